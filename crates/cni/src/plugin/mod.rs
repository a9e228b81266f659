//! The plugin, which the container runtime starts for each pod: a chained plugin of CNI 0.3 to 1.1. It decides nothing;
//! it hands the pod's network namespace to the node's component and passes on what the plugin before it said.
//!
//! Where the component does not answer, the plugin says so on standard error and lets the pod pass: a pod outside of
//! the mesh is never held up by us, and one inside is held by its own init container until the component has installed
//! the redirect.

mod arguments;
mod config;
mod outcome;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use countersign_api::transport::connect_unix;
use countersign_identity::shown::shown;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use arguments::PodName;
pub use outcome::Outcome;

use self::config::NetworkConfig;
use self::outcome::PluginError;
use crate::wire::{self, Answer, Operation, Request};

/// Name of the plugin's file, and of its `type` in configurations.
pub const NAME: &str = "countersign-cni";
/// Versions of CNI that the plugin knows.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// The version of what is said where the runtime's is not known.
const LATEST: &str = "1.1.0";
/// Largest configuration that is read, in bytes. It contains what the plugins before said.
const MAX_CONFIG: u64 = 1024 * 1024;
/// Time for the runtime to write it.
const CONFIG_TIME: Duration = Duration::from_secs(10);
/// Time for the node's component to answer. It gives up by itself before.
const PATIENCE: Duration = Duration::from_secs(10);

/// The variables by which a runtime says what it wants (CNI specification 1.1.0, section 2).
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: String,
    /// `CNI_CONTAINERID`.
    pub container: Option<String>,
    /// `CNI_NETNS`.
    pub netns: Option<String>,
    /// `CNI_IFNAME`.
    pub interface: Option<String>,
    /// `CNI_ARGS`.
    pub arguments: Option<String>,
}

impl Environment {
    /// The process's own; `None` if no runtime has started it.
    pub fn read() -> Option<Self> {
        let get =
            |name: &str| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()).filter(|v| !v.is_empty());
        Some(Self {
            command: get("CNI_COMMAND")?,
            container: get("CNI_CONTAINERID"),
            netns: get("CNI_NETNS"),
            interface: get("CNI_IFNAME"),
            arguments: get("CNI_ARGS"),
        })
    }
}

/// Runs the plugin on the process's environment, standard input and output; `None` if no runtime has started it.
pub fn main() -> Option<ExitCode> {
    let environment = Environment::read()?;
    Some(run(&environment, &mut InTime::new(io::stdin())).print())
}

/// Runs the plugin. `input`: the network configuration.
pub fn run(environment: &Environment, input: &mut impl Read) -> Outcome {
    // What removes a pod must not fail: nothing of ours outlives its network namespace.
    if ["DEL", "GC"].contains(&environment.command.as_str()) {
        return Outcome::silent();
    }
    let config = match read(input) {
        Ok(config) => config,
        Err(error) => return Outcome::failed(LATEST, error),
    };
    let version = config.version().unwrap_or(LATEST).to_owned();
    carried_out(environment, config).unwrap_or_else(|error| Outcome::failed(&version, error))
}

fn read(input: &mut impl Read) -> Result<NetworkConfig, PluginError> {
    let mut text = vec![];
    input
        .take(MAX_CONFIG + 1)
        .read_to_end(&mut text)
        .map_err(|e| PluginError::io("cannot read the configuration", &e))?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(PluginError::config(&format!("the configuration is longer than {MAX_CONFIG} bytes")));
    }
    NetworkConfig::parse(&text)
}

fn carried_out(environment: &Environment, config: NetworkConfig) -> Result<Outcome, PluginError> {
    if environment.command == "VERSION" {
        return Ok(Outcome::versions(config.version().unwrap_or(LATEST)));
    }
    let version = config.supported_version()?;
    match environment.command.as_str() {
        "STATUS" => Ok(Outcome::silent()),
        "ADD" => {
            let before = config.result_before(version)?;
            let warning = ask(environment, &config, Operation::Add)?;
            Ok(Outcome::result(&before, warning))
        }
        "CHECK" => ask(environment, &config, Operation::Check).map(Outcome::warned),
        other => Err(PluginError::environment(&format!("CNI_COMMAND is `{}`, which is no command", shown(other)))),
    }
}

/// Has the node's component install the redirect, or look at it. Returns why the pod passes although that is not known
/// to be done.
///
/// # Errors
/// The runtime's variables are incomplete, or the component has failed for a pod of the mesh.
fn ask(environment: &Environment, config: &NetworkConfig, operation: Operation) -> Result<Option<String>, PluginError> {
    let given = |value: &Option<String>, name: &str| {
        value.clone().ok_or_else(|| PluginError::environment(&format!("{name} is missing")))
    };
    let container = given(&environment.container, "CNI_CONTAINERID")?;
    let netns = given(&environment.netns, "CNI_NETNS")?;
    given(&environment.interface, "CNI_IFNAME")?;
    let arguments = environment.arguments.as_deref().unwrap_or_default();
    let pod = match PodName::of_arguments(arguments) {
        Ok(Some(pod)) => pod,
        Ok(None) => return Ok(None),
        Err(why) => return Ok(Some(why)),
    };
    let netns = File::open(&netns)
        .map_err(|e| PluginError::io(&format!("cannot open the network namespace {}", shown(&netns)), &e))?;
    let request = Request { operation, pod, container, resolvers: config.resolvers() };
    match answer_of(config.socket(), &request, &netns) {
        Ok(Answer::Nothing | Answer::InForce) => Ok(None),
        Ok(Answer::Unknown { why }) => Ok(Some(why)),
        Ok(Answer::Failed { why }) => Err(PluginError::redirect(&why)),
        Err(error) => {
            Ok(Some(format!("the node's component does not answer at {}: {error}", config.socket().display())))
        }
    }
}

fn answer_of(socket: &Path, request: &Request, netns: &File) -> io::Result<Answer> {
    let end = Instant::now() + PATIENCE;
    let stream = connect_unix(socket, PATIENCE)?;
    wire::ask(stream, request, netns.as_fd(), end)
}

/// Standard input that has to end in time.
struct InTime<T> {
    input: T,
    end: Instant,
}

impl<T: AsFd + Read> InTime<T> {
    fn new(input: T) -> Self {
        Self { input, end: Instant::now() + CONFIG_TIME }
    }
}

impl<T: AsFd + Read> Read for InTime<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let fd = self.input.as_fd();
        if poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout)? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.input.read(buffer)
    }
}

#[cfg(test)]
mod tests;
