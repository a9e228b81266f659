//! Whether authorities and roots last, and whether what is published of them is what the server has.

use std::collections::BTreeSet;

use countersign_identity::X509Authority;
use countersign_identity::bundle::certificates_from_pem;
use countersign_watch::in_words;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::Api;
use time::OffsetDateTime;

use super::finding::{Fault, Outcome};
use crate::kubernetes::cluster::{is_ready, page, pods};
use crate::metrics_page::{label, metric};

/// How long before its expiry a warning about an upstream root appears, in seconds: people have to renew it.
const UPSTREAM_WARNING: i64 = 30 * 86_400;
/// TCP port of the server's metrics page.
const SERVER_PAGES: u16 = 9464;

/// Metric with the end of each root of the server's trust bundle.
const ROOTS: &str = "countersign_server_bundle_authority_expiry_timestamp_seconds";

/// Facts from a server's metrics page.
pub(super) struct Server {
    /// The text of the metrics page.
    metrics: String,
    /// Whether its authorities are below an upstream root.
    has_upstream: bool,
}

pub(super) async fn server(client: &Client, namespace: &str) -> Result<Server, String> {
    let found = pods(client, namespace, "app.kubernetes.io/component=server").await?;
    let ready = found.iter().find(|p| is_ready(p)).ok_or("no server is ready")?;
    let args = ready.spec.iter().flat_map(|s| &s.containers).flat_map(|c| c.args.iter().flatten());
    let has_upstream = args.into_iter().any(|a| a.starts_with("--upstream-cert"));
    let metrics = page(client, ready, SERVER_PAGES, "/metrics").await?;
    Ok(Server { metrics, has_upstream })
}

pub(super) async fn configmap(client: &Client, namespace: &str) -> Result<String, String> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let map = api.get_opt("countersign-bundle").await.map_err(|e| in_words(&e))?;
    let map = map.ok_or("it does not exist, so no agent can start")?;
    map.data
        .unwrap_or_default()
        .remove("bundle.crt")
        .ok_or_else(|| "it has no bundle.crt, so no agent can start".to_owned())
}

/// Checks when the server's authorities expire, by its metrics.
pub(super) fn authorities(server: Result<&Server, &String>) -> Outcome {
    let page = &server.map_err(|e| Fault::new(e.clone(), "see the server's log"))?.metrics;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let ends = metric(page, "countersign_server_authority_expiry_timestamp_seconds");
    #[allow(clippy::cast_possible_truncation)] // seconds since 1970
    let active = ends.filter(|(l, _)| label(l, "status") == Some("active")).map(|(_, end)| end as i64 - now).max();
    match active {
        None => Err(Fault::new(
            "no authority is active",
            "see the server's log; `countersign authority prepare`, then `activate`",
        )),
        Some(left) if left <= 0 => Err(Fault::new(
            format!("the active authority ended {} s ago", -left),
            "see the server's log: it should have rotated",
        )),
        Some(left) => Ok(format!("the active one has {left} s left")),
    }
}

/// Checks whether a root outlasts the next weeks: its own authorities are replaced automatically, an upstream's are
/// not.
pub(super) fn roots(server: Result<&Server, &String>) -> Outcome {
    let server = server.map_err(|e| Fault::new(e.clone(), "see the server's log"))?;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let ends = metric(&server.metrics, ROOTS);
    #[allow(clippy::cast_possible_truncation)] // seconds since 1970
    let left = ends.map(|(_, end)| end as i64 - now).max();
    let warn = if server.has_upstream { UPSTREAM_WARNING } else { 0 };
    match left {
        None => Err(Fault::new("the trust bundle is empty", "see the server's log")),
        Some(left) if left <= warn => Err(Fault::new(
            format!("the last root of trust ends in {left} s"),
            if server.has_upstream {
                "bring a new upstream CA, then start the server and every agent anew with it"
            } else {
                "see the server's log: it should have rotated"
            },
        )),
        Some(left) => Ok(format!("the last one has {left} s left")),
    }
}

/// What to do where the bundle's ConfigMap is not as it should be.
const BUNDLE_MEND: &str = "the server makes and mends it within seconds; if it does not, see its log, and apply the manifests \
                           of `countersign install`, which have the permission";

/// Checks whether the bundle that agents start with is the server's.
pub(super) fn bundle(server: Result<&Server, &String>, map: Result<&str, &String>) -> Outcome {
    let wrong = |why: &str| Fault::new(format!("ConfigMap countersign-bundle: {why}"), BUNDLE_MEND);
    let map = map.map_err(|e| wrong(e))?;
    if map.trim().is_empty() {
        return Err(wrong("its bundle.crt is empty, so no agent can start"));
    }
    let server = server.map_err(|e| Fault::new(e.clone(), "see the server's log"))?;
    let published = certificates_from_pem(map.as_bytes()).map_err(|e| wrong(&e.to_string()))?;
    let published = published.into_iter().map(|c| X509Authority::from_der(c.to_vec()));
    let published = published.collect::<Result<Vec<_>, _>>().map_err(|e| wrong(&e.to_string()))?;
    let ids: BTreeSet<&str> = published.iter().map(X509Authority::id).collect();
    // Not with its authorities: below an upstream root none of them is in the bundle, and those that were made below one or
    // without one last for a while after that has changed.
    let roots = metric(&server.metrics, ROOTS).filter_map(|(l, _)| label(l, "authority"));
    let roots: BTreeSet<&str> = roots.collect();
    match roots.iter().filter(|id| ids.contains(*id)).count() {
        _ if roots.is_empty() => {
            Err(Fault::new("the server has no root to compare it with: see `roots`", "see the server's log"))
        }
        n if n == roots.len() => Ok(format!("all {n} roots of the server's trust bundle are published")),
        n => Err(Fault::new(
            format!("{n} of {} roots of the server's trust bundle are published", roots.len()),
            BUNDLE_MEND,
        )),
    }
}

/// Checks whether the API server verifies the webhook by the bundle that is published.
pub(super) async fn webhook_bundle(client: &Client, map: Result<&str, &String>) -> Outcome {
    let api: Api<MutatingWebhookConfiguration> = Api::all(client.clone());
    let found = match api.get("countersign-injector").await {
        Ok(found) => found,
        Err(kube::Error::Api(e)) if e.code == 404 => {
            return Err(Fault::new(
                "there is no webhook configuration countersign-injector, so new pods get no sidecar",
                "apply the manifests of `countersign install`, then restart the pods that began meanwhile",
            ));
        }
        Err(error) => return Err(Fault::absent(error)),
    };
    let hooks = found.webhooks.unwrap_or_default();
    let bundles = hooks.iter().map(|h| h.client_config.ca_bundle.as_ref().map_or(&[][..], |b| b.0.as_slice()));
    ca_bundles(&bundles.collect::<Vec<_>>(), map)
}

/// Compares the caBundle of each webhook with the ConfigMap. That both are empty is no agreement.
fn ca_bundles(hooks: &[&[u8]], map: Result<&str, &String>) -> Outcome {
    if hooks.is_empty() {
        let mend = "apply the manifests of `countersign install`";
        return Err(Fault::new("the webhook configuration names no webhook, so new pods get no sidecar", mend));
    }
    let empty = hooks.iter().filter(|h| h.trim_ascii().is_empty()).count();
    if empty > 0 {
        return Err(Fault::new(
            format!("{empty} of {} webhooks have no caBundle, so the API server cannot ask them", hooks.len()),
            "see the server's log: it writes the trust bundle there within seconds",
        ));
    }
    let published = map.ok().map(str::as_bytes).filter(|map| !map.trim_ascii().is_empty());
    let Some(published) = published else {
        return Err(Fault::new("nothing is published to compare it with: see `bundle`", BUNDLE_MEND));
    };
    match hooks.iter().filter(|h| **h == published).count() {
        n if n == hooks.len() => Ok("the same as the ConfigMap's".into()),
        n => Err(Fault::new(
            format!("{n} of {} webhooks have the bundle of the ConfigMap", hooks.len()),
            "see the server's log: it may not change the webhook configuration",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use countersign_identity::profile::issue_root;

    #[test]
    fn an_authority_without_time_is_found() {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        assert!(authorities(Ok(&server(&[("a", now + 60)], false))).is_ok());
        assert!(authorities(Ok(&server(&[("a", now - 60)], false))).unwrap_err().found.contains("ended"));
        assert!(authorities(Ok(&server(&[], false))).unwrap_err().found.contains("no authority"));
    }

    fn server(authorities: &[(&str, i64)], has_upstream: bool) -> Server {
        let line = |(id, end): &(&str, i64)| {
            format!(
                "countersign_server_authority_expiry_timestamp_seconds{{authority=\"{id}\",status=\"active\"}} {end}\n"
            )
        };
        Server { metrics: authorities.iter().map(line).collect(), has_upstream }
    }

    #[test]
    fn an_upstream_root_that_ends_soon_is_told_of_in_time() {
        let in_days = |days: i64, has_upstream| {
            let end = OffsetDateTime::now_utc().unix_timestamp() + days * 86_400;
            let name = "countersign_server_bundle_authority_expiry_timestamp_seconds";
            roots(Ok(&Server { metrics: format!("{name}{{authority=\"a\"}} {end}\n"), has_upstream }))
        };
        assert!(in_days(31, true).is_ok());
        assert!(in_days(29, true).unwrap_err().mend.contains("new upstream CA"));
        assert!(in_days(1, false).is_ok(), "our own follow each other");
        assert!(in_days(-1, false).is_err());
        assert!(roots(Ok(&server(&[], false))).unwrap_err().found.contains("empty"));
    }

    #[test]
    fn a_bundle_that_lacks_a_root_is_found() {
        let key = countersign_identity::PrivateKey::generate(countersign_identity::KeyType::EcP256).unwrap();
        let td = countersign_identity::TrustDomain::new("td").unwrap();
        let made = issue_root(&td, &key, std::time::Duration::from_secs(60), OffsetDateTime::now_utc()).unwrap();
        let made = X509Authority::from_der(made.to_vec()).unwrap();
        let pem = countersign_identity::bundle::certificates_to_pem([made.der().as_ref()]);
        let with = |roots: &[&str]| {
            let metrics = roots.iter().map(|id| format!("{ROOTS}{{authority=\"{id}\"}} 1\n")).collect();
            Server { metrics, has_upstream: false }
        };
        let judged = |roots: &[&str], pem: &str| bundle(Ok(&with(roots)), Ok(pem));
        assert!(judged(&[made.id()], &pem).unwrap().contains("all 1 roots"));
        assert!(judged(&[made.id(), "other"], &pem).unwrap_err().found.contains("1 of 2"));
        assert!(judged(&["other"], &pem).unwrap_err().found.contains("0 of 1"), "somebody else's certificate");
        assert!(judged(&[made.id()], "garbage").is_err());
        assert!(judged(&[made.id()], "\n").unwrap_err().found.contains("is empty"));
        assert!(judged(&[], &pem).is_err(), "none of none is no agreement");
        let gone = "it does not exist".to_owned();
        let Fault { found, mend, .. } = bundle(Ok(&with(&[made.id()])), Err(&gone)).unwrap_err();
        assert!(found.contains("does not exist") && mend.contains("countersign install"), "{found}; {mend}");
    }

    #[test]
    fn a_webhook_without_a_bundle_is_found_whatever_the_configmap_holds() {
        let none = "it has no bundle.crt".to_owned();
        for map in [Err(&none), Ok(""), Ok("\n"), Ok("roots")] {
            assert!(ca_bundles(&[b"", b""], map).unwrap_err().found.contains("2 of 2 webhooks have no caBundle"));
            assert!(ca_bundles(&[], map).unwrap_err().found.contains("no webhook"));
        }
        assert!(
            ca_bundles(&[b"roots", b""], Ok("roots")).unwrap_err().found.contains("1 of 2 webhooks have no caBundle")
        );
        assert!(ca_bundles(&[b"roots"], Ok("")).unwrap_err().found.contains("nothing is published"));
        assert!(ca_bundles(&[b"roots"], Err(&none)).is_err());
        assert!(ca_bundles(&[b"roots", b"other"], Ok("roots")).unwrap_err().found.contains("1 of 2"));
        assert!(ca_bundles(&[b"roots", b"roots"], Ok("roots")).is_ok());
    }
}
