//! `countersign federation`: relationships with foreign trust domains, whose bundles the server keeps fresh.

mod fields;

use anyhow::Result;
use clap::Subcommand;
use countersign_api::spire::trustdomain::trust_domain_client::TrustDomainClient;
use countersign_api::spire::trustdomain::{
    BatchCreateFederationRelationshipRequest, BatchDeleteFederationRelationshipRequest,
    BatchUpdateFederationRelationshipRequest, GetFederationRelationshipRequest, ListFederationRelationshipsRequest,
    RefreshBundleRequest,
};
use countersign_api::spire::types::federation_relationship::BundleEndpointProfile;
use countersign_api::spire::types::{FederationRelationship, FederationRelationshipMask};
use serde_json::{Value, json};

use self::fields::Fields;
use super::output::{Output, Table};
use super::{ok, trust_domain};
use crate::clients::{Asking, ServerArg, client, refused};

/// Federate with foreign trust domains: say where their bundles are fetched.
#[derive(Subcommand)]
pub enum FederationCommand {
    /// Federate with a trust domain: the server fetches its bundle from now on, and keeps it fresh.
    ///
    /// Workloads get the bundle once their entry names the trust domain (`countersign entry update --federates-with`). For
    /// both sides to verify each other, the other trust domain has to federate with this one likewise.
    Create {
        #[command(flatten)]
        server: ServerArg,
        /// Foreign trust domain, such as partner.example.
        #[arg(long, value_name = "NAME")]
        trust_domain: String,
        #[command(flatten)]
        fields: Fields,
        #[command(flatten)]
        output: Output,
    },
    /// Change where a trust domain's bundle is fetched, or how its endpoint is authenticated. What is not given stays.
    Update {
        #[command(flatten)]
        server: ServerArg,
        /// Foreign trust domain whose relationship to change.
        #[arg(long, value_name = "NAME")]
        trust_domain: String,
        #[command(flatten)]
        fields: Fields,
        #[command(flatten)]
        output: Output,
    },
    /// List all relationships.
    List {
        #[command(flatten)]
        server: ServerArg,
        #[command(flatten)]
        output: Output,
    },
    /// Show one relationship, and which bundle is here.
    Show {
        #[command(flatten)]
        server: ServerArg,
        /// Foreign trust domain.
        #[arg(long, value_name = "NAME")]
        trust_domain: String,
        #[command(flatten)]
        output: Output,
    },
    /// Fetch a trust domain's bundle now, and say what is wrong if that fails.
    Refresh {
        #[command(flatten)]
        server: ServerArg,
        /// Foreign trust domain.
        #[arg(long, value_name = "NAME")]
        trust_domain: String,
    },
    /// End relationships. The bundles stay, and are fetched no more.
    Delete {
        #[command(flatten)]
        server: ServerArg,
        /// Foreign trust domain; may be repeated.
        #[arg(long, value_name = "NAME", required = true)]
        trust_domain: Vec<String>,
        #[command(flatten)]
        output: Output,
    },
}

/// Runs the command.
pub async fn run(command: FederationCommand) -> Result<()> {
    match command {
        FederationCommand::Create { server, trust_domain, fields, output } => {
            let made = create(server.channel()?, fields.whole(&trust_domain)?).await?;
            if needs_bundle(&made) {
                eprintln!("warning: {}", no_bundle(&made));
            }
            print(&output, &[made])
        }
        FederationCommand::Update { server, trust_domain, fields, output } => {
            let (relationship, mask) = fields.changes(&trust_domain)?;
            let made = update(server.channel()?, relationship, mask).await?;
            print(&output, &[made])
        }
        FederationCommand::List { server, output } => print(&output, &list(server.channel()?).await?),
        FederationCommand::Show { server, trust_domain: name, output } => {
            let trust_domain = trust_domain("--trust-domain", &name)?.to_string();
            let request = GetFederationRelationshipRequest { trust_domain, output_mask: None };
            let found = client!(TrustDomainClient, server.channel()?).get_federation_relationship(request).await;
            show(&output, &found.map_err(refused)?.into_inner())
        }
        FederationCommand::Refresh { server, trust_domain: name } => {
            let td = trust_domain("--trust-domain", &name)?.to_string();
            let request = RefreshBundleRequest { trust_domain: td.clone() };
            client!(TrustDomainClient, server.channel()?).refresh_bundle(request).await.map_err(refused)?;
            eprintln!("the bundle of {td} is as its endpoint serves it now");
            Ok(())
        }
        FederationCommand::Delete { server, trust_domain: names, output } => {
            let parsed = names.iter().map(|name| Ok(trust_domain("--trust-domain", name)?.to_string()));
            let trust_domains = parsed.collect::<Result<Vec<_>>>()?;
            let request = BatchDeleteFederationRelationshipRequest { trust_domains };
            let mut client = client!(TrustDomainClient, server.channel()?);
            let answer = client.batch_delete_federation_relationship(request).await.map_err(refused)?.into_inner();
            let deleted = answer.results.into_iter().map(|r| ok(r.status).map(|()| r.trust_domain));
            let deleted = deleted.collect::<Result<Vec<_>>>()?;
            let mut table = Table::new(&["deleted"]);
            deleted.iter().for_each(|name| table.row(vec![name.clone()]));
            Ok(output.print(&table, &json!({ "deleted": deleted }))?)
        }
    }
}

async fn create(channel: Asking, relationship: FederationRelationship) -> Result<FederationRelationship> {
    let federation_relationships = vec![relationship];
    let request = BatchCreateFederationRelationshipRequest { federation_relationships, output_mask: None };
    let answer = client!(TrustDomainClient, channel).batch_create_federation_relationship(request).await;
    let result = answer.map_err(refused)?.into_inner().results.into_iter().next().unwrap_or_default();
    ok(result.status)?;
    Ok(result.federation_relationship.unwrap_or_default())
}

async fn update(
    channel: Asking,
    relationship: FederationRelationship,
    mask: FederationRelationshipMask,
) -> Result<FederationRelationship> {
    let request = BatchUpdateFederationRelationshipRequest {
        federation_relationships: vec![relationship],
        input_mask: Some(mask),
        output_mask: None,
    };
    let answer = client!(TrustDomainClient, channel).batch_update_federation_relationship(request).await;
    let result = answer.map_err(refused)?.into_inner().results.into_iter().next().unwrap_or_default();
    ok(result.status)?;
    Ok(result.federation_relationship.unwrap_or_default())
}

/// All relationships, from all pages.
async fn list(channel: Asking) -> Result<Vec<FederationRelationship>> {
    let mut client = client!(TrustDomainClient, channel);
    let (mut all, mut page_token) = (vec![], String::new());
    loop {
        let request = ListFederationRelationshipsRequest { output_mask: None, page_size: 100, page_token };
        let page = client.list_federation_relationships(request).await.map_err(refused)?.into_inner();
        all.extend(page.federation_relationships);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = page.next_page_token;
    }
}

/// A profile's name, and the endpoint's ID where it has one.
fn profile_of(relationship: &FederationRelationship) -> (&'static str, &str) {
    match &relationship.bundle_endpoint_profile {
        Some(BundleEndpointProfile::HttpsSpiffe(spiffe)) => ("https_spiffe", &spiffe.endpoint_spiffe_id),
        Some(BundleEndpointProfile::HttpsWeb(_)) => ("https_web", ""),
        None => ("", ""),
    }
}

/// Whether nothing can be fetched before somebody sets the bundle that the endpoint is authenticated with. One of another trust domain
/// may have a bundle of its own.
fn needs_bundle(relationship: &FederationRelationship) -> bool {
    let (_, id) = profile_of(relationship);
    let own = format!("spiffe://{}/", relationship.trust_domain);
    relationship.trust_domain_bundle.is_none() && id.starts_with(&own)
}

fn no_bundle(relationship: &FederationRelationship) -> String {
    let td = &relationship.trust_domain;
    format!(
        "no bundle of {td} is here, by which its endpoint could be authenticated: get it by a way that you trust, and set it with \
         `countersign bundle set --trust-domain {td} --path FILE --format spiffe`"
    )
}

fn json_of(r: &FederationRelationship) -> Value {
    let (profile, id) = profile_of(r);
    let bundle = r.trust_domain_bundle.as_ref().map(|b| {
        json!({ "sequence": b.sequence_number, "refresh_hint_seconds": b.refresh_hint,
            "x509_authorities": b.x509_authorities.len(), "jwt_authorities": b.jwt_authorities.len() })
    });
    json!({ "trust_domain": r.trust_domain, "bundle_endpoint_url": r.bundle_endpoint_url, "bundle_endpoint_profile": profile,
        "endpoint_spiffe_id": Some(id).filter(|id| !id.is_empty()), "bundle": bundle })
}

fn print(output: &Output, relationships: &[FederationRelationship]) -> Result<()> {
    let mut table = Table::new(&["trust domain", "profile", "bundle endpoint", "endpoint spiffe id", "bundle"]);
    for r in relationships {
        let (profile, id) = profile_of(r);
        let bundle =
            r.trust_domain_bundle.as_ref().map_or("none".to_owned(), |b| format!("sequence {}", b.sequence_number));
        table.row(vec![r.trust_domain.clone(), profile.into(), r.bundle_endpoint_url.clone(), id.to_owned(), bundle]);
    }
    Ok(output.print(&table, &Value::Array(relationships.iter().map(json_of).collect()))?)
}

fn show(output: &Output, r: &FederationRelationship) -> Result<()> {
    let (profile, id) = profile_of(r);
    let mut facts = vec![
        ("trust domain".to_owned(), r.trust_domain.clone()),
        ("bundle endpoint".to_owned(), r.bundle_endpoint_url.clone()),
        ("profile".to_owned(), profile.to_owned()),
    ];
    if !id.is_empty() {
        facts.push(("endpoint spiffe id".to_owned(), id.to_owned()));
    }
    match &r.trust_domain_bundle {
        None => facts.push(("bundle".to_owned(), if needs_bundle(r) { no_bundle(r) } else { "none yet".to_owned() })),
        Some(b) => {
            let (x509, jwt) = (b.x509_authorities.len(), b.jwt_authorities.len());
            facts.push(("bundle".to_owned(), format!("{x509} X.509 and {jwt} JWT authorities")));
            facts.push(("sequence".to_owned(), b.sequence_number.to_string()));
            facts.push(("refresh hint".to_owned(), format!("{} s", b.refresh_hint)));
        }
    }
    Ok(output.print(&Table::facts(facts), &json_of(r))?)
}
