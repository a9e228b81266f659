//! How `up` and `run` are told to stop: the first signal ends what they look after in order, the second one at once. Unlike a
//! role they never just exit: namespaces, folders and processes would stay.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The two stages of a shutdown.
#[derive(Clone)]
pub struct Signals {
    /// Cancelled by the first SIGTERM, SIGINT or SIGHUP (the terminal was closed).
    pub stop: CancellationToken,
    /// Cancelled by the second signal.
    pub at_once: CancellationToken,
}

impl Signals {
    /// Installs the signal handlers.
    pub fn take() -> anyhow::Result<Self> {
        Self::listen(true)
    }

    /// Takes them over for a program that shares our terminal: Ctrl-C reaches that program by itself, and stops nothing here.
    pub fn beside_a_program() -> anyhow::Result<Self> {
        Self::listen(false)
    }

    fn listen(interrupt_stops: bool) -> anyhow::Result<Self> {
        let signals = Self { stop: CancellationToken::new(), at_once: CancellationToken::new() };
        let mut term = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut int = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        // nohup(1) starts programs with SIGHUP ignored, which is kept.
        let mut hup = if is_ignored(SignalKind::hangup()) {
            None
        } else {
            Some(signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?)
        };
        let told = signals.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = term.recv() => {}
                    _ = int.recv() => if !interrupt_stops { continue },
                    () = hang_up(hup.as_mut()) => {}
                }
                if told.stop.is_cancelled() {
                    told.at_once.cancel();
                } else {
                    told.stop.cancel();
                }
            }
        });
        Ok(signals)
    }
}

/// Waits for SIGHUP; never returns if it is ignored.
async fn hang_up(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => {
            let _ = signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether this process was started with a signal ignored (proc(5), `SigIgn`: a mask whose lowest bit is signal 1).
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (kind.as_raw_value() - 1) & 1 == 1)
}
