//! Whether each role's service account may do what the chart's own rules grant it. The API server itself is asked, so that a
//! deleted binding, an edited role, and an authorizer beside RBAC all show.

use std::collections::BTreeMap;

use countersign_watch::in_words;
use futures::stream::{self, StreamExt, TryStreamExt};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule, Role, RoleBinding, RoleRef, Subject};
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::finding::{Fault, Outcome};
use super::installed::Installed;

/// Reviews that are asked for at once.
const AT_ONCE: usize = 16;

/// A binding of a role to a service account, as the chart has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Binding {
    /// `None` for a `ClusterRoleBinding`, which counts in every namespace.
    namespace: Option<String>,
    name: String,
    /// Kind and name of the role.
    role: (String, String),
    /// Namespace and name.
    account: (String, String),
}

/// What the chart grants, one verb on one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Permission {
    binding: Binding,
    verb: String,
    group: String,
    /// With its subresource, `nodes/pods`.
    resource: String,
    /// The only object that it counts for.
    object: Option<String>,
}

/// Has the API server review everything that the manifests grant.
pub(super) async fn reviewed(
    client: &Client,
    manifests: &anyhow::Result<Vec<Value>>,
    installed: &Installed,
) -> Vec<Outcome> {
    let manifests = match manifests {
        Ok(manifests) => manifests,
        Err(error) => return vec![Err(Fault::unchecked(error.to_string(), "this is a bug of this command"))],
    };
    let permissions = granted(manifests, |workload| installed.account_of(workload));
    match lacking(client, &permissions).await {
        Ok(lacking) => judged(client, &permissions, lacking).await,
        Err(error) => {
            let mend = "have `create` on subjectaccessreviews.authorization.k8s.io granted to you";
            vec![Err(Fault::unread(&error, mend))]
        }
    }
}

/// Everything that the roles and bindings among these objects grant to service accounts. `account`: that of the installed
/// workload which the chart runs under this name.
fn granted<'a>(manifests: &[Value], account: impl Fn(&str) -> Option<&'a str>) -> Vec<Permission> {
    let everywhere = of_kind::<ClusterRoleBinding>(manifests, "ClusterRoleBinding").into_iter();
    let everywhere = everywhere.map(|binding| (None, binding.name_any(), binding.role_ref, binding.subjects));
    let in_one = of_kind::<RoleBinding>(manifests, "RoleBinding").into_iter();
    let in_one = in_one.map(|binding| (binding.namespace(), binding.name_any(), binding.role_ref, binding.subjects));
    let bindings = everywhere.chain(in_one);
    let granted = bindings.flat_map(|(namespace, name, role, subjects)| {
        of_binding(manifests, namespace, &name, &role, subjects.unwrap_or_default(), &account)
    });
    granted.collect()
}

fn of_binding<'a>(
    manifests: &[Value],
    namespace: Option<String>,
    name: &str,
    role: &RoleRef,
    subjects: Vec<Subject>,
    account: &impl Fn(&str) -> Option<&'a str>,
) -> Vec<Permission> {
    let accounts = subjects.into_iter().filter(|s| s.kind == "ServiceAccount").map(|subject| {
        let own = account(&subject.name).unwrap_or(&subject.name).to_owned();
        (subject.namespace.unwrap_or_default(), own)
    });
    let bindings = accounts.map(|account| Binding {
        namespace: namespace.clone(),
        name: name.to_owned(),
        role: (role.kind.clone(), role.name.clone()),
        account,
    });
    let rules = rules_of(manifests, role);
    bindings
        .flat_map(|binding| rules.iter().flat_map(move |rule| of_rule(&binding, rule)).collect::<Vec<_>>())
        .collect()
}

fn rules_of(manifests: &[Value], role: &RoleRef) -> Vec<PolicyRule> {
    let rules = if role.kind == "ClusterRole" {
        let mut roles = of_kind::<ClusterRole>(manifests, "ClusterRole").into_iter();
        roles.find(|r| r.name_any() == role.name).and_then(|r| r.rules)
    } else {
        let mut roles = of_kind::<Role>(manifests, "Role").into_iter();
        roles.find(|r| r.name_any() == role.name).and_then(|r| r.rules)
    };
    rules.unwrap_or_default()
}

fn of_rule(binding: &Binding, rule: &PolicyRule) -> Vec<Permission> {
    let objects: Vec<Option<String>> = match rule.resource_names.as_deref() {
        None | Some([]) => vec![None],
        Some(names) => names.iter().cloned().map(Some).collect(),
    };
    let mut all = vec![];
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            for verb in &rule.verbs {
                all.extend(objects.iter().map(|object| Permission {
                    binding: binding.clone(),
                    verb: verb.clone(),
                    group: group.clone(),
                    resource: resource.clone(),
                    object: object.clone(),
                }));
            }
        }
    }
    all
}

fn of_kind<K: DeserializeOwned>(manifests: &[Value], kind: &str) -> Vec<K> {
    let of_kind = manifests.iter().filter(|o| o["kind"] == kind);
    of_kind.filter_map(|o| serde_json::from_value(o.clone()).ok()).collect()
}

impl Permission {
    /// The question whether the account has it.
    fn review(&self) -> SubjectAccessReview {
        let (namespace, account) = &self.binding.account;
        let (resource, subresource) =
            self.resource.split_once('/').map_or((self.resource.as_str(), None), |(r, s)| (r, Some(s)));
        let attributes = ResourceAttributes {
            namespace: self.binding.namespace.clone(),
            group: Some(self.group.clone()),
            resource: Some(resource.to_owned()),
            subresource: subresource.map(ToOwned::to_owned),
            verb: Some(self.verb.clone()),
            name: self.object.clone(),
            ..ResourceAttributes::default()
        };
        let groups = ["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}"), "system:authenticated"];
        let spec = SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{namespace}:{account}")),
            groups: Some(groups.map(ToOwned::to_owned).to_vec()),
            resource_attributes: Some(attributes),
            ..SubjectAccessReviewSpec::default()
        };
        SubjectAccessReview { spec, ..SubjectAccessReview::default() }
    }

    /// `nodes/pods`, `leases.coordination.k8s.io countersign-registrar`.
    fn on(&self) -> String {
        let group = if self.group.is_empty() { String::new() } else { format!(".{}", self.group) };
        let object = self.object.as_ref().map(|name| format!(" {name}")).unwrap_or_default();
        format!("{}{group}{object}", self.resource)
    }
}

/// Those that the accounts do not have.
async fn lacking(client: &Client, permissions: &[Permission]) -> Result<Vec<Permission>, kube::Error> {
    let api: Api<SubjectAccessReview> = Api::all(client.clone());
    let asked = stream::iter(permissions.to_vec()).map(|permission| {
        let api = api.clone();
        async move {
            let answer = api.create(&PostParams::default(), &permission.review()).await?;
            let allowed = answer.status.is_some_and(|s| s.allowed && s.denied != Some(true));
            Ok::<_, kube::Error>((!allowed).then_some(permission))
        }
    });
    let answers: Vec<Option<Permission>> = asked.buffered(AT_ONCE).try_collect().await?;
    Ok(answers.into_iter().flatten().collect())
}

/// A finding for each binding that does not give what it should, or one that all do.
async fn judged(client: &Client, permissions: &[Permission], lacking: Vec<Permission>) -> Vec<Outcome> {
    let mut accounts = BTreeMap::<&(String, String), usize>::new();
    permissions.iter().for_each(|p| *accounts.entry(&p.binding.account).or_default() += 1);
    let mut all = vec![];
    for (namespace, name) in accounts.keys() {
        let api: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
        // Who may not read it is told nothing here: what it may do is what counts.
        if let Ok(None) = api.get_opt(name).await {
            let found = format!("there is no service account {name}, so its pods cannot be made");
            all.push(Err(Fault::new(found, "apply the manifests of `countersign install` with your settings")));
        }
    }
    let mut by_binding = BTreeMap::<Binding, Vec<Permission>>::new();
    lacking.into_iter().for_each(|p| by_binding.entry(p.binding.clone()).or_default().push(p));
    for (binding, lacks) in by_binding {
        let why = binding.fault(client).await;
        all.push(Err(binding.lacks(&lacks, why)));
    }
    if all.is_empty() {
        let told = accounts.into_iter().map(|((_, name), count)| format!("{name} has all {count}"));
        all.push(Ok(format!("permissions of service accounts: {}", told.collect::<Vec<_>>().join(", "))));
    }
    all
}

impl Binding {
    fn kind(&self) -> &'static str {
        if self.namespace.is_some() { "RoleBinding" } else { "ClusterRoleBinding" }
    }

    fn lacks(&self, permissions: &[Permission], why: Option<String>) -> Fault {
        let mut verbs = BTreeMap::<String, Vec<&str>>::new();
        for permission in permissions {
            verbs.entry(permission.on()).or_default().push(&permission.verb);
        }
        let said: Vec<String> = verbs.into_iter().map(|(on, verbs)| format!("{} {on}", verbs.join(", "))).collect();
        let why = why.map(|why| format!("{why}: ")).unwrap_or_default();
        let found = format!("{why}service account {} may not {}", self.account.1, said.join("; "));
        let (kind, name, (role_kind, role)) = (self.kind(), &self.name, &self.role);
        let mend = format!(
            "apply the manifests of `countersign install` with your settings: they have {kind} {name} and {role_kind} {role}"
        );
        Fault::new(found, mend)
    }

    /// What is wrong with the binding or its role; `None` if that cannot be told.
    async fn fault(&self, client: &Client) -> Option<String> {
        let (kind, name) = (self.kind(), &self.name);
        let bound = match &self.namespace {
            None => Api::<ClusterRoleBinding>::all(client.clone())
                .get_opt(name)
                .await
                .map(|found| found.map(|b| (b.role_ref, b.subjects.unwrap_or_default()))),
            Some(namespace) => Api::<RoleBinding>::namespaced(client.clone(), namespace)
                .get_opt(name)
                .await
                .map(|found| found.map(|b| (b.role_ref, b.subjects.unwrap_or_default()))),
        };
        let (role, subjects) = match bound {
            Ok(Some(bound)) => bound,
            Ok(None) => return Some(format!("there is no {kind} {name}")),
            Err(_) => return None,
        };
        if let Some(why) = self.differs(&role, &subjects) {
            return Some(format!("{kind} {name} {why}"));
        }
        let there = match &self.namespace {
            Some(namespace) if role.kind == "Role" => {
                Api::<Role>::namespaced(client.clone(), namespace).get_opt(&role.name).await.map(|r| r.is_some())
            }
            _ => Api::<ClusterRole>::all(client.clone()).get_opt(&role.name).await.map(|r| r.is_some()),
        };
        match there {
            Ok(true) => Some(format!("{} {} lacks a rule, or something beside RBAC denies it", role.kind, role.name)),
            Ok(false) => Some(format!("there is no {} {}", role.kind, role.name)),
            Err(error) => Some(in_words(&error)),
        }
    }

    fn differs(&self, role: &RoleRef, subjects: &[Subject]) -> Option<String> {
        if (&role.kind, &role.name) != (&self.role.0, &self.role.1) {
            return Some(format!("binds {} {}", role.kind, role.name));
        }
        let (namespace, name) = &self.account;
        let named =
            |s: &Subject| s.kind == "ServiceAccount" && s.name == *name && s.namespace.as_ref() == Some(namespace);
        (!subjects.iter().any(named)).then(|| format!("does not name service account {namespace}/{name}"))
    }
}

#[cfg(test)]
mod tests;
