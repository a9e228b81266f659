//! State that all connections of a sidecar share.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use countersign_api::admission::{self, Admission};
use countersign_api::clock::Clock;
use countersign_api::directory::Subscriptions;
use countersign_identity::policy::{Mode, Policy};
use time::OffsetDateTime;

use crate::balance::Balancer;
use crate::config::{Config, Ports, Routing};
use crate::connections::Connections;
use crate::copy::Carried as Bytes;
use crate::exemption::Exemption;
use crate::identity::{Current, Identity};
use crate::local_workload::LocalWorkload;
use crate::mesh::Peer;
use crate::plaintext::{self, Plaintext};
use crate::refusal::Refused;
use crate::telemetry::{Carried, Direction, Record, Telemetry};

/// A running sidecar.
pub struct Sidecar {
    /// Settings from the start.
    pub config: Config,
    /// The current SVID and bundles.
    pub current: Arc<Current>,
    /// The agent's directory: what is at an address.
    pub directory: Subscriptions,
    /// This namespace's addresses and the workload behind them.
    pub local: LocalWorkload,
    /// Selects endpoints of services.
    pub balancer: Arc<Balancer>,
    /// Open connections and their bounds.
    pub connections: Arc<Connections>,
    /// Bounds on callers whose handshake is unfinished.
    pub handshakes: Admission<IpAddr>,
    /// Peers that use plaintext.
    pub plaintext: Plaintext,
    /// Metrics and access log.
    pub telemetry: Telemetry,
    /// Whether our own connections pass the redirect.
    pub exemption: Arc<Exemption>,
    /// Start time of the process.
    pub started_at: OffsetDateTime,
}

impl Sidecar {
    /// One that has no identity and no connection yet.
    pub fn new(config: Config, telemetry: Telemetry, clock: Clock) -> Self {
        let directory = Subscriptions::default();
        Self {
            current: Arc::new(Current::new(clock)),
            local: LocalWorkload::new(directory.clone()),
            connections: Arc::new(Connections::new(config.limits, telemetry.active.clone())),
            handshakes: Admission::new(admission::Limits {
                name: "unfinished handshakes",
                // They are connections too: all of them together leave most of these to callers that are proven.
                total: config.handshakes.total.min(config.limits.connections.div_ceil(4)),
                per_group: config.handshakes.per_peer,
            }),
            plaintext: Plaintext::default(),
            balancer: Arc::new(Balancer::new(config.balance)),
            exemption: Arc::new(Exemption::new(config.exemption.is_some())),
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

    /// Takes something of our own policy; `None` until the agent has told it. Ignores whether the SVID has expired.
    pub fn policy<T>(&self, take: impl FnOnce(&Policy) -> T) -> Option<T> {
        self.current.peek().and_then(|identity| self.local.workload(&identity)).map(|w| take(&w.policy))
    }

    /// Our own mode; `None` until the directory has named it. Ignores whether the SVID has expired.
    pub fn mode(&self) -> Option<Mode> {
        self.policy(|policy| policy.mode)
    }

    /// Mode of one of our ports; `None` until the agent has told.
    pub fn mode_of(&self, port: u16) -> Option<Mode> {
        self.policy(|policy| policy.mode_of(port))
    }

    /// Whether the mode is off, so that traffic is forwarded without an identity. Holds even if the agent is gone by
    /// now.
    pub fn is_transparent(&self) -> bool {
        self.mode() == Some(Mode::Off)
    }

    /// Why traffic cannot be served yet; `None` once ready.
    pub fn missing(&self) -> Option<String> {
        if let Some(missing) = self.exemption.missing() {
            return Some(missing);
        }
        match self.current.get() {
            Err(refused) => Some(refused.to_string()),
            Ok(identity) => {
                let redirected = matches!(self.config.routing, Routing::Redirected(_));
                (redirected && self.local.workload(&identity).is_none()).then(|| Refused::PolicyUnknown.to_string())
            }
        }
    }
}

/// The record of a connection while it is open; written to telemetry when it ends.
pub struct AccessRecord<'a> {
    sidecar: &'a Sidecar,
    /// Everything known about the connection so far.
    pub record: Record,
}

impl<'a> AccessRecord<'a> {
    /// Starts the record of a new connection.
    pub fn begin(sidecar: &'a Sidecar, direction: Direction, source: SocketAddr) -> Self {
        Self { sidecar, record: Record::begin(direction, source, sidecar.current.now()) }
    }

    /// Enters the connection into the plaintext table; open until the guard is dropped.
    pub fn in_clear(&self, peer: SocketAddr, port: u16) -> plaintext::Open {
        let key = plaintext::Key { peer: peer.ip(), port, direction: self.record.direction, mode: Carried::Plain };
        self.sidecar.plaintext.admitted(key, self.record.began_at)
    }

    /// Enters a refused plaintext connection into the plaintext table.
    pub fn refused_in_clear(&self, port: u16) {
        let (peer, direction) = (self.record.source.ip(), self.record.direction);
        let key = plaintext::Key { peer, port, direction, mode: Carried::Refused };
        self.sidecar.plaintext.refused(key, self.record.began_at);
    }

    /// Records the identity that we use on this connection.
    pub fn own(&mut self, identity: &Arc<Identity>) {
        self.record.own = Some(identity.clone());
    }

    /// Records the authenticated peer.
    pub fn peer(&mut self, peer: &Peer) {
        self.record.peer = Some(peer.clone());
    }

    /// Records how the connection was carried and how many bytes.
    pub fn carried(&mut self, mode: Carried, bytes: Bytes) {
        self.record.mode = mode;
        self.record.end = bytes.end.as_str();
        (self.record.bytes_sent, self.record.bytes_received) = match self.record.direction {
            Direction::Outbound => (bytes.forth, bytes.back),
            Direction::Inbound => (bytes.back, bytes.forth),
        };
    }

    /// Ends the record: counts it and writes the access log line.
    pub fn end(self, refused: Option<&Refused>) {
        self.sidecar.telemetry.ended(&self.record, refused);
    }
}
