//! `countersign proxy`: flags and settings file of the sidecar.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::Result;
use countersign_api::clock::system_clock;
use countersign_api::reopen::Reopen;
use countersign_identity::policy::Policy;
use countersign_identity::trust_domain::{parse_trust_domain, parse_workload_id};
use countersign_proxy::config::{
    AccessLogTarget, Balance, FixedInbound, FixedOutbound, Handshakes, Limits, Ports, Probe, ProbeKind, Timeouts,
};
use countersign_proxy::exemption::Asking;
use countersign_proxy::{Config, IdentitySource, Routing};
use serde::Deserialize;

use super::redirect::order;
use super::{ConfigFile, merge};
use crate::clients::AGENT_SOCKET;
use crate::logging::LogArgs;
use crate::settings::{Mistake, Ttl};
use crate::stop::{ReadyFile, for_role};

/// Run a sidecar.
///
/// Without further flags it serves the redirect, and asks the agent for its identity and for the directory. With
/// --outbound-listen or --inbound-listen it serves fixed listeners instead; with --svid, --key and --bundle it needs no
/// agent.
#[derive(Debug, clap::Args)]
pub struct ProxyArgs {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    settings: ProxySettings,
    #[command(flatten)]
    ready: ReadyFile,
    #[command(flatten)]
    log: LogArgs,
}

/// All settings that a flag or the file can set.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProxySettings {
    /// Unix socket of the agent [default: /run/countersign/agent.sock].
    #[arg(long, value_name = "PATH")]
    agent_socket: Option<PathBuf>,
    /// PEM certificate chain, leaf first, instead of the agent's SVID; reloaded when it changes.
    #[arg(long, value_name = "FILE")]
    svid: Option<PathBuf>,
    /// PEM private key (PKCS#8) of --svid.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// Trust bundle as NAME=FILE, once per trust domain whose peers are accepted.
    #[arg(long, value_name = "NAME=FILE")]
    bundle: Option<Vec<String>>,
    /// Unix socket of the node's CNI component, which is asked to let this sidecar's connections pass the redirect. The pod is
    /// that of `POD_NAMESPACE` and `POD_NAME` [default: nobody is asked].
    #[arg(long, value_name = "PATH")]
    cni_socket: Option<PathBuf>,
    /// Flags of the redirect that the CNI component installs for this pod, separated by spaces: see `countersign redirect --help`.
    /// The sidecar is not ready before the component says that a redirect is in force. Needs --cni-socket.
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    redirect: Option<String>,
    /// Fixed outbound: listening address for plaintext.
    #[arg(long, value_name = "ADDRESS")]
    outbound_listen: Option<SocketAddr>,
    /// Fixed outbound: mTLS address of the other sidecar.
    #[arg(long, value_name = "ADDRESS")]
    outbound_target: Option<SocketAddr>,
    /// Fixed outbound: SPIFFE ID that the other sidecar must prove; may be repeated, then any of them is accepted.
    #[arg(long, value_name = "SPIFFE ID")]
    outbound_expect: Option<Vec<String>>,
    /// Fixed inbound: listening address for mTLS.
    #[arg(long, value_name = "ADDRESS")]
    inbound_listen: Option<SocketAddr>,
    /// Fixed inbound: address of the app.
    #[arg(long, value_name = "ADDRESS")]
    inbound_target: Option<SocketAddr>,
    /// Fixed inbound: SPIFFE ID that may call; may be repeated [default: all of the trust domain].
    #[arg(long, value_name = "SPIFFE ID")]
    inbound_allow: Option<Vec<String>>,
    /// Port that outgoing connections are redirected to [default: 15001].
    #[arg(long, value_name = "PORT")]
    outbound_port: Option<u16>,
    /// Port that incoming plaintext is redirected to [default: 15006].
    #[arg(long, value_name = "PORT")]
    inbound_port: Option<u16>,
    /// Port for mTLS between sidecars [default: 15008].
    #[arg(long, value_name = "PORT")]
    mesh_port: Option<u16>,
    /// Address of /ready, /live and /metrics [default: [::]:15020, which includes IPv4, with a redirect, otherwise off].
    #[arg(long, value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Unix socket for `countersign status`, mode 0600 [default: off].
    #[arg(long, value_name = "PATH")]
    admin_socket: Option<PathBuf>,
    /// Access log, one JSON line per connection: `-` for standard output, `off`, or a file [default: - with a redirect,
    /// otherwise off].
    #[arg(long, value_name = "FILE")]
    access_log: Option<String>,
    /// How to select an endpoint of a Kubernetes Service: least-connections (of two random ones) or round-robin
    /// [default: least-connections].
    #[arg(long, value_name = "HOW")]
    balance: Option<String>,
    /// The app's probes that this sidecar runs, as the injector writes them: a JSON object from SECRET/CONTAINER/KIND to
    /// `{port, timeout_seconds, http|tcp|grpc}`.
    #[arg(long, env = "COUNTERSIGN_PROBES", value_name = "JSON")]
    probes: Option<String>,
    /// Number of threads that carry traffic [default: 1].
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// How long open connections may continue after SIGTERM [default: 25s].
    #[arg(long, value_name = "TIME")]
    drain: Option<Ttl>,
    /// Port of the app where each connection starts with a PROXY protocol (version 2) header with the caller's address
    /// and SPIFFE ID; may be repeated [default: none].
    #[arg(long, value_name = "PORT")]
    proxy_protocol: Option<Vec<u16>>,
    /// How long another machine may acknowledge neither data nor probes before its connection is reset [default: 25s].
    #[arg(long, value_name = "TIME")]
    mesh_user_timeout: Option<Ttl>,
    /// Most open connections [default: what fits into the memory limit, at most 65536].
    #[arg(long, value_name = "N")]
    max_connections: Option<usize>,
    /// Most open connections per peer address [default: half of --max-connections; a quarter of it in plaintext].
    #[arg(long, value_name = "N")]
    max_connections_per_peer: Option<usize>,
}

impl ProxySettings {
    fn over(self, file: Self) -> Self {
        merge!(self, file, {
            agent_socket, cni_socket, redirect, svid, key, bundle, outbound_listen, outbound_target, outbound_expect, inbound_listen, inbound_target,
            inbound_allow, outbound_port, inbound_port, mesh_port, http, admin_socket, access_log, balance, probes, workers,
            drain, proxy_protocol, mesh_user_timeout,
            max_connections, max_connections_per_peer,
        })
    }

    fn config(self) -> Result<Config, Mistake> {
        let ports = self.ports()?;
        let routing = self.routing(ports)?;
        let redirected = matches!(routing, Routing::Redirected(_));
        let identity = self.identity(redirected)?;
        let limits = Limits::default();
        let mut timeouts = Timeouts::default();
        if let Some(Ttl(time)) = self.mesh_user_timeout {
            // The kernel's probes are whole seconds apart, and one lost probe must not end a connection.
            if !(5..=3_600).contains(&time.as_secs()) {
                return Err(Mistake::flag("--mesh-user-timeout", "use 5s to 1h"));
            }
            timeouts.mesh_user = time;
        }
        if self.proxy_protocol.iter().flatten().any(|port| *port == 0) {
            return Err(Mistake::flag("--proxy-protocol", "0 is not a port"));
        }
        let workers = self.workers.unwrap_or(1);
        if !(1..=64).contains(&workers) {
            return Err(Mistake::flag("--workers", "use 1 to 64"));
        }
        Ok(Config {
            identity,
            exemption: asking(self.cni_socket, self.redirect.as_deref())?,
            routing,
            http: self.http.or_else(|| redirected.then(|| SocketAddr::from((Ipv6Addr::UNSPECIFIED, ports.http)))),
            admin_socket: self.admin_socket,
            access_log: match self.access_log.as_deref() {
                None if !redirected => None,
                None | Some("-") => Some(AccessLogTarget::Stdout),
                Some("off") => None,
                Some(path) => Some(AccessLogTarget::File(path.into())),
            },
            workers,
            drain: self.drain.map_or(countersign_proxy::DEFAULT_DRAIN, |t| t.0),
            proxy_protocol: self.proxy_protocol.into_iter().flatten().collect(),
            limits: Limits {
                connections: self.max_connections.unwrap_or(limits.connections),
                connections_per_peer: self.max_connections_per_peer.unwrap_or(limits.connections_per_peer),
            },
            handshakes: Handshakes::default(),
            timeouts,
            balance: match self.balance.as_deref() {
                None | Some("least-connections") => Balance::LeastConnections,
                Some("round-robin") => Balance::RoundRobin,
                Some(other) => {
                    let why = format!("`{other}` is no way to choose: use least-connections or round-robin");
                    return Err(Mistake::flag("--balance", &why));
                }
            },
            probes: match &self.probes {
                None => BTreeMap::new(),
                Some(json) => probes(json).map_err(|e| Mistake::flag("--probes", &e.to_string()))?,
            },
            reopen: Reopen::default(),
        })
    }

    fn ports(&self) -> Result<Ports, Mistake> {
        let defaults = Ports::default();
        let ports = Ports {
            outbound: self.outbound_port.unwrap_or(defaults.outbound),
            inbound: self.inbound_port.unwrap_or(defaults.inbound),
            mesh: self.mesh_port.unwrap_or(defaults.mesh),
            http: self.http.map_or(defaults.http, |a| a.port()),
        };
        let all = BTreeSet::from([ports.outbound, ports.inbound, ports.mesh, ports.http]);
        if all.len() < 4 || all.contains(&0) {
            return Err(Mistake(
                "--outbound-port, --inbound-port, --mesh-port and the port of --http must be four different ports"
                    .into(),
            ));
        }
        Ok(ports)
    }

    fn routing(&self, ports: Ports) -> Result<Routing, Mistake> {
        let ids = |flag: &str, ids: &[String]| {
            let parsed = ids.iter().map(|id| parse_workload_id(id).map(|id| id.to_string()));
            parsed.collect::<Result<BTreeSet<_>, _>>().map_err(|e| Mistake::flag(flag, &e.to_string()))
        };
        let expect = ids("--outbound-expect", self.outbound_expect.as_deref().unwrap_or_default())?;
        // An empty list admits none; without a list, all of the trust domain may call.
        let allow = self.inbound_allow.as_deref().map(|list| ids("--inbound-allow", list)).transpose()?;
        let outbound = match (self.outbound_listen, self.outbound_target) {
            (Some(_), Some(_)) if expect.is_empty() => {
                return Err(Mistake("--outbound-expect is missing: say who must stand at --outbound-target".into()));
            }
            (Some(listen), Some(target)) => Some(FixedOutbound { listen, target, expect }),
            (None, None) => None,
            _ => return Err(Mistake("a fixed way out needs both --outbound-listen and --outbound-target".into())),
        };
        let inbound = match (self.inbound_listen, self.inbound_target) {
            (Some(listen), Some(target)) => {
                Some(FixedInbound { listen, target, policy: Policy { allow, ..Policy::default() } })
            }
            (None, None) => None,
            _ => return Err(Mistake("a fixed way in needs both --inbound-listen and --inbound-target".into())),
        };
        Ok(if outbound.is_none() && inbound.is_none() {
            Routing::Redirected(ports)
        } else {
            Routing::Fixed { outbound, inbound }
        })
    }

    fn identity(&self, redirected: bool) -> Result<IdentitySource, Mistake> {
        match (&self.svid, &self.key, &self.bundle) {
            (None, None, None) => {
                Ok(IdentitySource::Agent { socket: self.agent_socket.clone().unwrap_or_else(|| AGENT_SOCKET.into()) })
            }
            (Some(_), Some(_), Some(_)) if redirected => Err(Mistake(
                "--svid works on a fixed way only: behind a redirect it takes an agent to say who is where".into(),
            )),
            (Some(chain), Some(key), Some(bundles)) => {
                let bundles = bundles.iter().map(|b| {
                    let (td, path) = b
                        .split_once('=')
                        .ok_or_else(|| Mistake::flag("--bundle", &format!("`{b}`: write NAME=FILE")))?;
                    let td = parse_trust_domain(td).map_err(|e| Mistake::flag("--bundle", &e.to_string()))?;
                    Ok((td, PathBuf::from(path)))
                });
                Ok(IdentitySource::Files {
                    chain: chain.clone(),
                    key: key.clone(),
                    bundles: bundles.collect::<Result<_, Mistake>>()?,
                })
            }
            _ => Err(Mistake("an identity from files needs --svid, --key and --bundle".into())),
        }
    }
}

/// Whom to ask for this pod, which the environment names. What is missing there, the component says. `redirect`: the flags of the one
/// that the component installs.
fn asking(socket: Option<PathBuf>, redirect: Option<&str>) -> Result<Option<Asking>, Mistake> {
    if let Some(flags) = redirect {
        let flags: Vec<String> = flags.split_whitespace().map(ToOwned::to_owned).collect();
        order(&flags, &BTreeSet::new()).map_err(|why| Mistake::flag("--redirect", &why))?;
    }
    let socket = match (socket, redirect) {
        (Some(socket), _) => socket,
        (None, None) => return Ok(None),
        (None, Some(_)) => return Err(Mistake::flag("--redirect", "needs --cni-socket: nobody else installs it")),
    };
    let from = |name| std::env::var(name).unwrap_or_default();
    Ok(Some(Asking {
        socket,
        namespace: from("POD_NAMESPACE"),
        pod: from("POD_NAME"),
        proves_redirect: redirect.is_some(),
    }))
}

/// A probe as the injector writes it.
#[derive(Deserialize)]
struct WrittenProbe {
    port: u16,
    #[serde(default = "one")]
    timeout_seconds: u64,
    #[serde(flatten)]
    kind: WrittenKind,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum WrittenKind {
    Http {
        #[serde(default)]
        tls: bool,
        path: String,
        #[serde(default)]
        headers: Vec<(String, String)>,
    },
    Tcp {},
    Grpc {
        #[serde(default)]
        service: String,
    },
}

fn one() -> u64 {
    1
}

fn probes(json: &str) -> Result<BTreeMap<String, Probe>, serde_json::Error> {
    let written: BTreeMap<String, WrittenProbe> = serde_json::from_str(json)?;
    let read = |w: WrittenProbe| Probe {
        port: w.port,
        timeout: std::time::Duration::from_secs(w.timeout_seconds.max(1)),
        kind: match w.kind {
            WrittenKind::Http { tls, path, headers } => ProbeKind::Http { tls, path, headers },
            WrittenKind::Tcp {} => ProbeKind::Tcp,
            WrittenKind::Grpc { service } => ProbeKind::Grpc { service },
        },
    };
    Ok(written.into_iter().map(|(name, probe)| (name, read(probe))).collect())
}

/// Runs a sidecar until it is stopped.
pub fn run(args: ProxyArgs) -> Result<()> {
    super::write_privately();
    super::hide_memory();
    args.log.start()?;
    let config = args.settings.over(args.config.load()?).config()?;
    super::raise_file_limit();
    // One thread carries everything; further workers are separate threads.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (stop, reopen) = for_role()?;
        let config = Config { reopen, ..config };
        let ran = countersign_proxy::run(config, system_clock(), stop, || args.ready.write("ready")).await;
        ran.map_err(|error| Mistake(error.to_string()).into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_example_loads_and_has_every_key() {
        let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/proxy.yaml"));
        let (settings, text): (ProxySettings, String) = crate::settings::load(path).unwrap();
        settings.config().unwrap();
        for key in [
            "agent_socket",
            "cni_socket",
            "redirect",
            "svid",
            "key",
            "bundle",
            "outbound_listen",
            "outbound_target",
            "outbound_expect",
            "inbound_listen",
            "inbound_target",
            "inbound_allow",
            "outbound_port",
            "inbound_port",
            "mesh_port",
            "http",
            "admin_socket",
            "access_log",
            "balance",
            "probes",
            "workers",
            "drain",
            "proxy_protocol",
            "mesh_user_timeout",
            "max_connections",
            "max_connections_per_peer",
        ] {
            assert!(text.contains(&format!("{key}:")), "{key} is not in the example");
        }
    }
}
