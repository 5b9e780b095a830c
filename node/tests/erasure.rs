//! After `revoke --wait erased` the wrapped key is in no file of any node, and what the vault signed of it convinces a third party.

mod support;

use std::io::BufRead as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use ensign_client::{Event, Mime, PublisherOptions};
use ensign_keyvault::testing::wrapped_keys;
use ensign_proto::{ByteCount, GroupId};
use ensign_storage::{FileDisk, FrameLog, LogConfig, NodeLog as _};
use serde_json::Value;
use support::process::ensign;
use support::{Cluster, read_all};

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

/// A search that is quick in a build for tests: it goes from one first byte of the pattern to the next.
fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    let mut rest = bytes;
    while rest.skip_until(pattern[0]).is_ok_and(|skipped| skipped > 0) {
        if bytes[bytes.len() - rest.len() - 1..].starts_with(pattern) {
            return true;
        }
    }
    false
}

/// Which files of a node hold any of the patterns.
fn search(folder: &Path, patterns: &[&[u8]]) -> anyhow::Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    files(folder, &mut all)?;
    let mut hits = Vec::new();
    for path in all {
        // A file of a running node may go away meanwhile.
        let Ok(bytes) = std::fs::read(&path) else { continue };
        if patterns.iter().any(|pattern| contains(&bytes, pattern)) {
            hits.push(path);
        }
    }
    Ok(hits)
}

/// Every wrapped key in the vault's log of a node that is stopped, from a copy of its file.
fn keys_of(data: &Path) -> anyhow::Result<Vec<Bytes>> {
    let copy = tempfile::tempdir()?;
    std::fs::copy(data.join("vault/log.redb"), copy.path().join("log.redb"))?;
    let (log, _writer) = FrameLog::reopen(Arc::new(FileDisk), copy.path(), LogConfig::small())?;
    let group = log.group(GroupId::VAULT);
    let state = group.state();
    let first = state.purged.map_or(ensign_proto::LogIndex(0), |purged| purged.index.next());
    let last = state.last.context("the vault's log is empty")?.index;
    let entries = group.read(first..last.next(), ByteCount(u64::MAX))?;
    Ok(entries.iter().flat_map(|entry| wrapped_keys(&entry.payload)).collect())
}

fn run(mut command: Command) -> anyhow::Result<Output> {
    command.output().context("cannot run ensign")
}

fn key(cluster: &Cluster, args: &[&str]) -> anyhow::Result<Value> {
    let mut command = ensign();
    command.arg("key").args(args).arg("--credentials").arg(cluster.credentials()).args(["--output", "json"]);
    let output = run(command)?;
    ensure!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn verify(file: &Path, keys: &str, pin: &str) -> anyhow::Result<(Option<i32>, String)> {
    let mut command = ensign();
    command.args(["receipt", "verify"]).arg(file).args(["--keys", keys, "--fingerprint", pin, "--output", "json"]);
    let output = run(command)?;
    let text = if output.status.success() { &output.stdout } else { &output.stderr };
    Ok((output.status.code(), String::from_utf8_lossy(text).into_owned()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_erased_key_is_in_no_file_of_any_node_and_a_third_party_can_verify_that_it_was_said() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    let client = cluster.client(false)?;
    client.create_topic("drawer").await?;
    let publisher = client.publisher("drawer", PublisherOptions::default()).await?;
    publisher.publish(Event::new("text".to_owned()).with_mimetype(Mime::TextPlain)).await?.await?;
    publisher.close().await;
    // One more version, which lives on: its bytes show that the search still finds what is there.
    key(&cluster, &["rotate"])?;

    cluster.kill(1)?;
    let keys = keys_of(&cluster.data(1))?;
    cluster.restart(1)?;
    let [dead, living] = &keys[..] else { anyhow::bail!("{} wrapped keys, and two were made", keys.len()) };
    // salt[32] ‖ commitment[32] ‖ ciphertext[32] ‖ tag[16]
    ensure!(dead.len() == 112 && dead != living, "this is no wrapped key: {} bytes", dead.len());
    let patterns = [&dead[..], &dead[64..80], &dead[80..96]];
    for id in cluster.ids() {
        let hits = search(&cluster.data(id), &patterns)?;
        ensure!(hits.iter().any(|path| path.ends_with("vault/log.redb")), "node {id} holds the key nowhere: {hits:?}");
    }

    let folder = tempfile::tempdir()?;
    let receipt = folder.path().join("revoked.jws");
    let receipt_text = receipt.to_str().context("a path is text")?;
    let args = ["revoke", "--version", "1", "--yes", "--wait", "erased", "--receipt", receipt_text];
    let revoked = key(&cluster, &args)?;
    ensure!(revoked["stage"] == "erased" && revoked["versions"] == serde_json::json!([1]), "{revoked}");
    for id in cluster.ids() {
        let hits = search(&cluster.data(id), &patterns)?;
        ensure!(hits.is_empty(), "node {id} says that it has erased the key, and holds it in {hits:?}");
        let alive = search(&cluster.data(id), &[living])?;
        ensure!(!alive.is_empty(), "the search finds nothing at all on node {id}");
    }
    let shown = key(&cluster, &["describe"])?;
    ensure!(shown["versions"][0]["erased"] == true && shown["versions"][1]["erased"] == false, "{shown}");

    // What anybody needs: the file, the published keys, and the fingerprint that was printed when the cluster was made.
    let credentials: Value = serde_json::from_slice(&std::fs::read(cluster.credentials())?)?;
    let auth = credentials["auth_url"].as_str().context("where to log in")?;
    let url = format!("{auth}/.well-known/ensign-receipts.json");
    let output = cluster.output(1);
    let printed = output.split("fingerprint").nth(1).context("the bootstrap printed no fingerprint")?;
    let is_text = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let pin: String = printed.chars().skip_while(|c| matches!(c, '=' | '"' | ':' | ' ')).take_while(is_text).collect();
    let (code, text) = verify(&receipt, &url, &pin)?;
    ensure!(code == Some(0), "{text}");
    let verified: Value = serde_json::from_str(&text)?;
    ensure!(verified[0]["receipt"]["kind"] == "revoked" && verified[1]["receipt"]["kind"] == "erased", "{verified}");
    ensure!(verified[0]["receipt"]["versions"][0]["kek_id"] == shown["versions"][0]["kek_id"], "{verified}");
    ensure!(verified[1]["receipt"]["erased_through"].as_object().map(serde_json::Map::len) == Some(3), "{verified}");

    // Offline: the keys in a file. And everything that must not be believed.
    let document = reqwest::get(&url).await?.text().await?;
    let saved = folder.path().join("keys.json");
    std::fs::write(&saved, &document)?;
    let saved = saved.to_str().context("a path is text")?;
    ensure!(verify(&receipt, saved, &pin)?.0 == Some(0), "not with the keys in a file");
    let wrong = verify(&receipt, saved, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k")?;
    ensure!(wrong.0 == Some(10) && wrong.1.contains("has the fingerprint"), "{wrong:?}");
    let altered = folder.path().join("altered.jws");
    let lines = std::fs::read_to_string(&receipt)?;
    let (first, _) = lines.split_once('\n').context("two receipts, one a line")?;
    let mut bytes = first.as_bytes().to_vec();
    let place = first.find('.').context("a JWS has dots")? + 40;
    bytes[place] = if bytes[place] == b'A' { b'B' } else { b'A' };
    std::fs::write(&altered, &bytes)?;
    let refused = verify(&altered, saved, &pin)?;
    ensure!(refused.0 == Some(10) && refused.1.contains("line 1: the signature does not fit"), "{refused:?}");
    std::fs::write(&altered, "")?;
    ensure!(verify(&altered, saved, &pin)?.0 == Some(2), "an empty file holds no receipt");
    ensure!(verify(&receipt, folder.path().join("none").to_str().context("text")?, &pin)?.0 == Some(2), "no such file");

    // All of it again after every node was killed: the same bytes, and still nothing on any disk.
    let before = key(&cluster, &["receipts"])?;
    ensure!(before[0]["receipt"] == lines.lines().next().unwrap_or_default(), "{before}");
    for id in cluster.ids() {
        cluster.kill(id)?;
    }
    cluster.restart_all()?;
    ensure!(key(&cluster, &["receipts"])? == before, "the receipts differ after a restart");
    for id in cluster.ids() {
        let hits = search(&cluster.data(id), &patterns)?;
        ensure!(hits.is_empty(), "node {id} after a restart: {hits:?}");
    }
    let topic = read_all(&cluster.client(false)?, "drawer").await;
    ensure!(topic.is_err(), "what was sealed under the version is read: {topic:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_built_is_refused_before_anything_is_destroyed() -> anyhow::Result<()> {
    let cluster = Cluster::start(1)?;
    let mut command = ensign();
    command.args(["key", "revoke", "--all", "--yes", "--wait", "unrecoverable", "--credentials"]);
    command.arg(cluster.credentials());
    let output = run(command)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(7) && text.contains("is not built yet") && text.contains("rotate-root"),
        "{text}"
    );
    ensure!(key(&cluster, &["describe"])?["state"] == "enabled", "the ring was revoked");
    Ok(())
}
