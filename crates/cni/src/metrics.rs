//! The metrics of a node's component. `docs/metrics.md` lists their names and meanings.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use countersign_watch::Kind;

use crate::wire::{Answer, Operation};

/// The labels of a request: what was asked for, and what became of it.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Asked {
    operation: &'static str,
    answer: &'static str,
}

/// The label `what`: what was put back.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Part {
    what: &'static str,
}

/// The label `answer`: what became of a sidecar's call.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    answer: &'static str,
}

/// The metrics of a node's component.
pub struct Metrics {
    /// All metrics, rendered by `/metrics`.
    pub registry: Registry,
    /// 1 while the plugin is installed.
    pub installed: Gauge,
    /// Number of pods that wait for their redirect.
    pub waiting: Gauge,
    /// Number of redirects that were installed by way of a pod's processes.
    pub repaired: Counter,
    /// Number of attempts at that which failed.
    pub repairs_failed: Counter,
    /// Errors of the watch.
    pub watch_errors: Family<Kind, Counter>,
    restored: Family<Part, Counter>,
    requests: Family<Asked, Counter>,
    sidecars: Family<Answered, Counter>,
    /// 1 where sidecars are told by their cgroups.
    pub by_cgroup: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("countersign_cni");
        let (installed, waiting) = (Gauge::default(), Gauge::default());
        let (repaired, repairs_failed) = (Counter::default(), Counter::default());
        let (restored, requests, watch_errors) = (Family::default(), Family::default(), Family::default());
        let (sidecars, by_cgroup) = (Family::default(), Gauge::default());
        registry.register("sidecar_by_cgroup", "1 where sidecars are told by their cgroups", by_cgroup.clone());
        registry.register(
            "connections_dropped",
            "Connections dropped for want of room, by listener and reason",
            countersign_api::admission::dropped(),
        );
        registry.register("installed", "1 while the plugin is installed", installed.clone());
        registry.register("restored", "Times that the plugin was put back, by what was missing", restored.clone());
        registry.register("requests", "Requests of the plugin, by operation and answer", requests.clone());
        registry.register("sidecars", "Calls of sidecars to be admitted, by answer", sidecars.clone());
        registry.register("waiting_pods", "Pods that wait for their redirect", waiting.clone());
        registry.register("repairs", "Redirects that the plugin had not installed", repaired.clone());
        registry.register("repairs_failed", "Attempts to install such a redirect that failed", repairs_failed.clone());
        registry.register("watch_errors", "Errors of watches, by kind", watch_errors.clone());
        Self {
            registry,
            installed,
            waiting,
            repaired,
            repairs_failed,
            watch_errors,
            restored,
            requests,
            sidecars,
            by_cgroup,
        }
    }
}

impl Metrics {
    /// Counts a part of the plugin that was put back.
    pub fn restored(&self, what: &'static str) {
        self.restored.get_or_create(&Part { what }).inc();
    }

    /// Number of times that a part was put back.
    #[cfg(test)]
    pub fn times_restored(&self, what: &'static str) -> u64 {
        self.restored.get_or_create(&Part { what }).get()
    }

    /// Counts the answer to a sidecar's call: whether it was admitted by its cgroup.
    pub fn sidecar(&self, answer: &Result<bool, tonic::Status>) {
        let answer = match answer {
            Ok(true) => "admitted",
            Ok(false) => "by_user",
            Err(status) if status.code() == tonic::Code::PermissionDenied => "refused",
            Err(_) => "unknown",
        };
        self.sidecars.get_or_create(&Answered { answer }).inc();
    }

    /// Counts an answer.
    pub fn answered(&self, operation: Operation, answer: &Answer) {
        let operation = match operation {
            Operation::Add => "add",
            Operation::Check => "check",
        };
        let answer = match answer {
            Answer::Nothing => "nothing",
            Answer::InForce => "in_force",
            Answer::Unknown { .. } => "unknown",
            Answer::Failed { .. } => "failed",
        };
        self.requests.get_or_create(&Asked { operation, answer }).inc();
    }
}
