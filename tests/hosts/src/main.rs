//! `hosts`: clusters of real processes under faults, and what became of the promises. See `hosts --help`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use ensign_hosts::cluster::{Mechanism, Plan, Settings};
use ensign_hosts::links::namespaces;
use ensign_hosts::scenario::Limits;
use ensign_hosts::scenario::cipher::{self, Cipher};
use ensign_hosts::scenario::drain::{self, Drain};
use ensign_hosts::scenario::failover::{self, Failover};
use ensign_hosts::scenario::ledger::{self, Ledger};
use ensign_hosts::scenario::rebuild::{self, Rebuild};
use ensign_hosts::scenario::regions::{self, Regions};
use ensign_hosts::scenario::rolling::{self, Rolling};
use ensign_hosts::scenario::{links, live};
use rand::TryRng as _;

/// Starts clusters of real `ensign serve` processes, lets hosts and links fail, and judges what clients saw.
#[derive(Debug, Parser)]
#[command(after_help = "Examples:
  cargo run --release -p ensign-hosts -- ledger --minutes 20 --nodes 5
  cargo run --release -p ensign-hosts -- ledger --minutes 2 --seed 42 --links netns
  cargo run --release -p ensign-hosts -- failover --rounds 5
  cargo run --release -p ensign-hosts -- rebuild --topics 48 --links netns

The server is target/release/ensign, unless --binary names another: build it with `cargo build --release`.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Publish and subscribe under random kills, pauses and partitions; then compare what was acked with what is there.
    Ledger {
        #[command(flatten)]
        cluster: ClusterArgs,
        /// How many minutes faults go on.
        #[arg(long, default_value_t = 2.0)]
        minutes: f64,
        /// What the faults are drawn from; printed, and another one each time unless it is given.
        #[arg(long)]
        seed: Option<u64>,
        /// Events a second of each publisher.
        #[arg(long, default_value_t = 100)]
        rate: u32,
        #[command(flatten)]
        pyensign: PyEnsignArgs,
    },
    /// Measure how long acks stay away when a leader is killed, and when it is asked to stop.
    Failover {
        #[command(flatten)]
        cluster: ClusterArgs,
        /// How often each is measured.
        #[arg(long, default_value_t = 3)]
        rounds: u32,
        /// Events a second of each publisher, of which each node has one.
        #[arg(long, default_value_t = 500)]
        rate: u32,
        /// Print figures that are beyond their limits, and do not fail for it: for machines that do other work as well.
        #[arg(long)]
        report_only: bool,
    },
    /// Restart every node in turn, under load; with --from, upgrade them.
    Rolling {
        #[command(flatten)]
        cluster: ClusterArgs,
        /// How often every node is restarted.
        #[arg(long, default_value_t = 1)]
        rounds: u32,
        /// Events a second of each publisher.
        #[arg(long, default_value_t = 200)]
        rate: u32,
        /// A server of an older release, of version 1 of the cluster: all nodes begin with it, and are upgraded one by one.
        #[arg(long, value_name = "BINARY")]
        from: Option<PathBuf>,
        #[command(flatten)]
        pyensign: PyEnsignArgs,
    },
    /// Subscribe live at a node that lags: nothing older than the subscription may come.
    Live {
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Measure topics of one region and of three, with delays between regions, and lose a region.
    Regions {
        /// How many nodes: one in each of two regions, the others in the first.
        #[arg(long, default_value_t = 5)]
        nodes: u64,
        /// The server.
        #[arg(long, default_value = "target/release/ensign")]
        binary: PathBuf,
        /// One way between two regions, in milliseconds.
        #[arg(long, default_value_t = 80)]
        delay_ms: u64,
        /// Events of each measurement, one at a time.
        #[arg(long, default_value_t = 1000)]
        events: u64,
        /// Print figures that are beyond their limits, and do not fail for it: for machines that do other work as well.
        #[arg(long)]
        report_only: bool,
    },
    /// Measure what publishers notice when a node joins and takes its share, and when a dead node's replicas are made anew.
    Rebuild {
        #[command(flatten)]
        cluster: ClusterArgs,
        /// How many topics, of three replicas each.
        #[arg(long, default_value_t = 48)]
        topics: usize,
        /// Bytes of an event.
        #[arg(long, default_value_t = 128)]
        size: usize,
        /// Events of a topic that wait for their acks.
        #[arg(long, default_value_t = 512)]
        window: usize,
        /// MiB that are published before anything is measured.
        #[arg(long, default_value_t = 128)]
        preload_mib: u64,
        /// Seconds that the throughput of quiet times is measured.
        #[arg(long, default_value_t = 10)]
        measure: u64,
        /// `storage.prefill` of every node: room for all that the run stores, since a log that grows is slower. On disk at once.
        #[arg(long, default_value = "3GiB")]
        prefill: String,
        /// `storage.move_rate` of every node; the server's default unless it is given.
        #[arg(long)]
        move_rate: Option<String>,
        /// Print figures that are beyond their limits, and do not fail for it: for machines that do other work as well.
        #[arg(long)]
        report_only: bool,
    },
    /// Drain a node that has its share of many partitions, without load: how long that takes, and what nodes use at rest.
    Drain {
        /// How many nodes; the last one is drained.
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(4..))]
        nodes: u64,
        /// How the links between nodes are made.
        #[arg(long, value_enum, default_value = "proxy")]
        links: Mechanism,
        /// The server.
        #[arg(long, default_value = "target/release/ensign")]
        binary: PathBuf,
        /// How many topics, of three replicas each.
        #[arg(long, default_value_t = 1000)]
        topics: usize,
        /// Seconds that nodes at rest are measured, after as long a rest.
        #[arg(long, default_value_t = 20)]
        rest: u64,
    },
    /// Measure what encryption costs, against the same build that passes batches as they are.
    Cipher {
        /// A server that can be told to: `cargo build --release -p ensign-node --features planted-bugs --target-dir target/planted`.
        #[arg(long, default_value = "target/planted/release/ensign")]
        binary: PathBuf,
        /// How often each is measured; the middle one counts.
        #[arg(long, default_value_t = 3)]
        rounds: u32,
        /// Events of each measurement, of 1 KiB.
        #[arg(long, default_value_t = 400_000)]
        events: u64,
        /// Print figures that are beyond their limits, and do not fail for it: for machines that do other work as well.
        #[arg(long)]
        report_only: bool,
    },
    /// Check that links do what they are told, without a cluster.
    Links {
        /// How links are made.
        #[arg(long, value_enum, default_value = "proxy")]
        links: Mechanism,
    },
    /// Say whether this machine can make network namespaces with links that can be cut.
    CanNetns,
    /// One side of `links`.
    #[command(hide = true)]
    ProbeAnswer { listen: std::net::SocketAddr },
    /// The other side of `links`.
    #[command(hide = true)]
    ProbeCall { to: std::net::SocketAddr },
}

#[derive(Debug, Args)]
struct ClusterArgs {
    /// How many nodes.
    #[arg(long, default_value_t = 3)]
    nodes: u64,
    /// How the links between nodes are made.
    #[arg(long, value_enum, default_value = "proxy")]
    links: Mechanism,
    /// The server.
    #[arg(long, default_value = "target/release/ensign")]
    binary: PathBuf,
}

impl ClusterArgs {
    fn plan(self) -> Plan {
        let Self { nodes, links, binary } = self;
        Plan {
            binary,
            nodes,
            mechanism: links,
            timing: "lan",
            more: BTreeMap::new(),
            all: Settings::default(),
            joining: 0,
        }
    }
}

#[derive(Debug, Args)]
struct PyEnsignArgs {
    /// A Python with PyEnsign; `.ci/run pyensign` makes this one.
    #[arg(long, default_value = "target/ci/venv/bin/python")]
    python: PathBuf,
    /// Our client only.
    #[arg(long)]
    without_pyensign: bool,
}

impl PyEnsignArgs {
    fn python(self) -> Option<PathBuf> {
        (!self.without_pyensign).then_some(self.python)
    }
}

impl Command {
    /// How many namespaces it needs, if it needs any.
    fn hosts(&self) -> Option<u64> {
        let (links, nodes) = match self {
            Self::Live { cluster }
            | Self::Ledger { cluster, .. }
            | Self::Failover { cluster, .. }
            | Self::Rolling { cluster, .. } => (cluster.links, cluster.nodes),
            // And the machine that joins.
            Self::Rebuild { cluster, .. } => (cluster.links, cluster.nodes + 1),
            Self::Drain { nodes, links, .. } => (*links, *nodes),
            Self::Links { links } => (*links, 2),
            // Delays need the proxy.
            Self::Regions { .. }
            | Self::Cipher { .. }
            | Self::CanNetns
            | Self::ProbeAnswer { .. }
            | Self::ProbeCall { .. } => return None,
        };
        (links == Mechanism::Netns).then_some(nodes)
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    if let Some(nodes) = cli.command.hosts().filter(|_| !namespaces::in_hub()) {
        return namespaces::run_in_hub(nodes);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(cli.command))?;
    Ok(ExitCode::SUCCESS)
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Ledger { cluster, minutes, seed, rate, pyensign } => {
            let seed = match seed {
                Some(seed) => seed,
                None => rand::rngs::SysRng.try_next_u64()? % 1_000_000,
            };
            let length = Duration::from_secs_f64(minutes * 60.0);
            ledger::run(Ledger { plan: cluster.plan(), length, seed, python: pyensign.python(), rate }).await
        }
        Command::Failover { cluster, rounds, rate, report_only } => {
            let limits = if report_only { Limits::Printed } else { Limits::Enforced };
            failover::run(Failover { plan: cluster.plan(), rounds, rate, limits }).await
        }
        Command::Rolling { cluster, rounds, rate, from, pyensign } => {
            rolling::run(Rolling { plan: cluster.plan(), rounds, rate, python: pyensign.python(), from }).await
        }
        Command::Live { cluster } => live::run(cluster.plan()).await,
        Command::Regions { nodes, binary, delay_ms, events, report_only } => {
            let more = regions::settings(nodes);
            let (mechanism, all) = (Mechanism::Proxy, Settings::default());
            let plan = Plan { binary, nodes, mechanism, timing: "wan", more, all, joining: 0 };
            let limits = if report_only { Limits::Printed } else { Limits::Enforced };
            regions::run(Regions { plan, delay: Duration::from_millis(delay_ms), events, limits }).await
        }
        Command::Rebuild { cluster, topics, size, window, preload_mib, measure, prefill, move_rate, report_only } => {
            let all = rebuild::settings(&prefill, move_rate.as_deref());
            let plan = Plan { all, joining: 1, ..cluster.plan() };
            let limits = if report_only { Limits::Printed } else { Limits::Enforced };
            let (preload, measure) = (preload_mib << 20, Duration::from_secs(measure));
            rebuild::run(Rebuild { plan, topics, size, window, preload, measure, limits }).await
        }
        Command::Drain { nodes, links, binary, topics, rest } => {
            let all = Settings { storage: "prefill = \"256MiB\"\n".to_owned(), ..Settings::default() };
            let plan = Plan { binary, nodes, mechanism: links, timing: "lan", more: BTreeMap::new(), all, joining: 0 };
            drain::run(Drain { plan, topics, rest: Duration::from_secs(rest) }).await
        }
        Command::Cipher { binary, rounds, events, report_only } => {
            let limits = if report_only { Limits::Printed } else { Limits::Enforced };
            cipher::run(Cipher { binary, rounds, events, limits }).await
        }
        Command::Links { links } => links::run(links).await,
        Command::CanNetns => namespaces::check(),
        Command::ProbeAnswer { listen } => links::answer(listen).await,
        Command::ProbeCall { to } => links::call(to).await,
    }
}
