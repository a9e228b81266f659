//! Errors of authorities.

use countersign_identity::profile::IssueError;

use super::Status;
use crate::datastore::DataStoreError;
use crate::key_manager::{KeyManagerError, SignError};
use crate::signing_ca::SigningError;
use crate::upstream_authority::UpstreamError;

/// Why an authority could not be prepared, activated, tainted, revoked or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// There is no authority with this ID.
    #[error("there is no authority `{0}` of this kind; `countersign authority show` lists those of all kinds (--kind)")]
    Unknown(String),
    /// The authority is not in the state that the command requires.
    #[error("authority `{id}` is {status}; {needed}")]
    State {
        /// ID of the authority.
        id: String,
        /// Current state of the authority.
        status: Status,
        /// The required state, and the next step.
        needed: &'static str,
    },
    /// Below an upstream authority the bundle has its roots and not our authorities.
    #[error(
        "local authority can't be tainted or revoked if there is an upstream authority: the bundle has the upstream's roots; name one \
         of them (`countersign authority show`, and `--kind upstream`)"
    )]
    Upstream,
    /// There is no upstream authority, and our own authorities are no roots of one.
    #[error(
        "upstream authority is not configured, and `{}` is no root of another; our own authorities are tainted and revoked with \
         `--kind x509`",
        countersign_identity::shown::shown(_0)
    )]
    NoUpstream(String),
    /// The roots are those of the server above. Holds its name.
    #[error("the trust bundle is that of {0}: taint and revoke its roots there, and this server follows")]
    Above(String),
    /// The bundle has no root with this ID.
    #[error(
        "the trust bundle has no root `{}`; `countersign authority show` lists them",
        countersign_identity::shown::shown(_0)
    )]
    UnknownRoot(String),
    /// The authority that signs, or will sign next, is below this root.
    #[error(
        "unable to use upstream authority `{root}`: the {status} authority `{id}` is below it; have the upstream sign below another \
         root, then prepare and activate a new authority"
    )]
    RootInUse {
        /// ID of the root.
        root: String,
        /// ID of our authority.
        id: String,
        /// State of our authority.
        status: Status,
    },
    /// The upstream signed below a root that is tainted or revoked here.
    #[error(
        "the upstream authority still signs below the root `{0}`, which is tainted or revoked here; have it sign below another one"
    )]
    Distrusted(String),
    /// The key was revoked here, for good.
    #[error(
        "the key of authority `{}` was revoked here and is not trusted again; a new authority needs a new key",
        countersign_identity::shown::shown(_0)
    )]
    Revoked(String),
    /// No authority is active yet.
    #[error("no authority is active yet")]
    NotReady,
    /// The request names no authority. An empty ID must not mean "any".
    #[error("no authority ID provided")]
    NoId,
    /// The authority must be tainted first. Otherwise nothing was renewed, and everything under the authority would be
    /// cut off.
    #[error(
        "authority `{0}` is not tainted, and it is not possible to revoke an untainted one: what it signed was not renewed \
         and would be cut off; run `countersign authority taint` with the same arguments first, and wait until that is done"
    )]
    Untainted(String),
    /// The bundle has another JWT authority with this key ID.
    #[error("the trust bundle has another JWT authority with the ID `{}`", countersign_identity::shown::shown(_0))]
    KeyIdTaken(String),
    /// The bundle has the same key under another ID.
    #[error(
        "the trust bundle has the key of `{}` as `{}`; one that is under two IDs would outlive its revocation",
        countersign_identity::shown::shown(key_id),
        countersign_identity::shown::shown(as_id)
    )]
    KeyKnown {
        /// ID of the key that was to be added.
        key_id: String,
        /// ID that it has.
        as_id: String,
    },
    /// The bundle has room for no more keys of servers below.
    #[error("the trust bundle has too many JWT authorities to take another; those that have ended go an hour later")]
    TooManyKeys,
    /// Another authority was prepared or activated while this one was being signed, so it was dropped.
    #[error(
        "the authorities changed while the next one was being signed, so it was dropped; look at them (`countersign \
         authority show`), then try again"
    )]
    Changed,
    /// The store rejected the change, so it was not made.
    #[error(transparent)]
    Store(#[from] DataStoreError),
    /// The key manager could not store or find the key.
    #[error(transparent)]
    Key(#[from] KeyManagerError),
    /// The upstream authority has not signed.
    #[error(transparent)]
    Unsigned(#[from] UpstreamError),
    /// The key has not signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// Issuing a certificate failed.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// The certificate may not be an authority.
    #[error(transparent)]
    Bundle(#[from] countersign_identity::bundle::BundleError),
}

impl From<SigningError> for AuthorityError {
    fn from(error: SigningError) -> Self {
        match error {
            SigningError::Issue(error) => error.into(),
            SigningError::Sign(error) => error.into(),
        }
    }
}
