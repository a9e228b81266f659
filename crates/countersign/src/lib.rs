//! The `countersign` command: reads the command line, runs one role or command, and says in one line what went wrong. A
//! library only for the binary and the fuzz targets.

/// Says a line on standard error. When that is closed or full there is nobody left to tell, and no reason to panic, which is
/// what the macro of the standard library does.
macro_rules! eprintln {
    ($($arg:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($arg)*)));
    }};
}

mod capture;
mod cli;
mod clients;
#[cfg(fuzzing)]
pub mod fuzzing;
mod kubernetes;
mod launch;
mod logging;
mod metrics_page;
mod operator;
mod probe;
mod reference;
mod roles;
mod settings;
mod shop;
mod stdout;
mod stop;
mod up;

use std::process::ExitCode;

/// Runs the command that the process's command line names. Exit codes: 0 done, 1 it was tried and failed, 2 the command line
/// or a file has to be corrected first, 141 the reader of standard output was gone.
pub fn main() -> ExitCode {
    let cli = cli::Cli::read();
    let ran = cli.run();
    logging::finish();
    match ran {
        Ok(code) => code,
        Err(error) => {
            if let Some(stdout::StdoutError::Closed) = error.downcast_ref() {
                return ExitCode::from(stdout::CLOSED_EXIT_CODE);
            }
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
    // Whatever was quoted in it, a line stays a line, and its length has an end.
    const MOST: usize = 4_000;
    let line = settings::words::escaped(&text.replace('\n', " "));
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
