//! `countersign install`: prints the manifests of an installation.

use anyhow::{Result, anyhow};
use serde_json::json;

use super::chart;
use super::values::ValuesArgs;
use crate::settings::Mistake;

/// Kubernetes: print the manifests of an installation: `countersign install --set trustDomain=example.org | kubectl
/// apply -f -`.
///
/// Equal to the Helm chart in charts/countersign: same templates, same values.
#[derive(Debug, clap::Args)]
pub struct InstallArgs {
    /// Namespace of the installation, which is created.
    #[arg(long, short, value_name = "NAMESPACE", default_value = "countersign")]
    namespace: String,
    #[command(flatten)]
    values: ValuesArgs,
    /// Print all settings with their defaults, and exit.
    #[arg(long)]
    show_values: bool,
}

/// Prints the manifests or the settings.
pub fn install(args: &InstallArgs) -> Result<()> {
    if args.show_values {
        return Ok(crate::stdout::put(chart::VALUES)?);
    }
    Ok(crate::stdout::put(&manifests(&args.namespace, &args.values)?)?)
}

/// All manifests as one YAML stream.
pub fn manifests(namespace: &str, values: &ValuesArgs) -> Result<String> {
    let form = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if namespace.is_empty() || namespace.len() > 63 || !namespace.bytes().all(form) {
        return Err(Mistake::flag("--namespace", &format!("`{namespace}` is no namespace's name")).into());
    }
    let values = values.read()?;
    // The agent needs its node's view of processes, which Pod Security calls privileged; the other pods do not.
    let own = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": namespace, "labels": {
            "app.kubernetes.io/name": "countersign", "pod-security.kubernetes.io/enforce": "privileged",
        } },
    });
    let crd = serde_json::to_value(countersign_controller::crd::definition())?;
    let mut out = format!("{}---\n{}", yaml(&own)?, yaml(&crd)?);
    for (name, template) in chart::TEMPLATES {
        let rendered = chart::render(template, &values, namespace).map_err(|e| anyhow!("{name}: {e}"))?;
        out.push_str("---\n");
        out.push_str(&rendered);
    }
    Ok(out)
}

/// Encodes a value as YAML.
pub fn yaml(value: &serde_json::Value) -> Result<String> {
    Ok(serde_saphyr::to_string(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use countersign_controller::injector::{INJECT, PROXY_UID, SIDECAR};
    use countersign_controller::store::MODE;
    use serde_json::Value;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: InstallArgs,
    }

    fn objects(args: &[&str]) -> Vec<Value> {
        let cli = Cli::parse_from([&["install"], args].concat());
        let text = manifests(&cli.args.namespace, &cli.args.values).unwrap();
        serde_saphyr::from_multiple(&text).unwrap()
    }

    fn one<'a>(all: &'a [Value], kind: &str, name: &str) -> &'a Value {
        all.iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name).unwrap()
    }

    #[test]
    fn every_manifest_is_an_object_and_settings_arrive() {
        let all = objects(&["--set", "trustDomain=example.org", "--set", "mesh.mode=strict", "-n", "mesh"]);
        assert!(all.iter().all(|o| o["kind"].is_string() && o["metadata"]["name"].is_string()));
        let server = one(&all, "StatefulSet", "countersign-server");
        assert_eq!(server["metadata"]["namespace"], "mesh");
        assert!(
            server["spec"]["template"]["spec"]["containers"][0]["args"]
                .to_string()
                .contains("--trust-domain=example.org")
        );
        assert_eq!(one(&all, "ConfigMap", "countersign-mesh")["data"]["mode"], "strict");
        assert!(!server.to_string().contains("upstream"));
        let with = objects(&["--set", "server.upstreamSecret=ca"]);
        let server = one(&with, "StatefulSet", "countersign-server");
        assert!(server.to_string().contains("--upstream-cert=/etc/countersign/upstream/tls.crt"));
    }

    #[test]
    fn what_runs_in_the_cluster_is_confined() {
        for object in objects(&[]) {
            let pod = &object["spec"]["template"]["spec"];
            for container in pod["containers"].as_array().into_iter().flatten() {
                let name = &container["name"];
                let context = &container["securityContext"];
                assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
                assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
                assert_eq!(context["capabilities"], json!({ "drop": ["ALL"] }), "{name}");
                let seccomp = [&context["seccompProfile"]["type"], &pod["securityContext"]["seccompProfile"]["type"]];
                assert!(seccomp.contains(&&json!("RuntimeDefault")), "{name}");
                if name != "agent" {
                    assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
                }
                assert!(container["resources"]["requests"]["memory"].is_string(), "{name}");
                assert!(container["readinessProbe"].is_object() && container["livenessProbe"].is_object(), "{name}");
            }
        }
    }

    #[test]
    fn the_api_servers_policies_name_what_the_code_names_and_can_be_left_out() {
        let policies = |args: &[&str]| {
            let all = objects(args).into_iter().filter(|o| o["kind"] == "ValidatingAdmissionPolicy");
            all.map(|o| o["spec"].to_string()).collect::<Vec<_>>()
        };
        let [words, pods] = policies(&["-n", "mesh"]).try_into().unwrap();
        for key in [INJECT, MODE] {
            assert!(words.contains(&format!("labels[?'{key}']")) && words.contains(&format!("annotations[?'{key}']")));
        }
        for part in [
            format!("'{SIDECAR}'").as_str(),
            format!("== {PROXY_UID}").as_str(),
            INJECT,
            "ephemeralContainers",
            "[\"mesh\"]",
        ] {
            assert!(pods.contains(part), "{part}");
        }
        assert!(policies(&["--set", "admissionPolicy=false"]).is_empty());
    }

    #[test]
    fn the_charts_definition_of_the_resource_is_the_codes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/countersign/crds/spiffeids.yaml");
        let written: Value = serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(written, serde_json::to_value(countersign_controller::crd::definition()).unwrap());
    }
}
