//! Draining and removing: how far a drain is, what keeps it, and what it means to remove a node that is lost.

use std::time::Duration;

use ensign_client::{Admin, CallError, admin_api as pb};
use ensign_proto::NodeId;

use super::shown::ShownNode;
use super::{describe_node, thousands};
use crate::cli::args::Output;
use crate::cli::output::one;
use crate::cli::watch::{Progress, wait};

/// Names of topics that one sentence has.
const NAMES: usize = 5;

/// Waits until nothing needs the node any more, and says meanwhile how far it is and what is in the way.
pub(super) async fn wait_for(
    admin: &Admin,
    node: NodeId,
    limit: Option<Duration>,
    output: Output,
) -> anyhow::Result<()> {
    let drained = wait(format!("the drain of node {node}"), limit, async || {
        let now = describe_node(admin, node).await?;
        if now.state == "active" {
            let message = format!("node {node} is not drained any more: somebody has taken the drain back");
            return Err(CallError::Precondition { message }.into());
        }
        if now.state == "removed" || is_over(&now) {
            return Ok(Progress::Over(now));
        }
        let takers = if now.replicas == 0 && now.arriving == 0 { takers(admin, node).await? } else { 0 };
        Ok(Progress::On(how_far(&now, takers)))
    })
    .await?;
    one(output, &drained, format_args!("node {node} is drained: it holds nothing, and can be removed"))
}

fn is_over(node: &ShownNode) -> bool {
    node.replicas == 0 && node.arriving == 0 && node.votes.is_empty()
}

/// How many other nodes answer, and have a vote in nothing or not in all of the cluster's groups: one of them may take a vote over.
async fn takers(admin: &Admin, node: NodeId) -> Result<usize, CallError> {
    let nodes = admin.nodes(None).await?.into_iter().map(ShownNode::from);
    Ok(nodes.filter(|it| it.id != node.0 && it.state == "active" && it.alive && it.votes.len() < 2).count())
}

/// How far a drain is, and what is in the way of it.
fn how_far(node: &ShownNode, takers: usize) -> String {
    let mut parts = Vec::new();
    if node.replicas > 0 || node.arriving > 0 {
        let replicas = if node.replicas == 1 { "replica" } else { "replicas" };
        parts.push(format!("{} {replicas} left, {} on their way", thousands(node.replicas), thousands(node.leaving)));
        if node.arriving > 0 {
            parts.push(format!("{} were coming and turn round", thousands(node.arriving)));
        }
        if node.stuck.is_empty() && node.leaving == 0 {
            parts.push("they wait for their turn".to_owned());
        }
    } else {
        parts.push(format!("it holds no replica, and votes in the {} still", node.votes.join(" and the ")));
        parts.push(match takers {
            0 => "no other node could take the vote, so add one (`ensign cluster join`, with the root key)".to_owned(),
            _ => "the vote goes to another node in a moment".to_owned(),
        });
    }
    let stuck: String = node.stuck.iter().map(|why| ["\n  in the way: ", why].concat()).collect();
    format!("node {}: {}{stuck}", node.id, parts.join("; "))
}

/// What becomes of a node that is removed by force, for whoever has to confirm it.
pub(super) async fn consequences(admin: &Admin, node: NodeId) -> anyhow::Result<String> {
    let known = describe_node(admin, node).await?;
    let filter = pb::ListPartitionsRequest { node_id: node.0, ..Default::default() };
    let held = admin.partitions(filter).await?;
    let names: Vec<&str> = held.iter().take(NAMES).map(|it| it.topic.as_str()).collect();
    Ok(warning(&known, held.len(), &names))
}

fn warning(node: &ShownNode, held: usize, names: &[&str]) -> String {
    let more = if held > names.len() { format!(" and {} more", held - names.len()) } else { String::new() };
    let replicas = match held {
        0 => "It holds no replica.".to_owned(),
        1 => format!(
            "One partition counts a replica on it: {}. It goes on without, or the removal is refused.",
            names.join(", ")
        ),
        held => format!(
            "{} partitions count a replica on it: {}{more}. They go on without, or the removal is refused.",
            thousands(held as u64),
            names.join(", ")
        ),
    };
    format!(
        "Node {} is removed although it was not drained. {replicas} What is on its disk is never used again, and its number never comes back.",
        node.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(change: impl FnOnce(&mut pb::Node)) -> ShownNode {
        let mut node = pb::Node { id: 3, state: pb::NodeState::Draining.into(), ..Default::default() };
        change(&mut node);
        node.into()
    }

    #[test]
    fn a_drain_says_how_far_it_is_and_what_is_in_the_way() {
        let moving = node(|it| (it.replicas, it.leaving) = (1_200, 8));
        assert_eq!(how_far(&moving, 0), "node 3: 1,200 replicas left, 8 on their way");
        let queued = node(|it| it.replicas = 2);
        assert_eq!(how_far(&queued, 0), "node 3: 2 replicas left, 0 on their way; they wait for their turn");
        let stuck = node(|it| {
            it.replicas = 1;
            it.stuck =
                vec!["orders: its only replica, on node 3, does not answer".to_owned(), "bills: too few".to_owned()];
        });
        assert_eq!(
            how_far(&stuck, 0),
            "node 3: 1 replica left, 0 on their way\n  in the way: orders: its only replica, on node 3, does not answer\n  in the way: bills: \
             too few"
        );
    }

    #[test]
    fn a_drain_is_not_over_while_the_node_votes() {
        let votes = node(|it| it.votes = vec!["catalog".to_owned(), "vault".to_owned()]);
        assert!(!is_over(&votes));
        let said = how_far(&votes, 0);
        assert!(
            said.starts_with("node 3: it holds no replica, and votes in the catalog and the vault still; no other"),
            "{said}"
        );
        assert!(how_far(&votes, 1).ends_with("the vote goes to another node in a moment"));
        assert!(is_over(&node(|_| ())));
    }

    #[test]
    fn what_is_confirmed_names_the_partitions() {
        let known = node(|_| ());
        assert!(warning(&known, 0, &[]).contains("It holds no replica."));
        let few = warning(&known, 2, &["a", "b"]);
        assert!(few.contains("2 partitions count a replica on it: a, b. They go on without, or"), "{few}");
        let many = warning(&known, 7, &["a", "b", "c", "d", "e"]);
        assert!(many.contains("a, b, c, d, e and 2 more"), "{many}");
        assert!(many.contains("its number never comes back"), "{many}");
    }
}
