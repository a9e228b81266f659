//! The last warnings among the events of some objects: those that say the same once, escaped, at most a few.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use countersign_identity::shown::sentence;
use countersign_watch::in_words;
use k8s_openapi::api::core::v1::Event;
use kube::Client;
use kube::api::{Api, ListParams};
use serde::Serialize;

use super::target::Kind;
use crate::kubernetes::cluster::listed;
use crate::operator::when;

/// Most warnings that are shown, most events that are read, and the longest message in characters.
const MAX_SHOWN: usize = 5;
const MAX_READ: u32 = 500;
const MAX_MESSAGE: usize = 400;
/// Longest wait for the API server.
const DEADLINE: Duration = Duration::from_secs(10);

/// A warning, however often it came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// Kind and name of the object, `ReplicaSet web-5d8`.
    pub object: String,
    /// One word of Kubernetes, `FailedCreate`.
    pub reason: String,
    /// For people, escaped.
    pub message: String,
    /// How often it came.
    pub count: i64,
    /// When it came last, seconds since 1970; 0 if that is not known.
    pub last: i64,
    /// The pods that it tells of, or else the objects: by name, all of those that say the same.
    pub names: BTreeSet<String>,
}

impl Warning {
    /// In words.
    pub fn sentence(&self) -> String {
        let often = if self.count > 1 { format!("{} times, last ", self.count) } else { String::new() };
        let names: Vec<String> = self.names.iter().cloned().collect();
        // One is named already.
        let of = if names.len() > 1 { format!(", of {}: {}", names.len(), listed(&names)) } else { String::new() };
        format!("{} {}: {} ({often}{}{of})", self.object, self.reason, self.message, when(self.last))
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    pub kind: Kind,
    pub name: &'a str,
}

/// The events that warn of an object. Error: why they could not be read, in words.
pub async fn about(client: &Client, namespace: &str, about: About<'_>) -> Result<Vec<Event>, String> {
    let object = format!(",involvedObject.kind={},involvedObject.name={}", about.kind.name(), about.name);
    read(client, namespace, &object).await
}

/// The events about controllers that could not make pods, in a whole namespace.
pub async fn failed_creations(client: &Client, namespace: &str) -> Result<Vec<Event>, String> {
    read(client, namespace, ",reason=FailedCreate").await
}

async fn read(client: &Client, namespace: &str, more: &str) -> Result<Vec<Event>, String> {
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    let params = ListParams::default().fields(&format!("type=Warning{more}")).limit(MAX_READ);
    match tokio::time::timeout(DEADLINE, api.list(&params)).await {
        Ok(listed) => Ok(listed.map_err(|e| in_words(&e))?.items),
        Err(_) => Err(format!("no answer within {} s", DEADLINE.as_secs())),
    }
}

/// The last warnings of some events, the latest first. Those that differ in counts, addresses and names that Kubernetes makes up say
/// the same: the latest stands for all.
pub fn warnings(events: &[Event]) -> Vec<Warning> {
    let mut all = BTreeMap::<(String, String, String), Warning>::new();
    for event in events {
        let text = |text: Option<&str>, most| sentence(text.unwrap_or_default().trim(), most).to_string();
        let about = &event.involved_object;
        let (kind, name) = (text(about.kind.as_deref(), 64), text(about.name.as_deref(), 253));
        let (reason, message) = (text(event.reason.as_deref(), 128), text(event.message.as_deref(), MAX_MESSAGE));
        let series = event.series.as_ref();
        let count = i64::from(series.and_then(|s| s.count).or(event.count).unwrap_or(1).max(1));
        let (object, names) = (format!("{kind} {name}"), told_of(&name, &message));
        let key = (likeness(&object), reason.clone(), likeness(&message));
        let mut new = Warning { object, reason, message, count, last: at(event), names };
        match all.get_mut(&key) {
            None => drop(all.insert(key, new)),
            Some(known) => {
                if new.last < known.last {
                    std::mem::swap(known, &mut new);
                }
                (new.count, new.names) = (known.count + new.count, &known.names | &new.names);
                *known = new;
            }
        }
    }
    let mut all: Vec<Warning> = all.into_values().collect();
    all.sort_by_key(|warning| std::cmp::Reverse(warning.last));
    all.truncate(MAX_SHOWN);
    all
}

/// The pods of an object that a message names, which begin with the object's name; otherwise the object.
fn told_of(object: &str, message: &str) -> BTreeSet<String> {
    let words = message.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '.'));
    let is_below = |word: &&str| word.strip_prefix(object).is_some_and(|rest| rest.len() > 1 && rest.starts_with('-'));
    let pods: BTreeSet<String> =
        words.map(|word| word.trim_end_matches('.')).filter(is_below).map(Into::into).collect();
    if pods.is_empty() { [object.to_owned()].into() } else { pods }
}

/// Letters and digits of the names that Kubernetes makes up (`rand.SafeEncodeString`).
const MADE_UP: &str = "bcdfghjklmnpqrstvwxz2456789";

/// A text without what differs each time: words with digits, and the five random letters at the end of a pod's name.
fn likeness(text: &str) -> String {
    let mut like = String::with_capacity(text.len());
    let mut before = None;
    for word in text.split_inclusive(|c: char| !c.is_alphanumeric()) {
        let name = word.trim_end_matches(|c: char| !c.is_alphanumeric());
        let is_made_up = before == Some('-') && name.len() == 5 && name.chars().all(|c| MADE_UP.contains(c));
        if is_made_up || name.contains(|c: char| c.is_ascii_digit()) {
            like.push('#');
            like.push_str(&word[name.len()..]);
        } else {
            like.push_str(word);
        }
        before = word.chars().last();
    }
    like
}

/// When an event came last, seconds since 1970.
fn at(event: &Event) -> i64 {
    let series = event.series.as_ref().and_then(|s| s.last_observed_time.as_ref()).map(|t| t.0.as_second());
    let (last, first) = (event.last_timestamp.as_ref(), event.event_time.as_ref());
    series.max(last.map(|t| t.0.as_second())).max(first.map(|t| t.0.as_second())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn event(name: &str, message: &str, more: Value) -> Event {
        let mut event = json!({
            "metadata": { "name": "x" }, "involvedObject": { "kind": "ReplicaSet", "name": name },
            "reason": "FailedCreate", "message": message, "type": "Warning",
        });
        event.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(event).unwrap()
    }

    #[test]
    fn what_came_often_is_told_once_with_its_last_time() {
        let events = [
            event("web", "exceeded quota", json!({ "count": 12, "lastTimestamp": "1970-01-01T00:02:00Z" })),
            event("web", "exceeded quota", json!({ "eventTime": "1970-01-01T00:03:00.000000Z" })),
            event("web", "old\u{1b}[2J", json!({ "count": 1, "lastTimestamp": "1970-01-01T00:01:00Z" })),
        ];
        let told: Vec<String> = warnings(&events).iter().map(Warning::sentence).collect();
        assert_eq!(
            told,
            [
                "ReplicaSet web FailedCreate: exceeded quota (13 times, last 1970-01-01T00:03:00Z)",
                "ReplicaSet web FailedCreate: old\\u{1b}[2J (1970-01-01T00:01:00Z)",
            ]
        );
    }

    #[test]
    fn what_differs_in_made_up_names_counts_and_addresses_is_told_once() {
        let at = |second: u8| json!({ "count": 2, "lastTimestamp": format!("1970-01-01T00:00:{second:02}Z") });
        let refused = |pod: &str| format!("Error creating: pods \"{pod}\" is forbidden: exceeded quota");
        let events = [
            event("web-5d8f", &refused("web-5d8f-x7k2p"), at(1)),
            event("web-5d8f", &refused("web-5d8f-bcdfg"), at(3)),
            event("web-7c44", &refused("web-7c44-zzzzz"), at(2)),
            event("web-5d8f", "Get \"http://10.0.0.5:15020/live\": connection refused", at(4)),
            event("web-5d8f", "Get \"http://10.0.1.77:15020/live\": connection refused", at(5)),
            event("web-5d8f", "back-off 10s restarting", at(6)),
            event("web-5d8f", "back-off 5m0s restarting", at(7)),
        ];
        let told: Vec<(String, i64)> = warnings(&events).into_iter().map(|w| (w.message, w.count)).collect();
        let expected = [
            ("back-off 5m0s restarting".to_owned(), 4),
            ("Get \"http://10.0.1.77:15020/live\": connection refused".to_owned(), 4),
            (refused("web-5d8f-bcdfg"), 6),
        ];
        assert_eq!(told, expected);
        let other = [event("web", "exceeded quota", at(1)), event("api", "exceeded quota", at(1))];
        assert_eq!(warnings(&other).len(), 2, "of two objects");
    }

    #[test]
    fn of_what_is_told_once_the_pods_are_named() {
        let failed = |pod: &str| {
            let message = format!("create Pod {pod} in StatefulSet web failed error: pods \"{pod}\" is forbidden: no.");
            event("web", &message, json!({ "lastTimestamp": format!("1970-01-01T00:00:0{}Z", &pod[4..]) }))
        };
        let told = warnings(&[failed("web-1"), failed("web-0"), failed("web-1")]);
        assert_eq!(told.len(), 1);
        assert!(told[0].message.contains("Pod web-1 "), "the last one");
        let said = told[0].sentence();
        assert!(said.ends_with("(3 times, last 1970-01-01T00:00:01Z, of 2: web-0, web-1)"), "{said}");
        assert!(!warnings(&[failed("web-1")])[0].sentence().contains(", of"), "the message names it");
        let many: Vec<Event> = (0..9).map(|n| failed(&format!("web-{n}"))).collect();
        assert!(warnings(&many)[0].sentence().ends_with("of 9: web-0, web-1, web-2, web-3, web-4 and 4 more)"));
        let pod = |name| event(name, "Readiness probe failed", json!({ "reason": "Unhealthy" }));
        let said = warnings(&[pod("web-0"), pod("web-1")])[0].sentence();
        assert!(said.ends_with("of 2: web-0, web-1)"), "{said}");
    }

    #[test]
    fn of_many_the_last_ones_are_told() {
        let many: Vec<Event> = (0..50)
            .map(|n| {
                // Letters alone, so that they are not alike.
                let message = "x".repeat(n + 1);
                event("web", &message, json!({ "lastTimestamp": format!("1970-01-01T00:00:{n:02}Z") }))
            })
            .collect();
        let told = warnings(&many);
        assert_eq!((told.len(), told[0].message.len(), told[4].message.len()), (MAX_SHOWN, 50, 46));
        assert!(warnings(&[event("web", &"x".repeat(10_000), json!({}))])[0].message.len() < 500);
    }
}
