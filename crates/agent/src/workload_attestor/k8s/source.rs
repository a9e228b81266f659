//! The sources of a node's pods together: the watch on the API server is looked at first, for it costs nothing; the
//! kubelet is asked about what the watch does not know. Both are verified peers, so either is believed.

use std::sync::Arc;

use countersign_identity::selector::SelectorSet;
use countersign_watch::cgroup::Container;
use tokio_util::sync::CancellationToken;

use super::api_server::{ApiServer, Known};
use super::kubelet::Client;
use super::pods::KnownPod;
use crate::metrics::{Metrics, PodSource};

/// Whether a source can be relied on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It answers.
    Works,
    /// It does not.
    Fails {
        /// What is wrong, in words.
        why: String,
        /// Whether it has been so for the time after which `/ready` says it.
        lasting: bool,
    },
}

/// What is known about a container.
#[derive(Debug)]
pub struct Found {
    /// Who knows it.
    pub source: PodSource,
    /// Its pod.
    pub pod: Arc<KnownPod>,
    /// The container's own selectors; `None` while no source knows it.
    pub container: Option<SelectorSet>,
}

impl Found {
    fn of(source: PodSource, pod: Arc<KnownPod>, container: &Container) -> Self {
        let container = pod.container(&container.id).cloned();
        Self { source, pod, container }
    }
}

/// Why a pod is not found.
#[derive(Debug, PartialEq, Eq)]
pub enum Missing {
    /// No source knows it now.
    Yet(String),
    /// It was deleted, and will not be known again.
    Deleted,
}

/// All sources of pods of this node; at least one.
pub struct PodSources {
    api_server: Option<ApiServer>,
    kubelet: Option<Client>,
    metrics: Arc<Metrics>,
}

impl PodSources {
    /// At least one of them is given.
    pub fn new(api_server: Option<ApiServer>, kubelet: Option<Client>, metrics: Arc<Metrics>) -> Self {
        Self { api_server, kubelet, metrics }
    }

    /// What the source knows that need not be asked; `None` if it does not know the pod.
    pub fn at_hand(&self, container: &Container) -> Result<Option<Found>, Missing> {
        let Some(api_server) = &self.api_server else { return Ok(None) };
        match api_server.look(&container.pod_uid) {
            Known::Deleted => Err(Missing::Deleted),
            Known::No(_) => Ok(None),
            Known::Pod(pod) => Ok(Some(Found::of(PodSource::ApiServer, pod, container))),
        }
    }

    /// What is known about a container now: by a source that knows the container if there is one, else by one that
    /// knows its pod.
    pub async fn find(&self, container: &Container) -> Result<Found, Missing> {
        let pod_uid = &container.pod_uid;
        let (mut part, mut why) = (None, vec![]);
        if let Some(api_server) = &self.api_server {
            match api_server.look(pod_uid) {
                Known::Deleted => return Err(Missing::Deleted),
                Known::Pod(pod) => match Found::of(PodSource::ApiServer, pod, container) {
                    found if found.container.is_some() => return Ok(found),
                    found => part = Some(found),
                },
                Known::No(reason) => why.push(reason),
            }
        }
        if let Some(kubelet) = &self.kubelet {
            let asked = tokio::select! {
                // Where packets to the kubelet are dropped, the watch has long learnt of it before the kubelet is given up.
                () = self.known(container) => return Box::pin(self.find(container)).await,
                pods = kubelet.pods() => pods,
            };
            match asked {
                Ok(pods) => match pods.get(pod_uid) {
                    Some(pod) => {
                        // It may have been deleted while the kubelet was asked, and the kubelet not know yet.
                        if self.api_server.as_ref().is_some_and(|a| matches!(a.look(pod_uid), Known::Deleted)) {
                            return Err(Missing::Deleted);
                        }
                        let found = Found::of(PodSource::Kubelet, pod.clone(), container);
                        if found.container.is_some() {
                            return Ok(found);
                        }
                        part = part.or(Some(found));
                    }
                    None => why.push(format!("the kubelet does not know pod {pod_uid}")),
                },
                Err(error) => why.push(error.to_string()),
            }
        }
        part.ok_or_else(|| Missing::Yet(why.join("; ")))
    }

    /// Counts what a caller was attested by.
    pub fn served(&self, source: PodSource) {
        self.metrics.served_by(source);
    }

    /// Resolves once a source that is told of changes knows the container; never without such a source.
    pub async fn known(&self, container: &Container) {
        match &self.api_server {
            Some(api_server) => api_server.known(container).await,
            None => std::future::pending().await,
        }
    }

    /// Keeps the sources up to date until `shutdown`, and asks each at the start.
    pub async fn keep(&self, shutdown: CancellationToken) {
        let watch = async {
            match &self.api_server {
                Some(api_server) => api_server.follow().await,
                None => std::future::pending().await,
            }
        };
        let probe = async {
            match &self.kubelet {
                Some(kubelet) => kubelet.keep().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = watch => {}
            () = probe => {}
        }
    }

    /// Each source with its standing.
    fn standings(&self) -> Vec<(PodSource, Standing)> {
        let api_server = self.api_server.as_ref().map(|a| (PodSource::ApiServer, a.standing()));
        let kubelet = self.kubelet.as_ref().map(|k| (PodSource::Kubelet, k.standing()));
        api_server.into_iter().chain(kubelet).collect()
    }

    /// Why callers cannot be attested, or soon cannot be; `None` if a source works. A kubelet is the second source
    /// where there is a watch: that it fails is told by metrics, and does not keep the agent from being ready.
    pub fn missing(&self) -> Option<String> {
        let standings = self.standings();
        let works = standings.iter().any(|(_, s)| *s == Standing::Works);
        let counts = |source, lasting| lasting && source == PodSource::ApiServer;
        let why: Vec<String> = standings
            .into_iter()
            .filter_map(|(source, standing)| match standing {
                Standing::Fails { why, lasting } if !works || counts(source, lasting) => Some(why),
                _ => None,
            })
            .collect();
        (!why.is_empty()).then(|| format!("pods of this node cannot be looked up: {}", why.join("; ")))
    }

    /// Each source in words, for `status`.
    pub fn facts(&self) -> Vec<(String, String)> {
        let said = |(source, standing): (PodSource, Standing)| {
            let words = match (source, standing) {
                (_, Standing::Fails { why, .. }) => why,
                (PodSource::ApiServer, Standing::Works) => {
                    format!("{} pods watched", self.api_server.as_ref().map_or(0, ApiServer::pods))
                }
                (PodSource::Kubelet, Standing::Works) => "answers".into(),
            };
            (format!("pods by {}", source.name()), words)
        };
        self.standings().into_iter().map(said).collect()
    }

    /// Sets the metrics of the sources.
    pub fn observe(&self) {
        for (source, standing) in self.standings() {
            self.metrics.source_up(source, standing == Standing::Works);
        }
    }
}

#[cfg(test)]
mod tests;
