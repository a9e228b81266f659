//! What the plugin prints: results and errors (CNI specification 1.1.0, section 5), and its exit code.

use std::io::{self, Write};
use std::process::ExitCode;

use countersign_identity::shown::{sentence, shown_up_to};
use serde_json::{Value, json};

use super::{NAME, VERSIONS};

/// Longest text of an error, in characters.
const MAX_MESSAGE: usize = 1_000;

/// Why the plugin fails: a code of the specification, and words.
#[derive(Debug, PartialEq, Eq)]
pub struct PluginError {
    code: u32,
    message: String,
}

impl PluginError {
    /// An error with this code.
    pub fn new(code: u32, message: &str) -> Self {
        Self { code, message: sentence(message, MAX_MESSAGE).to_string() }
    }

    /// A variable is missing or wrong (4).
    pub fn environment(message: &str) -> Self {
        Self::new(4, message)
    }

    /// Reading or opening failed (5).
    pub fn io(what: &str, error: &io::Error) -> Self {
        Self::new(5, &format!("{what}: {error}"))
    }

    /// The configuration is no JSON, or not of its form (6).
    pub fn undecodable(error: &serde_json::Error) -> Self {
        Self::new(6, &format!("the configuration cannot be read: {}", shown_up_to(&error.to_string(), MAX_MESSAGE)))
    }

    /// The configuration is wrong (7).
    pub fn config(message: &str) -> Self {
        Self::new(7, message)
    }

    /// The redirect could not be installed, or is not in force (100, the first code of plugins' own).
    pub fn redirect(message: &str) -> Self {
        Self::new(100, message)
    }
}

/// The end of a run.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// JSON for standard output; nothing where the command has no result.
    pub output: Option<Value>,
    /// A line for standard error, which runtimes log.
    pub warning: Option<String>,
    /// Whether the command succeeded.
    pub success: bool,
}

impl Outcome {
    pub(super) fn silent() -> Self {
        Self { output: None, warning: None, success: true }
    }

    pub(super) fn warned(warning: Option<String>) -> Self {
        Self { warning, ..Self::silent() }
    }

    pub(super) fn result(result: &Value, warning: Option<String>) -> Self {
        Self { output: Some(result.clone()), warning, success: true }
    }

    pub(super) fn versions(version: &str) -> Self {
        Self::result(&json!({ "cniVersion": version, "supportedVersions": VERSIONS }), None)
    }

    pub(super) fn failed(version: &str, PluginError { code, message }: PluginError) -> Self {
        let output = json!({ "cniVersion": version, "code": code, "msg": message });
        Self { output: Some(output), warning: None, success: false }
    }

    /// Writes it to the process's standard output and error.
    pub(super) fn print(&self) -> ExitCode {
        if let Some(warning) = &self.warning {
            // Nobody may read it.
            let _ = writeln!(io::stderr(), "{NAME}: {warning}");
        }
        let written = self.output.as_ref().map_or(Ok(()), |output| writeln!(io::stdout(), "{output}"));
        if self.success && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}
