//! The pods of one node: how to ask for them.

use std::str::FromStr;

use countersign_identity::shown::shown;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::Config;

/// Name of a node: a DNS subdomain (RFC 1123), so that it cannot add to a field selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeName(String);

impl NodeName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
        if text.is_empty() || text.len() > 253 || !text.bytes().all(valid) {
            return Err(format!("`{}` is no node's name: lowercase letters, digits, `-` and `.`", shown(text)));
        }
        Ok(Self(text.to_owned()))
    }
}

/// What a watch asks for to get this node's pods. They come from the API server's own memory, which has an index by
/// node: the roles of a large cluster's nodes must not have its database searched for each of them.
pub fn pods_of(node: &NodeName) -> Config {
    Config::default().fields(&format!("spec.nodeName={}", node.as_str())).any_semantic()
}

/// Whether a pod is on this node. The API server's answer is filtered by it; that it is, has to be checked.
pub fn is_on(node: &NodeName, pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) == Some(node.as_str())
}
