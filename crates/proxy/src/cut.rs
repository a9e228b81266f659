//! How an open connection is cut from outside: a flag that its task looks at whenever it runs, and a way to wake it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::task::Context;

use futures::task::AtomicWaker;

use crate::copy::End;

const NOT: u8 = 0;
const REVOKED: u8 = 1;
const DRAINED: u8 = 2;

/// One connection's cut.
#[derive(Default)]
pub struct Cut {
    state: AtomicU8,
    waker: AtomicWaker,
}

impl Cut {
    /// The authority behind the peer was revoked.
    pub fn revoke(&self) {
        self.set(REVOKED);
    }

    /// Whether the authority behind the peer was revoked.
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

    /// Whether it was cut, and how it is to end; wakes the task when it is.
    pub fn poll(&self, cx: &Context<'_>) -> Option<End> {
        // Registered before the look: a cut in between wakes the task.
        self.waker.register(cx.waker());
        match self.state.load(Ordering::Acquire) {
            NOT => None,
            REVOKED => Some(End::Revoked),
            _ => Some(End::Drained),
        }
    }
}
