//! `ensign bench`: how fast a cluster acknowledges and how fast it is read, with what that costs.
//!
//! The cluster runs in a process of its own, so that CPU, writes and syncs are attributed to it and not to the client. The
//! disk's own floor is measured in the same folder in the same run: without it a latency says nothing.

mod args;
mod cluster;
mod disk;
mod figures;
mod keys;
mod load;
mod nodes;
mod partitions;
mod ports;
mod report;
mod usage;

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use ensign_client::{CallError, Client, Start, SubscriberOptions};
use ensign_proto::Offset;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval};

use crate::cli::{Output, connect, note, print_json, print_record, thousands, until_interrupted};

pub use args::{BenchCommand, Common, KeysBench, PartitionsBench, PublishBench, SubscribeBench};
pub use ports::free_port;

use cluster::Cluster;
use disk::Floor;
use load::{Load, Publishers};
use report::{Report, Run};
use usage::Usage;

const WARM_UP_MAX: u64 = 20_000;

/// Runs one benchmark.
///
/// # Errors
/// The cluster cannot be started or reached, an event was not stored, or the run was interrupted.
pub async fn run(command: BenchCommand) -> anyhow::Result<()> {
    until_interrupted(async {
        match command {
            BenchCommand::Publish(args) => publish(args).await,
            BenchCommand::Subscribe(args) => subscribe(args).await,
            BenchCommand::Partitions(args) => partitions::run(args).await,
            BenchCommand::Keys(args) => Box::pin(keys::run(args)).await,
        }
    })
    .await
}

/// What a benchmark runs against.
struct Bench {
    client: Client,
    cluster: Option<Cluster>,
    floor: Option<Floor>,
    metrics_url: Option<String>,
    topics: Vec<String>,
}

impl Bench {
    async fn open(common: &Common) -> anyhow::Result<Self> {
        let mut client = common.client.clone();
        let (cluster, floor) = if client.endpoint.is_none() {
            disk::refuse_memory(&common.dir)?;
            let cluster = Cluster::start(&common.dir, common.replicas, common.events * u64::from(common.size)).await?;
            client.credentials = cluster.credentials();
            client.auth_url = None;
            let dir = cluster.dir().to_owned();
            let floor = tokio::task::spawn_blocking(move || disk::floor(&dir)).await??;
            (Some(cluster), Some(floor))
        } else {
            (None, None)
        };
        let client = connect(&client)?.project;
        let mut topics = Vec::new();
        for number in 1..=common.topics {
            let name = format!("ensign-bench-{}-{number}", std::process::id());
            match client.create_topic(&name).await {
                // An earlier attempt that we heard nothing of.
                Ok(_) | Err(CallError::AlreadyExists { .. }) => topics.push(name),
                Err(error) => return Err(error).context("cannot create a topic"),
            }
        }
        Ok(Self { client, cluster, floor, metrics_url: common.metrics_url.clone(), topics })
    }

    async fn server_usage(&self) -> Usage {
        match (&self.cluster, &self.metrics_url) {
            (Some(cluster), _) => cluster.usage().await,
            (None, Some(url)) => cluster::traffic(url).await,
            (None, None) => Usage::default(),
        }
    }

    /// Measures `work`; `clients` did it.
    async fn measure(
        &self,
        (name, common, clients): (&'static str, &Common, u32),
        events: u64,
        work: impl Future<Output = anyhow::Result<Duration>>,
    ) -> anyhow::Result<Run> {
        let me = std::process::id();
        let (server, client) = (self.server_usage().await, usage::cpu(me));
        let elapsed = work.await?;
        let client_cpu = usage::cpu(me).zip(client).map(|(now, then)| now.saturating_sub(then));
        Ok(Run {
            bench: name,
            events,
            size: common.size,
            replicas: self.cluster.as_ref().map(|_| common.replicas),
            clients,
            window: common.window,
            topics: common.topics,
            elapsed,
            server: self.server_usage().await.since(server),
            client_cpu,
            floor: self.floor,
        })
    }

    /// Removes what the benchmark made.
    async fn close(self) -> anyhow::Result<()> {
        if let Some(cluster) = self.cluster {
            return cluster.stop().await;
        }
        for topic in &self.topics {
            let topic = self.client.find_topic(topic).await?;
            self.client.destroy_topic(topic.id).await?;
        }
        Ok(())
    }
}

async fn publish(args: PublishBench) -> anyhow::Result<()> {
    let common = &args.common;
    let bench = Bench::open(common).await?;
    let load = Load { events: common.events, size: common.size as usize, window: common.window as usize };
    let mut publishers =
        Publishers::open(std::slice::from_ref(&bench.client), &bench.topics, common.publishers, load).await?;
    let warm_up = args.warm_up.unwrap_or((common.events / 10).min(WARM_UP_MAX));
    if warm_up > 0 {
        publishers.run(warm_up, &Arc::default()).await.context("warming up")?;
    }
    let done = Arc::new(AtomicU64::new(0));
    let mut seen = None;
    let work = async {
        let run = publishers.run(load.events, &done).await?;
        let elapsed = run.elapsed;
        seen = Some(run.latency);
        Ok(elapsed)
    };
    let measured = bench.measure(("publish", common, common.publishers), load.events, work);
    let run = with_progress("acknowledged", load.events, &done, measured).await?;
    publishers.close().await;
    bench.close().await?;
    print(common.client.output, &Report::new(&run, seen.as_ref()))
}

async fn subscribe(args: SubscribeBench) -> anyhow::Result<()> {
    let common = &args.common;
    let bench = Bench::open(common).await?;
    let load = Load { events: common.events, size: common.size as usize, window: common.window as usize };
    let mut publishers =
        Publishers::open(std::slice::from_ref(&bench.client), &bench.topics, common.publishers, load).await?;
    let filled = Arc::new(AtomicU64::new(0));
    with_progress("stored", load.events, &filled, publishers.run(load.events, &filled))
        .await
        .context("filling the topic")?;
    publishers.close().await;

    let mut shares = Vec::new();
    for topic in &bench.topics {
        let topic_id = bench.client.find_topic(topic).await?.id;
        let info = bench.client.info(&[topic_id]).await?;
        shares.push((topic.clone(), info.topics.iter().map(|it| it.events).sum::<u64>()));
    }
    let events: u64 = shares.iter().map(|(_, events)| events * u64::from(args.subscribers)).sum();
    let done = Arc::new(AtomicU64::new(0));
    let work = async {
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for (topic, events) in shares {
            for _ in 0..args.subscribers {
                tasks.spawn(read(bench.client.clone(), topic.clone(), events, common.size as usize, Arc::clone(&done)));
            }
        }
        while let Some(task) = tasks.join_next().await {
            task??;
        }
        Ok(begin.elapsed())
    };
    let measured = bench.measure(("subscribe", common, args.subscribers), events, work);
    let run = with_progress("read", events, &done, measured).await?;
    bench.close().await?;
    print(common.client.output, &Report::new(&run, None))
}

/// Reads a whole topic and checks that it is all there.
async fn read(client: Client, topic: String, events: u64, size: usize, done: Arc<AtomicU64>) -> anyhow::Result<()> {
    // How often the shared counter is written.
    const STEP: u64 = 1024;
    let mut subscriber = client.subscribe(&topic, Start::Earliest, SubscriberOptions::default()).await?;
    for number in 1..=events {
        let delivery = subscriber.next().await?;
        anyhow::ensure!(delivery.offset == Offset(number), "expected offset {number}, got {}", delivery.offset);
        anyhow::ensure!(
            delivery.bytes.len() >= size,
            "the event at offset {number} has only {} bytes",
            delivery.bytes.len()
        );
        if number % STEP == 0 {
            done.fetch_add(STEP, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Shows how far `done` is while `work` runs: a bar on a terminal, a line every few seconds elsewhere.
async fn with_progress<T>(
    verb: &str,
    total: u64,
    done: &AtomicU64,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let terminal = std::io::stderr().is_terminal();
    let bar = if terminal { ProgressBar::new(total) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} {msg}, {per_sec}, {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(verb.to_owned());
    let mut tick = interval(if terminal { Duration::from_millis(200) } else { Duration::from_secs(5) });
    tick.tick().await;
    tokio::pin!(work);
    loop {
        tokio::select! {
            outcome = &mut work => {
                bar.finish_and_clear();
                return outcome;
            }
            _ = tick.tick() => {
                let now = done.load(Ordering::Relaxed);
                bar.set_position(now);
                if !terminal {
                    note(format_args!("{} of {} events {verb}", thousands(now), thousands(total)));
                }
            }
        }
    }
}

fn print(output: Output, report: &Report) -> anyhow::Result<()> {
    match output {
        Output::Json => print_json(report),
        Output::Human => print_record(&report.lines()),
    }
}
