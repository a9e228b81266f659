//! Who calls, and what they may do: the table of the SPIRE server API.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use countersign_api::denied::Reason;
use countersign_api::peer::{TlsPeer, UnixPeer};
use countersign_identity::SpiffeId;
use countersign_identity::verify::VerifiedPeer;
use tonic::{Request, Status};

use crate::agents::{AttestedAgent, Denied};
use crate::core::Core;

/// A caller whose credentials were checked.
#[derive(Debug, Clone)]
pub enum Caller {
    /// On the server's own Unix socket, as root or as the server's user.
    Local {
        /// As the kernel says.
        uid: u32,
    },
    /// An attested agent that may act now.
    Agent(Arc<AttestedAgent>),
    /// A workload whose entry is `admin`.
    Admin(SpiffeId),
    /// A workload of the trust domain without rights here.
    Workload(SpiffeId),
    /// Over TLS without a certificate.
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
    /// Finds out who sent a request.
    pub fn of<T>(core: &Core, request: &Request<T>) -> Result<Self, Status> {
        if let Some(peer) = request.extensions().get::<UnixPeer>() {
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
        let peer =
            request.extensions().get::<TlsPeer>().ok_or_else(|| Status::internal("the connection has no peer"))?;
        let Some(svid) = &peer.svid else { return Ok(Self::Anonymous(peer.address.ip().to_canonical())) };
        // The connection is older than the call: the authority that vouched for it may have been revoked since.
        if !core.authorities.bundle().borrow().holds(svid.anchor) {
            return Err(revoked_status(svid));
        }
        if is_agent(&svid.id) {
            let admitted = core.agents.admit(&svid.id, &svid.facts.serial, svid.facts.not_after, core.now());
            return admitted.map(Self::Agent).map_err(|denied| denied_status(denied, &svid.id));
        }
        // The handshake checked the SVID when the connection began; it may have ended since.
        if svid.facts.not_after <= core.now() {
            return Err(Status::unauthenticated(format!(
                "the SVID of `{}` expired at {}",
                svid.id, svid.facts.not_after
            )));
        }
        Ok(if core.entries.is_admin(&svid.id, core.now()) {
            Self::Admin(svid.id.clone())
        } else {
            Self::Workload(svid.id.clone())
        })
    }

    /// Local callers and admins pass.
    pub fn operator<T>(core: &Core, request: &Request<T>) -> Result<Self, Status> {
        match Self::of(core, request)? {
            caller @ (Self::Local { .. } | Self::Admin(_)) => Ok(caller),
            other => Err(Status::permission_denied(format!(
                "{other} may not call this: it takes the server's Unix socket or an admin entry"
            ))),
        }
    }

    /// Local callers pass.
    pub fn local<T>(core: &Core, request: &Request<T>) -> Result<Self, Status> {
        match Self::of(core, request)? {
            caller @ Self::Local { .. } => Ok(caller),
            other => {
                Err(Status::permission_denied(format!("{other} may not call this: it takes the server's Unix socket")))
            }
        }
    }

    /// Agents pass.
    pub fn agent<T>(core: &Core, request: &Request<T>) -> Result<Arc<AttestedAgent>, Status> {
        match Self::of(core, request)? {
            Self::Agent(agent) => Ok(agent),
            other => Err(Status::permission_denied(format!("{other} may not call this: it takes an attested agent"))),
        }
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
        Denied::Banned => (Reason::AgentBanned, format!("agent `{id}` is banned")),
    };
    countersign_api::denied::denied(reason, message)
}

#[cfg(test)]
mod tests;
