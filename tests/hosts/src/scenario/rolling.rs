//! A rolling restart under load: SIGTERM to one node after the other, each started again and healthy before the next. With the program of
//! an older release to begin with, it is a rolling upgrade.

mod mixed;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{on_cluster, say};
use crate::balancer::Balancer;
use crate::checker::{Verdict, judge};
use crate::cluster::{Cluster, Plan};
use crate::history::History;
use crate::links::Node;
use crate::workload::{Finish, Pulse, ours, pyensign};

const TOPIC: &str = "rolling";
const PYENSIGN: &str = "rolling-pyensign";
const PYENSIGN_PUBLISHER: u32 = 1000;
const PATIENCE: Duration = Duration::from_mins(3);

/// What to run.
#[derive(Debug, Clone)]
pub struct Rolling {
    /// The cluster.
    pub plan: Plan,
    /// How often every node is restarted.
    pub rounds: u32,
    /// Each publisher's events a second.
    pub rate: u32,
    /// A Python with PyEnsign; none goes without.
    pub python: Option<PathBuf>,
    /// The program of an older release, of version 1 of the cluster, which every node runs before its first restart.
    pub from: Option<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// A publish of our client failed, something acked is lost, a subscriber missed something, or a node did not stop or start in order.
pub async fn run(rolling: Rolling) -> anyhow::Result<()> {
    let (new, mut plan) = (rolling.plan.binary.clone(), rolling.plan.clone());
    ensure!(new.exists(), "there is no server at {}: build one, or name it with --binary", new.display());
    if let Some(old) = &rolling.from {
        plan.binary.clone_from(old);
    }
    let restarting = async |cluster: &mut Cluster| {
        cluster.run_from_now_on(&new);
        restart_all(&rolling, cluster).await
    };
    on_cluster(&plan, restarting).await
}

/// The old program once more, and the new one again: while nodes of it are left, every node can be set back.
async fn put_back(rolling: &Rolling, cluster: &mut Cluster, node: Node) -> anyhow::Result<()> {
    let Some(old) = &rolling.from else { return Ok(()) };
    for program in [old, &rolling.plan.binary] {
        cluster.terminate(node).await?;
        cluster.run_from_now_on(program);
        cluster.start_node(node)?;
        cluster.ready(node).await?;
        cluster.healthy().await?;
    }
    say(format!("node {node} was set back, and upgraded again"));
    Ok(())
}

async fn restart_all(rolling: &Rolling, cluster: &mut Cluster) -> anyhow::Result<()> {
    let mut history: BTreeMap<&'static str, History> = [(TOPIC, History::default())].into();
    cluster.client_from(1)?.create_topic(TOPIC).await?;
    let (finish, pulse) = (Finish::default(), Pulse::default());
    let (mut publishers, mut subscribers) = (JoinSet::new(), JoinSet::new());
    let (end, until) = watch::channel(None);
    let pace =
        ours::Pace { every: Duration::from_millis(20), events: u64::from(rolling.rate / 50).max(1), window: 4096 };
    for node in 1..=rolling.plan.nodes {
        let (client, beat) = (cluster.client_from(node)?, (finish.clone(), pulse.clone()));
        publishers.spawn(async move {
            (node as u32, ours::publish(client, TOPIC.to_owned(), node as u32, pace, beat).await)
        });
        let client = cluster.client_from(node)?;
        subscribers.spawn(ours::follow(client, TOPIC.to_owned(), format!("subscriber {node}"), until.clone()));
    }
    let mut balancers = Vec::new();
    let worker = match &rolling.python {
        None => None,
        Some(python) => {
            cluster.client_from(1)?.create_topic(PYENSIGN).await?;
            let nodes: Vec<_> = cluster.network.nodes().iter().map(|node| cluster.addresses(*node)).collect();
            balancers.push(Balancer::start(nodes.iter().map(|it| (it.grpc, it.metrics))).await?);
            balancers.push(Balancer::start(nodes.iter().map(|it| (it.http, it.metrics))).await?);
            let job = pyensign::Job {
                python: python.clone(),
                endpoint: balancers[0].address().to_string(),
                auth_url: format!("http://{}", balancers[1].address()),
                credentials: cluster.credentials(),
                topic: PYENSIGN.to_owned(),
                publisher: PYENSIGN_PUBLISHER,
                rate: rolling.rate,
            };
            let worker = pyensign::Worker::start(&job).await?;
            let finish = finish.clone();
            let told = async move {
                while !finish.is_time() {
                    sleep(Duration::from_millis(100)).await;
                }
            };
            let mut task = JoinSet::new();
            task.spawn(worker.run(PYENSIGN_PUBLISHER, told));
            Some(task)
        }
    };
    sleep(Duration::from_secs(2)).await;
    say("round  node   stopped in   ready in   longest gap   slowest ack");
    for round in 1..=rolling.rounds {
        for node in 1..=rolling.plan.nodes {
            cluster.healthy().await?;
            pulse.take();
            let stopped = cluster.terminate(node).await?;
            let begun = tokio::time::Instant::now();
            cluster.start_node(node)?;
            cluster.ready(node).await?;
            cluster.healthy().await?;
            let (gap, slowest) = pulse.take();
            say(format!(
                "{round:5} {node:5} {:10.2} s {:8.2} s {:10.0} ms {:10.0} ms",
                stopped.as_secs_f64(),
                begun.elapsed().as_secs_f64(),
                gap.length.as_secs_f64() * 1e3,
                slowest.as_secs_f64() * 1e3,
            ));
            let old: Vec<_> = (node + 1..=rolling.plan.nodes).collect();
            if rolling.from.is_some() && round == 1 && !old.is_empty() {
                mixed::while_mixed(cluster, node, &old).await?;
                put_back(rolling, cluster, node).await?;
            }
        }
    }
    if rolling.from.is_some() {
        mixed::when_all_are_new(cluster).await?;
    }
    finish.now();
    let ours = history.entry(TOPIC).or_default();
    while let Some(publisher) = publishers.join_next().await {
        let (number, published) = publisher?;
        let published = published?;
        ensure!(published.trouble.is_empty(), "publisher {number} failed: {:?}", published.trouble);
        ours.published.insert(number, published);
    }
    if let Some(mut worker) = worker {
        let (published, received) = worker.join_next().await.context("it was started")???;
        for trouble in &published.trouble {
            say(format!("PyEnsign: {trouble}"));
        }
        let theirs = history.entry(PYENSIGN).or_default();
        theirs.published.insert(PYENSIGN_PUBLISHER, published);
        theirs.received.push(received);
    }
    for (topic, history) in &mut history {
        for node in cluster.running() {
            history.read.insert(format!("node {node}"), ours::read(&cluster.client(&[node])?, topic).await?);
        }
    }
    end.send_replace(history[TOPIC].read.values().map(|rows| rows.len() as u64).max());
    while let Some(received) =
        tokio::time::timeout(PATIENCE, subscribers.join_next()).await.context("a subscriber stands still")?
    {
        history.entry(TOPIC).or_default().received.push(received??);
    }
    cluster.nobody_died()?;
    let mut verdict = Verdict::default();
    for (topic, history) in &history {
        let begun: u64 = history.published.values().map(|it| it.begun).sum();
        let acked: usize = history.published.values().map(|it| it.acked.len()).sum();
        say(format!("{topic}: {begun} published, {acked} acked, {} read", history.read["node 1"].len()));
        ensure!(acked > 0, "nothing was acked on {topic}: the run shows nothing");
        verdict.merge(topic, judge(history));
    }
    ensure!(verdict.holds(), "promises were broken: {:?} {:#?}", verdict.broken, verdict.told);
    say(
        "no publish of our client failed, nothing acked is lost, every subscriber of ours got everything once and in order",
    );
    Ok(())
}
