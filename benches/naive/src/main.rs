//! The simplest sidecar pair: tokio-rustls, `read` / `write_all` / `flush` over 16 KiB buffers. The race measures it to show what the
//! effort in `crates/proxy` buys. It verifies chains against one CA and no identity: not for use.
//!
//! `naive-pair a|b LISTEN_IP LISTEN_PORT TARGET_IP TARGET_PORT PKIDIR`

use std::error::Error;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme, version};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Verifies the chain and no name: SPIFFE leaves have no DNS name.
#[derive(Debug)]
struct ChainOnly(CertificateDer<'static>);

impl ServerCertVerifier for ChainOnly {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let wrong = |e: webpki::Error| rustls::Error::General(e.to_string());
        let anchor = webpki::anchor_from_trusted_cert(&self.0).map_err(wrong)?;
        let usage = webpki::KeyUsage::server_auth();
        webpki::EndEntityCert::try_from(leaf)
            .and_then(|c| {
                c.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &[anchor], rest, now, usage, None, None).map(|_| ())
            })
            .map_err(wrong)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &aws_lc_rs::default_provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &aws_lc_rs::default_provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

async fn one_way(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..n]).await?;
        to.flush().await?;
    }
}

async fn carry(one: impl AsyncRead + AsyncWrite, other: impl AsyncRead + AsyncWrite) {
    let ((from_one, to_one), (from_other, to_other)) = (split(one), split(other));
    let _ = tokio::join!(one_way(from_one, to_other), one_way(from_other, to_one));
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [side, listen, port, target, target_port, pki] = &args[..] else {
        return Err("naive-pair a|b LISTEN_IP LISTEN_PORT TARGET_IP TARGET_PORT PKIDIR".into());
    };
    let chain = vec![CertificateDer::from_pem_file(format!("{pki}/{side}.crt"))?];
    let key = PrivateKeyDer::from_pem_file(format!("{pki}/{side}.key"))?;
    let root = CertificateDer::from_pem_file(format!("{pki}/ca.crt"))?;
    let listener = TcpListener::bind(format!("{listen}:{port}")).await?;
    let target = format!("{target}:{target_port}");
    let tls13 = &[&version::TLS13];
    let provider = Arc::new(aws_lc_rs::default_provider());
    if side == "a" {
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(tls13)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ChainOnly(root)))
            .with_client_auth_cert(chain, key)?;
        config.resumption = rustls::client::Resumption::disabled();
        let connector = TlsConnector::from(Arc::new(config));
        loop {
            let (app, _) = listener.accept().await?;
            let (connector, target) = (connector.clone(), target.clone());
            tokio::spawn(async move {
                let _ = app.set_nodelay(true);
                let Ok(tcp) = TcpStream::connect(target).await else { return };
                let _ = tcp.set_nodelay(true);
                let Ok(tls) = connector.connect("peer.invalid".try_into().expect("a good name"), tcp).await else {
                    return;
                };
                carry(app, tls).await;
            });
        }
    }
    let mut roots = RootCertStore::empty();
    roots.add(root)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(tls13)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.send_tls13_tickets = 0;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    loop {
        let (tcp, _) = listener.accept().await?;
        let (acceptor, target) = (acceptor.clone(), target.clone());
        tokio::spawn(async move {
            let _ = tcp.set_nodelay(true);
            let Ok(tls) = acceptor.accept(tcp).await else { return };
            let Ok(app) = TcpStream::connect(target).await else { return };
            let _ = app.set_nodelay(true);
            carry(tls, app).await;
        });
    }
}
