//! Finds what a pod's redirect, as injected, lets bypass the sidecar.

use countersign_controller::injector::{Leave, REDIRECT, SIDECAR};
use countersign_controller::port_modes::{self, PORT_MODES};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::{Client, ResourceExt};

/// Flags of the redirect that make exceptions, with the values that every injection sets.
const FLAGS: [(&str, &[&str]); 6] = [
    ("--exclude-inbound-ports=", &["15020"]),
    ("--exclude-outbound-ports=", &["53"]),
    ("--exclude-inbound-cidrs=", &[]),
    ("--exclude-outbound-cidrs=", &[]),
    ("--allow-udp-ports=", &[]),
    ("--allow-other-cidrs=", &[]),
];

/// The flags of a pod's redirect.
pub struct RedirectFlags {
    /// The flags, without the command.
    pub flags: Vec<String>,
    /// Whether the CNI plugin installs it.
    pub by_plugin: bool,
}

impl RedirectFlags {
    /// Those of a pod; `None` if it has no redirect.
    pub fn of(pod: &Pod) -> Option<Self> {
        let containers = pod.spec.as_ref()?.init_containers.as_ref()?;
        let of = |name: &str, role: &str| {
            let args = containers.iter().find(|c| c.name == name)?.args.as_deref()?;
            (args.first().map(String::as_str) == Some(role)).then_some(args)
        };
        if let Some(args) = of(REDIRECT, "redirect") {
            return Some(Self { flags: args.to_vec(), by_plugin: args.iter().any(|arg| arg == "--validate") });
        }
        let flags = of(SIDECAR, "proxy")?.iter().find_map(|arg| arg.strip_prefix("--redirect="))?;
        Some(Self { flags: flags.split_whitespace().map(ToOwned::to_owned).collect(), by_plugin: true })
    }
}

/// The pod's exceptions as flags, such as `exclude-inbound-ports=8080`, and the ports that its annotation opens.
pub fn exceptions(pod: &Pod) -> Vec<String> {
    let flags = RedirectFlags::of(pod).map_or_else(Vec::new, |redirect| redirect.flags);
    let of = |(flag, always): &(&str, &[&str])| {
        let values = flags.iter().filter_map(|f| f.strip_prefix(flag)).flat_map(|value| value.split(','));
        let own: Vec<&str> = values.filter(|v| !v.is_empty() && !always.contains(v)).collect();
        (!own.is_empty()).then(|| format!("{}{}", flag.trim_start_matches('-'), own.join(",")))
    };
    let modes = pod.annotations().get(PORT_MODES).map(|text| port_modes::weakening(&port_modes::read(text)));
    let opened = modes.filter(|open| !open.is_empty()).map(|open| format!("port-modes={open}"));
    FLAGS.iter().filter_map(of).chain(opened).collect()
}

/// Whether the redirect drops protocols other than TCP, which is fixed when a pod is created.
pub fn drops_others(pod: &Pod) -> bool {
    RedirectFlags::of(pod).is_some_and(|redirect| redirect.flags.iter().any(|f| f == "--other-protocols=drop"))
}

/// Namespaces with permission for exceptions, from the installed injector; none if it is not installed.
pub async fn leave(client: &Client, namespace: &str) -> Result<Leave, kube::Error> {
    let api: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let injector = api.get_opt("countersign-injector").await?;
    let args = injector.and_then(|d| d.spec?.template.spec?.containers.into_iter().next()?.args).unwrap_or_default();
    let list = args.iter().find_map(|a| a.strip_prefix("--allow-exceptions=")).unwrap_or_default();
    Ok(Leave::of(list.split(',').map(ToOwned::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_pods_redirect_lets_past_is_read_from_its_flags() {
        let pod = |args: &[&str]| -> Pod {
            let spec = json!({ "containers": [], "initContainers": [{ "name": REDIRECT, "args": args }] });
            serde_json::from_value(json!({ "spec": spec })).unwrap()
        };
        let plain = pod(&["redirect", "--exclude-inbound-ports=15020", "--exclude-outbound-ports=53"]);
        assert!(exceptions(&plain).is_empty() && !drops_others(&plain));
        let open = pod(&[
            "redirect",
            "--exclude-inbound-ports=15020,8080",
            "--exclude-outbound-cidrs=10.0.0.0/8",
            "--other-protocols=drop",
        ]);
        let twice = pod(&["redirect", "--allow-udp-ports=1", "--allow-udp-ports=2"]);
        assert_eq!(exceptions(&twice), ["allow-udp-ports=1,2"], "both count");
        assert_eq!(exceptions(&open), ["exclude-inbound-ports=8080", "exclude-outbound-cidrs=10.0.0.0/8"]);
        assert!(drops_others(&open));
        let mut by_sidecar = Pod::default();
        let args = json!(["proxy", "--redirect=--exclude-outbound-ports=53,5432 --other-protocols=drop", "--log=info"]);
        let spec = json!({ "containers": [], "initContainers": [{ "name": SIDECAR, "args": args }] });
        by_sidecar.spec = serde_json::from_value(spec).unwrap();
        assert_eq!(exceptions(&by_sidecar), ["exclude-outbound-ports=5432"]);
        assert!(drops_others(&by_sidecar) && RedirectFlags::of(&by_sidecar).is_some_and(|redirect| redirect.by_plugin));
        let mut modes = plain.clone();
        modes.annotations_mut().insert(PORT_MODES.into(), "80=strict, 9443=permissive".into());
        assert_eq!(exceptions(&modes), ["port-modes=9443=permissive"]);
        assert!(exceptions(&Pod::default()).is_empty() && !drops_others(&Pod::default()));
    }
}
