//! Commands for Kubernetes: manifests of an installation, injection into files, and inspection of a running mesh.

mod absent;
mod api_server;
mod changes;
mod chart;
mod check;
mod cluster;
mod csi_volumes;
mod exceptions;
mod existing;
mod explain;
mod former;
mod given;
mod inject;
mod injects;
mod install;
mod leftovers;
mod limits;
mod live_settings;
mod memory;
mod named_args;
mod namespaces;
mod pod_source;
mod pod_state;
mod redirects;
mod schema;
mod sidecars;
mod strict;
mod support;
mod transparency;
mod uninstall;
mod values;
mod verify;
mod without;

#[cfg(fuzzing)]
pub use sidecars::texts as sidecar_texts;

pub use check::{CheckArgs, check};
pub use explain::{ExplainArgs, explain};
pub use inject::{InjectArgs, inject};
pub use install::{InstallArgs, install};
pub use strict::{StrictArgs, strict};
pub use support::{SupportArgs, support};
pub use uninstall::{UninstallArgs, uninstall};
pub use verify::{VerifyArgs, verify};
