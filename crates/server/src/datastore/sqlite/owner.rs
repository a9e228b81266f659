//! The trust domain that a store belongs to. A server on another trust domain's data would publish a bundle that
//! verifies none of its peers.

use std::collections::BTreeSet;

use countersign_identity::TrustDomain;
use sqlx::{Row, SqlitePool};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::DataStoreError;

/// Name of the fact that holds the trust domain.
const TRUST_DOMAIN: &str = "trust_domain";

/// Rejects a store of another trust domain. Reads only: a rejected store is left unchanged.
pub async fn check(pool: &SqlitePool, asked: &TrustDomain) -> Result<(), DataStoreError> {
    let mut owners = match stated(pool).await? {
        Some(stated) => BTreeSet::from([stated]),
        // A store from before this fact was written.
        None => implied(pool).await?,
    };
    if owners.is_empty() || owners.contains(asked.as_str()) {
        return Ok(());
    }
    // Never empty here, as checked above.
    let stored = owners.pop_first().unwrap_or_default();
    Err(DataStoreError::TrustDomain { stored, asked: asked.to_string() })
}

/// Writes the trust domain into a new store.
pub async fn claim(pool: &SqlitePool, trust_domain: &TrustDomain) -> Result<(), DataStoreError> {
    sqlx::query("INSERT INTO facts (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING")
        .bind(TRUST_DOMAIN)
        .bind(trust_domain.as_str())
        .execute(pool)
        .await?;
    Ok(())
}

async fn has_table(pool: &SqlitePool, table: &str) -> Result<bool, DataStoreError> {
    let found = sqlx::query("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?").bind(table);
    Ok(found.fetch_optional(pool).await?.is_some())
}

async fn stated(pool: &SqlitePool) -> Result<Option<String>, DataStoreError> {
    if !has_table(pool, "facts").await? {
        return Ok(None);
    }
    let row = sqlx::query("SELECT value FROM facts WHERE name = ?").bind(TRUST_DOMAIN).fetch_optional(pool).await?;
    Ok(row.map(|r| r.get("value")))
}

/// The trust domains of the authorities, entries and agents in the store.
async fn implied(pool: &SqlitePool) -> Result<BTreeSet<String>, DataStoreError> {
    let mut found = BTreeSet::new();
    if !has_table(pool, "authorities").await? {
        return Ok(found);
    }
    for row in sqlx::query("SELECT certificate FROM authorities").fetch_all(pool).await? {
        found.extend(domain_of_authority(row.get("certificate")));
    }
    let ids = "SELECT spiffe_id FROM entries UNION SELECT spiffe_id FROM agents LIMIT 1000";
    for row in sqlx::query(ids).fetch_all(pool).await? {
        found.extend(domain_of_id(row.get("spiffe_id")));
    }
    Ok(found)
}

fn domain_of_authority(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => domain_of_id(uri),
        _ => None,
    })
}

fn domain_of_id(id: &str) -> Option<String> {
    id.strip_prefix("spiffe://").and_then(|rest| rest.split('/').next()).map(str::to_owned)
}
