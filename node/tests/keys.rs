//! Key rings by the command line and over a real cluster: disabled, enabled, named, set, scheduled.

mod support;

use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{
    CallError, Client, Event, Mime, PublishError, Publisher, PublisherOptions, Revoke, Ring, Start, SubscribeError,
    SubscriberOptions,
};
use ensign_proto::KeyVersion;
use serde_json::Value;
use support::process::ensign;
use support::{Cluster, Dev, read_all};

const PATIENCE: Duration = Duration::from_mins(1);

async fn publish(publisher: &Publisher, text: &str) -> Result<(), PublishError> {
    publisher.publish(Event::new(text.to_owned()).with_mimetype(Mime::TextPlain)).await?.await.map(drop)
}

async fn read(client: &Client, topic: &str) -> Result<usize, CallError> {
    match read_all(client, topic).await {
        Ok(rows) => Ok(rows.len()),
        Err(error) => Err(error.downcast::<CallError>().expect("reading fails with the call's error")),
    }
}

fn says_disabled(error: &CallError) -> bool {
    matches!(error, CallError::Precondition { .. }) && error.to_string().contains("ensign key enable")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disabled_ring_is_closed_on_every_node_and_open_again_when_it_is_enabled() -> anyhow::Result<()> {
    let cluster = Cluster::start(3)?;
    let (client, admin) = (cluster.client(false)?, cluster.client(true)?.admin());
    let topic = client.create_topic("drawer").await?;
    let publisher = client.publisher("drawer", PublisherOptions::default()).await?;
    publish(&publisher, "first").await?;
    for id in cluster.ids() {
        ensure!(read(&cluster.client_of(id)?, "drawer").await? == 1, "node {id} does not read before");
    }
    let mut subscriber = client.subscribe("drawer", Start::Earliest, SubscriberOptions::default()).await?;
    ensure!(&subscriber.next().await?.event()?.data[..] == b"first", "a strange first event");

    let ring = Ring::Project(topic.project);
    let disabled = admin.disable_key(ring.clone(), Revoke::All).await?;
    ensure!(disabled.index > 0, "a change has a place in the vault's log: {disabled:?}");
    // Over and over, since the answer says that no node does from then on.
    for _ in 0..20 {
        for id in cluster.ids() {
            match read(&cluster.client_of(id)?, "drawer").await {
                Err(error) if says_disabled(&error) => {}
                other => anyhow::bail!("node {id} after the disable: {other:?}"),
            }
        }
    }
    match subscriber.next().await {
        Err(SubscribeError::Stream(error)) if says_disabled(&error) => {}
        other => anyhow::bail!("an idle subscriber after the disable: {other:?}"),
    }
    let refused = publish(&publisher, "refused").await;
    let told = matches!(&refused, Err(error) if error.to_string().contains("ensign key enable"));
    ensure!(told, "a publisher after the disable: {refused:?}");

    let enabled = admin.enable_key(ring, Revoke::All).await?;
    ensure!(enabled.index > disabled.index, "{enabled:?}");
    publish(&publisher, "second").await.context("the same stream goes on")?;
    for id in cluster.ids() {
        ensure!(read(&cluster.client_of(id)?, "drawer").await? == 2, "node {id} does not read after");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disabled_version_survives_a_restart_of_all_nodes_and_rotating_lets_publishing_go_on() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    let client = dev.client()?;
    let topic = client.create_topic("drawer").await?;
    let publisher = client.publisher("drawer", PublisherOptions::default()).await?;
    publish(&publisher, "first era").await?;
    let ring = Ring::Project(topic.project);
    let first = Revoke::Version(KeyVersion(1));
    dev.admin()?.admin().disable_key(ring.clone(), first).await?;
    let refused = publish(&publisher, "refused").await;
    let told = matches!(&refused, Err(error) if error.to_string().contains("ensign key rotate"));
    ensure!(told, "a publisher without an active version: {refused:?}");
    dev.admin()?.admin().rotate_key(ring.clone()).await?;
    publish(&publisher, "second era").await.context("the same stream goes on")?;
    publisher.close().await;

    dev.kill()?;
    dev.restart()?;
    let (client, admin) = (dev.client()?, dev.admin()?.admin());
    match read(&client, "drawer").await {
        Err(error) if says_disabled(&error) => {}
        other => anyhow::bail!("the disabled version after a restart: {other:?}"),
    }
    admin.enable_key(ring.clone(), first).await?;
    ensure!(read(&client, "drawer").await? == 2, "not both eras are read");
    admin.revoke_key(ring.clone(), first).await?;
    let refused = admin.enable_key(ring, first).await;
    let told = matches!(&refused, Err(CallError::Precondition { .. }));
    ensure!(told && refused.unwrap_err().to_string().contains("destroyed, for ever"), "a revoked version was enabled");
    Ok(())
}

/// Runs `ensign key …` with the credentials of a cluster.
fn key(dev: &Dev, args: &[&str]) -> anyhow::Result<Output> {
    let mut command = ensign();
    command.arg("key").args(args).arg("--credentials").arg(dev.credentials());
    command.output().context("cannot run ensign")
}

fn json(dev: &Dev, args: &[&str]) -> anyhow::Result<Value> {
    let output = key(dev, &[args, &["--output", "json"]].concat())?;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn refused(dev: &Dev, args: &[&str], code: i32, what: &str) -> anyhow::Result<()> {
    let output = key(dev, args)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code) && text.contains(what), "{args:?}: {:?}: {text}", output.status.code());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_key_command_does_what_its_help_says_and_refuses_what_makes_no_sense() -> anyhow::Result<()> {
    let dev = Dev::start(1)?;
    wait_until_it_can(&dev).await?;
    let made = json(&dev, &["create", "payments", "--algorithm", "aes192_gcm"])?;
    ensure!(made["algorithm"] == "AES192_GCM" && made["log_index"].as_u64() > Some(0), "{made}");
    let id = made["id"].as_str().context("a ring has an id")?;
    refused(&dev, &["create", "payments"], 7, "already")?;
    refused(&dev, &["create", "no spaces"], 2, "letters, digits")?;
    refused(&dev, &["describe", "--ring", "nobody"], 3, "`ensign key list`")?;

    let set = json(&dev, &["set", "--ring", "payments", "--rotation", "30d"])?;
    ensure!(set["rotation_seconds"] == 30 * 24 * 60 * 60 && set["id"] == id, "{set}");
    refused(&dev, &["set", "--ring", "payments", "--rotation", "1h"], 2, "730 days")?;
    refused(&dev, &["set"], 2, "--rotation")?;

    refused(&dev, &["disable", "--ring", id, "--all"], 2, "under it until it is enabled again: confirm with --yes")?;
    let disabled = json(&dev, &["disable", "--ring", id, "--all", "--yes"])?;
    ensure!(disabled["state"] == "disabled" && disabled["next_rotation"].is_null(), "{disabled}");
    refused(&dev, &["rotate", "--ring", id], 7, "ensign key enable")?;
    ensure!(json(&dev, &["enable", "--ring", "payments", "--all"])?["state"] == "enabled", "it is not enabled");
    let disabled = json(&dev, &["disable", "--ring", id, "--version", "1", "--yes"])?;
    ensure!(disabled["versions"][0]["state"] == "disabled", "{disabled}");
    refused(&dev, &["disable", "--ring", id, "--version", "7", "--yes"], 3, "no version 7")?;

    refused(&dev, &["schedule-revoke", "--ring", id, "--version", "1"], 2, "becomes unreadable for everybody")?;
    let scheduled = json(&dev, &["schedule-revoke", "--ring", id, "--version", "1", "--after", "2d", "--yes"])?;
    ensure!(scheduled["scheduled"][0]["after_seconds"] == 2 * 24 * 60 * 60, "{scheduled}");
    refused(&dev, &["schedule-revoke", "--ring", id, "--version", "1", "--after", "3d", "--yes"], 7, "already")?;
    refused(&dev, &["schedule-revoke", "--ring", id, "--all", "--after", "1s", "--yes"], 2, "a minute")?;
    let shown = String::from_utf8(key(&dev, &["describe", "--ring", id])?.stdout)?;
    for text in ["payments", "AES192_GCM", "30d", "version 1 is destroyed in", "disabled"] {
        ensure!(shown.contains(text), "{text} is not in {shown}");
    }
    ensure!(
        json(&dev, &["cancel-revoke", "--ring", id, "--version", "1"])?["scheduled"] == Value::Array(vec![]),
        "left"
    );
    refused(&dev, &["cancel-revoke", "--ring", id, "--version", "1"], 3, "not scheduled")?;

    refused(&dev, &["revoke", "--ring", id, "--version", "1"], 2, "in the era of version 1 becomes unreadable")?;
    json(&dev, &["revoke", "--ring", id, "--all", "--yes"])?;
    refused(&dev, &["enable", "--ring", id, "--version", "1"], 7, "destroyed, for ever")?;
    let rings = json(&dev, &["list"])?;
    let states: Vec<_> = rings.as_array().context("a list")?.iter().map(|ring| ring["state"].clone()).collect();
    ensure!(states.iter().any(|state| state == "revoked") && states.iter().any(|state| state == "enabled"), "{rings}");
    Ok(())
}

/// The vault's leader may be on its way still.
async fn wait_until_it_can(dev: &Dev) -> anyhow::Result<()> {
    let begun = tokio::time::Instant::now();
    while dev.admin()?.admin().key_rings(None).await.is_err() {
        ensure!(begun.elapsed() < PATIENCE, "key rings cannot be listed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
