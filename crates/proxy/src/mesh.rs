//! Both ends of a mesh connection: mTLS with the expected identity, then the preamble.

use std::sync::Arc;

use countersign_identity::verify::{Refusal, VerifiedPeer};
use rustls::pki_types::ServerName;
use rustls::{CipherSuite, CommonState, NamedGroup};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::config::Timeouts;
use crate::identity::Identity;
use crate::preamble::{ALPN, Answer, Request};
use crate::refusal::Refused;
use crate::tls::{self, ClientStream, ServerStream};

/// The authenticated other end, from its verified certificate.
#[derive(Debug, Clone)]
pub struct Peer {
    /// SPIFFE ID, authority and facts of its verified chain.
    pub svid: Arc<VerifiedPeer>,
    /// TLS version and key exchange group, for the access log.
    pub tls: &'static str,
    /// Cipher suite by its RFC 8446 name; empty if unknown.
    pub cipher: &'static str,
}

impl Peer {
    /// Reads a handshake that the verifier has accepted.
    fn of(state: &CommonState, identity: &Identity) -> Result<Self, Refused> {
        let chain = state.peer_certificates().unwrap_or_default();
        // Taken from the verifier's own result for this chain: nothing is read from certificates that it did not
        // accept.
        let svid = identity.chains().recall(chain).ok_or(Refusal::NoCertificate)?;
        let tls = match state.negotiated_key_exchange_group().map(rustls::crypto::SupportedKxGroup::name) {
            Some(NamedGroup::X25519MLKEM768) => "TLSv1.3 X25519MLKEM768",
            Some(NamedGroup::X25519) => "TLSv1.3 X25519",
            Some(NamedGroup::secp256r1) => "TLSv1.3 P-256",
            _ => "TLSv1.3",
        };
        // By their names in RFC 8446 B.4.
        let cipher = match state.negotiated_cipher_suite().map(|s| s.suite()) {
            Some(CipherSuite::TLS13_AES_128_GCM_SHA256) => "TLS_AES_128_GCM_SHA256",
            Some(CipherSuite::TLS13_AES_256_GCM_SHA384) => "TLS_AES_256_GCM_SHA384",
            Some(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) => "TLS_CHACHA20_POLY1305_SHA256",
            _ => "",
        };
        Ok(Self { svid, tls, cipher })
    }
}

fn check_protocol(state: &CommonState) -> Result<(), Refused> {
    // rustls accepts a peer without ALPN. Bytes of another protocol must not be read as a preamble.
    if state.alpn_protocol() == Some(ALPN) { Ok(()) } else { Err(Refused::Protocol) }
}

/// Opens the client side: handshake with one of the `expected` IDs, then `request` and the app's first bytes, `early`.
/// `proven` is called with the peer right after the handshake, before anything of the app is sent.
pub async fn dial<'a>(
    tcp: TcpStream,
    identity: &Identity,
    proven: impl FnOnce(&VerifiedPeer) -> Result<(), Refused>,
    expected: &std::collections::BTreeSet<String>,
    request: &Request,
    early: impl FnOnce() -> Result<&'a [u8], Refused>,
    timeouts: &Timeouts,
) -> Result<(ClientStream, Peer), Refused> {
    let config = identity.client(expected).map_err(|e| Refused::Tls(e.to_string()))?;
    // The server name is neither sent nor checked: identity is the SPIFFE ID alone.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let handshake = tls::connect(config, name, tcp);
    let mut tls = match tokio::time::timeout(timeouts.handshake, handshake).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(e)) => return Err(Refused::of_handshake(&e)),
        Err(_) => return Err(Refused::HandshakeTimeout(timeouts.handshake)),
    };
    check_protocol(tls.state())?;
    let peer = Peer::of(tls.state(), identity)?;
    proven(&peer.svid)?;
    let mut first = request.encode();
    first.extend_from_slice(early()?);
    let talk = async {
        tls.write_all(&first).await?;
        tls.flush().await?;
        Answer::read(&mut tls).await
    };
    match tokio::time::timeout(timeouts.preamble, talk).await {
        Ok(Ok(Answer::Accepted)) => Ok((tls, peer)),
        Ok(Ok(Answer::Refused { code, text })) => Err(Refused::ByPeer { code, text }),
        // A server that rejects our certificate sends its alert after our side of the handshake has finished.
        Ok(Err(e)) => Err(Refused::of_handshake(&e)),
        Err(_) => Err(Refused::Preamble(format!("no answer within {:?}", timeouts.preamble))),
    }
}

/// Accepts the server side: handshake, then the caller's request. `proven` is called with the peer right after the
/// handshake, because the preamble may take seconds.
pub async fn accept(
    tcp: TcpStream,
    identity: &Arc<Identity>,
    proven: impl FnOnce(&VerifiedPeer) -> Result<(), Refused>,
    timeouts: &Timeouts,
) -> Result<(ServerStream, Peer, Request), (Refused, Option<Peer>)> {
    let handshake = tls::accept(identity.server(), tcp);
    let mut tls = match tokio::time::timeout(timeouts.handshake, handshake).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(e)) => return Err((Refused::of_handshake(&e), None)),
        Err(_) => return Err((Refused::HandshakeTimeout(timeouts.handshake), None)),
    };
    check_protocol(tls.state()).map_err(|e| (e, None))?;
    let peer = Peer::of(tls.state(), identity).map_err(|e| (e, None))?;
    if let Err(refused) = proven(&peer.svid) {
        return Err((refused, Some(peer)));
    }
    match tokio::time::timeout(timeouts.preamble, Request::read(&mut tls)).await {
        Ok(Ok(request)) => Ok((tls, peer, request)),
        Ok(Err(e)) => Err((Refused::Preamble(e.to_string()), Some(peer))),
        Err(_) => Err((Refused::Preamble(format!("not there within {:?}", timeouts.preamble)), Some(peer))),
    }
}

/// Sends the caller the reason, and waits up to a second so that it is read before the connection closes.
pub async fn refuse(tls: &mut ServerStream, refused: &Refused) {
    let answer = Answer::Refused { code: refused.code().to_owned(), text: refused.to_string() };
    let say = async {
        tls.write_all(&answer.encode()).await?;
        tls.shutdown().await?;
        // A socket that is closed with unread data resets, and a reset may overtake the answer. The room is on the heap, where
        // it is no part of each connection's future.
        let mut rest = vec![0; 4096];
        while tokio::io::AsyncReadExt::read(tls, &mut rest).await? != 0 {}
        std::io::Result::Ok(())
    };
    // A peer that does not hear why learns it from its own side of the handshake, or from our log.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), say).await;
}
