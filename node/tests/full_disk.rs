//! A disk that fills up under a real cluster: publishers are told so, readers read on, and publishing resumes by itself when
//! there is room.
//!
//! Everywhere the disk is a limit on the size of the process's files; where the machine allows it, a small file system as well.
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ensign_client::{Client, Event, Mime, NackCode, PublishError, PublisherOptions, Start, SubscriberOptions};
use rustix::process::{Pid, Resource, Rlimit};
use support::{Dev, read_all};

const TOPIC: &str = "heavy";
/// The bytes of one event.
const SIZE: usize = 1_000_000;

/// Publishes one event and waits for its answer, whatever it is.
async fn publish(client: &Client, number: usize) -> anyhow::Result<Result<(), PublishError>> {
    let publisher = client.publisher(TOPIC, PublisherOptions::default()).await?;
    let event = Event::new(format!("{number:08}{}", "x".repeat(SIZE))).with_mimetype(Mime::TextPlain);
    let outcome = publisher.publish(event).await?.await.map(drop);
    publisher.close().await;
    Ok(outcome)
}

/// The numbers of the events that are there.
async fn numbers(client: &Client) -> anyhow::Result<Vec<usize>> {
    let mut numbers = Vec::new();
    for row in read_all(client, TOPIC).await? {
        let event = row.event()?;
        ensure!(event.data.len() == SIZE + 8, "an event of {} bytes", event.data.len());
        numbers.push(std::str::from_utf8(&event.data[..8])?.parse()?);
    }
    Ok(numbers)
}

fn is_full(outcome: &Result<(), PublishError>) -> bool {
    matches!(outcome, Err(PublishError::Refused { code: NackCode::ConsensusFailure, message }) if message.contains("disk") && message.contains("full"))
}

/// Fills the cluster's disk, uses it, makes room, and uses it again.
async fn fill_and_relieve(dev: &Dev, relieve: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let client = dev.client()?;
    let mut acked = Vec::new();
    for number in 0.. {
        ensure!(number < 1_000, "the disk never filled up");
        match publish(&client, number).await? {
            Ok(()) => acked.push(number),
            outcome if is_full(&outcome) => break,
            outcome => bail!("a full disk is answered with {outcome:?}\n{}", dev.log()),
        }
    }
    ensure!(acked.len() > 5, "full after {} events", acked.len());

    // Publishers are told again and again, and what was acked is read meanwhile, by query and by subscribers.
    for _ in 0..3 {
        let outcome = publish(&client, 0).await?;
        ensure!(is_full(&outcome), "still full, and answered with {outcome:?}");
        ensure!(numbers(&client).await? == acked, "the query misses events");
    }
    let mut subscriber = client.subscribe(TOPIC, Start::Earliest, SubscriberOptions::default()).await?;
    for number in &acked {
        let next = tokio::time::timeout(Duration::from_mins(1), subscriber.next()).await.context("nothing comes")??;
        ensure!(next.event()?.data.starts_with(format!("{number:08}").as_bytes()), "not event {number}");
    }

    relieve()?;
    let number = acked.len();
    for attempt in 0.. {
        match publish(&client, number).await? {
            Ok(()) => break,
            outcome if is_full(&outcome) && attempt < 60 => {}
            outcome => bail!("with room again: {outcome:?}\n{}", dev.log()),
        }
    }
    acked.push(number);
    ensure!(numbers(&client).await? == acked, "not what was acked");
    let next = tokio::time::timeout(Duration::from_mins(1), subscriber.next()).await.context("nothing comes")??;
    ensure!(next.event()?.data.starts_with(format!("{number:08}").as_bytes()), "the subscriber missed it");
    Ok(())
}

fn limit_files(process: u32, bytes: Option<u64>) -> anyhow::Result<()> {
    let process = Pid::from_raw(process.try_into()?).context("a process has an id")?;
    rustix::process::prlimit(Some(process), Resource::Fsize, Rlimit { current: bytes, maximum: None })?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_may_not_grow_stop_publishing_alone_and_only_for_a_while() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    dev.client()?.create_topic(TOPIC).await?;
    let mut largest = 0;
    for node in 1..=3 {
        largest = largest.max(std::fs::metadata(dev.data().join(format!("node-{node}/log/log.redb")))?.len());
    }
    limit_files(dev.id(), Some(largest))?;
    fill_and_relieve(&dev, || limit_files(dev.id(), None)).await?;
    ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());
    Ok(())
}

/// A file system in memory, mounted as long as this lives.
struct Tmpfs<'a>(&'a Path);

impl Tmpfs<'_> {
    fn mount(&self, options: &str) -> anyhow::Result<()> {
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(self.0).output()?;
        ensure!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_file_system_stops_publishing_alone_and_only_for_a_while() -> anyhow::Result<()> {
    let mount = tempfile::tempdir()?;
    let fs = Tmpfs(mount.path());
    if let Err(reason) = fs.mount("size=256m") {
        eprintln!("skipped: no small file system can be mounted here ({reason})");
        return Ok(());
    }
    let mut dev = Dev::start_at(3, None, tempfile::tempdir()?, mount.path().join("data"))?;
    dev.client()?.create_topic(TOPIC).await?;
    fill_and_relieve(&dev, || fs.mount("remount,size=700m")).await?;
    // The file system goes only when nobody uses it.
    dev.kill()?;
    Ok(())
}
