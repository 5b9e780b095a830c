//! Nodes come, and go for good, while a cluster works: who votes in the catalog and in the vault follows.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{Client, Event, Mime, PublisherOptions};
use support::ledger::{Load, TOPIC, judge};
use support::machines::{Machines, RootKey, json};
use support::{Cluster, read_all};
use tokio::time::{Instant, sleep};

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(90);
/// The groups that span the cluster.
const GROUPS: [&str; 2] = ["catalog", "vault"];

/// Who votes in the group of that name, as the node that `operator` asks has it.
async fn voters(operator: &Client, group: &str) -> anyhow::Result<BTreeSet<u64>> {
    let status = operator.admin().cluster_status().await?;
    let group = status.groups.into_iter().find(|it| it.name == group).context("the group is not there")?;
    Ok(group.replicas.iter().filter(|replica| replica.voter).map(|replica| replica.node_id).collect())
}

async fn until_voters(operator: &Client, group: &str, expected: &[u64]) -> anyhow::Result<()> {
    let expected: BTreeSet<u64> = expected.iter().copied().collect();
    let end = Instant::now() + PATIENCE;
    let mut last = Err(anyhow::anyhow!("nobody was asked"));
    while Instant::now() < end {
        last = voters(operator, group).await;
        if last.as_ref().is_ok_and(|voters| *voters == expected) {
            return Ok(());
        }
        sleep(Duration::from_millis(200)).await;
    }
    anyhow::bail!("the voters of {group} are {:?}, and not {expected:?}", last?)
}

/// A project is written to the vault, for its key ring, and to the catalog.
async fn until_written(operator: &Client, name: &str) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match operator.admin().create_project(name, None).await {
            Ok(_) => return Ok(()),
            Err(error) => ensure!(Instant::now() < end, "the catalog and the vault take no writes: {error}"),
        }
        sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_joins_by_token_takes_the_place_of_a_founder_that_is_lost() -> anyhow::Result<()> {
    let mut cluster = Machines::found()?;
    let operator = cluster.admin_of(1)?;
    for node in [2, 3] {
        ensure!(cluster.join(RootKey::Copied)? == node, "numbers are given out in order");
    }
    for group in GROUPS {
        until_voters(&operator, group, &[1, 2, 3]).await.context("three nodes, three voters")?;
    }
    cluster.client_of(1)?.create_topic(TOPIC).await?;
    ensure!(cluster.join(RootKey::Copied)? == 4, "the fourth");
    let newest = cluster.admin_of(4)?;
    for group in GROUPS {
        until_voters(&newest, group, &[1, 2, 3]).await.context("the fourth learns without a vote")?;
    }
    // It has no replica of the topic, and serves it all the same, since it reads the catalog and has keys.
    let load = Load::start(vec![cluster.client_of(4)?]);
    load.wait_for_acks(100).await?;
    cluster.kill(2)?;
    for group in GROUPS {
        until_voters(&newest, group, &[1, 3, 4]).await.with_context(|| cluster.output(4))?;
    }
    load.wait_for_acks(100).await?;
    let acked = load.finish().await?;
    judge(&cluster.client_of(4)?, &acked).await?;
    // Topics that are made from now on are held by those that are there.
    let client = cluster.client_of(4)?;
    client.create_topic("after").await?;
    let publisher = client.publisher("after", PublisherOptions::default()).await?;
    publisher.publish(Event::new("first").with_mimetype(Mime::TextPlain)).await?.await?;
    // Its vote counts: with another founder away, the two that are left go on.
    cluster.kill(3)?;
    until_written(&newest, "made-with-the-new-vote").await.with_context(|| cluster.output(4))?;
    let stored = publisher.publish(Event::new("still").with_mimetype(Mime::TextPlain)).await?.await;
    stored.with_context(|| format!("of node 1:\n{}\nof node 4:\n{}", cluster.output(1), cluster.output(4)))?;
    publisher.close().await;
    ensure!(read_all(&client, "after").await?.len() == 2, "what two of three hold is there");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_without_the_root_key_serves_with_keys_from_the_others() -> anyhow::Result<()> {
    let mut cluster = Machines::found()?;
    cluster.client_of(1)?.create_topic(TOPIC).await?;
    ensure!(cluster.join(RootKey::Missing)? == 2, "the second");
    let load = Load::start(vec![cluster.client_of(2)?]);
    load.wait_for_acks(50).await?;
    let acked = load.finish().await?;
    judge(&cluster.client_of(2)?, &acked).await?;
    // A third one with the key: three voters in the catalog; the vault's only two able nodes are no better than one.
    ensure!(cluster.join(RootKey::Copied)? == 3, "the third");
    let operator = cluster.admin_of(2)?;
    until_voters(&operator, "catalog", &[1, 2, 3]).await?;
    until_voters(&cluster.admin_of(1)?, "vault", &[1]).await?;
    cluster.kill(2)?;
    cluster.restart(2)?;
    ensure!(read_all(&cluster.client_of(2)?, TOPIC).await?.len() as u64 == acked.total(), "it reads after a restart");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_a_certificate_made_by_hand_is_taken_in_too() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.add(4)?;
    for group in GROUPS {
        until_voters(&cluster.admin_of(4)?, group, &[1, 2, 3]).await.context("it learns without a vote")?;
    }
    // The status shows who votes and who learns.
    let args = ["cluster", "status", "--output", "json", "--credentials", &cluster.credentials().display().to_string()];
    let end = Instant::now() + PATIENCE;
    loop {
        let status = json(&args.map(str::to_owned))?;
        let groups = status["groups"].as_array().cloned().unwrap_or_default();
        let learns =
            |name: &str| groups.iter().any(|it| it["name"] == name && it["learners"] == serde_json::json!([4]));
        if GROUPS.iter().all(|name| learns(name)) {
            break;
        }
        ensure!(Instant::now() < end, "{status}");
        sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founder_that_was_replaced_comes_back_without_a_vote() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.add(4)?;
    cluster.kill(3)?;
    for group in GROUPS {
        until_voters(&cluster.admin_of(1)?, group, &[1, 2, 4]).await?;
    }
    cluster.restart(3)?;
    for group in GROUPS {
        until_voters(&cluster.admin_of(3)?, group, &[1, 2, 4]).await.context("it learns again")?;
    }
    cluster.client_of(3)?.create_topic(TOPIC).await?;
    ensure!(read_all(&cluster.client_of(1)?, TOPIC).await?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_disk_was_emptied_never_votes_under_its_old_number() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.client(false)?.create_topic(TOPIC).await?;
    cluster.kill(3)?;
    std::fs::remove_dir_all(cluster.data(3))?;
    let refused = cluster.restart(3).err().context("a node that forgot its votes was let in")?;
    ensure!(format!("{refused:#}").contains("comes back without its data"), "{refused:#}");
    // Half of its data is as bad as none: the log is gone, and the node knows that it had one.
    for group in GROUPS {
        until_voters(&cluster.admin_of(1)?, group, &[1, 2, 3]).await.context("nobody is there to take its vote")?;
    }
    Ok(())
}
