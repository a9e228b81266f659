//! The command line: all commands, and running the one that was given.

use std::process::ExitCode;

use anyhow::Result;
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};

use crate::{capture, kubernetes, launch, operator, probe, reference, roles, shop, stdout, up};

/// Zero-touch mutual TLS between services.
///
/// Try it: `countersign up` starts an example shop of four services on this machine, each with its own identity and
/// sidecar, and shows them live. `countersign up --verify` checks the whole mesh and exits.
#[derive(Parser)]
#[command(version, propagate_version = true, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// The help text of each command is at its arguments.
#[derive(Subcommand)]
enum Command {
    Up(up::UpArgs),
    Run(up::RunArgs),
    Ps(up::PsArgs),
    Logs(up::LogsArgs),
    Down(up::DownArgs),
    Server(Box<roles::server::ServerArgs>),
    Agent(Box<roles::agent::AgentArgs>),
    Proxy(Box<roles::proxy::ProxyArgs>),
    Controller(Box<roles::controller::ControllerArgs>),
    Csi(roles::csi::CsiArgs),
    CniNode(roles::cni_node::CniNodeArgs),
    Cni(roles::cni::CniArgs),
    Install(kubernetes::InstallArgs),
    Check(kubernetes::CheckArgs),
    Explain(kubernetes::ExplainArgs),
    Support(kubernetes::SupportArgs),
    Verify(kubernetes::VerifyArgs),
    Strict(kubernetes::StrictArgs),
    Uninstall(kubernetes::UninstallArgs),
    Inject(kubernetes::InjectArgs),
    Redirect(roles::redirect::RedirectArgs),
    /// Manage registration entries: which workload gets which identity.
    #[command(subcommand)]
    Entry(operator::entry::EntryCommand),
    /// List, evict and ban attested nodes.
    #[command(subcommand)]
    Node(operator::node::NodeCommand),
    /// Generate join tokens, with which agents attest.
    #[command(subcommand)]
    Token(operator::token::TokenCommand),
    /// Show and change how much a running server logs.
    #[command(subcommand)]
    Logger(operator::logger::LoggerCommand),
    /// Show trust bundles, and set those of foreign trust domains.
    #[command(subcommand)]
    Bundle(operator::bundle::BundleCommand),
    /// Federate with foreign trust domains: say where their bundles are fetched.
    #[command(subcommand)]
    Federation(operator::federation::FederationCommand),
    /// Show, rotate, taint and revoke the signing authorities.
    #[command(subcommand)]
    Authority(operator::authority::AuthorityCommand),
    /// Sign an SVID for a given SPIFFE ID.
    #[command(subcommand)]
    Mint(operator::mint::MintCommand),
    /// Fetch SVIDs from the agent, as a workload would.
    #[command(subcommand)]
    X509(operator::x509::X509Command),
    /// Fetch and validate JWT-SVIDs at the agent, as a workload would.
    #[command(subcommand)]
    Jwt(operator::jwt::JwtCommand),
    Status(operator::status::StatusArgs),
    /// Print a completion script for a shell.
    Completion {
        /// Shell that the script is for.
        shell: clap_complete::Shell,
    },
    /// Print all frames on the links of this network namespace (used by `verify`).
    #[command(hide = true)]
    Capture,
    /// Block a pod's containers, or wait for them (used by a sidecar that is a plain container).
    #[command(hide = true, subcommand)]
    SidecarHook(roles::sidecar_hook::SidecarHook),
    /// Start a program in a network namespace (used by `up`).
    #[command(hide = true)]
    Launch(launch::LaunchArgs),
    /// Run a service of the example shop (used by `up`).
    #[command(hide = true)]
    Shop(shop::ShopArgs),
    /// Print the page docs/cli.md.
    #[command(hide = true)]
    Reference,
    /// Request a URL repeatedly and report (used by `up --verify`).
    #[command(hide = true)]
    Probe(probe::ProbeArgs),
}

/// The command line of the sidecar only. There is a sidecar per workload, so it should not load the code of all other
/// commands just to parse its flags.
#[derive(Parser)]
#[command(name = "countersign", version, propagate_version = true, max_term_width = 120)]
struct SidecarCli {
    #[command(subcommand)]
    command: SidecarCommand,
}

#[derive(Subcommand)]
enum SidecarCommand {
    Proxy(Box<roles::proxy::ProxyArgs>),
}

impl Cli {
    /// All commands and arguments, as clap defines them.
    pub fn definitions() -> clap::Command {
        Self::command()
    }

    /// Parses the process's command line. On an error, or for help, prints and exits.
    pub fn read() -> Self {
        if std::env::args_os().nth(1).is_some_and(|command| command == "proxy") {
            let SidecarCommand::Proxy(args) = parsed::<SidecarCli>().command;
            return Self { command: Command::Proxy(args) };
        }
        parsed()
    }

    /// Runs the command and returns its exit code.
    pub fn run(self) -> Result<ExitCode> {
        let done = |result: Result<()>| result.map(|()| ExitCode::SUCCESS);
        match self.command {
            Command::Up(args) => up::up(args),
            Command::Run(args) => up::run(args),
            Command::Ps(args) => done(up::ps(&args)),
            Command::Logs(args) => done(up::logs(&args)),
            Command::Down(args) => done(up::down(&args)),
            Command::Server(args) => done(roles::server::run(*args)),
            Command::Agent(args) => done(roles::agent::run(*args)),
            Command::Proxy(args) => done(roles::proxy::run(*args)),
            Command::Controller(args) => done(roles::controller::run(*args)),
            Command::Csi(args) => done(roles::csi::run(args)),
            Command::CniNode(args) => done(roles::cni_node::run(args)),
            Command::Cni(_) => Ok(roles::cni::run()),
            Command::Install(args) => operator::block(kubernetes::install(args)),
            Command::Check(args) => kubernetes::check(&args),
            Command::Explain(args) => kubernetes::explain(&args),
            Command::Support(args) => kubernetes::support(&args),
            Command::Verify(args) => kubernetes::verify(args),
            Command::Strict(args) => kubernetes::strict(&args),
            Command::Uninstall(args) => done(operator::block(kubernetes::uninstall(args))),
            Command::Inject(args) => done(kubernetes::inject(args)),
            Command::Redirect(args) => roles::redirect::run(&args),
            Command::Entry(command) => done(operator::block(operator::entry::run(command))),
            Command::Node(command) => done(operator::block(operator::node::run(command))),
            Command::Token(command) => done(operator::block(operator::token::run(command))),
            Command::Logger(command) => done(operator::block(operator::logger::run(command))),
            Command::Bundle(command) => done(operator::block(operator::bundle::run(command))),
            Command::Federation(command) => done(operator::block(operator::federation::run(command))),
            Command::Authority(command) => done(operator::block(operator::authority::run(command))),
            Command::Mint(command) => done(operator::block(operator::mint::run(command))),
            Command::X509(command) => done(operator::block(operator::x509::run(command))),
            Command::Jwt(command) => done(operator::block(operator::jwt::run(command))),
            Command::Status(args) => done(operator::block(operator::status::run(args))),
            Command::Completion { shell } => {
                let mut script = vec![];
                clap_complete::generate(shell, &mut Self::command(), "countersign", &mut script);
                done(stdout::put(&String::from_utf8_lossy(&script)).map_err(Into::into))
            }
            Command::Reference => done(stdout::put(&reference::page(Self::definitions())).map_err(Into::into)),
            Command::Capture => done(capture::run()),
            Command::SidecarHook(hook) => done(roles::sidecar_hook::run(&hook)),
            Command::Launch(args) => launch::run(&args).map(|never| match never {}),
            Command::Shop(args) => done(shop::run(args)),
            Command::Probe(args) => probe::run(args),
        }
    }
}

/// Parses the process's command line. On an error, or for help, prints and exits.
fn parsed<T: Parser>() -> T {
    let error = match T::try_parse() {
        Ok(cli) => return cli,
        Err(error) => without_hidden_commands(error),
    };
    let code = match error.print() {
        Ok(()) => error.exit_code(),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => stdout::CLOSED_EXIT_CODE.into(),
        Err(e) => {
            eprintln!("countersign: cannot write to standard output: {e}");
            1
        }
    };
    std::process::exit(code)
}

/// Removes hidden commands from the suggestions for a misspelt one.
fn without_hidden_commands(mut error: clap::Error) -> clap::Error {
    let Some(ContextValue::Strings(suggested)) = error.remove(ContextKind::SuggestedSubcommand) else { return error };
    let all = Cli::command();
    let hidden = |name: &String| all.get_subcommands().any(|c| c.get_name() == name && c.is_hide_set());
    let shown: Vec<String> = suggested.into_iter().filter(|name| !hidden(name)).collect();
    if !shown.is_empty() {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(shown));
    }
    error
}
