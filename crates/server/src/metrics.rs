//! The server's metrics. `docs/metrics.md` lists their names and meanings.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::PoisonError;

use countersign_identity::TrustBundle;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use time::OffsetDateTime;

use crate::federation::metrics::FederationMetrics;

/// The label `kind`: what was signed.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Kind {
    kind: &'static str,
}

/// The label `reason`: why a request was refused.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Reason {
    reason: &'static str,
}

/// The labels of an authority's expiry.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct AuthorityLabels {
    authority: String,
    status: &'static str,
}

/// The label `authority`: the root whose expiry it is.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RootLabels {
    authority: String,
}

/// The server's metrics.
pub struct Metrics {
    /// All metrics, rendered by `/metrics`.
    pub registry: Registry,
    signed: Family<Kind, Counter>,
    refused: Family<Reason, Counter>,
    /// Number of agents with an open push stream.
    pub push_streams: Gauge,
    entries: Gauge,
    agents: Gauge,
    authority_expiry: Family<AuthorityLabels, Gauge>,
    root_expiry: Family<RootLabels, Gauge>,
    own_expiry: Gauge,
    /// Of federation relationships.
    pub federation: FederationMetrics,
    refused_counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("countersign_server");
        registry.register(
            "connections_dropped",
            "Connections dropped for want of room, by listener and reason",
            countersign_api::admission::dropped(),
        );
        let signed = Family::<Kind, Counter>::default();
        let refused = Family::<Reason, Counter>::default();
        let (push_streams, entries, agents) = (Gauge::default(), Gauge::default(), Gauge::default());
        let authority_expiry = Family::<AuthorityLabels, Gauge>::default();
        registry.register("svids_signed", "SVIDs signed, by kind", signed.clone());
        registry.register("requests_refused", "Requests for a signature that were refused, by reason", refused.clone());
        registry.register("push_streams", "Agents connected to the push service", push_streams.clone());
        registry.register("entries", "Registration entries", entries.clone());
        registry.register("agents", "Attested agents", agents.clone());
        registry.register(
            "authority_expiry_timestamp_seconds",
            "When each authority ends, seconds since 1970",
            authority_expiry.clone(),
        );
        let root_expiry = Family::<RootLabels, Gauge>::default();
        let own_expiry = Gauge::default();
        registry.register(
            "bundle_authority_expiry_timestamp_seconds",
            "When each authority of the trust bundle ends, seconds since 1970",
            root_expiry.clone(),
        );
        registry.register(
            "own_svid_expiry_timestamp_seconds",
            "When the server's own SVID ends, seconds since 1970",
            own_expiry.clone(),
        );
        let federation = FederationMetrics::default();
        registry.register(
            "federation_last_refresh_timestamp_seconds",
            "When the bundle of each federation relationship was last fetched, seconds since 1970; 0 for not yet",
            federation.last_success.clone(),
        );
        registry.register(
            "federation_refresh_failures",
            "Fetches of foreign bundles that failed, by trust domain",
            federation.failures.clone(),
        );
        Self {
            registry,
            signed,
            refused,
            push_streams,
            entries,
            agents,
            authority_expiry,
            root_expiry,
            own_expiry,
            federation,
            refused_counts: Mutex::default(),
        }
    }
}

impl Metrics {
    /// Counts one signature.
    pub fn signed(&self, kind: &'static str) {
        self.signed.get_or_create(&Kind { kind }).inc();
    }

    /// Counts one refused request.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
        *self.refused_counts.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }

    /// Number of refused requests since start, by reason.
    pub fn refused_counts(&self) -> BTreeMap<&'static str, u64> {
        self.refused_counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the expiry of the roots that agents trust and of the server's own SVID.
    pub fn observe_trust(&self, bundle: &TrustBundle, own_svid_ends: OffsetDateTime) {
        self.own_expiry.set(own_svid_ends.unix_timestamp());
        self.root_expiry.clear();
        for a in &bundle.authorities {
            let labels = RootLabels { authority: a.id().to_owned() };
            self.root_expiry.get_or_create(&labels).set(a.not_after().unix_timestamp());
        }
    }

    /// Sets the metrics that are looked up rather than counted.
    pub fn observe(&self, entries: usize, agents: usize, authorities: &[crate::authority::Record]) {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.entries.set(count(entries));
        self.agents.set(count(agents));
        self.authority_expiry.clear();
        for a in authorities {
            let labels = AuthorityLabels { authority: a.id.clone(), status: a.status.as_str() };
            self.authority_expiry.get_or_create(&labels).set(a.validity().1.unix_timestamp());
        }
    }
}
