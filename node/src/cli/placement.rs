//! `ensign node` and `ensign partition`: what is where, what moves, and what is in the way.

mod drain;
mod shown;

use std::collections::BTreeSet;

use ensign_client::{Admin, admin_api as pb};
use ensign_proto::NodeId;

use super::args::{ClientArgs, NodeCommand, Output, PartitionCommand};
use super::connect::connect;
use super::exit::UsageError;
use super::output::{confirm, list, one, record, thousands};
use super::watch::{Progress, wait, watched};
use shown::{NODE_HEADINGS, PARTITION_HEADINGS, ShownNode, ShownPartition, numbers};

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
        ("votes in", if node.votes.is_empty() { "nothing".to_owned() } else { node.votes.join(", ") }),
    ];
    fields.extend(node.stuck.iter().map(|why| ("in the way", why.clone())));
    record(output, node, &fields)
}

/// Runs one of the node commands.
pub(super) async fn node(command: NodeCommand) -> anyhow::Result<()> {
    match command {
        NodeCommand::List { watch, client } => {
            let admin = connect(&client)?.admin()?;
            watched(watch.watch, client.output, async || {
                let nodes: Vec<ShownNode> = admin.nodes(None).await?.into_iter().map(Into::into).collect();
                list(client.output, &NODE_HEADINGS, &nodes, ShownNode::row, "no nodes")
            })
            .await
        }
        NodeCommand::Describe { node, watch, client } => {
            let (node, admin) = (a_node(node)?, connect(&client)?.admin()?);
            watched(watch.watch, client.output, async || print_node(client.output, &describe_node(&admin, node).await?))
                .await
        }
        NodeCommand::Drain { node, wait: waits, timeout, client } => {
            let (node, admin) = (a_node(node)?, connect(&client)?.admin()?);
            let drained: ShownNode = admin.set_node_state(node, pb::NodeState::Draining).await?.into();
            if waits {
                return drain::wait_for(&admin, node, timeout, client.output).await;
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
        NodeCommand::Remove { node, force: true, yes, client } => {
            let (node, admin) = (a_node(node)?, connect(&client)?.admin()?);
            confirm(yes, &drain::consequences(&admin, node).await?)?;
            let removed: ShownNode = admin.remove_node_by_force(node).await?.into();
            let sentence = match removed.replicas {
                0 => format!("removed node {node}"),
                1 => format!(
                    "removed node {node}; one partition counts it still, and gets a replica elsewhere as far as there are nodes for it: `ensign \
                     partition list --unsettled`"
                ),
                held => format!(
                    "removed node {node}; {} partitions count it still, and get a replica elsewhere as far as there are nodes for it: `ensign \
                     partition list --unsettled`",
                    thousands(held)
                ),
            };
            one(client.output, &removed, sentence)
        }
        NodeCommand::Remove { node, force: false, yes, client } => {
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

/// Runs one of the partition commands.
pub(super) async fn partition(command: PartitionCommand) -> anyhow::Result<()> {
    match command {
        PartitionCommand::List { node, unsettled, watch, client } => {
            let admin = connect(&client)?.admin()?;
            let filter =
                pb::ListPartitionsRequest { node_id: node.unwrap_or_default(), unsettled, ..Default::default() };
            watched(watch.watch, client.output, async || {
                let all = admin.partitions(filter.clone()).await?;
                let all: Vec<ShownPartition> = all.into_iter().map(Into::into).collect();
                let none = if unsettled { "everything is where it should be" } else { "no partitions" };
                list(client.output, &PARTITION_HEADINGS, &all, ShownPartition::row, none)
            })
            .await
        }
        PartitionCommand::Describe { topic, watch, client } => {
            let admin = connect(&client)?.admin()?;
            watched(watch.watch, client.output, async || {
                print_partition(client.output, &describe(&admin, &topic).await?)
            })
            .await
        }
        PartitionCommand::Move { topic, to, wait: waits, timeout, client } => {
            let admin = connect(&client)?.admin()?;
            let target: BTreeSet<NodeId> = to.iter().map(|node| a_node(*node)).collect::<Result<_, _>>()?;
            if target.len() != to.len() {
                return Err(UsageError("--to names a node twice: name every node once".to_owned()).into());
            }
            let moved: ShownPartition = admin.move_partition(&topic, target).await?.into();
            if waits {
                return wait_for_move(&client, &admin, &topic, timeout).await;
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
    let placed = change.replication.is_some() || change.regions.is_some() || change.leader_region.is_some();
    let ring = change.ring.clone();
    if !placed && ring.is_empty() {
        let what =
            "say what to change: --replication, --region, --any-region, --leader-region, --no-leader-region or --key";
        return Err(UsageError(what.to_owned()).into());
    }
    let altered: ShownPartition = connect(client)?.admin()?.alter_topic(change).await?.into();
    if !placed {
        let topic = &altered.topic;
        let sentence = format!("what is published to topic {topic} from now on is sealed under key ring {ring}");
        return one(client.output, &altered, sentence);
    }
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
    record(output, partition, &partition.fields())
}

async fn wait_for_move(
    client: &ClientArgs,
    admin: &Admin,
    topic: &str,
    limit: Option<std::time::Duration>,
) -> anyhow::Result<()> {
    let over = wait(format!("the move of topic {topic}"), limit, async || {
        let now = describe(admin, topic).await?;
        let on = format!("topic {}: {}", now.topic, now.condition());
        Ok(if now.on.is_none() { Progress::Over(now) } else { Progress::On(on) })
    })
    .await?;
    let sentence = format!("topic {}: its replicas are on {}", over.topic, numbers(&over.replicas));
    one(client.output, &over, sentence)
}
