//! Replicas that move between real processes: nothing that was acked is lost, doubled or reordered on the way.

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{Admin, CallError, Place, admin_api as pb};
use ensign_proto::NodeId;
use support::Cluster;
use support::ledger::{Load, TOPIC, judge};
use support::machines::{Machines, RootKey};

/// How long anything may take on a loaded machine: not a promise.
const PATIENCE: Duration = Duration::from_mins(3);
const LOOK_EVERY: Duration = Duration::from_millis(200);

async fn partition(admin: &Admin, topic: &str) -> anyhow::Result<pb::PartitionInfo> {
    let filter = pb::ListPartitionsRequest { topic: topic.to_owned(), ..Default::default() };
    admin.partitions(filter).await?.into_iter().next().context("the topic has a partition")
}

/// Looks until `what` holds, also while nodes are down.
async fn until<T, F>(why: &str, look: impl Fn() -> F, what: impl Fn(&T) -> bool) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
    T: std::fmt::Debug,
{
    let mut last = String::from("nothing");
    let looking = async {
        loop {
            match look().await {
                Ok(seen) if what(&seen) => return seen,
                seen => last = format!("{seen:?}"),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let found = tokio::time::timeout(PATIENCE, looking).await;
    found.with_context(|| format!("{why}; last seen: {last}"))
}

async fn node(admin: &Admin, id: u64) -> anyhow::Result<pb::Node> {
    admin.nodes(Some(NodeId(id))).await?.into_iter().next().context("the node is listed")
}

/// Waits until every node is known: only then is it certain who has no replica, and who may take one.
async fn registered(admin: &Admin, count: usize) -> anyhow::Result<()> {
    let look = || async { anyhow::Ok(admin.nodes(None).await?) };
    until("not every node registers", look, |nodes: &Vec<pb::Node>| {
        nodes.len() == count && nodes.iter().all(|node| node.silent_for.is_none())
    })
    .await
    .map(drop)
}

async fn settled(admin: &Admin, topic: &str) -> anyhow::Result<pb::PartitionInfo> {
    let look = || partition(admin, topic);
    until("the move does not end", look, |it: &pb::PartitionInfo| it.r#move.is_none()).await
}

fn three() -> Place {
    Place { replication: Some(3), ..Place::default() }
}

fn nodes(numbers: &[u64]) -> Vec<NodeId> {
    numbers.iter().copied().map(NodeId).collect()
}

/// The node of `all` that has no replica, and one that has one, does not lead and shall stay.
fn free_and_home(all: &[u64], partition: &pb::PartitionInfo, leader: u64) -> anyhow::Result<(u64, u64)> {
    let free =
        all.iter().copied().find(|node| !partition.replicas.contains(node)).context("a node without a replica")?;
    let home =
        partition.replicas.iter().copied().find(|node| *node != leader).context("a replica that does not lead")?;
    Ok((free, home))
}

async fn leader(cluster: &Cluster, topic: &str) -> anyhow::Result<u64> {
    // Only who holds a replica knows.
    let look = || async {
        for id in cluster.ids() {
            let Ok(status) = cluster.admin_of(id)?.admin().cluster_status().await else { continue };
            let group = status.groups.iter().find(|group| group.name == topic);
            if let Some(leader) = group.map(|group| group.leader).filter(|leader| *leader != 0) {
                return anyhow::Ok(leader);
            }
        }
        anyhow::Ok(0)
    };
    until("nobody leads", look, |leader| *leader != 0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_move_under_load_and_nothing_is_lost_also_when_the_leader_dies_in_the_middle() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(4)?;
    let all = cluster.ids();
    let admin = cluster.client(true)?.admin();
    registered(&admin, 4).await?;
    cluster.client(false)?.create_topic_at(TOPIC, &three()).await?;
    let mut now = partition(&admin, TOPIC).await?;
    ensure!(now.replicas.len() == 3, "three of four nodes hold it: {now:?}");
    let (_, home) = free_and_home(&all, &now, leader(&cluster, TOPIC).await?)?;
    let load = Load::start(vec![cluster.client_of(home)?, cluster.client_of(home)?]);
    load.wait_for_acks(200).await?;

    // The leader moves out whenever it is not the node that the publishers talk to.
    for round in 0..4_u64 {
        let leads = leader(&cluster, TOPIC).await?;
        let free = all.iter().copied().find(|node| !now.replicas.contains(node)).context("a free node")?;
        let leaves = now.replicas.iter().copied().find(|node| *node == leads && *node != home);
        let leaves =
            leaves.or_else(|| now.replicas.iter().copied().find(|node| *node != home)).context("one that goes")?;
        let target: Vec<u64> = now.replicas.iter().copied().filter(|node| *node != leaves).chain([free]).collect();
        admin.move_partition(TOPIC, nodes(&target)).await?;
        now = settled(&admin, TOPIC).await?;
        ensure!(now.replicas.iter().collect::<BTreeSet<_>>() == target.iter().collect(), "{now:?} is not {target:?}");
        ensure!(now.assignment == round + 1, "{now:?}");
        load.wait_for_acks(200).await?;
    }

    // Begun and turned round.
    let free = all.iter().copied().find(|node| !now.replicas.contains(node)).context("a free node")?;
    let goes = now.replicas.iter().copied().find(|node| *node != home).context("one that goes")?;
    let target: Vec<u64> = now.replicas.iter().copied().filter(|node| *node != goes).chain([free]).collect();
    admin.move_partition(TOPIC, nodes(&target)).await?;
    match admin.cancel_move(TOPIC).await {
        // It was faster.
        Ok(_) | Err(CallError::Precondition { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    now = settled(&admin, TOPIC).await?;
    load.wait_for_acks(200).await?;

    // A node that leaves dies as soon as the move has begun.
    let leads = leader(&cluster, TOPIC).await?;
    let free = all.iter().copied().find(|node| !now.replicas.contains(node)).context("a free node")?;
    let victim = now.replicas.iter().copied().find(|node| *node == leads && *node != home);
    let victim = victim.or_else(|| now.replicas.iter().copied().find(|node| *node != home)).context("a victim")?;
    let target: Vec<u64> = now.replicas.iter().copied().filter(|node| *node != victim).chain([free]).collect();
    admin.move_partition(TOPIC, nodes(&target)).await?;
    cluster.kill(victim)?;
    let moved = settled(&admin, TOPIC).await?;
    ensure!(moved.replicas.iter().collect::<BTreeSet<_>>() == target.iter().collect(), "{moved:?} is not {target:?}");
    load.wait_for_acks(200).await?;
    let partings = |log: &str| log.matches("the replica on this node is not needed any more").count();
    let before = partings(&cluster.output(victim));
    cluster.restart(victim)?;
    // It comes back, learns that its replica is elsewhere, and lets go of it.
    let log = || async { anyhow::Ok(cluster.output(victim)) };
    until("the victim keeps its replica", log, |log: &String| partings(log) > before).await?;
    load.wait_for_acks(200).await?;

    let acked = load.finish().await?;
    for id in &moved.replicas {
        let rows = judge(&cluster.client_of(*id)?, &acked).await.with_context(|| format!("read at node {id}"))?;
        ensure!(rows >= 1_400, "only {rows} events: the test did not test");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_is_emptied_and_gets_its_share_back() -> anyhow::Result<()> {
    let cluster = Cluster::start(4)?;
    let admin = cluster.client(true)?.admin();
    registered(&admin, 4).await?;
    let client = cluster.client(false)?;
    for n in 0..4 {
        client.create_topic_at(&format!("topic-{n}"), &three()).await?;
    }
    let before = node(&admin, 4).await?;
    ensure!(before.replicas == 3, "four topics of three replicas on four nodes: {before:?}");

    let refused = admin.set_node_state(NodeId(4), pb::NodeState::Removed).await;
    let Err(CallError::Precondition { message }) = &refused else { anyhow::bail!("{refused:?}") };
    ensure!(message.contains("voters of the catalog") || message.contains("not drained"), "{message}");

    admin.set_node_state(NodeId(4), pb::NodeState::Draining).await?;
    let drained = until("the drain does not end", || node(&admin, 4), |it: &pb::Node| it.replicas == 0).await?;
    ensure!(drained.state() == pb::NodeState::Draining && drained.stuck.is_empty(), "{drained:?}");
    for n in 0..4 {
        let now = partition(&admin, &format!("topic-{n}")).await?;
        ensure!(now.replicas == [1, 2, 3], "{now:?}");
    }

    // One more, and nobody is left to go to: it says so and stays.
    admin.set_node_state(NodeId(3), pb::NodeState::Draining).await?;
    let stuck = until("nothing is in the way", || node(&admin, 3), |it: &pb::Node| !it.stuck.is_empty()).await?;
    ensure!(stuck.stuck[0].contains("3 replicas need 3 active nodes, and there are 2"), "{stuck:?}");
    let refused = client.create_topic_at("one-too-many", &three()).await;
    ensure!(matches!(refused, Err(CallError::Precondition { .. })), "{refused:?}");
    admin.set_node_state(NodeId(3), pb::NodeState::Active).await?;

    admin.set_node_state(NodeId(4), pb::NodeState::Active).await?;
    until("it does not get its share", || node(&admin, 4), |it: &pb::Node| it.replicas >= 2 && it.arriving == 0)
        .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_node_that_still_votes_is_not_removed() -> anyhow::Result<()> {
    let cluster = Cluster::start(3)?;
    let admin = cluster.client(true)?.admin();
    registered(&admin, 3).await?;
    // It holds no replica of any topic, and keeps its votes, since nobody is there to take them.
    admin.set_node_state(NodeId(3), pb::NodeState::Draining).await?;
    let refused = admin.set_node_state(NodeId(3), pb::NodeState::Removed).await;
    let Err(CallError::Precondition { message }) = &refused else { anyhow::bail!("{refused:?}") };
    ensure!(message.contains("node 3 is one of the 3 voters of the catalog, which would lose a vote"), "{message}");
    let kept = node(&admin, 3).await?;
    ensure!(kept.state() == pb::NodeState::Draining && kept.replicas == 0, "{kept:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_replicas_of_a_lost_node_are_made_anew_elsewhere() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(4)?;
    for id in cluster.ids() {
        let file = cluster.dir.path().join(format!("node-{id}/ensign.toml"));
        let text = std::fs::read_to_string(&file)?.replace("[cluster]\n", "[cluster]\nlost_after = \"5s\"\n");
        std::fs::write(&file, text)?;
        cluster.kill(id)?;
    }
    cluster.restart_all()?;
    let admin = cluster.client(true)?.admin();
    registered(&admin, 4).await?;
    cluster.client(false)?.create_topic_at(TOPIC, &three()).await?;
    let before = partition(&admin, TOPIC).await?;
    let (free, home) = free_and_home(&cluster.ids(), &before, leader(&cluster, TOPIC).await?)?;
    let load = Load::start(vec![cluster.client_of(home)?]);
    load.wait_for_acks(200).await?;
    let victim = before.replicas.iter().copied().find(|node| *node != home).context("a victim")?;
    cluster.kill(victim)?;
    let look = || partition(&admin, TOPIC);
    let after = until("the lost replica is not replaced", look, |it: &pb::PartitionInfo| {
        it.r#move.is_none() && it.replicas.contains(&free) && !it.replicas.contains(&victim)
    })
    .await?;
    ensure!(after.replicas.len() == 3, "{after:?}");
    load.wait_for_acks(200).await?;
    let acked = load.finish().await?;
    judge(&cluster.client_of(free)?, &acked).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_asked_for_is_refused_with_the_reason() -> anyhow::Result<()> {
    let cluster = Cluster::start(1)?;
    let (admin, client) = (cluster.client(true)?.admin(), cluster.client(false)?);
    client.create_topic("kept").await?;
    let place = |replication, region: &str| Place {
        replication,
        regions: if region.is_empty() { Vec::new() } else { vec![region.to_owned()] },
        leader_region: String::new(),
    };
    let said = |outcome: Result<String, CallError>| match outcome {
        Ok(what) => format!("done: {what}"),
        Err(error) => error.to_string(),
    };
    let created = async |place: Place| said(client.create_topic_at("new", &place).await.map(|it| it.name));
    let mut answers = vec![
        created(place(Some(2), "")).await,
        created(place(Some(0), "")).await,
        created(place(Some(10), "")).await,
        created(place(None, "atlantis")).await,
    ];
    let set =
        async |node: u64, state| said(admin.set_node_state(NodeId(node), state).await.map(|it| it.id.to_string()));
    answers.push(set(1, pb::NodeState::Draining).await);
    answers.push(set(1, pb::NodeState::Removed).await);
    answers.push(set(1, pb::NodeState::Unspecified).await);
    answers.push(set(7, pb::NodeState::Draining).await);
    let moved = async |topic: &str, to: &[u64]| said(admin.move_partition(topic, nodes(to)).await.map(|it| it.topic));
    answers.push(moved("kept", &[7]).await);
    answers.push(moved("kept", &[1, 2]).await);
    answers.push(moved("nothing", &[1]).await);
    answers.push(said(admin.cancel_move("kept").await.map(|it| it.topic)));
    let alter = pb::AlterTopicRequest { topic: "kept".to_owned(), replication: Some(3), ..Default::default() };
    answers.push(said(admin.alter_topic(alter).await.map(|it| it.topic)));
    // Not with a project's key.
    answers.push(said(client.admin().nodes(None).await.map(|it| it.len().to_string())));
    insta::assert_snapshot!("refusals_of_placement", answers.join("\n"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_joins_under_load_takes_its_share_and_then_the_place_of_one_that_is_removed()
-> anyhow::Result<()> {
    let mut cluster = Machines::found()?;
    for _ in 0..2 {
        cluster.join(RootKey::Copied)?;
    }
    let admin = cluster.admin_of(1)?.admin();
    registered(&admin, 3).await?;
    let client = cluster.client_of(1)?;
    client.create_topic_at(TOPIC, &three()).await?;
    for n in 0..5 {
        client.create_topic_at(&format!("topic-{n}"), &three()).await?;
    }
    let load = Load::start(vec![cluster.client_of(1)?, cluster.client_of(2)?]);
    load.wait_for_acks(100).await?;
    ensure!(cluster.join(RootKey::Copied)? == 4, "the fourth");
    // 18 replicas on four nodes: four or five each.
    let share = |it: &pb::Node| it.replicas >= 4 && it.arriving == 0;
    until("it does not get its share", || node(&admin, 4), share).await?;
    load.wait_for_acks(100).await?;

    let refused = admin.set_node_state(NodeId(3), pb::NodeState::Removed).await;
    ensure!(matches!(refused, Err(CallError::Precondition { .. })), "it holds replicas and votes: {refused:?}");
    admin.set_node_state(NodeId(3), pb::NodeState::Draining).await?;
    until("the drain does not end", || node(&admin, 3), |it: &pb::Node| it.replicas == 0 && it.arriving == 0).await?;
    // Its votes in the catalog and the vault go to the fourth by themselves.
    let remove = || async { Ok(admin.set_node_state(NodeId(3), pb::NodeState::Removed).await?) };
    let removed = until("it cannot be removed", remove, |it: &pb::Node| it.state() == pb::NodeState::Removed).await?;
    ensure!(removed.replicas == 0, "{removed:?}");
    let refused = admin.set_node_state(NodeId(3), pb::NodeState::Active).await;
    ensure!(matches!(refused, Err(CallError::Precondition { .. })), "for ever: {refused:?}");
    let report = || async { Ok(admin.cluster_report().await?) };
    let without = |it: &pb::ClusterReportReply| it.nodes.iter().map(|node| node.node_id).eq([1, 2, 4]);
    until("its silence is reported", report, without).await?;
    load.wait_for_acks(100).await?;
    let acked = load.finish().await?;
    for id in [1, 2, 4] {
        judge(&cluster.client_of(id)?, &acked).await.with_context(|| format!("read at node {id}"))?;
    }
    // No peer talks to it any more, and it is told why.
    cluster.kill(3)?;
    let started = cluster.restart(3);
    let told = || async { anyhow::Ok(cluster.output(3)) };
    until("it is not told", told, |log: &String| log.contains("was removed from the cluster"))
        .await
        .with_context(|| format!("{started:?}"))?;
    Ok(())
}
