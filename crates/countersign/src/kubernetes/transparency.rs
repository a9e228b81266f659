//! The way of a whole mesh to plaintext, without a request that fails: what sends plaintext before all accept it is refused, so each
//! step waits until every sidecar has taken the one before.

mod step;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_controller::store::Transparency;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use self::step::{FULL, INBOUND, Passed, is_running};
use super::cluster::{NoPage, ask, pods};
use super::live_settings::{NAME as SETTINGS, TRANSPARENT as KEY, way_back};
use super::without::Without;
use crate::settings::Mistake;

/// Port of the pages of the controller beside the server.
const CONTROLLER_PAGES: u16 = 9465;
/// How the mesh becomes transparent.
pub struct Way {
    /// Namespace of the installation.
    pub namespace: String,
    /// How long each step may take.
    pub patience: Duration,
    /// Leave out the first step, which older control planes do not know.
    pub at_once: bool,
    /// Pods that are not waited for.
    pub without: Vec<Without>,
}

impl Way {
    /// Goes all of it, in the end past sidecars that do not answer and whose pods are not ready. Errors: a step is unknown to the control
    /// plane, or some sidecars do not take it. After the first step the mesh is what it was before; after the second it stays as transparent as it is, because sidecars that are strict again would refuse
    /// those that are not yet.
    ///
    /// `stop` ends either wait, with the same outcome: whoever interrupts the command does not want to leave a strict mesh open.
    pub async fn go(&self, client: &Client, stop: &CancellationToken) -> Result<()> {
        let namespace = &self.namespace;
        let mut passed = Passed { by_leave: &self.without, silent: BTreeSet::new() };
        let before = Present::read(client, namespace).await?;
        let mut now = before.says();
        if now != Transparency::Full && !self.at_once {
            knows_steps(client, namespace).await?;
            before.change(client, namespace, Some(&INBOUND.setting.to_string())).await?;
            if let Err(why) = INBOUND.wait(client, self.patience, &mut passed, stop).await {
                return Err(anyhow!("{why:#}; {}", before.restore(client, namespace).await));
            }
            now = INBOUND.setting;
        }
        let present = Present::read(client, namespace).await?;
        if present.says() != now {
            return Err(anyhow!(
                "somebody else has set `{KEY}` of ConfigMap {SETTINGS} to {} meanwhile; nothing was removed",
                present.says()
            ));
        }
        present.change(client, namespace, Some(&FULL.setting.to_string())).await?;
        FULL.wait(client, self.patience, &mut passed, stop).await.map_err(|why| {
            anyhow!(
                "{why:#}; nothing was removed, and the mesh stays transparent as far as it is: run it again, or to go back: {}",
                way_back(namespace)
            )
        })
    }
}

/// Why strict has no effect now; `None` if it has, or if nobody may tell.
pub async fn without_effect(client: &Client, namespace: &str) -> Option<String> {
    let open = open(client, namespace).await?;
    Some(format!("strict has no effect: {open}"))
}

/// Why sidecars are opener than their modes, and the command that takes it back; `None` if they are not, or if nobody may tell.
pub async fn open(client: &Client, namespace: &str) -> Option<String> {
    let present = Present::read(client, namespace).await.ok()?;
    told(present.says()).map(|open| format!("{open}. To go back: {}", way_back(namespace)))
}

/// What a mesh on its way out is, in words; `None` if it is on none.
pub fn told(says: Transparency) -> Option<String> {
    let does = match says {
        Transparency::No => return None,
        Transparency::Inbound => "every sidecar accepts plaintext, whatever its mode is",
        Transparency::Full => "every sidecar accepts and sends plaintext, whatever its mode is: nothing is encrypted",
    };
    Some(format!(
        "the mesh is transparent, because an uninstall was begun (`{KEY}: {says}` in ConfigMap {SETTINGS}): {does}"
    ))
}

/// What the mesh's ConfigMap says now.
struct Present {
    value: Option<String>,
    version: Option<String>,
}

impl Present {
    async fn read(client: &Client, namespace: &str) -> Result<Self> {
        let found = Api::<ConfigMap>::namespaced(client.clone(), namespace).get_opt(SETTINGS).await;
        let Some(map) = found.context("cannot read the mesh's settings")? else {
            let why = format!(
                "there is no ConfigMap {SETTINGS} in namespace `{namespace}`, by which sidecars are told: apply the manifests of \
                 `countersign install` first"
            );
            return Err(Mistake(why).into());
        };
        let value = map.data.as_ref().and_then(|data| data.get(KEY)).cloned();
        Ok(Self { value, version: map.resource_version() })
    }

    /// How far the mesh is on its way, as the control plane reads it.
    fn says(&self) -> Transparency {
        self.value.as_deref().and_then(|text| text.trim().parse().ok()).unwrap_or_default()
    }

    /// Writes another value, unless the ConfigMap has changed since. `None` removes it.
    async fn change(&self, client: &Client, namespace: &str, to: Option<&str>) -> Result<()> {
        let patch = json!({ "metadata": { "resourceVersion": self.version }, "data": { KEY: to } });
        let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
        match api.patch(SETTINGS, &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(e)) if e.code == 409 => Err(anyhow!(
                "ConfigMap {SETTINGS} was changed by somebody else meanwhile: look at it, and run this again"
            )),
            Err(error) => Err(error).context("cannot change the mesh's settings"),
        }
    }

    /// Writes this value again, if the first step's still stands; what became of it, in words.
    async fn restore(&self, client: &Client, namespace: &str) -> String {
        let open = format!(
            "nothing was removed, and every sidecar is still told to accept plaintext. To go back: {}",
            way_back(namespace)
        );
        if self.says() == INBOUND.setting {
            return open;
        }
        let back = async {
            let now = Self::read(client, namespace).await?;
            if now.says() != INBOUND.setting {
                return Ok(false);
            }
            now.change(client, namespace, self.value.as_deref()).await?;
            anyhow::Ok(true)
        };
        match back.await {
            Ok(true) => "nothing was removed, and the mesh is what it was".into(),
            Ok(false) => {
                format!("nothing was removed; somebody else has changed `{KEY}` of ConfigMap {SETTINGS} meanwhile")
            }
            Err(why) => format!("{open} ({why:#})"),
        }
    }
}

/// Checks that every controller beside a server knows the steps, which its page on the mesh shows: an older one would take the first
/// for a mistake, and change nothing.
async fn knows_steps(client: &Client, namespace: &str) -> Result<()> {
    let silent = |why: String| {
        anyhow!(
            "the control plane does not say whether it knows the first step, and nothing was changed: {why}; see `countersign check`, \
             or use --at-once, with which some connections may be refused for a moment"
        )
    };
    let mut servers = pods(client, namespace, "app.kubernetes.io/component=server").await.map_err(silent)?;
    // One that was evicted stays, and answers nobody.
    servers.retain(is_running);
    if servers.is_empty() {
        return Err(silent(format!("no pod of the server runs in namespace {namespace}")));
    }
    for pod in servers {
        match ask(client, &pod, CONTROLLER_PAGES, "/mesh").await {
            Ok(_) => {}
            Err(NoPage::Unknown) => {
                return Err(Mistake(format!(
                    "the control plane (pod {}) is of an older version, which cannot make all sidecars accept plaintext before they send \
                     it, and nothing was changed: install this version first, or use --at-once, with which some connections may be refused \
                     for a moment",
                    pod.name_any()
                ))
                .into());
            }
            Err(NoPage::Unanswered(why)) => return Err(silent(format!("pod {}: {why}", pod.name_any()))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
