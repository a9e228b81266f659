//! Settings from files and flags: parsed into types that cannot be wrong, with errors that name file, line, key and mend.

mod file;
mod live;
mod values;
pub mod words;
pub mod yaml;

pub use file::{load, load_tree, read_file};
pub use live::{Live, MeshSettings, live};
pub use values::{Ttl, parse_mode};

/// A mistake that somebody can mend: in a flag, a file, or the machine. Shown in one line; the exit code is 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Mistake(pub String);

impl Mistake {
    /// In a flag.
    pub fn flag(flag: &str, why: &str) -> Self {
        Self(format!("{flag}: {why}"))
    }

    /// A flag or key that is needed.
    pub fn missing(flag: &str, key: &str) -> Self {
        Self(format!("{flag} is missing: give the flag, or `{key}` in the file of --config"))
    }
}

/// Whether we are root; what needs it says so here.
pub fn need_root(what: &str) -> Result<(), Mistake> {
    need_root_because(what, "it makes network namespaces and redirects")
}

/// The same, with another reason.
pub fn need_root_because(what: &str, why: &str) -> Result<(), Mistake> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Mistake(format!("{what} needs root: {why}; run it with sudo")))
}
