//! Rules for `SpiffeID` objects that were made by hand.
//!
//! Who may create such objects in a namespace gives identities to pods of that namespace, and must gain no more than by
//! creating pods there: a SPIFFE ID that the template could give to one of its pods, names of its own Services, the
//! agent of a node of this cluster. Names of our own installation are reserved.

use countersign_identity::TrustDomain;
use countersign_identity::trust_domain::{agent_id, parse_workload_id};
use kube::ResourceExt;

use super::object::{Wanted, entry_of, judge_federated};
use crate::config::RegistrarConfig;
use crate::crd::SpiffeID;
use crate::store::Store;

/// The default domain of Services in Kubernetes.
const CLUSTER_DOMAIN: &str = "cluster.local";
/// Most DNS names per object.
const MAX_NAMES: usize = 64;
/// Selectors of one object, at most.
const MAX_SELECTORS: usize = 64;
/// Selectors of one object together, in bytes, at most.
const MAX_SELECTOR_BYTES: usize = 16 * 1024;
/// The API server's own Service: whoever has its name in a certificate stands for it.
const API_SERVER: (&str, &str) = ("default", "kubernetes");

/// Whether no pod's certificate may contain the names of this Service: the API server's and, unless `by_us`, those of
/// our own installation.
pub fn is_reserved(namespace: &str, service: &str, config: &RegistrarConfig, by_us: bool) -> bool {
    (namespace, service) == API_SERVER || !by_us && config.control_namespace.as_deref() == Some(namespace)
}

/// The registration entry of an object made by hand. Errors: the rule that it breaks.
pub fn entry_by_hand(
    object: &SpiffeID,
    store: &Store,
    config: &RegistrarConfig,
    trust_domain: &TrustDomain,
) -> Result<Wanted, String> {
    let namespace = object.namespace().unwrap_or_default();
    if config.control_namespace.as_deref() == Some(namespace.as_str()) {
        return Err(format!(
            "identities of namespace {namespace}, where Countersign itself runs, are not given by hand"
        ));
    }
    if config.excluded_namespaces.contains(&namespace) {
        return Err(format!(
            "namespace {namespace} is one whose pods get no identity (registrar's --exclude-namespaces)"
        ));
    }
    let spec = &object.spec;
    let id = parse_workload_id(&spec.spiffe_id).map_err(|e| format!("spiffeId: {e}"))?;
    if id.trust_domain_name() != trust_domain.to_string() {
        return Err(format!("spiffeId: `{id}` is not of trust domain {trust_domain}"));
    }
    if !config.template.could_give(id.path(), &namespace) {
        return Err(format!(
            "spiffeId: `{id}` is none that a pod of namespace {namespace} could have: they are {}",
            config.template.shape_in(&namespace)
        ));
    }
    let mut agents = store
        .nodes
        .values()
        .filter_map(|node| agent_id(trust_domain, "k8s_psat", &format!("{}/{}", config.cluster, node.uid)).ok());
    if !agents.any(|agent| agent.to_string() == spec.parent_id) {
        return Err(format!(
            "parentId: `{}` is not the agent of a node of this cluster (spiffe://{trust_domain}/spire/agent/k8s_psat/{}/NODE-UID)",
            spec.parent_id, config.cluster
        ));
    }
    if spec.dns_names.len() > MAX_NAMES {
        return Err(format!("dnsNames: {} are too many; at most {MAX_NAMES}", spec.dns_names.len()));
    }
    for name in &spec.dns_names {
        judge_name(name, &namespace, store, config).map_err(|why| format!("dnsNames: `{name}` {why}"))?;
    }
    judge_federated(&spec.federates_with, trust_domain).map_err(|why| format!("federatesWith: {why}"))?;
    let selectors = spec.selector.selectors();
    let bytes: usize = selectors.iter().map(|(kind, value)| kind.len() + 1 + value.len()).sum();
    if selectors.len() > MAX_SELECTORS || bytes > MAX_SELECTOR_BYTES {
        return Err(format!(
            "selector: {} selectors with {bytes} bytes are too many; at most {MAX_SELECTORS} with {MAX_SELECTOR_BYTES} bytes",
            selectors.len()
        ));
    }
    // Selectors are only ever narrowed: this binds them to pods of the object's namespace.
    Ok(entry_of(object, Some(&namespace)))
}

/// Checks a DNS name: it must be a Service of this namespace, spelled in a form that no public name can have
/// (`web.shop` could be one).
fn judge_name(name: &str, namespace: &str, store: &Store, config: &RegistrarConfig) -> Result<(), String> {
    let service =
        name.strip_suffix(&format!(".{CLUSTER_DOMAIN}")).unwrap_or(name).strip_suffix(&format!(".{namespace}.svc"));
    let shape = || {
        format!(
            "is no name of a Service of namespace {namespace}: write NAME.{namespace}.svc or NAME.{namespace}.svc.{CLUSTER_DOMAIN}"
        )
    };
    let service = service.filter(|s| !s.is_empty() && !s.contains('.')).ok_or_else(shape)?;
    if is_reserved(namespace, service, config, false) {
        return Err("is reserved".into());
    }
    if !store.services.contains_key(&(namespace.to_owned(), service.to_owned())) {
        return Err(format!("names Service {service}, which namespace {namespace} does not have"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Service;

    const PARENT: &str = "spiffe://td/spire/agent/k8s_psat/c/node-uid";

    fn config() -> RegistrarConfig {
        RegistrarConfig {
            server_socket: "/x".into(),
            cluster: "c".into(),
            template: crate::template::DEFAULT.parse().unwrap(),
            excluded_namespaces: ["kube-system".to_owned()].into(),
            lease_namespace: None,
            control_namespace: Some("countersign".into()),
        }
    }

    fn store() -> Store {
        let service = |namespace: &str, name: &str| {
            let service = Service { namespace: namespace.into(), name: name.into(), ..Service::default() };
            ((namespace.to_owned(), name.to_owned()), service)
        };
        let node = crate::store::Node { uid: "node-uid".into(), ..Default::default() };
        Store {
            nodes: [((String::new(), "node1".to_owned()), node)].into(),
            services: [
                service("evil", "web"),
                service("victim", "web"),
                service("default", "kubernetes"),
                service("default", "web"),
                service("countersign", "countersign-injector"),
            ]
            .into(),
            ..Store::default()
        }
    }

    fn judged(namespace: &str, change: impl FnOnce(&mut SpiffeID)) -> Result<Wanted, String> {
        let mut object = SpiffeID::new("by-hand", crate::crd::SpiffeIdSpec::default());
        object.metadata.namespace = Some(namespace.to_owned());
        object.spec.spiffe_id = format!("spiffe://td/ns/{namespace}/sa/web");
        object.spec.parent_id = PARENT.into();
        change(&mut object);
        entry_by_hand(&object, &store(), &config(), &TrustDomain::new("td").unwrap())
    }

    #[test]
    fn an_identity_that_the_namespaces_pods_could_have_is_given_to_its_pods_alone() {
        let names = ["web.evil.svc", "web.evil.svc.cluster.local"].map(ToOwned::to_owned);
        let wanted = judged("evil", |o| {
            o.spec.dns_names = names.to_vec();
            o.spec.selector.arbitrary = vec!["k8s:ns:victim".into()];
        });
        let entry = wanted.unwrap().entry("k8s.1").unwrap();
        assert_eq!(entry.dns_names, names);
        let selectors: Vec<String> = entry.selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect();
        assert!(selectors.contains(&"k8s:ns:evil".to_owned()), "{selectors:?}");
    }

    #[test]
    fn anothers_identity_name_or_agent_is_refused_and_said() {
        type Change = Box<dyn FnOnce(&mut SpiffeID)>;
        let id = |id: &'static str| -> Change { Box::new(move |o| o.spec.spiffe_id = id.into()) };
        let name = |name: &'static str| -> Change { Box::new(move |o| o.spec.dns_names = vec![name.into()]) };
        let parent = |parent: &'static str| -> Change { Box::new(move |o| o.spec.parent_id = parent.into()) };
        let cases: Vec<(&str, Change, &str)> = vec![
            ("evil", id("spiffe://td/ns/victim/sa/default"), "is none that a pod of namespace evil could have"),
            ("evil", id("spiffe://td/ns/evil/sa/a/b"), "is none that a pod"),
            ("evil", id("spiffe://td/ns/evil/sa/web/../../victim"), "spiffeId:"),
            ("evil", id("spiffe://other/ns/evil/sa/web"), "is not of trust domain td"),
            ("evil", id("spiffe://td/spire/server"), "spiffeId:"),
            ("evil", name("countersign-injector.countersign.svc"), "is no name of a Service of namespace evil"),
            ("evil", name("kubernetes.default.svc"), "is no name of a Service of namespace evil"),
            ("default", name("kubernetes.default.svc"), "is reserved"),
            ("default", name("kubernetes.default.svc.cluster.local"), "is reserved"),
            ("evil", name("web.victim.svc"), "is no name"),
            ("evil", name("web"), "is no name"),
            ("evil", name("web.evil"), "is no name"),
            ("evil", name("web.evil.svc.example.com"), "is no name"),
            ("evil", name("*.evil.svc"), "names Service *"),
            ("evil", name("a.web.evil.svc"), "is no name"),
            ("evil", name("other.evil.svc"), "which namespace evil does not have"),
            ("evil", name(".evil.svc"), "is no name"),
            ("evil", parent("spiffe://td/spire/agent/k8s_psat/c/other"), "parentId:"),
            ("evil", parent("spiffe://td/spire/server"), "parentId:"),
            ("evil", parent(""), "parentId:"),
            ("countersign", id("spiffe://td/ns/countersign/sa/countersign-injector"), "not given by hand"),
            ("kube-system", id("spiffe://td/ns/kube-system/sa/default"), "get no identity"),
        ];
        for (namespace, change, said) in cases {
            let why = judged(namespace, change).unwrap_err();
            assert!(why.contains(said), "{why}\nshould say: {said}");
        }
        let many = vec!["web.evil.svc".to_owned(); MAX_NAMES + 1];
        assert!(judged("evil", |o| o.spec.dns_names = many).unwrap_err().contains("too many"));
    }

    #[test]
    fn what_would_not_fit_into_lists_with_others_is_refused_and_said() {
        let federated = |names: Vec<String>| judged("evil", |o| o.spec.federates_with = names);
        let domains = |n: usize| (0..n).map(|n| format!("td{n}")).collect::<Vec<_>>();
        assert!(federated(domains(64)).is_ok());
        assert!(federated(domains(65)).unwrap_err().starts_with("federatesWith: 65 trust domains are too many"));
        assert!(federated(vec!["td".into()]).unwrap_err().contains("own trust domain"));
        assert!(federated(vec!["a b".into()]).unwrap_err().starts_with("federatesWith: "));
        let arbitrary = |all: Vec<String>| judged("evil", |o| o.spec.selector.arbitrary = all);
        assert!(arbitrary((0..64).map(|n| format!("unix:uid:{n}")).collect()).is_ok());
        assert!(arbitrary((0..65).map(|n| format!("unix:uid:{n}")).collect()).unwrap_err().contains("65 selectors"));
        assert!(arbitrary(vec![format!("k8s:sa:{}", "x".repeat(1_000_000))]).unwrap_err().starts_with("selector: "));
        let image = judged("evil", |o| o.spec.selector.container_image = Some("x".repeat(20_000)));
        assert!(image.unwrap_err().starts_with("selector: "), "each field, not the list alone");
    }
}
