//! Placement's commands in any order: what must hold after each.

use bytes::Bytes;
use ensign_proto::{ClusterVersion, OrgId, ProjectId, RingId};
use proptest::prelude::*;

use super::*;
use crate::catalog::command::{Command, NewTopic};
use crate::catalog::records::{Organization, Project, TopicPolicies};
use crate::catalog::wire;

const AT: UnixNanos = UnixNanos(7);

fn topic(n: u8) -> TopicId {
    TopicId::from_bytes([n; 16])
}

fn ids(numbers: impl IntoIterator<Item = u64>) -> BTreeSet<NodeId> {
    numbers.into_iter().map(NodeId).collect()
}

fn node(id: u64, region: &str) -> Command {
    Command::PutNode(NodeRecord {
        id: NodeId(id),
        peer: format!("host-{id}:5357"),
        region: region.to_owned(),
        version: ClusterVersion::V2,
        ..NodeRecord::default()
    })
}

fn new_topic(n: u8, replicas: BTreeSet<NodeId>, placement: Placement) -> Command {
    Command::CreateTopic(NewTopic {
        id: topic(n),
        project: ProjectId::from_bytes([1; 16]),
        name: format!("topic-{n}").parse().unwrap(),
        ring: RingId::from_bytes([1; 16]),
        replicas,
        placement,
        policies: TopicPolicies::default(),
        at: AT,
    })
}

/// Nodes 1 to 3 in `eu`, 4 and 5 in `us`; topics 1 (nodes 1 to 3, anywhere) and 2 (node 1, only in `eu`).
fn cluster() -> State {
    let mut state = State::default();
    let (org, project) = (OrgId::from_bytes([1; 16]), ProjectId::from_bytes([1; 16]));
    let Organization { id, name, created: at } = Organization { id: org, name: "org".to_owned(), created: AT };
    let eu = Placement { regions: BTreeSet::from(["eu".to_owned()]), ..Placement::anywhere(1) };
    let commands = [
        Command::CreateOrganization { id, name, at },
        Command::CreateProject(Project {
            id: project,
            org,
            name: "project".to_owned(),
            ring: RingId::from_bytes([1; 16]),
            created: AT,
        }),
        Command::SetPlacementDefaults { founders: ids(1..=3), replication: 3 },
        node(1, "eu"),
        node(2, "eu"),
        node(3, "eu"),
        node(4, "us"),
        node(5, "us"),
        new_topic(1, ids(1..=3), Placement::anywhere(3)),
        new_topic(2, ids([1]), eu),
    ];
    for command in commands {
        state.apply(command.clone()).unwrap_or_else(|refusal| panic!("{command:?}: {refusal}"));
    }
    state
}

fn start(n: u8, assignment: u64, target: impl IntoIterator<Item = u64>) -> Command {
    let (topic, target, reason) = (topic(n), ids(target), MoveReason::Operator);
    Command::StartMove { topic, assignment, target, reason, at: AT }
}

fn cancel(n: u8, assignment: u64) -> Command {
    Command::CancelMove { topic: topic(n), assignment, at: AT }
}

fn finish(n: u8, assignment: u64, replicas: impl IntoIterator<Item = u64>) -> Command {
    Command::FinishMove { topic: topic(n), assignment, replicas: ids(replicas) }
}

fn set(node: u64, state: NodeState) -> Command {
    Command::SetNodeState { node: NodeId(node), state, at: AT }
}

#[test]
fn a_move_begins_once_and_ends_with_the_target_alone() {
    let mut state = cluster();
    state.apply(start(1, 0, [1, 2, 4])).unwrap();
    assert_eq!(state.apply(start(1, 0, [1, 2, 5])), Err(Refusal::MoveOn), "one change a group");
    assert_eq!(state.apply(finish(1, 0, [1, 2, 3])), Err(Refusal::MoveStale), "that is not where it leads");
    assert_eq!(state.apply(finish(1, 1, [1, 2, 4])), Err(Refusal::MoveStale));
    state.apply(finish(1, 0, [1, 2, 4])).unwrap();
    let moved = &state.topics[&topic(1)];
    assert_eq!((&moved.replicas, moved.assignment, &moved.reassignment), (&ids([1, 2, 4]), 1, &None));
    assert_eq!(state.apply(start(1, 0, [1, 2, 3])), Err(Refusal::MoveStale), "planned before the move ended");
    assert_eq!(state.apply(cancel(1, 1)), Err(Refusal::NoMove));
    assert_eq!(state.apply(cancel(1, 0)), Err(Refusal::MoveStale));
    assert_eq!(state.apply(start(9, 0, [1])), Err(Refusal::TopicUnknown));
    assert_eq!(state.apply(start(1, 1, [])), Err(Refusal::Replication));
}

#[test]
fn a_cancelled_move_leads_back_and_cannot_end_at_its_old_target() {
    let mut state = cluster();
    state.apply(start(1, 0, [3, 4, 5])).unwrap();
    state.apply(cancel(1, 0)).unwrap();
    assert_eq!(state.apply(finish(1, 0, [3, 4, 5])), Err(Refusal::MoveStale));
    state.apply(finish(1, 0, [1, 2, 3])).unwrap();
    assert_eq!(state.topics[&topic(1)].assignment, 1, "a group that was moved is never founded again");
}

#[test]
fn replicas_never_go_where_they_may_not() {
    let mut state = cluster();
    assert_eq!(state.apply(start(2, 0, [4])), Err(Refusal::RegionForbidden));
    assert_eq!(state.apply(start(1, 0, [1, 2, 9])), Err(Refusal::TargetUnusable));
    state.apply(set(4, NodeState::Draining)).unwrap();
    assert_eq!(state.apply(start(1, 0, [1, 2, 4])), Err(Refusal::TargetUnusable));
    let us = BTreeSet::from(["us".to_owned()]);
    let outside = new_topic(3, ids([1]), Placement { regions: us.clone(), ..Placement::anywhere(1) });
    assert_eq!(state.apply(outside), Err(Refusal::RegionForbidden));
    let alter = |placement| Command::AlterTopic { topic: topic(1), placement, at: AT };
    let two = Placement { regions: us.clone(), ..Placement::anywhere(2) };
    assert_eq!(state.apply(alter(two)), Err(Refusal::TooFewNodes), "one of the two drains");
    assert_eq!(state.apply(alter(Placement::anywhere(0))), Err(Refusal::Replication));
    assert_eq!(state.apply(alter(Placement::anywhere(10))), Err(Refusal::Replication));
    let mars = Placement { leader_region: "mars".to_owned(), ..Placement::anywhere(1) };
    assert_eq!(state.apply(alter(mars)), Err(Refusal::RegionUnknown));
    let contrary = Placement { regions: us, leader_region: "eu".to_owned(), ..Placement::anywhere(1) };
    assert_eq!(state.apply(alter(contrary)), Err(Refusal::RegionForbidden));
    state.apply(alter(Placement { leader_region: "us".to_owned(), ..Placement::anywhere(1) })).unwrap();
}

#[test]
fn a_node_is_removed_only_once_it_is_empty_and_never_comes_back() {
    let mut state = cluster();
    assert_eq!(state.apply(set(3, NodeState::Removed)), Err(Refusal::NodeActive));
    assert_eq!(state.apply(set(9, NodeState::Draining)), Err(Refusal::NodeUnknown));
    state.apply(set(3, NodeState::Draining)).unwrap();
    assert_eq!(state.apply(set(3, NodeState::Removed)), Err(Refusal::NodeHolds));
    state.apply(node(3, "eu")).unwrap();
    assert_eq!(state.nodes[&NodeId(3)].state, NodeState::Draining, "registering again undoes no drain");
    state.apply(start(1, 0, [1, 2, 4])).unwrap();
    state.apply(finish(1, 0, [1, 2, 4])).unwrap();
    state.apply(set(3, NodeState::Removed)).unwrap();
    assert_eq!(state.revoked_nodes.get(&NodeId(3)), Some(&AT), "one that was removed is revoked: the gate refuses it");
    for state_after in [NodeState::Active, NodeState::Draining] {
        assert_eq!(state.apply(set(3, state_after)), Err(Refusal::NodeRevoked));
    }
    assert_eq!(state.apply(node(3, "eu")), Err(Refusal::NodeRevoked));
}

#[test]
fn a_revoked_node_is_a_removed_one() {
    let mut state = cluster();
    state.apply(Command::RevokeNode { node: NodeId(3), at: AT }).unwrap();
    assert_eq!(state.nodes[&NodeId(3)].state, NodeState::Removed);
    assert_eq!(state.apply(start(1, 0, [1, 2, 3])).map(|_| ()), Ok(()), "where it is already, nothing begins");
    assert_eq!(state.apply(start(2, 0, [3])), Err(Refusal::TargetUnusable));
    assert_eq!(state.apply(set(3, NodeState::Active)), Err(Refusal::NodeRevoked));
    // What was written before both were one notion reads as if it had been.
    let mut before = state.clone();
    let known = NodeRecord { state: NodeState::Active, ..(*before.nodes[&NodeId(3)]).clone() };
    before.nodes.insert(NodeId(3), Arc::new(known));
    let (read, _) = wire::decode_snapshot(&wire::encode_snapshot(&before, 1)).unwrap();
    assert_eq!(read.nodes[&NodeId(3)].state, NodeState::Removed);
    // A founder that never registered, too.
    let mut young = State::default();
    young.apply(Command::SetPlacementDefaults { founders: ids([1, 2]), replication: 3 }).unwrap();
    young.apply(Command::RevokeNode { node: NodeId(2), at: AT }).unwrap();
    assert_eq!(young.check_placement(&Placement::anywhere(2)), Err(Refusal::TooFewNodes));
}

#[test]
fn the_last_active_node_cannot_be_drained() {
    let mut state = cluster();
    for id in 1..=4 {
        state.apply(set(id, NodeState::Draining)).unwrap();
    }
    assert_eq!(state.apply(set(5, NodeState::Draining)), Err(Refusal::LastNode));
}

#[test]
fn topics_from_before_placement_are_on_the_founding_nodes() {
    let mut state = cluster();
    state.defaults = None;
    state.apply(new_topic(3, BTreeSet::new(), Placement::default())).unwrap();
    assert_eq!(state.holds(NodeId(5)), 1, "nobody knows yet where it is");
    assert_eq!(state.apply(start(3, 0, [4])), Err(Refusal::MoveStale));
    state.apply(Command::SetPlacementDefaults { founders: ids(1..=3), replication: 3 }).unwrap();
    let resolved = &state.topics[&topic(3)];
    assert_eq!((&resolved.replicas, resolved.placement.replication), (&ids(1..=3), 3));
    state.apply(Command::SetPlacementDefaults { founders: ids([5]), replication: 1 }).unwrap();
    assert_eq!(state.defaults, Some(PlacementDefaults { founders: ids(1..=3), replication: 3 }), "once");
}

fn command() -> impl Strategy<Value = Command> {
    let topics = || 1..4_u8;
    let set_of = || proptest::collection::btree_set(1..7_u64, 0..4);
    let state = prop_oneof![Just(NodeState::Active), Just(NodeState::Draining), Just(NodeState::Removed)];
    let region = || prop_oneof![Just("eu"), Just("us"), Just("mars")];
    prop_oneof![
        2 => (1..7_u64, region()).prop_map(|(id, region)| node(id, region)),
        3 => (1..7_u64, state).prop_map(|(id, state)| set(id, state)),
        2 => (topics(), 0..5_u32, proptest::option::of(region()), proptest::option::of(region())).prop_map(
            |(n, replication, region, leader)| Command::AlterTopic {
                topic: topic(n),
                placement: Placement {
                    replication,
                    regions: region.map(str::to_owned).into_iter().collect(),
                    leader_region: leader.unwrap_or_default().to_owned(),
                },
                at: AT,
            }
        ),
        1 => (topics(), set_of(), 0..4_u32)
            .prop_map(|(n, replicas, replication)| new_topic(n, ids(replicas), Placement::anywhere(replication))),
        6 => (topics(), 0..4_u64, set_of()).prop_map(|(n, assignment, target)| start(n, assignment, target)),
        2 => (topics(), 0..4_u64).prop_map(|(n, assignment)| cancel(n, assignment)),
        6 => (topics(), 0..4_u64, set_of()).prop_map(|(n, assignment, nodes)| finish(n, assignment, nodes)),
        2 => (topics(), 0..4_u64, 0..3_u64, "[a-z]{0,9}").prop_map(|(n, assignment, at, waiting)| Command::ReportMove {
            topic: topic(n),
            assignment,
            report: MoveReport {
                phase: if waiting.is_empty() { MovePhase::CatchingUp } else { MovePhase::Waiting },
                behind: at,
                waiting,
                by: NodeId(1),
                at: UnixNanos(at),
            },
        }),
        1 => topics().prop_map(|n| Command::SetTopicState { topic: topic(n), state: TopicState::Deleting, at: AT }),
    ]
}

/// Ends whatever move is on where it leads, so that random runs get further than their first one.
fn lucky(state: &State, command: Command) -> Command {
    let Command::FinishMove { topic, .. } = &command else { return command };
    match state.topics.get(topic).and_then(|known| Some((known.assignment, known.reassignment.as_ref()?))) {
        Some((assignment, on)) => Command::FinishMove { topic: *topic, assignment, replicas: on.target.clone() },
        None => command,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn whatever_is_asked_every_replica_is_on_a_node_that_may_hold_it(
        commands in proptest::collection::vec((command(), any::<bool>()), 0..80)
    ) {
        let mut state = cluster();
        for (command, luck) in commands {
            let command = if luck { lucky(&state, command) } else { command };
            let bytes = wire::encode_command(&command);
            prop_assert_eq!(&wire::decode_command(&bytes).unwrap(), &command);
            let before = state.clone();
            let answer = state.apply(command.clone());
            let answered = wire::decode_response(&wire::encode_response(&answer)).unwrap();
            prop_assert_eq!(&answered, &answer);
            if answer.is_err() {
                prop_assert_eq!(&state, &before, "a refusal changes nothing");
                continue;
            }
            let after = state.clone();
            prop_assert_eq!(state.apply(command.clone()), answer, "again, the same: {:?}", command);
            prop_assert_eq!(&state, &after);

            let removed = |node: &NodeId| state.nodes.get(node).is_some_and(|it| it.state == NodeState::Removed);
            prop_assert!(state.active().next().is_some(), "somebody can hold replicas");
            for (id, topic) in &state.topics {
                prop_assert!(!topic.replicas.is_empty());
                prop_assert!(!topic.replicas.iter().any(removed));
                let was = before.topics.get(id);
                let gained = |now: &BTreeSet<NodeId>, had: &BTreeSet<NodeId>| {
                    now.difference(had).all(|node| state.check_nodes(&BTreeSet::from([*node]), &topic.placement).is_ok())
                };
                if let Some(on) = &topic.reassignment {
                    prop_assert!(!on.target.is_empty() && !on.target.iter().any(removed));
                    prop_assert!(topic.state != TopicState::Deleting);
                    if was.is_none_or(|was| was.reassignment.is_none()) {
                        prop_assert!(gained(&on.target, &topic.replicas), "replicas never leave their regions");
                    }
                }
                match was {
                    Some(was) if was.assignment != topic.assignment => {
                        prop_assert_eq!(topic.assignment, was.assignment + 1);
                        prop_assert_eq!(Some(&topic.replicas), was.reassignment.as_ref().map(|on| &on.target));
                        prop_assert!(topic.reassignment.is_none());
                    }
                    Some(was) => prop_assert_eq!(&topic.replicas, &was.replicas, "only a move's end moves"),
                    None => prop_assert!(gained(&topic.replicas, &BTreeSet::new())),
                }
            }
            // What is no part of the state is not compared.
            state.take_touched();
            let snapshot = wire::encode_snapshot(&state, 9);
            prop_assert_eq!(wire::decode_snapshot(&Bytes::clone(&snapshot)).unwrap(), (state.clone(), 9));
        }
    }
}
