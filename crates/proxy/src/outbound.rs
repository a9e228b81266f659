//! From the app to the world: original destination → directory → mTLS to the expected identity, or plain, or refused.

use std::net::SocketAddr;
use std::sync::Arc;

use countersign_identity::directory::{Answer, Workload};
use countersign_identity::policy::Mode;
use tokio::net::TcpStream;

use crate::config::FixedOutbound;
use crate::connections::Admitted;
use crate::copy::{End, carry, reset_on_close};
use crate::identity::Identity;
use crate::mesh;
use crate::preamble::Request;
use crate::refusal::Refused;
use crate::sidecar::{Sidecar, Story};
use crate::sockets::{dial, original_destination};
use crate::telemetry::{Carried, Direction};

/// Bytes of the app that travel with the preamble, at most.
const EARLY: usize = 16 * 1024;

/// Where a connection goes.
enum Route {
    Mesh { to: SocketAddr, workload: Arc<Workload> },
    Plain,
}

/// Carries one connection that the redirect brought.
pub async fn redirected(sidecar: &Sidecar, mut app: TcpStream, source: SocketAddr) {
    // The app must not take a refusal for an empty answer.
    reset_on_close(&app);
    let mut story = Story::begin(sidecar, Direction::Outbound, source);
    let result = carry_redirected(sidecar, &mut app, &mut story).await;
    story.end(result.as_ref().err());
}

/// Carries one connection of a fixed way out.
pub async fn fixed(sidecar: &Sidecar, mut app: TcpStream, source: SocketAddr, way: &FixedOutbound) {
    // The app must not take a refusal for an empty answer.
    reset_on_close(&app);
    let mut story = Story::begin(sidecar, Direction::Outbound, source);
    story.record.destination = Some(way.target);
    let result = async {
        let admitted = sidecar.connections.admit(source.ip())?;
        let identity = own_identity(sidecar, &mut story)?;
        let request = Request { destination: way.target, workload: String::new() };
        over_mesh(sidecar, &mut app, &mut story, &admitted, &identity, way.target, &way.expect, &request).await
    };
    let result = result.await;
    story.end(result.as_ref().err());
}

fn own_identity(sidecar: &Sidecar, story: &mut Story<'_>) -> Result<Arc<Identity>, Refused> {
    let identity = sidecar.current.get()?;
    story.own(&identity);
    Ok(identity)
}

async fn carry_redirected(sidecar: &Sidecar, app: &mut TcpStream, story: &mut Story<'_>) -> Result<(), Refused> {
    let admitted = sidecar.connections.admit(story.record.source.ip())?;
    let destination = original_destination(app)?;
    story.record.destination = Some(destination);
    if sidecar.ports().contains(destination.port()) && sidecar.own.is_own(destination.ip()) {
        return Err(Refused::Loop(destination));
    }
    let identity = own_identity(sidecar, story)?;
    match route(sidecar, &identity, destination).await? {
        Route::Mesh { to, workload } => {
            let request = Request { destination, workload: workload.uid.clone() };
            over_mesh(sidecar, app, story, &admitted, &identity, to, &workload.spiffe_ids, &request).await
        }
        Route::Plain => {
            let mut server = dial(destination, sidecar.config.timeouts.connect).await?;
            let bytes = sidecar.telemetry.bytes(Direction::Outbound);
            let carried = carry(app, &mut server, false, (&bytes.sent, &bytes.received), admitted.cut()).await;
            story.carried(Carried::Plain, carried);
            Ok(())
        }
    }
}

/// Decides by both modes and the directory; whatever is not known is refused, never guessed.
async fn route(sidecar: &Sidecar, identity: &Identity, destination: SocketAddr) -> Result<Route, Refused> {
    let own = sidecar.own.workload(identity).ok_or(Refused::PolicyUnknown)?;
    if own.policy.mode == Mode::Off {
        return Ok(Route::Plain);
    }
    let known = match sidecar.directory.peek(destination.ip()) {
        Some(known) => Some(known),
        None => sidecar.directory.resolve(destination.ip(), sidecar.config.timeouts.lookup).await,
    };
    match known.ok_or(Refused::DirectoryUnknown(destination))? {
        Answer::Meshed(workload) => {
            let theirs = workload.policy.mode_of(destination.port());
            if theirs == Mode::Off && own.policy.mode != Mode::Strict {
                return Ok(Route::Plain);
            }
            Ok(Route::Mesh { to: SocketAddr::new(destination.ip(), workload.mesh_port), workload })
        }
        Answer::NotMeshed if own.policy.mode == Mode::Strict && !own.policy.lets_out(destination.ip()) => {
            Err(Refused::NotMeshed(destination))
        }
        Answer::NotMeshed => Ok(Route::Plain),
    }
}

#[allow(clippy::too_many_arguments)] // the facts of one connection, gathered by two callers
async fn over_mesh(
    sidecar: &Sidecar,
    app: &mut TcpStream,
    story: &mut Story<'_>,
    admitted: &Admitted,
    identity: &Identity,
    to: SocketAddr,
    expected: &std::collections::BTreeSet<String>,
    request: &Request,
) -> Result<(), Refused> {
    let timeouts = &sidecar.config.timeouts;
    let tcp = dial(to, timeouts.connect).await?;
    let (mut ended, mut early_bytes) = (false, 0);
    let early = || {
        let mut buffer = vec![0; EARLY];
        match app.try_read(&mut buffer) {
            Ok(n) => {
                ended = n == 0;
                early_bytes = n as u64;
                buffer.truncate(n);
                Ok(buffer)
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(vec![]),
            Err(e) => Err(Refused::Connect { to, why: format!("the app went away: {e}") }),
        }
    };
    let dialled = mesh::dial(tcp, identity, expected, request, early, timeouts).await;
    let (mut mesh, peer) = dialled?;
    story.peer(&peer);
    admitted.authenticated_by(&peer.svid.authority);
    let bytes = sidecar.telemetry.bytes(Direction::Outbound);
    bytes.sent.inc_by(early_bytes);
    let mut carried = carry(app, &mut mesh, ended, (&bytes.sent, &bytes.received), admitted.cut()).await;
    carried.forth += early_bytes;
    story.carried(Carried::Mtls, carried);
    if carried.end == End::Revoked { Err(Refused::AuthorityRevoked) } else { Ok(()) }
}
