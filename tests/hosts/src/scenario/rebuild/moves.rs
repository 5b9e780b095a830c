//! Moves as an operator sees them, and what publishers notice meanwhile.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use anyhow::ensure;
use ensign_client::admin_api as pb;
use tokio::time::{Instant, sleep};

use super::{KEPT, say, told};
use crate::cluster::Cluster;
use crate::links::Node;
use crate::workload::load::{Acks, Rate, Stretch};

/// How often it is looked how far moves are.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// They are over once nothing has moved for so long: longer than the planner rests.
const QUIET: Duration = Duration::from_secs(8);
/// The metric of what nodes send to replicas that do not vote.
const COPIED: &str = "ensign_raft_learner_sent_bytes_total";

/// How many replicas each node holds.
pub(super) struct Held(BTreeMap<Node, u64>);

impl Held {
    /// Those of this node.
    pub(super) fn of(&self, node: Node) -> u64 {
        self.0.get(&node).copied().unwrap_or_default()
    }
}

/// What was sent to replicas that do not vote, by the nodes that run.
pub(super) struct Copied(BTreeMap<Node, f64>);

impl Copied {
    pub(super) async fn so_far(cluster: &Cluster) -> Self {
        let mut sent = BTreeMap::new();
        for node in cluster.running() {
            sent.insert(node, cluster.metric(node, COPIED).await.unwrap_or_default());
        }
        Self(sent)
    }

    /// Bytes since.
    pub(super) async fn until_now(self, cluster: &Cluster) -> f64 {
        let now = Self::so_far(cluster).await;
        now.0.iter().map(|(node, sent)| sent - self.0.get(node).copied().unwrap_or_default()).sum()
    }
}

/// Moves from the first to the last.
pub(super) struct Change {
    rate: Rate,
    slowest: f64,
    length: Duration,
}

impl Change {
    /// Waits until moves have begun and are over, and replicas are where they should be. In the middle it prints what the cluster says of
    /// itself.
    pub(super) async fn follow(
        cluster: &Cluster,
        acks: &Acks,
        patience: Duration,
        settled: impl Fn(&Held) -> bool,
    ) -> anyhow::Result<Self> {
        let admin = cluster.admin()?;
        let asked = Instant::now();
        let mut shown = false;
        let (mut all, mut last): (Option<Stretch>, Option<(Instant, Rate)>) = (None, None);
        let mut second = acks.measure(cluster.cpu()?);
        let mut slowest = f64::INFINITY;
        loop {
            sleep(LOOK_EVERY).await;
            let filter = pb::ListPartitionsRequest { unsettled: true, ..Default::default() };
            let unsettled = admin.admin().partitions(filter).await?;
            let moving = unsettled.iter().filter(|partition| partition.r#move.is_some()).count();
            let nodes = admin.admin().nodes(None).await?;
            let held = Held(nodes.iter().map(|node| (node.id, node.replicas)).collect());
            if moving > 0 {
                let cpu = cluster.cpu()?;
                let all = all.get_or_insert_with(|| {
                    second = acks.measure(cpu);
                    acks.measure(cpu)
                });
                last = Some((Instant::now(), all.rate(cpu)));
                if second.length() >= Duration::from_secs(1) {
                    slowest = slowest.min(second.rate(cpu).a_second);
                    second = acks.measure(cpu);
                }
                if !shown && all.length() >= Duration::from_secs(2) {
                    shown = true;
                    say(format!("\nmeanwhile, {moving} partitions move"));
                    say(cluster.ensign(&["cluster", "status"])?);
                    say(cluster.ensign(&["partition", "list", "--unsettled"])?);
                }
            }
            if let (Some(all), Some((at, rate))) = (&all, last)
                && at.elapsed() >= QUIET
                && settled(&held)
            {
                let length = all.length().saturating_sub(at.elapsed());
                return Ok(Self { rate, slowest: slowest.min(rate.a_second), length });
            }
            ensure!(
                asked.elapsed() < patience,
                "replicas are not where they should be after {patience:?}: nodes hold {:?}, {moving} partitions move, {:?}",
                held.0,
                unsettled.first()
            );
        }
    }

    /// What it has cost.
    pub(super) fn cost(self, what: &'static str, bytes: f64, (before, after): (Rate, Rate)) -> Cost {
        Cost { what, bytes, before, after, change: self }
    }
}

/// What a change has cost publishers.
pub(super) struct Cost {
    what: &'static str,
    bytes: f64,
    before: Rate,
    after: Rate,
    change: Change,
}

impl Cost {
    /// The share of the throughput just before that publishers kept.
    pub(super) fn kept(&self) -> Rate {
        let (now, before) = (self.change.rate, self.before);
        Rate { a_second: now.a_second / before.a_second, a_cpu_second: now.a_cpu_second / before.a_cpu_second }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = self.kept();
        writeln!(
            f,
            "{}: {:.1} s of moves, {:.0} MiB sent to new replicas",
            self.what,
            self.change.length.as_secs_f64(),
            self.bytes / f64::from(1 << 20)
        )?;
        writeln!(
            f,
            "  acked events/s: {} before, {} meanwhile (slowest second {:.0}), {} after",
            told(self.before),
            told(self.change.rate),
            self.change.slowest,
            told(self.after),
        )?;
        write!(
            f,
            "  kept: {:.2} of the throughput before (limit {KEPT}), {:.2} a CPU second",
            kept.a_second, kept.a_cpu_second
        )
    }
}
