//! The controller's metrics.

use countersign_watch::Kind;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The label of the injector's counter.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// Outcome of a review: `injected`, `left`, `refused` or `malformed`.
    pub outcome: &'static str,
}

/// The metrics of a controller.
pub struct Metrics {
    /// All metrics, rendered by `/metrics`.
    pub registry: Registry,
    /// Number of entries that the registrar maintains.
    pub registered: Gauge,
    /// Number of registrar passes that could not do everything.
    pub registrar_errors: Counter,
    /// Number of workloads in the directory.
    pub workloads: Gauge,
    /// Number of services in the directory.
    pub services: Gauge,
    /// Number of failed attempts to publish the directory.
    pub directory_errors: Counter,
    /// Number of pods that the webhook reviewed, by outcome.
    pub admissions: Family<Outcome, Counter>,
    /// Number of watches of the API server that failed, by kind.
    pub watch_errors: Family<Kind, Counter>,
    /// When the webhook's certificate expires, Unix seconds.
    pub webhook_expiry: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("countersign_controller");
        registry.register(
            "connections_dropped",
            "Connections dropped for want of room, by listener and reason",
            countersign_api::admission::dropped(),
        );
        let metrics = Self {
            registered: Gauge::default(),
            registrar_errors: Counter::default(),
            workloads: Gauge::default(),
            services: Gauge::default(),
            directory_errors: Counter::default(),
            admissions: Family::default(),
            watch_errors: Family::default(),
            webhook_expiry: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register("registered_entries", "Entries that the registrar keeps", metrics.registered.clone());
        registry.register("registrar_errors", "Passes that could not do everything", metrics.registrar_errors.clone());
        registry.register("directory_workloads", "Workloads in the directory", metrics.workloads.clone());
        registry.register("directory_services", "Services in the directory", metrics.services.clone());
        registry.register(
            "directory_errors",
            "Times that the directory could not be fed",
            metrics.directory_errors.clone(),
        );
        registry.register("admissions", "Pods that came by the webhook", metrics.admissions.clone());
        registry.register(
            "watch_errors",
            "Watches of the API server that failed, by kind",
            metrics.watch_errors.clone(),
        );
        registry.register(
            "webhook_certificate_expiry_timestamp_seconds",
            "End of the webhook's certificate, Unix time",
            metrics.webhook_expiry.clone(),
        );
        Self { registry, ..metrics }
    }
}
