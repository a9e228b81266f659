//! The network configuration that the runtime writes to standard input.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use countersign_identity::shown::shown;
use serde::Deserialize;
use serde_json::Value;

use super::outcome::PluginError;
use super::{NAME, VERSIONS};

/// Socket of the node's component where the configuration names none.
const SOCKET: &str = "/run/countersign/cni/cni.sock";
/// Most resolvers that are passed on.
const MAX_RESOLVERS: usize = 32;

/// The configuration, with everything that others added left out.
#[derive(Debug, Deserialize)]
pub struct NetworkConfig {
    #[serde(rename = "cniVersion", default)]
    version: Option<String>,
    #[serde(default)]
    socket: Option<PathBuf>,
    /// What the runtime adds for the plugin's `capabilities` (CNI conventions).
    #[serde(rename = "runtimeConfig", default)]
    runtime: Value,
    #[serde(rename = "prevResult", default)]
    before: Option<Value>,
}

impl NetworkConfig {
    /// Parses a configuration.
    pub fn parse(text: &[u8]) -> Result<Self, PluginError> {
        serde_json::from_slice(text).map_err(|e| PluginError::undecodable(&e))
    }

    /// The version, whether or not the plugin knows it.
    pub fn version(&self) -> Option<&'static str> {
        self.supported_version().ok()
    }

    /// The version. Errors: the plugin does not know it.
    pub fn supported_version(&self) -> Result<&'static str, PluginError> {
        let version = self.version.as_deref().unwrap_or("0.1.0");
        VERSIONS.into_iter().find(|known| *known == version).ok_or_else(|| PluginError::version(version))
    }

    /// Path of the socket of the node's component.
    pub fn socket(&self) -> &Path {
        self.socket.as_deref().unwrap_or(Path::new(SOCKET))
    }

    /// The pod's resolvers, if the runtime has said which. What has another form says nothing: it must not hold up the
    /// pod.
    pub fn resolvers(&self) -> Option<BTreeSet<IpAddr>> {
        let dns = &self.runtime["dns"];
        // The convention spells the name small; containerd writes it with a capital.
        let servers = ["servers", "Servers"].into_iter().find_map(|key| dns[key].as_array())?;
        let addresses = servers.iter().take(MAX_RESOLVERS).filter_map(|server| server.as_str()?.parse().ok());
        let addresses: BTreeSet<IpAddr> = addresses.collect();
        // containerd also leaves them out where the pod gets its node's.
        (!addresses.is_empty()).then_some(addresses)
    }

    /// The result of the plugin before, in this version.
    pub fn result_before(&self, version: &str) -> Result<Value, PluginError> {
        let Some(Value::Object(mut before)) = self.before.clone() else {
            return Err(PluginError::config(&format!(
                "{NAME} comes behind another plugin in a list, whose result is missing (prevResult)"
            )));
        };
        before.insert("cniVersion".into(), version.into());
        Ok(Value::Object(before))
    }
}

impl PluginError {
    fn version(found: &str) -> Self {
        Self::new(1, &format!("CNI version {} is not supported: {}", shown(found), VERSIONS.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn resolvers_come_from_the_runtime_in_either_spelling() {
        let resolvers = |dns: &str| parsed(&format!(r#"{{"runtimeConfig":{{"dns":{dns}}}}}"#)).resolvers();
        let expected: BTreeSet<IpAddr> = ["10.0.0.10".parse().unwrap()].into();
        for dns in [r#"{"Servers":["10.0.0.10"],"Searches":null}"#, r#"{"servers":["10.0.0.10","nonsense"]}"#] {
            assert_eq!(resolvers(dns).as_ref(), Some(&expected), "{dns}");
        }
        for dns in ["null", "{}", r#"{"Servers":null}"#, r#"{"servers":[]}"#, r#"{"servers":["x", 7]}"#, "[1]", "7"] {
            assert_eq!(resolvers(dns), None, "{dns}");
        }
        assert_eq!(parsed("{}").resolvers(), None);
    }

    #[test]
    fn the_result_before_is_passed_on_in_the_configurations_version() {
        let config =
            parsed(r#"{"cniVersion":"0.4.0","prevResult":{"cniVersion":"0.3.1","ips":[{"x":1.50}],"y":null}}"#);
        let version = config.supported_version().unwrap();
        let result = config.result_before(version).unwrap().to_string();
        assert_eq!(result, r#"{"cniVersion":"0.4.0","ips":[{"x":1.5}],"y":null}"#);
        for none in ["{}", r#"{"prevResult":[]}"#, r#"{"prevResult":null}"#] {
            assert!(parsed(none).result_before("1.0.0").is_err(), "{none}");
        }
    }

    #[test]
    fn a_version_that_is_not_known_is_none() {
        for text in ["{}", r#"{"cniVersion":"0.2.0"}"#, r#"{"cniVersion":"1.2.0"}"#] {
            assert!(parsed(text).supported_version().is_err(), "{text}");
        }
        assert_eq!(parsed("{}").socket(), Path::new(SOCKET));
    }
}
