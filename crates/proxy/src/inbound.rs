//! Incoming connections, forwarded to the app. The mesh port accepts mTLS only; whatever else comes in counts as
//! plaintext.

use std::net::SocketAddr;

use countersign_identity::policy::{Mode, Policy};
use countersign_identity::verify::VerifiedPeer;
use prometheus_client::metrics::counter::Counter;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::config::FixedInbound;
use crate::connections::Kind;
use crate::copy::{End, Terms, carry, reset_on_close};
use crate::cut::Cut;
use crate::identity::Identity;
use crate::mesh::{self, Peer};
use crate::preamble::{Answer, Request};
use crate::proxy_protocol;
use crate::refusal::Refused;
use crate::sidecar::{AccessRecord, Sidecar};
use crate::silence::{Network, Side};
use crate::sockets::{dial, dial_app, local_probes, original_destination};
use crate::telemetry::{Carried, Direction};
use crate::tls::ServerStream;

/// Where a connection to the mesh port is forwarded.
pub enum Target<'a> {
    /// To the destination in its preamble, if that is in this namespace.
    AsAsked,
    /// To one fixed address, whatever its preamble says.
    Fixed(&'a FixedInbound),
}

/// Carries one connection to the mesh port, from accept to close.
pub async fn from_mesh(sidecar: &Sidecar, tcp: TcpStream, source: SocketAddr, target: Target<'_>) {
    let mut access = AccessRecord::begin(sidecar, Direction::Inbound, source);
    let result = carry_mesh(sidecar, tcp, &mut access, target).await;
    access.end(result.as_ref().err());
}

async fn carry_mesh(
    sidecar: &Sidecar,
    tcp: TcpStream,
    access: &mut AccessRecord<'_>,
    target: Target<'_>,
) -> Result<(), Refused> {
    let admitted = sidecar.connections.admit(Kind::Mesh, access.record.source.ip());
    let identity = admitted.and_then(|a| Ok((a, sidecar.current.get()?)));
    let (admitted, identity) = identity.inspect_err(|_| reset_on_close(&tcp))?;
    access.own(&identity);
    let proven = |peer: &VerifiedPeer| admitted.authenticated_as(peer, |td, key| sidecar.current.trusts(td, key));
    // Unfinished handshakes have a bound of their own: unauthenticated callers cannot take the place of open
    // connections.
    let seat = sidecar.handshakes.admit(access.record.source.ip());
    let accepted = tokio::select! {
        accepted = mesh::accept(tcp, &identity, proven, &sidecar.config.timeouts) => accepted,
        () = seat.taken_away() => Err((Refused::TooMany("unfinished handshakes"), None)),
    };
    drop(seat);
    let (mut mesh, peer, request) = match accepted {
        Ok(accepted) => accepted,
        Err((refused, peer)) => {
            peer.iter().for_each(|p| access.peer(p));
            return Err(refused);
        }
    };
    access.peer(&peer);
    // The caller decides how long its preamble takes, and its authority may have been revoked meanwhile.
    let opened = match admitted.check() {
        Ok(()) => open_app(sidecar, &identity, &peer, &request, &target, access).await,
        Err(revoked) => Err(revoked),
    };
    let mut app = match opened {
        Ok(app) => app,
        Err(refused) => {
            mesh::refuse(&mut mesh, &refused).await;
            return Err(refused);
        }
    };
    let said = tokio::time::timeout(sidecar.config.timeouts.preamble, accept(&mut mesh)).await;
    if let Err(error) = said.unwrap_or_else(|elapsed| Err(elapsed.into())) {
        reset_on_close(&app);
        return Err(Refused::Tls(error.to_string()));
    }
    let bytes = sidecar.telemetry.bytes(Direction::Inbound);
    // Our answer is under way: a caller that has gone since is noticed though neither it nor the app says anything.
    let terms = Terms { under_way: true, ..terms(sidecar, (&bytes.received, &bytes.sent), admitted.cut()) };
    let carried = carry(&mut mesh, &mut app, terms).await;
    access.carried(Carried::Mtls, carried);
    if carried.end == End::Revoked { Err(Refused::AuthorityRevoked) } else { Ok(()) }
}

/// The caller is the first leg, and the one on the network.
fn terms<'a>(sidecar: &Sidecar, counters: (&'a Counter, &'a Counter), cut: &'a Cut) -> Terms<'a> {
    let network = Network { leg: Side::First, bound: sidecar.config.timeouts.mesh_user };
    Terms { first_ended: false, counters, cut, network, under_way: false }
}

/// Sends the app a PROXY protocol header, if its port is configured for it, before any byte of the caller.
async fn introduce(
    sidecar: &Sidecar,
    app: &mut TcpStream,
    source: SocketAddr,
    destination: SocketAddr,
    peer: Option<&Peer>,
) -> Result<(), Refused> {
    if !sidecar.config.proxy_protocol.contains(&destination.port()) {
        return Ok(());
    }
    let id = peer.map(|peer| peer.svid.id.to_string());
    let header = proxy_protocol::header(source, destination, id.as_deref());
    // The header fits into the send buffer of a new connection, so this does not wait for the app.
    app.write_all(&header).await.map_err(|e| Refused::Connect { to: destination, why: e.to_string() })
}

async fn accept(mesh: &mut ServerStream) -> std::io::Result<()> {
    mesh.write_all(&Answer::Accepted.encode()).await?;
    mesh.flush().await
}

/// Checks destination and policy, then dials the app.
async fn open_app(
    sidecar: &Sidecar,
    identity: &Identity,
    peer: &Peer,
    request: &Request,
    target: &Target<'_>,
    access: &mut AccessRecord<'_>,
) -> Result<TcpStream, Refused> {
    let own_domain = identity.svid().id().trust_domain_name();
    match target {
        Target::Fixed(way) => {
            access.record.destination = Some(way.target);
            // Policy before the dial: a rejected caller must not open even an empty connection to the app.
            way.policy.admits(&peer.svid.id, own_domain, way.target.port())?;
            let mut app = dial(way.target, sidecar.config.timeouts.connect, &local_probes()).await?;
            introduce(sidecar, &mut app, access.record.source, way.target, Some(peer)).await?;
            Ok(app)
        }
        Target::AsAsked => {
            let to = request.destination;
            access.record.destination = Some(to);
            // Not an open relay: only this namespace's own addresses, and no port of the sidecar itself.
            if sidecar.ports().contains(to.port()) {
                return Err(Refused::Loop(to));
            }
            // Loopback is this namespace's own too, but apps that listen there do not expect callers from outside.
            if to.ip().is_loopback() || !sidecar.local.is_own(to.ip()) {
                return Err(Refused::NotOurs(to));
            }
            // The directory must name us at this address: the policy of another workload says nothing about our app.
            let workload = sidecar.local.at(to.ip(), identity).ok_or(Refused::PolicyUnknown)?;
            // Addresses are reused. A caller with an outdated directory must not reach the workload that has the
            // address now.
            if !request.workload.is_empty() && request.workload != workload.uid {
                return Err(Refused::StaleWorkload { expected: request.workload.clone(), found: workload.uid.clone() });
            }
            workload.policy.admits(&peer.svid.id, own_domain, to.port())?;
            let mut app = dial_app(to, &workload.addresses, sidecar.config.timeouts.connect).await?;
            introduce(sidecar, &mut app, access.record.source, to, Some(peer)).await?;
            Ok(app)
        }
    }
}

/// Carries one plaintext connection from the redirect, from accept to close.
pub async fn redirected(sidecar: &Sidecar, mut caller: TcpStream, source: SocketAddr) {
    reset_on_close(&caller);
    let mut access = AccessRecord::begin(sidecar, Direction::Inbound, source);
    let result = carry_plain(sidecar, &mut caller, &mut access).await;
    access.end(result.as_ref().err());
}

async fn carry_plain(sidecar: &Sidecar, caller: &mut TcpStream, access: &mut AccessRecord<'_>) -> Result<(), Refused> {
    let admitted = sidecar.connections.admit(Kind::Plaintext, access.record.source.ip())?;
    let destination = original_destination(caller)?;
    access.record.destination = Some(destination);
    if sidecar.ports().contains(destination.port()) {
        return Err(Refused::Loop(destination));
    }
    if !sidecar.local.is_own(destination.ip()) {
        return Err(Refused::NotOurs(destination));
    }
    let identity = match sidecar.current.get() {
        // Mode off needs no identity, so traffic continues even after the SVID has expired.
        Err(refused) if !sidecar.is_transparent() => return Err(refused),
        Err(_) => sidecar.current.peek().ok_or(Refused::NoSvid)?,
        Ok(identity) => identity,
    };
    let workload = sidecar.local.at(destination.ip(), &identity).ok_or(Refused::PolicyUnknown)?;
    // Policy before the dial: rejected plaintext must not open even an empty connection to the app.
    admits_plaintext(&workload.policy, destination.port())
        .inspect_err(|_| access.refused_in_clear(destination.port()))?;
    let mut app = dial_app(destination, &workload.addresses, sidecar.config.timeouts.connect).await?;
    introduce(sidecar, &mut app, access.record.source, destination, None).await?;
    let bytes = sidecar.telemetry.bytes(Direction::Inbound);
    let _open = access.in_clear(access.record.source, destination.port());
    let terms = terms(sidecar, (&bytes.received, &bytes.sent), admitted.cut());
    let carried = carry(caller, &mut app, terms).await;
    access.carried(Carried::Plain, carried);
    Ok(())
}

/// Plaintext proves no identity: strict mode rejects it, and so does a port with an allow-list.
fn admits_plaintext(policy: &Policy, port: u16) -> Result<(), Refused> {
    if policy.admits_plaintext(port) {
        return Ok(());
    }
    let strict = policy.mode_of(port) == Mode::Strict;
    Err(if strict { Refused::Plaintext(port) } else { Refused::PlaintextUnproven(port) })
}
