//! A node that was never there takes the place of one that is lost for good, in the catalog and in the vault.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use support::ledger::{Load, TOPIC, judge};
use support::{Cluster, read_all};
use tokio::time::{Instant, sleep};

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// Who votes in the group of that name, as node `id` has it.
async fn voters(cluster: &Cluster, id: u64, group: &str) -> anyhow::Result<BTreeSet<u64>> {
    let status = cluster.admin_of(id)?.admin().cluster_status().await?;
    let group = status.groups.into_iter().find(|it| it.name == group).context("the group is not there")?;
    Ok(group.replicas.iter().filter(|replica| replica.voter).map(|replica| replica.node_id).collect())
}

async fn until_voters(cluster: &Cluster, id: u64, group: &str, expected: &[u64]) -> anyhow::Result<()> {
    let expected: BTreeSet<u64> = expected.iter().copied().collect();
    let end = Instant::now() + PATIENCE;
    let mut last = Err(anyhow::anyhow!("nobody was asked"));
    while Instant::now() < end {
        last = voters(cluster, id, group).await;
        if last.as_ref().is_ok_and(|voters| *voters == expected) {
            return Ok(());
        }
        sleep(Duration::from_millis(200)).await;
    }
    let seen = last?;
    anyhow::bail!("the voters of {group} are {seen:?} on node {id}, and not {expected:?}:\n{}", cluster.output(id))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_founder_is_replaced_by_a_node_that_joins() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.client(false)?.create_topic(TOPIC).await?;
    for group in ["catalog", "vault"] {
        until_voters(&cluster, 1, group, &[1, 2, 3]).await?;
    }
    cluster.add(4)?;
    for group in ["catalog", "vault"] {
        until_voters(&cluster, 4, group, &[1, 2, 3]).await.context("it learns without a vote")?;
    }
    // What it learned is the whole catalog, and it may ask the vault for keys.
    let load = Load::start(vec![cluster.client_of(1)?]);
    load.wait_for_acks(100).await?;
    cluster.kill(2)?;
    for group in ["catalog", "vault"] {
        until_voters(&cluster, 4, group, &[1, 3, 4]).await?;
    }
    load.wait_for_acks(100).await?;
    let acked = load.finish().await?;
    judge(&cluster.client_of(1)?, &acked).await?;
    // Its vote counts: with another founder away, the two that are left go on.
    cluster.kill(3)?;
    let operator = cluster.admin_of(4)?;
    let end = Instant::now() + PATIENCE;
    // A project is written to the vault, for its key ring, and to the catalog.
    while let Err(error) = operator.admin().create_project("made-with-the-new-vote", None).await {
        ensure!(Instant::now() < end, "the catalog and the vault take no writes: {error}\n{}", cluster.output(4));
        sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founder_that_was_replaced_comes_back_without_a_vote() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.add(4)?;
    cluster.kill(3)?;
    for group in ["catalog", "vault"] {
        until_voters(&cluster, 1, group, &[1, 2, 4]).await?;
    }
    cluster.restart(3)?;
    for group in ["catalog", "vault"] {
        until_voters(&cluster, 3, group, &[1, 2, 4]).await.context("it learns again")?;
    }
    cluster.client_of(3)?.create_topic(TOPIC).await?;
    ensure!(read_all(&cluster.client_of(1)?, TOPIC).await?.is_empty());
    Ok(())
}
