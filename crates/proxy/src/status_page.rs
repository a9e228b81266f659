//! `/status`: what a sidecar knows of itself, as JSON. `countersign strict` and `countersign explain` read it by the same types.
//!
//! A reader takes fields that it does not know for nothing, so that a newer sidecar can be asked by an older command.

use serde::{Deserialize, Serialize};

use crate::plaintext::Shown;
use crate::sidecar::Sidecar;

pub use crate::identity::AgentRefusal;
pub use crate::telemetry::{Carried, Direction};

/// A sidecar as it shows itself. Times are seconds since 1970; counts are since its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SidecarStatus {
    /// Its version.
    pub version: String,
    /// When it started: nothing here is older.
    pub started_at: i64,
    /// What is still missing before it can serve.
    pub missing: Option<String>,
    /// Why its node lets none of its connections pass the redirect yet; nothing once it does, and of a sidecar that needs no leave.
    #[serde(default)]
    pub not_admitted: Option<String>,
    /// Its workload's mode, once it is known: `off`, `permissive`, `strict`.
    pub mode: Option<String>,
    /// Who it is.
    pub identity: Option<ShownIdentity>,
    /// The agent's last answer, where it was no identity.
    pub agent_refusal: Option<AgentRefusal>,
    /// Connections that are open.
    pub open: u64,
    /// Connections that have ended.
    pub connections: Vec<Ended>,
    /// What was refused, and why.
    pub refused: Vec<RefusedBy>,
    /// Who came or went in plaintext.
    pub plaintext: Shown,
}

/// The SVID in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShownIdentity {
    /// Its SPIFFE ID.
    pub spiffe_id: String,
    /// Its serial number, lower-case hex.
    pub serial: String,
    /// Its end.
    pub expires_at: i64,
    /// Subject key ID of the authority that signed it, lower-case hex.
    pub authority_id: String,
}

/// Connections that have ended, of one direction and mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Seen from the workload.
    pub direction: Direction,
    /// How they were carried.
    pub mode: Carried,
    /// How many.
    pub count: u64,
}

/// Connections that were refused for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedBy {
    /// Seen from the workload.
    pub direction: Direction,
    /// The refusal's code (docs/metrics.md).
    pub reason: String,
    /// How many.
    pub count: u64,
}

impl SidecarStatus {
    /// What a sidecar knows now.
    pub(crate) fn of(sidecar: &Sidecar) -> Self {
        let t = &sidecar.telemetry;
        let directions = [Direction::Inbound, Direction::Outbound];
        let ended = directions.into_iter().flat_map(|direction| {
            let modes = [Carried::Mtls, Carried::Plain, Carried::Refused].into_iter();
            modes.map(move |mode| Ended { direction, mode, count: t.connection_count(direction, mode) })
        });
        let refused = t.refused_counts().into_iter().filter_map(|(name, count)| {
            let (direction, reason) = name.split_once(' ')?;
            let direction = directions.into_iter().find(|d| d.as_str() == direction)?;
            Some(RefusedBy { direction, reason: reason.to_owned(), count })
        });
        let identity = sidecar.current.peek().map(|i| {
            let (id, facts) = (i.svid().id(), i.svid().facts());
            ShownIdentity {
                spiffe_id: id.to_string(),
                serial: facts.serial.clone(),
                expires_at: facts.not_after.unix_timestamp(),
                authority_id: facts.authority_id.clone(),
            }
        });
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_at: sidecar.started_at.unix_timestamp(),
            missing: sidecar.missing(),
            not_admitted: sidecar.exemption.missing(),
            mode: sidecar.mode().map(|mode| mode.to_string()),
            identity,
            agent_refusal: sidecar.current.agent_refusal(),
            open: *sidecar.connections.count().borrow() as u64,
            connections: ended.collect(),
            refused: refused.collect(),
            plaintext: sidecar.plaintext.shown(),
        }
    }
}
