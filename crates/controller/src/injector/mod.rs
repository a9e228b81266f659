//! The mutating webhook: adds redirect and sidecar to a pod before the API server stores it.

mod containers;
mod namespace;
mod nearest;
mod pod;
mod pod_security;
mod probes;
mod raw_sockets;
mod resources;
mod settings;
mod webhook;

pub use namespace::{judge_namespace, mark_strict};
pub use nearest::did_you_mean;
pub use pod::{Refused, VOLUME, Verdict, confine_ephemeral, inject, judge_ephemeral};
pub use pod_security::{ENFORCE, Privileges, warn_of_level};
pub use resources::{Amount, Amounts, ContainerResources, Resources};
pub use settings::{Mistake, Settings};
pub use webhook::{Serving, WebhookError, serve};

use std::collections::BTreeSet;

use countersign_identity::policy::Mode;

/// Name of the sidecar's container.
pub const SIDECAR: &str = "countersign-proxy";
/// Name of the redirect's container.
pub const REDIRECT: &str = "countersign-redirect";
/// Label of a namespace or a pod that requests injection.
pub const INJECT: &str = "countersign.dev/inject";
/// Annotation of an injected pod: the version of the injector.
pub const INJECTED: &str = "countersign.dev/injected";
/// End of [`INJECTED`]'s value where the pod's own specification has what was injected (`countersign inject`), so that its successors
/// have it whatever the webhook does.
pub const IN_MANIFEST: &str = "+manifest";
/// User ID of the sidecar in a pod.
pub const PROXY_UID: u32 = 2102;
/// User ID of the init container that waits for the CNI plugin's redirect. It differs from the sidecar's, whose connections are
/// never redirected.
const VALIDATOR_UID: u32 = 2103;

/// What counts for a pod and is not in the pod itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surroundings {
    /// Namespace of the pod.
    pub namespace: String,
    /// Whether the namespace requests injection.
    pub asks: Asks,
    /// Mode of the mesh, narrowed by the namespace's.
    pub mode: Mode,
    /// Part of the paths of this pod's health checks that nobody can guess ([`new_probe_secret`]).
    pub probe_secret: String,
}

/// A new secret for the health checks of a pod: 128 random bits in hexadecimal. The checks make the sidecar call the app.
/// Their source address alone proves little, because a node's own address stands for everybody who comes by a node port.
pub fn new_probe_secret() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// The request in a namespace's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    /// The label is `enabled`.
    Yes,
    /// There is no label, or it is `disabled`.
    No,
    /// The label has another value, so the intention is unclear.
    Unclear,
}

/// Namespaces whose pods may weaken a strict mesh by annotations, set by the administrator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leave(BTreeSet<String>);

impl Leave {
    /// Permission for these namespaces. `*` stands for all; an empty list permits none.
    pub fn of(namespaces: impl IntoIterator<Item = String>) -> Self {
        Self(namespaces.into_iter().map(|n| n.trim().to_owned()).filter(|n| !n.is_empty()).collect())
    }

    /// Whether a namespace has the permission.
    pub fn is_given(&self, namespace: &str) -> bool {
        self.0.contains("*") || self.0.contains(namespace)
    }
}

/// Settings of the injected containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sidecar {
    /// Image of sidecar and redirect.
    pub image: String,
    /// When nodes pull the image: `Always`, `IfNotPresent` or `Never`.
    pub pull_policy: String,
    /// Folder on each node that holds its agent's socket.
    pub agent_dir: String,
    /// CSI driver that mounts this folder into pods; `None` mounts it by `hostPath`.
    pub csi_driver: Option<String>,
    /// Whether the CNI plugin installs the redirect.
    pub cni: bool,
    /// Log filter of sidecars whose pod sets none.
    pub log_level: String,
    /// Whether the sidecar is an init container that keeps running (Kubernetes 1.29 and newer), or the first of the
    /// pod's containers.
    pub native: bool,
    /// Namespaces whose pods may weaken strict mode.
    pub leave: Leave,
    /// Requests and limits of both containers where a pod sets none.
    pub resources: Resources,
}

impl Sidecar {
    /// Default settings with this image.
    pub fn new(image: String) -> Self {
        Self {
            image,
            pull_policy: "IfNotPresent".into(),
            agent_dir: "/run/countersign/agent".into(),
            csi_driver: None,
            cni: false,
            log_level: "info".into(),
            native: true,
            leave: Leave::default(),
            resources: Resources::default(),
        }
    }

    /// Whether the sidecar waits itself until the CNI plugin has installed the redirect, and holds up all other
    /// containers meanwhile. A plain one does not hold up init containers.
    pub fn waits_for_redirect(&self) -> bool {
        self.cni && self.native
    }
}
