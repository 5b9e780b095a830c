//! Nodes and partitions, for operators: what is where, what moves, and why something does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::{ClusterVersion, GroupId, NodeId, TopicId};
use ensign_raft::GroupStatus;
use tonic::Status;
use tracing::{info, warn};

use super::convert::{span, time};
use super::removal;
use super::scope::Caller;
use super::status;
use super::{Shared, keys};
use crate::catalog::{
    MovePhase, MoveReason, NodeRecord, NodeState, PlaceError, Placement, Reassignment, Refusal, Topic, TopicState,
};
use crate::placement::planner::{Facts, Pulse};
use crate::placement::{Obstacle, ObstacleKind, obstacles};

/// The most partitions in one reply.
const PAGE: usize = 1_000;
/// The most reasons why a node's replicas do not get on, in one reply.
const REASONS_MAX: usize = 8;

/// What an answer is made of: one look at everything.
struct Look {
    facts: Facts,
    obstacles: BTreeMap<TopicId, Obstacle>,
    topics: Vec<Arc<Topic>>,
    groups: Vec<GroupStatus>,
    leaders: BTreeMap<GroupId, NodeId>,
}

impl Look {
    fn new(shared: &Shared) -> Self {
        let mut topics = shared.catalog.view().all_topics();
        topics.retain(|topic| topic.state != TopicState::Deleting);
        let groups = shared.runtime.groups();
        // A replica goes on naming its leader when that has died.
        let led = |group: &GroupStatus| group.leadership.leader.filter(|leader| shared.catalog.is_alive(*leader));
        let leaders = groups.iter().filter_map(|group| Some((group.id, led(group)?))).collect();
        let (facts, obstacles) = (shared.catalog.facts(), obstacles(&shared.catalog, shared.clock.wall()));
        Self { facts, obstacles, topics, groups, leaders }
    }

    /// Asks the nodes that hold these topics who leads those whose leader is not known here.
    async fn ask_leaders(&mut self, shared: &Shared, topics: &[Arc<Topic>]) {
        let unknown: Vec<&Arc<Topic>> = topics.iter().filter(|it| !self.leaders.contains_key(&it.group)).collect();
        // In a move, the new replicas may have taken over already.
        let target = |topic: &Topic| topic.reassignment.as_ref().map(|on| on.target.clone()).unwrap_or_default();
        let holders =
            unknown.iter().flat_map(|topic| shared.catalog.replicas_of(topic).into_iter().chain(target(topic)));
        let asked: BTreeSet<NodeId> = holders.filter(|node| shared.catalog.is_alive(*node)).collect();
        if asked.is_empty() {
            return;
        }
        let wanted: BTreeSet<GroupId> = unknown.iter().map(|topic| topic.group).collect();
        self.leaders.extend(shared.reports.leaders(asked, &wanted).await);
    }

    fn node(&self, shared: &Shared, node: &NodeRecord) -> pb::Node {
        let state = match node.state {
            NodeState::Active => pb::NodeState::Active,
            NodeState::Draining => pb::NodeState::Draining,
            NodeState::Removed => pb::NodeState::Removed,
        };
        let holds = |topic: &&Arc<Topic>| shared.catalog.replicas_of(topic).contains(&node.id);
        let held: Vec<_> = self.topics.iter().filter(holds).collect();
        let target = |topic: &Topic| topic.reassignment.as_ref().map(|on| on.target.contains(&node.id));
        let arriving = self.topics.iter().filter(|topic| !holds(topic) && target(topic) == Some(true)).count();
        let leaving = held.iter().filter(|topic| target(topic) == Some(false)).count();
        let leaves = node.state != NodeState::Active || self.pulse(node.id) == Pulse::Lost;
        let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for topic in held.iter().filter(|topic| leaves || target(topic) == Some(false)) {
            if let Some(obstacle) = self.obstacles.get(&topic.id) {
                reasons.entry(&obstacle.what).or_default().push(topic.name.as_str());
            }
        }
        let stuck = reasons.iter().take(REASONS_MAX).map(|(why, topics)| format!("{}: {why}", removal::some(topics)));
        let votes = [(GroupId::CATALOG, "catalog"), (GroupId::VAULT, "vault")]
            .into_iter()
            .filter(|(id, _)| self.groups.iter().any(|group| group.id == *id && group.voters.contains(&node.id)));
        pb::Node {
            id: node.id.0,
            state: state.into(),
            region: node.region.clone(),
            zone: node.zone.clone(),
            address: node.peer.clone(),
            silent_for: shared.catalog.silent_for(node.id).and_then(span),
            lost: self.pulse(node.id) == Pulse::Lost,
            replicas: held.len() as u64,
            arriving: arriving as u64,
            leaving: leaving as u64,
            stuck: stuck.collect(),
            name: node.name.clone(),
            votes: votes.map(|(_, name)| name.to_owned()).collect(),
            never_started: !node.has_started(),
        }
    }

    fn pulse(&self, node: NodeId) -> Pulse {
        self.facts.nodes.get(&node).map_or(Pulse::Lost, |facts| facts.pulse)
    }

    /// What does not go away by itself; what else a move waits for is told with the move.
    fn lasting(&self, topic: TopicId) -> Option<&Obstacle> {
        let lasts = |it: &&Obstacle| matches!(it.kind, ObstacleKind::Nodes | ObstacleKind::Majority);
        self.obstacles.get(&topic).filter(lasts)
    }

    fn partition(&self, shared: &Shared, topic: &Topic) -> pb::PartitionInfo {
        let facts = shared.catalog.facts_of(topic);
        let numbers = |nodes: &BTreeSet<NodeId>| nodes.iter().map(|node| node.0).collect();
        let silent =
            facts.replicas.iter().filter(|node| self.pulse(**node) != Pulse::Alive).map(|node| node.0).collect();
        pb::PartitionInfo {
            topic_id: topic.id.to_string(),
            topic: topic.name.as_str().to_owned(),
            project_id: topic.project.to_string(),
            group: topic.group.0,
            replicas: numbers(&facts.replicas),
            placement: Some(pb::PlacementPolicy {
                replication: facts.placement.replication,
                regions: facts.placement.regions.iter().cloned().collect(),
                leader_region: facts.placement.leader_region.clone(),
            }),
            assignment: topic.assignment,
            r#move: topic.reassignment.as_ref().map(on_wire),
            leader: self.leaders.get(&topic.group).map_or(0, |leader| leader.0),
            preferred_leader: self.facts.preferred_leader(&facts).map_or(0, |node| node.0),
            stuck: self.lasting(topic.id).map(|obstacle| obstacle.what.clone()).unwrap_or_default(),
            silent,
        }
    }
}

fn on_wire(on: &Reassignment) -> pb::Move {
    let reason = match on.reason {
        MoveReason::Operator => pb::MoveReason::Operator,
        MoveReason::Drain => pb::MoveReason::Drain,
        MoveReason::Lost => pb::MoveReason::Lost,
        MoveReason::Rebalance => pb::MoveReason::Rebalance,
        MoveReason::Policy => pb::MoveReason::Policy,
    };
    let phase = on.report.as_ref().map_or(pb::MovePhase::Unspecified, |report| match report.phase {
        MovePhase::Waiting => pb::MovePhase::Waiting,
        MovePhase::CatchingUp => pb::MovePhase::CatchingUp,
        MovePhase::Switching => pb::MovePhase::Switching,
        MovePhase::HandingOver => pb::MovePhase::HandingOver,
    });
    pb::Move {
        target: on.target.iter().map(|node| node.0).collect(),
        reason: reason.into(),
        started: time(on.started),
        cancelled: on.cancelled,
        phase: phase.into(),
        behind: on.report.as_ref().map_or(0, |report| report.behind),
        waiting: on.report.as_ref().map(|report| report.waiting.clone()).unwrap_or_default(),
        reported: on.report.as_ref().and_then(|report| time(report.at)),
    }
}

fn find_node(shared: &Shared, id: u64) -> Result<Arc<NodeRecord>, Status> {
    if id == 0 {
        return Err(Status::invalid_argument("node_id: nodes are numbered from 1"));
    }
    let known = shared.catalog.view().node(NodeId(id));
    known.ok_or_else(|| Status::not_found(format!("there is no node {id} in the cluster")))
}

/// The topic of this id or name.
fn find_topic(shared: &Shared, text: &str) -> Result<Arc<Topic>, Status> {
    if text.is_empty() {
        return Err(Status::invalid_argument("topic: name a topic by its id or its name"));
    }
    let view = shared.catalog.view();
    if let Some(topic) = text.parse::<TopicId>().ok().and_then(|id| view.topic(id)) {
        return Ok(topic);
    }
    let mut named = view.all_topics().into_iter().filter(|topic| topic.name.as_str() == text);
    match (named.next(), named.next()) {
        (Some(topic), None) => Ok(topic),
        (None, _) => Err(Status::not_found(format!("there is no topic {text:?}"))),
        (Some(_), Some(_)) => {
            Err(Status::invalid_argument(format!("several projects have a topic {text:?}: name it by its id")))
        }
    }
}

pub(super) fn list_nodes(shared: &Shared, request: pb::ListNodesRequest) -> Result<pb::ListNodesReply, Status> {
    let nodes =
        if request.node_id == 0 { shared.catalog.view().nodes() } else { vec![find_node(shared, request.node_id)?] };
    let look = Look::new(shared);
    Ok(pb::ListNodesReply { nodes: nodes.iter().map(|node| look.node(shared, node)).collect() })
}

pub(super) async fn set_node_state(
    shared: &Shared,
    caller: &Caller,
    request: pb::SetNodeStateRequest,
) -> Result<pb::Node, Status> {
    let node = find_node(shared, request.node_id)?;
    let state = match request.state() {
        pb::NodeState::Active => NodeState::Active,
        pb::NodeState::Draining => NodeState::Draining,
        pb::NodeState::Removed => NodeState::Removed,
        pb::NodeState::Unspecified => return Err(Status::invalid_argument("state: say what the node shall be")),
    };
    if request.force && state != NodeState::Removed {
        return Err(Status::invalid_argument("force: only a node that is removed can be removed by force"));
    }
    if state == NodeState::Removed && node.state != NodeState::Removed {
        if request.force {
            return by_force(shared, caller, &node).await;
        }
        removal::check_votes(&shared.runtime.groups(), node.id)?;
    }
    let changed = shared.catalog.set_node_state(node.id, state).await;
    changed.map_err(|error| node_refused(shared, node.id, &error))?;
    info!(node = %node.id, ?state, by = %caller.claims.subject, "the state of a node was set");
    let node = find_node(shared, request.node_id)?;
    Ok(Look::new(shared).node(shared, &node))
}

fn check_force(shared: &Shared, node: NodeId) -> Result<(), Status> {
    let liveness = shared.runtime.liveness();
    let topics = shared.catalog.view().all_topics();
    let topics = topics.iter().filter(|topic| topic.state != TopicState::Deleting);
    let held = removal::Held {
        groups: &shared.runtime.groups(),
        topics: topics.map(|topic| (topic.name.as_str().to_owned(), shared.catalog.facts_of(topic))).collect(),
        nodes: shared.catalog.node_facts().nodes,
        state: &|node| liveness.state(node),
    };
    held.check(node)
}

/// Removes a node that does not answer, although it was not drained, if every group can do without it.
async fn by_force(shared: &Shared, caller: &Caller, node: &NodeRecord) -> Result<pb::Node, Status> {
    shared.catalog.refresh().await.map_err(|error| status::stale(&error))?;
    check_force(shared, node.id)?;
    shared.catalog.revoke_node(node.id).await.map_err(|error| status::write_failed(&error))?;
    warn!(node = %node.id, by = %caller.claims.subject, "a node that does not answer was removed by force");
    let node = find_node(shared, node.id.0)?;
    Ok(Look::new(shared).node(shared, &node))
}

fn node_refused(shared: &Shared, node: NodeId, error: &PlaceError) -> Status {
    let PlaceError::Refused(refusal) = error else { return status::place(error) };
    match refusal {
        Refusal::NodeHolds => {
            let held = shared.catalog.view().holds(node);
            Status::failed_precondition(format!(
                "node {node} still holds replicas of {held} partitions, or is about to, and each would lose a vote: wait for the \
                 drain to end; `ensign node describe {node}` says how far it is, and what is in the way. If the node is lost for good, \
                 `ensign node remove {node} --force`"
            ))
        }
        Refusal::NodeActive => Status::failed_precondition(format!(
            "node {node} is not drained: run `ensign node drain {node}` first, which moves its replicas elsewhere; if the node is lost for \
             good, `ensign node remove {node} --force`"
        )),
        Refusal::LastNode => Status::failed_precondition(format!(
            "node {node} is the last active node: its replicas could go nowhere; add a node, or undrain one"
        )),
        Refusal::NodeRevoked => {
            Status::failed_precondition(format!("node {node} was removed, for ever: its number is never used again"))
        }
        _ => status::place(error),
    }
}

pub(super) async fn list_partitions(
    shared: &Shared,
    request: &pb::ListPartitionsRequest,
) -> Result<pb::ListPartitionsReply, Status> {
    let after = super::scope::parse::<TopicId>(&request.after, "after")?;
    if request.node_id != 0 {
        find_node(shared, request.node_id)?;
    }
    let one = if request.topic.is_empty() { None } else { Some(find_topic(shared, &request.topic)?.id) };
    let mut look = Look::new(shared);
    let wanted = |topic: &&Arc<Topic>| {
        let concerned = || {
            let node = NodeId(request.node_id);
            let comes = topic.reassignment.as_ref().is_some_and(|on| on.target.contains(&node));
            comes || shared.catalog.replicas_of(topic).contains(&node)
        };
        one.is_none_or(|one| one == topic.id)
            && after.is_none_or(|after| after < topic.id)
            && (request.node_id == 0 || concerned())
            && (!request.unsettled || topic.reassignment.is_some() || look.obstacles.contains_key(&topic.id))
    };
    let limit = if request.limit == 0 { PAGE } else { PAGE.min(request.limit as usize) };
    let mut found = look.topics.iter().filter(wanted);
    let page: Vec<_> = found.by_ref().take(limit).map(Arc::clone).collect();
    let next = match (found.next(), page.last()) {
        (Some(_), Some(last)) => last.id.to_string(),
        _ => String::new(),
    };
    look.ask_leaders(shared, &page).await;
    let partitions = page.iter().map(|topic| look.partition(shared, topic)).collect();
    Ok(pb::ListPartitionsReply { partitions, next })
}

fn shown(shared: &Shared, topic: &Topic) -> pb::PartitionInfo {
    Look::new(shared).partition(shared, topic)
}

pub(super) async fn move_partition(
    shared: &Shared,
    caller: &Caller,
    request: &pb::MovePartitionRequest,
) -> Result<pb::PartitionInfo, Status> {
    let topic = find_topic(shared, &request.topic)?;
    let target: BTreeSet<NodeId> = request.target.iter().copied().map(NodeId).collect();
    let placement = shared.catalog.facts_of(&topic).placement;
    if target.len() != request.target.len() || target.len() != placement.replication as usize {
        let (name, count) = (topic.name.as_str(), placement.replication);
        return Err(Status::invalid_argument(format!(
            "target: topic {name} has {count} replicas, so name {count} different nodes; `ensign topic alter --replication` \
             changes how many"
        )));
    }
    check_target(shared, &topic, &target, &placement)?;
    if let Some(why) = shared.catalog.node_facts().without_majority(&shared.catalog.facts_of(&topic)) {
        return Err(crate::status::unplaceable(&why));
    }
    let moved = shared.catalog.start_move(&topic, target, MoveReason::Operator).await;
    let moved = moved.map_err(|error| match error {
        PlaceError::Refused(Refusal::MoveOn) => Status::failed_precondition(format!(
            "the replicas of topic {0} are being moved already: wait, or run `ensign partition cancel {0}`",
            topic.name.as_str()
        )),
        error => status::place(&error),
    })?;
    info!(topic = %topic.id, by = %caller.claims.subject, "a move was asked for");
    Ok(shown(shared, &moved))
}

/// Says which node of a target takes no replica, and why.
fn check_target(
    shared: &Shared,
    topic: &Topic,
    target: &BTreeSet<NodeId>,
    placement: &Placement,
) -> Result<(), Status> {
    let facts = shared.catalog.facts();
    for node in target.difference(&shared.catalog.replicas_of(topic)) {
        let refuse = |why: String| Err(Status::failed_precondition(format!("target: node {node} {why}")));
        let Some(known) = facts.nodes.get(node) else {
            return Err(Status::not_found(format!("target: there is no node {node} in the cluster")));
        };
        if known.state != NodeState::Active {
            return refuse("is drained or removed, and takes no replicas".to_owned());
        }
        if !placement.allows(&known.region) {
            return refuse(format!("is in region {:?}, which replicas of this topic may not be in", known.region));
        }
        if known.pulse != Pulse::Alive {
            return refuse("does not answer, and would take nothing".to_owned());
        }
    }
    Ok(())
}

pub(super) async fn cancel_move(
    shared: &Shared,
    caller: &Caller,
    request: &pb::CancelMoveRequest,
) -> Result<pb::PartitionInfo, Status> {
    let topic = find_topic(shared, &request.topic)?;
    let cancelled = shared.catalog.cancel_move(&topic).await.map_err(|error| status::place(&error))?;
    info!(topic = %topic.id, by = %caller.claims.subject, "a move was turned round");
    Ok(shown(shared, &cancelled))
}

pub(super) async fn alter_topic(
    shared: &Shared,
    caller: &Caller,
    request: pb::AlterTopicRequest,
) -> Result<pb::PartitionInfo, Status> {
    let topic = find_topic(shared, &request.topic)?;
    let rebound = rebind(shared, caller, &topic, &request.ring).await?;
    if let (Some(rebound), None, None, None) = (&rebound, request.replication, &request.regions, &request.leader_region)
    {
        return Ok(shown(shared, rebound));
    }
    let mut placement = shared.catalog.facts_of(&topic).placement;
    if let Some(replication) = request.replication {
        placement.replication = replication;
    }
    if let Some(set) = request.regions {
        placement.regions = set.regions.into_iter().collect();
    }
    if let Some(region) = request.leader_region {
        placement.leader_region = region;
    }
    let altered = shared.catalog.alter_topic(topic.id, placement).await.map_err(|error| status::place(&error))?;
    info!(topic = %topic.id, placement = ?altered.placement, by = %caller.claims.subject, "a topic's placement was altered");
    Ok(shown(shared, &altered))
}

/// Binds a topic to another key ring of its project, if one is named.
async fn rebind(shared: &Shared, caller: &Caller, topic: &Topic, ring: &str) -> Result<Option<Arc<Topic>>, Status> {
    if ring.is_empty() {
        return Ok(None);
    }
    shared.catalog.require(ClusterVersion::V2).await.map_err(|failure| status::write_failed(&failure))?;
    let project = shared.catalog.view().project(topic.project);
    let project = project.ok_or_else(|| Status::not_found("project not found"))?;
    let ring = keys::usable_ring(shared, &project, ring).await?;
    let bound = shared.catalog.set_topic_ring(topic.id, ring).await.map_err(|error| status::bind_ring(&error))?;
    info!(topic = %topic.id, %ring, by = %caller.claims.subject, "a topic was bound to another key ring");
    Ok(Some(bound))
}
