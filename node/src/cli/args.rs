//! What can be typed: the tree of commands, their flags and their help.

mod report;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::bench::BenchCommand;
use crate::config::{Seconds, ServerArgs};

pub(super) use report::{DoctorArgs, ReportArgs};

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
  8  the doctor found something that needs an operator
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
    /// Where --bootstrap writes the first credentials (mode 0600).
    #[arg(long, value_name = "FILE", default_value = "ensign-credentials.json")]
    pub credentials: PathBuf,
    /// Settings.
    #[command(flatten)]
    pub settings: ServerArgs,
}

/// `ensign cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make a certificate authority, and a certificate and settings for the first node. Nothing is sent anywhere.
    #[command(after_help = "Nothing is overwritten. The private keys are written for their owner alone (mode 0600).

Examples:
  ensign cluster init --dir /etc/ensign --address node-1.internal:5357 --region eu --zone eu-1
  ensign serve --config /etc/ensign/ensign.toml --bootstrap --authority-key /etc/ensign/ca.key")]
    Init(ClusterInitArgs),
    /// Tokens that let machines join: create, list, revoke.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Make this machine a node of a cluster that runs.
    #[command(
        after_help = "The private key is made here and never sent. The token names the cluster's certificate authority: nothing is sent to a
cluster that has another one. If the answer gets lost, run the same command again: it answers the same node.

Example:
  ensign cluster join --token-file token --seed node-1.internal:5357 --address node-4.internal:5357 --zone eu-2
  ensign serve --config /etc/ensign/ensign.toml"
    )]
    Join(ClusterJoinArgs),
    /// Show every node: whether it answers, what it leads, its disk, its clock, and what is not well.
    #[command(after_help = "Examples:
  ensign cluster status
  ensign cluster status --watch 2s
  ensign cluster status --direct http://127.0.0.1:1205    on a node, without logging in: works without a quorum too")]
    Status(ReportArgs),
    /// Show the cluster's version, and which versions every node speaks.
    #[command(
        after_help = "The version says which commands and formats the cluster may use. It rises by itself when every node speaks the next one, unless
a node runs with cluster.upgrade = \"manual\". Until it has, every node can be set back to the build before.

Example:
  ensign cluster version --output json | jq -e '.obstacle == \"\"'"
    )]
    Version {
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Raise the cluster's version now, for ever.
    #[command(
        after_help = "Only needed where a node holds the version back with cluster.upgrade = \"manual\". Every node has to answer and to speak it.
There is no way back: builds that do not speak the version are refused from then on.

Examples:
  ensign cluster upgrade
  ensign cluster upgrade --to 2
  ensign cluster upgrade --without 3    node 3 is lost, and version 1 cannot remove it"
    )]
    Upgrade {
        /// To which version. Default: the newest that the answering node speaks.
        #[arg(long, value_name = "VERSION", value_parser = clap::value_parser!(u32).range(1..))]
        to: Option<u32>,
        /// A node that is lost and need not answer. It may come back only with a program that speaks the version. May be repeated.
        #[arg(long, value_name = "NODE", value_parser = clap::value_parser!(u64).range(1..))]
        without: Vec<u64>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// Where a new node stands, and where its files go.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Its name, for people; unique in the cluster. Default: node-N.
    #[arg(long)]
    pub name: Option<String>,
    /// The region it stands in.
    #[arg(long, default_value = "local")]
    pub region: String,
    /// The zone of the region: nodes that can fail together.
    #[arg(long, default_value = "local")]
    pub zone: String,
    /// The folder for its certificate, key and settings.
    #[arg(long, value_name = "DIR", default_value = "/etc/ensign")]
    pub dir: PathBuf,
    /// Where it will keep its data.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/ensign")]
    pub data_dir: PathBuf,
    /// Where the cluster's root key is, or will be.
    #[arg(long, value_name = "FILE", default_value = "/etc/ensign/root.key")]
    pub root_key: PathBuf,
}

/// `ensign cluster init`.
#[derive(Debug, Args)]
pub struct ClusterInitArgs {
    /// Where the other nodes will reach this one's peer listener, HOST:PORT.
    #[arg(long, value_name = "ADDR")]
    pub address: String,
    /// Its number.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub node_id: u64,
    /// The node.
    #[command(flatten)]
    pub node: NodeArgs,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
}

/// `ensign cluster join`.
#[derive(Debug, Args)]
pub struct ClusterJoinArgs {
    /// The token. It is seen by who may list processes on this machine: --token-file is better where others may.
    #[arg(long, value_name = "TOKEN", conflicts_with = "token_file")]
    pub token: Option<String>,
    /// A file with the token.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The peer listener of a node that runs, HOST:PORT. May be repeated: the next is tried when one cannot be reached.
    #[arg(long = "seed", value_name = "ADDR", required = true)]
    pub seeds: Vec<String>,
    /// Where the other nodes will reach this one's peer listener, HOST:PORT. Default: the address it reaches the seed from, port
    /// 5357.
    #[arg(long, value_name = "ADDR")]
    pub address: Option<String>,
    /// The node.
    #[command(flatten)]
    pub node: NodeArgs,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
}

/// `ensign cluster token`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token. It is shown once.
    #[command(after_help = "Examples:
  ensign cluster token create
  ensign cluster token create --ttl 15m --uses 3 --output json")]
    Create {
        /// How long it lets machines in: at most 30 days.
        #[arg(long, value_name = "TIME", default_value = "1h")]
        ttl: Seconds,
        /// How many machines it lets in.
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        uses: u32,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// List tokens, also those that ended within the last week.
    List {
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Revoke a token: it lets nobody in any more. Nodes that it let in stay.
    Revoke {
        /// Its id, as `list` shows it.
        id: String,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
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
  ensign topic create --from topics.txt --if-missing      one name a line; # begins a comment
  ensign topic create shop.orders --replication 5
  ensign topic create shop.orders --region eu-west,eu-north --leader-region eu-west"
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
        /// How many replicas it has, 1 to 9. Default: three, or as many as there are nodes. One topic at a time.
        #[arg(long, value_name = "N")]
        replication: Option<u32>,
        /// The regions that its replicas never leave; several separated by commas. Default: any. One topic at a time.
        #[arg(long = "region", value_name = "REGION", value_delimiter = ',')]
        regions: Vec<String>,
        /// The region that should lead, where a replica is. One topic at a time.
        #[arg(long, value_name = "REGION", default_value = "", hide_default_value = true)]
        leader_region: String,
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
    /// Change how many replicas a topic has, and where they may be. Needs an operator's key.
    #[command(
        after_help = "Replicas that do not fit any more are moved in the background; publishers and subscribers notice nothing but a pause.

Examples:
  ensign topic alter orders --replication 5
  ensign topic alter orders --region eu-west,eu-north
  ensign topic alter orders --any-region --leader-region us-east"
    )]
    Alter {
        /// Its name or id.
        topic: String,
        /// How many replicas it shall have, 1 to 9.
        #[arg(long, value_name = "N")]
        replication: Option<u32>,
        /// The regions that its replicas shall never leave; several separated by commas.
        #[arg(long = "region", value_name = "REGION", value_delimiter = ',')]
        regions: Vec<String>,
        /// Let its replicas be in any region.
        #[arg(long, conflicts_with = "regions")]
        any_region: bool,
        /// The region that should lead.
        #[arg(long, value_name = "REGION")]
        leader_region: Option<String>,
        /// Let any region lead.
        #[arg(long, conflicts_with = "leader_region")]
        no_leader_region: bool,
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
    /// How fresh the place must be where `--from latest` begins. Default: what the node knows.
    #[arg(long, value_enum, value_name = "HOW")]
    pub consistency: Option<ConsistencyArg>,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// How fresh what is read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConsistencyArg {
    /// Everything that was acknowledged before; asks a majority first.
    Latest,
    /// What the nearest replica has, at most five seconds old; usually asks nobody.
    Local,
}

/// `ensign query`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ensign query \"SELECT * FROM orders\"
  ensign query \"SELECT * FROM orders OFFSET 100 LIMIT 10\" --output json
  ensign query \"SELECT * FROM orders\" --consistency local   from the nearest replica, at most five seconds old")]
pub struct QueryArgs {
    /// The query: SELECT * FROM topic [OFFSET n] [LIMIT n].
    pub query: String,
    /// How fresh the answer must be. Default: latest.
    #[arg(long, value_enum, value_name = "HOW")]
    pub consistency: Option<ConsistencyArg>,
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

/// `ensign quota`.
#[derive(Debug, Subcommand)]
pub enum QuotaCommand {
    /// Set limits; those that are not named stay as they are.
    #[command(
        after_help = "A value is a number, or `unlimited`; bytes may have a unit (KB, MB, GB, TB; KiB, MiB, GiB, TiB). 0 allows nothing.
Needs an operator's key. The change holds on every node within a moment.

Examples:
  ensign quota set --project 01HX… --events-per-second 5000 --bytes-per-second 20MB
  ensign quota set --default --topics 100 --stored-bytes 50GB
  ensign quota set --project 01HX… --topics unlimited"
    )]
    Set {
        /// Whose.
        #[command(flatten)]
        whose: Whose,
        /// Events published a second, over all nodes.
        #[arg(long, value_name = "N")]
        events_per_second: Option<QuotaValue>,
        /// Bytes of events published a second, over all nodes.
        #[arg(long, value_name = "BYTES")]
        bytes_per_second: Option<QuotaBytes>,
        /// Bytes of events kept, over all topics.
        #[arg(long, value_name = "BYTES")]
        stored_bytes: Option<QuotaBytes>,
        /// Topics.
        #[arg(long, value_name = "N")]
        topics: Option<QuotaValue>,
        /// Open publish, subscribe and query streams, on each node.
        #[arg(long, value_name = "N")]
        streams: Option<QuotaValue>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show limits, and how much of each is used.
    #[command(after_help = "Example:\n  ensign quota show --project 01HX… --output json")]
    Show {
        /// The project's id. Default: every project that the credentials may see, and the cluster's default.
        #[arg(long, value_name = "ID")]
        project: Option<String>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Forget limits that were set: the cluster's default holds again, or what is built in.
    #[command(after_help = "Examples:
  ensign quota unset --project 01HX… events-per-second
  ensign quota unset --default                           all of them")]
    Unset {
        /// Whose.
        #[command(flatten)]
        whose: Whose,
        /// Which limits. Default: all of them.
        #[arg(value_enum, value_name = "LIMIT")]
        limits: Vec<QuotaLimit>,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// Whose quota is changed.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Whose {
    /// That of the project with this id.
    #[arg(long, value_name = "ID")]
    pub project: Option<String>,
    /// That of every project that has no limit of its own.
    #[arg(long)]
    pub default: bool,
}

/// One of the limits of a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuotaLimit {
    /// Events published a second.
    EventsPerSecond,
    /// Bytes published a second.
    BytesPerSecond,
    /// Bytes kept.
    StoredBytes,
    /// Topics.
    Topics,
    /// Open streams on each node.
    Streams,
}

/// A number, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaValue(pub Option<u64>);

/// A number of bytes, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuotaBytes(pub Option<u64>);

impl FromStr for QuotaValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let number = text.replace(['_', ','], "").parse();
        number.map(|number| Self(Some(number))).map_err(|_| "it is a whole number, or `unlimited`".to_owned())
    }
}

impl FromStr for QuotaBytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unlimited" {
            return Ok(Self(None));
        }
        let wrong = || "it is a number of bytes, such as 1048576, 20MB or 50GiB, or `unlimited`".to_owned();
        let text = text.replace(['_', ','], "");
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "tib" => 1 << 40,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(|bytes| Self(Some(bytes))).ok_or_else(wrong)
    }
}

/// Looking again and again.
#[derive(Debug, Clone, Args)]
pub struct WatchArgs {
    /// Look again every second, until interrupted.
    #[arg(long)]
    pub watch: bool,
}

/// `ensign node`.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes, whether they answer, and how many replicas each holds.
    List {
        /// Watching.
        #[command(flatten)]
        watch: WatchArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show one node, and what keeps its replicas from leaving.
    Describe {
        /// Its number.
        node: u64,
        /// Watching.
        #[command(flatten)]
        watch: WatchArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Move every replica off a node, before it is stopped for long or removed.
    #[command(
        after_help = "Each replica is copied to another node first; no partition ever has fewer replicas than before. Where no other node
can take a replica it stays, and `ensign node describe` says why.

Examples:
  ensign node drain 3 --wait
  ensign node undrain 3"
    )]
    Drain {
        /// Its number.
        node: u64,
        /// Return once the node holds nothing; say meanwhile how far it is.
        #[arg(long)]
        wait: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Let a node that was drained take replicas again.
    Undrain {
        /// Its number.
        node: u64,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Remove a drained node from the cluster, for ever.
    #[command(
        after_help = "Refused while the node holds replicas or votes for the cluster's own groups: it says which, and what to do. Its number
is never used again.

Example:
  ensign node drain 3 --wait && ensign node remove 3"
    )]
    Remove {
        /// Its number.
        node: u64,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
}

/// `ensign partition`.
#[derive(Debug, Subcommand)]
pub enum PartitionCommand {
    /// List partitions: who holds them, who leads them, and whether something moves.
    #[command(after_help = "Examples:
  ensign partition list --node 3
  ensign partition list --unsettled --watch     what moves, and what should and cannot")]
    List {
        /// Only those with a replica on this node, or one to come.
        #[arg(long, value_name = "ID")]
        node: Option<u64>,
        /// Only those that are being moved, or should be and cannot.
        #[arg(long)]
        unsettled: bool,
        /// Watching.
        #[command(flatten)]
        watch: WatchArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show where one topic's replicas are, and how far a move is.
    Describe {
        /// The topic's name or id.
        topic: String,
        /// Watching.
        #[command(flatten)]
        watch: WatchArgs,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Move a topic's replicas to these nodes.
    #[command(
        after_help = "New replicas catch up before they count; the old ones go last. One move a partition at a time.

Example:
  ensign partition move orders --to 1,2,4 --wait"
    )]
    Move {
        /// The topic's name or id.
        topic: String,
        /// The nodes that shall hold its replicas, as many as it has; separated by commas.
        #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
        to: Vec<u64>,
        /// Return once the move is over; say meanwhile how far it is.
        #[arg(long)]
        wait: bool,
        /// Connection.
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Turn a move round: the replicas stay, or go back, where they were.
    Cancel {
        /// The topic's name or id.
        topic: String,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_numbers_with_or_without_a_unit_or_none() {
        let bytes = |text: &str| text.parse::<QuotaBytes>().map(|bytes| bytes.0);
        assert_eq!(bytes("unlimited"), Ok(None));
        assert_eq!(bytes("1_000"), Ok(Some(1_000)));
        assert_eq!(bytes("20MB"), Ok(Some(20_000_000)));
        assert_eq!(bytes("2 GiB"), Ok(Some(2 << 30)));
        for wrong in ["", "-1", "1.5GB", "GB", "5 bananas", "99999999999TB"] {
            assert!(bytes(wrong).unwrap_err().contains("50GiB"), "{wrong}");
        }
        let value = |text: &str| text.parse::<QuotaValue>().map(|value| value.0);
        assert_eq!((value("5,000"), value("0"), value("unlimited")), (Ok(Some(5_000)), Ok(Some(0)), Ok(None)));
        for wrong in ["", "many", "-1", "5k"] {
            assert!(value(wrong).is_err(), "{wrong}");
        }
    }
}
