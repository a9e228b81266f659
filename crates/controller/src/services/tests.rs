use std::time::Duration;

use countersign_identity::directory::{Hints, Readiness};

use super::*;
use crate::store::{Node, Pod, SliceEndpoint};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn key(namespace: &str, name: &str) -> Key {
    (namespace.to_owned(), name.to_owned())
}

fn service(namespace: &str, address: &str, created: i64) -> store::Service {
    store::Service {
        uid: format!("s-{namespace}"),
        namespace: namespace.into(),
        name: "web".into(),
        addresses: vec![ip(address)],
        ports: vec![(80, "http".into())],
        created,
        ..store::Service::default()
    }
}

fn slice(service: &str, address: &str, node: &str) -> Slice {
    let endpoint =
        SliceEndpoint { address: ip(address), readiness: Readiness::Ready, node: node.into(), hints: Hints::default() };
    Slice { service: service.into(), endpoints: vec![endpoint], ports: vec![("http".into(), 8080)] }
}

/// Two namespaces with a Service and a meshed pod each, one node, and the API server on it.
fn store() -> Store {
    let pod = |namespace: &str, address: &str, host_network| {
        let pod = Pod { addresses: vec![ip(address)], meshed: true, host_network, ..Pod::default() };
        (key(namespace, "web"), pod)
    };
    let node = Node { uid: "n".into(), zone: "z1".into(), addresses: vec![ip("10.89.0.1")] };
    Store {
        pods: [pod("old", "10.0.0.1", false), pod("new", "10.0.0.2", false), pod("kube-system", "10.89.0.2", true)]
            .into(),
        nodes: [(key("", "node1"), node)].into(),
        services: [
            (key("old", "web"), service("old", "10.91.0.1", 1)),
            (key("new", "web"), service("new", "10.91.0.2", 2)),
        ]
        .into(),
        slices: [
            (key("old", "web-1"), slice("web", "10.0.0.1", "node1")),
            (key("new", "web-1"), slice("web", "10.0.0.2", "node1")),
            (key("default", "kubernetes"), slice("kubernetes", "10.88.0.1", "")),
        ]
        .into(),
        ..Store::default()
    }
}

/// All services of the directory by UID. `in_mesh`: the addresses of meshed workloads.
fn services(store: &Store, leave: &Leave, in_mesh: &HashSet<IpAddr>) -> HashMap<String, Service> {
    let mut index = Index::default();
    in_mesh.iter().for_each(|ip| index.in_mesh.add(ip));
    for pod in store.pods.values() {
        let counted = if pod.host_network { &mut index.on_nodes } else { &mut index.pods };
        pod.addresses.iter().filter(|_| pod.host_network || !pod.over).for_each(|ip| counted.add(ip));
    }
    for (key, slice) in &store.slices {
        index.slices.entry((key.0.clone(), slice.service.clone())).or_default().insert(key.clone());
    }
    let view = View { store, index: &index, leave };
    let inner = store.services.values().filter_map(|service| view.virtual_addresses(service));
    inner.chain(view.outer()).map(|service| (service.uid.clone(), service)).collect()
}

fn of<'a>(store: &'a mut Store, namespace: &str) -> &'a mut store::Service {
    store.services.get_mut(&key(namespace, "web")).unwrap()
}

fn made(store: &Store) -> HashMap<String, Service> {
    let in_mesh = [ip("10.0.0.1"), ip("10.0.0.2")].into();
    services(store, &Leave::of(["trusted".to_owned()]), &in_mesh)
}

/// Who is behind a port of an address, and whether that is a mere claim.
fn behind(made: &HashMap<String, Service>, address: &str, port: u16) -> Option<(String, bool)> {
    let mut at = made.values().filter(|s| s.addresses.contains(&ip(address)));
    let service = at.next()?;
    assert!(at.next().is_none(), "one answer for an address");
    service.endpoints(port).first().map(|e| (e.address.to_string(), service.claimed))
}

fn first(claimed: bool) -> (String, bool) {
    ("10.0.0.1:8080".to_owned(), claimed)
}

#[test]
fn a_services_rules_go_with_its_ports_and_nodes_are_named_where_they_count() {
    let mut store = store();
    let web = of(&mut store, "old");
    let minute = Some(Duration::from_secs(60));
    (web.affinity, web.local) = (minute, true);
    (web.external_ips, web.node_ports) = (vec![ip("192.0.2.1")], vec![(30_080, "http".into())]);
    let made = made(&store);
    let node = |port: &ServicePort| port.endpoints[0].node.clone();
    let (inside, outside, on_nodes) =
        (&made["s-old"].ports[&80], &made["outer/192.0.2.1"].ports[&80], &made["node-ports"].ports[&30_080]);
    assert_eq!((inside.affinity, inside.local, node(inside).as_str()), (minute, true, "node1"));
    for port in [outside, on_nodes] {
        assert_eq!((port.affinity, port.local, node(port).as_str()), (minute, false, ""), "from anywhere");
    }
    let plain = &made["s-new"].ports[&80];
    assert_eq!((plain.affinity, plain.local, node(plain).as_str()), (None, false, ""));
}

#[test]
fn a_claim_never_takes_an_address_that_the_cluster_has() {
    let mut store = store();
    let before = made(&store);
    // A Service's, a pod's, a pod's on its node's network, a node's, the API server's.
    let attacked = ["10.91.0.1", "10.0.0.1", "10.89.0.2", "10.89.0.1", "10.88.0.1"];
    let evil = of(&mut store, "new");
    evil.external_ips = attacked.map(ip).to_vec();
    evil.balancer_ips = evil.external_ips.clone();
    assert_eq!(made(&store), before);
    // A pod that is over has no address any more.
    store.pods.get_mut(&key("old", "web")).unwrap().over = true;
    assert!(behind(&made(&store), "10.0.0.1", 80).is_some());
}

#[test]
fn a_load_balancers_address_that_nodes_do_not_answer_for_is_nobodys_to_claim() {
    let mut store = store();
    of(&mut store, "old").reserved_ips = vec![ip("192.0.2.1")];
    of(&mut store, "new").external_ips = vec![ip("192.0.2.1")];
    assert_eq!(behind(&made(&store), "192.0.2.1", 80), None);
}

#[test]
fn the_better_founded_claim_has_an_address_and_the_older_one_a_port() {
    let outer = "192.0.2.1";
    let mut store = store();
    of(&mut store, "old").external_ips = vec![ip(outer)];
    of(&mut store, "new").external_ips = vec![ip(outer)];
    of(&mut store, "new").ports.push((443, "http".into()));
    let shared = made(&store);
    assert_eq!(behind(&shared, outer, 80), Some(first(true)), "the older one's");
    assert_eq!(behind(&shared, outer, 443), Some(("10.0.0.2:8080".to_owned(), true)), "nobody else's");
    // What a load balancer gave is its Service's alone, ports included that it does not have.
    of(&mut store, "old").created = 3;
    of(&mut store, "old").balancer_ips = vec![ip(outer)];
    let given = made(&store);
    assert_eq!((behind(&given, outer, 80), behind(&given, outer, 443)), (Some(first(false)), None));
    // A namespace that the administrator trusts comes before others, and strict callers believe it.
    of(&mut store, "old").balancer_ips.clear();
    of(&mut store, "old").namespace = "trusted".into();
    let slice = store.slices.remove(&key("old", "web-1")).unwrap();
    store.slices.insert(key("trusted", "web-1"), slice);
    let trusted = made(&store);
    assert_eq!((behind(&trusted, outer, 80), behind(&trusted, outer, 443)), (Some(first(false)), None));
}

#[test]
fn nodes_and_outer_addresses_have_the_ports_that_lead_into_the_mesh() {
    let mut store = store();
    let web = of(&mut store, "old");
    web.node_ports = vec![(30_080, "http".into())];
    web.external_ips = vec![ip("192.0.2.1")];
    let published = made(&store);
    assert_eq!(behind(&published, "10.89.0.1", 30_080), Some(first(false)));
    assert_eq!(behind(&published, "10.89.0.1", 10_250), None);
    assert_eq!(published.len(), 4);
    // A node that says it has another's address does not get it.
    store.nodes.get_mut(&key("", "node1")).unwrap().addresses.extend([ip("10.91.0.2"), ip("10.0.0.2")]);
    assert_eq!(made(&store)["node-ports"].addresses, [ip("10.89.0.1")]);
    // Without a meshed endpoint they are the network's.
    let bare = services(&store, &Leave::default(), &HashSet::new());
    assert_eq!(bare.len(), 2);
    assert!(bare.contains_key("s-old") && bare.contains_key("s-new"));
}

#[test]
fn an_endpoint_that_is_listed_twice_is_as_ready_as_the_better_one_says() {
    let (mut worse, better) = (slice("web", "10.0.0.1", "n"), slice("web", "10.0.0.1", "n"));
    worse.endpoints[0].readiness = Readiness::NotReady;
    let all = endpoints(&[&worse, &better], "http", |_| false);
    assert_eq!(all.iter().map(|e| e.readiness).collect::<Vec<_>>(), [Readiness::Ready]);
}
