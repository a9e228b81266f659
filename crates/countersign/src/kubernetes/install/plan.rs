//! What an installation would do, compared with what the cluster has and remembers: changes, doubts, notes, and the flags that it
//! lacks.

use std::time::Duration;

use anyhow::{Context, Result};
use countersign_identity::policy::Mode;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::Api;
use serde_json::{Value, json};

use super::{InstallArgs, check_namespace, yaml};
use crate::kubernetes::changes::{self, Change, Consent};
use crate::kubernetes::check::csi;
use crate::kubernetes::existing::Existing;
use crate::kubernetes::former::Revision;
use crate::kubernetes::given::Given;
use crate::kubernetes::memory::{self, Memory, Seen};
use crate::kubernetes::{api_server, live_settings, redirects};
use crate::settings::Mistake;
use crate::settings::words::escaped;

/// What an installation would do.
pub(super) struct Plan {
    pub(super) namespace: String,
    pub(super) memory: Memory,
    pub(super) changes: Vec<Change>,
    /// What the cluster has beside what it remembers.
    pub(super) existing: Existing,
    /// Why nodes cannot have what it turns on.
    pub(super) unfit: Option<String>,
    /// How it would open the mesh unasked.
    pub(super) opened: Option<String>,
    /// What else there is to be said of it.
    pub(super) notes: Vec<String>,
    /// The cluster, and what it remembers; `None` if it is not asked.
    pub(super) cluster: Option<(Client, Seen)>,
}

pub(super) const NO_CLUSTER: &str = "there is no cluster to ask: set KUBECONFIG";

/// Compares what the arguments ask for with the cluster of the current KUBECONFIG, if there is one.
pub(super) async fn plan(args: &InstallArgs) -> Result<Plan> {
    check_namespace(&args.namespace)?;
    let given = args.values.given()?;
    // Who names the mode now means it.
    let names_mode = given.leaves().contains_key("mesh.mode");
    let client = if args.ignore_cluster { None } else { cluster().await? };
    let cluster = match client {
        None => None,
        Some(client) => {
            let seen = memory::look(&client, &args.namespace, args.force).await?;
            Some((client, seen))
        }
    };
    let existing = match &cluster {
        Some((client, seen)) => Existing::look(client, &args.namespace, seen).await?,
        None => Existing::default(),
    };
    let earlier = cluster.as_ref().and_then(|(_, seen)| seen.memory.as_ref());
    let given = match (args.reuse_values, earlier) {
        (false, _) => given,
        (true, Some(earlier)) => given.over(earlier.given.clone()),
        (true, None) if cluster.is_none() => return Err(Mistake::flag("--reuse-values", NO_CLUSTER).into()),
        (true, None) => {
            let why = format!("namespace `{}` has no installation that remembers its settings", args.namespace);
            return Err(Mistake::flag("--reuse-values", &why).into());
        }
    };
    let mut notes = vec![];
    if let Some(pending) = cluster.as_ref().and_then(|(_, seen)| seen.pending.as_ref()) {
        notes.push(memory::unfinished(pending, &given));
    }
    let whole = given.whole("the settings of the existing installation and those given now")?;
    let (mut given, mut opened) = (given, None);
    if let Some((client, seen)) = &cluster {
        let maps = Api::<ConfigMap>::namespaced(client.clone(), &args.namespace);
        let mesh = memory::get(&maps, live_settings::NAME).await?;
        match stricter(mesh.as_ref(), &whole) {
            _ if names_mode => {}
            Some((live, _)) if args.reuse_values => {
                let mode = json!({ "mesh": { "mode": live.to_string() } });
                given = Given::of(mode).map_err(Mistake)?.over(given);
            }
            stricter => opened = stricter.map(|(live, next)| opens(live, next)),
        }
        if let (Some(mesh), Some(memory)) = (&mesh, &seen.memory) {
            notes.extend(live_settings::taken_back(mesh, &memory.values()?, &whole));
        }
    }
    // What runs shows all that differs from today's defaults.
    let earlier = earlier.map(|memory| (&memory.given, memory.defaults));
    let earlier = earlier.or(existing.unremembered.as_ref().map(|given| (given, Revision::NOW)));
    let changes =
        earlier.map_or_else(|| Ok(vec![]), |(earlier, revision)| changes::changes(earlier, revision, &given))?;
    // Where a driver runs already it has shown that it can.
    let turned_on = earlier.is_none()
        || changes.iter().any(|change| match change.setting.as_str() {
            "agent.csi.enabled" => change.before != Some(json!(true)),
            setting => setting.starts_with("agent.nodeSelector"),
        });
    let unfit = match &cluster {
        Some((client, _)) if turned_on => unfit(client, &given.whole("the settings")?).await,
        _ => None,
    };
    if let Some((client, _)) = &cluster {
        notes.extend(redirects::note(client, &changes, &whole).await);
    }
    let memory = Memory::new(given);
    Ok(Plan { namespace: args.namespace.clone(), memory, changes, existing, unfit, opened, notes, cluster })
}

/// The mode of a mesh that was made stricter since (`countersign strict --mesh`) than these settings make it, and theirs. What was
/// changed on the running mesh is not remembered.
pub(super) fn stricter(mesh: Option<&ConfigMap>, values: &Value) -> Option<(Mode, Mode)> {
    let live: Mode = mesh?.data.as_ref()?.get("mode")?.trim().parse().ok()?;
    let next: Mode = values["mesh"]["mode"].as_str()?.parse().ok()?;
    (next < live).then_some((live, next))
}

/// What is said of settings that would open it.
pub(super) fn opens(live: Mode, next: Mode) -> String {
    format!(
        "the mesh is {live} (ConfigMap countersign-mesh) and would become {next}: add --set mesh.mode={live}, or --set \
         mesh.mode={next} if that is meant"
    )
}

/// Longest look at the nodes.
const NODES: Duration = Duration::from_secs(20);

/// Why some nodes cannot have the CSI driver that these settings turn on. What cannot be seen is told and is no reason.
pub(super) async fn unfit(client: &Client, values: &Value) -> Option<String> {
    let Ok(judged) = tokio::time::timeout(NODES, csi::before(client, values)).await else {
        eprintln!("whether the nodes can have the CSI driver was not checked: no answer within {} s", NODES.as_secs());
        return None;
    };
    let fault = judged.err()?;
    if !fault.is_checked {
        eprintln!("whether the nodes can have the CSI driver was not checked: {}", escaped(&fault.found));
        return None;
    }
    Some(format!("{}: {}, or keep agents off them by agent.nodeSelector", fault.found, fault.mend))
}

/// The cluster of the current KUBECONFIG; `None` where none is configured. Error: the configuration cannot be read.
async fn cluster() -> Result<Option<Client>> {
    let Some(config) = api_server::configured().await? else {
        eprintln!("no cluster is configured (KUBECONFIG): the settings are not compared with those of an installation");
        return Ok(None);
    };
    let reached = api_server::reach_by(config, &api_server::source()).await;
    Ok(Some(
        reached
            .context(
                "the settings cannot be compared with those of an installation, which --ignore-cluster leaves out",
            )?
            .client,
    ))
}

impl Plan {
    pub(super) fn is_allowed(&self, consent: Consent) -> bool {
        let doubts = !consent.force && !self.doubts().is_empty();
        !doubts && self.changes.iter().all(|change| change.is_allowed(consent))
    }

    /// What needs consent to everything, in words; empty if nothing does.
    pub(super) fn doubts(&self) -> Vec<String> {
        self.existing.doubts().into_iter().chain(self.unfit.clone()).chain(self.opened.clone()).collect()
    }

    pub(super) fn as_json(&self, consent: Consent) -> Value {
        let shown = |memory: &Memory| json!({ "version": memory.version, "values": memory.given.tree() });
        let before = self.cluster.as_ref().and_then(|(_, seen)| seen.memory.as_ref()).map(shown);
        json!({
            "namespace": self.namespace, "compared": self.cluster.is_some(), "installed": before,
            "remembered": shown(&self.memory), "changes": changes::as_json(&self.changes, consent),
            "doubts": self.doubts(), "allowed": self.is_allowed(consent), "needs": self.needed(consent), "notes": self.notes,
        })
    }

    /// The changes, and what would be remembered.
    pub(super) fn as_text(&self) -> Result<String> {
        let changes = changes::table(&self.changes).render();
        let values = yaml(&self.memory.given.tree())?;
        // Escaped line by line: some of it was read from the cluster.
        let values: Vec<String> = values.lines().map(escaped).collect();
        let doubts = self.doubts().into_iter().map(|doubt| format!("\n{}\n", escaped(&doubt)));
        let doubts: String = doubts.collect();
        Ok(format!("{changes}{doubts}\nremembered, version {}:\n{}\n", self.memory.version, values.join("\n")))
    }

    /// What a dry run says of itself.
    pub(super) fn tried(&self, consent: Consent) -> String {
        let needed = escaped(&self.needed(consent).join("; "));
        match needed.as_str() {
            "" => "a dry run: nothing was changed".into(),
            _ => format!("a dry run: nothing was changed, and without --dry-run it would be refused: {needed}"),
        }
    }

    /// Why nothing was applied, in words.
    pub(super) fn needs(&self, consent: Consent) -> String {
        let said = escaped(&self.needed(consent).join("; "));
        if self.changes.is_empty() {
            return format!("nothing was applied: {said}");
        }
        format!(
            "namespace `{}` has an installation with other settings, and nothing was applied: {said}",
            self.namespace
        )
    }

    /// Which flags it needs that were not given, in words; empty if none.
    pub(super) fn needed(&self, consent: Consent) -> Vec<String> {
        let refused = || self.changes.iter().filter(|change| !change.is_allowed(consent));
        let names = |of: &dyn Fn(&Change) -> bool| {
            refused().filter(|c| of(c)).map(|c| c.setting.clone()).collect::<Vec<_>>().join(", ")
        };
        let fixed = names(&|c| matches!(c.kind, changes::Kind::Fixed(_)));
        let dropped = names(&|c| c.kind == changes::Kind::Dropped);
        let mut said = vec![];
        if !fixed.is_empty() {
            said.push(format!("{fixed} would change, which needs --force"));
        }
        if !dropped.is_empty() {
            said.push(format!(
                "{dropped} would no longer be set: --reuse-values keeps earlier settings, --reset-values drops them"
            ));
        }
        if !consent.force {
            said.extend(self.existing.doubts().into_iter().map(|doubt| format!("{doubt}, which needs --force")));
            said.extend(self.unfit.iter().map(|why| format!("{why}; --force installs it all the same")));
            said.extend(self.opened.clone());
        }
        said
    }
}
