//! The command line.

use std::process::ExitCode;

use anyhow::Result;
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};

use crate::{capture, kubernetes, launch, operator, probe, reference, roles, shop, stdout, up};

/// Zero-touch mutual TLS between services.
///
/// Try it: `countersign up` starts a small shop of four services on this machine, each with its own identity and
/// sidecar, and shows them live. `countersign up --verify` checks the whole mesh and exits.
#[derive(Parser)]
#[command(version, propagate_version = true, max_term_width = 120)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What each does, short and at length, stands at its arguments.
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
    Install(kubernetes::InstallArgs),
    Check(kubernetes::CheckArgs),
    Explain(kubernetes::ExplainArgs),
    Verify(kubernetes::VerifyArgs),
    Strict(kubernetes::StrictArgs),
    Uninstall(kubernetes::UninstallArgs),
    Inject(kubernetes::InjectArgs),
    Redirect(roles::redirect::RedirectArgs),
    /// Registration entries: who gets which identity.
    #[command(subcommand)]
    Entry(operator::entry::EntryCommand),
    /// Attested nodes.
    #[command(subcommand)]
    Node(operator::node::NodeCommand),
    /// Join tokens.
    #[command(subcommand)]
    Token(operator::token::TokenCommand),
    /// Trust bundles.
    #[command(subcommand)]
    Bundle(operator::bundle::BundleCommand),
    /// The signing authorities.
    #[command(subcommand)]
    Authority(operator::authority::AuthorityCommand),
    /// Sign an SVID by hand.
    #[command(subcommand)]
    Mint(operator::mint::MintCommand),
    /// Ask the agent for an SVID, as a workload would.
    #[command(subcommand)]
    X509(operator::x509::X509Command),
    Status(operator::status::StatusArgs),
    /// Print a completion script for a shell.
    Completion {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print every frame on this network namespace's links (used by `verify`).
    #[command(hide = true)]
    Capture,
    /// Hold back a pod's containers, or wait for them (used in a sidecar that is a plain container).
    #[command(hide = true, subcommand)]
    SidecarHook(roles::sidecar_hook::SidecarHook),
    /// Start a program in a network namespace (used by `up`).
    #[command(hide = true)]
    Launch(launch::LaunchArgs),
    /// A service of the example shop (used by `up`).
    #[command(hide = true)]
    Shop(shop::ShopArgs),
    /// Print docs/cli.md.
    #[command(hide = true)]
    Reference,
    /// Request a URL many times and report (used by `up --verify`).
    #[command(hide = true)]
    Probe(probe::ProbeArgs),
}

/// The command line of a sidecar alone. One stands beside every workload, so it should not load the code of all other
/// commands only to read its flags.
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
    /// Every command and argument, as clap knows them.
    pub fn definitions() -> clap::Command {
        Self::command()
    }

    /// Reads the process's command line; with a mistake in it, or for help, prints and exits.
    pub fn read() -> Self {
        if std::env::args_os().nth(1).is_some_and(|command| command == "proxy") {
            let SidecarCommand::Proxy(args) = parsed::<SidecarCli>().command;
            return Self { command: Command::Proxy(args) };
        }
        parsed()
    }

    /// Runs the command to its end.
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
            Command::Install(args) => done(kubernetes::install(&args)),
            Command::Check(args) => kubernetes::check(&args),
            Command::Explain(args) => kubernetes::explain(&args),
            Command::Verify(args) => kubernetes::verify(args),
            Command::Strict(args) => kubernetes::strict(&args),
            Command::Uninstall(args) => done(operator::block(kubernetes::uninstall(args))),
            Command::Inject(args) => done(kubernetes::inject(args)),
            Command::Redirect(args) => roles::redirect::run(&args),
            Command::Entry(command) => done(operator::block(operator::entry::run(command))),
            Command::Node(command) => done(operator::block(operator::node::run(command))),
            Command::Token(command) => done(operator::block(operator::token::run(command))),
            Command::Bundle(command) => done(operator::block(operator::bundle::run(command))),
            Command::Authority(command) => done(operator::block(operator::authority::run(command))),
            Command::Mint(command) => done(operator::block(operator::mint::run(command))),
            Command::X509(command) => done(operator::block(operator::x509::run(command))),
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

/// The process's command line; with a mistake in it, or for help, prints and exits.
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

/// Takes commands that `--help` does not show out of what is suggested for a misspelt one.
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
