//! What `ensign node` and `ensign partition` take.

use clap::{Args, Subcommand};

use super::ClientArgs;

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
