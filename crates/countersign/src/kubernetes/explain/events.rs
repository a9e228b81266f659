//! The last warnings among an object's events: each once, escaped, at most a few.

use std::collections::BTreeMap;
use std::time::Duration;

use countersign_identity::shown::sentence;
use countersign_watch::in_words;
use k8s_openapi::api::core::v1::Event;
use kube::Client;
use kube::api::{Api, ListParams};
use serde::Serialize;

use super::target::Kind;
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
}

impl Warning {
    /// In words.
    pub fn sentence(&self) -> String {
        let often = if self.count > 1 { format!("{} times, last ", self.count) } else { String::new() };
        format!("{} {}: {} ({often}{})", self.object, self.reason, self.message, when(self.last))
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    pub kind: Kind,
    pub name: &'a str,
}

/// The last warnings about an object, the latest first. Error: why they could not be read, in words.
pub async fn about(client: &Client, namespace: &str, about: About<'_>) -> Result<Vec<Warning>, String> {
    let object = format!(",involvedObject.kind={},involvedObject.name={}", about.kind.name(), about.name);
    Ok(warnings(&read(client, namespace, &object).await?))
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

/// Each warning of some events once.
pub fn warnings(events: &[Event]) -> Vec<Warning> {
    let mut all = BTreeMap::<(String, String, String), (i64, i64)>::new();
    for event in events {
        let text = |text: Option<&str>, most| sentence(text.unwrap_or_default().trim(), most).to_string();
        let about = &event.involved_object;
        let object = format!("{} {}", text(about.kind.as_deref(), 64), text(about.name.as_deref(), 253));
        let key = (object, text(event.reason.as_deref(), 128), text(event.message.as_deref(), MAX_MESSAGE));
        let series = event.series.as_ref();
        let count = series.and_then(|s| s.count).or(event.count).unwrap_or(1);
        let (known, last) = all.entry(key).or_default();
        *known += i64::from(count.max(1));
        *last = (*last).max(at(event));
    }
    let of = |((object, reason, message), (count, last))| Warning { object, reason, message, count, last };
    let mut all: Vec<Warning> = all.into_iter().map(of).collect();
    all.sort_by_key(|warning| std::cmp::Reverse(warning.last));
    all.truncate(MAX_SHOWN);
    all
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
    fn of_many_the_last_ones_are_told() {
        let many: Vec<Event> = (0..50)
            .map(|n| event("web", &n.to_string(), json!({ "lastTimestamp": format!("1970-01-01T00:00:{n:02}Z") })))
            .collect();
        let told = warnings(&many);
        assert_eq!((told.len(), told[0].message.as_str(), told[4].message.as_str()), (MAX_SHOWN, "49", "45"));
        assert!(warnings(&[event("web", &"x".repeat(10_000), json!({}))])[0].message.len() < 500);
    }
}
