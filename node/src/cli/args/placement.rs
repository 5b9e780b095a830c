//! What `ensign node` and `ensign partition` take.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::ClientArgs;

/// Looking again and again.
#[derive(Debug, Clone, Args)]
pub struct WatchArgs {
    /// Show it again and again, this far apart, until Ctrl-C: `--watch`, or `--watch=5s`.
    #[arg(long, value_name = "PAUSE", num_args = 0..=1, require_equals = true, default_missing_value = "1s", value_parser = humantime::parse_duration)]
    pub watch: Option<Duration>,
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

Exit code with --wait: 0 when the node can be removed, 9 when --timeout ended the wait; the drain goes on.

Examples:
  ensign node drain 3 --wait
  ensign node drain 3 --wait --timeout 30m && ensign node remove 3 --yes
  ensign node undrain 3"
    )]
    Drain {
        /// Its number.
        node: u64,
        /// Return once the node holds no replica and has no vote; say meanwhile how far it is, and what is in the way.
        #[arg(long)]
        wait: bool,
        /// With --wait: how long to wait, as in 30m. Default: until it is over.
        #[arg(long, value_name = "TIME", requires = "wait", value_parser = humantime::parse_duration)]
        timeout: Option<Duration>,
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
    /// Remove a node from the cluster, for ever.
    #[command(
        after_help = "Refused while the node holds replicas or votes for the cluster's own groups: it says which, and what to do. Its number
is never used again; a process of it that runs ends with exit code 11.

--force is for a node that is lost: it must not answer. It goes although it holds replicas and votes, and others
take over. It is refused where a partition, the catalog or the vault has no majority without the node, since
what was acknowledged may then be on its disk alone: the message names the topics. Bring the disk back; or give
the topics up (`ensign topic destroy`), then force it.

Examples:
  ensign node drain 3 --wait && ensign node remove 3
  ensign node remove 3 --force"
    )]
    Remove {
        /// Its number.
        node: u64,
        /// Remove a node that does not answer, without draining it.
        #[arg(long)]
        force: bool,
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
        /// Return once the move is over; say meanwhile how far it is, and what it waits for.
        #[arg(long)]
        wait: bool,
        /// With --wait: how long to wait, as in 30m. Default: until it is over. Then the exit code is 9; the move goes on.
        #[arg(long, value_name = "TIME", requires = "wait", value_parser = humantime::parse_duration)]
        timeout: Option<Duration>,
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
