use serde_json::json;

use super::*;

fn class(name: &str, provisioner: &str, is_default: bool, made: &str) -> StorageClass {
    let annotations = json!({ IS_DEFAULT[0]: is_default.to_string() });
    let metadata = json!({ "name": name, "annotations": annotations, "creationTimestamp": made });
    let mode = "WaitForFirstConsumer";
    let class = json!({ "metadata": metadata, "provisioner": provisioner, "volumeBindingMode": mode });
    serde_json::from_value(class).unwrap()
}

fn volume(class: &str, change: impl FnOnce(&mut Value)) -> PersistentVolume {
    let mut volume = json!({
        "metadata": { "name": "disk" },
        "spec": { "storageClassName": class, "accessModes": ["ReadWriteOnce"], "capacity": { "storage": "1Gi" } },
        "status": { "phase": "Available" },
    });
    change(&mut volume);
    serde_json::from_value(volume).unwrap()
}

fn asked(class: &str) -> Asked<'_> {
    Asked { class, size: Some("1Gi".parse().unwrap()), namespace: "mesh" }
}

const OLD: &str = "2026-01-01T00:00:00Z";
const NEW: &str = "2026-02-01T00:00:00Z";

#[test]
fn a_cluster_without_a_default_class_and_without_a_volume_is_found() {
    let Fault { found, mend, .. } = judge(&asked(""), &[], &[]).unwrap_err();
    assert!(found.contains("no StorageClass is the default") && found.contains("there is none"), "{found}");
    assert!(mend.contains("server.persistence.enabled=false") && mend.contains("server.persistence.storageClass"));
    let others = [class("fast", "csi.example.org", false, OLD)];
    assert!(judge(&asked(""), &others, &[]).unwrap_err().found.contains("there are fast"));
    assert!(judge(&asked(""), &others, &[volume("", |_| ())]).unwrap().contains("PersistentVolume disk"));
}

#[test]
fn the_default_class_is_told_with_its_provisioner_and_when_it_binds() {
    let classes =
        [class("old", "old.csi", true, OLD), class("new", "new.csi", true, NEW), class("no", "x", false, NEW)];
    let found = judge(&asked(""), &classes, &[]).unwrap();
    assert_eq!(found, "StorageClass new (the default, new.csi) makes the volume when the server's pod has its node");
    let mut at_once = class("a", "csi", true, OLD);
    at_once.volume_binding_mode = Some("Immediate".into());
    assert!(judge(&asked(""), &[at_once], &[]).unwrap().contains("at once"));
}

#[test]
fn a_class_that_is_named_must_exist_or_have_a_volume() {
    let classes = [class("fast", "csi", false, OLD), class("local", BY_HAND, false, OLD)];
    assert!(judge(&asked("fast"), &classes, &[]).is_ok());
    let Fault { found, .. } = judge(&asked("fats"), &classes, &[]).unwrap_err();
    assert!(found.contains("no StorageClass fats") && found.contains("fast, local"), "{found}");
    assert!(judge(&asked("fats"), &[], &[volume("fats", |_| ())]).is_ok(), "a volume's class needs no object");
    assert!(judge(&asked("local"), &classes, &[]).unwrap_err().found.contains("makes no volumes"));
    assert!(judge(&asked("local"), &classes, &[volume("local", |_| ())]).unwrap().contains("disk of class local"));
}

#[test]
fn a_volume_that_the_claim_could_not_have_does_not_count() {
    let fits = |change: fn(&mut Value)| judge(&asked("a"), &[], &[volume("a", change)]).is_ok();
    assert!(fits(|_| ()));
    assert!(!fits(|v| v["status"]["phase"] = "Bound".into()));
    assert!(!fits(|v| v["status"]["phase"] = "Released".into()));
    assert!(!fits(|v| v["spec"]["accessModes"] = json!(["ReadOnlyMany"])));
    assert!(!fits(|v| v["spec"]["capacity"]["storage"] = "1000M".into()));
    assert!(!fits(|v| v["spec"]["volumeMode"] = "Block".into()));
    assert!(!fits(|v| v["spec"]["claimRef"] = json!({ "namespace": "other", "name": CLAIM })));
    assert!(fits(|v| v["spec"]["claimRef"] = json!({ "namespace": "mesh", "name": CLAIM })));
}

#[test]
fn sizes_are_compared_by_value_in_every_form_that_kubernetes_has() {
    let fits = |least: &str, size: &str| {
        let asked = Asked { class: "local", size: Some(least.parse().unwrap()), namespace: "mesh" };
        judge(&asked, &[], &[volume("local", |v| v["spec"]["capacity"]["storage"] = size.into())]).is_ok()
    };
    for enough in ["1Gi", "1073741824", "1.5Gi", "2e9", "2G", "1100M"] {
        assert!(fits("1Gi", enough), "{enough}");
    }
    for less in ["1G", "1073741823", "0.9Gi", "1e9", "5", "2k", "3M"] {
        assert!(!fits("1Gi", less), "{less}");
    }
    assert!(!fits("1.5Gi", "1Gi") && fits("1.5Gi", "1536Mi"));
}
