//! Both ends of a mesh connection: mTLS with the identity that is expected, then the preamble.


use std::sync::Arc;

use countersign_identity::SpiffeId;
use countersign_identity::bundle::authority_key_id;
use countersign_identity::svid::LeafFacts;
use countersign_identity::verify::leaf_id;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::CommonState;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::Timeouts;
use crate::identity::Identity;
use crate::preamble::{ALPN, Answer, Request};
use crate::refusal::Refused;

/// Who is on the other end, as its verified certificate says.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Identity.
    pub id: SpiffeId,
    /// Serial, validity, issuer.
    pub facts: LeafFacts,
    /// The authority at the top of its chain, below or at the trust root.
    pub authority: String,
    /// TLS version and key exchange.
    pub tls: String,
}

impl Peer {
    /// Reads a handshake that the verifier has passed.
    fn of(state: &CommonState) -> Result<Self, Refused> {
        let chain = state.peer_certificates().unwrap_or_default();
        let (leaf, top) = chain.first().zip(chain.last()).ok_or(countersign_identity::verify::Refusal::NoCertificate)?;
        let parse = |der: &CertificateDer<'_>| X509Certificate::from_der(der).map(|(_, c)| (leaf_id(&c), LeafFacts::of(&c), authority_key_id(&c).map(hex::encode)));
        let malformed = |e: x509_parser::nom::Err<x509_parser::error::X509Error>| countersign_identity::verify::Refusal::Malformed(e.to_string());
        let (id, facts, own_authority) = parse(leaf).map_err(malformed)?;
        let authority = if chain.len() == 1 { own_authority } else { parse(top).map_err(malformed)?.2 };
        let version = state.protocol_version().and_then(|v| v.as_str()).unwrap_or_default();
        let exchange = state.negotiated_key_exchange_group().map(|g| format!("{:?}", g.name())).unwrap_or_default();
        Ok(Self { id: id?, facts, authority: authority.unwrap_or_default(), tls: format!("{version} {exchange}") })
    }
}

fn check_protocol(state: &CommonState) -> Result<(), Refused> {
    if state.alpn_protocol() == Some(ALPN) { Ok(()) } else { Err(Refused::Protocol) }
}

/// Dials another sidecar and says where the connection is going. `early` goes with it.
pub async fn dial(
    tcp: TcpStream,
    identity: &Identity,
    expected: &std::collections::BTreeSet<String>,
    request: &Request,
    early: impl FnOnce() -> Result<Vec<u8>, Refused>,
    timeouts: &Timeouts,
) -> Result<(client::TlsStream<TcpStream>, Peer), Refused> {
    let config = identity.client(expected).map_err(|e| Refused::Tls(e.to_string()))?;
    // The name is never sent nor checked: identity is the SPIFFE ID alone.
    let name = ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into());
    let handshake = TlsConnector::from(config).connect(name, tcp);
    let mut tls = match tokio::time::timeout(timeouts.handshake, handshake).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(e)) => return Err(Refused::of_handshake(&e)),
        Err(_) => return Err(Refused::HandshakeTimeout(timeouts.handshake)),
    };
    check_protocol(tls.get_ref().1)?;
    let peer = Peer::of(tls.get_ref().1)?;
    let mut first = request.encode();
    first.extend(early()?);
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

/// Takes a connection from another sidecar and reads where it is going.
pub async fn accept(
    tcp: TcpStream,
    identity: &Arc<Identity>,
    timeouts: &Timeouts,
) -> Result<(server::TlsStream<TcpStream>, Peer, Request), (Refused, Option<Peer>)> {
    let handshake = TlsAcceptor::from(identity.server()).accept(tcp);
    let mut tls = match tokio::time::timeout(timeouts.handshake, handshake).await {
        Ok(Ok(tls)) => tls,
        Ok(Err(e)) => return Err((Refused::of_handshake(&e), None)),
        Err(_) => return Err((Refused::HandshakeTimeout(timeouts.handshake), None)),
    };
    check_protocol(tls.get_ref().1).map_err(|e| (e, None))?;
    let peer = Peer::of(tls.get_ref().1).map_err(|e| (e, None))?;
    match tokio::time::timeout(timeouts.preamble, Request::read(&mut tls)).await {
        Ok(Ok(request)) => Ok((tls, peer, request)),
        Ok(Err(e)) => Err((Refused::Preamble(e.to_string()), Some(peer))),
        Err(_) => Err((Refused::Preamble(format!("not there within {:?}", timeouts.preamble)), Some(peer))),
    }
}

/// Tells the caller why, and lets it hear that before the connection goes.
pub async fn refuse(tls: &mut server::TlsStream<TcpStream>, refused: &Refused) {
    let answer = Answer::Refused { code: refused.code().to_owned(), text: refused.to_string() };
    let say = async {
        tls.write_all(&answer.encode()).await?;
        tls.shutdown().await?;
        // A socket that is closed with unread data resets, and a reset may overtake the answer.
        let mut rest = [0; 4096];
        while tokio::io::AsyncReadExt::read(tls, &mut rest).await? != 0 {}
        std::io::Result::Ok(())
    };
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), say).await;
}

