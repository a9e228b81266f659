//! By which authorities an agent knows its server before the server has told it anything.
//!
//! The file of `--trust-bundle` is the operator's word, the kept bundle what the server said last over an authenticated
//! connection. The server's word takes the place of the file that was there when it came: what it does not name any more has
//! ended or was revoked, and must not come back through an old file. A file that has changed since is the operator's newer
//! word, and counts beside the kept bundle until the server is heard again. What has ended counts for nothing.

use std::path::Path;

use aws_lc_rs::digest::{SHA256, digest};
use countersign_api::files::read_pem;
use countersign_identity::bundle::X509Authority;
use countersign_identity::{TrustBundle, TrustDomain};
use time::OffsetDateTime;

use crate::link::LinkError;
use crate::node_attestor::EvidenceError;

/// The operator's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// What the file holds.
    pub bundle: TrustBundle,
    /// SHA-256 of the file, in hex.
    pub digest: String,
}

/// The server's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// What it published.
    pub bundle: TrustBundle,
    /// Digest of the file whose place this has taken; `None`: not known, of the one that is there.
    pub replaces: Option<String>,
}

impl Given {
    /// Reads the file.
    pub fn read(path: &Path, trust_domain: &TrustDomain) -> Result<Self, LinkError> {
        let wrong = |why: String| LinkError::Evidence(EvidenceError::File { path: path.to_owned(), why });
        let pem = read_pem(path).map_err(|e| wrong(e.to_string()))?;
        let bundle = TrustBundle::from_pem(trust_domain.clone(), &pem).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { bundle, digest: hex::encode(digest(&SHA256, &pem)) })
    }
}

/// What the server is known by when an agent starts; `None`: nothing.
pub fn at_start(kept: Option<Kept>, given: Option<Given>, now: OffsetDateTime) -> Option<TrustBundle> {
    let (kept, given) = match (kept, given) {
        (None, given) => return given.map(|g| g.bundle),
        (Some(kept), None) => return Some(kept.bundle),
        (Some(kept), Some(given)) => (kept, given),
    };
    if kept.replaces.is_none_or(|replaced| replaced == given.digest) {
        Some(kept.bundle)
    } else {
        Some(both(&kept.bundle, &given.bundle, now))
    }
}

/// What is known and what is given, as far as it has not ended.
pub fn both(known: &TrustBundle, given: &TrustBundle, now: OffsetDateTime) -> TrustBundle {
    let lasts = |a: &&X509Authority| a.not_after() > now;
    let mut both = known.clone();
    both.authorities = known.authorities.iter().filter(lasts).cloned().collect();
    for authority in given.authorities.iter().filter(lasts) {
        if !both.authorities.iter().any(|a| a.der() == authority.der()) {
            both.authorities.push(authority.clone());
        }
    }
    // Nothing that lasts: a refusal that says so is of more use than an empty bundle.
    if both.authorities.is_empty() { known.clone() } else { both }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::Ca;

    fn given(bundle: &TrustBundle, digest: &str) -> Given {
        Given { bundle: bundle.clone(), digest: digest.into() }
    }

    fn kept(bundle: &TrustBundle, replaces: Option<&str>) -> Kept {
        Kept { bundle: bundle.clone(), replaces: replaces.map(ToOwned::to_owned) }
    }

    fn ids(bundle: Option<TrustBundle>) -> Vec<String> {
        bundle.unwrap().authorities.iter().map(|a| a.id().to_owned()).collect()
    }

    #[test]
    fn a_root_that_the_server_has_revoked_does_not_come_back_through_the_file_that_was_there_before() {
        let now = OffsetDateTime::now_utc();
        let (revoked, present) = (Ca::new(now).bundle(), Ca::new(now).bundle());
        let only = vec![present.authorities[0].id().to_owned()];
        assert_eq!(ids(at_start(Some(kept(&present, Some("old"))), Some(given(&revoked, "old")), now)), only);
        assert_eq!(
            ids(at_start(Some(kept(&present, None)), Some(given(&revoked, "old")), now)),
            only,
            "kept by an older version"
        );
        assert_eq!(ids(at_start(Some(kept(&present, Some("old"))), None, now)), only);
    }

    #[test]
    fn a_file_that_has_changed_since_counts_beside_what_is_kept_and_what_has_ended_does_not() {
        let now = OffsetDateTime::now_utc();
        let day = Duration::from_secs(86_400);
        let (ended, present, new) =
            (Ca::lasting(day, now - 2 * day).bundle(), Ca::new(now).bundle(), Ca::new(now).bundle());
        let mut kept_two = present.clone();
        kept_two.authorities.extend(ended.authorities.clone());
        let mut given_two = new.clone();
        given_two.authorities.extend(present.authorities.clone());
        let found = ids(at_start(Some(kept(&kept_two, Some("old"))), Some(given(&given_two, "new")), now));
        assert_eq!(found, [present.authorities[0].id(), new.authorities[0].id()]);
        assert_eq!(
            ids(at_start(Some(kept(&ended, Some("old"))), Some(given(&ended, "new")), now)),
            [ended.authorities[0].id()]
        );
        assert_eq!(ids(at_start(None, Some(given(&new, "new")), now)), [new.authorities[0].id()]);
        assert_eq!(at_start(None, None, now), None);
    }
}
