//! Publishers that keep their windows full, and what they see.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use ensign_client::{Client, Event, PublishError, Publisher, PublisherOptions};
use ensign_raft::env::{OsRng, Rng as _};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use tokio::task::{JoinSet, unconstrained};
use tokio::time::Instant;

use super::report::microseconds;

/// How much to publish, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) events: u64,
    pub(super) size: usize,
    pub(super) window: usize,
}

/// Open publishers, each to one of the topics in turn.
pub(super) struct Publishers {
    publishers: Vec<Publisher>,
    payload: Bytes,
    window: usize,
}

/// What a run of them saw.
pub(super) struct Seen {
    /// From the call that accepted an event to its acknowledgement, in microseconds.
    pub(super) latency: Histogram<u64>,
    pub(super) elapsed: Duration,
}

impl Publishers {
    /// Opens `count` publishers, on these clients' connections in turn.
    ///
    /// # Errors
    /// The cluster refuses one.
    pub(super) async fn open(clients: &[Client], topics: &[String], count: u32, load: Load) -> anyhow::Result<Self> {
        let mut publishers = Vec::new();
        for (topic, client) in topics.iter().cycle().zip(clients.iter().cycle()).take(count as usize) {
            let options = PublisherOptions {
                window_events: load.window,
                window_bytes: load.window * (load.size + 1024),
                ..PublisherOptions::default()
            };
            publishers.push(client.publisher(topic, options).await?);
        }
        // Random, so that no layer can make it smaller.
        let mut payload = BytesMut::zeroed(load.size);
        OsRng.fill(&mut payload);
        Ok(Self { publishers, payload: payload.freeze(), window: load.window })
    }

    /// Publishes `events` in all and waits for every acknowledgement; `done` counts them.
    ///
    /// # Errors
    /// The first event that was not stored.
    pub(super) async fn run(&mut self, events: u64, done: &Arc<AtomicU64>) -> anyhow::Result<Seen> {
        let count = self.publishers.len() as u64;
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for (number, publisher) in self.publishers.drain(..).enumerate() {
            let share = events / count + u64::from((number as u64) < events % count);
            let (payload, window, done) = (self.payload.clone(), self.window, Arc::clone(done));
            tasks.spawn(async move {
                let latency = fill(&publisher, share, window, &payload, &done).await;
                (publisher, latency)
            });
        }
        let mut latency = microseconds()?;
        let mut failed = None;
        while let Some(task) = tasks.join_next().await {
            let (publisher, result) = task?;
            self.publishers.push(publisher);
            match result {
                Ok(part) => latency.add(part)?,
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(Seen { latency, elapsed: begin.elapsed() }),
        }
    }

    /// Ends every stream in an orderly way.
    pub(super) async fn close(self) {
        for publisher in self.publishers {
            publisher.close().await;
        }
    }
}

async fn fill(
    publisher: &Publisher,
    events: u64,
    window: usize,
    payload: &Bytes,
    done: &AtomicU64,
) -> anyhow::Result<Histogram<u64>> {
    fill_all(std::slice::from_ref(publisher), events, window, payload, done).await
}

/// Publishes `events` to these topics in turn, with at most `window` of them unacknowledged, whichever these are: one topic that is slow
/// holds up no other until it has taken up the window. Waits for every acknowledgement.
///
/// # Errors
/// The first event that was not stored.
pub(super) async fn fill_all(
    publishers: &[Publisher],
    events: u64,
    window: usize,
    payload: &Bytes,
    done: &AtomicU64,
) -> anyhow::Result<Histogram<u64>> {
    let mut latency = microseconds()?;
    let mut settle = |settled: Result<Duration, PublishError>| -> Result<(), PublishError> {
        latency.saturating_record(settled?.as_micros() as u64);
        done.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let mut waiting = FuturesUnordered::new();
    for publisher in publishers.iter().cycle().take(events as usize) {
        while waiting.len() >= window
            && let Some(settled) = waiting.next().await
        {
            settle(settled)?;
        }
        let receipt = publisher.publish(Event::new(payload.clone())).await?;
        let since = Instant::now();
        // Without a budget: once it is used up, tokio would have each receipt that is there say that it is not, all of them in turn, and
        // with thousands of them the load took more CPU than what it measures.
        waiting.push(unconstrained(async move { receipt.await.map(|_| since.elapsed()) }));
    }
    while let Some(settled) = waiting.next().await {
        settle(settled)?;
    }
    Ok(latency)
}
