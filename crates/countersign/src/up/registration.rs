//! Registration entries of a mesh's workloads: made before anything of a workload runs, deleted when it has left.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use countersign_api::backoff::Backoff;
use countersign_api::convert::{id_to_wire, selectors_to_wire};
use countersign_api::spire::types;
use countersign_identity::{Selector, SpiffeId};
use tokio::task::JoinSet;

use super::mesh_file::WorkloadSpec;
use super::numbers::Numbers;
use crate::clients::Asking;
use crate::operator;

/// How long the server may take to delete entries.
const DELETE: Duration = Duration::from_secs(5);

/// The entries of one mesh.
pub struct Registration {
    /// Unix socket of the server.
    server: PathBuf,
    /// Alias of the mesh's node, below which all entries are.
    parent: SpiffeId,
    numbers: Numbers,
    /// Entries made so far; each gets a name of its own.
    made: AtomicU64,
    /// Entries that the server could not delete yet.
    deleting: Mutex<JoinSet<()>>,
}

impl Registration {
    /// Entries below `parent`; `numbers` are given back when a workload's entries are gone.
    pub fn new(server: PathBuf, parent: SpiffeId, numbers: Numbers) -> Self {
        Self { server, parent, numbers, made: AtomicU64::default(), deleting: Mutex::default() }
    }

    /// The name of the next entry of a workload. It is known before the entry is asked for: an answer that is lost leaves
    /// an entry behind.
    pub fn next_id(&self, workload: &str) -> String {
        format!("{workload}-{}", self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// Registers a workload's identity for the processes of one user.
    ///
    /// # Errors
    /// The server does not answer, or rejects the entry.
    pub async fn register(&self, spec: &WorkloadSpec, id: &SpiffeId, uid: u32, entry_id: String) -> Result<()> {
        let entry = types::Entry {
            id: entry_id,
            spiffe_id: Some(id_to_wire(id)),
            parent_id: Some(id_to_wire(&self.parent)),
            selectors: selectors_to_wire([&Selector::new("unix", format!("uid:{uid}"))?]),
            dns_names: vec![spec.name.clone()],
            ..types::Entry::default()
        };
        let created = operator::entry::create(self.channel(), entry).await;
        created.map(|_| ()).with_context(|| format!("cannot register {}", spec.name))
    }

    /// Deletes a workload's entries and gives its number back. A server that does not answer now is asked again until it
    /// does, and the number is kept meanwhile: by it, the next workload would be handed the identity of this one.
    pub async fn forget(&self, name: &str, number: usize, entry_ids: Vec<String>) {
        let first = delete(self.channel(), &entry_ids).await;
        let Err(error) = first else { return self.numbers.release(number) };
        tracing::warn!(name, %error, "cannot delete the registration entry; trying again");
        let (channel, numbers) = (self.channel(), self.numbers.clone());
        let mut deleting = self.deleting.lock().unwrap_or_else(PoisonError::into_inner);
        while deleting.try_join_next().is_some() {}
        deleting.spawn(async move {
            let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
            while delete(channel.clone(), &entry_ids).await.is_err() {
                tokio::time::sleep(backoff.next_delay()).await;
            }
            numbers.release(number);
        });
    }

    /// Gives up on entries that are not deleted yet: the server ends too.
    pub fn stop(&self) {
        self.deleting.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }

    fn channel(&self) -> Asking {
        Asking::at(&self.server, "server")
    }
}

/// Deletes entries; those that are not there are deleted.
async fn delete(channel: Asking, ids: &[String]) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    tokio::time::timeout(DELETE, operator::entry::delete_if_there(channel, ids.to_vec()))
        .await
        .context("the server does not answer")?
}
