//! The `countersign` binary: reads the command line, runs one role or command, and says in one line what went wrong.

mod capture;
mod cli;
mod clients;
mod kubernetes;
mod launch;
mod logging;
mod metrics_page;
mod operator;
mod probe;
mod roles;
mod settings;
mod shop;
mod stop;
mod up;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = cli::Cli::read();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            let usage = error.downcast_ref::<settings::Mistake>().is_some();
            eprintln!("countersign: {}", one_line(&error));
            // 2: somebody has to mend the command or a file; 1: it was tried and failed.
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.replace('\n', " ")
}
