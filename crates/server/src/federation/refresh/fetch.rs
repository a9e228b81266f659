//! One fetch of a foreign bundle: TLS by the relationship's profile, a GET, redirects, the document.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::http_client::{self, ClientError};
use countersign_api::tls::{SvidVerifier, TlsError, client_config, only, web_client_config};
use countersign_api::tls_connect::{ConnectError, TlsStream, connect_tls, web_roots};
use countersign_identity::bundle_document::{self, DocumentError};
use countersign_identity::{BundleSet, SpiffeId, TrustBundle, TrustDomain};
use rustls::ClientConfig;
use tonic::codegen::http::StatusCode;

use crate::federation::relationship::{EndpointUrl, UrlError};

/// Longest fetch, redirects included.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// Longest document, in bytes: a hundred authorities, and still as many trust domains' bundles as an entry may name fit into a message.
const MAX_DOCUMENT_BYTES: usize = 256 * 1024;
/// Most redirects that are followed.
const MAX_REDIRECTS: usize = 5;

/// How an endpoint proves who it is, with all that is needed to judge it.
pub enum Proof {
    /// By a certificate for its name, under the roots of this machine.
    Web,
    /// By an SVID of this ID, under this bundle of its trust domain.
    Svid(SpiffeId, Arc<TrustBundle>),
}

/// Why no bundle was fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// There is no connection to the endpoint, or it has not proved who it is.
    #[error("{server}: {source}{hint}")]
    Connect {
        /// Host and port.
        server: String,
        /// Why not.
        source: ConnectError,
        /// What may be done about it.
        hint: &'static str,
    },
    /// This machine names no certificate authority.
    #[error(
        "https_web needs certificate authorities, and this machine has none ({0}): install the package ca-certificates, \
         or name a PEM file with them in the server's environment (SSL_CERT_FILE)"
    )]
    Roots(String),
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The endpoint's answer cannot be read.
    #[error("{server}: {source}")]
    Http {
        /// Host and port.
        server: String,
        /// Why not.
        source: ClientError,
    },
    /// The endpoint answers with another status than 200.
    #[error("{server} answers {status}, and a bundle endpoint answers 200")]
    Status {
        /// Host and port.
        server: String,
        /// What it answers.
        status: StatusCode,
    },
    /// A redirect without a place.
    #[error("{0} redirects to nowhere")]
    Nowhere(String),
    /// A redirect to what is no bundle endpoint.
    #[error("{server} redirects: {source}")]
    Redirect {
        /// Host and port.
        server: String,
        /// Why that is none.
        source: UrlError,
    },
    /// Redirects without an end.
    #[error("more than {MAX_REDIRECTS} redirects")]
    Redirects,
    /// What was fetched is no bundle.
    #[error("{server}: {source}")]
    Document {
        /// Host and port.
        server: String,
        /// Why not.
        source: DocumentError,
    },
    /// It took too long.
    #[error("no whole answer within {DEADLINE:?}")]
    Late,
}

/// Fetches the bundle of a trust domain. Each server on the way proves itself in the same manner.
pub async fn fetch(trust_domain: &TrustDomain, url: &EndpointUrl, proof: &Proof) -> Result<TrustBundle, FetchError> {
    let fetched = tokio::time::timeout(DEADLINE, fetch_document(url, proof)).await;
    let (server, document) = fetched.map_err(|_| FetchError::Late)??;
    bundle_document::read(trust_domain.clone(), &document).map_err(|source| FetchError::Document { server, source })
}

/// The document, and the server that it came from.
async fn fetch_document(url: &EndpointUrl, proof: &Proof) -> Result<(String, Vec<u8>), FetchError> {
    let config = Arc::new(client_tls(proof).await?);
    let mut url = url.clone();
    for _ in 0..=MAX_REDIRECTS {
        let server = url.server();
        let http = |source| FetchError::Http { server: server.clone(), source };
        let stream = connect(&url, &config, proof).await?;
        let answered = http_client::ask(stream, &url.authority(), url.path()).await.map_err(http)?;
        if answered.status == StatusCode::OK {
            let body = answered.whole(MAX_DOCUMENT_BYTES).await.map_err(http)?.body;
            return Ok((server, body.into()));
        }
        if !is_redirect(answered.status) {
            return Err(FetchError::Status { server, status: answered.status });
        }
        let location = answered.location.ok_or_else(|| FetchError::Nowhere(server.clone()))?;
        url = url.redirected(&location).map_err(|source| FetchError::Redirect { server, source })?;
    }
    Err(FetchError::Redirects)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

async fn connect(url: &EndpointUrl, config: &Arc<ClientConfig>, proof: &Proof) -> Result<TlsStream, FetchError> {
    let server = url.server();
    connect_tls(&server, url.host(), config.clone()).await.map_err(|source| {
        // A certificate that no authority of the web has signed is most often an SVID.
        let hint = if matches!(proof, Proof::Web) && source.is_certificate() {
            " (a SPIFFE server's endpoint has an SVID: such a relationship needs the profile https_spiffe)"
        } else {
            ""
        };
        FetchError::Connect { server, source, hint }
    })
}

async fn client_tls(proof: &Proof) -> Result<ClientConfig, FetchError> {
    const ALPN: &[&[u8]] = &[b"http/1.1"];
    match proof {
        Proof::Web => Ok(web_client_config(web_roots().await.map_err(FetchError::Roots)?, ALPN)?),
        Proof::Svid(id, bundle) => {
            let mut trusted = BundleSet::default();
            trusted.share(bundle.clone());
            let trusted = Arc::new(trusted);
            let verifier = SvidVerifier::new(move || trusted.clone(), only(id.clone()));
            let mut config = client_config(None, verifier, ALPN)?;
            // What stands before an endpoint may choose by the name.
            config.enable_sni = true;
            Ok(config)
        }
    }
}
