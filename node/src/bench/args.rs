//! What `ensign bench` takes.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::{ClientArgs, Output};
use crate::config::Seconds;

/// `ensign bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Publish as fast as the cluster acknowledges.
    #[command(
        after_help = "Every figure comes from one run. Without --endpoint it starts a cluster of its own in a new folder under --dir, as a
separate process, and removes it afterwards. With --output json the last line is one object.

Examples:
  ensign bench publish                                         1 KiB events, 8 publishers, window 256, 3 replicas
  ensign bench publish --replicas 1 --publishers 1 --window 1 --events 2000    latency of a lone event
  ensign bench publish --endpoint localhost:5356 --credentials ensign-dev.json"
    )]
    Publish(PublishBench),
    /// Make many partitions, leave them alone, write to them, and kill a node: what a partition costs.
    #[command(
        after_help = "Starts a cluster of its own, one `ensign serve` process a node, in a new folder under --dir, and removes it
afterwards. Each figure is printed with what it should be and their ratio, where 1.0 or less is as it should be. A figure that
is too high does not fail the run.

Examples:
  ensign bench partitions
  ensign bench partitions --count 200 --idle 10s --output json"
    )]
    Partitions(PartitionsBench),
    /// Rotate and revoke keys, at rest and under load, make many rings, and kill the vault's leader: what keys cost.
    #[command(
        after_help = "Starts a cluster of its own, one `ensign serve` process a node, in a new folder under --dir, and removes it
afterwards. Each figure is printed with what it should be and their ratio, where 1.0 or less is as it should be. A figure that
is too high does not fail the run; an event that is refused or lost does.

Examples:
  ensign bench keys
  ensign bench keys --failovers 30 --rings 10000 --output json"
    )]
    Keys(KeysBench),
    /// Fill a topic, then read all of it as fast as it comes.
    #[command(after_help = "Example:\n  ensign bench subscribe --events 2000000 --size 200 --output json")]
    Subscribe(SubscribeBench),
}

/// What both have in common.
#[derive(Debug, Args)]
pub struct Common {
    /// How many events.
    #[arg(long, value_name = "N", default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub events: u64,
    /// How many bytes of payload each has.
    #[arg(long, value_name = "B", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(8..=5_000_000))]
    pub size: u32,
    /// How many publishers.
    #[arg(long, value_name = "P", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub publishers: u32,
    /// How many events each publisher may have un-acknowledged.
    #[arg(long, value_name = "W", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub window: u32,
    /// How many topics the publishers share.
    #[arg(long, value_name = "T", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub topics: u32,
    /// How many replicas the cluster has that this starts.
    #[arg(long, value_name = "R", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=9))]
    pub replicas: u64,
    /// Where to put its data. The disk of this folder is what is measured; a file system in memory is refused.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// The metrics page of the cluster that --endpoint names, for its fsyncs and written bytes.
    #[arg(long, value_name = "URL", requires = "endpoint")]
    pub metrics_url: Option<String>,
    /// Connection.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `ensign bench publish`.
#[derive(Debug, Args)]
pub struct PublishBench {
    /// What both have in common.
    #[command(flatten)]
    pub common: Common,
    /// How many events to publish before measuring. Default: a tenth, at most 20,000.
    #[arg(long, value_name = "N")]
    pub warm_up: Option<u64>,
}

/// `ensign bench subscribe`.
#[derive(Debug, Args)]
pub struct SubscribeBench {
    /// What both have in common.
    #[command(flatten)]
    pub common: Common,
    /// How many subscribers read the whole topic at the same time.
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub subscribers: u32,
}

/// `ensign bench partitions`.
#[derive(Debug, Args)]
pub struct PartitionsBench {
    /// How many topics, of one partition each.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(8..=10_000))]
    pub count: u32,
    /// How many nodes, each with a replica of every partition.
    #[arg(long, value_name = "R", default_value_t = 3, value_parser = clap::value_parser!(u64).range(3..=9))]
    pub replicas: u64,
    /// For how long nothing is done, twice: to measure idle nodes, and before the writes to quiesced partitions.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub idle: Seconds,
    /// How many quiesced partitions are written to.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub writes: u32,
    /// How many events are published to one partition, and how many to all, for the throughput of each.
    #[arg(long, value_name = "N", default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub events: u64,
    /// How many bytes of payload each has.
    #[arg(long, value_name = "B", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(8..=5_000_000))]
    pub size: u32,
    /// How many publishers.
    #[arg(long, value_name = "P", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub publishers: u32,
    /// How many events each publisher may have un-acknowledged in one partition.
    #[arg(long, value_name = "W", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub window: u32,
    /// How many in all of its partitions.
    #[arg(long, value_name = "W", default_value_t = 16_384, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub spread_window: u32,
    /// Where to put its data.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
}

/// `ensign bench keys`.
#[derive(Debug, Args)]
pub struct KeysBench {
    /// How many times each of a vault's commands is timed.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(10..=1_000))]
    pub samples: u32,
    /// How many key rings there are while nothing is done.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rings: u32,
    /// For how long nothing is done, twice, to measure idle nodes.
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub idle: Seconds,
    /// How many events are published at each pace of rotation.
    #[arg(long, value_name = "N", default_value_t = 400_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub events: u64,
    /// How long lies between two rotations under load.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    pub rotate_every: Seconds,
    /// How many times the vault's leader is killed while events are published and read.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    pub failovers: u32,
    /// How many nodes.
    #[arg(long, value_name = "R", default_value_t = 3, value_parser = clap::value_parser!(u64).range(3..=9))]
    pub replicas: u64,
    /// How many bytes of payload each event has.
    #[arg(long, value_name = "B", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(8..=5_000_000))]
    pub size: u32,
    /// Where to put its data.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    pub output: Output,
}
