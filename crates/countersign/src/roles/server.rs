//! `countersign server`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use countersign_api::clock::system_clock;
use countersign_identity::trust_domain::parse_trust_domain;
use countersign_server::{Config, KeyManagerKind, UpstreamDisk};
use serde::Deserialize;

use super::{ConfigFile, merge};
use crate::clients::SERVER_SOCKET;
use crate::logging::LogArgs;
use crate::settings::{Mistake, Ttl};
use crate::stop::{ReadyFile, on_signal};

/// Run the certificate authority: it holds the signing keys and the registration entries, attests agents, signs.
#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    settings: ServerSettings,
    #[command(flatten)]
    ready: ReadyFile,
    #[command(flatten)]
    log: LogArgs,
}

/// Everything that a flag or the file can set.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSettings {
    /// Trust domain to sign for, such as example.org.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<String>,
    /// Where agents connect [default: 0.0.0.0:8081].
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<SocketAddr>,
    /// Unix socket for operators, mode 0600 [default: /run/countersign/server.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Folder for keys and the database [default: /var/lib/countersign/server].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Life of a signing authority [default: 24h].
    #[arg(long, value_name = "TTL")]
    ca_ttl: Option<Ttl>,
    /// Life of an X509-SVID whose entry names none [default: 1h].
    #[arg(long, value_name = "TTL")]
    svid_ttl: Option<Ttl>,
    /// Life of an agent's SVID [default: as --svid-ttl].
    #[arg(long, value_name = "TTL")]
    agent_svid_ttl: Option<Ttl>,
    /// Key type of authorities: ec-p256, ec-p384, rsa-2048, rsa-4096 [default: ec-p256].
    #[arg(long, value_name = "TYPE")]
    ca_key_type: Option<String>,
    /// Where authorities' keys live: disk or memory [default: disk].
    #[arg(long, value_name = "KIND")]
    key_manager: Option<String>,
    /// PEM certificate of an upstream CA; makes our authorities intermediates below it.
    #[arg(long, value_name = "FILE")]
    upstream_cert: Option<PathBuf>,
    /// PEM key (PKCS#8) of the upstream CA.
    #[arg(long, value_name = "FILE")]
    upstream_key: Option<PathBuf>,
    /// PEM roots above the upstream CA, where it is not a root itself.
    #[arg(long, value_name = "FILE")]
    upstream_bundle: Option<PathBuf>,
    /// PEM CAs whose certificates agents may attest with (x509pop).
    #[arg(long, value_name = "FILE")]
    x509pop_ca: Option<PathBuf>,
    /// Append one JSON line here for each SVID signed or refused.
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// Serve /metrics, /ready and /live here; off unless set.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
}

impl ServerSettings {
    fn over(self, file: Self) -> Self {
        merge!(self, file, {
            trust_domain, bind, socket, data_dir, ca_ttl, svid_ttl, agent_svid_ttl, ca_key_type, key_manager, upstream_cert,
            upstream_key, upstream_bundle, x509pop_ca, audit_log, metrics,
        })
    }

    fn config(self) -> Result<Config, Mistake> {
        let domain = self.trust_domain.ok_or_else(|| Mistake::missing("--trust-domain", "trust_domain"))?;
        let hours = |h: u64| Duration::from_secs(h * 3600);
        let svid_ttl = self.svid_ttl.map_or(hours(1), |t| t.0);
        let ca_ttl = self.ca_ttl.map_or(hours(24), |t| t.0);
        if svid_ttl > ca_ttl {
            return Err(Mistake::flag(
                "--svid-ttl",
                "an SVID cannot outlive its authority: make it shorter than --ca-ttl",
            ));
        }
        let upstream = match (self.upstream_cert, self.upstream_key, self.upstream_bundle) {
            (None, None, None) => None,
            (Some(certificate), Some(key), bundle) => Some(UpstreamDisk { certificate, key, bundle }),
            _ => return Err(Mistake("an upstream authority needs both --upstream-cert and --upstream-key".into())),
        };
        Ok(Config {
            trust_domain: parse_trust_domain(&domain).map_err(|e| Mistake::flag("--trust-domain", &e.to_string()))?,
            bind: self.bind.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 8081))),
            admin_socket: self.socket.unwrap_or_else(|| SERVER_SOCKET.into()),
            data_dir: self.data_dir.unwrap_or_else(|| "/var/lib/countersign/server".into()),
            ca_ttl,
            svid_ttl,
            agent_svid_ttl: self.agent_svid_ttl.map_or(svid_ttl, |t| t.0),
            ca_key_type: match self.ca_key_type {
                Some(text) => text
                    .parse()
                    .map_err(|e: countersign_identity::key::KeyError| Mistake::flag("--ca-key-type", &e.to_string()))?,
                None => countersign_identity::KeyType::default(),
            },
            key_manager: match self.key_manager.as_deref() {
                None | Some("disk") => KeyManagerKind::Disk,
                Some("memory") => KeyManagerKind::Memory,
                Some(other) => {
                    return Err(Mistake::flag(
                        "--key-manager",
                        &format!("`{other}` is no key manager: use disk or memory"),
                    ));
                }
            },
            upstream,
            x509pop_ca: self.x509pop_ca,
            audit_log: self.audit_log,
            metrics: self.metrics,
        })
    }
}

/// Runs a server until it is told to stop.
pub fn run(args: ServerArgs) -> Result<()> {
    args.log.start()?;
    let config = args.settings.over(args.config.load()?).config()?;
    super::runtime()?.block_on(async {
        let stop = on_signal()?;
        countersign_server::run(config, system_clock(), stop, |address| args.ready.write(&address.to_string()))
            .await
            .map_err(mistake_or_failure)
    })
}

/// What an operator can mend is a mistake: an address that is taken, a file that is wrong.
fn mistake_or_failure(error: countersign_server::ServerError) -> anyhow::Error {
    use countersign_server::ServerError as E;
    match error {
        E::Io { .. } | E::Upstream(_) | E::X509Pop(_) | E::Keys(_) => Mistake(error.to_string()).into(),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_example_loads_and_has_every_key() {
        let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/server.yaml"));
        let (settings, text): (ServerSettings, String) = crate::settings::load(path).unwrap();
        settings.config().unwrap();
        for key in [
            "trust_domain",
            "bind",
            "socket",
            "data_dir",
            "ca_ttl",
            "svid_ttl",
            "agent_svid_ttl",
            "ca_key_type",
            "key_manager",
            "upstream_cert",
            "upstream_key",
            "upstream_bundle",
            "x509pop_ca",
            "audit_log",
            "metrics",
        ] {
            assert!(text.contains(&format!("{key}:")), "{key} is not in the example");
        }
    }
}
