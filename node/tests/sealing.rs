//! Nodes that lack the root key, vaults that an operator seals, and passphrases: real processes, as an operator meets them.

mod support;

use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::CallError;
use serde_json::Value;
use support::Cluster;
use support::ledger::{Load, TOPIC, judge};
use support::process::ensign;
use tokio::time::{Instant, sleep};

const PATIENCE: Duration = Duration::from_secs(90);
const LOOK: Duration = Duration::from_millis(100);

/// Runs a command with something on its standard input: its code, and what it printed and said.
fn run(args: &[&str], typed: &str) -> anyhow::Result<(Option<i32>, String, String)> {
    let mut command = ensign();
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    // A command that asks for nothing may be gone before it is told anything.
    let _ = child.stdin.take().context("a pipe")?.write_all(typed.as_bytes());
    let output = child.wait_with_output()?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((output.status.code(), text(output.stdout), text(output.stderr)))
}

fn unseal(socket: &Path, typed: &str) -> anyhow::Result<(Option<i32>, String, String)> {
    run(&["vault", "unseal", "--output", "json", "--socket", &socket.display().to_string()], typed)
}

fn status(cluster: &Cluster, node: u64) -> anyhow::Result<Value> {
    let (code, said, error) =
        run(&["vault", "status", "--output", "json", "--direct", &cluster.metrics_url(node)], "")?;
    ensure!(code == Some(0), "{error}");
    Ok(serde_json::from_str(&said)?)
}

async fn page(cluster: &Cluster, node: u64, name: &str) -> anyhow::Result<(u16, String)> {
    let answer = reqwest::get(format!("{}/{name}", cluster.metrics_url(node))).await?;
    Ok((answer.status().as_u16(), answer.text().await?))
}

/// Waits until what `/readyz` of a node says contains `text`.
async fn until_ready_says(cluster: &Cluster, node: u64, code: u16, text: &str) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let last = page(cluster, node, "readyz").await;
        match &last {
            Ok((found, said)) if *found == code && said.contains(text) => return Ok(()),
            _ => ensure!(Instant::now() < end, "not {code} with {text:?}, but {last:?}"),
        }
        sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_its_root_key_serves_on_says_why_and_unseals_by_itself_once_it_is_there() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.client_of(1)?.create_topic(TOPIC).await?;
    let key = cluster.dir.path().join("key-of-3/root.key");
    fs::create_dir(key.parent().context("a folder")?)?;
    cluster.kill(3)?;
    let settings = fs::read_to_string(cluster.config(3))?;
    let before = format!("root_key = \"{}/root.key\"", cluster.dir.path().display());
    ensure!(settings.contains(&before), "{settings}");
    fs::write(cluster.config(3), settings.replace(&before, &format!("root_key = \"{}\"", key.display())))?;

    // Missing: it serves with keys from the others, and says what it lacks wherever one would look.
    cluster.restart(3)?;
    until_ready_says(&cluster, 3, 503, "sealed: there is no root key at").await?;
    let (alive, said) = page(&cluster, 3, "healthz").await?;
    ensure!(alive == 200 && said.starts_with("ok\n") && said.contains("vault: sealed: there is no root key"), "{said}");
    ensure!(cluster.output(3).contains("the vault is sealed on this node"), "{}", cluster.output(3));
    let shown = status(&cluster, 3)?;
    ensure!(shown["nodes"][2]["state"] == "sealed" && shown["nodes"][0]["state"] == "unsealed", "{shown}");
    ensure!(shown["root_key"]["provider"] == "file" && shown["held"] == false, "{shown}");
    let (code, _, error) = unseal(&cluster.socket(3), "")?;
    ensure!(code == Some(7) && error.contains("there is no root key at"), "{code:?} {error}");
    let load = Load::start(vec![cluster.client_of(3)?]);
    load.wait_for_acks(50).await?;

    // Each other trouble, one after the other, without a restart; and no file is ever written.
    let right = fs::read(cluster.dir.path().join("root.key"))?;
    let wrong: Vec<u8> = right.iter().map(|byte| byte ^ 0x55).collect();
    let put = |bytes: &[u8], mode: u32| -> anyhow::Result<()> {
        fs::write(&key, bytes)?;
        Ok(fs::set_permissions(&key, Permissions::from_mode(mode))?)
    };
    put(b"short", 0o600)?;
    until_ready_says(&cluster, 3, 503, "is not a root key: not 32 bytes long").await?;
    put(&wrong, 0o644)?;
    until_ready_says(&cluster, 3, 503, "a root key is readable by its owner alone (chmod 600)").await?;
    put(&wrong, 0o600)?;
    until_ready_says(&cluster, 3, 503, "wrong root key: the vault needs root key").await?;
    ensure!(fs::read(&key)? == wrong, "a root key was overwritten");
    put(&right, 0o600)?;
    until_ready_says(&cluster, 3, 200, "ready").await?;
    let (code, said, error) = unseal(&cluster.socket(3), "")?;
    ensure!(code == Some(0) && said.contains("\"already\":true"), "{said}{error}");
    load.wait_for_acks(50).await?;
    let acked = load.finish().await?;
    judge(&cluster.client_of(1)?, &acked).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_seals_the_vault_and_publishers_go_on_where_they_stopped_once_it_is_unsealed() -> anyhow::Result<()>
{
    let mut cluster = Cluster::start(3)?;
    cluster.client_of(1)?.create_topic(TOPIC).await?;
    let credentials = cluster.credentials().display().to_string();
    let (code, _, error) = run(&["vault", "seal", "--credentials", &credentials], "")?;
    ensure!(code == Some(2) && error.contains("confirm with --yes"), "{code:?} {error}");
    let tenant = cluster.client(false)?.admin().seal_vault().await;
    ensure!(matches!(tenant, Err(CallError::PermissionDenied { .. })), "{tenant:?}");
    let load = Load::start(vec![cluster.client(false)?]);
    load.wait_for_acks(50).await?;

    let (code, said, error) = run(&["vault", "seal", "--yes", "--credentials", &credentials, "--output", "json"], "")?;
    ensure!(code == Some(0), "{error}");
    let sealed: Value = serde_json::from_str(&said)?;
    ensure!(sealed["keys_end_within_seconds"].as_u64().is_some_and(|within| (10..60).contains(&within)), "{said}");
    for node in 1..=3 {
        until_ready_says(&cluster, node, 503, "an operator has sealed it").await?;
        // Nothing is left to publish or read with.
        until_ready_says(&cluster, node, 503, "no lease on any key").await?;
    }
    let shown = status(&cluster, 2)?;
    ensure!(shown["held"] == true, "{shown}");
    // Publishers that were cut short go on where they stopped.
    let (code, said, error) = unseal(&cluster.socket(1), "")?;
    ensure!(code == Some(0) && said.contains("\"lifted\":true"), "{said}{error}");
    load.wait_for_acks(50).await?;
    let acked = load.finish().await?;
    judge(&cluster.client_of(1)?, &acked).await?;

    // A seal outlives every process, although each has the root key. Nobody need log in to order it.
    let socket = cluster.socket(3).display().to_string();
    let (code, said, error) = run(&["vault", "seal", "--yes", "--local", "--socket", &socket], "")?;
    ensure!(code == Some(0) && said.contains("no key is handed out any more"), "{said}{error}");
    for node in 1..=3 {
        cluster.kill(node)?;
    }
    cluster.restart_all()?;
    for node in 1..=3 {
        until_ready_says(&cluster, node, 503, "an operator has sealed it").await?;
    }

    let socket = fs::metadata(cluster.socket(2))?;
    ensure!(socket.file_type().is_socket() && socket.permissions().mode() & 0o777 == 0o600, "{socket:?}");
    let (code, said, error) = unseal(&cluster.socket(2), "")?;
    ensure!(code == Some(0) && said.contains("\"lifted\":true") && said.contains("\"sealed\":null"), "{said}{error}");
    for node in 1..=3 {
        until_ready_says(&cluster, node, 200, "ready").await?;
    }
    judge(&cluster.client_of(1)?, &acked).await?;
    let nowhere = cluster.dir.path().join("nowhere.sock");
    let (code, _, error) = unseal(&nowhere, "")?;
    ensure!(code == Some(5) && error.contains("--socket wants ensign.sock"), "{code:?} {error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vault_made_with_a_passphrase_waits_for_it_after_a_restart() -> anyhow::Result<()> {
    let mut cluster = Cluster::start_set(3, "[root]\nprovider = \"passphrase\"\n")?;
    cluster.client_of(1)?.create_topic(TOPIC).await?;
    let phrase = fs::read_to_string(cluster.passphrase())?;
    ensure!(phrase.trim_end().len() == 39, "a generated phrase has 32 letters and digits in groups of four");
    ensure!(!cluster.output(1).contains(phrase.trim_end()), "the phrase is in the log");
    // Nobody has typed it on the other nodes yet: they vote, and serve with keys that the first one grants.
    for node in 2..=3 {
        until_ready_says(&cluster, node, 503, "it waits for the passphrase: run `ensign vault unseal`").await?;
    }
    let load = Load::start(vec![cluster.client(false)?]);
    load.wait_for_acks(50).await?;

    for node in 1..=3 {
        cluster.kill(node)?;
    }
    cluster.restart_all()?;
    for node in 1..=3 {
        until_ready_says(&cluster, node, 503, "no lease on any key").await?;
    }
    let shown = status(&cluster, 1)?;
    let sealed = |node: &Value| node["state"] == "sealed" && node["provider"] == "passphrase";
    ensure!(shown["nodes"].as_array().is_some_and(|nodes| nodes.len() == 3 && nodes.iter().all(sealed)), "{shown}");

    let socket = cluster.socket(3);
    let (code, _, error) = unseal(&socket, "not the phrase that was made\n")?;
    ensure!(code == Some(4) && error.contains("wrong passphrase"), "{code:?} {error}");
    let (code, _, error) = unseal(&socket, "")?;
    ensure!(code == Some(2) && error.contains("the passphrase is empty"), "{code:?} {error}");
    // The pause after a wrong one is a second and may be over: then it is told as wrong once more, and the next is two.
    let mut told = String::new();
    for _ in 0..4 {
        told = unseal(&socket, "nor is this one\n")?.2;
        if told.contains("the next attempt can be made in") {
            break;
        }
    }
    ensure!(told.contains("the next attempt can be made in"), "{told}");
    let end = Instant::now() + PATIENCE;
    loop {
        let (code, said, error) = unseal(&socket, &phrase)?;
        if code == Some(0) {
            ensure!(said.contains("\"already\":false") && said.contains("\"sealed\":null"), "{said}");
            break;
        }
        ensure!(code == Some(5) && Instant::now() < end, "{code:?} {error}");
        sleep(LOOK).await;
    }
    // One is enough to grant, and the publisher of before goes on by itself.
    load.wait_for_acks(50).await?;
    until_ready_says(&cluster, 3, 200, "ready").await?;
    let (code, said, error) =
        run(&["vault", "unseal", "--socket", &cluster.socket(1).display().to_string(), "--passphrase-fd", "9"], "")?;
    ensure!(code == Some(2) && error.contains("file descriptor 9 cannot be read"), "{code:?} {said}{error}");
    for node in 1..=2 {
        let (code, _, error) = unseal(&cluster.socket(node), &phrase)?;
        ensure!(code == Some(0), "node {node}: {error}");
    }
    let acked = load.finish().await?;
    judge(&cluster.client_of(1)?, &acked).await?;
    for node in 1..=3 {
        ensure!(!cluster.output(node).contains(phrase.trim_end()), "the phrase is in the log of node {node}");
    }
    Ok(())
}
