//! What an installation adds to pods, by the arguments that its injector runs with and the modes of mesh and namespaces.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, anyhow};
use clap::Parser;
use countersign_controller::injector::Sidecar;
use countersign_controller::store::MODE;
use countersign_identity::policy::Mode;
use countersign_watch::in_words;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::Api;
use kube::{Client, ResourceExt};

use super::existing::{Elsewhere, elsewhere};
use super::live_settings;
use crate::roles::controller::ControllerArgs;
use crate::settings::Mistake;

/// What an installation adds.
#[derive(Debug)]
pub struct Injects {
    /// To every pod.
    pub sidecar: Sidecar,
    /// The mode of the mesh.
    pub mesh: Mode,
    /// The mode of each namespace that was asked about, as far as it is known.
    pub namespaces: BTreeMap<String, Mode>,
}

impl Injects {
    /// Reads it from the cluster; `None` if it has no installation. `namespaces`: those whose modes count. Error: there is one, or there
    /// may be one, and what it adds is not known.
    pub async fn read(client: &Client, mesh_namespace: &str, namespaces: &BTreeSet<String>) -> Result<Option<Self>> {
        let injectors: Api<Deployment> = Api::namespaced(client.clone(), mesh_namespace);
        let injector = injectors.get_opt("countersign-injector").await.map_err(|e| anyhow!(in_words(&e)))?;
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), mesh_namespace);
        let map = maps.get_opt(live_settings::NAME).await.map_err(|e| anyhow!(in_words(&e)))?;
        let Some(injector) = injector else {
            if map.is_some() {
                return Err(anyhow!(
                    "the installation in namespace {mesh_namespace} has no injector; see `countersign check`"
                ));
            }
            nothing_elsewhere(client, mesh_namespace).await?;
            return Ok(None);
        };
        let container = injector.spec.and_then(|s| s.template.spec?.containers.into_iter().next());
        let sidecar = sidecar(&container.and_then(|c| c.args).unwrap_or_default())?;
        let mesh = live_settings::mode(map.as_ref());
        let mut modes = BTreeMap::new();
        // Nothing weakens a strict mesh.
        for name in namespaces.iter().filter(|_| mesh != Mode::Strict) {
            let found = Api::<Namespace>::all(client.clone()).get_opt(name).await;
            // One that is not there yet has the mesh's mode.
            if let Some(found) = found.map_err(|e| anyhow!("the mode of namespace {name}: {}", in_words(&e)))? {
                modes.insert(name.clone(), mesh.narrowed_by(own_mode(&found)));
            }
        }
        Ok(Some(Self { sidecar, mesh, namespaces: modes }))
    }
}

/// Checks that the installation is not in another namespace, as far as this user may see.
async fn nothing_elsewhere(client: &Client, mesh_namespace: &str) -> Result<(), Mistake> {
    match elsewhere(client, mesh_namespace).await {
        Ok(Some(Elsewhere { namespace, .. })) => Err(Mistake(format!(
            "there is no installation in namespace `{mesh_namespace}`, and there is one in namespace `{namespace}`: say \
             --mesh-namespace {namespace}"
        ))),
        _ => Ok(()),
    }
}

/// A namespace's own mode: the stricter one of annotation and label. A word that is none counts as strict.
pub fn own_mode(namespace: &Namespace) -> Option<Mode> {
    let words = [namespace.annotations().get(MODE), namespace.labels().get(MODE)].into_iter().flatten();
    words.map(|word| word.parse().unwrap_or(Mode::Strict)).max()
}

fn sidecar(args: &[String]) -> Result<Sidecar> {
    #[derive(Parser)]
    struct Injector {
        #[command(flatten)]
        args: ControllerArgs,
    }
    let read = Injector::try_parse_from(args);
    let read = read.map_err(|_| {
        anyhow!("the injector is of another version, whose flags this command does not know; use the command of that version")
    })?;
    Ok(read.args.injects())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, refused};
    use crate::kubernetes::check::installed::tests::installed;
    use serde_json::json;

    #[tokio::test]
    async fn the_sidecar_and_the_modes_are_those_of_the_installation() {
        let injector = installed(|values| {
            values["image"]["name"] = "registry.example.org/countersign:1".into();
            values["cni"]["enabled"] = true.into();
            values["sidecar"]["resources"]["limits"]["cpu"] = "2".into();
        });
        let injector = serde_json::to_value(injector.injector).unwrap();
        let client = client(move |asked: &Asked| match asked.path.as_str() {
            path if path.ends_with("/mesh/deployments/countersign-injector") => Answer::Now(200, injector.clone()),
            path if path.ends_with("/mesh/configmaps/countersign-mesh") => {
                Answer::Now(200, json!({ "metadata": {}, "data": { "mode": "permissive" } }))
            }
            "/api/v1/namespaces/pay" => {
                Answer::Now(200, json!({ "metadata": { "name": "pay", "annotations": { MODE: "strict" } } }))
            }
            _ => refused(404, "not found"),
        });
        let names = ["pay", "new"].map(ToOwned::to_owned).into();
        let injects = Injects::read(&client, "mesh", &names).await.unwrap().unwrap();
        assert_eq!(injects.sidecar.image, "registry.example.org/countersign:1");
        assert!(injects.sidecar.cni && injects.sidecar.csi_driver.as_deref() == Some("csi.countersign.dev"));
        assert_eq!(injects.sidecar.resources.sidecar.cpu.limit, "2".parse().unwrap());
        assert_eq!((injects.mesh, injects.namespaces.get("pay")), (Mode::Permissive, Some(&Mode::Strict)));
        assert_eq!(injects.namespaces.get("new"), None);
        assert!(Injects::read(&client, "elsewhere", &names).await.unwrap().is_none());
        assert!(sidecar(&["controller".into(), "--of-a-later-version".into()]).is_err());
    }

    /// What is said of a cluster where one path has this answer, and of all others is only what `has` names.
    async fn refusal(path: &'static str, answer: fn() -> Answer, has: &'static [&'static str]) -> anyhow::Error {
        let injector = serde_json::to_value(installed(|_| ()).injector).unwrap();
        let map = json!({ "metadata": {}, "data": { "mode": "permissive" } });
        let client = client(move |asked: &Asked| match asked.path.rsplit_once('/').unwrap() {
            _ if asked.path.ends_with(path) => answer(),
            (_, name) if !has.contains(&name) => refused(404, "not found"),
            (_, "countersign-mesh") => Answer::Now(200, map.clone()),
            _ => Answer::Now(200, injector.clone()),
        });
        Injects::read(&client, "mesh", &["pay".to_owned()].into()).await.unwrap_err()
    }

    #[tokio::test]
    async fn what_may_not_be_read_is_not_taken_for_permissive() {
        let no = || refused(403, "you may not");
        let all = &["countersign-injector", "countersign-mesh"];
        for path in ["/deployments/countersign-injector", "/configmaps/countersign-mesh", "/api/v1/namespaces/pay"] {
            let why = refusal(path, no, all).await.to_string();
            assert!(why.contains("you may not"), "{path}: {why}");
        }
        let missing = || refused(404, "not found");
        let why = refusal("/countersign-injector", missing, &["countersign-mesh"]).await.to_string();
        assert!(why.contains("has no injector"), "{why}");
        let other = || {
            let service = json!({ "namespace": "system", "name": "countersign-injector" });
            let hook = json!({ "name": "pod.inject", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                               "clientConfig": { "service": service } });
            Answer::Now(200, json!({ "metadata": { "name": "countersign-injector" }, "webhooks": [hook] }))
        };
        let why = refusal("/mutatingwebhookconfigurations/countersign-injector", other, &[]).await;
        assert!(why.downcast_ref::<Mistake>().is_some(), "it has to be said where");
        assert!(why.to_string().ends_with("say --mesh-namespace system"), "{why}");
    }
}
