//! Ways to a running server or agent, and errors that say what to do next.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use countersign_api::transport::{MAX_MESSAGE_BYTES, unix_channel};
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Where a server's Unix socket is, unless told otherwise.
pub const SERVER_SOCKET: &str = "/run/countersign/server.sock";
/// Where an agent's Unix socket is, unless told otherwise.
pub const AGENT_SOCKET: &str = "/run/countersign/agent.sock";

/// How a command finds its server.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerArg {
    /// The server's Unix socket.
    #[arg(long, env = "COUNTERSIGN_SERVER_SOCKET", default_value = SERVER_SOCKET, value_name = "PATH")]
    pub socket: PathBuf,
}

impl ServerArg {
    /// A channel to it.
    pub fn channel(&self) -> anyhow::Result<Channel> {
        channel(&self.socket, "server")
    }
}

/// A channel to a socket that is there.
pub fn channel(socket: &Path, role: &str) -> anyhow::Result<Channel> {
    if !socket.exists() {
        return Err(anyhow!(
            "no {role} listens at {}: is it running here? (name another place with --socket)",
            socket.display()
        ));
    }
    std::os::unix::net::UnixStream::connect(socket)
        .with_context(|| format!("cannot reach the {role} at {}", socket.display()))?;
    Ok(unix_channel(socket))
}

/// A client of a service with our message bound.
macro_rules! client {
    ($service:ident, $channel:expr) => {
        $service::new($channel)
            .max_decoding_message_size($crate::clients::MAX_MESSAGE)
            .max_encoding_message_size($crate::clients::MAX_MESSAGE)
    };
}
pub(crate) use client;

/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = MAX_MESSAGE_BYTES;

/// A refused call as an error for people.
pub fn refused(status: Status) -> anyhow::Error {
    let hint = match status.code() {
        Code::Unavailable => " (is it still running?)",
        Code::PermissionDenied => " (run it as root, or as the user that the role runs as)",
        _ => "",
    };
    anyhow!("{}{hint}", status.message())
}
