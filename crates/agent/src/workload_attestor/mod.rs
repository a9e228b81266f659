//! What can be proven about a caller, as selectors.

mod unix;

use countersign_identity::selector::SelectorSet;

use crate::peer::Process;

pub use unix::Unix;

/// One way to learn about a process.
pub trait WorkloadAttestor: Send + Sync {
    /// The selectors of a process whose identity as a process is certain.
    fn attest(&self, process: &Process) -> SelectorSet;
}
