//! `kill -9`: no acked event is ever lost, altered, duplicated or reordered.
//!
//! The page cache survives these kills: they test recovery and the protocol, not the fsync (the power-cut tests do that).

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{Client, Event, Mime, PublisherOptions};
use ensign_proto::Offset;
use support::{Cluster, Dev, read_all};

const PUBLISHERS: u64 = 3;
const TOPIC: &str = "ledger";

/// What a publisher was told: its sequence numbers, and the offset of each where the ack says so.
struct Acked {
    publisher: u64,
    acked: u64,
}

/// Publishes `publisher:0`, `publisher:1`, … until told to stop; every event is acked before it returns.
async fn publish_until(
    client: Client,
    publisher: u64,
    stop: Arc<AtomicBool>,
    progress: Arc<AtomicU64>,
) -> anyhow::Result<Acked> {
    let options = PublisherOptions { deadline: Duration::from_mins(2), ..PublisherOptions::default() };
    let stream = client.publisher(TOPIC, options).await?;
    let mut acked = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut receipts = Vec::new();
        for sequence in acked..acked + 50 {
            let event = Event::new(format!("{publisher}:{sequence}")).with_mimetype(Mime::TextPlain);
            receipts.push(stream.publish(event).await?);
        }
        for receipt in receipts {
            receipt.await.with_context(|| format!("publisher {publisher} after {acked} acks"))?;
            acked += 1;
            progress.fetch_add(1, Ordering::Relaxed);
        }
    }
    stream.close().await;
    Ok(Acked { publisher, acked })
}

/// Waits until `count` more acks have come in, so that every kill hits a working cluster.
async fn wait_for_acks(progress: &AtomicU64, count: u64) -> anyhow::Result<()> {
    let wanted = progress.load(Ordering::Relaxed) + count;
    let waiting = async {
        while progress.load(Ordering::Relaxed) < wanted {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(90), waiting).await.context("publishing did not resume")
}

/// Every acked event is there exactly once, in its publisher's order, and offsets have no holes.
async fn judge(client: &Client, acked: &[Acked]) -> anyhow::Result<u64> {
    let rows = read_all(client, TOPIC).await?;
    let mut next: BTreeMap<u64, u64> = BTreeMap::new();
    let mut last_id = None;
    for (place, row) in rows.iter().enumerate() {
        ensure!(row.offset == Offset(place as u64 + 1), "row {place} has offset {}", row.offset);
        ensure!(last_id < Some(row.id), "event ids went backwards at offset {}", row.offset);
        last_id = Some(row.id);
        let event = row.event()?;
        let text = std::str::from_utf8(&event.data)?;
        let (publisher, sequence) = text.split_once(':').context("a strange event")?;
        let (publisher, sequence): (u64, u64) = (publisher.parse()?, sequence.parse()?);
        let expected = next.entry(publisher).or_default();
        ensure!(
            sequence == *expected,
            "publisher {publisher}: {sequence} at offset {} where {expected} belongs",
            row.offset
        );
        *expected += 1;
    }
    for Acked { publisher, acked } in acked {
        let found = next.get(publisher).copied().unwrap_or(0);
        ensure!(found >= *acked, "publisher {publisher}: {acked} events were acked and {found} are there");
    }
    Ok(rows.len() as u64)
}

struct Load {
    stop: Arc<AtomicBool>,
    progress: Arc<AtomicU64>,
    publishers: tokio::task::JoinSet<anyhow::Result<Acked>>,
}

impl Load {
    fn start(clients: Vec<Client>) -> Self {
        let (stop, progress) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut publishers = tokio::task::JoinSet::new();
        for (publisher, client) in (0..).zip(clients) {
            publishers.spawn(publish_until(client, publisher, Arc::clone(&stop), Arc::clone(&progress)));
        }
        Self { stop, progress, publishers }
    }

    async fn finish(self) -> anyhow::Result<Vec<Acked>> {
        self.stop.store(true, Ordering::Relaxed);
        self.publishers.join_all().await.into_iter().collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_process_loses_nothing_to_kill_nine() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    dev.client()?.create_topic(TOPIC).await?;
    let load = Load::start((0..PUBLISHERS).map(|_| dev.client()).collect::<Result<_, _>>()?);
    for _ in 0..8 {
        wait_for_acks(&load.progress, 300).await?;
        dev.kill()?;
        dev.restart()?;
    }
    wait_for_acks(&load.progress, 300).await?;
    let acked = load.finish().await?;
    let rows = judge(&dev.client()?, &acked).await?;
    ensure!(rows >= 2_700, "only {rows} events: the test did not test");
    dev.kill()?;
    dev.restart()?;
    judge(&dev.client()?, &acked).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_processes_lose_nothing_to_kill_nine_of_each_in_turn() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.client(false)?.create_topic(TOPIC).await?;
    let load = Load::start((0..PUBLISHERS).map(|_| cluster.client(false)).collect::<Result<_, _>>()?);
    for round in 0..12 {
        let victim = round % 3 + 1;
        wait_for_acks(&load.progress, 200).await?;
        cluster.kill(victim)?;
        // A majority is left: publishing goes on while the victim is down.
        wait_for_acks(&load.progress, 200).await?;
        cluster.restart(victim)?;
    }
    wait_for_acks(&load.progress, 200).await?;
    let acked = load.finish().await?;
    for id in cluster.ids() {
        let rows = judge(&cluster.client_of(id)?, &acked).await.with_context(|| format!("read at node {id}"))?;
        ensure!(rows >= 4_800, "only {rows} events: the test did not test");
    }
    Ok(())
}
