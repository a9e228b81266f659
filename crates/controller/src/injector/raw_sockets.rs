//! Takes `CAP_NET_RAW` from the apps of strict pods. Root in a container has it by the runtime's default, and no redirect sees what a
//! packet socket (`AF_PACKET`) sends. A container that asks for it by name keeps it: Pod Security `baseline` forbids that, as it
//! forbids `NET_ADMIN`, with which the rules themselves can be removed.

use serde_json::{Value, json};

/// The capability, as Kubernetes writes it.
const NET_RAW: &str = "NET_RAW";
/// What it is part of.
const ALL: &str = "ALL";

/// Has a container drop it, unless the container asks for it.
pub fn drop_from(container: &mut Value) {
    let capabilities = &container["securityContext"]["capabilities"];
    let lists = |list: &str, names: &[&str]| {
        let listed = capabilities[list].as_array().into_iter().flatten().filter_map(Value::as_str);
        listed.map(canonical).any(|name| names.contains(&name.as_str()))
    };
    let is_privileged = container["securityContext"]["privileged"] == true;
    if is_privileged || lists("add", &[NET_RAW, ALL]) || lists("drop", &[NET_RAW, ALL]) {
        return;
    }
    // Whatever else stands there is the API server's to refuse.
    for parent in ["/securityContext", "/securityContext/capabilities"] {
        if container.pointer(parent).is_some_and(|found| !found.is_object() && !found.is_null()) {
            return;
        }
    }
    match &mut container["securityContext"]["capabilities"]["drop"] {
        Value::Array(dropped) => dropped.push(NET_RAW.into()),
        none @ Value::Null => *none = json!([NET_RAW]),
        _ => {}
    }
}

/// `CAP_NET_RAW` and `net_raw` are the same to runtimes.
fn canonical(name: &str) -> String {
    let name = name.to_ascii_uppercase();
    name.strip_prefix("CAP_").map_or_else(|| name.clone(), ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(security: Value) -> Value {
        let mut container = json!({ "name": "app", "securityContext": security });
        drop_from(&mut container);
        let once = container.clone();
        drop_from(&mut container);
        assert_eq!(container, once, "twice is as once");
        container["securityContext"].take()
    }

    #[test]
    fn a_container_loses_the_capability_unless_it_asks_for_it() {
        let dropped = |names: &[&str]| json!({ "capabilities": { "drop": names } });
        let mut bare = json!({ "name": "app" });
        drop_from(&mut bare);
        assert_eq!(bare, json!({ "name": "app", "securityContext": dropped(&["NET_RAW"]) }));
        assert_eq!(after(Value::Null), dropped(&["NET_RAW"]));
        assert_eq!(after(dropped(&["CHOWN"])), dropped(&["CHOWN", "NET_RAW"]));
        for names in [["ALL"], ["NET_RAW"], ["cap_net_raw"], ["all"]] {
            assert_eq!(after(dropped(&names)), dropped(&names));
            let added = json!({ "capabilities": { "add": names } });
            assert_eq!(after(added.clone()), added);
        }
        let user = json!({ "runAsUser": 0, "capabilities": { "add": ["NET_BIND_SERVICE"] } });
        let expected = json!({ "runAsUser": 0, "capabilities": { "add": ["NET_BIND_SERVICE"], "drop": ["NET_RAW"] } });
        assert_eq!(after(user), expected);
        assert_eq!(after(json!({ "privileged": true })), json!({ "privileged": true }));
        for odd in [json!("x"), json!({ "capabilities": 7 }), json!({ "capabilities": { "drop": "ALL" } })] {
            assert_eq!(after(odd.clone()), odd, "not ours to correct");
        }
    }
}
