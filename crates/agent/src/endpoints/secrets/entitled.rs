//! What a caller may have now, and by which names.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use countersign_identity::shown::shown;
use countersign_identity::{TrustBundle, X509Svid};
use tonic::Status;

use super::asked::{Subscription, Validator};
use super::secret::Material;
use crate::cache::Cached;
use crate::config::Config;
use crate::endpoints::workload::{federated, in_order, ready, with_certificates};
use crate::endpoints::{Attested, Core};
use crate::secret_names::Special;

/// The SVIDs and bundles of one caller.
pub struct Entitled {
    config: Arc<Config>,
    /// Those that are ready, the default first.
    svids: Vec<Arc<X509Svid>>,
    /// Our own trust domain's; `None` until the server has sent it.
    bundle: Option<Arc<TrustBundle>>,
    federated: Vec<Arc<TrustBundle>>,
    /// Names of what is the caller's and not ready yet.
    expected: BTreeSet<String>,
    /// Whether more may become the caller's once it is attested whole.
    in_part: bool,
}

/// What a name leads to.
enum Found {
    Ready(Material),
    NotYet,
    Unknown,
}

/// What became of names.
pub struct Resolved {
    /// What is ready, by name.
    pub ready: BTreeMap<String, Material>,
    /// What may be had later: names, or everything while there is nothing.
    pub is_waiting: bool,
    /// Names that this caller may not have.
    pub unknown: Vec<String>,
}

impl Entitled {
    /// Errors: the caller has no identity.
    pub fn of(core: &Core, attested: &Attested) -> Result<Self, Status> {
        let identities = core.identities(attested)?;
        let mut identities = in_order(&identities);
        // They are signed for a store, never for a caller.
        identities.retain(|identity| !identity.entry.store_svid);
        if identities.is_empty() && !attested.in_part {
            return Err(Status::permission_denied("no identity issued: the caller's entries are stored elsewhere"));
        }
        let svids: Vec<_> = ready(&identities, core.now()).map(|(_, svid)| svid.clone()).collect();
        let state = core.cache.read();
        let federated: Vec<_> = with_certificates(federated(&state, &identities)).cloned().collect();
        let own = bundle_name(core.config.trust_domain.as_ref());
        let expected = identities.iter().flat_map(|identity| names_of(identity)).chain([own]);
        Ok(Self {
            config: core.config.clone(),
            bundle: state.bundle.clone(),
            expected: expected.collect(),
            in_part: attested.in_part,
            svids,
            federated,
        })
    }

    /// What is wanted, as far as there is some. Errors: `FailedPrecondition` if an Envoy without the SPIFFE validator wants all bundles.
    pub fn resolve(&self, subscription: &Subscription, validator: Validator) -> Result<Resolved, Status> {
        let mut resolved = Resolved { ready: BTreeMap::new(), is_waiting: false, unknown: vec![] };
        if subscription.everything {
            resolved.ready = self.everything();
            resolved.is_waiting = self.bundle.is_none() || self.svids.is_empty();
        }
        for name in &subscription.names {
            match self.find(name) {
                Found::Ready(Material::AllBundles(_)) if validator == Validator::Chain => {
                    return Err(no_spiffe_validator(name));
                }
                Found::Ready(material) => drop(resolved.ready.insert(name.clone(), material)),
                Found::NotYet => resolved.is_waiting = true,
                Found::Unknown => resolved.unknown.push(name.clone()),
            }
        }
        Ok(resolved)
    }

    /// Whether this name is the caller's, ready or not.
    pub fn may_have(&self, name: &str) -> bool {
        !matches!(self.find(name), Found::Unknown)
    }

    /// The refusal of names, with what could be asked for instead.
    pub fn refusal(&self, unknown: &[String]) -> Status {
        let unknown = listed(unknown.iter().map(String::as_str));
        let own = listed(self.config.sds.names.list().into_iter().chain(self.expected.iter().map(String::as_str)));
        Status::invalid_argument(format!("the caller may not have {unknown}, but {own}"))
    }

    fn find(&self, name: &str) -> Found {
        let found = match self.config.sds.names.meaning(name) {
            Some(Special::Svid) => self.svids.first().cloned().map(Material::Svid),
            Some(Special::Bundle) => self.bundle.clone().map(Material::Bundle),
            Some(Special::AllBundles) => {
                self.bundle.as_ref().map(|_| Material::AllBundles(self.bundles().cloned().collect()))
            }
            None => {
                let bundle = self.bundles().find(|b| bundle_name(b.trust_domain.as_ref()) == name);
                let svid = || self.svids.iter().find(|svid| svid.id().to_string() == name);
                match bundle {
                    Some(bundle) => Some(Material::Bundle(bundle.clone())),
                    None => svid().cloned().map(Material::Svid),
                }
            }
        };
        let is_expected = self.config.sds.names.meaning(name).is_some() || self.expected.contains(name);
        match found {
            Some(material) => Found::Ready(material),
            // A selector that is not known yet may be the one that an entry requires.
            None if is_expected || self.in_part => Found::NotYet,
            None => Found::Unknown,
        }
    }

    fn everything(&self) -> BTreeMap<String, Material> {
        let bundles = self.bundles().map(|b| (bundle_name(b.trust_domain.as_ref()), Material::Bundle(b.clone())));
        // Of several SVIDs with one ID the oldest entry's, as by name.
        let svids = self.svids.iter().rev().map(|svid| (svid.id().to_string(), Material::Svid(svid.clone())));
        bundles.chain(svids).collect()
    }

    /// Ours first.
    fn bundles(&self) -> impl Iterator<Item = &Arc<TrustBundle>> {
        self.bundle.iter().chain(&self.federated)
    }
}

/// The names that an identity may have secrets by.
fn names_of(identity: &Cached) -> impl Iterator<Item = String> {
    let bundles = identity.entry.federates_with.iter().map(|td| bundle_name(td.as_ref()));
    bundles.chain([identity.entry.spiffe_id.to_string()])
}

fn bundle_name(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}

fn no_spiffe_validator(name: &str) -> Status {
    Status::failed_precondition(format!(
        "`{}` needs Envoy's SPIFFE validator, which this Envoy is too old for (before 1.18) or goes without \
         (`disable_spiffe_cert_validation` of its node's metadata, or the agent's --sds-disable-spiffe-cert-validation); \
         ask for one trust domain's bundle instead",
        shown(name)
    ))
}

/// Names in a message.
fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    const MOST: usize = 8;
    let mut names: Vec<String> = names.map(|name| format!("`{}`", shown(name))).collect();
    if names.len() > MOST {
        let rest = names.len() - MOST;
        names.truncate(MOST);
        names.push(format!("{rest} more"));
    }
    names.join(", ")
}
