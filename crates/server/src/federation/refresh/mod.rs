//! Keeps foreign bundles fresh: a task for each relationship, which fetches, stores and waits.
//!
//! The last good bundle stays whatever happens: it is replaced only by one that was authenticated, read whole and is not empty.

mod fetch;
mod schedule;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use countersign_api::sampled::Sampled;
use countersign_identity::shown::sentence;
use countersign_identity::trust_domain::trust_domain_of;
use countersign_identity::{SpiffeId, TrustBundle, TrustDomain};
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;

use self::fetch::{FetchError, Proof, fetch};
use self::schedule::Schedule;
use super::bundles::SetError;
use super::relationship::{Profile, Relationship};
use crate::core::{Core, MAX_REASON};

/// Attempts of one refresh, while others change the bundle that it would replace.
const TRIES: usize = 3;
/// Fetches at once; others wait for their turn.
const FETCHES_AT_ONCE: usize = 16;

/// What all fetches share.
pub struct Refresher {
    turns: Semaphore,
    lines: Sampled<TrustDomain>,
}

impl Default for Refresher {
    fn default() -> Self {
        Self { turns: Semaphore::new(FETCHES_AT_ONCE), lines: Sampled::default() }
    }
}

/// Why a bundle was not refreshed. The one that was there stays.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// The endpoint cannot be authenticated.
    #[error(
        "there is no bundle of `{trust_domain}`, by which the endpoint's SVID `{id}` could be verified: get it by a way \
         that you trust and set it (countersign bundle set --trust-domain {trust_domain} --path FILE)"
    )]
    NoBundle {
        /// The endpoint's ID.
        id: SpiffeId,
        /// Its trust domain.
        trust_domain: TrustDomain,
    },
    /// The fetch failed.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The bundle cannot be stored.
    #[error(transparent)]
    Set(#[from] SetError),
    /// Relationship or bundle were changed while it was fetched.
    #[error("it was changed while its bundle was fetched; the next refresh goes by what it is now")]
    Overtaken,
    /// The server ends.
    #[error("the server is shutting down")]
    Ending,
}

/// Follows every relationship until the server ends.
pub async fn keep(core: Arc<Core>) {
    let mut relationships = core.relationships.watch();
    let mut followed: BTreeMap<String, Followed> = BTreeMap::new();
    loop {
        let now = relationships.borrow_and_update().clone();
        followed.retain(|name, followed| now.get(name).is_some_and(|r| *r == followed.relationship));
        for (name, relationship) in now.iter() {
            followed.entry(name.clone()).or_insert_with(|| Followed::start(&core, relationship));
        }
        tokio::select! {
            changed = relationships.changed() => if changed.is_err() { return },
            () = core.shutdown.cancelled() => return,
        }
    }
}

/// A relationship that is being followed. Dropped, it is no longer, at once.
struct Followed {
    core: Arc<Core>,
    relationship: Arc<Relationship>,
    _task: AbortOnDropHandle<()>,
}

impl Followed {
    fn start(core: &Arc<Core>, relationship: &Arc<Relationship>) -> Self {
        core.metrics.federation.begin(relationship.trust_domain.as_str());
        let task = core.tasks.spawn(follow(core.clone(), relationship.clone()));
        Self { core: core.clone(), relationship: relationship.clone(), _task: AbortOnDropHandle::new(task) }
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.core.metrics.federation.end(self.relationship.trust_domain.as_str());
    }
}

/// Refreshes one bundle again and again.
async fn follow(core: Arc<Core>, relationship: Arc<Relationship>) {
    let mut schedule = Schedule::default();
    let mut told = String::new();
    loop {
        let mut bundles = core.federated.watch();
        let trusted = endpoint_bundle(&core, &relationship.profile);
        let refreshed = tokio::select! {
            refreshed = refresh(&core, &relationship) => refreshed,
            () = core.shutdown.cancelled() => return,
        };
        let pause = if let Ok(bundle) = &refreshed {
            schedule.after_success(bundle.refresh_hint)
        } else {
            let known = core.federated.get(relationship.trust_domain.as_str());
            schedule.after_failure(known.map(|bundle| bundle.refresh_hint))
        };
        tell(&core, &relationship, &mut told, refreshed.err());
        // What the endpoint is judged by may be all that was wrong.
        let other_trust = async {
            if told.is_empty() {
                return std::future::pending().await;
            }
            while endpoint_bundle(&core, &relationship.profile) == trusted && bundles.changed().await.is_ok() {}
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = other_trust => {}
            () = core.shutdown.cancelled() => return,
        }
    }
}

/// Logs why a bundle is not fresh, once for each reason, and that it is again.
fn tell(core: &Core, relationship: &Relationship, told: &mut String, error: Option<RefreshError>) {
    let Relationship { trust_domain, url, profile } = relationship;
    // The endpoint has a say in it.
    let now = error.map(|e| sentence(&e.to_string(), MAX_REASON).to_string()).unwrap_or_default();
    if *told == now {
        return;
    }
    let line = |kind| core.refresher.lines.next(trust_domain.clone(), kind, Instant::now());
    if now.is_empty() {
        if let Some(unsaid) = line("refreshed again") {
            tracing::info!(%trust_domain, unsaid, "the bundle of a foreign trust domain is refreshed again");
        }
    } else if let Some(unsaid) = line("not refreshed") {
        let (url, profile) = (url.as_str(), profile.name());
        tracing::warn!(%trust_domain, url, profile, error = now, unsaid, "cannot refresh the bundle of a foreign trust domain; trying again");
    }
    *told = now;
}

/// Fetches the bundle of a relationship and stores it if it is another one. Returns the bundle that is stored then.
pub async fn refresh(core: &Arc<Core>, relationship: &Arc<Relationship>) -> Result<Arc<TrustBundle>, RefreshError> {
    let name = relationship.trust_domain.as_str();
    let mut refreshed = refresh_uncounted(core, relationship).await;
    for _ in 1..TRIES {
        match refreshed {
            Err(RefreshError::Overtaken) if is_current(core, relationship) => {}
            _ => break,
        }
        refreshed = refresh_uncounted(core, relationship).await;
    }
    match &refreshed {
        // Its metrics went with it.
        _ if !is_current(core, relationship) => {}
        Ok(_) => core.metrics.federation.fetched(name, core.now()),
        Err(_) => core.metrics.federation.failed(name),
    }
    refreshed
}

async fn refresh_uncounted(
    core: &Arc<Core>,
    relationship: &Arc<Relationship>,
) -> Result<Arc<TrustBundle>, RefreshError> {
    let name = relationship.trust_domain.as_str();
    let _turn = core.refresher.turns.acquire().await.map_err(|_| RefreshError::Ending)?;
    let before = core.federated.get(name);
    let trusted = endpoint_bundle(core, &relationship.profile);
    let proof = proof(core, &relationship.profile)?;
    let fetched = fetch(&relationship.trust_domain, &relationship.url, &proof).await?;
    // What the endpoint was judged by may have been taken back while it was still sending.
    if endpoint_bundle(core, &relationship.profile) != trusted {
        return Err(RefreshError::Overtaken);
    }
    if let Some(before) = before.as_ref().filter(|before| is_same(before, &fetched)) {
        let now = core.federated.get(name);
        return now.filter(|now| Arc::ptr_eq(now, before)).ok_or(RefreshError::Overtaken);
    }
    // Whoever gives this up from here on does not leave memory behind the store.
    let (core, relationship) = (core.clone(), relationship.clone());
    let store = core.tasks.spawn({
        let core = core.clone();
        async move { store(&core, &relationship, fetched, before).await }
    });
    store.await.unwrap_or(Err(RefreshError::Ending))
}

async fn store(
    core: &Core,
    relationship: &Arc<Relationship>,
    fetched: TrustBundle,
    before: Option<Arc<TrustBundle>>,
) -> Result<Arc<TrustBundle>, RefreshError> {
    if !is_current(core, relationship) {
        return Err(RefreshError::Overtaken);
    }
    let (sequence, last) = (fetched.sequence, before.as_ref().map_or(0, |b| b.sequence));
    let stored = core.federated.refresh(fetched, before.as_ref()).await?.ok_or(RefreshError::Overtaken)?;
    let (trust_domain, authorities, keys) =
        (&stored.trust_domain, stored.authorities.len(), stored.jwt_authorities.len());
    // As SPIRE does, its endpoint is believed: it may have been restored from a backup.
    let went_back = sequence != 0 && sequence < last;
    if let Some(unsaid) = core.refresher.lines.next(trust_domain.clone(), "refreshed", Instant::now()) {
        tracing::info!(%trust_domain, sequence = stored.sequence, went_back, authorities, jwt_authorities = keys, unsaid, "bundle of a foreign trust domain refreshed");
    }
    Ok(stored)
}

/// Whether the relationship is still the one that its trust domain has.
fn is_current(core: &Core, relationship: &Arc<Relationship>) -> bool {
    core.relationships.get(&relationship.trust_domain).as_ref() == Some(relationship)
}

/// Whether a fetched bundle is the one that is stored, which has a number of its own if its document has none.
fn is_same(stored: &TrustBundle, fetched: &TrustBundle) -> bool {
    let sequence = if fetched.sequence == 0 { stored.sequence } else { fetched.sequence };
    *stored == TrustBundle { sequence, ..fetched.clone() }
}

fn proof(core: &Core, profile: &Profile) -> Result<Proof, RefreshError> {
    match profile {
        Profile::HttpsWeb => Ok(Proof::Web),
        Profile::HttpsSpiffe(id) => {
            let no_bundle = || RefreshError::NoBundle { id: id.clone(), trust_domain: trust_domain_of(id) };
            endpoint_bundle(core, profile).map(|bundle| Proof::Svid(id.clone(), bundle)).ok_or_else(no_bundle)
        }
    }
}

/// The bundle that an endpoint's SVID is verified with; `None` if there is none, or the endpoint has no SVID.
fn endpoint_bundle(core: &Core, profile: &Profile) -> Option<Arc<TrustBundle>> {
    let Profile::HttpsSpiffe(id) = profile else { return None };
    if id.is_member_of(core.trust_domain()) {
        return Some(core.authorities.bundle().borrow().clone());
    }
    core.federated.get(id.trust_domain_name())
}
