//! Where replicas are and where they shall be: the records, and how a command changes them.
//!
//! A topic's replicas are `replicas`. A move names the `target` that they shall be; it ends when the partition's leader has made
//! the target the group's voters. Whoever is in neither set holds nothing of the topic. Every check that another command could
//! overtake is made here, where commands have one order.

use std::collections::BTreeSet;
use std::sync::Arc;

use ensign_proto::{NodeId, TopicId};
use ensign_raft::env::UnixNanos;

use super::command::{Outcome, Refusal, Response};
use super::records::{NodeRecord, Topic, TopicState};
use super::state::State;

/// The most replicas that a topic can have.
pub const REPLICATION_MAX: u32 = 9;

/// What a node may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum NodeState {
    /// It holds replicas and takes new ones.
    #[default]
    Active,
    /// Its replicas go elsewhere, and it takes none.
    Draining,
    /// It is no part of the cluster any more; its number is never used again.
    Removed,
}

/// Where a topic's replicas may be.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Placement {
    /// How many. 0 for a topic that was made before placement was kept, until the cluster's defaults are known.
    pub replication: u32,
    /// The regions that replicas never leave; empty for any.
    pub regions: BTreeSet<String>,
    /// The region that should lead, where a replica is; empty for none.
    pub leader_region: String,
}

impl Placement {
    /// `replication` replicas, anywhere.
    pub fn anywhere(replication: u32) -> Self {
        Self { replication, ..Self::default() }
    }

    /// Whether replicas may be in this region.
    pub fn allows(&self, region: &str) -> bool {
        self.regions.is_empty() || self.regions.contains(region)
    }
}

/// What a cluster does where nothing else is asked for. Kept once, when the cluster is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementDefaults {
    /// The founding nodes: they count as active before they have registered.
    pub founders: BTreeSet<NodeId>,
    /// Replicas of a topic that asks for no number.
    pub replication: u32,
}

/// Why replicas are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MoveReason {
    /// Somebody asked for it.
    Operator,
    /// A node is drained.
    Drain,
    /// A node was silent for too long.
    Lost,
    /// Nodes hold unequal shares, or replicas stand too close together.
    Rebalance,
    /// The topic's placement was altered.
    Policy,
}

/// A move that is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reassignment {
    /// Who shall hold the replicas.
    pub target: BTreeSet<NodeId>,
    /// Why.
    pub reason: MoveReason,
    /// When it was asked for.
    pub started: UnixNanos,
    /// It was turned round: the target is where the replicas were.
    pub cancelled: bool,
    /// What the partition's leader said last; none before it said anything.
    pub report: Option<MoveReport>,
}

/// How far a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MovePhase {
    /// Something is in the way; the report says what.
    Waiting,
    /// New replicas catch up.
    CatchingUp,
    /// The voters are being exchanged.
    Switching,
    /// Leadership goes to a node that stays.
    HandingOver,
}

/// What the partition's leader says of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoveReport {
    /// How far it is.
    pub phase: MovePhase,
    /// Log entries that the slowest new replica still misses.
    pub behind: u64,
    /// What it waits for, or why new replicas come no closer; empty when it gets on.
    pub waiting: String,
    /// The node that said so.
    pub by: NodeId,
    /// When.
    pub at: UnixNanos,
}

impl State {
    pub(super) fn set_placement_defaults(&mut self, founders: BTreeSet<NodeId>, replication: u32) -> Response {
        if self.defaults.is_some() {
            return Ok(Outcome::Done);
        }
        if founders.is_empty() || replication == 0 || replication > REPLICATION_MAX {
            return Err(Refusal::Replication);
        }
        // Topics from before placement was kept are on every founding node.
        let unresolved = |topic: &&Arc<Topic>| topic.replicas.is_empty() || topic.placement.replication == 0;
        let old: Vec<Topic> = self.topics.values().filter(unresolved).map(|topic| (**topic).clone()).collect();
        for mut topic in old {
            if topic.replicas.is_empty() {
                topic.replicas.clone_from(&founders);
            }
            if topic.placement.replication == 0 {
                topic.placement.replication = topic.replicas.len() as u32;
            }
            self.put_topic(topic);
        }
        self.defaults = Some(PlacementDefaults { founders, replication });
        Ok(Outcome::Done)
    }

    /// The node as placement sees it: a founding node counts before it has registered, without a region.
    fn standing(&self, node: NodeId) -> Option<(NodeState, &str)> {
        if let Some(known) = self.nodes.get(&node) {
            return Some((known.state, &known.region));
        }
        let founder = self.defaults.as_ref().is_some_and(|defaults| defaults.founders.contains(&node))
            && !self.revoked_nodes.contains_key(&node);
        founder.then_some((NodeState::Active, ""))
    }

    fn active(&self) -> impl Iterator<Item = (NodeId, &str)> {
        let founders = self.defaults.iter().flat_map(|defaults| defaults.founders.iter().copied());
        let all: BTreeSet<NodeId> = self.nodes.keys().copied().chain(founders).collect();
        all.into_iter().filter_map(|node| {
            let (state, region) = self.standing(node)?;
            (state == NodeState::Active).then_some((node, region))
        })
    }

    /// Ends a node's being one, for ever.
    pub(super) fn end_node(&mut self, node: NodeId, at: UnixNanos) {
        self.revoked_nodes.entry(node).or_insert(at);
        self.next_node = self.next_node.max(NodeId(node.0.saturating_add(1)));
        if let Some(known) = self.nodes.get_mut(&node).filter(|known| known.state != NodeState::Removed) {
            *known = Arc::new(NodeRecord { state: NodeState::Removed, ..(**known).clone() });
        }
    }

    pub(super) fn set_node_state(&mut self, node: NodeId, state: NodeState, at: UnixNanos) -> Response {
        let old = self.nodes.get(&node).ok_or(Refusal::NodeUnknown)?;
        match (old.state, state) {
            (old, new) if old == new => return Ok(Outcome::Done),
            (NodeState::Removed, _) => return Err(Refusal::NodeRevoked),
            (NodeState::Active, NodeState::Removed) => return Err(Refusal::NodeActive),
            (NodeState::Active, NodeState::Draining) if self.active().all(|(other, _)| other == node) => {
                return Err(Refusal::LastNode);
            }
            (_, NodeState::Removed) if self.holds(node) > 0 => return Err(Refusal::NodeHolds),
            (_, NodeState::Removed) => {
                self.end_node(node, at);
                return Ok(Outcome::Done);
            }
            _ => {}
        }
        let changed = NodeRecord { state, ..(**old).clone() };
        self.nodes.insert(node, Arc::new(changed));
        Ok(Outcome::Done)
    }

    /// How many topics have a replica on the node, or shall have one there.
    pub(super) fn holds(&self, node: NodeId) -> usize {
        let founders = self.defaults.as_ref().map(|defaults| &defaults.founders);
        let holds = |topic: &&Arc<Topic>| {
            // Unresolved, it may be anywhere.
            let unresolved = topic.replicas.is_empty() && founders.is_none_or(|founders| founders.contains(&node));
            let target = topic.reassignment.as_ref().is_some_and(|it| it.target.contains(&node));
            topic.replicas.contains(&node) || target || unresolved
        };
        self.topics.values().filter(holds).count()
    }

    /// Whether as many nodes as replicas may hold one.
    pub(super) fn check_placement(&self, placement: &Placement) -> Result<(), Refusal> {
        if placement.replication == 0 || placement.replication > REPLICATION_MAX {
            return Err(Refusal::Replication);
        }
        let named = placement.regions.iter().chain(Some(&placement.leader_region).filter(|it| !it.is_empty()));
        for region in named {
            if !self.active().any(|(_, other)| other == region) {
                return Err(Refusal::RegionUnknown);
            }
        }
        if !placement.leader_region.is_empty() && !placement.allows(&placement.leader_region) {
            return Err(Refusal::RegionForbidden);
        }
        let eligible = self.active().filter(|(_, region)| placement.allows(region)).count();
        if eligible < placement.replication as usize { Err(Refusal::TooFewNodes) } else { Ok(()) }
    }

    /// Whether these nodes may take replicas that they do not have yet.
    pub(super) fn check_nodes(&self, nodes: &BTreeSet<NodeId>, placement: &Placement) -> Result<(), Refusal> {
        for node in nodes {
            let (state, region) = self.standing(*node).ok_or(Refusal::TargetUnusable)?;
            if state != NodeState::Active {
                return Err(Refusal::TargetUnusable);
            }
            if !placement.allows(region) {
                return Err(Refusal::RegionForbidden);
            }
        }
        Ok(())
    }

    pub(super) fn alter_topic(&mut self, topic: TopicId, placement: Placement, at: UnixNanos) -> Response {
        let old = self.topics.get(&topic).ok_or(Refusal::TopicUnknown)?;
        if old.state == TopicState::Deleting {
            return Err(Refusal::TopicState(old.state));
        }
        if old.placement == placement {
            return Ok(Outcome::Topic(Arc::clone(old)));
        }
        self.check_placement(&placement)?;
        let modified = old.modified.max(at);
        Ok(self.put_topic(Topic { placement, modified, ..(**old).clone() }))
    }

    pub(super) fn start_move(
        &mut self,
        topic: TopicId,
        assignment: u64,
        target: BTreeSet<NodeId>,
        reason: MoveReason,
        at: UnixNanos,
    ) -> Response {
        let old = self.topics.get(&topic).ok_or(Refusal::TopicUnknown)?;
        if old.state == TopicState::Deleting {
            return Err(Refusal::TopicState(old.state));
        }
        match &old.reassignment {
            Some(on) if on.target == target && !on.cancelled && old.assignment == assignment => {
                return Ok(Outcome::Topic(Arc::clone(old)));
            }
            Some(_) => return Err(Refusal::MoveOn),
            None if old.replicas == target => return Ok(Outcome::Topic(Arc::clone(old))),
            None if old.assignment != assignment => return Err(Refusal::MoveStale),
            None => {}
        }
        // Unresolved, nobody knows what is moved.
        if old.replicas.is_empty() {
            return Err(Refusal::MoveStale);
        }
        if target.is_empty() || target.len() > REPLICATION_MAX as usize {
            return Err(Refusal::Replication);
        }
        let gaining = target.difference(&old.replicas).copied().collect();
        self.check_nodes(&gaining, &old.placement)?;
        let reassignment = Some(Reassignment { target, reason, started: at, cancelled: false, report: None });
        Ok(self.put_topic(Topic { reassignment, ..(**old).clone() }))
    }

    /// The topic and its move, if both are as the proposer saw them.
    fn moving(&self, topic: TopicId, assignment: u64) -> Result<(&Arc<Topic>, &Reassignment), Refusal> {
        let old = self.topics.get(&topic).ok_or(Refusal::TopicUnknown)?;
        if old.assignment != assignment {
            return Err(Refusal::MoveStale);
        }
        Ok((old, old.reassignment.as_ref().ok_or(Refusal::NoMove)?))
    }

    pub(super) fn cancel_move(&mut self, topic: TopicId, assignment: u64, at: UnixNanos) -> Response {
        let (old, on) = self.moving(topic, assignment)?;
        if on.cancelled {
            return Ok(Outcome::Topic(Arc::clone(old)));
        }
        let back = Reassignment {
            target: old.replicas.clone(),
            started: on.started.max(at),
            cancelled: true,
            report: None,
            ..on.clone()
        };
        Ok(self.put_topic(Topic { reassignment: Some(back), ..(**old).clone() }))
    }

    pub(super) fn finish_move(&mut self, topic: TopicId, assignment: u64, replicas: BTreeSet<NodeId>) -> Response {
        if let Some(old) = self.topics.get(&topic)
            && old.assignment == assignment.saturating_add(1)
            && old.replicas == replicas
        {
            return Ok(Outcome::Topic(Arc::clone(old)));
        }
        let (old, on) = self.moving(topic, assignment)?;
        // The move was turned round while its end was on the way: the leader turns with it.
        if on.target != replicas {
            return Err(Refusal::MoveStale);
        }
        let assignment = assignment.saturating_add(1);
        Ok(self.put_topic(Topic { replicas, assignment, reassignment: None, ..(**old).clone() }))
    }

    pub(super) fn report_move(&mut self, topic: TopicId, assignment: u64, report: MoveReport) -> Response {
        let (old, on) = self.moving(topic, assignment)?;
        if on.report.as_ref().is_some_and(|known| known.at >= report.at) {
            return Ok(Outcome::Topic(Arc::clone(old)));
        }
        let on = Reassignment { report: Some(report), ..on.clone() };
        Ok(self.put_topic(Topic { reassignment: Some(on), ..(**old).clone() }))
    }
}

#[cfg(test)]
mod tests;
