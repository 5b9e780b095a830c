//! What must hold while nodes of two releases work together, and once all are of the new one.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ensign_client::admin_api as pb;
use ensign_client::{CallError, Event, PublisherOptions};
use tokio::time::{Instant, sleep};

use super::super::say;
use crate::cluster::Cluster;
use crate::links::Node;
use crate::workload::ours;

/// How long the cluster may take to notice that all nodes are of the new release.
const RISE: Duration = Duration::from_mins(1);

/// As a publisher of a workload names its events.
const EVENT: &str = "1:0";

fn ten_thousand_streams() -> pb::Quota {
    let limit = pb::Limit { kind: Some(pb::limit::Kind::At(10_000)) };
    pb::Quota { streams: Some(limit), ..pb::Quota::default() }
}

/// Some nodes are new, `old` are not: topics are made and used through nodes of both, and what the old ones cannot read is refused,
/// with a message that names them.
///
/// # Errors
/// One of these does not hold.
pub(super) async fn while_mixed(cluster: &Cluster, new: Node, old: &[Node]) -> anyhow::Result<()> {
    for (maker, user) in old.iter().flat_map(|old| [(new, *old), (*old, new)]) {
        let topic = format!("made-at-{maker}-used-at-{user}-when-{}-were-old", old.len());
        cluster.client(&[maker])?.create_topic(&topic).await.with_context(|| format!("cannot make {topic}"))?;
        let client = cluster.client(&[user])?;
        let publisher = client.publisher(&topic, PublisherOptions::default()).await?;
        publisher.publish(Event::new(EVENT)).await?.await.with_context(|| format!("cannot publish to {topic}"))?;
        publisher.close().await;
        let rows = ours::read(&cluster.client(&[maker])?, &topic).await?;
        ensure!(rows.len() == 1, "{} events in {topic}", rows.len());
    }
    let admin = cluster.admin_of(&[new])?;
    let behind = old.first().map(|node| format!("node {node} speaks version 1")).unwrap_or_default();
    match admin.admin().set_quota(None, ten_thousand_streams()).await {
        Err(CallError::Precondition { message })
            if message.contains("needs version 2 of the cluster") && message.contains(&behind) => {}
        other => bail!("a quota while node {old:?} is old: {other:?}"),
    }
    match admin.admin().raise_cluster_version(None, &[]).await {
        Err(CallError::Precondition { message }) if message.contains(&behind) => {}
        other => bail!("the version was to be raised while node {old:?} is old: {other:?}"),
    }
    let version = admin.admin().cluster_version().await?;
    ensure!(version.active == 1 && version.obstacle.contains(&behind), "{version:?}");
    Ok(())
}

/// All nodes are new: the version rises, and what needs it works.
///
/// # Errors
/// It does not.
pub(super) async fn when_all_are_new(cluster: &Cluster) -> anyhow::Result<()> {
    let (admin, begun) = (cluster.admin()?, Instant::now());
    loop {
        let version = admin.admin().cluster_version().await?;
        if version.active >= 2 {
            break;
        }
        ensure!(begun.elapsed() < RISE, "the cluster's version does not rise: {version:?}");
        sleep(Duration::from_millis(200)).await;
    }
    say(format!("the cluster is at version 2, {:.1} s after the last node", begun.elapsed().as_secs_f64()));
    admin.admin().set_quota(None, ten_thousand_streams()).await.context("cannot set a quota")?;
    let names: Vec<String> = (0..20).map(|n| format!("bulk-{n}")).collect();
    let made = cluster.client_from(2)?.create_topics(&names).await.context("cannot make many topics")?;
    let created = made.iter().filter(|topic| topic.outcome() == pb::created_topic::Outcome::Created).count();
    ensure!(created == names.len(), "{made:?}");
    Ok(())
}
