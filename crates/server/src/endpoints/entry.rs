//! `spire.api.server.entry.v1`: registration entries, for operators and for agents.

use std::collections::BTreeSet;
use std::collections::HashMap;

use async_trait::async_trait;
use countersign_api::convert::{entry_from_wire, entry_to_wire, id_from_wire, selectors_from_wire};
use countersign_api::spire::entry::entry_server::Entry as EntryService;
use countersign_api::spire::entry::{
    BatchCreateEntryRequest, BatchCreateEntryResponse, BatchDeleteEntryRequest, BatchDeleteEntryResponse,
    BatchUpdateEntryRequest, BatchUpdateEntryResponse, CountEntriesRequest, CountEntriesResponse, EntryRevision,
    GetAuthorizedEntriesRequest, GetAuthorizedEntriesResponse, GetEntryRequest, ListEntriesRequest,
    ListEntriesResponse, SyncAuthorizedEntriesRequest, SyncAuthorizedEntriesResponse, batch_create_entry_response,
    batch_delete_entry_response, batch_update_entry_response,
};
use countersign_api::spire::types;
use countersign_identity::{Entry, EntryId};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::{BoxStream, Endpoint, invalid, item_status, masks, paging};
use crate::caller::Caller;
use crate::core::store_status;
use crate::entries::fresh_entry_id;

/// Entries in one batch at most.
const MAX_BATCH: usize = 10_000;
/// Entries in one message of SyncAuthorizedEntries.
const SYNC_PAGE: usize = 500;

/// The match behaviours of selectors and federation (SelectorMatch and FederatesWithMatch share their numbers).
pub(super) fn sets_match<T: Ord>(wanted: &BTreeSet<T>, held: &BTreeSet<T>, behavior: i32) -> bool {
    match behavior {
        1 => held.is_subset(wanted),
        2 => held.is_superset(wanted),
        3 => !held.is_disjoint(wanted),
        _ => held == wanted,
    }
}

/// What CountEntries and ListEntries filter by; their wire messages are alike.
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

impl Endpoint {
    fn entries_matching(&self, filter: Filter) -> Result<Vec<std::sync::Arc<Entry>>, Status> {
        let id =
            |name, id: Option<types::Spiffeid>| id.map(|id| id_from_wire(name, Some(id))).transpose().map_err(invalid);
        let spiffe_id = id("by_spiffe_id", filter.spiffe_id)?;
        let parent_id = id("by_parent_id", filter.parent_id)?;
        let selectors =
            filter.selectors.map(|m| Ok::<_, Status>((selectors_from_wire(m.selectors).map_err(invalid)?, m.r#match)));
        let selectors = selectors.transpose()?;
        let federates =
            filter.federates_with.map(|m| (m.trust_domains.into_iter().collect::<BTreeSet<_>>(), m.r#match));
        let mut all = self.0.entries.list();
        all.retain(|e| {
            spiffe_id.as_ref().is_none_or(|id| e.spiffe_id == *id)
                && parent_id.as_ref().is_none_or(|id| e.parent_id == *id)
                && selectors.as_ref().is_none_or(|(wanted, how)| sets_match(wanted, &e.selectors, *how))
                && federates.as_ref().is_none_or(|(wanted, how)| {
                    sets_match(wanted, &e.federates_with.iter().map(ToString::to_string).collect(), *how)
                })
                && filter.hint.as_ref().is_none_or(|h| e.hint == *h)
                && filter.downstream.is_none_or(|d| e.downstream == d)
        });
        Ok(all)
    }

    fn entry_id(text: &str) -> Result<EntryId, Status> {
        text.parse().map_err(invalid)
    }

    fn parse_new(&self, wire: types::Entry) -> Result<Entry, Status> {
        let mut entry = entry_from_wire(wire, fresh_entry_id).map_err(invalid)?;
        entry.check(self.0.trust_domain()).map_err(invalid)?;
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

#[async_trait]
impl EntryService for Endpoint {
    type SyncAuthorizedEntriesStream = BoxStream<SyncAuthorizedEntriesResponse>;

    async fn count_entries(
        &self,
        request: Request<CountEntriesRequest>,
    ) -> Result<Response<CountEntriesResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let count = self.entries_matching(filter!(request.into_inner().filter))?.len();
        Ok(Response::new(CountEntriesResponse { count: count.try_into().unwrap_or(i32::MAX) }))
    }

    async fn list_entries(
        &self,
        request: Request<ListEntriesRequest>,
    ) -> Result<Response<ListEntriesResponse>, Status> {
        Caller::operator(&self.0, &request)?;
        let request = request.into_inner();
        let found = self.entries_matching(filter!(request.filter))?;
        let (page, next_page_token) = paging::page(found, request.page_size, &request.page_token, |e| e.id.to_string());
        let entries = page.iter().map(|e| masks::entry(entry_to_wire(e), request.output_mask)).collect();
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
        let mut good: Vec<Entry> = vec![];
        let judged: Vec<(Result<(), Status>, Option<types::Entry>)> = request
            .entries
            .into_iter()
            .map(|wire| match self.parse_new(wire) {
                Err(status) => (Err(status), None),
                Ok(entry) => {
                    let twin = good.iter().find(|g| g.registers_the_same_as(&entry)).map(entry_to_wire);
                    if let Some(same) = twin.or_else(|| self.0.entries.same_as(&entry).map(|e| entry_to_wire(&e))) {
                        return (
                            Err(Status::already_exists("an entry with this SPIFFE ID, parent and selectors exists")),
                            Some(same),
                        );
                    }
                    if self.0.entries.get(&entry.id).is_some() || good.iter().any(|g| g.id == entry.id) {
                        return (Err(Status::already_exists(format!("entry `{}` exists", entry.id))), None);
                    }
                    let wire = entry_to_wire(&entry);
                    good.push(entry);
                    (Ok(()), Some(wire))
                }
            })
            .collect();
        let stored = if good.is_empty() { Ok(()) } else { self.0.entries.put(good).await };
        let results = judged.into_iter().map(|(verdict, entry)| {
            let verdict = match (&stored, verdict) {
                (Err(e), Ok(())) => Err(store_status(e)),
                (_, verdict) => verdict,
            };
            let shown = verdict.as_ref().map_or_else(|s| s.code() == Code::AlreadyExists, |()| true);
            if let (Ok(()), Some(e)) = (&verdict, &entry) {
                tracing::info!(entry = e.id, %caller, "entry created");
            }
            batch_create_entry_response::Result {
                status: Some(item_status(&verdict)),
                entry: entry.filter(|_| shown).map(|e| masks::entry(e, request.output_mask)),
            }
        });
        Ok(Response::new(BatchCreateEntryResponse { results: results.collect() }))
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
            let updated = async {
                let id = Self::entry_id(&wire.id)?;
                let before =
                    self.0.entries.get(&id).ok_or_else(|| Status::not_found(format!("there is no entry `{id}`")))?;
                let merged = masks::update_entry(entry_to_wire(&before), wire, request.input_mask);
                let mut entry = entry_from_wire(merged, || id.clone()).map_err(invalid)?;
                entry.check(self.0.trust_domain()).map_err(invalid)?;
                entry.revision = before.revision + 1;
                let updated = entry_to_wire(&entry);
                self.0.entries.put(vec![entry]).await.map_err(|e| store_status(&e))?;
                tracing::info!(entry = %id, %caller, "entry updated");
                Ok(updated)
            };
            let updated = updated.await;
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
        let judged: Vec<Result<EntryId, Status>> = ids
            .iter()
            .map(|text| {
                let id = Self::entry_id(text)?;
                self.0
                    .entries
                    .get(&id)
                    .map(|_| id)
                    .ok_or_else(|| Status::not_found(format!("there is no entry `{text}`")))
            })
            .collect();
        let good: Vec<EntryId> = judged.iter().flatten().cloned().collect();
        let stored = if good.is_empty() { Ok(()) } else { self.0.entries.delete(&good).await };
        let results = ids.into_iter().zip(judged).map(|(id, verdict)| {
            let verdict = match (&stored, verdict) {
                (Err(e), Ok(_)) => Err(store_status(e)),
                (_, verdict) => verdict.map(|id| tracing::info!(entry = %id, %caller, "entry deleted")),
            };
            batch_delete_entry_response::Result { status: Some(item_status(&verdict)), id }
        });
        Ok(Response::new(BatchDeleteEntryResponse { results: results.collect() }))
    }

    async fn get_authorized_entries(
        &self,
        request: Request<GetAuthorizedEntriesRequest>,
    ) -> Result<Response<GetAuthorizedEntriesResponse>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        let mask = request.into_inner().output_mask;
        let now = self.0.now();
        let entries = self
            .0
            .entries
            .authorized(&agent)
            .iter()
            .filter(|e| !e.is_expired(now))
            .map(|e| masks::entry(entry_to_wire(e), mask))
            .collect();
        Ok(Response::new(GetAuthorizedEntriesResponse { entries }))
    }

    /// The agent gets every entry's revision and asks back for those that it holds in another one (SPIRE API).
    async fn sync_authorized_entries(
        &self,
        request: Request<Streaming<SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<Self::SyncAuthorizedEntriesStream>, Status> {
        let agent = Caller::agent(&self.0, &request)?;
        let mut requests = request.into_inner();
        let first = requests.message().await?.ok_or_else(|| invalid("the first message is missing"))?;
        let now = self.0.now();
        let entries: Vec<_> = self.0.entries.authorized(&agent).into_iter().filter(|e| !e.is_expired(now)).collect();
        let (tx, rx) = mpsc::channel(4);
        let shutdown = self.0.shutdown.clone();
        self.0.tasks.spawn(async move {
            let talk = async {
                let mask = first.output_mask;
                if entries.len() <= SYNC_PAGE {
                    let entries = entries.iter().map(|e| masks::entry(entry_to_wire(e), mask)).collect();
                    let all = SyncAuthorizedEntriesResponse { entries, ..Default::default() };
                    drop(tx.send(Ok(all)).await);
                    return;
                }
                let by_id: HashMap<&str, _> = entries.iter().map(|e| (e.id.as_str(), e)).collect();
                let mut pages = entries.chunks(SYNC_PAGE * 10).peekable();
                while let Some(page) = pages.next() {
                    let entry_revisions = page
                        .iter()
                        .map(|e| EntryRevision { id: e.id.to_string(), revision_number: e.revision })
                        .collect();
                    let more = pages.peek().is_some();
                    if tx
                        .send(Ok(SyncAuthorizedEntriesResponse { entry_revisions, entries: vec![], more }))
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                while let Ok(Some(wanted)) = requests.message().await {
                    let found: Vec<_> = wanted.ids.iter().filter_map(|id| by_id.get(id.as_str())).collect();
                    let mut pages = found.chunks(SYNC_PAGE).peekable();
                    if pages.peek().is_none() && tx.send(Ok(SyncAuthorizedEntriesResponse::default())).await.is_err() {
                        return;
                    }
                    while let Some(page) = pages.next() {
                        let entries = page.iter().map(|e| masks::entry(entry_to_wire(e), mask)).collect();
                        let more = pages.peek().is_some();
                        if tx
                            .send(Ok(SyncAuthorizedEntriesResponse { entry_revisions: vec![], entries, more }))
                            .await
                            .is_err()
                        {
                            return;
                        }
                    }
                }
            };
            tokio::select! {
                () = talk => {}
                () = shutdown.cancelled() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}
