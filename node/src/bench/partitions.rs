//! `ensign bench partitions`: what many partitions cost while nobody writes to them, and what they do when somebody does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::{Bytes, BytesMut};
use ensign_client::admin_api::created_topic::Outcome;
use ensign_client::{Client, Event, Publisher, PublisherOptions, TOPICS_BATCH_MAX};
use ensign_raft::env::{OsRng, Rng as _};
use futures::{StreamExt as _, TryStreamExt as _};
use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::args::PartitionsBench;
use super::figures::{Figure, Target};
use super::load::{Load, Publishers, fill_all};
use super::nodes::Nodes;
use super::report::microseconds;
use super::{disk, figures, usage};
use crate::cli::note;

/// How long partitions may take until each has a leader, and how often that is looked at.
const LED: Duration = Duration::from_mins(5);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a partition that has lost its leader may take until it stores an event again.
const FAILOVER: Duration = Duration::from_mins(2);
/// Publishers that are opened at the same time.
const OPENING: usize = 32;
/// How many groups there are besides the topics': catalog and vault.
const OWN_GROUPS: usize = 2;

#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    partitions: u32,
    replicas: u64,
    figures: Vec<Figure>,
}

/// Runs it from an empty cluster to one that has lost a node.
pub(super) async fn run(args: PartitionsBench) -> anyhow::Result<()> {
    disk::refuse_memory(&args.dir)?;
    let mut bench = Bench::start(&args).await?;
    bench.create().await?;
    bench.idle().await?;
    bench.quiesced().await?;
    bench.throughput().await?;
    bench.failover().await?;
    let Bench { nodes, figures, .. } = bench;
    nodes.stop().await?;
    let report = Report { bench: "partitions", partitions: args.count, replicas: args.replicas, figures };
    figures::print(args.output, &report, &report.figures)
}

struct Bench<'a> {
    args: &'a PartitionsBench,
    nodes: Nodes,
    project: Client,
    topics: Vec<String>,
    payload: Bytes,
    /// Of each node, before there was a partition.
    empty: BTreeMap<u64, u64>,
    figures: Vec<Figure>,
}

impl<'a> Bench<'a> {
    async fn start(args: &'a PartitionsBench) -> anyhow::Result<Self> {
        note(format_args!("starting {} nodes", args.replicas));
        let nodes = Nodes::start(&args.dir, args.replicas).await?;
        let dir = nodes.dir().to_owned();
        let floor = tokio::task::spawn_blocking(move || disk::floor(&dir)).await??;
        let (project, _) = nodes.clients(|_| true)?;
        let topics = (0..args.count).map(|number| format!("bench-{number}")).collect();
        // Random, so that no layer can make it smaller.
        let mut payload = BytesMut::zeroed(args.size as usize);
        OsRng.fill(&mut payload);
        // Certificates, logins and the first lease have come and gone.
        sleep(Duration::from_secs(5)).await;
        let empty = usage::resident_each(&nodes);
        let mut bench = Self { args, nodes, project, topics, payload: payload.freeze(), empty, figures: Vec::new() };
        bench.figure("disk: 4 KiB append + fdatasync p50", floor.p50_us as f64 / 1e3, "ms", None);
        Ok(bench)
    }

    fn figure(&mut self, name: &'static str, value: f64, unit: &'static str, target: Option<Target>) {
        self.figures.push(Figure::new(name, value, unit, target));
    }

    async fn create(&mut self) -> anyhow::Result<()> {
        note(format_args!("creating {} topics", self.topics.len()));
        let begin = Instant::now();
        for batch in self.topics.chunks(TOPICS_BATCH_MAX) {
            let made = self.project.create_topics(batch).await.context("cannot create topics")?;
            let failed = made.iter().find(|topic| topic.outcome() != Outcome::Created);
            ensure!(failed.is_none(), "a topic was not created: {failed:?}");
        }
        let answered = begin.elapsed();
        for (id, _) in self.nodes.pids() {
            let (_, operator) = self.nodes.clients(|node| node == id)?;
            let wanted = self.topics.len() + OWN_GROUPS;
            timeout(LED, wait_led(&operator, wanted)).await.context("not every partition has a leader")??;
        }
        let led = begin.elapsed();
        self.figure("creation answered", answered.as_secs_f64(), "s", None);
        self.figure("creation, all with a leader", led.as_secs_f64(), "s", Some(Target::AtMost(60.0)));
        Ok(())
    }

    async fn idle(&mut self) -> anyhow::Result<()> {
        let idle = Duration::from(self.args.idle);
        note(format_args!("doing nothing for twice {idle:?}"));
        sleep(idle).await;
        let (before, begin) = (usage::cpu_each(&self.nodes), Instant::now());
        sleep(idle).await;
        let elapsed = begin.elapsed().as_secs_f64();
        let used = usage::cpu_each(&self.nodes)
            .into_iter()
            .filter_map(|(id, now)| Some(now.saturating_sub(*before.get(&id)?).as_secs_f64()));
        let most = used.fold(0.0, f64::max);
        ensure!(!before.is_empty(), "/proc does not tell how much CPU a process has used");
        let replicas = f64::from(self.args.count);
        let grown = usage::resident_each(&self.nodes)
            .into_iter()
            .filter_map(|(id, now)| Some(now.saturating_sub(*self.empty.get(&id)?) as f64 / replicas));
        let per_replica = grown.fold(0.0, f64::max);
        self.figure("idle CPU of the busiest node", 100.0 * most / elapsed, "% of a core", Some(Target::AtMost(3.0)));
        self.figure("resident memory a replica", per_replica / 1024.0, "KiB", Some(Target::AtMost(400.0)));
        Ok(())
    }

    /// One write each to partitions that were written to once, and then left alone.
    async fn quiesced(&mut self) -> anyhow::Result<()> {
        let step = (self.topics.len() / self.args.writes as usize).max(1);
        let chosen: Vec<String> = self.topics.iter().step_by(step).take(self.args.writes as usize).cloned().collect();
        note(format_args!("writing to {} quiesced partitions", chosen.len()));
        let publishers = open(&self.project, &chosen).await?;
        // Makes the partition's data key; afterwards it is a write like any other.
        let first = one_by_one(&publishers, &self.payload).await?;
        sleep(self.args.idle.into()).await;
        let again = one_by_one(&publishers, &self.payload).await?;
        close(publishers).await;
        let ms = |histogram: &Histogram<u64>, q: f64| histogram.value_at_quantile(q) as f64 / 1e3;
        self.figure("first write ever, ack p50", ms(&first, 0.5), "ms", None);
        self.figure("first write ever, ack p99", ms(&first, 0.99), "ms", None);
        self.figure("write to a quiesced partition, ack p50", ms(&again, 0.5), "ms", None);
        self.figure("write to a quiesced partition, ack p99", ms(&again, 0.99), "ms", Some(Target::AtMost(10.0)));
        Ok(())
    }

    async fn throughput(&mut self) -> anyhow::Result<()> {
        let args = self.args;
        note(format_args!("publishing {} events to one partition", args.events));
        let load = Load { events: args.events, size: args.size as usize, window: args.window as usize };
        // As so many processes: each has a connection to itself, and not all of them to the same node.
        let clients = self.nodes.spread_clients(args.publishers as usize)?;
        let mut publishers = Publishers::open(&clients, &self.topics[..1], args.publishers, load).await?;
        publishers.run(args.events / 10, &Arc::default()).await.context("warming up")?;
        let single = publishers.run(args.events, &Arc::default()).await?;
        publishers.close().await;

        note(format_args!("publishing {} events to all {} partitions", args.events, self.topics.len()));
        let mut shares = Vec::new();
        for (client, topics) in clients.iter().zip(deal(&self.topics, clients.len())) {
            shares.push(open(client, &topics).await?);
        }
        // Every partition has its data key then.
        let (shares, _) = self.spread(shares, self.topics.len() as u64).await?;
        let (shares, spread) = self.spread(shares, args.events).await?;
        close(shares.into_iter().flatten().collect()).await;

        let per_second = |elapsed: Duration| args.events as f64 / elapsed.as_secs_f64();
        let (single, spread) = (per_second(single.elapsed), per_second(spread));
        self.figure("throughput of one partition", single, "events/s", None);
        self.figure("throughput of all partitions", spread, "events/s", None);
        self.figure("all partitions to one", 100.0 * spread / single, "%", Some(Target::AtLeast(50.0)));
        Ok(())
    }

    /// Each publisher has a share of the partitions and writes to them in turn.
    async fn spread(
        &self,
        shares: Vec<Vec<Publisher>>,
        events: u64,
    ) -> anyhow::Result<(Vec<Vec<Publisher>>, Duration)> {
        let (begin, count) = (Instant::now(), shares.len() as u64);
        let mut tasks = JoinSet::new();
        for share in shares {
            let window = (self.args.window as usize * share.len()).min(self.args.spread_window as usize);
            let payload = self.payload.clone();
            tasks.spawn(async move {
                let done = AtomicU64::new(0);
                fill_all(&share, events.div_ceil(count), window, &payload, &done).await.map(|_| share)
            });
        }
        let mut shares = Vec::new();
        while let Some(share) = tasks.join_next().await {
            shares.push(share??);
        }
        Ok((shares, begin.elapsed()))
    }

    /// Kills the node that leads most, and writes to every partition that it led until each has stored an event.
    async fn failover(&mut self) -> anyhow::Result<()> {
        let (_, operator) = self.nodes.clients(|_| true)?;
        let before = operator.admin().cluster_status().await?;
        let mut led: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for group in before.groups.iter().filter(|group| self.topics.contains(&group.name)) {
            led.entry(group.leader).or_default().push(group.name.clone());
        }
        led.remove(&0);
        let (victim, led) = led.into_iter().max_by_key(|(_, led)| led.len()).context("nobody leads a partition")?;
        note(format_args!("killing node {victim}, which leads {} partitions", led.len()));
        // Of the others, so that what is seen is the cluster's doing and not that of a connection.
        let (project, operator) = self.nodes.clients(|id| id != victim)?;
        let publishers = open(&project, &led).await?;
        let terms = terms(&operator).await?;
        let killed = Instant::now();
        self.nodes.kill(victim).await?;
        let mut tasks = JoinSet::new();
        for publisher in publishers {
            let payload = self.payload.clone();
            tasks.spawn(async move {
                publisher.publish(Event::new(payload)).await?.await?;
                let took = killed.elapsed();
                publisher.close().await;
                anyhow::Ok(took)
            });
        }
        let mut latency = microseconds()?;
        let stored = async {
            while let Some(took) = tasks.join_next().await {
                latency.saturating_record(took??.as_micros() as u64);
            }
            anyhow::Ok(())
        };
        timeout(FAILOVER, stored).await.context("a partition does not store events after its leader was killed")??;
        let elections = terms_since(&operator, &terms).await?;
        let seconds = |us: u64| us as f64 / 1e6;
        self.figure("partitions that the killed node led", led.len() as f64, "", None);
        self.figure("failover, half of them store again", seconds(latency.value_at_quantile(0.5)), "s", None);
        self.figure("failover, all of them store again", seconds(latency.max()), "s", Some(Target::AtMost(10.0)));
        // One each is what it takes; a split vote costs another.
        let each = elections as f64 / led.len() as f64;
        self.figure("elections a partition that it led", each, "", Some(Target::AtMost(2.0)));
        Ok(())
    }
}

/// The topics in so many shares as equal as can be, none of them empty: what an idle publisher should have published would count.
fn deal(topics: &[String], shares: usize) -> Vec<Vec<String>> {
    let shares = shares.min(topics.len());
    (0..shares).map(|number| topics.iter().skip(number).step_by(shares).cloned().collect()).collect()
}

async fn open(client: &Client, topics: &[String]) -> anyhow::Result<Vec<Publisher>> {
    let opening = topics.iter().map(|topic| client.publisher(topic, PublisherOptions::default()));
    Ok(futures::stream::iter(opening).buffered(OPENING).try_collect().await?)
}

async fn close(publishers: Vec<Publisher>) {
    futures::stream::iter(publishers).for_each_concurrent(OPENING, Publisher::close).await;
}

async fn one_by_one(publishers: &[Publisher], payload: &Bytes) -> anyhow::Result<Histogram<u64>> {
    let mut latency = microseconds()?;
    for publisher in publishers {
        let begin = Instant::now();
        publisher.publish(Event::new(payload.clone())).await?.await?;
        latency.saturating_record(begin.elapsed().as_micros() as u64);
    }
    Ok(latency)
}

/// Waits until the node knows this many groups and a leader of each.
async fn wait_led(operator: &Client, groups: usize) -> anyhow::Result<()> {
    loop {
        let status = operator.admin().cluster_status().await?;
        let led = status.groups.iter().filter(|group| group.leader != 0).count();
        if led >= groups {
            return Ok(());
        }
        sleep(LOOK_EVERY).await;
    }
}

/// The term of each group.
async fn terms(operator: &Client) -> anyhow::Result<BTreeMap<u64, u64>> {
    let status = operator.admin().cluster_status().await?;
    Ok(status.groups.iter().map(|group| (group.id, group.term)).collect())
}

/// How many terms have begun since.
async fn terms_since(operator: &Client, before: &BTreeMap<u64, u64>) -> anyhow::Result<u64> {
    let now = terms(operator).await?;
    Ok(now.iter().map(|(group, term)| term.saturating_sub(before.get(group).copied().unwrap_or(*term))).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_of_one_is_the_target_whichever_way_it_points() {
        let ratio = |value, target| Figure::new("x", value, "s", Some(target)).ratio;
        assert_eq!(ratio(30.0, Target::AtMost(60.0)), Some(0.5));
        assert_eq!(ratio(90.0, Target::AtMost(60.0)), Some(1.5));
        assert_eq!(ratio(100.0, Target::AtLeast(50.0)), Some(0.5));
        assert_eq!(ratio(25.0, Target::AtLeast(50.0)), Some(2.0));
    }

    #[test]
    fn every_topic_is_dealt_once_and_no_publisher_is_left_without() {
        for (topics, publishers, shares) in [(10, 4, 4), (3, 8, 3), (1, 1, 1), (8, 8, 8)] {
            let topics: Vec<_> = (0..topics).map(|number| format!("{number:02}")).collect();
            let dealt = deal(&topics, publishers);
            let sizes: Vec<_> = dealt.iter().map(Vec::len).collect();
            assert_eq!(sizes.len(), shares);
            assert!(sizes.iter().all(|size| *size > 0 && sizes[0] - size <= 1), "{sizes:?}");
            let mut all = dealt.concat();
            all.sort();
            assert_eq!(all, topics);
        }
    }
}
