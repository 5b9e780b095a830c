//! `kill -9`: no acked event is ever lost, altered, duplicated or reordered.
//!
//! The page cache survives these kills: they test recovery and the protocol, not the fsync (`power_cut.rs` does that). That
//! they can fail is shown with a log that commits without durability.

mod support;

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use support::ledger::{Broken, Load, TOPIC, judge};
use support::{Cluster, Dev};

const PUBLISHERS: usize = 3;

fn load(dev: &Dev) -> anyhow::Result<Load> {
    Ok(Load::start((0..PUBLISHERS).map(|_| dev.client()).collect::<Result<_, _>>()?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_process_loses_nothing_to_kill_nine() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    dev.client()?.create_topic(TOPIC).await?;
    let load = load(&dev)?;
    for _ in 0..8 {
        load.wait_for_acks(300).await?;
        dev.kill()?;
        dev.restart()?;
    }
    load.wait_for_acks(300).await?;
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
        load.wait_for_acks(200).await?;
        cluster.kill(victim)?;
        // A majority is left: publishing goes on while the victim is down.
        load.wait_for_acks(200).await?;
        cluster.restart(victim)?;
    }
    load.wait_for_acks(200).await?;
    let acked = load.finish().await?;
    for id in cluster.ids() {
        let rows = judge(&cluster.client_of(id)?, &acked).await.with_context(|| format!("read at node {id}"))?;
        ensure!(rows >= 4_800, "only {rows} events: the test did not test");
    }
    Ok(())
}

/// Publishes until a kill, with the bug in the process, and starts it again without: what the judge says then.
async fn judged_after_a_kill(dev: &mut Dev, plant: &'static str) -> anyhow::Result<u64> {
    ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());
    dev.plant = Some(plant);
    dev.restart()?;
    let load = load(dev)?;
    load.wait_for_acks(300).await?;
    dev.kill()?;
    let acked = load.abandon().await;
    dev.plant = None;
    dev.restart()?;
    judge(&dev.client()?, &acked).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planted_commits_without_durability_lose_acked_events_and_are_caught() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    dev.client()?.create_topic(TOPIC).await?;
    match judged_after_a_kill(&mut dev, "unsynced-commits").await {
        Ok(rows) => bail!("the planted bug was not found: {rows} events are there"),
        Err(error) => match error.downcast_ref::<Broken>() {
            Some(Broken(what)) => ensure!(what.contains("events were acked and"), "found something else: {what}"),
            None => return Err(error),
        },
    }
    Ok(())
}
