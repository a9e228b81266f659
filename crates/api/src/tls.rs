//! The thin adapter between rustls and the only verifier, in `countersign-identity`.
//!
//! TLS 1.3 only; X25519MLKEM768 first, then X25519 and P-256; AES-128-GCM first; no tickets, no early data.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use countersign_identity::verify::{PeerRole, Refusal, VerifiedPeer};
use countersign_identity::{BundleSet, SpiffeId, X509Svid};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, ServerConnection,
    SignatureScheme, version,
};
use time::OffsetDateTime;

use crate::verified::VerifiedChains;

/// Why a TLS configuration could not be built.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls rejected the key or the settings.
    #[error("cannot set up TLS: {0}")]
    Rustls(#[from] rustls::Error),
}

/// Decides whether a peer with a valid chain is accepted.
pub type Authorize = dyn Fn(&VerifiedPeer) -> Result<(), Refusal> + Send + Sync;

/// Returns the current bundles.
pub type Bundles = dyn Fn() -> Arc<BundleSet> + Send + Sync;

/// Our algorithms: key exchange groups and cipher suites in order of preference.
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups =
        vec![aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519, aws_lc_rs::kx_group::SECP256R1];
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider.into()
}

/// Verifies peers by their SVID, as clients and as servers.
pub struct SvidVerifier {
    trust: Trust,
    authorize: Box<Authorize>,
    client_must_authenticate: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

/// The bundles that a verifier trusts.
enum Trust {
    /// The current bundles at each call, with the chains that were verified under the last ones.
    Moving(Box<Bundles>, Mutex<Arc<VerifiedChains>>),
    /// One revision of the bundles, with the chains that were verified under it.
    Fixed(Arc<VerifiedChains>),
}

impl SvidVerifier {
    /// A verifier for one revision of the bundles that caches verified chains.
    pub fn remembering(
        chains: Arc<VerifiedChains>,
        authorize: impl Fn(&VerifiedPeer) -> Result<(), Refusal> + Send + Sync + 'static,
    ) -> Self {
        Self::with(Trust::Fixed(chains), authorize)
    }

    fn with(trust: Trust, authorize: impl Fn(&VerifiedPeer) -> Result<(), Refusal> + Send + Sync + 'static) -> Self {
        Self {
            trust,
            authorize: Box::new(authorize),
            client_must_authenticate: true,
            algorithms: aws_lc_rs::default_provider().signature_verification_algorithms,
        }
    }

    /// A verifier that takes the current bundles from `bundles` and asks `authorize` about each peer with a valid
    /// chain.
    pub fn new(
        bundles: impl Fn() -> Arc<BundleSet> + Send + Sync + 'static,
        authorize: impl Fn(&VerifiedPeer) -> Result<(), Refusal> + Send + Sync + 'static,
    ) -> Self {
        let chains = Mutex::new(Arc::new(VerifiedChains::new(bundles())));
        Self::with(Trust::Moving(Box::new(bundles), chains), authorize)
    }

    /// Accepts clients without a certificate, such as agents before attestation. A certificate that is sent must still
    /// be valid.
    #[must_use]
    pub fn client_may_be_anonymous(mut self) -> Self {
        self.client_must_authenticate = false;
        self
    }

    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
        role: PeerRole,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<_> = std::iter::once(leaf.clone()).chain(rest.iter().cloned()).collect();
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let now = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        self.check(&chain, now, role).map(drop).map_err(refused)
    }

    /// The peer that a chain proves, if the chain is valid and `authorize` accepts it.
    fn check(
        &self,
        chain: &[CertificateDer<'_>],
        now: OffsetDateTime,
        role: PeerRole,
    ) -> Result<Arc<VerifiedPeer>, Refusal> {
        let peer = self.chains().verify(chain, now, role)?;
        (self.authorize)(&peer)?;
        Ok(peer)
    }

    /// The bundles to verify against now, with the chains that were verified under them.
    fn chains(&self) -> Arc<VerifiedChains> {
        let (bundles, last) = match &self.trust {
            Trust::Fixed(chains) => return chains.clone(),
            Trust::Moving(bundles, last) => (bundles(), last),
        };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        // Chains that were verified under other bundles prove nothing under these.
        if *last.bundles() != bundles {
            *last = Arc::new(VerifiedChains::new(bundles));
        }
        last.clone()
    }
}

impl fmt::Debug for SvidVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SvidVerifier")
    }
}

/// Wraps a refusal in an error that rustls passes on; [`refusal_of`] unwraps it.
fn refused(refusal: Refusal) -> rustls::Error {
    rustls::Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(refusal))))
}

/// The refusal inside a handshake error; `None` if the error is not our verifier's.
pub fn refusal_of(error: &rustls::Error) -> Option<Refusal> {
    match error {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
            other.0.downcast_ref::<Refusal>().cloned()
        }
        rustls::Error::NoCertificatesPresented => Some(Refusal::NoCertificate),
        _ => None,
    }
}

/// Replaces a handshake error by our verifier's reason, if it has one.
pub fn explain(error: std::io::Error) -> std::io::Error {
    let refusal = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()).and_then(refusal_of);
    refusal.map_or(error, |refusal| std::io::Error::new(std::io::ErrorKind::PermissionDenied, refusal))
}

const NO_TLS12: rustls::Error = rustls::Error::PeerIncompatible(rustls::PeerIncompatible::Tls13RequiredForQuic);

impl ServerCertVerifier for SvidVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, PeerRole::Server).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NO_TLS12)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for SvidVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.client_must_authenticate
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, PeerRole::Client).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(NO_TLS12)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// An SVID in the form that rustls signs with. Errors: rustls does not support the key.
pub fn certified_key(svid: &X509Svid) -> Result<Arc<CertifiedKey>, TlsError> {
    let key = aws_lc_rs::sign::any_supported_type(&PrivatePkcs8KeyDer::from(svid.key().as_pkcs8()).into())?;
    Ok(Arc::new(CertifiedKey::new(svid.chain().to_vec(), key)))
}

#[derive(Debug)]
struct OneKey(Arc<CertifiedKey>);

impl rustls::server::ResolvesServerCert for OneKey {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl rustls::client::ResolvesClientCert for OneKey {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A server configuration that presents `own` and verifies clients with `verifier`.
pub fn server_config(own: Arc<CertifiedKey>, verifier: SvidVerifier, alpn: &[&[u8]]) -> Result<ServerConfig, TlsError> {
    server_config_with(own, Arc::new(verifier), alpn)
}

fn server_config_with(
    own: Arc<CertifiedKey>,
    verifier: Arc<SvidVerifier>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(OneKey(own)));
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    // No resumption: a resumed session would skip the verifier, and with it any revocation since the first handshake.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

/// A server configuration that presents `own` and asks clients for no certificate. Errors: rustls rejects the key.
pub fn public_server_config(own: Arc<CertifiedKey>, alpn: &[&[u8]]) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(OneKey(own)));
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

/// A server configuration together with its verifier, for listeners that need the peer after the handshake.
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verifier: Arc<SvidVerifier>,
}

impl ServerTls {
    /// A configuration as of [`server_config`], with its verifier. Errors: rustls rejects the key.
    pub fn new(own: Arc<CertifiedKey>, verifier: SvidVerifier, alpn: &[&[u8]]) -> Result<Self, TlsError> {
        let verifier = Arc::new(verifier);
        Ok(Self { config: Arc::new(server_config_with(own, verifier.clone(), alpn)?), verifier })
    }

    /// The rustls configuration, to be used per connection.
    pub fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }

    /// The peer that the certificate of a finished handshake proves; `None` if the client sent no certificate.
    ///
    /// Comes from the verified path. If the bundles have changed since the handshake, the chain is verified again, and
    /// a peer that is no longer trusted is rejected; it never becomes anonymous.
    pub fn peer(
        &self,
        connection: &ServerConnection,
        now: OffsetDateTime,
    ) -> Result<Option<Arc<VerifiedPeer>>, Refusal> {
        let shown = connection.peer_certificates().filter(|chain| !chain.is_empty());
        shown.map(|chain| self.verifier.check(chain, now, PeerRole::Client)).transpose()
    }
}

/// A client configuration that presents `own`, if given, and verifies the server with `verifier`.
pub fn client_config(
    own: Option<Arc<CertifiedKey>>,
    verifier: SvidVerifier,
    alpn: &[&[u8]],
) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match own {
        Some(own) => builder.with_client_cert_resolver(Arc::new(OneKey(own))),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// A client configuration that verifies the server as the web does: by a certificate for its name under one of `roots`. TLS 1.2 is
/// spoken too, for such servers are not ours.
pub fn web_client_config(roots: RootCertStore, alpn: &[&[u8]]) -> Result<ClientConfig, TlsError> {
    let mut config = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
        .with_protocol_versions(&[&version::TLS13, &version::TLS12])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// An authorization that accepts exactly one SPIFFE ID.
pub fn only(expected: SpiffeId) -> impl Fn(&VerifiedPeer) -> Result<(), Refusal> + Send + Sync {
    move |peer| {
        if peer.id == expected {
            Ok(())
        } else {
            Err(Refusal::WrongIdentity { expected: format!("`{expected}`"), found: peer.id.clone() })
        }
    }
}
