use super::plan::{Plan, opens, stricter, unfit};
use super::*;
use crate::kubernetes::check::fake_api::{client, list, refused as refused_by_api};
use crate::kubernetes::existing::Elsewhere;
use crate::kubernetes::existing::Existing;
use crate::kubernetes::former::Revision;
use crate::kubernetes::given::Given;
use crate::kubernetes::live_settings;
use clap::Parser;
use countersign_controller::injector::{INJECT, PROXY_UID, REDIRECT, Resources, SIDECAR};
use countersign_controller::store::MODE;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::json;

use crate::roles::resources::ResourceArgs;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: InstallArgs,
}

fn objects(args: &[&str]) -> Vec<Value> {
    let cli = Cli::parse_from([&["install"], args].concat());
    let memory = Memory::new(cli.args.values.given().unwrap());
    let text = manifests(&cli.args.namespace, &memory).unwrap();
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
        server["spec"]["template"]["spec"]["containers"][0]["args"].to_string().contains("--trust-domain=example.org")
    );
    assert_eq!(one(&all, "ConfigMap", "countersign-mesh")["data"]["mode"], "strict");
    assert!(!server.to_string().contains("upstream"));
    let with = objects(&["--set", "server.upstreamSecret=ca"]);
    let server = one(&with, "StatefulSet", "countersign-server");
    assert!(server.to_string().contains("--upstream-cert=/etc/countersign/upstream/tls.crt"));
}

#[test]
fn the_manifests_say_what_was_given_and_the_chart_does_not() {
    let memory = |args: &[&str]| {
        let object = one(&objects(args), "ConfigMap", "countersign-install").clone();
        let values: Value = serde_saphyr::from_str(object["data"]["values.yaml"].as_str().unwrap()).unwrap();
        (object["data"]["version"].as_str().unwrap().to_owned(), values)
    };
    assert_eq!(memory(&[]), (memory::OURS.to_owned(), json!({})));
    let given = ["--set", "clusterName=7", "--set", "injector.replicas=3", "--reset-values"];
    assert_eq!(memory(&given).1, json!({ "clusterName": "7", "injector": { "replicas": 3 } }));
    assert!(chart::TEMPLATES.iter().all(|(_, text)| !text.contains("countersign-install")));
}

#[test]
fn a_value_with_quotes_colons_and_lines_stays_the_value_that_it_is() {
    let text = "a\"b': {c}, #d\n- e: \\f <g> %s {{ h }}";
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("values.json");
    let values = json!({
        "image": { "name": text }, "registrar": { "idTemplate": text }, "agent": { "kubeletCA": text },
        "server": { "upstreamSecret": text, "priorityClassName": text, "persistence": { "storageClass": text },
                    "podLabels": { "a": text } },
        "injector": { "webhook": { "namespaceSelector": { "matchLabels": { text: text } } } },
    });
    std::fs::write(&path, values.to_string()).unwrap();
    let (plain, with) = (
        objects(&["--set", "agent.kubeletCA=x", "--set", "server.upstreamSecret=x"]),
        objects(&["--values", path.to_str().unwrap()]),
    );
    let names =
        |all: &[Value]| all.iter().map(|o| format!("{} {}", o["kind"], o["metadata"]["name"])).collect::<Vec<_>>();
    assert_eq!(names(&with), names(&plain));
    let server = &one(&with, "StatefulSet", "countersign-server")["spec"];
    let pod = &server["template"]["spec"];
    assert_eq!(pod["containers"][0]["image"], text);
    assert_eq!(pod["priorityClassName"], text);
    assert_eq!(server["volumeClaimTemplates"][0]["spec"]["storageClassName"], text);
    assert_eq!(server["template"]["metadata"]["labels"]["a"], text);
    let args = pod["containers"][1]["args"].as_array().unwrap();
    assert!(args.contains(&json!(format!("--id-template={text}"))), "{args:?}");
    let mut volumes = pod["volumes"].as_array().unwrap().iter();
    assert!(volumes.any(|v| v["secret"]["secretName"] == text));
    let hooks = &one(&with, "MutatingWebhookConfiguration", "countersign-injector")["webhooks"];
    assert_eq!(hooks[0]["namespaceSelector"]["matchLabels"], json!({ text: text }));
    // A namespace whose name YAML would take for a number is a name.
    assert!(
        objects(&["-n", "1e3"])
            .iter()
            .all(|o| o["metadata"]["namespace"] == "1e3" || o["metadata"]["namespace"].is_null())
    );
}

#[test]
fn service_accounts_may_exist_already_under_other_names() {
    let roles = ["server", "agent", "injector"];
    let flags: Vec<String> = roles
        .iter()
        .flat_map(|role| {
            [format!("{role}.serviceAccount.create=false"), format!("{role}.serviceAccount.name=own-{role}")]
        })
        .collect();
    let flags: Vec<&str> = flags.iter().flat_map(|flag| ["--set", flag.as_str()]).collect();
    let all = objects(&flags);
    assert!(all.iter().all(|o| o["kind"] != "ServiceAccount"));
    assert_eq!(objects(&[]).iter().filter(|o| o["kind"] == "ServiceAccount").count(), 3);
    for (kind, role) in [("StatefulSet", "server"), ("DaemonSet", "agent"), ("Deployment", "injector")] {
        let pod = &one(&all, kind, &format!("countersign-{role}"))["spec"]["template"]["spec"];
        assert_eq!(pod["serviceAccountName"], format!("own-{role}"));
    }
    let subjects = all.iter().filter(|o| o["kind"].as_str().unwrap().ends_with("RoleBinding"));
    let subjects: Vec<&str> = subjects.map(|o| o["subjects"][0]["name"].as_str().unwrap()).collect();
    assert_eq!(subjects, ["own-server", "own-server", "own-agent"]);
    let server = one(&all, "StatefulSet", "countersign-server").to_string();
    assert!(server.contains("--k8s-psat-allow=countersign:own-agent"), "agents are attested by it");
}

#[test]
fn the_webhook_fails_closed_unless_the_values_say_otherwise() {
    let policies = |args: &[&str]| {
        let hooks = one(&objects(args), "MutatingWebhookConfiguration", "countersign-injector")["webhooks"].clone();
        let all = hooks.as_array().unwrap().iter();
        let judges = |h: &Value| h["name"] == "judge-namespace.inject.countersign.dev";
        all.filter(|h| !judges(h)).map(|h| h["failurePolicy"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(policies(&[]), ["Fail"; 6]);
    assert_eq!(policies(&["--set", "injector.webhook.failurePolicy=Ignore"]), ["Ignore"; 6]);
}

#[test]
fn a_pod_monitor_is_there_only_for_who_asks_for_it() {
    assert!(objects(&[]).iter().all(|o| o["kind"] != "PodMonitor"));
    let set = ["--set", "podMonitor.enabled=true", "--set", r#"podMonitor.labels={"release":"prometheus"}"#];
    let all = objects(&set);
    let monitor = one(&all, "PodMonitor", "countersign");
    assert_eq!(
        (&monitor["apiVersion"], &monitor["metadata"]["labels"]["release"]),
        (&json!("monitoring.coreos.com/v1"), &json!("prometheus"))
    );
    let ports: Vec<&str> = monitor["spec"]["podMetricsEndpoints"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| e["port"].as_str().unwrap())
        .collect();
    let named = all.iter().filter_map(|o| o["spec"]["template"]["spec"]["containers"].as_array()).flatten();
    let named: Vec<Value> = named.filter_map(|c| c["ports"].as_array()).flatten().map(|p| p["name"].clone()).collect();
    assert!(ports.iter().all(|port| named.contains(&json!(port))), "{ports:?} are ports of our pods");
}

#[test]
fn what_needs_consent_names_the_settings_and_the_flags() {
    let given = |tree: Value| Given::of(tree).unwrap();
    let (before, after) = (json!({ "trustDomain": "a", "mesh": { "mode": "strict" } }), json!({ "trustDomain": "b" }));
    let changes = changes::changes(&given(before), Revision::NOW, &given(after.clone())).unwrap();
    let plan = Plan {
        namespace: "n".into(),
        memory: Memory::new(given(after)),
        changes,
        existing: Existing::default(),
        unfit: None,
        opened: None,
        notes: vec![],
        cluster: None,
    };
    let said = plan.needs(Consent::default());
    assert!(said.contains("trustDomain would change, which needs --force; mesh.mode would no longer be set"), "{said}");
    let json = plan.as_json(Consent { force: true, reset: false });
    assert_eq!((&json["allowed"], &json["remembered"]["values"]["trustDomain"]), (&json!(true), &json!("b")));
    let text = plan.as_text().unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().take(4).collect()).collect();
    assert!(rows.contains(&vec!["trustDomain", "a", "->", "b"]), "{text}");
    assert!(text.ends_with("remembered, version 0.1.0:\ntrustDomain: b\n"), "{text}");
    let reset = plan.needs(Consent { force: false, reset: true });
    assert!(reset.contains("trustDomain") && !reset.contains("mesh.mode"), "{reset}");
}

#[test]
fn an_installation_in_another_namespace_and_one_without_memory_need_force_even_without_changes() {
    let plan = |existing| {
        let memory = Memory::new(Given::default());
        Plan {
            namespace: "n".into(),
            memory,
            changes: vec![],
            existing,
            unfit: None,
            opened: None,
            notes: vec![],
            cluster: None,
        }
    };
    let elsewhere = Elsewhere { object: "ClusterRoleBinding x".into(), namespace: "mesh".into() };
    let existing = [
        Existing { elsewhere: Some(elsewhere), ..Existing::default() },
        Existing { unremembered: Some(Given::default()), ..Existing::default() },
    ];
    for (plan, doubt) in existing.map(plan).iter().zip(["in namespace `mesh`", "does not remember"]) {
        let consent = |force| Consent { force, reset: true };
        assert!(!plan.is_allowed(consent(false)) && plan.is_allowed(consent(true)));
        let said = plan.needs(consent(false));
        assert!(said.starts_with("nothing was applied: ") && said.ends_with("which needs --force"), "{said}");
        assert!(said.contains(doubt) && plan.as_text().unwrap().contains(doubt), "{said}");
        assert_eq!(plan.as_json(consent(false))["allowed"], false);
    }
    assert!(plan(Existing::default()).is_allowed(Consent::default()));
}

#[tokio::test]
async fn a_driver_that_nodes_cannot_have_is_not_turned_on_unasked() {
    let info = json!({
        "architecture": "", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "5.4.0", "kubeProxyVersion": "",
        "kubeletVersion": "", "machineID": "", "operatingSystem": "linux", "osImage": "", "systemUUID": "",
    });
    let node = json!({ "metadata": { "name": "old" }, "status": { "nodeInfo": info } });
    let cluster = client(move |_| list("NodeList", vec![node.clone()]));
    let mut values = super::super::values::defaults().unwrap();
    let why = unfit(&cluster, &values).await.unwrap();
    assert!(why.contains("old (5.4.0)") && why.contains("agent.csi.enabled=false"), "{why}");
    let plan = |unfit| Plan {
        namespace: "n".into(),
        memory: Memory::new(Given::default()),
        changes: vec![],
        existing: Existing::default(),
        unfit,
        opened: None,
        notes: vec![],
        cluster: None,
    };
    let refused = plan(Some(why.clone()));
    assert!(!refused.is_allowed(Consent::default()) && refused.is_allowed(Consent { force: true, reset: false }));
    assert!(refused.needs(Consent::default()).ends_with("; --force installs it all the same"));
    assert_eq!(refused.as_json(Consent::default())["doubts"], json!([why]));
    assert!(plan(None).is_allowed(Consent::default()));
    values["agent"]["csi"]["enabled"] = false.into();
    assert_eq!(unfit(&cluster, &values).await, None);
    let silent = client(|_| refused_by_api(403, "you may not list nodes"));
    assert_eq!(unfit(&silent, &super::super::values::defaults().unwrap()).await, None, "it is told, and no reason");
}

#[test]
fn a_mesh_that_was_made_strict_since_is_not_opened_unasked() {
    let mesh =
        |mode: &str| serde_json::from_value::<ConfigMap>(json!({ "metadata": {}, "data": { "mode": mode } })).unwrap();
    let with = |mode: &str| json!({ "mesh": { "mode": mode } });
    let (live, next) = stricter(Some(&mesh("strict")), &with("permissive")).unwrap();
    let why = opens(live, next);
    assert!(why.contains("is strict") && why.contains("--set mesh.mode=strict"), "{why}");
    assert!(stricter(Some(&mesh("permissive")), &with("off")).is_some());
    for (live, next) in [("strict", "strict"), ("permissive", "strict"), ("off", "permissive"), ("", "off")] {
        assert_eq!(stricter(Some(&mesh(live)), &with(next)), None, "{live} to {next}");
    }
    assert_eq!(stricter(None, &with("off")), None);
    let plan = Plan {
        namespace: "n".into(),
        memory: Memory::new(Given::default()),
        changes: vec![],
        existing: Existing::default(),
        unfit: None,
        opened: Some(why.clone()),
        notes: vec![],
        cluster: None,
    };
    let tried = plan.tried(Consent::default());
    assert!(
        tried.starts_with("a dry run: nothing was changed, and without --dry-run it would be refused: "),
        "{tried}"
    );
    assert!(tried.ends_with(&why), "{tried}");
    assert_eq!(plan.tried(Consent { force: true, reset: false }), "a dry run: nothing was changed");
    assert!(!plan.is_allowed(Consent { force: false, reset: true }));
    assert!(plan.needs(Consent::default()).ends_with(&why));
}

#[test]
fn what_is_remembered_comes_last_and_is_no_part_of_what_is_applied() {
    let last = objects(&[]).pop().unwrap();
    assert_eq!((&last["kind"], &last["metadata"]["name"]), (&json!("ConfigMap"), &json!("countersign-install")));
    let text = applied("mesh", &Memory::new(Given::default())).unwrap();
    assert!(!text.contains("countersign-install"), "who is interrupted remembers nothing");
}

#[test]
fn without_persistence_the_servers_data_is_in_its_pod() {
    let server = |args: &[&str]| one(&objects(args), "StatefulSet", "countersign-server")["spec"].clone();
    let data = |spec: &Value| {
        let volumes = spec["template"]["spec"]["volumes"].as_array().unwrap().iter();
        volumes.filter(|v| v["name"] == "data").cloned().collect::<Vec<_>>()
    };
    let kept = server(&[]);
    assert_eq!(kept["volumeClaimTemplates"][0]["metadata"]["name"], "data");
    assert!(data(&kept).is_empty());
    let lost = server(&["--set", "server.persistence.enabled=false"]);
    assert!(lost["volumeClaimTemplates"].is_null());
    assert_eq!(data(&lost), [json!({ "name": "data", "emptyDir": { "sizeLimit": "1Gi" } })]);
}

#[test]
fn the_server_may_make_its_own_configmap_and_no_other() {
    let rules = one(&objects(&[]), "Role", "countersign-server")["rules"].as_array().unwrap().clone();
    let may_create = rules
        .iter()
        .filter(|r| r["resources"] == json!(["configmaps"]))
        .filter(|r| r["verbs"].as_array().unwrap().contains(&json!("create")));
    let names: Vec<_> = may_create.map(|r| r["resourceNames"].clone()).collect();
    assert_eq!(names, [json!(["countersign-bundle"])]);
}

#[test]
fn the_injector_gets_the_resources_of_the_values_which_are_the_flags_own_by_default() {
    let injected = |args: &[&str]| {
        let all = objects(args);
        let injector = one(&all, "Deployment", "countersign-injector");
        let flags = injector["spec"]["template"]["spec"]["containers"][0]["args"].as_array().unwrap().clone();
        let flags = flags.iter().filter_map(Value::as_str).filter(|f| {
            (f.starts_with("--sidecar-") || f.starts_with("--redirect-")) && !f.starts_with("--sidecar-log")
        });
        resources(&flags.collect::<Vec<_>>())
    };
    assert_eq!(injected(&[]), resources(&[]));
    let set = ["--set", "sidecar.resources.limits.cpu=2", "--set", "redirect.resources.limits.memory="];
    let mut expected = resources(&[]);
    *expected.amount("cpu-limit").unwrap() = "2".parse().unwrap();
    *expected.amount("redirect-memory-limit").unwrap() = "".parse().unwrap();
    assert_eq!(injected(&set), expected);
}

fn resources(flags: &[&str]) -> Resources {
    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        resources: ResourceArgs,
    }
    Flags::parse_from([&["injector"], flags].concat()).resources.resources()
}

#[test]
fn scheduling_labels_and_pull_secrets_reach_the_pods_and_no_label_of_ours_is_changed() {
    let roles = [("StatefulSet", "server"), ("DaemonSet", "agent"), ("Deployment", "injector")];
    for (kind, role) in roles {
        let set = |key: &str, json: &str| format!("{role}.{key}={json}");
        let settings = [
            set("tolerations", r#"[{"operator":"Exists"}]"#),
            set("nodeSelector", r#"{"disk":"ssd"}"#),
            set("affinity", r#"{"nodeAffinity":{}}"#),
            set("priorityClassName", "high"),
            set("podLabels", r#"{"team":"a","countersign.dev/inject":"enabled"}"#),
            set("podAnnotations", r#"{"note":"b: #c"}"#),
            set("resources.limits.memory", "1Gi"),
            r#"imagePullSecrets=[{"name":"registry"}]"#.to_owned(),
        ];
        let flags: Vec<&str> = settings.iter().flat_map(|s| ["--set", s.as_str()]).collect();
        let (all, plain) = (objects(&flags), objects(&[]));
        let name = format!("countersign-{role}");
        let pod = |all: &[Value]| one(all, kind, &name)["spec"]["template"].clone();
        let (spec, before) = (pod(&all)["spec"].clone(), pod(&plain)["spec"].clone());
        assert_eq!(spec["tolerations"], json!([{ "operator": "Exists" }]));
        assert_eq!(spec["nodeSelector"], json!({ "disk": "ssd" }));
        assert_eq!(spec["affinity"], json!({ "nodeAffinity": {} }));
        assert_eq!(spec["priorityClassName"], "high");
        assert_eq!(spec["imagePullSecrets"], json!([{ "name": "registry" }]));
        assert_eq!(spec["containers"][0]["resources"]["limits"]["memory"], "1Gi");
        for key in ["nodeSelector", "affinity", "imagePullSecrets"] {
            assert!(before[key].is_null(), "{key}");
        }
        let (mut labels, metadata) = (pod(&plain)["metadata"]["labels"].clone(), pod(&all)["metadata"].clone());
        assert_eq!(labels["countersign.dev/inject"], "disabled");
        labels["team"] = "a".into();
        assert_eq!(metadata["labels"], labels);
        assert_eq!(metadata["annotations"], json!({ "note": "b: #c" }));
        assert!(pod(&plain)["metadata"]["annotations"].is_null());
    }
    let spread = r#"server.topologySpreadConstraints=[{"maxSkew":1}]"#;
    let server = one(&objects(&["--set", spread]), "StatefulSet", "countersign-server").clone();
    assert_eq!(server["spec"]["template"]["spec"]["topologySpreadConstraints"], json!([{ "maxSkew": 1 }]));
}

#[test]
fn what_runs_in_the_cluster_is_confined() {
    for object in objects(&[]) {
        let pod = &object["spec"]["template"]["spec"];
        for container in pod["containers"].as_array().into_iter().flatten() {
            let name = &container["name"];
            let context = &container["securityContext"];
            assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
            // Which has no narrower form: the next test.
            if name == "csi" {
                continue;
            }
            assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
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
fn the_csi_driver_is_a_container_of_its_own_and_the_only_one_with_privileges_and_can_be_left_out() {
    let of_agent = |args: &[&str]| {
        let all = objects(args);
        (one(&all, "DaemonSet", "countersign-agent")["spec"]["template"]["spec"].clone(), all)
    };
    let (without, all) = of_agent(&["--set", "agent.csi.enabled=false"]);
    assert_eq!(without["containers"].as_array().unwrap().len(), 1);
    // The memory names the setting.
    let others: Vec<_> = all.iter().filter(|o| o["metadata"]["name"] != "countersign-install").collect();
    assert!(!json!(others).to_string().contains("csi"));
    assert!(one(&objects(&[]), "Deployment", "countersign-injector").to_string().contains("=csi.countersign.dev"));
    let named = ["--set", "agent.csi.driverName=csi.spiffe.io"];
    let (with, all) = of_agent(&named);
    let [agent, driver] = with["containers"].as_array().unwrap().as_slice() else { panic!("{with}") };
    assert_eq!(agent["securityContext"], without["containers"][0]["securityContext"]);
    assert_eq!((&driver["name"], &driver["securityContext"]["privileged"]), (&json!("csi"), &json!(true)));
    let mounts = driver["volumeMounts"].as_array().unwrap();
    let writable = |m: &&Value| m["readOnly"] != true;
    let paths: Vec<_> = mounts.iter().filter(writable).map(|m| m["mountPath"].as_str().unwrap()).collect();
    let kubelet = "/var/lib/kubelet";
    let plugin = format!("{kubelet}/plugins/csi.spiffe.io");
    let expected = [&plugin, &format!("{kubelet}/plugins_registry"), &format!("{kubelet}/pods")];
    assert_eq!(paths, expected);
    assert_eq!(one(&all, "CSIDriver", "csi.spiffe.io")["spec"]["volumeLifecycleModes"], json!(["Ephemeral"]));
    let injector = |all: &[Value]| one(all, "Deployment", "countersign-injector").to_string();
    assert!(injector(&all).contains("--csi-driver=csi.spiffe.io"));
    let (_, back) = of_agent(&[&named[..], &["--set", "injector.csiVolumes=false"]].concat());
    assert!(!injector(&back).contains("--csi-driver"));
}

#[test]
fn the_cni_component_has_three_capabilities_its_folders_and_a_narrow_role_and_the_injector_knows_of_it() {
    let all = |args: &[&str]| objects(args);
    let pod = |all: &[Value]| one(all, "DaemonSet", "countersign-agent")["spec"]["template"].clone();
    let (without, with) = (all(&[]), all(&["-n", "mesh", "--set", "cni.enabled=true"]));
    // The policy on its folder stands in any case.
    let others: Vec<_> = without.iter().filter(|o| o["kind"] != "ValidatingAdmissionPolicy").collect();
    assert!(!json!(others).to_string().contains("cni"));
    let [agent, _, component] = pod(&with)["spec"]["containers"].as_array().unwrap().clone().try_into().unwrap();
    assert_eq!(agent["securityContext"], pod(&without)["spec"]["containers"][0]["securityContext"]);
    assert_eq!(component["name"], countersign_cni::CONTAINER);
    let context = &component["securityContext"];
    let capabilities = json!({ "drop": ["ALL"], "add": ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"] });
    assert_eq!((&context["privileged"], &context["capabilities"]), (&json!(false), &capabilities));
    let paths: Vec<_> = component["volumeMounts"].as_array().unwrap().iter().map(|m| m["mountPath"].clone()).collect();
    assert_eq!(paths[..4], ["/run/countersign/cni", "/run/countersign/agent", "/opt/cni/bin", "/etc/cni/net.d"]);
    let by_cgroup = |set: &str| pod(&all(&["--set", "cni.enabled=true", "--set", set])).to_string();
    assert!(by_cgroup("cni.sidecarByCgroup=true").contains("\"--sidecar-by-cgroup\""));
    assert!(!by_cgroup("cni.sidecarByCgroup=false").contains("\"--sidecar-by-cgroup\""));
    let args = component["args"].to_string();
    assert!(args.contains("--daemon-set=mesh/countersign-agent") && args.contains("--repair"));
    let role = &one(&with, "Role", "countersign-agent")["rules"];
    assert_eq!(role[0]["resourceNames"], json!(["countersign-agent"]));
    assert_eq!((&role[0]["verbs"], role.as_array().unwrap().len()), (&json!(["get"]), 1));
    let injected_for = |all: &[Value]| one(all, "Deployment", "countersign-injector").to_string().contains("\"--cni\"");
    let first = all(&["--set", "cni.enabled=true", "--set", "injector.cniRedirect=false"]);
    assert!(injected_for(&with) && !injected_for(&first));
    assert_eq!(pod(&first), pod(&all(&["--set", "cni.enabled=true"])), "the second step restarts no agent");
    let less = all(&["--set", "cni.enabled=true", "--set", "cni.repair=false", "--set", "agent.watchPods=false"]);
    assert!(!pod(&less).to_string().contains("--repair"));
    let rules = |all: &[Value]| one(all, "ClusterRole", "countersign-agent")["rules"].to_string();
    assert!(!rules(&less).contains("watch") && rules(&less).contains("[\"get\"]") && rules(&with).contains("watch"));
    for kind in ["Role", "RoleBinding"] {
        // Turned off, the components that end still have to ask.
        let kept = &one(&with, kind, "countersign-agent")["metadata"]["annotations"]["helm.sh/resource-policy"];
        assert_eq!(kept, "keep", "{kind}");
    }
    let monitored = |set: &[&str]| {
        let monitor = all(&[["--set", "podMonitor.enabled=true"].as_slice(), set].concat());
        one(&monitor, "PodMonitor", "countersign")["spec"]["podMetricsEndpoints"].to_string()
    };
    assert!(monitored(&["--set", "cni.enabled=true"]).contains("\"cni\"") && !monitored(&[]).contains("\"cni\""));
    let noted = all(&["--set", "cni.enabled=true", "--set", r#"agent.podAnnotations={"note":"b"}"#]);
    let unconfined = "container.apparmor.security.beta.kubernetes.io/cni";
    assert_eq!(pod(&noted)["metadata"]["annotations"], json!({ "note": "b", unconfined: "unconfined" }));
}

#[test]
fn the_api_servers_policies_name_what_the_code_names_and_can_be_left_out() {
    let policies = |args: &[&str]| {
        let all = objects(args).into_iter().filter(|o| o["kind"] == "ValidatingAdmissionPolicy");
        all.map(|o| o["spec"].to_string()).collect::<Vec<_>>()
    };
    let [words, pods, commands, images] = policies(&["-n", "mesh"]).try_into().unwrap();
    for policy in [&pods, &commands, &images] {
        assert!(policy.contains(&format!("'{SIDECAR}', '{REDIRECT}'")), "{policy}");
    }
    assert!(commands.contains(&format!("namespace(\\\"mesh\\\").name('{}')", live_settings::NAME)), "{commands}");
    for key in [INJECT, MODE] {
        assert!(words.contains(&format!("labels[?'{key}']")) && words.contains(&format!("annotations[?'{key}']")));
    }
    for part in [
        format!("'{SIDECAR}'").as_str(),
        format!("== {PROXY_UID}").as_str(),
        INJECT,
        "ephemeralContainers",
        "[\"mesh\"]",
        "countersign(/+[.]?)*(/cni(/.*)?)?$",
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
