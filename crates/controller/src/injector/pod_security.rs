//! Which Pod Security levels refuse meshed pods, by what the injected containers need (Kubernetes, "Pod Security Standards").

use std::fmt;

use serde_json::Value;

use super::{INJECT, Sidecar};

/// Label of a namespace with the Pod Security level that it enforces.
pub const ENFORCE: &str = "pod-security.kubernetes.io/enforce";

/// What the injection adds to a pod and every level but `privileged` forbids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Privileges {
    /// `NET_ADMIN` for the redirect's init container.
    pub net_admin: bool,
    /// A `hostPath` volume with the agent's socket.
    pub host_path: bool,
}

impl Privileges {
    /// What pods that are injected with these settings need.
    pub fn of(sidecar: &Sidecar) -> Self {
        Self { net_admin: !sidecar.cni, host_path: sidecar.csi_driver.is_none() }
    }

    /// The settings of an installation that spare pods these.
    pub fn spared_by(self) -> &'static str {
        match (self.net_admin, self.host_path) {
            (true, false) => "cni.enabled and injector.cniRedirect",
            (false, true) => "agent.csi.enabled and injector.csiVolumes",
            _ => "cni.enabled, injector.cniRedirect, agent.csi.enabled and injector.csiVolumes",
        }
    }

    /// Whether a namespace that enforces this level refuses meshed pods. `baseline` forbids both, and a level that is unknown is taken
    /// for one that forbids as much.
    pub fn are_refused_by(self, level: &str) -> bool {
        level != "privileged" && (self.net_admin || self.host_path)
    }
}

/// `NET_ADMIN and a hostPath`, or the one that is needed.
impl fmt::Display for Privileges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.net_admin, self.host_path) {
            (true, true) => "NET_ADMIN and a hostPath",
            (true, false) => "NET_ADMIN",
            (false, true) => "a hostPath",
            (false, false) => "nothing",
        })
    }
}

/// A warning, if this change makes a namespace one whose pods are both meshed and refused.
pub fn warn_of_level(needed: Privileges, namespace: &Value, before: Option<&Value>) -> Option<String> {
    let refusing = |namespace: &Value| {
        let labels = &namespace["metadata"]["labels"];
        let level =
            labels[ENFORCE].as_str().filter(|level| labels[INJECT] == "enabled" && needed.are_refused_by(level));
        level.map(ToOwned::to_owned)
    };
    let level = refusing(namespace)?;
    (before.and_then(refusing).as_ref() != Some(&level)).then(|| {
        format!(
            "countersign: Pod Security `{level}` refuses meshed pods, which need {needed}; label the namespace \
             {ENFORCE}=privileged, or install with {}",
            needed.spared_by()
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const BOTH: Privileges = Privileges { net_admin: true, host_path: true };

    #[test]
    fn a_namespace_that_is_meshed_and_refuses_meshed_pods_is_warned_of_once() {
        let labelled =
            |inject: &str, level: &str| json!({ "metadata": { "labels": { INJECT: inject, ENFORCE: level } } });
        for level in ["baseline", "restricted"] {
            let said = warn_of_level(BOTH, &labelled("enabled", level), None).unwrap();
            assert!(said.starts_with(&format!("countersign: Pod Security `{level}` refuses")), "{said}");
            assert!(said.len() <= 256, "the API server cuts longer warnings off");
            assert!(warn_of_level(BOTH, &labelled("enabled", level), Some(&labelled("disabled", level))).is_some());
            assert!(
                warn_of_level(BOTH, &labelled("enabled", level), Some(&labelled("enabled", "privileged"))).is_some()
            );
            assert_eq!(warn_of_level(BOTH, &labelled("enabled", level), Some(&labelled("enabled", level))), None);
            assert_eq!(warn_of_level(BOTH, &labelled("disabled", level), None), None);
        }
        assert_eq!(warn_of_level(BOTH, &labelled("enabled", "privileged"), None), None);
        assert_eq!(warn_of_level(BOTH, &json!({ "metadata": { "labels": { INJECT: "enabled" } } }), None), None);
        assert_eq!(warn_of_level(BOTH, &json!({}), None), None);
    }

    #[test]
    fn with_plugin_and_driver_no_level_refuses_meshed_pods() {
        let restricted = json!({ "metadata": { "labels": { INJECT: "enabled", ENFORCE: "restricted" } } });
        let with = |cni: bool, driver: bool| {
            let csi_driver = driver.then(|| "csi.countersign.dev".to_owned());
            let sidecar = Sidecar { cni, csi_driver, ..Sidecar::new("countersign:1".into()) };
            warn_of_level(Privileges::of(&sidecar), &restricted, None)
        };
        for (cni, driver, needed, by) in [
            (
                false,
                false,
                "need NET_ADMIN and a hostPath;",
                "with cni.enabled, injector.cniRedirect, agent.csi.enabled and injector.csiVolumes",
            ),
            (false, true, "need NET_ADMIN;", "with cni.enabled and injector.cniRedirect"),
            (true, false, "need a hostPath;", "with agent.csi.enabled and injector.csiVolumes"),
        ] {
            let said = with(cni, driver).unwrap();
            assert!(said.contains(needed) && said.ends_with(by), "{said}");
        }
        assert_eq!(with(true, true), None);
    }
}
