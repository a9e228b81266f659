//! What tests of listeners need.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Opens as many files as the system lets a test.
pub fn many_descriptors() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    }
    assert!(hard >= 4_096, "these tests need 4,096 descriptors, and the limit is {hard}");
}
