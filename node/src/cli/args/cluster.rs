//! What `ensign cluster` takes: identity, joining, tokens.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::config::Seconds;

use super::{ClientArgs, Output, ReportArgs};

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
