//! The pure domain of Countersign: SPIFFE IDs, SVIDs, trust bundles, registration entries, selectors, what we issue
//! ([`profile`]), what we accept ([`verify`]), when things rotate ([`rotation`]), what is at an address ([`directory`])
//! and which traffic is allowed ([`policy`]).
//!
//! No I/O, no async and no clock: time is always an argument.

pub mod bundle;
pub mod bundle_document;
mod ca;
mod der;
pub mod directory;
pub mod entry;
mod issuer;
mod jwt_authority;
pub mod jwt_svid;
pub mod key;
pub mod local_key;
pub mod path;
pub mod policy;
pub mod profile;
pub mod rotation;
pub mod selector;
pub mod shown;
pub mod signature;
pub mod svid;
pub mod trust_domain;
pub mod verify;

pub use bundle::{AuthorityKey, BundleSet, TrustBundle, X509Authority};
pub use entry::{AdditionalAttributes, Entry, EntryId};
pub use jwt_authority::JwtAuthority;
pub use key::{KeyType, PrivateKey};
pub use local_key::LocalKey;
pub use selector::Selector;
pub use signature::{PublicSide, SignatureAlgorithm};
pub use spiffe::{SpiffeId, TrustDomain};
pub use svid::X509Svid;
