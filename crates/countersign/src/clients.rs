//! Connections to a running server or agent, with errors that name the next step.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use crate::settings::Mistake;
use crate::up;
use anyhow::{Context, anyhow};
use countersign_api::status::message_of;
use countersign_api::transport::{MAX_MESSAGE_BYTES, connect_unix, unix_channel};
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::BoxFuture;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Default path of a server's Unix socket.
pub const SERVER_SOCKET: &str = "/run/countersign/server.sock";
/// Default path of an agent's Unix socket.
pub const AGENT_SOCKET: &str = "/run/countersign/agent.sock";
/// Longest wait for a socket to take a connection.
pub const CONNECT: Duration = Duration::from_secs(5);

/// Longest wait for an answer. The longest work of a server is an RSA key, of some seconds on a slow machine.
const ANSWER: Duration = Duration::from_secs(9);

/// A channel to a role behind a Unix socket, whose calls fail after [`ANSWER`], with words that name the socket. A process that
/// is stopped, or waits for its disk, still takes connections: its kernel does that.
#[derive(Clone)]
pub struct Asking {
    channel: Channel,
    late: Arc<str>,
}

impl Asking {
    /// The role behind this socket, connected when it is first asked.
    pub fn at(socket: &Path, role: &str) -> Self {
        let late = format!(
            "the {role} at {} does not answer, for {} s: is it stopped, or its disk full or stuck? Look at its log, or \
             restart it",
            socket.display(),
            ANSWER.as_secs()
        );
        Self { channel: unix_channel(socket), late: late.into() }
    }
}

impl GrpcService<Body> for Asking {
    type ResponseBody = Body;
    type Error = tonic::codegen::StdError;
    type Future = BoxFuture<http::Response<Body>, Self::Error>;

    fn poll_ready(&mut self, cx: &mut TaskContext<'_>) -> Poll<Result<(), Self::Error>> {
        GrpcService::poll_ready(&mut self.channel, cx).map_err(Into::into)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (answer, late) = (GrpcService::call(&mut self.channel, request), self.late.clone());
        Box::pin(async move {
            match tokio::time::timeout(ANSWER, answer).await {
                Ok(answered) => Ok(answered?),
                Err(_) => Err(Status::deadline_exceeded(&*late).into()),
            }
        })
    }
}

/// The argument that selects the server.
#[derive(Debug, Clone, clap::Args)]
pub struct ServerArg {
    /// Unix socket of the server [default: /run/countersign/server.sock, or the socket of the only mesh that `up` runs
    /// here].
    #[arg(long, env = "COUNTERSIGN_SERVER_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

impl ServerArg {
    /// A channel to the selected server.
    pub fn channel(&self) -> anyhow::Result<Asking> {
        channel(&server_socket(self.socket.clone())?, "server")
    }
}

/// The socket to use: the given one, the default one, or that of the only mesh that runs on this machine.
pub fn server_socket(named: Option<PathBuf>) -> Result<PathBuf, Mistake> {
    let usual = PathBuf::from(SERVER_SOCKET);
    if let Some(named) = named {
        return Ok(named);
    }
    // Only if the default one certainly does not exist: any other problem with it is reported by the connection
    // attempt.
    if !matches!(std::fs::metadata(&usual), Err(e) if e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(usual);
    }
    let socket = |mesh: &str| Path::new(up::RUN_DIR).join(mesh).join("server").join("server.sock");
    let meshes = up::meshes().unwrap_or_default().up;
    match &meshes[..] {
        [] => Ok(usual),
        [one] => Ok(socket(one)),
        [first, ..] => Err(Mistake(format!(
            "several meshes are up ({}); choose a server with --socket, as in --socket {}",
            meshes.join(", "),
            socket(first).display()
        ))),
    }
}

/// A channel to a socket. Errors if the socket does not exist or may not be used.
pub fn channel(socket: &Path, role: &str) -> anyhow::Result<Asking> {
    let shown = socket.display();
    match std::fs::metadata(socket) {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            return Err(anyhow!(
                "this user may not enter the folder of {shown}; run it as root, or as the user that the {role} runs as"
            ));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(anyhow!(
                "no {role} listens at {shown}: is it running here? (name another place with --socket)"
            ));
        }
        Err(e) => return Err(anyhow!("cannot reach {shown}: {e}")),
    }
    match connect_unix(socket, CONNECT) {
        Ok(_) => Ok(Asking::at(socket, role)),
        // What a role that has ended leaves behind.
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => Err(anyhow!(
            "no {role} listens at {shown} any more: has it ended? Look at its log (name another place with --socket)"
        )),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(anyhow!("this user may not use {shown}; run it as root, or as the user that the {role} runs as"))
        }
        Err(e) => Err(e).with_context(|| format!("cannot reach the {role} at {shown}")),
    }
}

/// A client of a service with our bound on message sizes.
macro_rules! client {
    ($service:ident, $channel:expr) => {
        $service::new($channel)
            .max_decoding_message_size($crate::clients::MAX_MESSAGE)
            .max_encoding_message_size($crate::clients::MAX_MESSAGE)
    };
}
pub(crate) use client;

/// Longest message that is sent or received, in bytes.
pub const MAX_MESSAGE: usize = MAX_MESSAGE_BYTES;

/// Converts a failed call to an error with a hint at the next step.
pub fn refused(status: Status) -> anyhow::Error {
    let hint = match status.code() {
        Code::Unavailable => " (is it still running?)",
        Code::PermissionDenied => " (run it as root, or as the user that the role runs as)",
        _ => "",
    };
    anyhow!("{}{hint}", message_of(&status))
}
