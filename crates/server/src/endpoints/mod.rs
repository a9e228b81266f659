//! The server's gRPC services, on TLS for agents and on its Unix socket for operators.

mod agent;
mod bundle;
mod by_caller;
mod debug;
mod directory;
mod entry;
mod entry_sync;
mod local_authority;
mod logger;
mod masks;
mod paging;
mod push;
mod status;
mod svid;
mod trust_domain;

use std::pin::Pin;
use std::sync::Arc;

use countersign_api::push::directory_server::DirectoryServer;
use countersign_api::push::push_server::PushServer;
use countersign_api::push::status_server::StatusServer;
use countersign_api::spire::agent::agent_server::AgentServer;
use countersign_api::spire::bundle::bundle_server::BundleServer;
use countersign_api::spire::debug::debug_server::DebugServer;
use countersign_api::spire::entry::entry_server::EntryServer;
use countersign_api::spire::localauthority::local_authority_server::LocalAuthorityServer;
use countersign_api::spire::logger::logger_server::LoggerServer;
use countersign_api::spire::svid::svid_server::SvidServer;
use countersign_api::spire::trustdomain::trust_domain_server::TrustDomainServer;
use countersign_api::spire::types;
use futures::Stream;
use tonic::service::Routes;
use tonic::{Code, Status};

use crate::core::Core;

pub use by_caller::by_caller;

/// A response stream.
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Implements all services on the server's state.
#[derive(Clone)]
struct Endpoint(Arc<Core>);

/// Every service of the server, for messages of at most `longest` bytes.
async fn routes(core: &Arc<Core>, longest: usize) -> Routes {
    let endpoint = Endpoint(core.clone());
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    Routes::new(health)
        .add_service(AgentServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(EntryServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(SvidServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(BundleServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(LocalAuthorityServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(LoggerServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(DebugServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(TrustDomainServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(PushServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(DirectoryServer::new(endpoint.clone()).max_decoding_message_size(longest))
        .add_service(StatusServer::new(endpoint).max_decoding_message_size(longest))
}

/// The status of one item of a batch.
fn item_status(result: &Result<(), Status>) -> types::Status {
    match result {
        Ok(()) => types::Status { code: Code::Ok.into(), message: "OK".into() },
        Err(status) => types::Status { code: status.code().into(), message: status.message().to_owned() },
    }
}

/// InvalidArgument for a field that cannot be parsed.
fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

#[cfg(test)]
mod tests;
