//! How a role is told to stop, and how it says that it is ready.

use std::path::PathBuf;

use anyhow::Context;
use countersign_api::files::write_atomically;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancelled by SIGTERM or SIGINT; a second one ends the process at once.
pub fn on_signal() -> anyhow::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let stop = token.clone();
    tokio::spawn(async move {
        for round in 0.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
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

/// A file that tells a supervisor that a role is ready, and where.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ReadyFile {
    /// Write a file once ready; it holds the address, where there is one.
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

impl ReadyFile {
    /// Writes it.
    pub fn write(&self, content: &str) {
        if let Some(path) = &self.ready_file
            && let Err(error) = write_atomically(path, format!("{content}\n").as_bytes(), 0o644)
        {
            tracing::error!(path = %path.display(), %error, "cannot write the ready file");
        }
    }
}
