//! Runs checks: several at once, each within a deadline, all of them within another one, with progress on a terminal.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt};
use tokio::time::Instant;

use super::finding::{Fault, Finding, Outcome};

/// Checks that run at once.
const AT_ONCE: usize = 8;
/// Longest time of one check, and of all of them. A check of many nodes asks several of them at once.
const EACH: Duration = Duration::from_secs(30);
const ALL: Duration = Duration::from_secs(90);

/// A check that has not been made yet. It may come to several findings.
pub struct Check<'a> {
    name: &'static str,
    work: BoxFuture<'a, Vec<Outcome>>,
}

impl<'a> Check<'a> {
    /// A check with one finding.
    pub fn one(name: &'static str, work: impl Future<Output = Outcome> + Send + 'a) -> Self {
        Self { name, work: Box::pin(async { vec![work.await] }) }
    }

    /// A check with several findings.
    pub fn several(name: &'static str, work: impl Future<Output = Vec<Outcome>> + Send + 'a) -> Self {
        Self { name, work: Box::pin(work) }
    }
}

/// Makes all checks. The findings are in the order of the checks.
pub async fn make(checks: Vec<Check<'_>>, shows_progress: bool) -> Vec<Finding> {
    let (end, total) = (Instant::now() + ALL, checks.len());
    let made = stream::iter(checks).map(|check| async move {
        let until = end.min(Instant::now() + EACH);
        let outcomes = tokio::time::timeout_at(until, check.work).await.unwrap_or_else(|_| vec![Err(late())]);
        (check.name, outcomes)
    });
    let (mut made, mut findings, mut progress) = (made.buffered(AT_ONCE), vec![], Progress::of(total, shows_progress));
    while let Some((check, outcomes)) = made.next().await {
        progress.one_more(check);
        findings.extend(outcomes.into_iter().map(|outcome| Finding { check, outcome }));
    }
    findings
}

fn late() -> Fault {
    let mend = "see whether the API server answers: kubectl get --raw /readyz";
    Fault::unchecked("no answer in time", mend)
}

/// One line on a terminal that is overwritten and goes at the end.
struct Progress {
    shows: bool,
    done: usize,
    total: usize,
}

impl Progress {
    fn of(total: usize, shows: bool) -> Self {
        Self { shows: shows && std::io::stderr().is_terminal(), done: 0, total }
    }

    fn one_more(&mut self, name: &str) {
        self.done += 1;
        self.put(&format!("{} of {}: {name}", self.done, self.total));
    }

    fn put(&self, text: &str) {
        if self.shows {
            // A terminal that does not take it has no reader either.
            let _ = write!(std::io::stderr(), "\r\x1b[K{text}").and_then(|()| std::io::stderr().flush());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.put("");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_check_that_never_ends_holds_up_no_other_and_the_order_stays() {
        let fine = |text: &'static str| async move { Ok(text.to_owned()) };
        let mut checks = vec![Check::one("stuck", std::future::pending()), Check::one("a", fine("1"))];
        checks.push(Check::several("b", async { vec![Ok("2".into()), Err(Fault::new("3", "4"))] }));
        let began = Instant::now();
        let found = make(checks, false).await;
        assert_eq!(began.elapsed(), EACH);
        let names: Vec<_> = found.iter().map(|f| f.check).collect();
        assert_eq!(names, ["stuck", "a", "b", "b"]);
        assert!(found[0].outcome.as_ref().is_err_and(|fault| !fault.is_checked && fault.found == "no answer in time"));
        assert_eq!(found[1].outcome, Ok("1".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn all_of_them_together_have_a_deadline_too() {
        let checks = (0..100).map(|_| Check::one("stuck", std::future::pending())).collect();
        let began = Instant::now();
        let found = make(checks, false).await;
        assert_eq!((found.len(), began.elapsed()), (100, ALL));
    }
}
