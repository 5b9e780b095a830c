//! Publishers that number what they publish, and a judge of what became of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use ensign_client::{Client, Event, Mime, PublisherOptions};
use ensign_proto::Offset;
use tokio::task::JoinSet;

use super::read_all;

/// The topic of the ledger.
pub const TOPIC: &str = "ledger";

/// A promise that was broken.
#[derive(Debug)]
pub struct Broken(pub String);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Broken {}

fn keep(holds: bool, broken: impl FnOnce() -> String) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(Broken(broken())) }
}

/// How many of its events, from the first, each publisher was told to be safe.
#[derive(Debug, Clone)]
pub struct Acked(Vec<u64>);

impl Acked {
    /// Of all publishers.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// Publishers at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    acked: Vec<Arc<AtomicU64>>,
    publishers: JoinSet<anyhow::Result<()>>,
}

impl Load {
    /// One publisher for each client.
    pub fn start(clients: Vec<Client>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut acked, mut publishers) = (Vec::new(), JoinSet::new());
        for (publisher, client) in (0..).zip(clients) {
            let count = Arc::new(AtomicU64::new(0));
            publishers.spawn(publish_until(client, publisher, Arc::clone(&stop), Arc::clone(&count)));
            acked.push(count);
        }
        Self { stop, acked, publishers }
    }

    fn acked(&self) -> Acked {
        Acked(self.acked.iter().map(|count| count.load(Ordering::SeqCst)).collect())
    }

    /// Waits until `count` more acks have come in, so that whatever happens next hits a working cluster.
    pub async fn wait_for_acks(&self, count: u64) -> anyhow::Result<()> {
        let wanted = self.acked().total() + count;
        let waiting = async {
            while self.acked().total() < wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(90), waiting).await.context("publishing did not resume")
    }

    /// Lets every publisher finish what it has begun.
    pub async fn finish(mut self) -> anyhow::Result<Acked> {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(outcome) = self.publishers.join_next().await {
            outcome??;
        }
        Ok(self.acked())
    }

    /// Ends the publishers of a cluster that is gone; what they were told still counts.
    pub async fn abandon(mut self) -> Acked {
        self.publishers.shutdown().await;
        self.acked()
    }
}

/// Publishes `publisher:0`, `publisher:1`, … until told to stop, and counts the acks, which come in that order.
async fn publish_until(
    client: Client,
    publisher: u64,
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
) -> anyhow::Result<()> {
    let options = PublisherOptions { deadline: Duration::from_mins(2), ..PublisherOptions::default() };
    let stream = client.publisher(TOPIC, options).await?;
    let mut sequence = 0;
    while !stop.load(Ordering::SeqCst) {
        let mut receipts = Vec::new();
        for _ in 0..50 {
            let event = Event::new(format!("{publisher}:{sequence}")).with_mimetype(Mime::TextPlain);
            receipts.push(stream.publish(event).await?);
            sequence += 1;
        }
        for receipt in receipts {
            let before = acked.load(Ordering::SeqCst);
            receipt.await.with_context(|| format!("publisher {publisher} after {before} acks"))?;
            acked.store(before + 1, Ordering::SeqCst);
        }
    }
    stream.close().await;
    Ok(())
}

/// Every acked event is there exactly once, in its publisher's order, and offsets have no holes. How many events there are.
///
/// # Errors
/// [`Broken`], or why the ledger cannot be read.
pub async fn judge(client: &Client, acked: &Acked) -> anyhow::Result<u64> {
    let rows = read_all(client, TOPIC).await?;
    let mut next: BTreeMap<u64, u64> = BTreeMap::new();
    let mut last_id = None;
    for (place, row) in rows.iter().enumerate() {
        keep(row.offset == Offset(place as u64 + 1), || format!("row {place} has offset {}", row.offset))?;
        keep(last_id < Some(row.id), || format!("event ids went backwards at offset {}", row.offset))?;
        last_id = Some(row.id);
        let event = row.event()?;
        let text = std::str::from_utf8(&event.data)?;
        let (publisher, sequence) = text.split_once(':').context("a strange event")?;
        let (publisher, sequence): (u64, u64) = (publisher.parse()?, sequence.parse()?);
        let expected = next.entry(publisher).or_default();
        keep(sequence == *expected, || {
            format!("publisher {publisher}: {sequence} at offset {} where {expected} belongs", row.offset)
        })?;
        *expected += 1;
    }
    for (publisher, acked) in (0..).zip(&acked.0) {
        let found = next.get(&publisher).copied().unwrap_or(0);
        keep(found >= *acked, || format!("publisher {publisher}: {acked} events were acked and {found} are there"))?;
    }
    Ok(rows.len() as u64)
}
