//! How fresh foreign bundles are: metrics per relationship, which go with it. Each has one label, a trust domain that an operator
//! named, and there are [`MAX_RELATIONSHIPS`](super::relationships::MAX_RELATIONSHIPS) at most.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use time::OffsetDateTime;

/// The label `trust_domain`: the foreign one.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ForeignLabels {
    trust_domain: String,
}

/// Metrics of all relationships.
#[derive(Default)]
pub struct FederationMetrics {
    /// When each bundle was last fetched, seconds since 1970.
    pub last_success: Family<ForeignLabels, Gauge>,
    /// Fetches that failed.
    pub failures: Family<ForeignLabels, Counter>,
}

impl FederationMetrics {
    /// A relationship is followed from now on.
    pub fn begin(&self, trust_domain: &str) {
        drop(self.last_success.get_or_create(&labels(trust_domain)));
        drop(self.failures.get_or_create(&labels(trust_domain)));
    }

    /// Its bundle was fetched.
    pub fn fetched(&self, trust_domain: &str, now: OffsetDateTime) {
        self.last_success.get_or_create(&labels(trust_domain)).set(now.unix_timestamp());
    }

    /// Its bundle could not be fetched.
    pub fn failed(&self, trust_domain: &str) {
        self.failures.get_or_create(&labels(trust_domain)).inc();
    }

    /// It is followed no longer.
    pub fn end(&self, trust_domain: &str) {
        self.last_success.remove(&labels(trust_domain));
        self.failures.remove(&labels(trust_domain));
    }
}

fn labels(trust_domain: &str) -> ForeignLabels {
    ForeignLabels { trust_domain: trust_domain.to_owned() }
}
