//! A SPIRE-compatible server above ours: our CA is a downstream one of the same trust domain.
//!
//! This server is a workload there, with a `downstream` entry: its SVID comes from the Workload API of an agent of that server.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::convert::{bundle_without_unknown_keys, jwt_authority_from_wire, jwt_authority_to_wire};
use countersign_api::spire::bundle::bundle_client::BundleClient;
use countersign_api::spire::bundle::{GetBundleRequest, PublishJwtAuthorityRequest};
use countersign_api::spire::svid::NewDownstreamX509caRequest;
use countersign_api::spire::svid::svid_client::SvidClient;
use countersign_api::spire::types::JwtKey;
use countersign_api::status::message_of;
use countersign_api::tls::{SvidVerifier, certified_key, client_config, only};
use countersign_api::transport::{tls_channel, unix_channel};
use countersign_api::workload_api::{Told, Update, follow};
use countersign_identity::shown::sentence;
use countersign_identity::trust_domain::{server_id, trust_domain_of};
use countersign_identity::{JwtAuthority, TrustDomain, X509Authority};
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{UpstreamAuthority, UpstreamBundle, UpstreamError, UpstreamSigned};
use crate::config::UpstreamSpire;
use crate::core::MAX_REASON;

/// Longest wait for an identity from the agent, which may be starting with us.
const IDENTITY_PATIENCE: Duration = Duration::from_secs(10);

/// What the agent said last.
#[derive(Clone, Default)]
enum Identity {
    /// Nothing yet.
    #[default]
    Awaited,
    /// Who we are there, and whom to trust.
    Known(Arc<Update>),
    /// Why there is none.
    None(String),
}

/// Calls the server above with the SVID of the moment.
pub struct Spire {
    settings: UpstreamSpire,
    trust_domain: TrustDomain,
    identity: watch::Receiver<Identity>,
    /// The connection, and the identity that it was made with.
    connected: Mutex<Option<(Channel, Arc<Update>)>>,
    /// What was said of keys that cannot be used.
    left_out: std::sync::Mutex<String>,
}

impl Spire {
    /// Follows the Workload API until `shutdown`. Connects with the first call.
    pub fn new(settings: UpstreamSpire, trust_domain: TrustDomain, shutdown: CancellationToken) -> Self {
        let (tell, identity) = watch::channel(Identity::default());
        let agent = unix_channel(&settings.workload_api);
        tokio::spawn(follow(agent, shutdown, move |told| match told {
            Told::Update(update) => drop(tell.send_replace(Identity::Known(Arc::from(update)))),
            Told::Withdrawn => drop(tell.send_replace(Identity::None("the agent has no identity for it".into()))),
            // What the agent gave out before is good until it ends.
            Told::Ended(status) => tell.send_modify(|identity| {
                if !matches!(identity, Identity::Known(_)) {
                    *identity = Identity::None(message_of(&status).to_owned());
                }
            }),
        }));
        Self { settings, trust_domain, identity, connected: Mutex::new(None), left_out: Default::default() }
    }

    /// A connection as the identity of the moment. Errors: there is none, or it is of another trust domain.
    async fn channel(&self) -> Result<Channel, UpstreamError> {
        let update = self.identity().await?;
        let mut connected = self.connected.lock().await;
        if let Some((channel, by)) = connected.as_ref()
            && Arc::ptr_eq(by, &update)
        {
            return Ok(channel.clone());
        }
        let own = certified_key(&update.svid).map_err(|e| self.malformed(&e))?;
        let bundles = Arc::new(update.bundles.clone());
        let verifier = SvidVerifier::new(move || bundles.clone(), only(server_id(&self.trust_domain)));
        let config = Arc::new(client_config(Some(own), verifier, &[b"h2"]).map_err(|e| self.malformed(&e))?);
        let channel = tls_channel(self.settings.address.clone(), move || config.clone());
        *connected = Some((channel.clone(), update));
        Ok(channel)
    }

    async fn identity(&self) -> Result<Arc<Update>, UpstreamError> {
        let mut identity = self.identity.clone();
        let known = identity.wait_for(|identity| matches!(identity, Identity::Known(_)));
        let found = tokio::time::timeout(IDENTITY_PATIENCE, known).await.map(|found| found.map(|found| found.clone()));
        match found {
            Ok(Ok(Identity::Known(update))) if trust_domain_of(update.svid.id()) == self.trust_domain => Ok(update),
            Ok(Ok(Identity::Known(update))) => Err(UpstreamError::Refused {
                upstream: self.name(),
                why: format!(
                    "the Workload API gives this server `{}`, and an upstream of this kind is of the same trust domain, `{}`: correct \
                     --trust-domain, or --upstream-spire-workload-api",
                    update.svid.id(),
                    self.trust_domain
                ),
            }),
            _ => Err(self.no_identity()),
        }
    }

    fn no_identity(&self) -> UpstreamError {
        let why = match &*self.identity.borrow() {
            Identity::None(why) => why.clone(),
            _ => "no answer".to_owned(),
        };
        let socket = workload_api(&self.settings.workload_api);
        UpstreamError::Unreachable {
            upstream: socket,
            why: format!(
                "{why}; this server needs an identity there, from an entry with `--downstream` on the server above"
            ),
        }
    }

    fn malformed(&self, why: &dyn std::fmt::Display) -> UpstreamError {
        UpstreamError::Malformed { upstream: self.name(), why: why.to_string() }
    }

    fn of_status(&self, status: &Status) -> UpstreamError {
        let (upstream, why) = (self.name(), message_of(status).to_owned());
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
                UpstreamError::Unreachable { upstream, why }
            }
            Code::PermissionDenied | Code::Unauthenticated => UpstreamError::Refused {
                upstream,
                why: format!("{why} (this server needs an entry with `--downstream` there)"),
            },
            _ => UpstreamError::Refused { upstream, why },
        }
    }

    /// Those of the keys that can be used here.
    fn keys(&self, keys: Vec<JwtKey>) -> Vec<JwtAuthority> {
        let read: Vec<_> = keys.into_iter().map(jwt_authority_from_wire).collect();
        let left_out: Vec<_> = read.iter().filter_map(|key| key.as_ref().err()).collect();
        self.say_left_out(&left_out);
        read.into_iter().flatten().collect()
    }

    /// Once for each set of them: they are there for as long as the bundle above has them.
    fn say_left_out(&self, errors: &[impl std::fmt::Display]) {
        let now: String = errors.iter().map(|error| format!("{error}; ")).collect();
        let mut told = self.left_out.lock().unwrap_or_else(PoisonError::into_inner);
        if !now.is_empty() && *told != now {
            tracing::warn!(
                upstream = self.name(),
                left_out = sentence(&now, MAX_REASON).to_string(),
                "keys of its bundle cannot be used here; they are left out"
            );
            *told = now;
        }
    }
}

fn workload_api(socket: &Path) -> String {
    format!("the Workload API at {}", socket.display())
}

#[async_trait]
impl UpstreamAuthority for Spire {
    fn name(&self) -> String {
        format!("the server at {}", self.settings.address)
    }

    async fn sign_intermediate(
        &self,
        _: &TrustDomain,
        csr: &[u8],
        ttl: Duration,
        _: OffsetDateTime,
    ) -> Result<UpstreamSigned, UpstreamError> {
        let preferred_ttl = ttl.as_secs().try_into().unwrap_or(i32::MAX);
        let asked = NewDownstreamX509caRequest { csr: csr.to_vec(), preferred_ttl };
        let signed = SvidClient::new(self.channel().await?).new_downstream_x509ca(asked).await;
        let signed = signed.map_err(|status| self.of_status(&status))?.into_inner();
        let chain: Vec<CertificateDer<'static>> = signed.ca_cert_chain.into_iter().map(Into::into).collect();
        // Its answer has no word of which of them is tainted: the bundle has.
        let named: Vec<X509Authority> = self.bundle().await?.roots;
        let roots = signed.x509_authorities.into_iter().map(|der| {
            let known = named.iter().find(|root| root.der().as_ref() == der.as_slice());
            known.cloned().map_or_else(|| X509Authority::from_der(der).map_err(|e| self.malformed(&e)), Ok)
        });
        Ok(UpstreamSigned { chain, roots: roots.collect::<Result<_, _>>()? })
    }

    fn has_whole_bundle(&self) -> bool {
        true
    }

    async fn bundle(&self) -> Result<UpstreamBundle, UpstreamError> {
        let answer = BundleClient::new(self.channel().await?).get_bundle(GetBundleRequest::default()).await;
        let answer = answer.map_err(|status| self.of_status(&status))?.into_inner();
        // A key of a kind that is not known here is no reason to miss a revocation.
        let (bundle, left_out) = bundle_without_unknown_keys(answer).map_err(|e| self.malformed(&e))?;
        self.say_left_out(&left_out);
        if bundle.trust_domain != self.trust_domain {
            return Err(self.malformed(&format!("its bundle is of `{}`", bundle.trust_domain)));
        }
        Ok(UpstreamBundle { roots: bundle.authorities, keys: bundle.jwt_authorities, is_whole: true })
    }

    async fn publish_jwt_key(&self, key: &JwtAuthority) -> Result<Option<Vec<JwtAuthority>>, UpstreamError> {
        let asked = PublishJwtAuthorityRequest { jwt_authority: Some(jwt_authority_to_wire(key)) };
        let published = BundleClient::new(self.channel().await?).publish_jwt_authority(asked).await;
        let published = published.map_err(|status| self.of_status(&status))?.into_inner();
        Ok(Some(self.keys(published.jwt_authorities)))
    }
}
