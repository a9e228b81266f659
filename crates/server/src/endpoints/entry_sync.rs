//! SyncAuthorizedEntries: sends every entry's revision; the agent then requests those that it holds in another
//! revision.

use std::collections::HashMap;
use std::sync::Arc;

use countersign_api::convert::entry_to_wire;
use countersign_api::spire::entry::{EntryRevision, SyncAuthorizedEntriesRequest, SyncAuthorizedEntriesResponse};
use countersign_api::spire::types;
use countersign_identity::Entry;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::masks;

/// Most entries per message.
const PAGE: usize = 500;
/// Most revisions per message.
const REVISIONS_PAGE: usize = PAGE * 10;

/// The exchange with one agent.
pub struct Sync {
    /// Entries that the agent may serve.
    pub entries: Vec<Arc<Entry>>,
    /// Fields that the agent requested; `None` means all.
    pub mask: Option<types::EntryMask>,
    /// Sends responses to the agent.
    pub tx: mpsc::Sender<Result<SyncAuthorizedEntriesResponse, Status>>,
}

/// The agent has disconnected.
struct Gone;

impl Sync {
    /// Runs until the agent has all that it requests, or disconnects.
    pub async fn run(self, mut requests: Streaming<SyncAuthorizedEntriesRequest>) {
        // A disconnected agent ends the exchange like any other end.
        let _ = self.talk(&mut requests).await;
    }

    async fn talk(&self, requests: &mut Streaming<SyncAuthorizedEntriesRequest>) -> Result<(), Gone> {
        if self.entries.len() <= PAGE {
            return self.send_entries(&self.entries.iter().collect::<Vec<_>>(), false).await;
        }
        let mut pages = self.entries.chunks(REVISIONS_PAGE).peekable();
        while let Some(page) = pages.next() {
            let revision = |e: &Arc<Entry>| EntryRevision {
                id: e.id.to_string(),
                revision_number: e.revision,
                created_at: e.created_at.unix_timestamp(),
            };
            let entry_revisions = page.iter().map(revision).collect();
            self.send(SyncAuthorizedEntriesResponse { entry_revisions, entries: vec![], more: pages.peek().is_some() })
                .await?;
        }
        let by_id: HashMap<&str, _> = self.entries.iter().map(|e| (e.id.as_str(), e)).collect();
        while let Ok(Some(wanted)) = requests.message().await {
            let found: Vec<_> = wanted.ids.iter().filter_map(|id| by_id.get(id.as_str()).copied()).collect();
            let mut pages = found.chunks(PAGE).peekable();
            if pages.peek().is_none() {
                self.send_entries(&[], false).await?;
            }
            while let Some(page) = pages.next() {
                self.send_entries(page, pages.peek().is_some()).await?;
            }
        }
        Ok(())
    }

    async fn send_entries(&self, entries: &[&Arc<Entry>], more: bool) -> Result<(), Gone> {
        let entries = entries.iter().map(|e| masks::entry(entry_to_wire(e), self.mask)).collect();
        self.send(SyncAuthorizedEntriesResponse { entry_revisions: vec![], entries, more }).await
    }

    async fn send(&self, message: SyncAuthorizedEntriesResponse) -> Result<(), Gone> {
        self.tx.send(Ok(message)).await.map_err(|_| Gone)
    }
}
