//! The next step of a move: a pure function of where replicas shall be and where the group has them.
//!
//! ```text
//! learners that nobody wants go ─▶ missing ones are added ─▶ they catch up ─▶ a majority of the target lives ─▶
//! leadership goes to who stays ─▶ the voters are exchanged ─▶ the move is over
//! ```
//! Whoever leads computes it from the group alone, so it does not matter who took the step before, or how often.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ensign_proto::NodeId;

/// How many entries a new replica may miss when it becomes a voter: it gets them within a round trip or two.
pub(super) const LAG_MAX: u64 = 32;

/// A group as its leader sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// The voters; in the middle of a change, those that it leads to.
    pub voters: BTreeSet<NodeId>,
    /// In the middle of a change, those that it leads away from.
    pub outgoing: Option<BTreeSet<NodeId>>,
    /// Members without a vote.
    pub learners: BTreeSet<NodeId>,
    /// Entries that members are not known to hold; absent for those of whom nothing is known.
    pub missing: BTreeMap<NodeId, u64>,
    /// The end of the log.
    pub last: u64,
    /// How long, since it started, this node has kept what it sends to replicas without a vote waiting for `storage.move_rate`.
    pub throttled: Duration,
}

impl Seen {
    /// What the slowest of these nodes misses, where anything is known of it.
    fn behind(&self, nodes: &BTreeSet<NodeId>) -> u64 {
        nodes.iter().filter_map(|node| self.missing.get(node)).copied().max().unwrap_or_default()
    }

    fn has_caught_up(&self, node: NodeId) -> bool {
        self.missing.get(&node).is_some_and(|missing| *missing <= LAG_MAX)
    }
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Send this one nothing more.
    RemoveLearner(NodeId),
    /// Let this one receive the log.
    AddLearner(NodeId),
    /// Nothing, until new replicas have caught up; the slowest misses so much.
    CatchUp {
        /// Entries.
        behind: u64,
    },
    /// Nothing, until what is in the way is gone.
    Wait {
        /// What is in the way.
        why: String,
    },
    /// Leave the lead to this one, which goes on.
    HandOver(NodeId),
    /// Make these the voters. If they are already, a change that was cut short is completed.
    Switch(BTreeSet<NodeId>),
    /// The group is as it shall be.
    Finish,
}

/// What node `me`, which leads, does next.
pub(super) fn next_step(
    me: NodeId,
    target: &BTreeSet<NodeId>,
    seen: &Seen,
    prefers: Option<NodeId>,
    is_alive: impl Fn(NodeId) -> bool,
) -> Step {
    // Whoever began a change may be gone; until it is completed, two sets of voters have to agree to everything.
    if seen.outgoing.is_some() {
        return Step::Switch(seen.voters.clone());
    }
    if let Some(stranger) = seen.learners.difference(target).next() {
        return Step::RemoveLearner(*stranger);
    }
    let arriving: BTreeSet<NodeId> = target.difference(&seen.voters).copied().collect();
    if let Some(new) = arriving.difference(&seen.learners).find(|node| is_alive(**node)) {
        return Step::AddLearner(*new);
    }
    let silent: Vec<NodeId> = arriving.iter().copied().filter(|node| !is_alive(*node)).collect();
    if !silent.is_empty() {
        return Step::Wait { why: format!("{} not answer", nodes_do(&silent)) };
    }
    if arriving.iter().any(|node| !seen.has_caught_up(*node)) {
        return Step::CatchUp { behind: seen.behind(&arriving) };
    }
    if seen.voters == *target {
        return Step::Finish;
    }
    let living = target.iter().filter(|node| is_alive(**node)).count();
    if living <= target.len() / 2 {
        let why = format!("only {living} of the {} nodes that stay answer: no majority", target.len());
        return Step::Wait { why };
    }
    if !target.contains(&me) {
        let mut stay: Vec<NodeId> = seen.voters.intersection(target).copied().filter(|node| is_alive(*node)).collect();
        stay.sort_by_key(|node| {
            (seen.missing.get(node).copied().unwrap_or(u64::MAX) > LAG_MAX, Some(*node) != prefers)
        });
        if let Some(heir) = stay.first() {
            return Step::HandOver(*heir);
        }
    }
    Step::Switch(target.clone())
}

fn nodes_do(nodes: &[NodeId]) -> String {
    let names: Vec<_> = nodes.iter().map(ToString::to_string).collect();
    if names.len() == 1 { format!("node {} does", names[0]) } else { format!("nodes {} do", names.join(", ")) }
}

#[cfg(test)]
mod tests;
