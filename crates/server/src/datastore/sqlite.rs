//! SQLite, embedded: WAL mode, synced on each commit, migrated at start.

mod journal;
mod migrations;
mod owner;
mod relationships;

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::convert::{bundle_to_wire, bundle_without_unknown_keys, entry_from_wire, entry_to_wire};
use countersign_api::spire::types;
use countersign_identity::trust_domain::parse_workload_id;
use countersign_identity::{Entry, EntryId, SpiffeId, TrustBundle, TrustDomain};
use prost::Message;
use sqlx::sqlite::SqliteRow;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Row, SqliteConnection, SqlitePool};
use time::OffsetDateTime;

use super::{DataStore, DataStoreError, JoinToken, Version, Versioned, Written};
use crate::agents::AttestedAgent;
use crate::authority::StoredJournal;
use crate::federation::relationship::Relationship;

/// Name of the fact that holds the version of journal and own bundle.
const AUTHORITIES_VERSION: &str = "authorities_version";

/// The embedded store, one file.
pub struct Sqlite(SqlitePool);

impl Sqlite {
    /// Opens the file, creates it if it is missing, and migrates its schema. Data of another trust domain is rejected
    /// before anything is written.
    pub async fn open(path: &Path, trust_domain: &TrustDomain) -> Result<Self, DataStoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5));
        // SQLite has one writer at a time; a pool of one connection queues fairly instead of failing with lock errors.
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_secs(5))
            .connect_with(options)
            .await?;
        owner::check(&pool, trust_domain).await?;
        migrations::migrator().run(&pool).await?;
        owner::claim(&pool, trust_domain).await?;
        Ok(Self(pool))
    }
}

fn bad_row(what: &'static str, name: String, why: impl ToString) -> DataStoreError {
    DataStoreError::Row { what, name, why: why.to_string() }
}

fn versioned<T>(row: &SqliteRow, value: T) -> Versioned<T> {
    Versioned { value, version: Version(row.get("version")) }
}

fn entry_of(row: &SqliteRow) -> Result<Versioned<Entry>, DataStoreError> {
    let read = types::Entry::decode(row.get::<&[u8], _>("body")).map_err(|e| e.to_string());
    let read = read.and_then(|e| {
        let own: Result<EntryId, _> = e.id.parse();
        entry_from_wire(e, || own.unwrap_or_else(|_| unreachable!("stored entries carry their ID")))
            .map_err(|e| e.to_string())
    });
    read.map(|entry| versioned(row, entry)).map_err(|why| bad_row("entry", row.get("id"), why))
}

fn agent_of(row: &SqliteRow) -> Result<Versioned<AttestedAgent>, DataStoreError> {
    let agent = serde_json::from_str(row.get("body")).map_err(|e| bad_row("agent", row.get("spiffe_id"), e))?;
    Ok(versioned(row, agent))
}

/// Refuses a bundle that vouches for nobody.
fn refuse_empty(bundle: &TrustBundle, is_empty: bool) -> Result<(), DataStoreError> {
    if is_empty { Err(DataStoreError::EmptyBundle(bundle.trust_domain.clone())) } else { Ok(()) }
}

async fn put_entry(
    tx: &mut SqliteConnection,
    entry: &Entry,
    from: Option<Version>,
    to: Version,
) -> Result<bool, DataStoreError> {
    let (id, spiffe_id, parent_id) = (entry.id.as_str(), entry.spiffe_id.to_string(), entry.parent_id.to_string());
    let body = entry_to_wire(entry).encode_to_vec();
    let query = match from {
        None => sqlx::query(
            "INSERT INTO entries (spiffe_id, parent_id, body, version, id) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        ),
        Some(_) => sqlx::query(
            "UPDATE entries SET spiffe_id = ?, parent_id = ?, body = ?, version = ? WHERE id = ? AND version = ?",
        ),
    };
    let query = query.bind(spiffe_id).bind(parent_id).bind(body).bind(to.0).bind(id);
    let query = if let Some(from) = from { query.bind(from.0) } else { query };
    Ok(query.execute(tx).await?.rows_affected() == 1)
}

async fn put_bundle(
    tx: &mut SqliteConnection,
    bundle: &TrustBundle,
    from: Option<Version>,
    to: Version,
) -> Result<bool, DataStoreError> {
    let query = match from {
        None => {
            sqlx::query("INSERT INTO bundles (body, version, trust_domain) VALUES (?, ?, ?) ON CONFLICT DO NOTHING")
        }
        Some(_) => sqlx::query("UPDATE bundles SET body = ?, version = ? WHERE trust_domain = ? AND version = ?"),
    };
    let query =
        query.bind(bundle_to_wire(bundle).encode_to_vec()).bind(to.0).bind(bundle.trust_domain.as_str().to_owned());
    let query = if let Some(from) = from { query.bind(from.0) } else { query };
    Ok(query.execute(tx).await?.rows_affected() == 1)
}

async fn authorities_version(tx: &mut SqliteConnection) -> Result<Version, DataStoreError> {
    let row =
        sqlx::query("SELECT value FROM facts WHERE name = ?").bind(AUTHORITIES_VERSION).fetch_optional(tx).await?;
    let Some(row) = row else { return Ok(Version::FIRST) };
    let value: &str = row.get("value");
    value.parse().map(Version).map_err(|e| bad_row("fact", AUTHORITIES_VERSION.into(), e))
}

#[async_trait]
impl DataStore for Sqlite {
    async fn entries(&self) -> Result<Vec<Versioned<Entry>>, DataStoreError> {
        let rows = sqlx::query("SELECT id, body, version FROM entries").fetch_all(&self.0).await?;
        rows.iter().map(entry_of).collect()
    }

    async fn entry(&self, id: &EntryId) -> Result<Option<Versioned<Entry>>, DataStoreError> {
        let query = sqlx::query("SELECT id, body, version FROM entries WHERE id = ?").bind(id.as_str());
        query.fetch_optional(&self.0).await?.as_ref().map(entry_of).transpose()
    }

    async fn put_entries(&self, entries: &[(Entry, Option<Version>)]) -> Result<Written, DataStoreError> {
        let to = Version::fresh();
        let mut tx = self.0.begin().await?;
        for (entry, from) in entries {
            if !put_entry(&mut tx, entry, *from, to).await? {
                tx.rollback().await?;
                return Ok(Written::Stale);
            }
        }
        tx.commit().await?;
        Ok(Written::Stored(to))
    }

    async fn delete_entries(&self, ids: &[EntryId]) -> Result<(), DataStoreError> {
        let mut tx = self.0.begin().await?;
        for id in ids {
            sqlx::query("DELETE FROM entries WHERE id = ?").bind(id.as_str()).execute(&mut *tx).await?;
        }
        Ok(tx.commit().await?)
    }

    async fn agents(&self) -> Result<Vec<Versioned<AttestedAgent>>, DataStoreError> {
        let rows = sqlx::query("SELECT spiffe_id, body, version FROM agents").fetch_all(&self.0).await?;
        rows.iter().map(agent_of).collect()
    }

    async fn agent(&self, id: &SpiffeId) -> Result<Option<Versioned<AttestedAgent>>, DataStoreError> {
        let query = sqlx::query("SELECT spiffe_id, body, version FROM agents WHERE spiffe_id = ?").bind(id.to_string());
        query.fetch_optional(&self.0).await?.as_ref().map(agent_of).transpose()
    }

    async fn put_agent(&self, agent: &AttestedAgent, from: Option<Version>) -> Result<Written, DataStoreError> {
        let body = serde_json::to_string(agent).map_err(|e| bad_row("agent", agent.id.to_string(), e))?;
        let evidence = agent.evidence.as_ref().map(|e| e.as_str().to_owned());
        let to = Version::fresh();
        let mut tx = self.0.begin().await?;
        if !agent.banned && evidence.is_some() {
            let banned = sqlx::query("SELECT 1 FROM agents WHERE evidence = ? AND banned = 1").bind(&evidence);
            if banned.fetch_optional(&mut *tx).await?.is_some() {
                tx.rollback().await?;
                return Ok(Written::Banned);
            }
        }
        let query = match from {
            None => sqlx::query(
                "INSERT INTO agents (body, banned, evidence, version, spiffe_id) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            ),
            Some(_) => sqlx::query(
                "UPDATE agents SET body = ?, banned = ?, evidence = ?, version = ? WHERE spiffe_id = ? AND version = ?",
            ),
        };
        let query = query.bind(body).bind(agent.banned).bind(evidence).bind(to.0).bind(agent.id.to_string());
        let query = if let Some(from) = from { query.bind(from.0) } else { query };
        if query.execute(&mut *tx).await?.rows_affected() != 1 {
            tx.rollback().await?;
            return Ok(Written::Stale);
        }
        tx.commit().await?;
        Ok(Written::Stored(to))
    }

    async fn delete_agent(&self, id: &SpiffeId) -> Result<(), DataStoreError> {
        sqlx::query("DELETE FROM agents WHERE spiffe_id = ?").bind(id.to_string()).execute(&self.0).await?;
        Ok(())
    }

    async fn put_token(&self, token: &JoinToken, now: OffsetDateTime) -> Result<(), DataStoreError> {
        let mut tx = self.0.begin().await?;
        sqlx::query("DELETE FROM join_tokens WHERE expires_at <= ?")
            .bind(now.unix_timestamp())
            .execute(&mut *tx)
            .await?;
        sqlx::query("INSERT INTO join_tokens (token, expires_at, agent_id) VALUES (?, ?, ?)")
            .bind(&token.token)
            .bind(token.expires_at.unix_timestamp())
            .bind(token.agent_id.as_ref().map(ToString::to_string))
            .execute(&mut *tx)
            .await?;
        Ok(tx.commit().await?)
    }

    async fn take_token(&self, token: &str) -> Result<Option<JoinToken>, DataStoreError> {
        let row = sqlx::query("DELETE FROM join_tokens WHERE token = ? RETURNING token, expires_at, agent_id")
            .bind(token)
            .fetch_optional(&self.0)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let bad = |e: String| bad_row("join token", "(secret)".into(), e);
        let agent_id: Option<String> = row.get("agent_id");
        Ok(Some(JoinToken {
            token: row.get("token"),
            expires_at: OffsetDateTime::from_unix_timestamp(row.get("expires_at")).map_err(|e| bad(e.to_string()))?,
            agent_id: agent_id.map(|id| parse_workload_id(&id)).transpose().map_err(|e| bad(e.to_string()))?,
        }))
    }

    async fn bundles(&self) -> Result<Vec<Versioned<TrustBundle>>, DataStoreError> {
        let rows = sqlx::query("SELECT trust_domain, body, version FROM bundles").fetch_all(&self.0).await?;
        let read = |body: &[u8]| {
            let wire = types::Bundle::decode(body).map_err(|e| e.to_string())?;
            let (bundle, left_out) = bundle_without_unknown_keys(wire).map_err(|e| e.to_string())?;
            for error in left_out {
                tracing::warn!(trust_domain = %bundle.trust_domain, %error, "a stored key cannot be used; it is left out");
            }
            Ok::<_, String>(bundle)
        };
        let read = |r: &SqliteRow| {
            let bundle = read(r.get("body")).map_err(|e| bad_row("bundle", r.get("trust_domain"), e))?;
            Ok(versioned(r, bundle))
        };
        rows.iter().map(read).collect()
    }

    async fn put_bundle(&self, bundle: &TrustBundle, from: Option<Version>) -> Result<Written, DataStoreError> {
        refuse_empty(bundle, bundle.is_empty())?;
        let to = Version::fresh();
        let mut tx = self.0.begin().await?;
        if !put_bundle(&mut tx, bundle, from, to).await? {
            tx.rollback().await?;
            return Ok(Written::Stale);
        }
        tx.commit().await?;
        Ok(Written::Stored(to))
    }

    async fn delete_bundle(&self, trust_domain: &str) -> Result<(), DataStoreError> {
        sqlx::query("DELETE FROM bundles WHERE trust_domain = ?").bind(trust_domain).execute(&self.0).await?;
        Ok(())
    }

    async fn relationships(&self) -> Result<Vec<Versioned<Relationship>>, DataStoreError> {
        relationships::read(&self.0).await
    }

    async fn put_relationship(
        &self,
        relationship: &Relationship,
        from: Option<Version>,
        bundle: Option<(&TrustBundle, Option<Version>)>,
    ) -> Result<Written, DataStoreError> {
        if let Some((bundle, _)) = bundle {
            refuse_empty(bundle, bundle.is_empty())?;
        }
        let to = Version::fresh();
        let mut tx = self.0.begin().await?;
        let stored = relationships::put(&mut tx, relationship, from, to).await?
            && match bundle {
                Some((bundle, from)) => put_bundle(&mut tx, bundle, from, to).await?,
                None => true,
            };
        if !stored {
            tx.rollback().await?;
            return Ok(Written::Stale);
        }
        tx.commit().await?;
        Ok(Written::Stored(to))
    }

    async fn delete_relationship(&self, trust_domain: &TrustDomain) -> Result<(), DataStoreError> {
        relationships::delete(&self.0, trust_domain).await
    }

    async fn authorities(&self) -> Result<Versioned<StoredJournal>, DataStoreError> {
        let mut tx = self.0.begin().await?;
        let version = authorities_version(&mut tx).await?;
        Ok(Versioned { value: journal::read(&mut tx).await?, version })
    }

    async fn put_authorities(
        &self,
        journal: &StoredJournal,
        bundle: &TrustBundle,
        from: Version,
    ) -> Result<Written, DataStoreError> {
        // Ours has the root of our own certificate.
        refuse_empty(bundle, bundle.authorities.is_empty())?;
        let to = Version::fresh();
        let mut tx = self.0.begin().await?;
        if authorities_version(&mut tx).await? != from {
            tx.rollback().await?;
            return Ok(Written::Stale);
        }
        journal::replace(&mut tx, journal).await?;
        // Our own bundle is written only here, so that its version is the journal's.
        sqlx::query("INSERT OR REPLACE INTO bundles (trust_domain, body, version) VALUES (?, ?, ?)")
            .bind(bundle.trust_domain.as_str())
            .bind(bundle_to_wire(bundle).encode_to_vec())
            .bind(to.0)
            .execute(&mut *tx)
            .await?;
        sqlx::query("INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)")
            .bind(AUTHORITIES_VERSION)
            .bind(to.0.to_string())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(Written::Stored(to))
    }
}

#[cfg(test)]
mod tests;
