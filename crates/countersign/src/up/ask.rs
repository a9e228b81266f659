//! Questions of `ps`, `logs`, `status NAME` and `down` to a running mesh, over the socket that `run` uses to join.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use countersign_api::push::GetStatusRequest;
use countersign_api::push::status_client::StatusClient;
use countersign_api::transport::{connect_unix, unix_channel};
use nix::sys::signal::{Signal, raise};
use serde::{Deserialize, Serialize};

use super::children::{Process, State};
use super::control::{SOCKET, socket_of};
use super::mesh::Mesh;
use super::run_directory::RUN_DIR;
use super::table::{Row, ask_once};
use crate::clients::{CONNECT, client};
use crate::settings::Mistake;
use crate::settings::words::{did_you_mean, shown};

/// Longest wait for an answer: the mesh asks its sidecars, each of which may take a second.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest wait for the server's or the agent's answer.
const ROLE: Duration = Duration::from_secs(2);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 4 * 1024 * 1024;

/// A question to a running mesh.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "lowercase", deny_unknown_fields)]
pub enum Question {
    /// Asks for the state of everything.
    Ps,
    /// Asks the mesh to stop.
    Down,
}

/// The state of a mesh.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Overview {
    /// Name of the mesh.
    pub mesh: String,
    /// Trust domain of the mesh.
    pub trust_domain: String,
    /// Process ID of `up`.
    pub pid: u32,
    /// Folder with the logs.
    pub logs: PathBuf,
    /// Unix socket of the server, for operators.
    pub server_socket: PathBuf,
    /// Unix socket of the agent.
    pub agent_socket: PathBuf,
    /// State of server and agent.
    pub roles: Vec<Role>,
    /// Workloads, those with problems first.
    pub workloads: Vec<Row>,
}

/// State of the server or the agent.
#[derive(Debug, Serialize, Deserialize)]
pub struct Role {
    /// Name: `server` or `agent`.
    pub name: String,
    /// State in words.
    pub state: String,
    /// Number of restarts.
    pub restarts: u32,
}

/// The answer to a line; `None` if the line is not a question.
pub async fn answer(mesh: &Rc<Mesh>, line: &str) -> Option<String> {
    let question: Question = serde_json::from_str(line).ok()?;
    let overview = match question {
        Question::Ps => overview(mesh).await,
        Question::Down => {
            // The same as Ctrl-C, so that there is one shutdown path.
            let _ = raise(Signal::SIGINT);
            Overview { mesh: mesh.spec.name.clone(), pid: std::process::id(), ..Overview::default() }
        }
    };
    serde_json::to_string(&overview).ok()
}

async fn overview(mesh: &Rc<Mesh>) -> Overview {
    let (server_socket, agent_socket) = (mesh.server_socket(), super::control_plane::agent_socket(mesh.dir()));
    let [server, agent] = mesh.roles();
    let roles = tokio::join!(role(server, &server_socket), role(agent, &agent_socket));
    Overview {
        mesh: mesh.spec.name.clone(),
        trust_domain: mesh.spec.trust_domain.to_string(),
        pid: std::process::id(),
        logs: mesh.logs().to_owned(),
        server_socket,
        agent_socket,
        roles: vec![roles.0, roles.1],
        workloads: ask_once(mesh).await,
    }
}

/// The state of a role, which is asked: one that is stopped is a process as any other.
async fn role((name, process): (&str, &Process), socket: &Path) -> Role {
    let state = match process.state() {
        State::Ended(end) => end.to_string(),
        State::Running(_) => {
            let mut client = client!(StatusClient, unix_channel(socket));
            match tokio::time::timeout(ROLE, client.get_status(GetStatusRequest {})).await {
                Err(_) => format!("no answer for {} s", ROLE.as_secs()),
                // One that refuses to tell runs as well, or is restarted this moment.
                Ok(_) => "running".into(),
            }
        }
    };
    Role { name: name.into(), state, restarts: process.restarts() }
}

/// The meshes of this machine, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Meshes {
    /// Those that are up.
    pub up: Vec<String>,
    /// Those whose `up` was killed: nobody answers at their socket any more.
    pub killed: Vec<String>,
}

/// Looks which meshes this machine has.
///
/// # Errors
/// The run directory cannot be read.
pub fn meshes() -> Result<Meshes, Mistake> {
    meshes_in(Path::new(RUN_DIR))
}

fn meshes_in(run_dir: &Path) -> Result<Meshes, Mistake> {
    let entries = match std::fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Meshes::default()),
        Err(e) => return Err(Mistake(format!("{} cannot be read: {e}; run this as root", run_dir.display()))),
    };
    let mut found = Meshes::default();
    for entry in entries.flatten() {
        let (socket, Ok(name)) = (entry.path().join(SOCKET), entry.file_name().into_string()) else { continue };
        match connect_unix(&socket, CONNECT) {
            // A mesh without a socket, and files that are no mesh.
            Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {}
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => found.killed.push(name),
            // One that is asked and cannot answer says why then.
            _ => found.up.push(name),
        }
    }
    found.up.sort();
    found.killed.sort();
    Ok(found)
}

/// What to do about a mesh whose `up` was killed.
pub fn killed(name: &str) -> String {
    format!("the `up` of mesh `{name}` was killed; `countersign down {name}` removes what it left")
}

/// The mesh to use: the given one, or the only one that is up.
pub fn the_mesh(named: Option<&str>, flag: &str) -> Result<String, Mistake> {
    meshes()?.choose(named, flag)
}

impl Meshes {
    fn choose(&self, named: Option<&str>, flag: &str) -> Result<String, Mistake> {
        match (named, &self.up[..]) {
            (Some(name), _) if self.up.iter().any(|m| m == name) => Ok(name.to_owned()),
            (Some(name), _) if self.killed.iter().any(|m| m == name) => Err(Mistake(killed(name))),
            (Some(name), []) => {
                Err(Mistake(format!("no mesh `{}` is up here; start one with `countersign up`", shown(name))))
            }
            (Some(name), several) => {
                let hint = did_you_mean(name, several.iter().map(String::as_str));
                let hint = if hint.is_empty() { format!("; there is {}", several.join(", ")) } else { hint };
                Err(Mistake(format!("no mesh `{}` is up here{hint}", shown(name))))
            }
            (None, [one]) => Ok(one.clone()),
            (None, []) => match &self.killed[..] {
                [] => Err(Mistake("no mesh is up on this machine; start one with `countersign up`".into())),
                [first, ..] => Err(Mistake(format!("no mesh is up on this machine: {}", killed(first)))),
            },
            (None, several) => {
                Err(Mistake(format!("several meshes are up ({}); choose one with {flag}", several.join(", "))))
            }
        }
    }
}

/// Sends a question to a running mesh and returns the answer.
pub fn ask(mesh: &str, question: &Question) -> Result<Overview> {
    let path = socket_of(mesh);
    let talk = || -> Result<Overview> {
        let mut stream = connect_unix(&path, CONNECT)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        writeln!(stream, "{}", serde_json::to_string(question)?)?;
        let mut line = String::new();
        BufReader::new(stream.take(MAX_ANSWER)).read_line(&mut line)?;
        let answer: serde_json::Value = serde_json::from_str(&line).context("it gave no answer")?;
        match answer["error"].as_str() {
            Some(error) => Err(anyhow!("{error}")),
            None => Ok(serde_json::from_value(answer)?),
        }
    };
    talk().with_context(|| format!("cannot ask the mesh `{mesh}` ({})", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mesh_whose_up_was_killed_is_told_apart_and_named_with_what_to_do() {
        let run_dir = tempfile::tempdir().unwrap();
        let listen = |mesh: &str| {
            let folder = run_dir.path().join(mesh);
            std::fs::create_dir(&folder).unwrap();
            std::os::unix::net::UnixListener::bind(folder.join(SOCKET)).unwrap()
        };
        let (_shop, night) = (listen("shop"), listen("night"));
        std::fs::create_dir(run_dir.path().join("other")).unwrap();
        std::fs::write(run_dir.path().join("shop.lock"), "").unwrap();
        drop(night);
        let found = meshes_in(run_dir.path()).unwrap();
        assert_eq!(found, Meshes { up: vec!["shop".into()], killed: vec!["night".into()] });
        assert_eq!(found.choose(None, "--mesh").unwrap(), "shop", "the other one is no choice");
        let why = found.choose(Some("night"), "--mesh").unwrap_err().0;
        assert!(why.contains("was killed") && why.contains("countersign down night"), "{why}");
        let alone = Meshes { up: vec![], ..found };
        assert!(alone.choose(None, "--mesh").unwrap_err().0.contains("countersign down night"));
    }
}
