//! The long-running roles: converts flags and settings file to a role's config, and runs the role until it is stopped.

pub mod agent;
pub mod cni;
pub mod cni_node;
pub mod controller;
pub mod csi;
pub mod proxy;
pub mod redirect;
pub mod resources;
pub mod server;
pub mod sidecar_hook;

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::logging::LogArgs;
use crate::settings::Mistake;
use crate::stop::ReadyFile;

/// Takes each field from the flags, otherwise from the file.
macro_rules! merge {
    ($flags:expr, $file:expr, { $($field:ident),* $(,)? }) => {{
        let (flags, file) = ($flags, $file);
        Self { $($field: flags.$field.or(file.$field)),* }
    }};
}
pub(crate) use merge;

/// The argument for the settings file of a role.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigFile {
    /// YAML file with settings. Keys are the flags' names with `_` for `-`; flags override the file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigFile {
    /// Reads the file, if one was given; otherwise returns the defaults.
    pub fn load<T: serde::de::DeserializeOwned + Default>(&self) -> Result<T, crate::settings::Mistake> {
        match &self.config {
            Some(path) => crate::settings::load(path).map(|(settings, _)| settings),
            None => Ok(T::default()),
        }
    }
}

/// The arguments of a role without a settings file by which a supervisor follows it.
#[derive(Debug, Clone, clap::Args)]
pub struct SupervisorArgs {
    /// Serve /metrics, /ready and /live on this address [default: off].
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
    /// Where it says that it is ready.
    #[command(flatten)]
    pub ready: ReadyFile,
    /// What it logs.
    #[command(flatten)]
    pub log: LogArgs,
}

/// An address `HOST:PORT`, as this flag has it.
fn address(flag: &str, text: String) -> Result<String, Mistake> {
    if countersign_api::names::split(&text).is_none() {
        return Err(Mistake::flag(flag, &format!("`{text}` is no address: write host:port, as in 10.0.0.1:8081")));
    }
    Ok(text)
}

/// Sets the umask so that files of a role are private unless it decides otherwise: keys, databases and sockets start as
/// 0600.
pub fn write_privately() {
    use nix::sys::stat::{Mode, umask};
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
}

/// Keeps others of the same user from this process's memory, which holds private keys: no ptrace(2), and no core file.
pub fn hide_memory() {
    if let Err(error) = nix::sys::prctl::set_dumpable(false) {
        tracing::warn!(%error, "other processes of this user can read this one's memory");
    }
}

/// A runtime with two threads, for roles that serve many callers.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    raise_file_limit();
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// Raises the limit of open files to the maximum: each connection takes one or two.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "cannot raise the limit of open files");
    }
}
