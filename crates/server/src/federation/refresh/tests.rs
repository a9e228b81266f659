//! Two servers, and endpoints that answer wrongly.

use std::net::SocketAddr;
use std::time::Duration;

use countersign_api::tls::{certified_key, public_server_config};
use countersign_identity::profile::{LeafRequest, RequestedKey, SigningAuthority, issue_leaf, issue_root, request};
use countersign_identity::{KeyType, PrivateKey, X509Authority, X509Svid, bundle_document};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::config::{BundleEndpoint, EndpointAuthentication};
use crate::federation::bundles::Expect;
use crate::federation::endpoint::Listening;
use crate::own_svid::OwnSvid;
use crate::testing::{config, server};

fn partner_td() -> TrustDomain {
    TrustDomain::new("partner").unwrap()
}

/// A whole server of the trust domain `partner`, with its bundle endpoint.
struct Partner {
    core: Arc<Core>,
    at: SocketAddr,
    _dir: tempfile::TempDir,
}

impl Partner {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = crate::Config { trust_domain: partner_td(), ..config(dir.path()) };
        let core = crate::assemble(config, countersign_api::clock::system_clock(), Default::default()).await.unwrap();
        let core = Arc::new(core);
        let own = Arc::new(OwnSvid::new(core.clone()).await.unwrap());
        let endpoint = BundleEndpoint {
            bind: "127.0.0.1:0".parse().unwrap(),
            authentication: EndpointAuthentication::HttpsSpiffe,
        };
        let listening = Listening::new(&endpoint).await.unwrap();
        let at = listening.address().unwrap();
        listening.serve(&core, &own);
        Self { core, at, _dir: dir }
    }

    fn bundle(&self) -> TrustBundle {
        TrustBundle::clone(&self.core.authorities.bundle().borrow())
    }

    async fn rotate(&self) {
        let asked = self.core.authorities.prepare(crate::authority::Kind::X509).await;
        asked.unwrap();
    }
}

/// A relationship with `partner` whose endpoint is here.
fn relationship(at: SocketAddr, id: &str) -> Relationship {
    Relationship {
        trust_domain: partner_td(),
        url: format!("https://{at}/").parse().unwrap(),
        profile: Profile::HttpsSpiffe(SpiffeId::new(id).unwrap()),
    }
}

async fn add(core: &Core, relationship: Relationship, bundle: Option<TrustBundle>) -> Arc<Relationship> {
    core.relationships.create((relationship, bundle), &core.federated).await.unwrap()
}

fn known(core: &Core) -> TrustBundle {
    TrustBundle::clone(&core.federated.get("partner").unwrap())
}

#[tokio::test]
async fn a_bundle_is_fetched_by_the_one_that_is_stored_and_a_new_authority_comes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (core, partner) = (server(&dir).await, Partner::start().await);
    let with = add(&core, relationship(partner.at, "spiffe://partner/spire/server"), None).await;
    let error = refresh(&core, &with).await.unwrap_err();
    assert!(matches!(error, RefreshError::NoBundle { .. }), "{error}");
    assert!(error.to_string().contains("countersign bundle set --trust-domain partner"), "{error}");
    core.federated.set(partner.bundle(), Expect::New).await.unwrap();
    // The document says nothing about when a JWT key ends.
    let before = refresh(&core, &with).await.unwrap();
    assert!(Arc::ptr_eq(&refresh(&core, &with).await.unwrap(), &before), "nothing has changed");
    partner.rotate().await;
    refresh(&core, &with).await.unwrap();
    let now = known(&core);
    assert_eq!(now.authorities.len(), 2);
    let keys = |b: &TrustBundle| b.jwt_authorities.iter().map(|k| k.key_id().to_owned()).collect::<Vec<_>>();
    assert_eq!((now.sequence, now.refresh_hint), (partner.bundle().sequence, partner.bundle().refresh_hint));
    assert_eq!(keys(&now), keys(&partner.bundle()));
    assert_eq!(core.store.bundles().await.unwrap().iter().find(|b| b.value == now).map(|b| b.value.clone()), Some(now));
}

#[tokio::test]
async fn an_endpoint_with_another_id_or_under_another_bundle_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (core, partner) = (server(&dir).await, Partner::start().await);
    let with = add(&core, relationship(partner.at, "spiffe://partner/other"), Some(partner.bundle())).await;
    let error = refresh(&core, &with).await.unwrap_err().to_string();
    assert!(error.contains("spiffe://partner/spire/server") && error.contains("spiffe://partner/other"), "{error}");
    assert_eq!(known(&core), partner.bundle());
    // An SVID of `partner` under somebody else's authority.
    let stranger = TrustBundle { trust_domain: partner_td(), ..crate::testing::bundle() };
    core.federated.set(stranger, Expect::Known).await.unwrap();
    let before = known(&core);
    let right = relationship(partner.at, "spiffe://partner/spire/server");
    let with = core.relationships.update(&partner_td(), &core.federated, |_| (right.clone(), None)).await.unwrap();
    assert!(refresh(&core, &with).await.is_err());
    // And one that our own trust domain vouches for is of our own trust domain.
    let with = relationship(partner.at, "spiffe://td/spire/server");
    let with = core.relationships.update(&partner_td(), &core.federated, |_| (with.clone(), None)).await.unwrap();
    assert!(refresh(&core, &with).await.is_err());
    assert_eq!(known(&core), before);
}

/// An endpoint with the SVID `spiffe://partner/e`, which gives each connection one of these answers, in order.
struct Wrong {
    at: SocketAddr,
    bundle: TrustBundle,
}

impl Wrong {
    async fn start(answers: impl Fn(SocketAddr, &TrustBundle) -> Vec<String>) -> Self {
        let now = time::OffsetDateTime::now_utc();
        let [ca_key, key] = [(); 2].map(|()| PrivateKey::generate(KeyType::EcP256).unwrap());
        let root = issue_root(&partner_td(), &ca_key, Duration::from_secs(600), now).unwrap();
        let authority = X509Authority::from_der(root.to_vec()).unwrap();
        let bundle = TrustBundle { authorities: vec![authority], sequence: 5, ..TrustBundle::empty(partner_td()) };
        let signing = SigningAuthority::new(root, vec![], &ca_key).unwrap();
        let id = SpiffeId::new("spiffe://partner/e").unwrap();
        let asked = RequestedKey::from_csr(&request(&key, None).unwrap()).unwrap();
        let leaf = LeafRequest { id: &id, dns_names: &[], key: &asked, ttl: Duration::from_secs(60) };
        let svid = X509Svid::new(issue_leaf(&leaf, &signing, now).unwrap().chain, key).unwrap();
        let tls = public_server_config(certified_key(&svid).unwrap(), &[b"http/1.1"]).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let answers = answers(at, &bundle);
        tokio::spawn(async move {
            for answer in answers {
                let (tcp, _) = listener.accept().await.unwrap();
                let mut stream = acceptor.accept(tcp).await.unwrap();
                let mut asked = [0; 1_024];
                let _ = stream.read(&mut asked).await;
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        Self { at, bundle }
    }
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

fn redirect(status: u16, to: &str) -> String {
    format!("HTTP/1.1 {status} X\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n")
}

#[tokio::test]
async fn no_answer_that_is_not_a_whole_bundle_takes_the_place_of_the_last_good_one() {
    let cases: Vec<(&str, String)> = vec![
        ("no key of a kind", ok(r#"{"keys":[]}"#)),
        ("no key of a kind", ok(r#"{"keys":[{"use":"wit-svid","kty":"EC","kid":"1"}]}"#)),
        ("not a SPIFFE bundle", ok("<html>")),
        ("not a SPIFFE bundle", ok("")),
        ("x5c", ok(r#"{"keys":[{"use":"x509-svid","kty":"EC","x5c":[]}]}"#)),
        ("262144 bytes", ok(&" ".repeat(256 * 1024 + 1))),
        ("up to its end", "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{".into()),
        ("404", "HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n".into()),
        ("204", "HTTP/1.1 204 No\r\n\r\n".into()),
        ("https://", redirect(302, "http://127.0.0.1:1/")),
        ("redirects to nowhere", "HTTP/1.1 302 X\r\ncontent-length: 0\r\n\r\n".into()),
        ("no answer", "SSH-2.0-x\r\n\r\n".into()),
    ];
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let texts: Vec<String> = cases.iter().map(|(_, text)| text.clone()).collect();
    let wrong = Wrong::start(|_, _| texts.clone()).await;
    let with = add(&core, relationship(wrong.at, "spiffe://partner/e"), Some(wrong.bundle.clone())).await;
    for (said, _) in cases {
        let error = refresh(&core, &with).await.unwrap_err().to_string();
        assert!(error.contains(said), "{said}: {error}");
        assert_eq!(known(&core), wrong.bundle, "{said}");
    }
}

#[tokio::test]
async fn redirects_are_followed_over_https_and_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let followed = Wrong::start(|at, bundle| {
        let next = TrustBundle { sequence: 6, ..bundle.clone() };
        vec![
            redirect(307, "/bundle"),
            redirect(301, &format!("https://{at}/there")),
            ok(&bundle_document::write(&next)),
        ]
    })
    .await;
    let with = add(&core, relationship(followed.at, "spiffe://partner/e"), Some(followed.bundle.clone())).await;
    assert_eq!(refresh(&core, &with).await.unwrap().sequence, 6);
    let endless = Wrong::start(|_, _| vec![redirect(302, "/"); 10]).await;
    core.federated.set(endless.bundle.clone(), Expect::Known).await.unwrap();
    let other = relationship(endless.at, "spiffe://partner/e");
    let with = core.relationships.update(&partner_td(), &core.federated, |_| (other.clone(), None)).await.unwrap();
    let error = refresh(&core, &with).await.unwrap_err();
    assert!(matches!(error, RefreshError::Fetch(FetchError::Redirects)), "{error}");
}

#[tokio::test]
async fn a_document_without_a_number_is_stored_once_and_a_number_may_go_back() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let wrong = Wrong::start(|_, bundle| {
        let document = |sequence, hint| {
            let refresh_hint = Duration::from_secs(hint);
            ok(&bundle_document::write(&TrustBundle { sequence, refresh_hint, ..bundle.clone() }))
        };
        vec![document(0, 7), document(0, 7), document(3, 7)]
    })
    .await;
    let with = add(&core, relationship(wrong.at, "spiffe://partner/e"), Some(wrong.bundle.clone())).await;
    let first = refresh(&core, &with).await.unwrap();
    assert_eq!((first.sequence, first.refresh_hint), (6, Duration::from_secs(7)), "it counts on");
    assert!(Arc::ptr_eq(&refresh(&core, &with).await.unwrap(), &first));
    assert_eq!(refresh(&core, &with).await.unwrap().sequence, 3);
}

#[tokio::test]
async fn an_endpoint_of_a_third_trust_domain_is_verified_by_that_ones_bundle_and_changes_its_own_alone() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let served = TrustBundle { sequence: 4, ..crate::testing::bundle() };
    let host = Wrong::start(|_, _| vec![ok(&bundle_document::write(&served))]).await;
    let third = TrustDomain::new("third").unwrap();
    let with = Relationship { trust_domain: third.clone(), ..relationship(host.at, "spiffe://partner/e") };
    // Its own bundle vouches for nobody of `partner`.
    let with = add(&core, with, Some(TrustBundle { trust_domain: third.clone(), ..host.bundle.clone() })).await;
    assert!(matches!(refresh(&core, &with).await, Err(RefreshError::NoBundle { .. })));
    core.federated.set(host.bundle.clone(), Expect::New).await.unwrap();
    let refreshed = refresh(&core, &with).await.unwrap();
    assert_eq!((&refreshed.trust_domain, &refreshed.authorities), (&third, &served.authorities));
    assert_eq!(known(&core), host.bundle);
}

#[tokio::test]
async fn what_was_fetched_before_somebody_set_another_bundle_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let bundle = |sequence| TrustBundle { trust_domain: partner_td(), sequence, ..crate::testing::bundle() };
    let before = core.federated.set(bundle(1), Expect::New).await.unwrap();
    let set = core.federated.set(bundle(9), Expect::Known).await.unwrap();
    assert_eq!(core.federated.refresh(bundle(2), Some(&before)).await.unwrap(), None);
    assert_eq!(core.federated.refresh(bundle(2), None).await.unwrap(), None);
    assert_eq!(known(&core), *set);
    assert!(core.federated.refresh(bundle(10), Some(&set)).await.unwrap().is_some());
}

/// The metrics of relationships, without their headings.
fn metrics(core: &Core) -> Vec<String> {
    let mut page = String::new();
    prometheus_client::encoding::text::encode(&mut page, &core.metrics.registry).unwrap();
    page.lines().filter(|l| l.starts_with("countersign_server_federation_")).map(str::to_owned).collect()
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let waiting = async {
        while !is() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap_or_else(|_| panic!("waited for {what}"));
}

#[tokio::test]
async fn relationships_are_followed_from_when_they_are_made_until_they_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let (core, partner) = (server(&dir).await, Partner::start().await);
    core.tasks.spawn(keep(core.clone()));
    add(&core, relationship(partner.at, "spiffe://partner/spire/server"), None).await;
    let failures = |core: &Core| {
        let line = metrics(core).into_iter().find(|l| l.contains("failures_total{"));
        line.and_then(|l| l.split(' ').next_back()?.parse::<u64>().ok()).unwrap_or(0)
    };
    until("the first failure", || failures(&core) > 0).await;
    // No retry is waited for: what was missing is here.
    let old = TrustBundle { sequence: 1, refresh_hint: Duration::ZERO, ..partner.bundle() };
    core.federated.set(old, Expect::New).await.unwrap();
    until("the refresh", || known(&core).refresh_hint == partner.bundle().refresh_hint).await;
    until("the metric", || !metrics(&core).iter().any(|l| l.contains("timestamp_seconds{") && l.ends_with(" 0"))).await;
    core.relationships.delete(&partner_td()).await.unwrap();
    until("the end of its metrics", || metrics(&core).is_empty()).await;
    assert_eq!(known(&core).trust_domain, partner_td(), "its bundle stays");
    core.shutdown.cancel();
    core.tasks.close();
    tokio::time::timeout(Duration::from_secs(10), core.tasks.wait()).await.unwrap();
}

#[tokio::test]
async fn the_endpoint_serves_the_document_at_its_root_alone_and_asks_nobody_for_a_certificate() {
    let partner = Partner::start().await;
    let id = SpiffeId::new("spiffe://partner/spire/server").unwrap();
    let trusted = Arc::new(std::iter::once(partner.bundle()).collect::<countersign_identity::BundleSet>());
    let ask = async |method: &str, path: &str| {
        let (trusted, only) = (trusted.clone(), countersign_api::tls::only(id.clone()));
        let verifier = countersign_api::tls::SvidVerifier::new(move || trusted.clone(), only);
        let config = Arc::new(countersign_api::tls::client_config(None, verifier, &[b"http/1.1"]).unwrap());
        let at = partner.at.to_string();
        let mut stream = countersign_api::tls_connect::connect_tls(&at, "127.0.0.1", config).await.unwrap();
        stream
            .write_all(format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
            .await
            .unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        answer
    };
    let answer = ask("GET", "/").await;
    assert!(
        answer.starts_with("HTTP/1.1 200 ") && answer.contains("\r\ncontent-type: application/json\r\n"),
        "{answer}"
    );
    let document = answer.split_once("\r\n\r\n").unwrap().1;
    let read = bundle_document::read(partner_td(), document.as_bytes()).unwrap();
    assert_eq!((read.sequence, read.authorities), (partner.bundle().sequence, partner.bundle().authorities));
    assert_eq!(read.jwt_authorities.len(), partner.bundle().jwt_authorities.len());
    assert!(ask("GET", "/other").await.starts_with("HTTP/1.1 404 "));
    assert!(ask("POST", "/").await.starts_with("HTTP/1.1 405 "));
    assert!(ask("HEAD", "/").await.starts_with("HTTP/1.1 405 "));
}
