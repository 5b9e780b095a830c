//! How long acks stay away when a leader goes: killed, and asked to stop.

use std::time::Duration;

use anyhow::ensure;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{Limits, on_cluster, say};
use crate::checker::judge;
use crate::cluster::{Cluster, Plan};
use crate::history::History;
use crate::workload::{Finish, Pulse, ours};

const TOPIC: &str = "failover";
/// After a leader has gone, this long is watched.
const WATCH: Duration = Duration::from_secs(6);
/// Before it goes, so that what happens is hit in full run.
const SETTLE: Duration = Duration::from_secs(3);

/// What the issue asks for.
const KILLED_LIMIT: Duration = Duration::from_secs(3);
const STOPPED_LIMIT: Duration = Duration::from_millis(500);

/// What to run.
#[derive(Debug, Clone)]
pub struct Failover {
    /// The cluster.
    pub plan: Plan,
    /// How often each way of going is measured.
    pub rounds: u32,
    /// Events a second of each publisher; there is one for each node, connected to it.
    pub rate: u32,
    /// What a figure beyond its limit means.
    pub limits: Limits,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
struct Measured {
    /// The longest time without an ack to anyone.
    gap: Duration,
    /// The longest that any event waited for its ack.
    slowest: Duration,
}

/// Measures; the verdict on the topic's history is part of it.
///
/// # Errors
/// A limit was missed, a promise was broken, or the run could not be carried out.
pub async fn run(failover: Failover) -> anyhow::Result<()> {
    on_cluster(&failover.plan, async |cluster| measure(&failover, cluster).await).await
}

async fn measure(failover: &Failover, cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.client_from(1)?.create_topic(TOPIC).await?;
    let (finish, pulse) = (Finish::default(), Pulse::default());
    let mut publishers = JoinSet::new();
    let pace =
        ours::Pace { every: Duration::from_millis(10), events: u64::from(failover.rate / 100).max(1), window: 4096 };
    for node in 1..=failover.plan.nodes {
        let (client, beat) = (cluster.client_from(node)?, (finish.clone(), pulse.clone()));
        publishers.spawn(async move {
            (node as u32, ours::publish(client, TOPIC.to_owned(), node as u32, pace, beat).await)
        });
    }
    let (mut killed, mut stopped) = (Vec::new(), Vec::new());
    say("round  what      leader   longest gap   slowest ack");
    for round in 1..=failover.rounds {
        for (what, measured) in [("kill -9", &mut killed), ("SIGTERM", &mut stopped)] {
            cluster.healthy().await?;
            sleep(SETTLE).await;
            let leader = cluster.leader_of(TOPIC).await?;
            pulse.take();
            if what == "SIGTERM" {
                cluster.terminate(leader).await?;
            } else {
                cluster.kill(leader)?;
            }
            let begun = Instant::now();
            sleep(WATCH.saturating_sub(begun.elapsed())).await;
            let (gap, slowest) = pulse.take();
            say(format!(
                "{round:5}  {what:8} {leader:7} {:10.0} ms {:10.0} ms",
                gap.length.as_secs_f64() * 1e3,
                slowest.as_secs_f64() * 1e3
            ));
            measured.push(Measured { gap: gap.length, slowest });
            cluster.start_node(leader)?;
            cluster.ready(leader).await?;
        }
    }
    finish.now();
    let mut history = History::default();
    while let Some(publisher) = publishers.join_next().await {
        let (number, published) = publisher?;
        history.published.insert(number, published?);
    }
    for node in 1..=failover.plan.nodes {
        history.read.insert(format!("node {node}"), ours::read(&cluster.client(&[node])?, TOPIC).await?);
    }
    let verdict = judge(&history);
    ensure!(verdict.holds(), "promises were broken: {:?} {:#?}", verdict.broken, verdict.told);
    let worst =
        |measured: &[Measured], of: fn(&Measured) -> Duration| measured.iter().map(of).max().unwrap_or_default();
    let (resumed, late) = (worst(&killed, |it| it.gap), worst(&stopped, |it| it.slowest));
    for (what, figure, limit) in [
        ("kill -9 of the leader: acks resumed after at most", resumed, KILLED_LIMIT),
        ("SIGTERM to the leader: no ack later than", late, STOPPED_LIMIT),
    ] {
        let ratio = figure.as_secs_f64() / limit.as_secs_f64();
        say(format!("{what} {figure:.0?}, which is {ratio:.2} of the limit of {limit:?}"));
    }
    say(format!("{} events acked: 0 lost, 0 duplicated, 0 reordered", pulse.acks()));
    if failover.limits == Limits::Printed {
        return Ok(());
    }
    ensure!(resumed <= KILLED_LIMIT, "acks stayed away for {resumed:?} after a kill -9");
    ensure!(late <= STOPPED_LIMIT, "an ack came {late:?} after its event while the leader was stopping");
    Ok(())
}
