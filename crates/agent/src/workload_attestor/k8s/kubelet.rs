//! Queries the kubelet's pod list (`GET /pods` on port 10250) on demand; callers that wait share one query. A kubelet
//! whose certificate does not verify is asked nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex as StdMutex, MutexGuard, PoisonError};
use std::time::Duration;

use countersign_api::files::read_bounded;
use countersign_api::{http_client, names};
use countersign_identity::bundle::certificates_from_pem;
use http_body_util::Empty;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::pods::Pods;
use super::source::Standing;
use crate::config::Kubelet;

/// Longest query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a kubelet that failed is left alone where there is another source. Most fail for good, and each attempt is a
/// line in a kubelet's log.
const REST: Duration = Duration::from_secs(30);
/// Interval between two attempts of the only source while it fails.
const PROBE: Duration = Duration::from_secs(5);
/// Largest pod list that is read, in bytes.
const MAX_LIST_BYTES: usize = 64 * 1024 * 1024;
/// Largest token or CA file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Why the attestor could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The kubelet's CA file cannot be used.
    #[error("kubelet CA {}: {why}", path.display())]
    Ca {
        /// Path of the CA file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// There is no way to the API server, which provides pods and labels of namespaces.
    #[error("cannot reach the Kubernetes API: {}; run in a pod, or set KUBECONFIG", countersign_watch::in_words(.0))]
    Api(#[from] kube::Error),
}

/// Why there is no pod list.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The token file cannot be read.
    #[error("cannot read {}: {why}", path.display())]
    File {
        /// Path of the token file.
        path: PathBuf,
        /// Error of the operating system, or what is wrong with it.
        why: String,
    },
    /// The connection or the TLS handshake failed.
    #[error("cannot reach the kubelet at {address}: {why}")]
    Connect {
        /// Address of the kubelet, `HOST:PORT`.
        address: String,
        /// Why it failed.
        why: String,
    },
    /// The kubelet answered with an HTTP error.
    #[error("the kubelet at {address} refuses the pod list with {status}; {mend}")]
    Refused {
        /// Address of the kubelet, `HOST:PORT`.
        address: String,
        /// HTTP status code of the answer.
        status: u16,
        /// How to fix it.
        mend: &'static str,
    },
    /// The kubelet's answer cannot be parsed, or is too long.
    #[error("the kubelet's pod list cannot be read: {0}")]
    Answer(String),
    /// It failed a moment ago, and is left alone.
    #[error("{0}")]
    Resting(String),
}

/// Queries a kubelet; concurrent callers share the answer.
pub struct Client {
    settings: Kubelet,
    tls: Arc<ClientConfig>,
    latest: Mutex<Option<(Instant, Arc<Pods>)>>,
    /// Time between two attempts while it fails.
    rest: Duration,
    state: StdMutex<State>,
}

/// What became of the latest query.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Unasked,
    Works,
    Failed { at: Instant, why: String },
}

impl Client {
    /// Reads the CA that the kubelet's certificate must chain to. `second`: there is another source, so a kubelet that
    /// fails is left alone for [`REST`].
    pub fn new(settings: Kubelet, second: bool) -> Result<Self, SetupError> {
        let wrong = |why: String| SetupError::Ca { path: settings.ca.clone(), why };
        let pem = read_bounded(&settings.ca, MAX_FILE_BYTES).map_err(|e| wrong(e.to_string()))?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates_from_pem(&pem).map_err(|e| wrong(e.to_string()))? {
            roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = tls.map_err(|e| wrong(e.to_string()))?.with_root_certificates(roots).with_no_client_auth();
        let rest = if second { REST } else { Duration::ZERO };
        let state = StdMutex::new(State::Unasked);
        Ok(Self { settings, tls: Arc::new(tls), latest: Mutex::default(), rest, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it answers, by the latest query.
    pub fn standing(&self) -> Standing {
        match &*self.state() {
            State::Works => Standing::Works,
            State::Unasked => Standing::Fails { why: "the kubelet has not answered yet".into(), lasting: false },
            State::Failed { why, .. } => Standing::Fails { why: why.clone(), lasting: true },
        }
    }

    /// Asks at the start, and now and then while it fails, without end.
    pub async fn keep(&self) {
        loop {
            if *self.state() != State::Works {
                // What became of it is noted, and told from there.
                let _ = self.pods().await;
            }
            tokio::time::sleep(REST.min(self.rest.max(PROBE))).await;
        }
    }

    /// Keeps what became of a query, and logs what is new about it.
    fn note(&self, outcome: Result<(), &QueryError>) {
        let mut state = self.state();
        let next = match outcome {
            Ok(()) => State::Works,
            Err(error) => State::Failed { at: Instant::now(), why: error.to_string() },
        };
        match (&*state, &next) {
            (State::Works, State::Works) | (State::Failed { .. }, State::Failed { .. }) => {}
            (_, State::Failed { why, .. }) if self.rest.is_zero() => {
                tracing::warn!(why, "the kubelet is not available");
            }
            (_, State::Failed { why, .. }) => {
                tracing::info!(why, "the kubelet is no source of pods; the API server alone is");
            }
            _ => tracing::info!(address = self.settings.address, "the kubelet is a source of pods"),
        }
        *state = next;
    }

    /// A pod list that is no older than this call. Callers that wait for the same list share one query.
    pub async fn pods(&self) -> Result<Arc<Pods>, QueryError> {
        let arrived = Instant::now();
        let mut latest = self.latest.lock().await;
        if let Some((asked, pods)) = &*latest
            // A list from before this call may lack the caller's pod, or show a container of the past.
            && *asked >= arrived
        {
            return Ok(pods.clone());
        }
        let asked = Instant::now();
        if let State::Failed { at, why } = &*self.state()
            && at.elapsed() < self.rest
        {
            return Err(QueryError::Resting(why.clone()));
        }
        let answer = tokio::time::timeout(QUERY_TIMEOUT, self.query()).await;
        let answer = answer.unwrap_or_else(|_| Err(self.unreachable("no answer in time".into())));
        self.note(answer.as_ref().map(drop));
        let pods = Arc::new(answer?);
        *latest = Some((asked, pods.clone()));
        Ok(pods)
    }

    fn unreachable(&self, why: String) -> QueryError {
        QueryError::Connect { address: self.settings.address.clone(), why }
    }

    async fn query(&self) -> Result<Pods, QueryError> {
        let Kubelet { address, token, .. } = &self.settings;
        let file = |why: String| QueryError::File { path: token.clone(), why };
        let secret = Zeroizing::new(read_bounded(token, MAX_FILE_BYTES).map_err(|e| file(e.to_string()))?);
        let secret = std::str::from_utf8(&secret).map_err(|e| file(e.to_string()))?;
        let bearer = Zeroizing::new(format!("Bearer {}", secret.trim()));
        let mut bearer = http::HeaderValue::from_str(&bearer).map_err(|e| file(e.to_string()))?;
        bearer.set_sensitive(true);
        let fails = |e: &dyn std::fmt::Display| self.unreachable(e.to_string());
        let host = names::split(address).map_or(address.as_str(), |(host, _)| host);
        let name = ServerName::try_from(host.to_owned()).map_err(|e| fails(&e))?;
        let tcp = names::connect(address).await.map_err(|e| fails(&e))?;
        let tls = TlsConnector::from(self.tls.clone()).connect(name, tcp).await.map_err(|e| fails(&e))?;
        let request = http::Request::get("/pods")
            .header(http::header::HOST, address.as_str())
            .header(http::header::AUTHORIZATION, bearer)
            .body(Empty::new())
            .map_err(|e| fails(&e))?;
        let answer = http_client::send(tls, request).await.map_err(|e| fails(&e))?;
        let status = answer.status.as_u16();
        if status != 200 {
            let mend = match status {
                401 => "does it accept service account tokens (authentication.webhook)?",
                403 => {
                    "give the agent `get` on nodes/pods (before Kubernetes 1.33 on nodes/proxy: agent.nodesProxyPermission)"
                }
                _ => "see the kubelet's log",
            };
            return Err(QueryError::Refused { address: address.clone(), status, mend });
        }
        let pods = answer.whole(MAX_LIST_BYTES).await.map_err(|e| QueryError::Answer(e.to_string()))?;
        Pods::parse(&pods.body).map_err(|e| QueryError::Answer(e.to_string()))
    }
}

#[cfg(test)]
pub mod tests;
