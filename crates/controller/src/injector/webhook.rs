//! `AdmissionReview` (admission.k8s.io/v1) in over TLS, JSON Patch out. `/inject/namespace` takes pods whose namespace asks for
//! injection, `/inject/pod` those that must ask themselves: the API server's own selectors tell them apart, so that we need
//! no permission to look. The certificate is our own SVID, whose
//! DNS names are those of the webhook's Service; it is swapped whenever the agent renews it.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use base64::Engine;
use countersign_api::tls::{TlsError, certified_key};
use countersign_api::transport::{back_off_after, unix_channel};
use countersign_api::workload_api::{Told, Update, follow};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Verdict, inject, judge_ephemeral};
use crate::config::InjectorConfig;
use crate::metrics::{Metrics, Outcome};

/// Largest review that is read, in bytes. The API server takes no larger object.
const MAX_REVIEW_BYTES: usize = 4 * 1024 * 1024;
/// Connections at once; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 256;
/// A handshake, a head, a body take no longer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why the webhook does not serve.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// Its port is taken.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
}

/// A certificate that is served.
#[derive(Clone)]
struct Certificate {
    tls: Arc<ServerConfig>,
    ends_at: OffsetDateTime,
}

/// The certificate of the moment; none before the agent has given us one.
#[derive(Clone, Default)]
pub struct Serving(Arc<RwLock<Option<Certificate>>>);

impl Serving {
    fn get(&self) -> Option<Certificate> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, certificate: Certificate) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(certificate);
    }

    /// Why the API server would not take our word; `None`: it does.
    pub fn missing(&self) -> Option<&'static str> {
        match self.get() {
            None => Some("the agent has given us no certificate yet"),
            Some(c) if c.ends_at <= OffsetDateTime::now_utc() => {
                Some("our certificate has ended, and the agent has given us no new one")
            }
            Some(_) => None,
        }
    }
}

/// Serves until `shutdown`.
pub async fn serve(
    config: InjectorConfig,
    serving: Serving,
    metrics: Arc<Metrics>,
    tasks: &TaskTracker,
    shutdown: CancellationToken,
) -> Result<(), WebhookError> {
    let listener = TcpListener::bind(config.bind).await;
    let listener = listener.map_err(|source| WebhookError::Listen { address: config.bind, source })?;
    tasks.spawn(follow_identity(config.clone(), serving.clone(), metrics.clone(), shutdown.clone()));
    let hook = Arc::new(Hook { config, metrics });
    let inner = tasks.clone();
    tasks.spawn(async move {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else { return };
            let tcp = tokio::select! {
                () = shutdown.cancelled() => return,
                accepted = listener.accept() => match accepted {
                    Ok((tcp, _)) => tcp,
                    Err(error) => {
                        back_off_after(&error).await;
                        continue;
                    }
                },
            };
            let Some(Certificate { tls, .. }) = serving.get() else { continue };
            let (hook, stop) = (hook.clone(), shutdown.clone());
            inner.spawn(async move {
                let _slot = slot;
                if let Err(error) = connection(hook, tls, tcp, stop).await {
                    tracing::debug!(%error, "webhook connection ended");
                }
            });
        }
    });
    Ok(())
}

fn server_config(update: &Update) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::from)?
        .with_no_client_auth();
    let key = certified_key(&update.svid)?;
    let mut config = builder.with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Keeps the serving certificate the same as our SVID. One that is withdrawn is served until it ends.
async fn follow_identity(config: InjectorConfig, serving: Serving, metrics: Arc<Metrics>, shutdown: CancellationToken) {
    let told = |told| {
        let Told::Update(update) = told else { return };
        match server_config(&update) {
            Ok(tls) => {
                let facts = update.svid.facts();
                metrics.webhook_expiry.set(facts.not_after.unix_timestamp());
                tracing::info!(spiffe_id = %update.svid.id(), serial = facts.serial, expires_at = %facts.not_after, "serving certificate");
                serving.set(Certificate { tls, ends_at: facts.not_after });
            }
            Err(error) => tracing::error!(%error, "our SVID cannot be served"),
        }
    };
    follow(unix_channel(&config.agent_socket), shutdown, told).await;
}

async fn connection(
    hook: Arc<Hook>,
    tls: Arc<ServerConfig>,
    tcp: TcpStream,
    shutdown: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let stream = tokio::time::timeout(TIMEOUT, TlsAcceptor::from(tls).accept(tcp)).await??;
    let service = service_fn(move |request| {
        let hook = hook.clone();
        async move { Ok::<_, Infallible>(hook.answer(request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    tokio::select! {
        ended = served.as_mut() => ended?,
        () = shutdown.cancelled() => {
            // What is being answered is answered.
            served.as_mut().graceful_shutdown();
            tokio::time::timeout(TIMEOUT, served).await??;
        }
    }
    Ok(())
}

struct Hook {
    config: InjectorConfig,
    metrics: Arc<Metrics>,
}

fn plain(status: StatusCode, text: &str) -> Response<String> {
    let mut response = Response::new(text.to_owned());
    *response.status_mut() = status;
    response
}

impl Hook {
    async fn answer(&self, request: Request<Incoming>) -> Response<String> {
        let namespace_enabled = match (request.method(), request.uri().path()) {
            (&Method::POST, "/inject/namespace") => true,
            (&Method::POST, "/inject/pod") => false,
            _ => return plain(StatusCode::NOT_FOUND, "POST /inject/namespace or /inject/pod\n"),
        };
        let read = tokio::time::timeout(TIMEOUT, Limited::new(request.into_body(), MAX_REVIEW_BYTES).collect());
        let body = match read.await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => return plain(StatusCode::PAYLOAD_TOO_LARGE, "the review is too large, or broken off\n"),
            Err(_) => return plain(StatusCode::REQUEST_TIMEOUT, "the review did not come in time\n"),
        };
        let review: Option<Value> = serde_json::from_slice(&body).ok();
        let Some(answer) = review.as_ref().and_then(|review| self.review(review, namespace_enabled)) else {
            self.count("malformed");
            return plain(StatusCode::BAD_REQUEST, "the body is no admission.k8s.io/v1 AdmissionReview of a pod\n");
        };
        let mut response = Response::new(answer.to_string());
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        response
    }

    fn count(&self, outcome: &'static str) {
        self.metrics.admissions.get_or_create(&Outcome { outcome }).inc();
    }

    /// Judges one review; `None`: it is none.
    fn review(&self, review: &Value, namespace_enabled: bool) -> Option<Value> {
        let request = review.get("request").filter(|_| review["kind"] == "AdmissionReview")?;
        let uid = request["uid"].as_str()?;
        let mut pod = request.get("object").filter(|o| o.is_object())?.clone();
        let before = pod.clone();
        let namespace = request["namespace"].as_str().unwrap_or_default();
        let name = ["name", "generateName"].iter().find_map(|k| before["metadata"][*k].as_str()).unwrap_or_default();
        let mut response = json!({ "uid": uid, "allowed": true });
        let verdict = if request["subResource"] == "ephemeralcontainers" {
            judge_ephemeral(&pod).map(|()| None)
        } else {
            inject(&mut pod, &self.config.sidecar, namespace_enabled).map(Some)
        };
        match verdict {
            Ok(None) => self.count("kept"),
            Ok(Some(Verdict::Injected)) => {
                self.count("injected");
                tracing::info!(namespace, pod = name, "injected");
                let patch = json_patch::diff(&before, &pod);
                let patch = serde_json::to_vec(&patch).unwrap_or_default();
                response["patchType"] = "JSONPatch".into();
                response["patch"] = base64::engine::general_purpose::STANDARD.encode(patch).into();
            }
            Ok(Some(Verdict::Left(why))) => {
                self.count("left");
                tracing::info!(namespace, pod = name, why, "left as it is");
                response["warnings"] = json!([format!("countersign: not injected: {why}")]);
            }
            Err(refused) => {
                self.count("refused");
                tracing::warn!(namespace, pod = name, why = %refused, "refused");
                response["allowed"] = false.into();
                response["status"] = json!({ "code": 422, "reason": "Invalid", "message": refused.to_string() });
            }
        }
        Some(json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response }))
    }
}
