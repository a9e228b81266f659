//! What can go wrong with an authority.

use std::time::Duration;

use countersign_identity::profile::IssueError;

use super::Status;
use crate::datastore::DataStoreError;
use crate::key_manager::KeyManagerError;
use crate::upstream_authority::UpstreamError;

/// Why an authority could not be prepared, activated, tainted, revoked or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// No authority of that ID.
    #[error("there is no authority `{0}`; `countersign authority show` lists them")]
    Unknown(String),
    /// It is not in the state that the command needs.
    #[error("authority `{id}` is {status}; {needed}")]
    State {
        /// Which.
        id: String,
        /// Where it is in its life.
        status: Status,
        /// What the command needs, and the next step.
        needed: &'static str,
    },
    /// The roots are not ours to taint.
    #[error("the roots come from the upstream authority; taint or revoke them there, then restart with the new files")]
    Upstream,
    /// No authority signs yet.
    #[error("no authority is active yet")]
    NotReady,
    /// The call names no authority. An empty name must not mean "whichever is there".
    #[error("no authority ID provided")]
    NoId,
    /// Revoking takes a taint first: without it nothing was renewed, and everything under the authority would be cut off.
    #[error(
        "authority `{0}` is not tainted, and it is not possible to revoke an untainted one: what it signed was not renewed \
         and would be cut off; run `countersign authority taint --id {0}` first and give agents a minute to renew"
    )]
    Untainted(String),
    /// The upstream authority did not answer in time.
    #[error("the upstream authority has not answered for {} seconds; trying again", .0.as_secs())]
    UpstreamTimeout(Duration),
    /// The store did not keep the change, so it was not made.
    #[error(transparent)]
    Store(#[from] DataStoreError),
    /// The key could not be kept.
    #[error(transparent)]
    Key(#[from] KeyManagerError),
    /// The upstream authority refused.
    #[error(transparent)]
    UpstreamRefused(#[from] UpstreamError),
    /// Signing failed.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// A certificate that cannot be an authority.
    #[error(transparent)]
    Bundle(#[from] countersign_identity::bundle::BundleError),
}
