//! Watches of the Kubernetes API that say when they do not work: [`follow`] keeps one up, and its [`Health`] tells
//! `/ready` and `/metrics` since when it fails, and which permission is missing. [`node`] and [`cgroup`] are what the
//! roles of a node know about its pods: which they are, and which processes are theirs.

pub mod cgroup;
mod health;
pub mod node;
mod words;

use std::fmt::Debug;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use futures::StreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;

pub use health::{Health, Kind, Trouble, Watches};
pub use words::in_words;

/// Life of one watch request, in seconds. The API server authorizes a request when it begins, so a permission that is
/// taken away is noticed no later than this.
const WATCH_SECONDS: u32 = 60;
/// Longest silence on a connection: of an answer that does not begin, and of a watch that the API server should have
/// ended.
const SILENCE: Duration = Duration::from_secs(90);
/// Longest time to open a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Delays between two attempts.
const FIRST_DELAY: Duration = Duration::from_millis(500);
const LONGEST_DELAY: Duration = Duration::from_secs(15);

/// A client of the API server, as whom the pod or KUBECONFIG says we are, that does not wait for an answer for ever.
/// Not for streams that may be silent, such as a port-forward.
pub async fn client() -> Result<Client, kube::Error> {
    let mut config = kube::Config::infer().await.map_err(kube::Error::InferConfig)?;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    Client::try_from(config)
}

/// Follows all objects of an API, without end: their list, then each change. After an error the list comes anew, which
/// shows that the API server answers again; until then `health` knows what is wrong.
pub async fn follow<K>(api: Api<K>, config: watcher::Config, health: &Health, mut take: impl FnMut(Event<K>))
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let config = config.timeout(WATCH_SECONDS);
    let mut backoff = Backoff::new(FIRST_DELAY, LONGEST_DELAY);
    loop {
        let mut events = watcher(api.clone(), config.clone()).boxed();
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    match &event {
                        Event::InitDone => health.listed(),
                        Event::Apply(_) | Event::Delete(_) => {
                            health.watched();
                            backoff.reset();
                        }
                        Event::Init | Event::InitApply(_) => {}
                    }
                    take(event);
                }
                Err(error) => {
                    health.failed(&error);
                    break;
                }
            }
        }
        // A list that stood for a while was a success.
        if health.trouble().is_none() {
            backoff.reset();
        }
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

#[cfg(test)]
mod tests;
