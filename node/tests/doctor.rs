//! What an operator is told when nodes go: by any node while there is a quorum, by the node itself when there is none.

mod support;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use support::Cluster;
use support::process::ensign;
use tokio::time::Instant;

/// Runs a command; its code, and the JSON that it printed.
fn run(cluster: &Cluster, args: &[&str]) -> anyhow::Result<(Option<i32>, Value)> {
    let output = ensign()
        .args(args)
        .args(["--output", "json"])
        .env("ENSIGN_CREDENTIALS", cluster.credentials())
        .output()
        .context("the command runs")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let json = serde_json::from_slice(&output.stdout).with_context(|| format!("{args:?}: {said}"))?;
    Ok((output.status.code(), json))
}

/// What the doctor found, but for the disk, which is the test machine's own.
fn findings(diagnosis: &Value) -> Vec<&Value> {
    let all = diagnosis["findings"].as_array().into_iter().flatten();
    all.filter(|finding| finding["code"] != "disk-pressure").collect()
}

fn finding<'a>(diagnosis: &'a Value, code: &str) -> Option<&'a Value> {
    findings(diagnosis).into_iter().find(|finding| finding["code"] == code)
}

/// Asks until the doctor has found `code`: elections take their time.
fn until_found(cluster: &Cluster, args: &[&str], code: &str) -> anyhow::Result<(Option<i32>, Value)> {
    let begun = Instant::now();
    loop {
        // Right after a loss no node may vouch for a login, so a failure is asked again, too.
        let last = run(cluster, args);
        match last {
            Ok(found) if finding(&found.1, code).is_some() => return Ok(found),
            _ if begun.elapsed() < Duration::from_mins(1) => std::thread::sleep(Duration::from_millis(200)),
            Ok((_, diagnosis)) => anyhow::bail!("no {code}: {diagnosis}"),
            Err(error) => return Err(error),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_names_lost_nodes_with_a_quorum_and_without() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    cluster.client(false)?.create_topic("orders").await?;

    // What a start tells a moment later, and what a node that lags does not know yet, is waited for.
    let begun = Instant::now();
    loop {
        let (code, status) = run(&cluster, &["cluster", "status"])?;
        let nodes = status["nodes"].as_array().context("nodes")?;
        let serving = nodes.iter().filter(|node| node["state"] == "serving").count();
        if (code, serving) == (Some(0), 3) && status["partitions"] == 1 {
            break;
        }
        ensure!(begun.elapsed() < Duration::from_mins(1), "three nodes serve one partition: {status}");
    }
    // A loaded machine may still be electing.
    loop {
        let (_, diagnosis) = run(&cluster, &["doctor", "--over", "100ms"])?;
        if findings(&diagnosis).is_empty() {
            break;
        }
        ensure!(begun.elapsed() < Duration::from_mins(1), "a healthy cluster is found unwell: {diagnosis}");
    }

    cluster.kill(3)?;
    let (code, diagnosis) = until_found(&cluster, &["doctor", "--over", "100ms"], "node-silent")?;
    let silent = finding(&diagnosis, "node-silent").context("found")?;
    assert_eq!((code, &silent["severity"], &silent["nodes"][0]), (Some(8), &"critical".into(), &3.into()), "{silent}");
    assert!(silent["remedy"].as_str().is_some_and(|remedy| remedy.starts_with("start it")), "{silent}");

    cluster.kill(2)?;
    let url = cluster.metrics_url(1);
    let direct = ["doctor", "--over", "100ms", "--direct", &url];
    let (code, diagnosis) = until_found(&cluster, &direct, "no-quorum")?;
    let lost = finding(&diagnosis, "no-quorum").context("found")?;
    assert_eq!(code, Some(8), "{diagnosis}");
    assert!(lost["remedy"].as_str().is_some_and(|remedy| remedy.contains("bring nodes 2, 3 back")), "{lost}");
    assert!(!diagnosis.to_string().contains("orders"), "nobody has logged in: {diagnosis}");
    Ok(())
}

#[test]
fn a_wrong_address_is_told_as_such() -> anyhow::Result<()> {
    let output = ensign().args(["doctor", "--direct", "http://127.0.0.1:1"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(said.contains("--direct wants the metrics address of a node that runs"), "{said}");
    Ok(())
}
