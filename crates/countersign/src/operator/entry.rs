//! `countersign entry`.

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::entry::entry_client::EntryClient;
use countersign_api::spire::entry::{
    BatchCreateEntryRequest, BatchDeleteEntryRequest, BatchUpdateEntryRequest, GetEntryRequest, ListEntriesRequest,
    list_entries_request,
};
use countersign_api::spire::types::{self, EntryMask};
use serde_json::{Value, json};
use tonic::transport::Channel;

use super::output::{Output, Table};
use super::{ok, selectors, shown, when, workload_id};
use crate::clients::{ServerArg, client, refused};
use crate::settings::Ttl;

/// Registration entries: who gets which identity.
#[derive(Subcommand)]
pub enum EntryCommand {
    /// Register a workload: whoever has all the selectors at the parent agent gets the SPIFFE ID.
    Create {
        #[command(flatten)]
        server: ServerArg,
        /// Identity to grant.
        #[arg(long)]
        spiffe_id: String,
        /// The agent that hands it out (`countersign node list`), or an alias of agents.
        #[arg(long)]
        parent_id: String,
        #[command(flatten)]
        fields: Fields,
        /// Name of the entry [default: made by the server].
        #[arg(long)]
        id: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// List entries, or show one.
    Show {
        #[command(flatten)]
        server: ServerArg,
        /// Only this entry.
        #[arg(long)]
        id: Option<String>,
        /// Only entries of this identity.
        #[arg(long)]
        spiffe_id: Option<String>,
        /// Only entries below this parent.
        #[arg(long)]
        parent_id: Option<String>,
        /// Only entries with exactly these selectors.
        #[arg(long)]
        selector: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Change the given fields of an entry.
    Update {
        #[command(flatten)]
        server: ServerArg,
        /// Which entry.
        #[arg(long)]
        id: String,
        /// New identity.
        #[arg(long)]
        spiffe_id: Option<String>,
        /// New parent.
        #[arg(long)]
        parent_id: Option<String>,
        #[command(flatten)]
        fields: Fields,
        #[command(flatten)]
        output: Output,
    },
    /// Delete entries; their SVIDs are withdrawn at once.
    Delete {
        #[command(flatten)]
        server: ServerArg,
        /// Which entries.
        #[arg(long, required = true)]
        id: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
}

/// Fields that create and update share.
#[derive(Debug, clap::Args)]
pub struct Fields {
    /// What the workload must have, such as unix:uid:1000; all of several.
    #[arg(long)]
    selector: Vec<String>,
    /// Life of the SVID [default: the server's].
    #[arg(long, value_name = "TTL")]
    x509_svid_ttl: Option<Ttl>,
    /// DNS name in the certificate.
    #[arg(long)]
    dns_name: Vec<String>,
    /// Foreign trust domain whose bundle the workload gets.
    #[arg(long)]
    federates_with: Vec<String>,
    /// Tells several identities of one workload apart.
    #[arg(long)]
    hint: Option<String>,
    /// The workload may administer the server.
    #[arg(long)]
    admin: bool,
    /// The workload may ask for an intermediate authority.
    #[arg(long)]
    downstream: bool,
}

impl Fields {
    fn fill(&self, entry: &mut types::Entry) -> Result<()> {
        entry.selectors = selectors(&self.selector)?;
        entry.x509_svid_ttl = self.x509_svid_ttl.map_or(0, |t| t.0.as_secs().try_into().unwrap_or(i32::MAX));
        entry.dns_names.clone_from(&self.dns_name);
        entry.federates_with.clone_from(&self.federates_with);
        entry.hint = self.hint.clone().unwrap_or_default();
        entry.admin = self.admin;
        entry.downstream = self.downstream;
        Ok(())
    }
}

fn json_of(e: &types::Entry) -> Value {
    json!({
        "id": e.id,
        "spiffe_id": shown(e.spiffe_id.as_ref()),
        "parent_id": shown(e.parent_id.as_ref()),
        "selectors": e.selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>(),
        "x509_svid_ttl_seconds": e.x509_svid_ttl,
        "dns_names": e.dns_names,
        "federates_with": e.federates_with,
        "hint": e.hint,
        "admin": e.admin,
        "downstream": e.downstream,
        "expires_at": e.expires_at,
        "revision": e.revision_number,
        "created_at": e.created_at,
    })
}

fn print(output: &Output, entries: &[types::Entry]) -> Result<()> {
    let mut table = Table::new(&["id", "spiffe id", "parent id", "selectors", "ttl", "revision", "created"]);
    for e in entries {
        let selectors = e.selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>().join(" ");
        let ttl = if e.x509_svid_ttl == 0 { "default".into() } else { format!("{}s", e.x509_svid_ttl) };
        table.row(vec![
            e.id.clone(),
            shown(e.spiffe_id.as_ref()),
            shown(e.parent_id.as_ref()),
            selectors,
            ttl,
            e.revision_number.to_string(),
            when(e.created_at),
        ]);
    }
    Ok(output.print(&table, &Value::Array(entries.iter().map(json_of).collect()))?)
}

/// Every entry that a filter lets through.
pub async fn list(channel: Channel, filter: list_entries_request::Filter) -> Result<Vec<types::Entry>> {
    let mut client = client!(EntryClient, channel);
    let (mut all, mut page_token) = (vec![], String::new());
    loop {
        let request =
            ListEntriesRequest { filter: Some(filter.clone()), output_mask: None, page_size: 1_000, page_token };
        let page = client.list_entries(request).await.map_err(refused)?.into_inner();
        all.extend(page.entries);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = page.next_page_token;
    }
}

/// Creates one entry; fails with the server's reason.
pub async fn create(channel: Channel, entry: types::Entry) -> Result<types::Entry> {
    let request = BatchCreateEntryRequest { entries: vec![entry], output_mask: None };
    let response = client!(EntryClient, channel).batch_create_entry(request).await.map_err(refused)?.into_inner();
    let result = response.results.into_iter().next().unwrap_or_default();
    ok(result.status)?;
    Ok(result.entry.unwrap_or_default())
}

/// Deletes entries; fails with the first reason.
pub async fn delete(channel: Channel, ids: Vec<String>) -> Result<Vec<String>> {
    let response = client!(EntryClient, channel)
        .batch_delete_entry(BatchDeleteEntryRequest { ids })
        .await
        .map_err(refused)?
        .into_inner();
    response.results.into_iter().map(|r| ok(r.status).map(|()| r.id)).collect()
}

/// Deletes entries, of which some may not be there; fails with the first reason.
pub async fn delete_if_there(channel: Channel, ids: Vec<String>) -> Result<()> {
    let request = BatchDeleteEntryRequest { ids };
    let response = client!(EntryClient, channel).batch_delete_entry(request).await.map_err(refused)?.into_inner();
    let not_found = i32::from(tonic::Code::NotFound);
    response
        .results
        .into_iter()
        .map(|r| r.status)
        .filter(|s| s.as_ref().is_none_or(|s| s.code != not_found))
        .try_for_each(ok)
}

/// Runs the command.
pub async fn run(command: EntryCommand) -> Result<()> {
    match command {
        EntryCommand::Create { server, spiffe_id, parent_id, fields, id, output } => {
            let mut entry = types::Entry {
                id: id.unwrap_or_default(),
                spiffe_id: Some(workload_id("--spiffe-id", &spiffe_id)?),
                parent_id: Some(workload_id("--parent-id", &parent_id)?),
                ..types::Entry::default()
            };
            fields.fill(&mut entry)?;
            let created = create(server.channel()?, entry).await?;
            print(&output, &[created])?;
        }
        EntryCommand::Show { server, id, spiffe_id, parent_id, selector, output } => {
            let channel = server.channel()?;
            if let Some(id) = id {
                let found = client!(EntryClient, channel)
                    .get_entry(GetEntryRequest { id, output_mask: None })
                    .await
                    .map_err(refused)?;
                print(&output, &[found.into_inner()])?;
                return Ok(());
            }
            let filter = list_entries_request::Filter {
                by_spiffe_id: spiffe_id.map(|id| workload_id("--spiffe-id", &id)).transpose()?,
                by_parent_id: parent_id.map(|id| workload_id("--parent-id", &id)).transpose()?,
                by_selectors: if selector.is_empty() {
                    None
                } else {
                    Some(types::SelectorMatch { selectors: selectors(&selector)?, r#match: 0 })
                },
                ..Default::default()
            };
            print(&output, &list(channel, filter).await?)?;
        }
        EntryCommand::Update { server, id, spiffe_id, parent_id, fields, output } => {
            let mut entry = types::Entry { id, ..types::Entry::default() };
            fields.fill(&mut entry)?;
            let mask = EntryMask {
                spiffe_id: spiffe_id.is_some(),
                parent_id: parent_id.is_some(),
                selectors: !fields.selector.is_empty(),
                x509_svid_ttl: fields.x509_svid_ttl.is_some(),
                dns_names: !fields.dns_name.is_empty(),
                federates_with: !fields.federates_with.is_empty(),
                hint: fields.hint.is_some(),
                admin: fields.admin,
                downstream: fields.downstream,
                ..EntryMask::default()
            };
            entry.spiffe_id = spiffe_id.map(|id| workload_id("--spiffe-id", &id)).transpose()?;
            entry.parent_id = parent_id.map(|id| workload_id("--parent-id", &id)).transpose()?;
            let request = BatchUpdateEntryRequest { entries: vec![entry], input_mask: Some(mask), output_mask: None };
            let response = client!(EntryClient, server.channel()?)
                .batch_update_entry(request)
                .await
                .map_err(refused)?
                .into_inner();
            let result = response.results.into_iter().next().unwrap_or_default();
            ok(result.status)?;
            print(&output, &result.entry.into_iter().collect::<Vec<_>>())?;
        }
        EntryCommand::Delete { server, id, output } => {
            let deleted = delete(server.channel()?, id).await?;
            let mut table = Table::new(&["deleted"]);
            deleted.iter().for_each(|id| table.row(vec![id.clone()]));
            output.print(&table, &json!({ "deleted": deleted }))?;
        }
    }
    Ok(())
}
