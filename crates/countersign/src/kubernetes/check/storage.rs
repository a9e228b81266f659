//! Whether the server's volume can be had before an installation, and is there afterwards.

use countersign_controller::quantity::Quantity;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Event, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use serde_json::Value;

use super::finding::{Fault, Outcome};

/// The claim of the server's volume.
const CLAIM: &str = "data-countersign-server-0";
/// The provisioner of classes whose volumes are made by hand.
const BY_HAND: &str = "kubernetes.io/no-provisioner";
/// A class with one of these annotations is taken for claims that name none.
const IS_DEFAULT: [&str; 2] =
    ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
/// Most names in a finding.
const MAX_NAMED: usize = 5;

const MEND: &str = "name a StorageClass by server.persistence.storageClass, make a PersistentVolume, or install with \
                    server.persistence.enabled=false (docs/kubernetes.md says what that means)";

/// What the settings ask for.
struct Asked<'a> {
    /// Name of the class; empty for the cluster's default.
    class: &'a str,
    /// Least size; `None` if it cannot be read.
    size: Option<Quantity>,
    namespace: &'a str,
}

/// Checks whether an installation with these settings would get a volume for the server.
pub(super) async fn before(client: &Client, namespace: &str, values: &Value) -> Outcome {
    let persistence = &values["server"]["persistence"];
    if persistence["enabled"] == false {
        return Ok("none is asked for: a deleted server pod means a new authority".into());
    }
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let unread = |e: kube::Error| Fault::unread(&e, "see whether you may list storageclasses and persistentvolumes");
    if let Some(claim) = claims.get_opt(CLAIM).await.map_err(unread)?
        && phase(&claim) == "Bound"
    {
        return Ok(format!("{CLAIM} is bound already"));
    }
    let classes = Api::<StorageClass>::all(client.clone()).list(&ListParams::default()).await.map_err(unread)?;
    let volumes = Api::<PersistentVolume>::all(client.clone()).list(&ListParams::default()).await.map_err(unread)?;
    let size = persistence["size"].as_str().and_then(|text| text.parse().ok());
    let asked = Asked { class: persistence["storageClass"].as_str().unwrap_or_default(), size, namespace };
    judge(&asked, &classes.items, &volumes.items)
}

fn judge(asked: &Asked<'_>, classes: &[StorageClass], volumes: &[PersistentVolume]) -> Outcome {
    let class = if asked.class.is_empty() { default_class(classes) } else { named(asked.class, classes) };
    let name = class.map_or_else(|| asked.class.to_owned(), ResourceExt::name_any);
    let free = volumes.iter().find(|v| is_free(v, &name, asked)).map(ResourceExt::name_any);
    match (class, free) {
        (Some(class), _) if class.provisioner != BY_HAND => Ok(described(class, asked)),
        (_, Some(volume)) if name.is_empty() => Ok(format!("PersistentVolume {volume}, which has no class")),
        (_, Some(volume)) => Ok(format!("PersistentVolume {volume} of class {name}")),
        (Some(_), None) => {
            let what = format!("StorageClass {name} makes no volumes, and no PersistentVolume of it fits and is free");
            Err(Fault::new(what, MEND))
        }
        (None, None) if name.is_empty() => {
            let what = "no StorageClass is the default, and no PersistentVolume without a class fits and is free";
            Err(Fault::new(format!("{what}; {}", there_are(classes)), MEND))
        }
        (None, None) => {
            let what = format!("there is no StorageClass {name}, and no PersistentVolume of it fits and is free");
            Err(Fault::new(format!("{what}; {}", there_are(classes)), MEND))
        }
    }
}

fn named<'a>(name: &str, classes: &'a [StorageClass]) -> Option<&'a StorageClass> {
    classes.iter().find(|class| class.name_any() == name)
}

/// The default class; of several the newest, as Kubernetes does.
fn default_class(classes: &[StorageClass]) -> Option<&StorageClass> {
    let says = |class: &StorageClass, key: &str| class.annotations().get(key).is_some_and(|v| v == "true");
    let defaults = classes.iter().filter(|class| IS_DEFAULT.into_iter().any(|key| says(class, key)));
    defaults.max_by_key(|class| class.creation_timestamp().map(|at| at.0))
}

fn described(class: &StorageClass, asked: &Asked<'_>) -> String {
    let (name, provisioner) = (class.name_any(), &class.provisioner);
    let which = if asked.class.is_empty() { "the default, " } else { "" };
    let when = match class.volume_binding_mode.as_deref() {
        Some("WaitForFirstConsumer") => "when the server's pod has its node",
        _ => "at once, on whichever node the volume is",
    };
    format!("StorageClass {name} ({which}{provisioner}) makes the volume {when}")
}

fn there_are(classes: &[StorageClass]) -> String {
    let mut names: Vec<String> = classes.iter().map(ResourceExt::name_any).collect();
    let more = if names.len() > MAX_NAMED { ", …" } else { "" };
    names.truncate(MAX_NAMED);
    if names.is_empty() { "there is none".into() } else { format!("there are {}{more}", names.join(", ")) }
}

/// Whether the claim could have this volume.
fn is_free(volume: &PersistentVolume, class: &str, asked: &Asked<'_>) -> bool {
    let Some(spec) = &volume.spec else { return false };
    let phase = volume.status.as_ref().and_then(|s| s.phase.as_deref());
    let ours = spec.claim_ref.as_ref().is_none_or(|claim| {
        claim.namespace.as_deref() == Some(asked.namespace) && claim.name.as_deref() == Some(CLAIM)
    });
    let size =
        spec.capacity.as_ref().and_then(|c| c.get("storage")).and_then(|written| written.0.parse::<Quantity>().ok());
    matches!(phase, None | Some("Available" | "Pending"))
        && ours
        && spec.storage_class_name.as_deref().unwrap_or_default() == class
        && spec.access_modes.iter().flatten().any(|mode| mode == "ReadWriteOnce")
        && spec.volume_mode.as_deref().is_none_or(|mode| mode == "Filesystem")
        && size.is_none_or(|size| asked.size.as_ref().is_none_or(|least| size >= *least))
}

/// Checks whether the volumes of an installation are there.
pub(super) async fn installed(client: &Client, namespace: &str) -> Outcome {
    let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let set = sets.get("countersign-server").await.map_err(Fault::absent)?;
    let persists = set.spec.and_then(|s| s.volume_claim_templates).is_some_and(|t| !t.is_empty());
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let claims = claims.list(&ListParams::default()).await;
    let claims = claims.map_err(|e| Fault::unread(&e, "see whether you may list persistentvolumeclaims"))?.items;
    if let Some(claim) = claims.iter().find(|claim| phase(claim) != "Bound") {
        let name = claim.name_any();
        let why = last_event(client, namespace, &name).await.map(|why| format!(": {why}")).unwrap_or_default();
        return Err(Fault::new(format!("PersistentVolumeClaim {name} is {}{why}", phase(claim)), MEND));
    }
    match claims.iter().find(|claim| claim.name_any() == CLAIM) {
        _ if !persists => Ok("the server has none: if its pod is deleted, there is a new authority".into()),
        None => {
            let mend = "see `kubectl describe statefulset countersign-server` in the mesh's namespace";
            Err(Fault::new(format!("PersistentVolumeClaim {CLAIM} does not exist"), mend))
        }
        Some(claim) => {
            let volume = claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).unwrap_or_default();
            Ok(format!("{CLAIM} is bound to {volume}"))
        }
    }
}

fn phase(claim: &PersistentVolumeClaim) -> &str {
    claim.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or("Pending")
}

/// Reason and message of the claim's last event; `None` if there is none, or we may not read it.
async fn last_event(client: &Client, namespace: &str, claim: &str) -> Option<String> {
    let about = format!("involvedObject.kind=PersistentVolumeClaim,involvedObject.name={claim}");
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let events = events.list(&ListParams::default().fields(&about)).await.ok()?;
    let at = |event: &Event| {
        let series = event.series.as_ref().and_then(|s| s.last_observed_time.as_ref()).map(|t| t.0);
        let last = event.last_timestamp.as_ref().map(|t| t.0);
        series.max(last).max(event.event_time.as_ref().map(|t| t.0))
    };
    let last = events.items.into_iter().max_by_key(at)?;
    Some(format!("{}: {}", last.reason.unwrap_or_default(), last.message.unwrap_or_default()))
}

#[cfg(test)]
mod tests;
