//! Logs of a role, on standard error, as text or JSON. No role waits for the reader of its log.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use countersign_api::log_levels::LogLevels;
use countersign_api::log_writer::{LogWriter, Sink};
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;
use tracing_subscriber::{fmt, reload};

use crate::settings::Mistake;

/// How long the process waits for its last lines to be written when it ends.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The process's log, once started.
static LOG: OnceLock<LogWriter> = OnceLock::new();
/// Number of lost lines that were already reported.
static TOLD: AtomicU64 = AtomicU64::new(0);

/// Arguments for the log of a role.
#[derive(Debug, Clone, clap::Args)]
pub struct LogArgs {
    /// Log level (error, warn, info, debug, trace) or filters such as `info,countersign_proxy=debug`.
    #[arg(long, env = "COUNTERSIGN_LOG", default_value = "info", global = false)]
    pub log: String,
    /// Log format: text or json.
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    pub log_format: String,
}

impl LogArgs {
    /// Starts logging. Errors: the filter is invalid.
    pub fn start(&self) -> Result<LogLevels, Mistake> {
        let filter =
            Targets::from_str(&self.log).map_err(|e| Mistake::flag("--log", &format!("`{}`: {e}", self.log)))?;
        // Our own watches say the same in one line of words; this logs the whole structure of an answer.
        let filter = if self.log.contains("kube_runtime") {
            filter
        } else {
            filter.with_target("kube_runtime::watcher", LevelFilter::ERROR)
        };
        if LOG.get().is_none()
            && let Ok(log) = stderr().and_then(|file| LogWriter::start(Sink::Stream(file), Duration::ZERO))
        {
            // A second start in one process (tests) keeps the first log.
            let _ = LOG.set(log);
        }
        // What fails is a write to standard error; to say so there is the macro that panics when nobody reads any more.
        let layer = fmt::layer().log_internal_errors(false).with_writer(|| Line).with_ansi(io::stderr().is_terminal());
        let layer = if self.log_format == "json" { layer.json().boxed() } else { layer.boxed() };
        let launch = filter.clone();
        let (filter, handle) = reload::Layer::new(filter);
        // The same holds for a second start here.
        let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
        let started_with = own_level(&launch);
        Ok(LogLevels::new(started_with, move |level| {
            let filter = level.map_or_else(|| launch.clone(), |level| changed(&launch, level));
            handle.reload(filter).map_err(|e| e.to_string())
        }))
    }
}

/// The most detailed level of our own lines under a filter.
fn own_level(filter: &Targets) -> Level {
    let levels = [Level::TRACE, Level::DEBUG, Level::INFO, Level::WARN, Level::ERROR];
    let shown = levels.into_iter().find(|level| filter.would_enable("countersign", level));
    shown.unwrap_or(Level::ERROR)
}

/// A filter with another level. Libraries never say more than at the start: in detail they log what they send.
fn changed(launch: &Targets, level: Level) -> Targets {
    let libraries = launch.default_level().unwrap_or(LevelFilter::OFF).min(LevelFilter::from_level(level));
    Targets::new()
        .with_default(libraries)
        .with_target("kube_runtime::watcher", LevelFilter::ERROR)
        .with_target("countersign", level)
}

/// Waits, for a bounded time, until everything logged was written. Called when the process ends.
pub fn finish() {
    if let Some(log) = LOG.get() {
        log.finish(LAST_LINES);
    }
}

fn stderr() -> io::Result<File> {
    Ok(File::from(io::stderr().as_fd().try_clone_to_owned()?))
}

/// One line of the log, which the layer writes with one call.
struct Line;

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let Some(log) = LOG.get() else { return io::stderr().write(line) };
        let lost = log.lost();
        if TOLD.swap(lost, Ordering::Relaxed) < lost {
            log.line(|held| writeln!(held, "{lost} log lines were lost since the start: they were not read in time"));
        }
        log.line(|held| {
            held.extend_from_slice(line);
            Ok::<_, Infallible>(())
        });
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
