//! Both ends of a mesh connection: mTLS with the identity that is expected, then the preamble.

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

/// Who is on the other end, as its verified certificate says.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Identity, and what its certificate says.
    pub svid: Arc<VerifiedPeer>,
    /// TLS version and key exchange.
    pub tls: &'static str,
    /// Cipher suite.
    pub cipher: &'static str,
}

impl Peer {
    /// Reads a handshake that the verifier has passed.
    fn of(state: &CommonState, identity: &Identity) -> Result<Self, Refused> {
        let chain = state.peer_certificates().unwrap_or_default();
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
    if state.alpn_protocol() == Some(ALPN) { Ok(()) } else { Err(Refused::Protocol) }
}

/// Dials another sidecar and says where the connection is going. `early` goes with it. `proven` hears of the peer as soon
/// as the handshake has ended, before anything of the app is sent.
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
    // The name is never sent nor checked: identity is the SPIFFE ID alone.
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
        // A server that refuses our certificate says so with an alert, after our side of the handshake is over.
        Ok(Err(e)) => Err(Refused::of_handshake(&e)),
        Err(_) => Err(Refused::Preamble(format!("no answer within {:?}", timeouts.preamble))),
    }
}

/// Takes a connection from another sidecar and reads where it is going. `proven` hears of the peer as soon as the handshake
/// has ended: the preamble may be seconds away.
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

/// Tells the caller why, and lets it hear that before the connection goes.
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
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), say).await;
}
