//! Logs of a role: to standard error, text or JSON.

use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::prelude::*;

use crate::settings::Mistake;

/// What is logged and how.
#[derive(Debug, Clone, clap::Args)]
pub struct LogArgs {
    /// What is logged: error, warn, info, debug, trace, or filters such as `info,countersign_proxy=debug`.
    #[arg(long, env = "COUNTERSIGN_LOG", default_value = "info", global = false)]
    pub log: String,
    /// How it is written: text or json.
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    pub log_format: String,
}

impl LogArgs {
    /// Starts logging.
    pub fn start(&self) -> Result<(), Mistake> {
        let filter =
            Targets::from_str(&self.log).map_err(|e| Mistake::flag("--log", &format!("`{}`: {e}", self.log)))?;
        let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
        let layer = if self.log_format == "json" { layer.json().boxed() } else { layer.boxed() };
        // A second start in one process (tests) keeps the first.
        let _ = tracing_subscriber::registry().with(layer.with_filter(filter)).try_init();
        Ok(())
    }
}
