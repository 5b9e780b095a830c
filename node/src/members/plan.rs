//! What a group that every node, or every fit node, belongs to should change next.
//!
//! A pure function of what is known, one step at a time, so that each step starts from what the last one really did. In order:
//!
//! 1. finish a change that was cut short;
//! 2. add whoever is missing, as a learner;
//! 3. put a caught-up learner in the place of a voter that is lost, unfit or leaving, fill up to the number wanted, and spread
//!    over zones;
//! 4. let go of learners that are no members any more.
//!
//! Never is a vote taken away so that a majority of what is left would not be alive, and a lost voter keeps its vote until
//! another node is ready for it: without a replacement, taking it away only makes the group easier to stop. Two lost votes of five
//! do go, since three of three survive what three of five do not. So does the vote of a drained node that nobody can take, where the nodes that
//! stay want fewer voters: of five voters three are left.

use std::collections::{BTreeMap, BTreeSet};

use ensign_proto::{LogIndex, NodeId};
use ensign_raft::Members;

/// How many entries a learner may miss and still get a vote.
const BEHIND_MAX: u64 = 64;
/// With this many nodes there are [`VOTERS_MANY`] voters, else [`VOTERS_FEW`].
const MANY_NODES: usize = 5;
const VOTERS_MANY: usize = 5;
const VOTERS_FEW: usize = 3;

/// What is known of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing {
    /// Region and zone: two voters in one place may go down together.
    pub(super) place: (String, String),
    pub(super) pulse: Pulse,
    pub(super) stay: Stay,
    /// It may belong to the group at all.
    pub(super) fit: bool,
}

/// Whether a node answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pulse {
    Alive,
    /// Not now.
    Silent,
    /// Not for so long that its vote should go to another.
    Lost,
}

/// Whether a node is to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stay {
    Stays,
    /// It is being drained: it shall not vote.
    Leaves,
    /// It was removed from the cluster: it shall not even learn.
    Gone,
}

/// What is known of a group.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    pub(super) members: &'a Members,
    /// How much of the log each member holds.
    pub(super) matched: &'a BTreeMap<NodeId, LogIndex>,
    /// The end of the log.
    pub(super) last: LogIndex,
    /// The nodes of the cluster.
    pub(super) nodes: &'a BTreeMap<NodeId, Standing>,
}

/// The next change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Change the voters to what the change that was begun leads to.
    Finish,
    AddLearner(NodeId),
    RemoveLearner(NodeId),
    ChangeVoters(BTreeSet<NodeId>),
}

/// The next change, if there is anything to change that can be changed now.
pub(super) fn next_step(facts: &Facts<'_>) -> Option<Step> {
    if facts.members.is_joint() {
        return Some(Step::Finish);
    }
    let missing = facts
        .nodes
        .iter()
        .find(|(id, node)| node.joins() && node.pulse == Pulse::Alive && !facts.members.contains(**id));
    if let Some((id, _)) = missing {
        return Some(Step::AddLearner(*id));
    }
    if let Some(voters) = better_voters(facts) {
        return Some(Step::ChangeVoters(voters));
    }
    let extra = facts.members.learners.iter().find(|id| facts.nodes.get(id).is_none_or(|node| !node.joins()));
    extra.copied().map(Step::RemoveLearner)
}

/// Why a vote stays where it should not be; `None` when all votes are where they should be, or [`next_step`] moves one.
pub(super) fn in_the_way(facts: &Facts<'_>) -> Option<String> {
    let listed = facts.members.voters.iter().filter(|id| facts.nodes.contains_key(id));
    let bad: Vec<&NodeId> = listed.filter(|id| !facts.sound(**id)).collect();
    let names = |ids: &[&NodeId]| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let alive = facts.members.voters.iter().filter(|id| facts.alive(**id)).count();
    match (bad.len(), facts.ready().len()) {
        (0, _) => None,
        (_, 0) => Some(format!("no other node is ready to take the votes of {}", names(&bad))),
        (_, _) => Some(format!(
            "without the votes of {} too few of those that are left would be alive ({alive} of {} are)",
            names(&bad),
            facts.members.voters.len()
        )),
    }
}

impl Standing {
    /// Whether it belongs to the group, with or without a vote.
    fn joins(&self) -> bool {
        self.fit && self.stay != Stay::Gone
    }

    /// Whether it is a good voter.
    fn sound(&self) -> bool {
        self.fit && self.stay == Stay::Stays && self.pulse != Pulse::Lost
    }
}

impl Facts<'_> {
    fn sound(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(Standing::sound)
    }

    fn leaves(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.stay == Stay::Leaves)
    }

    fn is_lost(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.pulse == Pulse::Lost)
    }

    fn alive(&self, id: NodeId) -> bool {
        self.nodes.get(&id).is_some_and(|node| node.pulse == Pulse::Alive)
    }

    /// Learners that could vote at once.
    fn ready(&self) -> Vec<NodeId> {
        let caught_up = |id: &NodeId| self.matched.get(id).is_some_and(|held| held.0 + BEHIND_MAX >= self.last.0);
        let able = self.members.learners.iter().copied().filter(|id| self.sound(*id) && self.alive(*id));
        able.filter(caught_up).collect()
    }

    fn places(&self, voters: &BTreeSet<NodeId>) -> usize {
        let places: BTreeSet<_> = voters.iter().filter_map(|id| self.nodes.get(id)).map(|node| &node.place).collect();
        places.len()
    }

    /// The candidate that stands where the fewest of `voters` do.
    fn best(&self, voters: &BTreeSet<NodeId>, candidates: &[NodeId]) -> Option<NodeId> {
        let neighbours = |candidate: &NodeId| {
            let place = &self.nodes[candidate].place;
            let same = |id: &&NodeId| self.nodes.get(id).is_some_and(|node| node.place == *place);
            voters.iter().filter(same).count()
        };
        candidates.iter().filter(|id| !voters.contains(id)).min_by_key(|id| (neighbours(id), **id)).copied()
    }
}

/// How many voters a cluster of so many nodes should have: two lost nodes of five, one of three.
pub(crate) fn voters_wanted(nodes: usize) -> usize {
    if nodes >= MANY_NODES {
        VOTERS_MANY
    } else if nodes >= VOTERS_FEW {
        VOTERS_FEW
    } else {
        1
    }
}

fn better_voters(facts: &Facts<'_>) -> Option<BTreeSet<NodeId>> {
    let now = &facts.members.voters;
    let ready = facts.ready();
    let mut voters = now.clone();
    // Who is not listed has not registered yet. Whoever was removed goes first: it is not coming back, while one that is lost or drained may.
    let listed = now.iter().filter(|id| facts.nodes.contains_key(id));
    let mut bad: Vec<NodeId> = listed.copied().filter(|id| !facts.sound(*id)).collect();
    bad.sort_by_key(|id| facts.nodes.get(id).is_some_and(|node| node.stay != Stay::Gone));
    for out in bad {
        let kept: BTreeSet<NodeId> = voters.iter().copied().filter(|id| *id != out).collect();
        if let Some(instead) = facts.best(&kept, &ready) {
            voters = kept;
            voters.insert(instead);
        } else if facts.nodes.get(&out).is_some_and(|node| node.stay == Stay::Gone) && !kept.is_empty() {
            voters = kept;
        }
    }
    let lost: Vec<NodeId> = voters.iter().copied().filter(|id| facts.is_lost(*id)).collect();
    for pair in lost.chunks_exact(2) {
        if voters.len() >= VOTERS_FEW + 2 {
            voters.retain(|id| !pair.contains(id));
        }
    }
    let wanted = voters_wanted(facts.nodes.values().filter(|node| node.sound()).count());
    if wanted >= VOTERS_FEW && voters.iter().any(|id| facts.leaves(*id)) {
        shrink(facts, &mut voters, wanted);
    }
    while voters.len() < wanted {
        // One more of an even number only makes a majority larger, so two at a time, unless that makes the number odd.
        let mut grown = voters.clone();
        while grown.len() < voters.len() + 1 + voters.len() % 2 {
            let Some(another) = facts.best(&grown, &ready) else { break };
            grown.insert(another);
        }
        if grown.len() <= voters.len() || grown.len().is_multiple_of(2) {
            break;
        }
        voters = grown;
    }
    if voters == *now {
        voters = spread(facts, &ready)?;
    }
    // It takes both majorities to get there.
    let lives = |set: &BTreeSet<NodeId>| set.iter().filter(|id| facts.alive(**id)).count() > set.len() / 2;
    (voters != *now && lives(&voters) && lives(now)).then_some(voters)
}

/// Without drained nodes, a cluster wants fewer voters: their votes go although nobody takes them, and so does another one where the number
/// would be even otherwise. Three are left at least.
fn shrink(facts: &Facts<'_>, voters: &mut BTreeSet<NodeId>, wanted: usize) {
    while voters.len() > wanted {
        let crowd = |id: &NodeId| {
            let place = facts.nodes.get(id).map(|node| &node.place);
            voters.iter().filter(|other| facts.nodes.get(other).map(|node| &node.place) == place).count()
        };
        let least = voters.iter().copied().max_by_key(|id| (facts.leaves(*id), !facts.sound(*id), crowd(id), *id));
        let Some(out) = least.filter(|out| facts.nodes.contains_key(out)) else { return };
        voters.remove(&out);
    }
}

/// One voter moved to where none is, from where several are.
fn spread(facts: &Facts<'_>, ready: &[NodeId]) -> Option<BTreeSet<NodeId>> {
    let now = &facts.members.voters;
    for out in now.iter().filter(|id| facts.nodes.contains_key(id)) {
        let mut voters = now.clone();
        voters.remove(out);
        voters.insert(facts.best(&voters, ready)?);
        if facts.places(&voters) > facts.places(now) {
            return Some(voters);
        }
    }
    None
}

#[cfg(test)]
mod tests;
