//! Commands for Kubernetes: the manifests of an installation, and injection into files.

mod chart;
mod inject;
mod install;
mod uninstall;
mod values;

pub use inject::{InjectArgs, inject};
pub use install::{InstallArgs, install};
pub use uninstall::{UninstallArgs, uninstall};
