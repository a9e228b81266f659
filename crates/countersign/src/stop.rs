//! Stop signals of a role, and its ready file.

use std::path::PathBuf;

use anyhow::Context;
use countersign_api::files::write_atomically;
use countersign_api::reopen::{self, Reopen};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// For commands at a terminal: cancelled by SIGTERM, SIGINT, or SIGHUP (the terminal was closed). A second signal ends
/// the process at once.
pub fn on_signal() -> anyhow::Result<CancellationToken> {
    let hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    stop_on(Some(hangup))
}

/// For roles: cancelled by SIGTERM or SIGINT; a second one ends the process at once. SIGHUP requests that logs are
/// reopened (logrotate sends it after renaming them) and never ends a role.
pub fn for_role() -> anyhow::Result<(CancellationToken, Reopen)> {
    let mut hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    let (reopener, reopen) = reopen::channel();
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            tracing::info!("SIGHUP: opening the logs anew");
            reopener.ask();
        }
    });
    Ok((stop_on(None)?, reopen))
}

fn stop_on(mut hangup: Option<Signal>) -> anyhow::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let stop = token.clone();
    tokio::spawn(async move {
        for round in 0.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                () = hung_up(hangup.as_mut()) => {}
            }
            if round > 0 {
                std::process::exit(130);
            }
            tracing::info!("stopping; once more to stop at once");
            stop.cancel();
        }
    });
    Ok(token)
}

/// Resolves at SIGHUP; never if SIGHUP has another meaning.
async fn hung_up(hangup: Option<&mut Signal>) {
    match hangup {
        Some(hangup) => drop(hangup.recv().await),
        None => std::future::pending().await,
    }
}

/// The argument for a file that tells a supervisor that a role is ready.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ReadyFile {
    /// Write this file once ready; it contains the listening address, if there is one.
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

impl ReadyFile {
    /// Writes the file, if one was given.
    pub fn write(&self, content: &str) {
        if let Some(path) = &self.ready_file
            && let Err(error) = write_atomically(path, format!("{content}\n").as_bytes(), 0o644)
        {
            tracing::error!(path = %path.display(), %error, "cannot write the ready file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, raise};
    use std::time::Duration;

    /// One test, because signals reach the whole process: a second test would receive them, too.
    #[tokio::test]
    async fn sighup_opens_a_roles_logs_anew_and_ends_a_command() {
        let within = Duration::from_secs(5);
        let (stop, mut reopen) = for_role().unwrap();
        for _ in 0..3 {
            raise(Signal::SIGHUP).unwrap();
            tokio::time::timeout(within, reopen.asked()).await.unwrap();
        }
        assert!(!stop.is_cancelled());
        let command = on_signal().unwrap();
        raise(Signal::SIGHUP).unwrap();
        tokio::time::timeout(within, command.cancelled()).await.unwrap();
        assert!(!stop.is_cancelled());
    }
}
