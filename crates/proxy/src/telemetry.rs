//! Metrics (`docs/metrics.md`) and the access log, one line per connection.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use countersign_api::log_writer::{LogWriter, Sink};
use countersign_api::sampled::Sampled;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::config::AccessLogTarget;
use crate::identity::Identity;
use crate::mesh::Peer;
use crate::refusal::Refused;

/// How long the access log collects lines before it writes them together.
const HOLD: Duration = Duration::from_millis(200);
/// How long writing the last lines may take at shutdown.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Which way a connection goes, seen from the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From others to the workload.
    Inbound,
    /// From the workload to others.
    Outbound,
}

/// How a connection went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Carried {
    /// Carried over mTLS.
    Mtls,
    /// Carried in plaintext.
    Plain,
    /// Refused: nothing was carried.
    Refused,
}

impl Direction {
    /// Its name in metrics, logs and `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

impl Carried {
    /// Its name in metrics, logs and `status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Plain => "plain",
            Self::Refused => "refused",
        }
    }
}

// The library's derive would write the Rust names of the variants; dashboards and alerts match the documented ones.
impl EncodeLabelValue for Direction {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        std::fmt::Write::write_str(encoder, self.as_str())
    }
}

impl EncodeLabelValue for Carried {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        std::fmt::Write::write_str(encoder, self.as_str())
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ConnectionLabels {
    direction: Direction,
    mode: Carried,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RefusalLabels {
    direction: Direction,
    reason: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByteLabels {
    direction: Direction,
    flow: &'static str,
}

/// Byte counters of one direction's connections.
#[derive(Clone)]
pub struct Bytes {
    /// Bytes that the workload sent.
    pub sent: Counter,
    /// Bytes that the workload received.
    pub received: Counter,
}

/// Metrics and access log of one sidecar.
pub struct Telemetry {
    /// All metrics, rendered by `/metrics`.
    pub registry: Registry,
    connections: Family<ConnectionLabels, Counter>,
    refused: Family<RefusalLabels, Counter>,
    bytes: [Bytes; 2],
    /// Number of open connections.
    pub active: Gauge,
    /// Number of identities used since start, the first included.
    pub rotations: Counter,
    svid_expiry: Gauge,
    authority_expiry: Gauge,
    /// Number of addresses that the directory is asked about.
    pub followed: Gauge,
    log: Option<Arc<LogWriter>>,
    /// Rate limit for log lines about refusals.
    refusals: Sampled,
    /// Rate limit for access log lines of callers without an identity.
    strangers: Sampled<IpAddr>,
}

impl Telemetry {
    /// Registers all metrics and opens the access log. Errors: the log cannot be opened.
    pub fn new(target: Option<&AccessLogTarget>) -> std::io::Result<Self> {
        let mut registry = Registry::with_prefix("countersign_proxy");
        let connections = Family::<ConnectionLabels, Counter>::default();
        let refused = Family::<RefusalLabels, Counter>::default();
        let bytes = Family::<ByteLabels, Counter>::default();
        let (active, svid_expiry, authority_expiry, followed) =
            (Gauge::default(), Gauge::default(), Gauge::default(), Gauge::default());
        let rotations = Counter::<u64, AtomicU64>::default();
        registry.register(
            "connections",
            "Connections that ended or were refused, by direction and mode",
            connections.clone(),
        );
        registry.register("refused", "Connections refused or cut, by direction and reason", refused.clone());
        registry.register(
            "connections_dropped",
            "Connections dropped for want of room, by listener and reason",
            countersign_api::admission::dropped(),
        );
        registry.register("bytes", "Bytes carried for the workload, by direction and flow", bytes.clone());
        registry.register("active_connections", "Open connections", active.clone());
        registry.register("identity_rotations", "Identities taken up since the start", rotations.clone());
        registry.register(
            "svid_expiry_timestamp_seconds",
            "When the SVID ends, seconds since 1970; 0 without one",
            svid_expiry.clone(),
        );
        registry.register(
            "authority_expiry_timestamp_seconds",
            "When the first of the trusted authorities ends, seconds since 1970",
            authority_expiry.clone(),
        );
        registry.register("directory_addresses", "Addresses that the directory is asked about", followed.clone());
        let of = |direction| Bytes {
            sent: bytes.get_or_create_owned(&ByteLabels { direction, flow: "sent" }),
            received: bytes.get_or_create_owned(&ByteLabels { direction, flow: "received" }),
        };
        let bytes = [of(Direction::Inbound), of(Direction::Outbound)];
        let log = target.map(open_access_log).transpose()?.map(Arc::new);
        registry.register_collector(Box::new(Lost(log.clone())));
        Ok(Self {
            registry,
            connections,
            refused,
            bytes,
            active,
            rotations,
            svid_expiry,
            authority_expiry,
            followed,
            log,
            refusals: Sampled::default(),
            strangers: Sampled::default(),
        })
    }

    /// The byte counters of a direction.
    pub fn bytes(&self, direction: Direction) -> &Bytes {
        match direction {
            Direction::Inbound => &self.bytes[0],
            Direction::Outbound => &self.bytes[1],
        }
    }

    /// Sets the expiry metrics from the current identity; 0 without one.
    pub fn identity(&self, identity: Option<&Identity>) {
        self.svid_expiry.set(identity.map_or(0, |i| i.svid().facts().not_after.unix_timestamp()));
        let ends = identity
            .into_iter()
            .flat_map(|i| i.bundles().iter())
            .flat_map(|b| b.authorities.iter().map(|a| a.not_after().unix_timestamp()));
        self.authority_expiry.set(ends.min().unwrap_or(0));
    }

    /// Counts a finished connection and writes its log lines.
    pub fn ended(&self, record: &Record, refused: Option<&Refused>) {
        self.connections.get_or_create(&ConnectionLabels { direction: record.direction, mode: record.mode }).inc();
        if let Some(refused) = refused {
            // A code from a peer is text of its choice, so it never becomes a label: `refused_by_peer` is counted
            // instead.
            self.refused
                .get_or_create(&RefusalLabels { direction: record.direction, reason: refused.code().to_owned() })
                .inc();
            if let Some(unsaid) = self.refusals.next((), refused.code(), Instant::now()) {
                tracing::warn!(direction = ?record.direction, source = %record.source, destination = record.destination.map(|d| d.to_string()),
                    code = refused.code(), reason = %refused, unsaid, "connection refused");
            }
        }
        if let Some(log) = &self.log
            && let Some(left_out) = self.is_logged(record, refused, Instant::now())
        {
            log.line(|held| write_line(held, record, refused, left_out));
        }
    }

    /// Whether the access log has a line of a connection. `Some` holds the number of lines like it that were left out before. A
    /// caller that has proven nothing could fill the log, and push all others out of it, by connecting alone.
    fn is_logged(&self, record: &Record, refused: Option<&Refused>, now: Instant) -> Option<u64> {
        match refused {
            Some(refused) if record.direction == Direction::Inbound && record.peer.is_none() => {
                self.strangers.next(record.source.ip(), refused.code(), now)
            }
            _ => Some(0),
        }
    }

    /// Number of finished connections by direction and mode.
    pub fn connection_count(&self, direction: Direction, mode: Carried) -> u64 {
        self.connections.get_or_create(&ConnectionLabels { direction, mode }).get()
    }

    /// Number of refusals by "direction reason", read back from the registry's text.
    pub fn refused_counts(&self) -> BTreeMap<String, u64> {
        let mut text = String::new();
        // Writing to a text cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry);
        let field = |line: &str, name: &str| {
            line.split_once(&format!("{name}=\"")).and_then(|(_, r)| r.split_once('"')).map(|(v, _)| v.to_owned())
        };
        text.lines()
            .filter(|l| l.starts_with("countersign_proxy_refused_total{"))
            .filter_map(|l| {
                let key = format!("{} {}", field(l, "direction")?.to_lowercase(), field(l, "reason")?);
                Some((key, l.rsplit_once(' ')?.1.parse().ok()?))
            })
            .collect()
    }

    /// Reopens the file of the access log, after logrotate has renamed it.
    pub fn reopen(&self) {
        if let Some(log) = &self.log {
            log.reopen();
        }
    }

    /// Writes the collected lines and ends the access log. Lines that are not written in time are lost.
    pub async fn finish(&self) {
        if let Some(log) = self.log.clone() {
            let finished = tokio::task::spawn_blocking(move || log.finish(LAST_LINES)).await;
            if !finished.unwrap_or(false) {
                tracing::warn!("the last lines of the access log were not read within {LAST_LINES:?} and are lost");
            }
        }
    }
}

/// Everything known about a connection when it ends.
#[derive(Clone)]
pub struct Record {
    /// Direction as seen from the workload.
    pub direction: Direction,
    /// How it was carried.
    pub mode: Carried,
    /// Start on the monotonic clock, for the duration.
    pub began: Instant,
    /// Start on the wall clock.
    pub began_at: OffsetDateTime,
    /// Address and port of the side that dialled.
    pub source: SocketAddr,
    /// Address and port that was dialled; `None` if it never became known.
    pub destination: Option<SocketAddr>,
    /// The authenticated other end; `None` for plaintext.
    pub peer: Option<Peer>,
    /// Our identity on this connection; `None` if there was none.
    pub own: Option<Arc<Identity>>,
    /// Bytes that the workload sent.
    pub bytes_sent: u64,
    /// Bytes that the workload received.
    pub bytes_received: u64,
    /// How it ended, see [`crate::copy::End::as_str`]; empty if nothing was carried.
    pub end: &'static str,
}

impl Record {
    /// A connection that has just begun, and counts as refused until it is carried.
    pub fn begin(direction: Direction, source: SocketAddr, began_at: OffsetDateTime) -> Self {
        Self {
            direction,
            mode: Carried::Refused,
            began: Instant::now(),
            began_at,
            source,
            destination: None,
            peer: None,
            own: None,
            bytes_sent: 0,
            bytes_received: 0,
            end: "",
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    direction: Direction,
    mode: Carried,
    source: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    destination_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_serial: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    own_serial: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    own_expires_at: Option<String>,
    bytes_sent: u64,
    bytes_received: u64,
    duration_ms: f64,
    #[serde(skip_serializing_if = "str::is_empty")]
    end: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<u64>,
}

fn open_access_log(target: &AccessLogTarget) -> std::io::Result<LogWriter> {
    let sink = match target {
        // A duplicate of the descriptor instead of the standard library's lock and buffer: a reader that stalls blocks
        // neither.
        AccessLogTarget::Stdout => Sink::Stream(std::io::stdout().as_fd().try_clone_to_owned()?.into()),
        AccessLogTarget::File(path) => Sink::File(path.clone()),
    };
    LogWriter::start(sink, HOLD)
}

/// Exports the number of lost access log lines.
#[derive(Debug)]
struct Lost(Option<Arc<LogWriter>>);

impl Collector for Lost {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let lost = ConstCounter::new(self.0.as_ref().map_or(0, |log| log.lost()));
        let help = "Access log lines that were not read in time or could not be written";
        lost.encode(encoder.encode_descriptor("access_log_lost", help, None, MetricType::Counter)?)
    }
}

/// Appends one JSON object and a line feed.
fn write_line(out: &mut Vec<u8>, r: &Record, refused: Option<&Refused>, left_out: u64) -> serde_json::Result<()> {
    let rfc3339 = |t: OffsetDateTime| t.format(&Rfc3339).unwrap_or_default();
    let peer_id = r.peer.as_ref().map(|p| p.svid.id.to_string());
    let own_id = r.own.as_ref().map(|i| &**i.id());
    let (source_id, destination_id) = match r.direction {
        Direction::Inbound => (peer_id.as_deref(), own_id),
        Direction::Outbound => (own_id, peer_id.as_deref()),
    };
    let (peer_facts, own_facts) = (r.peer.as_ref().map(|p| &p.svid.facts), r.own.as_ref().map(|i| i.svid().facts()));
    let line = Line {
        time: rfc3339(r.began_at),
        direction: r.direction,
        mode: r.mode,
        source: r.source,
        source_id,
        destination: r.destination,
        destination_id,
        tls: r.peer.as_ref().map(|p| p.tls),
        cipher: r.peer.as_ref().map(|p| p.cipher),
        peer_serial: peer_facts.map(|f| f.serial.as_str()),
        peer_expires_at: peer_facts.map(|f| rfc3339(f.not_after)),
        own_serial: own_facts.map(|f| f.serial.as_str()),
        own_expires_at: own_facts.map(|f| rfc3339(f.not_after)),
        bytes_sent: r.bytes_sent,
        bytes_received: r.bytes_received,
        duration_ms: (r.began.elapsed().as_secs_f64() * 1e6).round() / 1e3,
        end: r.end,
        code: refused.map(Refused::code),
        reason: refused.map(ToString::to_string),
        left_out: (left_out > 0).then_some(left_out),
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.push(b'\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_does_not_fill_the_access_log() {
        let telemetry = Telemetry::new(None).unwrap();
        let record =
            |direction, last: u8| Record::begin(direction, ([10, 0, 0, last], 1).into(), OffsetDateTime::now_utc());
        let (refused, now) = (Refused::Tls("no TLS".into()), Instant::now());
        let lines = |direction, last| {
            (0..1_000).filter_map(|_| telemetry.is_logged(&record(direction, last), Some(&refused), now)).count()
        };
        assert_eq!(lines(Direction::Inbound, 1), 20);
        assert_eq!(lines(Direction::Inbound, 2), 20, "another one is still seen");
        assert_eq!(lines(Direction::Outbound, 1), 1_000, "what the own workload is refused");
        let later = now + Duration::from_secs(10);
        let again = record(Direction::Inbound, 1);
        assert_eq!(telemetry.is_logged(&again, Some(&refused), later), Some(980), "the next line tells of it");
        let mut line = vec![];
        write_line(&mut line, &again, Some(&refused), 980).unwrap();
        assert!(String::from_utf8(line).unwrap().contains("\"left_out\":980"));
        assert_eq!(telemetry.is_logged(&again, None, later), Some(0), "what was carried has a line each");
    }
}
