//! The client of the SPIFFE Workload API's X.509 stream.

use std::time::Duration;

use countersign_identity::trust_domain::{parse_trust_domain, trust_domain_of};
use countersign_identity::{BundleSet, PrivateKey, TrustBundle, TrustDomain, X509Authority, X509Svid};
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use zeroize::Zeroize;

use crate::backoff::Backoff;
use crate::status::message_of;
use crate::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::workload::{X509svidRequest, X509svidResponse};

/// Longest response that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;

/// A workload's identity and trust bundles.
pub struct Update {
    /// The default identity: the first SVID of the response.
    pub svid: X509Svid,
    /// The bundles of the own trust domain and of federated ones.
    pub bundles: BundleSet,
}

/// A message from the agent.
pub enum Told {
    /// The identity to use from now on.
    Update(Box<Update>),
    /// The workload has no identity any more.
    Withdrawn,
    /// Why there was no identity, or why its stream has ended; it is asked again.
    Ended(Status),
}

/// Hands on what the agent says, until `shutdown`. An agent that is away withdraws nothing: it is dialled again, with a
/// jittered delay of 50 ms to 2 s.
pub async fn follow(channel: Channel, shutdown: CancellationToken, mut told: impl FnMut(Told)) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let mut served = false;
        let heard = |update| {
            served = true;
            backoff.reset();
            told(Told::Update(Box::new(update)));
        };
        let ended = tokio::select! {
            ended = stream(channel.clone(), heard) => ended,
            () = shutdown.cancelled() => return,
        };
        if ended.code() == Code::PermissionDenied {
            told(Told::Withdrawn);
        }
        let delay = backoff.next_delay();
        if served {
            tracing::info!(status = message_of(&ended), "the agent has ended its stream; asking again in {delay:.1?}");
        } else {
            tracing::warn!(status = message_of(&ended), "no identity from the agent; trying again in {delay:.1?}");
        }
        told(Told::Ended(ended));
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Passes each update to `heard` until the stream ends; returns why it ended.
async fn stream(channel: Channel, mut heard: impl FnMut(Update)) -> Status {
    let mut client = SpiffeWorkloadApiClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let mut request = Request::new(X509svidRequest {});
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let mut stream = match client.fetch_x509svid(request).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return status,
    };
    loop {
        match stream.message().await {
            Ok(Some(message)) => match from_wire(message) {
                Ok(update) => heard(update),
                Err(why) => tracing::error!(why, "the agent's answer cannot be used; the identity stays as it is"),
            },
            Ok(None) => return Status::unavailable("the agent closed the stream"),
            Err(status) => return status,
        }
    }
}

fn from_wire(mut message: X509svidResponse) -> Result<Update, String> {
    let mut first = message.svids.drain(..).next().ok_or("it holds no SVID")?;
    let key = std::mem::take(&mut first.x509_svid_key);
    let key = PrivateKey::from_pkcs8(key).map_err(|e| e.to_string())?;
    let svid = X509Svid::new(split_der(&first.x509_svid)?.into_iter().map(|c| c.to_vec().into()).collect(), key);
    let svid = svid.map_err(|e| e.to_string())?;
    let mut bundles = BundleSet::default();
    bundles.insert(bundle_from_der(trust_domain_of(svid.id()), &first.bundle)?);
    for (name, der) in &message.federated_bundles {
        let td = parse_trust_domain(name.strip_prefix("spiffe://").unwrap_or(name)).map_err(|e| e.to_string())?;
        bundles.insert(bundle_from_der(td, der)?);
    }
    // The keys of the other identities are not used here.
    message.svids.iter_mut().for_each(|s| s.x509_svid_key.zeroize());
    Ok(Update { svid, bundles })
}

fn bundle_from_der(trust_domain: TrustDomain, der: &[u8]) -> Result<TrustBundle, String> {
    let authorities =
        split_der(der)?.into_iter().map(|c| X509Authority::from_der(c.to_vec()).map_err(|e| e.to_string()));
    Ok(TrustBundle { authorities: authorities.collect::<Result<_, _>>()?, ..TrustBundle::empty(trust_domain) })
}

/// Splits concatenated DER into its certificates (X.690 8.1.3: tag, length, value). Errors name the malformed one.
pub fn split_der(mut bytes: &[u8]) -> Result<Vec<&[u8]>, String> {
    let mut all = vec![];
    while !bytes.is_empty() {
        let malformed = || format!("certificate {} is no DER", all.len() + 1);
        let [0x30, first, rest @ ..] = bytes else { return Err(malformed()) };
        let (header, length) = match *first {
            short if short < 0x80 => (2, usize::from(short)),
            long @ 0x81..=0x83 => {
                let count = usize::from(long & 0x7f);
                let digits = rest.get(..count).ok_or_else(malformed)?;
                (2 + count, digits.iter().fold(0, |n, d| n << 8 | usize::from(*d)))
            }
            _ => return Err(malformed()),
        };
        let (one, more) = bytes.split_at_checked(header + length).ok_or_else(malformed)?;
        all.push(one);
        bytes = more;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_agent_that_is_away_is_told_and_withdraws_nothing() {
        let shutdown = CancellationToken::new();
        let end = shutdown.clone();
        let mut heard = vec![];
        let channel = crate::transport::unix_channel("/nowhere/agent.sock");
        follow(channel, shutdown, |told| {
            heard.push(match told {
                Told::Update(_) => None,
                Told::Withdrawn => Some(Code::PermissionDenied),
                Told::Ended(status) => Some(status.code()),
            });
            end.cancel();
        })
        .await;
        assert_eq!(heard, [Some(Code::Unavailable)]);
    }

    #[test]
    fn concatenated_der_is_cut_at_its_own_lengths() {
        let long = [&[0x30, 0x82, 0x01, 0x00][..], &[7; 256]].concat();
        let both = [&[0x30, 1, 9][..], &long].concat();
        assert_eq!(split_der(&both).unwrap(), [&[0x30, 1, 9][..], &long]);
        for bad in [&[0x31, 0][..], &[0x30], &[0x30, 5, 1], &[0x30, 0x82, 1], &[0x30, 0x84, 0, 0, 0, 0]] {
            assert!(split_der(bad).is_err(), "{bad:?}");
        }
    }
}
