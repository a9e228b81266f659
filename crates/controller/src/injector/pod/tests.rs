use super::super::new_probe_secret;
use super::*;

fn sidecar() -> Sidecar {
    Sidecar::new("countersign:1".into())
}

fn pod() -> Value {
    json!({
        "metadata": { "name": "web" },
        "spec": {
            "initContainers": [{ "name": "migrate", "image": "m" }],
            "containers": [{ "name": "app", "image": "a", "x-unknown": 1, "readinessProbe": { "httpGet": { "port": 80 } } }],
            "volumes": [{ "name": "data", "emptyDir": {} }],
        },
    })
}

/// A namespace that requests injection, in a permissive mesh.
fn asks() -> Surroundings {
    Surroundings { namespace: "shop".into(), asks: Asks::Yes, mode: Mode::Permissive, probe_secret: "s3cret".into() }
}

fn asks_not() -> Surroundings {
    Surroundings { asks: Asks::No, ..asks() }
}

fn strict() -> Surroundings {
    Surroundings { mode: Mode::Strict, ..asks() }
}

fn injected(mut pod: Value) -> Value {
    assert_eq!(inject(&mut pod, &sidecar(), &asks()), Ok(Verdict::Injected));
    pod
}

fn annotated(key: &str, value: &str) -> Value {
    let mut pod = pod();
    pod["metadata"]["annotations"] = json!({ key: value });
    pod
}

fn names(pod: &Value, list: &str) -> Vec<String> {
    pod["spec"][list].as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn redirect_then_sidecar_stand_before_the_apps_own_init_containers() {
    let pod = injected(pod());
    assert_eq!(names(&pod, "initContainers"), [REDIRECT, SIDECAR, "migrate"]);
    assert_eq!(names(&pod, "containers"), ["app"]);
    assert_eq!(pod["spec"]["initContainers"][1]["restartPolicy"], "Always");
    assert_eq!(pod["spec"]["containers"][0]["x-unknown"], 1, "what we do not know stays");
    assert_eq!(pod["spec"]["containers"][0]["readinessProbe"]["httpGet"]["port"], 15020);
    assert_eq!(names(&pod, "volumes"), ["data", VOLUME]);
}

#[test]
fn a_plain_sidecar_stands_first_among_the_containers_and_gates_and_drains() {
    let plain = Sidecar { native: false, ..sidecar() };
    let mut pod = pod();
    assert_eq!(inject(&mut pod, &plain, &asks()), Ok(Verdict::Injected));
    assert_eq!(names(&pod, "initContainers"), [REDIRECT, "migrate"]);
    assert_eq!(names(&pod, "containers"), [SIDECAR, "app"]);
    let proxy = &pod["spec"]["containers"][0];
    assert!(proxy["restartPolicy"].is_null());
    assert_eq!(proxy["lifecycle"]["postStart"]["exec"]["command"], json!(["/countersign", "sidecar-hook", "gate"]));
    assert_eq!(proxy["lifecycle"]["preStop"]["exec"]["command"], json!(["/countersign", "sidecar-hook", "drain"]));
    let once = pod.clone();
    assert_eq!(inject(&mut pod, &plain, &asks()), Ok(Verdict::Injected));
    assert_eq!(pod, once, "twice is as once");
    pod["spec"]["restartPolicy"] = "OnFailure".into();
    assert_eq!(inject(&mut pod, &plain, &asks()), Err(Refused::NeverEnds("OnFailure".into())));
    assert_eq!(inject(&mut pod, &sidecar(), &asks()), Ok(Verdict::Injected));
}

#[test]
fn the_sidecar_needs_no_privilege_and_the_redirect_one() {
    let pod = injected(pod());
    let (redirect, proxy) = (&pod["spec"]["initContainers"][0], &pod["spec"]["initContainers"][1]);
    assert_eq!(redirect["securityContext"]["capabilities"], json!({ "drop": ["ALL"], "add": ["NET_ADMIN"] }));
    assert_eq!(proxy["securityContext"]["capabilities"], json!({ "drop": ["ALL"] }));
    assert_eq!(proxy["securityContext"]["runAsNonRoot"], true);
    for container in [redirect, proxy] {
        assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
        assert_eq!(container["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    }
    assert_eq!(proxy["volumeMounts"][0]["readOnly"], true);
}

#[test]
fn with_the_cni_plugin_no_container_needs_a_privilege() {
    let by_plugin = Sidecar { cni: true, csi_driver: Some("csi.countersign.dev".into()), ..sidecar() };
    let with = |mut pod: Value| {
        assert_eq!(inject(&mut pod, &by_plugin, &strict()), Ok(Verdict::Injected));
        pod
    };
    let once = with(pod());
    assert_eq!(names(&once, "initContainers"), [SIDECAR, "migrate"], "the sidecar waits itself");
    let args = |container: &Value| -> Vec<String> { serde_json::from_value(container["args"].clone()).unwrap() };
    let proxy = &once["spec"]["initContainers"][0];
    let asked = args(proxy).into_iter().find_map(|a| a.strip_prefix("--redirect=").map(ToOwned::to_owned)).unwrap();
    let mut plain = pod();
    inject(&mut plain, &Sidecar { native: false, ..by_plugin.clone() }, &strict()).unwrap();
    assert_eq!(names(&plain, "initContainers"), [REDIRECT, "migrate"], "a plain one holds up no init container");
    let validator = &plain["spec"]["initContainers"][0];
    assert_eq!(args(validator)[..2], ["redirect", "--validate"]);
    assert!(!args(&plain["spec"]["containers"][0]).iter().any(|a| a.starts_with("--redirect")));
    for container in [proxy, validator] {
        assert_eq!(container["securityContext"]["capabilities"], json!({ "drop": ["ALL"] }));
        assert_eq!(container["securityContext"]["runAsNonRoot"], true);
        assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
    }
    assert_ne!(validator["securityContext"]["runAsUser"], proxy["securityContext"]["runAsUser"]);
    let mut without = pod();
    inject(&mut without, &Sidecar { cni: false, ..by_plugin.clone() }, &strict()).unwrap();
    let own = args(&without["spec"]["initContainers"][0]).split_off(1);
    let by_cgroup = [&own[..2], &["--by-cgroup".to_owned()], &own[2..]].concat();
    assert_eq!(asked.split(' ').collect::<Vec<_>>(), by_cgroup, "the plugin reads the same rules");
    assert_eq!(args(validator).split_off(2), by_cgroup);
    assert_eq!(with(once.clone()), once);
    assert_eq!(with(without), once, "a template that was injected before the plugin is changed");
}

#[test]
fn the_sidecars_probe_gets_its_answer_before_it_gives_up() {
    let probe = injected(pod())["spec"]["initContainers"][1]["startupProbe"].clone();
    let path = probe["httpGet"]["path"].as_str().unwrap();
    let wait: u64 = path.strip_prefix("/ready?wait=").unwrap().parse().unwrap();
    assert!(wait > 0 && wait < probe["timeoutSeconds"].as_u64().unwrap(), "{probe}");
}

#[test]
fn a_driver_mounts_the_agents_folder_and_no_host_path_is_left() {
    let by_driver = Sidecar { csi_driver: Some("csi.countersign.dev".into()), ..sidecar() };
    let volume = json!({ "name": VOLUME, "csi": { "driver": "csi.countersign.dev", "readOnly": true } });
    let with = |mut pod: Value| {
        assert_eq!(inject(&mut pod, &by_driver, &asks()), Ok(Verdict::Injected));
        pod
    };
    let once = with(pod());
    assert_eq!(once["spec"]["volumes"][1], volume);
    assert!(!once.to_string().contains("hostPath"));
    assert_eq!(with(once.clone()), once, "twice is as once");
    assert_eq!(with(injected(pod())), once, "an injection of before the driver is replaced");
    // Another driver's volume of this name is not ours, whatever the pod claims.
    let mut foreign = once;
    foreign["spec"]["volumes"][1]["csi"]["driver"] = "csi.example.org".into();
    assert!(matches!(inject(&mut foreign, &by_driver, &asks()), Err(Refused::Reserved { .. })));
}

/// The API server runs a command that names no container in the only one.
#[test]
fn a_pod_without_an_app_is_refused_so_that_no_sidecar_is_a_pods_only_container() {
    for native in [false, true] {
        let sidecar = Sidecar { native, ..sidecar() };
        let mut pod = pod();
        assert_eq!(inject(&mut pod, &sidecar, &asks()), Ok(Verdict::Injected));
        let all = pod["spec"]["containers"].as_array_mut().unwrap();
        all.retain(|c| c["name"] != "app");
        assert_eq!(inject(&mut pod.clone(), &sidecar, &asks()), Err(Refused::Malformed), "{native}");
        // A sidecar that says that an earlier injection brought it.
        pod["spec"]["containers"] = json!([{ "name": SIDECAR, "image": "i" }]);
        assert_eq!(inject(&mut pod, &sidecar, &asks()), Err(Refused::Malformed), "{native}");
    }
    for none in [json!({}), json!({ "spec": "x" }), json!({ "spec": { "containers": [] } }), json!([])] {
        assert_eq!(inject(&mut none.clone(), &sidecar(), &asks()), Err(Refused::Malformed), "{none}");
    }
}

#[test]
fn injecting_again_changes_nothing() {
    let once = injected(pod());
    assert_eq!(injected(once.clone()), once);
    // A reinvocation brings a new secret; the probes keep the first one, which the sidecar knows.
    let mut again = once.clone();
    let other = Surroundings { probe_secret: new_probe_secret(), ..asks() };
    assert_eq!(inject(&mut again, &sidecar(), &other), Ok(Verdict::Injected));
    assert_eq!(again, once);
    assert_eq!(once["spec"]["containers"][0]["readinessProbe"]["httpGet"]["path"], "/probe/s3cret/app/readiness");
    assert!(new_probe_secret().len() == 32 && new_probe_secret() != new_probe_secret());
}

#[test]
fn a_limit_ranges_defaults_survive_a_reinvocation_and_no_annotation_is_passed_over() {
    let mut limited = injected(annotated("countersign.dev/memory-limit", "64Mi"));
    // What the API server adds between two calls of the webhook.
    let defaults = json!({ "limits": { "cpu": "1", "memory": "64Mi" }, "requests": { "cpu": "1" } });
    for n in [0, 1] {
        limited["spec"]["initContainers"][n]["resources"] = defaults.clone();
    }
    assert_eq!(injected(limited.clone()), limited);
    limited["metadata"]["annotations"]["countersign.dev/redirect-cpu-limit"] = "2".into();
    let again = injected(limited);
    assert_eq!(again["spec"]["initContainers"][0]["resources"]["limits"]["cpu"], "2");
    assert_eq!(again["spec"]["initContainers"][1]["resources"]["limits"]["cpu"], "1");
    let lots = annotated("countersign.dev/redirect-memory-limit", "lots");
    let said = inject(&mut lots.clone(), &sidecar(), &asks()).unwrap_err().to_string();
    assert!(said.starts_with("annotation countersign.dev/redirect-memory-limit: `lots` is no quantity"), "{said}");
}

#[test]
fn the_stricter_of_a_pods_two_modes_counts_and_one_that_is_none_is_refused() {
    let moded = |label: &str| {
        let mut pod = annotated(MODE, "permissive");
        pod["metadata"]["labels"] = json!({ MODE: label });
        let injected = inject(&mut pod, &sidecar(), &asks());
        injected.map(|_| pod["spec"]["initContainers"][0]["args"].to_string().contains("--other-protocols=drop"))
    };
    assert_eq!((moded("strict"), moded("off")), (Ok(true), Ok(false)));
    assert!(moded("stict").unwrap_err().to_string().ends_with("did you mean `strict`?"));
}

#[test]
fn the_pods_label_wins_over_its_namespace() {
    let mut labelled = pod();
    labelled["metadata"]["labels"] = json!({ INJECT: "disabled" });
    let before = labelled.clone();
    assert!(matches!(inject(&mut labelled, &sidecar(), &asks()), Ok(Verdict::Left(_))));
    assert_eq!(labelled, before);
    labelled["metadata"]["labels"] = json!({ INJECT: "enabled" });
    assert_eq!(inject(&mut labelled, &sidecar(), &asks_not()), Ok(Verdict::Injected));
    assert!(matches!(inject(&mut pod(), &sidecar(), &asks_not()), Ok(Verdict::Left(_))));
    let mut host = pod();
    host["spec"]["hostNetwork"] = true.into();
    assert!(matches!(inject(&mut host, &sidecar(), &asks()), Ok(Verdict::Left(_))));
}

#[test]
fn a_container_under_the_sidecars_user_is_refused() {
    let mut one = pod();
    one["spec"]["containers"][0]["securityContext"] = json!({ "runAsUser": 2102 });
    assert_eq!(inject(&mut one, &sidecar(), &asks()), Err(Refused::ProxyUid("app".into())));
    let mut wide = pod();
    wide["spec"]["securityContext"] = json!({ "runAsUser": 2102 });
    assert_eq!(inject(&mut wide, &sidecar(), &asks()), Err(Refused::ProxyUid("migrate".into())));
    wide["spec"]["initContainers"][0]["securityContext"] = json!({ "runAsUser": 1 });
    wide["spec"]["containers"][0]["securityContext"] = json!({ "runAsUser": 1 });
    assert_eq!(inject(&mut wide, &sidecar(), &asks()), Ok(Verdict::Injected));
}

#[test]
fn an_ephemeral_container_under_the_sidecars_user_or_beside_its_processes_is_refused() {
    let mut pod = injected(pod());
    pod["spec"]["ephemeralContainers"] = json!([{ "name": "debug", "securityContext": { "runAsUser": 1 } }]);
    assert_eq!(judge_ephemeral(&pod, None), Ok(()), "the sidecar itself is no offence");
    for (target, is_refused) in [("app", false), (SIDECAR, true), (REDIRECT, true)] {
        pod["spec"]["ephemeralContainers"][0]["targetContainerName"] = target.into();
        assert_eq!(judge_ephemeral(&pod, None).is_err(), is_refused, "{target}");
    }
    pod["spec"]["ephemeralContainers"][0]["targetContainerName"] = Value::Null;
    pod["spec"]["ephemeralContainers"][0]["securityContext"]["runAsUser"] = 2102.into();
    assert_eq!(judge_ephemeral(&pod, None), Err(Refused::ProxyUid("debug".into())));
}

#[test]
fn annotations_reach_redirect_and_sidecar() {
    let mut asked = pod();
    asked["metadata"]["annotations"] = json!({
        "countersign.dev/ignore-inbound-ports": "9090, 9091", "countersign.dev/ignore-outbound-cidrs": "10.8.0.0/16",
        "countersign.dev/log-level": "debug", "countersign.dev/memory-limit": "64Mi",
    });
    let asked = injected(asked);
    let args = asked["spec"]["initContainers"][0]["args"].to_string();
    assert!(args.contains("--exclude-inbound-ports=15020,9090,9091"), "{args}");
    assert!(args.contains("--exclude-outbound-ports=53\""), "{args}");
    assert!(args.contains("--exclude-outbound-cidrs=10.8.0.0/16"), "{args}");
    let proxy = &asked["spec"]["initContainers"][1];
    assert!(proxy["args"].to_string().contains("--log=debug"));
    assert_eq!(proxy["resources"]["limits"]["memory"], "64Mi");
    assert_eq!(asked["spec"]["initContainers"][0]["resources"], json!({}), "each container has its own");
    let mut wrong = pod();
    wrong["metadata"]["annotations"] = json!({ "countersign.dev/mode": "tight" });
    let said = inject(&mut wrong, &sidecar(), &asks()).unwrap_err().to_string();
    assert!(said.contains("`tight` is no mode"), "{said}");
}

#[test]
fn what_is_in_a_pods_own_specification_stays_marked_until_it_is_taken_out() {
    let mut pod = pod();
    inject(&mut pod, &sidecar(), &asks()).unwrap();
    let version = pod["metadata"]["annotations"][INJECTED].as_str().unwrap().to_owned();
    assert!(!version.ends_with(IN_MANIFEST), "{version}");
    let marked = format!("{version}{IN_MANIFEST}");
    pod["metadata"]["annotations"][INJECTED] = marked.clone().into();
    inject(&mut pod, &sidecar(), &asks()).unwrap();
    assert_eq!(pod["metadata"]["annotations"][INJECTED], marked);
    let mut without = self::pod();
    without["metadata"]["annotations"] = json!({ INJECTED: marked });
    inject(&mut without, &sidecar(), &asks()).unwrap();
    assert_eq!(without["metadata"]["annotations"][INJECTED], version, "the annotation alone is no volume");
}

#[test]
fn a_name_of_ours_on_something_of_the_apps_own_is_refused() {
    let said = |pod: Value| inject(&mut pod.clone(), &sidecar(), &asks()).unwrap_err().to_string();
    let mut own_volume = pod();
    own_volume["spec"]["volumes"] = json!([{ "name": VOLUME, "emptyDir": {} }]);
    own_volume["spec"]["containers"][0]["volumeMounts"] = json!([{ "name": VOLUME, "mountPath": "/x" }]);
    assert!(said(own_volume.clone()).starts_with("volume `countersign-agent`"));
    own_volume["metadata"]["annotations"] = json!({ INJECTED: "0.1.0" });
    assert!(said(own_volume.clone()).starts_with("volume `countersign-agent`"), "an annotation is easily written");
    own_volume["spec"]["volumes"] = json!(volumes(&sidecar()));
    assert!(said(own_volume).starts_with("the mount of container `app` `countersign-agent`"));
    for list in ["containers", "initContainers"] {
        let mut mount = pod();
        mount["spec"][list][0]["volumeMounts"] = json!([{ "name": VOLUME, "mountPath": "/x" }]);
        assert!(said(mount).contains("`countersign-agent` has a name that the injection uses"));
        for name in [SIDECAR, REDIRECT] {
            let mut container = pod();
            container["spec"][list][0]["name"] = name.into();
            assert_eq!(said(container), format!("container `{name}` has a name that the injection uses: rename it"));
        }
    }
}

#[test]
fn a_label_that_means_nothing_is_refused_with_what_was_meant() {
    for value in ["enable", "true"] {
        let mut labelled = pod();
        labelled["metadata"]["labels"] = json!({ INJECT: value });
        for around in [asks(), asks_not()] {
            let said = inject(&mut labelled.clone(), &sidecar(), &around).unwrap_err().to_string();
            assert_eq!(
                said,
                format!("countersign.dev/inject: `{value}` is neither enabled nor disabled; did you mean `enabled`?")
            );
        }
    }
    let unclear = Surroundings { asks: Asks::Unclear, ..asks() };
    assert_eq!(inject(&mut pod(), &sidecar(), &unclear), Err(Refused::UnclearNamespace("shop".into())));
    let mut clear = pod();
    clear["metadata"]["labels"] = json!({ INJECT: "disabled" });
    assert!(matches!(inject(&mut clear, &sidecar(), &unclear), Ok(Verdict::Left(_))));
    clear["metadata"]["labels"] = json!({ INJECT: "enabled" });
    assert_eq!(inject(&mut clear, &sidecar(), &unclear), Ok(Verdict::Injected));
}

#[test]
fn a_strict_pod_names_no_resolver_of_its_own_without_the_administrators_leave() {
    let named = |resolvers: Value| {
        let mut pod = pod();
        pod["spec"]["dnsConfig"] = json!({ "nameservers": resolvers, "searches": ["a"] });
        pod
    };
    let leave = Sidecar { leave: super::super::Leave::of(["shop".to_owned()]), ..sidecar() };
    let own = || named(json!(["192.0.2.53"]));
    assert_eq!(inject(&mut own(), &sidecar(), &asks()), Ok(Verdict::Injected), "not strict");
    assert_eq!(inject(&mut own(), &leave, &strict()), Ok(Verdict::Injected));
    assert_eq!(inject(&mut named(json!([])), &sidecar(), &strict()), Ok(Verdict::Injected));
    let said = inject(&mut own(), &sidecar(), &strict()).unwrap_err().to_string();
    assert!(said.contains("`192.0.2.53`") && said.contains("mesh.allowExceptions"), "{said}");
}

#[test]
fn exceptions_of_a_strict_mesh_need_the_administrators_leave() {
    let leave = Sidecar { leave: super::super::Leave::of(["shop".to_owned()]), ..sidecar() };
    for (key, value) in [
        ("ignore-inbound-ports", "8080"),
        ("ignore-outbound-ports", "5432"),
        ("ignore-inbound-cidrs", "10.0.0.0/8"),
        ("ignore-outbound-cidrs", "10.0.0.0/8"),
        ("allow-udp-ports", "4433"),
        ("allow-other-cidrs", "10.0.0.0/8"),
    ] {
        let pod = || annotated(&format!("countersign.dev/{key}"), value);
        assert_eq!(inject(&mut pod(), &sidecar(), &asks()), Ok(Verdict::Injected), "{key}");
        let said = inject(&mut pod(), &sidecar(), &strict()).unwrap_err().to_string();
        assert!(said.contains(key) && said.contains("mesh.allowExceptions"), "{said}");
        assert_eq!(inject(&mut pod(), &leave, &strict()), Ok(Verdict::Injected), "{key}");
        let mut own = pod();
        own["metadata"]["annotations"][MODE] = "strict".into();
        assert!(inject(&mut own, &sidecar(), &asks()).is_err(), "a pod's own strict is one too");
        let elsewhere = Surroundings { namespace: "other".into(), ..strict() };
        assert!(inject(&mut pod(), &leave, &elsewhere).is_err());
    }
    let everything = || annotated("countersign.dev/ignore-inbound-cidrs", "0.0.0.0/0");
    assert!(inject(&mut everything(), &sidecar(), &asks()).is_err(), "out of the mesh altogether, in any mode");
    assert_eq!(inject(&mut everything(), &leave, &strict()), Ok(Verdict::Injected));
    let nobody = Sidecar { leave: super::super::Leave::of([" ".to_owned()]), ..sidecar() };
    assert!(inject(&mut everything(), &nobody, &asks()).is_err(), "an empty list is nobody");
    let all = Sidecar { leave: super::super::Leave::of(["*".to_owned()]), ..sidecar() };
    assert_eq!(inject(&mut everything(), &all, &strict()), Ok(Verdict::Injected));
}

#[test]
fn other_protocols_are_dropped_where_the_pod_is_strict() {
    let args = |around: &Surroundings, mut pod: Value| {
        let leave = Sidecar { leave: super::super::Leave::of(["*".to_owned()]), ..sidecar() };
        inject(&mut pod, &leave, around).unwrap();
        pod["spec"]["initContainers"][0]["args"].to_string()
    };
    assert!(!args(&asks(), pod()).contains("--other-protocols"));
    assert!(args(&strict(), pod()).contains("--other-protocols=drop"));
    assert!(args(&asks(), annotated(MODE, "strict")).contains("--other-protocols=drop"));
    assert!(args(&strict(), annotated(MODE, "off")).contains("--other-protocols=drop"), "strict is not weakened");
    let named = annotated("countersign.dev/allow-udp-ports", "4433");
    assert!(args(&strict(), named.clone()).contains("--allow-udp-ports=4433"));
    assert!(!args(&asks(), named).contains("--allow-udp-ports"), "the redirect knows it with the other flag alone");
    assert!(args(&asks(), pod()).contains("--in-pod"));
}

#[test]
fn an_ephemeral_container_of_a_strict_pod_waits_for_the_sidecar() {
    let mut pod = pod();
    inject(&mut pod, &sidecar(), &strict()).unwrap();
    let stored = |list: &str, started: bool| {
        let mut stored = pod.clone();
        stored["status"][list] = json!([{ "name": "app", "started": true }, { "name": SIDECAR, "started": started }]);
        stored
    };
    for list in ["initContainerStatuses", "containerStatuses"] {
        assert_eq!(judge_ephemeral(&pod, Some(&stored(list, true))), Ok(()), "{list}");
        assert_eq!(judge_ephemeral(&pod, Some(&stored(list, false))), Err(Refused::Early), "{list}");
    }
    assert_eq!(judge_ephemeral(&stored("initContainerStatuses", true), Some(&pod)), Err(Refused::Early), "as stored");
    assert_eq!(judge_ephemeral(&pod, None), Err(Refused::Early));
    let mut forged = pod.clone();
    forged["spec"]["initContainers"] = json!([]);
    assert_eq!(judge_ephemeral(&forged, Some(&pod)), Err(Refused::Early), "a request without our containers");
    forged["spec"]["ephemeralContainers"] = json!([{ "name": "sly", "securityContext": { "runAsUser": 2102 } }]);
    let running = stored("initContainerStatuses", true);
    assert_eq!(judge_ephemeral(&forged, Some(&running)), Err(Refused::ProxyUid("sly".into())));
    confine_ephemeral(&mut forged, Some(&running), &Leave::default(), "shop");
    let drop = &forged["spec"]["ephemeralContainers"][0]["securityContext"]["capabilities"]["drop"];
    assert_eq!(*drop, json!(["NET_RAW"]));
    let mut permissive = self::pod();
    inject(&mut permissive, &sidecar(), &asks()).unwrap();
    assert_eq!(judge_ephemeral(&permissive, None), Ok(()));
}

#[test]
fn apps_of_strict_pods_have_no_raw_sockets_by_default_ephemeral_ones_neither() {
    let drops = |container: &Value| container["securityContext"]["capabilities"]["drop"] == json!(["NET_RAW"]);
    let with = |around: &Surroundings, sidecar: &Sidecar| {
        let mut pod = pod();
        assert_eq!(inject(&mut pod, sidecar, around), Ok(Verdict::Injected));
        pod
    };
    let strictly = with(&strict(), &sidecar());
    let of = |pod: &Value| (drops(&pod["spec"]["containers"][0]), drops(&pod["spec"]["initContainers"][2]));
    assert_eq!(of(&strictly), (true, true), "app and init container");
    assert_eq!(of(&with(&asks(), &sidecar())), (false, false), "a permissive pod sends plaintext anyway");
    let permitting = Sidecar { leave: Leave::of(["shop".to_owned()]), ..sidecar() };
    assert_eq!(of(&with(&strict(), &permitting)), (false, false));
    let by_plugin = with(&strict(), &Sidecar { cni: true, ..sidecar() });

    let debugged = |pod: &Value, leave: &Leave| {
        let mut pod = pod.clone();
        pod["spec"]["ephemeralContainers"] = json!([{ "name": "old" }]);
        let before = pod.clone();
        pod["spec"]["ephemeralContainers"].as_array_mut().unwrap().push(json!({ "name": "new" }));
        confine_ephemeral(&mut pod, Some(&before), leave, "shop");
        [0, 1].map(|n| drops(&pod["spec"]["ephemeralContainers"][n]))
    };
    let none = Leave::default();
    assert_eq!(debugged(&strictly, &none), [false, true], "one that is there cannot be changed");
    assert_eq!(debugged(&by_plugin, &none), [false, true]);
    assert_eq!(debugged(&strictly, &Leave::of(["shop".to_owned()])), [false, false]);
    assert_eq!(debugged(&with(&asks(), &sidecar()), &none), [false, false]);
    assert_eq!(debugged(&pod(), &none), [false, false], "not in the mesh");
}

#[test]
fn an_ephemeral_container_is_judged_by_the_sidecar_and_not_by_a_label() {
    let mut pod = injected(pod());
    pod["metadata"]["labels"] = json!({ INJECT: "disabled" });
    pod["spec"]["ephemeralContainers"] = json!([{ "name": "debug", "securityContext": { "runAsUser": 2102 } }]);
    assert_eq!(judge_ephemeral(&pod, None), Err(Refused::ProxyUid("debug".into())));
    pod["spec"]["ephemeralContainers"] =
        json!([{ "name": "debug", "volumeMounts": [{ "name": VOLUME, "mountPath": "/x" }] }]);
    assert!(judge_ephemeral(&pod, None).unwrap_err().to_string().contains("the mount of container `debug`"));
    pod["spec"]["initContainers"] = json!([]);
    assert_eq!(judge_ephemeral(&pod, None), Ok(()), "a pod without a sidecar has nothing to bypass");
}
