//! As much as a cluster takes: one publisher a topic, each with its window full, and whether everything that it was acked is there.
//!
//! With one publisher, the event of number `n` belongs at offset `n + 1`: an ack that says anything else, or a topic that holds anything
//! else in the end, is a broken promise. So nothing has to be remembered but a number a topic, however many events there are.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use ensign_client::{CallError, Client, Event, PublisherOptions, Receipt};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::time::{Instant, sleep};

use super::Finish;
use crate::history::Name;

/// An event is sent again for so long: longer than any fault lasts.
const PATIENCE: Duration = Duration::from_mins(4);

/// What every publisher does.
#[derive(Debug, Clone)]
pub struct Load {
    /// Events of one publisher that wait for their acks.
    window: usize,
    /// What follows an event's name: as if random, so that no layer can make it smaller.
    filler: Bytes,
}

impl Load {
    /// Events of about `size` bytes each.
    pub fn new(size: usize, window: usize) -> Self {
        let mut filler = vec![0; size];
        ChaCha8Rng::seed_from_u64(size as u64).fill_bytes(&mut filler);
        Self { window, filler: filler.into() }
    }
}

/// How many events were acked so far, to all publishers.
#[derive(Debug, Clone, Default)]
pub struct Acks(Arc<AtomicU64>);

impl Acks {
    /// So many.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// From now on; until now, all that take part have used so much processor time.
    pub fn measure(&self, cpu: Duration) -> Stretch {
        Stretch { acks: self.clone(), begun: Instant::now(), before: self.count(), cpu }
    }
}

/// A stretch of time whose acks are counted.
#[derive(Debug)]
pub struct Stretch {
    acks: Acks,
    begun: Instant,
    before: u64,
    cpu: Duration,
}

/// Acks of a stretch of time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rate {
    /// A second of it.
    pub a_second: f64,
    /// A second of processor time of all that take part: what does not change when the machine does other work as well.
    pub a_cpu_second: f64,
}

impl Stretch {
    /// How long it has lasted.
    pub fn length(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Acks until now, when so much processor time is used.
    pub fn rate(&self, cpu: Duration) -> Rate {
        let acks = (self.acks.count() - self.before) as f64;
        let cpu = cpu.saturating_sub(self.cpu).as_secs_f64().max(0.01);
        Rate { a_second: acks / self.length().as_secs_f64(), a_cpu_second: acks / cpu }
    }
}

/// Publishes until it is time to finish, then waits for what is under way. How many events were acked: all that were published.
///
/// # Errors
/// An event failed, or was acked where it does not belong.
pub async fn keep_full(
    client: Client,
    topic: String,
    publisher: u32,
    load: Load,
    (finish, acks): (Finish, Acks),
) -> anyhow::Result<u64> {
    let window_bytes = load.window * (load.filler.len() + 1024);
    let options = PublisherOptions {
        deadline: PATIENCE,
        window_events: load.window,
        window_bytes,
        ..PublisherOptions::default()
    };
    let stream = client.publisher(&topic, options).await.with_context(|| format!("cannot publish to {topic}"))?;
    let mut waiting: VecDeque<(u64, Receipt)> = VecDeque::with_capacity(load.window);
    let mut number = 0;
    loop {
        let publishes = !finish.is_time();
        if !publishes || waiting.len() >= load.window {
            let Some((number, receipt)) = waiting.pop_front() else { break };
            let ack = receipt.await.with_context(|| format!("event {number} of {topic}"))?;
            let offset = ack.offset.map(|offset| offset.0);
            ensure!(offset == Some(number + 1), "event {number} of {topic} was acked at offset {offset:?}");
            acks.0.fetch_add(1, Ordering::Relaxed);
        }
        if publishes {
            let name = Name { publisher, number }.to_string();
            let event = Event::new([name.as_bytes(), b" ", &load.filler].concat());
            waiting.push_back((number, stream.publish(event).await?));
            number += 1;
        }
    }
    stream.close().await;
    Ok(number)
}

/// Reads the whole topic: it holds the `count` events of its publisher, each once, in order, and nothing else.
///
/// # Errors
/// It does not, or cannot be read for longer than a cluster takes to find itself.
pub async fn verify(client: &Client, topic: &str, publisher: u32, count: u64) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        match read(client, topic, publisher).await {
            Ok(found) => {
                let found = found?;
                ensure!(found == count, "{topic} holds {found} events, and {count} were acked");
                return Ok(());
            }
            Err(error) if error.is_transient() && begun.elapsed() < Duration::from_mins(2) => {
                sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {topic}")),
        }
    }
}

/// How many events there are, if each is where it belongs.
async fn read(client: &Client, topic: &str, publisher: u32) -> Result<anyhow::Result<u64>, CallError> {
    let mut rows = client.query(&format!("SELECT * FROM {topic}")).await?;
    let mut count = 0;
    while let Some(row) = rows.next().await? {
        let name = row.event().ok().and_then(|event| named(&event.data));
        let expected = Name { publisher, number: count };
        if name != Some(expected) || row.offset.0 != count + 1 {
            return Ok(Err(anyhow::anyhow!(
                "{topic} holds {name:?} at offset {} where {expected} belongs",
                row.offset
            )));
        }
        count += 1;
    }
    Ok(Ok(count))
}

fn named(payload: &[u8]) -> Option<Name> {
    Name::parse(payload.split(|byte| *byte == b' ').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_a_name_is_not_part_of_it() {
        assert_eq!(named(b"7:12 \x00:  \xff"), Some(Name { publisher: 7, number: 12 }));
        assert_eq!(named(b"7:12"), Some(Name { publisher: 7, number: 12 }));
        assert_eq!(named(b" 7:12"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_what_came_since_its_stretch_began() {
        let acks = Acks::default();
        acks.0.fetch_add(1000, Ordering::Relaxed);
        let stretch = acks.measure(Duration::from_secs(10));
        acks.0.fetch_add(500, Ordering::Relaxed);
        tokio::time::advance(Duration::from_secs(2)).await;
        let rate = stretch.rate(Duration::from_secs(11));
        assert_eq!((rate.a_second.round(), rate.a_cpu_second.round()), (250.0, 500.0));
    }
}
