//! The protocol whose responses say what has changed (xDS: delta, or incremental). `DeltaSecrets`.
//!
//! What an Envoy holds and may not have any more is removed; what it asks for and has never had is refused, as by the other protocol,
//! so that its log says why.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use countersign_api::sds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, SECRET_TYPE};
use tonic::Status;

use super::asked::{Subscription, Validator, check_type};
use super::entitled::{Entitled, Resolved};
use super::secret::{Material, Version};
use super::{Heard, Protocol, Rejection, nonce};

/// Most responses that are remembered until an Envoy says what became of them.
const MAX_UNANSWERED: usize = 16;

/// One stream. Nothing is sent before the first request.
#[derive(Default)]
pub struct Delta {
    subscription: Option<Subscription>,
    validator: Validator,
    /// What the Envoy holds.
    held: BTreeMap<String, Version>,
    /// Names that it wants and was told to be removed.
    removed: BTreeSet<String>,
    /// Nonces of responses that it has not acknowledged or rejected, oldest first.
    unanswered: VecDeque<String>,
    owes: bool,
}

impl Protocol for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn hear(&mut self, request: DeltaDiscoveryRequest, disable_spiffe_validation: bool) -> Result<Heard, Status> {
        check_type(&request.type_url)?;
        let is_first = self.subscription.is_none();
        let names_some = !request.resource_names_subscribe.is_empty() || !request.resource_names_unsubscribe.is_empty();
        let before = self.validator;
        if let Some(node) = request.node.or_else(|| is_first.then(Node::default)) {
            self.validator = Validator::of(&node, disable_spiffe_validation);
        }
        let subscription = self.subscription.get_or_insert_default();
        // Taken away first: a name in both lists is one that the Envoy has dropped and wants again.
        for name in &request.resource_names_unsubscribe {
            subscription.remove(name);
        }
        // What is asked for is sent, whether the Envoy has had it or not: it may have dropped it meanwhile.
        for name in request.resource_names_unsubscribe.iter().chain(&request.resource_names_subscribe) {
            self.held.remove(name);
            self.removed.remove(name);
        }
        let had_everything = subscription.everything;
        // A stream that begins without a name wants everything.
        subscription.everything |= is_first && request.resource_names_subscribe.iter().all(String::is_empty);
        subscription.add(request.resource_names_subscribe)?;
        if is_first {
            // What it holds from a stream before this one, which may have been another agent's.
            let versions = request.initial_resource_versions.into_iter();
            self.held = versions.map(|(name, version)| (name, Version::told(version))).collect();
        } else if subscription.everything && !had_everything {
            self.held.clear();
        }
        self.held.retain(|name, _| subscription.everything || subscription.names.contains(name));
        let answered = self.unanswered.iter().position(|nonce| *nonce == request.response_nonce);
        let answered = answered.and_then(|at| self.unanswered.remove(at));
        let rejection = request.error_detail.filter(|_| answered.is_some()).map(|error| Rejection(error.message));
        Ok(Heard { rejection, is_change: is_first || names_some || self.validator != before })
    }

    fn due(&mut self, entitled: &Entitled) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let Some(subscription) = &self.subscription else { return Ok(None) };
        let found = entitled.resolve(subscription, self.validator)?;
        let refused = |name: &&String| !self.held.contains_key(*name) && !self.removed.contains(*name);
        let refused: Vec<String> = found.unknown.iter().filter(refused).cloned().collect();
        if !refused.is_empty() {
            return Err(entitled.refusal(&refused));
        }
        self.owes = found.is_waiting && self.lacks_some(subscription, &found);
        let resources = self.changed(&found);
        let removed_resources = self.gone(entitled, &found);
        if resources.is_empty() && removed_resources.is_empty() {
            return Ok(None);
        }
        for resource in &resources {
            self.removed.remove(&resource.name);
            self.held.insert(resource.name.clone(), Version::told(resource.version.clone()));
        }
        for name in &removed_resources {
            self.held.remove(name);
        }
        self.removed.extend(found.unknown);
        let nonce = nonce();
        if self.unanswered.len() == MAX_UNANSWERED {
            self.unanswered.pop_front();
        }
        self.unanswered.push_back(nonce.clone());
        let version = Version::of_all(self.held.iter().map(|(name, version)| (name.as_str(), version.clone())));
        Ok(Some(DeltaDiscoveryResponse {
            system_version_info: version.as_str().to_owned(),
            resources,
            type_url: SECRET_TYPE.into(),
            nonce,
            removed_resources,
        }))
    }

    fn owes(&self) -> bool {
        self.owes
    }
}

impl Delta {
    /// What the Envoy does not hold as it is.
    fn changed(&self, found: &Resolved) -> Vec<Resource> {
        let resource = |(name, material): (&String, &Material)| {
            let version = material.version(self.validator);
            (self.held.get(name) != Some(&version)).then(|| Resource {
                version: version.as_str().to_owned(),
                resource: Some(material.secret(name, self.validator)),
                name: name.clone(),
            })
        };
        found.ready.iter().filter_map(resource).collect()
    }

    /// What it holds and may not have any more. What is only not ready, such as an SVID that is being renewed, stays.
    fn gone(&self, entitled: &Entitled, found: &Resolved) -> Vec<String> {
        let is_gone = |name: &&String| !found.ready.contains_key(*name) && !entitled.may_have(name);
        self.held.keys().filter(is_gone).cloned().collect()
    }

    /// Whether it wants something that it has no version of.
    fn lacks_some(&self, subscription: &Subscription, found: &Resolved) -> bool {
        let has = |name: &&String| {
            self.held.contains_key(*name) || found.ready.contains_key(*name) || found.unknown.contains(*name)
        };
        !subscription.names.iter().all(|name| has(&name)) || (subscription.everything && self.held.is_empty())
    }
}

#[cfg(fuzzing)]
impl Delta {
    /// What is asked for so far.
    pub fn subscription(&self) -> Option<&Subscription> {
        self.subscription.as_ref()
    }
}
