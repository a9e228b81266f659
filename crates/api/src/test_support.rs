//! Helpers for tests of listeners.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the descriptor limit to what the system allows.
pub fn many_descriptors() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    }
    assert!(hard >= 4_096, "these tests need 4,096 descriptors, and the limit is {hard}");
}
