//! Requests and limits of the containers that the injection adds: defaults, narrowed by a pod's annotations.

use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::settings::Mistake;
use crate::quantity::{NoQuantity, Quantity};
use crate::store::OURS;

/// Requests and limits of both containers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resources {
    /// Of the sidecar.
    pub sidecar: ContainerResources,
    /// Of the redirect.
    pub redirect: ContainerResources,
}

/// Requests and limits of one container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerResources {
    /// Processor time, counted in cores.
    pub cpu: Amounts,
    /// Memory, counted in bytes.
    pub memory: Amounts,
}

/// Request and limit of one resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Amounts {
    /// What is set aside; `None` for nothing.
    pub request: Amount,
    /// What is never exceeded; `None` for no limit.
    pub limit: Amount,
}

/// A quantity, or none. As text, none is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Amount(pub Option<Quantity>);

impl FromStr for Amount {
    type Err = NoQuantity;

    fn from_str(text: &str) -> Result<Self, NoQuantity> {
        if text.is_empty() { Ok(Self(None)) } else { text.parse().map(|quantity| Self(Some(quantity))) }
    }
}

impl Resources {
    /// The amount of a setting, such as `cpu-limit` (the sidecar's) or `redirect-memory-request`; `None` if there is no
    /// setting of this name.
    pub fn amount(&mut self, key: &str) -> Option<&mut Amount> {
        let (container, key) = match key.strip_prefix("redirect-") {
            Some(rest) => (&mut self.redirect, rest),
            None => (&mut self.sidecar, key),
        };
        let (resource, kind) = key.split_once('-')?;
        let amounts = match resource {
            "cpu" => &mut container.cpu,
            "memory" => &mut container.memory,
            _ => return None,
        };
        match kind {
            "request" => Some(&mut amounts.request),
            "limit" => Some(&mut amounts.limit),
            _ => None,
        }
    }

    /// These defaults, with what a pod's annotations set in their place. Errors: an annotation sets a limit below the
    /// request.
    pub fn narrowed_by(&self, own: &Self) -> Result<Self, Mistake> {
        Ok(Self {
            sidecar: self.sidecar.narrowed_by(&own.sidecar, "")?,
            redirect: self.redirect.narrowed_by(&own.redirect, "redirect-")?,
        })
    }
}

impl ContainerResources {
    fn narrowed_by(&self, own: &Self, prefix: &str) -> Result<Self, Mistake> {
        Ok(Self {
            cpu: self.cpu.narrowed_by(&own.cpu, &format!("{prefix}cpu"))?,
            memory: self.memory.narrowed_by(&own.memory, &format!("{prefix}memory"))?,
        })
    }

    /// As a container's `resources` in a manifest. `found` is what the container has after an earlier injection: the API
    /// server adds a LimitRange's defaults before it asks again, and they are kept where we have nothing of our own.
    pub fn manifest(&self, found: Option<&Value>) -> Value {
        let kinds = [
            ("requests", [("cpu", &self.cpu.request), ("memory", &self.memory.request)]),
            ("limits", [("cpu", &self.cpu.limit), ("memory", &self.memory.limit)]),
        ];
        let mut all = json!({});
        for (kind, amounts) in kinds {
            let mut of_kind: Map<String, Value> = found.and_then(|f| f[kind].as_object()).cloned().unwrap_or_default();
            let ours = amounts.into_iter().filter_map(|(name, amount)| Some((name, amount.0.as_ref()?)));
            of_kind.extend(ours.map(|(name, quantity)| (name.to_owned(), quantity.as_str().into())));
            if !of_kind.is_empty() {
                all[kind] = of_kind.into();
            }
        }
        all
    }
}

impl Amounts {
    /// A default limit follows the request upwards; one that the pod sets itself has to be right.
    fn narrowed_by(&self, own: &Self, key: &str) -> Result<Self, Mistake> {
        let request = own.request.0.clone().or_else(|| self.request.0.clone());
        let limit = match (&own.limit.0, &request) {
            (Some(limit), Some(request)) if limit < request => {
                return Err(Mistake {
                    key: format!("{OURS}{key}-limit"),
                    value: limit.to_string(),
                    why: format!("is below the request of {request}: raise it, or lower {OURS}{key}-request"),
                });
            }
            (Some(limit), _) => Some(limit.clone()),
            (None, Some(request)) => self.limit.0.clone().map(|default| default.max(request.clone())),
            (None, None) => self.limit.0.clone(),
        };
        Ok(Self { request: Amount(request), limit: Amount(limit) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(settings: &[(&str, &str)]) -> Resources {
        let mut all = Resources::default();
        for (key, text) in settings {
            *all.amount(key).unwrap() = text.parse().unwrap();
        }
        all
    }

    fn defaults() -> Resources {
        set(&[
            ("cpu-request", "10m"),
            ("memory-request", "16Mi"),
            ("memory-limit", "256Mi"),
            ("redirect-cpu-limit", "1"),
        ])
    }

    #[test]
    fn each_amount_has_a_name_and_other_names_are_none() {
        let mut all = defaults();
        assert_eq!(all.redirect.cpu.limit, "1000m".parse().unwrap());
        for other in ["cpu", "cpu-", "-limit", "disk-limit", "cpu-limits", "redirect-cpu", "sidecar-cpu-limit", ""] {
            assert!(all.amount(other).is_none(), "{other}");
        }
    }

    #[test]
    fn a_default_limit_follows_the_request_upwards_and_nothing_else_moves() {
        let limit = |request: &str| {
            let own = set(&[("memory-request", request), ("redirect-cpu-request", "1500m")]);
            let all = defaults().narrowed_by(&own).unwrap();
            assert_eq!(all.redirect.cpu.limit, "1500m".parse().unwrap());
            assert_eq!(all.sidecar.cpu, defaults().sidecar.cpu, "no limit stays none");
            all.sidecar.memory.limit.0.unwrap().to_string()
        };
        assert_eq!(limit("1Gi"), "1Gi");
        assert_eq!(limit("256Mi"), "256Mi");
        assert_eq!(limit("64Mi"), "256Mi");
    }

    #[test]
    fn a_limit_of_its_own_below_the_request_is_refused() {
        for (own, said) in [
            (
                &[("memory-limit", "8Mi")][..],
                "annotation countersign.dev/memory-limit: `8Mi` is below the request of 16Mi: raise it, or lower \
                 countersign.dev/memory-request",
            ),
            (
                &[("redirect-cpu-limit", "999m"), ("redirect-cpu-request", "1")],
                "annotation countersign.dev/redirect-cpu-limit: `999m` is below the request of 1: raise it, or lower \
                 countersign.dev/redirect-cpu-request",
            ),
        ] {
            assert_eq!(defaults().narrowed_by(&set(own)).unwrap_err().to_string(), said);
        }
        let own = set(&[("memory-limit", "8Mi"), ("memory-request", "8Mi"), ("cpu-limit", "10m")]);
        let all = defaults().narrowed_by(&own).unwrap().sidecar;
        assert_eq!((all.memory, all.cpu.limit), (own.sidecar.memory, own.sidecar.cpu.limit));
    }

    #[test]
    fn what_the_api_server_added_is_kept_where_we_have_nothing_of_our_own() {
        let ours = defaults().sidecar;
        let bare = json!({ "requests": { "cpu": "10m", "memory": "16Mi" }, "limits": { "memory": "256Mi" } });
        assert_eq!(ours.manifest(None), bare);
        let found = json!({
            "requests": { "cpu": "1", "memory": "1Mi", "ephemeral-storage": "1Gi" }, "limits": { "cpu": "500m" },
        });
        let kept = json!({
            "requests": { "cpu": "10m", "memory": "16Mi", "ephemeral-storage": "1Gi" },
            "limits": { "cpu": "500m", "memory": "256Mi" },
        });
        assert_eq!(ours.manifest(Some(&found)), kept);
        assert_eq!(ContainerResources::default().manifest(None), json!({}));
    }
}
