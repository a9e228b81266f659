//! Queries the kubelet's pod list (`GET /pods` on port 10250) on demand; callers that wait share one query.

use std::path::PathBuf;
use std::sync::Arc;
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
use crate::config::Kubelet;

/// Longest query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
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
    /// The API server, which provides labels of namespaces, cannot be reached.
    #[error("cannot reach the Kubernetes API: {0}; run in a pod, or set KUBECONFIG")]
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
}

/// Queries a kubelet; concurrent callers share the answer.
pub struct Client {
    settings: Kubelet,
    tls: Arc<ClientConfig>,
    latest: Mutex<Option<(Instant, Arc<Pods>)>>,
}

impl Client {
    /// Reads the CA that the kubelet's certificate must chain to.
    pub fn new(settings: Kubelet) -> Result<Self, SetupError> {
        let wrong = |why: String| SetupError::Ca { path: settings.ca.clone(), why };
        let pem = read_bounded(&settings.ca, MAX_FILE_BYTES).map_err(|e| wrong(e.to_string()))?;
        let mut roots = RootCertStore::empty();
        for certificate in certificates_from_pem(&pem).map_err(|e| wrong(e.to_string()))? {
            roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let tls = tls.map_err(|e| wrong(e.to_string()))?.with_root_certificates(roots).with_no_client_auth();
        Ok(Self { settings, tls: Arc::new(tls), latest: Mutex::default() })
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
        let answer = tokio::time::timeout(QUERY_TIMEOUT, self.query()).await;
        let pods = answer.map_err(|_| self.unreachable("no answer in time".into()))??;
        let pods = Arc::new(pods);
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
                403 => "give the agent's service account `get` on nodes/pods (nodes/proxy before Kubernetes 1.33)",
                _ => "see the kubelet's log",
            };
            return Err(QueryError::Refused { address: address.clone(), status, mend });
        }
        let pods = answer.whole(MAX_LIST_BYTES).await.map_err(|e| QueryError::Answer(e.to_string()))?;
        Pods::parse(&pods.body).map_err(|e| QueryError::Answer(e.to_string()))
    }
}
