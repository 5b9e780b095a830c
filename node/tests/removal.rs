//! Nodes that are lost for good: what the operator is told, what is refused, and the way out.

mod support;

use std::collections::BTreeSet;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{CallError, Event, Mime, Place, PublisherOptions, Start, SubscriberOptions, admin_api as pb};
use ensign_proto::NodeId;
use serde_json::Value;
use support::ledger::{Load, TOPIC, judge};
use support::process::ensign;
use support::refused::refused;
use support::{Cluster, Process, free_port, read_all};
use tokio::time::{Instant, sleep};

/// How long anything may take on a loaded machine.
const PATIENCE: Duration = Duration::from_mins(3);

/// Runs a command with the operator's credentials.
fn run(cluster: &Cluster, node: u64, args: &[&str]) -> anyhow::Result<Output> {
    let (endpoint, auth) = cluster.client_addresses(node);
    let mut command = ensign();
    command
        .args(args)
        .args(["--endpoint", &endpoint, "--auth-url", &auth])
        .env("ENSIGN_CREDENTIALS", cluster.credentials());
    command.stdin(std::process::Stdio::null()).output().context("the command runs")
}

/// What a command says in JSON, whatever its code.
fn json(cluster: &Cluster, node: u64, args: &[&str]) -> anyhow::Result<(Option<i32>, Value)> {
    let output = run(cluster, node, &[args, &["--output", "json"]].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.code(), serde_json::from_slice(&output.stdout).with_context(|| format!("{args:?}: {said}"))?))
}

/// Runs a command again and again until it ends like this: a node that was just killed is not known to be dead yet. What it said on stderr.
async fn until_code(cluster: &Cluster, node: u64, args: &[&str], code: i32, words: &str) -> anyhow::Result<String> {
    let end = Instant::now() + PATIENCE;
    loop {
        let output = run(cluster, node, args)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() == Some(code) && said.contains(words) {
            return Ok(said);
        }
        ensure!(
            Instant::now() < end,
            "{args:?} ends with {:?}, not {code} and {words:?}: {said}",
            output.status.code()
        );
        sleep(Duration::from_millis(300)).await;
    }
}

fn at(replication: u32) -> Place {
    Place { replication: Some(replication), ..Place::default() }
}

async fn partition(cluster: &Cluster, node: u64, topic: &str) -> anyhow::Result<pb::PartitionInfo> {
    let filter = pb::ListPartitionsRequest { topic: topic.to_owned(), ..Default::default() };
    cluster.admin_of(node)?.admin().partitions(filter).await?.into_iter().next().context("the topic has a partition")
}

async fn publish(cluster: &Cluster, node: u64, topic: &str) -> anyhow::Result<()> {
    let publisher = cluster.client_of(node)?.publisher(topic, PublisherOptions::default()).await?;
    publisher.publish(Event::new("kept").with_mimetype(Mime::TextPlain)).await?.await?;
    publisher.close().await;
    Ok(())
}

/// Makes a topic whose only replica is on node 3.
async fn only_on_3(cluster: &Cluster, topic: &str) -> anyhow::Result<()> {
    cluster.client(false)?.create_topic_at(topic, &at(1)).await?;
    let output = run(cluster, 1, &["partition", "move", topic, "--to", "3", "--wait", "--timeout", "2m"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(partition(cluster, 1, topic).await?.replicas == [3], "it is on node 3 alone");
    Ok(())
}

async fn until_listed(cluster: &Cluster, node: u64, count: usize) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let nodes = cluster.admin_of(node)?.admin().nodes(None).await?;
        if nodes.len() == count && nodes.iter().all(|it| it.silent_for.is_none()) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "not every node registers: {nodes:?}");
        sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_died_with_the_only_replica_is_removed_once_its_topic_is_given_up() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(4)?;
    until_listed(&cluster, 1, 4).await?;
    let (client, only) = (cluster.client(false)?, "single");
    // As many replicas on each node, so that none is moved for its share.
    client.create_topic_at(TOPIC, &at(3)).await?;
    client.create_topic_at("fourth", &at(1)).await?;
    ensure!(partition(&cluster, 1, TOPIC).await?.replicas == [1, 2, 3], "the first three hold it");
    only_on_3(&cluster, only).await?;
    publish(&cluster, 1, only).await?;

    // While it answers, nothing is forced.
    until_code(&cluster, 1, &["node", "remove", "3", "--force", "--yes"], 7, "node 3 answers: drain it").await?;
    let said = until_code(&cluster, 1, &["node", "remove", "3", "--force"], 2, "confirm with --yes").await?;
    ensure!(said.contains(only) && said.contains("its number never comes back"), "{said}");

    let load = Load::start(vec![cluster.client_of(1)?]);
    load.wait_for_acks(50).await?;
    cluster.kill(3)?;
    // What it alone can prove is named, with what to do.
    let force = ["node", "remove", "3", "--force", "--yes"];
    let said = until_code(&cluster, 1, &force, 7, "no majority without it").await?;
    ensure!(said.contains(only) && !said.contains(TOPIC) && said.contains("ensign topic destroy"), "{said}");

    // A drain does not get on, says why, and ends the wait when it is told to.
    let drain = ["node", "drain", "3", "--wait", "--timeout", "8s"];
    let said = until_code(&cluster, 1, &drain, 9, "in the way").await?;
    ensure!(said.contains(&format!("{only}: its only replica, on node 3, does not answer")), "{said}");
    ensure!(said.contains("the drain of node 3 is not over after 8s"), "{said}");
    // So does the doctor.
    let end = Instant::now() + PATIENCE;
    let stuck = loop {
        let (code, found) = json(&cluster, 1, &["doctor", "--over", "100ms"])?;
        let stuck = found["findings"].as_array().into_iter().flatten().find(|it| it["code"] == "move-stuck").cloned();
        match stuck {
            Some(stuck) => break (code, stuck),
            None => ensure!(Instant::now() < end, "no move-stuck: {found}"),
        }
    };
    ensure!(stuck.0 == Some(8) && stuck.1["nodes"] == serde_json::json!([3]), "{stuck:?}");
    ensure!(stuck.1["what"].as_str().is_some_and(|what| what.contains(only)), "{stuck:?}");
    // Somebody who asks for such a move by hand hears it at once.
    let refused = cluster.admin_of(1)?.admin().move_partition(only, [NodeId(1)]).await;
    ensure!(
        matches!(&refused, Err(CallError::Precondition { message }) if message.contains("its only replica")),
        "{refused:?}"
    );

    // The way out: the topic is given up by name, although nobody leads it, and its name is free again.
    let output = run(&cluster, 1, &["topic", "destroy", only, "--yes"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    until_code(&cluster, 1, &["topic", "describe", only], 3, "").await?;
    until_code(&cluster, 1, &force, 0, "").await?;
    // The others go on, and what it held is made anew on the fourth.
    let end = Instant::now() + PATIENCE;
    loop {
        let now = partition(&cluster, 1, TOPIC).await?;
        if now.r#move.is_none() && now.replicas == [1, 2, 4] {
            break;
        }
        ensure!(Instant::now() < end, "the replica is not made anew: {now:?}");
        sleep(Duration::from_millis(300)).await;
    }
    load.wait_for_acks(100).await?;
    let acked = load.finish().await?;
    judge(&cluster.client_of(4)?, &acked).await?;
    // And its votes went to the fourth, or nowhere.
    let node = cluster.admin_of(1)?.admin().nodes(Some(NodeId(3))).await?;
    ensure!(node[0].state() == pb::NodeState::Removed, "{node:?}");
    let end = Instant::now() + PATIENCE;
    while !cluster.admin_of(1)?.admin().nodes(Some(NodeId(3))).await?[0].votes.is_empty() {
        ensure!(Instant::now() < end, "the removed node keeps its votes");
        sleep(Duration::from_millis(300)).await;
    }
    client.create_topic_at(only, &at(1)).await.context("its name is free")?;
    // Should its machine come back, it hears why it may not.
    let refused = format!("{:#}", cluster.restart(3).err().context("a node that was removed is let in")?);
    ensure!(
        refused.contains("exit status: 11") && refused.contains("node 3 was removed from the cluster, for ever"),
        "{refused}"
    );
    ensure!(!refused.contains("no lease on any key"), "the vault is not to blame: {refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_three_nodes_a_lost_one_is_removed_and_the_two_that_are_left_go_on() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(3)?;
    until_listed(&cluster, 1, 3).await?;
    cluster.client(false)?.create_topic_at(TOPIC, &at(3)).await?;
    publish(&cluster, 1, TOPIC).await?;
    cluster.client(false)?.create_topic_at("pair", &at(2)).await?;
    let output = run(&cluster, 1, &["partition", "move", "pair", "--to", "2,3", "--wait"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    publish(&cluster, 1, "pair").await?;
    cluster.kill(3)?;
    let force = ["node", "remove", "3", "--force", "--yes"];
    until_code(&cluster, 1, &force, 7, "a partition that has no majority without it (pair)").await?;
    // Nobody leads what is left of it, and yet what it knows to be committed can be read before it is given up.
    let mut left = cluster.client_of(2)?.subscribe("pair", Start::Earliest, SubscriberOptions::default()).await?;
    let first = tokio::time::timeout(PATIENCE, left.next()).await.context("nothing is read")??;
    ensure!(first.event()?.data == b"kept"[..], "another event");
    let output = run(&cluster, 1, &["topic", "destroy", "pair", "--yes"])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    until_code(&cluster, 1, &force, 0, "").await?;
    publish(&cluster, 2, TOPIC).await?;
    // The votes of the catalog and the vault go although nobody takes them; the partition waits for a third node, and the doctor says so.
    let end = Instant::now() + PATIENCE;
    loop {
        let (_, found) = json(&cluster, 1, &["doctor", "--over", "100ms"])?;
        let codes: BTreeSet<&str> =
            found["findings"].as_array().into_iter().flatten().filter_map(|it| it["code"].as_str()).collect();
        if codes.contains("move-stuck") && codes.contains("under-replicated") && !codes.contains("voter-lost") {
            break;
        }
        ensure!(Instant::now() < end, "what is missing is not told: {found}");
        sleep(Duration::from_millis(300)).await;
    }
    // One that stays away for good cannot be forced out of two.
    cluster.kill(2)?;
    let refused = until_code(&cluster, 1, &["node", "remove", "2", "--force", "--yes"], 5, "").await;
    ensure!(refused.is_ok(), "the catalog has no majority, and nothing is decided: {refused:?}");
    cluster.restart(2)?;
    ensure!(read_all(&cluster.client_of(2)?, TOPIC).await?.len() == 2, "nothing is lost");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_replica_knows_who_leads() -> anyhow::Result<()> {
    let cluster = Cluster::start(3)?;
    until_listed(&cluster, 1, 3).await?;
    cluster.client(false)?.create_topic_at("orders", &at(1)).await?;
    let holder = partition(&cluster, 1, "orders").await?.replicas[0];
    for node in cluster.ids() {
        let end = Instant::now() + PATIENCE;
        loop {
            let (_, listed) = json(&cluster, node, &["partition", "list"])?;
            if listed[0]["leader"] == holder {
                break;
            }
            ensure!(Instant::now() < end, "node {node} does not know who leads: {listed}");
            sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_removed_while_it_runs_stops_with_a_code_of_its_own() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(4)?;
    until_listed(&cluster, 1, 4).await?;
    cluster.client(false)?.create_topic_at(TOPIC, &at(3)).await?;
    // The drain is over only once its votes are elsewhere, so that it can be removed at once.
    let drained = run(&cluster, 1, &["node", "drain", "4", "--wait", "--timeout", "3m"])?;
    ensure!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
    let removed = run(&cluster, 1, &["node", "remove", "4", "--yes"])?;
    ensure!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    let code = cluster.ended(4, PATIENCE)?;
    let log = cluster.output(4);
    ensure!(code == Some(11), "it ended with {code:?}:\n{log}");
    ensure!(log.matches("this node was removed from the cluster, and stops").count() == 1, "{log}");
    ensure!(log.contains("joins with an empty data directory"), "{log}");
    publish(&cluster, 2, TOPIC).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_original_of_a_copied_data_directory_says_what_happened_and_is_back_after_one_restart() -> anyhow::Result<()>
{
    let mut cluster = Cluster::start(3)?;
    until_listed(&cluster, 1, 3).await?;
    ensure!(cluster.terminate(3, PATIENCE)?, "no clean stop");
    let copy = cluster.dir.path().join("copy");
    let copied = std::process::Command::new("cp").arg("-r").arg(cluster.data(3)).arg(&copy).status()?;
    ensure!(copied.success(), "not copied");
    cluster.restart(3)?;

    // The copy begins the same life, and hears of it; its next start begins one that counts, and the original is cut off.
    let peers = format!("127.0.0.1:{}", free_port()?);
    let mut args = cluster.serve_args(3);
    let list = cluster
        .ids()
        .into_iter()
        .map(|id| if id == 3 { format!("3={peers}") } else { format!("{id}={}", cluster.peer_address(id)) });
    args.extend([
        format!("--data-dir={}", copy.display()),
        format!("--peers-listen={peers}"),
        format!("--peers={}", list.collect::<Vec<_>>().join(",")),
    ]);
    args.extend(["grpc", "http", "metrics"].map(|name| format!("--{name}-listen=127.0.0.1:0")));
    let (code, said) = refused(&args)?;
    ensure!(code == Some(11) && said.contains("two processes run under one node.id"), "{code:?}: {said}");
    let mut twin = Process::start("the copy", &args, &cluster.dir.path().join("copy.log"), None)?;
    let end = Instant::now() + PATIENCE;
    while !cluster.output(3).contains("another process runs as this node, and has taken its place") {
        ensure!(Instant::now() < end, "the original does not notice:\n{}", cluster.output(3));
        sleep(Duration::from_millis(100)).await;
    }
    let ready = reqwest::get(format!("{}/readyz", cluster.metrics_url(3))).await?;
    let (code, said) = (ready.status(), ready.text().await?);
    ensure!(
        code == 503 && said.contains("Stop the one that does not belong") && said.contains("restart this one"),
        "{code}: {said}"
    );
    twin.kill()?;
    cluster.kill(3)?;
    cluster.restart(3).context("one restart is enough")?;
    Ok(())
}
