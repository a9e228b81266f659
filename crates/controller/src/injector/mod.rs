//! The mutating webhook: what a pod is given before the API server stores it.

mod pod;
mod probes;
mod settings;
mod webhook;

pub use pod::{Refused, Verdict, inject, judge_ephemeral};
pub use webhook::{Serving, WebhookError, serve};

/// Name of the sidecar's container.
pub const SIDECAR: &str = "countersign-proxy";
/// Name of the redirect's container.
pub const REDIRECT: &str = "countersign-redirect";
/// The label that asks for injection, of a namespace or a pod.
pub const INJECT: &str = "countersign.dev/inject";
/// The annotation of a pod that was injected: our version.
pub const INJECTED: &str = "countersign.dev/injected";
/// The sidecar's user in a pod.
pub const PROXY_UID: u32 = 2102;

/// What is put into pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sidecar {
    /// Image of sidecar and redirect.
    pub image: String,
    /// When nodes look for it: `Always`, `IfNotPresent`, `Never`.
    pub pull_policy: String,
    /// Folder of a node where its agent's socket is.
    pub agent_dir: String,
    /// Log filter, where a pod names none.
    pub log_level: String,
    /// As an init container that goes on (Kubernetes 1.29 and newer), or as the first of the pod's containers.
    pub native: bool,
}

impl Sidecar {
    /// This image, and the defaults.
    pub fn new(image: String) -> Self {
        Self {
            image,
            pull_policy: "IfNotPresent".into(),
            agent_dir: "/run/countersign/agent".into(),
            log_level: "info".into(),
            native: true,
        }
    }
}
