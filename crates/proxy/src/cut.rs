//! Cuts an open connection from outside: a flag that its task checks whenever it runs, and a way to wake the task.

use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Context;

use futures::task::AtomicWaker;

use crate::copy::End;

const NOT: u8 = 0;
const REVOKED: u8 = 1;
const DRAINED: u8 = 2;

/// The cut of one connection. The default is not cut.
#[derive(Default)]
pub struct Cut {
    state: AtomicU8,
    waker: AtomicWaker,
}

impl Cut {
    /// Cuts the connection because the authority behind its peer was revoked.
    pub fn revoke(&self) {
        self.set(REVOKED);
    }

    /// Whether the connection was cut by [`Self::revoke`].
    pub fn is_revoked(&self) -> bool {
        self.state.load(Ordering::Acquire) == REVOKED
    }

    /// The revocation was of a peer that this connection has left. A drain stays.
    pub fn take_back_revocation(&self) {
        // A failure says that it was not revoked.
        let _ = self.state.compare_exchange(REVOKED, NOT, Ordering::AcqRel, Ordering::Acquire);
    }

    /// The drain is over.
    pub fn drain(&self) {
        self.set(DRAINED);
    }

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::Release);
        self.waker.wake();
    }

    /// How the connection must end, or `None` if it was not cut; wakes the task once it is.
    pub fn poll(&self, cx: &Context<'_>) -> Option<End> {
        // Registered before the load: a cut in between wakes the task.
        self.waker.register(cx.waker());
        match self.state.load(Ordering::Acquire) {
            NOT => None,
            REVOKED => Some(End::Revoked),
            _ => Some(End::Drained),
        }
    }
}
