//! What a pod asks for, by the API server's word alone: its init container `redirect --validate` has the flags of its
//! redirect.

use std::collections::BTreeSet;
use std::net::IpAddr;

use countersign_redirect::{Backend, Redirect};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};

/// Beginning of the validator's arguments.
const BEGINNING: [&str; 2] = ["redirect", "--validate"];
/// Longest arguments that are read, in bytes.
const MAX_ARGUMENTS: usize = 64 * 1024;

/// How a validator is found, and its arguments read: by those who add and run it.
#[derive(Clone, Copy)]
pub struct Validators {
    /// Name of the init container.
    pub container: &'static str,
    /// Name of the sidecar's container.
    pub sidecar: &'static str,
    /// Reads the arguments behind `redirect`, as `countersign redirect` does. `resolvers` are the pod's, for arguments
    /// that name none.
    ///
    /// # Errors
    /// They are wrong, in words.
    pub read: fn(arguments: &[String], resolvers: &BTreeSet<IpAddr>) -> Result<Order, String>,
}

/// A redirect to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its rules.
    pub redirect: Redirect,
    /// Who is to hold them.
    pub backend: Backend,
}

/// Where a pod's resolvers come from (`spec.dnsPolicy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DnsPolicy {
    /// The cluster's, which every pod with this policy has, our own too.
    Cluster,
    /// The node's.
    Node,
    /// Only those that the pod names itself.
    Own,
}

/// A pod whose redirect is ours to install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshedPod {
    /// Its UID.
    pub uid: String,
    /// Its namespace and name, for messages.
    pub name: String,
    /// The validator's arguments, from `--validate` on.
    pub arguments: Vec<String>,
    /// Where its resolvers come from.
    pub dns: DnsPolicy,
    /// Resolvers that it names itself (`spec.dnsConfig`), in its order.
    pub nameservers: Vec<IpAddr>,
    /// The validator's container, once the kubelet has reported it.
    pub validator: Option<String>,
    /// Whether the pod still waits for its validator.
    pub waits: bool,
}

impl MeshedPod {
    /// Reads a pod; `None` for one whose redirect is not ours.
    pub fn of(pod: &Pod, container: &str) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        if spec.host_network == Some(true) {
            return None;
        }
        let mut all = spec.init_containers.iter().flatten();
        let arguments = all.find(|c| c.name == container)?.args.clone()?;
        let is_ours = arguments.len() >= BEGINNING.len() && arguments.iter().zip(BEGINNING).all(|(a, b)| a == b);
        if !is_ours {
            return None;
        }
        let metadata = &pod.metadata;
        let status = pod.status.as_ref();
        let statuses = status.and_then(|s| s.init_container_statuses.as_ref()).into_iter().flatten();
        let validator = statuses.into_iter().find(|c| c.name == container);
        let is_over = matches!(status.and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"));
        let config = spec.dns_config.as_ref().and_then(|config| config.nameservers.as_ref());
        Some(Self {
            uid: metadata.uid.clone()?,
            name: format!("{}/{}", metadata.namespace.as_deref()?, metadata.name.as_deref()?),
            arguments: arguments.into_iter().skip(1).collect(),
            dns: match spec.dns_policy.as_deref() {
                Some("None") => DnsPolicy::Own,
                Some("Default") => DnsPolicy::Node,
                _ => DnsPolicy::Cluster,
            },
            nameservers: config.into_iter().flatten().filter_map(|address| address.parse().ok()).collect(),
            validator: validator.and_then(container_id).map(ToOwned::to_owned),
            waits: !is_over && !validator.is_some_and(has_succeeded),
        })
    }

    /// The redirect that it asks for.
    ///
    /// # Errors
    /// Its arguments are wrong, in words.
    pub fn order(&self, validators: &Validators, resolvers: &BTreeSet<IpAddr>) -> Result<Order, String> {
        if self.arguments.iter().map(String::len).sum::<usize>() > MAX_ARGUMENTS {
            return Err(format!("the arguments of its redirect are longer than {MAX_ARGUMENTS} bytes"));
        }
        (validators.read)(&self.arguments, resolvers)
    }
}

fn has_succeeded(status: &ContainerStatus) -> bool {
    let ended = status.state.as_ref().and_then(|state| state.terminated.as_ref());
    ended.is_some_and(|ended| ended.exit_code == 0)
}

/// The ID in `containerd://ID`.
pub fn container_id(status: &ContainerStatus) -> Option<&str> {
    status.container_id.as_deref()?.rsplit("://").next().filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{UID, meshed};

    fn of(pod: Value) -> Option<MeshedPod> {
        MeshedPod::of(&serde_json::from_value(pod).unwrap(), "countersign-redirect")
    }

    #[test]
    fn a_pod_with_a_validator_is_ours_and_no_other_is() {
        let pod = of(meshed()).unwrap();
        assert_eq!((pod.uid.as_str(), pod.name.as_str(), pod.waits), (UID, "shop/web-0", true));
        assert_eq!(pod.arguments, ["--validate", "--proxy-uid=2102"]);
        assert_eq!((pod.dns, pod.nameservers.len(), pod.validator), (DnsPolicy::Cluster, 0, None));
        let with = |path: &str, value: Value| {
            let mut pod = meshed();
            *pod.pointer_mut(path).unwrap() = value;
            of(pod)
        };
        assert_eq!(with("/spec/hostNetwork", true.into()), None);
        assert_eq!(with("/spec/initContainers", json!([])), None);
        assert_eq!(with("/spec/initContainers/0/name", "other".into()), None);
        assert_eq!(with("/spec/initContainers/0/args", json!(["redirect", "--proxy-uid=2102"])), None, "the old way");
        assert_eq!(with("/spec/initContainers/0/args", json!(["redirect"])), None);
        assert_eq!(with("/spec/initContainers/0/args", json!(["proxy", "--validate"])), None);
        assert_eq!(with("/spec/initContainers/0/args", Value::Null), None);
        assert_eq!(with("/metadata/uid", Value::Null), None);
        assert_eq!(with("/spec/dnsPolicy", "Default".into()).unwrap().dns, DnsPolicy::Node);
        assert_eq!(with("/spec/dnsPolicy", "ClusterFirstWithHostNet".into()).unwrap().dns, DnsPolicy::Cluster);
        let own = with("/spec/dnsConfig", json!({ "nameservers": ["10.0.0.1", "x"] })).unwrap();
        assert_eq!(own.nameservers, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_pod_waits_until_its_validator_has_succeeded() {
        let with = |state: Value| {
            let mut pod = meshed();
            let status = json!([{ "name": "countersign-redirect", "image": "i", "imageID": "", "ready": false,
                                  "restartCount": 0, "containerID": "containerd://c1", "state": state }]);
            pod["status"]["initContainerStatuses"] = status;
            of(pod).unwrap()
        };
        let ended = |code: i32| json!({ "terminated": { "exitCode": code } });
        assert!(with(json!({ "running": {} })).waits && with(json!({ "waiting": {} })).waits && with(ended(1)).waits);
        assert!(!with(ended(0)).waits);
        assert_eq!(with(ended(0)).validator.as_deref(), Some("c1"));
        let mut failed = meshed();
        failed["status"]["phase"] = "Failed".into();
        assert!(!of(failed).unwrap().waits);
    }

    #[test]
    fn arguments_of_any_length_are_not_read() {
        let mut pod = of(meshed()).unwrap();
        assert!(pod.order(&crate::testing::VALIDATORS, &BTreeSet::new()).is_ok());
        pod.arguments.push("x".repeat(MAX_ARGUMENTS));
        assert!(pod.order(&crate::testing::VALIDATORS, &BTreeSet::new()).unwrap_err().contains("longer"));
    }
}
