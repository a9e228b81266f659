//! Redirects the kubelet's probes and hooks to the sidecar, which asks the app: in strict mode nothing else may reach
//! the app in plaintext.

use serde_json::{Map, Value, json};

/// TCP port of the sidecar for health checks.
const PROBE_PORT: u16 = 15020;

/// Probes and hooks of a container, and the sidecar's names for them.
const ASKED: [(&str, &str); 5] = [
    ("/livenessProbe", "liveness"),
    ("/readinessProbe", "readiness"),
    ("/startupProbe", "startup"),
    ("/lifecycle/postStart", "post-start"),
    ("/lifecycle/preStop", "pre-stop"),
];
/// Timeout of a hook in seconds. A hook has none of its own: the pod's termination grace period bounds it, 30 s by
/// default.
const HOOK_SECONDS: u64 = 30;

/// Rewrites the probes and hooks of one container. The checks that the sidecar has to run are added to `written`, below
/// `secret`: whoever cannot read the pod cannot ask for them.
pub fn rewrite(container: &mut Value, secret: &str, written: &mut Map<String, Value>) {
    let Some(name) = container["name"].as_str().map(ToOwned::to_owned) else { return };
    let ports = container["ports"].clone();
    for (place, kind) in ASKED {
        let Some(probe) = container.pointer_mut(place).and_then(Value::as_object_mut) else { continue };
        let unless_set = if place.starts_with("/lifecycle") { HOOK_SECONDS } else { 1 };
        let timeout = probe.get("timeoutSeconds").and_then(Value::as_u64).unwrap_or(unless_set);
        let Some(mut asked) = app_side(probe, &ports) else { continue };
        asked["timeout_seconds"] = timeout.into();
        let asked_as = format!("{secret}/{name}/{kind}");
        for handler in ["httpGet", "tcpSocket", "grpc"] {
            probe.remove(handler);
        }
        probe.insert("httpGet".into(), json!({ "path": format!("/probe/{asked_as}"), "port": PROBE_PORT }));
        written.insert(asked_as, asked);
    }
}

/// The check that the sidecar runs; `None` if the probe does not use this pod's network, or uses a port that it does
/// not have.
fn app_side(probe: &Map<String, Value>, ports: &Value) -> Option<Value> {
    if let Some(http) = probe.get("httpGet") {
        // A probe of another host does not concern the app.
        if http["host"].as_str().is_some_and(|h| !h.is_empty()) {
            return None;
        }
        let headers: Vec<Value> = http["httpHeaders"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|h| json!([h["name"].as_str().unwrap_or_default(), h["value"].as_str().unwrap_or_default()]))
            .collect();
        let path = http["path"].as_str().filter(|p| !p.is_empty()).unwrap_or("/");
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let tls = http["scheme"].as_str() == Some("HTTPS");
        let port = number(&http["port"], ports)?;
        return Some(json!({ "port": port, "http": { "tls": tls, "path": path, "headers": headers } }));
    }
    if let Some(tcp) = probe.get("tcpSocket") {
        if tcp["host"].as_str().is_some_and(|h| !h.is_empty()) {
            return None;
        }
        return Some(json!({ "port": number(&tcp["port"], ports)?, "tcp": {} }));
    }
    let grpc = probe.get("grpc")?;
    let service = grpc["service"].as_str().unwrap_or_default();
    Some(json!({ "port": number(&grpc["port"], ports)?, "grpc": { "service": service } }))
}

/// A port by number, or by name among the container's own ports.
fn number(port: &Value, ports: &Value) -> Option<u16> {
    if let Some(number) = port.as_u64() {
        return number.try_into().ok().filter(|p| *p != PROBE_PORT);
    }
    let name = port.as_str()?;
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let found = ports.as_array()?.iter().find(|p| p["name"].as_str() == Some(name))?;
    found["containerPort"].as_u64()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(container: Value) -> (Value, Value) {
        let (mut container, mut written) = (container, Map::new());
        rewrite(&mut container, "s3cret", &mut written);
        (container, Value::Object(written))
    }

    #[test]
    fn http_tcp_and_grpc_probes_go_through_the_sidecar() {
        let (container, written) = rewritten(json!({
            "name": "app", "ports": [{"name": "web", "containerPort": 8080}],
            "livenessProbe": {"httpGet": {"path": "/live?x=1", "port": "web", "scheme": "HTTPS", "httpHeaders": [{"name": "A", "value": "b"}]},
                              "timeoutSeconds": 3, "periodSeconds": 7},
            "readinessProbe": {"tcpSocket": {"port": 5432}},
            "startupProbe": {"grpc": {"port": 9000, "service": "db"}, "failureThreshold": 30},
        }));
        assert_eq!(
            container["livenessProbe"],
            json!({"httpGet": {"path": "/probe/s3cret/app/liveness", "port": 15020}, "timeoutSeconds": 3, "periodSeconds": 7})
        );
        assert_eq!(
            container["readinessProbe"],
            json!({"httpGet": {"path": "/probe/s3cret/app/readiness", "port": 15020}})
        );
        assert_eq!(container["startupProbe"]["failureThreshold"], 30);
        assert_eq!(
            written,
            json!({
                "s3cret/app/liveness": {"port": 8080, "timeout_seconds": 3,
                                 "http": {"tls": true, "path": "/live?x=1", "headers": [["A", "b"]]}},
                "s3cret/app/readiness": {"port": 5432, "timeout_seconds": 1, "tcp": {}},
                "s3cret/app/startup": {"port": 9000, "timeout_seconds": 1, "grpc": {"service": "db"}},
            })
        );
    }

    #[test]
    fn hooks_go_through_the_sidecar_too() {
        let (container, written) = rewritten(json!({
            "name": "app",
            "lifecycle": {"preStop": {"httpGet": {"path": "/drain", "port": 8080}}, "postStart": {"exec": {"command": ["true"]}}},
        }));
        let asked = json!({"httpGet": {"path": "/probe/s3cret/app/pre-stop", "port": 15020}});
        assert_eq!(container["lifecycle"], json!({"preStop": asked, "postStart": {"exec": {"command": ["true"]}}}));
        assert_eq!(written["s3cret/app/pre-stop"]["timeout_seconds"], 30);
        assert_eq!(written["s3cret/app/pre-stop"]["http"]["path"], "/drain");
    }

    #[test]
    fn what_asks_nothing_of_the_app_over_the_network_stays() {
        let probes = json!({
            "name": "app",
            "livenessProbe": {"exec": {"command": ["true"]}},
            "readinessProbe": {"httpGet": {"host": "example.org", "port": 80}},
            "startupProbe": {"httpGet": {"port": "no-such-port"}},
        });
        let (container, written) = rewritten(probes.clone());
        assert_eq!(container, probes);
        assert_eq!(written, json!({}));
    }

    #[test]
    fn what_is_rewritten_already_is_left_as_it_is() {
        let (once, _) = rewritten(json!({"name": "a", "livenessProbe": {"tcpSocket": {"port": 1}}}));
        let (twice, written) = rewritten(once.clone());
        assert_eq!(once, twice);
        assert_eq!(written, json!({}));
    }
}
