//! The example application: a shop of four plain HTTP services, productpage → details, reviews → ratings. None of them
//! knows about TLS, certificates or the mesh.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use countersign_api::http_client::{self, Reply};
use countersign_api::names::connect;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// TCP port that every service listens on.
pub const PORT: u16 = 9080;
const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_BODY: usize = 1024 * 1024;

/// Run a service of the example shop.
#[derive(Debug, clap::Args)]
pub struct ShopArgs {
    /// Service to run.
    service: Service,
}

/// The four services of the shop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Service {
    /// The front page; calls details and reviews.
    Productpage,
    /// Returns facts about the book.
    Details,
    /// Returns reviews; calls ratings.
    Reviews,
    /// Returns the stars of each review.
    Ratings,
}

/// Serves until the process ends.
pub fn run(args: ShopArgs) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener =
            TcpListener::bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), PORT)).await.context("cannot listen")?;
        loop {
            let (stream, _) = listener.accept().await?;
            let service = service_fn(move |request| respond(args.service, request));
            // With a timer a request's head has hyper's 30 s to come.
            let mut http = hyper::server::conn::http1::Builder::new();
            tokio::spawn(http.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service));
        }
    })
}

async fn respond(service: Service, request: Request<Incoming>) -> Result<Response<String>, Infallible> {
    // `?echo=…` is returned unchanged, for tests that look for its bytes on the wire.
    let echo = request.uri().query().and_then(|q| q.strip_prefix("echo=")).map(str::to_owned);
    let answer = match service {
        Service::Details => Ok(json!({ "title": "The Comedy of Errors", "pages": 200 })),
        Service::Ratings => Ok(json!({ "stars": [5, 4] })),
        Service::Reviews => both("reviews", &[("ratings", "ratings")]).await,
        Service::Productpage => both("productpage", &[("details", "details"), ("reviews", "reviews")]).await,
    };
    let (status, mut body) = match answer {
        Ok(body) => (StatusCode::OK, body),
        Err(error) => (StatusCode::BAD_GATEWAY, json!({ "error": format!("{error:#}") })),
    };
    if let Some(echo) = echo {
        body["echo"] = Value::String(echo);
    }
    let mut response = Response::new(format!("{body}\n"));
    *response.status_mut() = status;
    Ok(response)
}

async fn both(name: &str, needs: &[(&str, &str)]) -> Result<Value> {
    let mut page = json!({ "service": name });
    for (key, host) in needs {
        page[key] = get(host).await.with_context(|| format!("cannot ask {host}"))?;
    }
    Ok(page)
}

async fn get(host: &str) -> Result<Value> {
    let ask = async {
        let stream = connect(&format!("{host}:{PORT}")).await?;
        let Reply { status, body } = http_client::get(stream, host, "/", MAX_BODY).await?;
        if !status.is_success() {
            return Err(anyhow!("it answered {status}: {}", String::from_utf8_lossy(&body).trim()));
        }
        Ok(serde_json::from_slice(&body)?)
    };
    tokio::time::timeout(TIMEOUT, ask).await.map_err(|_| anyhow!("no answer within {TIMEOUT:?}"))?
}
