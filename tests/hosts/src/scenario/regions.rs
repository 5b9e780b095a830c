//! Regions: delays between them, a topic that stays in one, and a topic that survives the loss of one.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::ensure;
use ensign_client::{Client, Event, Mime, PublisherOptions};
use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::{Limits, on_cluster, say};
use crate::checker::{Verdict, judge};
use crate::cluster::{Cluster, Plan};
use crate::history::{History, Name, Published, Sending};
use crate::links::{Node, Way, patterns};
use crate::workload::ours;

/// Three regions: one node in each of the last two, the others in the first.
const REGIONS: [&str; 3] = ["east", "north", "west"];

/// The longest that an ack may take and be told from longer ones.
const LONGEST: Duration = Duration::from_mins(1);

/// What a topic of one region may take once the others are far away, beside what it took before.
const RATIO_MAX: f64 = 2.0;

/// Pinned to the first region, and spread over all.
const PINNED: &str = "pinned";
const SPREAD: &str = "spread";

/// What to run.
#[derive(Debug, Clone)]
pub struct Regions {
    /// The cluster, of five nodes or more; see [`settings`].
    pub plan: Plan,
    /// One way between regions.
    pub delay: Duration,
    /// Events of each measurement, one at a time.
    pub events: u64,
    /// What a ratio beyond its limit means.
    pub limits: Limits,
}

/// Settings that tell each node its region, for [`Plan::more`].
pub fn settings(nodes: Node) -> std::collections::BTreeMap<Node, String> {
    let line = |node| format!("region = \"{}\"\nzone = \"zone-{node}\"\n", region(node, nodes));
    (1..=nodes).map(|node| (node, line(node))).collect()
}

fn region(node: Node, nodes: Node) -> &'static str {
    REGIONS[(node + 2).saturating_sub(nodes) as usize]
}

fn of_region(nodes: &BTreeSet<Node>, name: &str) -> BTreeSet<Node> {
    nodes.iter().copied().filter(|node| region(*node, nodes.len() as Node) == name).collect()
}

fn between_regions(nodes: &BTreeSet<Node>) -> Vec<Way> {
    let of = |node: &Node| region(*node, nodes.len() as Node);
    patterns::ways(nodes).into_iter().filter(|(from, to)| of(from) != of(to)).collect()
}

/// Measures and checks.
///
/// # Errors
/// A limit was missed, an event was lost, or the run could not be carried out.
pub async fn run(regions: Regions) -> anyhow::Result<()> {
    on_cluster(&regions.plan, async |cluster| measure(&regions, cluster).await).await
}

async fn measure(regions: &Regions, cluster: &mut Cluster) -> anyhow::Result<()> {
    let nodes = cluster.network.nodes().clone();
    let home = of_region(&nodes, REGIONS[0]);
    let (replicas, all) = (home.len().to_string(), REGIONS.join(","));
    cluster.ensign(&["topic", "create", PINNED, "--replication", &replicas, "--region", REGIONS[0]])?;
    // It is led from a region that can be lost: the first one holds most of the catalog's voters.
    let led_from = ["--replication", "3", "--region", &all, "--leader-region", REGIONS[2]];
    cluster.ensign(&[&["topic", "create", SPREAD][..], &led_from].concat())?;
    let near: Vec<Node> = home.iter().copied().collect();
    let (mut pinned, mut spread) = (History::default(), History::default());
    let client = cluster.client(&near)?;
    // The first event makes the topic's key.
    publish(&client, PINNED, &mut pinned, 0, 1).await?;
    let without = publish(&client, PINNED, &mut pinned, 1, regions.events).await?;
    cluster.network.delay(between_regions(&nodes), regions.delay)?;
    // The catalog and the vault, which span all regions, find their pace.
    tokio::time::sleep(Duration::from_secs(5)).await;
    cluster.healthy().await?;
    let with = publish(&client, PINNED, &mut pinned, 2, regions.events).await?;
    let few = regions.events / 20 + 1;
    let far = publish(&client, SPREAD, &mut spread, 0, few).await?;
    let ms = |latency: &Histogram<u64>, quantile| latency.value_at_quantile(quantile) as f64 / 1e3;
    let ratio = ms(&with, 0.5) / ms(&without, 0.5);
    say(format!("{:?} one way between regions; one event at a time, {} of them", regions.delay, regions.events));
    for (when, latency) in [("without delays", &without), ("with delays", &with)] {
        say(format!(
            "topic in one region, {when}: ack p50 {:.2} ms, p99 {:.2} ms",
            ms(latency, 0.5),
            ms(latency, 0.99)
        ));
    }
    say(format!("topic in one region, p50 with delays to p50 without: {ratio:.2} (limit {RATIO_MAX})"));
    say(format!(
        "topic over three regions, with delays: ack p50 {:.1} ms, p99 {:.1} ms",
        ms(&far, 0.5),
        ms(&far, 0.99)
    ));

    lose_one(regions, cluster, &client, &mut spread, few).await?;
    for node in &nodes {
        let client = cluster.client(&[*node])?;
        pinned.read.insert(format!("node {node}"), ours::read(&client, PINNED).await?);
        spread.read.insert(format!("node {node}"), ours::read(&client, SPREAD).await?);
    }
    let mut verdict = Verdict::default();
    let mut events = 0;
    for (topic, history) in [(PINNED, &pinned), (SPREAD, &spread)] {
        events += history.published.values().map(|it| it.acked.len()).sum::<usize>();
        verdict.merge(topic, judge(history));
    }
    ensure!(verdict.holds(), "promises were broken: {:?} {:#?}", verdict.broken, verdict.told);
    cluster.nobody_died()?;
    say(format!("{events} events acked: 0 lost, 0 duplicated, 0 reordered, and every node reads the same"));
    ensure!(
        ratio <= RATIO_MAX || regions.limits == Limits::Printed,
        "acks of a topic in one region take {ratio:.2} times as long once others are far away"
    );
    Ok(())
}

/// Kills every node of the last region, and goes on publishing to the topic that spans all.
async fn lose_one(
    regions: &Regions,
    cluster: &mut Cluster,
    client: &Client,
    spread: &mut History,
    few: u64,
) -> anyhow::Result<()> {
    let lost = of_region(cluster.network.nodes(), REGIONS[2]);
    let leader = cluster.leader_of(SPREAD).await?;
    say(format!("the topic over three regions is led by node {leader}; region {} is lost: nodes {lost:?}", REGIONS[2]));
    for node in &lost {
        cluster.kill(*node)?;
    }
    let begun = Instant::now();
    publish(client, SPREAD, spread, 1, 1).await?;
    say(format!("it takes events again after {:.1} s", begun.elapsed().as_secs_f64()));
    let far = publish(client, SPREAD, spread, 2, few).await?;
    let p50 = far.value_at_quantile(0.5) as f64 / 1e3;
    say(format!(
        "and acks {few} of them without the region: p50 {p50:.1} ms, which is {:.1} delays",
        p50 / regions.delay.as_millis() as f64
    ));
    for node in &lost {
        cluster.start_node(*node)?;
    }
    for node in &lost {
        cluster.ready(*node).await?;
    }
    Ok(())
}

/// One event after the other, each once the one before is acked; how long each took, in microseconds.
async fn publish(
    client: &Client,
    topic: &str,
    history: &mut History,
    publisher: u32,
    events: u64,
) -> anyhow::Result<Histogram<u64>> {
    let stream = client.publisher(topic, PublisherOptions::default()).await?;
    let mut latency = Histogram::new_with_bounds(1, LONGEST.as_micros() as u64, 3)?;
    let mut published = Published::new(Sending::UntilAcked);
    for number in 0..events {
        let since = Instant::now();
        published.begun = number + 1;
        let event = Event::new(Name { publisher, number }.to_string()).with_mimetype(Mime::TextPlain);
        let ack = stream.publish(event).await?.await?;
        latency.saturating_record(since.elapsed().as_micros() as u64);
        published.acked.insert(number, ack.offset.map(|offset| offset.0));
    }
    stream.close().await;
    history.published.insert(publisher, published);
    Ok(latency)
}
