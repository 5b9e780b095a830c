//! The `ensign` command line: what can be typed, and what client commands do.
//!
//! Client commands are programs on `ensign_client`: they know the public API only. Serving is elsewhere (`serve`, `dev`).

mod admin;
mod apikey;
mod args;
mod cluster;
mod connect;
mod doctor;
mod events;
mod exit;
mod key;
mod output;
mod placement;
mod quota;
mod receipt;
mod topic;
mod topics;
mod vault;
mod watch;

use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};

use crate::config::{Config, Provider};

pub use args::{ApiKeyCommand, Cli, ClientArgs, Command, ConfigCommand, DevArgs, KeyCommand, Output, ServeArgs};
pub(crate) use connect::connect;
pub use exit::{Exit, Interrupted, UsageError, exit_code};
pub(crate) use output::{fields as print_record, json as print_json, note, thousands};

/// Runs the command that was typed; the process ends with the code that this returns.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return report(&anyhow::Error::from(error).context("cannot start")).into(),
    };
    let code = match runtime.block_on(run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough, as in `ensign query … | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => report(&error).into(),
    };
    // A read of the terminal that nobody will answer must not keep us.
    runtime.shutdown_timeout(Duration::from_millis(100));
    code
}

/// Runs one command.
///
/// # Errors
/// Whatever went wrong; [`exit_code`] tells its code.
pub async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => crate::serve::run(args).await,
        Command::Dev(args) => crate::dev::run(args).await,
        Command::Config(ConfigCommand::Check { config, without_files, settings }) => {
            let config = Config::load(config.as_deref(), *settings)?;
            if without_files {
                crate::serve::check_peers(&config)?;
            } else {
                check_files(&config)?;
            }
            output::line(toml::to_string(&config)?.trim_end())
        }
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "ensign", &mut std::io::stdout());
            Ok(())
        }
        Command::Project(command) => admin::project(command).await,
        Command::Topic(command) => topic::run(command).await,
        Command::Publish(args) => events::publish(args).await,
        Command::Subscribe(args) => events::subscribe(args).await,
        Command::Query(args) => events::query(args).await,
        Command::ApiKey(command) => admin::api_key(command).await,
        Command::Key(command) => key::run(command).await,
        Command::Receipt(command) => receipt::run(command).await,
        Command::Vault(command) => vault::run(command).await,
        Command::Quota(command) => quota::run(command).await,
        Command::Node(command) => placement::node(command).await,
        Command::Partition(command) => placement::partition(command).await,
        Command::Status(args) => admin::status(args).await,
        Command::Cluster(command) => cluster::run(command).await,
        Command::Doctor(args) => doctor::run(args).await,
        Command::Bench(command) => crate::bench::run(command).await,
    }
}

fn check_files(config: &Config) -> anyhow::Result<()> {
    crate::serve::check(config)?;
    if config.root.provider == Provider::File && !config.node.root_key.exists() {
        note(format_args!(
            "note: node.root_key = \"{}\" is not there: `ensign serve --bootstrap` makes it, on one node; without a copy of it the vault of \
             this node stays sealed",
            config.node.root_key.display()
        ));
    }
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &std::io::Error| cause.kind() == std::io::ErrorKind::BrokenPipe;
    error.chain().filter_map(|cause| cause.downcast_ref()).any(broken)
}

/// Says on stderr why a command failed, and returns the code to end with.
pub fn report(error: &anyhow::Error) -> Exit {
    let code = exit_code(error);
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Errors that show their source already say the same twice.
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    output::note(format_args!("ensign: {text}"));
    code
}

/// Runs `work` until it is done or the process is asked to end.
///
/// # Errors
/// [`Interrupted`], or what `work` says.
pub(crate) async fn until_interrupted<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::select! {
        done = work => done,
        () = stop_signal() => Err(Interrupted.into()),
    }
}

/// Resolves when the process is asked to end by SIGINT or SIGTERM.
pub(crate) async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // Without handlers the default action ends the process, which is what was asked for.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
