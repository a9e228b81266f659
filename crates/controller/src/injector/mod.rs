//! The mutating webhook: what a pod is given before the API server stores it.

mod namespace;
mod nearest;
mod pod;
mod probes;
mod settings;
mod webhook;

pub use namespace::{judge_namespace, mark_strict};
pub use pod::{Refused, Verdict, inject, judge_ephemeral};
pub use webhook::{Serving, WebhookError, serve};

use std::collections::BTreeSet;

use countersign_identity::policy::Mode;

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

/// What is known of a pod's surroundings, beside the pod itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    /// Its namespace.
    pub namespace: String,
    /// Whether its namespace asks for injection.
    pub asks: Asks,
    /// The mode of mesh and namespace.
    pub mode: Mode,
}

/// What a namespace's label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    /// `enabled`.
    Yes,
    /// Nothing, or `disabled`.
    No,
    /// Something that is neither; nobody knows what was meant.
    Unclear,
}

/// Who may weaken a strict mesh by annotations: the administrator's leave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leave(BTreeSet<String>);

impl Leave {
    /// For these namespaces; `*` is every one, and an empty list nobody.
    pub fn of(namespaces: impl IntoIterator<Item = String>) -> Self {
        Self(namespaces.into_iter().map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect())
    }

    /// Whether a namespace has it.
    pub fn is_given(&self, namespace: &str) -> bool {
        self.0.contains("*") || self.0.contains(namespace)
    }
}

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
    /// Namespaces whose pods may weaken strict.
    pub leave: Leave,
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
            leave: Leave::default(),
        }
    }
}
