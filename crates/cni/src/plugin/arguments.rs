//! `CNI_ARGS`: which pod it is. Runtimes of Kubernetes say it by `K8S_POD_…` (containerd, CRI-O).

use countersign_identity::shown::shown;
use serde::{Deserialize, Serialize};

/// Longest text of arguments that is read, in bytes.
const MAX_ARGUMENTS: usize = 16 * 1024;
/// Longest name of a pod, in bytes: a DNS subdomain (RFC 1123).
const MAX_NAME: usize = 253;
/// Longest name of a namespace, in bytes: a DNS label.
const MAX_NAMESPACE: usize = 63;
/// Longest UID, in bytes.
const MAX_UID: usize = 64;

/// A pod, by the names that the runtime gives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Names")]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// The same before it is checked.
#[derive(Default, Deserialize)]
struct Names {
    namespace: String,
    name: String,
    uid: String,
}

impl PodName {
    /// Parses `KEY=VALUE;KEY=VALUE…`; `None` for a container that is no pod's.
    ///
    /// # Errors
    /// A name is missing or has a wrong form, in words.
    pub fn of_arguments(text: &str) -> Result<Option<Self>, String> {
        if text.len() > MAX_ARGUMENTS {
            return Err(format!("CNI_ARGS is longer than {MAX_ARGUMENTS} bytes"));
        }
        let value = |key: &str| {
            let pairs = text.split(';').filter_map(|pair| pair.split_once('='));
            pairs.rev().find(|(k, _)| *k == key).map(|(_, v)| v.to_owned()).unwrap_or_default()
        };
        let [namespace, name, uid] = ["K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_UID"].map(value);
        if namespace.is_empty() && name.is_empty() {
            return Ok(None);
        }
        Self::try_from(Names { namespace, name, uid }).map(Some)
    }
}

impl TryFrom<Names> for PodName {
    type Error = String;

    fn try_from(names: Names) -> Result<Self, String> {
        let is_label = |text: &str| {
            let form = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            !text.is_empty() && text.bytes().all(form) && !text.starts_with('-') && !text.ends_with('-')
        };
        let is_namespace = names.namespace.len() <= MAX_NAMESPACE && is_label(&names.namespace);
        let is_name = names.name.len() <= MAX_NAME && names.name.split('.').all(is_label);
        let is_uid = (1..=MAX_UID).contains(&names.uid.len())
            && names.uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let wrong = |what: &str, text: &str| Err(format!("the runtime gives `{}` for the pod's {what}", shown(text)));
        match (is_namespace, is_name, is_uid) {
            (false, _, _) => wrong("namespace", &names.namespace),
            (_, false, _) => wrong("name", &names.name),
            (_, _, false) => wrong("UID", &names.uid),
            _ => Ok(Self { namespace: names.namespace, name: names.name, uid: names.uid }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_named_by_the_runtimes_of_kubernetes() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0.a;X=y;K8S_POD_UID=7f1a-2";
        let pod = PodName::of_arguments(text).unwrap().unwrap();
        assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_str()), ("shop", "web-0.a", "7f1a-2"));
        assert_eq!(PodName::of_arguments("").unwrap(), None);
        assert_eq!(PodName::of_arguments("IgnoreUnknown=1;MAC=x").unwrap(), None, "a container of another tool");
    }

    #[test]
    fn what_is_no_name_is_refused_and_shown_without_harm() {
        let of = |ns: &str, name: &str, uid: &str| {
            PodName::of_arguments(&format!("K8S_POD_NAMESPACE={ns};K8S_POD_NAME={name};K8S_POD_UID={uid}")).unwrap_err()
        };
        assert!(of("a/b", "n", "u").ends_with("`a/b` for the pod's namespace"));
        assert!(of("a", "../n", "u").ends_with("`../n` for the pod's name"));
        assert!(of("a", "n", "").ends_with("`` for the pod's UID"));
        assert!(of("a", "n", "\u{1b}[2J").contains("\\u{1b}"));
        assert!(of(&"a".repeat(64), "n", "u").contains("namespace"));
        assert!(PodName::of_arguments(&"K8S_POD_NAME=a;".repeat(2_000)).is_err());
        let sent = r#"{"namespace":"a","name":"B","uid":"u"}"#;
        assert!(serde_json::from_str::<PodName>(sent).is_err(), "over the socket too");
    }
}
