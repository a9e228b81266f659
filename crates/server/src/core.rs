//! The state that all endpoints share, and the only way to a signature.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use countersign_api::clock::Clock;
use countersign_api::rate_limit::RateLimit;
use countersign_identity::profile::{Issued, LeafRequest, RequestedKey};
use countersign_identity::shown::sentence;
use countersign_identity::{Entry, SpiffeId, TrustDomain};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use crate::agents::Agents;
use crate::attempts::Attempts;
use crate::audit::{Audit, Outcome, Record, rfc3339};
use crate::authority::{Authorities, AuthorityError};
use crate::bundle_publisher::BundlePublisher;
use crate::caller::{Caller, Downstream};
use crate::config::{Config, Issuance};
use crate::datastore::{DataStore, DataStoreError};
use crate::directory::Directory;
use crate::entries::Entries;
use crate::federation::bundles::FederatedBundles;
use crate::federation::refresh::Refresher;
use crate::federation::relationships::Relationships;
use crate::key_manager::KeyManagerError;
use crate::metrics::Metrics;
use crate::node_attestor::NodeAttestor;
use crate::refusals::{Group, Refusals, Refused};
use crate::upstream_authority::UpstreamError;

/// The reason in metrics and the audit log for calls over a rate limit.
const RATE_LIMIT: &str = "rate_limit";

/// The reason for nodes that were not believed.
pub const ATTESTATION: &str = "attestation";
/// Characters of a refusal's text that are told and kept: it may quote what was sent, up to the longest payload.
pub const MAX_REASON: usize = 512;

/// One server's state.
pub struct Core {
    pub config: Config,
    pub clock: Clock,
    pub store: Arc<dyn DataStore>,
    pub authorities: Authorities,
    pub entries: Entries,
    pub agents: Agents,
    pub federated: FederatedBundles,
    pub relationships: Relationships,
    pub refresher: Refresher,
    pub directory: Directory,
    pub attestors: Vec<Box<dyn NodeAttestor>>,
    pub publishers: Vec<Arc<dyn BundlePublisher>>,
    pub audit: Audit,
    pub metrics: Metrics,
    /// Refusals that anybody can cause, told once a minute and source.
    pub refusals: Refusals,
    /// Attestations whose evidence is not verified yet.
    pub attempts: Attempts,
    /// By agent: attestations whose evidence was verified.
    pub attest_limit: RateLimit<SpiffeId>,
    pub sign_limit: RateLimit<Group>,
    /// As many again (SPIRE): JWT-SVIDs.
    pub token_limit: RateLimit<Group>,
    /// Random ID of this run of the server: revisions of another run are not comparable.
    pub epoch: String,
    pub started_at: OffsetDateTime,
    /// The chain of the server's own SVID; empty before there is one.
    pub own_chain: ArcSwap<Vec<CertificateDer<'static>>>,
    /// Streams and other tasks. All end with `shutdown`, and the server waits for them.
    pub tasks: TaskTracker,
    pub shutdown: CancellationToken,
}

/// A certificate to be signed.
pub struct SigningRequest<'a> {
    /// For audit and metrics: `x509_svid`, `agent_svid`, `server_svid`, `downstream_ca`.
    pub kind: &'static str,
    /// The caller, as the audit log names it.
    pub caller: &'a str,
    /// ID of the registration entry; empty if there is none.
    pub entry_id: &'a str,
    /// The SPIFFE ID to certify.
    pub id: &'a SpiffeId,
    /// DNS names of the leaf; may be empty.
    pub dns_names: &'a [String],
    /// Lifetime that is requested.
    pub ttl: Duration,
    /// The signing request (PKCS#10, DER).
    pub csr: &'a [u8],
}

impl Core {
    /// The current time, by the server's clock.
    pub fn now(&self) -> OffsetDateTime {
        (self.clock)()
    }

    /// The lifetimes and key types that apply now.
    pub fn issuance(&self) -> Issuance {
        *self.config.issuance.borrow()
    }

    /// The trust domain that the server signs for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.config.trust_domain
    }

    /// Makes a change of state in a task of its own, and waits for it. The call of a client that goes away is dropped wherever
    /// it stands; between the store's commit and what is kept in memory that would leave the two apart for good.
    pub async fn to_the_end<T, F>(self: &Arc<Self>, change: impl FnOnce(Arc<Self>) -> F) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Status>> + Send + 'static,
    {
        let changed = self.tasks.spawn(change(self.clone())).await;
        changed.unwrap_or_else(|_| Err(Status::internal("the change broke off; look whether it was made")))
    }

    /// Signs, and keeps the record of it either way.
    pub async fn sign(&self, request: &SigningRequest<'_>) -> Result<Issued, Status> {
        let signed = match RequestedKey::from_csr(request.csr) {
            Ok(key) => {
                let leaf = LeafRequest { id: request.id, dns_names: request.dns_names, key: &key, ttl: request.ttl };
                self.authorities.sign(&leaf).await
            }
            Err(error) => Err(error.into()),
        };
        self.record(request, signed)
    }

    /// Signs the CA certificate of a server below, and keeps the record of it either way.
    pub async fn sign_downstream(&self, caller: &Downstream, csr: &[u8], ttl: Duration) -> Result<Issued, Status> {
        let signed = match RequestedKey::from_csr(csr) {
            Ok(key) => self.authorities.sign_downstream(&key, ttl).await,
            Err(error) => Err(error.into()),
        };
        let (id, entry_id) = (caller.id.to_string(), caller.entry.id.as_str());
        let asked =
            SigningRequest { kind: "downstream_ca", caller: &id, entry_id, id: &caller.id, dns_names: &[], ttl, csr };
        self.record(&asked, signed)
    }

    fn record(&self, request: &SigningRequest<'_>, signed: Result<Issued, AuthorityError>) -> Result<Issued, Status> {
        let issued = match signed {
            Ok(issued) => issued,
            Err(error) => {
                self.refuse(
                    request.kind,
                    request.caller,
                    request.entry_id,
                    &request.id.to_string(),
                    refused_as(&error),
                    &error.to_string(),
                );
                return Err(status_of(&error));
            }
        };
        self.metrics.signed(request.kind);
        let record = Record {
            outcome: Outcome::Signed,
            kind: request.kind,
            caller: request.caller,
            entry_id: request.entry_id,
            spiffe_id: &request.id.to_string(),
            serial: &issued.facts.serial,
            expires_at: &rfc3339(issued.facts.not_after),
            audience: &[],
            authority_id: &issued.facts.authority_id,
            reason: "",
        };
        self.audit.write(&record, self.now());
        Ok(issued)
    }

    /// Records a refusal: `code` for the metric, `reason` for people.
    pub fn refuse(
        &self,
        kind: &'static str,
        caller: &str,
        entry_id: &str,
        spiffe_id: &str,
        code: &'static str,
        reason: &str,
    ) {
        let reason = sentence(reason, MAX_REASON).to_string();
        self.metrics.refused(code);
        tracing::warn!(kind, caller, entry_id, spiffe_id, code, reason, "refused to sign");
        self.keep_refusal(kind, caller, entry_id, spiffe_id, &reason);
    }

    fn keep_refusal(&self, kind: &'static str, caller: &str, entry_id: &str, spiffe_id: &str, reason: &str) {
        let record = Record {
            outcome: Outcome::Refused,
            kind,
            caller,
            entry_id,
            spiffe_id,
            serial: "",
            expires_at: "",
            audience: &[],
            authority_id: "",
            reason,
        };
        self.audit.write(&record, self.now());
    }

    /// Keeps the record of a refusal that anybody can cause as often as a limit lets them, and there are many addresses. The
    /// audit stands on the database's own disk, and it is bounded, so that they would push others' records out of it: one
    /// line a minute, source and `code` says how many there were. Local callers have a line each.
    pub fn refuse_counted(
        &self,
        kind: &'static str,
        caller: &str,
        source: Option<IpAddr>,
        code: &'static str,
        reason: &str,
    ) {
        if source.is_none_or(|ip| self.refusals.count(ip, code, Instant::now())) {
            self.refuse(kind, caller, "", "", code, reason);
        } else {
            self.metrics.refused(code);
        }
    }

    /// Keeps the record of a call over a rate limit.
    pub fn refuse_over_limit(&self, kind: &'static str, source: IpAddr) {
        let reason = "too many calls from this address";
        self.refuse_counted(kind, &format!("address@{source}"), Some(source), RATE_LIMIT, reason);
    }

    /// Tells of refusals that were only counted, where a minute is over.
    pub fn tell_refusals(&self, now: Instant) {
        self.tell(self.refusals.over(now));
    }

    /// Logs all refusals that were only counted.
    pub fn tell_all_refusals(&self) {
        self.tell(self.refusals.rest());
    }

    fn tell(&self, counted: Vec<(Refused, u64)>) {
        for (Refused { source, code }, count) in counted {
            let caller = source.map_or_else(|| "other addresses".to_owned(), |group| format!("address@{group}"));
            let (kind, what) = match code {
                RATE_LIMIT => ("rate_limited", "calls over the rate limit"),
                _ => ("agent_svid", "refused attestations"),
            };
            let reason = format!("{count} more {what} in the last minute");
            tracing::warn!(caller, count, code, "refused to sign");
            self.keep_refusal(kind, &caller, "", "", &reason);
        }
    }

    /// Signs a workload's SVID for an entry.
    pub async fn sign_entry(&self, caller: &Caller, entry: &Entry, csr: &[u8]) -> Result<Issued, Status> {
        self.sign(&SigningRequest {
            kind: "x509_svid",
            caller: &caller.to_string(),
            entry_id: entry.id.as_str(),
            id: &entry.spiffe_id,
            dns_names: &entry.dns_names,
            ttl: entry.x509_svid_ttl.unwrap_or_else(|| self.issuance().svid_ttl),
            csr,
        })
        .await
    }

    /// Checks the rate limit of a remote caller for `count` more signatures. Local callers have none.
    pub fn within_sign_limit<T>(&self, request: &tonic::Request<T>, count: usize) -> Result<(), Status> {
        let Some(peer) = request.extensions().get::<countersign_api::peer::TlsPeer>() else { return Ok(()) };
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        if self.sign_limit.take(Group::of(peer.address.ip()), count, Instant::now()) {
            Ok(())
        } else {
            self.refuse_over_limit("x509_svid", peer.address.ip().to_canonical());
            Err(Status::resource_exhausted("too many signatures asked for from this address; slow down"))
        }
    }
}

/// The reason in metrics for what an authority has not signed.
pub fn refused_as(error: &AuthorityError) -> &'static str {
    match error {
        AuthorityError::Issue(_) => "bad_request",
        AuthorityError::Sign(_) => "no_signature",
        _ => "no_authority",
    }
}

/// Converts an authority's error to a gRPC status.
pub fn status_of(error: &AuthorityError) -> Status {
    let text = error.to_string();
    match error {
        AuthorityError::Upstream
        | AuthorityError::Above(_)
        | AuthorityError::NoUpstream(_)
        | AuthorityError::Untainted(_)
        | AuthorityError::Distrusted(_) => Status::failed_precondition(text),
        // As SPIRE: the ID is no valid argument.
        AuthorityError::NoId
        | AuthorityError::Unknown(_)
        | AuthorityError::State { .. }
        | AuthorityError::UnknownRoot(_)
        | AuthorityError::RootInUse { .. }
        | AuthorityError::Revoked(_)
        | AuthorityError::Issue(_)
        | AuthorityError::Bundle(_)
        | AuthorityError::KeyIdTaken(_)
        | AuthorityError::KeyKnown { .. } => Status::invalid_argument(text),
        AuthorityError::NotReady
        | AuthorityError::Store(_)
        | AuthorityError::Sign(_)
        | AuthorityError::Key(KeyManagerError::Timeout(_))
        | AuthorityError::Unsigned(UpstreamError::Timeout(_) | UpstreamError::Unreachable { .. }) => {
            Status::unavailable(text)
        }
        AuthorityError::Changed => Status::aborted(text),
        AuthorityError::TooManyKeys => Status::resource_exhausted(text),
        AuthorityError::Key(_) | AuthorityError::Unsigned(_) => Status::internal(text),
    }
}

/// Converts the store's error to a gRPC status: nothing was changed.
pub fn store_status(error: &DataStoreError) -> Status {
    tracing::error!(%error, "the store refused a change");
    if let DataStoreError::Contended(_) = error {
        return Status::aborted(format!("the change was not made: {error}"));
    }
    Status::unavailable(format!("the change was not made: {error}"))
}
