use serde_json::{Value, json};

use super::*;

fn slice(endpoint: Value) -> SliceEndpoint {
    let read: EndpointSlice = serde_json::from_value(json!({
        "addressType": "IPv4",
        "metadata": { "name": "web-1", "labels": { "kubernetes.io/service-name": "web" } },
        "endpoints": [endpoint],
    }))
    .unwrap();
    Slice::read(&read).unwrap().endpoints.remove(0)
}

fn service(spec: Value, ingress: &Value) -> Service {
    let read: v1::Service = serde_json::from_value(json!({
        "metadata": { "name": "web", "namespace": "shop", "uid": "u" },
        "spec": spec,
        "status": { "loadBalancer": { "ingress": ingress } },
    }))
    .unwrap();
    Service::read(&read).unwrap()
}

#[test]
fn conditions_that_are_missing_have_the_defaults_of_the_api() {
    let readiness = |conditions| slice(json!({ "addresses": ["10.0.0.1"], "conditions": conditions })).readiness;
    assert_eq!(readiness(json!({})), Readiness::Ready);
    assert_eq!(readiness(json!({ "ready": false })), Readiness::NotReady);
    assert_eq!(readiness(json!({ "ready": false, "terminating": true })), Readiness::Draining);
    let ended = json!({ "ready": false, "serving": false, "terminating": true });
    assert_eq!(readiness(ended), Readiness::NotReady);
    // publishNotReadyAddresses: the slice says ready, whatever the pod is.
    let published = json!({ "ready": true, "serving": false, "terminating": true });
    assert_eq!(readiness(published), Readiness::Ready);
}

#[test]
fn an_endpoint_has_its_node_and_a_bounded_number_of_hints() {
    let zones: Vec<Value> = (0..20).map(|n| json!({ "name": format!("z{n}") })).collect();
    let hints = json!({ "forZones": zones, "forNodes": [{ "name": "n1" }] });
    let read = slice(json!({ "addresses": ["10.0.0.1"], "nodeName": "n1", "hints": hints }));
    assert_eq!((read.node.as_str(), read.hints.nodes.len(), read.hints.zones.len()), ("n1", 1, MAX_HINTS));
}

#[test]
fn a_services_promises_are_read() {
    let affinity = |spec| service(spec, &json!([])).affinity.map(|a| a.as_secs());
    assert_eq!(affinity(json!({ "sessionAffinity": "None" })), None);
    assert_eq!(affinity(json!({ "sessionAffinity": "ClientIP" })), Some(10_800));
    let config = json!({ "clientIP": { "timeoutSeconds": 60 } });
    assert_eq!(affinity(json!({ "sessionAffinity": "ClientIP", "sessionAffinityConfig": config })), Some(60));
    let spec = json!({
        "internalTrafficPolicy": "Local",
        "externalIPs": ["192.0.2.1"],
        "ports": [{ "port": 80, "name": "a", "nodePort": 30_080 }, { "port": 53, "protocol": "UDP", "nodePort": 30_053 }],
    });
    let read = service(spec, &json!([]));
    assert_eq!((read.local, read.node_ports), (true, vec![(30_080, "a".to_owned())]));
    assert_eq!(read.external_ips, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
}

#[test]
fn nodes_answer_for_virtual_load_balancer_addresses_that_admit_everybody() {
    let ingress = json!([
        { "ip": "192.0.2.1", "ipMode": "VIP" },
        { "ip": "192.0.2.2", "ipMode": "Proxy" },
        { "ip": "192.0.2.3" },
        { "hostname": "lb.example.org" },
    ]);
    let shown = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    let read = service(json!({}), &ingress);
    assert_eq!(shown(&read.balancer_ips), ["192.0.2.1", "192.0.2.3"]);
    assert_eq!(shown(&read.reserved_ips), ["192.0.2.2"]);
    let narrow = service(json!({ "loadBalancerSourceRanges": ["203.0.113.0/24"] }), &ingress);
    assert!(narrow.balancer_ips.is_empty());
    assert_eq!(narrow.reserved_ips.len(), 3);
}

#[test]
fn addresses_have_one_form_and_a_service_has_no_more_of_them_than_it_may() {
    let mapped = service(json!({ "externalIPs": ["::ffff:10.0.0.1", "10.0.0.1"] }), &json!([]));
    assert_eq!(mapped.external_ips, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    let many: Vec<String> = (0..200).map(|n| format!("192.0.2.{n}")).collect();
    assert_eq!(service(json!({ "externalIPs": many }), &json!([])).external_ips.len(), MAX_OUTER);
}

#[test]
fn a_node_has_its_zone_and_its_internal_addresses() {
    let read: v1::Node = serde_json::from_value(json!({
        "metadata": { "name": "n1", "uid": "u", "labels": { ZONE: "z1" } },
        "status": { "addresses": [
            { "type": "InternalIP", "address": "10.89.0.1" },
            { "type": "ExternalIP", "address": "203.0.113.9" },
            { "type": "Hostname", "address": "n1" },
        ] },
    }))
    .unwrap();
    let node = Node { uid: "u".into(), zone: "z1".into(), addresses: vec!["10.89.0.1".parse().unwrap()] };
    assert_eq!(Node::read(&read), Some(node));
}
