//! A node with a share of many partitions is drained: how long that takes, whether anything is left behind, and what it costs at rest.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ensign_client::admin_api as pb;
use ensign_client::{Client, Event, Mime, PublisherOptions};
use tokio::time::{Instant, sleep};

use super::{on_cluster, say};
use crate::cluster::{Cluster, Plan};
use crate::history::Name;
use crate::links::Node;
use crate::workload::ours;

/// How often it is looked how far the drain is, and how often that is told.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const TELL_EVERY: Duration = Duration::from_secs(20);
/// No move may take so long that nothing else ends meanwhile.
const STUCK: Duration = Duration::from_mins(1);
const PATIENCE: Duration = Duration::from_mins(3);
/// So many topics are published to before and after.
const SAMPLE: usize = 20;
const TOPICS_AT_ONCE: usize = 200;

/// What to run.
#[derive(Debug, Clone)]
pub struct Drain {
    /// The cluster, of four nodes or more; the last one is drained.
    pub plan: Plan,
    /// How many topics.
    pub topics: usize,
    /// How long the processor time of nodes at rest is measured, after as long a rest.
    pub rest: Duration,
}

/// Runs it.
///
/// # Errors
/// A replica stays on the node, a topic does not take events any more or has lost one, or the run could not be carried out.
pub async fn run(drain: Drain) -> anyhow::Result<()> {
    on_cluster(&drain.plan, async |cluster| drain_one(&drain, cluster).await).await
}

async fn drain_one(drain: &Drain, cluster: &mut Cluster) -> anyhow::Result<()> {
    let leaves = drain.plan.nodes;
    let topics: Vec<String> = (1..=drain.topics).map(|number| format!("topic-{number}")).collect();
    let client = cluster.client_from(1)?;
    let begun = Instant::now();
    for some in topics.chunks(TOPICS_AT_ONCE) {
        client.create_topics(some).await?;
    }
    led(cluster).await?;
    say(format!("{} topics made, all with a leader, in {:.1} s", drain.topics, begun.elapsed().as_secs_f64()));
    let sample: Vec<&String> = topics.iter().step_by(topics.len().div_ceil(SAMPLE)).collect();
    publish(&client, &sample, 0).await?;
    at_rest(drain, cluster, "before").await?;

    say(cluster.ensign(&["node", "drain", &leaves.to_string()])?);
    let took = emptied(cluster, leaves).await?;
    let replicas = drain.topics * 3 / leaves as usize;
    say(format!(
        "about {replicas} replicas left it in {:.0} s, {:.1} a second",
        took.as_secs_f64(),
        replicas as f64 / took.as_secs_f64()
    ));
    led(cluster).await?;
    publish(&client, &sample, 1).await?;
    for topic in sample {
        let names: Vec<Name> = ours::read(&client, topic).await?.iter().map(|row| row.name).collect();
        ensure!(names == [0, 1].map(|number| Name { publisher: 1, number }), "{topic} holds {names:?}");
    }
    at_rest(drain, cluster, "after").await?;
    say(cluster.ensign(&["node", "list"])?);
    cluster.nobody_died()
}

/// Returns once every replica knows a leader.
async fn led(cluster: &Cluster) -> anyhow::Result<()> {
    let begun = Instant::now();
    for node in cluster.running() {
        while cluster.metric(node, "ensign_replicas_without_leader").await? > 0.0 {
            ensure!(begun.elapsed() < PATIENCE, "node {node} holds replicas without a leader");
            sleep(LOOK_EVERY).await;
        }
    }
    Ok(())
}

async fn publish(client: &Client, topics: &[&String], number: u64) -> anyhow::Result<()> {
    for topic in topics {
        let stream = client.publisher(topic, PublisherOptions::default()).await?;
        let event = Event::new(Name { publisher: 1, number }.to_string()).with_mimetype(Mime::TextPlain);
        stream.publish(event).await?.await.with_context(|| format!("cannot publish to {topic}"))?;
        stream.close().await;
    }
    Ok(())
}

/// Says what every node uses while nothing happens.
async fn at_rest(drain: &Drain, cluster: &Cluster, when: &str) -> anyhow::Result<()> {
    sleep(drain.rest).await;
    let mut before = Vec::new();
    for node in cluster.running() {
        before.push((node, cluster.cpu_of(node)?));
    }
    sleep(drain.rest).await;
    for (node, before) in before {
        let used = cluster.cpu_of(node)?.saturating_sub(before);
        say(format!(
            "at rest {when}: node {node} uses {:.2} % of a core",
            used.as_secs_f64() / drain.rest.as_secs_f64() * 100.0
        ));
    }
    Ok(())
}

/// Returns once the node holds nothing and nothing moves: how long that took.
async fn emptied(cluster: &Cluster, node: Node) -> anyhow::Result<Duration> {
    let admin = cluster.admin()?;
    let begun = Instant::now();
    let (mut least, mut since, mut told) = (u64::MAX, Instant::now(), Instant::now());
    loop {
        let nodes = admin.admin().nodes(None).await?;
        let held = nodes.iter().find(|it| it.id == node).context("the node is listed")?.replicas;
        let filter = pb::ListPartitionsRequest { unsettled: true, ..Default::default() };
        let unsettled = admin.admin().partitions(filter).await?;
        if held == 0 && unsettled.is_empty() {
            return Ok(begun.elapsed());
        }
        if held < least {
            (least, since) = (held, Instant::now());
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            say(format!("{:.0} s: {held} replicas left", begun.elapsed().as_secs_f64()));
        }
        if since.elapsed() > STUCK {
            bail!(
                "{held} replicas stay on node {node}, {} topics are not where they should be: {:?}",
                unsettled.len(),
                unsettled.first()
            );
        }
        sleep(LOOK_EVERY).await;
    }
}
