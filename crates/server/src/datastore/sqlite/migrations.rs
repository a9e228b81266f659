//! The history of the schema, compiled in. A list and not sqlx's macro for it: the macro's crates would build SQLite, sqlx and
//! tokio a second time, for the compiler.

use std::borrow::Cow;

use sqlx::SqlSafeStr;
use sqlx::migrate::{Migration, MigrationType, Migrator};

/// Number, title and statements of each step, as its file in `migrations/sqlite` is named. Steps are only ever added: a store
/// holds the checksum of each step that it has taken, and is rejected if that step has changed.
const STEPS: [(i64, &str, &str); 5] = [
    (1, "first", include_str!("../../../migrations/sqlite/0001_first.sql")),
    (2, "versions", include_str!("../../../migrations/sqlite/0002_versions.sql")),
    (3, "jwt authorities", include_str!("../../../migrations/sqlite/0003_jwt_authorities.sql")),
    (4, "revoked keys", include_str!("../../../migrations/sqlite/0004_revoked_keys.sql")),
    (5, "federation", include_str!("../../../migrations/sqlite/0005_federation.sql")),
];

/// Brings a store to today's schema.
pub fn migrator() -> Migrator {
    let step = |(number, title, statements): &(i64, &'static str, &'static str)| {
        Migration::new(*number, Cow::Borrowed(*title), MigrationType::Simple, statements.into_sql_str(), false)
    };
    Migrator::with_migrations(STEPS.iter().map(step).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[tokio::test]
    async fn the_list_is_what_the_folder_has() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/sqlite"));
        let known = |m: &Migrator| -> Vec<_> {
            m.iter().map(|s| (s.version, s.description.clone(), s.migration_type, s.checksum.clone())).collect()
        };
        assert_eq!(known(&migrator()), known(&Migrator::new(folder).await.unwrap()));
    }
}
