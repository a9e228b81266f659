//! Has the node prove this pod's redirect, and let this sidecar's own connections pass it.
//!
//! Where the node's CNI component installs the redirect, the sidecar, which holds up the pod's other containers, is not ready before the
//! component has found one in force by the kernel's word.
//!
//! Where a pod's redirect tells the sidecar by its cgroup, nothing of the sidecar's user leaves the pod until the node's CNI
//! component has admitted the sidecar's container. The sidecar asks for that when it starts and is not ready before; it goes on
//! asking, because a redirect that is installed again has to be told again.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::push::AdmitRequest;
use countersign_api::push::sidecar_admission_client::SidecarAdmissionClient;
use countersign_api::transport::unix_channel;
use countersign_identity::shown::sentence;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Longest wait for an answer. The component waits for the API server for five seconds.
const ANSWER: Duration = Duration::from_secs(10);
/// First and longest pause between two questions without success.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// Pause between two questions once the answer is known.
const AGAIN: Duration = Duration::from_secs(60);
/// Longest reason that is shown, in characters.
const MAX_REASON: usize = 300;

/// Whom to ask, and for which pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asking {
    /// Unix socket of the node's CNI component.
    pub socket: PathBuf,
    /// Namespace of this pod.
    pub namespace: String,
    /// Name of this pod.
    pub pod: String,
    /// Whether the component also has to say that the pod's redirect is in force.
    pub proves_redirect: bool,
}

/// Whether this sidecar's own connections pass.
pub struct Exemption {
    missing: watch::Sender<Option<String>>,
    /// The last answer that did not confirm what was confirmed before.
    doubt: Mutex<Option<String>>,
}

impl Exemption {
    /// `asked`: whether somebody has to be asked; otherwise connections pass.
    pub fn new(asked: bool) -> Self {
        let missing = asked.then(|| "the node's CNI component has not been asked yet".to_owned());
        Self { missing: watch::Sender::new(missing), doubt: Mutex::default() }
    }

    /// Why connections do not pass yet; `None` once they do.
    pub fn missing(&self) -> Option<String> {
        let why = self.missing.borrow();
        why.as_ref().map(|why| format!("the node does not let this sidecar's connections pass yet: {why}"))
    }

    /// Tells of changes of [`Self::missing`].
    pub fn changes(&self) -> watch::Receiver<Option<String>> {
        self.missing.subscribe()
    }

    /// Asks until `end`.
    pub async fn run(self: Arc<Self>, asking: Asking, end: CancellationToken) {
        let mut pauses = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let asked = tokio::select! {
                asked = ask(&asking) => asked,
                () = end.cancelled() => return,
            };
            let pause = match asked {
                Ok(by_cgroup) => {
                    self.admitted(by_cgroup);
                    pauses.reset();
                    AGAIN
                }
                Err(why) => {
                    self.failed(&why);
                    pauses.next_delay()
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = end.cancelled() => return,
            }
        }
    }

    fn admitted(&self, by_cgroup: bool) {
        if self.missing.send_if_modified(|why| why.take().is_some()) {
            tracing::info!(by_cgroup, "this sidecar's connections pass the redirect");
        } else if self.doubt().take().is_some() {
            tracing::info!(by_cgroup, "the node's CNI component confirms the redirect again");
        }
    }

    fn doubt(&self) -> MutexGuard<'_, Option<String>> {
        self.doubt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A failure after a success is said and changes nothing: the app runs.
    fn failed(&self, why: &str) {
        if self.missing.borrow().is_none() {
            let mut doubt = self.doubt();
            if doubt.as_deref() != Some(why) {
                tracing::warn!(why, "the node's CNI component does not confirm this pod's redirect any more");
                *doubt = Some(why.to_owned());
            }
            return;
        }
        let is_new = self.missing.send_if_modified(|before| match before {
            Some(before) if before != why => {
                why.clone_into(before);
                true
            }
            _ => false,
        });
        if is_new {
            tracing::warn!(why, "this sidecar's connections do not pass the redirect yet");
        }
    }
}

/// Whether the component knows this sidecar by its cgroup now; otherwise the redirect knows it by its user ID.
async fn ask(asking: &Asking) -> Result<bool, String> {
    let Asking { socket, namespace, pod, proves_redirect } = asking.clone();
    let mut client = SidecarAdmissionClient::new(unix_channel(socket));
    let asked = client.admit(AdmitRequest { namespace, name: pod });
    let answered = tokio::time::timeout(ANSWER, asked).await;
    let answered = answered.map_err(|_| format!("no answer within {} s", ANSWER.as_secs()))?;
    let answer = answered.map_err(|s| sentence(s.message(), MAX_REASON).to_string())?.into_inner();
    if proves_redirect && !answer.in_force {
        return Err(
            "the component is older than this sidecar, and does not say whether the redirect is in force".into()
        );
    }
    Ok(answer.by_cgroup)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_pass_once_the_node_has_said_so_and_stay_so() {
        assert_eq!(Exemption::new(false).missing(), None, "nobody has to be asked");
        let exemption = Exemption::new(true);
        let mut changes = exemption.changes();
        assert!(exemption.missing().unwrap().contains("has not been asked yet"));
        exemption.failed("not found");
        assert!(changes.has_changed().unwrap() && exemption.missing().unwrap().ends_with("not found"));
        changes.mark_unchanged();
        exemption.failed("not found");
        assert!(!changes.has_changed().unwrap(), "said once");
        exemption.admitted(true);
        assert!(changes.has_changed().unwrap() && exemption.missing().is_none());
        exemption.failed("the component is away");
        assert_eq!(exemption.missing(), None);
        assert_eq!(exemption.doubt().as_deref(), Some("the component is away"));
        exemption.admitted(true);
        assert!(exemption.doubt().is_none() && exemption.missing().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_component_that_is_not_there_is_asked_again_until_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let asking = Asking {
            socket: dir.path().join("none.sock"),
            namespace: "shop".into(),
            pod: "web-0".into(),
            proves_redirect: true,
        };
        let (exemption, end) = (Arc::new(Exemption::new(true)), CancellationToken::new());
        let running = tokio::spawn(exemption.clone().run(asking, end.clone()));
        let mut changes = exemption.changes();
        changes.changed().await.unwrap();
        assert!(exemption.missing().is_some());
        end.cancel();
        running.await.unwrap();
    }
}
