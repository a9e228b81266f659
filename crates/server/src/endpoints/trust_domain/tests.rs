//! What operators may say of relationships, and what is answered.

use countersign_api::spire::trustdomain::batch_update_federation_relationship_response as updated;
use tonic::Code;

use super::*;
use crate::testing::{agent_call, local, server};

fn bundle(of: &str) -> TrustBundle {
    TrustBundle { trust_domain: TrustDomain::new(of).unwrap(), ..crate::testing::bundle() }
}

fn web(of: &str) -> types::FederationRelationship {
    types::FederationRelationship {
        trust_domain: of.into(),
        bundle_endpoint_url: format!("https://{}.test/", of.trim_start_matches("spiffe://")),
        bundle_endpoint_profile: Some(BundleEndpointProfile::HttpsWeb(types::HttpsWebProfile {})),
        trust_domain_bundle: None,
    }
}

fn spiffe(of: &str, id: &str) -> types::FederationRelationship {
    let profile = types::HttpsspiffeProfile { endpoint_spiffe_id: id.into() };
    types::FederationRelationship {
        bundle_endpoint_profile: Some(BundleEndpointProfile::HttpsSpiffe(profile)),
        ..web(of)
    }
}

async fn create(endpoint: &Endpoint, all: Vec<types::FederationRelationship>) -> Vec<(Code, String)> {
    let request = BatchCreateFederationRelationshipRequest { federation_relationships: all, output_mask: None };
    let answer = endpoint.batch_create_federation_relationship(local(request)).await.unwrap().into_inner();
    let status = |r: &batch_create_federation_relationship_response::Result| r.status.clone().unwrap();
    answer.results.iter().map(|r| (status(r).code.into(), status(r).message)).collect()
}

async fn update(
    endpoint: &Endpoint,
    relationship: types::FederationRelationship,
    mask: Option<FederationRelationshipMask>,
) -> updated::Result {
    let all = vec![relationship];
    let request =
        BatchUpdateFederationRelationshipRequest { federation_relationships: all, input_mask: mask, output_mask: None };
    let answer = endpoint.batch_update_federation_relationship(local(request)).await.unwrap().into_inner();
    answer.results.into_iter().next().unwrap()
}

async fn get(endpoint: &Endpoint, of: &str) -> Result<types::FederationRelationship, Status> {
    let request = GetFederationRelationshipRequest { trust_domain: of.into(), output_mask: None };
    endpoint.get_federation_relationship(local(request)).await.map(Response::into_inner)
}

#[tokio::test]
async fn each_of_a_batch_is_judged_by_itself_and_wrong_ones_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint(server(&dir).await);
    let with = |change: &dyn Fn(&mut types::FederationRelationship)| {
        let mut wire = web("wrong");
        change(&mut wire);
        wire
    };
    let batch = vec![
        web("partner"),
        web("spiffe://other"),
        web("partner"),
        web("td"),
        with(&|w| w.trust_domain = String::new()),
        with(&|w| w.trust_domain = "Wrong".into()),
        with(&|w| w.bundle_endpoint_url = "http://wrong.test".into()),
        with(&|w| w.bundle_endpoint_url = "https://u:p@wrong.test".into()),
        with(&|w| w.bundle_endpoint_profile = None),
        with(&|w| w.trust_domain_bundle = Some(bundle_to_wire(&bundle("another")))),
        with(&|w| {
            w.trust_domain_bundle = Some(bundle_to_wire(&TrustBundle::empty(TrustDomain::new("wrong").unwrap())));
        }),
        spiffe("wrong", "wrong/spire/server"),
        spiffe("wrong", "spiffe://wrong"),
        spiffe("spiffe", "spiffe://elsewhere/endpoint"),
    ];
    let answers = create(&endpoint, batch).await;
    let codes: Vec<Code> = answers.iter().map(|(code, _)| *code).collect();
    let wrong = [Code::InvalidArgument; 10];
    let expected = [&[Code::Ok, Code::Ok, Code::AlreadyExists][..], &wrong[..], &[Code::Ok]].concat();
    assert_eq!(codes, expected, "{answers:?}");
    let names: Vec<String> = endpoint.0.relationships.all().keys().cloned().collect();
    assert_eq!(names, ["other", "partner", "spiffe"]);
    assert!(endpoint.0.federated.all().is_empty());
    assert_eq!(endpoint.0.store.relationships().await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_relationship_brings_its_bundle_and_leaves_it_when_it_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint(server(&dir).await);
    let (first, second) = (bundle("partner"), bundle("partner"));
    let wire = types::FederationRelationship {
        trust_domain_bundle: Some(bundle_to_wire(&first)),
        ..spiffe("partner", "spiffe://partner/spire/server")
    };
    assert_eq!(create(&endpoint, vec![wire.clone()]).await[0].0, Code::Ok);
    let known = || endpoint.0.federated.get("partner").unwrap().authorities.clone();
    assert_eq!(known(), first.authorities);
    let told = get(&endpoint, "spiffe://partner").await.unwrap();
    assert_eq!(told.bundle_endpoint_profile, wire.bundle_endpoint_profile);
    assert_eq!(told.trust_domain_bundle.unwrap().x509_authorities, bundle_to_wire(&first).x509_authorities);
    // A second one brings no bundle either.
    let again = types::FederationRelationship { trust_domain_bundle: Some(bundle_to_wire(&second)), ..wire };
    assert_eq!(create(&endpoint, vec![again]).await[0].0, Code::AlreadyExists);
    assert_eq!(known(), first.authorities);
    let delete = |names: &[&str]| {
        let trust_domains = names.iter().map(|n| (*n).to_owned()).collect();
        local(BatchDeleteFederationRelationshipRequest { trust_domains })
    };
    let names = ["spiffe://partner", "partner", "", "A"];
    let answer = endpoint.batch_delete_federation_relationship(delete(&names)).await.unwrap().into_inner();
    let told: Vec<(Code, &str)> =
        answer.results.iter().map(|r| (r.status.as_ref().unwrap().code.into(), r.trust_domain.as_str())).collect();
    let (ok, gone, wrong) = (Code::Ok, Code::NotFound, Code::InvalidArgument);
    assert_eq!(told, [(ok, "partner"), (gone, "partner"), (wrong, ""), (wrong, "A")]);
    assert_eq!(known(), first.authorities);
    assert_eq!(get(&endpoint, "partner").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn an_update_changes_what_its_mask_names_and_nothing_that_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint(server(&dir).await);
    create(&endpoint, vec![web("partner")]).await;
    let id = "spiffe://partner/spire/server";
    let none = FederationRelationshipMask::default();
    let profile = FederationRelationshipMask { bundle_endpoint_profile: true, ..none };
    let only_profile = types::FederationRelationship { bundle_endpoint_url: String::new(), ..spiffe("partner", id) };
    let result = update(&endpoint, only_profile, Some(profile)).await;
    let told = result.federation_relationship.unwrap();
    assert_eq!(told.bundle_endpoint_url, "https://partner.test/");
    assert_eq!(told.bundle_endpoint_profile, spiffe("partner", id).bundle_endpoint_profile);
    let url = FederationRelationshipMask { bundle_endpoint_url: true, ..none };
    let moved = types::FederationRelationship { bundle_endpoint_url: "https://b.test/".into(), ..web("partner") };
    assert_eq!(update(&endpoint, moved, Some(url)).await.status.unwrap().code, 0);
    // A mask that names no bundle keeps one from being set.
    let bundle = Some(bundle_to_wire(&bundle("partner")));
    let with_bundle = types::FederationRelationship { trust_domain_bundle: bundle, ..web("partner") };
    assert_eq!(update(&endpoint, with_bundle.clone(), Some(none)).await.status.unwrap().code, 0);
    assert!(endpoint.0.federated.all().is_empty());
    let wrong = types::FederationRelationship { bundle_endpoint_url: "ftp://x".into(), ..with_bundle.clone() };
    let code = |result: updated::Result| Code::from(result.status.unwrap().code);
    assert_eq!(code(update(&endpoint, wrong, None).await), Code::InvalidArgument);
    assert!(endpoint.0.federated.all().is_empty(), "all or nothing");
    assert_eq!(code(update(&endpoint, web("unknown"), None).await), Code::NotFound);
    let now = get(&endpoint, "partner").await.unwrap();
    assert_eq!(now.bundle_endpoint_url, "https://b.test/");
    assert_eq!(now.bundle_endpoint_profile, spiffe("partner", id).bundle_endpoint_profile);
    assert_eq!(code(update(&endpoint, with_bundle, None).await), Code::Ok);
    assert_eq!(endpoint.0.federated.all().len(), 1);
}

#[tokio::test]
async fn lists_come_in_pages_with_the_fields_that_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = Endpoint(server(&dir).await);
    create(&endpoint, ["c", "a", "b"].map(web).to_vec()).await;
    let (mut names, mut page_token) = (vec![], String::new());
    loop {
        let output_mask = Some(FederationRelationshipMask { bundle_endpoint_url: true, ..Default::default() });
        let request = ListFederationRelationshipsRequest { output_mask, page_size: 2, page_token };
        let page = endpoint.list_federation_relationships(local(request)).await.unwrap().into_inner();
        for r in page.federation_relationships {
            assert!(r.bundle_endpoint_url.starts_with("https://") && r.bundle_endpoint_profile.is_none());
            names.push(r.trust_domain);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["a", "b", "c"]);
}

#[tokio::test]
async fn relationships_are_there_again_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let first = Endpoint(server(&dir).await);
    create(&first, vec![spiffe("partner", "spiffe://partner/x"), web("other")]).await;
    let before = first.0.relationships.all();
    drop(first);
    let again = server(&dir).await;
    assert_eq!(again.relationships.all(), before);
}

#[tokio::test]
async fn a_refresh_names_what_is_wrong_and_agents_may_call_nothing_here() {
    let dir = tempfile::tempdir().unwrap();
    let core = server(&dir).await;
    let endpoint = Endpoint(core.clone());
    let refresh = |of: &str| local(RefreshBundleRequest { trust_domain: of.into() });
    assert_eq!(endpoint.refresh_bundle(refresh("partner")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(endpoint.refresh_bundle(refresh("?")).await.unwrap_err().code(), Code::InvalidArgument);
    create(&endpoint, vec![spiffe("partner", "spiffe://partner/x")]).await;
    let refused = endpoint.refresh_bundle(refresh("partner")).await.unwrap_err();
    assert!(refused.code() == Code::Internal && refused.message().contains("no bundle of `partner`"), "{refused:?}");
    let extensions = agent_call(&core, "1").await.1.into_parts().1;
    let call = Request::from_parts(Default::default(), extensions, ListFederationRelationshipsRequest::default());
    let refused = endpoint.list_federation_relationships(call).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
}
