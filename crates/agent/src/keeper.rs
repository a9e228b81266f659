//! Writes the agent's identity and bundle to disk, now or later. A full or read-only disk does not take an identity
//! away: it is used from memory, reported in log, status and metrics, and written once that is possible.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use countersign_identity::{TrustDomain, X509Svid};

use crate::known::Kept;
use crate::store::{Store, StoreError};

/// The agent's folder, and what still has to be written to it.
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
    /// Nothing pending; `store` is the agent's folder.
    pub fn new(store: Store) -> Self {
        Self { store, pending: Mutex::default() }
    }

    /// The identity of an earlier run; `None` if there is none or it cannot be used.
    pub fn identity(&self) -> Option<X509Svid> {
        self.store.identity()
    }

    /// The bundle of an earlier run.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<Kept> {
        self.store.bundle(trust_domain)
    }

    /// Checks whether an identity could be written now. Errors: it could not.
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

    /// Tries to write what is pending; returns whether nothing is left.
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

    /// Why something is not on disk yet; `None` if everything is.
    pub fn unsaved(&self) -> Option<String> {
        self.pending().why.clone()
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pending {
    fn write(&mut self, store: &Store) -> Result<(), StoreError> {
        // The identity first: a bundle can be fetched again, but an identity from a join token cannot.
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
