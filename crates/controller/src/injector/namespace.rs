//! Validates our labels and annotations on a namespace when they are set.

use serde_json::{Value, json};

use super::INJECT;
use super::nearest::did_you_mean;
use super::settings::MODES;
use crate::store::MODE;

/// Valid values of the label.
pub(super) const WORDS: [&str; 2] = ["enabled", "disabled"];

/// Rejects an invalid value in one of our labels or annotations, if this change sets it. An invalid value that existed
/// before is accepted, so that other changes to the namespace remain possible.
pub fn judge_namespace(namespace: &Value, before: Option<&Value>) -> Result<(), String> {
    let said = |object: &Value, place: &str, key: &str| object["metadata"][place][key].as_str().map(ToOwned::to_owned);
    let mut checks = vec![];
    for (place, what) in [("labels", "label"), ("annotations", "annotation")] {
        checks.push((place, what, INJECT, &WORDS[..], "is neither enabled nor disabled"));
        checks.push((place, what, MODE, &MODES[..], "is no mode: use off, permissive or strict"));
    }
    for (place, what, key, words, why) in checks {
        let Some(value) = said(namespace, place, key) else { continue };
        let stood = before.and_then(|b| said(b, place, key)).as_ref() == Some(&value);
        if !stood && !words.contains(&value.as_str()) {
            return Err(format!("{what} {key}: `{value}` {why}{}", did_you_mean(&value, words)));
        }
    }
    Ok(())
}

/// Gives a namespace that is strict by annotation the label that says so too: by the label the API server tells us of which kind
/// a pod's namespace is.
pub fn mark_strict(namespace: &mut Value) {
    let metadata = &mut namespace["metadata"];
    if metadata["annotations"][MODE] != "strict" || metadata["labels"][MODE] == "strict" {
        return;
    }
    if !metadata["labels"].is_object() {
        metadata["labels"] = json!({});
    }
    metadata["labels"][MODE] = "strict".into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_is_strict_by_annotation_is_labelled_so() {
        let marked = |mut namespace: Value| {
            mark_strict(&mut namespace);
            namespace["metadata"]["labels"].clone()
        };
        let strict = json!({ MODE: "strict" });
        assert_eq!(marked(json!({ "metadata": { "annotations": strict } })), strict);
        let both = json!({ "metadata": { "annotations": strict, "labels": { "a": "b", MODE: "permissive" } } });
        assert_eq!(marked(both), json!({ "a": "b", MODE: "strict" }));
        assert_eq!(marked(json!({ "metadata": { "annotations": { MODE: "permissive" } } })), Value::Null);
        assert_eq!(marked(json!({ "metadata": {} })), Value::Null);
    }

    #[test]
    fn a_word_that_means_nothing_is_refused_where_it_is_new() {
        let labelled = |value: &str| json!({ "metadata": { "labels": { INJECT: value } } });
        let moded = |value: &str| json!({ "metadata": { "annotations": { MODE: value } } });
        assert_eq!(judge_namespace(&labelled("enabled"), None), Ok(()));
        let why = judge_namespace(&labelled("true"), Some(&labelled("enabled"))).unwrap_err();
        assert!(
            why.starts_with("label countersign.dev/inject: `true` is neither") && why.ends_with("`enabled`?"),
            "{why}"
        );
        let why = judge_namespace(&moded("stict"), None).unwrap_err();
        assert!(why.starts_with("annotation countersign.dev/mode: `stict`") && why.ends_with("`strict`?"), "{why}");
        assert_eq!(judge_namespace(&moded("stict"), Some(&moded("stict"))), Ok(()), "something else is changed");
        assert_eq!(judge_namespace(&moded("strict"), Some(&moded("stict"))), Ok(()));
        assert_eq!(judge_namespace(&json!({}), None), Ok(()));
    }
}
