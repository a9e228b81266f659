//! `countersign server`: flags and settings file of the server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use countersign_api::clock::system_clock;
use countersign_api::log_levels::LogLevels;
use countersign_api::reopen::Reopen;
use countersign_identity::KeyType;
use countersign_identity::trust_domain::parse_trust_domain;
use countersign_server::{
    BundleConfigMap, BundleEndpoint, CertificateFiles, Config, EndpointAuthentication, Issuance, KeyManagerKind,
    PsatCluster, Upstream, UpstreamDisk, UpstreamSpire,
};
use serde::Deserialize;

use super::{ConfigFile, merge};
use crate::clients::{AGENT_SOCKET, SERVER_SOCKET};
use crate::logging::LogArgs;
use crate::settings::{Live, Mistake, Ttl, live};
use crate::stop::{ReadyFile, for_role};

/// Agents sign an SVID at most every two seconds and check once per second, so a shorter one could expire before its
/// renewal.
const MIN_TTL: Duration = countersign_server::MIN_SVID_TTL;
/// An authority must outlive the preparation, publication and activation of its successor.
const MIN_CA_TTL: Duration = Duration::from_secs(20);

/// Longest issuer of JWT-SVIDs, in bytes: each token holds it.
const MAX_ISSUER_BYTES: usize = 1_024;

/// Run the certificate authority.
///
/// The server holds the signing keys and the registration entries, attests agents, and signs SVIDs.
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

/// All settings that a flag or the file can set.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerSettings {
    /// Trust domain to sign for, such as example.org.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<String>,
    /// Listening address for agents [default: 0.0.0.0:8081].
    #[arg(long, value_name = "ADDRESS")]
    bind: Option<SocketAddr>,
    /// Unix socket for operators, mode 0600 [default: /run/countersign/server.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Folder for keys and the database [default: /var/lib/countersign/server].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Lifetime of a signing authority [default: 24h].
    #[arg(long, value_name = "TTL")]
    ca_ttl: Option<Ttl>,
    /// Lifetime of an X509-SVID whose entry sets none [default: 1h].
    #[arg(long, value_name = "TTL")]
    svid_ttl: Option<Ttl>,
    /// Lifetime of an agent's own SVID [default: --svid-ttl].
    #[arg(long, value_name = "TTL")]
    agent_svid_ttl: Option<Ttl>,
    /// Key type of authorities: ec-p256, ec-p384, rsa-2048 or rsa-4096 [default: ec-p256].
    #[arg(long, value_name = "TYPE")]
    ca_key_type: Option<String>,
    /// Folder with one file per setting (caTTL, svidTTL, caKeyType), such as a mounted ConfigMap. It overrides the
    /// flags, and changes take effect while the server runs.
    #[arg(long, value_name = "DIR")]
    live_settings: Option<PathBuf>,
    /// Who JWT-SVIDs say issued them (claim iss), such as the URL of an OIDC discovery document [default: nobody].
    #[arg(long, value_name = "ISSUER")]
    jwt_issuer: Option<String>,
    /// Where to store the authorities' private keys: disk or memory [default: disk].
    #[arg(long, value_name = "KIND")]
    key_manager: Option<String>,
    /// PEM certificate of an upstream CA, below which our authorities become intermediates.
    #[arg(long, value_name = "FILE")]
    upstream_cert: Option<PathBuf>,
    /// PEM private key (PKCS#8) of the upstream CA.
    #[arg(long, value_name = "FILE")]
    upstream_key: Option<PathBuf>,
    /// Address HOST:PORT of a SPIRE-compatible server of the same trust domain, below which this one is. Its bundle is this server's then.
    #[arg(long, value_name = "ADDRESS", conflicts_with_all = ["upstream_cert", "upstream_key", "upstream_bundle"])]
    upstream_spire: Option<String>,
    /// Socket of an agent of the server above, from which this one has its identity there [default: /run/countersign/agent.sock].
    #[arg(long, value_name = "SOCKET", requires = "upstream_spire")]
    upstream_spire_workload_api: Option<PathBuf>,
    /// PEM roots above the upstream CA, if it is not a root itself.
    #[arg(long, value_name = "FILE")]
    upstream_bundle: Option<PathBuf>,
    /// PEM CAs of the certificates that agents may attest with (x509pop).
    #[arg(long, value_name = "FILE")]
    x509pop_ca: Option<PathBuf>,
    /// Attest agents of this Kubernetes cluster by their projected service account tokens (`k8s_psat`); the name is
    /// part of their SPIFFE IDs.
    #[arg(long, value_name = "NAME")]
    k8s_psat_cluster: Option<String>,
    /// Service accounts of agents, NAMESPACE:NAME, comma separated [default: countersign:countersign-agent].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    k8s_psat_allow: Option<Vec<String>>,
    /// Accepted audiences of a token, comma separated [default: spire-server].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    k8s_psat_audience: Option<Vec<String>>,
    /// Node labels that become selectors, comma separated.
    #[arg(long, value_name = "KEYS", value_delimiter = ',')]
    k8s_psat_node_labels: Option<Vec<String>>,
    /// Labels of the agent's pod that become selectors, comma separated.
    #[arg(long, value_name = "KEYS", value_delimiter = ',')]
    k8s_psat_pod_labels: Option<Vec<String>>,
    /// Publish the trust bundle to this ConfigMap, NAMESPACE/NAME, under the key bundle.crt.
    #[arg(long, value_name = "NAMESPACE/NAME")]
    k8s_bundle_configmap: Option<String>,
    /// Keep the caBundle of mutating webhook configurations with this label, KEY=VALUE, equal to the trust bundle.
    #[arg(long, value_name = "KEY=VALUE")]
    k8s_webhook_label: Option<String>,
    /// Serve the trust bundle on this address over https, for trust domains that federate with this one [default: off]. The endpoint
    /// proves itself by the server's own SVID, `spiffe://TRUST_DOMAIN/spire/server` (profile `https_spiffe`), unless a certificate is
    /// given.
    #[arg(long, value_name = "ADDRESS")]
    bundle_endpoint: Option<SocketAddr>,
    /// PEM certificate for the host name of the bundle endpoint, with any intermediates behind it (profile `https_web`). Read again
    /// when it changes.
    #[arg(long, value_name = "FILE")]
    bundle_endpoint_cert: Option<PathBuf>,
    /// PEM private key of that certificate.
    #[arg(long, value_name = "FILE")]
    bundle_endpoint_key: Option<PathBuf>,
    /// Audit log: append one JSON line to this file for each SVID signed or refused [default: off].
    #[arg(long, value_name = "FILE")]
    audit_log: Option<PathBuf>,
    /// Serve /metrics, /ready and /live on this address [default: off].
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
}

impl ServerSettings {
    fn over(self, file: Self) -> Self {
        merge!(self, file, {
            trust_domain, bind, socket, data_dir, ca_ttl, svid_ttl, agent_svid_ttl, ca_key_type, live_settings, jwt_issuer, key_manager,
            upstream_cert, upstream_key, upstream_spire, upstream_spire_workload_api, upstream_bundle, x509pop_ca, k8s_psat_cluster, k8s_psat_allow, k8s_psat_audience,
            k8s_psat_node_labels, k8s_psat_pod_labels, k8s_bundle_configmap, k8s_webhook_label, bundle_endpoint, bundle_endpoint_cert,
            bundle_endpoint_key, audit_log, metrics,
        })
    }

    fn config(self) -> Result<(Config, Option<Live<Issuance>>), Mistake> {
        let domain = self.trust_domain.ok_or_else(|| Mistake::missing("--trust-domain", "trust_domain"))?;
        let ca_key_type = match self.ca_key_type {
            Some(text) => text
                .parse()
                .map_err(|e: countersign_identity::key::KeyError| Mistake::flag("--ca-key-type", &e.to_string()))?,
            None => KeyType::default(),
        };
        let (ca_ttl, svid_ttl, agent_svid_ttl) = (self.ca_ttl, self.svid_ttl, self.agent_svid_ttl);
        let (issuance, follow) = live(self.live_settings, move |found| {
            let hours = |h: u64| Duration::from_secs(h * 3600);
            let svid_ttl = found.svid_ttl.or(svid_ttl).map_or(hours(1), |t| t.0);
            let ca_ttl = found.ca_ttl.or(ca_ttl).map_or(hours(24), |t| t.0);
            if svid_ttl > ca_ttl {
                let why = "an SVID cannot outlive its authority: make it shorter than --ca-ttl";
                return Err(Mistake::flag("--svid-ttl", why));
            }
            let agent_svid_ttl = agent_svid_ttl.map_or(svid_ttl, |t| t.0);
            if agent_svid_ttl > ca_ttl {
                let why = format!(
                    "an agent's SVID of {} s cannot outlive its authority of {} s: make it shorter than --ca-ttl",
                    agent_svid_ttl.as_secs(),
                    ca_ttl.as_secs()
                );
                return Err(Mistake::flag("--agent-svid-ttl", &why));
            }
            let ttls = [
                ("--ca-ttl", ca_ttl, MIN_CA_TTL),
                ("--svid-ttl", svid_ttl, MIN_TTL),
                ("--agent-svid-ttl", agent_svid_ttl, MIN_TTL),
            ];
            if let Some((flag, ttl, least)) = ttls.into_iter().find(|(_, ttl, least)| ttl < least) {
                let why = format!(
                    "{} s is too short to be renewed in time: use {} s or more",
                    ttl.as_secs(),
                    least.as_secs()
                );
                return Err(Mistake::flag(flag, &why));
            }
            Ok(Issuance { ca_ttl, svid_ttl, agent_svid_ttl, ca_key_type: found.ca_key_type.unwrap_or(ca_key_type) })
        })?;
        if self.upstream_spire.is_none() && self.upstream_spire_workload_api.is_some() {
            // Without it this server would be another root of its trust domain.
            return Err(Mistake(
                "the Workload API of an upstream is given without the upstream: add --upstream-spire".into(),
            ));
        }
        let has_files = self.upstream_cert.is_some() || self.upstream_key.is_some() || self.upstream_bundle.is_some();
        if self.upstream_spire.is_some() && has_files {
            return Err(Mistake(
                "there is one upstream authority: leave out --upstream-spire, or --upstream-cert with --upstream-key and \
                 --upstream-bundle"
                    .into(),
            ));
        }
        let upstream = match (self.upstream_cert, self.upstream_key, self.upstream_bundle) {
            (None, None, None) => None,
            (Some(certificate), Some(key), bundle) => Some(Upstream::Disk(UpstreamDisk { certificate, key, bundle })),
            _ => return Err(Mistake("an upstream authority needs both --upstream-cert and --upstream-key".into())),
        };
        let upstream = match self.upstream_spire {
            None => upstream,
            Some(address) => Some(Upstream::Spire(UpstreamSpire {
                address: super::address("--upstream-spire", address)?,
                workload_api: self.upstream_spire_workload_api.unwrap_or_else(|| AGENT_SOCKET.into()),
            })),
        };
        let k8s_psat = psat(
            self.k8s_psat_cluster,
            self.k8s_psat_allow,
            self.k8s_psat_audience,
            self.k8s_psat_node_labels,
            self.k8s_psat_pod_labels,
        )?;
        let config = Config {
            trust_domain: parse_trust_domain(&domain).map_err(|e| Mistake::flag("--trust-domain", &e.to_string()))?,
            bind: self.bind.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 8081))),
            admin_socket: self.socket.unwrap_or_else(|| SERVER_SOCKET.into()),
            data_dir: self.data_dir.unwrap_or_else(|| "/var/lib/countersign/server".into()),
            issuance,
            jwt_issuer: self.jwt_issuer.map(issuer).transpose()?,
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
            k8s_psat,
            k8s_bundle: self.k8s_bundle_configmap.as_deref().map(config_map).transpose()?,
            k8s_webhook_label: self.k8s_webhook_label.map(label).transpose()?,
            bundle_endpoint: bundle_endpoint(
                self.bundle_endpoint,
                self.bundle_endpoint_cert,
                self.bundle_endpoint_key,
            )?,
            audit_log: self.audit_log,
            metrics: self.metrics,
            log_levels: LogLevels::fixed(tracing::Level::INFO),
            reopen: Reopen::default(),
        };
        Ok((config, follow))
    }
}

fn psat(
    cluster: Option<String>,
    allow: Option<Vec<String>>,
    audiences: Option<Vec<String>>,
    node_labels: Option<Vec<String>>,
    pod_labels: Option<Vec<String>>,
) -> Result<Option<PsatCluster>, Mistake> {
    let Some(name) = cluster else {
        let set = [
            ("--k8s-psat-allow", allow.is_some()),
            ("--k8s-psat-audience", audiences.is_some()),
            ("--k8s-psat-node-labels", node_labels.is_some()),
            ("--k8s-psat-pod-labels", pod_labels.is_some()),
        ];
        return match set.iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Mistake::flag(flag, "has no effect without --k8s-psat-cluster")),
            None => Ok(None),
        };
    };
    let word = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || !name.bytes().all(word) {
        return Err(Mistake::flag(
            "--k8s-psat-cluster",
            &format!("`{name}` cannot be part of a SPIFFE ID: use letters, digits, `.`, `_`, `-`"),
        ));
    }
    let service_accounts = allow.unwrap_or_else(|| vec!["countersign:countersign-agent".into()]);
    if let Some(wrong) = service_accounts.iter().find(|a| a.split(':').filter(|p| !p.is_empty()).count() != 2) {
        return Err(Mistake::flag("--k8s-psat-allow", &format!("`{wrong}` is no namespace:serviceaccount")));
    }
    Ok(Some(PsatCluster {
        name,
        service_accounts: service_accounts.into_iter().collect(),
        audiences: audiences.unwrap_or_else(|| vec!["spire-server".into()]).into_iter().collect(),
        node_labels: node_labels.unwrap_or_default().into_iter().collect(),
        pod_labels: pod_labels.unwrap_or_default().into_iter().collect(),
    }))
}

fn bundle_endpoint(
    bind: Option<SocketAddr>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<BundleEndpoint>, Mistake> {
    let authentication = match (certificate, key) {
        (None, None) => EndpointAuthentication::HttpsSpiffe,
        (Some(certificate), Some(key)) => EndpointAuthentication::HttpsWeb(CertificateFiles { certificate, key }),
        _ => {
            let why =
                "a certificate for the bundle endpoint needs both --bundle-endpoint-cert and --bundle-endpoint-key";
            return Err(Mistake(why.into()));
        }
    };
    match (bind, authentication) {
        (Some(bind), authentication) => Ok(Some(BundleEndpoint { bind, authentication })),
        (None, EndpointAuthentication::HttpsSpiffe) => Ok(None),
        (None, EndpointAuthentication::HttpsWeb(_)) => {
            Err(Mistake::flag("--bundle-endpoint-cert", "has no effect without --bundle-endpoint"))
        }
    }
}

fn config_map(text: &str) -> Result<BundleConfigMap, Mistake> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(BundleConfigMap { namespace: namespace.into(), name: name.into(), key: "bundle.crt".into() })
        }
        _ => Err(Mistake::flag("--k8s-bundle-configmap", &format!("`{text}` is no namespace/name"))),
    }
}

fn issuer(text: String) -> Result<String, Mistake> {
    if text.is_empty() || text.len() > MAX_ISSUER_BYTES || text.chars().any(char::is_control) {
        return Err(Mistake::flag("--jwt-issuer", &format!("it must be 1 to {MAX_ISSUER_BYTES} bytes of text")));
    }
    Ok(text)
}

fn label(text: String) -> Result<String, Mistake> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text),
        _ => Err(Mistake::flag("--k8s-webhook-label", &format!("`{text}` is no KEY=VALUE"))),
    }
}

/// Runs a server until it is stopped.
pub fn run(args: ServerArgs) -> Result<()> {
    super::write_privately();
    super::hide_memory();
    let log_levels = args.log.start()?;
    let (config, follow) = args.settings.over(args.config.load()?).config()?;
    super::runtime()?.block_on(async {
        let (stop, reopen) = for_role()?;
        let config = Config { reopen, log_levels, ..config };
        let _followed = follow.map(Live::start);
        countersign_server::run(config, system_clock(), stop, |address| args.ready.write(&address.to_string()))
            .await
            .map_err(mistake_or_failure)
    })
}

/// Errors that an operator can fix are mistakes (exit code 2): an address in use, an invalid file.
fn mistake_or_failure(error: countersign_server::ServerError) -> anyhow::Error {
    use countersign_server::ServerError as E;
    match error {
        E::Store { source: countersign_server::datastore::DataStoreError::TrustDomain { .. }, .. }
        | E::Io { .. }
        | E::Upstream(_)
        | E::Certificate(_)
        | E::X509Pop(_)
        | E::Keys(_)
        | E::Kubernetes(_) => Mistake(error.to_string()).into(),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttls_that_cannot_work_are_refused_with_the_number() {
        let ttl = |text: &str| Some(text.parse().unwrap());
        let base = || ServerSettings { trust_domain: Some("td".into()), ..Default::default() };
        let refused = |settings: ServerSettings| settings.config().err().unwrap().to_string();
        let agent = refused(ServerSettings { agent_svid_ttl: ttl("30d"), ca_ttl: ttl("1h"), ..base() });
        assert!(
            agent.contains("--agent-svid-ttl") && agent.contains("2592000 s") && agent.contains("3600 s"),
            "{agent}"
        );
        let brief = refused(ServerSettings { svid_ttl: ttl("5s"), ..base() });
        assert!(brief.contains("--svid-ttl") && brief.contains("5 s") && brief.contains("10 s"), "{brief}");
        let authority = refused(ServerSettings { ca_ttl: ttl("15s"), svid_ttl: ttl("12s"), ..base() });
        assert!(authority.contains("--ca-ttl") && authority.contains("20 s"), "{authority}");
        assert!(ServerSettings { svid_ttl: ttl("20s"), ca_ttl: ttl("40s"), ..base() }.config().is_ok());
    }

    #[test]
    fn a_bundle_endpoint_has_a_certificate_with_its_key_or_the_servers_svid() {
        let base = || ServerSettings { trust_domain: Some("td".into()), ..Default::default() };
        let bind = "127.0.0.1:8443".parse().ok();
        let [cert, key] = ["c.pem", "k.pem"].map(|name| Some(PathBuf::from(name)));
        let endpoint = |settings: ServerSettings| {
            settings.config().map(|(config, _)| config.bundle_endpoint).map_err(|mistake| mistake.to_string())
        };
        assert_eq!(endpoint(base()), Ok(None));
        let spiffe = endpoint(ServerSettings { bundle_endpoint: bind, ..base() }).unwrap().unwrap();
        assert_eq!(spiffe.authentication, EndpointAuthentication::HttpsSpiffe);
        let both = ServerSettings {
            bundle_endpoint_cert: cert.clone(),
            bundle_endpoint_key: key.clone(),
            ..Default::default()
        };
        let web = ServerSettings { trust_domain: Some("td".into()), bundle_endpoint: bind, ..both };
        assert!(matches!(endpoint(web).unwrap().unwrap().authentication, EndpointAuthentication::HttpsWeb(_)));
        let half = ServerSettings { bundle_endpoint: bind, bundle_endpoint_cert: cert.clone(), ..base() };
        assert!(endpoint(half).unwrap_err().contains("--bundle-endpoint-key"));
        let nowhere = ServerSettings { bundle_endpoint_cert: cert, bundle_endpoint_key: key, ..base() };
        assert!(endpoint(nowhere).unwrap_err().contains("without --bundle-endpoint"));
    }

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
            "live_settings",
            "key_manager",
            "upstream_cert",
            "upstream_key",
            "upstream_bundle",
            "upstream_spire",
            "upstream_spire_workload_api",
            "x509pop_ca",
            "k8s_psat_cluster",
            "k8s_psat_allow",
            "k8s_psat_audience",
            "k8s_psat_node_labels",
            "k8s_psat_pod_labels",
            "k8s_bundle_configmap",
            "k8s_webhook_label",
            "bundle_endpoint",
            "bundle_endpoint_cert",
            "bundle_endpoint_key",
            "audit_log",
            "metrics",
        ] {
            assert!(text.contains(&format!("{key}:")), "{key} is not in the example");
        }
    }
}
