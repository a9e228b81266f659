//! Commands for Kubernetes: manifests of an installation, injection into files, and inspection of a running mesh.

mod chart;
mod check;
mod cluster;
mod exceptions;
mod explain;
mod inject;
mod install;
mod pod_source;
mod sidecars;
mod strict;
mod uninstall;
mod values;
mod verify;

#[cfg(fuzzing)]
pub use sidecars::texts as sidecar_texts;

pub use check::{CheckArgs, check};
pub use explain::{ExplainArgs, explain};
pub use inject::{InjectArgs, inject};
pub use install::{InstallArgs, install};
pub use strict::{StrictArgs, strict};
pub use uninstall::{UninstallArgs, uninstall};
pub use verify::{VerifyArgs, verify};
