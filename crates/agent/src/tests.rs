//! The agent with a server that misbehaves, or on a machine that does.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use countersign_api::clock::{Clock, system_clock};
use countersign_api::denied::Reason;
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::config::Config;
use crate::link::Link;
use crate::node_attestor::{K8sPsat, NodeAttestor};
use crate::testing::{Ca, FakeServer, config, entry, eventually, join_token, td};
use crate::{AgentError, attestation_state, metrics, signing, sync};

const fn secs(s: u64) -> Duration {
    Duration::from_secs(s)
}

/// The parts of an agent that talk to its server.
struct Agent {
    link: Arc<Link>,
    cache: Arc<Cache>,
    tasks: Vec<JoinHandle<()>>,
    shutdown: CancellationToken,
}

impl Agent {
    fn start(dir: &Path, server: &FakeServer, attestor: Arc<dyn NodeAttestor>) -> Self {
        Self::start_by(system_clock(), config(dir, server.address.clone(), &server.bundle(), attestor))
    }

    fn start_by(clock: Clock, config: Config) -> Self {
        let config = Arc::new(config);
        let link = Arc::new(Link::new(config.clone(), clock).unwrap());
        let (cache, shutdown) = (Arc::<Cache>::default(), CancellationToken::new());
        let (refusals, heard) = tokio::sync::mpsc::channel(4);
        let sync = sync::Sync {
            link: link.clone(),
            cache: cache.clone(),
            refusals: refusals.clone(),
            interval: secs(1),
            trust_domain: td(),
        };
        let signing = signing::Signing {
            link: link.clone(),
            cache: cache.clone(),
            refusals,
            key_type: config.key_type.clone(),
            metrics: Arc::<metrics::Metrics>::default(),
        };
        let tasks = vec![
            tokio::spawn(attestation_state::keep(link.clone(), cache.clone(), heard, shutdown.clone())),
            tokio::spawn(sync.run(shutdown.clone())),
            tokio::spawn(signing.run(shutdown.clone())),
        ];
        Self { link, cache, tasks, shutdown }
    }

    /// The ID of the authority above its own SVID, once it has one.
    async fn authority(&self) -> String {
        eventually("the agent's identity", || {
            self.link.identity().borrow().as_ref().map(|svid| svid.facts().authority_id.clone())
        })
        .await
    }

    /// Its stream stands: what the server pushes from now on comes, whatever authority new connections show.
    async fn hears(&self) {
        eventually("the first push", || self.cache.read().synced.then_some(())).await;
    }

    async fn comes_under(&self, ca: &str) {
        eventually("an SVID of the other authority", || {
            self.link.identity().borrow().as_ref().filter(|s| s.facts().authority_id == ca).map(drop)
        })
        .await;
    }

    fn signed(&self) -> usize {
        self.cache.read().entries.values().filter(|c| c.svid.is_some()).count()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

/// Evidence that can be used again: the fake server does not check it.
fn again(dir: &Path) -> Arc<dyn NodeAttestor> {
    let file = dir.join("psat");
    std::fs::write(&file, "a token").unwrap();
    Arc::new(K8sPsat::new("test".into(), file))
}

#[tokio::test]
async fn an_agent_renews_its_own_svid_when_its_authority_is_tainted() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    let agent = Agent::start(dir.path(), &server, join_token());
    let first = agent.authority().await;
    agent.hears().await;
    let next = Ca::new(OffsetDateTime::now_utc());
    let second = next.bundle().authorities[0].id().to_owned();
    let mut both = server.next_authority(next);
    // Half of its lifetime is far away: without the taint nothing happens.
    server.push(vec![], both.clone());
    tokio::time::sleep(secs(3)).await;
    assert_eq!(agent.authority().await, first);
    both.authorities.iter_mut().filter(|a| a.id() == first).for_each(|a| a.tainted = true);
    server.push(vec![], both);
    agent.comes_under(&second).await;
    assert_eq!(server.agent_signatures(), (1, 1), "once is enough");
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_whose_svid_is_refused_attests_again_and_goes_on_serving() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    server.push(vec![entry("a", 1)], server.bundle());
    let agent = Agent::start(dir.path(), &server, again(dir.path()));
    agent.authority().await;
    eventually("an SVID", || (agent.signed() == 1).then_some(())).await;
    agent.stop().await;
    // While it is away, its authority is replaced and revoked; it returns with an SVID that no server accepts.
    let next = Ca::new(OffsetDateTime::now_utc());
    let second = next.bundle().authorities[0].id().to_owned();
    let both = server.next_authority(next);
    server.revoke_others();
    server.push(vec![entry("a", 1)], server.bundle());
    std::fs::write(dir.path().join("agent/bundle.pem"), both.to_pem()).unwrap();
    let agent = Agent::start(dir.path(), &server, again(dir.path()));
    agent.comes_under(&second).await;
    eventually("an SVID", || (agent.signed() == 1).then_some(())).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_whose_svid_is_refused_and_whose_token_is_used_up_keeps_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    server.push(vec![entry("a", 1)], server.bundle());
    let agent = Agent::start(dir.path(), &server, join_token());
    let first = agent.authority().await;
    eventually("an SVID", || (agent.signed() == 1).then_some(())).await;
    let page = metrics::Metrics::default();
    page.observe(&agent.cache.read(), None, false);
    let page = countersign_api::http::Answer::metrics(&page.registry).text;
    assert!(page.contains("countersign_agent_svids 1\n"), "{page}");
    assert!(!page.contains("spiffe://"), "a stranger learns no identity: {page}");
    // Every new connection of the agent is now rejected; its one open stream ends with the new SVID that it requests.
    server.next_authority(Ca::new(OffsetDateTime::now_utc()));
    server.revoke_others();
    server.push(vec![entry("a", 1)], server.bundle());
    tokio::time::sleep(secs(9)).await;
    assert_eq!(agent.authority().await, first, "nobody on the way can make it forget who it is");
    assert_eq!(agent.signed(), 1, "its workloads are served from memory");
    assert_eq!(server.agent_signatures().0, 1, "a used token is not shown again");
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_is_banned_and_then_let_back_in_has_all_its_entries_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    server.push(vec![entry("a", 1), entry("b", 1)], server.bundle());
    let agent = Agent::start(dir.path(), &server, again(dir.path()));
    eventually("both SVIDs", || (agent.signed() == 2).then_some(())).await;
    server.deny(Some(Reason::AgentBanned));
    let withdrawn =
        || (agent.cache.read().entries.is_empty() && agent.link.identity().borrow().is_none()).then_some(());
    eventually("the withdrawal", withdrawn).await;
    // The ban is lifted; no entry has changed meanwhile.
    server.deny(None);
    eventually("both SVIDs once more", || (agent.signed() == 2).then_some(())).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_attests_under_another_id_asks_for_all_entries() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    let agent = Agent::start(dir.path(), &server, again(dir.path()));
    agent.hears().await;
    server.name_agents("/spire/agent/test/2");
    server.deny(Some(Reason::AgentNotAttested));
    eventually("the loss of its identity", || agent.link.identity().borrow().is_none().then_some(())).await;
    let before = server.watched_from().len();
    server.deny(None);
    let next = eventually("the next stream", || server.watched_from().get(before).cloned()).await;
    assert_eq!(next, (String::new(), 0));
    agent.stop().await;
}

/// A clock that is ahead by so many hours.
fn shifted(hours: &Arc<AtomicI64>) -> Clock {
    let hours = hours.clone();
    Arc::new(move || OffsetDateTime::now_utc() + time::Duration::hours(hours.load(Ordering::Relaxed)))
}

#[tokio::test]
async fn a_clock_that_jumps_ahead_for_a_moment_costs_an_agent_with_a_join_token_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    server.push(vec![entry("a", 1)], server.bundle());
    let ahead = Arc::new(AtomicI64::new(0));
    let settings = || config(dir.path(), server.address.clone(), &server.bundle(), join_token());
    let agent = Agent::start_by(shifted(&ahead), settings());
    let first = agent.authority().await;
    eventually("an SVID", || (agent.signed() == 1).then_some(())).await;
    ahead.store(2, Ordering::Relaxed);
    tokio::time::sleep(secs(3)).await;
    ahead.store(0, Ordering::Relaxed);
    server.push(vec![entry("a", 1), entry("b", 1)], server.bundle());
    eventually("another SVID", || (agent.signed() == 2).then_some(())).await;
    assert_eq!((agent.authority().await, server.agent_signatures().0), (first, 1), "a used token is not shown again");
    agent.stop().await;
    // Nor does a start in such a moment, once the clock is right again.
    ahead.store(2, Ordering::Relaxed);
    let link = Link::new(Arc::new(settings()), shifted(&ahead)).unwrap();
    assert!(link.identity().borrow().is_none() && !link.recover());
    ahead.store(0, Ordering::Relaxed);
    assert!(link.recover() && link.identity().borrow().is_some());
}

#[tokio::test]
async fn an_agent_that_was_away_knows_its_server_by_what_it_kept_and_by_a_file_that_has_changed_since() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    let old = server.bundle();
    let agent = Agent::start(dir.path(), &server, again(dir.path()));
    let first = agent.authority().await;
    agent.hears().await;
    let next = Ca::new(OffsetDateTime::now_utc());
    let second = next.bundle().authorities[0].id().to_owned();
    let both = server.next_authority(next);
    server.push(vec![], both);
    let kept = dir.path().join("agent/bundle.pem");
    eventually("the kept bundle", || std::fs::read_to_string(&kept).ok().filter(|t| t.starts_with('#'))).await;
    agent.stop().await;
    // Its SVID is gone, and the file is as old as the installation.
    std::fs::remove_file(dir.path().join("agent/agent-svid.pem")).unwrap();
    let settings = config(dir.path(), server.address.clone(), &old, again(dir.path()));
    let given = settings.trust_bundle.clone().unwrap();
    let agent = Agent::start_by(system_clock(), settings);
    agent.comes_under(&second).await;
    // The server is another one altogether, and the operator says so while the agent runs.
    let other = FakeServer::start().await;
    agent.stop().await;
    let settings = config(dir.path(), other.address.clone(), &old, again(dir.path()));
    let agent = Agent::start_by(system_clock(), settings);
    std::fs::write(given, other.bundle().to_pem()).unwrap();
    agent.comes_under(other.bundle().authorities[0].id()).await;
    assert_ne!(first, second);
    agent.stop().await;
}

#[tokio::test]
async fn an_authority_that_is_about_to_end_does_not_make_an_agent_spin() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    server.agent_ttl(secs(9));
    let agent = Agent::start(dir.path(), &server, join_token());
    agent.authority().await;
    tokio::time::sleep(secs(5)).await;
    let (attested, renewed) = server.agent_signatures();
    assert!(attested == 1 && (1..=3).contains(&renewed), "{attested} attestations and {renewed} renewals in 5 s");
    agent.stop().await;
}

#[tokio::test]
async fn a_foreign_bundle_that_the_server_has_deleted_is_gone_from_its_agents() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    let mut partner = Ca::new(OffsetDateTime::now_utc()).bundle();
    partner.trust_domain = countersign_identity::trust_domain::parse_trust_domain("partner").unwrap();
    server.push_foreign(vec![partner]);
    let agent = Agent::start(dir.path(), &server, join_token());
    let held = || agent.cache.read().federated.len();
    eventually("the foreign bundle", || (held() == 1).then_some(())).await;
    server.push_foreign(vec![]);
    eventually("its end", || (held() == 0).then_some(())).await;
    agent.stop().await;
}

#[tokio::test]
async fn entries_that_are_refused_for_good_starve_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    // A whole batch of refused entries comes first in every order, with one valid entry after it.
    let bad: Vec<String> = (0..500).map(|n| format!("a{n:03}")).collect();
    server.refuse(bad.clone());
    let mut entries: Vec<_> = bad.iter().map(|name| entry(name, 1)).collect();
    entries.push(entry("z", 1));
    server.push(entries.clone(), server.bundle());
    let agent = Agent::start(dir.path(), &server, join_token());
    eventually("the good entry's SVID", || (agent.signed() == 1).then_some(())).await;
    // A new entry does not wait for their backoff either.
    entries.push(entry("zz", 1));
    let asked = std::time::Instant::now();
    server.push(entries, server.bundle());
    eventually("the newcomer's SVID", || (agent.signed() == 2).then_some(())).await;
    assert!(asked.elapsed() < secs(2), "{:?}", asked.elapsed());
    tokio::time::sleep(secs(4)).await;
    let calls = server.signing_calls().len();
    assert!(calls <= 60, "{calls} calls in some five seconds");
    agent.stop().await;
}

/// A small file system that can be filled up, mounted for one test.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Option<Self> {
        use nix::mount::{MsFlags, mount};
        let dir = tempfile::tempdir().unwrap();
        match mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=64k,mode=700")) {
            Ok(()) => Some(Self(dir)),
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "CI must be able to mount: {error}");
                eprintln!("skipped: cannot mount a tmpfs ({error})");
                None
            }
        }
    }

    fn fill(&self) {
        let mut filler = std::fs::File::create(self.0.path().join("filler")).unwrap();
        while std::io::Write::write_all(&mut filler, &[0; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.0.path().join("filler")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_join_token_is_not_spent_on_an_identity_that_cannot_be_kept() {
    let Some(disk) = Small::mount() else { return };
    std::fs::create_dir(disk.0.path().join("agent")).unwrap();
    let server = FakeServer::start().await;
    let settings = config(disk.0.path(), server.address.clone(), &server.bundle(), join_token());
    disk.fill();
    let link = Link::new(Arc::new(settings), system_clock()).unwrap();
    let refused = link.attest().await.err().unwrap().to_string();
    assert!(
        refused.contains("No space left on device") && refused.contains("the join token was not used"),
        "{refused}"
    );
    assert_eq!(server.agent_signatures().0, 0);
    disk.make_room();
    link.attest().await.unwrap();
}

#[tokio::test]
async fn a_full_disk_costs_an_agent_nothing_and_is_made_up_for() {
    let Some(disk) = Small::mount() else { return };
    let server = FakeServer::start().await;
    let agent = Agent::start(disk.0.path(), &server, join_token());
    let first = agent.authority().await;
    let kept = || std::fs::read(disk.0.path().join("agent/agent-svid.pem")).unwrap();
    let before = kept();
    disk.fill();
    let next = Ca::new(OffsetDateTime::now_utc());
    let second = next.bundle().authorities[0].id().to_owned();
    let mut both = server.next_authority(next);
    both.authorities.iter_mut().filter(|a| a.id() == first).for_each(|a| a.tainted = true);
    server.push(vec![entry("a", 1)], both);
    agent.comes_under(&second).await;
    eventually("an SVID signed with it", || (agent.signed() == 1).then_some(())).await;
    assert_eq!(kept(), before, "the disk still holds the old one");
    let why = agent.link.keeper().unsaved().unwrap();
    assert!(why.contains("No space left on device") && why.contains("agent-svid.pem"), "{why}");
    disk.make_room();
    eventually("the new one on disk", || (kept() != before && agent.link.keeper().unsaved().is_none()).then_some(()))
        .await;
    agent.stop().await;
}

#[tokio::test]
async fn a_client_that_stands_still_does_not_keep_the_agent_from_ending() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    server.push(vec![entry("a", 1)], server.bundle());
    let settings = config(dir.path(), server.address.clone(), &server.bundle(), join_token());
    let (socket, shutdown) = (settings.socket.clone(), CancellationToken::new());
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let end = shutdown.clone();
    let agent = tokio::spawn(crate::run(settings, system_clock(), end, || ready.send(()).unwrap()));
    is_ready.await.unwrap();
    // A client with an open stream that reads nothing more, not even the server's goodbye.
    let (asked, opened) = std::sync::mpsc::channel();
    let (thaw, frozen) = std::sync::mpsc::channel::<()>();
    let client = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stream = runtime.block_on(async {
            use countersign_api::workload::X509svidRequest;
            use countersign_api::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
            let channel = countersign_api::transport::unix_channel(socket);
            let mut request = tonic::Request::new(X509svidRequest {});
            request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
            for _ in 0..500 {
                let mut client = SpiffeWorkloadApiClient::new(channel.clone());
                let mut again = tonic::Request::new(X509svidRequest {});
                *again.metadata_mut() = request.metadata().clone();
                if let Ok(stream) = client.fetch_x509svid(again).await {
                    let mut stream = stream.into_inner();
                    if stream.message().await.is_ok() {
                        return stream;
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            panic!("no SVID");
        });
        asked.send(()).unwrap();
        // Its runtime is blocked, like that of a stopped process.
        let _ = frozen.recv();
        drop(stream);
    });
    tokio::task::spawn_blocking(move || opened.recv().unwrap()).await.unwrap();
    let asked_to_end = std::time::Instant::now();
    shutdown.cancel();
    let ended = tokio::time::timeout(secs(20), agent).await.expect("it ends in bounded time");
    ended.unwrap().unwrap();
    assert!(asked_to_end.elapsed() < secs(10), "{:?}", asked_to_end.elapsed());
    thaw.send(()).unwrap();
    client.join().unwrap();
}

#[tokio::test]
async fn a_second_agent_on_one_folder_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let server = FakeServer::start().await;
    let first = Agent::start(dir.path(), &server, join_token());
    first.authority().await;
    let mut settings = config(dir.path(), server.address.clone(), &server.bundle(), join_token());
    settings.socket = dir.path().join("other.sock");
    let refused = crate::run(settings, system_clock(), CancellationToken::new(), || {}).await;
    let Err(AgentError::Link(why)) = refused else { panic!("{refused:?}") };
    assert!(why.to_string().contains("another agent uses this folder"), "{why}");
    assert!(!dir.path().join("other.sock").exists());
    first.stop().await;
}
