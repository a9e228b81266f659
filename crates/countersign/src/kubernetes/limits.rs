//! What the LimitRanges and ResourceQuotas of a namespace object to in the containers that the injection adds. The API
//! server judges a pod after the webhook, which may not read these objects, so `check` foretells the judgement here.

use std::collections::BTreeMap;

use countersign_controller::injector::{Amount, Amounts, Resources, SIDECAR};
use countersign_controller::quantity::Quantity;
use k8s_openapi::api::core::v1::{LimitRange, LimitRangeItem, ResourceQuota};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Written;
use kube::ResourceExt;

/// Why the API server will refuse meshed pods, and how to fix it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objection {
    /// The object, the container, and what is wrong.
    pub why: String,
    /// The annotation and the value of the chart that change it.
    pub mend: &'static str,
}

/// A request or a limit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Limit,
}

impl Kind {
    fn name(self) -> &'static str {
        if self == Self::Request { "request" } else { "limit" }
    }
}

/// How to change an amount.
macro_rules! mend {
    ($annotation:literal, $value:literal) => {
        concat!("annotate the pods with countersign.dev/", $annotation, ", or set the chart's value ", $value)
    };
}

/// One resource of one container, as it is after the LimitRanges' defaults.
struct Judged {
    container: &'static str,
    resource: &'static str,
    request: Option<Quantity>,
    limit: Option<Quantity>,
}

/// Judges the containers that are added to a pod, by their names, with these resources. Only what no app in the same pod could make
/// right is an objection.
pub fn objections(
    added: &[&'static str],
    resources: &Resources,
    ranges: &[LimitRange],
    quotas: &[ResourceQuota],
) -> Vec<Objection> {
    let items = || ranges.iter().flat_map(|range| range.spec.iter().flat_map(|s| &s.limits).map(move |i| (range, i)));
    let mut all = vec![];
    for container in added {
        let of = if *container == SIDECAR { &resources.sidecar } else { &resources.redirect };
        for (resource, amounts) in [("cpu", &of.cpu), ("memory", &of.memory)] {
            let judged = Judged::new(container, resource, amounts, items().map(|(_, item)| item));
            for (range, item) in items() {
                let called = format!("LimitRange {}", range.name_any());
                let found = judged.by_range(item).into_iter();
                all.extend(found.map(|(kind, why)| judged.objection(&called, kind, &why)));
            }
            if let (Some(request), Some(limit)) = (&judged.request, &judged.limit)
                && limit < request
            {
                let why = format!("its {resource} request {request} is above the default limit {limit}");
                all.push(judged.objection("LimitRange", Kind::Limit, &why));
            }
            for quota in quotas.iter().filter(|q| counts_meshed(q)) {
                let called = format!("ResourceQuota {}", quota.name_any());
                let found = judged.by_quota(quota).into_iter();
                all.extend(found.map(|(kind, why)| judged.objection(&called, kind, &why)));
            }
        }
    }
    all
}

/// Whether a quota counts meshed pods, which request something and run on. Pods of the other scopes are some of them at
/// most.
fn counts_meshed(quota: &ResourceQuota) -> bool {
    let Some(spec) = &quota.spec else { return false };
    let scopes = spec.scopes.iter().flatten();
    spec.scope_selector.is_none() && scopes.into_iter().all(|s| s == "NotTerminating" || s == "NotBestEffort")
}

fn amount(amounts: Option<&BTreeMap<String, Written>>, resource: &str) -> Option<Quantity> {
    amounts?.get(resource)?.0.parse().ok()
}

impl Judged {
    /// Fills in the API server's defaults: a request is a limit's that is given, else the LimitRanges' ones.
    fn new<'a>(
        container: &'static str,
        resource: &'static str,
        amounts: &Amounts,
        items: impl Iterator<Item = &'a LimitRangeItem> + Clone,
    ) -> Self {
        let mut items = items.filter(|i| i.type_ == "Container");
        let Amounts { request: Amount(request), limit: Amount(limit) } = amounts.clone();
        let request = request.or_else(|| limit.clone());
        let request = request.or_else(|| items.clone().find_map(|i| amount(i.default_request.as_ref(), resource)));
        let limit = limit.or_else(|| items.find_map(|i| amount(i.default.as_ref(), resource)));
        Self { container, resource, request, limit }
    }

    fn objection(&self, object: &str, kind: Kind, why: &str) -> Objection {
        let mend = match (self.container == SIDECAR, self.resource, kind) {
            (true, "cpu", Kind::Request) => mend!("cpu-request", "sidecar.resources.requests.cpu"),
            (true, "cpu", Kind::Limit) => mend!("cpu-limit", "sidecar.resources.limits.cpu"),
            (true, _, Kind::Request) => mend!("memory-request", "sidecar.resources.requests.memory"),
            (true, _, Kind::Limit) => mend!("memory-limit", "sidecar.resources.limits.memory"),
            (false, "cpu", Kind::Request) => mend!("redirect-cpu-request", "redirect.resources.requests.cpu"),
            (false, "cpu", Kind::Limit) => mend!("redirect-cpu-limit", "redirect.resources.limits.cpu"),
            (false, _, Kind::Request) => mend!("redirect-memory-request", "redirect.resources.requests.memory"),
            (false, _, Kind::Limit) => mend!("redirect-memory-limit", "redirect.resources.limits.memory"),
        };
        Objection { why: format!("{object} refuses {}: {why}", self.container), mend }
    }

    fn amounts(&self) -> [(Kind, Option<&Quantity>); 2] {
        [(Kind::Request, self.request.as_ref()), (Kind::Limit, self.limit.as_ref())]
    }

    /// By the rules of the API server's plugin `LimitRanger`.
    fn by_range(&self, item: &LimitRangeItem) -> Vec<(Kind, String)> {
        let mut all = vec![];
        let of_container = item.type_ == "Container";
        if !of_container && item.type_ != "Pod" {
            return all;
        }
        let resource = self.resource;
        if let Some(min) = amount(item.min.as_ref(), resource).filter(|_| of_container) {
            for (kind, amount) in self.amounts() {
                match amount {
                    Some(amount) if *amount < min => {
                        all.push((kind, format!("its {resource} {} {amount} is below the minimum {min}", kind.name())));
                    }
                    None if kind == Kind::Request => {
                        all.push((kind, format!("it has no {resource} request, and the minimum is {min}")));
                    }
                    _ => {}
                }
            }
        }
        if let Some(max) = amount(item.max.as_ref(), resource) {
            for (kind, amount) in self.amounts() {
                match amount {
                    Some(amount) if *amount > max => {
                        all.push((kind, format!("its {resource} {} {amount} is above the maximum {max}", kind.name())));
                    }
                    None if kind == Kind::Limit && of_container => {
                        all.push((kind, format!("it has no {resource} limit, and the maximum is {max}")));
                    }
                    _ => {}
                }
            }
        }
        if let Some(ratio) = amount(item.max_limit_request_ratio.as_ref(), resource).filter(|_| of_container) {
            match (&self.request, &self.limit) {
                (Some(request), Some(limit)) if !request.is_zero() => {
                    if limit.is_more_than(&ratio, request) {
                        let why =
                            format!("its {resource} limit {limit} is more than {ratio} times the request {request}");
                        all.push((Kind::Limit, why));
                    }
                }
                (Some(_), None) => all.push((
                    Kind::Limit,
                    format!("it has no {resource} limit, and {ratio} times the request is the most"),
                )),
                _ => all.push((
                    Kind::Request,
                    format!("it has no {resource} request, and the limit may be {ratio} times of it"),
                )),
            }
        }
        all
    }

    /// A quota of a resource requires each container to name it, and admits no pod with more than all of it.
    fn by_quota(&self, quota: &ResourceQuota) -> Vec<(Kind, String)> {
        let resource = self.resource;
        let hard = quota.spec.as_ref().and_then(|s| s.hard.as_ref());
        let of = |name: &str| amount(hard, name);
        let requests = of(&format!("requests.{resource}")).or_else(|| of(resource));
        let hards = [requests, of(&format!("limits.{resource}"))];
        let mut all = vec![];
        for ((kind, amount), hard) in self.amounts().into_iter().zip(hards) {
            let name = kind.name();
            match (amount, hard) {
                (None, Some(_)) => all.push((kind, format!("it has no {resource} {name}, which the quota requires"))),
                (Some(amount), Some(hard)) if *amount > hard => {
                    all.push((kind, format!("its {resource} {name} {amount} is more than the whole quota of {hard}")));
                }
                _ => {}
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_controller::injector::REDIRECT;
    use serde_json::{Value, json};

    fn resources(settings: &[(&str, &str)]) -> Resources {
        let mut all = Resources::default();
        let defaults = [
            ("cpu-request", "10m"),
            ("memory-request", "16Mi"),
            ("memory-limit", "256Mi"),
            ("redirect-cpu-request", "10m"),
            ("redirect-memory-request", "16Mi"),
            ("redirect-memory-limit", "64Mi"),
        ];
        for (key, text) in defaults.iter().chain(settings) {
            *all.amount(key).unwrap() = text.parse().unwrap();
        }
        all
    }

    fn range(item: Value) -> Vec<LimitRange> {
        vec![serde_json::from_value(json!({ "metadata": { "name": "bounds" }, "spec": { "limits": [item] } })).unwrap()]
    }

    fn quota(spec: Value) -> Vec<ResourceQuota> {
        vec![serde_json::from_value(json!({ "metadata": { "name": "team" }, "spec": spec })).unwrap()]
    }

    fn said(all: &[Objection]) -> Vec<&str> {
        all.iter().map(|o| o.why.as_str()).collect()
    }

    #[test]
    fn a_limit_ranges_bounds_are_judged_by_value_after_its_defaults() {
        let by = |settings: &[(&str, &str)], item: Value| {
            objections(&[SIDECAR, REDIRECT], &resources(settings), &range(item), &[])
        };
        // As the API server stores `max: {cpu: 1}, min: {cpu: 50m}`.
        let bounds = json!({
            "type": "Container", "max": { "cpu": "1" }, "min": { "cpu": "50m" },
            "default": { "cpu": "1" }, "defaultRequest": { "cpu": "1" },
        });
        let found = by(&[], bounds.clone());
        assert_eq!(
            said(&found),
            [
                "LimitRange bounds refuses countersign-proxy: its cpu request 10m is below the minimum 50m",
                "LimitRange bounds refuses countersign-redirect: its cpu request 10m is below the minimum 50m",
            ]
        );
        assert_eq!(
            found[1].mend,
            "annotate the pods with countersign.dev/redirect-cpu-request, or set the chart's value \
             redirect.resources.requests.cpu"
        );
        let enough = [("cpu-request", "0.05"), ("redirect-cpu-request", "50m")];
        assert_eq!(by(&enough, bounds.clone()), [], "and the limit is the default one");
        let above = by(&[enough[0], enough[1], ("cpu-limit", "1001m")], bounds);
        assert_eq!(
            said(&above),
            ["LimitRange bounds refuses countersign-proxy: its cpu limit 1001m is above the maximum 1"]
        );
        let ratio = json!({ "type": "Container", "maxLimitRequestRatio": { "memory": "4" } });
        let found = by(&[("redirect-memory-limit", "64Mi")], ratio);
        assert_eq!(
            said(&found),
            [
                "LimitRange bounds refuses countersign-proxy: its memory limit 256Mi is more than 4 times the request 16Mi"
            ]
        );
        let ratio = json!({ "type": "Container", "maxLimitRequestRatio": { "cpu": "4" } });
        assert_eq!(by(&[], ratio.clone()).len(), 2, "no cpu limit at all");
        assert!(by(&[], ratio)[0].mend.contains("cpu-limit"));
        let default = json!({ "type": "Container", "default": { "cpu": "5m" } });
        let found = by(&[("redirect-cpu-limit", "10m")], default);
        assert_eq!(
            said(&found),
            ["LimitRange refuses countersign-proxy: its cpu request 10m is above the default limit 5m"]
        );
    }

    #[test]
    fn a_pods_bounds_count_where_one_container_is_beyond_them() {
        let by = |item: Value| objections(&[SIDECAR, REDIRECT], &resources(&[]), &range(item), &[]);
        let found = by(json!({ "type": "Pod", "max": { "cpu": "1", "memory": "128Mi" }, "min": { "cpu": "1" } }));
        assert_eq!(
            said(&found),
            ["LimitRange bounds refuses countersign-proxy: its memory limit 256Mi is above the maximum 128Mi"]
        );
        assert_eq!(by(json!({ "type": "PersistentVolumeClaim", "max": { "storage": "1", "cpu": "1m" } })), []);
    }

    #[test]
    fn a_quota_requires_what_it_counts_and_admits_no_more_than_all_of_it() {
        let by = |settings: &[(&str, &str)], spec: Value| {
            objections(&[SIDECAR, REDIRECT], &resources(settings), &[], &quota(spec))
        };
        let hard = json!({ "hard": {
            "limits.cpu": "2", "limits.memory": "2Gi", "requests.cpu": "1", "memory": "1Gi", "pods": "10",
        } });
        let found = by(&[], hard.clone());
        assert_eq!(
            said(&found),
            [
                "ResourceQuota team refuses countersign-proxy: it has no cpu limit, which the quota requires",
                "ResourceQuota team refuses countersign-redirect: it has no cpu limit, which the quota requires",
            ]
        );
        assert_eq!(by(&[("cpu-limit", "100m"), ("redirect-cpu-limit", "100m")], hard.clone()), []);
        let defaults = range(json!({ "type": "Container", "default": { "cpu": "100m" } }));
        assert_eq!(
            objections(&[SIDECAR, REDIRECT], &resources(&[]), &defaults, &quota(hard)),
            [],
            "a LimitRange's default is one"
        );
        let found = by(&[("redirect-memory-limit", "")], json!({ "hard": { "limits.memory": "128Mi" } }));
        assert_eq!(
            said(&found),
            [
                "ResourceQuota team refuses countersign-proxy: its memory limit 256Mi is more than the whole quota of 128Mi",
                "ResourceQuota team refuses countersign-redirect: it has no memory limit, which the quota requires",
            ]
        );
        for (scopes, counts) in [
            (json!({ "scopes": ["NotTerminating", "NotBestEffort"] }), true),
            (json!({ "scopes": ["BestEffort"] }), false),
            (json!({ "scopes": ["Terminating"] }), false),
            (json!({ "scopeSelector": {} }), false),
        ] {
            let mut spec = json!({ "hard": { "limits.cpu": "1" } });
            spec.as_object_mut().unwrap().extend(scopes.as_object().unwrap().clone());
            assert_eq!(!by(&[], spec).is_empty(), counts, "{scopes}");
        }
    }
}
