//! The protocol whose responses are complete (xDS: state of the world). `StreamSecrets` and `FetchSecrets`.

use countersign_api::sds::{DiscoveryRequest, DiscoveryResponse, Node, SECRET_TYPE};
use tonic::Status;

use super::asked::{Validator, Wanted, check_type};
use super::entitled::Entitled;
use super::secret::Version;
use super::{Protocol, Rejection, nonce};

/// One stream. Nothing is sent before the first request.
#[derive(Default)]
pub struct StateOfTheWorld {
    wanted: Option<Wanted>,
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

    fn hear(
        &mut self,
        request: DiscoveryRequest,
        disable_spiffe_validation: bool,
    ) -> Result<Option<Rejection>, Status> {
        check_type(&request.type_url)?;
        let mut rejection = None;
        if let Some(sent) = &mut self.sent {
            // It was written before the last response was read. An Envoy says all of it again when it acknowledges that one.
            if sent.nonce != request.response_nonce {
                return Ok(None);
            }
            let is_first = !std::mem::replace(&mut sent.is_rejected, request.error_detail.is_some());
            rejection = request.error_detail.filter(|_| is_first).map(|error| Rejection(error.message));
        }
        // Later requests may leave it out.
        if let Some(node) = request.node.or_else(|| self.wanted.is_none().then(Node::default)) {
            self.validator = Validator::of(&node, disable_spiffe_validation);
        }
        let wanted = Some(Wanted::all_of(request.resource_names)?);
        if self.wanted != wanted {
            self.wanted = wanted;
            self.owes = true;
        }
        Ok(rejection)
    }

    fn due(&mut self, entitled: &Entitled) -> Result<Option<DiscoveryResponse>, Status> {
        let Some(wanted) = &self.wanted else { return Ok(None) };
        let found = entitled.resolve(wanted, self.validator)?;
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
            resources: found.ready.iter().map(|(name, content)| content.secret(name, validator)).collect(),
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
    /// The names that are wanted so far.
    pub fn wanted(&self) -> Option<&Wanted> {
        self.wanted.as_ref()
    }
}
