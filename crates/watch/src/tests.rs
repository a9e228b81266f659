#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full, combinators::BoxBody};
use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
use tokio::time::{Instant, sleep};

use super::*;

/// What the API server does with a request for the list, and for the watch.
#[derive(Clone, Copy, PartialEq)]
enum Server {
    Works,
    Forbids,
    ForbidsToWatch,
}

const FORBIDDEN: &str = r#"{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403,
    "message":"pods is forbidden: User \"system:serviceaccount:c:agent\" cannot list resource \"pods\""}"#;
const LIST: &str = r#"{"kind":"PodList","apiVersion":"v1","metadata":{"resourceVersion":"1"},"items":[]}"#;

/// Follows the pods of an API server whose behaviour the test changes.
fn pods(behaviour: Arc<Mutex<Server>>, watches: &Watches) -> (Arc<Health>, tokio::task::JoinHandle<()>) {
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let now = *behaviour.lock().unwrap();
        async move {
            let watch = request.uri().query().is_some_and(|q| q.contains("watch=true"));
            let refused = now == Server::Forbids || (now == Server::ForbidsToWatch && watch);
            let (status, text) = match (refused, watch) {
                (true, _) => (403, FORBIDDEN),
                (false, true) => (200, ""),
                (false, false) => (200, LIST),
            };
            if status == 200 && watch {
                // It ends when its time is over, as the request says.
                sleep(Duration::from_secs(WATCH_SECONDS.into())).await;
            }
            let body: BoxBody<_, Infallible> = Full::from(text).boxed();
            Ok::<_, Infallible>(http::Response::builder().status(status).body(body).unwrap())
        }
    });
    let health = watches.health("pods");
    let (api, own) = (Api::<Pod>::all(Client::new(service, "default")), health.clone());
    let task = tokio::spawn(async move { follow(api, watcher::Config::default(), &own, |_| {}).await });
    (health, task)
}

#[tokio::test(start_paused = true)]
async fn a_permission_that_is_taken_away_is_named_in_stated_time_and_its_return_is_seen() {
    let (behaviour, watches) = (Arc::new(Mutex::new(Server::Works)), Watches::default());
    let (health, _task) = pods(behaviour.clone(), &watches);
    sleep(Duration::from_secs(300)).await;
    assert!(watches.lasting().is_none() && health.trouble().is_none());
    *behaviour.lock().unwrap() = Server::Forbids;
    let taken = Instant::now();
    while watches.lasting().is_none() {
        sleep(Duration::from_secs(1)).await;
        assert!(taken.elapsed() < Duration::from_secs(100), "a watch's life, and the grace");
    }
    assert!(taken.elapsed() >= Duration::from_secs(30), "a moment's failure is nobody's business");
    let told = watches.lasting().unwrap();
    assert!(told.contains(r#"cannot list resource "pods""#), "{told}");
    assert!(health.unheard().unwrap().refused_since.is_some());
    assert!(watches.errors().get_or_create(&Kind { kind: "pods" }).get() > 1);
    *behaviour.lock().unwrap() = Server::Works;
    sleep(Duration::from_secs(30)).await;
    assert!(watches.lasting().is_none() && health.trouble().is_none());
}

#[tokio::test(start_paused = true)]
async fn who_may_list_and_not_watch_is_in_trouble() {
    let (behaviour, watches) = (Arc::new(Mutex::new(Server::ForbidsToWatch)), Watches::default());
    let (_health, _task) = pods(behaviour, &watches);
    sleep(Duration::from_secs(60)).await;
    assert!(watches.lasting().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_never_began_is_in_trouble() {
    let (behaviour, watches) = (Arc::new(Mutex::new(Server::Forbids)), Watches::default());
    let (health, _task) = pods(behaviour, &watches);
    sleep(Duration::from_secs(5)).await;
    assert!(watches.lasting().is_none() && health.trouble().is_some());
    sleep(Duration::from_secs(40)).await;
    assert!(watches.lasting().is_some());
}
