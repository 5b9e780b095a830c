//! What `ensign vault` takes.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ClientArgs, Output, ReportArgs};

/// `ensign vault`.
#[derive(Debug, Subcommand)]
pub enum VaultCommand {
    /// Show, for every node, whether its vault is sealed and why, what keeps the root key, and who leads the vault.
    #[command(
        after_help = "While the vault is sealed on all nodes nobody can log in: ask a node itself, with --direct.

Examples:
  ensign vault status
  ensign vault status --direct http://127.0.0.1:1205    on a node, without logging in
  ensign vault status --output json | jq '.nodes[] | select(.state != \"unsealed\")'"
    )]
    Status(ReportArgs),
    /// Unseal the vault on this machine's node, and lift an operator's seal for all nodes.
    #[command(
        after_help = "Run it on the node's own machine, as the server's user or as root. Where the root key is made of a
passphrase, every node of the vault has to be unsealed so after each restart; it is asked for at the
terminal, or read from standard input or a file descriptor. After a wrong one the next attempt has to
wait: 1 second, then 2, and so on up to a minute.

Examples:
  sudo ensign vault unseal
  sudo ensign vault unseal --passphrase-fd 3 3< /run/secrets/ensign-root
  pass show ensign/root | ssh node-2 sudo ensign vault unseal"
    )]
    Unseal {
        /// Read the passphrase from this file descriptor instead of the terminal or standard input.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(3..))]
        passphrase_fd: Option<u32>,
        /// The node.
        #[command(flatten)]
        socket: SocketArgs,
        /// How to print.
        #[arg(long, value_enum, default_value_t = Output::Human)]
        output: Output,
    },
    /// Seal the vault: no key is handed out any more, and all nodes stop publishing and reading within seconds.
    #[command(
        after_help = "For an emergency. Every node of the vault overwrites its keys in memory, and stays sealed through
restarts until `ensign vault unseal` on one of them (on each of them, where the root key is made of a
passphrase). Nothing that is stored changes.

Examples:
  ensign vault seal
  sudo ensign vault seal --yes --local                  on a node, when nobody can log in"
    )]
    Seal {
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Ask the node of this machine, without logging in.
        #[arg(long)]
        local: bool,
        /// The node.
        #[command(flatten)]
        socket: SocketArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// Where the node of this machine is.
#[derive(Debug, Args)]
pub struct SocketArgs {
    /// The node's socket: `ensign.sock` in its data directory, or what listen.operator says.
    #[arg(
        long,
        value_name = "FILE",
        env = "ENSIGN_SOCKET",
        hide_env_values = true,
        default_value = "/var/lib/ensign/ensign.sock"
    )]
    pub socket: PathBuf,
}
