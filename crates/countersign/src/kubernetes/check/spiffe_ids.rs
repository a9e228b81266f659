//! `SpiffeID` objects that somebody else than the registrar made, and those that it refused.

use countersign_controller::crd::SpiffeID;
use countersign_controller::registrar::is_ours;
use countersign_identity::shown::{sentence, shown};
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};

use super::finding::{Fault, Outcome};
use super::nodes::some;
use crate::kubernetes::cluster::listed;

/// Longest reason of a refusal that is repeated, in characters.
const MAX_REASON: usize = 300;

/// Checks who made the objects, and whether the registrar took them.
pub(super) async fn made_by(client: &Client) -> Outcome {
    let api: Api<SpiffeID> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await;
    judge(&all.map_err(|e| Fault::unread(&e, "see whether you may list spiffeids"))?.items)
}

fn judge(all: &[SpiffeID]) -> Outcome {
    let name = |object: &SpiffeID| format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
    let refusal = |object: &SpiffeID| {
        let condition =
            object.status.as_ref()?.conditions.iter().find(|c| c.kind == "Registered" && c.status == "False")?;
        let by = if is_ours(object) { "" } else { ", made by hand," };
        Some(format!(
            "{}{by} for {}: {}",
            name(object),
            shown(&object.spec.spiffe_id),
            sentence(&condition.message, MAX_REASON)
        ))
    };
    let live = || all.iter().filter(|object| object.metadata.deletion_timestamp.is_none());
    let refused: Vec<String> = live().filter_map(refusal).collect();
    if !refused.is_empty() {
        let found = format!("{} not registered: {}", refused.len(), some(refused.into_iter()));
        return Err(Fault::new(
            found,
            "correct or delete those that were made by hand; see the registrar's log for the others",
        ));
    }
    let by_hand: Vec<String> =
        live().filter(|o| !is_ours(o)).map(|o| format!("{} ({})", name(o), shown(&o.spec.spiffe_id))).collect();
    if by_hand.is_empty() {
        return Ok(format!("{} objects, all made by the registrar", all.len()));
    }
    Ok(format!("{} objects, {} of them made by hand: {}", all.len(), by_hand.len(), listed(&by_hand)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn object(name: &str, labels: Value, registered: &str, message: &str) -> SpiffeID {
        let condition = json!({
            "type": "Registered", "status": registered, "reason": "x", "message": message, "lastTransitionTime": "",
        });
        serde_json::from_value(json!({
            "apiVersion": "spiffeid.spiffe.io/v1beta1", "kind": "SpiffeID",
            "metadata": { "name": name, "namespace": "shop", "labels": labels },
            "spec": { "spiffeId": format!("spiffe://td/{name}"), "parentId": "spiffe://td/p", "selector": {} },
            "status": { "conditions": [condition] },
        }))
        .unwrap()
    }

    #[test]
    fn objects_of_others_are_listed_and_refused_ones_are_a_fault() {
        let ours = || object("web", json!({ "app.kubernetes.io/managed-by": "countersign" }), "True", "");
        let theirs =
            |registered, message| object("job", json!({ "app.kubernetes.io/managed-by": "argo" }), registered, message);
        assert_eq!(judge(&[ours()]).unwrap(), "1 objects, all made by the registrar");
        let said = judge(&[ours(), theirs("True", "")]).unwrap();
        assert_eq!(said, "2 objects, 1 of them made by hand: shop/job (spiffe://td/job)");
        let fault = judge(&[ours(), theirs("False", "spiffeId: no\u{1b}")]).unwrap_err();
        assert_eq!(fault.found, "1 not registered: shop/job, made by hand, for spiffe://td/job: spiffeId: no\\u{1b}");
    }
}
