//! Envoy's secret discovery service (SDS v3): the caller's SVIDs and the bundles that it may verify with, each as a named secret.
//!
//! Callers are attested as those of the Workload API are. `asked` is what an Envoy wants, `entitled` what it may have, `secret` how
//! that is written; `state_of_the_world` and `delta` are the two protocols, which know nothing of calls.

mod asked;
mod delta;
mod entitled;
mod secret;
mod state_of_the_world;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use async_trait::async_trait;
use countersign_api::sds::secret_discovery_service_server::SecretDiscoveryService;
use countersign_api::sds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse};
use countersign_identity::shown::sentence;
use tokio::sync::mpsc;
use tonic::{Code, Request, Response, Status, Streaming};

use self::delta::Delta;
use self::entitled::Entitled;
use self::state_of_the_world::StateOfTheWorld;
use super::streams::Feed;
use super::{Attested, BoxStream, Core, Endpoint, Follower, Wanted};

/// How long a request waits for a secret that is not ready yet: longer than an attestation in part stays so (`IN_PART`).
const PATIENCE: Duration = Duration::from_secs(12);
/// Most characters of an Envoy's reason in the log.
const MAX_REASON: usize = 300;

/// One of the two protocols, for one stream.
trait Protocol: Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;

    /// Takes a request up. Errors: InvalidArgument.
    fn hear(&mut self, request: Self::Request, disable_spiffe_validation: bool) -> Result<Heard, Status>;

    /// The next response; `None` while there is nothing new. Errors: InvalidArgument if the caller may not have what it wants.
    fn due(&mut self, entitled: &Entitled) -> Result<Option<Self::Response>, Status>;

    /// Whether a request is not answered yet, because a secret is not ready.
    fn owes(&self) -> bool;
}

/// What a request said.
#[derive(Default)]
struct Heard {
    /// The response before it is rejected.
    rejection: Option<Rejection>,
    /// Something else is asked for than before.
    is_change: bool,
}

/// What an Envoy says of a response that it rejects.
struct Rejection(String);

/// A stream of requests and responses.
struct Session<P: Protocol> {
    protocol: P,
    requests: Streaming<P::Request>,
}

#[async_trait]
impl<P: Protocol> Feed for Session<P> {
    type Message = P::Response;

    async fn feed(
        &mut self,
        core: &Core,
        attested: &Attested,
        tx: &mpsc::Sender<Result<P::Response, Status>>,
    ) -> Option<Status> {
        let mut versions = core.cache.versions();
        let patience = tokio::time::sleep(PATIENCE);
        tokio::pin!(patience);
        let mut may_be_due = true;
        loop {
            if may_be_due {
                // Room first: what is made then is as new as can be, and is never lost between here and the channel.
                let room = tx.reserve().await.ok()?;
                versions.mark_unchanged();
                let due = Entitled::of(core, attested).and_then(|entitled| self.protocol.due(&entitled));
                match due {
                    Ok(Some(response)) => room.send(Ok(response)),
                    Ok(None) => drop(room),
                    Err(status) => return Some(core.secret_refused(attested, status)),
                }
            }
            tokio::select! {
                changed = versions.changed() => {
                    changed.ok()?;
                    may_be_due = true;
                }
                request = self.requests.message() => {
                    let request = match request {
                        Ok(request) => request?,
                        Err(status) => return Some(status),
                    };
                    match self.protocol.hear(request, core.config.sds.disable_spiffe_validation) {
                        Ok(heard) => {
                            heard.rejection.iter().for_each(|rejection| core.secrets_rejected(attested, rejection));
                            // Acknowledgements cost nothing, however many they are.
                            may_be_due = heard.is_change;
                        }
                        Err(status) => return Some(core.secret_refused(attested, status)),
                    }
                    if may_be_due {
                        patience.as_mut().reset(tokio::time::Instant::now() + PATIENCE);
                    }
                }
                () = tx.closed() => return None,
                () = &mut patience, if self.protocol.owes() => return Some(not_ready()),
            }
        }
    }
}

/// The name of a response, which nobody can guess and no earlier stream had.
fn nonce() -> String {
    hex::encode(rand::random::<[u8; 8]>())
}

fn not_ready() -> Status {
    Status::unavailable("a secret is not ready yet: is it signed, and is the server reachable from the agent?")
}

impl Core {
    /// Notes that a caller is told so, unless that was noted where it was decided.
    fn secret_refused(&self, attested: &Attested, status: Status) -> Status {
        if matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition) {
            self.metrics.refused("no_secret");
            if let Some(unsaid) = self.said.next(Follower::of(attested), "secret refused", Instant::now()) {
                tracing::warn!(pid = attested.peer.pid, why = status.message(), unsaid, "secret refused");
            }
        }
        status
    }

    fn secrets_rejected(&self, attested: &Attested, rejection: &Rejection) {
        self.metrics.secrets_rejected.inc();
        if let Some(unsaid) = self.said.next(Follower::of(attested), "secrets rejected", Instant::now()) {
            let reason = sentence(&rejection.0, MAX_REASON);
            tracing::warn!(pid = attested.peer.pid, %reason, unsaid, "an Envoy has rejected its secrets");
        }
    }

    /// The answer to one request. Errors: as a stream ends.
    async fn secrets(&self, attested: &Attested, request: DiscoveryRequest) -> Result<DiscoveryResponse, Status> {
        let mut protocol = StateOfTheWorld::default();
        protocol.hear(request, self.config.sds.disable_spiffe_validation)?;
        let mut versions = self.cache.versions();
        loop {
            versions.mark_unchanged();
            if let Some(response) = protocol.due(&Entitled::of(self, attested)?)? {
                return Ok(DiscoveryResponse { nonce: String::new(), ..response });
            }
            versions.changed().await.map_err(|_| not_ready())?;
        }
    }
}

#[async_trait]
impl SecretDiscoveryService for Endpoint {
    type StreamSecretsStream = BoxStream<DiscoveryResponse>;
    type DeltaSecretsStream = BoxStream<DeltaDiscoveryResponse>;

    async fn stream_secrets(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamSecretsStream>, Status> {
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        let session = Session { protocol: StateOfTheWorld::default(), requests: request.into_inner() };
        Ok(Response::new(self.stream(attested, session)))
    }

    async fn delta_secrets(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaSecretsStream>, Status> {
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        let session = Session { protocol: Delta::default(), requests: request.into_inner() };
        Ok(Response::new(self.stream(attested, session)))
    }

    async fn fetch_secrets(&self, request: Request<DiscoveryRequest>) -> Result<Response<DiscoveryResponse>, Status> {
        let mut attested = self.0.attest(&request).await?;
        // A name that is unknown so far may be an identity that needs more than it was attested by.
        if attested.in_part {
            attested = self.0.prove(attested.peer, Wanted::EveryFact).await?;
        }
        let answer = tokio::time::timeout(PATIENCE, self.0.secrets(&attested, request.into_inner())).await;
        let answer = answer.unwrap_or_else(|_| Err(not_ready()));
        let response = answer.map_err(|status| self.0.secret_refused(&attested, status))?;
        // Meanwhile the caller may have changed.
        self.0.still(&attested)?;
        Ok(Response::new(response))
    }
}

/// Hears requests as they may come from anybody, each with its length before it; the first byte says by which protocol.
#[cfg(fuzzing)]
pub fn hear(data: &[u8]) {
    fn all<P: Protocol + Default>(mut data: &[u8], subscribed: fn(&P) -> Option<&asked::Subscription>)
    where
        P::Request: prost::Message + Default,
    {
        let mut protocol = P::default();
        while let Ok(request) = <P::Request as prost::Message>::decode_length_delimited(&mut data) {
            if protocol.hear(request, false).is_err() {
                return;
            }
            if let Some(subscription) = subscribed(&protocol) {
                subscription.assert_bounded();
            }
        }
    }
    match data.split_first() {
        Some((0, data)) => all::<StateOfTheWorld>(data, StateOfTheWorld::subscription),
        Some((_, data)) => all::<Delta>(data, Delta::subscription),
        None => {}
    }
}
