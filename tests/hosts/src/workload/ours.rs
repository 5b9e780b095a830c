//! Our client: a publisher that sends until it is acked, a subscriber that follows everything, a reader of it all.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context as _, bail};
use ensign_client::{
    CallError, Client, Delivery, Event, Mime, PublisherOptions, Receipt, Start, SubscribeError, SubscriberOptions,
};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use super::{Finish, Pulse};
use crate::history::{Following, Name, Published, Received, Row, Sending};

/// How much a publisher publishes.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Between two rounds.
    pub every: Duration,
    /// Events of a round.
    pub events: u64,
    /// Events that may wait for their acks; the next round waits beyond that.
    pub window: usize,
}

/// An event is sent again for so long: longer than any fault lasts.
const PATIENCE: Duration = Duration::from_mins(4);

/// Publishes `publisher:0`, `publisher:1`, … until it is time to finish, then waits for what is under way.
///
/// # Errors
/// The topic cannot be opened.
pub async fn publish(
    client: Client,
    topic: String,
    publisher: u32,
    pace: Pace,
    (finish, pulse): (Finish, Pulse),
) -> anyhow::Result<Published> {
    let options = PublisherOptions { deadline: PATIENCE, window_events: pace.window, ..PublisherOptions::default() };
    let stream = client.publisher(&topic, options).await.with_context(|| format!("cannot publish to {topic}"))?;
    let mut published = Published::new(Sending::UntilAcked);
    let mut waiting: VecDeque<(u64, Instant, Receipt)> = VecDeque::new();
    let mut rounds = interval(pace.every);
    // After a pause it goes on at its pace: a burst would be another workload.
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            Some(outcome) = next(&mut waiting) => note(&mut published, &pulse, outcome),
            _ = rounds.tick(), if waiting.len() < pace.window && !finish.is_time() => {
                for _ in 0..pace.events {
                    let name = Name { publisher, number: published.begun };
                    published.begun += 1;
                    let event = Event::new(name.to_string()).with_mimetype(Mime::TextPlain);
                    match stream.publish(event).await {
                        Ok(receipt) => waiting.push_back((name.number, Instant::now(), receipt)),
                        Err(error) => {
                            published.trouble.push(error.to_string());
                            return Ok(published);
                        }
                    }
                }
            }
            else => break,
        }
    }
    stream.close().await;
    Ok(published)
}

type Answered = (u64, Instant, Result<ensign_client::Ack, ensign_client::PublishError>);

/// The oldest outcome; none when nothing waits. Cancel safe.
async fn next(waiting: &mut VecDeque<(u64, Instant, Receipt)>) -> Option<Answered> {
    let (number, since, receipt) = waiting.front_mut()?;
    let (number, since, outcome) = (*number, *since, receipt.await);
    waiting.pop_front();
    Some((number, since, outcome))
}

fn note(published: &mut Published, pulse: &Pulse, (number, since, outcome): Answered) {
    use ensign_client::PublishError;
    match outcome {
        Ok(ack) => {
            pulse.beat(since);
            published.acked.insert(number, ack.offset.map(|offset| offset.0));
        }
        Err(PublishError::Refused { code, message }) => {
            published.trouble.push(format!("{number}: {code:?}: {message}"));
            published.refused.insert(number, message);
        }
        Err(error) => published.trouble.push(format!("{number}: {error}")),
    }
}

fn row(delivery: &Delivery) -> anyhow::Result<Row> {
    let event = delivery.event()?;
    let name = Name::parse(&event.data).with_context(|| format!("a strange event at offset {}", delivery.offset))?;
    let id = delivery.id.as_bytes()[..].try_into().context("an event id has ten bytes")?;
    Ok(Row { offset: Some(delivery.offset.0), id, name })
}

/// Follows the topic from its first event until it has got so many as `until` says, once it says so.
///
/// # Errors
/// What no subscriber of ours should ever see: a gap, or the end of the subscription.
pub async fn follow(
    client: Client,
    topic: String,
    name: String,
    mut until: watch::Receiver<Option<u64>>,
) -> anyhow::Result<Received> {
    let mut received = Received { name, following: Following::Everything, rows: Vec::new() };
    let options = SubscriberOptions { patience: Duration::from_secs(20), ..SubscriberOptions::default() };
    let mut stream = client.subscribe(&topic, Start::Earliest, options).await?;
    loop {
        let all = *until.borrow_and_update();
        if all.is_some_and(|all| received.rows.len() as u64 >= all) {
            return Ok(received);
        }
        tokio::select! {
            delivery = stream.next() => match delivery {
                Ok(delivery) => received.rows.push(row(&delivery)?),
                // Not reachable for a while: it goes on where it was.
                Err(SubscribeError::Unavailable(_)) => {}
                Err(error) => bail!("{} after {} events: {error}", received.name, received.rows.len()),
            },
            changed = until.changed() => changed.context("the run was given up")?,
        }
    }
}

/// Everything that the topic holds, by query.
///
/// # Errors
/// It cannot be read, for longer than a cluster takes to find itself.
pub async fn read(client: &Client, topic: &str) -> anyhow::Result<Vec<Row>> {
    let begun = Instant::now();
    loop {
        match try_read(client, topic).await {
            Ok(deliveries) => return deliveries.iter().map(row).collect(),
            Err(error) if error.is_transient() && begun.elapsed() < Duration::from_mins(2) => {
                sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {topic}")),
        }
    }
}

async fn try_read(client: &Client, topic: &str) -> Result<Vec<Delivery>, CallError> {
    let mut rows = client.query(&format!("SELECT * FROM {topic}")).await?;
    let mut all = Vec::new();
    while let Some(row) = rows.next().await? {
        all.push(row);
    }
    Ok(all)
}
