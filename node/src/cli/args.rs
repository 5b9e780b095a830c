//! What can be typed: the tree of commands, their flags and their help.

mod access;
mod cluster;
mod events;
mod key;
mod placement;
mod quota;
mod receipt;
mod report;
mod topic;
mod vault;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::bench::BenchCommand;
use crate::config::ServerArgs;

pub use access::ApiKeyCommand;
pub(super) use access::{ProjectCommand, StatusArgs};
pub(super) use cluster::{ClusterCommand, ClusterInitArgs, ClusterJoinArgs, NodeArgs, TokenCommand};
pub(super) use events::{ConsistencyArg, PublishArgs, QueryArgs, SubscribeArgs};
pub use key::KeyCommand;
pub(super) use key::{Algorithm, RevokeArgs, RingArg, Stage, TargetArgs};
pub(super) use placement::{NodeCommand, PartitionCommand, WatchArgs};
pub(super) use quota::{QuotaBytes, QuotaCommand, QuotaLimit, QuotaValue, Whose};
pub(super) use receipt::{ReceiptCommand, VerifyArgs};
pub(super) use report::{DoctorArgs, ReportArgs};
pub(super) use topic::TopicCommand;
pub(super) use vault::VaultCommand;

/// What every command's exit tells, at the end of the main help.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  an error that no other code tells
  2  the command line, a file or a setting is wrong
  3  not found
  4  not allowed: bad or revoked credentials, or a missing permission
  5  the cluster cannot be reached, or is not available
  6  unknown whether it was done: look before you repeat it
  7  refused as things are: it exists already, is archived, its key was revoked
  8  the doctor found something that needs an operator, or a removed node may have a copy of an erased key
  9  --timeout was over before what was waited for; that goes on
 10  a receipt, or a key that it is verified with, is not what it claims to be
 11  this node may not run: it was removed, or another process runs as it; starting it again does no good
130  interrupted

Credentials:
  Client commands read --credentials FILE or ENSIGN_CREDENTIALS; the default is ensign-dev.json in this
  folder, which `ensign dev` writes. Secrets are never given on the command line.

Examples:
  ensign dev                                             a cluster of three replicas on this machine
  ensign topic create orders
  echo '{\"item\": 1}' | ensign publish orders
  ensign subscribe orders --from earliest --count 1
  ensign query \"SELECT * FROM orders LIMIT 10\" --output json
  ensign key revoke --version 3                          shreds what was sealed in the era of version 3
";

/// Ensign: a replicated, encrypted event log.
#[derive(Debug, Parser)]
#[command(name = "ensign", version, after_help = EXIT_CODES, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Every command.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value per process")]
pub enum Command {
    /// Run one node of a cluster.
    Serve(ServeArgs),
    /// Run a whole cluster in one process, for development.
    Dev(DevArgs),
    /// Look after configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a completion script for a shell.
    #[command(after_help = "Example:\n  ensign completions bash > /etc/bash_completion.d/ensign")]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Projects: each has its own topics, API keys and encryption keys.
    #[command(subcommand)]
    Project(ProjectCommand),
    /// Topics: create, look at, retire.
    #[command(subcommand)]
    Topic(TopicCommand),
    /// Publish events to a topic and wait until they are stored.
    Publish(PublishArgs),
    /// Print the events of a topic, past and to come.
    Subscribe(SubscribeArgs),
    /// Run an EnSQL query.
    Query(QueryArgs),
    /// API keys: what programs log in with.
    #[command(subcommand, name = "apikey")]
    ApiKey(ApiKeyCommand),
    /// Encryption keys: make, look at, rotate, disable, destroy.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Receipts of what the key vault destroyed: verify them, without a cluster.
    #[command(subcommand)]
    Receipt(ReceiptCommand),
    /// The key vault: is it sealed, seal it, unseal it.
    #[command(subcommand)]
    Vault(VaultCommand),
    /// Quotas: how much each project may publish, store and open.
    #[command(subcommand)]
    Quota(QuotaCommand),
    /// Make a cluster, and let machines join it.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Nodes: look at them, drain them, remove them.
    #[command(subcommand)]
    Node(NodeCommand),
    /// Partitions: where their replicas are, and moving them.
    #[command(subcommand)]
    Partition(PartitionCommand),
    /// Show the nodes and Raft groups of the cluster.
    Status(StatusArgs),
    /// Find what is wrong with the cluster, and say what to do.
    Doctor(DoctorArgs),
    /// Measure a cluster.
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// `ensign serve`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ensign serve --config ensign.toml --bootstrap     once per cluster, on one node
  ensign serve --config ensign.toml                 every other time

Every setting is a flag, a key of the file and a variable ENSIGN_SERVER_…; a flag beats a variable, a variable the file.")]
pub struct ServeArgs {
    /// The configuration file.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Create the cluster first: root key, vault, signing key, catalog, first project and API key. Once per cluster;
    /// what exists already is left alone.
    #[arg(long)]
    pub bootstrap: bool,
    /// With --bootstrap: the private key of the cluster's authority, which `ensign cluster init` made. The vault keeps it, and signs
    /// with it for machines that join. Without it nodes are added with certificates made by hand.
    #[arg(long, value_name = "FILE", requires = "bootstrap")]
    pub authority_key: Option<PathBuf>,
    /// With --bootstrap, in place of --authority-key: every node is certified by an authority of your own, and no machine can ever join by
    /// token. Has to be said where peers are not all on this machine, since it cannot be changed later.
    #[arg(long, requires = "bootstrap", conflicts_with = "authority_key")]
    pub own_certificates: bool,
    /// Where --bootstrap writes the first credentials (mode 0600).
    #[arg(long, value_name = "FILE", default_value = "ensign-credentials.json")]
    pub credentials: PathBuf,
    /// With --bootstrap and root.provider = "passphrase": the file with the passphrase to make the vault with. If there is none, one of
    /// 160 random bits is made and written there (mode 0600): write it down, and delete the file.
    #[arg(long, value_name = "FILE", default_value = "ensign-root-passphrase")]
    pub root_passphrase: PathBuf,
    /// Settings.
    #[command(flatten)]
    pub settings: ServerArgs,
}

/// `ensign dev`.
#[derive(Debug, Args)]
#[command(after_help = "Prints a PyEnsign snippet to paste, then `ready` once everything serves. Ctrl-C stops it.

Examples:
  ensign dev
  ensign dev --data ./data                  keeps data and credentials across restarts
  ensign dev --nodes 1 --grpc 127.0.0.1:0   one replica, on a free port")]
pub struct DevArgs {
    /// How many replicas.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    pub nodes: u64,
    /// Where to keep data. Without it, a folder that is removed at the end.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where gRPC listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5356")]
    pub grpc: SocketAddr,
    /// Where HTTP (logging in) listens.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8088")]
    pub http: SocketAddr,
    /// Where metrics and health listen.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:1205")]
    pub metrics: SocketAddr,
    /// Where to write SDK credentials (mode 0600).
    #[arg(long, value_name = "FILE", default_value = "ensign-dev.json")]
    pub credentials: PathBuf,
}

/// `ensign config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a configuration file and the files that it names, and print the settings that would hold. Nothing is changed.
    #[command(
        after_help = "What it refuses, `ensign serve` refuses too, with the same words and the same exit code, 2.

Examples:
  ensign config check --config /etc/ensign/ensign.toml
  ensign config check --config ensign.toml --without-files    where certificates and keys are on another machine"
    )]
    Check {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Leave out the files and directories that the settings name: they are on another machine.
        #[arg(long)]
        without_files: bool,
        /// Settings.
        #[command(flatten)]
        settings: Box<ServerArgs>,
    },
}

/// How a client command finds the cluster, its rights, and how it answers.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection and output")]
pub struct ClientArgs {
    /// The credentials file.
    #[arg(
        long,
        value_name = "FILE",
        env = "ENSIGN_CREDENTIALS",
        hide_env_values = true,
        default_value = "ensign-dev.json"
    )]
    pub credentials: PathBuf,
    /// gRPC address, HOST:PORT; several separated by commas. Default: what the credentials file says.
    #[arg(long, value_name = "ADDR", env = "ENSIGN_ENDPOINT", hide_env_values = true)]
    pub endpoint: Option<String>,
    /// Where to log in, http://… or https://…; several separated by commas. Default: what the credentials file says.
    #[arg(long, value_name = "URL", env = "ENSIGN_AUTH_URL", hide_env_values = true)]
    pub auth_url: Option<String>,
    /// Speak gRPC without TLS. Default: what the credentials file says.
    #[arg(long, env = "ENSIGN_INSECURE", hide_env_values = true, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub insecure: Option<bool>,
    /// A PEM file of certificate authorities to trust besides the system's.
    #[arg(long, value_name = "FILE", env = "ENSIGN_CA_FILE", hide_env_values = true)]
    pub ca_file: Option<PathBuf>,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
    /// Tell on stderr what the client does.
    #[arg(long, short)]
    pub verbose: bool,
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables and sentences.
    Human,
    /// JSON, for scripts.
    Json,
}
