//! Duration of one pass in a large cluster: `cargo test --release -p countersign-controller --lib bench -- --ignored
//! --nocapture`.

use std::collections::BTreeSet;
use std::time::Instant;

use super::*;
use crate::store::{Pod, Service};

const PODS: usize = 5_000;
const SERVICES: usize = 500;

/// Pods of 20 namespaces with 25 services each, on 100 nodes; each pod is behind one service.
fn cluster() -> Store {
    let mut store = Store::default();
    for node in 0..100 {
        store.nodes.insert((String::new(), format!("node-{node}")), format!("node-uid-{node}"));
    }
    for number in 0..SERVICES {
        let (namespace, name) = (format!("ns-{}", number % 20), format!("svc-{number}"));
        let service = Service {
            uid: format!("s-{number}"),
            namespace: namespace.clone(),
            name: name.clone(),
            selector: [("app".to_owned(), name.clone())].into(),
            ..Service::default()
        };
        store.services.insert((namespace, name), service);
    }
    for number in 0..PODS {
        let (namespace, name) = (format!("ns-{}", number % 20), format!("pod-{number}"));
        let app = format!("svc-{}", number % SERVICES);
        let pod = Pod {
            namespace: namespace.clone(),
            name: name.clone(),
            uid: format!("p-{number}"),
            service_account: "web".into(),
            node: Some(format!("node-{}", number % 100)),
            labels: [("app", app.as_str()), ("tier", "web"), ("version", "v1")]
                .map(|(k, v)| (k.into(), v.into()))
                .into(),
            ..Pod::default()
        };
        store.pods.insert((namespace, name), pod);
    }
    store
}

#[test]
#[ignore = "prints figures, judges the products alone"]
fn bench_a_pass_over_5000_pods_and_500_services() {
    let config = RegistrarConfig {
        server_socket: "/x".into(),
        cluster: "c".into(),
        template: crate::template::DEFAULT.parse().unwrap(),
        excluded_namespaces: BTreeSet::new(),
        lease_namespace: None,
        control_namespace: None,
    };
    let (store, td) = (cluster(), TrustDomain::new("td").unwrap());
    let began = Instant::now();
    let by_product: usize = store.pods.values().map(|p| store.services.values().filter(|s| s.selects(p)).count()).sum();
    let product = began.elapsed();
    let began = Instant::now();
    let index = ServiceIndex::of(&store);
    let by_index: usize = store.pods.values().map(|p| index.before(p).len()).sum();
    let indexed = began.elapsed();
    let began = Instant::now();
    let wanted = desired(&store, &config, &td);
    let desired_took = began.elapsed();
    let began = Instant::now();
    let left = steps(&wanted, &wanted).len();
    let steps_took = began.elapsed();
    eprintln!(
        "{PODS} pods, {SERVICES} services: pods x services {product:.1?}, by index {indexed:.1?}; objects {desired_took:.1?}, steps {steps_took:.1?}"
    );
    assert_eq!((by_product, by_index, wanted.len(), left), (PODS, PODS, PODS, 0));
    assert!(indexed < product);
}
