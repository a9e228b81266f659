//! The processes of a mesh: started through `launch`, each with a log, restarted when a role ends, and stopped in
//! order.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{PipeReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_api::backoff::Backoff;
use countersign_redirect::netns::NetNs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::account::Account;
use super::events::Events;
use super::leftovers::{Belonging, Mounts};
use super::mesh_file::Restart;
use super::rotate::Log;
use crate::launch::OWN_PROGRAM;
use crate::settings::words::{duration, shown};

/// How long a process may take to end after SIGTERM.
pub const GRACE: Duration = Duration::from_secs(5);

/// Longest start of a program: it only enters namespaces and changes the user.
const START: Duration = Duration::from_secs(10);
/// Longest reason of a failed start, in bytes.
const MAX_REPORT_BYTES: u64 = 8 * 1024;

/// A program to start.
#[derive(Clone)]
pub struct Program {
    /// Name for messages and for its log.
    pub name: String,
    /// Network namespace; `None` for our own.
    pub netns: Option<NetNs>,
    /// File to mount over /etc/hosts; `None` for none.
    pub hosts: Option<PathBuf>,
    /// Folder with tables to mount over /etc/passwd and /etc/group; `None` for none.
    pub accounts: Option<PathBuf>,
    /// User and groups that it runs as.
    pub account: Account,
    /// Whether it can never gain privileges.
    pub no_new_privs: bool,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Environment variables, in addition to a small default environment.
    pub env: BTreeMap<String, String>,
    /// Working directory; `None` for our own.
    pub workdir: Option<PathBuf>,
    /// What to do when it ends unexpectedly.
    pub restart: Restart,
    /// What belongs to it and ends before it is restarted; `None` for a role, which has no children.
    pub belonging: Option<Belonging>,
    /// Log of the mesh's events.
    pub events: Events,
}

/// State of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It runs with this process ID.
    Running(u32),
    /// It has ended.
    Ended(End),
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Description in words, such as `ended with code 3`.
    pub how: String,
    /// Whether it was stopped by us, or ended with code 0.
    pub good: bool,
    /// Time of day when it ended (UTC).
    pub at: String,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.how, self.at)
    }
}

/// A supervised process.
pub struct Process {
    log: Log,
    restarts: Arc<AtomicU32>,
    stop: Arc<Notify>,
    state: watch::Receiver<State>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

impl Program {
    /// Starts it, and waits until it runs or the reason is known why it cannot.
    async fn start(&self, log: &Log) -> Result<Child> {
        let (child, report) = self.spawn(log)?;
        let mut why = String::new();
        let mut report =
            pipe::Receiver::from_owned_fd(report.into()).context("cannot wait for the start")?.take(MAX_REPORT_BYTES);
        match tokio::time::timeout(START, report.read_to_string(&mut why)).await {
            Ok(Ok(_)) if why.is_empty() => Ok(child),
            Ok(Ok(_)) => Err(anyhow!(why)),
            Ok(Err(error)) => Err(error).context("cannot wait for the start"),
            Err(_) => Err(anyhow!("it was not started within {START:?}")),
        }
    }

    fn spawn(&self, log: &Log) -> Result<(Child, PipeReader)> {
        let (report, reporter) = std::io::pipe().context("cannot make a pipe")?;
        let file = log.open().with_context(|| format!("cannot open the log {}", log.display()))?;
        // Not by its path: it may have been replaced since, or lie where only root may go.
        let mut command = Command::new(OWN_PROGRAM);
        command.arg0("countersign");
        command.arg("launch").arg("--report").args([
            "--uid",
            &self.account.uid.to_string(),
            "--gid",
            &self.account.gid.to_string(),
        ]);
        command.args(["--parent", &std::process::id().to_string()]);
        if !self.account.groups.is_empty() {
            let groups: Vec<String> = self.account.groups.iter().map(ToString::to_string).collect();
            command.args(["--groups", &groups.join(",")]);
        }
        if let Some(netns) = &self.netns {
            command.arg("--netns").arg(netns.path());
        }
        if let Some(hosts) = &self.hosts {
            command.arg("--hosts").arg(hosts);
        }
        if let Some(accounts) = &self.accounts {
            command.arg("--accounts").arg(accounts);
        }
        if self.no_new_privs {
            command.arg("--no-new-privs");
        }
        if let Some(workdir) = &self.workdir {
            command.arg("--workdir").arg(workdir);
        }
        command.arg("--").args(&self.command).env_clear().envs(small_environment()).envs(&self.env);
        command.stdin(Stdio::from(reporter)).stdout(file.try_clone()?).stderr(file);
        // In its own process group, so that Ctrl-C reaches only us, and we stop the processes in order.
        command.process_group(0).kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("cannot start {}", self.name))?;
        Ok((child, report))
    }
}

/// The default environment of every program.
fn small_environment() -> impl Iterator<Item = (String, String)> {
    ["PATH", "LANG", "TZ", "RUST_BACKTRACE", "COUNTERSIGN_LOG"]
        .into_iter()
        .filter_map(|k| Some((k.to_owned(), std::env::var(k).ok()?)))
}

impl Process {
    /// Starts a program and supervises it.
    pub async fn start(program: Program, log: PathBuf) -> Result<Self> {
        let log = Log::at(log);
        let child = program.start(&log).await?;
        let (tx, state) = watch::channel(State::Running(child.id().unwrap_or(0)));
        let stop = Arc::new(Notify::new());
        let restarts = Arc::<AtomicU32>::default();
        let watcher = tokio::spawn(watch_over(program, log.clone(), child, tx, stop.clone(), restarts.clone()));
        Ok(Self { log, restarts, stop, state, watcher: Mutex::new(Some(watcher)) })
    }

    /// Its log.
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Number of restarts so far.
    pub fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// The current state.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Stops the process: SIGTERM, then SIGKILL.
    pub async fn stop(&self) {
        self.stop.notify_one();
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(watcher) = watcher {
            let _ = watcher.await;
        }
    }

    /// Polls until a condition is true. Fails if the process ends first.
    pub async fn wait_until(
        &self,
        what: &str,
        patience: Duration,
        mut is_true: impl AsyncFnMut() -> bool,
    ) -> Result<()> {
        let wait = async {
            loop {
                if is_true().await {
                    return Ok(());
                }
                if let State::Ended(end) = self.state() {
                    return Err(anyhow!("{} before {what}", end.how));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(patience, wait).await.unwrap_or_else(|_| Err(anyhow!("waited {patience:?} for {what}")))
    }
}

async fn watch_over(
    program: Program,
    log: Log,
    mut child: Child,
    state: watch::Sender<State>,
    stop: Arc<Notify>,
    restarts: Arc<AtomicU32>,
) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));
    loop {
        let began = tokio::time::Instant::now();
        let mounts = child.id().and_then(Mounts::of);
        tokio::select! {
            ended = child.wait() => {
                let good = ended.as_ref().is_ok_and(ExitStatus::success);
                let how = ended.map_or_else(|e| e.to_string(), described);
                state.send_replace(State::Ended(End { how: how.clone(), good, at: now() }));
                let again = match program.restart {
                    Restart::No => false,
                    Restart::OnFailure => !good,
                    Restart::Always => true,
                };
                let lived = duration(began.elapsed().as_secs());
                // The reason is at the end of the log, where it would not be noticed.
                let why = if good { String::new() } else { last_words(&log) };
                if !again {
                    let event = format!("{}: {how} after {lived}{why}", program.name);
                    if good { program.events.mention(&event) } else { program.events.record(&event) }
                    return;
                }
                if began.elapsed() > Duration::from_secs(10) {
                    backoff.reset();
                }
                let delay = backoff.next_delay();
                program.events.record(&format!("{}: {how} after {lived}; starting it again in {delay:.1?}{why}", program.name));
                let failed = |why: &str| {
                    let how = format!("cannot be started again: {why}");
                    program.events.record(&format!("{}: {how}; trying on", program.name));
                    state.send_replace(State::Ended(End { how, good: false, at: now() }));
                };
                let again = async {
                    end_leftovers(&program, mounts.as_ref()).await;
                    start_again(|| program.start(&log), delay, &mut backoff, failed).await
                };
                tokio::select! {
                    again = again => child = again,
                    () = stop.notified() => return,
                }
                restarts.fetch_add(1, Ordering::Relaxed);
                state.send_replace(State::Running(child.id().unwrap_or(0)));
            }
            () = stop.notified() => {
                terminate(&mut child).await;
                state.send_replace(State::Ended(End { how: "was stopped".into(), good: true, at: now() }));
                return;
            }
        }
    }
}

/// Ends what a program has left behind: it may hold the ports that the next start needs.
async fn end_leftovers(program: &Program, mounts: Option<&Mounts>) {
    let Some(belonging) = &program.belonging else { return };
    match belonging.end(mounts).await {
        0 => {}
        1 => program.events.record(&format!("{}: a process that it left was ended", program.name)),
        n => program.events.record(&format!("{}: {n} processes that it left were ended", program.name)),
    }
}

/// Starts something after `delay`, and again and again until it starts: what hinders it, no memory or a full disk, may pass.
/// `failed` hears of each reason that is not the one before.
async fn start_again<T, F: Future<Output = Result<T>>>(
    mut start: impl FnMut() -> F,
    mut delay: Duration,
    backoff: &mut Backoff,
    failed: impl Fn(&str),
) -> T {
    let mut before = String::new();
    loop {
        tokio::time::sleep(delay).await;
        match start().await {
            Ok(started) => return started,
            Err(error) => {
                let why = format!("{error:#}");
                if why != before {
                    failed(&why);
                    before = why;
                }
                delay = backoff.next_delay();
            }
        }
    }
}

async fn terminate(child: &mut Child) {
    let Some(pid) = child.id().and_then(|p| i32::try_from(p).ok()) else { return };
    // The whole group, because a program may have children.
    let group = Pid::from_raw(-pid);
    let _ = kill(group, Signal::SIGTERM);
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        let _ = kill(group, Signal::SIGKILL);
        let _ = child.wait().await;
    }
    let _ = kill(group, Signal::SIGKILL);
}

fn described(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        _ => "ended".into(),
    }
}

/// The current time of day (UTC).
fn now() -> String {
    let (h, m, s) = time::OffsetDateTime::now_utc().to_hms();
    format!("{h:02}:{m:02}:{s:02}Z")
}

/// The last line of a log, for an event.
fn last_words(log: &Path) -> String {
    let line = last_lines(log, 1);
    if line.is_empty() { line } else { format!("; its log ends: {}", shown(&line)) }
}

/// The last lines of a log, for an error message.
pub fn last_lines(log: &Path, count: usize) -> String {
    let text = last_bytes(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// The end of a log, which may be too large to read completely.
fn last_bytes(log: &Path) -> std::io::Result<String> {
    const MOST: u64 = 64 * 1024;
    let mut file = File::open(log)?;
    let start = file.metadata()?.len().saturating_sub(MOST);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = vec![];
    file.take(MOST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Why a role ended: the line that our `main` prints, or the last line of its log.
pub fn cause_of_end(log: &Path) -> String {
    let end = last_lines(log, 20);
    let said = end.lines().rev().find_map(|line| line.strip_prefix("countersign: "));
    said.map_or_else(|| format!("its log ends: {}", last_lines(log, 1)), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_started_again_is_tried_on_and_each_reason_is_told_once() {
        let (tries, told) = (Cell::new(0), RefCell::new(vec![]));
        let start = || {
            tries.set(tries.get() + 1);
            std::future::ready(match tries.get() {
                1..4 => Err(anyhow!("no memory")),
                4..6 => Err(anyhow!("the disk is full")),
                _ => Ok("running"),
            })
        };
        let most = Duration::from_secs(5);
        let mut backoff = Backoff::new(Duration::from_millis(50), most);
        let began = tokio::time::Instant::now();
        let failed = |why: &str| told.borrow_mut().push(why.to_owned());
        let started = start_again(start, Duration::from_millis(50), &mut backoff, failed).await;
        assert_eq!((started, tries.get()), ("running", 6));
        assert_eq!(*told.borrow(), ["no memory", "the disk is full"]);
        assert!(began.elapsed() >= Duration::from_millis(50) && began.elapsed() < 6 * most, "{:?}", began.elapsed());
    }
}
