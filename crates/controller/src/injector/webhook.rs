//! The webhook: `AdmissionReview` (admission.k8s.io/v1) in over TLS, JSON Patch out. `/inject/namespace` is for pods
//! whose namespace requests injection, `/inject/pod` for those that must request it themselves: the API server's
//! selectors tell them apart, so the webhook needs no permission to look namespaces up. The certificate is its own SVID
//! with the DNS names of the webhook's Service, replaced whenever the agent renews it.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use countersign_api::accept::Door;
use countersign_api::admission::{Admission, Limits, Seat, Source};
use countersign_api::sampled::Sampled;
use countersign_api::tls::{TlsError, certified_key};
use countersign_api::transport::unix_channel;
use countersign_api::workload_api::{Told, Update, follow};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, META_API_VERSION_V1, META_KIND};
use kube::core::{DynamicObject, Status};
use rustls::ServerConfig;
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{
    Asks, Privileges, Surroundings, Verdict, confine_ephemeral, inject, judge_ephemeral, judge_namespace, mark_strict,
    new_probe_secret, warn_of_level,
};
use countersign_identity::policy::Mode;
use countersign_identity::shown::{sentence, shown_up_to};

use crate::config::InjectorConfig;
use crate::metrics::{Metrics, Outcome};

/// Largest review that is read, in bytes. The API server accepts no larger object.
const MAX_REVIEW_BYTES: usize = 4 * 1024 * 1024;
/// Bounds on concurrent connections. Anyone may connect, because an API server shows no certificate of ours.
const CONNECTIONS: Limits = Limits { name: "webhook connections", total: 512, per_group: 256 };
/// A review takes one part of our memory per this many bytes after the first ones.
const PART_BYTES: usize = 32 * 1024;
/// Bounds on parts: unauthenticated peers can make us hold 16 MiB in first parts and 32 MiB in all others.
const PARTS: Limits = Limits { name: "parts of large reviews", total: 1_024, per_group: 768 };
/// Longest name of an object in the log, in characters: as long as Kubernetes lets one be.
const MAX_NAME: usize = 253;
/// Longest reason in the log, in characters: it quotes what the object says.
const MAX_WHY: usize = 1_024;
/// Longest TLS handshake, request head or request body.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Age of a connection after which no further request is read. API servers would otherwise keep connections forever.
const LIFE: Duration = Duration::from_secs(600);

/// Why the webhook does not serve.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    /// Its address cannot be opened.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The listening address.
        address: SocketAddr,
        /// Error of the operating system.
        source: io::Error,
    },
}

/// A serving certificate.
#[derive(Clone)]
struct Certificate {
    tls: Arc<ServerConfig>,
    ends_at: OffsetDateTime,
}

/// The current serving certificate; none before the agent has provided one.
#[derive(Clone, Default)]
pub struct Serving(Arc<RwLock<Option<Certificate>>>);

impl Serving {
    fn get(&self) -> Option<Certificate> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, certificate: Certificate) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(certificate);
    }

    /// Why the API server would not accept our certificate; `None` if it does.
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

/// Serves until `shutdown`. Errors: the address cannot be opened.
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
    let hook = Arc::new(Hook { config, metrics, parts: Admission::new(PARTS), said: Sampled::default() });
    tasks.spawn(accept(listener, hook, serving, tasks.clone(), shutdown));
    Ok(())
}

/// Accepts connections until `shutdown`.
async fn accept(
    listener: TcpListener,
    hook: Arc<Hook>,
    serving: Serving,
    tasks: TaskTracker,
    shutdown: CancellationToken,
) {
    let mut door = Door::new(listener);
    let seats = Admission::<IpAddr>::new(CONNECTIONS);
    loop {
        let (tcp, peer) = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = door.next(|| seats.shed()) => accepted,
        };
        let Some(Certificate { tls, .. }) = serving.get() else { continue };
        let peer = peer.ip().to_canonical();
        let seat = seats.admit(peer);
        let (hook, stop) = (hook.clone(), shutdown.clone());
        tasks.spawn(async move {
            let taken_away = seat.taken_away();
            tokio::select! {
                ended = connection(hook, tls, tcp, peer, seat, stop) => if let Err(error) = ended {
                    tracing::debug!(%error, "webhook connection ended");
                },
                () = taken_away => {}
            }
        });
    }
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

/// Keeps the serving certificate equal to our SVID. A withdrawn SVID is served until it expires.
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
    peer: IpAddr,
    seat: Seat,
    shutdown: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let stream = tokio::time::timeout(TIMEOUT, TlsAcceptor::from(tls).accept(tcp)).await??;
    let seat = Arc::new(seat);
    let service = service_fn(move |request| {
        let (hook, seat) = (hook.clone(), seat.clone());
        async move { Ok::<_, Infallible>(hook.answer(request, peer, &seat).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(TIMEOUT)
        .max_buf_size(PART_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    tokio::select! {
        ended = served.as_mut() => ended?,
        () = async { tokio::select! { () = shutdown.cancelled() => {}, () = tokio::time::sleep(LIFE) => {} } } => {
            // Requests in progress are still answered.
            served.as_mut().graceful_shutdown();
            tokio::time::timeout(TIMEOUT, served).await??;
        }
    }
    Ok(())
}

/// The subject of a review, from the request's path: the API server's selectors know the labels of a pod's namespace, a
/// review does not contain them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// A pod; what its namespace requests, and whether the namespace is strict by its label.
    Pod { asks: Asks, strict: bool },
    /// A namespace that is created or changed.
    Namespace,
}

impl Asked {
    fn by(path: &str) -> Option<Self> {
        Some(match path {
            "/inject/namespace" => Self::Pod { asks: Asks::Yes, strict: false },
            "/inject/namespace/strict" => Self::Pod { asks: Asks::Yes, strict: true },
            "/inject/pod" => Self::Pod { asks: Asks::No, strict: false },
            "/inject/pod/strict" => Self::Pod { asks: Asks::No, strict: true },
            "/inject/unclear" => Self::Pod { asks: Asks::Unclear, strict: false },
            "/judge/namespace" => Self::Namespace,
            _ => return None,
        })
    }
}

struct Hook {
    config: InjectorConfig,
    metrics: Arc<Metrics>,
    /// Bounds on the memory of reviews per peer.
    parts: Admission<IpAddr>,
    /// Rate limit for log lines about reviews, by who sent them and the namespace that they name: the API server sends one for
    /// whatever a tenant asks of it, and anybody else may send one too.
    said: Sampled<(IpAddr, String)>,
}

/// Why a review was not read.
enum Unread {
    TooLarge,
    BrokenOff,
    /// There is no memory for all reviews in progress, and this peer uses the most.
    TooMany,
}

/// A request as the API server sends it; `None` if it is no review of an object in the version that we answer in.
fn request_in(body: &[u8]) -> Option<AdmissionRequest<DynamicObject>> {
    let review: AdmissionReview<DynamicObject> = serde_json::from_slice(body).ok()?;
    let known = review.types.kind == META_KIND && review.types.api_version == META_API_VERSION_V1;
    review.try_into().ok().filter(|request: &AdmissionRequest<_>| known && request.object.is_some())
}

/// A refusal with its reason, which the API server shows to whoever asked.
fn refusal(request: &AdmissionRequest<DynamicObject>, why: &str) -> AdmissionResponse {
    let mut response = AdmissionResponse::from(request).deny(why);
    response.result = Status { code: 422, ..Status::failure(why, "Invalid") };
    response
}

fn plain(status: StatusCode, text: &str) -> Response<String> {
    let mut response = Response::new(text.to_owned());
    *response.status_mut() = status;
    response
}

impl Hook {
    async fn answer(&self, request: Request<Incoming>, peer: IpAddr, seat: &Seat) -> Response<String> {
        if request.method() != Method::POST {
            return plain(StatusCode::NOT_FOUND, "POST an AdmissionReview\n");
        }
        let Some(asked) = Asked::by(request.uri().path()) else {
            return plain(StatusCode::NOT_FOUND, "there is nothing at this path: see the webhook configuration\n");
        };
        let body = match tokio::time::timeout(TIMEOUT, self.read(request.into_body(), peer)).await {
            Ok(Ok(body)) => body,
            Ok(Err(Unread::TooLarge)) => return plain(StatusCode::PAYLOAD_TOO_LARGE, "the review is too large\n"),
            Ok(Err(Unread::BrokenOff)) => return plain(StatusCode::BAD_REQUEST, "the review is broken off\n"),
            Ok(Err(Unread::TooMany)) => {
                return plain(StatusCode::TOO_MANY_REQUESTS, "too many large reviews at once\n");
            }
            Err(_) => return plain(StatusCode::REQUEST_TIMEOUT, "the review did not come in time\n"),
        };
        let _busy = seat.busy();
        // Answered and counted as malformed; the API server, which wrote it, keeps the record.
        let answer = request_in(&body).and_then(|request| self.review(&request, asked, peer));
        let Some(answer) = answer.and_then(|answer| serde_json::to_string(&answer.into_review()).ok()) else {
            self.count("malformed");
            return plain(StatusCode::BAD_REQUEST, "the body is no admission.k8s.io/v1 AdmissionReview of a pod\n");
        };
        let mut response = Response::new(answer);
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/json"));
        response
    }

    /// Reads a review within the memory bound of all reviews.
    async fn read(&self, mut body: Incoming, peer: IpAddr) -> Result<Vec<u8>, Unread> {
        let mut read = vec![];
        let mut parts: Vec<Seat> = vec![];
        loop {
            let taken_away = parts.iter().map(|part| Box::pin(part.taken_away()));
            let taken_away = async {
                match parts.len() {
                    0 => std::future::pending().await,
                    _ => drop(futures::future::select_all(taken_away).await),
                }
            };
            let frame = tokio::select! {
                frame = body.frame() => frame,
                () = taken_away => return Err(Unread::TooMany),
            };
            let Some(frame) = frame else { return Ok(read) };
            let data: Bytes = frame.map_err(|_| Unread::BrokenOff)?.into_data().unwrap_or_default();
            let length = read.len() + data.len();
            if length > MAX_REVIEW_BYTES {
                return Err(Unread::TooLarge);
            }
            while parts.len() < length / PART_BYTES {
                parts.push(self.parts.admit(peer));
            }
            read.extend_from_slice(&data);
        }
    }

    fn count(&self, outcome: &'static str) {
        self.metrics.admissions.get_or_create(&Outcome { outcome }).inc();
    }

    /// Judges one review; `None` if it cannot be answered.
    fn review(
        &self,
        request: &AdmissionRequest<DynamicObject>,
        asked: Asked,
        peer: IpAddr,
    ) -> Option<AdmissionResponse> {
        let before = serde_json::to_value(request.object.as_ref()?).ok()?;
        let old = request.old_object.as_ref().and_then(|old| serde_json::to_value(old).ok());
        let mut object = before.clone();
        let namespace = request.namespace.as_deref().unwrap_or_default();
        let name = ["name", "generateName"].iter().find_map(|k| before["metadata"][*k].as_str()).unwrap_or_default();
        let mut response = AdmissionResponse::from(request);
        let (shown_namespace, name) = (shown_up_to(namespace, MAX_NAME), shown_up_to(name, MAX_NAME));
        let say = |kind| self.said.next((peer.group(), shown_namespace.to_string()), kind, Instant::now());
        let verdict = match asked {
            Asked::Namespace => judge_namespace(&object, old.as_ref()).map(|()| {
                mark_strict(&mut object);
                None
            }),
            Asked::Pod { .. } if request.sub_resource.as_deref() == Some("ephemeralcontainers") => {
                let judged = judge_ephemeral(&object, old.as_ref()).map_err(|e| e.to_string());
                confine_ephemeral(&mut object, old.as_ref(), &self.config.sidecar.leave, namespace);
                judged.map(|()| None)
            }
            Asked::Pod { asks, strict } => {
                let mode = if strict { Mode::Strict } else { self.config.mesh_mode() };
                let around =
                    Surroundings { namespace: namespace.to_owned(), asks, mode, probe_secret: new_probe_secret() };
                inject(&mut object, &self.config.sidecar, &around).map(Some).map_err(|e| e.to_string())
            }
        };
        match verdict {
            Ok(None) => {
                self.count("kept");
                let warning = (asked == Asked::Namespace)
                    .then(|| warn_of_level(Privileges::of(&self.config.sidecar), &object, old.as_ref()));
                response.warnings = warning.flatten().map(|warning| vec![warning]);
                if object != before {
                    response = response.with_patch(json_patch::diff(&before, &object)).ok()?;
                }
            }
            Ok(Some(Verdict::Injected)) => {
                self.count("injected");
                if let Some(unsaid) = say("injected") {
                    tracing::info!(namespace = %shown_namespace, pod = %name, unsaid, "injected");
                }
                response = response.with_patch(json_patch::diff(&before, &object)).ok()?;
            }
            Ok(Some(Verdict::Left(why))) => {
                self.count("left");
                if let Some(unsaid) = say("left as it is") {
                    tracing::info!(namespace = %shown_namespace, pod = %name, why, unsaid, "left as it is");
                }
                response.warnings = Some(vec![format!("countersign: not injected: {why}")]);
            }
            Err(why) => {
                self.count("refused");
                if let Some(unsaid) = say("refused") {
                    let why = sentence(&why, MAX_WHY);
                    tracing::warn!(namespace = %shown_namespace, object = %name, %why, unsaid, "refused");
                }
                response = refusal(request, &why);
            }
        }
        Some(response)
    }
}

#[cfg(test)]
mod tests;
