//! Power cuts under real clusters: every acked event was fsynced by a majority, and is there when the power is back.
//!
//! A kill alone leaves the page cache. So the nodes run on a disk that keeps in their own memory what was not synced: it dies
//! with them (`VolatileDisk`). Where the machine allows it, a real file system is cut off under a cluster as well. That these
//! tests can fail is shown with a sync that does nothing.
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

mod support;

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ensign_client::Client;
use ensign_proto::ByteCount;
use ensign_storage::testing::LoopFs;
use support::ledger::{Acked, Broken, Load, TOPIC, judge};
use support::{Cluster, Dev};

const PUBLISHERS: usize = 3;
/// Room for three nodes' logs, written out ahead.
const SIZE: ByteCount = ByteCount(400 << 20);

fn load(client: impl Fn() -> anyhow::Result<Client>) -> anyhow::Result<Load> {
    Ok(Load::start((0..PUBLISHERS).map(|_| client()).collect::<Result<_, _>>()?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_that_loses_power_as_a_whole_loses_no_acked_event() -> anyhow::Result<()> {
    let mut dev = Dev::start_planted(3, Some("volatile-disk"))?;
    dev.client()?.create_topic(TOPIC).await?;
    let load = load(|| dev.client())?;
    for _ in 0..6 {
        load.wait_for_acks(300).await?;
        dev.kill()?;
        dev.restart()?;
    }
    load.wait_for_acks(300).await?;
    let acked = load.finish().await?;
    let rows = judge(&dev.client()?, &acked).await?;
    ensure!(rows >= 2_100, "only {rows} events: the test did not test");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_lose_power_one_by_one_and_all_at_once_lose_no_acked_event() -> anyhow::Result<()> {
    let mut cluster = Cluster::start_tapped(3, Some("volatile-disk"), None)?;
    cluster.client(false)?.create_topic(TOPIC).await?;
    let load = load(|| cluster.client(false))?;
    for victim in cluster.ids() {
        load.wait_for_acks(200).await?;
        cluster.kill(victim)?;
        load.wait_for_acks(200).await?;
        cluster.restart(victim)?;
        load.wait_for_acks(200).await?;
        for id in cluster.ids() {
            cluster.kill(id)?;
        }
        cluster.restart_all()?;
    }
    load.wait_for_acks(200).await?;
    let acked = load.finish().await?;
    for id in cluster.ids() {
        let rows = judge(&cluster.client_of(id)?, &acked).await.with_context(|| format!("read at node {id}"))?;
        ensure!(rows >= 2_000, "only {rows} events: the test did not test");
    }
    Ok(())
}

/// Publishes on a disk whose syncs do nothing until the power is cut: what the judge says once it is back.
async fn judged_after_lies(dev: &mut Dev) -> anyhow::Result<u64> {
    ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());
    dev.plant = Some("lying-disk");
    dev.restart()?;
    let load = load(|| dev.client())?;
    load.wait_for_acks(300).await?;
    dev.kill()?;
    let acked = load.abandon().await;
    dev.plant = None;
    dev.restart()?;
    judge(&dev.client()?, &acked).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planted_sync_that_does_nothing_loses_acked_events_and_is_caught() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    dev.client()?.create_topic(TOPIC).await?;
    match judged_after_lies(&mut dev).await {
        Ok(rows) => bail!("the planted bug was not found: {rows} events are there"),
        Err(error) => match error.downcast_ref::<Broken>() {
            Some(Broken(what)) => ensure!(what.contains("events were acked and"), "found something else: {what}"),
            None => return Err(error),
        },
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_file_system_that_is_cut_off_loses_no_acked_event() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let mut fs = match LoopFs::new(folder.path(), SIZE) {
        Ok(fs) => fs,
        Err(reason) => {
            eprintln!("skipped: no file system can be mounted and cut off here ({reason})");
            return Ok(());
        }
    };
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| anyhow::anyhow!(error);
    let mut dev = Dev::start_at(3, None, tempfile::tempdir()?, fs.path().join("data"))?;
    dev.client()?.create_topic(TOPIC).await?;
    let load = load(|| dev.client())?;
    for _ in 0..4 {
        load.wait_for_acks(300).await?;
        fs.cut().map_err(failed)?;
        dev.kill()?;
        fs.restore().map_err(failed)?;
        dev.restart()?;
    }
    load.wait_for_acks(300).await?;
    let acked: Acked = load.finish().await?;
    let rows = judge(&dev.client()?, &acked).await?;
    ensure!(rows >= 1_500, "only {rows} events: the test did not test");
    // The file system goes only when nobody uses it.
    dev.kill()?;
    drop(fs);
    Ok(())
}
