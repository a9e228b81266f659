//! Whether the socket's path leads to this agent. Who can write to the folder can put another socket there, and callers would take
//! the identities that its owner gives them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use countersign_api::transport::connect_unix;
use nix::sys::socket::{getsockopt, sockopt};

/// Longest wait for a connection to it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The path of the agent's socket, and who answered there last.
pub struct OwnSocket {
    path: PathBuf,
    trouble: Mutex<Option<String>>,
}

impl OwnSocket {
    /// A socket that has just been bound.
    pub fn at(path: PathBuf) -> Self {
        Self { path, trouble: Mutex::default() }
    }

    /// Connects to the path, and notes who listens there; whether it is this process.
    pub async fn look(&self) -> bool {
        let path = self.path.clone();
        let looked = tokio::task::spawn_blocking(move || trouble(&path)).await;
        // A task that is not run is one of an agent that ends.
        let trouble = looked.unwrap_or_default();
        let mut known = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != trouble {
            if let Some(trouble) = &trouble {
                tracing::error!(trouble, "callers do not reach this agent");
            } else {
                tracing::info!(path = %self.path.display(), "callers reach this agent again");
            }
        }
        *known = trouble;
        known.is_none()
    }

    /// What was wrong when it was last looked at, in words.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn trouble(path: &Path) -> Option<String> {
    let own = i32::try_from(std::process::id()).ok()?;
    match listener(path) {
        Ok(pid) if pid == own => None,
        // Of a process that our namespace of processes does not have.
        Ok(0) => Some(format!("{} is answered by a process that is not this agent", path.display())),
        Ok(pid) => Some(format!("{} is answered by process {pid}, which is not this agent", path.display())),
        Err(error) => Some(format!("nobody answers at {}: {error}", path.display())),
    }
}

/// The process that listens on a socket, by the kernel (`SO_PEERCRED` of a connection to it); 0 if it is in another namespace.
fn listener(path: &Path) -> io::Result<i32> {
    let stream = connect_unix(path, PATIENCE)?;
    Ok(getsockopt(&stream, sockopt::PeerCredentials)?.pid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[tokio::test]
    async fn a_socket_in_our_place_is_told_by_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let own = OwnSocket::at(path.clone());
        assert!(!own.look().await && own.trouble().unwrap().starts_with("nobody answers at "), "there is none");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(own.look().await && own.trouble().is_none());
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        let serve = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print('up', flush=True); sys.stdin.read()";
        let mut other = Command::new("python3");
        let other = other.args(["-c", serve]).arg(&path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut other = other.unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(other.stdout.as_mut().unwrap()), &mut line).unwrap();
        assert!(!own.look().await);
        let said = own.trouble().unwrap();
        assert!(said.ends_with(&format!("is answered by process {}, which is not this agent", other.id())), "{said}");
        drop(other.stdin.take());
        other.wait().unwrap();
    }
}
