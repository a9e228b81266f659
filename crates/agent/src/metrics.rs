//! The agent's metrics. `docs/metrics.md` lists their names and meanings.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

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

/// The labels of an SVID's expiry.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Identity {
    spiffe_id: String,
    entry: String,
}

/// The agent's metrics.
pub struct Metrics {
    /// All metrics, rendered by `/metrics`.
    pub registry: Registry,
    /// Number of SVIDs that the server signed for us.
    pub svids_signed: Counter,
    /// Number of signing calls that failed or returned fewer SVIDs than requested.
    pub signing_failures: Counter,
    /// Number of callers that were attested.
    pub attestations: Counter,
    /// Number of open streams of workloads and sidecars.
    pub streams: Gauge,
    refused: Family<Reason, Counter>,
    expiry: Family<Identity, Gauge>,
    own_expiry: Gauge,
    unsaved: Gauge,
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
        let expiry = Family::<Identity, Gauge>::default();
        registry.register("svids_signed", "SVIDs that the server signed for this agent", svids_signed.clone());
        registry.register(
            "signing_failures",
            "Calls to the server that got no or not all signatures",
            signing_failures.clone(),
        );
        registry.register("attestations", "Callers that were attested", attestations.clone());
        registry.register("streams", "Open streams of workloads and sidecars", streams.clone());
        registry.register("callers_refused", "Callers that were refused, by reason", refused.clone());
        registry.register("svid_expiry_timestamp_seconds", "When each SVID ends, seconds since 1970", expiry.clone());
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
        Self {
            registry,
            svids_signed,
            signing_failures,
            attestations,
            streams,
            refused,
            expiry,
            own_expiry,
            unsaved,
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

    /// Number of rejected callers since start, by reason.
    pub fn refused_counts(&self) -> BTreeMap<&'static str, u64> {
        self.refused_counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the metrics that are looked up rather than counted. `own`: expiry of the agent's own SVID, if it has one;
    /// `unsaved`: whether part of the agent's own state is not on disk yet.
    pub fn observe(&self, state: &crate::cache::State, own: Option<OffsetDateTime>, unsaved: bool) {
        self.unsaved.set(i64::from(unsaved));
        self.own_expiry.set(own.map_or(0, OffsetDateTime::unix_timestamp));
        self.expiry.clear();
        for cached in state.entries.values() {
            if let Some(svid) = &cached.svid {
                let labels = Identity { spiffe_id: svid.id().to_string(), entry: cached.entry.id.to_string() };
                self.expiry.get_or_create(&labels).set(svid.facts().not_after.unix_timestamp());
            }
        }
    }
}
