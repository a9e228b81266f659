//! JWT-SVIDs for a caller: its own identities, and no other ones.

use std::collections::HashSet;
use std::sync::Arc;

use countersign_api::workload::{Jwtsvid, JwtsvidRequest};
use countersign_identity::profile::jwt::Audience;
use countersign_identity::trust_domain::parse_workload_id;
use countersign_identity::{Entry, SpiffeId};
use futures::{StreamExt, TryStreamExt};
use tonic::Status;

use super::workload::in_order;
use super::{Attested, Core, Follower, Wanted};
use crate::cache::Cached;
use crate::tokens::Token;

/// Tokens of one call that are fetched at once.
const AT_ONCE: usize = 8;

/// What a caller asks for.
pub struct Asked {
    audience: Audience,
    /// The identity; `None` for all that it has.
    id: Option<SpiffeId>,
}

impl Asked {
    /// Errors: InvalidArgument.
    pub fn new(request: &JwtsvidRequest) -> Result<Self, Status> {
        let audience = Audience::new(request.audience.clone())
            .map_err(|error| Status::invalid_argument(format!("audience must be specified: {error}")))?;
        let id = match request.spiffe_id.as_str() {
            "" => None,
            text => Some(
                parse_workload_id(text)
                    .map_err(|error| Status::invalid_argument(format!("invalid requested SPIFFE ID: {error}")))?,
            ),
        };
        Ok(Self { audience, id })
    }
}

impl Core {
    /// Tokens for the caller's identities, the default first. Errors: PermissionDenied if it has none, or not this one; Unavailable if
    /// one cannot be had now.
    pub(super) async fn jwt_svids(&self, mut attested: Attested, asked: &Asked) -> Result<Vec<Jwtsvid>, Status> {
        // What it was attested by may be enough for another one of its identities.
        if attested.in_part && self.entitled(&attested, asked).is_err() {
            attested = self.prove(attested.peer, Wanted::EveryFact).await?;
        }
        let entries = self.entitled(&attested, asked)?;
        let caller = &Follower::of(&attested);
        let calls = futures::stream::iter(entries).map(|entry| async move {
            let token = self.tokens.get(&entry, &asked.audience, caller).await?;
            Ok::<_, Status>((entry, token))
        });
        let fetched: Vec<_> = calls.buffered(AT_ONCE).try_collect().await?;
        // Meanwhile the caller may have changed, and its entries too.
        self.still(&attested)?;
        let entitled = self.entitled(&attested, asked)?;
        let is_still =
            |fetched: &Entry| entitled.iter().any(|e| e.id == fetched.id && e.spiffe_id == fetched.spiffe_id);
        if !fetched.iter().all(|(entry, _)| is_still(entry)) {
            // Without it another identity might come first, or none.
            return Err(Status::unavailable("the caller's identities have changed meanwhile; ask again"));
        }
        let told = |(entry, token): (Arc<Entry>, Arc<Token>)| Jwtsvid {
            spiffe_id: token.id.to_string(),
            svid: token.text.to_string(),
            hint: entry.hint.clone(),
        };
        Ok(fetched.into_iter().map(told).collect())
    }

    /// The entries that the caller may have tokens of now; at least one. Of several with the same hint the first.
    pub(super) fn entitled(&self, attested: &Attested, asked: &Asked) -> Result<Vec<Arc<Entry>>, Status> {
        let identities = self.identities(attested)?;
        let is_asked = |c: &&Cached| !c.entry.store_svid && asked.id.as_ref().is_none_or(|id| *id == c.entry.spiffe_id);
        // Hints are unique within a response: the first of two equal ones counts (SPIFFE Workload API 6.2.1).
        let mut hints = HashSet::new();
        let is_first = |c: &&Cached| c.entry.hint.is_empty() || hints.insert(c.entry.hint.clone());
        let found = in_order(&identities).into_iter().filter(is_asked).filter(is_first);
        let found: Vec<_> = found.map(|c| c.entry.clone()).collect();
        match &asked.id {
            _ if !found.is_empty() => Ok(found),
            // A selector that is not known yet may be the one that the entry requires.
            _ if attested.in_part => {
                Err(Status::unavailable("no identity issued yet, for the container is not known yet"))
            }
            Some(id) => {
                self.metrics.refused("no_identity");
                Err(Status::permission_denied(format!("no identity issued: `{id}` is none of the caller's")))
            }
            None => Err(Status::permission_denied("no identity issued: the caller's entries are stored elsewhere")),
        }
    }
}
