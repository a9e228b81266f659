//! Whether objects of the cluster are as the chart renders them: admission policies and the rules of the webhook, which decide
//! what the API server refuses and what it asks the injector about.

use countersign_watch::in_words;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject};
use serde_json::Value;

use super::finding::{Fault, Outcome};
use super::requirements::ADMISSION_POLICY;
use crate::kubernetes::cluster::{listed, words};

const INSTALL: &str = "apply the manifests of `countersign install` with your settings";

/// Checks the admission policies and their bindings. `version`: that of Kubernetes.
pub(super) async fn policies(client: &Client, manifests: &anyhow::Result<Vec<Value>>, version: (u32, u32)) -> Outcome {
    let manifests = manifests.as_ref().map_err(|e| Fault::unchecked(e.to_string(), "this is a bug of this command"))?;
    let kinds = [
        ApiResource::erase::<ValidatingAdmissionPolicy>(&()),
        ApiResource::erase::<ValidatingAdmissionPolicyBinding>(&()),
    ];
    let wanted: Vec<_> = kinds.iter().flat_map(|kind| of_kind(manifests, kind).map(move |o| (kind, o))).collect();
    if wanted.is_empty() {
        return Ok("left out by admissionPolicy=false: only the webhook judges pods and namespaces".into());
    }
    if version < ADMISSION_POLICY {
        let found = format!("Kubernetes {}.{} evaluates no admission policies", version.0, version.1);
        return Err(Fault::new(found, "install with admissionPolicy=false"));
    }
    let mut bad = vec![];
    for (kind, object) in &wanted {
        bad.extend(compared(client, kind, object, "spec").await?);
    }
    if bad.is_empty() {
        Ok(format!("{} policies and bindings as in the chart", wanted.len()))
    } else {
        Err(Fault::new(listed(&bad), INSTALL))
    }
}

/// Checks what the API server asks the webhook about, and what happens to pods while it does not answer.
pub(super) async fn webhook(client: &Client, manifests: &anyhow::Result<Vec<Value>>) -> Outcome {
    let manifests = manifests.as_ref().map_err(|e| Fault::unchecked(e.to_string(), "this is a bug of this command"))?;
    let kind = ApiResource::erase::<MutatingWebhookConfiguration>(&());
    let mut bad = vec![];
    for object in of_kind(manifests, &kind) {
        bad.extend(compared(client, &kind, object, "webhooks").await?);
    }
    if bad.is_empty() {
        Ok("selectors and failure policies as in the chart".into())
    } else {
        Err(Fault::new(listed(&bad), INSTALL))
    }
}

fn of_kind<'a>(manifests: &'a [Value], kind: &ApiResource) -> impl Iterator<Item = &'a Value> {
    manifests.iter().filter(move |o| o["kind"] == kind.kind)
}

/// How an object differs from the rendered one in one of its fields; `None` if it does not.
async fn compared(client: &Client, kind: &ApiResource, wanted: &Value, field: &str) -> Result<Option<String>, Fault> {
    let name = wanted["metadata"]["name"].as_str().unwrap_or_default();
    let what = format!("{} {name}", kind.kind);
    let api: Api<DynamicObject> = Api::all_with(client.clone(), kind);
    let found = match api.get_opt(name).await {
        Ok(Some(found)) => found.data,
        Ok(None) => return Ok(Some(format!("there is no {what}"))),
        Err(error) => {
            let mend = format!("see whether you may get {}", kind.plural);
            return Err(Fault::unchecked(in_words(&error), mend));
        }
    };
    if let Some(at) = difference(&wanted[field], &found[field]) {
        return Ok(Some(format!("{what} differs from the chart's at {field}{at}")));
    }
    Ok(warning(&found).map(|why| format!("{what}: {why}")))
}

/// What the API server says of a policy's expressions.
fn warning(policy: &Value) -> Option<String> {
    let first = policy["status"]["typeChecking"]["expressionWarnings"].as_array()?.first()?;
    Some(format!(
        "the API server warns of {}: {}",
        words(first["fieldRef"].as_str()?),
        words(first["warning"].as_str()?)
    ))
}

/// Where the second value lacks something of the first one, as a path. What it has beside it is the API server's defaults.
pub(super) fn difference(wanted: &Value, found: &Value) -> Option<String> {
    match (wanted, found) {
        (Value::Object(wanted), Value::Object(found)) => wanted.iter().find_map(|(key, value)| {
            let found = found.get(key).unwrap_or(&Value::Null);
            difference(value, found).map(|at| format!(".{key}{at}"))
        }),
        (Value::Array(wanted), Value::Array(found)) if wanted.len() == found.len() => wanted
            .iter()
            .zip(found)
            .enumerate()
            .find_map(|(n, (wanted, found))| difference(wanted, found).map(|at| format!("[{n}]{at}"))),
        // The API server leaves out what is empty.
        (wanted, Value::Null) if is_empty(wanted) => None,
        (wanted, found) => (wanted != found).then(String::new),
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(serde_json::Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn defaults_of_the_api_server_are_no_difference_and_everything_else_is() {
        let wanted = json!({ "a": [{ "b": 1 }, { "c": ["x"] }], "d": "e" });
        let with = |change: &dyn Fn(&mut Value)| {
            let mut found = json!({ "a": [{ "b": 1, "default": {} }, { "c": ["x"] }], "d": "e", "more": [] });
            change(&mut found);
            difference(&wanted, &found)
        };
        assert_eq!(with(&|_| {}), None);
        assert_eq!(with(&|f| f["a"][0]["b"] = json!(2)).as_deref(), Some(".a[0].b"));
        assert_eq!(
            with(&|f| f["a"][1]["c"] = json!(["x", "y"])).as_deref(),
            Some(".a[1].c"),
            "one more is another list"
        );
        assert_eq!(with(&|f| f["d"] = Value::Null).as_deref(), Some(".d"));
        assert_eq!(with(&|f| *f = Value::Null).as_deref(), Some(""));
        let empty = json!({ "a": { "b": {}, "c": [] } });
        assert_eq!(difference(&empty, &json!({ "a": {} })), None, "the API server leaves out what is empty");
        assert_eq!(difference(&json!({ "a": {} }), &json!({ "a": "x" })).as_deref(), Some(".a"));
    }

    #[test]
    fn an_expression_that_the_api_server_does_not_understand_is_told_of() {
        let warnings = json!([{ "fieldRef": "spec.validations[0].expression", "warning": "undefined\n field" }]);
        let policy = json!({ "status": { "typeChecking": { "expressionWarnings": warnings } } });
        let said = warning(&policy).unwrap();
        assert_eq!(said, "the API server warns of spec.validations[0].expression: undefined field");
        assert_eq!(warning(&json!({ "status": {} })), None);
    }
}
