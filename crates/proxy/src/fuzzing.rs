//! Entry points for the fuzz targets in `fuzz/`, built with `--cfg fuzzing` only.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)] // a fuzz target that cannot set its scene has to stop

use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Waker};

use countersign_api::tls::provider;
use countersign_identity::BundleSet;
use rustls::ServerConfig;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::ConnectionState;

use crate::preamble::{Answer, Request};

/// Polls a future that reads from memory and therefore never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    let mut context = Context::from_waker(Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("memory does not wait"),
    }
}

/// Parses the input as a request and as an answer.
pub fn preamble(data: &[u8]) {
    let mut rest = data;
    if let Ok(request) = now(Request::read(&mut rest)) {
        let again = request.encode();
        assert_eq!(now(Request::read(&mut &again[..])).unwrap(), request);
        assert!(!request.workload.chars().any(char::is_control), "a UID with control characters: {request:?}");
    }
    if let Ok(answer @ Answer::Refused { .. }) = now(Answer::read(&mut &data[..])) {
        let Answer::Refused { code, text } = &answer else { return };
        assert!(!code.chars().chain(text.chars()).any(char::is_control), "{answer:?}");
    }
}

static CONFIG: LazyLock<Arc<ServerConfig>> = LazyLock::new(|| {
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec![]).unwrap().self_signed(&key).unwrap();
    let verifier = countersign_api::tls::SvidVerifier::new(|| Arc::new(BundleSet::default()), |_| Ok(()));
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(vec![cert.der().clone()], key.into())
        .unwrap();
    Arc::new(config)
});

/// Feeds the input to a server's TLS engine; the first byte is the length of the pieces.
pub fn handshake(data: &[u8]) {
    let Some((piece, data)) = data.split_first() else { return };
    let mut engine = UnbufferedServerConnection::new(CONFIG.clone()).unwrap();
    let mut incoming = vec![];
    let mut out = vec![0; 32 * 1024];
    for bytes in data.chunks(usize::from(*piece).max(1)) {
        incoming.extend_from_slice(bytes);
        loop {
            let status = engine.process_tls_records(&mut incoming);
            let discard = status.discard;
            let go_on = match status.state {
                Err(_) => return,
                Ok(ConnectionState::EncodeTlsData(mut data)) => data.encode(&mut out).is_ok(),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    true
                }
                Ok(ConnectionState::WriteTraffic(_)) => unreachable!("nobody has proven anything"),
                Ok(_) => false,
            };
            incoming.drain(..discard);
            if !go_on {
                break;
            }
        }
    }
}
