//! The app's outgoing connections: original destination, directory, then mTLS to the expected identity, plaintext or
//! refusal.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use countersign_identity::directory::{Answer, Place, Service, Workload};
use countersign_identity::policy::Mode;
use countersign_identity::verify::VerifiedPeer;
use prometheus_client::metrics::counter::Counter;
use tokio::net::TcpStream;

use crate::affinity::Session;
use crate::balance::Chosen;
use crate::config::FixedOutbound;
use crate::connections::{Admitted, Kind};
use crate::copy::{End, Terms, carry, reset_on_close};
use crate::cut::Cut;
use crate::eligible::eligible;
use crate::identity::Identity;
use crate::mesh::{self, Peer};
use crate::preamble::Request;
use crate::refusal::Refused;
use crate::sidecar::{AccessRecord, Sidecar};
use crate::silence::{Network, Side, probes_when_idle};
use crate::sockets::{dial, is_link_local, original_destination};
use crate::telemetry::{Carried, Direction};
use crate::tls::ClientStream;

/// Most bytes of the app that are sent together with the preamble.
const EARLY: usize = 16 * 1024;

/// Most endpoints of a service that are tried per connection.
const MAX_TRIES: usize = 3;

/// How a connection is forwarded.
enum Route {
    Mesh { to: SocketAddr, workload: Arc<Workload> },
    Service { service: Arc<Service>, strict: bool, own: Arc<Workload> },
    Plain,
}

/// The app's first bytes, kept until an endpoint has accepted the connection.
#[derive(Default)]
struct Early {
    bytes: Vec<u8>,
    ended: bool,
    read: bool,
}

impl Early {
    /// Reads what is available, once, without waiting.
    fn take(&mut self, app: &TcpStream, to: SocketAddr) -> Result<&[u8], Refused> {
        if !self.read {
            let mut buffer = vec![0; EARLY];
            match app.try_read(&mut buffer) {
                Ok(n) => {
                    self.ended = n == 0;
                    buffer.truncate(n);
                    self.bytes = buffer;
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(Refused::Connect { to, why: format!("the app went away: {e}") }),
            }
            self.read = true;
        }
        Ok(&self.bytes)
    }
}

/// Carries one connection from the redirect, from accept to close.
pub async fn redirected(sidecar: &Sidecar, mut app: TcpStream, source: SocketAddr) {
    // A refusal must reach the app as a reset: a clean end would look like an empty answer.
    reset_on_close(&app);
    let mut access = AccessRecord::begin(sidecar, Direction::Outbound, source);
    let result = carry_redirected(sidecar, &mut app, &mut access).await;
    access.end(result.as_ref().err());
}

/// Carries one connection of a fixed listener, from accept to close.
pub async fn fixed(sidecar: &Sidecar, mut app: TcpStream, source: SocketAddr, way: &FixedOutbound) {
    // A refusal must reach the app as a reset: a clean end would look like an empty answer.
    reset_on_close(&app);
    let mut access = AccessRecord::begin(sidecar, Direction::Outbound, source);
    access.record.destination = Some(way.target);
    let result = async {
        let admitted = sidecar.connections.admit(Kind::Outbound, source.ip())?;
        let identity = own_identity(sidecar, &mut access)?;
        let request = Request { destination: way.target, workload: String::new() };
        let mut early = Early::default();
        let reached = reach(sidecar, &app, &admitted, &identity, way.target, &way.expect, &request, &mut early).await?;
        over_mesh(sidecar, &mut app, &mut access, &admitted, reached, early).await
    };
    let result = result.await;
    access.end(result.as_ref().err());
}

fn own_identity(sidecar: &Sidecar, access: &mut AccessRecord<'_>) -> Result<Arc<Identity>, Refused> {
    let identity = sidecar.current.get()?;
    access.own(&identity);
    Ok(identity)
}

async fn carry_redirected(
    sidecar: &Sidecar,
    app: &mut TcpStream,
    access: &mut AccessRecord<'_>,
) -> Result<(), Refused> {
    let admitted = sidecar.connections.admit(Kind::Outbound, access.record.source.ip())?;
    let destination = original_destination(app)?;
    access.record.destination = Some(destination);
    // An app that dials the sidecar's own port would make it forward to itself without end.
    if sidecar.ports().contains(destination.port()) && sidecar.local.is_own(destination.ip()) {
        return Err(Refused::Loop(destination));
    }
    let identity = match own_identity(sidecar, access) {
        Ok(identity) => identity,
        // Only mode off: without an identity, any other mode must fail closed.
        Err(_) if sidecar.is_transparent() => return in_clear(sidecar, app, access, &admitted, destination).await,
        Err(refused) => return Err(refused),
    };
    match route(sidecar, &identity, destination).await? {
        Route::Mesh { to, workload } => {
            let mut early = Early::default();
            let request = Request { destination, workload: workload.uid.clone() };
            let reached =
                reach(sidecar, app, &admitted, &identity, to, &workload.spiffe_ids, &request, &mut early).await?;
            over_mesh(sidecar, app, access, &admitted, reached, early).await
        }
        Route::Service { service, strict, own } => {
            let asked = Asked { at: destination, service: &service, own: &own.place, strict };
            through_service(sidecar, app, access, &admitted, &identity, &asked).await
        }
        Route::Plain => in_clear(sidecar, app, access, &admitted, destination).await,
    }
}

async fn in_clear(
    sidecar: &Sidecar,
    app: &mut TcpStream,
    access: &mut AccessRecord<'_>,
    admitted: &Admitted,
    to: SocketAddr,
) -> Result<(), Refused> {
    let timeouts = &sidecar.config.timeouts;
    let mut server = dial(to, timeouts.connect, &probes_when_idle(timeouts.mesh_user)).await?;
    let bytes = sidecar.telemetry.bytes(Direction::Outbound);
    let _open = access.in_clear(to, to.port());
    let terms = terms(sidecar, false, (&bytes.sent, &bytes.received), admitted.cut());
    let carried = carry(app, &mut server, terms).await;
    access.carried(Carried::Plain, carried);
    Ok(())
}

/// The app is the first leg; the second one is on the network.
fn terms<'a>(sidecar: &Sidecar, first_ended: bool, counters: (&'a Counter, &'a Counter), cut: &'a Cut) -> Terms<'a> {
    let network = Network { leg: Side::Second, bound: sidecar.config.timeouts.mesh_user };
    Terms { first_ended, counters, cut, network, under_way: false }
}

/// A connection to a service.
struct Asked<'a> {
    /// The address and port that the app dialled.
    at: SocketAddr,
    service: &'a Service,
    /// Where this workload runs.
    own: &'a Place,
    /// Whether only meshed endpoints count.
    strict: bool,
}

impl Asked<'_> {
    /// The endpoints that may be used, by what the directory says of the service now.
    fn endpoints(&self, service: &Service) -> Vec<SocketAddr> {
        service.ports.get(&self.at.port()).map_or(vec![], |port| eligible(port, self.own, self.strict))
    }

    fn choose(&self, sidecar: &Sidecar, candidates: &[SocketAddr]) -> Option<Chosen> {
        match self.service.ports.get(&self.at.port()).and_then(|port| port.affinity) {
            Some(timeout) => {
                let session = Session { service: self.service.uid.clone(), port: self.at.port() };
                sidecar.balancer.choose_again(candidates, session, timeout, Instant::now())
            }
            None => sidecar.balancer.choose(candidates),
        }
    }
}

/// Forwards to one of a service's endpoints, and to another one as long as no endpoint has accepted the connection.
async fn through_service(
    sidecar: &Sidecar,
    app: &mut TcpStream,
    access: &mut AccessRecord<'_>,
    admitted: &Admitted,
    identity: &Identity,
    asked: &Asked<'_>,
) -> Result<(), Refused> {
    let mut left = asked.endpoints(asked.service);
    if left.is_empty() {
        left = wait_for_endpoint(sidecar, asked).await;
    }
    let mut early = Early::default();
    let mut last = Refused::NoEndpoint { service: asked.service.name.clone(), to: asked.at, strict: asked.strict };
    for _ in 0..MAX_TRIES {
        let Some(chosen) = asked.choose(sidecar, &left) else { break };
        let to = chosen.address;
        left.retain(|a| *a != to);
        // What is revoked from now on is the authority of the endpoint that takes the connection, not of one that did not.
        admitted.leave_peer();
        access.record.destination = Some(to);
        let refused = match route(sidecar, identity, to).await {
            Ok(Route::Mesh { to: mesh, workload }) => {
                let request = Request { destination: to, workload: workload.uid.clone() };
                match reach(sidecar, app, admitted, identity, mesh, &workload.spiffe_ids, &request, &mut early).await {
                    Ok(reached) => return over_mesh(sidecar, app, access, admitted, reached, early).await,
                    Err(refused) => refused,
                }
            }
            // Bytes that were read for a mesh connection must never leave in plaintext.
            Ok(Route::Plain) if !early.read => match in_clear(sidecar, app, access, admitted, to).await {
                Ok(()) => return Ok(()),
                Err(refused) => refused,
            },
            Ok(Route::Plain | Route::Service { .. }) => continue,
            Err(refused) => refused,
        };
        // An app may have received bytes already, and another endpoint would receive them again.
        if !refused.may_go_elsewhere() {
            return Err(refused);
        }
        last = refused;
    }
    Err(last)
}

/// Waits, up to the lookup timeout, for an endpoint of the service: a kubelet that restarts reports all its pods as not
/// ready for a moment, though nothing about them has changed.
async fn wait_for_endpoint(sidecar: &Sidecar, asked: &Asked<'_>) -> Vec<SocketAddr> {
    let mut answers = sidecar.directory.follow(asked.at.ip());
    let usable = |answer: &Option<Answer>| match answer {
        Some(Answer::Service(service)) if !(asked.strict && service.claimed) => asked.endpoints(service),
        _ => vec![],
    };
    let there = answers.wait_for(|answer| !usable(answer).is_empty());
    match tokio::time::timeout(sidecar.config.timeouts.lookup, there).await {
        Ok(Ok(answer)) => usable(&answer),
        _ => vec![],
    }
}

/// Decides by both modes and the directory. What is unknown is refused, never guessed.
async fn route(sidecar: &Sidecar, identity: &Identity, destination: SocketAddr) -> Result<Route, Refused> {
    let own = sidecar.local.workload(identity).ok_or(Refused::PolicyUnknown)?;
    if own.policy.mode == Mode::Off {
        return Ok(Route::Plain);
    }
    if is_link_local(destination.ip()) {
        // The address means another machine on each link: the directory cannot know it, so mTLS is not possible.
        let may = own.policy.mode != Mode::Strict || own.policy.lets_out(destination);
        return if may { Ok(Route::Plain) } else { Err(Refused::NotMeshed(destination)) };
    }
    let known = match sidecar.directory.peek(destination.ip()) {
        Some(known) => Some(known),
        None => sidecar.directory.resolve(destination.ip(), sidecar.config.timeouts.lookup).await,
    };
    match known.ok_or(Refused::DirectoryUnknown(destination))? {
        Answer::Meshed(workload) => {
            let theirs = workload.policy.mode_of(destination.port());
            // The directory may relax how we reach others, but never our own strict mode.
            if theirs == Mode::Off && own.policy.mode != Mode::Strict {
                return Ok(Route::Plain);
            }
            Ok(Route::Mesh { to: SocketAddr::new(destination.ip(), workload.mesh_port), workload })
        }
        // A destination on the egress list is forwarded as it is.
        Answer::Service(_) if own.policy.lets_out(destination) => Ok(Route::Plain),
        Answer::Service(service) => {
            let strict = own.policy.mode == Mode::Strict;
            // Behind a port that the service does not have is nobody of the mesh. Nor does a claim let a strict caller out to
            // an address that it would not reach without.
            if strict && (service.claimed || !service.ports.contains_key(&destination.port())) {
                return Err(Refused::NotMeshed(destination));
            }
            // A service without a meshed endpoint, ready or not, is left to the network's own load balancing.
            let meshed = service.endpoints(destination.port()).iter().any(|e| e.meshed);
            if strict || meshed { Ok(Route::Service { service, strict, own }) } else { Ok(Route::Plain) }
        }
        Answer::NotMeshed if own.policy.mode == Mode::Strict && !own.policy.lets_out(destination) => {
            Err(Refused::NotMeshed(destination))
        }
        Answer::NotMeshed => Ok(Route::Plain),
    }
}

/// Connects to a workload's sidecar and sends the app's first bytes along.
#[allow(clippy::too_many_arguments)] // the facts of one connection
async fn reach(
    sidecar: &Sidecar,
    app: &TcpStream,
    admitted: &Admitted,
    identity: &Identity,
    to: SocketAddr,
    expected: &std::collections::BTreeSet<String>,
    request: &Request,
    early: &mut Early,
) -> Result<(ClientStream, Peer), Refused> {
    let timeouts = &sidecar.config.timeouts;
    let tcp = dial(to, timeouts.connect, &probes_when_idle(timeouts.mesh_user)).await?;
    let proven = |peer: &VerifiedPeer| admitted.authenticated_as(peer, |td, key| sidecar.current.trusts(td, key));
    mesh::dial(tcp, identity, proven, expected, request, || early.take(app, to), timeouts).await
}

async fn over_mesh(
    sidecar: &Sidecar,
    app: &mut TcpStream,
    access: &mut AccessRecord<'_>,
    admitted: &Admitted,
    (mut mesh, peer): (ClientStream, Peer),
    early: Early,
) -> Result<(), Refused> {
    let (ended, early_bytes) = (early.ended, early.bytes.len() as u64);
    drop(early);
    access.peer(&peer);
    // The authority may have been revoked while the other sidecar took its time to answer.
    admitted.check()?;
    let bytes = sidecar.telemetry.bytes(Direction::Outbound);
    bytes.sent.inc_by(early_bytes);
    let terms = terms(sidecar, ended, (&bytes.sent, &bytes.received), admitted.cut());
    let mut carried = carry(app, &mut mesh, terms).await;
    carried.forth += early_bytes;
    access.carried(Carried::Mtls, carried);
    if carried.end == End::Revoked { Err(Refused::AuthorityRevoked) } else { Ok(()) }
}
