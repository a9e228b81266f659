//! The long-running roles: flags and file become a role's config, and the role runs until it is told to stop.

pub mod agent;
pub mod controller;
pub mod proxy;
pub mod redirect;
pub mod server;
pub mod sidecar_hook;

use std::path::PathBuf;

/// Takes each field from the flags, else from the file.
macro_rules! merge {
    ($flags:expr, $file:expr, { $($field:ident),* $(,)? }) => {{
        let (flags, file) = ($flags, $file);
        Self { $($field: flags.$field.or(file.$field)),* }
    }};
}
pub(crate) use merge;

/// The settings file of a role.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ConfigFile {
    /// YAML file with settings; flags win over it. Keys are the flags' names with `_` for `-`.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ConfigFile {
    /// Reads it, if there is one.
    pub fn load<T: serde::de::DeserializeOwned + Default>(&self) -> Result<T, crate::settings::Mistake> {
        match &self.config {
            Some(path) => crate::settings::load(path).map(|(settings, _)| settings),
            None => Ok(T::default()),
        }
    }
}

/// Lets nobody else read what a role writes, unless the role says so: keys, databases and sockets begin as 0600.
pub fn write_privately() {
    use nix::sys::stat::{Mode, umask};
    umask(Mode::S_IRWXG | Mode::S_IRWXO);
}

/// A runtime for roles that serve many callers.
pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    raise_file_limit();
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

/// Opens as many files as the system lets us: each connection is one or two.
pub fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!(%error, soft, hard, "cannot raise the limit of open files");
    }
}
