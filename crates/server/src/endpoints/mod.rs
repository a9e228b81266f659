//! The services that the server speaks, on TLS for agents and on its Unix socket for operators.

mod agent;
mod bundle;
mod directory;
mod entry;
mod entry_sync;
mod local_authority;
mod masks;
mod paging;
mod push;
mod status;
mod svid;

use std::pin::Pin;
use std::sync::Arc;

use countersign_api::push::directory_server::DirectoryServer;
use countersign_api::push::push_server::PushServer;
use countersign_api::push::status_server::StatusServer;
use countersign_api::spire::agent::agent_server::AgentServer;
use countersign_api::spire::bundle::bundle_server::BundleServer;
use countersign_api::spire::entry::entry_server::EntryServer;
use countersign_api::spire::localauthority::local_authority_server::LocalAuthorityServer;
use countersign_api::spire::svid::svid_server::SvidServer;
use countersign_api::spire::types;
use countersign_api::transport::MAX_MESSAGE_BYTES;
use futures::Stream;
use tonic::service::Routes;
use tonic::{Code, Status};

use crate::core::Core;

/// A response stream.
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A service's own handle on the server.
#[derive(Clone)]
struct Endpoint(Arc<Core>);

/// Every service of the server.
pub async fn routes(core: &Arc<Core>) -> Routes {
    let endpoint = Endpoint(core.clone());
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    Routes::new(health)
        .add_service(AgentServer::new(endpoint.clone()).max_decoding_message_size(1024 * 1024))
        .add_service(EntryServer::new(endpoint.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(SvidServer::new(endpoint.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(BundleServer::new(endpoint.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(LocalAuthorityServer::new(endpoint.clone()))
        .add_service(PushServer::new(endpoint.clone()))
        .add_service(DirectoryServer::new(endpoint.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(StatusServer::new(endpoint))
}

/// The status of one item in a batch.
fn item_status(result: &Result<(), Status>) -> types::Status {
    match result {
        Ok(()) => types::Status { code: Code::Ok.into(), message: "OK".into() },
        Err(status) => types::Status { code: status.code().into(), message: status.message().to_owned() },
    }
}

/// A field that cannot be parsed.
fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

#[cfg(test)]
mod tests;
