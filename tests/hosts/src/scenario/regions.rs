//! Regions: delays between them, a topic that stays in one, and a topic that survives the loss of one.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{Client, Event, Mime, PublisherOptions};
use hdrhistogram::Histogram;
use tokio::time::Instant;

use super::{Limits, say};
use crate::checker::judge;
use crate::cluster::{Cluster, Plan};
use crate::history::{History, Name, Published, Sending};
use crate::links::{Node, Way, patterns};
use crate::workload::ours;

/// Three regions: one node in each of the last two, the others in the first.
const REGIONS: [&str; 3] = ["east", "north", "west"];

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
    let mut cluster = Cluster::start(regions.plan.clone()).await?;
    let outcome = measure(&regions, &mut cluster).await;
    if outcome.is_err() {
        say(format!("the cluster's directory is kept: {}", cluster.keep().display()));
    }
    outcome
}

async fn measure(regions: &Regions, cluster: &mut Cluster) -> anyhow::Result<()> {
    let nodes = cluster.network.nodes().clone();
    let home = of_region(&nodes, REGIONS[0]);
    let replicas = home.len().to_string();
    create(&regions.plan.binary, cluster, &[PINNED, "--replication", &replicas, "--region", REGIONS[0]])?;
    create(&regions.plan.binary, cluster, &[SPREAD, "--replication", "3", "--region", &REGIONS.join(",")])?;
    let near: Vec<Node> = home.iter().copied().collect();
    let mut history = History::default();
    let client = cluster.client(&near)?;
    let without = publish(&client, PINNED, &mut history, 0, regions.events).await?;
    cluster.network.delay(between_regions(&nodes), regions.delay)?;
    // The catalog and the vault, which span all regions, find their pace.
    tokio::time::sleep(Duration::from_secs(5)).await;
    cluster.healthy().await?;
    let with = publish(&client, PINNED, &mut history, 1, regions.events).await?;
    let spread = publish(&client, SPREAD, &mut History::default(), 0, regions.events / 10 + 1).await?;
    let p50 = |latency: &Histogram<u64>| latency.value_at_quantile(0.5) as f64 / 1e3;
    let ratio = p50(&with) / p50(&without);
    say(format!(
        "topic in one region, ack p50: {:.2} ms without delays, {:.2} ms with, ratio {ratio:.2} (limit 2)",
        p50(&without),
        p50(&with)
    ));
    say(format!("topic over three regions, ack p50 with delays: {:.1} ms", p50(&spread)));

    let lost = of_region(&nodes, REGIONS[2]);
    say(format!("region {} is lost: nodes {lost:?}", REGIONS[2]));
    for node in &lost {
        cluster.kill(*node)?;
    }
    let begun = Instant::now();
    let mut survived = History::default();
    publish(&client, SPREAD, &mut survived, 1, 1).await?;
    say(format!("the topic over three regions takes events again after {:.1} s", begun.elapsed().as_secs_f64()));
    publish(&client, SPREAD, &mut survived, 2, regions.events / 10 + 1).await?;
    for node in &lost {
        cluster.start_node(*node)?;
    }
    for node in &lost {
        cluster.ready(*node).await?;
    }
    history.read.insert("home".to_owned(), ours::read(&client, PINNED).await?);
    let verdict = judge(&history);
    ensure!(verdict.holds(), "promises were broken: {:?} {:#?}", verdict.broken, verdict.told);
    let rows = ours::read(&cluster.client(&[*lost.iter().next().context("a region has nodes")?])?, SPREAD).await?;
    let acked: usize = survived.published.values().map(|it| it.acked.len()).sum();
    let found = rows.iter().filter(|row| row.name.publisher > 0).count();
    ensure!(found == acked, "{acked} events were acked while a region was away, {found} are there");
    ensure!(
        ratio <= 2.0 || regions.limits == Limits::Printed,
        "acks of a topic in one region take {ratio:.2} times as long once others are far away"
    );
    Ok(())
}

/// `ensign topic create`, as an operator would: what the Rust client does not say is where a topic lies.
fn create(binary: &Path, cluster: &Cluster, args: &[&str]) -> anyhow::Result<()> {
    let home = cluster.addresses(1);
    let output = Command::new(binary)
        .args(["topic", "create"])
        .args(args)
        .args(["--endpoint", &home.grpc.to_string(), "--auth-url", &format!("http://{}", home.http)])
        .arg("--credentials")
        .arg(cluster.credentials())
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`ensign topic create {}` failed: {said}", args.join(" "));
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
    let mut latency = Histogram::new(3)?;
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
