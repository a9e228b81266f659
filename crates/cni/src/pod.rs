//! What a pod asks for, by the API server's word alone: its sidecar's argument `--redirect` has the flags of its
//! redirect, or those of its init container `redirect --validate` where the sidecar does not hold the pod up.

use std::collections::BTreeSet;
use std::net::IpAddr;

use countersign_redirect::{Backend, Redirect};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod};

/// Beginning of the validator's arguments, and of the sidecar's.
const VALIDATOR: [&str; 2] = ["redirect", "--validate"];
const SIDECAR: [&str; 1] = ["proxy"];
/// The sidecar's argument with the redirect's flags, separated by spaces.
const FLAGS: &str = "--redirect=";
/// Longest flags that are read, in bytes.
const MAX_FLAGS: usize = 64 * 1024;

/// The containers that may ask for a redirect, by their names, and how their flags are read: by those who add and run them.
#[derive(Clone, Copy)]
pub struct Askers {
    /// The init container that validates the redirect.
    pub validator: &'static str,
    /// The sidecar.
    pub sidecar: &'static str,
    /// Reads flags as `countersign redirect` does. `resolvers` are the pod's, for flags that name none.
    ///
    /// # Errors
    /// They are wrong, in words.
    pub read: fn(flags: &[String], resolvers: &BTreeSet<IpAddr>) -> Result<Order, String>,
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
    /// The redirect's flags.
    pub flags: Vec<String>,
    /// Where its resolvers come from.
    pub dns: DnsPolicy,
    /// Resolvers that it names itself (`spec.dnsConfig`), in its order.
    pub nameservers: Vec<IpAddr>,
    /// The container that asks for it, once the kubelet has reported it.
    pub asker: Option<String>,
    /// Whether the pod still waits for it: nothing else in it runs.
    pub waits: bool,
}

impl MeshedPod {
    /// Reads a pod; `None` for one whose redirect is not ours.
    pub fn of(pod: &Pod, askers: &Askers) -> Option<Self> {
        let spec = pod.spec.as_ref()?;
        if spec.host_network == Some(true) {
            return None;
        }
        let Asked { by, flags } = Asked::by(spec.init_containers.as_deref()?, askers)?;
        let metadata = &pod.metadata;
        let status = pod.status.as_ref();
        let statuses = status.and_then(|s| s.init_container_statuses.as_ref()).into_iter().flatten();
        let (asker, others): (Vec<_>, Vec<_>) = statuses.into_iter().partition(|c| c.name == by.name);
        let asker = asker.first().copied();
        let apps = status.into_iter().flat_map(|s| [&s.container_statuses, &s.ephemeral_container_statuses]);
        let mut others = others.into_iter().chain(apps.flatten().flatten());
        let is_over = matches!(status.and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"));
        let config = spec.dns_config.as_ref().and_then(|config| config.nameservers.as_ref());
        Some(Self {
            uid: metadata.uid.clone()?,
            name: format!("{}/{}", metadata.namespace.as_deref()?, metadata.name.as_deref()?),
            flags,
            dns: match spec.dns_policy.as_deref() {
                Some("None") => DnsPolicy::Own,
                Some("Default") => DnsPolicy::Node,
                _ => DnsPolicy::Cluster,
            },
            nameservers: config.into_iter().flatten().filter_map(|address| address.parse().ok()).collect(),
            asker: asker.and_then(container_id).map(ToOwned::to_owned),
            // One whose apps run had its redirect when they began, and a restart of its sidecar changes nothing about it.
            waits: !is_over && !asker.is_some_and(lets_others_start) && !others.any(is_running),
        })
    }

    /// The redirect that it asks for.
    ///
    /// # Errors
    /// Its flags are wrong, in words.
    pub fn order(&self, askers: &Askers, resolvers: &BTreeSet<IpAddr>) -> Result<Order, String> {
        if self.flags.iter().map(String::len).sum::<usize>() > MAX_FLAGS {
            return Err(format!("the flags of its redirect are longer than {MAX_FLAGS} bytes"));
        }
        (askers.read)(&self.flags, resolvers)
    }
}

/// A container that asks for a redirect.
struct Asked<'a> {
    by: &'a Container,
    flags: Vec<String>,
}

impl<'a> Asked<'a> {
    /// A sidecar is looked for among the init containers alone: only there it holds up the containers behind it.
    fn by(all: &'a [Container], askers: &Askers) -> Option<Self> {
        let of = |name: &str, beginning: &[&str]| {
            let by = all.iter().find(|c| c.name == name)?;
            let args = by.args.as_ref()?;
            let begins = args.len() >= beginning.len() && args.iter().zip(beginning).all(|(a, b)| a == b);
            begins.then_some((by, args))
        };
        if let Some((by, args)) = of(askers.validator, &VALIDATOR) {
            return Some(Self { by, flags: args.iter().skip(1).cloned().collect() });
        }
        let (by, args) = of(askers.sidecar, &SIDECAR)?;
        let flags = args.iter().find_map(|arg| arg.strip_prefix(FLAGS))?;
        Some(Self { by, flags: flags.split_whitespace().map(ToOwned::to_owned).collect() })
    }
}

fn is_running(status: &ContainerStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

/// Whether a container that asked lets those behind it start: a validator that has succeeded, a sidecar that has started.
fn lets_others_start(status: &ContainerStatus) -> bool {
    let ended = status.state.as_ref().and_then(|state| state.terminated.as_ref());
    match ended {
        Some(ended) => ended.exit_code == 0,
        None => status.started == Some(true),
    }
}

/// The ID in `containerd://ID`.
pub fn container_id(status: &ContainerStatus) -> Option<&str> {
    status.container_id.as_deref()?.rsplit("://").next().filter(|id| !id.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::testing::{ASKERS, UID, meshed, validated};

    fn of(pod: Value) -> Option<MeshedPod> {
        MeshedPod::of(&serde_json::from_value(pod).unwrap(), &ASKERS)
    }

    #[test]
    fn a_pod_whose_sidecar_or_validator_asks_is_ours_and_no_other_is() {
        let pod = of(meshed()).unwrap();
        assert_eq!((pod.uid.as_str(), pod.name.as_str(), pod.waits), (UID, "shop/web-0", true));
        assert_eq!(pod.flags, ["--proxy-uid=2102"]);
        assert_eq!((pod.dns, pod.nameservers.len(), pod.asker), (DnsPolicy::Cluster, 0, None));
        let with = |path: &str, value: Value| {
            let mut pod = meshed();
            *pod.pointer_mut(path).unwrap() = value;
            of(pod)
        };
        assert_eq!(with("/spec/hostNetwork", true.into()), None);
        assert_eq!(with("/spec/initContainers", json!([])), None);
        assert_eq!(with("/spec/initContainers/0/name", "other".into()), None);
        let asks = |flags: &str| json!(["proxy", "--log=info", format!("--redirect={flags}")]);
        let flags = |args: Value| with("/spec/initContainers/0/args", args).map(|pod| pod.flags);
        assert_eq!(flags(asks(" --proxy-uid=2102  --in-pod")).unwrap(), ["--proxy-uid=2102", "--in-pod"]);
        assert_eq!(flags(json!(["proxy", "--log=info"])), None, "its redirect is not ours");
        assert_eq!(flags(json!(["redirect", "--redirect=--proxy-uid=2102"])), None, "another role");
        assert_eq!(flags(json!([])), None);
        let sidecar = meshed()["spec"]["initContainers"][0].clone();
        let mut behind = meshed();
        behind["spec"]["containers"] = json!([sidecar]);
        behind["spec"]["initContainers"] = json!([]);
        assert_eq!(of(behind), None, "a plain sidecar holds nobody up");
        let validates = |args: Value| {
            let mut pod = validated();
            pod["spec"]["initContainers"][0]["args"] = args;
            of(pod).map(|pod| pod.flags)
        };
        assert_eq!(of(validated()).unwrap().flags, ["--validate", "--proxy-uid=2102"]);
        assert_eq!(validates(json!(["redirect", "--proxy-uid=2102"])), None, "it installs its redirect itself");
        assert_eq!(validates(json!(["redirect"])), None);
        assert_eq!(validates(json!(["proxy", "--validate"])), None);
        assert_eq!(with("/spec/initContainers/0/args", Value::Null), None);
        assert_eq!(with("/metadata/uid", Value::Null), None);
        assert_eq!(with("/spec/dnsPolicy", "Default".into()).unwrap().dns, DnsPolicy::Node);
        assert_eq!(with("/spec/dnsPolicy", "ClusterFirstWithHostNet".into()).unwrap().dns, DnsPolicy::Cluster);
        let own = with("/spec/dnsConfig", json!({ "nameservers": ["10.0.0.1", "x"] })).unwrap();
        assert_eq!(own.nameservers, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_pod_waits_until_its_sidecar_has_started_or_its_validator_has_succeeded() {
        let with = |pod: Value, started: bool, state: Value| {
            let mut pod = pod;
            let name = pod["spec"]["initContainers"][0]["name"].clone();
            let status = json!([{ "name": name, "image": "i", "imageID": "", "ready": false, "started": started,
                                  "restartCount": 0, "containerID": "containerd://c1", "state": state }]);
            pod["status"]["initContainerStatuses"] = status;
            of(pod).unwrap()
        };
        let ended = |code: i32| json!({ "terminated": { "exitCode": code } });
        let running = json!({ "running": {} });
        assert!(with(meshed(), false, running.clone()).waits && with(meshed(), false, ended(1)).waits);
        assert!(!with(meshed(), true, running.clone()).waits);
        assert!(with(validated(), false, running).waits && with(validated(), false, json!({ "waiting": {} })).waits);
        assert!(with(validated(), false, ended(1)).waits && !with(validated(), false, ended(0)).waits);
        assert_eq!(with(meshed(), false, ended(0)).asker.as_deref(), Some("c1"));
        let mut restarted = meshed();
        let app = |state: Value| {
            json!([{ "name": "app", "image": "i", "imageID": "", "ready": true, "restartCount": 0,
                                         "state": state }])
        };
        restarted["status"]["containerStatuses"] = app(json!({ "running": {} }));
        assert!(!with(restarted.clone(), false, ended(1)).waits, "its apps run");
        restarted["status"]["containerStatuses"] = app(ended(1));
        assert!(with(restarted, false, ended(1)).waits, "nothing runs, as after its node's restart");
        let mut failed = meshed();
        failed["status"]["phase"] = "Failed".into();
        assert!(!of(failed).unwrap().waits);
    }

    #[test]
    fn flags_of_any_length_are_not_read() {
        let mut pod = of(meshed()).unwrap();
        assert!(pod.order(&ASKERS, &BTreeSet::new()).is_ok());
        pod.flags.push("x".repeat(MAX_FLAGS));
        assert!(pod.order(&ASKERS, &BTreeSet::new()).unwrap_err().contains("longer"));
    }
}
