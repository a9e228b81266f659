//! What every connection of a sidecar shares.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use countersign_api::admission::{self, Admission};
use countersign_api::clock::Clock;
use countersign_api::directory::Subscriptions;
use countersign_identity::policy::Mode;
use time::OffsetDateTime;

use crate::balance::Balancer;
use crate::config::{Config, Ports, Routing};
use crate::connections::Connections;
use crate::copy::Carried as Bytes;
use crate::identity::{Current, Identity};
use crate::mesh::Peer;
use crate::own::Own;
use crate::plaintext::{self, Plaintext};
use crate::refusal::Refused;
use crate::telemetry::{Carried, Direction, Record, Telemetry};

/// One sidecar.
pub struct Sidecar {
    /// Settings.
    pub config: Config,
    /// Who we are.
    pub current: Arc<Current>,
    /// Who is where.
    pub directory: Subscriptions,
    /// Where we are.
    pub own: Own,
    /// Which endpoint of a service is next.
    pub balancer: Arc<Balancer>,
    /// What is open.
    pub connections: Arc<Connections>,
    /// Callers whose handshake is not finished.
    pub handshakes: Admission<IpAddr>,
    /// Who came or went in plaintext.
    pub plaintext: Plaintext,
    /// What is counted and written down.
    pub telemetry: Telemetry,
    /// When it started.
    pub started_at: OffsetDateTime,
}

impl Sidecar {
    /// One that has no identity and no connection yet.
    pub fn new(config: Config, telemetry: Telemetry, clock: Clock) -> Self {
        let directory = Subscriptions::default();
        Self {
            current: Arc::new(Current::new(clock)),
            own: Own::new(directory.clone()),
            connections: Arc::new(Connections::new(config.limits, telemetry.active.clone())),
            handshakes: Admission::new(admission::Limits {
                name: "unfinished handshakes",
                total: config.handshakes.total,
                per_group: config.handshakes.per_peer,
            }),
            plaintext: Plaintext::default(),
            balancer: Arc::new(Balancer::new(config.balance)),
            started_at: OffsetDateTime::now_utc(),
            directory,
            telemetry,
            config,
        }
    }

    /// The ports behind a redirect.
    pub fn ports(&self) -> Ports {
        match self.config.routing {
            Routing::Redirected(ports) => ports,
            Routing::Fixed { .. } => Ports::default(),
        }
    }

    /// Our own mode, as far as it was ever known.
    pub fn mode(&self) -> Option<Mode> {
        self.current.peek().and_then(|identity| self.own.workload(&identity)).map(|w| w.policy.mode)
    }

    /// Whether we were told to forward in the clear. Then no identity is needed: whoever said so may be gone since.
    pub fn is_transparent(&self) -> bool {
        self.mode() == Some(Mode::Off)
    }

    /// What is still missing before traffic can be served.
    pub fn missing(&self) -> Option<String> {
        match self.current.get() {
            Err(refused) => Some(refused.to_string()),
            Ok(identity) => {
                let redirected = matches!(self.config.routing, Routing::Redirected(_));
                (redirected && self.own.workload(&identity).is_none()).then(|| Refused::PolicyUnknown.to_string())
            }
        }
    }
}

/// The record of a connection while it goes on; written when it is finished.
pub struct Story<'a> {
    sidecar: &'a Sidecar,
    /// What is known so far.
    pub record: Record,
}

impl<'a> Story<'a> {
    /// A connection has come in.
    pub fn begin(sidecar: &'a Sidecar, direction: Direction, source: SocketAddr) -> Self {
        let record = Record {
            direction,
            mode: Carried::Refused,
            began: Instant::now(),
            began_at: sidecar.current.now(),
            source,
            destination: None,
            peer: None,
            own: None,
            bytes_sent: 0,
            bytes_received: 0,
            end: "",
        };
        Self { sidecar, record }
    }

    /// It goes on in the clear; open until the guard is dropped.
    pub fn in_clear(&self, peer: SocketAddr, port: u16) -> plaintext::Open {
        let key = plaintext::Key { peer: peer.ip(), port, direction: self.record.direction, mode: Carried::Plain };
        self.sidecar.plaintext.admitted(key, self.record.began_at)
    }

    /// It is refused because it came in the clear.
    pub fn refused_in_clear(&self, port: u16) {
        let (peer, direction) = (self.record.source.ip(), self.record.direction);
        let key = plaintext::Key { peer, port, direction, mode: Carried::Refused };
        self.sidecar.plaintext.refused(key, self.record.began_at);
    }

    /// As whom we act.
    pub fn own(&mut self, identity: &Arc<Identity>) {
        self.record.own = Some(identity.clone());
    }

    /// Who is on the other end.
    pub fn peer(&mut self, peer: &Peer) {
        self.record.peer = Some(peer.clone());
    }

    /// It is let through.
    pub fn carried(&mut self, mode: Carried, bytes: Bytes) {
        self.record.mode = mode;
        self.record.end = bytes.end.as_str();
        (self.record.bytes_sent, self.record.bytes_received) = match self.record.direction {
            Direction::Outbound => (bytes.forth, bytes.back),
            Direction::Inbound => (bytes.back, bytes.forth),
        };
    }

    /// It is over.
    pub fn end(self, refused: Option<&Refused>) {
        self.sidecar.telemetry.ended(&self.record, refused);
    }
}
