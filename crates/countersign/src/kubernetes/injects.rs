//! What an installation adds to pods, by the arguments that its injector runs with and the modes of mesh and namespaces.

use std::collections::{BTreeMap, BTreeSet};

use clap::Parser;
use countersign_controller::injector::Sidecar;
use countersign_controller::store::MODE;
use countersign_identity::policy::Mode;
use countersign_watch::in_words;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::api::Api;
use kube::{Client, ResourceExt};

use super::live_settings;
use crate::roles::controller::ControllerArgs;

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
    /// Reads it from the cluster. Error: why nobody knows, in words.
    pub async fn read(client: &Client, mesh_namespace: &str, namespaces: &BTreeSet<String>) -> Result<Self, String> {
        let injectors: Api<Deployment> = Api::namespaced(client.clone(), mesh_namespace);
        let found = injectors.get_opt("countersign-injector").await.map_err(|e| in_words(&e))?;
        let found = found.ok_or_else(|| format!("namespace {mesh_namespace} has no injector; say --mesh-namespace"))?;
        let container = found.spec.and_then(|s| s.template.spec?.containers.into_iter().next());
        let sidecar = sidecar(&container.and_then(|c| c.args).unwrap_or_default())?;
        let maps: Api<ConfigMap> = Api::namespaced(client.clone(), mesh_namespace);
        let map = maps.get_opt(live_settings::NAME).await.map_err(|e| in_words(&e))?;
        let mesh = live_settings::mode(map.as_ref());
        let mut modes = BTreeMap::new();
        for name in namespaces {
            // One that is not there yet has the mesh's mode, and so has one that this user may not read.
            if let Ok(Some(found)) = Api::<Namespace>::all(client.clone()).get_opt(name).await {
                modes.insert(name.clone(), mesh.narrowed_by(own_mode(&found)));
            }
        }
        Ok(Self { sidecar, mesh, namespaces: modes })
    }
}

/// A namespace's own mode: the stricter one of annotation and label. A word that is none counts as strict.
pub fn own_mode(namespace: &Namespace) -> Option<Mode> {
    let words = [namespace.annotations().get(MODE), namespace.labels().get(MODE)].into_iter().flatten();
    words.map(|word| word.parse().unwrap_or(Mode::Strict)).max()
}

fn sidecar(args: &[String]) -> Result<Sidecar, String> {
    #[derive(Parser)]
    struct Injector {
        #[command(flatten)]
        args: ControllerArgs,
    }
    let read = Injector::try_parse_from(args);
    let read = read.map_err(|_| "the injector is of another version, whose flags this command does not know")?;
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
            path if path.ends_with("/configmaps/countersign-mesh") => {
                Answer::Now(200, json!({ "metadata": {}, "data": { "mode": "permissive" } }))
            }
            "/api/v1/namespaces/pay" => {
                Answer::Now(200, json!({ "metadata": { "name": "pay", "annotations": { MODE: "strict" } } }))
            }
            _ => refused(404, "not found"),
        });
        let names = ["pay", "new"].map(ToOwned::to_owned).into();
        let injects = Injects::read(&client, "mesh", &names).await.unwrap();
        assert_eq!(injects.sidecar.image, "registry.example.org/countersign:1");
        assert!(injects.sidecar.cni && injects.sidecar.csi_driver.as_deref() == Some("csi.countersign.dev"));
        assert_eq!(injects.sidecar.resources.sidecar.cpu.limit, "2".parse().unwrap());
        assert_eq!((injects.mesh, injects.namespaces.get("pay")), (Mode::Permissive, Some(&Mode::Strict)));
        assert_eq!(injects.namespaces.get("new"), None);
        let why = Injects::read(&client, "elsewhere", &names).await.unwrap_err();
        assert!(why.contains("--mesh-namespace"), "{why}");
        assert!(sidecar(&["controller".into(), "--of-a-later-version".into()]).is_err());
    }
}
