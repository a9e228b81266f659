//! Settings from files and flags: parsed into types that are always valid, with errors that name file, line, key and
//! fix.

mod file;
mod live;
mod values;
pub mod words;
pub mod yaml;

pub use file::{load, load_tree, read_file, read_stdin};
pub use live::{Live, MeshSettings, live};
pub use values::{Ttl, parse_mode};

/// An error that the user can fix: in a flag, a file, or the machine. Printed in one line; the exit code is 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mistake(pub String);

impl Mistake {
    /// An error in a flag.
    pub fn flag(flag: &str, why: &str) -> Self {
        Self(format!("{flag}: {why}"))
    }

    /// A required flag or key is missing.
    pub fn missing(flag: &str, key: &str) -> Self {
        Self(format!("{flag} is missing: give the flag, or `{key}` in the file of --config"))
    }
}

/// Fails unless the process runs as root, naming `what` needs it.
pub fn need_root(what: &str) -> Result<(), Mistake> {
    need_root_because(what, "it makes network namespaces and redirects")
}

/// [`need_root`] with another reason.
pub fn need_root_because(what: &str, why: &str) -> Result<(), Mistake> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Mistake(format!("{what} needs root: {why}; run it with sudo")))
}
