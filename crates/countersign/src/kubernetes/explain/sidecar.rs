//! What a pod's sidecar knows of itself, as steps of the pod's way into the mesh.

use countersign_identity::policy::Mode;
use countersign_proxy::plaintext::Row;
use countersign_proxy::status_page::{Carried, Direction, SidecarStatus};

use super::Step;
use crate::kubernetes::sidecars::Unasked;
use crate::operator::when;

/// What else there is to be said of a sidecar's mode.
#[derive(Debug, Default)]
pub struct Around {
    /// Why sidecars are opener than their modes, if they are.
    pub open: Option<String>,
    /// Whether the containers of its pod see each other's processes.
    pub shares_processes: bool,
}

/// What sharing processes gives away (docs/threat-model.md).
const SHARED: &str = "the pod's containers see each other's processes (shareProcessNamespace): root among the apps can end the sidecar, and \
                      nothing gets through until it is back";

/// The steps that the sidecar itself tells of. `now`: seconds since 1970.
pub fn told(asked: &Result<SidecarStatus, Unasked>, now: i64, around: &Around) -> Vec<Step> {
    let status = match asked {
        Ok(status) => status,
        Err(why) => return vec![Step { name: "sidecar", outcome: Err(format!("{why}; {}", why.mend())) }],
    };
    let since = format!("version {}, started {}", status.version, when(status.started_at));
    let mut steps = vec![Step { name: "sidecar", outcome: Ok(since) }];
    // Who needs no leave of its node has no such step.
    steps.extend(status.not_admitted.as_deref().map(|why| Step { name: "admission", outcome: Err(not_admitted(why)) }));
    steps.extend([
        Step { name: "attestation", outcome: attestation(status) },
        Step { name: "SVID", outcome: svid(status, now) },
        Step { name: "mode", outcome: mode(status, around) },
        Step { name: "handshakes", outcome: Ok(handshakes(status)) },
    ]);
    steps
}

/// Why the node lets none of the sidecar's connections pass, and what to do.
fn not_admitted(why: &str) -> String {
    format!(
        "{why}; its pod starts once the node's CNI component, a container of the agent's pod, has admitted it: see that container's log"
    )
}

/// A plaintext peer in words.
pub fn sentence(row: &Row) -> String {
    let how = if row.key.mode == Carried::Refused { "refused" } else { "carried" };
    let (key, last) = (&row.key, when(row.last_seen));
    format!(
        "{} {}, port {}: {how}, {} open, {} in all, last {last}",
        key.direction.as_str(),
        key.peer,
        key.port,
        row.open,
        row.total
    )
}

/// What the agent last answered the sidecar.
fn attestation(status: &SidecarStatus) -> Result<String, String> {
    match &status.agent_refusal {
        Some(refusal) => Err(format!("{} ({}, {})", refusal.message, refusal.code, when(refusal.at))),
        None if status.identity.is_some() => Ok("the agent's last answer was an identity".into()),
        None => Err("the agent has not answered the sidecar yet".into()),
    }
}

fn svid(status: &SidecarStatus, now: i64) -> Result<String, String> {
    let identity = status.identity.as_ref().ok_or("the sidecar has none")?;
    match identity.expires_at - now {
        left @ 1.. => Ok(format!("{}, serial {}, {left} s left", identity.spiffe_id, identity.serial)),
        over => Err(format!("it ended {} s ago; is the agent connected to its server?", -over)),
    }
}

fn mode(status: &SidecarStatus, around: &Around) -> Result<String, String> {
    let missing = || format!(" ({})", status.missing.as_deref().unwrap_or("the directory has not answered"));
    let mode = status.mode.clone().ok_or_else(|| format!("the sidecar does not know its policy yet{}", missing()))?;
    let shared = (around.shares_processes && mode == Mode::Strict.to_string()).then(|| SHARED.to_owned());
    Ok([Some(mode), around.open.clone(), shared].into_iter().flatten().collect::<Vec<_>>().join("; "))
}

fn handshakes(status: &SidecarStatus) -> String {
    let count = |direction, mode| {
        let of = status.connections.iter().filter(|c| (c.direction, c.mode) == (direction, mode));
        of.map(|c| c.count).sum::<u64>()
    };
    let one = |direction: Direction| {
        format!(
            "{}: {} over mTLS, {} in the clear, {} refused",
            direction.as_str(),
            count(direction, Carried::Mtls),
            count(direction, Carried::Plain),
            count(direction, Carried::Refused)
        )
    };
    format!("{}; {}; {} open", one(Direction::Inbound), one(Direction::Outbound), status.open)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    use crate::kubernetes::sidecars::tests::page;

    fn status(change: impl FnOnce(&mut Value)) -> SidecarStatus {
        let mut page = page();
        change(&mut page);
        serde_json::from_value(page).unwrap()
    }

    #[test]
    fn a_sidecar_that_is_well_passes_each_step() {
        let steps = told(&Ok(status(|_| {})), 1_000, &Around::default());
        let names: Vec<_> = steps.iter().map(|s| s.name).collect();
        assert_eq!(names, ["sidecar", "attestation", "SVID", "mode", "handshakes"]);
        assert!(steps.iter().all(|s| s.outcome.is_ok()));
        assert_eq!(steps[2].outcome.as_ref().unwrap(), "spiffe://a.org/ns/shop/sa/web, serial 0a, 3999999000 s left");
        let said = steps[4].outcome.as_ref().unwrap();
        let expected =
            "inbound: 7 over mTLS, 0 in the clear, 0 refused; outbound: 0 over mTLS, 0 in the clear, 0 refused; 1 open";
        assert_eq!(said, expected);
    }

    #[test]
    fn a_sidecar_that_lacks_nothing_but_its_nodes_leave_says_so() {
        let why = "the node does not let this sidecar's connections pass yet: no answer within 10 s";
        let steps = told(&Ok(status(|page| page["not_admitted"] = json!(why))), 1_000, &Around::default());
        let missing: Vec<_> = steps.iter().filter(|step| step.outcome.is_err()).collect();
        assert_eq!((missing.len(), missing[0].name), (1, "admission"));
        assert!(missing[0].outcome.as_ref().unwrap_err().starts_with(why));
    }

    #[test]
    fn the_agents_last_word_counts() {
        let refusal = json!({ "at": 60, "code": "PermissionDenied", "message": "no identity issued: it also needs y" });
        let refused = status(|page| page["agent_refusal"] = refusal);
        let why = attestation(&refused).unwrap_err();
        assert_eq!(why, "no identity issued: it also needs y (PermissionDenied, 1970-01-01T00:01:00Z)");
        assert!(attestation(&status(|_| {})).is_ok());
        let silent = status(|page| page["identity"] = Value::Null);
        assert!(attestation(&silent).unwrap_err().contains("not answered"));
    }

    #[test]
    fn an_svid_that_is_over_is_none() {
        let ends = |end: i64| status(|page| page["identity"]["expires_at"] = json!(end));
        assert!(svid(&ends(61), 60).is_ok());
        assert!(svid(&ends(60), 60).unwrap_err().contains("ended 0 s ago"));
        assert!(svid(&status(|page| page["identity"] = Value::Null), 60).unwrap_err().contains("none"));
    }

    #[test]
    fn a_mode_that_is_not_known_says_what_is_missing() {
        let waiting = status(|page| (page["mode"], page["missing"]) = (Value::Null, json!("no SVID yet")));
        assert!(mode(&waiting, &Around::default()).unwrap_err().contains("no SVID yet"));
    }

    #[test]
    fn a_mode_that_an_uninstallation_has_opened_says_so() {
        let around = Around { open: Some("the mesh is transparent".into()), ..Around::default() };
        let steps = told(&Ok(status(|_| {})), 1_000, &around);
        assert_eq!(steps[3].outcome.as_ref().unwrap(), "permissive; the mesh is transparent");
    }

    #[test]
    fn a_strict_pod_whose_containers_share_their_processes_is_told_what_that_gives_away() {
        let said = |mode: &str, shares_processes| {
            let of = status(|page| page["mode"] = json!(mode));
            super::mode(&of, &Around { shares_processes, ..Around::default() }).unwrap()
        };
        assert!(said("strict", true).starts_with("strict; the pod's containers see each other's processes"));
        assert_eq!((said("strict", false).as_str(), said("permissive", true).as_str()), ("strict", "permissive"));
    }

    #[test]
    fn a_sidecar_that_cannot_be_asked_is_one_step_with_what_to_do() {
        let steps = told(&Err(Unasked::Forbidden("no".into())), 0, &Around::default());
        assert_eq!((steps.len(), steps[0].name), (1, "sidecar"));
        let why = steps[0].outcome.as_ref().unwrap_err();
        assert!(why.contains("get and create on pods/portforward"), "{why}");
    }

    #[test]
    fn a_plaintext_peer_is_a_sentence() {
        let row = &status(|_| {}).plaintext.peers[0];
        let said = "inbound 10.0.0.9, port 8080: carried, 1 open, 3 in all, last 1970-01-01T00:02:00Z";
        assert_eq!(sentence(row), said);
    }
}
