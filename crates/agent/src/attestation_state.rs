//! Maintains the agent's own identity: attests at start, renews at half of the lifetime and when its authority is
//! tainted, and attests again when the server asks for it or no longer accepts the SVID.

use std::sync::Arc;
use std::time::Duration;

use countersign_api::backoff::Backoff;
use countersign_api::denied::Reason;
use countersign_identity::X509Svid;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::cache::{self, Cache};
use crate::link::{Link, LinkError};
use crate::refusal::Refusal;
use crate::renewal;

/// Interval between two checks of the clock, so that a jump of the clock is noticed.
const LOOK: Duration = Duration::from_secs(1);

/// Runs until `shutdown`. `refusals` receives the server's refusals from other calls.
pub async fn keep(link: Arc<Link>, cache: Arc<Cache>, refusals: mpsc::Receiver<Refusal>, shutdown: CancellationToken) {
    let disk = Backoff::new(Duration::from_millis(250), Duration::from_secs(60));
    let state = State {
        link,
        cache,
        refusals,
        jitter: draw(),
        obtained: OffsetDateTime::UNIX_EPOCH,
        refused: false,
        expired: false,
        banned: false,
        pauses: Pauses::default(),
        disk: Disk { backoff: disk, next: Instant::now() },
    };
    tokio::select! {
        () = state.follow() => {}
        () = shutdown.cancelled() => {}
    }
}

struct State {
    link: Arc<Link>,
    cache: Arc<Cache>,
    refusals: mpsc::Receiver<Refusal>,
    jitter: f64,
    /// When the SVID was obtained; 1970 for one of an earlier run, which was signed long ago.
    obtained: OffsetDateTime,
    /// Whether the server rejects our SVID. It is kept until there is another one.
    refused: bool,
    /// It has been said that the SVID has expired.
    expired: bool,
    /// The server has banned this agent; what is on disk is no way back.
    banned: bool,
    pauses: Pauses,
    disk: Disk,
}

/// Pauses after attempts that failed.
struct Pauses {
    failed: Backoff,
    /// After answers that the server has no room now. They say nothing about us, and others may be the cause of them: whoever
    /// waits ever longer is never there when there is room.
    busy: Backoff,
}

impl Default for Pauses {
    fn default() -> Self {
        let from = |first, most| Backoff::new(Duration::from_millis(first), Duration::from_millis(most));
        Self { failed: from(250, 30_000), busy: from(500, 2_000) }
    }
}

impl Pauses {
    fn after(&mut self, error: &LinkError) -> Duration {
        match error {
            LinkError::Server(status) if status.code() == Code::ResourceExhausted => self.busy.next_delay(),
            _ => self.failed.next_delay(),
        }
    }

    fn reset(&mut self) {
        self.failed.reset();
        self.busy.reset();
    }
}

/// Retries of writing to disk.
struct Disk {
    backoff: Backoff,
    next: Instant,
}

/// The step that is due now.
enum Due {
    Nothing,
    Attest,
    Renew,
}

impl State {
    async fn follow(mut self) {
        loop {
            self.write_pending();
            let result = match self.due() {
                Due::Nothing => {
                    tokio::select! {
                        () = tokio::time::sleep(LOOK) => {}
                        refusal = self.refusals.recv() => match refusal {
                            Some(refusal) => self.heed(refusal),
                            None => return,
                        },
                    }
                    continue;
                }
                Due::Attest => self.link.attest().await.inspect(|svid| tracing::info!(agent = %svid.id(), "attested")),
                Due::Renew => self.link.renew().await.inspect(|svid| {
                    tracing::info!(serial = svid.facts().serial, until = %svid.facts().not_after, "agent SVID renewed");
                }),
            };
            match result {
                Ok(_) => self.succeeded(),
                Err(error) => self.failed(&error).await,
            }
        }
    }

    fn due(&mut self) -> Due {
        let identity = self.link.identity().borrow().clone();
        let Some(svid) = identity else {
            // Nothing is left but what is on disk, and by now the clock may tell another time.
            return if !self.banned && !self.link.can_attest() && self.link.recover() {
                Due::Renew
            } else {
                Due::Attest
            };
        };
        let now = self.link.now();
        if svid.is_expired(now) {
            let expired_at = svid.facts().not_after;
            if self.link.can_attest() {
                tracing::error!(agent = %svid.id(), %expired_at, "the agent's own SVID has expired; attesting again");
                self.link.forget();
                return Due::Attest;
            }
            // It is no use now, and the only one that there is: a clock that has jumped ahead may come back.
            if !std::mem::replace(&mut self.expired, true) {
                tracing::error!(
                    agent = %svid.id(), %expired_at,
                    "the agent's own SVID has expired, and a join token works once. Unless this machine's clock is wrong, make a token (`countersign token generate`), put it into the --join-token-file, and restart the agent"
                );
            }
            return Due::Nothing;
        }
        self.expired = false;
        if self.refused && self.link.can_attest() {
            return Due::Attest;
        }
        if self.renewal_is_due(&svid, now) { Due::Renew } else { Due::Nothing }
    }

    fn renewal_is_due(&self, svid: &X509Svid, now: OffsetDateTime) -> bool {
        renewal::is_due(svid, self.obtained, self.jitter, self.link.bundle().as_deref(), now)
    }

    fn succeeded(&mut self) {
        self.pauses.reset();
        self.jitter = draw();
        self.obtained = self.link.now();
        self.refused = false;
        self.banned = false;
        // What was said of the SVID before does not hold for this one.
        while self.refusals.try_recv().is_ok() {}
    }

    async fn failed(&mut self, error: &LinkError) {
        let delay = self.pauses.after(error);
        tracing::error!(%error, "cannot prove this node to the server; trying again in {delay:.1?}");
        if let Some(refusal) = error.refusal() {
            self.heed(refusal);
        }
        self.link.look_at_given();
        tokio::time::sleep(delay).await;
    }

    /// Reacts to a refusal of the server.
    fn heed(&mut self, refusal: Refusal) {
        match refusal {
            Refusal::Agent(Reason::AgentBanned) => {
                tracing::error!("this agent is banned: its workloads' identities are withdrawn");
                self.banned = true;
                // No stream begins without an identity, and what older streams say is not taken up after the withdrawal.
                self.link.forget();
                // At once: workloads of a banned node must not keep an identity until it expires.
                self.cache.change(cache::State::withdraw);
            }
            Refusal::Agent(
                reason @ (Reason::AgentExpired
                | Reason::AgentNotAttested
                | Reason::AgentNotActive
                | Reason::AgentMustReattest),
            ) => {
                tracing::warn!(?reason, "the server asks this agent to attest again");
                if self.link.can_attest() {
                    self.link.forget();
                } else {
                    // There is no other one to come, and the server's clock may have been wrong.
                    self.svid_refused();
                }
            }
            Refusal::Agent(Reason::Unknown) => {}
            Refusal::Svid => self.svid_refused(),
        }
    }

    /// Keeps the SVID until there is another one: the next server that is reached may accept it.
    fn svid_refused(&mut self) {
        if self.refused || self.link.identity().borrow().is_none() {
            return;
        }
        self.refused = true;
        if self.link.can_attest() {
            tracing::warn!("the server does not accept this agent's SVID; attesting again");
        } else {
            tracing::error!(
                "the server does not accept this agent's SVID, and a join token works once: workloads are served from memory until their SVIDs end. Make a token (`countersign token generate`), put it into the --join-token-file, and restart the agent"
            );
        }
    }

    fn write_pending(&mut self) {
        if self.disk.next <= Instant::now() && self.link.keeper().unsaved().is_some() {
            if self.link.keeper().write_pending() {
                self.disk.backoff.reset();
            }
            self.disk.next = Instant::now() + self.disk.backoff.next_delay();
        }
    }
}

fn draw() -> f64 {
    rand::random_range(-1.0..=1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Status;

    #[test]
    fn an_agent_that_is_told_to_wait_does_not_wait_ever_longer() {
        let mut pauses = Pauses::default();
        let (busy, down): (LinkError, LinkError) =
            (Status::resource_exhausted("wait").into(), Status::unavailable("down").into());
        assert!((0..100).all(|_| pauses.after(&busy) <= Duration::from_secs(2)));
        assert!(pauses.after(&down) <= Duration::from_millis(250), "it has not counted as a failure");
        assert!((0..10).map(|_| pauses.after(&down)).any(|pause| pause >= Duration::from_secs(15)));
        pauses.reset();
        assert!(pauses.after(&down) <= Duration::from_millis(250));
    }
}
