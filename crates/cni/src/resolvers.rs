//! A pod's resolvers, which a strict pod may send DNS to. The node's component cannot read the pod's own `resolv.conf`
//! before its containers exist. A resolver that is missing means that DNS is dropped, never that more is allowed.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use countersign_redirect::Guard;

use crate::pod::{DnsPolicy, MeshedPod};

/// Most resolvers that a kubelet writes into a pod's `resolv.conf`; it leaves out the rest.
const MOST: usize = 3;

/// The resolvers that the kubelet gives a pod by its policy. `own`: the `resolv.conf` of this process, whose pod has
/// the policy `ClusterFirst`. Those of the node are not known here.
pub fn by_policy(pod: &MeshedPod, own: &Path) -> BTreeSet<IpAddr> {
    let mut resolvers = match pod.dns {
        DnsPolicy::Cluster => Guard::with_resolvers_of(own).resolvers,
        DnsPolicy::Node | DnsPolicy::Own => BTreeSet::new(),
    };
    for address in &pod.nameservers {
        if resolvers.len() < MOST {
            resolvers.insert(*address);
        }
    }
    resolvers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ASKERS, meshed};

    #[test]
    fn a_policy_gives_the_clusters_resolvers_or_only_those_that_the_pod_names() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("resolv.conf");
        std::fs::write(&own, "search a\nnameserver 10.96.0.10\n").unwrap();
        let of = |policy: &str, named: &[&str]| {
            let mut pod = meshed();
            pod["spec"]["dnsPolicy"] = policy.into();
            pod["spec"]["dnsConfig"]["nameservers"] = named.into();
            let pod = MeshedPod::of(&serde_json::from_value(pod).unwrap(), &ASKERS).unwrap();
            by_policy(&pod, &own).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of("ClusterFirst", &[]), ["10.96.0.10"]);
        assert_eq!(of("ClusterFirst", &["9.9.9.1", "9.9.9.2", "9.9.9.3"]), ["9.9.9.1", "9.9.9.2", "10.96.0.10"]);
        assert_eq!(of("None", &["9.9.9.9"]), ["9.9.9.9"]);
        assert_eq!(of("Default", &[]), [""; 0]);
    }
}
