//! `ensign bench keys`: what the vault's commands cost, and what rotating, many rings and a dying vault leader cost those who publish.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::admin_api::KeyAlgorithm;
use ensign_client::{Client, Event, PublisherOptions, Revoke, Ring, Start, SubscriberOptions};
use ensign_proto::Offset;
use futures::{StreamExt as _, TryStreamExt as _};
use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};

use super::args::KeysBench;
use super::figures::{self, Figure, Target};
use super::load::{Load, Publishers};
use super::nodes::Nodes;
use super::report::microseconds;
use super::{disk, usage};
use crate::cli::note;

/// Rings that a project may have beside its own (`docs/limits.md`).
const RINGS_OF_PROJECT: u32 = 1_000;
/// Rings that are made at the same time.
const MAKING: usize = 64;
/// Publishers of the load, and what each may have un-acknowledged.
const PUBLISHERS: u32 = 8;
const WINDOW: usize = 256;
/// Runs of the load with each pace of rotation; the middle one counts.
const RUNS: usize = 3;
/// How long the vault may take to have another leader.
const FAILOVER: Duration = Duration::from_mins(1);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The last event of the load that runs while vault leaders die.
const LAST: &[u8] = b"the last one";

#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    rings: u32,
    replicas: u64,
    figures: Vec<Figure>,
}

/// Runs it on a cluster of its own.
pub(super) async fn run(args: KeysBench) -> anyhow::Result<()> {
    disk::refuse_memory(&args.dir)?;
    let mut bench = Bench::start(&args).await?;
    bench.commands().await?;
    bench.rotation_under_load().await?;
    bench.many_rings().await?;
    bench.failovers().await?;
    let Bench { nodes, figures, .. } = bench;
    nodes.stop().await?;
    let report = Report { bench: "keys", rings: args.rings, replicas: args.replicas, figures };
    figures::print(args.output, &report, &report.figures)
}

struct Bench<'a> {
    args: &'a KeysBench,
    nodes: Nodes,
    operator: Client,
    figures: Vec<Figure>,
}

impl<'a> Bench<'a> {
    async fn start(args: &'a KeysBench) -> anyhow::Result<Self> {
        note(format_args!("starting {} nodes", args.replicas));
        let nodes = Nodes::start(&args.dir, args.replicas).await?;
        let dir = nodes.dir().to_owned();
        let floor = tokio::task::spawn_blocking(move || disk::floor(&dir)).await??;
        let (_, operator) = nodes.clients(|_| true)?;
        // Certificates, logins and the first lease have come and gone.
        sleep(Duration::from_secs(5)).await;
        let mut bench = Self { args, nodes, operator, figures: Vec::new() };
        bench.figure("disk: 4 KiB append + fdatasync p50", floor.p50_us as f64 / 1e3, "ms", None);
        Ok(bench)
    }

    fn figure(&mut self, name: &'static str, value: f64, unit: &'static str, target: Option<Target>) {
        self.figures.push(Figure::new(name, value, unit, target));
    }

    /// Times commands one after the other, each of them on rings of its own.
    async fn commands(&mut self) -> anyhow::Result<()> {
        note(format_args!("timing {} commands of each kind", self.args.samples));
        let admin = self.operator.admin();
        let (mut commit, mut rotate, mut revoke) = (microseconds()?, microseconds()?, microseconds()?);
        for number in 0..self.args.samples {
            let ring = admin.create_key_ring(&format!("timed-{number}"), None, KeyAlgorithm::default()).await?;
            let ring = Ring::Id(ring.id.parse()?);
            // A command that changes what the vault holds and concerns no holder: what a commit takes.
            let period = Duration::from_hours(24 * (30 + u64::from(number % 7)));
            time(&mut commit, admin.set_key(ring.clone(), Some(period), None)).await?;
            time(&mut rotate, admin.rotate_key(ring.clone())).await?;
            time(&mut revoke, admin.revoke_key(ring, Revoke::All)).await?;
        }
        let ms = |histogram: &Histogram<u64>, q: f64| histogram.value_at_quantile(q) as f64 / 1e3;
        self.figure("a vault commit, p50", ms(&commit, 0.5), "ms", None);
        self.figure("rotate, p50", ms(&rotate, 0.5), "ms", None);
        self.figure("rotate, p99", ms(&rotate, 0.99), "ms", None);
        self.figure("revoke, p50", ms(&revoke, 0.5), "ms", None);
        self.figure("revoke, p99", ms(&revoke, 0.99), "ms", None);
        let ratio = ms(&revoke, 0.5) / ms(&commit, 0.5);
        self.figure("revoke to a commit, p50", ratio, "commits", Some(Target::AtMost(3.0)));
        Ok(())
    }

    /// The same load with a key that rests and with one that is rotated all the time, in turn. An event that is not stored fails the run.
    async fn rotation_under_load(&mut self) -> anyhow::Result<()> {
        let args = self.args;
        let every = Duration::from(args.rotate_every);
        note(format_args!(
            "publishing {} events {} times, every other time rotating every {every:?}",
            args.events,
            2 * RUNS
        ));
        let clients = self.nodes.spread_clients(PUBLISHERS as usize)?;
        let topics = ["bench-rotation".to_owned()];
        clients[0].create_topic(&topics[0]).await?;
        let load = Load { events: args.events, size: args.size as usize, window: WINDOW };
        let mut publishers = Publishers::open(&clients, &topics, PUBLISHERS, load).await?;
        publishers.run(args.events / 10, &Arc::default()).await.context("warming up")?;
        let (mut resting, mut rotating, mut rotations) = (Vec::new(), Vec::new(), 0);
        for _ in 0..RUNS {
            resting.push(publishers.run(args.events, &Arc::default()).await?);
            let admin = self.operator.admin();
            let rotate = async {
                loop {
                    sleep(every).await;
                    if let Err(error) = admin.rotate_key(Ring::Own).await {
                        return error;
                    }
                    rotations += 1;
                }
            };
            let done = Arc::default();
            let seen = tokio::select! {
                seen = publishers.run(args.events, &done) => seen?,
                error = rotate => return Err(error).context("cannot rotate under load"),
            };
            rotating.push(seen);
        }
        publishers.close().await;
        let p99 = |runs: &[super::load::Seen]| {
            median(runs.iter().map(|run| run.latency.value_at_quantile(0.99) as f64 / 1e3).collect())
        };
        let rate = |runs: &[super::load::Seen]| {
            median(runs.iter().map(|run| args.events as f64 / run.elapsed.as_secs_f64()).collect())
        };
        self.figure("publishing, key at rest", rate(&resting), "events/s", None);
        self.figure("publishing, key rotated", rate(&rotating), "events/s", None);
        self.figure("rotations meanwhile", f64::from(rotations), "", None);
        self.figure("ack p99, key at rest", p99(&resting), "ms", None);
        self.figure("ack p99, key rotated", p99(&rotating), "ms", None);
        let ratio = p99(&rotating) / p99(&resting);
        self.figure("ack p99, rotated to at rest", ratio, "times", Some(Target::AtMost(2.0)));
        Ok(())
    }

    /// What rings cost that nobody uses.
    async fn many_rings(&mut self) -> anyhow::Result<()> {
        let rings = self.args.rings;
        let idle = self.idle_cpu().await?;
        self.figure("idle CPU of the busiest node, few rings", idle, "% of a core", None);
        note(format_args!("making {rings} rings"));
        let admin = self.operator.admin();
        let before = usage::resident_each(&self.nodes);
        let begin = Instant::now();
        let mut left = rings;
        while left > 0 {
            let project = admin.create_project(&format!("rings-{left}"), None).await?.id.parse()?;
            let part = left.min(RINGS_OF_PROJECT);
            let make = |number: u32| {
                let admin = &admin;
                async move { admin.create_key_ring(&format!("r{number}"), Some(project), KeyAlgorithm::default()).await }
            };
            futures::stream::iter((0..part).map(make)).buffer_unordered(MAKING).try_collect::<Vec<_>>().await?;
            left -= part;
        }
        let made = begin.elapsed();
        let grown = usage::resident_each(&self.nodes)
            .into_iter()
            .filter_map(|(id, now)| Some(now.saturating_sub(*before.get(&id)?) as f64 / f64::from(rings)))
            .fold(0.0, f64::max);
        self.figure("making a ring, many at once", made.as_secs_f64() * 1e3 / f64::from(rings), "ms", None);
        self.figure("resident memory a ring", grown / 1024.0, "KiB", None);
        let idle = self.idle_cpu().await?;
        self.figure("idle CPU of the busiest node, all rings", idle, "% of a core", None);
        Ok(())
    }

    /// In percent of a core, after a rest.
    async fn idle_cpu(&self) -> anyhow::Result<f64> {
        let idle = Duration::from(self.args.idle);
        note(format_args!("doing nothing for twice {idle:?}"));
        sleep(idle).await;
        let (before, begin) = (usage::cpu_each(&self.nodes), Instant::now());
        ensure!(!before.is_empty(), "/proc does not tell how much CPU a process has used");
        sleep(idle).await;
        let elapsed = begin.elapsed().as_secs_f64();
        let used = usage::cpu_each(&self.nodes).into_iter();
        let used = used.filter_map(|(id, now)| Some(now.saturating_sub(*before.get(&id)?).as_secs_f64()));
        Ok(100.0 * used.fold(0.0, f64::max) / elapsed)
    }

    /// Kills the vault's leader again and again while events are published and read. One that is refused or missing fails the run.
    async fn failovers(&mut self) -> anyhow::Result<()> {
        const TOPIC: &str = "bench-failovers";
        let rounds = self.args.failovers;
        if rounds == 0 {
            return Ok(());
        }
        note(format_args!("killing the vault's leader {rounds} times"));
        let (project, _) = self.nodes.clients(|_| true)?;
        project.create_topic(TOPIC).await?;
        let stop = AtomicBool::new(false);
        let kills = async {
            let mut leaderless = microseconds()?;
            for _ in 0..rounds {
                sleep(Duration::from_secs(1)).await;
                let victim = self.vault_leader(0).await?;
                let killed = Instant::now();
                self.nodes.kill(victim).await?;
                self.vault_leader(victim).await?;
                leaderless.saturating_record(killed.elapsed().as_micros() as u64);
                self.nodes.restart(victim).await?;
            }
            sleep(Duration::from_secs(1)).await;
            stop.store(true, Ordering::Relaxed);
            Ok(leaderless)
        };
        let all =
            async { tokio::try_join!(kills, publish_until(&project, TOPIC, &stop), read_to_the_last(&project, TOPIC)) };
        let (leaderless, (acked, latency), read) =
            timeout(FAILOVER * (rounds + 1), all).await.context("not all events were stored and read")??;
        ensure!(read == acked, "{acked} events were acked and {read} read");
        self.figure("vault leaders killed", f64::from(rounds), "", None);
        self.figure("another one leads after, p50", leaderless.value_at_quantile(0.5) as f64 / 1e6, "s", None);
        self.figure("another one leads after, max", leaderless.max() as f64 / 1e6, "s", None);
        self.figure("events acked and read meanwhile", acked as f64, "", None);
        self.figure("longest time to an ack", latency.max() as f64 / 1e6, "s", None);
        Ok(())
    }

    /// Waits until the vault is led by another node than `other`, as the nodes that run say.
    async fn vault_leader(&self, other: u64) -> anyhow::Result<u64> {
        let (_, operator) = self.nodes.clients(|_| true)?;
        let look = async {
            loop {
                // It may be asked of a node that is just going.
                let groups = operator.admin().cluster_status().await.map(|status| status.groups).unwrap_or_default();
                let leader = groups.iter().find(|group| group.name == "vault").map_or(0, |group| group.leader);
                if leader != 0 && leader != other {
                    return leader;
                }
                sleep(LOOK_EVERY).await;
            }
        };
        timeout(FAILOVER, look).await.context("nobody leads the vault")
    }
}

async fn time<T, E>(into: &mut Histogram<u64>, command: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let begin = Instant::now();
    let done = command.await?;
    into.saturating_record(begin.elapsed().as_micros() as u64);
    Ok(done)
}

/// One event after the other until told to stop, and then the last one: how many, and how long each took.
async fn publish_until(client: &Client, topic: &str, stop: &AtomicBool) -> anyhow::Result<(u64, Histogram<u64>)> {
    let publisher = client.publisher(topic, PublisherOptions::default()).await?;
    let refused = "an event was refused while the vault had no leader";
    let (mut acked, mut latency) = (0, microseconds()?);
    loop {
        let last = stop.load(Ordering::Relaxed);
        let event = if last { Event::new(LAST) } else { Event::new(format!("event {acked}")) };
        let begin = Instant::now();
        publisher.publish(event).await.context(refused)?.await.context(refused)?;
        latency.saturating_record(begin.elapsed().as_micros() as u64);
        acked += 1;
        if last {
            publisher.close().await;
            return Ok((acked, latency));
        }
    }
}

async fn read_to_the_last(client: &Client, topic: &str) -> anyhow::Result<u64> {
    let mut subscriber = client.subscribe(topic, Start::Earliest, SubscriberOptions::default()).await?;
    let mut number = 0;
    loop {
        number += 1;
        let delivery = subscriber.next().await.context("reading ended while the vault had no leader")?;
        ensure!(delivery.offset == Offset(number), "expected offset {number}, got {}", delivery.offset);
        if delivery.event()?.data == LAST {
            return Ok(number);
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
