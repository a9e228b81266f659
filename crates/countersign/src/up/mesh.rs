//! A running mesh: server and agent as processes, and a namespace, a sidecar and a program per workload.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_api::backoff::Backoff;
use countersign_api::convert::{id_to_wire, selectors_to_wire, workload_to_wire};
use countersign_api::push::directory_client::DirectoryClient;
use countersign_api::push::{GetStatusResponse, PublishRequest};
use countersign_api::spire::types;
use countersign_api::transport::unix_channel;
use countersign_identity::directory::Workload;
use countersign_identity::policy::Mode;
use countersign_identity::trust_domain::service_account_id;
use countersign_identity::{Selector, SpiffeId};
use countersign_redirect::bridge::{Addresses, Bridge};
use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, install};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::account::{Account, Login};
use super::children::{Process, Program, State, cause_of_end};
use super::control_plane::{PATIENCE, agent_socket, node_alias, server_socket, start_agent, start_server};
use super::events::Events;
use super::mesh_file::{MeshSpec, Restart, WorkloadSpec, check_user};
use super::namespaces::Namespaces;
use super::node_identity::NodeIdentity;
use super::numbers::Numbers;
use super::rotate::Log;
use super::run_directory::{RunDirectory, end_all_of, fresh, kill_inside};
use super::sidecar;
use super::users::{Users, users_with_processes};
use crate::clients::client;
use crate::operator;

/// TCP port of mTLS between sidecars.
const MESH_PORT: u16 = 15008;
/// Host number of the first workload in the mesh's networks.
const FIRST_HOST: u16 = 10;
/// Interval at which the directory is published again, for a server that was restarted.
const PUBLISH_EVERY: Duration = Duration::from_secs(2);
/// How long the server may take to delete entries.
const DELETE: Duration = Duration::from_secs(5);

/// A mesh that is up.
pub struct Mesh {
    /// Settings of the mesh.
    pub spec: MeshSpec,
    dir: PathBuf,
    users: Users,
    namespaces: Namespaces,
    logs: PathBuf,
    bridge: Bridge,
    server: Process,
    agent: Process,
    events: Events,
    workloads: Mutex<BTreeMap<String, Rc<Running>>>,
    numbers: Numbers,
    /// Entries made so far; each gets a name of its own.
    entries: AtomicU64,
    /// Entries that the server could not delete yet.
    forgetting: Mutex<JoinSet<()>>,
    /// Held while a workload comes or goes: who comes next finds its name and number free.
    changing: tokio::sync::Mutex<()>,
    /// Random ID of this run, part of UIDs in the directory.
    run_id: String,
    publish: Arc<Notify>,
    directory: Arc<Mutex<Vec<Workload>>>,
    publisher: tokio::task::JoinHandle<()>,
    /// Mode that overrides the file's; `None` for none.
    mode: Mutex<Option<Mode>>,
}

/// A workload that is up.
pub struct Running {
    /// Settings of the workload.
    pub spec: WorkloadSpec,
    /// Number of the workload in the mesh.
    pub number: usize,
    /// Network namespace of the workload.
    pub netns: NetNs,
    /// IPv4 and IPv6 address of the workload.
    pub addresses: [IpAddr; 2],
    /// SPIFFE ID of the workload.
    pub spiffe_id: SpiffeId,
    /// User and groups that its program runs as.
    pub account: Account,
    /// Environment variables about its user.
    pub environment: BTreeMap<String, String>,
    /// Folder with tables that contain its user; `None` if the machine's suffice.
    pub accounts: Option<PathBuf>,
    parts: Parts,
    admin_socket: PathBuf,
    sidecar: Rc<Process>,
    program: Mutex<Option<Process>>,
}

/// What has to go again when a workload goes, as far as it is there.
#[derive(Clone, Default)]
struct Parts {
    number: usize,
    netns: Option<NetNs>,
    /// Users that are nobody's but the workload's and its sidecar's.
    uids: Vec<u32>,
    entry_ids: Vec<String>,
    sidecar: Option<Rc<Process>>,
}

/// A namespace's addresses by its number.
fn addresses(number: usize) -> (Ipv4Addr, Ipv6Addr) {
    let host = FIRST_HOST + u16::try_from(number).unwrap_or(0);
    let [_, low] = host.to_be_bytes();
    (Ipv4Addr::new(10, 86, 0, low), Ipv6Addr::new(0xfd86, 0, 0, 0, 0, 0, 0, host))
}

fn both(number: usize) -> Addresses {
    let (v4, v6) = addresses(number);
    Addresses { v4: (v4, 24), v6: Some((v6, 64)) }
}

fn port_name(number: usize) -> String {
    format!("port{number}")
}

impl Mesh {
    /// Starts a mesh. After a failure, `RunDirectory::tidy` removes what is left.
    pub async fn start(
        spec: MeshSpec,
        run_dir: &RunDirectory,
        log_dir: Option<PathBuf>,
        progress: &dyn Fn(&str),
    ) -> Result<Rc<Self>> {
        let logs = match log_dir {
            Some(dir) => {
                std::fs::create_dir_all(&dir)
                    .with_context(|| format!("cannot make the log folder {}", dir.display()))?;
                dir.canonicalize()?
            }
            None => run_dir.folder("logs", 0)?,
        };
        let events = run_dir.events.clone();
        events.keep_in(&logs).with_context(|| format!("cannot write events to {}", logs.display()))?;
        let dir = run_dir.dir.clone();
        // Before anything runs: a name that is another mesh's is a mistake in the file.
        run_dir.namespaces().claim(&run_dir.namespaces().bridge()).context("the mesh cannot have this name")?;
        for workload in &spec.workloads {
            let claimed = run_dir.namespaces().claim(&run_dir.namespaces().workload(&workload.name));
            claimed.with_context(|| format!("workload {} cannot have this name", workload.name))?;
        }
        progress(&format!("mesh {}: trust domain {}, mode {}", spec.name, spec.trust_domain, spec.mode));
        let node = NodeIdentity::new(time::OffsetDateTime::now_utc())?;
        let server = start_server(&spec, run_dir, &node, &logs).await?;
        progress("server is up");
        let agent = start_agent(&spec, run_dir, &node, &logs).await?;
        progress("agent is up and attested");
        let switch = run_dir.namespaces().bridge();
        let bridge = Bridge::create(&switch)
            .inspect_err(|error| run_dir.namespaces().not_made(&switch, error))
            .context("cannot make the mesh's network")?;
        let mut random = [0u8; 4];
        rand::fill(&mut random);
        let publish = Arc::new(Notify::new());
        let directory = Arc::<Mutex<Vec<Workload>>>::default();
        let publisher =
            tokio::spawn(keep_published(unix_channel(server_socket(&dir)), directory.clone(), publish.clone()));
        let mesh = Rc::new(Self {
            namespaces: run_dir.namespaces().clone(),
            run_id: format!("{:08x}", u32::from_be_bytes(random)),
            workloads: Mutex::default(),
            numbers: Numbers::default(),
            entries: AtomicU64::default(),
            forgetting: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            mode: Mutex::default(),
            spec: spec.clone(),
            dir,
            users: run_dir.users(),
            logs,
            bridge,
            server,
            agent,
            events,
            publish,
            directory,
            publisher,
        });
        mesh.write_hosts()?;
        // All at once: the sidecars wait for their identities in parallel.
        let mut prepared = vec![];
        for workload in spec.workloads {
            // In the file's order from 0: whoever took the users has looked that no process has them.
            let number = mesh.numbers.take(|_| false)?;
            prepared.push(mesh.prepare(workload, number).await?);
        }
        for running in &prepared {
            mesh.wait_for_sidecar(running).await?;
        }
        for running in prepared {
            mesh.start_program(&running).await?;
            progress(&format!("{} is up: {} at {}", running.spec.name, running.spiffe_id, running.addresses[0]));
        }
        Ok(mesh)
    }

    /// Folder of the mesh.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Folder with the logs of all processes.
    pub fn logs(&self) -> &Path {
        &self.logs
    }

    /// The logs that its processes have open.
    pub fn open_logs(&self) -> Vec<Log> {
        let mut logs: Vec<Log> = self.roles().iter().map(|(_, process)| process.log().clone()).collect();
        for running in self.workloads().values() {
            logs.push(running.sidecar.log().clone());
            let program = running.program.lock().unwrap_or_else(PoisonError::into_inner);
            logs.extend(program.as_ref().map(|process| process.log().clone()));
        }
        logs
    }

    /// Programs that have failed and are not restarted, with how they ended.
    pub fn failed_programs(&self) -> Vec<(String, String)> {
        let failed = |w: &Rc<Running>| match w.program() {
            Some(State::Ended(end)) if !end.good => Some((w.spec.name.clone(), end.to_string())),
            _ => None,
        };
        self.workloads().values().filter_map(failed).collect()
    }

    /// Events of the mesh.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Server and agent, by name.
    pub fn roles(&self) -> [(&'static str, &Process); 2] {
        [("server", &self.server), ("agent", &self.agent)]
    }

    /// Path of the server's socket, for operators.
    pub fn server_socket(&self) -> PathBuf {
        server_socket(&self.dir)
    }

    /// All workloads by name.
    pub fn workloads(&self) -> BTreeMap<String, Rc<Running>> {
        self.workloads.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The workload with this name; `None` if there is none.
    pub fn workload(&self, name: &str) -> Option<Rc<Running>> {
        self.workloads().get(name).cloned()
    }

    /// Adds a workload under an unused number; its program is started by the caller.
    pub async fn join(self: &Rc<Self>, spec: WorkloadSpec) -> Result<Rc<Running>> {
        let _changing = self.changing.lock().await;
        if self.workload(&spec.name).is_some() {
            return Err(anyhow!("`{}` is already in the mesh; give this one another --name", spec.name));
        }
        let busy = users_with_processes();
        let has_process = |n| busy.contains(&self.users.sidecar(n)) || busy.contains(&self.users.workload(n).uid);
        let number = self.numbers.take(has_process)?;
        self.prepare(spec, number).await
    }

    /// Namespace, redirect, entry and sidecar of a workload; its program comes later. When one of them cannot be had, the
    /// others go again.
    async fn prepare(self: &Rc<Self>, spec: WorkloadSpec, number: usize) -> Result<Rc<Running>> {
        let name = spec.name.clone();
        let mut parts = Parts { number, ..Parts::default() };
        let prepared = self.assemble(spec, &mut parts).await;
        if prepared.is_err() {
            self.workloads.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
            self.take_apart(&name, parts).await;
        }
        prepared
    }

    async fn assemble(self: &Rc<Self>, spec: WorkloadSpec, parts: &mut Parts) -> Result<Rc<Running>> {
        let (name, number) = (&spec.name, parts.number);
        // Here too, for a sidecar may have been started by hand since the file was read.
        if let Some(user) = &spec.user {
            check_user(user).map_err(|why| anyhow!("{name}: {why}"))?;
        }
        let proxy_uid = self.users.sidecar(number);
        let spiffe_id = service_account_id(&self.spec.trust_domain, &spec.namespace, &spec.service_account)?;
        let netns = self.plug(name, &port_name(number), both(number))?;
        parts.netns = Some(netns.clone());
        // In force before anything runs there: NAT sees only a connection's first packet.
        let redirect = sidecar::redirect(&spec, proxy_uid);
        netns
            .run(move || Ok(install(&redirect, Backend::Auto)))?
            .with_context(|| format!("cannot redirect the traffic of {name}"))?;
        let account = spec.user.clone().unwrap_or_else(|| self.users.workload(number));
        parts.uids = vec![proxy_uid];
        // Only for a user that nobody else on the machine has: by any other, whoever shares it would get this identity.
        if spec.user.is_none() {
            parts.uids.push(account.uid);
        }
        for uid in parts.uids.clone() {
            // Known before it is asked for: an answer that is lost leaves an entry behind.
            let id = format!("{name}-{}", self.entries.fetch_add(1, Ordering::Relaxed));
            parts.entry_ids.push(id.clone());
            self.register(&spec, &spiffe_id, uid, id).await?;
        }
        let home = self.folder("sidecars", name, proxy_uid, 0o755)?;
        let admin_socket = sidecar::admin_socket(&home);
        let sidecar =
            Process::start(self.sidecar(&spec, proxy_uid, &netns, &home), self.log(&format!("{name}.sidecar"))).await?;
        let sidecar = Rc::new(sidecar);
        parts.sidecar = Some(sidecar.clone());
        let (environment, accounts) = self.person(&spec, &account)?;
        let (v4, v6) = addresses(number);
        let running = Rc::new(Running {
            account,
            environment,
            accounts,
            addresses: [v4.into(), v6.into()],
            program: Mutex::default(),
            spec,
            number,
            netns,
            spiffe_id,
            parts: parts.clone(),
            admin_socket,
            sidecar,
        });
        self.workloads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(running.spec.name.clone(), running.clone());
        self.write_hosts()?;
        self.publish_now();
        Ok(running)
    }

    /// Makes a namespace of the mesh's own and plugs it in.
    pub fn plug(&self, name: &str, port: &str, addresses: Addresses) -> Result<NetNs> {
        let namespace = self.namespaces.workload(name);
        self.namespaces.claim(&namespace).with_context(|| format!("{name} cannot have this name"))?;
        let plugged = self.bridge.plug(&namespace, port, addresses);
        if let Err(error) = &plugged {
            self.namespaces.not_made(&namespace, error);
        }
        plugged.with_context(|| format!("cannot make the namespace of {name}"))
    }

    /// Unplugs and removes a namespace; the name is free again when it is gone.
    pub fn unplug(&self, netns: &NetNs, port: &str) -> Result<()> {
        let unplugged = self.bridge.unplug(netns, port);
        if !netns.path().exists()
            && let Some(name) = netns.path().file_name().and_then(|n| n.to_str())
        {
            self.namespaces.release(name);
        }
        Ok(unplugged?)
    }

    /// Registers a workload's identity for the processes of one user.
    async fn register(&self, spec: &WorkloadSpec, id: &SpiffeId, uid: u32, entry_id: String) -> Result<()> {
        let entry = types::Entry {
            id: entry_id,
            spiffe_id: Some(id_to_wire(id)),
            parent_id: Some(id_to_wire(&node_alias(&self.spec)?)),
            selectors: selectors_to_wire([&Selector::new("unix", format!("uid:{uid}"))?]),
            dns_names: vec![spec.name.clone()],
            ..types::Entry::default()
        };
        let created = operator::entry::create(self.channel(), entry).await;
        created.map(|_| ()).with_context(|| format!("cannot register {}", spec.name))
    }

    /// What a workload's program learns about its user: environment variables, and tables that contain it.
    fn person(&self, spec: &WorkloadSpec, account: &Account) -> Result<(BTreeMap<String, String>, Option<PathBuf>)> {
        let name = &spec.name;
        let own_home = self.dir.join("homes").join(name);
        let login = Login::of(account, name, &own_home).map_err(|e| anyhow!(e))?;
        if !login.known {
            self.folder("homes", name, account.uid, 0o700)?;
        }
        let accounts = login
            .write_tables(account, &self.dir.join("accounts").join(name))
            .with_context(|| format!("cannot write the accounts of {name}"))?;
        let mut environment: BTreeMap<String, String> = login.environment().into();
        if spec.user.is_none() {
            let socket = agent_socket(&self.dir);
            environment.insert("SPIFFE_ENDPOINT_SOCKET".into(), format!("unix://{}", socket.display()));
        }
        Ok((environment, accounts))
    }

    /// A workload's folder of one kind, its user's, and empty.
    fn folder(&self, kind: &str, workload: &str, owner: u32, mode: u32) -> Result<PathBuf> {
        let folder = self.dir.join(kind).join(workload);
        fresh(&folder, owner, mode).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// Waits until a sidecar has its identity and policy.
    pub async fn wait_for_sidecar(&self, running: &Running) -> Result<()> {
        let name = &running.spec.name;
        let ready = async || {
            let status = running.status().await;
            status.is_ok_and(|s| s.facts.get("ready").is_some_and(|r| r == "yes"))
        };
        let waited = running.sidecar.wait_until("it had an identity", PATIENCE, ready).await;
        waited.with_context(|| {
            format!("the sidecar of {name} did not come up: {}", cause_of_end(&self.log(&format!("{name}.sidecar"))))
        })
    }

    /// Starts a workload's program.
    async fn start_program(&self, running: &Running) -> Result<()> {
        let program = Program {
            name: running.spec.name.clone(),
            netns: Some(running.netns.clone()),
            hosts: Some(self.hosts()),
            accounts: running.accounts.clone(),
            account: running.account.clone(),
            no_new_privs: false,
            command: running.spec.command.clone(),
            // Variables of the mesh file override these.
            env: running.environment.clone().into_iter().chain(running.spec.env.clone()).collect(),
            workdir: running.spec.workdir.clone(),
            restart: running.spec.restart,
            events: self.events.clone(),
        };
        let process = Process::start(program, self.log(&running.spec.name)).await?;
        *running.program.lock().unwrap_or_else(PoisonError::into_inner) = Some(process);
        Ok(())
    }

    /// Removes a workload.
    pub async fn remove(&self, name: &str) {
        let _changing = self.changing.lock().await;
        let removed = self.workloads.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
        let Some(running) = removed else { return };
        let program = running.program.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(program) = program {
            program.stop().await;
        }
        self.publish_now();
        self.take_apart(name, running.parts.clone()).await;
    }

    /// Removes what there is of a workload, the last first. Its number stays taken until its entries are gone.
    async fn take_apart(&self, name: &str, parts: Parts) {
        if let Some(sidecar) = &parts.sidecar {
            sidecar.stop().await;
        }
        if let Some(netns) = &parts.netns {
            let _ = kill_inside(netns);
        }
        // A process may have left the namespace; the next workload of this number has the same users.
        end_all_of(&parts.uids).await;
        self.forget(name, parts.number, parts.entry_ids).await;
        for kind in ["homes", "accounts"] {
            match std::fs::remove_dir_all(self.dir.join(kind).join(name)) {
                // A workload with a user of the machine has neither.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(name, kind, %error, "cannot remove a folder of a workload that has left");
                }
                _ => {}
            }
        }
        if let Some(netns) = &parts.netns
            && let Err(error) = self.unplug(netns, &port_name(parts.number))
        {
            tracing::warn!(name, %error, "cannot remove the namespace");
        }
        if let Err(error) = self.write_hosts() {
            tracing::warn!(name, error = format!("{error:#}"), "the mesh's names still have a workload that has left");
        }
    }

    /// Deletes a workload's entries and gives its number back. A server that does not answer now is asked again until it
    /// does, and the number is kept meanwhile: by it, the next workload would be handed the identity of this one.
    async fn forget(&self, name: &str, number: usize, entry_ids: Vec<String>) {
        let first = delete_entries(self.channel(), &entry_ids).await;
        let Err(error) = first else { return self.numbers.release(number) };
        tracing::warn!(name, %error, "cannot delete the registration entry; trying again");
        let (channel, numbers) = (self.channel(), self.numbers.clone());
        let mut forgetting = self.forgetting.lock().unwrap_or_else(PoisonError::into_inner);
        while forgetting.try_join_next().is_some() {}
        forgetting.spawn(async move {
            let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
            while delete_entries(channel.clone(), &entry_ids).await.is_err() {
                tokio::time::sleep(backoff.next_delay()).await;
            }
            numbers.release(number);
        });
    }

    /// Stops everything, programs first. `RunDirectory::tidy` removes the rest.
    pub async fn stop(&self) {
        for running in self.workloads().values() {
            let program = running.program.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(program) = program {
                program.stop().await;
            }
        }
        for running in self.workloads().values() {
            running.sidecar.stop().await;
        }
        self.publisher.abort();
        self.forgetting.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
        self.agent.stop().await;
        self.server.stop().await;
    }

    /// Overrides the mode of the whole mesh without a restart; `None` restores the file's.
    pub fn set_mode(&self, mode: Option<Mode>) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
        self.publish_now();
    }

    /// File with the host names, mounted as every workload's `/etc/hosts`.
    pub fn hosts(&self) -> PathBuf {
        self.dir.join("hosts")
    }

    fn channel(&self) -> Channel {
        unix_channel(self.server_socket())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    fn sidecar(&self, spec: &WorkloadSpec, uid: u32, netns: &NetNs, home: &Path) -> Program {
        Program {
            name: format!("{}'s sidecar", spec.name),
            netns: Some(netns.clone()),
            hosts: None,
            accounts: None,
            account: Account::of_uid(uid),
            no_new_privs: true,
            command: sidecar::command(spec, &agent_socket(&self.dir), home),
            env: BTreeMap::new(),
            workdir: None,
            restart: Restart::Always,
            events: self.events.clone(),
        }
    }

    /// Written in place, because every workload has this file mounted.
    fn write_hosts(&self) -> Result<()> {
        let mut text = format!("127.0.0.1 localhost\n::1 localhost\n# mesh {}\n", self.spec.name);
        for w in self.workloads().values() {
            for address in w.addresses {
                text.push_str(&format!("{address} {0} {0}.{1} {0}.{1}.svc\n", w.spec.name, w.spec.namespace));
            }
        }
        std::fs::write(self.hosts(), text)
            .and_then(|()| std::fs::set_permissions(self.hosts(), PermissionsExt::from_mode(0o644)))
            .context("cannot write the mesh's names")
    }

    fn publish_now(&self) {
        let mode = *self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        let one = |w: &Rc<Running>| {
            let mut policy = w.spec.policy.clone();
            policy.mode = mode.unwrap_or(policy.mode);
            Workload {
                uid: format!("{}-{}-{}", w.spec.name, self.run_id, w.parts.entry_ids.join("+")),
                name: w.spec.name.clone(),
                addresses: w.addresses.to_vec(),
                spiffe_ids: [w.spiffe_id.to_string()].into(),
                mesh_port: MESH_PORT,
                policy,
            }
        };
        let all = self.workloads().values().map(one).collect();
        *self.directory.lock().unwrap_or_else(PoisonError::into_inner) = all;
        self.publish.notify_one();
    }
}

impl Running {
    /// Fetches the status of its sidecar.
    pub async fn status(&self) -> Result<GetStatusResponse> {
        operator::status::get(&self.admin_socket).await
    }

    /// State of its program; `None` if `run` started it.
    pub fn program(&self) -> Option<State> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Process::state)
    }

    /// Number of restarts of its sidecar and its program.
    pub fn restarts(&self) -> u32 {
        let program = self.program.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, Process::restarts);
        self.sidecar.restarts() + program
    }

    /// State of its sidecar.
    pub fn sidecar(&self) -> State {
        self.sidecar.state()
    }

    /// Path of the sidecar's admin socket.
    pub fn admin_socket(&self) -> &Path {
        &self.admin_socket
    }

    /// Path of the sidecar's access log.
    pub fn access_log(&self) -> PathBuf {
        self.admin_socket.with_file_name("access.log")
    }
}

/// Deletes entries; those that are not there are deleted.
async fn delete_entries(channel: Channel, ids: &[String]) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    tokio::time::timeout(DELETE, operator::entry::delete_if_there(channel, ids.to_vec()))
        .await
        .context("the server does not answer")?
}

/// Publishes the directory after each change, and periodically.
async fn keep_published(channel: Channel, directory: Arc<Mutex<Vec<Workload>>>, changed: Arc<Notify>) {
    loop {
        let all =
            directory.lock().unwrap_or_else(PoisonError::into_inner).iter().map(workload_to_wire).collect::<Vec<_>>();
        if !all.is_empty() {
            let request = PublishRequest { replace: true, upserted: all, ..Default::default() };
            let mut request = tonic::Request::new(request);
            request.set_timeout(PATIENCE);
            let mut client = client!(DirectoryClient, channel.clone());
            if let Err(status) = client.publish(request).await {
                tracing::debug!(status = status.message(), "cannot publish the directory; trying again");
            }
        }
        tokio::select! {
            () = changed.notified() => {}
            () = tokio::time::sleep(PUBLISH_EVERY) => {}
        }
    }
}
