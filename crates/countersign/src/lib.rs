//! The `countersign` command: parses the command line, runs one role or command, and reports an error in one line. A
//! library only for the binary and the fuzz targets.

/// Prints a line on standard error. Unlike the standard library's macro, it does not panic if standard error is closed
/// or full: there is nowhere left to report that.
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

/// Runs the command on the process's command line, or the CNI plugin if that is the program's name. Exit codes: 0 success, 1 the attempt failed, 2 the command line or a
/// file has to be corrected first, 141 the reader of standard output has closed it.
pub fn main() -> ExitCode {
    if let Some(code) = roles::cni::as_plugin() {
        return code;
    }
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
            // 2: the command or a file has to be corrected; 1: the attempt failed.
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let kubernetes = cause.downcast_ref::<kube::Error>();
        let cause = kubernetes.map_or_else(|| cause.to_string(), countersign_watch::in_words);
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        if kubernetes.is_some() {
            // What it comes from is in its words already.
            break;
        }
    }
    // Whatever text it quotes, the message stays one line of bounded length.
    const MOST: usize = 4_000;
    let line = settings::words::escaped(&text.replace('\n', " "));
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_the_api_server_is_told_in_words_and_once() {
        let status = serde_json::json!({ "message": "pods \"web\" is forbidden", "reason": "Forbidden", "code": 403 });
        let error = kube::Error::Api(serde_json::from_value(status).unwrap_or_default());
        let error = anyhow::Error::new(error).context("cannot list pods");
        assert_eq!(one_line(&error), "cannot list pods: pods \"web\" is forbidden");
    }
}
