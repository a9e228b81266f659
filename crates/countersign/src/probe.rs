//! An HTTP client that counts: requests a URL over new and kept-alive connections and reports failures in JSON.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use countersign_api::names::connect;
use http_body_util::{BodyExt, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Longest body that is read, in bytes.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// Request a URL many times and report.
#[derive(Debug, clap::Args)]
pub struct ProbeArgs {
    /// URL to request, `http://HOST:PORT/PATH`.
    url: String,
    /// How long to repeat; without it, each client sends one request.
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Number of clients that keep their connection alive.
    #[arg(long, default_value_t = 0)]
    kept: usize,
    /// Number of clients that connect for each request.
    #[arg(long, default_value_t = 1)]
    fresh: usize,
    /// Pause between two requests of a client, in milliseconds.
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
}

/// Result of a run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Number of requests that were answered with 200.
    pub ok: u64,
    /// Number of all other requests.
    pub failed: u64,
    /// Number of connections that were opened.
    pub connections: u64,
    /// The first reasons of failures.
    pub errors: Vec<String>,
    /// Body of the last answer.
    pub body: String,
}

impl Report {
    fn fail(&mut self, error: &anyhow::Error) {
        self.failed += 1;
        if self.errors.len() < 5 {
            self.errors.push(format!("{error:#}"));
        }
    }

    fn add(&mut self, other: Self) {
        self.ok += other.ok;
        self.failed += other.failed;
        self.connections += other.connections;
        self.errors.extend(other.errors);
        self.errors.truncate(5);
        if self.body.is_empty() {
            self.body = other.body;
        }
    }
}

struct Client {
    authority: String,
    path: String,
    kept: Option<hyper::client::conn::http1::SendRequest<String>>,
    report: Report,
}

impl Client {
    fn new(url: &str) -> Result<Self> {
        let rest = url.strip_prefix("http://").context("the URL must begin with http://")?;
        let (authority, path) = rest.split_once('/').map_or((rest, "/".to_owned()), |(a, p)| (a, format!("/{p}")));
        Ok(Self { authority: authority.to_owned(), path, kept: None, report: Report::default() })
    }

    async fn request_in_time(&mut self, keep: bool) -> Result<String> {
        let answer = tokio::time::timeout(PATIENCE, self.request(keep)).await;
        answer.unwrap_or_else(|_| Err(anyhow!("no answer within {PATIENCE:?}")))
    }

    async fn request(&mut self, keep: bool) -> Result<String> {
        let mut sender = if let Some(sender) = self.kept.take() {
            sender
        } else {
            self.report.connections += 1;
            let stream = connect(&self.authority).await.context("connect")?;
            let (sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.context("handshake")?;
            tokio::spawn(connection);
            sender
        };
        let mut request = Request::get(&self.path).header("host", &self.authority);
        if !keep {
            request = request.header("connection", "close");
        }
        let response = sender.send_request(request.body(String::new())?).await.context("request")?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = body.map_err(|e| anyhow!("body: {e}"))?.to_bytes();
        if !status.is_success() {
            return Err(anyhow!("status {status}: {}", String::from_utf8_lossy(&body).trim()));
        }
        if keep {
            self.kept = Some(sender);
        }
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    async fn run(mut self, until: Option<Instant>, keep: bool, pause: Duration) -> Report {
        loop {
            match self.request_in_time(keep).await {
                Ok(body) => {
                    self.report.ok += 1;
                    self.report.body = body;
                }
                Err(error) => self.report.fail(&error),
            }
            if until.is_none_or(|t| Instant::now() >= t) {
                return self.report;
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// Sends one GET request and returns the body. A status other than 200 is an error.
pub async fn get(url: &str) -> Result<String> {
    Client::new(url)?.request_in_time(false).await
}

/// Prints the report; exit code 1 if a request failed.
pub fn run(args: ProbeArgs) -> Result<ExitCode> {
    let count = args.kept + args.fresh;
    let every = (0..count).map(|_| Client::new(&args.url)).collect::<Result<Vec<_>>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        let until = args.seconds.map(|s| Instant::now() + Duration::from_secs(s));
        let mut clients = tokio::task::JoinSet::new();
        for (n, client) in every.into_iter().enumerate() {
            clients.spawn(client.run(until, n < args.kept, Duration::from_millis(args.pause_ms)));
        }
        let mut all = Report::default();
        while let Some(one) = clients.join_next().await {
            all.add(one.unwrap_or_default());
        }
        all
    });
    crate::stdout::line(&serde_json::to_string(&report)?)?;
    Ok(ExitCode::from(u8::from(report.failed > 0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_server_that_accepts_and_never_answers_is_given_up() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        assert_eq!(get(&url).await.unwrap_err().to_string(), "no answer within 15s");
    }
}
