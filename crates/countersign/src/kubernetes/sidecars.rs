//! What sidecars know of themselves, asked of each one: its page `/status`, which is served inside the pod alone, through
//! the API server's port-forward. Nobody's log is read, for a log is rotated and tells of what has ended.
//!
//! Whoever can make a pod can answer here in a sidecar's place: what comes is bounded, parsed, and escaped before it is shown.

use std::time::Duration;

use countersign_api::http_client::{self, ClientError, Reply};
use countersign_controller::injector::SIDECAR;
use countersign_identity::policy::Mode;
use countersign_identity::shown::{sentence, shown};
use countersign_proxy::status_page::SidecarStatus;
use countersign_watch::in_words;
use futures::future::{FusedFuture, FutureExt};
use futures::stream::{self, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, Portforwarder};
use kube::{Client, ResourceExt};
use tokio::io::{AsyncRead, AsyncWrite};

use super::cluster::{SIDECAR_PORT, words};

/// Sidecars that are asked at once: each one costs the API server and a kubelet a connection.
const AT_ONCE: usize = 16;
/// The longest that one may take, from the question to the last byte.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a stream that has ended may take to tell why.
const LAST_WORD: Duration = Duration::from_secs(1);
/// Longest answer that is read, in bytes. A full table is some 200 KiB.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Longest text of an answer that is shown, in characters.
const MAX_TEXT: usize = 512;

/// Why a sidecar could not be asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unasked {
    /// The API server does not let this user in.
    #[error("you may not ask it: {0}")]
    Forbidden(String),
    /// It is not there any more.
    #[error("the pod is gone")]
    Gone,
    /// Its container does not run.
    #[error("its sidecar does not run: {0}")]
    NotRunning(String),
    /// It took too long.
    #[error("no answer within {} s", DEADLINE.as_secs())]
    Silent,
    /// The way to it broke.
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    /// It answers, and has no such page.
    #[error("its sidecar is older than this command and has no page /status")]
    NoPage,
    /// What it says is no status.
    #[error("its answer cannot be used: {0}")]
    Unreadable(String),
}

impl Unasked {
    /// Its name in JSON; never changes.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Forbidden(_) => "forbidden",
            Self::Gone => "gone",
            Self::NotRunning(_) => "not_running",
            Self::Silent => "silent",
            Self::Unreachable(_) => "unreachable",
            Self::NoPage => "no_page",
            Self::Unreadable(_) => "unreadable",
        }
    }

    /// What to do.
    pub fn mend(&self) -> &'static str {
        match self {
            Self::Forbidden(_) => {
                "have the verbs get and create on pods/portforward granted to you in the pod's namespace (docs/kubernetes.md)"
            }
            Self::Gone => "ask again",
            Self::NotRunning(_) => "see kubectl describe pod; delete it if nobody needs it",
            Self::Silent => "see whether its node is well, and ask again",
            Self::Unreachable(_) => {
                "see whether kubectl port-forward works: a proxy before the API server must let WebSockets through"
            }
            Self::NoPage => "restart the pod, so that it gets the installed version of the sidecar",
            Self::Unreadable(_) => "use the command of the installed version; see which image its sidecar runs",
        }
    }

    fn of(error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 403 => Self::Forbidden(in_words(error)),
            kube::Error::Api(status) if status.code == 404 => Self::Gone,
            other => Self::Unreachable(in_words(other)),
        }
    }
}

/// Asks the sidecar of each pod, [`AT_ONCE`] at a time; the answers are in the order of the pods.
pub async fn ask_each(client: &Client, pods: &[&Pod]) -> Vec<Result<SidecarStatus, Unasked>> {
    stream::iter(pods).map(|pod| ask(client, pod)).buffered(AT_ONCE).collect().await
}

/// Asks one pod's sidecar, within [`DEADLINE`].
pub async fn ask(client: &Client, pod: &Pod) -> Result<SidecarStatus, Unasked> {
    runs(pod)?;
    let asked = async {
        let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
        let forward = pods.portforward(&pod.name_any(), &[SIDECAR_PORT]).await;
        let mut forward = Forward(forward.map_err(|e| Unasked::of(&e))?);
        let ends = (forward.0.take_stream(SIDECAR_PORT), forward.0.take_error(SIDECAR_PORT));
        let (Some(stream), Some(broken)) = ends else {
            return Err(Unasked::Unreachable("the port-forward has no stream".into()));
        };
        status_over(stream, broken).await
    };
    tokio::time::timeout(DEADLINE, asked).await.unwrap_or(Err(Unasked::Silent))
}

/// A port-forward that ends with its owner.
struct Forward(Portforwarder);

impl Drop for Forward {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Whether the sidecar's container runs. A pod that hangs in its init containers can have one that does.
fn runs(pod: &Pod) -> Result<(), Unasked> {
    let Some(status) = &pod.status else { return Err(Unasked::NotRunning("the pod has no status yet".into())) };
    let lists = [&status.init_container_statuses, &status.container_statuses];
    let state = lists.into_iter().flatten().flatten().find(|c| c.name == SIDECAR).and_then(|c| c.state.as_ref());
    let why = match state {
        Some(state) if state.running.is_some() => return Ok(()),
        Some(state) => {
            let ended = state.terminated.as_ref().map(|t| format!("it ended with {}", t.exit_code));
            state.waiting.as_ref().and_then(|w| w.reason.clone()).or(ended)
        }
        None => None,
    };
    let phase = || format!("the pod is {}", status.phase.as_deref().unwrap_or("not started"));
    Err(Unasked::NotRunning(words(&why.unwrap_or_else(phase))))
}

/// Asks over a stream to the page. `broken` resolves when the port-forward cannot be used, with the kubelet's reason.
async fn status_over<S>(stream: S, broken: impl Future<Output = Option<String>>) -> Result<SidecarStatus, Unasked>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let unreachable = |why: &str| Unasked::Unreachable(words(&sentence(why, MAX_TEXT).to_string()));
    let mut broken = std::pin::pin!(broken.fuse());
    let answer = tokio::select! {
        answer = http_client::get(stream, "localhost", "/status", MAX_ANSWER_BYTES) => answer,
        Some(why) = broken.as_mut() => return Err(unreachable(&why)),
    };
    match answer {
        Ok(reply) => read(&reply),
        Err(error @ ClientError::Body { .. }) => Err(Unasked::Unreadable(error.to_string())),
        Err(error) => {
            // The stream's end and its reason come by two ways.
            if broken.is_terminated() {
                return Err(unreachable(&error.to_string()));
            }
            let why = tokio::time::timeout(LAST_WORD, broken).await.ok().flatten();
            Err(unreachable(&why.unwrap_or_else(|| error.to_string())))
        }
    }
}

fn read(reply: &Reply) -> Result<SidecarStatus, Unasked> {
    match reply.status.as_u16() {
        200 => parse(&reply.body),
        404 => Err(Unasked::NoPage),
        other => Err(Unasked::Unreadable(format!("status {other}"))),
    }
}

/// Reads a status; every text in it is fit to be shown.
fn parse(body: &[u8]) -> Result<SidecarStatus, Unasked> {
    let read: Result<SidecarStatus, _> = serde_json::from_slice(body);
    let mut status = read.map_err(|e| Unasked::Unreadable(sentence(&e.to_string(), MAX_TEXT).to_string()))?;
    if let Some(mode) = &status.mode {
        mode.parse::<Mode>().map_err(|e| Unasked::Unreadable(e.to_string()))?;
    }
    let clean = |text: &mut String| *text = shown(text).to_string();
    let clean_sentence = |text: &mut String| *text = sentence(text, MAX_TEXT).to_string();
    clean(&mut status.version);
    [&mut status.missing, &mut status.not_admitted].into_iter().flatten().for_each(clean_sentence);
    if let Some(identity) = &mut status.identity {
        [&mut identity.spiffe_id, &mut identity.serial, &mut identity.authority_id].into_iter().for_each(clean);
    }
    if let Some(refusal) = &mut status.agent_refusal {
        clean(&mut refusal.code);
        clean_sentence(&mut refusal.message);
    }
    status.refused.iter_mut().for_each(|r| clean(&mut r.reason));
    Ok(status)
}

/// A door for `fuzzing`: the texts of an answer as they are shown, or why there is none.
#[cfg(fuzzing)]
pub fn texts(body: &[u8]) -> Vec<String> {
    match parse(body) {
        Ok(status) => {
            let identity = status.identity.into_iter().flat_map(|i| [i.spiffe_id, i.serial, i.authority_id]);
            let refusal = status.agent_refusal.into_iter().flat_map(|r| [r.code, r.message]);
            let reasons = status.refused.into_iter().map(|r| r.reason);
            let others = [Some(status.version), status.mode, status.missing, status.not_admitted].into_iter().flatten();
            others.chain(identity).chain(refusal).chain(reasons).collect()
        }
        Err(why) => vec![why.to_string()],
    }
}

#[cfg(test)]
pub mod tests;
