//! The driver's metrics. `docs/metrics.md` lists their names and meanings.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The label `reason`: why a call failed.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// The metrics of a driver.
pub struct Metrics {
    /// All metrics, rendered by `/metrics`.
    pub registry: Registry,
    /// Number of times that a volume was put into a pod.
    pub published: Counter,
    /// Number of times that a volume was removed.
    pub unpublished: Counter,
    /// 1 once the kubelet has registered the driver.
    pub registered: Gauge,
    failed: Family<Reason, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("countersign_csi");
        registry.register(
            "connections_dropped",
            "Connections dropped for want of room, by listener and reason",
            countersign_api::admission::dropped(),
        );
        let (published, unpublished) = (Counter::default(), Counter::default());
        let (registered, failed) = (Gauge::default(), Family::default());
        registry.register("volumes_published", "Volumes that were put into pods", published.clone());
        registry.register("volumes_unpublished", "Volumes that were removed", unpublished.clone());
        registry.register("registered", "1 once the kubelet has registered the driver", registered.clone());
        registry.register("calls_failed", "Calls of the kubelet that failed, by reason", failed.clone());
        Self { registry, published, unpublished, registered, failed }
    }
}

impl Metrics {
    /// Counts a call that failed.
    pub fn failed(&self, reason: &'static str) {
        self.failed.get_or_create(&Reason { reason }).inc();
    }
}
