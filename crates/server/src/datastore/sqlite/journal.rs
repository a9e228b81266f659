//! The journal of authorities: a table for each kind, with positions of one list, and the keys that were revoked.

use countersign_identity::JwtAuthority;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteConnection};
use time::OffsetDateTime;

use super::bad_row;
use crate::authority::{Public, Record, RevokedKeys, StoredJournal};
use crate::datastore::DataStoreError;

/// All authorities and all revoked keys.
pub async fn read(tx: &mut SqliteConnection) -> Result<StoredJournal, DataStoreError> {
    Ok(StoredJournal { records: records(tx).await?, revoked: revoked(tx).await? })
}

async fn revoked(tx: &mut SqliteConnection) -> Result<RevokedKeys, DataStoreError> {
    let read = |row: &SqliteRow| {
        let key: &str = row.get("public_key_sha256");
        key.parse().map_err(|e| bad_row("revoked key", key.to_owned(), e))
    };
    sqlx::query("SELECT public_key_sha256 FROM revoked_keys").fetch_all(tx).await?.iter().map(read).collect()
}

async fn records(tx: &mut SqliteConnection) -> Result<Vec<Record>, DataStoreError> {
    let x509 = sqlx::query("SELECT id, position, status, key_name, certificate, chain FROM authorities");
    let mut all = x509.fetch_all(&mut *tx).await?.iter().map(x509_of).collect::<Result<Vec<_>, _>>()?;
    let jwt =
        sqlx::query("SELECT id, position, status, key_name, public_key, not_before, not_after FROM jwt_authorities");
    for row in jwt.fetch_all(&mut *tx).await? {
        all.push(jwt_of(&row)?);
    }
    all.sort_by_key(|(position, _)| *position);
    Ok(all.into_iter().map(|(_, record)| record).collect())
}

/// Writes these authorities instead of all that are there, and adds the revoked keys.
pub async fn replace(tx: &mut SqliteConnection, journal: &StoredJournal) -> Result<(), DataStoreError> {
    sqlx::query("DELETE FROM authorities").execute(&mut *tx).await?;
    sqlx::query("DELETE FROM jwt_authorities").execute(&mut *tx).await?;
    for (position, record) in (0..).zip(&journal.records) {
        put(tx, position, record).await?;
    }
    for key in journal.revoked.iter() {
        let add = sqlx::query("INSERT INTO revoked_keys (public_key_sha256) VALUES (?) ON CONFLICT DO NOTHING");
        add.bind(key.to_string()).execute(&mut *tx).await?;
    }
    Ok(())
}

async fn put(tx: &mut SqliteConnection, position: i64, a: &Record) -> Result<(), DataStoreError> {
    let query = match &a.public {
        Public::X509 { certificate, chain } => {
            let chain: Vec<&[u8]> = chain.iter().map(AsRef::as_ref).collect();
            let chain = serde_json::to_vec(&chain).map_err(|e| bad_row("authority", a.id.clone(), e))?;
            sqlx::query(
                "INSERT INTO authorities (certificate, chain, id, position, status, key_name) VALUES (?, ?, ?, ?, ?, ?)",
            )
            .bind(certificate.as_ref())
            .bind(chain)
        }
        Public::Jwt { key, not_before } => {
            let not_after = key.expires_at.ok_or_else(|| bad_row("authority", a.id.clone(), "it has no end"))?;
            sqlx::query(
                "INSERT INTO jwt_authorities (public_key, not_before, not_after, id, position, status, key_name) VALUES (?, ?, ?, ?, ?, ?, ?)",
            )
            .bind(key.der())
            .bind(not_before.unix_timestamp())
            .bind(not_after.unix_timestamp())
        }
    };
    query.bind(&a.id).bind(position).bind(a.status.as_str()).bind(&a.key_name).execute(tx).await?;
    Ok(())
}

fn x509_of(r: &SqliteRow) -> Result<(i64, Record), DataStoreError> {
    let id: String = r.get("id");
    let chain: Vec<Vec<u8>> =
        serde_json::from_slice(r.get("chain")).map_err(|e| bad_row("authority", id.clone(), e))?;
    let certificate = r.get::<Vec<u8>, _>("certificate").into();
    record(r, id, Public::X509 { certificate, chain: chain.into_iter().map(Into::into).collect() })
}

fn jwt_of(r: &SqliteRow) -> Result<(i64, Record), DataStoreError> {
    let id: String = r.get("id");
    let time = |column: &str| {
        let time = OffsetDateTime::from_unix_timestamp(r.get(column));
        time.map_err(|e| bad_row("JWT authority", id.clone(), e))
    };
    let mut key = JwtAuthority::new(&id, r.get("public_key")).map_err(|e| bad_row("JWT authority", id.clone(), e))?;
    key.expires_at = Some(time("not_after")?);
    let not_before = time("not_before")?;
    record(r, id, Public::Jwt { key, not_before })
}

fn record(r: &SqliteRow, id: String, public: Public) -> Result<(i64, Record), DataStoreError> {
    let status: &str = r.get("status");
    let status = status.parse().map_err(|e| bad_row("authority", id.clone(), e))?;
    Ok((r.get("position"), Record { id, status, key_name: r.get("key_name"), public }))
}
