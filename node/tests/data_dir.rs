//! Data directories that cannot be used: each is refused by name, with what to do, and left exactly as it was found.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use ensign_client::{CallError, Client, Event, Mime, NackCode, PublishError, PublisherOptions};
use support::refused::refused;
use support::{Cluster, Dev, read_all};

const TOPIC: &str = "archive";
const EVENTS: usize = 600;

async fn publish(client: &Client) -> anyhow::Result<()> {
    client.create_topic(TOPIC).await?;
    let publisher = client.publisher(TOPIC, PublisherOptions::default()).await?;
    for batch in 0..EVENTS / 20 {
        let mut receipts = Vec::new();
        for n in 0..20 {
            let event = Event::new(format!("{:06} {}", batch * 20 + n, "z".repeat(500))).with_mimetype(Mime::TextPlain);
            receipts.push(publisher.publish(event).await?);
        }
        for receipt in receipts {
            receipt.await?;
        }
    }
    publisher.close().await;
    Ok(())
}

async fn all_there(client: &Client) -> anyhow::Result<()> {
    let rows = read_all(client, TOPIC).await?;
    for (n, row) in rows.iter().enumerate() {
        ensure!(row.event()?.data.starts_with(format!("{n:06}").as_bytes()), "row {n} is another event");
    }
    ensure!(rows.len() == EVENTS, "{} events are there", rows.len());
    Ok(())
}

/// Every file of a directory, with its bytes. The socket that a node which was refused leaves behind has none.
fn contents(dir: &Path) -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if kind.is_dir() {
            found.extend(contents(&path)?);
        } else if kind.is_file() {
            let bytes = std::fs::read(&path)?;
            found.push((path, bytes));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Starts the cluster on damaged data: it must end with 1, say these words, and leave `file` alone.
fn must_refuse(dev: &Dev, what: &str, file: &Path, words: &[&str]) -> anyhow::Result<()> {
    let before = std::fs::read(file).ok();
    let (code, text) = refused(dev.args())?;
    ensure!(code == Some(1), "{what}: ended with {code:?}: {text}");
    for word in words.iter().copied().chain([file.to_str().unwrap_or_default()]) {
        ensure!(text.contains(word), "{what}: no {word:?} in: {text}");
    }
    ensure!(std::fs::read(file).ok() == before, "{what}: the file was changed");
    Ok(())
}

/// A change that can be undone.
enum Damage {
    /// The bit at this place of the file.
    Flip(usize),
    /// All after so many bytes.
    Cut(usize),
    /// The whole file.
    Remove,
}

/// The places of all chunks of frames in a log's file, without those of which redb has left an old copy.
fn chunks(log: &[u8]) -> Vec<usize> {
    let head = b"ENSF\x01\0\0\0";
    let all: Vec<usize> = (0..log.len() - 48).filter(|at| log[*at..].starts_with(head)).collect();
    let sequence = |at: usize| &log[at + 8..at + 16];
    let single = |at: &usize| all.iter().filter(|other| sequence(**other) == sequence(*at)).count() == 1;
    all.iter().copied().filter(single).collect()
}

/// The longest chunk: its frame holds events.
fn events_chunk(log: &[u8]) -> usize {
    let frame = |at: &usize| u32::from_le_bytes(log[at + 24..at + 28].try_into().expect("four bytes"));
    chunks(log).into_iter().max_by_key(frame).expect("a log has frames")
}

/// Damages `file` in each way, sees it refused, and puts it back.
fn refused_when_damaged(dev: &Dev, file: &Path, damages: Vec<(&str, Damage, &[&str])>) -> anyhow::Result<()> {
    let pristine = std::fs::read(file)?;
    for (what, damage, words) in damages {
        match damage {
            Damage::Flip(at) => {
                let mut flipped = pristine.clone();
                flipped[at] ^= 0x10;
                std::fs::write(file, flipped)?;
            }
            Damage::Cut(len) => std::fs::write(file, &pristine[..len])?,
            Damage::Remove => std::fs::remove_file(file)?,
        }
        must_refuse(dev, what, file, words)?;
        std::fs::write(file, &pristine)?;
    }
    Ok(())
}

const DAMAGED: &[&str] = &["is damaged (", "set the folder aside", "restore a backup", "it was left as it is"];
const MISSING: &[&str] = &["is missing or empty", "put the file back"];

/// The log's file of the one node, and everything in it that start-up relies on, damaged in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_or_missing_log_is_refused_by_name_and_left_alone() -> anyhow::Result<()> {
    let mut dev = Dev::start(1)?;
    publish(&dev.client()?).await?;
    ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());
    let file = dev.data().join("node-1/log/log.redb");
    let log = std::fs::read(&file)?;
    // redb's header says which of its two commits counts, and where the database ends.
    let slot = 64 + 128 * usize::from(log[9] & 1);
    let index = log.windows(8).position(|bytes| bytes == b"ENSB\x01\0\0\0").expect("a closed log has its index");
    let used = chunks(&log).last().copied().expect("a log has frames");
    refused_when_damaged(
        &dev,
        &file,
        vec![
            ("its magic number", Damage::Flip(0), DAMAGED),
            ("its newest commit", Damage::Flip(slot + 36), DAMAGED),
            ("its index", Damage::Flip(index + 60), DAMAGED),
            ("cut in the middle", Damage::Cut(used / 2), DAMAGED),
            ("cut within a page", Damage::Cut(used / 2 + 77), DAMAGED),
            ("cut to its header", Damage::Cut(4096), DAMAGED),
            ("cut to nothing", Damage::Cut(0), MISSING),
            ("removed", Damage::Remove, MISSING),
        ],
    )?;
    let vault = dev.data().join("node-1/vault/log.redb");
    refused_when_damaged(
        &dev,
        &vault,
        vec![("the vault", Damage::Cut(100_000), DAMAGED), ("no vault", Damage::Remove, MISSING)],
    )?;
    // Refusing changed nothing: put back, it serves everything.
    dev.restart()?;
    all_there(&dev.client()?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_was_not_closed_is_repaired_when_it_is_sound_and_refused_when_it_is_not() -> anyhow::Result<()> {
    let mut dev = Dev::start(1)?;
    publish(&dev.client()?).await?;
    dev.kill()?;
    let file = dev.data().join("node-1/log/log.redb");
    let log = std::fs::read(&file)?;
    let middle = events_chunk(&log);
    refused_when_damaged(
        &dev,
        &file,
        vec![
            ("its magic number", Damage::Flip(0), DAMAGED),
            ("a frame in the middle", Damage::Flip(middle + 60), DAMAGED),
            ("cut in the middle", Damage::Cut(middle), DAMAGED),
            ("cut within a page", Damage::Cut(middle + 77), DAMAGED),
            ("removed", Damage::Remove, MISSING),
        ],
    )?;
    dev.restart()?;
    all_there(&dev.client()?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_an_old_frame_fences_its_topic_and_nothing_else() -> anyhow::Result<()> {
    let mut dev = Dev::start(1)?;
    publish(&dev.client()?).await?;
    dev.client()?.create_topic("spared").await?;
    ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());
    let file = dev.data().join("node-1/log/log.redb");
    let mut log = std::fs::read(&file)?;
    let at = events_chunk(&log) + 100;
    log[at] ^= 0x10;
    std::fs::write(&file, &log)?;

    // The index covers the frame, so the node starts, and finds the damage when it reads the topic's entries.
    dev.restart()?;
    let client = dev.client()?;
    // What was batched before the damaged frame may be read; what is in it may not.
    let error = read_all(&client, TOPIC).await.err().context("a damaged topic was read to its end")?;
    let error = error.downcast::<CallError>().context("another error than a call's")?;
    ensure!(matches!(error, CallError::DataLoss { .. }) && error.to_string().contains("damaged"), "{error:?}");
    // Nothing is acked on it: a node alone may only find out that nobody else can lead.
    let options = PublisherOptions { deadline: Duration::from_secs(5), ..PublisherOptions::default() };
    let outcome = client.publisher(TOPIC, options).await?.publish(Event::new("late")).await?.await;
    match outcome {
        Err(PublishError::Refused { code: NackCode::ShardingFailure, message }) if message.contains("damaged") => {}
        Err(PublishError::OutcomeUnknown { .. }) => {}
        outcome => bail!("published to a damaged topic: {outcome:?}"),
    }
    ensure!(dev.log().contains(&format!("{} is damaged (frame chunk", file.display())), "{}", dev.log());
    let publisher = client.publisher("spared", PublisherOptions::default()).await?;
    publisher.publish(Event::new("well")).await?.await?;
    ensure!(read_all(&client, "spared").await?.len() == 1, "another topic suffers");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_in_use_or_of_a_newer_format_or_of_other_nodes_is_refused() -> anyhow::Result<()> {
    let mut dev = Dev::start(3)?;
    // The same directory, other ports.
    let ports = |arg: &String| {
        let port = ["--grpc=", "--http=", "--metrics="].iter().find(|name| arg.starts_with(**name));
        port.map_or_else(|| arg.clone(), |name| format!("{name}127.0.0.1:0"))
    };
    let mut second: Vec<String> = dev.args().iter().map(ports).collect();
    let credentials = dev.dir.path().join("second.json");
    second.push(format!("--credentials={}", credentials.display()));
    second.retain(|arg| *arg != format!("--credentials={}", dev.credentials().display()));
    let (code, text) = refused(&second)?;
    ensure!(code == Some(1), "ended with {code:?}: {text}");
    let expected = format!("{} is in use by another process: stop that one first", dev.data().join("node-1").display());
    ensure!(text.contains(&expected), "{text}");
    ensure!(!credentials.exists(), "a start that was refused wrote credentials");
    publish(&dev.client()?).await?;
    ensure!(dev.terminate(Duration::from_secs(30))?, "no clean stop:\n{}", dev.log());

    let format = dev.data().join("node-2/format");
    std::fs::write(&format, "ensign-data 99\n")?;
    let (code, text) = refused(dev.args())?;
    ensure!(code == Some(1) && text.contains("node-2 was written by a newer release (format 99"), "{code:?}: {text}");
    ensure!(text.contains("run that release") && std::fs::read(&format)? == b"ensign-data 99\n", "{text}");
    std::fs::write(&format, "ensign-data 1\n")?;

    let life = dev.data().join("node-3/node.json");
    let known = std::fs::read_to_string(&life)?;
    let newer = known.replace("\"format\": 3", "\"format\": 9");
    ensure!(newer != known, "node.json has another format: {known}");
    std::fs::write(&life, &newer)?;
    let (code, text) = refused(dev.args())?;
    ensure!(code == Some(1) && text.contains("node.json has format 9"), "{code:?}: {text}");
    ensure!(text.contains("run the version that wrote it") && std::fs::read_to_string(&life)? == newer, "{text}");
    std::fs::write(&life, known)?;

    let before = contents(&dev.data())?;
    for nodes in ["--nodes=1", "--nodes=4"] {
        let args: Vec<String> = dev
            .args()
            .iter()
            .map(|arg| if arg.starts_with("--nodes=") { nodes.to_owned() } else { arg.clone() })
            .collect();
        let (code, text) = refused(&args)?;
        ensure!(code == Some(2) && text.contains("holds the data of nodes 1, 2, 3"), "{nodes}: {code:?}: {text}");
        ensure!(contents(&dev.data())? == before, "{nodes} changed a file");
    }
    dev.restart()?;
    all_there(&dev.client()?).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_a_cluster_refuses_its_damaged_log_while_the_others_serve() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    publish(&cluster.client(false)?).await?;
    ensure!(cluster.terminate(2, Duration::from_mins(1))?, "no clean stop");
    let file = cluster.data(2).join("log/log.redb");
    let pristine = std::fs::read(&file)?;
    for (what, left, words) in [("cut", 300_000, DAMAGED), ("emptied", 0, MISSING)] {
        std::fs::write(&file, &pristine[..left])?;
        let (code, text) = refused(&cluster.serve_args(2))?;
        ensure!(code == Some(1), "{what}: ended with {code:?}: {text}");
        for word in words.iter().copied().chain([file.to_str().unwrap_or_default()]) {
            ensure!(text.contains(word), "{what}: no {word:?} in: {text}");
        }
        ensure!(std::fs::read(&file)? == pristine[..left], "{what}: the file was changed");
        all_there(&cluster.client_of(1)?).await?;
    }
    std::fs::write(&file, &pristine)?;
    cluster.restart(2)?;
    all_there(&cluster.client_of(2)?).await
}
