//! Logs of a role: to standard error, text or JSON.

use std::io::IsTerminal;
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

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
        let filter = EnvFilter::from_str(&self.log).map_err(|e| Mistake::flag("--log", &format!("`{}`: {e}", self.log)))?;
        let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
        // A second start in one process (tests) keeps the first.
        let _ = if self.log_format == "json" { builder.json().try_init() } else { builder.try_init() };
        Ok(())
    }
}
