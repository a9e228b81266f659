//! What is known before a move to strict, and how it is shown.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};

use countersign_identity::policy::Policy;
use countersign_proxy::plaintext::{Key, Row};
use countersign_proxy::status_page::{Carried, Direction, SidecarStatus};
use serde_json::{Value, json};

use crate::kubernetes::sidecars::Unasked;
use crate::operator::output::Table;
use crate::operator::when;

/// What is known before a move.
#[derive(Debug, Default)]
pub struct Plan {
    /// Plaintext peers that strict would cut off.
    pub found: Vec<Peer>,
    /// Plaintext peers that are refused already, for a port's own mode or list: the move changes nothing for them.
    pub refused: Vec<Peer>,
    /// Pods whose sidecars could not be asked, and why.
    pub unknown: Vec<(String, Unasked)>,
    /// Sidecars that were asked.
    pub asked: Vec<Asked>,
    /// Pods with exceptions that nobody gave leave for, and which.
    pub exceptions: Vec<(String, String)>,
    /// Pods with exceptions that the administrator gave leave for, and which. They stand under strict.
    pub allowed: Vec<(String, String)>,
    /// Pods whose other protocols go on in the clear until they are made anew.
    pub unguarded: Vec<String>,
}

/// A sidecar that was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Its pod.
    pub workload: String,
    /// When it started to look, in seconds since 1970.
    pub since: i64,
    /// Rows that fell out of its table. A peer that is missing there proves nothing then.
    pub forgotten: u64,
}

impl Plan {
    /// Whether strict is known to cut off nobody.
    pub fn is_clear(&self) -> bool {
        let whole = self.asked.iter().all(|a| a.forgotten == 0);
        self.found.is_empty() && self.unknown.is_empty() && self.exceptions.is_empty() && whole
    }

    /// Sorts a sidecar's rows in. `strict` is the policy that its pod has after the move.
    pub fn take(&mut self, workload: &str, status: SidecarStatus, names: &HashMap<IpAddr, String>, strict: &Policy) {
        let since = status.started_at;
        let forgotten = status.plaintext.forgotten;
        self.asked.push(Asked { workload: workload.to_owned(), since, forgotten });
        for row in status.plaintext.peers {
            let Key { peer, direction, mode, port } = row.key;
            let at = SocketAddr::new(peer, port);
            let name = names.get(&peer.to_canonical()).cloned().unwrap_or_else(|| peer.to_string());
            let peer = Peer { workload: workload.to_owned(), name, row, since };
            match mode {
                Carried::Plain if direction == Direction::Outbound && strict.lets_out(at) => {}
                Carried::Plain if direction == Direction::Inbound && strict.admits_plaintext(port) => {}
                Carried::Plain => self.found.push(peer),
                Carried::Refused => self.refused.push(peer),
                Carried::Mtls => {}
            }
        }
    }

    /// For people.
    pub fn table(&self) -> Table {
        let mut table = Table::new(&[
            "workload",
            "direction",
            "plaintext peer",
            "port",
            "how",
            "open/total",
            "first seen",
            "last seen",
            "looking since",
        ]);
        self.found.iter().for_each(|peer| table.row(peer.cells("carried")));
        self.refused.iter().for_each(|peer| table.row(peer.cells("refused already")));
        let mut other = |pod: &str, direction: &str, what: String| {
            table.row(vec![pod.to_owned(), direction.to_owned(), what]);
        };
        for asked in self.asked.iter().filter(|a| a.forgotten > 0) {
            other(&asked.workload, "?", format!("the table was full: {} rows were forgotten", asked.forgotten));
        }
        for (pod, why) in &self.unknown {
            other(pod, "?", format!("unknown: {why}; {}", why.mend()));
        }
        for (pod, which) in &self.exceptions {
            other(pod, "past", format!("exception: {which}"));
        }
        for (pod, which) in &self.allowed {
            other(pod, "past", format!("allowed exception: {which}"));
        }
        table
    }

    /// For programs.
    pub fn json(&self, moved: bool) -> Value {
        let peers = |all: &[Peer]| all.iter().map(Peer::json).collect::<Vec<_>>();
        let unknown = self.unknown.iter().map(
            |(pod, why)| json!({ "workload": pod, "reason": why.code(), "why": why.to_string(), "mend": why.mend() }),
        );
        let past = |all: &[(String, String)]| {
            all.iter().map(|(pod, what)| json!({ "workload": pod, "what": what })).collect::<Vec<_>>()
        };
        let asked = self.asked.iter();
        let asked = asked.map(|a| json!({ "workload": a.workload, "since": a.since, "forgotten": a.forgotten }));
        json!({
            "moved": moved, "plaintext": peers(&self.found), "refused": peers(&self.refused),
            "sidecars": asked.collect::<Vec<_>>(), "unknown": unknown.collect::<Vec<_>>(),
            "exceptions": past(&self.exceptions), "allowed_exceptions": past(&self.allowed), "other_protocols_in_clear": self.unguarded,
        })
    }
}

/// A plaintext peer of a workload. Times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    workload: String,
    /// What its address is called, or the address.
    name: String,
    row: Row,
    /// When the sidecar started to look.
    since: i64,
}

impl Peer {
    fn json(&self) -> Value {
        let Row { key, first_seen, last_seen, open, total } = &self.row;
        json!({
            "workload": self.workload, "direction": way(key.direction), "peer": self.name, "address": key.peer,
            "port": key.port, "open": open, "total": total, "first_seen": first_seen, "last_seen": last_seen,
        })
    }

    fn cells(&self, how: &str) -> Vec<String> {
        let Row { key, first_seen, last_seen, open, total } = &self.row;
        vec![
            self.workload.clone(),
            way(key.direction).to_owned(),
            self.name.clone(),
            key.port.to_string(),
            how.to_owned(),
            format!("{open}/{total}"),
            when(*first_seen),
            when(*last_seen),
            when(self.since),
        ]
    }
}

/// A direction as the command shows it.
fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Inbound => "in",
        Direction::Outbound => "out",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::sidecars::tests::page;
    use countersign_identity::policy::Mode;

    fn planned(peers: &Value, forgotten: u64) -> Plan {
        let mut page = page();
        page["plaintext"] = json!({ "peers": peers, "forgotten": forgotten });
        let names = [("10.0.0.9".parse().unwrap(), "pod old/cron".to_owned())].into();
        let strict = Policy {
            egress: vec!["10.96.0.1:443".parse::<SocketAddr>().unwrap().into()],
            port_exceptions: [(9443, Mode::Permissive)].into(),
            mode: Mode::Strict,
            ..Policy::default()
        };
        let mut plan = Plan::default();
        plan.take("shop/web", serde_json::from_value(page).unwrap(), &names, &strict);
        plan
    }

    fn row(peer: &str, port: u16, direction: &str, mode: &str, open: u64) -> Value {
        json!({ "peer": peer, "port": port, "direction": direction, "mode": mode, "first_seen": 0, "last_seen": 60, "open": open, "total": 3 })
    }

    #[test]
    fn carried_peers_are_named_and_stop_the_move_be_they_open_or_over() {
        for open in [0, 1] {
            let plan = planned(&json!([row("10.0.0.9", 8080, "inbound", "plain", open)]), 0);
            assert!(!plan.is_clear());
            let shown = &plan.json(false)["plaintext"][0];
            let expected = json!({ "workload": "shop/web", "direction": "in", "peer": "pod old/cron", "address": "10.0.0.9", "port": 8080,
                "open": open, "total": 3, "first_seen": 0, "last_seen": 60 });
            assert_eq!(shown, &expected);
            let table = plan.table().render();
            assert!(table.contains("pod old/cron") && table.contains(&format!("{open}/3")), "{table}");
            assert!(table.contains("1970-01-01T00:01:00Z") && table.contains("1970-01-01T00:01:40Z"), "{table}");
        }
        let mapped = planned(&json!([row("::ffff:10.0.0.9", 8080, "inbound", "plain", 0)]), 0);
        assert_eq!(mapped.found[0].name, "pod old/cron");
        let foreign = planned(&json!([row("192.0.2.1", 8080, "outbound", "plain", 0)]), 0);
        assert_eq!((foreign.found[0].name.as_str(), way(foreign.found[0].row.key.direction)), ("192.0.2.1", "out"));
    }

    #[test]
    fn what_is_refused_already_is_shown_apart_and_stops_nothing() {
        let plan = planned(&json!([row("10.0.0.9", 8080, "inbound", "refused", 0)]), 0);
        assert!(plan.is_clear());
        let json = plan.json(false);
        assert_eq!((json["plaintext"].as_array().unwrap().len(), &json["refused"][0]["total"]), (0, &json!(3)));
        assert!(plan.table().render().contains("refused already"));
    }

    #[test]
    fn what_strict_would_let_out_cuts_off_nobody() {
        let row = |direction: &str| json!([row("10.96.0.1", 443, direction, "plain", 1)]);
        assert!(planned(&row("outbound"), 0).is_clear(), "the API server");
        assert!(!planned(&row("inbound"), 0).is_clear(), "out is not in");
        let another_port = planned(&json!([super::tests::row("10.96.0.1", 80, "outbound", "plain", 1)]), 0);
        assert!(!another_port.is_clear(), "the API server's other ports");
    }

    #[test]
    fn who_comes_in_by_an_allowed_port_goes_on_doing_so() {
        let row = |port| json!([row("10.0.0.9", port, "inbound", "plain", 1)]);
        assert!(planned(&row(9443), 0).is_clear());
        assert!(!planned(&row(9444), 0).is_clear());
        let allowed = Plan { allowed: vec![("a/b".into(), "port-modes=9443=permissive".into())], ..Plan::default() };
        assert!(allowed.is_clear());
        assert!(allowed.table().render().contains("allowed exception: port-modes=9443=permissive"));
        assert_eq!(allowed.json(false)["allowed_exceptions"][0]["workload"], "a/b");
    }

    #[test]
    fn a_full_table_and_a_sidecar_that_cannot_be_asked_prove_nothing() {
        let full = planned(&json!([]), 7);
        assert!(!full.is_clear());
        assert!(full.table().render().contains("the table was full: 7 rows were forgotten"));
        assert_eq!(full.json(false)["sidecars"][0], json!({ "workload": "shop/web", "since": 100, "forgotten": 7 }));
        assert!(planned(&json!([]), 0).is_clear());
        let unknown = Plan { unknown: vec![("a/b".into(), Unasked::NoPage)], ..Plan::default() };
        assert!(!unknown.is_clear(), "who cannot be asked stops the move");
        let table = unknown.table().render();
        assert!(
            table.contains("a/b") && table.contains("older than this command") && table.contains("restart the pod"),
            "{table}"
        );
        assert_eq!(unknown.json(false)["unknown"][0]["reason"], "no_page");
        assert!(Plan { unguarded: vec!["a/b".into()], ..Plan::default() }.is_clear());
    }
}
