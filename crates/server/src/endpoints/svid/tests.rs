//! Who gets which JWT-SVID.

use countersign_identity::{BundleSet, TrustBundle, jwt_svid};
use tonic::Code;

use super::*;
use crate::testing::{agent_call, call, local, server};

struct World {
    core: Arc<Core>,
    endpoint: Endpoint,
    dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let core = server(&dir).await;
        Self { endpoint: Endpoint(core.clone()), core, dir }
    }

    async fn mint(&self, id: &str, audience: &[&str], ttl: i32) -> Result<types::Jwtsvid, Status> {
        let id = id.strip_prefix("spiffe://").and_then(|id| id.split_once('/'));
        let id = id.map(|(td, path)| types::Spiffeid { trust_domain: td.into(), path: format!("/{path}") });
        let asked = MintJwtsvidRequest { id, audience: audience.iter().map(|&a| a.into()).collect(), ttl };
        Ok(self.endpoint.mint_jwtsvid(local(asked)).await?.into_inner().svid.unwrap())
    }

    /// An entry of this agent for `/web`, changed as asked.
    async fn entry(&self, id: &str, parent: &SpiffeId, change: impl FnOnce(&mut Entry)) {
        let mut entry = Entry {
            id: id.parse().unwrap(),
            spiffe_id: SpiffeId::new("spiffe://td/web").unwrap(),
            parent_id: parent.clone(),
            selectors: ["unix:uid:1".parse().unwrap()].into(),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            federates_with: [].into(),
            admin: false,
            downstream: false,
            dns_names: vec![],
            expires_at: None,
            hint: String::new(),
            store_svid: false,
            additional: Default::default(),
            revision: 0,
            created_at: time::OffsetDateTime::UNIX_EPOCH,
        };
        change(&mut entry);
        self.core.entries.create(vec![entry]).await.unwrap();
    }

    fn judge(&self, token: &str, audience: &str) -> jwt_svid::JwtSvid {
        let bundle = TrustBundle::clone(&self.core.authorities.bundle().borrow());
        let bundles: BundleSet = std::iter::once(bundle).collect();
        jwt_svid::verify(token, audience, &bundles, self.core.now()).unwrap()
    }

    fn audit(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("audit.log")).unwrap()
    }
}

fn asked(entry_id: &str, audience: &[&str]) -> NewJwtsvidRequest {
    NewJwtsvidRequest { entry_id: entry_id.into(), audience: audience.iter().map(|&a| a.into()).collect() }
}

#[tokio::test]
async fn an_operator_mints_tokens_that_end_with_their_authority_at_the_latest() {
    let world = World::new().await;
    let minted = world.mint("spiffe://td/web", &["db"], 0).await.unwrap();
    assert_eq!(minted.expires_at - minted.issued_at, 300, "as SPIRE's default");
    let svid = world.judge(&minted.token, "db");
    assert_eq!(
        (svid.id.to_string().as_str(), svid.expires_at.unix_timestamp()),
        ("spiffe://td/web", minted.expires_at)
    );
    assert_eq!(world.mint("spiffe://td/web", &["db"], 60).await.map(|s| s.expires_at - s.issued_at).unwrap(), 60);
    let end = world.core.authorities.journal().iter().map(|r| r.validity().1).max().unwrap();
    let long = world.mint("spiffe://td/web", &["db"], i32::MAX).await.unwrap();
    assert!(long.expires_at <= end.unix_timestamp(), "{}", long.expires_at);
    let audit = world.audit();
    let kind = "\"kind\":\"jwt_svid\"";
    assert!(audit.lines().filter(|l| l.contains(kind) && l.contains("spiffe://td/web")).count() == 3, "{audit}");
    assert!(audit.contains("\"audience\":[\"db\""), "{audit}");
    assert!(!audit.contains(&minted.token[minted.token.len() - 20..]), "the token itself is told to its holder alone");
}

#[tokio::test]
async fn what_cannot_be_minted_is_refused_and_nothing_is_signed() {
    let world = World::new().await;
    for (id, audience, ttl) in [
        ("spiffe://td/web", &[][..], 0),
        ("spiffe://td/web", &[""], 0),
        ("spiffe://td/web", &["db", ""], 0),
        ("spiffe://td/web", &["db"], -1),
        ("spiffe://elsewhere/web", &["db"], 0),
        ("spiffe://td/spire/server", &["db"], 0),
        ("spiffe://td/spire/agent/x/1", &["db"], 0),
        ("", &["db"], 0),
    ] {
        let refused = world.mint(id, audience, ttl).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{id} {audience:?} {ttl}: {refused}");
    }
    let long = "x".repeat(100_000);
    assert_eq!(world.mint("spiffe://td/web", &[&long], 0).await.unwrap_err().code(), Code::InvalidArgument);
    let (_, agent) = agent_call(&world.core, "1").await;
    let refused = world.endpoint.mint_jwtsvid(agent.map(|()| MintJwtsvidRequest::default())).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(!world.audit().contains("\"signed\",\"kind\":\"jwt_svid\""), "{}", world.audit());
}

#[tokio::test]
async fn an_agent_gets_tokens_for_its_own_entries_with_their_lifetime_and_hint() {
    let world = World::new().await;
    let (own, request) = agent_call(&world.core, "1").await;
    let (other, _) = agent_call(&world.core, "2").await;
    world.entry("own", &own, |e| (e.jwt_svid_ttl, e.hint) = (Some(Duration::from_secs(42)), "internal".into())).await;
    world.entry("plain", &own, |e| e.spiffe_id = SpiffeId::new("spiffe://td/plain").unwrap()).await;
    world.entry("over", &own, |e| e.expires_at = Some(time::OffsetDateTime::UNIX_EPOCH + Duration::from_secs(1))).await;
    world.entry("foreign", &other, |_| {}).await;
    let extensions = request.extensions().clone();
    let new = |message: NewJwtsvidRequest| {
        let mut request = Request::new(message);
        *request.extensions_mut() = extensions.clone();
        world.endpoint.new_jwtsvid(request)
    };
    let svid = new(asked("own", &["db", "cache"])).await.unwrap().into_inner().svid.unwrap();
    assert_eq!((svid.expires_at - svid.issued_at, svid.hint.as_str()), (42, "internal"));
    assert_eq!(world.judge(&svid.token, "cache").id.to_string(), "spiffe://td/web");
    let plain = new(asked("plain", &["db"])).await.unwrap().into_inner().svid.unwrap();
    assert_eq!((plain.expires_at - plain.issued_at, plain.id.unwrap().path.as_str()), (300, "/plain"));
    for entry in ["foreign", "over", "nobodys"] {
        assert_eq!(new(asked(entry, &["db"])).await.unwrap_err().code(), Code::NotFound, "{entry}");
    }
    assert_eq!(new(asked("own", &[])).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(new(asked("", &["db"])).await.unwrap_err().code(), Code::InvalidArgument);
    let workload = call(&world.core, &SpiffeId::new("spiffe://td/web").unwrap()).await;
    let refused = world.endpoint.new_jwtsvid(workload.map(|()| asked("own", &["db"]))).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn tokens_of_an_entry_that_wants_it_have_an_id_each() {
    let world = World::new().await;
    let (own, request) = agent_call(&world.core, "1").await;
    world.entry("own", &own, |e| e.additional.jwt_svid_include_jti = true).await;
    world.entry("plain", &own, |e| e.spiffe_id = SpiffeId::new("spiffe://td/plain").unwrap()).await;
    let extensions = request.extensions().clone();
    let id_of = |entry: &str| {
        let mut request = Request::new(asked(entry, &["db"]));
        *request.extensions_mut() = extensions.clone();
        async {
            let token = world.endpoint.new_jwtsvid(request).await.unwrap().into_inner().svid.unwrap().token;
            world.judge(&token, "db").claims.get("jti").map(|id| id.as_str().unwrap().to_owned())
        }
    };
    let (one, two) = (id_of("own").await.unwrap(), id_of("own").await.unwrap());
    assert!(one != two && one.len() == 36 && one.as_bytes()[14] == b'4', "{one} {two}");
    assert_eq!(id_of("plain").await, None);
}

#[tokio::test]
async fn an_address_that_asks_for_too_many_tokens_is_refused_and_its_certificates_are_not() {
    let world = World::new().await;
    let (_, request) = agent_call(&world.core, "1").await;
    let refused = (0..10_000).find_map(|_| world.core.within_token_limit(&request).err()).unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    world.core.within_sign_limit(&request, 500).unwrap();
}

#[tokio::test]
async fn a_server_below_gets_a_ca_whose_svids_everybody_accepts_and_publishes_its_keys() {
    use countersign_api::spire::bundle::PublishJwtAuthorityRequest;
    use countersign_api::spire::bundle::bundle_server::Bundle;
    use countersign_identity::profile::{SigningAuthority, issue_leaf, request};
    use countersign_identity::verify::{PeerRole, verify_chain};
    use countersign_identity::{JwtAuthority, KeyType, PrivateKey, X509Authority};
    let world = World::new().await;
    let (agent, agents) = agent_call(&world.core, "1").await;
    let id = SpiffeId::new("spiffe://td/web").unwrap();
    let call_of = call(&world.core, &id).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let asked = |ttl: i32| NewDownstreamX509caRequest { csr: request(&key, None).unwrap(), preferred_ttl: ttl };
    let with = |message, of: &Request<()>| {
        let mut request = Request::new(message);
        *request.extensions_mut() = of.extensions().clone();
        request
    };
    let jwt = |id: &str, seconds: Option<i64>| {
        let public = PrivateKey::generate(KeyType::EcP256).unwrap().public_der().unwrap();
        let mut key = JwtAuthority::new(id, &public).unwrap();
        key.expires_at = seconds.map(|seconds| world.core.now() + time::Duration::seconds(seconds));
        let jwt_authority = Some(countersign_api::convert::jwt_authority_to_wire(&key));
        PublishJwtAuthorityRequest { jwt_authority }
    };
    // Neither an operator, nor an agent, nor any workload.
    for refused in [
        world.endpoint.new_downstream_x509ca(local(asked(0))).await.unwrap_err(),
        world.endpoint.new_downstream_x509ca(with(asked(0), &agents)).await.unwrap_err(),
        world.endpoint.new_downstream_x509ca(with(asked(0), &call_of)).await.unwrap_err(),
    ] {
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    }
    let mut foreign = Request::new(jwt("k", Some(60)));
    *foreign.extensions_mut() = call_of.extensions().clone();
    assert_eq!(world.endpoint.publish_jwt_authority(foreign).await.unwrap_err().code(), Code::PermissionDenied);

    world.entry("below", &agent, |e| e.downstream = true).await;
    let malformed = NewDownstreamX509caRequest { csr: vec![0; 9], preferred_ttl: 0 };
    for wrong in [malformed, asked(-1)] {
        let refused = world.endpoint.new_downstream_x509ca(with(wrong, &call_of)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    let signed = world.endpoint.new_downstream_x509ca(with(asked(600), &call_of)).await.unwrap().into_inner();
    let bundle = TrustBundle::clone(&world.core.authorities.bundle().borrow());
    assert_eq!(signed.x509_authorities, [bundle.authorities[0].der().to_vec()]);
    let chain: Vec<_> = signed.ca_cert_chain.into_iter().map(rustls::pki_types::CertificateDer::from).collect();
    let end = X509Authority::from_der(chain[0].to_vec()).unwrap().not_after();
    assert!((end - world.core.now() - Duration::from_secs(600)).abs() < Duration::from_secs(5));
    // An SVID below it, as any peer verifies it.
    let ca = SigningAuthority::new(chain[0].clone(), chain, &key).unwrap();
    let leaf_key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let leaf_key = RequestedKey::from_csr(&request(&leaf_key, None).unwrap()).unwrap();
    let ttl = Duration::from_secs(60);
    let leaf = countersign_identity::profile::LeafRequest { id: &id, dns_names: &[], key: &leaf_key, ttl };
    let issued = issue_leaf(&leaf, &ca, world.core.now()).unwrap();
    let bundles: BundleSet = std::iter::once(bundle).collect();
    assert_eq!(verify_chain(&issued.chain, &bundles, world.core.now(), PeerRole::Server).unwrap().id, id);
    assert!(world.audit().lines().any(|l| l.contains("downstream_ca") && l.contains("\"below\"")), "{}", world.audit());
    let long = world.endpoint.new_downstream_x509ca(with(asked(i32::MAX), &call_of)).await.unwrap().into_inner();
    let end = X509Authority::from_der(long.ca_cert_chain[0].clone()).unwrap().not_after();
    assert!(end <= world.core.authorities.journal()[0].validity().1, "no longer than its authority");

    let publish = |message: PublishJwtAuthorityRequest| {
        let mut request = Request::new(message);
        *request.extensions_mut() = call_of.extensions().clone();
        world.endpoint.publish_jwt_authority(request)
    };
    let own = world.core.authorities.bundle().borrow().jwt_authorities[0].key_id().to_owned();
    for wrong in [
        PublishJwtAuthorityRequest { jwt_authority: None },
        jwt("k", None),
        jwt("k", Some(-1)),
        jwt("k", Some(400 * 86_400)),
        jwt(&own, Some(60)),
    ] {
        assert_eq!(publish(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    }
    let all = publish(jwt("k", Some(60))).await.unwrap().into_inner().jwt_authorities;
    assert_eq!(all.iter().map(|k| k.key_id.as_str()).collect::<Vec<_>>(), [own.as_str(), "k"]);
}
