//! The SPIFFE Workload API: SVIDs and bundles of both kinds, and whether a JWT-SVID is one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use countersign_api::workload::spiffe_workload_api_server::SpiffeWorkloadApi;
use countersign_api::workload::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
};
use countersign_identity::{BundleSet, TrustBundle, X509Svid, jwt_svid};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status};

use super::streams::Feed;
use super::tokens::Asked;
use super::{Attested, BoxStream, Core, Endpoint};
use crate::cache::Cached;
use crate::claims::to_struct;

/// How long a call waits for an SVID that is not signed yet.
const FIRST_SVID_PATIENCE: Duration = Duration::from_secs(10);

fn check_header<T>(request: &Request<T>) -> Result<(), Status> {
    let values: Vec<_> = request.metadata().get_all("workload.spiffe.io").iter().collect();
    if values.len() == 1 && values[0] == "true" {
        Ok(())
    } else {
        Err(Status::invalid_argument(
            "security header missing from request: send the metadata `workload.spiffe.io: true`",
        ))
    }
}

/// The content of a stream. Each message is a complete state.
trait Content: Send + Sync + 'static {
    type Message: Clone + PartialEq + Send + 'static;
    /// The current message; `None` if it is not ready yet.
    fn message(core: &Core, identities: &[Cached]) -> Option<Self::Message>;
}

struct Svids;

impl Content for Svids {
    type Message = X509svidResponse;

    fn message(core: &Core, identities: &[Cached]) -> Option<X509svidResponse> {
        let now = core.now();
        let state = core.cache.read();
        let bundle = state.bundle.as_ref()?;
        let identities = in_order(identities);
        let mut hints = std::collections::HashSet::new();
        let svids: Vec<X509svid> = ready(&identities, now)
            // Hints are unique within a response: the first of two equal ones counts (SPIFFE Workload API 5.2.1).
            .filter(|(c, _)| c.entry.hint.is_empty() || hints.insert(&c.entry.hint))
            .map(|(c, svid)| X509svid {
                spiffe_id: svid.id().to_string(),
                x509_svid: svid.chain().iter().flat_map(|c| c.iter().copied()).collect(),
                x509_svid_key: svid.key().as_pkcs8().to_vec(),
                bundle: bundle.concatenated_der(),
                hint: c.entry.hint.clone(),
            })
            .collect();
        let federated_bundles = with_certificates(federated(&state, &identities))
            .map(|b| (format!("spiffe://{}", b.trust_domain), b.concatenated_der()))
            .collect();
        (!svids.is_empty()).then_some(X509svidResponse { svids, crl: vec![], federated_bundles })
    }
}

/// The default first: the oldest entry, and it stays so, whatever is added later. Attestation waits for facts that an older entry may
/// lack (`Cache::is_settled`).
pub(super) fn in_order(identities: &[Cached]) -> Vec<&Cached> {
    let mut identities: Vec<&Cached> = identities.iter().collect();
    identities.sort_by(|a, b| (a.entry.created_at, &a.entry.id).cmp(&(b.entry.created_at, &b.entry.id)));
    identities
}

/// Those of them whose SVID is signed and not expired.
pub(super) fn ready<'a>(
    identities: &[&'a Cached],
    now: OffsetDateTime,
) -> impl Iterator<Item = (&'a Cached, &'a Arc<X509Svid>)> {
    identities.iter().filter_map(move |c| Some((*c, c.svid.as_ref().filter(|s| !s.is_expired(now))?)))
}

struct Bundles;

impl Content for Bundles {
    type Message = X509BundlesResponse;

    fn message(core: &Core, identities: &[Cached]) -> Option<X509BundlesResponse> {
        let state = core.cache.read();
        let own = state.bundle.as_ref()?;
        let identities: Vec<&Cached> = identities.iter().collect();
        let all = std::iter::once(own).chain(with_certificates(federated(&state, &identities)));
        let bundles: HashMap<String, Vec<u8>> =
            all.map(|b| (format!("spiffe://{}", b.trust_domain), b.concatenated_der())).collect();
        Some(X509BundlesResponse { crl: vec![], bundles })
    }
}

struct JwtBundles;

impl Content for JwtBundles {
    type Message = JwtBundlesResponse;

    fn message(core: &Core, identities: &[Cached]) -> Option<JwtBundlesResponse> {
        let trusted = trusted(&core.cache.read(), identities)?;
        let now = core.now();
        let document = |b: &Arc<TrustBundle>| (format!("spiffe://{}", b.trust_domain), b.jwks(now).into_bytes());
        Some(JwtBundlesResponse { bundles: trusted.iter().map(document).collect() })
    }
}

/// The bundles that these identities may verify with: our own, and those that they federate with. `None` if ours is not known yet.
fn trusted(state: &crate::cache::State, identities: &[Cached]) -> Option<BundleSet> {
    let identities: Vec<&Cached> = identities.iter().collect();
    let mut trusted = BundleSet::default();
    federated(state, &identities).for_each(|bundle| trusted.share(bundle.clone()));
    // Last, so that no other one takes its place.
    trusted.share(state.bundle.clone()?);
    Some(trusted)
}

/// Name of our own trust domain.
fn bundles_own(state: &crate::cache::State) -> Option<String> {
    state.bundle.as_ref().map(|bundle| bundle.trust_domain.to_string())
}

/// The claims that a caller is told, as SPIRE does: of a foreign token those of the standard alone, because what others mean by theirs
/// is not known, and its audiences always as a list.
fn told(
    mut claims: serde_json::Map<String, serde_json::Value>,
    is_own: bool,
) -> serde_json::Map<String, serde_json::Value> {
    if !is_own {
        claims.retain(|name, _| ["sub", "exp", "aud"].contains(&name.as_str()));
    }
    if let Some(audience) = claims.get_mut("aud").filter(|aud| aud.is_string()) {
        *audience = serde_json::Value::Array(vec![audience.take()]);
    }
    claims
}

pub(super) fn federated<'a>(
    state: &'a crate::cache::State,
    identities: &[&Cached],
) -> impl Iterator<Item = &'a Arc<TrustBundle>> {
    let wanted: std::collections::BTreeSet<String> =
        identities.iter().flat_map(|c| c.entry.federates_with.iter().map(ToString::to_string)).collect();
    state.federated.iter().filter(move |(td, _)| wanted.contains(*td)).map(|(_, b)| b)
}

/// Those with X.509 authorities: an empty list of certificates is no bundle, and some clients refuse the whole message for it.
pub(super) fn with_certificates<'a>(
    bundles: impl Iterator<Item = &'a Arc<TrustBundle>>,
) -> impl Iterator<Item = &'a Arc<TrustBundle>> {
    bundles.filter(|bundle| !bundle.authorities.is_empty())
}

/// A stream of one content: each message that differs from the one that was sent last.
struct Complete<C: Content> {
    sent: Option<C::Message>,
}

impl<C: Content> Default for Complete<C> {
    fn default() -> Self {
        Self { sent: None }
    }
}

#[async_trait]
impl<C: Content> Feed for Complete<C> {
    type Message = C::Message;

    async fn feed(
        &mut self,
        core: &Core,
        attested: &Attested,
        tx: &mpsc::Sender<Result<C::Message, Status>>,
    ) -> Option<Status> {
        let mut versions = core.cache.versions();
        let patience = tokio::time::sleep(FIRST_SVID_PATIENCE);
        tokio::pin!(patience);
        loop {
            versions.mark_unchanged();
            match core.identities(attested) {
                Err(status) => return Some(status),
                Ok(identities) => {
                    let message = C::message(core, &identities);
                    if message.is_some() && message != self.sent {
                        tx.send(Ok(message.clone()?)).await.ok()?;
                        self.sent = message;
                    }
                }
            }
            tokio::select! {
                changed = versions.changed() => changed.ok()?,
                () = tx.closed() => return None,
                () = &mut patience, if self.sent.is_none() => return Some(Status::unavailable("the SVID is not signed yet; is the server reachable from the agent?")),
            }
        }
    }
}

#[async_trait]
impl SpiffeWorkloadApi for Endpoint {
    type FetchX509SVIDStream = BoxStream<X509svidResponse>;
    type FetchX509BundlesStream = BoxStream<X509BundlesResponse>;
    type FetchJWTBundlesStream = BoxStream<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        check_header(&request)?;
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        Ok(Response::new(self.stream(attested, Complete::<Svids>::default())))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        check_header(&request)?;
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        Ok(Response::new(self.stream(attested, Complete::<Bundles>::default())))
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        check_header(&request)?;
        let asked = Asked::new(request.get_ref())?;
        let attested = self.0.attest(&request).await?;
        Ok(Response::new(JwtsvidResponse { svids: self.0.jwt_svids(attested, &asked).await? }))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        check_header(&request)?;
        let attested = self.0.attest(&request).await?;
        self.0.identities(&attested)?;
        Ok(Response::new(self.stream(attested, Complete::<JwtBundles>::default())))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        check_header(&request)?;
        let attested = self.0.attest(&request).await?;
        let identities = self.0.identities(&attested)?;
        let asked = request.into_inner();
        let bundles = trusted(&self.0.cache.read(), &identities);
        let bundles = bundles.ok_or_else(|| Status::unavailable("the trust bundle is not known yet"))?;
        let verified = jwt_svid::verify(&asked.svid, &asked.audience, &bundles, self.0.now());
        let svid = verified.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let own = bundles_own(&self.0.cache.read());
        let is_own = own.is_some_and(|own| own == svid.id.trust_domain_name());
        let claims = Some(to_struct(told(svid.claims, is_own)));
        Ok(Response::new(ValidateJwtsvidResponse { spiffe_id: svid.id.to_string(), claims }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use countersign_api::transport::peer_credentials;
    use countersign_identity::selector::SelectorSet;
    use futures::StreamExt;
    use time::OffsetDateTime;

    use super::*;
    use crate::endpoints::tests::core;
    use crate::peer::Process;
    use crate::testing::{Ca, cached};
    use crate::workload_attestor::{AttestorError, Proof, Purpose, WorkloadAttestor};

    #[test]
    fn of_a_foreign_token_the_claims_of_the_standard_are_told_and_audiences_as_a_list() {
        let claims = serde_json::json!({ "sub": "spiffe://td/a", "aud": "me", "exp": 1, "role": "admin" });
        let told = |is_own| serde_json::Value::Object(told(claims.as_object().unwrap().clone(), is_own));
        assert_eq!(told(true), serde_json::json!({ "sub": "spiffe://td/a", "aud": ["me"], "exp": 1, "role": "admin" }));
        assert_eq!(told(false), serde_json::json!({ "sub": "spiffe://td/a", "aud": ["me"], "exp": 1 }));
        let exp = to_struct(told(true).as_object().unwrap().clone()).fields.remove("exp").unwrap();
        assert_eq!(exp.kind, Some(prost_types::value::Kind::NumberValue(1.0)));
    }

    const POD: &str = "k8s:pod-uid:u";
    const CONTAINER: &str = "k8s:container-name:app";

    /// Knows the pod at once, and the container when the test says so.
    #[derive(Default)]
    struct Kubelet(AtomicBool);

    #[async_trait]
    impl WorkloadAttestor for Kubelet {
        async fn attest(&self, _: &Process, purpose: &dyn Purpose) -> Result<Proof, AttestorError> {
            let mut selectors: SelectorSet = std::iter::once(POD.parse().unwrap()).collect();
            if purpose.is_met_by(&selectors, |s| s.value().starts_with("container-")) {
                return Ok(Proof { selectors, in_part: true });
            }
            let in_part = !self.0.load(Ordering::Relaxed);
            selectors.extend((!in_part).then(|| CONTAINER.parse().unwrap()));
            Ok(Proof { selectors, in_part })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_a_caller_attested_in_part_goes_on_and_gets_what_its_container_adds() {
        let dir = tempfile::tempdir().unwrap();
        let (mut core, kubelet) = (core(dir.path()), Arc::new(Kubelet::default()));
        core.attestors = vec![kubelet.clone()];
        let (ca, now) = (Ca::new(OffsetDateTime::now_utc()), OffsetDateTime::now_utc());
        let signed = |name: &str, selectors: &[&str]| {
            let mut one = cached(name, 1);
            let entry = Arc::get_mut(&mut one.entry).unwrap();
            entry.selectors = selectors.iter().map(|s| s.parse().unwrap()).collect();
            one.svid = Some(Arc::new(ca.svid(&format!("/{name}"), Duration::from_secs(3_600), now)));
            (one.entry.id.clone(), one)
        };
        core.cache.change(|state| {
            state.synced = true;
            state.bundle = Some(Arc::new(ca.bundle()));
            state.entries.extend([signed("pod", &[POD])]);
        });
        let (caller, _other_end) = tokio::net::UnixStream::pair().unwrap();
        let mut request = Request::new(X509svidRequest {});
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        request.extensions_mut().insert(peer_credentials(&caller).unwrap());
        let core = Arc::new(core);
        let mut stream = Endpoint(core.clone()).fetch_x509svid(request).await.unwrap().into_inner();
        let ids = |message: Option<Result<X509svidResponse, Status>>| {
            message.unwrap().unwrap().svids.into_iter().map(|s| s.spiffe_id).collect::<Vec<_>>()
        };
        let pods = "spiffe://test.local/pod".to_owned();
        assert_eq!(ids(stream.next().await), std::slice::from_ref(&pods));
        // An entry that needs the container appears after the caller was attested by its pod alone.
        core.cache.change(|state| state.entries.extend([signed("container", &[POD, CONTAINER])]));
        let soon = tokio::time::timeout(Duration::from_secs(60), stream.next()).await;
        assert!(soon.is_err(), "nobody knows the container yet, and the stream goes on: {:?}", soon.map(ids));
        kubelet.0.store(true, Ordering::Relaxed);
        let both = tokio::time::timeout(Duration::from_secs(11), stream.next()).await.unwrap();
        let mut both = ids(both);
        both.sort();
        assert_eq!(both, ["spiffe://test.local/container".to_owned(), pods]);
        let quiet = tokio::time::timeout(Duration::from_secs(120), stream.next()).await;
        assert!(quiet.is_err(), "what is whole is left alone");
    }

    /// A core whose caller has entries with these IDs, hints and names, and a request of that caller.
    fn with_entries(
        dir: &std::path::Path,
        entries: &[&str],
        asked: JwtsvidRequest,
    ) -> (Arc<Core>, Request<JwtsvidRequest>) {
        let mut core = core(dir);
        let kubelet = Arc::new(Kubelet::default());
        kubelet.0.store(true, Ordering::Relaxed);
        core.attestors = vec![kubelet];
        core.cache.change(|state| {
            state.synced = true;
            for name in entries {
                let mut one = cached(name, 1);
                let entry = Arc::get_mut(&mut one.entry).unwrap();
                entry.selectors = std::iter::once(POD.parse().unwrap()).collect();
                entry.store_svid = *name == "stored";
                state.entries.insert(one.entry.id.clone(), one);
            }
        });
        let mut request = Request::new(asked);
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
        (Arc::new(core), request)
    }

    #[tokio::test]
    async fn of_two_identities_with_the_same_hint_one_has_a_token() {
        let dir = tempfile::tempdir().unwrap();
        let asked = JwtsvidRequest { audience: vec!["db".into()], ..JwtsvidRequest::default() };
        let (core, _) = with_entries(dir.path(), &["a", "b", "c"], asked.clone());
        core.cache.change(|state| {
            for one in state.entries.values_mut() {
                let entry = Arc::make_mut(&mut one.entry);
                entry.hint = if entry.id.as_str() == "c" { "other" } else { "same" }.into();
            }
        });
        let (caller, _other_end) = tokio::net::UnixStream::pair().unwrap();
        let peer = peer_credentials(&caller).unwrap();
        let attested = Attested { peer, selectors: std::iter::once(POD.parse().unwrap()).collect(), in_part: false };
        let entitled = core.entitled(&attested, &Asked::new(&asked).unwrap()).unwrap();
        let ids: Vec<_> = entitled.iter().map(|e| e.id.as_str()).collect();
        assert_eq!(ids, ["a", "c"]);
    }

    #[tokio::test]
    async fn a_token_of_an_identity_that_the_caller_has_not_is_refused_before_the_server_is_asked() {
        let asked = |audience: &[&str], id: &str| JwtsvidRequest {
            audience: audience.iter().map(|&a| a.into()).collect(),
            spiffe_id: id.into(),
        };
        let own = "spiffe://test.local/pod";
        for (entries, asked, code) in [
            (&["pod"][..], asked(&[], own), tonic::Code::InvalidArgument),
            (&["pod"], asked(&["db", ""], own), tonic::Code::InvalidArgument),
            (&["pod"], asked(&["db"], "https://test.local/pod"), tonic::Code::InvalidArgument),
            (&["pod"], asked(&["db"], "spiffe://test.local"), tonic::Code::InvalidArgument),
            (&["pod"], asked(&["db"], "spiffe://test.local/other"), tonic::Code::PermissionDenied),
            (&["pod"], asked(&["db"], "spiffe://elsewhere/pod"), tonic::Code::PermissionDenied),
            (&["stored"], asked(&["db"], "spiffe://test.local/stored"), tonic::Code::PermissionDenied),
            (&["stored"], asked(&["db"], ""), tonic::Code::PermissionDenied),
            (&[], asked(&["db"], ""), tonic::Code::PermissionDenied),
            // This one is its own, and this agent has no server.
            (&["pod"], asked(&["db"], own), tonic::Code::Unavailable),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let (core, mut request) = with_entries(dir.path(), entries, asked.clone());
            let (caller, _other_end) = tokio::net::UnixStream::pair().unwrap();
            request.extensions_mut().insert(peer_credentials(&caller).unwrap());
            let refused = Endpoint(core).fetch_jwtsvid(request).await.unwrap_err();
            assert_eq!(refused.code(), code, "{asked:?}: {refused}");
        }
        let (core, _) = with_entries(tempfile::tempdir().unwrap().path(), &["pod"], asked(&["db"], own));
        let without_header = Endpoint(core).fetch_jwtsvid(Request::new(asked(&["db"], own))).await.unwrap_err();
        assert_eq!(without_header.code(), tonic::Code::InvalidArgument);
    }
}
