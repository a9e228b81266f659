//! Installs redirects as pods ask for them.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::Pod;

use crate::namespace::{Do, Found, apply};
use crate::pod::{Askers, DnsPolicy, MeshedPod};
use crate::resolvers::by_policy;
use crate::turns::Turns;
use countersign_redirect::guard::RESOLV_CONF;

/// Installs redirects as pods ask for them.
#[derive(Clone)]
pub struct Installer {
    askers: Askers,
    /// Whether sidecars can be told by their cgroups on this node.
    by_cgroup: bool,
    /// Our own `resolv.conf`.
    own: PathBuf,
    turns: Turns,
}

impl Installer {
    /// An installer for what these containers ask for. `by_cgroup`: whether sidecars can be told by their cgroups on this
    /// node; otherwise they are told by their user ID, whatever a pod asks for.
    pub fn new(askers: Askers, by_cgroup: bool) -> Self {
        Self { askers, by_cgroup, own: RESOLV_CONF.into(), turns: Turns::default() }
    }

    /// A pod whose redirect this installs; `None` for any other.
    pub fn meshed(&self, pod: &Pod) -> Option<MeshedPod> {
        MeshedPod::of(pod, &self.askers)
    }

    /// Whether a pod's redirect depends on its node's resolvers, which are known only once its containers run.
    pub fn needs_nodes_resolvers(&self, pod: &MeshedPod) -> bool {
        let order = pod.order(&self.askers, &by_policy(pod, &self.own));
        let guard = order.ok().and_then(|order| order.redirect.guard);
        pod.dns == DnsPolicy::Node && guard.is_some_and(|guard| guard.resolvers.is_empty())
    }

    /// Brings a pod's redirect into force in its namespace, or looks whether it is. `resolvers`: the pod's, if they are
    /// known.
    ///
    /// # Errors
    /// The reason, in words.
    pub async fn apply(
        &self,
        pod: &MeshedPod,
        netns: OwnedFd,
        resolvers: Option<BTreeSet<IpAddr>>,
        what: Do,
    ) -> Result<Found, String> {
        let resolvers = resolvers.unwrap_or_else(|| by_policy(pod, &self.own));
        let mut order = pod.order(&self.askers, &resolvers)?;
        order.redirect.by_cgroup &= self.by_cgroup;
        self.turns.run(move || apply(netns, order, what).map_err(io::Error::other)).await
    }
}
