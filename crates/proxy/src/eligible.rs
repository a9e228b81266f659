//! Which endpoints of a service a new connection may use. The rules are kube-proxy's (`CategorizeEndpoints` in its
//! `topology.go`), so that a pod reaches the same endpoints with a sidecar as without.

use std::net::SocketAddr;

use countersign_identity::directory::{Endpoint, Place, Readiness, ServicePort};

/// The endpoints that a client at this place may use. With `strict`, what is not meshed counts as if it were not there.
///
/// Ready endpoints are used. Where there is none, terminating ones that still serve are. A `local` port has the endpoints of
/// the client's node only. On other ports the ready endpoints' hints narrow the choice: those for the client's node, if each
/// endpoint names nodes and one names this node; otherwise those for its zone, by the same condition; otherwise all.
pub fn eligible(port: &ServicePort, own: &Place, strict: bool) -> Vec<SocketAddr> {
    let here = |e: &&Endpoint| !port.local || (!own.node.is_empty() && e.node == own.node);
    let there: Vec<&Endpoint> = port.endpoints.iter().filter(|e| e.meshed || !strict).filter(here).collect();
    let of = |readiness| there.iter().copied().filter(|e| e.readiness == readiness).collect::<Vec<_>>();
    let ready = of(Readiness::Ready);
    let chosen = if ready.is_empty() {
        of(Readiness::Draining)
    } else if port.local {
        ready
    } else {
        near(ready, own)
    };
    chosen.into_iter().map(|e| e.address).collect()
}

/// The endpoints whose hints name the client's node or zone; all of them if the hints do not decide.
fn near<'a>(ready: Vec<&'a Endpoint>, own: &Place) -> Vec<&'a Endpoint> {
    let hinted = |hints: fn(&'a Endpoint) -> &'a [String], own: &String| {
        let complete = ready.iter().all(|e| !hints(e).is_empty());
        let named: Vec<_> = ready.iter().copied().filter(|e| !own.is_empty() && hints(e).contains(own)).collect();
        (complete && !named.is_empty()).then_some(named)
    };
    let node = hinted(|e| &e.hints.nodes, &own.node);
    node.or_else(|| hinted(|e| &e.hints.zones, &own.zone)).unwrap_or(ready)
}

#[cfg(test)]
mod tests {
    use countersign_identity::directory::Hints;

    use super::*;
    use Readiness::{Draining, NotReady, Ready};

    /// An endpoint by the last part of its address, on a node of that name.
    fn at(number: u8, readiness: Readiness, node: &str) -> Endpoint {
        Endpoint {
            address: SocketAddr::from(([10, 0, 0, number], 80)),
            meshed: true,
            readiness,
            node: node.into(),
            hints: Hints::default(),
        }
    }

    fn hinted(number: u8, nodes: &[&str], zones: &[&str]) -> Endpoint {
        let owned = |all: &[&str]| all.iter().map(|t| (*t).to_owned()).collect();
        Endpoint { hints: Hints { nodes: owned(nodes), zones: owned(zones) }, ..at(number, Ready, "") }
    }

    /// What a client on node `n1` in zone `z1` may use.
    fn used(endpoints: Vec<Endpoint>, local: bool, strict: bool) -> Vec<u8> {
        let own = Place { node: "n1".into(), zone: "z1".into() };
        numbers(&ServicePort { endpoints, affinity: None, local }, &own, strict)
    }

    fn numbers(port: &ServicePort, own: &Place, strict: bool) -> Vec<u8> {
        let last = |a: SocketAddr| match a {
            SocketAddr::V4(a) => a.ip().octets()[3],
            SocketAddr::V6(_) => 0,
        };
        eligible(port, own, strict).into_iter().map(last).collect()
    }

    #[test]
    fn ready_endpoints_are_used_and_draining_ones_where_none_is_ready() {
        let all = |first| vec![at(1, first, "n1"), at(2, Draining, "n2"), at(3, NotReady, "n1")];
        assert_eq!(used(all(Ready), false, false), [1]);
        assert_eq!(used(all(NotReady), false, false), [2]);
        assert_eq!(used(vec![at(3, NotReady, "n1")], false, false), [] as [u8; 0]);
    }

    #[test]
    fn a_local_port_never_leaves_the_node() {
        let all = |first, second| vec![at(1, first, "n1"), at(2, second, "n1"), at(3, Ready, "n2")];
        assert_eq!(used(all(Ready, Draining), true, false), [1]);
        assert_eq!(used(all(NotReady, Draining), true, false), [2], "a draining one here, not a ready one elsewhere");
        assert_eq!(used(all(NotReady, NotReady), true, false), [] as [u8; 0]);
        // A client that does not know its node is on none, and neither is an endpoint without a node.
        let port = ServicePort { endpoints: vec![at(1, Ready, "")], affinity: None, local: true };
        assert_eq!(numbers(&port, &Place::default(), false), [] as [u8; 0]);
    }

    #[test]
    fn hints_count_if_every_ready_endpoint_has_some_and_one_is_ours() {
        let zones = || vec![hinted(1, &[], &["z1"]), hinted(2, &[], &["z2"]), hinted(3, &[], &["z2", "z1"])];
        assert_eq!(used(zones(), false, false), [1, 3]);
        let mut one_without = zones();
        one_without.push(at(4, Ready, "n1"));
        assert_eq!(used(one_without.clone(), false, false), [1, 2, 3, 4]);
        one_without[3].readiness = Draining;
        assert_eq!(used(one_without, false, false), [1, 3], "hints of endpoints that are not ready do not matter");
        assert_eq!(used(vec![hinted(1, &[], &["z2"]), hinted(2, &[], &["z3"])], false, false), [1, 2]);
        // The node comes before the zone, which decides where no endpoint names the node.
        let both = |node| vec![hinted(1, &[node], &["z1"]), hinted(2, &["n2"], &["z1"]), hinted(3, &["n3"], &["z3"])];
        assert_eq!(used(both("n1"), false, false), [1]);
        assert_eq!(used(both("n4"), false, false), [1, 2]);
        let port = ServicePort { endpoints: both("n1"), ..ServicePort::default() };
        assert_eq!(numbers(&port, &Place::default(), false), [1, 2, 3], "a place that is not known matches nothing");
        // Local is a rule, hints are a preference.
        let mut local = both("n2");
        local.iter_mut().for_each(|e| e.node = "n1".into());
        assert_eq!(used(local, true, false), [1, 2, 3]);
    }

    #[test]
    fn for_a_strict_client_what_is_not_meshed_is_not_there() {
        let mut all = vec![at(1, Ready, "n1"), at(2, Draining, "n1"), at(3, Ready, "n2")];
        all[0].meshed = false;
        assert_eq!(used(all.clone(), false, true), [3]);
        assert_eq!(used(all.clone(), true, true), [2]);
        assert_eq!(used(all, true, false), [1]);
        // No hint leads to an endpoint that may not be used, and none keeps from one that may.
        let mut zones = vec![hinted(1, &[], &["z1"]), hinted(2, &[], &["z2"])];
        zones[0].meshed = false;
        assert_eq!(used(zones, false, true), [2]);
    }
}
