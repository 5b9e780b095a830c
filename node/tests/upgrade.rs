//! The cluster's version on real processes: a planted build that speaks one version more than there is.

mod support;

use std::time::Duration;

use anyhow::{bail, ensure};
use ensign_client::admin_api::VersionReply;
use ensign_client::{CallError, Client, Event, PublisherOptions};
use ensign_proto::ClusterVersion;
use support::refused::refused;
use support::{Cluster, Plant, read_all};

const NEXT: Plant = Some("next-version");
const NOW: u32 = ClusterVersion::NEWEST.0;
const PATIENCE: Duration = Duration::from_mins(1);

async fn version(admin: &Client) -> anyhow::Result<VersionReply> {
    Ok(admin.admin().cluster_version().await?)
}

async fn rises_to(admin: &Client, active: u32) -> anyhow::Result<()> {
    let begun = tokio::time::Instant::now();
    loop {
        // A node of those that were just restarted may not answer yet.
        match version(admin).await {
            Ok(reply) if reply.active == active => return Ok(()),
            reply => ensure!(begun.elapsed() < PATIENCE, "the version does not rise: {reply:?}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn publish(client: &Client) -> anyhow::Result<()> {
    let publisher = client.publisher("orders", PublisherOptions::default()).await?;
    publisher.publish(Event::new("an order")).await?.await?;
    publisher.close().await;
    Ok(())
}

fn node_file(cluster: &Cluster, node: u64) -> anyhow::Result<String> {
    Ok(std::fs::read_to_string(cluster.data(node).join("node.json"))?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_version_rises_when_every_node_speaks_it_and_then_keeps_older_builds_out() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    let admin = cluster.client(true)?;
    ensure!(version(&admin).await?.active == NOW, "a new cluster begins at the newest version");
    cluster.client(false)?.create_topic("orders").await?;

    // One node is new, and would hold the version back by itself if all were.
    ensure!(cluster.terminate(3, PATIENCE)?, "node 3 does not stop in order");
    cluster.configure(3, "upgrade = \"manual\"")?;
    cluster.restart_planted(3, NEXT)?;
    let new = cluster.admin_of(3)?;
    publish(&cluster.client_of(3)?).await?;
    let shown = version(&new).await?;
    let speaks: Vec<_> = shown.nodes.iter().map(|node| (node.newest, node.held)).collect();
    ensure!(speaks == [(NOW, false), (NOW, false), (NOW + 1, true)], "{shown:?}");
    ensure!(shown.obstacle.contains(&format!("node 1 speaks version {NOW}")), "{}", shown.obstacle);
    match new.admin().raise_cluster_version(None, &[]).await {
        Err(CallError::Precondition { message }) if message.contains("node 2 speaks version") => {}
        other => bail!("it was to be raised while nodes are old: {other:?}"),
    }
    match cluster.admin_of(1)?.admin().raise_cluster_version(Some(NOW + 1), &[]).await {
        Err(CallError::Invalid { message }) if message.contains("speaks versions up to") => {}
        other => bail!("an old node was to raise it: {other:?}"),
    }
    // The way back.
    ensure!(cluster.terminate(3, PATIENCE)?, "node 3 does not stop in order");
    cluster.restart_planted(3, None)?;
    publish(&cluster.client_of(3)?).await?;

    for node in [1, 2, 3] {
        ensure!(cluster.terminate(node, PATIENCE)?, "node {node} does not stop in order");
        cluster.restart_planted(node, NEXT)?;
    }
    let shown = version(&admin).await?;
    ensure!(shown.active == NOW && shown.obstacle.contains("ensign cluster upgrade"), "{shown:?}");
    // A node that is lost is not waited for, if it is named.
    cluster.kill(2)?;
    match new.admin().raise_cluster_version(None, &[1]).await {
        Err(CallError::Precondition { message }) if message.contains("node 2 does not answer") => {}
        other => bail!("it was to be raised while a node is away: {other:?}"),
    }
    new.admin().raise_cluster_version(None, &[2]).await?;
    rises_to(&new, NOW + 1).await?;
    cluster.restart_planted(2, NEXT)?;
    publish(&cluster.client_of(1)?).await?;

    // No way back: the old build touches nothing.
    ensure!(cluster.terminate(1, PATIENCE)?, "node 1 does not stop in order");
    let kept = node_file(&cluster, 1)?;
    let (code, said) = refused(&cluster.serve_args(1))?;
    let words = format!("the cluster is at version {}, and this program speaks versions up to {NOW} only", NOW + 1);
    ensure!(code == Some(1) && said.contains(&words), "{code:?}: {said}");
    ensure!(node_file(&cluster, 1)? == kept, "node.json was changed");
    // Nor if it does not know: it stops where its own log, or a peer, says so.
    let forgotten = kept.replace(&format!("\"cluster_version\": {}", NOW + 1), &format!("\"cluster_version\": {NOW}"));
    ensure!(forgotten != kept, "{kept}");
    std::fs::write(cluster.data(1).join("node.json"), forgotten)?;
    let (code, said) = refused(&cluster.serve_args(1))?;
    ensure!(code == Some(1) && said.contains(&words), "{code:?}: {said}");

    cluster.restart_planted(1, NEXT)?;
    publish(&cluster.client_of(1)?).await?;
    let events = read_all(&cluster.client(false)?, "orders").await?.len();
    ensure!(events == 4, "{events} events");
    Ok(())
}
