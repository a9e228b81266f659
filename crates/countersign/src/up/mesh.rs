//! A running mesh: server and agent as processes, and a namespace, a sidecar and a program per workload.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, anyhow};
use countersign_identity::policy::Mode;
use countersign_identity::trust_domain::service_account_id;
use countersign_redirect::bridge::{Addresses, Bridge};
use countersign_redirect::netns::NetNs;
use countersign_redirect::{Backend, install};

use super::account::{Account, Login};
use super::children::{Process, Program, State, cause_of_end};
use super::control_plane::{PATIENCE, agent_socket, node_alias, server_socket, start_agent, start_server};
use super::events::Events;
use super::leftovers::Belonging;
use super::mesh_file::{MeshSpec, Restart, WorkloadSpec, check_user};
use super::namespaces::Namespaces;
use super::node_identity::NodeIdentity;
use super::numbers::Numbers;
use super::published::Published;
use super::registration::Registration;
use super::rotate::Log;
use super::run_directory::{RunDirectory, end_all_of, fresh, kill_inside};
use super::running::{Parts, Running, is_ready};
use super::sidecar;
use super::users::{Users, users_with_processes};

/// Host number of the first workload in the mesh's networks.
const FIRST_HOST: u16 = 10;

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
    registration: Registration,
    published: Published,
    /// Held while a workload comes or goes: who comes next finds its name and number free.
    changing: tokio::sync::Mutex<()>,
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
        let numbers = Numbers::default();
        let registration = Registration::new(server_socket(&dir), node_alias(&spec)?, numbers.clone());
        let mesh = Rc::new(Self {
            namespaces: run_dir.namespaces().clone(),
            workloads: Mutex::default(),
            numbers,
            registration,
            published: Published::start(server_socket(&dir)),
            changing: tokio::sync::Mutex::default(),
            spec: spec.clone(),
            dir,
            users: run_dir.users(),
            logs,
            bridge,
            server,
            agent,
            events,
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
            let id = self.registration.next_id(name);
            parts.entry_ids.push(id.clone());
            self.registration.register(&spec, &spiffe_id, uid, id).await?;
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
        self.published.update(self.workloads().values());
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
        let ready = async || running.status().await.is_ok_and(|status| is_ready(&status));
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
            belonging: Some(Belonging {
                netns: running.netns.clone(),
                uid: running.account.uid,
                own_user: running.spec.user.is_none(),
            }),
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
        running.stop_program().await;
        self.published.update(self.workloads().values());
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
        self.registration.forget(name, parts.number, parts.entry_ids).await;
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

    /// Stops everything, programs first. `RunDirectory::tidy` removes the rest.
    pub async fn stop(&self) {
        for running in self.workloads().values() {
            running.stop_program().await;
        }
        for running in self.workloads().values() {
            running.sidecar.stop().await;
        }
        self.published.stop();
        self.registration.stop();
        self.agent.stop().await;
        self.server.stop().await;
    }

    /// Overrides the mode of the whole mesh without a restart; `None` restores the file's.
    pub fn set_mode(&self, mode: Option<Mode>) {
        self.published.set_mode(mode);
        self.published.update(self.workloads().values());
    }

    /// File with the host names, mounted as every workload's `/etc/hosts`.
    pub fn hosts(&self) -> PathBuf {
        self.dir.join("hosts")
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
            env: sidecar::environment(),
            workdir: None,
            restart: Restart::Always,
            belonging: None,
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
}
