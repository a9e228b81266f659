//! `countersign cni`: the CNI plugin, which container runtimes start by its file's name, `countersign-cni`.

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use countersign_cni::plugin::{NAME, VERSIONS, main};

/// Run the CNI plugin, as container runtimes do for each pod.
///
/// The plugin is a chained one: it comes behind the plugin that makes a pod's network, and has the redirect installed
/// in the pod's network namespace. `countersign cni-node` installs it on a node, as `countersign-cni`, and does the
/// work. It reads CNI's variables (`CNI_COMMAND`, …) and a network configuration on standard input.
#[derive(Debug, clap::Args)]
pub struct CniArgs {}

/// Runs the plugin if that is the name by which this program was started; `None` otherwise.
pub fn as_plugin() -> Option<ExitCode> {
    let name = std::env::args_os().next()?;
    (Path::new(&name).file_name() == Some(OsStr::new(NAME))).then(run)
}

/// Runs the plugin; without a runtime's variables it says what it is.
pub fn run() -> ExitCode {
    main().unwrap_or_else(|| {
        eprintln!(
            "CNI plugin {NAME} v{}; CNI versions {}. Container runtimes start it with CNI_COMMAND set; \
             `countersign cni-node` installs it on a node",
            env!("CARGO_PKG_VERSION"),
            VERSIONS.join(", ")
        );
        ExitCode::SUCCESS
    })
}
