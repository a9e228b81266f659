//! Which settings an installation has, by what it runs with: the chart is rendered with them, and what is rendered is what has
//! to be there.

use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{PodSpec, PodTemplateSpec};
use kube::api::Api;
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::finding::Fault;
use super::requirements::NARROW_KUBELET;
use crate::kubernetes::values::defaults;
use crate::kubernetes::{install, memory};

/// Annotation of the injector's Deployment: whether the chart was rendered with its admission policies.
const POLICIES: &str = "countersign.dev/admission-policy";

/// Each workload, and where its settings are among the chart's.
const ROLES: [(&str, &str); 3] =
    [("countersign-agent", "agent"), ("countersign-server", "server"), ("countersign-injector", "injector")];

/// The workloads of an installation; `None` where one is missing.
#[derive(Debug, Default)]
pub struct Installed {
    /// The agents.
    pub agent: Option<DaemonSet>,
    /// Server and registrar.
    pub server: Option<StatefulSet>,
    /// The injector.
    pub injector: Option<Deployment>,
    /// What the API server asks the injector about.
    pub webhook: Option<MutatingWebhookConfiguration>,
    /// All settings, if `countersign install` remembers the given ones. Helm keeps its own memory.
    pub remembered: Option<Value>,
}

/// The driver that mounts the agent's directory into pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsiDriver {
    /// Its name, `csi.countersign.dev`.
    pub name: String,
    /// The folder of the kubelet that it registers with.
    pub kubelet_dir: String,
}

impl Installed {
    /// Reads them from the cluster.
    pub async fn read(client: &Client, namespace: &str) -> Result<Self, Fault> {
        let agents: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
        let servers: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
        let injectors: Api<Deployment> = Api::namespaced(client.clone(), namespace);
        let webhooks: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
        let (agent, server, injector) = futures::try_join!(
            agents.get_opt("countersign-agent"),
            servers.get_opt("countersign-server"),
            injectors.get_opt("countersign-injector"),
        )
        .map_err(Fault::absent)?;
        // Without them there is less to compare with; who may not read the webhook is told so by its checks.
        let (webhook, remembered) =
            futures::join!(webhooks.get_opt("countersign-injector"), remembered(client, namespace));
        Ok(Self { agent, server, injector, webhook: webhook.ok().flatten(), remembered })
    }

    fn pods(&self) -> [(&'static str, Option<&PodTemplateSpec>); 3] {
        [
            ("countersign-agent", self.agent.as_ref().and_then(|a| Some(&a.spec.as_ref()?.template))),
            ("countersign-server", self.server.as_ref().and_then(|s| Some(&s.spec.as_ref()?.template))),
            ("countersign-injector", self.injector.as_ref().and_then(|i| Some(&i.spec.as_ref()?.template))),
        ]
    }

    fn pod(&self, workload: &str) -> Option<&PodSpec> {
        self.pods().into_iter().find(|(name, _)| *name == workload)?.1?.spec.as_ref()
    }

    /// The arguments of a container of a workload.
    pub fn args(&self, workload: &str, container: &str) -> Option<&[String]> {
        let container = self.pod(workload)?.containers.iter().find(|c| c.name == container)?;
        container.args.as_deref()
    }

    /// The CSI driver, if the agents' pods have its container.
    pub fn csi_driver(&self) -> Option<CsiDriver> {
        let args = self.args("countersign-agent", "csi")?;
        let of = |flag: &str| args.iter().find_map(|a| a.strip_prefix(flag)).map(ToOwned::to_owned);
        Some(CsiDriver { name: of("--driver-name=")?, kubelet_dir: of("--kubelet-dir=")? })
    }

    /// Whether new pods get the agent's directory by the CSI driver.
    pub fn injects_csi_volumes(&self) -> bool {
        let args = self.args("countersign-injector", "injector");
        args.is_some_and(|args| args.iter().any(|arg| arg.starts_with("--csi-driver=")))
    }

    /// Whether the nodes have the CNI plugin.
    pub fn has_plugin(&self) -> bool {
        self.args("countersign-agent", countersign_cni::CONTAINER).is_some()
    }

    /// Whether new pods leave their redirect to the CNI plugin.
    pub fn injects_for_plugin(&self) -> bool {
        let args = self.args("countersign-injector", "injector");
        args.is_some_and(|args| args.iter().any(|arg| arg == "--cni"))
    }

    /// The service account of a workload, if it runs as another one than the chart's.
    pub fn account_of(&self, workload: &str) -> Option<&str> {
        self.pod(workload)?.service_account_name.as_deref()
    }

    /// Whether there is a workload that makes agents.
    pub fn has_agents(&self) -> Result<(), Fault> {
        let mend = "apply the manifests of `countersign install`";
        self.agent.is_some().then_some(()).ok_or_else(|| Fault::new("there is no DaemonSet countersign-agent", mend))
    }

    /// Whether the injector uses native sidecars; `None` if there is no injector.
    pub fn native_sidecars(&self) -> Option<bool> {
        let args = self.args("countersign-injector", "injector")?;
        Some(!args.iter().any(|a| a == "--native-sidecars=false"))
    }

    /// The manifests as `countersign install` prints them with the settings of this installation, as far as they bear on what is
    /// compared with them. `version`: that of Kubernetes.
    pub fn manifests(&self, namespace: &str, version: (u32, u32)) -> anyhow::Result<Vec<Value>> {
        let text = install::rendered(namespace, &self.values(version)?)?;
        Ok(serde_saphyr::from_multiple(&text)?)
    }

    /// All settings: what runs counts before what is remembered, because manifests may have been applied without being remembered.
    pub fn values(&self, version: (u32, u32)) -> anyhow::Result<Value> {
        let mut values = match &self.remembered {
            Some(remembered) => remembered.clone(),
            None => self.unremembered()?,
        };
        if let Some(args) = self.args("countersign-agent", "agent") {
            let has = |flag: &str| args.iter().any(|a| a == flag || a.starts_with(&format!("{flag}=")));
            let agent = &mut values["agent"];
            agent["watchPods"] = has("--node-name").into();
            agent["askKubelet"] = has("--kubelet").into();
            agent["namespaceLabels"] = has("--namespace-labels").into();
            // No flag shows it. Newer kubelets need it as little as their agents do.
            agent["nodesProxyPermission"] = (version < NARROW_KUBELET).into();
            let plugin = self.args("countersign-agent", "cni");
            values["cni"]["enabled"] = plugin.is_some().into();
            values["cni"]["repair"] = plugin.is_some_and(|args| args.iter().any(|a| a == "--repair")).into();
        }
        let driver = self.csi_driver();
        if self.agent.is_some() {
            values["agent"]["csi"]["enabled"] = driver.is_some().into();
        }
        // While driver or plugin is off, nothing shows what the injector would do with it.
        if self.injector.is_some() && driver.is_some() {
            values["injector"]["csiVolumes"] = self.injects_csi_volumes().into();
        }
        if self.injector.is_some() && values["cni"]["enabled"] == true {
            values["injector"]["cniRedirect"] = self.injects_for_plugin().into();
        }
        if let Some(driver) = driver {
            let csi = &mut values["agent"]["csi"];
            (csi["driverName"], csi["kubeletDir"]) = (driver.name.into(), driver.kubelet_dir.into());
        }
        for (workload, role) in ROLES {
            if let Some(account) = self.account_of(workload) {
                values[role]["serviceAccount"]["name"] = account.into();
            }
        }
        Ok(values)
    }

    /// The settings that nothing remembers and no flag shows.
    fn unremembered(&self) -> anyhow::Result<Value> {
        let mut values = defaults()?;
        let policies = self.injector.as_ref().and_then(|i| i.annotations().get(POLICIES));
        values["admissionPolicy"] = policies.is_none_or(|said| said != "false").into();
        // They cannot be told from an edited webhook; that one fails open is said in any case.
        if let Some(hook) = self.webhook.as_ref().and_then(|w| w.webhooks.as_ref()?.first()) {
            let webhook = &mut values["injector"]["webhook"];
            webhook["failurePolicy"] = hook.failure_policy.as_deref().unwrap_or("Fail").into();
            let labels = hook.namespace_selector.as_ref().and_then(|s| s.match_labels.clone()).unwrap_or_default();
            webhook["namespaceSelector"]["matchLabels"] = json!(labels);
        }
        Ok(values)
    }
}

async fn remembered(client: &Client, namespace: &str) -> Option<Value> {
    let seen = memory::look(client, namespace, true).await.ok()?;
    seen.memory?.given.whole("the settings").ok()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::kubernetes::values::ValuesArgs;

    /// An installation as the chart renders it with these settings.
    pub fn installed(change: impl FnOnce(&mut Value)) -> Installed {
        let mut values = ValuesArgs::default().read().unwrap();
        change(&mut values);
        let text = install::rendered("mesh", &values).unwrap();
        let all: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
        let one = |kind: &str| all.iter().find(|o| o["kind"] == kind).cloned().unwrap();
        Installed {
            agent: Some(serde_json::from_value(one("DaemonSet")).unwrap()),
            server: Some(serde_json::from_value(one("StatefulSet")).unwrap()),
            injector: Some(serde_json::from_value(one("Deployment")).unwrap()),
            webhook: Some(serde_json::from_value(one("MutatingWebhookConfiguration")).unwrap()),
            remembered: None,
        }
    }

    #[test]
    fn the_settings_in_force_are_read_from_what_runs() {
        let values = |installed: &Installed, version| installed.values(version).unwrap();
        let plain = installed(|_| {});
        let mut expected = ValuesArgs::default().read().unwrap();
        // Without the plugin nothing shows it.
        expected["cni"]["repair"] = false.into();
        assert_eq!(values(&plain, (1, 34)), expected);
        assert_eq!(values(&plain, (1, 32))["agent"]["nodesProxyPermission"], true);
        let other = installed(|values| {
            values["agent"]["watchPods"] = false.into();
            values["agent"]["namespaceLabels"] = true.into();
            values["agent"]["csi"]["driverName"] = "csi.spiffe.io".into();
            values["admissionPolicy"] = false.into();
        });
        let read = values(&other, (1, 34));
        assert_eq!((&read["agent"]["watchPods"], &read["agent"]["askKubelet"]), (&json!(false), &json!(true)));
        assert_eq!((&read["agent"]["namespaceLabels"], &read["admissionPolicy"]), (&json!(true), &json!(false)));
        assert_eq!(read["agent"]["csi"]["driverName"], "csi.spiffe.io");
        assert_eq!(other.csi_driver().unwrap().kubelet_dir, "/var/lib/kubelet");
    }

    #[test]
    fn without_the_driver_or_the_plugin_or_before_pods_are_injected_for_it_the_settings_say_so() {
        let read = |change: fn(&mut Value)| installed(change).values((1, 34)).unwrap();
        let off = read(|values| values["agent"]["csi"]["enabled"] = false.into());
        assert_eq!(off["agent"]["csi"]["enabled"], false);
        let first = read(|values| {
            values["cni"]["enabled"] = true.into();
            (values["injector"]["csiVolumes"], values["injector"]["cniRedirect"]) = (false.into(), false.into());
        });
        assert_eq!((&first["agent"]["csi"]["enabled"], &first["cni"]["enabled"]), (&json!(true), &json!(true)));
        let injector = &first["injector"];
        assert_eq!((&injector["csiVolumes"], &injector["cniRedirect"]), (&json!(false), &json!(false)));
    }

    #[test]
    fn accounts_the_plugin_and_the_webhooks_policy_are_those_of_the_installation() {
        let other = installed(|values| {
            values["cni"]["enabled"] = true.into();
            values["agent"]["serviceAccount"] = json!({ "create": false, "name": "ours" });
            values["injector"]["webhook"]["failurePolicy"] = "Ignore".into();
            values["injector"]["webhook"]["namespaceSelector"]["matchLabels"] = json!({ "team": "a" });
        });
        let read = other.values((1, 34)).unwrap();
        assert_eq!((&read["cni"]["enabled"], &read["cni"]["repair"]), (&json!(true), &json!(true)));
        assert_eq!(read["agent"]["serviceAccount"]["name"], "ours");
        let webhook = |values: &Value| values["injector"]["webhook"].clone();
        let policy = json!({ "failurePolicy": "Ignore", "namespaceSelector": { "matchLabels": { "team": "a" } } });
        assert_eq!(webhook(&read), policy);
        // What is remembered was asked for; an edited webhook is then a difference.
        let remembered = Installed { remembered: Some(defaults().unwrap()), ..other };
        assert_eq!(webhook(&remembered.values((1, 34)).unwrap())["failurePolicy"], "Fail");
    }

    #[test]
    fn of_what_is_not_there_nothing_is_known() {
        let none = Installed::default();
        assert_eq!(
            (none.native_sidecars(), none.csi_driver(), none.account_of("countersign-agent")),
            (None, None, None)
        );
        assert!(none.has_agents().is_err() && installed(|_| {}).has_agents().is_ok());
        assert_eq!(
            installed(|values| values["injector"]["nativeSidecars"] = false.into()).native_sidecars(),
            Some(false)
        );
    }
}
