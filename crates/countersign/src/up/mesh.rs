//! A running mesh: server and agent as processes, and a namespace, a sidecar and a program per workload.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_api::convert::{id_to_wire, selectors_to_wire, workload_to_wire};
use countersign_api::push::directory_client::DirectoryClient;
use countersign_api::push::{GetStatusResponse, PublishRequest};
use countersign_api::spire::types;
use countersign_api::transport::unix_channel;
use countersign_identity::directory::Workload;
use countersign_identity::policy::Mode;
use countersign_identity::trust_domain::service_account_id;
use countersign_identity::{Selector, SpiffeId};
use countersign_redirect::fabric::{Addresses, Fabric};
use countersign_redirect::guard::RESOLV_CONF;
use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, Guard, Redirect, install};
use tokio::sync::Notify;
use tonic::transport::Channel;

use super::account::{Account, Login};
use super::children::{Process, Program, State, cause_of_end};
use super::control_plane::{PATIENCE, agent_socket, node_alias, server_socket, start_agent, start_server};
use super::events::Events;
use super::mesh_file::{MAX_WORKLOADS, MeshSpec, Restart, WorkloadSpec, check_user};
use super::node_identity::NodeIdentity;
use super::place::{Place, kill_inside, passable};
use super::users::Users;
use crate::clients::client;
use crate::launch::OWN_PROGRAM;
use crate::operator;

/// TCP port of mTLS between sidecars.
const MESH_PORT: u16 = 15008;
/// Host number of the first workload in the mesh's networks.
const FIRST_HOST: u16 = 10;
/// Interval at which the directory is published again, for a server that was restarted.
const PUBLISH_EVERY: Duration = Duration::from_secs(2);

/// A mesh that is up.
pub struct Mesh {
    /// Settings of the mesh.
    pub spec: MeshSpec,
    dir: PathBuf,
    users: Users,
    names: Names,
    logs: PathBuf,
    fabric: Fabric,
    server: Process,
    agent: Process,
    events: Events,
    workloads: Mutex<BTreeMap<String, Rc<Running>>>,
    /// Locked while a workload is added or removed, so that the next one finds name and number free.
    changing: tokio::sync::Mutex<()>,
    /// Random ID of this run, part of UIDs in the directory.
    run_id: String,
    publish: Arc<Notify>,
    directory: Arc<Mutex<Vec<Workload>>>,
    publisher: tokio::task::JoinHandle<()>,
    /// Mode that overrides the file's; `None` for none.
    mode: Mutex<Option<Mode>>,
}

/// Prefixes of namespaces, and the name of the mesh.
struct Names {
    fabric: String,
    mesh: String,
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
    entry_ids: Vec<String>,
    admin_socket: PathBuf,
    sidecar: Process,
    program: Mutex<Option<Process>>,
}

/// Addresses of the workload with this number.
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
    /// Starts a mesh. After a failure, `Place::tidy` removes what is left.
    pub async fn start(
        spec: MeshSpec,
        place: &Place,
        log_dir: Option<PathBuf>,
        progress: &dyn Fn(&str),
    ) -> Result<Rc<Self>> {
        let logs = match log_dir {
            Some(dir) => {
                std::fs::create_dir_all(&dir)
                    .with_context(|| format!("cannot make the log folder {}", dir.display()))?;
                dir.canonicalize()?
            }
            None => place.folder("logs", 0)?,
        };
        let events = place.events.clone();
        events.keep_in(&logs).with_context(|| format!("cannot write events to {}", logs.display()))?;
        let dir = place.dir.clone();
        progress(&format!("mesh {}: trust domain {}, mode {}", spec.name, spec.trust_domain, spec.mode));
        let node = NodeIdentity::new(time::OffsetDateTime::now_utc())?;
        let server = start_server(&spec, place, &node, &logs).await?;
        progress("server is up");
        let agent = start_agent(&spec, place, &node, &logs).await?;
        progress("agent is up and attested");
        let fabric = Fabric::create(&place.fabric_name()).context("cannot make the mesh's network")?;
        let mut random = [0u8; 4];
        rand::fill(&mut random);
        let publish = Arc::new(Notify::new());
        let directory = Arc::<Mutex<Vec<Workload>>>::default();
        let publisher =
            tokio::spawn(keep_published(unix_channel(server_socket(&dir)), directory.clone(), publish.clone()));
        let mesh = Rc::new(Self {
            names: Names { fabric: place.fabric_name(), mesh: spec.name.clone() },
            run_id: format!("{:08x}", u32::from_be_bytes(random)),
            workloads: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            mode: Mutex::default(),
            spec: spec.clone(),
            dir,
            users: place.users(),
            logs,
            fabric,
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
        for (number, workload) in spec.workloads.into_iter().enumerate() {
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

    /// The switch that connects the namespaces.
    pub fn fabric(&self) -> &Fabric {
        &self.fabric
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
        let number = self.free_number()?;
        self.prepare(spec, number).await
    }

    fn free_number(&self) -> Result<usize> {
        let used: Vec<usize> = self.workloads().values().map(|w| w.number).collect();
        (0..MAX_WORKLOADS)
            .find(|n| !used.contains(n))
            .ok_or_else(|| anyhow!("a mesh on one machine holds at most {MAX_WORKLOADS} workloads"))
    }

    /// Creates namespace, redirect, entry and sidecar of a workload; the program is started later.
    async fn prepare(self: &Rc<Self>, spec: WorkloadSpec, number: usize) -> Result<Rc<Running>> {
        let name = &spec.name;
        // Checked again, because a sidecar may have been started by hand since the file was read.
        if let Some(user) = &spec.user {
            check_user(user).map_err(|why| anyhow!("{name}: {why}"))?;
        }
        let proxy_uid = self.users.sidecar(number);
        let spiffe_id = service_account_id(&self.spec.trust_domain, &spec.namespace, &spec.service_account)?;
        let netns = self.fabric.plug(&self.netns_name(name), &port_name(number), both(number));
        let netns = netns.with_context(|| format!("cannot make the namespace of {name}"))?;
        // Installed before anything runs there: NAT sees only the first packet of a connection.
        let redirect = redirect_of(&spec, proxy_uid);
        netns
            .run(move || Ok(install(&redirect, Backend::Auto)))?
            .with_context(|| format!("cannot redirect the traffic of {name}"))?;
        let account = spec.user.clone().unwrap_or_else(|| self.users.workload(number));
        let mut entry_ids = vec![self.register(&spec, &spiffe_id, proxy_uid).await?];
        // Only for a user that is used by nothing else on the machine: otherwise every process of that user would get
        // this identity.
        if spec.user.is_none() {
            entry_ids.push(self.register(&spec, &spiffe_id, account.uid).await?);
        }
        let home = self.folder("sidecars", name, proxy_uid, 0o755)?;
        let admin_socket = home.join("admin.sock");
        let sidecar =
            Process::start(self.sidecar(name, proxy_uid, &netns, &home), self.log(&format!("{name}.sidecar"))).await?;
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
            entry_ids,
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

    /// Registers a workload's identity for the processes of one user.
    async fn register(&self, spec: &WorkloadSpec, id: &SpiffeId, uid: u32) -> Result<String> {
        let entry = types::Entry {
            spiffe_id: Some(id_to_wire(id)),
            parent_id: Some(id_to_wire(&node_alias(&self.spec)?)),
            selectors: selectors_to_wire([&Selector::new("unix", format!("uid:{uid}"))?]),
            dns_names: vec![spec.name.clone()],
            ..types::Entry::default()
        };
        let created = operator::entry::create(self.channel(), entry).await;
        Ok(created.with_context(|| format!("cannot register {}", spec.name))?.id)
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

    /// Creates a workload's folder of one kind, owned by `owner`.
    fn folder(&self, kind: &str, workload: &str, owner: u32, mode: u32) -> Result<PathBuf> {
        let folder = self.dir.join(kind).join(workload);
        let made = passable(&folder)
            .and_then(|()| std::fs::set_permissions(&folder, PermissionsExt::from_mode(mode)))
            .and_then(|()| std::os::unix::fs::chown(&folder, Some(owner), Some(owner)));
        made.with_context(|| format!("cannot make {}", folder.display()))?;
        // A workload that joins again under its name may have another number, so the old logs change their owner.
        for old in std::fs::read_dir(&folder)?.flatten() {
            let _ = std::os::unix::fs::lchown(old.path(), Some(owner), Some(owner));
        }
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
        running.sidecar.stop().await;
        if let Err(error) = operator::entry::delete(self.channel(), running.entry_ids.clone()).await {
            tracing::warn!(name, %error, "cannot delete the registration entry");
        }
        let _ = kill_inside(&running.netns);
        for kind in ["homes", "accounts"] {
            let _ = std::fs::remove_dir_all(self.dir.join(kind).join(name));
        }
        if let Err(error) = self.fabric.unplug(&running.netns, &port_name(running.number)) {
            tracing::warn!(name, %error, "cannot remove the namespace");
        }
        let _ = self.write_hosts();
    }

    /// Stops everything, programs first. `Place::tidy` removes the rest.
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

    fn netns_name(&self, workload: &str) -> String {
        format!("{}-{workload}", self.names.fabric)
    }

    fn sidecar(&self, name: &str, uid: u32, netns: &NetNs, home: &Path) -> Program {
        let shown = |file: &str| home.join(file).display().to_string();
        let agent_socket = agent_socket(&self.dir).display().to_string();
        let command = [
            OWN_PROGRAM,
            "proxy",
            "--agent-socket",
            &agent_socket,
            "--admin-socket",
            &shown("admin.sock"),
            "--access-log",
            &shown("access.log"),
            "--drain",
            "3s",
        ];
        Program {
            name: format!("{name}'s sidecar"),
            netns: Some(netns.clone()),
            hosts: None,
            accounts: None,
            account: Account::of_uid(uid),
            no_new_privs: true,
            command: command.map(String::from).to_vec(),
            env: BTreeMap::new(),
            workdir: None,
            restart: Restart::Always,
            events: self.events.clone(),
        }
    }

    /// Written in place, because every workload has this file mounted.
    fn write_hosts(&self) -> Result<()> {
        let mut text = format!("127.0.0.1 localhost\n::1 localhost\n# mesh {}\n", self.names.mesh);
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
                uid: format!("{}-{}-{}", w.spec.name, self.run_id, w.entry_ids.join("+")),
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

fn redirect_of(spec: &WorkloadSpec, proxy_uid: u32) -> Redirect {
    let mut redirect = Redirect::for_proxy(proxy_uid);
    redirect.exempt_outbound_ports.extend(&spec.exclude_outbound_ports);
    redirect.exempt_inbound_ports.extend(&spec.exclude_inbound_ports);
    redirect.exempt_outbound_cidrs.extend(&spec.exclude_outbound_cidrs);
    redirect.exempt_inbound_cidrs.extend(&spec.exclude_inbound_cidrs);
    // The mode at start: a later change of the mode leaves the rules as they are.
    redirect.guard = (spec.policy.mode == Mode::Strict).then(|| Guard::with_resolvers_of(Path::new(RESOLV_CONF)));
    redirect
}

/// Publishes the directory after each change, and periodically.
async fn keep_published(channel: Channel, directory: Arc<Mutex<Vec<Workload>>>, changed: Arc<Notify>) {
    loop {
        let all =
            directory.lock().unwrap_or_else(PoisonError::into_inner).iter().map(workload_to_wire).collect::<Vec<_>>();
        if !all.is_empty() {
            let request = PublishRequest { replace: true, upserted: all, ..Default::default() };
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
