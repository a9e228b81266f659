//! Whether watches work, since when they do not, and why.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use countersign_identity::shown::sentence;
use kube::runtime::watcher;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::time::Instant;

use crate::words::{MAX_MESSAGE, last_cause};

/// How long a watch may fail before `/ready` says so.
const GRACE: Duration = Duration::from_secs(30);
/// How long a list must stand before a failure is over: who may list and not watch is listed again and again.
const SETTLED: Duration = Duration::from_secs(10);

/// The label of [`Watches::errors`].
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Kind {
    /// What is watched, in the plural: `pods`.
    pub kind: &'static str,
}

/// All watches of one process.
#[derive(Default)]
pub struct Watches {
    errors: Family<Kind, Counter>,
    all: Mutex<Vec<Arc<Health>>>,
}

impl Watches {
    /// No watches yet; their errors are counted here.
    pub fn of(errors: Family<Kind, Counter>) -> Self {
        Self { errors, all: Mutex::default() }
    }

    /// Number of errors by kind.
    pub fn errors(&self) -> Family<Kind, Counter> {
        self.errors.clone()
    }

    /// The health of a new watch of this kind.
    pub fn health(&self, kind: &'static str) -> Arc<Health> {
        let errors = self.errors.get_or_create(&Kind { kind }).clone();
        let health = Arc::new(Health { kind, errors, state: Mutex::default() });
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(health.clone());
        health
    }

    /// What has failed for [`GRACE`], in words; `None` if nothing has.
    pub fn lasting(&self) -> Option<String> {
        self.told(Health::lasting)
    }

    /// What fails now, in words; `None` if nothing does.
    pub fn troubles(&self) -> Option<String> {
        self.told(|health| health.trouble().map(|t| t.words))
    }

    fn told(&self, words: impl Fn(&Health) -> Option<String>) -> Option<String> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let told: Vec<String> = all.iter().filter_map(|health| words(health)).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }
}

/// Whether one watch works.
pub struct Health {
    kind: &'static str,
    errors: Counter,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    trouble: Option<Trouble>,
    /// When the list arrived that is being followed; `None` before the first, and after an error.
    listed: Option<Instant>,
}

/// Why a watch does not work.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// The first error of those without a pause.
    pub since: Instant,
    /// When the API server first answered and refused, in contrast to one that cannot be reached; `None` if it has not.
    pub refused_since: Option<Instant>,
    /// The latest error, in words.
    pub words: String,
}

impl State {
    fn is_over(&self) -> bool {
        self.listed.is_some_and(|at| at.elapsed() >= SETTLED)
    }
}

impl Health {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A complete list has arrived.
    pub fn listed(&self) {
        self.state().listed = Some(Instant::now());
    }

    /// A change has arrived: the watch works too.
    pub fn watched(&self) {
        self.state().trouble = None;
    }

    /// The list or the watch failed.
    pub fn failed(&self, error: &watcher::Error) {
        self.errors.inc();
        let (refused, words) = told(self.kind, error);
        tracing::warn!(kind = self.kind, error = words, "a watch failed; trying again");
        let mut state = self.state();
        let before = if state.is_over() { None } else { state.trouble.take() };
        let now = Instant::now();
        let since = before.as_ref().map_or(now, |t| t.since);
        // What it has refused it has not permitted since, only because it cannot be reached now.
        let refused_since = before.and_then(|t| t.refused_since).or(refused.then_some(now));
        *state = State { trouble: Some(Trouble { since, refused_since, words }), listed: None };
    }

    /// What is wrong, or was a moment ago; `None` while the watch works.
    pub fn trouble(&self) -> Option<Trouble> {
        let mut state = self.state();
        if state.is_over() {
            state.trouble = None;
        }
        state.trouble.clone()
    }

    /// What is wrong while nothing is being followed; `None` as long as the last list is.
    pub fn unheard(&self) -> Option<Trouble> {
        let state = self.state();
        if state.listed.is_some() { None } else { state.trouble.clone() }
    }

    /// What has been wrong for [`GRACE`], in words.
    pub fn lasting(&self) -> Option<String> {
        let trouble = self.trouble().filter(|t| t.since.elapsed() >= GRACE)?;
        Some(format!("{} for {} s", trouble.words, trouble.since.elapsed().as_secs()))
    }
}

/// Whether the API server refused, and an error in words.
fn told(kind: &str, error: &watcher::Error) -> (bool, String) {
    let status = match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status),
        _ => None,
    };
    match status {
        Some(status) if status.code == 403 => {
            let said = sentence(&status.message, MAX_MESSAGE);
            (true, format!("the API server refuses {kind}: {said}; `countersign install` has the permission"))
        }
        // Every API server knows its own kinds: it is a resource of ours.
        Some(status) if status.code == 404 => {
            let words = format!("the API server does not know {kind}; apply the manifests of `countersign install`");
            (true, words)
        }
        Some(status) => {
            let said = sentence(&status.message, MAX_MESSAGE);
            // 410: the list comes anew; 429: later.
            let refused = (400..500).contains(&status.code) && ![410, 429].contains(&status.code);
            (refused, format!("the API server answers about {kind} with {}: {said}", status.code))
        }
        None => (false, format!("the API server cannot be asked about {kind}: {}", last_cause(error))),
    }
}
