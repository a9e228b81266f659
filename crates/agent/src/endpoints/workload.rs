//! The X.509 calls of the SPIFFE Workload API. The JWT calls return Unimplemented.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::workload::spiffe_workload_api_server::SpiffeWorkloadApi;
use countersign_api::workload::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
};
use countersign_identity::X509Bundle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Attested, BoxStream, Core, Endpoint, last_word};
use crate::cache::Cached;

/// How long a call waits for an SVID that is not signed yet.
const FIRST_SVID_PATIENCE: Duration = Duration::from_secs(10);
/// The message for JWT calls.
const NOT_YET: &str = "JWT-SVIDs are not served by this version";

fn check_header<T>(request: &Request<T>) -> Result<(), Status> {
    let values: Vec<_> = request.metadata().get_all("workload.spiffe.io").iter().collect();
    if values.len() == 1 && values[0] == "true" {
        Ok(())
    } else {
        Err(Status::invalid_argument(
            "security header missing from request: send the metadata `workload.spiffe.io: true`",
        ))
    }
}

/// The content of a stream. Each message is a complete state.
trait Feed: Send + Sync + 'static {
    type Message: Clone + PartialEq + Send + 'static;
    /// The current message; `None` if it is not ready yet.
    fn message(core: &Core, identities: &[Cached]) -> Option<Self::Message>;
}

struct Svids;

impl Feed for Svids {
    type Message = X509svidResponse;

    fn message(core: &Core, identities: &[Cached]) -> Option<X509svidResponse> {
        let now = core.now();
        let state = core.cache.read();
        let bundle = state.bundle.as_ref()?;
        let mut identities: Vec<&Cached> = identities.iter().collect();
        // The oldest entry is the default and stays so, whatever is added later.
        identities.sort_by(|a, b| (a.entry.created_at, &a.entry.id).cmp(&(b.entry.created_at, &b.entry.id)));
        let mut hints = std::collections::HashSet::new();
        let svids: Vec<X509svid> = identities
            .iter()
            .filter_map(|c| Some((c, c.svid.as_ref().filter(|s| !s.is_expired(now))?)))
            // Hints are unique within a response: the first of two equal ones counts (SPIFFE Workload API 5.2.1).
            .filter(|(c, _)| c.entry.hint.is_empty() || hints.insert(&c.entry.hint))
            .map(|(c, svid)| X509svid {
                spiffe_id: svid.id().to_string(),
                x509_svid: svid.chain().iter().flat_map(|c| c.iter().copied()).collect(),
                x509_svid_key: svid.key().as_pkcs8().to_vec(),
                bundle: bundle.concatenated_der(),
                hint: c.entry.hint.clone(),
            })
            .collect();
        let federated_bundles = federated(&state, &identities)
            .map(|b| (format!("spiffe://{}", b.trust_domain), b.concatenated_der()))
            .collect();
        (!svids.is_empty()).then_some(X509svidResponse { svids, crl: vec![], federated_bundles })
    }
}

struct Bundles;

impl Feed for Bundles {
    type Message = X509BundlesResponse;

    fn message(core: &Core, identities: &[Cached]) -> Option<X509BundlesResponse> {
        let state = core.cache.read();
        let own = state.bundle.as_ref()?;
        let identities: Vec<&Cached> = identities.iter().collect();
        let all = std::iter::once(own).chain(federated(&state, &identities));
        let bundles: HashMap<String, Vec<u8>> =
            all.map(|b| (format!("spiffe://{}", b.trust_domain), b.concatenated_der())).collect();
        Some(X509BundlesResponse { crl: vec![], bundles })
    }
}

fn federated<'a>(state: &'a crate::cache::State, identities: &[&Cached]) -> impl Iterator<Item = &'a Arc<X509Bundle>> {
    let wanted: std::collections::BTreeSet<String> =
        identities.iter().flat_map(|c| c.entry.federates_with.iter().map(ToString::to_string)).collect();
    state.federated.iter().filter(move |(td, _)| wanted.contains(*td)).map(|(_, b)| b)
}

impl Endpoint {
    fn stream<F: Feed>(&self, attested: Attested) -> BoxStream<F::Message> {
        let (tx, rx) = mpsc::channel(1);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            core.metrics.streams.inc();
            let ended = tokio::select! {
                ended = feed::<F>(&core, &attested, &tx) => ended,
                status = core.outgrown(&attested) => Some(status),
                () = core.shutdown.cancelled() => Some(Status::unavailable("the agent is shutting down")),
            };
            core.metrics.streams.dec();
            if let Some(status) = ended {
                last_word(&tx, status).await;
            }
        });
        Box::pin(ReceiverStream::new(rx))
    }
}

/// Sends each new message until the caller disconnects (`None`) or no longer has an identity.
async fn feed<F: Feed>(
    core: &Core,
    attested: &Attested,
    tx: &mpsc::Sender<Result<F::Message, Status>>,
) -> Option<Status> {
    let mut versions = core.cache.versions();
    let mut sent: Option<F::Message> = None;
    let patience = tokio::time::sleep(FIRST_SVID_PATIENCE);
    tokio::pin!(patience);
    loop {
        versions.mark_unchanged();
        match core.identities(attested) {
            Err(status) => return Some(status),
            Ok(identities) => {
                let message = F::message(core, &identities);
                if message.is_some() && message != sent {
                    tx.send(Ok(message.clone()?)).await.ok()?;
                    sent = message;
                }
            }
        }
        tokio::select! {
            changed = versions.changed() => changed.ok()?,
            () = tx.closed() => return None,
            () = &mut patience, if sent.is_none() => return Some(Status::unavailable("the SVID is not signed yet; is the server reachable from the agent?")),
        }
    }
}

#[async_trait]
impl SpiffeWorkloadApi for Endpoint {
    type FetchX509SVIDStream = BoxStream<X509svidResponse>;
    type FetchX509BundlesStream = BoxStream<X509BundlesResponse>;
    type FetchJWTBundlesStream = BoxStream<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        check_header(&request)?;
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        Ok(Response::new(self.stream::<Svids>(attested)))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        check_header(&request)?;
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        Ok(Response::new(self.stream::<Bundles>(attested)))
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        check_header(&request)?;
        Err(Status::unimplemented(NOT_YET))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        check_header(&request)?;
        Err(Status::unimplemented(NOT_YET))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        check_header(&request)?;
        Err(Status::unimplemented(NOT_YET))
    }
}
