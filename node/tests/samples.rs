//! Data directories that every release so far has written: today's program opens each, and goes on with it.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::admin_api as pb;
use ensign_client::{Client, CredentialsFile, Event, Mime, PublisherOptions, Ring};
use ensign_proto::ClusterVersion;
use serde_json::Value;
use support::process::ensign;
use support::{Dev, read_all};

/// How many events the script published to `orders`.
const ORDERS: usize = 600;
const PATIENCE: Duration = Duration::from_mins(1);

/// What the script published to each topic.
fn topics(version: u32) -> Vec<(&'static str, usize)> {
    let mut topics = vec![("orders", ORDERS), ("notes", 40)];
    // Under a ring of its own, and from an API key that has one.
    topics.extend((version > 1).then_some(("kept", 40)));
    topics
}

fn sample(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/samples/{version}"))
}

fn versions() -> std::ops::RangeInclusive<u32> {
    1..=ClusterVersion::NEWEST.0
}

/// What `tar` or `gzip` says on stdout.
fn run(program: &str, args: &[&str], at: &Path) -> anyhow::Result<Vec<u8>> {
    let output =
        Command::new(program).args(args).arg(at).output().with_context(|| format!("{program} is not installed"))?;
    ensure!(output.status.success(), "{program} {}: {}", at.display(), String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

fn objects(lines: &[u8]) -> anyhow::Result<Vec<Value>> {
    let lines = std::str::from_utf8(lines)?.lines();
    lines.map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}"))).collect()
}

/// What the release that wrote the sample read from it.
fn expected(version: u32, topic: &str) -> anyhow::Result<Vec<Value>> {
    objects(&run("gzip", &["-dc"], &sample(version).join(format!("{topic}.jsonl.gz")))?)
}

/// What today's command reads.
fn read(dev: &Dev, topic: &str) -> anyhow::Result<Vec<Value>> {
    let query = format!("SELECT * FROM {topic}");
    let output = ensign()
        .args(["query", &query, "--output", "json", "--credentials"])
        .arg(dev.credentials())
        .output()
        .context("cannot query")?;
    ensure!(output.status.success(), "{query}: {}", String::from_utf8_lossy(&output.stderr));
    objects(&output.stdout)
}

/// Every event is there, in its place, with its id, times, metadata and bytes; today's command may show more of it.
fn compare(dev: &Dev, version: u32) -> anyhow::Result<()> {
    for (topic, count) in topics(version) {
        let (expected, found) = (expected(version, topic)?, read(dev, topic)?);
        ensure!(expected.len() == count, "the sample of version {version} has {} events of {topic}", expected.len());
        ensure!(found.len() >= count, "{} of {count} events of {topic} are left", found.len());
        for (expected, found) in expected.iter().zip(&found) {
            for (field, value) in expected.as_object().context("an event is an object")? {
                ensure!(found.get(field) == Some(value), "{topic}: {field} of {found} is not that of {expected}");
            }
        }
    }
    Ok(())
}

fn client_id(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(serde_json::from_str::<Value>(&text)?["ClientID"].take())
}

async fn has_risen(admin: &Client) -> anyhow::Result<()> {
    let begun = tokio::time::Instant::now();
    loop {
        let version = admin.admin().cluster_version().await?;
        if version.active == ClusterVersion::NEWEST.0 {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "the version does not rise: {version:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn publish(client: &Client, count: usize) -> anyhow::Result<()> {
    let publisher = client.publisher("orders", PublisherOptions::default()).await?;
    for n in 0..count {
        publisher.publish(Event::new(format!("later {n}")).with_mimetype(Mime::TextPlain)).await?.await?;
    }
    publisher.close().await;
    Ok(())
}

/// Whether these are the states of the ring's first versions. A sample that is older than its ring's period is rotated when it is opened.
fn began_as(ring: &pb::KeyRing, states: &[pb::KeyState]) -> bool {
    let found: Vec<_> = ring.versions.iter().map(pb::KeyRingVersion::state).collect();
    let same = |(found, made): (&pb::KeyState, &pb::KeyState)| {
        found == made || (*found, *made) == (pb::KeyState::Retired, pb::KeyState::Active)
    };
    let active = found.iter().filter(|state| **state == pb::KeyState::Active).count();
    found.len() >= states.len() && active == 1 && found.iter().zip(states).all(same)
}

/// The rest of what the script did.
async fn compare_the_rest(client: &Client, admin: &Client, version: u32) -> anyhow::Result<()> {
    let topics = client.topics().await?;
    let readonly = |name: &str| topics.iter().find(|topic| topic.name == name).map(|topic| topic.readonly);
    ensure!((readonly("orders"), readonly("notes"), readonly("gone")) == (Some(false), Some(true), None), "{topics:?}");
    let rings = admin.admin().key_rings(None).await?;
    let named = |name: &str| rings.iter().find(|ring| ring.name == name).context("a ring is missing");
    let own = named("")?;
    ensure!(began_as(own, &[pb::KeyState::Retired, pb::KeyState::Revoked, pb::KeyState::Active]), "{own:?}");
    if version > 1 {
        const DAY: i64 = 24 * 3600;
        ensure!(own.rotation.is_some_and(|rotation| rotation.seconds == 730 * DAY), "{own:?}");
        let spare = named("spare")?;
        ensure!(began_as(spare, &[pb::KeyState::Disabled, pb::KeyState::Active]), "{spare:?}");
        ensure!(spare.algorithm() == pb::KeyAlgorithm::Aes128Gcm, "{spare:?}");
        let scheduled: Vec<_> = spare.scheduled.iter().map(|it| (it.version, it.after.map(|it| it.seconds))).collect();
        ensure!(scheduled == [(2, Some(365 * DAY))], "{spare:?}");
        let keeper = admin.admin().key_ring(Ring::Name("keeper".to_owned(), None)).await?;
        ensure!(keeper.bindings.iter().any(|bound| bound.name == "kept"), "{keeper:?}");
    }
    let receipts = admin.admin().key_receipts(Ring::Own).await?.receipts;
    let revoked = receipts.iter().find(|it| it.kind() == pb::KeyReceiptKind::Revoked);
    ensure!(revoked.is_some_and(|it| it.versions == [2]), "{receipts:?}");
    let keys = admin.admin().api_keys(None).await?;
    for (name, since) in [("second", 1), ("third", 2)] {
        ensure!(version < since || keys.iter().any(|key| key.name == name), "{keys:?}");
    }
    Ok(())
}

async fn opens(version: u32) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let folder = format!("--directory={}", dir.path().display());
    run("tar", &["--extract", "--gzip", &folder, "--file"], &sample(version).join("data.tar.gz"))?;
    let data = dir.path().join("data");
    let mut dev = Dev::start_at(1, None, dir, data)?;
    ensure!(client_id(&dev.credentials())? == client_id(&dev.data().join("credentials.json"))?, "other credentials");
    CredentialsFile::read(&dev.credentials())?;
    compare(&dev, version)?;
    compare_the_rest(&dev.client()?, &dev.admin()?, version).await?;
    publish(&dev.client()?, 25).await?;
    has_risen(&dev.admin()?).await?;
    ensure!(dev.terminate(PATIENCE)?, "it does not stop in order:\n{}", dev.log());

    dev.restart()?;
    compare(&dev, version)?;
    // What only today's version knows.
    let limit = pb::Limit { kind: Some(pb::limit::Kind::At(40)) };
    dev.admin()?.admin().set_quota(None, pb::Quota { topics: Some(limit), ..pb::Quota::default() }).await?;
    let names: Vec<String> = (0..5).map(|n| format!("many-{n}")).collect();
    dev.client()?.create_topics(&names).await?;
    publish(&dev.client()?, 25).await?;
    dev.kill()?;

    dev.restart()?;
    compare(&dev, version)?;
    compare_the_rest(&dev.client()?, &dev.admin()?, version).await?;
    let rows = read_all(&dev.client()?, "orders").await?;
    ensure!(rows.len() == ORDERS + 50, "{} events", rows.len());
    Ok(())
}

#[test]
fn every_version_has_a_sample_and_they_stay_small() -> anyhow::Result<()> {
    let mut bytes = 0;
    for version in versions() {
        let read = topics(version).into_iter().map(|(topic, _)| format!("{topic}.jsonl.gz"));
        for file in read.chain(["data.tar.gz".to_owned()]) {
            let path = sample(version).join(file);
            let found = std::fs::metadata(&path).with_context(|| {
                format!("there is no {}: make it with tests/samples/make.sh, as the README there says", path.display())
            })?;
            bytes += found.len();
        }
    }
    let each = bytes / u64::from(ClusterVersion::NEWEST.0);
    ensure!(each < 150_000, "{each} bytes a sample");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sample_of_every_version_opens_is_read_and_goes_on() -> anyhow::Result<()> {
    for version in versions() {
        opens(version).await.with_context(|| format!("the sample of version {version}"))?;
    }
    Ok(())
}
