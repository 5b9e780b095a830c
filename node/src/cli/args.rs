//! What can be typed: the tree of commands, their flags and their help.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::bench::BenchCommand;
use crate::config::ServerArgs;

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
    /// Encryption keys: list, rotate, destroy.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Show the nodes and Raft groups of the cluster.
    Status(StatusArgs),
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
    /// Where --bootstrap writes the first credentials (mode 0600).
    #[arg(long, value_name = "FILE", default_value = "ensign-credentials.json")]
    pub credentials: PathBuf,
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
    /// Check a configuration file and print the settings that would hold.
    Check {
        /// The configuration file.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
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
    /// Where to log in, http://… or https://…. Default: what the credentials file says.
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

/// `ensign project`.
#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// Create a project.
    #[command(after_help = "Example:\n  ensign project create \"web shop\"")]
    Create {
        /// What people call it.
        name: String,
        /// The organization's id. Default: the administrator's own.
        #[arg(long, value_name = "ID")]
        organization: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List projects.
    List {
        /// Only those of the organization with this id.
        #[arg(long, value_name = "ID")]
        organization: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign topic`.
#[derive(Debug, Subcommand)]
pub enum TopicCommand {
    /// Create topics.
    #[command(
        after_help = "A name begins with a letter and has letters, digits, dots, dashes and underscores, at most 512.
Of many topics each is decided for itself: those that can be made are, and the command says which could not and fails.
A thousand are made in a few commits; the command shows how far it is.

Examples:
  ensign topic create shop.orders
  ensign topic create shop.orders shop.returns shop.stock
  ensign topic create --from topics.txt --if-missing      one name a line; # begins a comment"
    )]
    Create {
        /// Their names.
        #[arg(value_name = "NAME", required_unless_present = "from")]
        names: Vec<String>,
        /// Read names from this file too, one a line; - is standard input.
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
        /// Take a topic that exists already for made.
        #[arg(long)]
        if_missing: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List the topics of the project.
    List {
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show one topic: its state, events and bytes.
    Describe {
        /// Its name or id.
        topic: String,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Make a topic read-only, for ever.
    Archive {
        /// Its name or id.
        topic: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Destroy a topic and every event in it, for ever.
    Destroy {
        /// Its name or id.
        topic: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign publish`.
#[derive(Debug, Args)]
#[command(
    after_help = "Each line of the input is one event; empty lines are skipped. The command ends when every event is stored
on a majority of the replicas, and fails if one is not.

Examples:
  ensign publish orders --file events.jsonl
  tail -f access.log | ensign publish access --mimetype text/plain
  ensign publish pictures --whole --file cat.png --mimetype application/octet-stream --key-value name=cat"
)]
pub struct PublishArgs {
    /// The topic's name or id.
    pub topic: String,
    /// The file to read; - is standard input.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub file: PathBuf,
    /// The format of every event, as a media type.
    #[arg(long, value_name = "TYPE", default_value = "application/json")]
    pub mimetype: String,
    /// Attach a pair of metadata to every event. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub key_value: Vec<String>,
    /// Take the whole input as one event.
    #[arg(long)]
    pub whole: bool,
    /// How many events may wait for their acknowledgement.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub window: u32,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `ensign subscribe`.
#[derive(Debug, Args)]
#[command(
    after_help = "Prints one event a line; with --output json, one JSON object a line. If the connection breaks it goes on where it
was, without a gap or a repeat.

Examples:
  ensign subscribe orders                             what is published from now on
  ensign subscribe orders --from earliest --count 10
  ensign subscribe orders --from 1042                 from an offset
  ensign subscribe orders --from 2026-01-31T12:00:00Z from a time
  ensign subscribe orders --from 15m                  from fifteen minutes ago"
)]
pub struct SubscribeArgs {
    /// The topic's name or id.
    pub topic: String,
    /// Where to begin: latest, earliest, an offset, a time (RFC 3339), how long ago (15m), or the id of the event before.
    #[arg(long, value_name = "PLACE", default_value = "latest")]
    pub from: String,
    /// Stop after this many events.
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `ensign query`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ensign query \"SELECT * FROM orders\"
  ensign query \"SELECT * FROM orders OFFSET 100 LIMIT 10\" --output json")]
pub struct QueryArgs {
    /// The query: SELECT * FROM topic [OFFSET n] [LIMIT n].
    pub query: String,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `ensign apikey`.
#[derive(Debug, Subcommand)]
pub enum ApiKeyCommand {
    /// Create an API key. Its secret is written to a file and never shown again.
    #[command(after_help = "Example:
  ensign apikey create reader --permission subscriber --permission topics:read --save reader.json")]
    Create {
        /// What people call it.
        name: String,
        /// What it may do: metrics:read, publisher, subscriber, topics:create, topics:destroy, topics:edit, topics:read.
        /// May be repeated. Default: all seven.
        #[arg(long = "permission", value_name = "PERMISSION")]
        permissions: Vec<String>,
        /// The project's id. Default: the one that the credentials are for.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Where to write its credentials (mode 0600; must not exist yet); - prints them. Default: apikey-NAME.json.
        #[arg(long, value_name = "FILE")]
        save: Option<PathBuf>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List API keys.
    List {
        /// Only those of the project with this id.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Revoke an API key: its tokens and streams end, for ever.
    Revoke {
        /// Its id or client id.
        key: String,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List key rings and their versions.
    List {
        /// Only those of the project with this id.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Make a new active version; stored events stay readable.
    Rotate {
        /// The ring's id. Default: that of the project that the credentials are for.
        #[arg(long, value_name = "ID")]
        ring: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Destroy versions of a key for ever: nobody reads again what was sealed under them.
    #[command(
        after_help = "Waits until no node can open the data any more: usually a moment, at worst the lease wait (about 15 seconds).

Examples:
  ensign key revoke --version 3
  ensign key revoke --all --yes"
    )]
    Revoke {
        /// The ring's id. Default: that of the project that the credentials are for.
        #[arg(long, value_name = "ID")]
        ring: Option<String>,
        /// The version to destroy.
        #[arg(long, value_name = "N", required_unless_present = "all", value_parser = clap::value_parser!(u32).range(1..))]
        version: Option<u32>,
        /// Destroy every version.
        #[arg(long, conflicts_with = "version")]
        all: bool,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign status`.
#[derive(Debug, Args)]
#[command(
    after_help = "With an administrator's key in the credentials file it shows nodes and groups, otherwise only the node that answers."
)]
pub struct StatusArgs {
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}
