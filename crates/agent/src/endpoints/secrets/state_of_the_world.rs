//! The protocol whose responses are complete (xDS: state of the world). `StreamSecrets` and `FetchSecrets`.

use countersign_api::sds::{DiscoveryRequest, DiscoveryResponse, Node, SECRET_TYPE};
use tonic::Status;

use super::asked::{Subscription, Validator, check_type};
use super::entitled::Entitled;
use super::secret::Version;
use super::{Heard, Protocol, Rejection, nonce};

/// One stream. Nothing is sent before the first request.
#[derive(Default)]
pub struct StateOfTheWorld {
    subscription: Option<Subscription>,
    validator: Validator,
    /// Whether the last request has no response yet.
    owes: bool,
    sent: Option<Sent>,
}

struct Sent {
    version: Version,
    nonce: String,
    is_rejected: bool,
}

impl Protocol for StateOfTheWorld {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn hear(&mut self, request: DiscoveryRequest, disable_spiffe_validation: bool) -> Result<Heard, Status> {
        check_type(&request.type_url)?;
        let mut rejection = None;
        if let Some(sent) = &mut self.sent {
            // It was written before the last response was read. An Envoy says all of it again when it acknowledges that one.
            if sent.nonce != request.response_nonce {
                return Ok(Heard::default());
            }
            let is_first = !std::mem::replace(&mut sent.is_rejected, request.error_detail.is_some());
            rejection = request.error_detail.filter(|_| is_first).map(|error| Rejection(error.message));
        }
        let before = self.validator;
        // Later requests may leave it out.
        if let Some(node) = request.node.or_else(|| self.subscription.is_none().then(Node::default)) {
            self.validator = Validator::of(&node, disable_spiffe_validation);
        }
        let subscription = Some(Subscription::all_of(request.resource_names)?);
        let is_change = self.subscription != subscription || self.validator != before;
        self.subscription = subscription;
        self.owes |= is_change;
        Ok(Heard { rejection, is_change })
    }

    fn due(&mut self, entitled: &Entitled) -> Result<Option<DiscoveryResponse>, Status> {
        let Some(subscription) = &self.subscription else { return Ok(None) };
        let found = entitled.resolve(subscription, self.validator)?;
        if !found.unknown.is_empty() {
            return Err(entitled.refusal(&found.unknown));
        }
        if found.is_waiting {
            return Ok(None);
        }
        let validator = self.validator;
        let version = Version::of_all(found.ready.iter().map(|(name, c)| (name.as_str(), c.version(validator))));
        if !self.owes && self.sent.as_ref().is_some_and(|sent| sent.version == version) {
            return Ok(None);
        }
        let nonce = nonce();
        let response = DiscoveryResponse {
            version_info: version.as_str().to_owned(),
            resources: found.ready.iter().map(|(name, material)| material.secret(name, validator)).collect(),
            type_url: SECRET_TYPE.into(),
            nonce: nonce.clone(),
        };
        self.sent = Some(Sent { version, nonce, is_rejected: false });
        self.owes = false;
        Ok(Some(response))
    }

    fn owes(&self) -> bool {
        self.owes
    }
}

#[cfg(fuzzing)]
impl StateOfTheWorld {
    /// What is asked for so far.
    pub fn subscription(&self) -> Option<&Subscription> {
        self.subscription.as_ref()
    }
}
