//! A store for tests whose commits are made and not acknowledged until somebody says so.

use std::sync::Arc;

use async_trait::async_trait;
use countersign_identity::{Entry, EntryId, SpiffeId, TrustBundle, TrustDomain};
use time::OffsetDateTime;
use tokio::sync::watch;

use super::{DataStore, DataStoreError, JoinToken, Version, Versioned, Written};
use crate::agents::AttestedAgent;
use crate::authority::StoredJournal;
use crate::federation::relationship::Relationship;

/// As the store below, which answers a change only while it is not held.
pub struct Held {
    below: Arc<dyn DataStore>,
    closed: watch::Sender<bool>,
    waiting: watch::Sender<bool>,
}

impl Held {
    /// Answers at once, to begin with.
    pub fn new(below: Arc<dyn DataStore>) -> Self {
        Self { below, closed: watch::Sender::new(false), waiting: watch::Sender::new(false) }
    }

    /// Lets a future come to its commit, and drops it there.
    pub async fn drop_at_commit(&self, call: impl Future) {
        self.closed.send_replace(true);
        self.waiting.send_replace(false);
        let mut waiting = self.waiting.subscribe();
        tokio::select! {
            _ = call => panic!("it ended without a commit"),
            committed = waiting.wait_for(|w| *w) => drop(committed.unwrap()),
        }
        self.closed.send_replace(false);
    }

    /// Passes on what the store below has done.
    async fn answer<T>(&self, done: T) -> T {
        if *self.closed.borrow() {
            self.waiting.send_replace(true);
        }
        drop(self.closed.subscribe().wait_for(|held| !held).await.unwrap());
        done
    }
}

#[async_trait]
impl DataStore for Held {
    async fn entries(&self) -> Result<Vec<Versioned<Entry>>, DataStoreError> {
        self.below.entries().await
    }

    async fn entry(&self, id: &EntryId) -> Result<Option<Versioned<Entry>>, DataStoreError> {
        self.below.entry(id).await
    }

    async fn put_entries(&self, entries: &[(Entry, Option<Version>)]) -> Result<Written, DataStoreError> {
        self.answer(self.below.put_entries(entries).await).await
    }

    async fn delete_entries(&self, ids: &[EntryId]) -> Result<(), DataStoreError> {
        self.answer(self.below.delete_entries(ids).await).await
    }

    async fn agents(&self) -> Result<Vec<Versioned<AttestedAgent>>, DataStoreError> {
        self.below.agents().await
    }

    async fn agent(&self, id: &SpiffeId) -> Result<Option<Versioned<AttestedAgent>>, DataStoreError> {
        self.below.agent(id).await
    }

    async fn put_agent(&self, agent: &AttestedAgent, from: Option<Version>) -> Result<Written, DataStoreError> {
        self.answer(self.below.put_agent(agent, from).await).await
    }

    async fn delete_agent(&self, id: &SpiffeId) -> Result<(), DataStoreError> {
        self.answer(self.below.delete_agent(id).await).await
    }

    async fn put_token(&self, token: &JoinToken, now: OffsetDateTime) -> Result<(), DataStoreError> {
        self.below.put_token(token, now).await
    }

    async fn take_token(&self, token: &str) -> Result<Option<JoinToken>, DataStoreError> {
        self.below.take_token(token).await
    }

    async fn bundles(&self) -> Result<Vec<Versioned<TrustBundle>>, DataStoreError> {
        self.below.bundles().await
    }

    async fn put_bundle(&self, bundle: &TrustBundle, from: Option<Version>) -> Result<Written, DataStoreError> {
        self.answer(self.below.put_bundle(bundle, from).await).await
    }

    async fn delete_bundle(&self, trust_domain: &str) -> Result<(), DataStoreError> {
        self.answer(self.below.delete_bundle(trust_domain).await).await
    }

    async fn relationships(&self) -> Result<Vec<Versioned<Relationship>>, DataStoreError> {
        self.below.relationships().await
    }

    async fn put_relationship(
        &self,
        relationship: &Relationship,
        from: Option<Version>,
        bundle: Option<(&TrustBundle, Option<Version>)>,
    ) -> Result<Written, DataStoreError> {
        self.answer(self.below.put_relationship(relationship, from, bundle).await).await
    }

    async fn delete_relationship(&self, trust_domain: &TrustDomain) -> Result<(), DataStoreError> {
        self.answer(self.below.delete_relationship(trust_domain).await).await
    }

    async fn authorities(&self) -> Result<Versioned<StoredJournal>, DataStoreError> {
        self.below.authorities().await
    }

    async fn put_authorities(
        &self,
        journal: &StoredJournal,
        bundle: &TrustBundle,
        from: Version,
    ) -> Result<Written, DataStoreError> {
        self.answer(self.below.put_authorities(journal, bundle, from).await).await
    }
}
