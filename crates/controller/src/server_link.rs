//! Calls to the server over its Unix socket: registration entries and the directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// Outcome of one item of a batch.
pub struct Done {
    /// gRPC status code; 0 is success.
    pub code: i32,
    /// Message of the status, for people.
    pub message: String,
}

impl Done {
    fn of(status: Option<Status>) -> Self {
        let status = status.unwrap_or_default();
        Self { code: status.code, message: status.message }
    }
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

    /// All registration entries.
    pub async fn list(&self) -> Result<Vec<Entry>, tonic::Status> {
        let (mut all, mut token) = (vec![], String::new());
        loop {
            let mut request =
                tonic::Request::new(ListEntriesRequest { page_size: 1_000, page_token: token, ..Default::default() });
            request.set_timeout(TIMEOUT);
            let page = self.entries().list_entries(request).await?.into_inner();
            all.extend(page.entries);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            token = page.next_page_token;
        }
    }

    /// Creates entries; returns one outcome per entry, in order.
    pub async fn create(&self, entries: &[Entry]) -> Result<Vec<Done>, tonic::Status> {
        let mut done = vec![];
        for batch in entries.chunks(BATCH) {
            let mut request =
                tonic::Request::new(BatchCreateEntryRequest { entries: batch.to_vec(), output_mask: None });
            request.set_timeout(TIMEOUT);
            let results = self.entries().batch_create_entry(request).await?.into_inner().results;
            done.extend(results.into_iter().map(|r| Done::of(r.status)));
        }
        Ok(done)
    }

    /// Replaces entries; returns one outcome per entry, in order.
    pub async fn update(&self, entries: &[Entry]) -> Result<Vec<Done>, tonic::Status> {
        let mut done = vec![];
        for batch in entries.chunks(BATCH) {
            let request = BatchUpdateEntryRequest { entries: batch.to_vec(), input_mask: None, output_mask: None };
            let mut request = tonic::Request::new(request);
            request.set_timeout(TIMEOUT);
            let results = self.entries().batch_update_entry(request).await?.into_inner().results;
            done.extend(results.into_iter().map(|r| Done::of(r.status)));
        }
        Ok(done)
    }

    /// Deletes entries. An entry that no longer exists is not an error.
    pub async fn delete(&self, ids: &[String]) -> Result<(), tonic::Status> {
        for batch in ids.chunks(BATCH) {
            let mut request = tonic::Request::new(BatchDeleteEntryRequest { ids: batch.to_vec() });
            request.set_timeout(TIMEOUT);
            self.entries().batch_delete_entry(request).await?;
        }
        Ok(())
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
        let mut request = tonic::Request::new(PublishRequest { replace, upserted, removed, upserted_services });
        request.set_timeout(TIMEOUT);
        client.publish(request).await?;
        Ok(())
    }
}
