//! Federation relationships: a row each.

use countersign_identity::TrustDomain;
use countersign_identity::trust_domain::{parse_trust_domain, parse_workload_id};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::{bad_row, versioned};
use crate::datastore::{DataStoreError, Version, Versioned};
use crate::federation::relationship::{Profile, Relationship};

/// All of them, in no particular order.
pub async fn read(pool: &SqlitePool) -> Result<Vec<Versioned<Relationship>>, DataStoreError> {
    let query = sqlx::query("SELECT trust_domain, url, endpoint_id, version FROM relationships");
    query.fetch_all(pool).await?.iter().map(relationship_of).collect()
}

/// Writes one over a version; `false` if that is not there any more.
pub async fn put(
    tx: &mut SqliteConnection,
    relationship: &Relationship,
    from: Option<Version>,
    to: Version,
) -> Result<bool, DataStoreError> {
    let endpoint_id = match &relationship.profile {
        Profile::HttpsSpiffe(id) => Some(id.to_string()),
        Profile::HttpsWeb => None,
    };
    let query = match from {
        None => sqlx::query(
            "INSERT INTO relationships (url, endpoint_id, version, trust_domain) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        ),
        Some(_) => sqlx::query(
            "UPDATE relationships SET url = ?, endpoint_id = ?, version = ? WHERE trust_domain = ? AND version = ?",
        ),
    };
    let (url, name) = (relationship.url.as_str().to_owned(), relationship.trust_domain.to_string());
    let query = query.bind(url).bind(endpoint_id).bind(to.0).bind(name);
    let query = if let Some(from) = from { query.bind(from.0) } else { query };
    Ok(query.execute(tx).await?.rows_affected() == 1)
}

/// Deletes one, if it exists.
pub async fn delete(pool: &SqlitePool, trust_domain: &TrustDomain) -> Result<(), DataStoreError> {
    sqlx::query("DELETE FROM relationships WHERE trust_domain = ?").bind(trust_domain.as_str()).execute(pool).await?;
    Ok(())
}

fn relationship_of(row: &SqliteRow) -> Result<Versioned<Relationship>, DataStoreError> {
    let name: &str = row.get("trust_domain");
    let bad = |why: String| bad_row("federation relationship", name.to_owned(), why);
    let endpoint_id: Option<&str> = row.get("endpoint_id");
    let profile = match endpoint_id {
        Some(id) => Profile::HttpsSpiffe(parse_workload_id(id).map_err(|e| bad(e.to_string()))?),
        None => Profile::HttpsWeb,
    };
    let trust_domain = parse_trust_domain(name).map_err(|e| bad(e.to_string()))?;
    let url: &str = row.get("url");
    let url = url.parse().map_err(|e: crate::federation::relationship::UrlError| bad(e.to_string()))?;
    Ok(versioned(row, Relationship { trust_domain, url, profile }))
}
