//! What should be on disk and is not yet: a full or read-only disk costs nobody an identity. It is used from memory, said in
//! log, status and metrics, and written when that is possible again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use countersign_identity::{TrustDomain, X509Svid};

use crate::known::Kept;
use crate::store::{Store, StoreError};

/// The agent's folder, and what is still to be written there.
pub struct Keeper {
    store: Store,
    pending: Mutex<Pending>,
}

#[derive(Default)]
struct Pending {
    identity: Option<Arc<X509Svid>>,
    bundle: Option<Arc<Kept>>,
    why: Option<String>,
}

impl Keeper {
    /// Nothing is pending.
    pub fn new(store: Store) -> Self {
        Self { store, pending: Mutex::default() }
    }

    /// The identity of an earlier run.
    pub fn identity(&self) -> Option<X509Svid> {
        self.store.identity()
    }

    /// The bundle of an earlier run.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<Kept> {
        self.store.bundle(trust_domain)
    }

    /// Fails unless an identity could be written now.
    pub fn probe(&self) -> Result<(), StoreError> {
        self.store.probe()
    }

    /// Writes an identity, now or later.
    pub fn keep_identity(&self, svid: Arc<X509Svid>) {
        self.pending().identity = Some(svid);
        self.write_pending();
    }

    /// Writes a bundle, now or later.
    pub fn keep_bundle(&self, bundle: Arc<Kept>) {
        self.pending().bundle = Some(bundle);
        self.write_pending();
    }

    /// Tries to write what is pending; whether nothing is any more.
    pub fn write_pending(&self) -> bool {
        let mut pending = self.pending();
        let before = pending.why.take();
        match pending.write(&self.store) {
            Ok(()) if before.is_some() => tracing::info!("the agent's folder can be written again; all is kept now"),
            Ok(()) => {}
            Err(error) => {
                if before.is_none() {
                    tracing::error!(
                        %error,
                        "cannot keep the agent's identity or bundle on disk; they are used from memory and written later. Until then a restart falls back on what is on disk"
                    );
                }
                pending.why = Some(error.to_string());
            }
        }
        pending.why.is_none()
    }

    /// Why something is not on disk yet; `None` when everything is.
    pub fn unsaved(&self) -> Option<String> {
        self.pending().why.clone()
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn write(&mut self, store: &Store) -> Result<(), StoreError> {
        if let Some(svid) = &self.identity {
            store.put_identity(svid)?;
            self.identity = None;
        }
        if let Some(bundle) = &self.bundle {
            store.put_bundle(bundle)?;
            self.bundle = None;
        }
        Ok(())
    }
}
