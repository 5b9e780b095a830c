//! Topics on real processes: what is destroyed stays destroyed, through a crash in the middle of it.

mod support;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::admin_api::created_topic::Outcome;
use ensign_client::{Client, Event, Mime, PublisherOptions};
use futures::{StreamExt as _, TryStreamExt as _};
use support::{Cluster, Dev, read_all};

async fn publish(client: &Client, topic: &str, count: u32) -> anyhow::Result<()> {
    let publisher = client.publisher(topic, PublisherOptions::default()).await?;
    for n in 0..count {
        publisher.publish(Event::new(format!("{n}")).with_mimetype(Mime::TextPlain)).await?.await?;
    }
    publisher.close().await;
    Ok(())
}

async fn wait_until_gone(client: &Client, topic: &str) -> anyhow::Result<()> {
    for _ in 0..600 {
        if matches!(client.topic_exists(topic).await, Ok(false)) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    anyhow::bail!("{topic} is still there")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_whose_destruction_was_cut_short_is_destroyed_after_the_restart() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    // Keys never reach a core dump, whatever limit the process was started with.
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", dev.id()))?;
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).context("no limit of cores")?;
    ensure!(core.split_whitespace().skip(4).take(2).eq(["0", "0"]), "cores may be dumped: {core}");
    let client = dev.client()?;
    let doomed = client.create_topic("doomed").await?;
    client.create_topic("kept").await?;
    publish(&client, "doomed", 20).await?;
    publish(&client, "kept", 20).await?;
    client.destroy_topic(doomed.id).await?;
    // The logs are being removed, or are not yet; the catalog says DELETING.
    dev.kill()?;
    dev.restart()?;
    let client = dev.client()?;
    wait_until_gone(&client, "doomed").await?;
    ensure!(read_all(&client, "kept").await?.len() == 20, "another topic lost events");
    let again = client.create_topic("doomed").await?;
    ensure!(again.id != doomed.id, "a destroyed id is never given out again");
    ensure!(read_all(&client, "doomed").await?.is_empty(), "events of the destroyed topic came back");
    publish(&client, "doomed", 3).await?;
    ensure!(read_all(&client, "doomed").await?.len() == 3, "the new topic takes events");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_topics_made_at_once_take_events_and_are_there_after_a_crash() -> anyhow::Result<()> {
    // One replica each: this is about how many there are, and a debug build on a busy machine has no time for more elections.
    let mut dev = Dev::start(1)?;
    let client = dev.client()?;
    client.create_topic("many-17").await?;
    let names: Vec<String> = (0..200).map(|n| format!("many-{n}")).collect();
    let mut asked = names.clone();
    asked.push("not a name".to_owned());
    let made = client.create_topics(&asked).await?;
    ensure!(made.len() == 201, "{} answers", made.len());
    for (name, topic) in asked.iter().zip(&made) {
        let expected = match name.as_str() {
            "many-17" => Outcome::Exists,
            "not a name" => Outcome::Refused,
            _ => Outcome::Created,
        };
        ensure!(topic.name == *name && topic.outcome() == expected, "{name}: {topic:?}");
        ensure!(topic.id.is_empty() == (expected == Outcome::Refused), "{name}: {topic:?}");
    }
    // Each takes events as soon as it is made.
    let publishing = names.iter().map(|name| publish(&client, name, 1));
    futures::stream::iter(publishing).buffer_unordered(16).try_collect::<()>().await?;

    dev.kill()?;
    dev.restart()?;
    let client = dev.client()?;
    ensure!(client.topics().await?.len() == 200, "every topic is listed after the restart");
    let reader = &client;
    let reading = names.iter().map(|name| async move {
        let rows = read_all(reader, name).await?;
        ensure!(rows.len() == 1, "{name} has {} events", rows.len());
        anyhow::Ok(())
    });
    futures::stream::iter(reading).buffer_unordered(16).try_collect::<()>().await?;
    let again = client.create_topics(&names).await?;
    ensure!(again.iter().all(|topic| topic.outcome() == Outcome::Exists), "asking again makes nothing");

    let none = client.create_topics(&[]).await.expect_err("no name");
    let many = client.create_topics(&vec!["x".to_owned(); 257]).await.expect_err("too many names");
    for error in [none, many] {
        ensure!(error.to_string().contains("1 to 256"), "{error}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_takes_events_and_gives_them_and_one_that_drains_loses_none() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.client_of(1)?.create_topic("shared").await?;
    for id in cluster.ids() {
        publish(&cluster.client_of(id)?, "shared", 40).await.with_context(|| format!("through node {id}"))?;
    }
    let mut seen = Vec::new();
    for id in cluster.ids() {
        let rows = read_all(&cluster.client_of(id)?, "shared").await.with_context(|| format!("from node {id}"))?;
        seen.push(rows.into_iter().map(|row| (row.offset, row.id, row.bytes)).collect::<Vec<_>>());
    }
    ensure!(seen[0].len() == 120 && seen.iter().all(|rows| *rows == seen[0]), "every node gives the same events");
    // A node that is asked to stop while it takes events answers what it took, and its clients go on elsewhere.
    let client = cluster.client(false)?;
    let publisher = client.publisher("shared", PublisherOptions::default()).await?;
    let mut receipts = Vec::new();
    for n in 0..600 {
        receipts.push(publisher.publish(Event::new(format!("drain {n}")).with_mimetype(Mime::TextPlain)).await?);
        if n == 200 {
            ensure!(cluster.terminate(1, Duration::from_mins(1))?, "a node that drains ends well");
        }
    }
    for (n, receipt) in receipts.into_iter().enumerate() {
        receipt.await.with_context(|| format!("event {n}"))?;
    }
    publisher.close().await;
    let rows = read_all(&cluster.client_of(2)?, "shared").await?;
    ensure!(rows.len() == 720, "{} events are there instead of 720", rows.len());
    Ok(())
}
