//! What lies on disk and travels between replicas is ciphertext, and a revoked key takes its data with it.
//!
//! That the searches find plaintext where there is some is shown with batches that are not sealed.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{
    CallError, Client, Credentials, CredentialsFile, Event, Mime, Options, PublisherOptions, Revoke, Ring, Start,
    SubscribeError, SubscriberOptions,
};
use ensign_proto::GroupId;
use support::wiretap::Seen;
use support::{Cluster, Dev, read_all};

/// Bytes that nothing else in the world writes.
const PATTERN: &str = "kingfisher-3f9a1c77-under-the-bridge";

async fn publish(client: &Client, topic: &str, texts: &[String]) -> anyhow::Result<()> {
    let publisher = client.publisher(topic, PublisherOptions::default()).await?;
    for text in texts {
        let event = Event::new(text.clone()).with_mimetype(Mime::TextPlain).with_metadata(PATTERN, PATTERN);
        publisher.publish(event).await?.await?;
    }
    publisher.close().await;
    Ok(())
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, found)?;
        } else if path.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

/// The files under `folder` that contain `pattern`, and how many bytes were searched.
fn search(folder: &Path, pattern: &[u8]) -> anyhow::Result<(Vec<PathBuf>, u64)> {
    let mut all = Vec::new();
    files(folder, &mut all)?;
    let (mut hits, mut searched) = (Vec::new(), 0);
    for path in all {
        let bytes = std::fs::read(&path)?;
        searched += bytes.len() as u64;
        if bytes.windows(pattern.len()).any(|window| window == pattern) {
            hits.push(path);
        }
    }
    Ok((hits, searched))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_file_of_any_node_contains_what_was_published() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    let client = dev.client()?;
    client.create_topic("secrets").await?;
    let texts: Vec<String> = (0..200).map(|n| format!("{PATTERN} {n}")).collect();
    publish(&client, "secrets", &texts).await?;
    ensure!(read_all(&client, "secrets").await?.len() == 200, "the events are not there");

    for look in ["while running", "after a clean stop"] {
        let (hits, searched) = search(&dev.data(), PATTERN.as_bytes())?;
        ensure!(hits.is_empty(), "{look}: plaintext in {hits:?}");
        ensure!(searched > 50 << 20, "{look}: searched only {searched} bytes; is this the right folder?");
        // The search itself works: the topic's name is not a secret, and is found.
        let (names, _) = search(&dev.data(), b"secrets")?;
        ensure!(!names.is_empty(), "{look}: the search finds nothing at all");
        if look == "while running" {
            ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planted_unsealed_batch_is_found_on_the_disk_of_every_node() -> anyhow::Result<()> {
    let mut dev = Dev::start_planted(3, Some("unsealed-batches"))?;
    let client = dev.client()?;
    client.create_topic("secrets").await?;
    publish(&client, "secrets", &[PATTERN.to_owned()]).await?;
    // A follower may still be writing what a majority has: every node holds it once it has stopped in order.
    ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());
    let (hits, _) = search(&dev.data(), PATTERN.as_bytes())?;
    for node in 1..=3 {
        let log = dev.data().join(format!("node-{node}/log/log.redb"));
        ensure!(hits.contains(&log), "the planted bug was not found in {}, but in {hits:?}", log.display());
    }
    Ok(())
}

fn contains(bytes: &[u8], pattern: &str) -> bool {
    bytes.windows(pattern.len()).any(|window| window == pattern.as_bytes())
}

/// Publishes at the topic's leader: how many bytes then passed between the nodes, and whether the pattern was among them.
async fn tapped(cluster: &Cluster, seen: &Seen, leader: u64, topic: &str) -> anyhow::Result<(usize, bool)> {
    let before = seen.with(<[u8]>::len);
    let texts: Vec<String> = (0..200).map(|n| format!("{PATTERN} {n} {}", "y".repeat(1_000))).collect();
    publish(&cluster.client_of(leader)?, topic, &texts).await?;
    Ok(seen.with(|bytes| (bytes.len() - before, contains(&bytes[before..], PATTERN))))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_messages_carry_ciphertext_inside_the_peers_tls() -> anyhow::Result<()> {
    let seen = Seen::default();
    let cluster = Cluster::start_tapped(3, None, Some(&seen))?;
    let client = cluster.client(false)?;
    client.create_topic("tapped-topic").await?;
    // At the leader itself: what is forwarded to a leader is the one thing that travels readable, inside the peers' TLS.
    let mut leader = None;
    for id in cluster.ids() {
        let before = seen.with(<[u8]>::len);
        publish(&cluster.client_of(id)?, "tapped-topic", &[format!("probe-of-node-{id} {}", "x".repeat(64))]).await?;
        if !seen.with(|bytes| contains(&bytes[before..], &format!("probe-of-node-{id}"))) {
            leader = Some(id);
        }
    }
    let leader = leader.context("every node forwards: where is the leader?")?;
    let (travelled, plain) = tapped(&cluster, &seen, leader, "tapped-topic").await?;
    ensure!(travelled > 2 * 200 * 1_000, "only {travelled} bytes passed the tap: the batches went another way");
    ensure!(!plain, "plaintext between replicas");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planted_unsealed_batch_is_found_inside_the_peers_tls() -> anyhow::Result<()> {
    let seen = Seen::default();
    let cluster = Cluster::start_tapped(3, Some("unsealed-batches"), Some(&seen))?;
    cluster.client(false)?.create_topic("tapped-topic").await?;
    publish(&cluster.client(false)?, "tapped-topic", &["first".to_owned()]).await?;
    // Nothing is forwarded from the leader, so whatever is seen of what it was given is a message of Raft's.
    let status = cluster.client(true)?.admin().cluster_status().await?;
    let partition = status.groups.iter().find(|group| GroupId(group.id) >= GroupId::FIRST_PARTITION);
    let leader = partition.context("no partition in the cluster's status")?.leader;
    let (_, plain) = tapped(&cluster, &seen, leader, "tapped-topic").await?;
    ensure!(plain, "the planted bug was not found between the nodes");
    Ok(())
}

/// A client of another project of the same cluster.
async fn another_project(dev: &Dev) -> anyhow::Result<Client> {
    let admin = dev.admin()?.admin();
    let project = admin.create_project("bystander", None).await?;
    let reply = admin.create_api_key("bystander", Some(project.id.parse()?), Vec::new()).await?;
    let key = reply.key.context("no key")?;
    let file = CredentialsFile::read(&dev.credentials())?;
    let other = CredentialsFile { credentials: Credentials::new(key.client_id, reply.client_secret), ..file };
    Ok(Client::connect(Options::from_file(other).0)?)
}

fn says_revoked(error: &CallError) -> bool {
    matches!(error, CallError::Precondition { .. }) && error.to_string().contains("revoked")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_key_takes_its_data_with_it_and_nobody_elses() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    let (client, bystander) = (dev.client()?, another_project(&dev).await?);
    client.create_topic("doomed").await?;
    bystander.create_topic("spared").await?;
    publish(&client, "doomed", &["first era".to_owned()]).await?;
    publish(&bystander, "spared", &["untouched".to_owned()]).await?;

    // A subscriber that has read everything and waits for more.
    let mut subscriber = client.subscribe("doomed", Start::Earliest, SubscriberOptions::default()).await?;
    ensure!(&subscriber.next().await?.event()?.data[..] == b"first era", "a strange first event");

    let project: ensign_proto::ProjectId = {
        let topic = client.find_topic("doomed").await?;
        topic.project
    };
    let ring = dev.admin()?.admin().key_rings(Some(project)).await?.pop().context("the project has no ring")?;
    let reply = dev.admin()?.admin().revoke_key(Ring::Id(ring.id.parse()?), Revoke::All).await?;
    ensure!(reply.versions == [1], "revoked {:?}", reply.versions);

    // It is told, although nothing more was published.
    match subscriber.next().await {
        Err(SubscribeError::Stream(error)) if says_revoked(&error) => {}
        other => anyhow::bail!("an idle subscriber after the revoke: {other:?}"),
    }

    let refused = |what: &str, outcome: Result<usize, CallError>| match outcome {
        Err(error) if says_revoked(&error) => Ok(()),
        other => Err(anyhow::anyhow!("{what} after the revoke: {other:?}")),
    };
    let query = |client: Client| async move {
        match read_all(&client, "doomed").await {
            Ok(rows) => Ok(rows.len()),
            Err(error) => Err(error.downcast::<CallError>().expect("reading fails with the call's error")),
        }
    };
    refused("query", query(client.clone()).await)?;
    let mut fresh = client.subscribe("doomed", Start::Earliest, SubscriberOptions::default()).await?;
    match fresh.next().await {
        Err(SubscribeError::Stream(error)) if says_revoked(&error) => {}
        other => anyhow::bail!("a new subscriber after the revoke: {other:?}"),
    }
    let published =
        client.publisher("doomed", PublisherOptions { deadline: Duration::from_secs(5), ..Default::default() });
    let outcome = published.await?.publish(Event::new("too late")).await?.await;
    ensure!(outcome.is_err(), "published under a revoked ring");
    ensure!(read_all(&bystander, "spared").await?.len() == 1, "another project cannot read");

    dev.kill()?;
    dev.restart()?;
    refused("query after a restart", query(dev.client()?).await)?;
    ensure!(read_all(&bystander, "spared").await?.len() == 1, "another project cannot read after a restart");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotation_interrupts_nobody_and_old_events_stay_readable() -> anyhow::Result<()> {
    let dev = Dev::start(3)?;
    let client = dev.client()?;
    let topic = client.create_topic("eras").await?;
    let ring = dev.admin()?.admin().key_rings(Some(topic.project)).await?.pop().context("the project has no ring")?;
    for era in 1..=3 {
        publish(&client, "eras", &[format!("era {era}")]).await?;
        let reply = dev.admin()?.admin().rotate_key(Ring::Id(ring.id.parse()?)).await?;
        ensure!(reply.version == era + 1, "rotation {era} made version {}", reply.version);
    }
    publish(&client, "eras", &["era 4".to_owned()]).await?;
    let rows = read_all(&client, "eras").await?;
    let texts: Vec<Vec<u8>> =
        rows.iter().map(|row| row.event().map(|event| event.data.to_vec())).collect::<Result<_, _>>()?;
    ensure!(texts == [b"era 1", b"era 2", b"era 3", b"era 4"], "{texts:?}");

    // Destroying one era leaves the others.
    dev.admin()?.admin().revoke_key(Ring::Id(ring.id.parse()?), Revoke::Version(ensign_proto::KeyVersion(1))).await?;
    let later = client.query("SELECT * FROM eras OFFSET 1").await;
    let mut rows = later?;
    let mut count = 0;
    while rows.next().await?.is_some() {
        count += 1;
    }
    ensure!(count == 3, "{count} of three eras are left");
    Ok(())
}
