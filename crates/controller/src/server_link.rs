//! Calls to the server over its Unix socket: registration entries and the directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use countersign_api::portions::portions;
use countersign_api::push::directory_client::DirectoryClient;
use countersign_api::push::{PublishRequest, Service, Workload};
use countersign_api::spire::entry::entry_client::EntryClient;
use countersign_api::spire::entry::{
    BatchCreateEntryRequest, BatchDeleteEntryRequest, BatchUpdateEntryRequest, ListEntriesRequest,
};
use countersign_api::spire::types::{Entry, Status};
use countersign_api::transport::{MAX_MESSAGE_BYTES, unix_channel};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// Most entries per call.
const BATCH: usize = 200;
/// Longest call to the server.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The connection to a server. Clones share it.
#[derive(Clone)]
pub struct ServerLink {
    socket: PathBuf,
    channel: Channel,
}

/// What became of one item of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// gRPC status code; 0 is success.
    pub code: i32,
    /// Message of the status, for people.
    pub message: String,
    /// The ID of the entry that the answer shows.
    pub entry: Option<String>,
}

impl Done {
    fn of(status: Option<Status>, entry: Option<String>) -> Self {
        let status = status.unwrap_or_default();
        Self { code: status.code, message: status.message, entry }
    }
}

/// What became of a list that was sent in batches.
#[derive(Debug, Default)]
pub struct Answers {
    /// One answer for each item, in order; `None`: its call has failed.
    pub done: Vec<Option<Done>>,
    /// The calls that have failed.
    pub failed: Vec<tonic::Status>,
}

impl Answers {
    /// Takes what became of the next batch; whether another one should be sent. One that fails does not stop the others, unless it
    /// was the server that could not be reached.
    fn take(&mut self, batch: usize, result: Result<Vec<Done>, tonic::Status>) -> bool {
        let expected = self.done.len() + batch;
        let reached = match result {
            Ok(done) => {
                self.done.extend(done.into_iter().take(batch).map(Some));
                true
            }
            Err(status) => {
                let is_away = matches!(status.code(), tonic::Code::Unavailable | tonic::Code::DeadlineExceeded);
                self.failed.push(status);
                !is_away
            }
        };
        self.done.resize(expected, None);
        reached
    }

    /// Of so many items; those that were not sent have no answer.
    fn of(mut self, items: usize) -> Self {
        self.done.resize(items, None);
        self
    }
}

/// A request that takes no longer than [`TIMEOUT`].
fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(TIMEOUT);
    request
}

/// The registration entries of a server.
pub trait Entries {
    /// All of them.
    fn list(&self) -> impl Future<Output = Result<Vec<Entry>, tonic::Status>> + Send;
    /// Creates entries.
    fn create(&self, entries: &[Entry]) -> impl Future<Output = Answers> + Send;
    /// Replaces entries.
    fn update(&self, entries: &[Entry]) -> impl Future<Output = Answers> + Send;
    /// Deletes entries; one that is gone already is answered with `NOT_FOUND`.
    fn delete(&self, ids: &[String]) -> impl Future<Output = Answers> + Send;
}

impl ServerLink {
    /// A connection to the server on this socket, opened at the first call.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned(), channel: unix_channel(socket) }
    }

    /// Path of the socket, for logs.
    pub fn name(&self) -> String {
        self.socket.display().to_string()
    }

    fn entries(&self) -> EntryClient<Channel> {
        EntryClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Resolves once the server is gone. Its memory, and the directory in it, is lost then.
    pub async fn gone(&self) -> tonic::Status {
        let mut client = HealthClient::new(self.channel.clone());
        let request = HealthCheckRequest { service: String::new() };
        match client.watch(request).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(_)) => {}
                        Ok(None) => return tonic::Status::unavailable("the server closed the stream"),
                        Err(status) => return status,
                    }
                }
            }
            Err(status) => status,
        }
    }

    /// Publishes changes of the directory; with `replace`, everything else is removed.
    pub async fn publish(
        &self,
        replace: bool,
        upserted: Vec<Workload>,
        upserted_services: Vec<Service>,
        removed: Vec<String>,
    ) -> Result<(), tonic::Status> {
        let mut client = DirectoryClient::new(self.channel.clone()).max_encoding_message_size(MAX_MESSAGE_BYTES);
        let request = request(PublishRequest { replace, upserted, removed, upserted_services });
        client.publish(request).await?;
        Ok(())
    }
}

impl Entries for ServerLink {
    async fn list(&self) -> Result<Vec<Entry>, tonic::Status> {
        let (mut all, mut token) = (vec![], String::new());
        loop {
            let request = request(ListEntriesRequest { page_size: 1_000, page_token: token, ..Default::default() });
            let page = self.entries().list_entries(request).await?.into_inner();
            all.extend(page.entries);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            token = page.next_page_token;
        }
    }

    async fn create(&self, entries: &[Entry]) -> Answers {
        let mut answers = Answers::default();
        for batch in portions(entries, BATCH) {
            let request = request(BatchCreateEntryRequest { entries: batch.to_vec(), output_mask: None });
            let response = self.entries().batch_create_entry(request).await.map(tonic::Response::into_inner);
            let done =
                response.map(|r| r.results.into_iter().map(|r| Done::of(r.status, r.entry.map(|e| e.id))).collect());
            if !answers.take(batch.len(), done) {
                break;
            }
        }
        answers.of(entries.len())
    }

    async fn update(&self, entries: &[Entry]) -> Answers {
        let mut answers = Answers::default();
        for batch in portions(entries, BATCH) {
            let message = BatchUpdateEntryRequest { entries: batch.to_vec(), input_mask: None, output_mask: None };
            let response = self.entries().batch_update_entry(request(message)).await.map(tonic::Response::into_inner);
            let done =
                response.map(|r| r.results.into_iter().map(|r| Done::of(r.status, r.entry.map(|e| e.id))).collect());
            if !answers.take(batch.len(), done) {
                break;
            }
        }
        answers.of(entries.len())
    }

    async fn delete(&self, ids: &[String]) -> Answers {
        let mut answers = Answers::default();
        for batch in ids.chunks(BATCH) {
            let request = request(BatchDeleteEntryRequest { ids: batch.to_vec() });
            let response = self.entries().batch_delete_entry(request).await.map(tonic::Response::into_inner);
            let done = response.map(|r| r.results.into_iter().map(|r| Done::of(r.status, Some(r.id))).collect());
            if !answers.take(batch.len(), done) {
                break;
            }
        }
        answers.of(ids.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_fails_costs_its_own_items_their_answer_and_no_others() {
        let good = |ids: std::ops::Range<usize>| Ok(ids.map(|id| Done::of(None, Some(id.to_string()))).collect());
        let answered = |answers: &Answers| answers.done.iter().map(Option::is_some).collect::<Vec<_>>();
        let mut answers = Answers::default();
        assert!(answers.take(2, good(0..2)));
        assert!(answers.take(2, Err(tonic::Status::out_of_range("too large"))), "the next one is sent");
        assert!(answers.take(2, good(4..5)), "an answer too short is none for the rest");
        assert_eq!(answered(&answers), [true, true, false, false, true, false]);
        assert_eq!(answers.done[4].as_ref().unwrap().entry.as_deref(), Some("4"), "each its own");
        // Nobody waits for a server that is away once more for each batch.
        assert!(!answers.take(2, Err(tonic::Status::unavailable("away"))));
        let answers = answers.of(12);
        assert_eq!((answers.done.len(), answers.failed.len()), (12, 2));
    }
}
