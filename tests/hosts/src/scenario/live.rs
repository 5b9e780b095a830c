//! A live subscription at a node that lags: it begins with what is committed after it has begun, not with what this node had missed.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{Client, Event, Mime, PublisherOptions, Start, SubscriberOptions};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::say;
use crate::cluster::{Cluster, Plan};
use crate::links::patterns;

const TOPIC: &str = "live";

/// Cuts a follower off, publishes, subscribes at the follower, heals, publishes more: what the subscriber gets first tells.
///
/// # Errors
/// It got something older, or the run could not be carried out.
pub async fn run(plan: Plan) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(plan).await?;
    cluster.client_from(1)?.create_topic(TOPIC).await?;
    let leader = cluster.leader_of(TOPIC).await?;
    let nodes = cluster.network.nodes().clone();
    let late = nodes.iter().copied().find(|node| *node != leader).context("a cluster has followers")?;
    publish(&cluster.client(&[leader])?, &["seen by all"]).await?;
    // A client that is logged in, since a node that is cut off vouches for nobody new.
    let client = cluster.client(&[late])?;
    client.topics().await?;

    cluster.network.cut(patterns::deafened(&nodes, &[late].into()))?;
    publish(&cluster.client(&[leader])?, &["missed", "missed, too"]).await?;
    let mut subscribing = JoinSet::new();
    subscribing.spawn(async move { client.subscribe(TOPIC, Start::Live, SubscriberOptions::default()).await });
    // As long as a server that does not ask anybody would need many times over.
    sleep(Duration::from_secs(1)).await;
    cluster.network.heal()?;
    let mut subscriber = subscribing.join_next().await.context("it was started")???;
    publish(&cluster.client(&[leader])?, &["live"]).await?;
    let first = subscriber.next().await?.event()?;
    let first = String::from_utf8_lossy(&first.data).into_owned();
    ensure!(first == "live", "node {late}, which had been cut off, delivered {first:?} as live");
    say(format!(
        "node {late}, which had been cut off, delivered as live what was published afterwards, and nothing older"
    ));
    Ok(())
}

async fn publish(client: &Client, texts: &[&'static str]) -> anyhow::Result<()> {
    let stream = client.publisher(TOPIC, PublisherOptions::default()).await?;
    for text in texts {
        stream.publish(Event::new(*text).with_mimetype(Mime::TextPlain)).await?.await?;
    }
    stream.close().await;
    Ok(())
}
