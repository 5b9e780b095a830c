//! Key rings of topics and of API keys, by the command line and over real clusters: what is sealed under them, and how it ends.

mod support;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ensign_client::{
    CallError, Client, CredentialsFile, Event, Mime, Options, PublishError, Publisher, PublisherOptions, Revoke, Ring,
    Start, SubscribeError, SubscriberOptions,
};
use serde_json::Value;
use support::process::ensign;
use support::{Cluster, read_all};

const PATIENCE: Duration = Duration::from_mins(1);

/// Runs `ensign …` with these credentials.
fn run(credentials: &Path, args: &[&str]) -> anyhow::Result<Output> {
    let mut command = ensign();
    command.args(args).arg("--credentials").arg(credentials);
    command.output().context("cannot run ensign")
}

fn json(credentials: &Path, args: &[&str]) -> anyhow::Result<Value> {
    let output = run(credentials, &[args, &["--output", "json"]].concat())?;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn refused(credentials: &Path, args: &[&str], code: i32, what: &str) -> anyhow::Result<()> {
    let output = run(credentials, args)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code) && text.contains(what), "{args:?}: {:?}: {text}", output.status.code());
    Ok(())
}

fn text<'a>(value: &'a Value, field: &str) -> anyhow::Result<&'a str> {
    value[field].as_str().with_context(|| format!("no {field} in {value}"))
}

/// A client with the credentials in `file`, of any node of the cluster.
fn client_with(cluster: &Cluster, file: &Path) -> anyhow::Result<Client> {
    let (mut options, _) = Options::from_file(CredentialsFile::read(file)?);
    let (all, _) = Options::from_file(CredentialsFile::read(&cluster.credentials())?);
    (options.endpoints, options.auth_urls) = (all.endpoints, all.auth_urls);
    Ok(Client::connect(options)?)
}

async fn publish(publisher: &Publisher, text: &str) -> Result<(), PublishError> {
    publisher.publish(Event::new(text.to_owned()).with_mimetype(Mime::TextPlain)).await?.await.map(drop)
}

async fn read(client: &Client, topic: &str) -> Result<usize, CallError> {
    match read_all(client, topic).await {
        Ok(rows) => Ok(rows.len()),
        Err(error) => Err(error.downcast::<CallError>().expect("reading fails with the call's error")),
    }
}

fn says_revoked(error: &CallError, ring: &str) -> bool {
    let text = error.to_string();
    matches!(error, CallError::Precondition { .. }) && text.contains(ring) && text.contains("was revoked")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topics_ring_ends_with_it_on_every_node_and_no_other_topic_notices() -> anyhow::Result<()> {
    let cluster = Cluster::start(3)?;
    let file = cluster.credentials();
    wait_until_it_can(&cluster).await?;
    let ring = json(&file, &["key", "create", "payments"])?;
    let ring = text(&ring, "id")?.to_owned();
    refused(&file, &["topic", "create", "pay", "--key", "nobody"], 3, "has no key ring \"nobody\": `ensign key list`")?;
    json(&file, &["topic", "create", "pay", "--key", "payments"])?;
    json(&file, &["topic", "create", "plain"])?;
    ensure!(json(&file, &["topic", "describe", "pay"])?["ring"] == ring.as_str(), "describe does not show the ring");
    let listed = json(&file, &["topic", "list"])?;
    let rings: Vec<_> =
        listed.as_array().context("a list")?.iter().map(|topic| topic["ring"] == ring.as_str()).collect();
    ensure!(rings == [true, false], "{listed}");
    let described = json(&file, &["key", "describe", "--ring", "payments"])?;
    ensure!(described["bindings"][0]["name"] == "pay" && described["bindings"][1].is_null(), "{described}");

    let client = cluster.client(false)?;
    let publisher = client.publisher("pay", PublisherOptions::default()).await?;
    let plain = client.publisher("plain", PublisherOptions::default()).await?;
    publish(&publisher, "one").await?;
    publish(&plain, "one").await?;
    // A new version: later batches are under that, and all are read.
    json(&file, &["key", "rotate", "--ring", "payments"])?;
    publish(&publisher, "two").await?;
    for id in cluster.ids() {
        ensure!(read(&cluster.client_of(id)?, "pay").await? == 2, "node {id} does not read before");
    }
    // Without its active version, publishing is refused with the remedy, and the stream lives on.
    json(&file, &["key", "disable", "--ring", "payments", "--version", "2", "--yes"])?;
    let told = publish(&publisher, "no").await.expect_err("nothing can be sealed").to_string();
    ensure!(told.contains(&format!("`ensign key enable --ring {ring} --version 2`")), "{told}");
    json(&file, &["key", "enable", "--ring", "payments", "--version", "2"])?;
    publish(&publisher, "three").await.context("the same stream goes on")?;

    json(&file, &["key", "revoke", "--ring", "payments", "--all", "--yes"])?;
    for _ in 0..20 {
        for id in cluster.ids() {
            match read(&cluster.client_of(id)?, "pay").await {
                Err(error) if says_revoked(&error, &ring) => {}
                other => bail!("node {id} after the revoke: {other:?}"),
            }
            ensure!(read(&cluster.client_of(id)?, "plain").await? == 1, "node {id} does not read the other topic");
        }
    }
    publish(&plain, "two").await.context("the other topic goes on")?;
    refused(&file, &["topic", "create", "more", "--key", "payments"], 7, "was revoked, for ever: name another one")?;

    // Bound to another ring, it takes events again, and what is under that is read from where the refusal says.
    json(&file, &["key", "create", "payments-2"])?;
    refused(&file, &["topic", "alter", "pay"], 2, "--key")?;
    json(&file, &["topic", "alter", "pay", "--key", "payments-2"])?;
    let begun = tokio::time::Instant::now();
    loop {
        let publisher = client.publisher("pay", PublisherOptions::default()).await?;
        match publish(&publisher, "four").await {
            Ok(()) => break,
            // The leader hears of it a moment later.
            Err(error) => ensure!(begun.elapsed() < PATIENCE, "it takes no events: {error}"),
        }
    }
    let error = read(&client, "pay").await.expect_err("the first three are gone").to_string();
    let at = error.rsplit_once("reading topic pay can go on at offset ").context(error.clone())?.1;
    let next: u64 = at.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().with_context(|| error.clone())?;
    let start = Start::Offset(ensign_proto::Offset(next));
    let mut reader = client.subscribe("pay", start, SubscriberOptions::default()).await?;
    ensure!(next == 4 && &reader.next().await?.event()?.data[..] == b"four", "{error}");
    let described = json(&file, &["key", "describe", "--ring", "payments"])?;
    ensure!(described["bindings"][0]["kind"] == "topic, before", "{described}");
    Ok(())
}

/// Makes an API key by the command line; where its credentials are, and what was printed.
fn make_key(cluster: &Cluster, name: &str, args: &[&str]) -> anyhow::Result<(PathBuf, Value)> {
    let save = cluster.dir.path().join(format!("{name}.json"));
    let saved = save.display().to_string();
    let made = json(&cluster.credentials(), &[&["apikey", "create", name, "--save", &saved], args].concat())?;
    Ok((save, made))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shredding_an_api_key_destroys_what_it_published_on_every_node_and_nothing_else() -> anyhow::Result<()> {
    let cluster = Cluster::start(3)?;
    let file = cluster.credentials();
    wait_until_it_can(&cluster).await?;
    json(&file, &["topic", "create", "north", "south"])?;
    let (device_file, made) = make_key(&cluster, "device", &["--own-ring"])?;
    let (id, ring) = (text(&made, "id")?.to_owned(), text(&made, "ring")?.to_owned());
    let (other_file, other) = make_key(&cluster, "other", &["--own-ring"])?;
    let (client, device, other) = (
        cluster.client(false)?,
        client_with(&cluster, &device_file)?,
        (client_with(&cluster, &other_file)?, text(&other, "ring")?.to_owned()),
    );
    ensure!(ring != other.1, "two API keys share a ring that was made for one");
    for topic in ["north", "south"] {
        for (n, client) in [&client, &device, &other.0].into_iter().enumerate() {
            let publisher = client.publisher(topic, PublisherOptions::default()).await?;
            publish(&publisher, &format!("{n}")).await?;
            publisher.close().await;
        }
    }
    for node in cluster.ids() {
        ensure!(read(&cluster.client_of(node)?, "north").await? == 3, "node {node} does not read before");
    }
    let stream = device.publisher("north", PublisherOptions::default()).await?;
    let described = json(&file, &["apikey", "describe", &id])?;
    ensure!(
        described["topics"] == serde_json::json!(["north", "south"]) && described["ring"] == ring.as_str(),
        "{described}"
    );

    // Who is there is asked, and told what it costs.
    refused(&file, &["apikey", "revoke", &id, "--shred"], 2, "events in topics north, south. This cannot be undone")?;
    let (_, plain) = make_key(&cluster, "plain", &[])?;
    let plain = text(&plain, "id")?.to_owned();
    refused(&file, &["apikey", "revoke", &plain, "--shred", "--yes"], 7, "has no key ring of its own")?;
    ensure!(json(&file, &["apikey", "describe", &plain])?["revoked"] == false, "it was revoked all the same");
    json(&file, &["key", "create", "shared"])?;
    json(&file, &["topic", "create", "bound", "--key", "shared"])?;
    let (_, sharing) = make_key(&cluster, "sharing", &["--ring", "shared"])?;
    let sharing = text(&sharing, "id")?.to_owned();
    refused(
        &file,
        &["apikey", "revoke", &sharing, "--shred", "--yes"],
        7,
        "topic bound is bound to it; nothing was revoked",
    )?;
    // Where somebody would be asked, the command itself refuses: the cluster may see by then what this node did not.
    let told = "the node that answered sees it (topic bound, API key sharing); nothing was revoked";
    refused(&file, &["apikey", "revoke", &sharing, "--shred"], 7, told)?;
    refused(&file, &["apikey", "create", "x", "--ring", "nobody", "--save", "-"], 3, "has no key ring")?;

    let shredded = json(&file, &["apikey", "revoke", &id, "--shred", "--yes"])?;
    ensure!(shredded["shredded"] == true && shredded["versions"] == serde_json::json!([1]), "{shredded}");
    let gone = json(&file, &["key", "describe", "--ring", &format!("apikey-{id}")])?;
    ensure!(gone["id"] == ring.as_str() && gone["state"] == "revoked", "{gone}");
    ensure!(text(&shredded, "receipt")?.split('.').count() == 3, "no receipt that others can check: {shredded}");
    for _ in 0..20 {
        for node in cluster.ids() {
            for topic in ["north", "south"] {
                match read(&cluster.client_of(node)?, topic).await {
                    Err(error) if says_revoked(&error, &ring) => {
                        let goes_on = format!("reading topic {topic} can go on at offset 3");
                        ensure!(error.to_string().contains(&goes_on), "{error}");
                    }
                    other => bail!("node {node} after the shred: {other:?}"),
                }
            }
        }
    }
    // The events of others are read past it, also those of the other API key with a ring of its own.
    for node in cluster.ids() {
        let start = Start::Offset(ensign_proto::Offset(3));
        let mut reader = cluster.client_of(node)?.subscribe("north", start, SubscriberOptions::default()).await?;
        ensure!(&reader.next().await?.event()?.data[..] == b"2", "node {node} does not read the living");
        let mut earliest =
            cluster.client_of(node)?.subscribe("north", Start::Earliest, SubscriberOptions::default()).await?;
        ensure!(&earliest.next().await?.event()?.data[..] == b"0", "node {node} does not read the first");
        match earliest.next().await {
            Err(SubscribeError::Stream(error)) if says_revoked(&error, &ring) => {}
            other => bail!("node {node}: the subscriber is not told: {other:?}"),
        }
    }
    ensure!(publish(&stream, "late").await.is_err(), "a revoked API key publishes");
    let publisher = other.0.publisher("north", PublisherOptions::default()).await?;
    publish(&publisher, "goes on").await.context("the other API key publishes")?;

    // Again is no error, and nothing is bound to the ring any more.
    let again = json(&file, &["apikey", "revoke", &id, "--shred", "--yes"])?;
    ensure!(again["shredded"] == true && again["ring_destroyed"] == true, "{again}");
    let listed = json(&file, &["apikey", "list"])?;
    let fates: Vec<_> = listed.as_array().context("a list")?.iter().map(|key| &key["ring_destroyed"]).collect();
    ensure!(
        fates.iter().filter(|fate| fate.is_boolean()).count() == 1 && fates.contains(&&Value::Bool(true)),
        "{listed}"
    );
    ensure!(json(&file, &["apikey", "describe", &id])?["ring_destroyed"] == true, "describe does not say so");
    refused(&file, &["topic", "create", "late", "--key", &ring], 7, "was revoked, for ever")?;
    Ok(())
}

/// What is bound and what is destroyed outlives every process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bindings_and_what_was_shredded_survive_a_restart_of_all_nodes() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    let file = cluster.credentials();
    wait_until_it_can(&cluster).await?;
    json(&file, &["key", "create", "vault"])?;
    json(&file, &["topic", "create", "kept", "--key", "vault"])?;
    let (first_file, first) = make_key(&cluster, "first", &["--own-ring"])?;
    let (second_file, second) = make_key(&cluster, "second", &["--own-ring"])?;
    for file in [&first_file, &second_file] {
        let publisher = client_with(&cluster, file)?.publisher("kept", PublisherOptions::default()).await?;
        publish(&publisher, "before").await?;
    }
    json(&file, &["apikey", "revoke", text(&first, "id")?, "--shred", "--yes"])?;
    for id in cluster.ids() {
        cluster.kill(id)?;
    }
    cluster.restart_all()?;
    let client = cluster.client(false)?;
    match read(&client, "kept").await {
        Err(error) if says_revoked(&error, text(&first, "ring")?) => {}
        other => bail!("what was shredded, after a restart: {other:?}"),
    }
    let publisher = client_with(&cluster, &second_file)?.publisher("kept", PublisherOptions::default()).await?;
    publish(&publisher, "after").await?;
    let plain = client.publisher("kept", PublisherOptions::default()).await?;
    publish(&plain, "topic").await?;
    // What each of them is sealed under is seen by what goes when a ring goes.
    let admin = cluster.client(true)?.admin();
    let second_ring = Ring::Id(text(&second, "ring")?.parse()?);
    admin.revoke_key(second_ring, Revoke::All).await?;
    let start = Start::Offset(ensign_proto::Offset(4));
    let mut reader = client.subscribe("kept", start, SubscriberOptions::default()).await?;
    ensure!(&reader.next().await?.event()?.data[..] == b"topic", "the topic's own ring lives");
    let start = Start::Offset(ensign_proto::Offset(2));
    let mut reader = client.subscribe("kept", start, SubscriberOptions::default()).await?;
    match reader.next().await {
        Err(SubscribeError::Stream(error)) => {
            let text = error.to_string();
            ensure!(text.contains("can go on at offset 4"), "both of the second API key's go: {text}");
        }
        other => bail!("the second API key's events are read: {other:?}"),
    }
    Ok(())
}

/// The vault's leader, and the cluster's version, may be on their way still.
async fn wait_until_it_can(cluster: &Cluster) -> anyhow::Result<()> {
    let begun = tokio::time::Instant::now();
    while cluster.client(true)?.admin().key_rings(None).await.is_err() {
        ensure!(begun.elapsed() < PATIENCE, "key rings cannot be listed");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}
