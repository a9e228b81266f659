//! Identifies the caller of a request, and what it may do: the authorization table of the SPIRE server API.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use countersign_api::denied::Reason;
use countersign_api::peer::{TlsPeer, UnixPeer};
use countersign_identity::verify::VerifiedPeer;
use countersign_identity::{Entry, SpiffeId};
use tonic::{Extensions, Request, Status};

use crate::agents::{AttestedAgent, Denied};
use crate::core::Core;

/// A caller whose credentials were checked.
#[derive(Debug, Clone)]
pub enum Caller {
    /// Root or the server's own user, on the server's Unix socket.
    Local {
        /// Effective user ID from the kernel.
        uid: u32,
    },
    /// An attested agent that is neither banned nor expired.
    Agent(Arc<AttestedAgent>),
    /// A workload with an `admin` entry.
    Admin(SpiffeId),
    /// A workload of the trust domain, without rights here.
    Workload(SpiffeId),
    /// A TLS client without a certificate.
    Anonymous(IpAddr),
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { uid } => write!(f, "local:uid={uid}"),
            Self::Agent(agent) => write!(f, "{}", agent.id),
            Self::Admin(id) | Self::Workload(id) => write!(f, "{id}"),
            Self::Anonymous(address) => write!(f, "anonymous@{address}"),
        }
    }
}

impl Caller {
    /// Identifies the caller of a request. Errors: its credentials are not valid any more, or it may not use the Unix
    /// socket.
    pub fn of<T>(core: &Core, request: &Request<T>) -> Result<Self, Status> {
        Self::behind(core, request.extensions())
    }

    /// Whether what is on the other end of a connection may send more than it takes to become somebody.
    pub fn is_known(core: &Core, connection: &Extensions) -> bool {
        matches!(Self::behind(core, connection), Ok(Self::Local { .. } | Self::Agent(_) | Self::Admin(_)))
    }

    fn behind(core: &Core, connection: &Extensions) -> Result<Self, Status> {
        if let Some(peer) = connection.get::<UnixPeer>() {
            let own = nix::unistd::geteuid().as_raw();
            return if peer.uid == 0 || peer.uid == own {
                Ok(Self::Local { uid: peer.uid })
            } else {
                Err(Status::permission_denied(format!(
                    "uid {} may not use the server's socket: only root and uid {own} may",
                    peer.uid
                )))
            };
        }
        let peer = connection.get::<TlsPeer>().ok_or_else(|| Status::internal("the connection has no peer"))?;
        let Some(svid) = &peer.svid else { return Ok(Self::Anonymous(peer.address.ip().to_canonical())) };
        // The connection is older than the call: the authority behind the caller may have been revoked since.
        if !core.authorities.bundle().borrow().holds(svid.anchor) {
            return Err(revoked_status(svid));
        }
        if is_agent(&svid.id) {
            let admitted = core.agents.admit(&svid.id, &svid.facts.serial, svid.facts.not_after, core.now());
            return admitted.map(Self::Agent).map_err(|denied| denied_status(denied, &svid.id));
        }
        // The handshake checked the SVID when the connection was opened; it may have expired since.
        if svid.facts.not_after <= core.now() {
            return Err(Status::unauthenticated(format!(
                "the SVID of `{}` expired at {}",
                svid.id, svid.facts.not_after
            )));
        }
        // Looked up at each call, so that deleting the `admin` entry takes effect at once.
        Ok(if core.entries.is_admin(&svid.id, core.now()) {
            Self::Admin(svid.id.clone())
        } else {
            Self::Workload(svid.id.clone())
        })
    }

    /// Accepts local callers and admins. Errors: PermissionDenied for others.
    pub fn operator<T>(core: &Core, request: &Request<T>) -> Result<Self, Status> {
        match Self::of(core, request)? {
            caller @ (Self::Local { .. } | Self::Admin(_)) => Ok(caller),
            other => Err(Status::permission_denied(format!(
                "{other} may not call this: it takes the server's Unix socket or an admin entry"
            ))),
        }
    }

    /// Accepts local callers only. Errors: PermissionDenied for others.
    pub fn local<T>(core: &Core, request: &Request<T>) -> Result<Self, Status> {
        match Self::of(core, request)? {
            caller @ Self::Local { .. } => Ok(caller),
            other => {
                Err(Status::permission_denied(format!("{other} may not call this: it takes the server's Unix socket")))
            }
        }
    }

    /// Accepts agents only. Errors: PermissionDenied for others.
    pub fn agent<T>(core: &Core, request: &Request<T>) -> Result<Arc<AttestedAgent>, Status> {
        match Self::of(core, request)? {
            Self::Agent(agent) => Ok(agent),
            other => Err(Status::permission_denied(format!("{other} may not call this: it takes an attested agent"))),
        }
    }
}

/// A server below ours, as a workload with a `downstream` entry.
pub struct Downstream {
    /// Who it is.
    pub id: SpiffeId,
    /// Its entry.
    pub entry: Arc<Entry>,
}

impl Downstream {
    /// Accepts workloads with a `downstream` entry, admins or not. Errors: PermissionDenied for others.
    pub fn of<T>(core: &Core, request: &Request<T>) -> Result<Self, Status> {
        let caller = Caller::of(core, request)?;
        if let Caller::Admin(id) | Caller::Workload(id) = &caller
            && let Some(entry) = core.entries.downstream(id, core.now())
        {
            return Ok(Self { id: id.clone(), entry });
        }
        Err(Status::permission_denied(format!("{caller} may not call this: it takes a downstream entry")))
    }
}

fn revoked_status(svid: &VerifiedPeer) -> Status {
    Status::unauthenticated(format!("the authority that vouched for `{}` was revoked; attest again", svid.id))
}

/// Waits until a caller may listen no longer: its authority is revoked, or it is an agent and is banned or evicted. Every
/// stream ends then, with this status. Never for callers on the Unix socket and those without a certificate.
///
/// That an agent's SVID ends or is replaced cuts no stream: it outlives the SVID that opened it.
pub fn cut_off<T>(core: &Arc<Core>, request: &Request<T>) -> impl Future<Output = Status> + Send + use<T> {
    let svid = request.extensions().get::<TlsPeer>().and_then(|peer| peer.svid.clone());
    let core = core.clone();
    async move {
        let Some(svid) = svid else { return std::future::pending().await };
        tokio::select! {
            status = revoked(&core, &svid) => status,
            status = denied(&core, &svid.id) => status,
        }
    }
}

async fn revoked(core: &Core, svid: &VerifiedPeer) -> Status {
    // The sender lives as long as the server; were it gone, nobody would be trusted any more.
    let _ = core.authorities.bundle().wait_for(|bundle| !bundle.holds(svid.anchor)).await.map(drop);
    revoked_status(svid)
}

async fn denied(core: &Core, id: &SpiffeId) -> Status {
    if !is_agent(id) {
        return std::future::pending().await;
    }
    // Subscribed before the first look: a ban in between is seen.
    let mut changes = core.agents.changes();
    loop {
        if let Err(denied) = core.agents.standing(id) {
            return denied_status(denied, id);
        }
        if changes.changed().await.is_err() {
            return denied_status(Denied::NotAttested, id);
        }
    }
}

fn is_agent(id: &SpiffeId) -> bool {
    id.path().starts_with("/spire/agent/")
}

/// PermissionDenied with the reason in the detail that SPIRE's agents look for.
pub fn denied_status(denied: Denied, id: &SpiffeId) -> Status {
    let (reason, message) = match denied {
        Denied::Expired => (Reason::AgentExpired, format!("agent `{id}`: its SVID has expired; it must attest again")),
        Denied::NotAttested => {
            (Reason::AgentNotAttested, format!("agent `{id}` is not attested here; it must attest again"))
        }
        Denied::NotActive => {
            (Reason::AgentNotActive, format!("agent `{id}` uses an SVID that was replaced; it must attest again"))
        }
        // SPIRE's words in front, which clients match on.
        Denied::Banned => (Reason::AgentBanned, format!("agent is banned: `{id}`")),
    };
    countersign_api::denied::denied(reason, message)
}

#[cfg(test)]
pub mod tests;
