use super::*;
use crate::kubernetes::check::fake_api::{Answer, Asked, client, refused};
use crate::kubernetes::check::installed::tests::installed;
use serde_json::json;

fn permissions(change: impl FnOnce(&mut Value), version: (u32, u32)) -> Vec<Permission> {
    let installed = installed(change);
    let manifests = installed.manifests("mesh", version).unwrap();
    granted(&manifests, |workload| installed.account_of(workload))
}

fn said(all: &[Permission], account: &str) -> Vec<String> {
    let of = all.iter().filter(|p| p.binding.account.1 == account);
    of.map(|p| format!("{} {}", p.verb, p.on())).collect()
}

#[test]
fn what_each_account_needs_is_the_charts_rules_for_the_settings_in_force() {
    let plain = permissions(|_| {}, (1, 34));
    assert_eq!(said(&plain, "countersign-agent"), ["list pods", "watch pods", "get nodes/pods"]);
    let server = said(&plain, "countersign-server");
    for needed in [
        "create tokenreviews.authentication.k8s.io",
        "patch mutatingwebhookconfigurations.admissionregistration.k8s.io countersign-injector",
        "create configmaps countersign-bundle",
        "update leases.coordination.k8s.io countersign-registrar",
    ] {
        assert!(server.iter().any(|s| s == needed), "{needed} in {server:?}");
    }
    assert!(said(&plain, "countersign-injector").is_empty());
    let kubelets = permissions(|values| values["agent"]["watchPods"] = false.into(), (1, 32));
    assert_eq!(said(&kubelets, "countersign-agent"), ["get nodes/pods", "get nodes/proxy"]);
}

#[test]
fn a_question_is_about_one_subresource_object_and_namespace() {
    let all = permissions(|_| {}, (1, 34));
    let one = |on: &str, verb: &str| all.iter().find(|p| p.on() == on && p.verb == verb).unwrap().review().spec;
    let kubelet = one("nodes/pods", "get");
    assert_eq!(kubelet.user.as_deref(), Some("system:serviceaccount:mesh:countersign-agent"));
    let asked = kubelet.resource_attributes.unwrap();
    assert_eq!((asked.resource.as_deref(), asked.subresource.as_deref()), (Some("nodes"), Some("pods")));
    assert_eq!((asked.namespace, asked.name), (None, None));
    let lease = one("leases.coordination.k8s.io countersign-registrar", "get").resource_attributes.unwrap();
    assert_eq!((lease.namespace.as_deref(), lease.name.as_deref()), (Some("mesh"), Some("countersign-registrar")));
    assert_eq!(lease.group.as_deref(), Some("coordination.k8s.io"));
}

#[test]
fn a_finding_names_account_verbs_resource_and_binding() {
    let all = permissions(|_| {}, (1, 34));
    let lacks: Vec<_> = all.into_iter().filter(|p| p.binding.account.1 == "countersign-agent").collect();
    let fault = lacks[0].binding.lacks(&lacks, Some("there is no ClusterRoleBinding countersign-agent".into()));
    assert_eq!(
        fault.found,
        "there is no ClusterRoleBinding countersign-agent: service account countersign-agent may not get nodes/pods; \
         list, watch pods"
    );
    assert!(fault.mend.contains("they have ClusterRoleBinding countersign-agent and ClusterRole countersign-agent"));
}

#[test]
fn a_binding_of_another_role_or_account_is_none() {
    let binding = permissions(|_| {}, (1, 34))[0].binding.clone();
    let role = |name: &str| RoleRef { name: name.into(), kind: "ClusterRole".into(), ..RoleRef::default() };
    let subject = |name: &str, namespace: &str| {
        let kind = "ServiceAccount".into();
        [Subject { kind, name: name.into(), namespace: Some(namespace.into()), ..Subject::default() }]
    };
    let ours = binding.role.1.clone();
    let account = binding.account.1.clone();
    assert_eq!(binding.differs(&role(&ours), &subject(&account, "mesh")), None);
    assert!(binding.differs(&role("view"), &subject(&account, "mesh")).unwrap().contains("binds ClusterRole view"));
    for (name, namespace) in [("default", "mesh"), (account.as_str(), "other")] {
        assert!(binding.differs(&role(&ours), &subject(name, namespace)).unwrap().contains("does not name"));
    }
}

async fn reviewed_by(api: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Vec<Outcome> {
    let installed = installed(|_| {});
    let manifests = installed.manifests("mesh", (1, 34));
    reviewed(&client(api), &manifests, &installed).await
}

/// Allows everything but what an account asks about.
fn review(asked: &Asked, denied: &str) -> Answer {
    let mut review = asked.body.clone();
    let user = review["spec"]["user"].as_str().unwrap_or_default();
    review["status"] = json!({ "allowed": !user.ends_with(denied) });
    Answer::Now(201, review)
}

fn account(asked: &Asked) -> Answer {
    let name = asked.path.rsplit('/').next().unwrap();
    Answer::Now(200, json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": { "name": name } }))
}

#[tokio::test]
async fn a_deleted_binding_is_named_with_what_its_account_may_not() {
    let api = |asked: &Asked| match asked.path.as_str() {
        path if path.ends_with("/subjectaccessreviews") => review(asked, "countersign-agent"),
        path if path.contains("/serviceaccounts/") => account(asked),
        path => refused(404, path),
    };
    let found = reviewed_by(api).await;
    let [Err(fault)] = found.as_slice() else { panic!("{found:?}") };
    assert!(fault.is_checked && fault.found.starts_with("there is no ClusterRoleBinding countersign-agent: "));
    let well = |asked: &Asked| match asked.path.as_str() {
        path if path.ends_with("/subjectaccessreviews") => review(asked, "nobody"),
        _ => account(asked),
    };
    let found = reviewed_by(well).await;
    let [Ok(found)] = found.as_slice() else { panic!("{found:?}") };
    assert!(found.contains("countersign-agent has all 3, countersign-server has all "), "{found}");
}

#[tokio::test]
async fn who_may_not_ask_for_reviews_is_told_that_nothing_was_checked() {
    let found = reviewed_by(|_| refused(403, "may not create")).await;
    let [Err(fault)] = found.as_slice() else { panic!("{found:?}") };
    assert!(!fault.is_checked && fault.found == "may not create" && fault.mend.contains("subjectaccessreviews"));
}

#[tokio::test]
async fn a_service_account_that_is_gone_is_named_whatever_it_may() {
    let api = |asked: &Asked| match asked.path.as_str() {
        path if path.ends_with("/subjectaccessreviews") => review(asked, "nobody"),
        path => refused(404, path),
    };
    let found = reviewed_by(api).await;
    assert_eq!(found.len(), 2);
    assert!(found[0].as_ref().unwrap_err().found.contains("no service account countersign-agent"));
}
