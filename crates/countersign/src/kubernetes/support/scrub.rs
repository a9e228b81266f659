//! What must not leave a cluster: secrets in objects and in texts.

use std::borrow::Cow;
use std::sync::LazyLock;

use countersign_controller::injector::{REDIRECT, SIDECAR};
use regex::Regex;
use serde_json::Value;

/// Stands in the place of what was left out.
pub const LEFT_OUT: &str = "(left out)";

/// Domains of the annotations that are kept: those that decide how a pod is meshed, and Kubernetes' own.
const KEPT_ANNOTATIONS: [&str; 3] = ["countersign.dev", "spiffe.io", "kubernetes.io"];
/// Annotations in which kubectl keeps a whole object, and the command line that changed it.
const COMMANDS: [&str; 2] = ["kubectl.kubernetes.io/last-applied-configuration", "kubernetes.io/change-cause"];

/// Form of a secret in a text, and what takes its place.
static SECRETS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let forms = [
        // A private key in PEM, whole or cut off. Line feeds may be escaped.
        (
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----([A-Za-z0-9+/=\s\\:,-]*?-----END [A-Z ]*PRIVATE KEY-----|[A-Za-z0-9+/=\s\\:,]*)",
            "(left out)",
        ),
        // A JSON Web Token, such as a service account's.
        (r"eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*", "(left out)"),
        (r#"(?i)\bbearer [^\s"'\\]+"#, "Bearer (left out)"),
        // User and password in a URL.
        (r#"://[^\s/@"'\\]+@"#, "://(left out)@"),
        // The secret part of a sidecar's probe paths: whoever has it can make the sidecar call its app.
        (r#"/probe/[^\s/"'\\]+/"#, "/probe/(left out)/"),
    ];
    // The forms are constants; a test builds them.
    #[allow(clippy::expect_used)]
    forms.map(|(form, instead)| (Regex::new(form).expect("a valid form"), instead)).into()
});

/// A text without what has the form of a secret.
pub fn text(text: &str) -> Cow<'_, str> {
    let mut clean = Cow::Borrowed(text);
    for (form, instead) in SECRETS.iter() {
        if let Cow::Owned(changed) = form.replace_all(&clean, *instead) {
            clean = Cow::Owned(changed);
        }
    }
    clean
}

/// Every text in a value, as [`text`] has it.
pub fn texts(value: &mut Value) {
    match value {
        Value::String(given) => {
            if let Cow::Owned(clean) = text(given) {
                *given = clean;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(texts),
        Value::Object(fields) => fields.values_mut().for_each(texts),
        _ => {}
    }
}

/// Names of the containers of an installation.
const INSTALLED: [&str; 6] = ["server", "registrar", "agent", "csi", "cni", "injector"];

/// An object without what may hold secrets of its owner: other people's annotations, what they wrote into containers, volumes and
/// classes in free form, and what their programs said. `ours`: whether the chart made the object.
pub fn object(object: &mut Value, ours: bool) {
    metadata(&mut object["metadata"]);
    for at in ["/spec", "/spec/template/spec"] {
        if let Some(spec) = object.pointer_mut(at) {
            containers(spec, ours);
            volumes(spec);
        }
    }
    if let Some(template) = object.pointer_mut("/spec/template/metadata") {
        metadata(template);
    }
    for list in ["initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"] {
        let Some(all) = object.pointer_mut(&format!("/status/{list}")).and_then(Value::as_array_mut) else { continue };
        all.iter_mut().filter(|c| !is_shown(c, ours)).for_each(|status| leave_out("message", status));
    }
    // Of a storage class: some provisioners take passwords there.
    if let Some(parameters) = object.get_mut("parameters").and_then(Value::as_object_mut) {
        parameters.values_mut().for_each(|value| *value = LEFT_OUT.into());
    }
    // Of an event: a message about an app's container repeats its command, or what it said.
    if let Some(Value::String(part)) = object.pointer("/involvedObject/fieldPath")
        && let Some((_, name)) = part.split_once('{')
        && !is_known(name.trim_end_matches('}'), ours)
    {
        object["message"] = LEFT_OUT.into();
    }
}

fn metadata(metadata: &mut Value) {
    let Some(metadata) = metadata.as_object_mut() else { return };
    metadata.remove("managedFields");
    let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) else { return };
    annotations.iter_mut().filter(|(key, _)| !is_kept(key)).for_each(|(_, value)| *value = LEFT_OUT.into());
}

/// Whether an annotation is kept: by the domain before the slash, and its parents.
fn is_kept(key: &str) -> bool {
    let domain = key.split_once('/').map_or("", |(domain, _)| domain);
    let below = |kept: &str| domain == kept || domain.strip_suffix(kept).is_some_and(|rest| rest.ends_with('.'));
    !COMMANDS.contains(&key) && KEPT_ANNOTATIONS.iter().any(|kept| below(kept))
}

/// Whether a container of this name is ours.
fn is_known(name: &str, ours: bool) -> bool {
    [SIDECAR, REDIRECT].contains(&name) || ours && INSTALLED.contains(&name)
}

fn is_shown(container: &Value, ours: bool) -> bool {
    is_known(container["name"].as_str().unwrap_or_default(), ours)
}

fn containers(spec: &mut Value, ours: bool) {
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in spec[list].as_array_mut().into_iter().flatten() {
            if !is_shown(container, ours) {
                hide(container);
            } else if !ours {
                // The sidecar's environment has the app's probes, with their paths and headers, and the secret of its own.
                leave_out("value", &mut container["env"]);
            }
        }
    }
}

fn volumes(spec: &mut Value) {
    for volume in spec["volumes"].as_array_mut().into_iter().flatten() {
        for at in ["/csi/volumeAttributes", "/flexVolume/options"] {
            if let Some(options) = volume.pointer_mut(at) {
                *options = LEFT_OUT.into();
            }
        }
    }
}

/// Replaces the value of each field of this name, however deep.
fn leave_out(name: &str, within: &mut Value) {
    match within {
        Value::Object(fields) => {
            for (field, value) in fields {
                if field == name { *value = LEFT_OUT.into() } else { leave_out(name, value) }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| leave_out(name, item)),
        _ => {}
    }
}

/// Replaces whatever the owner wrote into a container in free form. What `valueFrom` names is a name, and stays.
fn hide(container: &mut Value) {
    // `value`: of an environment variable, or of a header that a probe sends; `path`: of a probe, with its query.
    for name in ["command", "args", "value", "path"] {
        leave_out(name, container);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_text_loses_what_has_the_form_of_a_secret() {
        for (given, expected) in [
            ("GET /probe/s3cr3t/app/readiness: 503", "GET /probe/(left out)/app/readiness: 503"),
            ("authorization: Bearer abc.def", "authorization: Bearer (left out)"),
            ("token eyJhbGciOiJ.eyJpc3M.c2ln end", "token (left out) end"),
            ("postgres://me:pass@db:5432/x", "postgres://(left out)@db:5432/x"),
            ("a -----BEGIN EC PRIVATE KEY-----\\nMHc\\n-----END EC PRIVATE KEY----- b", "a (left out) b"),
            ("a -----BEGIN PRIVATE KEY-----\nMHc", "a (left out)"),
            ("-----BEGIN CERTIFICATE-----\nMII", "-----BEGIN CERTIFICATE-----\nMII"),
            ("spiffe://a.org/ns/x/sa/y is ready", "spiffe://a.org/ns/x/sa/y is ready"),
        ] {
            assert_eq!(text(given), expected);
        }
    }

    #[test]
    fn a_word_cuts_no_value_beyond_its_own_text() {
        let mut value =
            json!([{ "a": "-----BEGIN PRIVATE KEY-----" }, { "b": "kept. -----BEGIN PRIVATE KEY-----abc" }, 1]);
        texts(&mut value);
        assert_eq!(value, json!([{ "a": "(left out)" }, { "b": "kept. (left out)" }, 1]));
        assert_eq!(text("-----BEGIN PRIVATE KEY----- oops\n2026-11-27: all is well"), "(left out)-11-27: all is well");
    }

    #[test]
    fn an_app_keeps_its_environment_arguments_and_annotations_and_we_show_ours() {
        let canary = "canary";
        let app = json!({
            "name": "app", "image": "a", "command": [canary], "args": [canary],
            "env": [{ "name": "PASSWORD", "value": canary }, { "name": "NODE", "valueFrom": { "fieldRef": { "fieldPath": "spec.nodeName" } } }],
            "livenessProbe": { "httpGet": { "path": format!("/?t={canary}"), "httpHeaders": [{ "name": "X", "value": canary }] } },
            "lifecycle": { "preStop": { "exec": { "command": [canary] } } },
        });
        let probes = json!({ "name": "COUNTERSIGN_PROBES", "value": format!("{{\"{canary}/app/liveness\":{{}}}}") });
        let sidecar = json!({ "name": SIDECAR, "args": ["proxy"], "env": [probes] });
        let notes = json!({ "countersign.dev/mode": "strict", "who": canary, "not-kubernetes.io/x": canary,
                            (COMMANDS[0]): canary, (COMMANDS[1]): canary });
        let volumes = json!([{ "name": "v", "csi": { "driver": "d", "volumeAttributes": { "password": canary } } }]);
        let spec = json!({ "initContainers": [sidecar], "containers": [app], "nodeName": "n", "volumes": volumes });
        let status = json!({ "containerStatuses": [
            { "name": "app", "lastState": { "terminated": { "message": canary, "exitCode": 1 } } },
            { "name": SIDECAR, "state": { "waiting": { "message": "ours" } } },
        ] });
        let metadata = json!({ "annotations": notes, "managedFields": [canary] });
        let mut pod = json!({ "metadata": metadata, "spec": spec, "status": status });
        let template = json!({ "metadata": metadata, "spec": spec });
        let mut deployment = json!({ "metadata": {}, "spec": { "template": template } });
        let mut class = json!({ "metadata": {}, "provisioner": "p", "parameters": { "restuserkey": canary } });
        let about = json!({ "fieldPath": "spec.containers{app}" });
        let mut event = json!({ "metadata": {}, "involvedObject": about, "reason": "Failed", "message": canary });
        // A pod of somebody else that says it is the chart's.
        let mut foreign = pod.clone();
        object(&mut foreign, true);
        assert!(!foreign["spec"]["containers"].to_string().contains(canary), "{foreign}");
        for hidden in [&mut pod, &mut deployment, &mut class, &mut event] {
            object(hidden, false);
            assert!(!hidden.to_string().contains(canary), "{hidden}");
        }
        assert_eq!(pod["metadata"]["annotations"]["countersign.dev/mode"], "strict");
        assert_eq!(pod["spec"]["initContainers"][0]["args"], json!(["proxy"]));
        assert_eq!(pod["spec"]["containers"][0]["env"][1]["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName");
        assert_eq!(pod["spec"]["nodeName"], "n");
        assert_eq!(pod["status"]["containerStatuses"][1]["state"]["waiting"]["message"], "ours");
        assert_eq!(event["reason"], "Failed");
        let mut own = json!({ "metadata": {}, "spec": { "containers": [{ "name": "server", "args": ["server"] }] } });
        object(&mut own, true);
        assert_eq!(own["spec"]["containers"][0]["args"][0], "server");
    }
}
