//! The kubelet's health checks, run against the app from inside: in strict mode nothing else may reach the app in
//! plaintext.
//!
//! The kubelet requests `/probe/SECRET/CONTAINER/KIND` from the sidecar. Only checks that the injector configured exist, and
//! only the app's own address is called. The secret is in the pod's specification: who cannot read that cannot ask.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use countersign_api::http::Answer;
use countersign_api::http_client;
use http_body_util::Empty;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::config::{Probe, ProbeKind};

/// Path prefix of the health checks.
pub const PREFIX: &str = "/probe/";

/// Runs the configured health checks.
pub struct Prober {
    probes: BTreeMap<String, Probe>,
    /// TLS configuration, created by the first HTTPS check; holds `None` if that failed.
    tls: std::sync::OnceLock<Option<Arc<ClientConfig>>>,
}

impl Prober {
    /// Runs these health checks and no others.
    pub fn new(probes: BTreeMap<String, Probe>) -> Self {
        Self { probes, tls: std::sync::OnceLock::new() }
    }

    /// Runs the check `CONTAINER/KIND` at the app's address: 200 if healthy, 503 with the reason if not; `None` if
    /// there is no such check.
    pub async fn ask(&self, name: &str, app: IpAddr) -> Option<Answer> {
        let probe = self.probes.get(name)?;
        let to = SocketAddr::new(app, probe.port);
        let asked = tokio::time::timeout(probe.timeout, self.run(&probe.kind, to)).await;
        let asked = asked.unwrap_or_else(|_| Err(format!("no answer within {:?}", probe.timeout)));
        Some(match asked {
            Ok(said) => Answer::text(200, format!("{said}\n")),
            Err(why) => Answer::text(503, format!("the app at {to}: {why}\n")),
        })
    }

    async fn run(&self, kind: &ProbeKind, to: SocketAddr) -> Result<String, String> {
        let tcp = TcpStream::connect(to).await.map_err(|e| e.to_string())?;
        match kind {
            ProbeKind::Tcp => Ok("connected".to_owned()),
            ProbeKind::Http { tls: false, path, headers } => get(tcp, to, path, headers).await,
            ProbeKind::Http { tls: true, path, headers } => {
                let config = self.tls.get_or_init(|| believing_anybody().ok()).clone();
                let config = config.ok_or("TLS cannot be set up")?;
                let stream = TlsConnector::from(config).connect(ServerName::IpAddress(to.ip().into()), tcp).await;
                get(stream.map_err(|e| e.to_string())?, to, path, headers).await
            }
            ProbeKind::Grpc { service } => {
                drop(tcp);
                let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{to}"));
                let channel = endpoint.map_err(|e| e.to_string())?.connect().await.map_err(|e| e.to_string())?;
                let request = HealthCheckRequest { service: service.clone() };
                let answer = HealthClient::new(channel).check(request).await.map_err(|e| e.message().to_owned())?;
                match answer.into_inner().status() {
                    ServingStatus::Serving => Ok("SERVING".to_owned()),
                    other => Err(other.as_str_name().to_owned()),
                }
            }
        }
    }
}

/// An HTTP GET. Healthy is status 200 to 399, as for the kubelet.
async fn get<S>(stream: S, to: SocketAddr, path: &str, headers: &[(String, String)]) -> Result<String, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut request = http::Request::get(path);
    let named = |name: &str| headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if !named("host") {
        request = request.header("host", to.to_string());
    }
    if !named("user-agent") {
        request = request.header("user-agent", "kube-probe/countersign");
    }
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let request = request.body(Empty::new()).map_err(|e| e.to_string())?;
    let status = http_client::send(stream, request).await.map_err(|e| e.to_string())?.status;
    if (200..400).contains(&status.as_u16()) { Ok(status.to_string()) } else { Err(status.to_string()) }
}

/// A client configuration that accepts any certificate. The kubelet does not verify one either: a health check asks
/// whether the app answers, not who it is.
fn believing_anybody() -> io::Result<Arc<ClientConfig>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn prober(port: u16, kind: ProbeKind) -> Prober {
        let probe = Probe { port, kind, timeout: Duration::from_millis(500) };
        Prober::new([("app/ready".to_owned(), probe)].into())
    }

    async fn status(prober: &Prober) -> u16 {
        prober.ask("app/ready", IpAddr::from([127, 0, 0, 1])).await.unwrap().status
    }

    /// Answers each connection with `reply`, and passes on the request it received.
    async fn app(reply: &'static str) -> (u16, tokio::sync::mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (tx, rx) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let n = stream.read(&mut request).await.unwrap_or(0);
                let _ = tx.send(String::from_utf8_lossy(&request[..n]).into_owned());
                let _ = stream.write_all(reply.as_bytes()).await;
            }
        });
        (port, rx)
    }

    fn http(path: &str, headers: &[(&str, &str)]) -> ProbeKind {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        ProbeKind::Http { tls: false, path: path.into(), headers }
    }

    #[tokio::test]
    async fn an_http_probe_is_asked_as_it_was_written_and_judged_by_its_status() {
        let (port, mut asked) = app("HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(status(&prober(port, http("/health?deep=1", &[("Host", "shop"), ("X-Probe", "yes")]))).await, 200);
        let request = asked.recv().await.unwrap().to_lowercase();
        assert!(request.starts_with("get /health?deep=1 http/1.1"), "{request}");
        assert!(request.contains("host: shop") && request.contains("x-probe: yes"), "{request}");
        let (port, _asked) = app("HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n").await;
        assert_eq!(status(&prober(port, http("/", &[]))).await, 503);
        let (port, _asked) = app("").await;
        assert_eq!(status(&prober(port, http("/", &[]))).await, 503, "an app that says nothing");
    }

    #[tokio::test]
    async fn a_tcp_probe_needs_a_listener_and_only_known_probes_are_asked() {
        let (port, _asked) = app("").await;
        assert_eq!(status(&prober(port, ProbeKind::Tcp)).await, 200);
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        assert_eq!(status(&prober(closed, ProbeKind::Tcp)).await, 503);
        assert!(prober(port, ProbeKind::Tcp).ask("other/ready", IpAddr::from([127, 0, 0, 1])).await.is_none());
    }

    #[tokio::test]
    async fn a_grpc_probe_wants_serving() {
        let (reporter, service) = tonic_health::server::health_reporter();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        let probe = |service: &str| prober(port, ProbeKind::Grpc { service: service.into() });
        reporter.set_service_status("db", tonic_health::ServingStatus::NotServing).await;
        assert_eq!(status(&probe("db")).await, 503);
        reporter.set_service_status("db", tonic_health::ServingStatus::Serving).await;
        assert_eq!(status(&probe("db")).await, 200);
        assert_eq!(status(&probe("unknown")).await, 503);
    }

    #[tokio::test]
    async fn an_https_probe_takes_any_certificate() {
        let key = rcgen::generate_simple_self_signed(vec!["x".into()]).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], key.signing_key.serialize_der().try_into().unwrap())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (tcp, _) = listener.accept().await.unwrap();
            let mut tls = acceptor.accept(tcp).await.unwrap();
            let _ = tls.read(&mut [0; 1024]).await;
            tls.write_all(b"HTTP/1.1 204 No\r\n\r\n").await.unwrap();
        });
        let kind = ProbeKind::Http { tls: true, path: "/".into(), headers: vec![] };
        assert_eq!(status(&prober(port, kind)).await, 200);
    }
}
