//! What it costs publishers that a node joins, and that a dead one's replicas are made anew.
//!
//! ```text
//! three nodes, loaded ─ measured ─ a fourth joins and takes its share ─ measured ─ one is killed for good, its replicas are made anew
//! ```
//! Throughput is that of publishers that keep their windows full, in one run on one machine, so that only ratios count.

mod moves;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::Client;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use self::moves::{Change, Copied};
use super::{Limits, on_cluster, say};
use crate::checker::judge;
use crate::cluster::{Cluster, Plan, Settings};
use crate::history::{History, Published, Received};
use crate::links::Node;
use crate::workload::load::{Acks, Load, Rate, keep_full, verify};
use crate::workload::{Finish, Pulse, ours};

/// Its history is judged like that of any other run: with a publisher and a subscriber that are in no hurry.
const LEDGER: &str = "ledger";
const LEDGER_PUBLISHER: u32 = 1;
/// The least share of the throughput of before that publishers keep.
const KEPT: f64 = 0.8;
/// Replicas of each topic.
const REPLICATION: usize = 3;
/// The share of a node that joined: the others may keep a little more.
const SHARE: f64 = 0.85;
/// The node that dies. Not the first, which clients of the command line ask.
const DIES: Node = 2;
/// A node that is silent for so long is lost.
const LOST_AFTER: Duration = Duration::from_secs(10);
/// A failover is over by then.
const FAILOVER: Duration = Duration::from_secs(4);
const PATIENCE: Duration = Duration::from_mins(3);

/// What to run.
#[derive(Debug, Clone)]
pub struct Rebuild {
    /// The cluster: three nodes or more, and one machine that joins; see [`settings`].
    pub plan: Plan,
    /// How many topics, of three replicas each.
    pub topics: usize,
    /// Bytes of an event.
    pub size: usize,
    /// Events of a topic that wait for their acks.
    pub window: usize,
    /// Bytes that are published before anything is measured.
    pub preload: u64,
    /// How long the throughput of quiet times is measured.
    pub measure: Duration,
    /// What a throughput below its limit means.
    pub limits: Limits,
}

/// Settings of every node, for [`Plan::all`].
pub fn settings(prefill: &str, move_rate: Option<&str>) -> Settings {
    let rate = move_rate.map(|rate| format!("move_rate = \"{rate}\"\n")).unwrap_or_default();
    Settings {
        cluster: format!("lost_after = \"{}s\"\n", LOST_AFTER.as_secs()),
        storage: format!("prefill = \"{prefill}\"\n{rate}"),
    }
}

/// Measures and checks.
///
/// # Errors
/// A limit was missed, an event was lost, or the run could not be carried out.
pub async fn run(rebuild: Rebuild) -> anyhow::Result<()> {
    on_cluster(&rebuild.plan, async |cluster| measure(&rebuild, cluster).await).await
}

async fn measure(rebuild: &Rebuild, cluster: &mut Cluster) -> anyhow::Result<()> {
    let joins = rebuild.plan.nodes + 1;
    let mut work = Work::begin(rebuild, cluster).await?;
    while work.acks.count() * (rebuild.size as u64) < rebuild.preload {
        work.goes_on()?;
        sleep(Duration::from_millis(100)).await;
    }
    let before = quiet(rebuild, cluster, &work, "before").await?;

    say(format!("\nnode {joins} joins"));
    let copied = Copied::so_far(cluster).await;
    cluster.join(joins).await?;
    let replicas = (rebuild.topics + 1) * REPLICATION;
    let share = (replicas as f64 / joins as f64 * SHARE) as u64;
    let change = Change::follow(cluster, &work.acks, PATIENCE, |held| held.of(joins) >= share).await?;
    let copied = copied.until_now(cluster).await;
    let after = quiet(rebuild, cluster, &work, "after").await?;
    let added = change.cost("a node that joins receives its share", copied, (before, after));
    say(added.to_string());
    work.goes_on()?;

    say(format!("\nnode {DIES} is killed for good"));
    let copied = Copied::so_far(cluster).await;
    cluster.kill(DIES)?;
    sleep(FAILOVER).await;
    let silent = work.acks.measure(cluster.cpu()?);
    sleep(LOST_AFTER.saturating_sub(FAILOVER + Duration::from_secs(2))).await;
    let silent = silent.rate(cluster.cpu()?);
    say(format!("acked events/s while it is silent and nothing moves: {}", told(silent)));
    // With one replica less to wait for, or one node less on the same cores, publishers may be faster than before it died.
    let before = if silent.a_second > after.a_second { silent } else { after };
    let change = Change::follow(cluster, &work.acks, PATIENCE, |held| held.of(DIES) == 0).await?;
    let copied = copied.until_now(cluster).await;
    let last = quiet(rebuild, cluster, &work, "after").await?;
    let rebuilt = change.cost("a dead node's replicas are made anew", copied, (before, last));

    let events = work.judge(cluster).await?;
    cluster.nobody_died()?;
    say("");
    for cost in [&added, &rebuilt] {
        say(cost.to_string());
    }
    say(format!("{events} events acked: 0 lost, 0 duplicated, 0 reordered"));
    for cost in [added, rebuilt] {
        ensure!(
            cost.kept().a_second >= KEPT || rebuild.limits == Limits::Printed,
            "publishers kept less than {KEPT} of their throughput: {cost}"
        );
    }
    Ok(())
}

/// The throughput while nothing moves, and what the cluster says of itself then.
async fn quiet(rebuild: &Rebuild, cluster: &Cluster, work: &Work, when: &str) -> anyhow::Result<Rate> {
    say(format!("\n{when}, measured for {:?}", rebuild.measure));
    let stretch = work.acks.measure(cluster.cpu()?);
    sleep(rebuild.measure).await;
    let rate = stretch.rate(cluster.cpu()?);
    say(format!("acked events/s: {}", told(rate)));
    say(cluster.ensign(&["cluster", "status"])?);
    Ok(rate)
}

fn told(rate: Rate) -> String {
    format!("{:.0} ({:.0} a CPU second)", rate.a_second, rate.a_cpu_second)
}

/// Everybody who publishes and subscribes.
struct Work {
    finish: Finish,
    acks: Acks,
    publishers: JoinSet<anyhow::Result<(String, u32, u64)>>,
    ledger: JoinSet<anyhow::Result<Published>>,
    subscriber: JoinSet<anyhow::Result<Received>>,
    end: watch::Sender<Option<u64>>,
}

/// A client that begins with this node, and knows those that were there from the start.
fn from(rebuild: &Rebuild, cluster: &Cluster, node: Node) -> anyhow::Result<Client> {
    let all = rebuild.plan.nodes;
    let nodes: Vec<Node> = (0..all).map(|turn| (node - 1 + turn) % all + 1).collect();
    cluster.client(&nodes)
}

impl Work {
    async fn begin(rebuild: &Rebuild, cluster: &Cluster) -> anyhow::Result<Self> {
        let topics: Vec<String> = (1..=rebuild.topics).map(|number| format!("load-{number}")).collect();
        let client = from(rebuild, cluster, 1)?;
        client.create_topic(LEDGER).await?;
        for some in topics.chunks(100) {
            client.create_topics(some).await?;
        }
        // A client a node, as behind a balancer.
        let clients: Vec<Client> =
            (1..=rebuild.plan.nodes).map(|node| from(rebuild, cluster, node)).collect::<Result<_, _>>()?;
        let (finish, acks) = (Finish::default(), Acks::default());
        let (mut publishers, mut ledger, mut subscriber) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
        let load = Load::new(rebuild.size, rebuild.window);
        for ((number, topic), client) in (1..).zip(topics).zip(clients.iter().cycle()) {
            let (client, load, told) = (client.clone(), load.clone(), (finish.clone(), acks.clone()));
            publishers.spawn(async move {
                let count = keep_full(client, topic.clone(), number, load, told).await?;
                Ok((topic, number, count))
            });
        }
        let (end, until) = watch::channel(None);
        let pace = ours::Pace { every: Duration::from_millis(20), events: 1, window: 1024 };
        let told = (finish.clone(), Pulse::default());
        ledger.spawn(ours::publish(client, LEDGER.to_owned(), LEDGER_PUBLISHER, pace, told));
        let client = from(rebuild, cluster, 3)?;
        subscriber.spawn(ours::follow(client, LEDGER.to_owned(), "subscriber".to_owned(), until));
        Ok(Self { finish, acks, publishers, ledger, subscriber, end })
    }

    /// A publisher that ended by itself is an error, whatever becomes of the cluster.
    fn goes_on(&mut self) -> anyhow::Result<()> {
        match self.publishers.try_join_next() {
            Some(ended) => ended?.map(|_| ()).context("a publisher gave up"),
            None => Ok(()),
        }
    }

    /// Ends it, and compares what was acked with what every node that lives reads. How many events that are.
    async fn judge(mut self, cluster: &Cluster) -> anyhow::Result<u64> {
        self.finish.now();
        let nodes: Vec<Node> = cluster.running().into_iter().collect();
        let clients: Vec<Client> = nodes.iter().map(|node| cluster.client(&[*node])).collect::<Result<_, _>>()?;
        let (mut events, mut turns) = (0, clients.iter().cycle());
        while let Some(ended) = self.publishers.join_next().await {
            let (topic, publisher, count) = ended??;
            let client = turns.next().context("a node runs")?;
            verify(client, &topic, publisher, count).await?;
            events += count;
        }
        let mut history = History::default();
        let published = self.ledger.join_next().await.context("it was started")???;
        events += published.acked.len() as u64;
        history.published.insert(LEDGER_PUBLISHER, published);
        for (node, client) in nodes.iter().zip(&clients) {
            history.read.insert(format!("node {node}"), ours::read(client, LEDGER).await?);
        }
        self.end.send_replace(history.read.values().map(|rows| rows.len() as u64).max());
        let received = tokio::time::timeout(PATIENCE, self.subscriber.join_next()).await;
        history.received.push(received.context("the subscriber stands still")?.context("it was started")???);
        let verdict = judge(&history);
        ensure!(verdict.holds(), "promises were broken: {:?} {:#?}", verdict.broken, verdict.told);
        Ok(events)
    }
}
