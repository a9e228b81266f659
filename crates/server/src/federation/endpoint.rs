//! The bundle endpoint: serves our trust bundle as a document over https (SPIFFE Federation 5).

use std::net::SocketAddr;
use std::sync::Arc;

use countersign_api::http::{self, Answer};
use countersign_identity::bundle_document;
use rustls::ServerConfig;
use tokio::net::TcpListener;

use super::serving_certificate::ServingCertificate;
use crate::ServerError;
use crate::config::{BundleEndpoint, EndpointAuthentication};
use crate::core::Core;
use crate::own_svid::OwnSvid;

/// An endpoint that listens and is not served yet.
pub struct Listening {
    listener: TcpListener,
    certificate: Option<Arc<ServingCertificate>>,
}

impl Listening {
    /// Listens, and reads the files of the certificate.
    pub async fn new(config: &BundleEndpoint) -> Result<Self, ServerError> {
        let certificate = match &config.authentication {
            EndpointAuthentication::HttpsSpiffe => None,
            EndpointAuthentication::HttpsWeb(files) => Some(Arc::new(ServingCertificate::load(files.clone())?)),
        };
        let listener = TcpListener::bind(config.bind).await.map_err(crate::io("listen on", config.bind))?;
        Ok(Self { listener, certificate })
    }

    /// Where it listens.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until the server ends.
    pub fn serve(self, core: &Arc<Core>, own: &Arc<OwnSvid>) {
        let (pages, shutdown) = (pages(core.clone()), core.shutdown.clone());
        match self.certificate {
            None => {
                let own = own.clone();
                let config = move || own.public_tls();
                core.tasks.spawn(http::serve_tls(self.listener, config, pages, shutdown));
            }
            Some(certificate) => {
                core.tasks.spawn(certificate.clone().follow(shutdown.clone()));
                let config = move || -> Arc<ServerConfig> { certificate.tls() };
                core.tasks.spawn(http::serve_tls(self.listener, config, pages, shutdown));
            }
        }
    }
}

fn pages(core: Arc<Core>) -> Arc<http::Handler> {
    http::pages(move |path| {
        (path == "/").then(|| Answer::json(bundle_document::write(&core.authorities.bundle().borrow())))
    })
}
