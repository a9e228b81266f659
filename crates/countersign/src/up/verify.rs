//! `up --verify`: the mesh checks itself, one line per check. Each check can fail: what a capture must not find in
//! strict mode, it must find with the mesh off.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_identity::policy::Mode;
use countersign_redirect::bridge::Addresses;
use countersign_redirect::netns::NetNs;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::{Instant, sleep};

use super::children::{Process, Program, State};
use super::mesh::Mesh;
use super::mesh_file::{MeshSpec, Restart};
use super::run_directory::RunDirectory;
use super::running::Running;
use super::signals::Signals;
use crate::capture::Capture;
use crate::launch::OWN_PROGRAM;
use crate::operator;
use crate::operator::output::told;
use crate::probe::Report;
use crate::shop::PORT;

/// Longest HTTP exchange or check of a port.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Duration of the load in seconds: three lifetimes of an SVID and one of an authority.
const LOAD_SECONDS: u64 = 42;
/// Number of rotations of each SVID that must happen under load.
const ROTATIONS: usize = 3;

/// Prints and counts the checks.
#[derive(Default)]
struct Checks {
    passed: u32,
    failed: u32,
}

impl Checks {
    /// Prints a line. The checks continue if it cannot be written, because the mesh has to be stopped; the sum at the
    /// end then fails.
    fn say(line: &str) {
        let _ = crate::stdout::line(&told(line));
    }

    fn line(&mut self, what: &str, result: Result<String>) {
        match result {
            Ok(detail) => {
                self.passed += 1;
                Self::say(&format!("ok    {what}: {detail}"));
            }
            Err(error) => {
                self.failed += 1;
                Self::say(&format!("FAIL  {what}: {}", crate::one_line(&error)));
            }
        }
    }
}

/// Starts the mesh, checks it, stops it, and checks that nothing is left.
pub async fn verify(spec: MeshSpec, log_dir: Option<PathBuf>, full: bool, signals: Signals) -> Result<ExitCode> {
    let mut checks = Checks::default();
    let run_dir = RunDirectory::take(&spec.name)?;
    let began = Instant::now();
    let progress = |step: &str| eprintln!("{step}");
    let started = tokio::select! {
        started = Mesh::start(spec, &run_dir, log_dir, &progress) => started,
        () = signals.stop.cancelled() => Err(anyhow!("stopped while starting")),
    };
    let mesh = started?;
    checks.line(
        "the mesh comes up",
        Ok(format!("{} workloads in {:.1} s", mesh.workloads().len(), began.elapsed().as_secs_f64())),
    );
    tokio::select! {
        () = all(&mesh, &mut checks, full) => {}
        () = signals.stop.cancelled() => checks.line("the verification", Err(anyhow!("stopped"))),
    }
    tokio::select! {
        () = mesh.stop() => {}
        () = signals.at_once.cancelled() => {}
    }
    drop(mesh);
    run_dir.tidy();
    let left = run_dir.leftovers();
    checks.line(
        "everything is gone afterwards",
        if left.is_empty() {
            Ok("no process, namespace, link or file left".into())
        } else {
            Err(anyhow!(left.join(", ")))
        },
    );
    crate::stdout::line(&format!("{} passed, {} failed", checks.passed, checks.failed))?;
    Ok(ExitCode::from(u8::from(checks.failed > 0)))
}

async fn all(mesh: &Rc<Mesh>, checks: &mut Checks, full: bool) {
    checks.line("every program runs", programs_run(mesh).await);
    checks.line("every pair that may talks, over mTLS, and no other does", pairs(mesh).await);
    checks.line("a stranger without a sidecar is refused where the mesh is strict", stranger(mesh).await);
    if full {
        let hidden = canary(mesh, "strict").await;
        checks.line(
            "no link shows a byte of a payload",
            hidden.and_then(|seen| match seen {
                (packets, 0) => Ok(format!("0 of {packets} packets")),
                (packets, hits) => Err(anyhow!("{hits} of {packets} packets held it")),
            }),
        );
        mesh.set_mode(Some(Mode::Off));
        let shown = shown_when_off(mesh).await;
        checks.line("the same capture sees the payload with the mesh off, so that it could have failed", shown);
        mesh.set_mode(None);
        checks.line("the mesh is strict again, without a restart", strict_again(mesh).await);
        rotation(mesh, checks).await;
    }
}

/// Runs blocking work in a workload's namespace, off this thread.
async fn within<T: Send + 'static>(
    ns: &NetNs,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T> {
    let ns = ns.clone();
    Ok(tokio::task::spawn_blocking(move || ns.run(work)).await??)
}

async fn programs_run(mesh: &Rc<Mesh>) -> Result<String> {
    // A program that cannot start ends at once.
    sleep(Duration::from_millis(500)).await;
    let ended: Vec<String> = mesh
        .workloads()
        .iter()
        .filter_map(|(name, w)| match w.program() {
            Some(State::Ended(end)) => Some(format!("{name} {end}")),
            _ => None,
        })
        .collect();
    if ended.is_empty() {
        Ok(format!("{} of them", mesh.workloads().len()))
    } else {
        Err(anyhow!("{} (logs: {})", ended.join(", "), mesh.logs().display()))
    }
}

/// Result of connecting to a port.
#[derive(Debug, PartialEq, Eq)]
enum Reached {
    /// The connection stays open, or the program answered.
    Yes,
    /// The connection was reset or could not be opened.
    No(String),
}

/// Connects to a port and checks whether the connection is accepted: a refusal shows as a reset. `Yes` for a server
/// that waits for its client to speak.
fn reach(ip: IpAddr, port: u16, patience: Duration) -> std::io::Result<Reached> {
    let mut stream = match TcpStream::connect_timeout(&SocketAddr::new(ip, port), TIMEOUT) {
        Ok(stream) => stream,
        Err(e) => return Ok(Reached::No(e.to_string())),
    };
    stream.set_read_timeout(Some(patience))?;
    match stream.read(&mut [0; 1]) {
        Ok(_) => Ok(Reached::Yes),
        Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => Ok(Reached::Yes),
        Err(e) => Ok(Reached::No(e.to_string())),
    }
}

async fn pairs(mesh: &Rc<Mesh>) -> Result<String> {
    let workloads = mesh.workloads();
    let td = mesh.spec.trust_domain.to_string();
    wait_for_ports(&workloads).await?;
    let (mut open, mut shut) = (0, 0);
    for (from_name, from) in &workloads {
        for (to_name, to) in workloads.iter().filter(|(name, _)| *name != from_name) {
            for port in to.spec.ports.clone() {
                let allowed = to.spec.policy.admits(&from.spiffe_id, &td, port).is_ok();
                for address in to.addresses {
                    let reached = within(&from.netns, move || reach(address, port, Duration::from_millis(300))).await?;
                    match (allowed, reached) {
                        (true, Reached::Yes) => open += 1,
                        (false, Reached::No(_)) => shut += 1,
                        (true, Reached::No(why)) => {
                            return Err(anyhow!("{from_name} cannot reach {to_name} at {address} port {port}: {why}"));
                        }
                        (false, Reached::Yes) => {
                            return Err(anyhow!(
                                "{from_name} is not on the allow-list of {to_name} port {port}, and got through"
                            ));
                        }
                    }
                }
            }
        }
    }
    Ok(format!("{open} ways open, {shut} shut, over IPv4 and IPv6"))
}

/// Waits until every program listens on its ports, seen from its own namespace.
async fn wait_for_ports(workloads: &BTreeMap<String, Rc<Running>>) -> Result<()> {
    for (name, w) in workloads {
        for port in w.spec.ports.clone() {
            let address = SocketAddr::new(w.addresses[0], port);
            let deadline = Instant::now() + Duration::from_secs(30);
            while within(&w.netns, move || TcpStream::connect_timeout(&address, TIMEOUT)).await.is_err() {
                if Instant::now() > deadline {
                    return Err(anyhow!("{name} does not listen on port {port}"));
                }
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
    Ok(())
}

async fn stranger(mesh: &Rc<Mesh>) -> Result<String> {
    let addresses = Addresses { v4: (Ipv4Addr::new(10, 86, 0, 250), 24), v6: None };
    let ns = mesh.plug("stranger", "stranger", addresses).context("cannot plug a stranger in")?;
    let asked = async {
        let (mut refused, mut accepted) = (0, 0);
        for (name, w) in mesh.workloads() {
            for port in w.spec.ports.clone() {
                let address = w.addresses[0];
                let reached = within(&ns, move || reach(address, port, Duration::from_millis(500))).await?;
                match (w.spec.policy.mode_of(port), reached) {
                    (Mode::Strict, Reached::Yes) => return Err(anyhow!("{name} port {port} let it in")),
                    (Mode::Strict, Reached::No(_)) => refused += 1,
                    (_, _) => accepted += 1,
                }
            }
        }
        Ok(format!("{refused} ports refused it, {accepted} are not strict"))
    };
    let asked = asked.await;
    mesh.unplug(&ns, "stranger").context("cannot unplug the stranger")?;
    asked
}

/// Sends an HTTP GET and returns the whole body.
fn get(ip: IpAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(ip, PORT), TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Sends a unique word over every allowed connection, and looks for it on every link. Returns the numbers of packets
/// and of hits.
async fn canary(mesh: &Rc<Mesh>, mark: &str) -> Result<(u64, u64)> {
    let mut random = [0u8; 12];
    rand::fill(&mut random);
    let word: String = format!("canary-{mark}-{}", random.iter().map(|b| format!("{b:02x}")).collect::<String>());
    let captures =
        mesh.workloads().values().map(|w| Capture::start(&w.netns, word.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let td = mesh.spec.trust_domain.to_string();
    for from in mesh.workloads().values() {
        for to in mesh.workloads().values().filter(|to| to.number != from.number) {
            if to.spec.policy.admits(&from.spiffe_id, &td, PORT).is_err() {
                continue;
            }
            for address in to.addresses {
                let path = format!("/?echo={word}");
                let answer = within(&from.netns, move || get(address, &path)).await;
                let answer = answer.with_context(|| format!("{} cannot ask {}", from.spec.name, to.spec.name))?;
                // Once in the request, and once in the answer.
                if !answer.contains(&word) {
                    return Err(anyhow!(
                        "{} did not echo: {}",
                        to.spec.name,
                        answer.lines().next().unwrap_or_default()
                    ));
                }
            }
        }
    }
    let seen: Vec<_> = captures.into_iter().map(Capture::stop).collect();
    let packets = seen.iter().map(|s| s.packets).sum();
    if packets == 0 {
        return Err(anyhow!("the captures saw no packet at all"));
    }
    Ok((packets, seen.iter().map(|s| s.hits).sum()))
}

async fn shown_when_off(mesh: &Rc<Mesh>) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match canary(mesh, "off").await {
            Ok((packets, hits)) if hits > 0 => return Ok(format!("{hits} of {packets} packets")),
            other if Instant::now() > deadline => {
                return Err(other.err().unwrap_or_else(|| anyhow!("the capture saw nothing")));
            }
            // The mode has not reached all sidecars yet.
            _ => sleep(Duration::from_millis(200)).await,
        }
    }
}

async fn strict_again(mesh: &Rc<Mesh>) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let last = stranger(mesh).await;
        let hidden = canary(mesh, "again").await;
        match (&last, &hidden) {
            (Ok(_), Ok((_, 0))) => return last,
            _ if Instant::now() > deadline => {
                return Err(last.err().or(hidden.err()).unwrap_or_else(|| anyhow!("payloads still show")));
            }
            _ => sleep(Duration::from_millis(200)).await,
        }
    }
}

/// Load on every connection of the shop, while identities and the authority rotate.
async fn rotation(mesh: &Rc<Mesh>, checks: &mut Checks) {
    let first_authority = active_authority(mesh).await;
    let mut serials: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let ways = [
        ("productpage", "details"),
        ("productpage", "reviews"),
        ("reviews", "ratings"),
        ("details", "productpage"),
        ("ratings", "productpage"),
    ];
    let mut load = vec![];
    for (from, to) in ways {
        match start_load(mesh, from, to).await {
            Ok(process) => load.push(process),
            Err(error) => return checks.line("load", Err(error)),
        }
    }
    eprintln!("load on {} ways for {LOAD_SECONDS} s, over new and kept-alive connections", ways.len());
    let deadline = Instant::now() + Duration::from_secs(LOAD_SECONDS + 20);
    while load.iter().any(|(p, _)| matches!(p.state(), State::Running(_))) && Instant::now() < deadline {
        for (name, w) in mesh.workloads() {
            if let Ok(status) = w.status().await {
                serials.entry(name).or_default().extend(status.identities.into_iter().map(|i| i.serial));
            }
        }
        sleep(Duration::from_millis(250)).await;
    }
    checks.line("no request failed while everything rotated", requests(&load));
    let fewest = serials.iter().min_by_key(|(_, s)| s.len());
    checks.line(
        &format!("each SVID rotated at least {ROTATIONS} times meanwhile"),
        match fewest {
            Some((_, s)) if s.len() > ROTATIONS => {
                Ok(serials.iter().map(|(n, s)| format!("{n} {}", s.len() - 1)).collect::<Vec<_>>().join(", "))
            }
            Some((name, s)) => Err(anyhow!("{name} only {} times", s.len().saturating_sub(1))),
            None => Err(anyhow!("no sidecar answered")),
        },
    );
    checks.line(
        "the signing authority rotated meanwhile",
        match (first_authority, active_authority(mesh).await) {
            (Ok(before), Ok(after)) if before != after => Ok(format!("{before} to {after}")),
            (Ok(_), Ok(_)) => Err(anyhow!("it is still the same")),
            (Err(e), _) | (_, Err(e)) => Err(e),
        },
    );
    for (process, _) in &load {
        process.stop().await;
    }
    sleep(Duration::from_millis(500)).await;
    checks.line("no connection used a certificate outside its time", certificates_in_time(mesh));
    checks.line("every serial in use was issued by this authority", serials_in_audit(mesh, &serials));
}

async fn active_authority(mesh: &Rc<Mesh>) -> Result<String> {
    let status = operator::status::get(&mesh.server_socket()).await?;
    let active = status.facts.get("authority active").context("the server names no active authority")?;
    Ok(active.split(' ').next().unwrap_or_default().chars().take(12).collect())
}

async fn start_load(mesh: &Rc<Mesh>, from: &str, to: &str) -> Result<(Process, PathBuf)> {
    let from = mesh.workload(from).context("a workload of the shop is missing")?;
    let url = format!("http://{to}:{PORT}/");
    let seconds = LOAD_SECONDS.to_string();
    let command =
        [OWN_PROGRAM, "probe", &url, "--seconds", &seconds, "--kept", "2", "--fresh", "2", "--pause-ms", "10"];
    let log = mesh.dir().join(format!("load-{}-{to}.json", from.spec.name));
    let program = Program {
        name: "load".into(),
        netns: Some(from.netns.clone()),
        hosts: Some(mesh.hosts()),
        accounts: None,
        account: from.account.clone(),
        no_new_privs: true,
        command: command.map(std::borrow::ToOwned::to_owned).to_vec(),
        env: BTreeMap::new(),
        workdir: None,
        restart: Restart::No,
        belonging: None,
        events: mesh.events().clone(),
    };
    Ok((Process::start(program, log.clone()).await?, log))
}

fn requests(load: &[(Process, PathBuf)]) -> Result<String> {
    let (mut ok, mut connections) = (0, 0);
    for (_, log) in load {
        let text = std::fs::read_to_string(log)?;
        let report: Report =
            serde_json::from_str(text.trim()).with_context(|| format!("the load did not report: {}", text.trim()))?;
        if report.failed > 0 || report.ok == 0 {
            return Err(anyhow!(
                "{} of {} failed: {}",
                report.failed,
                report.ok + report.failed,
                report.errors.join("; ")
            ));
        }
        ok += report.ok;
        connections += report.connections;
    }
    Ok(format!("{ok} requests over {connections} connections"))
}

fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = super::rotate::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .map(|l| serde_json::from_str(l).with_context(|| format!("{}: not JSON: {l}", path.display())))
        .collect()
}

fn certificates_in_time(mesh: &Rc<Mesh>) -> Result<String> {
    let mut count = 0;
    for w in mesh.workloads().values() {
        for line in lines(&w.access_log())?.iter().filter(|l| l["mode"] == "mtls") {
            let time = |key: &str| {
                OffsetDateTime::parse(line[key].as_str().unwrap_or_default(), &Rfc3339)
                    .with_context(|| format!("no {key} in {line}"))
            };
            let began = time("time")?;
            if time("peer_expires_at")? <= began || time("own_expires_at")? <= began {
                return Err(anyhow!("{line}"));
            }
            count += 1;
        }
    }
    if count == 0 {
        Err(anyhow!("the access logs hold no mTLS connection"))
    } else {
        Ok(format!("{count} connections in the access logs"))
    }
}

fn serials_in_audit(mesh: &Rc<Mesh>, serials: &BTreeMap<String, BTreeSet<String>>) -> Result<String> {
    let audit = lines(&mesh.dir().join("server").join("audit.log"))?;
    let issued: BTreeSet<&str> =
        audit.iter().filter(|l| l["outcome"] == "signed").filter_map(|l| l["serial"].as_str()).collect();
    let unknown = serials.values().flatten().find(|s| !issued.contains(s.as_str()));
    match unknown {
        Some(serial) => Err(anyhow!("serial {serial} is in no audit record")),
        None => Ok(format!("{} serials, all in the audit record", serials.values().map(BTreeSet::len).sum::<usize>())),
    }
}
