//! The sidecar settings in a pod's annotations, validated one by one.

use std::collections::BTreeMap;

use countersign_identity::policy::Mode;
use ipnet::IpNet;

use super::nearest::did_you_mean;
use super::resources::{Amount, Resources};
use crate::port_modes;
use crate::quantity::NoQuantity;

/// Most ports or networks per annotation. Each is a rule that every new connection passes.
const MAX_LISTED: usize = 64;
/// The names of the modes.
pub(super) const MODES: [&str; 3] = ["off", "permissive", "strict"];

/// Why an annotation is invalid, as the user sees it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("annotation {key}: `{value}` {why}")]
pub struct Mistake {
    pub(super) key: String,
    pub(super) value: String,
    pub(super) why: String,
}

/// The settings of a pod's annotations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Incoming TCP ports that are not redirected.
    pub inbound_ports: Vec<u16>,
    /// Outgoing TCP ports that are not redirected.
    pub outbound_ports: Vec<u16>,
    /// Source networks that are not redirected.
    pub inbound_cidrs: Vec<IpNet>,
    /// Destination networks that are not redirected.
    pub outbound_cidrs: Vec<IpNet>,
    /// UDP ports that strict mode allows.
    pub udp_ports: Vec<u16>,
    /// Networks with which strict mode allows every protocol except TCP.
    pub other_cidrs: Vec<IpNet>,
    /// Modes of single ports.
    pub port_modes: BTreeMap<u16, Mode>,
    /// Log filter of the sidecar; `None` for the default.
    pub log_level: Option<String>,
    /// Requests and limits that replace the defaults.
    pub resources: Resources,
}

/// The known annotations. `mode` is used by the directory publisher and only validated here, like `inject` elsewhere.
const KEYS: [&str; 19] = [
    "mode",
    "port-modes",
    "inject",
    "injected",
    "ignore-inbound-ports",
    "ignore-outbound-ports",
    "ignore-inbound-cidrs",
    "ignore-outbound-cidrs",
    "allow-udp-ports",
    "allow-other-cidrs",
    "log-level",
    "cpu-request",
    "memory-request",
    "cpu-limit",
    "memory-limit",
    "redirect-cpu-request",
    "redirect-memory-request",
    "redirect-cpu-limit",
    "redirect-memory-limit",
];

/// Parses a comma-separated list. Spaces around items and empty items are ignored.
fn list<T: std::str::FromStr>(key: &str, text: &str, why: &str) -> Result<Vec<T>, Mistake> {
    let items = text.split(',').map(str::trim).filter(|i| !i.is_empty());
    let wrong = |item: &str, why: &str| Mistake { key: key.to_owned(), value: item.to_owned(), why: why.to_owned() };
    let all = items.map(|item| item.parse().map_err(|_| wrong(item, why))).collect::<Result<Vec<T>, _>>()?;
    if all.len() > MAX_LISTED {
        let count = all.len().to_string();
        return Err(wrong(&count, &format!("items are too many: list at most {MAX_LISTED}")));
    }
    Ok(all)
}

impl Settings {
    /// Parses a pod's annotations. Errors: an unknown annotation of ours, or an invalid value.
    pub fn read<'a>(annotations: impl Iterator<Item = (&'a str, &'a str)>) -> Result<Self, Mistake> {
        let mut settings = Self::default();
        for (full, value) in annotations {
            let Some(key) = full.strip_prefix(crate::store::OURS) else { continue };
            let wrong = |why: &str| Mistake { key: full.to_owned(), value: value.to_owned(), why: why.to_owned() };
            if let Some(amount) = settings.resources.amount(key) {
                *amount = Amount(Some(value.parse().map_err(|e: NoQuantity| wrong(&e.to_string()))?));
                continue;
            }
            match key {
                "mode" => {
                    mode(full, value)?;
                }
                "port-modes" => {
                    settings.port_modes = port_modes::parse(value).map_err(|wrong| Mistake {
                        key: full.to_owned(),
                        value: wrong.item,
                        why: wrong.why,
                    })?;
                }
                "allow-udp-ports" => settings.udp_ports = ports(full, value)?,
                "allow-other-cidrs" => settings.other_cidrs = list(full, value, "is no CIDR, such as 10.0.0.0/8")?,
                "ignore-inbound-ports" => settings.inbound_ports = ports(full, value)?,
                "ignore-outbound-ports" => settings.outbound_ports = ports(full, value)?,
                "ignore-inbound-cidrs" => settings.inbound_cidrs = list(full, value, "is no CIDR, such as 10.0.0.0/8")?,
                "ignore-outbound-cidrs" => {
                    settings.outbound_cidrs = list(full, value, "is no CIDR, such as 10.0.0.0/8")?;
                }
                "log-level" => {
                    if !["error", "warn", "info", "debug", "trace"].contains(&value) {
                        return Err(wrong("is no level: use error, warn, info, debug or trace"));
                    }
                    settings.log_level = Some(value.to_owned());
                }
                known if KEYS.contains(&known) => {}
                _ => {
                    return Err(wrong(&format!(
                        "is set on an annotation that does not exist; see docs/kubernetes.md for those that do{}",
                        did_you_mean(key, &KEYS)
                    )));
                }
            }
        }
        Ok(settings)
    }

    /// The settings that let traffic bypass the sidecar, as annotation and value.
    pub fn exceptions(&self) -> Vec<(&'static str, String)> {
        let all = [
            ("ignore-inbound-ports", joined(&self.inbound_ports)),
            ("ignore-outbound-ports", joined(&self.outbound_ports)),
            ("ignore-inbound-cidrs", joined(&self.inbound_cidrs)),
            ("ignore-outbound-cidrs", joined(&self.outbound_cidrs)),
            ("allow-udp-ports", joined(&self.udp_ports)),
            ("allow-other-cidrs", joined(&self.other_cidrs)),
            ("port-modes", port_modes::weakening(&self.port_modes)),
        ];
        all.into_iter().filter(|(_, value)| !value.is_empty()).collect()
    }

    /// A setting that takes the pod out of the mesh completely, whatever the mode: networks that cover all addresses.
    /// `None` if there is none.
    pub fn opens_everything(&self) -> Option<(&'static str, String)> {
        let everything = |nets: &Vec<IpNet>| IpNet::aggregate(nets).iter().any(|net| net.prefix_len() == 0);
        let lists = [("ignore-inbound-cidrs", &self.inbound_cidrs), ("ignore-outbound-cidrs", &self.outbound_cidrs)];
        lists.into_iter().find(|(_, nets)| everything(nets)).map(|(key, nets)| (key, joined(nets)))
    }
}

/// Parses the mode that a label or annotation `key` names.
pub(super) fn mode(key: &str, value: &str) -> Result<Mode, Mistake> {
    value.parse().map_err(|_| Mistake {
        key: key.to_owned(),
        value: value.to_owned(),
        why: format!("is no mode: use off, permissive or strict{}", did_you_mean(value, &MODES)),
    })
}

/// Joins items with commas, as a flag takes them.
pub(super) fn joined<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn ports(key: &str, value: &str) -> Result<Vec<u16>, Mistake> {
    let why = "is no port: use numbers from 1 to 65535, comma separated";
    let all: Vec<u16> = list(key, value, why)?;
    match all.iter().find(|p| **p == 0) {
        Some(_) => Err(Mistake { key: key.to_owned(), value: "0".to_owned(), why: why.to_owned() }),
        None => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(key: &str, value: &str) -> Result<Settings, String> {
        let full = format!("countersign.dev/{key}");
        Settings::read([(full.as_str(), value), ("other.io/x", "y")].into_iter()).map_err(|e| e.to_string())
    }

    #[test]
    fn lists_have_blanks_or_not() {
        for text in ["80,443", "80, 443", " 80 ,443, "] {
            assert_eq!(read("ignore-inbound-ports", text).unwrap().inbound_ports, [80, 443], "{text}");
        }
        let cidrs = read("ignore-outbound-cidrs", "10.0.0.0/8, fd00::/8").unwrap().outbound_cidrs;
        assert_eq!(cidrs.len(), 2);
        assert_eq!(read("ignore-outbound-ports", "").unwrap().outbound_ports, [0; 0]);
    }

    #[test]
    fn a_mistake_names_annotation_and_value() {
        for (key, value, said) in [
            ("ignore-inbound-ports", "80,http", "annotation countersign.dev/ignore-inbound-ports: `http` is no port"),
            ("ignore-outbound-ports", "0", "annotation countersign.dev/ignore-outbound-ports: `0` is no port"),
            (
                "ignore-inbound-cidrs",
                "10.0.0.0/40",
                "annotation countersign.dev/ignore-inbound-cidrs: `10.0.0.0/40` is no CIDR",
            ),
            ("mode", "loose", "annotation countersign.dev/mode: `loose` is no mode"),
            (
                "mode",
                "stict",
                "annotation countersign.dev/mode: `stict` is no mode: use off, permissive or strict; did you mean `strict`?",
            ),
            ("allow-udp-ports", "0", "annotation countersign.dev/allow-udp-ports: `0` is no port"),
            ("log-level", "loud", "annotation countersign.dev/log-level: `loud` is no level"),
            ("memory-limit", "much", "annotation countersign.dev/memory-limit: `much` is no quantity"),
            (
                "cpu-request",
                "-1",
                "annotation countersign.dev/cpu-request: `-1` is no quantity of a resource: it is negative",
            ),
            ("redirect-memory-limit", "", "annotation countersign.dev/redirect-memory-limit: `` is no quantity"),
            (
                "redirect-cpu-limits",
                "1",
                "annotation countersign.dev/redirect-cpu-limits: `1` is set on an annotation that does not exist",
            ),
            ("mod", "strict", "annotation countersign.dev/mod: `strict` is set on an annotation that does not exist"),
        ] {
            let why = read(key, value).unwrap_err();
            assert!(why.starts_with(said), "{why}");
        }
    }

    #[test]
    fn resources_and_level_are_taken() {
        let settings = read("memory-limit", "64Mi").unwrap();
        assert_eq!(settings.resources.sidecar.memory.limit, "64Mi".parse().unwrap());
        let settings = read("redirect-cpu-request", "1e-1").unwrap();
        assert_eq!(settings.resources.redirect.cpu.request, "100m".parse().unwrap());
        for key in KEYS.iter().filter(|k| k.ends_with("-request") || k.ends_with("-limit")) {
            assert!(Resources::default().amount(key).is_some(), "{key}");
        }
        assert_eq!(read("log-level", "debug").unwrap().log_level.as_deref(), Some("debug"));
        assert!(read("mode", "strict").is_ok());
    }

    #[test]
    fn a_list_is_bounded_and_a_key_with_a_mistake_is_guessed() {
        let many: Vec<String> = (1..=65).map(|p: u16| p.to_string()).collect();
        let why = read("ignore-inbound-ports", &many.join(",")).unwrap_err();
        assert!(why.contains("`65` items are too many"), "{why}");
        assert_eq!(read("ignore-inbound-ports", &many[..64].join(",")).unwrap().inbound_ports.len(), 64);
        let why = read("ignore-inbound-port", "80").unwrap_err();
        assert!(why.ends_with("did you mean `ignore-inbound-ports`?"), "{why}");
    }

    #[test]
    fn networks_that_together_are_everything_are_known() {
        for (list, opens) in [
            ("0.0.0.0/0", true),
            ("::/0", true),
            ("0.0.0.0/1, 128.0.0.0/1", true),
            ("0.0.0.0/1,128.0.0.0/2,192.0.0.0/2", true),
            ("10.0.0.0/8, fd00::/8", false),
            ("", false),
        ] {
            assert_eq!(read("ignore-inbound-cidrs", list).unwrap().opens_everything().is_some(), opens, "{list}");
            assert_eq!(read("ignore-outbound-cidrs", list).unwrap().opens_everything().is_some(), opens, "{list}");
        }
    }

    #[test]
    fn each_way_past_the_sidecar_is_an_exception() {
        for key in [
            "ignore-inbound-ports",
            "ignore-outbound-ports",
            "allow-udp-ports",
            "ignore-inbound-cidrs",
            "ignore-outbound-cidrs",
            "allow-other-cidrs",
        ] {
            let value = if key.ends_with("ports") { "80" } else { "10.0.0.0/8" };
            assert_eq!(read(key, value).unwrap().exceptions(), [(key, value.to_owned())]);
        }
        assert!(read("memory-limit", "64Mi").unwrap().exceptions().is_empty());
        let modes = read("port-modes", "80=strict, 9443=permissive").unwrap();
        assert_eq!(modes.exceptions(), [("port-modes", "9443=permissive".to_owned())]);
        let why = read("port-modes", "80=open").unwrap_err();
        assert!(why.starts_with("annotation countersign.dev/port-modes: `80=open` names no mode"), "{why}");
    }
}
