//! The way to the API server of the current KUBECONFIG, which every command takes first: one that does not answer is told of within
//! seconds, with its address and where that comes from.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use countersign_watch::in_words;
use k8s_openapi::apimachinery::pkg::version::Info;
use kube::config::{ExecInteractiveMode, Kubeconfig};
use kube::{Client, Config};

use crate::settings::Mistake;
use crate::settings::words::shown;

/// Longest wait for the first answer, and the part of it that passes in silence.
const FIRST_ANSWER: Duration = Duration::from_secs(10);
const SILENCE: Duration = Duration::from_secs(1);
/// Longest wait for credentials where somebody may have to log in.
const LOGIN: Duration = Duration::from_secs(120);
/// Where a pod has the token of its service account, and what is said of it.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
const SERVICE_ACCOUNT: &str = "the service account of this pod";

/// An API server that answers.
pub struct ApiServer {
    /// A client that asks again while the API server is busy.
    pub client: Client,
    /// One that takes 503 for an answer: a page that is not ready says why, and a client that asks again until it is would not
    /// read it.
    pub pages: Client,
    /// What it says of itself; `None` if this user may not ask.
    pub version: Option<Info>,
}

/// The API server, once it has answered. Errors: there is no usable KUBECONFIG, which has to be corrected; or no answer came.
pub async fn reach() -> Result<ApiServer> {
    reach_by(config().await?, &source()).await
}

/// A client of the API server, once it has answered.
pub async fn client() -> Result<Client> {
    Ok(reach().await?.client)
}

async fn config() -> Result<Config, Mistake> {
    let config = Config::infer().await;
    config.map_err(|e| Mistake(format!("there is no cluster to ask: {e}; set KUBECONFIG to a file that names one")))
}

/// The configuration of a command that can do without a cluster; `None` where none is set up. Error: one is, and what names it cannot
/// be used.
pub async fn configured() -> Result<Option<Config>, Mistake> {
    match Config::infer().await {
        Ok(config) => Ok(Some(config)),
        Err(error) => naming().map_or(Ok(None), |what| Err(Mistake(format!("{what}: {error}")))),
    }
}

/// What names a cluster on this machine, whether it can be used or not; `None` if nothing does.
fn naming() -> Option<String> {
    if std::env::var_os("KUBECONFIG").is_some_and(|paths| !paths.is_empty()) {
        return Some("KUBECONFIG".into());
    }
    let home = home_config().map(|path| shown(&path.display().to_string()));
    // A pod without a service account's token has no cluster either, although its environment names one.
    let is_account = || Path::new(ACCOUNT).exists() && std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    home.or_else(|| is_account().then(|| SERVICE_ACCOUNT.into()))
}

/// The file that kubectl reads where KUBECONFIG is not set, if it is there.
fn home_config() -> Option<PathBuf> {
    std::env::home_dir().map(|home| home.join(".kube/config")).filter(|path| path.is_file())
}

/// [`reach`] by a configuration; `source` says where it is from.
pub async fn reach_by(config: Config, source: &str) -> Result<ApiServer> {
    let whom = format!("the API server at {} ({source})", shown(config.cluster_url.to_string().trim_end_matches('/')));
    // A configuration is large.
    let (client, pages) = Box::pin(clients(config, &whom)).await?;
    let version = first_answer(&pages, &whom).await?;
    Ok(ApiServer { client, pages, version })
}

/// A client that asks again and one that does not. To make one, kube runs the program that KUBECONFIG names for credentials, and waits for
/// its end.
async fn clients(config: Config, whom: &str) -> Result<(Client, Client)> {
    let patience = if may_ask_a_person(&config) { LOGIN } else { FIRST_ANSWER };
    let mut once = config.clone();
    once.default_retry = false;
    let made = in_time(patience, whom, move || (Client::try_from(config), Client::try_from(once))).await?;
    let unusable =
        |e: kube::Error| Mistake(format!("{whom} cannot be asked: {}; see what KUBECONFIG says", in_words(&e)));
    Ok((made.0.map_err(unusable)?, made.1.map_err(unusable)?))
}

/// Whether credentials may come from a program that has somebody log in.
fn may_ask_a_person(config: &Config) -> bool {
    let exec = config.auth_info.exec.as_ref();
    exec.is_some_and(|exec| exec.interactive_mode != Some(ExecInteractiveMode::Never)) && std::io::stdin().is_terminal()
}

/// What `work` makes, which may block. What has not ended by then is left to the process's end.
async fn in_time<T: Send + 'static>(
    patience: Duration,
    whom: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let mut made = tokio::task::spawn_blocking(work);
    let mut outcome = tokio::time::timeout(SILENCE.min(patience), &mut made).await;
    if outcome.is_err() {
        eprintln!("waiting for the credentials for {whom}");
        outcome = tokio::time::timeout(patience.saturating_sub(SILENCE), made).await;
    }
    let late = || {
        anyhow!(
            "{whom} cannot be asked: the program that KUBECONFIG names for credentials has given none within {} s; see whether kubectl \
             version gets an answer, which runs it too",
            patience.as_secs()
        )
    };
    Ok(outcome.map_err(|_| late())??)
}

async fn first_answer(pages: &Client, whom: &str) -> Result<Option<Info>> {
    let mut asked = std::pin::pin!(pages.apiserver_version());
    let mut answer = tokio::time::timeout(SILENCE, asked.as_mut()).await;
    if answer.is_err() {
        eprintln!("waiting for {whom}");
        answer = tokio::time::timeout(FIRST_ANSWER.saturating_sub(SILENCE), asked).await;
    }
    match answer {
        Ok(Ok(version)) => Ok(Some(version)),
        // Who may do little may still do what the command is for.
        Ok(Err(kube::Error::Api(status))) if status.code == 403 => Ok(None),
        Ok(Err(error @ kube::Error::Api(_))) => {
            Err(anyhow!("{whom} answers: {}; see kubectl version, which asks the same", in_words(&error)))
        }
        Ok(Err(error)) => Err(unreached(whom, &in_words(&error))),
        Err(_) => Err(unreached(whom, &format!("no answer within {} s", FIRST_ANSWER.as_secs()))),
    }
}

fn unreached(whom: &str, why: &str) -> anyhow::Error {
    anyhow!("cannot reach {whom}: {why}; see whether it runs and this machine may reach it: kubectl get --raw /readyz")
}

/// Where the configuration is from, as kube looks for it.
pub fn source() -> String {
    let named = std::env::var("KUBECONFIG").ok().filter(|paths| !paths.is_empty());
    let file = named.map(|paths| format!("KUBECONFIG {}", shown(&paths)));
    let Some(file) = file.or_else(|| home_config().map(|path| path.display().to_string())) else {
        return SERVICE_ACCOUNT.into();
    };
    match Kubeconfig::read().ok().and_then(|config| config.current_context) {
        Some(context) => format!("{file}, context {}", shown(&context)),
        None => file,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    async fn asked(listener: &TcpListener) -> (String, Result<ApiServer>) {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let config = Config::new(url.parse().unwrap());
        (url, reach_by(config, "KUBECONFIG k, context c").await)
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_is_silent_is_named_within_seconds_and_is_no_mistake() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let began = tokio::time::Instant::now();
        let (url, answer) = asked(&listener).await;
        let why = answer.err().unwrap();
        assert_eq!(began.elapsed(), FIRST_ANSWER);
        let said = format!("cannot reach the API server at {url} (KUBECONFIG k, context c): no answer within 10 s; ");
        assert!(why.to_string().starts_with(&said), "{why}");
        assert!(why.downcast_ref::<Mistake>().is_none(), "it was tried: exit code 1");
    }

    #[test]
    fn a_program_for_credentials_that_hangs_holds_nobody_up() {
        let (release, held) = std::sync::mpsc::channel::<()>();
        let began = std::time::Instant::now();
        let patience = Duration::from_millis(50);
        let why = crate::operator::block(in_time(patience, "it", move || held.recv().is_ok())).unwrap_err().to_string();
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(why.starts_with("it cannot be asked: the program that KUBECONFIG names for credentials"), "{why}");
        drop(release);
        assert!(crate::operator::block(in_time(patience, "it", || true)).unwrap());
    }

    #[tokio::test]
    async fn one_that_refuses_is_named_at_once() {
        let mut listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
        drop(std::mem::replace(&mut listener, elsewhere));
        let why = reach_by(Config::new(url.parse().unwrap()), "x").await.err().unwrap().to_string();
        assert!(why.contains(&url) && why.to_lowercase().contains("connection refused"), "{why}");
    }

    #[tokio::test]
    async fn who_may_not_ask_for_the_version_has_reached_it_and_who_is_not_known_has_not() {
        use crate::kubernetes::check::fake_api::{client, refused};
        assert!(first_answer(&client(|_| refused(403, "no")), "it").await.unwrap().is_none());
        let why = first_answer(&client(|_| refused(401, "Unauthorized")), "it").await.unwrap_err().to_string();
        assert_eq!(why, "it answers: Unauthorized; see kubectl version, which asks the same");
    }
}
