//! `ensign node` and `ensign partition`: what is where, what moves, and what is in the way.

use std::collections::BTreeSet;
use std::time::Duration;

use ensign_client::{Admin, admin_api as pb};
use ensign_proto::NodeId;
use serde::Serialize;

use super::args::{ClientArgs, NodeCommand, Output, PartitionCommand, WatchArgs};
use super::connect::connect;
use super::exit::UsageError;
use super::output::{confirm, line, list, note, one, record, thousands, wire_time};
use super::until_interrupted;

/// Between two looks of `--watch` and `--wait`.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct ShownNode {
    id: u64,
    name: String,
    state: &'static str,
    alive: bool,
    lost: bool,
    silent_seconds: Option<u64>,
    region: String,
    zone: String,
    address: String,
    replicas: u64,
    arriving: u64,
    leaving: u64,
    stuck: Vec<String>,
}

impl From<pb::Node> for ShownNode {
    fn from(node: pb::Node) -> Self {
        let state = match node.state() {
            pb::NodeState::Unspecified => "unknown",
            pb::NodeState::Active => "active",
            pb::NodeState::Draining => "draining",
            pb::NodeState::Removed => "removed",
        };
        let silent_seconds = node.silent_for.as_ref().map(|silent| u64::try_from(silent.seconds).unwrap_or_default());
        Self {
            id: node.id,
            name: node.name,
            state,
            alive: silent_seconds.is_none(),
            lost: node.lost,
            silent_seconds,
            region: node.region,
            zone: node.zone,
            address: node.address,
            replicas: node.replicas,
            arriving: node.arriving,
            leaving: node.leaving,
            stuck: node.stuck,
        }
    }
}

impl ShownNode {
    /// Whether it answers, for people.
    fn pulse(&self) -> String {
        match self.silent_seconds {
            _ if self.state == "removed" => String::new(),
            None => "yes".to_owned(),
            Some(seconds) if self.lost => format!("lost, silent for {seconds} s"),
            Some(seconds) => format!("silent for {seconds} s"),
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.state.to_owned(),
            self.pulse(),
            self.region.clone(),
            self.zone.clone(),
            self.address.clone(),
            thousands(self.replicas),
            thousands(self.arriving),
            thousands(self.leaving),
        ]
    }
}

const NODE_HEADINGS: [&str; 9] =
    ["id", "state", "answers", "region", "zone", "address", "replicas", "arriving", "leaving"];

#[derive(Serialize)]
struct ShownMove {
    target: Vec<u64>,
    reason: &'static str,
    cancelled: bool,
    phase: &'static str,
    behind: u64,
    waiting: String,
    started: Option<String>,
    reported: Option<String>,
}

impl From<pb::Move> for ShownMove {
    fn from(on: pb::Move) -> Self {
        let reason = match on.reason() {
            pb::MoveReason::Unspecified => "unknown",
            pb::MoveReason::Operator => "operator",
            pb::MoveReason::Drain => "drain",
            pb::MoveReason::Lost => "lost node",
            pb::MoveReason::Rebalance => "rebalance",
            pb::MoveReason::Policy => "placement",
        };
        let phase = match on.phase() {
            pb::MovePhase::Unspecified => "queued",
            pb::MovePhase::Waiting => "waiting",
            pb::MovePhase::CatchingUp => "catching up",
            pb::MovePhase::Switching => "switching",
            pb::MovePhase::HandingOver => "handing over",
        };
        Self {
            reason,
            phase,
            cancelled: on.cancelled,
            behind: on.behind,
            started: wire_time(on.started.as_ref()),
            reported: wire_time(on.reported.as_ref()),
            waiting: on.waiting,
            target: on.target,
        }
    }
}

impl ShownMove {
    fn sentence(&self) -> String {
        let behind = match self.behind {
            0 => String::new(),
            behind => format!(", {} entries behind", thousands(behind)),
        };
        let waiting = if self.waiting.is_empty() { String::new() } else { format!(": {}", self.waiting) };
        let cancelled = if self.cancelled { ", cancelled" } else { "" };
        format!("to {} ({}): {}{behind}{waiting}{cancelled}", numbers(&self.target), self.reason, self.phase)
    }
}

#[derive(Serialize)]
struct ShownPartition {
    topic: String,
    topic_id: String,
    project: String,
    group: u64,
    replicas: Vec<u64>,
    silent: Vec<u64>,
    replication: u32,
    regions: Vec<String>,
    leader_region: String,
    leader: Option<u64>,
    preferred_leader: Option<u64>,
    assignment: u64,
    #[serde(rename = "move")]
    on: Option<ShownMove>,
    stuck: String,
}

impl From<pb::PartitionInfo> for ShownPartition {
    fn from(partition: pb::PartitionInfo) -> Self {
        let placement = partition.placement.unwrap_or_default();
        let some = |node: u64| (node != 0).then_some(node);
        Self {
            topic: partition.topic,
            topic_id: partition.topic_id,
            project: partition.project_id,
            group: partition.group,
            replicas: partition.replicas,
            silent: partition.silent,
            replication: placement.replication,
            regions: placement.regions,
            leader_region: placement.leader_region,
            leader: some(partition.leader),
            preferred_leader: some(partition.preferred_leader),
            assignment: partition.assignment,
            on: partition.r#move.map(Into::into),
            stuck: partition.stuck,
        }
    }
}

fn numbers(nodes: &[u64]) -> String {
    nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl ShownPartition {
    fn condition(&self) -> String {
        match &self.on {
            Some(on) => on.sentence(),
            None if !self.stuck.is_empty() => self.stuck.clone(),
            None if !self.silent.is_empty() => format!("node {} does not answer", numbers(&self.silent)),
            None => "settled".to_owned(),
        }
    }

    fn row(&self) -> Vec<String> {
        let leader = self.leader.map(|leader| leader.to_string()).unwrap_or_default();
        vec![self.topic.clone(), self.group.to_string(), numbers(&self.replicas), leader, self.condition()]
    }

    fn fields(&self) -> Vec<(&'static str, String)> {
        let or = |text: String, none: &str| if text.is_empty() { none.to_owned() } else { text };
        let node = |node: Option<u64>| node.map_or_else(|| "unknown here".to_owned(), |node| node.to_string());
        let mut fields = vec![
            ("topic", self.topic.clone()),
            ("id", self.topic_id.clone()),
            ("project", self.project.clone()),
            ("group", self.group.to_string()),
            ("replicas", numbers(&self.replicas)),
            ("wanted", format!("{} in {}", self.replication, or(self.regions.join(", "), "any region"))),
            ("leader", node(self.leader)),
            ("preferred leader", node(self.preferred_leader)),
            ("leader region", or(self.leader_region.clone(), "any")),
            ("moves over", self.assignment.to_string()),
            ("condition", self.condition()),
        ];
        if let Some(on) = &self.on {
            fields.push(("move began", on.started.clone().unwrap_or_default()));
            fields.push(("last heard", on.reported.clone().unwrap_or_else(|| "not yet".to_owned())));
        }
        fields
    }
}

const PARTITION_HEADINGS: [&str; 5] = ["topic", "group", "replicas", "leader", "condition"];

/// Runs `look` once, or again and again until it is interrupted.
async fn watched<F>(watch: &WatchArgs, look: impl Fn() -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    if !watch.watch {
        return look().await;
    }
    until_interrupted(async {
        loop {
            look().await?;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    })
    .await
}

fn a_node(id: u64) -> Result<NodeId, UsageError> {
    if id == 0 { Err(UsageError("nodes are numbered from 1".to_owned())) } else { Ok(NodeId(id)) }
}

async fn describe_node(admin: &Admin, id: NodeId) -> anyhow::Result<ShownNode> {
    let node = admin.nodes(Some(id)).await?.into_iter().next();
    Ok(node.unwrap_or_default().into())
}

fn print_node(output: Output, node: &ShownNode) -> anyhow::Result<()> {
    let mut fields = vec![
        ("id", node.id.to_string()),
        ("state", node.state.to_owned()),
        ("answers", node.pulse()),
        ("region", node.region.clone()),
        ("zone", node.zone.clone()),
        ("address", node.address.clone()),
        ("replicas", thousands(node.replicas)),
        ("arriving", thousands(node.arriving)),
        ("leaving", thousands(node.leaving)),
    ];
    fields.extend(node.stuck.iter().map(|why| ("in the way", why.clone())));
    record(output, node, &fields)
}

/// Runs one of the node commands.
pub(super) async fn node(command: NodeCommand) -> anyhow::Result<()> {
    match command {
        NodeCommand::List { watch, client } => {
            let admin = connect(&client)?.admin()?;
            watched(&watch, || async {
                let nodes: Vec<ShownNode> = admin.nodes(None).await?.into_iter().map(Into::into).collect();
                list(client.output, &NODE_HEADINGS, &nodes, ShownNode::row, "no nodes")
            })
            .await
        }
        NodeCommand::Describe { node, watch, client } => {
            let (node, admin) = (a_node(node)?, connect(&client)?.admin()?);
            watched(&watch, || async { print_node(client.output, &describe_node(&admin, node).await?) }).await
        }
        NodeCommand::Drain { node, wait, client } => {
            let (node, admin) = (a_node(node)?, connect(&client)?.admin()?);
            let drained: ShownNode = admin.set_node_state(node, pb::NodeState::Draining).await?.into();
            if wait {
                return until_interrupted(wait_for_drain(&admin, node, client.output)).await;
            }
            let sentence = format!(
                "node {node} is being drained: {} replicas go elsewhere; `ensign node describe {node} --watch` shows how far it is",
                drained.replicas
            );
            one(client.output, &drained, sentence)
        }
        NodeCommand::Undrain { node, client } => {
            let admin = connect(&client)?.admin()?;
            let node: ShownNode = admin.set_node_state(a_node(node)?, pb::NodeState::Active).await?.into();
            one(client.output, &node, format_args!("node {} takes replicas again", node.id))
        }
        NodeCommand::Remove { node, yes, client } => {
            let (node, admin) = (a_node(node)?, connect(&client)?.admin()?);
            confirm(
                yes,
                &format!("Node {node} will be no part of the cluster any more, and its number never used again."),
            )?;
            let removed: ShownNode = admin.set_node_state(node, pb::NodeState::Removed).await?.into();
            one(client.output, &removed, format_args!("removed node {node}"))
        }
    }
}

async fn wait_for_drain(admin: &Admin, node: NodeId, output: Output) -> anyhow::Result<()> {
    let mut said = None;
    loop {
        let now = describe_node(admin, node).await?;
        if now.replicas == 0 && now.arriving == 0 {
            return one(output, &now, format_args!("node {node} is drained: it holds nothing, and can be removed"));
        }
        let state = (now.replicas, now.leaving, now.stuck.clone());
        if said.as_ref() != Some(&state) {
            let stuck =
                if now.stuck.is_empty() { String::new() } else { format!("; in the way: {}", now.stuck.join("; ")) };
            note(format_args!("node {node}: {} replicas left, {} on their way{stuck}", now.replicas, now.leaving));
            said = Some(state);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Runs one of the partition commands.
pub(super) async fn partition(command: PartitionCommand) -> anyhow::Result<()> {
    match command {
        PartitionCommand::List { node, unsettled, watch, client } => {
            let admin = connect(&client)?.admin()?;
            let filter =
                pb::ListPartitionsRequest { node_id: node.unwrap_or_default(), unsettled, ..Default::default() };
            watched(&watch, || async {
                let all = admin.partitions(filter.clone()).await?;
                let all: Vec<ShownPartition> = all.into_iter().map(Into::into).collect();
                let none = if unsettled { "everything is where it should be" } else { "no partitions" };
                list(client.output, &PARTITION_HEADINGS, &all, ShownPartition::row, none)
            })
            .await
        }
        PartitionCommand::Describe { topic, watch, client } => {
            let admin = connect(&client)?.admin()?;
            watched(&watch, || async { print_partition(client.output, &describe(&admin, &topic).await?) }).await
        }
        PartitionCommand::Move { topic, to, wait, client } => {
            let admin = connect(&client)?.admin()?;
            let target: BTreeSet<NodeId> = to.iter().map(|node| a_node(*node)).collect::<Result<_, _>>()?;
            if target.len() != to.len() {
                return Err(UsageError("--to names a node twice: name every node once".to_owned()).into());
            }
            let moved: ShownPartition = admin.move_partition(&topic, target).await?.into();
            if wait {
                return until_interrupted(wait_for_move(&client, &admin, &topic)).await;
            }
            let sentence = format!("topic {}: {}", moved.topic, moved.condition());
            one(client.output, &moved, sentence)
        }
        PartitionCommand::Cancel { topic, client } => {
            let admin = connect(&client)?.admin()?;
            let back: ShownPartition = admin.cancel_move(&topic).await?.into();
            let sentence = format!("the move of topic {} is turned round: {}", back.topic, back.condition());
            one(client.output, &back, sentence)
        }
    }
}

/// Changes where a topic may be.
pub(super) async fn alter(change: pb::AlterTopicRequest, client: &ClientArgs) -> anyhow::Result<()> {
    if change.replication.is_none() && change.regions.is_none() && change.leader_region.is_none() {
        let what = "say what to change: --replication, --region, --any-region, --leader-region or --no-leader-region";
        return Err(UsageError(what.to_owned()).into());
    }
    let altered: ShownPartition = connect(client)?.admin()?.alter_topic(change).await?.into();
    let sentence = format!(
        "altered topic {}; replicas that do not fit are moved: `ensign partition describe {} --watch` shows how far it is",
        altered.topic, altered.topic
    );
    one(client.output, &altered, sentence)
}

async fn describe(admin: &Admin, topic: &str) -> anyhow::Result<ShownPartition> {
    let filter = pb::ListPartitionsRequest { topic: topic.to_owned(), ..Default::default() };
    let found = admin.partitions(filter).await?.into_iter().next();
    Ok(found.unwrap_or_default().into())
}

fn print_partition(output: Output, partition: &ShownPartition) -> anyhow::Result<()> {
    record(output, partition, &partition.fields())?;
    if matches!(output, Output::Human) { line("") } else { Ok(()) }
}

async fn wait_for_move(client: &ClientArgs, admin: &Admin, topic: &str) -> anyhow::Result<()> {
    let mut said = String::new();
    loop {
        let now = describe(admin, topic).await?;
        let condition = now.condition();
        if now.on.is_none() {
            let sentence = format!("topic {}: its replicas are on {}", now.topic, numbers(&now.replicas));
            return one(client.output, &now, sentence);
        }
        if condition != said {
            note(format_args!("topic {}: {condition}", now.topic));
            said = condition;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
