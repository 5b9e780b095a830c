//! Placement, from any node: nodes that come and go, where topics may be, moves.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ensign_proto::{GroupId, NodeId, TopicId};

use super::command::{Command, Outcome, Refusal};
use super::errors::{PlaceError, WriteFailure};
use super::handle::{Catalog, unexpected};
use super::moves::{MoveReason, MoveReport, NodeState, Placement, PlacementDefaults};
use super::records::{Topic, TopicState};
use crate::placement::planner::{Facts, NodeFacts, Pulse, TopicFacts, Unplaceable};

/// As many replicas as topics have by default, where the cluster has as many nodes.
const REPLICATION: u32 = 3;

/// Where a new topic shall be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PlacementWish {
    /// How many replicas; none for as many as the cluster's topics have.
    pub replication: Option<u32>,
    /// The regions that replicas never leave; empty for any.
    pub regions: BTreeSet<String>,
    /// The region that should lead; empty for none.
    pub leader_region: String,
}

/// Finds places for topics that are made together: each counts when the next is placed.
pub(super) struct Placer {
    facts: Facts,
    placement: Placement,
}

impl Placer {
    /// Where the topic goes.
    pub(super) fn place(&mut self, id: TopicId) -> Result<(Placement, BTreeSet<NodeId>), Unplaceable> {
        let placement = self.placement.clone();
        let replicas = self.facts.choose(&placement)?;
        self.facts.topics.push(TopicFacts {
            id,
            group: GroupId::FIRST_PARTITION,
            replicas: replicas.clone(),
            target: None,
            cancelled: false,
            placement: placement.clone(),
        });
        Ok((placement, replicas))
    }
}

impl Catalog {
    /// The cluster's defaults; before they are kept, what they will be.
    ///
    /// The founders are the members of the catalog's group, which all nodes agreed on, and not what one node's settings say.
    pub fn defaults(&self) -> PlacementDefaults {
        self.placement_defaults().unwrap_or_else(|| {
            let members = self.parts.replica.members();
            // Nobody belongs to a group that is not there yet, and then nothing is written either.
            let founders = if members.is_empty() { self.parts.founders.clone() } else { members };
            PlacementDefaults { founders, replication: REPLICATION }
        })
    }

    /// Keeps the cluster's defaults, unless they are kept already. For the catalog's leader: it knows who the members are.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub async fn keep_defaults(&self) -> Result<(), PlaceError> {
        if self.placement_defaults().is_some() {
            return Ok(());
        }
        let PlacementDefaults { founders, replication } = self.defaults();
        done(self.write(Command::SetPlacementDefaults { founders, replication }).await?)
    }

    /// What this node knows of nodes and topics, for the planner.
    pub fn facts(&self) -> Facts {
        let topics = self.all_topics();
        let topics = topics.iter().filter(|topic| topic.state != TopicState::Deleting);
        Facts { topics: topics.map(|topic| self.facts_of(topic)).collect(), ..self.node_facts() }
    }

    /// The same without topics, for questions about one.
    pub fn node_facts(&self) -> Facts {
        let pulse = |node: NodeId| match self.silent_for(node) {
            // Nobody listens to it any more.
            _ if self.is_node_revoked(node) => Pulse::Lost,
            None => Pulse::Alive,
            Some(silent) if silent >= self.parts.lost_after => Pulse::Lost,
            Some(_) => Pulse::Silent,
        };
        // A founding node that has not registered yet stands nowhere that is known: it may get new topics, and nothing is moved there.
        let removed = |node: NodeId| self.is_node_revoked(node);
        let founder = |node: NodeId| NodeFacts {
            region: String::new(),
            zone: String::new(),
            state: if removed(node) { NodeState::Removed } else { NodeState::Active },
            pulse: pulse(node).max(Pulse::Silent),
        };
        let mut nodes: BTreeMap<NodeId, NodeFacts> =
            self.defaults().founders.into_iter().map(|node| (node, founder(node))).collect();
        // A machine that joined and has never started is known, and no place to put anything.
        for node in self.nodes().iter().filter(|node| node.has_started()) {
            let (region, zone) = (node.region.clone(), node.zone.clone());
            nodes.insert(node.id, NodeFacts { region, zone, state: node.state, pulse: pulse(node.id) });
        }
        Facts { nodes, topics: Vec::new() }
    }

    /// Whether a node answers this one.
    pub fn is_alive(&self, node: NodeId) -> bool {
        node == self.parts.me || (self.parts.liveness.silent_for(node).is_none() && !self.is_node_revoked(node))
    }

    /// For how long a node has not answered this one; none of a node that does.
    pub fn silent_for(&self, node: NodeId) -> Option<std::time::Duration> {
        self.parts.liveness.silent_for(node).filter(|_| node != self.parts.me)
    }

    /// What this node knows of a topic, for the planner.
    pub fn facts_of(&self, topic: &Topic) -> TopicFacts {
        let replicas = self.replicas_of(topic);
        let mut placement = topic.placement.clone();
        if placement.replication == 0 {
            placement.replication = replicas.len() as u32;
        }
        TopicFacts {
            id: topic.id,
            group: topic.group,
            replicas,
            target: topic.reassignment.as_ref().map(|on| on.target.clone()),
            cancelled: topic.reassignment.as_ref().is_some_and(|on| on.cancelled),
            placement,
        }
    }

    /// Finds places for new topics.
    pub(super) fn placer(&self, wish: PlacementWish) -> Placer {
        let facts = self.facts();
        let mut placement = Placement { replication: 1, regions: wish.regions, leader_region: wish.leader_region };
        // A drained node counts: while it is away, a topic is refused rather than made with fewer replicas for ever.
        let nodes = facts.nodes.values().filter(|node| node.state != NodeState::Removed);
        let there = nodes.filter(|node| placement.allows(&node.region)).count();
        let default = || u32::try_from(there).unwrap_or(u32::MAX).clamp(1, self.defaults().replication);
        placement.replication = wish.replication.unwrap_or_else(default);
        Placer { facts, placement }
    }

    /// Drains a node, takes that back, or removes it for ever. Doing it again changes nothing.
    ///
    /// # Errors
    /// [`PlaceError::Refused`]: it is unknown, or holds replicas, or is the last.
    pub async fn set_node_state(&self, node: NodeId, state: NodeState) -> Result<(), PlaceError> {
        done(self.write(Command::SetNodeState { node, state, at: self.now() }).await?)
    }

    /// Replaces where a topic's replicas may be; what does not fit is moved in the background.
    ///
    /// # Errors
    /// [`PlaceError::Unplaceable`]: the cluster has no nodes for it.
    pub async fn alter_topic(&self, topic: TopicId, placement: Placement) -> Result<Arc<Topic>, PlaceError> {
        self.facts().check(&placement)?;
        moved(self.write(Command::AlterTopic { topic, placement, at: self.now() }).await?)
    }

    /// Begins to move a topic's replicas to `target`. It goes on in the background, also if this node dies.
    ///
    /// # Errors
    /// [`PlaceError::Refused`]: a move is on, or was since this node looked, or a node of the target takes no replicas.
    pub async fn start_move(
        &self,
        topic: &Topic,
        target: BTreeSet<NodeId>,
        reason: MoveReason,
    ) -> Result<Arc<Topic>, PlaceError> {
        let (id, assignment) = (topic.id, topic.assignment);
        moved(self.write(Command::StartMove { topic: id, assignment, target, reason, at: self.now() }).await?)
    }

    /// Turns a move round: the replicas go back to where they were.
    ///
    /// # Errors
    /// [`PlaceError::Refused`]: none is on, or it has ended since this node looked.
    pub async fn cancel_move(&self, topic: &Topic) -> Result<Arc<Topic>, PlaceError> {
        let (id, assignment) = (topic.id, topic.assignment);
        moved(self.write(Command::CancelMove { topic: id, assignment, at: self.now() }).await?)
    }

    /// Ends a move whose target are the group's voters now.
    ///
    /// # Errors
    /// [`PlaceError::Refused`]: it was turned round meanwhile.
    pub async fn finish_move(&self, topic: &Topic, replicas: BTreeSet<NodeId>) -> Result<Arc<Topic>, PlaceError> {
        let (id, assignment) = (topic.id, topic.assignment);
        moved(self.write(Command::FinishMove { topic: id, assignment, replicas }).await?)
    }

    /// Says how far a move is.
    ///
    /// # Errors
    /// [`PlaceError::Refused`]: it is over.
    pub async fn report_move(&self, topic: &Topic, report: MoveReport) -> Result<Arc<Topic>, PlaceError> {
        let (id, assignment) = (topic.id, topic.assignment);
        moved(self.write(Command::ReportMove { topic: id, assignment, report }).await?)
    }
}

fn done(response: Result<Outcome, Refusal>) -> Result<(), PlaceError> {
    match response {
        Ok(_) => Ok(()),
        Err(refusal) => Err(refused(refusal)),
    }
}

fn moved(response: Result<Outcome, Refusal>) -> Result<Arc<Topic>, PlaceError> {
    match response {
        Ok(Outcome::Topic(topic)) => Ok(topic),
        Err(refusal) => Err(refused(refusal)),
        other => Err(unexpected(&other).into()),
    }
}

fn refused(refusal: Refusal) -> PlaceError {
    match refusal {
        Refusal::Unreadable => WriteFailure::Internal { cause: refusal.to_string() }.into(),
        refusal => PlaceError::Refused(refusal),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use ensign_proto::ClusterVersion;
    use ensign_raft::env::{SeededRng, SystemClock};

    use super::*;
    use crate::catalog::NodeRecord;
    use crate::catalog::testing::solo;

    #[tokio::test]
    async fn a_machine_that_joined_takes_replicas_once_it_has_started() {
        let catalog = solo(Arc::new(SystemClock), Arc::new(SeededRng::new(1)));
        let (key, version) = (Bytes::from_static(&[7; 32]), ClusterVersion::NEWEST);
        let joined = NodeRecord { id: NodeId(2), key, version, ..NodeRecord::default() };
        catalog.put_node(joined.clone()).await.unwrap();
        let replication = |wish| catalog.placer(wish).placement.replication;
        assert_eq!(replication(PlacementWish::default()), 1, "there is one node to speak of");
        let two = PlacementWish { replication: Some(2), ..PlacementWish::default() };
        let refused = catalog.placer(two.clone()).place(catalog.fresh_topic());
        assert!(matches!(refused, Err(Unplaceable::TooFewNodes { wanted: 2, eligible: 1, .. })), "{refused:?}");
        catalog.put_node(NodeRecord { incarnation: 1, process: 9, ..joined }).await.unwrap();
        assert_eq!(replication(PlacementWish::default()), 2, "as many as there are, up to three");
        assert!(catalog.placer(two).place(catalog.fresh_topic()).is_ok());
    }
}
