//! The agent's metrics. `docs/metrics.md` lists their names and meanings.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use countersign_watch::Kind;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use time::OffsetDateTime;

/// The label `reason`: why a caller was rejected.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Reason {
    reason: &'static str,
}

/// Where a node's pods are learnt from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodSource {
    /// A watch on the API server.
    ApiServer,
    /// The node's kubelet.
    Kubelet,
}

impl PodSource {
    /// Its name in metrics and `status`, stable between releases.
    pub fn name(self) -> &'static str {
        match self {
            Self::ApiServer => "api_server",
            Self::Kubelet => "kubelet",
        }
    }
}

/// The label `source` of the metrics about sources of pods.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct BySource {
    source: &'static str,
}

/// The agent's metrics.
pub struct Metrics {
    /// All metrics, rendered by `/metrics`.
    pub registry: Registry,
    /// Number of SVIDs that the server signed for us.
    pub svids_signed: Counter,
    /// Number of JWT-SVIDs that the server signed for us.
    pub tokens_signed: Counter,
    /// Number of signing calls that failed or returned fewer SVIDs than requested.
    pub signing_failures: Counter,
    /// Number of callers that were attested.
    pub attestations: Counter,
    /// Number of open streams of workloads and sidecars.
    pub streams: Gauge,
    /// Number of responses that Envoys have rejected.
    pub secrets_rejected: Counter,
    /// Number of watches of the API server that failed, by kind.
    pub watch_errors: Family<Kind, Counter>,
    source_up: Family<BySource, Gauge>,
    served_by: Family<BySource, Counter>,
    refused: Family<Reason, Counter>,
    svids: Gauge,
    first_expiry: Gauge,
    own_expiry: Gauge,
    unsaved: Gauge,
    /// Whether callers reach this agent by its socket's path.
    pub socket_own: Gauge,
    refused_counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("countersign_agent");
        registry.register(
            "connections_dropped",
            "Connections dropped for want of room, by listener and reason",
            countersign_api::admission::dropped(),
        );
        let (svids_signed, signing_failures, attestations) =
            (Counter::default(), Counter::default(), Counter::default());
        let streams = Gauge::default();
        let refused = Family::<Reason, Counter>::default();
        let (svids, first_expiry) = (Gauge::default(), Gauge::default());
        registry.register("svids_signed", "SVIDs that the server signed for this agent", svids_signed.clone());
        let tokens_signed = Counter::default();
        registry.register("jwt_svids_signed", "JWT-SVIDs that the server signed for this agent", tokens_signed.clone());
        registry.register(
            "signing_failures",
            "Calls to the server that got no or not all signatures",
            signing_failures.clone(),
        );
        registry.register("attestations", "Callers that were attested", attestations.clone());
        registry.register("streams", "Open streams of workloads and sidecars", streams.clone());
        registry.register("callers_refused", "Callers that were refused, by reason", refused.clone());
        let secrets_rejected = Counter::default();
        registry.register("secrets_rejected", "Responses that Envoys have rejected", secrets_rejected.clone());
        // Without their names: whoever reaches the page would learn which identities this node's pods have.
        registry.register("svids", "SVIDs of workloads that are ready", svids.clone());
        registry.register(
            "svid_expiry_timestamp_seconds",
            "When the first of them ends, seconds since 1970",
            first_expiry.clone(),
        );
        let own_expiry = Gauge::default();
        registry.register(
            "own_svid_expiry_timestamp_seconds",
            "When the agent's own SVID ends, seconds since 1970",
            own_expiry.clone(),
        );
        let unsaved = Gauge::default();
        registry.register(
            "unsaved",
            "1 while the agent's own identity or bundle cannot be written to its folder",
            unsaved.clone(),
        );
        let socket_own = Gauge::default();
        registry.register("socket_own", "1 while the agent itself answers at its socket's path", socket_own.clone());
        let watch_errors = Family::default();
        registry.register("watch_errors", "Watches of the API server that failed, by kind", watch_errors.clone());
        let (source_up, served_by) = (Family::default(), Family::default());
        registry.register("pod_source_up", "1 while this source of pods works, by source", source_up.clone());
        registry.register(
            "pod_source_served",
            "Callers that were attested by their pod, by the source that knew it",
            served_by.clone(),
        );
        Self {
            registry,
            watch_errors,
            source_up,
            served_by,
            svids_signed,
            tokens_signed,
            signing_failures,
            attestations,
            streams,
            secrets_rejected,
            refused,
            svids,
            first_expiry,
            own_expiry,
            unsaved,
            socket_own,
            refused_counts: Mutex::default(),
        }
    }
}

impl Metrics {
    /// Counts one rejected caller.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
        *self.refused_counts.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// Counts a container that was found by this source.
    pub fn served_by(&self, source: PodSource) {
        self.served_by.get_or_create(&BySource { source: source.name() }).inc();
    }

    /// Sets whether this source works.
    pub fn source_up(&self, source: PodSource, up: bool) {
        self.source_up.get_or_create(&BySource { source: source.name() }).set(i64::from(up));
    }

    /// Number of rejected callers since start, by reason.
    pub fn refused_counts(&self) -> BTreeMap<&'static str, u64> {
        self.refused_counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the metrics that are looked up rather than counted. `own`: expiry of the agent's own SVID, if it has one;
    /// `unsaved`: whether part of the agent's own state is not on disk yet.
    pub fn observe(&self, state: &crate::cache::State, own: Option<OffsetDateTime>, unsaved: bool) {
        self.unsaved.set(i64::from(unsaved));
        self.own_expiry.set(own.map_or(0, OffsetDateTime::unix_timestamp));
        let ends = state.entries.values().filter_map(|cached| cached.svid.as_ref()).map(|svid| svid.facts().not_after);
        self.svids.set(ends.clone().count().try_into().unwrap_or(i64::MAX));
        self.first_expiry.set(ends.min().map_or(0, OffsetDateTime::unix_timestamp));
    }
}
