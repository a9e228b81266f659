//! `countersign logger`: how much a running server logs.

use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use countersign_api::spire::logger::logger_client::LoggerClient;
use countersign_api::spire::logger::{GetLoggerRequest, ResetLogLevelRequest, SetLogLevelRequest};
use countersign_api::spire::types::{self, LogLevel};
use serde_json::json;

use super::output::{Output, Table};
use crate::clients::{ServerArg, client, refused};

/// Show and change how much a running server logs.
#[derive(Subcommand)]
pub enum LoggerCommand {
    /// Show the level of now, and that of the start.
    Get {
        #[command(flatten)]
        server: ServerArg,
        #[command(flatten)]
        output: Output,
    },
    /// Log in this detail from now on, until the next start.
    Set {
        #[command(flatten)]
        server: ServerArg,
        /// Least severe lines to log.
        #[arg(long, value_enum)]
        level: Level,
        #[command(flatten)]
        output: Output,
    },
    /// Log as at the start again.
    Reset {
        #[command(flatten)]
        server: ServerArg,
        #[command(flatten)]
        output: Output,
    },
}

/// A level of logging.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// What has failed.
    Error,
    /// Also what may lead to a failure.
    Warn,
    /// Also what happened.
    Info,
    /// Also why it happened.
    Debug,
    /// Also each step on the way.
    Trace,
}

impl From<Level> for LogLevel {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::Error,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
            Level::Trace => Self::Trace,
        }
    }
}

fn print(output: &Output, logger: types::Logger) -> Result<()> {
    let name = |level: LogLevel| level.as_str_name().to_lowercase();
    let (now, launch) = (name(logger.current_level()), name(logger.launch_level()));
    let table = Table::facts([("level".into(), now.clone()), ("at the start".into(), launch.clone())]);
    Ok(output.print(&table, &json!({ "level": now, "launch_level": launch }))?)
}

/// Runs a subcommand and prints its result.
pub async fn run(command: LoggerCommand) -> Result<()> {
    match command {
        LoggerCommand::Get { server, output } => {
            let logger = client!(LoggerClient, server.channel()?).get_logger(GetLoggerRequest {}).await;
            print(&output, logger.map_err(refused)?.into_inner())
        }
        LoggerCommand::Set { server, level, output } => {
            let request = SetLogLevelRequest { new_level: LogLevel::from(level).into() };
            let logger = client!(LoggerClient, server.channel()?).set_log_level(request).await;
            print(&output, logger.map_err(refused)?.into_inner())
        }
        LoggerCommand::Reset { server, output } => {
            let logger = client!(LoggerClient, server.channel()?).reset_log_level(ResetLogLevelRequest {}).await;
            print(&output, logger.map_err(refused)?.into_inner())
        }
    }
}
