//! The signing authorities, of X509- and of JWT-SVIDs: prepared → active → old → gone, or tainted → revoked.

mod active;
mod error;
mod journal;
mod lifecycle;
mod making;
mod manager;
mod published;
mod record;
mod revoked;
mod stored;
mod upstream_call;
mod upstream_roots;

pub use error::AuthorityError;
pub use lifecycle::validity_of;
pub use manager::{Authorities, Settings};
pub use record::{Kind, Public, Record, Status, StoredJournal};
pub use revoked::RevokedKeys;
