//! `spire.api.server.entry.v1`: registration entries, for operators and agents.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use countersign_api::convert::{
    entry_from_wire, entry_to_wire, id_from_wire, selectors_from_wire, trust_domain_from_wire,
};
use countersign_api::portions::first_portion;
use countersign_api::spire::entry::entry_server::Entry as EntryService;
use countersign_api::spire::entry::{
    BatchCreateEntryRequest, BatchCreateEntryResponse, BatchDeleteEntryRequest, BatchDeleteEntryResponse,
    BatchUpdateEntryRequest, BatchUpdateEntryResponse, CountEntriesRequest, CountEntriesResponse,
    GetAuthorizedEntriesRequest, GetAuthorizedEntriesResponse, GetEntryRequest, ListEntriesRequest,
    ListEntriesResponse, SyncAuthorizedEntriesRequest, SyncAuthorizedEntriesResponse, batch_create_entry_response,
    batch_delete_entry_response, batch_update_entry_response,
};
use countersign_api::spire::types;
use countersign_identity::{Entry, EntryId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{BoxStream, Endpoint, invalid, item_status, masks, paging};
use crate::caller::{Caller, cut_off};
use crate::config::MIN_SVID_TTL;
use crate::core::{Core, store_status};
use crate::entries::{Created, UpdateError, fresh_entry_id};

/// Most entries per batch.
const MAX_BATCH: usize = 10_000;

/// Match behaviour of selectors and federation (SelectorMatch and FederatesWithMatch use the same numbers).
pub(super) fn sets_match<T: Ord>(wanted: &BTreeSet<T>, held: &BTreeSet<T>, behavior: i32) -> bool {
    match behavior {
        1 => held.is_subset(wanted),
        2 => held.is_superset(wanted),
        3 => !held.is_disjoint(wanted),
        _ => held == wanted,
    }
}

/// Filter of CountEntries and ListEntries, whose wire messages are alike.
#[derive(Default)]
struct Filter {
    spiffe_id: Option<types::Spiffeid>,
    parent_id: Option<types::Spiffeid>,
    selectors: Option<types::SelectorMatch>,
    federates_with: Option<types::FederatesWithMatch>,
    hint: Option<String>,
    downstream: Option<bool>,
}

macro_rules! filter {
    ($f:expr) => {
        $f.map(|f| Filter {
            spiffe_id: f.by_spiffe_id,
            parent_id: f.by_parent_id,
            selectors: f.by_selectors,
            federates_with: f.by_federates_with,
            hint: f.by_hint,
            downstream: f.by_downstream,
        })
        .unwrap_or_default()
    };
}

impl Filter {
    /// Parses the filter into a predicate on entries.
    fn parse(self) -> Result<impl Fn(&Entry) -> bool, Status> {
        let id =
            |name, id: Option<types::Spiffeid>| id.map(|id| id_from_wire(name, Some(id))).transpose().map_err(invalid);
        let spiffe_id = id("by_spiffe_id", self.spiffe_id)?;
        let parent_id = id("by_parent_id", self.parent_id)?;
        let selectors =
            self.selectors.map(|m| Ok::<_, Status>((selectors_from_wire(m.selectors).map_err(invalid)?, m.r#match)));
        let selectors = selectors.transpose()?;
        let federates = self.federates_with.map(|m| {
            let named = m.trust_domains.iter().map(|td| trust_domain_from_wire(td));
            Ok::<_, Status>((named.collect::<Result<BTreeSet<_>, _>>().map_err(invalid)?, m.r#match))
        });
        let federates = federates.transpose()?;
        let (hint, downstream) = (self.hint, self.downstream);
        Ok(move |e: &Entry| {
            spiffe_id.as_ref().is_none_or(|id| e.spiffe_id == *id)
                && parent_id.as_ref().is_none_or(|id| e.parent_id == *id)
                && selectors.as_ref().is_none_or(|(wanted, how)| sets_match(wanted, &e.selectors, *how))
                && federates.as_ref().is_none_or(|(wanted, how)| sets_match(wanted, &e.federates_with, *how))
                && hint.as_ref().is_none_or(|h| e.hint == *h)
                && downstream.is_none_or(|d| e.downstream == d)
        })
    }
}

impl Endpoint {
    fn entry_id(text: &str) -> Result<EntryId, Status> {
        text.parse().map_err(invalid)
    }

    fn check(&self, entry: &Entry) -> Result<(), Status> {
        entry.check(self.0.trust_domain()).map_err(invalid)?;
        match entry.x509_svid_ttl {
            Some(ttl) if ttl < MIN_SVID_TTL => Err(invalid(format!(
                "x509_svid_ttl: {} s is too short to be renewed in time; use {} s or more",
                ttl.as_secs(),
                MIN_SVID_TTL.as_secs()
            ))),
            _ => Ok(()),
        }
    }

    /// Refuses to federate with a trust domain whose bundle is not here (SPIRE): its workloads would be refused, and nobody told why.
    /// What the entry had `before` is not judged.
    fn check_federated(&self, entry: &Entry, before: Option<&Entry>) -> Result<(), Status> {
        let had = |td| before.is_some_and(|before| before.federates_with.contains(td));
        let known = self.0.federated.all();
        match entry.federates_with.iter().find(|td| !had(td) && !known.contains_key(td.as_str())) {
            Some(td) => Err(Status::failed_precondition(format!(
                "federates_with: no bundle of `{td}` is here; federate with it first (`countersign federation create`), or set its \
                 bundle (`countersign bundle set`)"
            ))),
            None => Ok(()),
        }
    }

    fn parse_new(&self, wire: types::Entry) -> Result<Entry, Status> {
        let mut entry = entry_from_wire(wire, fresh_entry_id).map_err(invalid)?;
        self.check(&entry)?;
        self.check_federated(&entry, None)?;
        entry.revision = 0;
        entry.created_at = self.0.now();
        Ok(entry)
    }
}

fn check_batch(len: usize) -> Result<(), Status> {
    if len > MAX_BATCH {
        Err(invalid(format!("a batch holds at most {MAX_BATCH} entries, this one {len}")))
    } else {
        Ok(())
    }
}

/// Changes one entry.
async fn update(
    endpoint: &Endpoint,
    wire: &types::Entry,
    mask: Option<types::EntryMask>,
    caller: &Caller,
) -> Result<types::Entry, Status> {
    let id = Endpoint::entry_id(&wire.id)?;
    // What the mask leaves alone is taken from the entry as it is when the change is written.
    let change = |before: &Entry| {
        let merged = masks::update_entry(entry_to_wire(before), wire.clone(), mask);
        let entry = entry_from_wire(merged, || id.clone()).map_err(invalid)?;
        endpoint.check(&entry)?;
        endpoint.check_federated(&entry, Some(before))?;
        Ok(entry)
    };
    let entry = endpoint.0.entries.update(&id, change).await.map_err(|error| match error {
        UpdateError::Unknown => Status::not_found(format!("there is no entry `{id}`")),
        UpdateError::Refused(status) => status,
        UpdateError::Store(error) => store_status(&error),
    })?;
    tracing::info!(entry = %id, %caller, "entry updated");
    Ok(entry_to_wire(&entry))
}

#[async_trait]
impl EntryService for Endpoint {
    type SyncAuthorizedEntriesStream = BoxStream<SyncAuthorizedEntriesResponse>;

    async fn count_entries(
        &self,
        request: Request<CountEntriesRequest>,
    ) -> Result<Response<CountEntriesResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let count = self.0.entries.count(filter!(request.into_inner().filter).parse()?);
        Ok(Response::new(CountEntriesResponse { count: count.try_into().unwrap_or(i32::MAX) }))
    }

    async fn list_entries(
        &self,
        request: Request<ListEntriesRequest>,
    ) -> Result<Response<ListEntriesResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let wanted = filter!(request.filter).parse()?;
        let after = Some(request.page_token.as_str()).filter(|t| !t.is_empty()).map(Self::entry_id).transpose()?;
        let size = paging::size(request.page_size);
        // One more than the page holds shows whether there is another page.
        let mut page = self.0.entries.page(after.as_ref(), size.saturating_add(1), wanted);
        let mut entries: Vec<_> =
            page.iter().take(size).map(|e| masks::entry(entry_to_wire(e), request.output_mask)).collect();
        // A page of large entries is shorter: it must fit into a message.
        entries.truncate(first_portion(&entries, size));
        let more = page.len() > entries.len();
        page.truncate(entries.len());
        let next_page_token = page.last().filter(|_| more).map(|e| e.id.to_string()).unwrap_or_default();
        Ok(Response::new(ListEntriesResponse { entries, next_page_token }))
    }

    async fn get_entry(&self, request: Request<GetEntryRequest>) -> Result<Response<types::Entry>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let id = Self::entry_id(&request.id)?;
        let entry = self.0.entries.get(&id).ok_or_else(|| Status::not_found(format!("there is no entry `{id}`")))?;
        Ok(Response::new(masks::entry(entry_to_wire(&entry), request.output_mask)))
    }

    async fn batch_create_entry(
        &self,
        request: Request<BatchCreateEntryRequest>,
    ) -> Result<Response<BatchCreateEntryResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        check_batch(request.entries.len())?;
        let parsed: Vec<Result<Entry, Status>> = request.entries.into_iter().map(|wire| self.parse_new(wire)).collect();
        let good: Vec<Entry> = parsed.iter().filter_map(|p| p.as_ref().ok()).cloned().collect();
        let create = |core: Arc<Core>| async move {
            let created = core.entries.create(good).await.map_err(|e| store_status(&e))?;
            let fresh = created.iter().filter_map(|c| if let Created::New(entry) = c { Some(entry) } else { None });
            fresh.for_each(|entry| tracing::info!(entry = %entry.id, %caller, "entry created"));
            Ok(created)
        };
        // An answer for each good one, in their order.
        let mut created = self.0.to_the_end(create).await.map(Vec::into_iter);
        let results = parsed.into_iter().map(|parsed| {
            let made = parsed.and_then(|_| match &mut created {
                Ok(created) => created.next().ok_or_else(|| Status::internal("an entry was not judged")),
                Err(status) => Err(status.clone()),
            });
            let (verdict, entry) = match made {
                Ok(Created::New(entry)) => (Ok(()), Some(entry)),
                Ok(Created::Same(entry)) => {
                    let why = "an entry with this SPIFFE ID, parent and selectors exists";
                    (Err(Status::already_exists(why)), Some(entry))
                }
                Ok(Created::IdTaken(id)) => (Err(Status::already_exists(format!("entry `{id}` exists"))), None),
                Err(status) => (Err(status), None),
            };
            batch_create_entry_response::Result {
                status: Some(item_status(&verdict)),
                entry: entry.map(|e| masks::entry(entry_to_wire(&e), request.output_mask)),
            }
        });
        let results = results.collect();
        Ok(Response::new(BatchCreateEntryResponse { results }))
    }

    async fn batch_update_entry(
        &self,
        request: Request<BatchUpdateEntryRequest>,
    ) -> Result<Response<BatchUpdateEntryResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        check_batch(request.entries.len())?;
        let mut results = vec![];
        for wire in request.entries {
            let (mask, caller) = (request.input_mask, caller.clone());
            let update = |core: Arc<Core>| async move { update(&Self(core), &wire, mask, &caller).await };
            let updated = self.0.to_the_end(update).await;
            let (verdict, entry) = match updated {
                Ok(entry) => (Ok(()), Some(masks::entry(entry, request.output_mask))),
                Err(status) => (Err(status), None),
            };
            results.push(batch_update_entry_response::Result { status: Some(item_status(&verdict)), entry });
        }
        Ok(Response::new(BatchUpdateEntryResponse { results }))
    }

    async fn batch_delete_entry(
        &self,
        request: Request<BatchDeleteEntryRequest>,
    ) -> Result<Response<BatchDeleteEntryResponse>, Status> {
        let caller = Caller::operator(&self.0, &request)?;
        let ids = request.into_inner().ids;
        check_batch(ids.len())?;
        let judged: Vec<Result<EntryId, Status>> = ids.iter().map(|text| Self::entry_id(text)).collect();
        let good: Vec<EntryId> = judged.iter().flatten().cloned().collect();
        let delete = |core: Arc<Core>| async move {
            let deleted = core.entries.delete(&good).await.map_err(|e| store_status(&e))?;
            let gone = good.iter().zip(&deleted).filter(|(_, was)| **was);
            gone.for_each(|(id, _)| tracing::info!(entry = %id, %caller, "entry deleted"));
            Ok(deleted)
        };
        // Whether each good one was there, in their order.
        let mut deleted = self.0.to_the_end(delete).await.map(Vec::into_iter);
        let results = ids.into_iter().zip(judged).map(|(text, judged)| {
            let verdict = judged.and_then(|id| match &mut deleted {
                Ok(deleted) => {
                    let was = deleted.next().filter(|was| *was);
                    was.map(drop).ok_or_else(|| Status::not_found(format!("there is no entry `{id}`")))
                }
                Err(status) => Err(status.clone()),
            });
            batch_delete_entry_response::Result { status: Some(item_status(&verdict)), id: text }
        });
        let results = results.collect();
        Ok(Response::new(BatchDeleteEntryResponse { results }))
    }

    async fn get_authorized_entries(
        &self,
        request: Request<GetAuthorizedEntriesRequest>,
    ) -> Result<Response<GetAuthorizedEntriesResponse>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        let mask = request.into_inner().output_mask;
        let entries = self.0.entries.authorized(&agent, self.0.now());
        let entries = entries.iter().map(|e| masks::entry(entry_to_wire(e), mask)).collect();
        Ok(Response::new(GetAuthorizedEntriesResponse { entries }))
    }

    /// Sends every entry's revision; the agent then requests those that it holds in another revision (SPIRE API).
    async fn sync_authorized_entries(
        &self,
        request: Request<Streaming<SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<Self::SyncAuthorizedEntriesStream>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        let cut_off = cut_off(&self.0, &request);
        let mut requests = request.into_inner();
        let first = requests.message().await?.ok_or_else(|| invalid("the first message is missing"))?;
        let entries = self.0.entries.authorized(&agent, self.0.now());
        let (tx, rx) = mpsc::channel(4);
        let core = self.0.clone();
        self.0.tasks.spawn(async move {
            let ended = tx.clone();
            let sync = super::entry_sync::Sync { entries, mask: first.output_mask, tx };
            tokio::select! {
                () = sync.run(requests) => {}
                () = core.shutdown.cancelled() => {}
                status = cut_off => drop(ended.try_send(Err(status))),
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}
