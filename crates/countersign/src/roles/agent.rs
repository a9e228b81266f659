//! `countersign agent`: flags and settings file of the agent.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use countersign_agent::config::{Kubelet, NodeName, PodSources, SdsConfig, Sources};
use countersign_agent::node_attestor::{JoinToken, K8sPsat, NodeAttestor, X509Pop};
use countersign_agent::{Config, SecretNames};
use countersign_api::clock::system_clock;
use countersign_api::files::read_bounded;
use countersign_identity::KeyType;
use countersign_identity::trust_domain::parse_trust_domain;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{ConfigFile, merge};
use crate::clients::AGENT_SOCKET;
use crate::logging::LogArgs;
use crate::settings::{Live, Mistake, Ttl, live};
use crate::stop::{ReadyFile, for_role};

/// Largest join token file, in bytes.
const MAX_TOKEN_BYTES: u64 = 4_096;

/// Run the agent of this node.
///
/// The agent attests the node to the server, keeps the node's SVIDs fresh, and serves each local caller its own.
#[derive(Debug, clap::Args)]
pub struct AgentArgs {
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    settings: AgentSettings,
    #[command(flatten)]
    ready: ReadyFile,
    #[command(flatten)]
    log: LogArgs,
}

/// All settings that a flag or the file can set.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AgentSettings {
    /// Trust domain of the server.
    #[arg(long, value_name = "NAME")]
    trust_domain: Option<String>,
    /// Address of the server, HOST:PORT.
    #[arg(long, value_name = "ADDRESS")]
    server: Option<String>,
    /// Unix socket for workloads and sidecars [default: /run/countersign/agent.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Also offer the socket under this name, by a symbolic link beside it, for programs that look for SPIRE's
    /// `spire-agent.sock`.
    #[arg(long, value_name = "NAME")]
    socket_link: Option<String>,
    /// Folder for the agent's own identity [default: /var/lib/countersign/agent].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// PEM trust bundle that authenticates the server at the first connection.
    #[arg(long, value_name = "FILE")]
    trust_bundle: Option<PathBuf>,
    /// File with a join token (`countersign token generate`).
    #[arg(long, value_name = "FILE")]
    join_token_file: Option<PathBuf>,
    /// PEM certificate to attest with (x509pop).
    #[arg(long, value_name = "FILE")]
    x509pop_cert: Option<PathBuf>,
    /// PEM private key (PKCS#8) of that certificate.
    #[arg(long, value_name = "FILE")]
    x509pop_key: Option<PathBuf>,
    /// Attest as a node of this Kubernetes cluster (`k8s_psat`); the name must equal the server's --k8s-psat-cluster.
    #[arg(long, value_name = "NAME")]
    k8s_psat_cluster: Option<String>,
    /// Projected service account token to attest with [default: /var/run/secrets/tokens/countersign-agent].
    #[arg(long, value_name = "FILE")]
    k8s_psat_token: Option<PathBuf>,
    /// Attest callers by their pods, watched on the API server: name of this node. Needs `list` and `watch` on pods.
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// Attest callers by their pods, as listed by this node's kubelet: its address, HOST:PORT. The kubelet's certificate
    /// must name the host. With --node-name it is the second source, used where its certificate verifies.
    #[arg(long, value_name = "ADDRESS")]
    kubelet: Option<String>,
    /// PEM CAs of the kubelet's certificate [default: the service account's ca.crt].
    #[arg(long, value_name = "FILE")]
    kubelet_ca: Option<PathBuf>,
    /// Token for requests to the kubelet [default: the service account's token].
    #[arg(long, value_name = "FILE")]
    kubelet_token: Option<PathBuf>,
    /// Also attest the labels of callers' namespaces (k8s:ns-label:KEY:VALUE), read from the API server.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    namespace_labels: Option<bool>,
    /// Key type of workloads' SVIDs [default: ec-p256].
    #[arg(long, value_name = "TYPE")]
    workload_key_type: Option<String>,
    /// Folder with one file per setting (workloadKeyType), such as a mounted ConfigMap. It overrides the flag, and
    /// changes take effect while the agent runs.
    #[arg(long, value_name = "DIR")]
    live_settings: Option<PathBuf>,
    /// How often to poll a server that does not push [default: 5s].
    #[arg(long, value_name = "TIME")]
    sync_interval: Option<Ttl>,
    /// Also attest executables: unix:path and unix:sha256.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    discover_workload_path: Option<bool>,
    /// Largest executable that is hashed, in bytes [default: 104857600].
    #[arg(long, value_name = "BYTES")]
    workload_size_limit: Option<u64>,
    /// Also attest callers in other PID and user namespaces by uid. Off by default, because a container chooses its
    /// uids.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    foreign_namespaces: Option<bool>,
    /// Name by which Envoys ask for their default SVID [default: default].
    #[arg(long, value_name = "NAME")]
    sds_default_svid_name: Option<String>,
    /// Name by which Envoys ask for the trust domain's own bundle [default: ROOTCA].
    #[arg(long, value_name = "NAME")]
    sds_default_bundle_name: Option<String>,
    /// Name by which Envoys ask for all bundles, federated ones included [default: ALL].
    #[arg(long, value_name = "NAME")]
    sds_default_all_bundles_name: Option<String>,
    /// Give Envoys bundles without Envoy's SPIFFE certificate validator, unless their node metadata says otherwise. Such an Envoy
    /// accepts any certificate that chains to the bundle.
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    sds_disable_spiffe_cert_validation: Option<bool>,
    /// Serve /metrics, /ready and /live on this address [default: off].
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
}

impl AgentSettings {
    fn over(self, file: Self) -> Self {
        merge!(self, file, {
            trust_domain, server, socket, socket_link, data_dir, trust_bundle, join_token_file, x509pop_cert, x509pop_key, k8s_psat_cluster,
            k8s_psat_token, node_name, kubelet, kubelet_ca, kubelet_token, namespace_labels, workload_key_type, live_settings,
            sync_interval, discover_workload_path, workload_size_limit, foreign_namespaces, sds_default_svid_name,
            sds_default_bundle_name, sds_default_all_bundles_name, sds_disable_spiffe_cert_validation, metrics,
        })
    }

    fn config(self) -> Result<(Config, Option<Live<KeyType>>), Mistake> {
        let key_type = match self.workload_key_type {
            Some(text) => text.parse().map_err(|e: countersign_identity::key::KeyError| {
                Mistake::flag("--workload-key-type", &e.to_string())
            })?,
            None => KeyType::default(),
        };
        let (key_type, follow) =
            live(self.live_settings, move |found| Ok(found.workload_key_type.unwrap_or(key_type)))?;
        let domain = self.trust_domain.ok_or_else(|| Mistake::missing("--trust-domain", "trust_domain"))?;
        let server = self.server.ok_or_else(|| Mistake::missing("--server", "server"))?;
        let server = super::address("--server", server)?;
        let config = Config {
            trust_domain: parse_trust_domain(&domain).map_err(|e| Mistake::flag("--trust-domain", &e.to_string()))?,
            server,
            socket: self.socket.unwrap_or_else(|| AGENT_SOCKET.into()),
            socket_link: self
                .socket_link
                .map(|name| name.parse().map_err(|e: String| Mistake::flag("--socket-link", &e)))
                .transpose()?,
            data_dir: self.data_dir.unwrap_or_else(|| "/var/lib/countersign/agent".into()),
            trust_bundle: self.trust_bundle,
            attestor: attestor(
                self.join_token_file,
                (self.x509pop_cert, self.x509pop_key),
                (self.k8s_psat_cluster, self.k8s_psat_token),
            )?,
            key_type,
            sync_interval: self.sync_interval.map_or(Duration::from_secs(5), |t| t.0),
            discover_path: self.discover_workload_path.unwrap_or(false),
            hash_limit: self.workload_size_limit.unwrap_or(100 * 1024 * 1024),
            foreign_namespaces: self.foreign_namespaces.unwrap_or(false),
            pods: pods(
                self.node_name,
                kubelet(self.kubelet, self.kubelet_ca, self.kubelet_token)?,
                self.namespace_labels.unwrap_or(false),
            )?,
            sds: SdsConfig {
                names: SecretNames::new(
                    self.sds_default_svid_name,
                    self.sds_default_bundle_name,
                    self.sds_default_all_bundles_name,
                )
                .map_err(|e| {
                    Mistake(format!(
                        "--sds-default-svid-name, --sds-default-bundle-name, --sds-default-all-bundles-name: {e}"
                    ))
                })?,
                disable_spiffe_validation: self.sds_disable_spiffe_cert_validation.unwrap_or(false),
            },
            metrics: self.metrics,
        };
        Ok((config, follow))
    }
}

fn attestor(
    token: Option<PathBuf>,
    x509pop: (Option<PathBuf>, Option<PathBuf>),
    psat: (Option<String>, Option<PathBuf>),
) -> Result<Option<Arc<dyn NodeAttestor>>, Mistake> {
    let given = [token.is_some(), x509pop.0.is_some() || x509pop.1.is_some(), psat.0.is_some()];
    if given.iter().filter(|g| **g).count() > 1 {
        return Err(Mistake(
            "give one way to attest: a join token, an x509pop certificate, or a Kubernetes cluster".into(),
        ));
    }
    match (token, x509pop, psat) {
        (Some(path), ..) => {
            let wrong = |why: String| Mistake::flag("--join-token-file", &format!("{}: {why}", path.display()));
            let text = read_bounded(&path, MAX_TOKEN_BYTES).map_err(|e| wrong(e.to_string()))?;
            let token = join_token(&Zeroizing::new(text)).map_err(wrong)?;
            Ok(Some(Arc::new(JoinToken::new(token))))
        }
        (_, (Some(certificate), Some(key)), _) => Ok(Some(Arc::new(X509Pop::new(certificate, key)))),
        (_, (None, None), (Some(cluster), token)) => {
            let token = token.unwrap_or_else(|| "/var/run/secrets/tokens/countersign-agent".into());
            Ok(Some(Arc::new(K8sPsat::new(cluster, token))))
        }
        (_, (None, None), (None, None)) => Ok(None),
        (_, (None, None), (None, Some(_))) => {
            Err(Mistake::flag("--k8s-psat-token", "has no effect without --k8s-psat-cluster"))
        }
        _ => Err(Mistake("x509pop needs both --x509pop-cert and --x509pop-key".into())),
    }
}

/// Parses a join token file: one word. Errors do not quote it, because it may be part of a secret.
fn join_token(content: &[u8]) -> Result<Zeroizing<String>, String> {
    const FIX: &str = "write it with `countersign token generate -q`";
    let text = std::str::from_utf8(content).map_err(|_| format!("expected a join token, found no text; {FIX}"))?;
    let text = text.trim_start_matches('\u{feff}').trim();
    let words = text.split_whitespace().count();
    if words == 0 {
        return Err(format!("expected a join token, found an empty file; {FIX}"));
    }
    if words > 1 || text.starts_with(['{', '[', '-']) {
        return Err(format!("expected a join token alone, found more around it; {FIX}"));
    }
    if text.len() > 256 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(format!(
            "expected a join token of at most 256 letters, digits and signs, found something else; {FIX}"
        ));
    }
    Ok(Zeroizing::new(text.to_owned()))
}

fn pods(node: Option<String>, kubelet: Option<Kubelet>, namespace_labels: bool) -> Result<Option<PodSources>, Mistake> {
    let node: Option<NodeName> =
        node.map(|name| name.parse().map_err(|e: String| Mistake::flag("--node-name", &e))).transpose()?;
    let sources = match (node, kubelet) {
        (Some(node), Some(kubelet)) => Sources::Both(node, kubelet),
        (Some(node), None) => Sources::ApiServer(node),
        (None, Some(kubelet)) => Sources::Kubelet(kubelet),
        (None, None) if namespace_labels => {
            return Err(Mistake::flag("--namespace-labels", "has no effect without --node-name or --kubelet"));
        }
        (None, None) => return Ok(None),
    };
    Ok(Some(PodSources { sources, namespace_labels }))
}

fn kubelet(address: Option<String>, ca: Option<PathBuf>, token: Option<PathBuf>) -> Result<Option<Kubelet>, Mistake> {
    let Some(address) = address else {
        let given = [("--kubelet-ca", ca.is_some()), ("--kubelet-token", token.is_some())];
        return match given.iter().find(|(_, given)| *given) {
            None => Ok(None),
            Some((flag, _)) => Err(Mistake::flag(flag, "has no effect without --kubelet")),
        };
    };
    let address = super::address("--kubelet", address)?;
    let account = |file: &str| PathBuf::from("/var/run/secrets/kubernetes.io/serviceaccount").join(file);
    let (ca, token) = (ca.unwrap_or_else(|| account("ca.crt")), token.unwrap_or_else(|| account("token")));
    Ok(Some(Kubelet { address, ca, token }))
}

/// Runs an agent until it is stopped.
pub fn run(args: AgentArgs) -> Result<()> {
    super::write_privately();
    super::hide_memory();
    args.log.start()?;
    let (config, follow) = args.settings.over(args.config.load()?).config()?;
    super::runtime()?.block_on(async {
        // An agent writes no files that would have to be reopened.
        let (stop, _) = for_role()?;
        let _followed = follow.map(Live::start);
        let ran = countersign_agent::run(config, system_clock(), stop, || args.ready.write("ready")).await;
        ran.map_err(|error| match error {
            countersign_agent::AgentError::Grpc(e) => e.into(),
            other => Mistake(other.to_string()).into(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_token_stands_alone_in_its_file() {
        let token = "0b7c2a9e-6f0e-4a4c-9c5e-3f6c6c1c9f10";
        assert_eq!(join_token(format!("{token}\n").as_bytes()).unwrap().as_str(), token);
        for (content, found) in [
            (&b""[..], "an empty file"),
            (b" \n", "an empty file"),
            (b"\xff\xfe", "no text"),
            (b"token    0b7c\nexpires  2026-01-01T00:00:00Z\n", "more around it"),
            (b"{\"token\":\"0b7c\"}", "more around it"),
            ("x".repeat(300).as_bytes(), "something else"),
            ("t\u{1b}[2J".as_bytes(), "something else"),
        ] {
            let why = join_token(content).unwrap_err();
            assert!(
                why.contains(&format!("found {found}")) && why.ends_with("`countersign token generate -q`"),
                "{why}"
            );
        }
    }

    #[test]
    fn the_documented_example_loads_and_has_every_key() {
        let path = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/agent.yaml"));
        let (settings, text): (AgentSettings, String) = crate::settings::load(path).unwrap();
        AgentSettings { join_token_file: None, ..settings }.config().unwrap();
        for key in [
            "trust_domain",
            "server",
            "socket",
            "socket_link",
            "data_dir",
            "trust_bundle",
            "join_token_file",
            "x509pop_cert",
            "x509pop_key",
            "k8s_psat_cluster",
            "k8s_psat_token",
            "node_name",
            "kubelet",
            "kubelet_ca",
            "kubelet_token",
            "namespace_labels",
            "workload_key_type",
            "live_settings",
            "sync_interval",
            "discover_workload_path",
            "workload_size_limit",
            "foreign_namespaces",
            "sds_default_svid_name",
            "sds_default_bundle_name",
            "sds_default_all_bundles_name",
            "sds_disable_spiffe_cert_validation",
            "metrics",
        ] {
            assert!(text.contains(&format!("{key}:")), "{key} is not in the example");
        }
    }
}
