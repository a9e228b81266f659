//! Conversions between pods, `SpiffeID` objects and registration entries, without I/O.

use std::collections::BTreeSet;

use countersign_api::spire::types::{Entry, Selector, Spiffeid};
use countersign_identity::TrustDomain;
use countersign_identity::entry::{MAX_DNS_BYTES, MAX_DNS_NAMES, MAX_FEDERATED};
use countersign_identity::trust_domain::{agent_id, parse_trust_domain, parse_workload_id};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::ResourceExt;

use super::by_hand::is_reserved;
use super::entries::Refused;
use crate::config::RegistrarConfig;
use crate::crd::{Condition, SpiffeID, SpiffeIdSelector, SpiffeIdSpec, SpiffeIdStatus};
use crate::store::{FEDERATES_WITH, Key, Pod, ServiceIndex, Store};

/// Label of the objects that we created.
const MADE_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "countersign");

/// The part of an entry that we maintain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The SPIFFE ID that the entry grants.
    pub spiffe_id: String,
    parent_id: String,
    selectors: BTreeSet<(String, String)>,
    dns_names: Vec<String>,
    federates_with: Vec<String>,
    /// Nobody has set anything else of the entry, such as an end, by which the pod would lose its identity.
    is_ours_alone: bool,
}

/// Whose entry one is: SPIFFE ID, parent and selectors, of which the server has one entry at most.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Subject(String, String, BTreeSet<(String, String)>);

impl Wanted {
    /// Whose entry this is.
    pub fn subject(&self) -> Subject {
        Subject(self.spiffe_id.clone(), self.parent_id.clone(), self.selectors.clone())
    }

    /// Reads an entry from the server.
    pub fn read(entry: &Entry) -> Self {
        let id = |id: &Option<Spiffeid>| {
            id.as_ref().map(|i| format!("spiffe://{}{}", i.trust_domain, i.path)).unwrap_or_default()
        };
        Self {
            spiffe_id: id(&entry.spiffe_id),
            parent_id: id(&entry.parent_id),
            selectors: entry.selectors.iter().map(|s| (s.r#type.clone(), s.value.clone())).collect(),
            dns_names: entry.dns_names.clone(),
            federates_with: entry.federates_with.clone(),
            is_ours_alone: is_plain(entry),
        }
    }

    /// The entry as sent to the server. Errors: an ID or trust domain is invalid.
    pub fn entry(&self, id: &str) -> Result<Entry, String> {
        let wire = |text: &str| {
            let id = parse_workload_id(text).map_err(|e| e.to_string())?;
            Ok::<_, String>(Some(Spiffeid {
                trust_domain: id.trust_domain_name().to_owned(),
                path: id.path().to_owned(),
            }))
        };
        let selectors = self.selectors.iter().map(|(t, v)| Selector { r#type: t.clone(), value: v.clone() });
        Ok(Entry {
            id: id.to_owned(),
            spiffe_id: wire(&self.spiffe_id)?,
            parent_id: wire(&self.parent_id)?,
            selectors: selectors.collect(),
            dns_names: self.dns_names.clone(),
            federates_with: self.federates_with.clone(),
            ..Entry::default()
        })
    }
}

/// Whether an entry has nothing but what [`Wanted::entry`] gives to it, and what the server counts.
fn is_plain(entry: &Entry) -> bool {
    let Entry { id, spiffe_id, parent_id, selectors, dns_names, federates_with, .. } = entry.clone();
    let (revision_number, created_at) = (entry.revision_number, entry.created_at);
    let ours = Entry { id, spiffe_id, parent_id, selectors, dns_names, federates_with, ..Entry::default() };
    *entry == Entry { revision_number, created_at, ..ours }
}

/// Turns the list of a `spiffe.io/federatesWith` annotation into names. One that an entry could not hold is no list: the pod is
/// registered without it, for its identity hangs on it, and other pods' registration must not.
fn federates_with(pod: &Pod, trust_domain: &TrustDomain) -> Vec<String> {
    let listed = pod.annotations.get(FEDERATES_WITH).map(String::as_str).unwrap_or_default();
    let names: BTreeSet<&str> = listed.split(',').map(str::trim).filter(|n| !n.is_empty()).collect();
    let names: Vec<String> = names.into_iter().map(ToOwned::to_owned).collect();
    match judge_federated(&names, trust_domain) {
        Ok(()) => names,
        Err(why) => {
            tracing::warn!(namespace = pod.namespace, pod = pod.name, why, "{FEDERATES_WITH} is left out");
            vec![]
        }
    }
}

/// Why an entry cannot federate with these.
pub fn judge_federated(names: &[String], own: &TrustDomain) -> Result<(), String> {
    if names.len() > MAX_FEDERATED {
        return Err(format!("{} trust domains are too many; at most {MAX_FEDERATED}", names.len()));
    }
    for name in names {
        if parse_trust_domain(name).map_err(|e| e.to_string())? == *own {
            return Err(format!("`{name}` is this mesh's own trust domain"));
        }
    }
    Ok(())
}

/// As many of a pod's names as a certificate holds, in their order.
fn fitting(names: BTreeSet<String>) -> Vec<String> {
    let mut bytes = 0;
    let fits = |name: &String| {
        bytes += name.len();
        bytes <= MAX_DNS_BYTES
    };
    names.into_iter().take(MAX_DNS_NAMES).take_while(fits).collect()
}

/// The object that a pod should have; `None` if it has no node yet, or lacks what its identity is made of.
pub fn object_of(
    pod: &Pod,
    store: &Store,
    services: &ServiceIndex,
    config: &RegistrarConfig,
    trust_domain: &TrustDomain,
) -> Option<SpiffeID> {
    let node = pod.node.clone()?;
    let node_uid = &store.nodes.get(&(String::new(), node.clone()))?.uid;
    let id = match config.template.id_of(pod, trust_domain)? {
        Ok(id) => id,
        Err(error) => {
            tracing::warn!(namespace = pod.namespace, pod = pod.name, %error, "no identity for this pod");
            return None;
        }
    };
    let parent = agent_id(trust_domain, "k8s_psat", &format!("{}/{node_uid}", config.cluster)).ok()?;
    // No pod gets the API server's name, whatever the selector of its Service says.
    let services =
        services.before(pod, store).into_iter().filter(|s| !is_reserved(&s.namespace, &s.name, config, true));
    let dns_names: BTreeSet<String> = services.map(|s| format!("{}.{}.svc", s.name, s.namespace)).collect();
    let spec = SpiffeIdSpec {
        spiffe_id: id.to_string(),
        parent_id: parent.to_string(),
        selector: SpiffeIdSelector {
            pod_uid: Some(pod.uid.clone()),
            node_name: Some(node),
            ..SpiffeIdSelector::default()
        },
        dns_names: fitting(dns_names),
        federates_with: federates_with(pod, trust_domain),
    };
    let owner = OwnerReference {
        api_version: "v1".into(),
        kind: "Pod".into(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        controller: Some(true),
        block_owner_deletion: Some(false),
    };
    let metadata = ObjectMeta {
        name: Some(pod.name.clone()),
        namespace: Some(pod.namespace.clone()),
        labels: Some([(MADE_BY.0.to_owned(), MADE_BY.1.to_owned())].into()),
        owner_references: Some(vec![owner]),
        ..ObjectMeta::default()
    };
    Some(SpiffeID { metadata, spec, status: None })
}

/// What an object says of itself after this outcome.
pub fn status_of(outcome: &Result<String, Refused>) -> SpiffeIdStatus {
    let now = time::OffsetDateTime::now_utc().replace_nanosecond(0).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let (status, reason, message) = match outcome {
        Ok(_) => ("True", "EntryKept", "the registration entry is as it should be"),
        Err(refused) => ("False", "Refused", refused.why.as_str()),
    };
    let condition = Condition {
        kind: "Registered".into(),
        status: status.into(),
        reason: reason.into(),
        message: message.into(),
        last_transition_time: now.format(&time::format_description::well_known::Rfc3339).unwrap_or_default(),
    };
    SpiffeIdStatus { entry_id: outcome.as_ref().ok().cloned(), conditions: vec![condition] }
}

/// The entry of an object. `within`: restricts it to pods of this namespace.
pub fn entry_of(object: &SpiffeID, within: Option<&str>) -> Wanted {
    let mut selectors: BTreeSet<_> = object.spec.selector.selectors().into_iter().collect();
    selectors.extend(within.map(|namespace| ("k8s".to_owned(), format!("ns:{namespace}"))));
    Wanted {
        spiffe_id: object.spec.spiffe_id.clone(),
        parent_id: object.spec.parent_id.clone(),
        selectors,
        dns_names: object.spec.dns_names.clone(),
        federates_with: object.spec.federates_with.clone(),
        is_ours_alone: true,
    }
}

/// The key of an object: namespace and name.
pub fn key_of(object: &SpiffeID) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// Whether we created the object.
pub fn is_ours(object: &SpiffeID) -> bool {
    object.labels().get(MADE_BY.0).map(String::as_str) == Some(MADE_BY.1)
}

/// UID of the pod that the object was created for; `None` if it has no owner.
pub fn owner_uid(object: &SpiffeID) -> Option<&str> {
    object.owner_references().iter().find(|o| o.kind == "Pod").map(|o| o.uid.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Service;

    fn object_with(annotation: &str, services: usize) -> SpiffeID {
        let config = RegistrarConfig {
            server_socket: "/x".into(),
            cluster: "c".into(),
            template: crate::template::DEFAULT.parse().unwrap(),
            excluded_namespaces: BTreeSet::new(),
            lease_namespace: None,
            control_namespace: None,
        };
        let pod = Pod {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: "u".into(),
            service_account: "web".into(),
            node: Some("node1".into()),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            annotations: [(FEDERATES_WITH.to_owned(), annotation.to_owned())].into(),
            ..Pod::default()
        };
        let service = |n: usize| {
            let name = format!("svc-{n:03}-{}", "x".repeat(40));
            let selector = pod.labels.clone();
            let service = Service { namespace: "shop".into(), name: name.clone(), selector, ..Service::default() };
            (("shop".to_owned(), name), service)
        };
        let node = crate::store::Node { uid: "node-uid".into(), ..Default::default() };
        let store = Store {
            nodes: [((String::new(), "node1".to_owned()), node)].into(),
            services: (0..services).map(service).collect(),
            ..Store::default()
        };
        let trust_domain = TrustDomain::new("td").unwrap();
        object_of(&pod, &store, &ServiceIndex::of(&store), &config, &trust_domain).unwrap()
    }

    #[test]
    fn an_entry_that_somebody_gave_an_end_is_not_the_one_that_is_wanted() {
        let object = object_with("", 1);
        let want = entry_of(&object, None);
        let ours = Entry { revision_number: 7, created_at: 9, ..want.entry("k8s.u").unwrap() };
        assert_eq!(Wanted::read(&ours), want);
        let ends = Entry { expires_at: 1, ..ours.clone() };
        let admin = Entry { admin: true, ..ours.clone() };
        let hinted = Entry { hint: "x".into(), ..ours };
        for other in [ends, admin, hinted] {
            assert_ne!(Wanted::read(&other), want, "{other:?}");
        }
    }

    #[test]
    fn a_list_that_no_entry_can_hold_costs_its_pod_the_list_and_nothing_else() {
        let listed = |annotation: &str| object_with(annotation, 0).spec.federates_with;
        assert_eq!(listed(" b.example, a.example,"), ["a.example", "b.example"]);
        let many: Vec<String> = (0..65).map(|n| format!("td{n}")).collect();
        for bad in [many.join(",").as_str(), "a.example,not a name", "a.example,td", &"x".repeat(250_000)] {
            assert_eq!(listed(bad), [] as [&str; 0], "{bad:.40}");
        }
    }

    #[test]
    fn a_pod_behind_more_services_than_a_certificate_can_name_is_registered_with_what_fits() {
        let names = |services| object_with("", services).spec.dns_names;
        assert_eq!(names(100).len(), 100);
        let fitting = names(300);
        assert!(fitting.len() < 256 && fitting.iter().map(String::len).sum::<usize>() <= MAX_DNS_BYTES);
        assert_eq!(fitting, names(300), "the same ones each time");
    }
}
