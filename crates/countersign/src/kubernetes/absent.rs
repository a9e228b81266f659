//! An installation that is not in the namespace where it was looked for.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::Client;
use kube::api::Api;

use super::existing::elsewhere;
use super::live_settings;
use crate::settings::Mistake;

/// Longest look for it.
const CALL: Duration = Duration::from_secs(10);

/// That a namespace has no part of an installation.
#[derive(Debug, PartialEq, Eq)]
pub struct Absent {
    namespace: String,
    /// Whether there is such a namespace.
    is_there: bool,
    /// A namespace with an installation.
    elsewhere: Option<String>,
}

/// Whether a namespace has no part of an installation; `None` if it has one, or if this user may not tell.
pub async fn absent(client: &Client, namespace: &str) -> Option<Absent> {
    // Its four questions at once are a large future.
    tokio::time::timeout(CALL, Box::pin(look(client, namespace))).await.ok().flatten()
}

async fn look(client: &Client, namespace: &str) -> Option<Absent> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let servers: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
    let agents: Api<DaemonSet> = Api::namespaced(client.clone(), namespace);
    let injectors: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    let (map, server, agent, injector) = futures::try_join!(
        maps.get_opt(live_settings::NAME),
        servers.get_opt("countersign-server"),
        agents.get_opt("countersign-agent"),
        injectors.get_opt("countersign-injector"),
    )
    .ok()?;
    if map.is_some() || server.is_some() || agent.is_some() || injector.is_some() {
        return None;
    }
    // Who may not read it learns what is missing without it.
    let is_there = Api::<Namespace>::all(client.clone()).get_opt(namespace).await.map_or(true, |found| found.is_some());
    let elsewhere = elsewhere(client, namespace).await.ok().flatten().map(|other| other.namespace);
    Some(Absent { namespace: namespace.to_owned(), is_there, elsewhere })
}

/// Refuses to go on without an installation. `flag` is the one that names the namespace.
pub async fn refuse(client: &Client, namespace: &str, flag: &str) -> Result<(), Mistake> {
    absent(client, namespace)
        .await
        .map_or(Ok(()), |absent| Err(Mistake(format!("{}: {}", absent.found(), absent.mend(flag)))))
}

impl Absent {
    /// What was found, in words.
    pub fn found(&self) -> String {
        let which = if self.is_there { "" } else { ", which does not exist" };
        let other = self.elsewhere.as_ref().map(|other| format!("; there is one in namespace `{other}`"));
        format!("there is no installation in namespace `{}`{which}{}", self.namespace, other.unwrap_or_default())
    }

    /// What to do.
    pub fn mend(&self, flag: &str) -> String {
        match &self.elsewhere {
            Some(other) => format!("say {flag} {other}"),
            None => "see `countersign check --before` and `countersign install`".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::check::fake_api::{Answer, Asked, client, refused};
    use serde_json::json;

    /// A cluster with an installation in namespace `mesh`.
    fn cluster(may_look: bool) -> Client {
        client(move |asked: &Asked| match asked.path.as_str() {
            path if path.contains("/namespaces/mesh/") && path.ends_with("countersign-agent") => {
                Answer::Now(200, json!({ "metadata": { "name": "countersign-agent" } }))
            }
            path if path.ends_with("/mutatingwebhookconfigurations/countersign-injector") => {
                let service = json!({ "namespace": "mesh", "name": "countersign-injector" });
                let hook = json!({ "name": "pod.inject", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                                   "clientConfig": { "service": service } });
                Answer::Now(200, json!({ "metadata": { "name": "countersign-injector" }, "webhooks": [hook] }))
            }
            "/api/v1/namespaces/empty" => Answer::Now(200, json!({ "metadata": { "name": "empty" } })),
            _ if may_look => refused(404, "not found"),
            _ => refused(403, "no"),
        })
    }

    #[tokio::test]
    async fn an_installation_that_is_elsewhere_is_said_with_its_namespace() {
        let wrong = absent(&cluster(true), "wrong").await.unwrap();
        assert_eq!(
            wrong.found(),
            "there is no installation in namespace `wrong`, which does not exist; there is one in namespace `mesh`"
        );
        assert_eq!(wrong.mend("-n"), "say -n mesh");
        let empty = absent(&cluster(true), "empty").await.unwrap();
        assert!(empty.found().starts_with("there is no installation in namespace `empty`; "), "{}", empty.found());
        let nowhere = absent(&client(|_| refused(404, "not found")), "x").await.unwrap();
        assert!(nowhere.mend("-n").contains("check --before"));
    }

    #[tokio::test]
    async fn one_that_lacks_much_is_there_and_who_may_not_look_is_told_nothing() {
        assert_eq!(absent(&cluster(true), "mesh").await, None, "its agents are left");
        assert_eq!(absent(&cluster(false), "wrong").await, None);
        assert!(refuse(&cluster(true), "mesh", "-n").await.is_ok());
        assert!(refuse(&cluster(true), "wrong", "-n").await.unwrap_err().to_string().ends_with(": say -n mesh"));
    }
}
