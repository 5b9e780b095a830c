//! What the planner must never do, and what it must do in the end.

use proptest::prelude::*;

use super::*;

fn node(region: &str, zone: &str) -> NodeFacts {
    NodeFacts { region: region.to_owned(), zone: zone.to_owned(), state: NodeState::Active, pulse: Pulse::Alive }
}

fn ids<const N: usize>(numbers: [u64; N]) -> BTreeSet<NodeId> {
    numbers.map(NodeId).into()
}

fn topic(n: u8, replicas: BTreeSet<NodeId>) -> TopicFacts {
    TopicFacts {
        id: TopicId::from_bytes([n; 16]),
        group: GroupId(GroupId::FIRST_PARTITION.0 + u64::from(n)),
        placement: Placement::anywhere(replicas.len() as u32),
        replicas,
        target: None,
        cancelled: false,
    }
}

fn cluster(nodes: &[(u64, NodeFacts)]) -> Facts {
    Facts { nodes: nodes.iter().map(|(id, facts)| (NodeId(*id), facts.clone())).collect(), topics: Vec::new() }
}

fn flat(count: u64) -> Facts {
    cluster(&(1..=count).map(|id| (id, node("", ""))).collect::<Vec<_>>())
}

/// Carries plans out, each as if it took a while: until there is nothing to do. How many moves it took.
fn carry_out(facts: &mut Facts, limits: PlanLimits) -> usize {
    let mut moves = 0;
    loop {
        let plan = facts.plan(limits);
        if plan.moves.is_empty() && plan.cancels.is_empty() && facts.topics.iter().all(|it| it.target.is_none()) {
            return moves;
        }
        for planned in plan.moves {
            moves += 1;
            assert!(moves < 5_000, "the planner does not come to an end");
            let topic = facts.topics.iter_mut().find(|topic| topic.id == planned.topic).unwrap();
            assert!(topic.target.is_none(), "one move at a time");
            topic.target = Some(planned.target);
        }
        for cancelled in plan.cancels {
            let topic = facts.topics.iter_mut().find(|topic| topic.id == cancelled).unwrap();
            (topic.target, topic.cancelled) = (Some(topic.replicas.clone()), true);
        }
        // Half of what is on ends before the next plan.
        let on: Vec<usize> = (0..facts.topics.len()).filter(|at| facts.topics[*at].target.is_some()).collect();
        for at in &on[..on.len().div_ceil(2)] {
            let topic = &mut facts.topics[*at];
            topic.replicas = topic.target.take().unwrap();
            topic.cancelled = false;
        }
    }
}

fn load(facts: &Facts) -> BTreeMap<u64, usize> {
    facts.load().into_iter().map(|(node, held)| (node.0, held)).collect()
}

#[test]
fn a_new_topic_is_spread_over_zones_then_nodes() {
    let mut facts = cluster(&[
        (1, node("eu", "a")),
        (2, node("eu", "a")),
        (3, node("eu", "b")),
        (4, node("eu", "b")),
        (5, node("eu", "c")),
    ]);
    assert_eq!(facts.choose(&Placement::anywhere(3)).unwrap(), ids([1, 3, 5]));
    facts.topics.push(topic(0, ids([1, 3, 5])));
    assert_eq!(facts.choose(&Placement::anywhere(3)).unwrap(), ids([2, 4, 5]), "the emptier nodes of each zone");
}

#[test]
fn replicas_stay_in_their_regions_and_cover_the_one_that_leads() {
    let facts = cluster(&[
        (1, node("eu", "a")),
        (2, node("us", "a")),
        (3, node("us", "b")),
        (4, node("us", "c")),
        (5, node("ap", "a")),
    ]);
    let pinned = Placement { regions: BTreeSet::from(["us".to_owned()]), ..Placement::anywhere(3) };
    assert_eq!(facts.choose(&pinned).unwrap(), ids([2, 3, 4]));
    assert_eq!(facts.choose(&Placement::anywhere(3)).unwrap(), ids([1, 2, 5]), "one in each region");
    let led = Placement { leader_region: "ap".to_owned(), ..Placement::anywhere(1) };
    assert_eq!(facts.choose(&led).unwrap(), ids([5]));
}

#[test]
fn what_cannot_be_placed_says_why() {
    let mut facts = cluster(&[(1, node("eu", "a")), (2, node("us", "a")), (3, node("eu", "b"))]);
    facts.nodes.get_mut(&NodeId(3)).unwrap().state = NodeState::Draining;
    let eu = BTreeSet::from(["eu".to_owned()]);
    let message = |placement: Placement| facts.choose(&placement).unwrap_err().to_string();
    assert_eq!(message(Placement::anywhere(0)), "a topic has 1 to 9 replicas, not 0");
    assert_eq!(message(Placement::anywhere(10)), "a topic has 1 to 9 replicas, not 10");
    assert_eq!(
        message(Placement::anywhere(3)),
        "3 replicas need 3 active nodes, and there are 2: add nodes, or ask for fewer replicas"
    );
    assert_eq!(
        message(Placement { regions: eu.clone(), ..Placement::anywhere(2) }),
        "2 replicas need 2 active nodes in \"eu\", and there are 1: add nodes, or ask for fewer replicas"
    );
    assert_eq!(
        message(Placement { regions: BTreeSet::from(["mars".to_owned()]), ..Placement::anywhere(1) }),
        "no active node is in region \"mars\"; there are \"eu\", \"us\""
    );
    assert_eq!(
        message(Placement { regions: eu, leader_region: "us".to_owned(), ..Placement::anywhere(1) }),
        "the leader region \"us\" is not among the topic's regions, \"eu\""
    );
}

#[test]
fn a_new_node_gets_its_share_and_then_it_is_quiet() {
    let mut facts = flat(3);
    facts.topics = (0..40).map(|n| topic(n, ids([1, 2, 3]))).collect();
    assert_eq!(facts.plan(PlanLimits::default()).moves, [], "three nodes, three replicas");
    facts.nodes.insert(NodeId(4), node("", ""));
    let first = facts.plan(PlanLimits::default());
    assert_eq!(first.moves.len(), 4, "no more than {} arrive at one node at once", PlanLimits::default().per_node);
    assert!(first.moves.iter().all(|planned| planned.reason == MoveReason::Rebalance));
    let moves = carry_out(&mut facts, PlanLimits::default());
    let held = load(&facts);
    assert!(held.values().all(|held| (28..=32).contains(held)), "{held:?}");
    assert!(moves <= 31, "{moves} moves for 30 replicas");
}

#[test]
fn a_restart_moves_nothing_and_a_lost_node_is_replaced() {
    let mut facts = flat(4);
    facts.topics = (0..8).map(|n| topic(n, ids([1, 2, 3]))).collect();
    facts.nodes.get_mut(&NodeId(3)).unwrap().pulse = Pulse::Silent;
    assert_eq!(facts.plan(PlanLimits::default()), Plan::default(), "not even for equal shares");
    facts.nodes.get_mut(&NodeId(3)).unwrap().pulse = Pulse::Lost;
    let plan = facts.plan(PlanLimits::default());
    assert_eq!(plan.moves[0].target, ids([1, 2, 4]));
    assert_eq!(plan.moves[0].reason, MoveReason::Lost);
    carry_out(&mut facts, PlanLimits::default());
    assert!(facts.topics.iter().all(|topic| topic.replicas == ids([1, 2, 4])));
}

#[test]
fn a_drain_without_room_says_so_and_moves_nothing() {
    let mut facts = flat(3);
    facts.topics = vec![topic(0, ids([1, 2, 3]))];
    facts.nodes.get_mut(&NodeId(2)).unwrap().state = NodeState::Draining;
    let plan = facts.plan(PlanLimits::default());
    assert_eq!(plan.moves, []);
    let why = plan.stuck[0].1.to_string();
    assert_eq!(why, "3 replicas need 3 active nodes, and there are 2: add nodes, or ask for fewer replicas");
    facts.nodes.insert(NodeId(4), node("", ""));
    let plan = facts.plan(PlanLimits::default());
    assert_eq!((plan.moves[0].target.clone(), plan.moves[0].reason), (ids([1, 3, 4]), MoveReason::Drain));
}

#[test]
fn a_move_to_a_node_that_is_lost_is_turned_round_once() {
    let mut facts = flat(5);
    facts.topics = vec![TopicFacts { target: Some(ids([1, 2, 4])), ..topic(0, ids([1, 2, 3])) }];
    assert_eq!(facts.plan(PlanLimits::default()), Plan::default());
    facts.nodes.get_mut(&NodeId(4)).unwrap().pulse = Pulse::Lost;
    assert_eq!(facts.plan(PlanLimits::default()).cancels, [facts.topics[0].id]);
    (facts.topics[0].target, facts.topics[0].cancelled) = (Some(ids([1, 2, 3])), true);
    assert_eq!(facts.plan(PlanLimits::default()), Plan::default());
}

#[test]
fn leaders_take_turns_and_stand_in_the_preferred_region() {
    let mut facts = cluster(&[(1, node("eu", "a")), (2, node("us", "a")), (3, node("us", "b"))]);
    let mut leads = BTreeMap::<u64, usize>::new();
    for n in 0..30 {
        *leads.entry(facts.preferred_leader(&topic(n, ids([1, 2, 3]))).unwrap().0).or_default() += 1;
    }
    assert_eq!(leads, BTreeMap::from([(1, 10), (2, 10), (3, 10)]));
    let mut near = topic(0, ids([1, 2, 3]));
    near.placement.leader_region = "us".to_owned();
    assert_eq!(facts.preferred_leader(&near), Some(NodeId(2)));
    facts.nodes.get_mut(&NodeId(2)).unwrap().state = NodeState::Draining;
    assert_eq!(facts.preferred_leader(&near), Some(NodeId(3)), "who drains leads nothing");
    facts.nodes.get_mut(&NodeId(3)).unwrap().pulse = Pulse::Lost;
    assert_eq!(facts.preferred_leader(&near), Some(NodeId(1)), "better elsewhere than nobody");
}

const REGIONS: [&str; 3] = ["", "eu", "us"];

fn any_node() -> impl Strategy<Value = NodeFacts> {
    let state = prop_oneof![6 => Just(NodeState::Active), 1 => Just(NodeState::Draining)];
    let pulse = prop_oneof![6 => Just(Pulse::Alive), 1 => Just(Pulse::Silent), 1 => Just(Pulse::Lost)];
    (0..3_usize, 0..3_usize, state, pulse).prop_map(|(region, zone, state, pulse)| NodeFacts {
        region: REGIONS[region].to_owned(),
        zone: format!("zone-{zone}"),
        state,
        pulse,
    })
}

/// Replicas, a target, how many, the one region allowed, the region that should lead.
type Rolled = (BTreeSet<u64>, Option<BTreeSet<u64>>, u32, Option<usize>, Option<usize>);

/// Nodes in any state, and topics anywhere, wherever they should be.
fn any_cluster() -> impl Strategy<Value = Facts> {
    let nodes = proptest::collection::vec(any_node(), 1..8);
    let topics = proptest::collection::vec(
        (
            proptest::collection::btree_set(1..9_u64, 1..5),
            proptest::option::of(proptest::collection::btree_set(1..9_u64, 1..5)),
            1..5_u32,
            proptest::option::of(0..3_usize),
            proptest::option::of(0..3_usize),
        ),
        0..25,
    );
    (nodes, topics).prop_map(|(nodes, topics)| {
        let nodes = (1..).map(NodeId).zip(nodes).collect();
        let build = |(n, (replicas, target, replication, region, leader)): (usize, Rolled)| {
            let set = |numbers: BTreeSet<u64>| numbers.into_iter().map(NodeId).collect::<BTreeSet<_>>();
            // One in a few is on the move already.
            let target = target.filter(|_| n % 4 == 0).map(set);
            let placement = Placement {
                replication,
                regions: region.map(|region| REGIONS[region].to_owned()).into_iter().collect(),
                leader_region: leader.map(|region| REGIONS[region].to_owned()).unwrap_or_default(),
            };
            TopicFacts { target, placement, ..topic(n as u8, set(replicas)) }
        };
        Facts { nodes, topics: topics.into_iter().enumerate().map(build).collect() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_plan_only_ever_gives_replicas_to_nodes_that_may_have_them(facts in any_cluster()) {
        let limits = PlanLimits { moves: 5, per_node: 2 };
        let plan = facts.plan(limits);
        let moves = |topic: &&TopicFacts| topic.target.is_some() && facts.without_majority(topic).is_none();
        let on = facts.topics.iter().filter(moves).count();
        prop_assert!(plan.moves.len() <= limits.moves.saturating_sub(on));
        let mut arriving = BTreeMap::<NodeId, usize>::new();
        for planned in &plan.moves {
            let topic = facts.topics.iter().find(|topic| topic.id == planned.topic).unwrap();
            prop_assert!(topic.target.is_none(), "one move at a time");
            prop_assert!(planned.target != topic.replicas);
            prop_assert_eq!(facts.without_majority(topic), None, "somebody can lead it");
            let wanted = topic.placement.replication as usize;
            prop_assert!(planned.target.len() <= wanted.max(1));
            prop_assert!(planned.target.len() >= wanted.min(topic.replicas.len()), "never fewer replicas than it need be");
            for node in planned.target.difference(&topic.replicas) {
                let node_facts = &facts.nodes[node];
                prop_assert!(topic.placement.allows(&node_facts.region), "replicas never leave their regions");
                prop_assert_eq!((node_facts.state, node_facts.pulse), (NodeState::Active, Pulse::Alive));
                *arriving.entry(*node).or_default() += 1;
            }
        }
        prop_assert!(arriving.values().all(|count| *count <= limits.per_node));
        prop_assert_eq!(plan, facts.plan(limits), "the same facts, the same plan");
    }

    #[test]
    fn plans_come_to_an_end_where_everything_is_in_its_place(mut facts in any_cluster()) {
        // Targets that nobody planned may name anything; here moves are the planner's own.
        for topic in &mut facts.topics {
            topic.target = None;
        }
        carry_out(&mut facts, PlanLimits::default());
        let stuck: BTreeSet<TopicId> = facts.plan(PlanLimits::default()).stuck.into_iter().map(|(id, _)| id).collect();
        for topic in facts.topics.iter().filter(|topic| !stuck.contains(&topic.id)) {
            prop_assert_eq!(topic.replicas.len(), topic.placement.replication as usize);
            for node in &topic.replicas {
                prop_assert!(facts.allowed(*node, &topic.placement, Pulse::Silent));
            }
        }
        for topic in facts.topics.iter().filter(|topic| stuck.contains(&topic.id)) {
            let takers = facts.nodes.keys().filter(|node| facts.allowed(**node, &topic.placement, Pulse::Alive));
            let takers: BTreeSet<NodeId> = takers.copied().collect();
            let headless = facts.without_majority(topic).is_some();
            prop_assert!(headless || takers.is_subset(&topic.replicas), "stuck only once nobody is left to ask");
        }
    }

    #[test]
    fn shares_differ_by_little_once_plans_have_ended(nodes in 3..8_u64, topics in 0..40_u8, joined in 1..4_u64) {
        let mut facts = flat(nodes);
        for n in 0..topics {
            let replicas = facts.choose(&Placement::anywhere(3)).unwrap();
            facts.topics.push(topic(n, replicas));
        }
        prop_assert_eq!(facts.plan(PlanLimits::default()).moves, vec![], "new topics are in their place");
        for id in nodes + 1..=nodes + joined {
            facts.nodes.insert(NodeId(id), node("", ""));
        }
        carry_out(&mut facts, PlanLimits::default());
        let held = load(&facts);
        let (least, most) = (held.values().min().unwrap(), held.values().max().unwrap());
        prop_assert!(most - least < 2.max(most / 10 + 1), "{:?}", held);
    }
}

#[test]
fn nobody_is_asked_to_move_what_has_no_majority() {
    let mut facts = flat(4);
    facts.nodes.get_mut(&NodeId(4)).unwrap().pulse = Pulse::Lost;
    facts.topics = vec![topic(0, ids([4])), topic(1, ids([3, 4])), topic(2, ids([2, 3, 4]))];
    let plan = facts.plan(PlanLimits::default());
    let moved: Vec<_> = plan.moves.iter().map(|it| (it.topic, it.target.clone())).collect();
    assert_eq!(moved, [(facts.topics[2].id, ids([1, 2, 3]))], "one of three can be missed");
    let said: Vec<_> = plan.stuck.iter().map(|(topic, why)| (*topic, why.to_string())).collect();
    assert_eq!(said.len(), 2);
    assert!(said[0].1.starts_with("its only replica, on node 4, does not answer"), "{said:?}");
    assert!(said[1].1.starts_with("1 of its 2 replicas, on node 4, does not answer"), "{said:?}");
    assert!(said[1].1.contains("bring node 4 back") && said[1].1.contains("`ensign topic destroy`"), "{said:?}");
    // Drained, it is the same; merely silent, there is nothing to say.
    facts.nodes.get_mut(&NodeId(4)).unwrap().pulse = Pulse::Silent;
    assert_eq!(facts.plan(PlanLimits::default()), Plan::default());
    facts.nodes.get_mut(&NodeId(4)).unwrap().state = NodeState::Draining;
    assert_eq!(facts.plan(PlanLimits::default()).stuck.len(), 2);
}

#[test]
fn moves_that_nobody_can_lead_take_nobodys_turn() {
    let mut facts = flat(4);
    let leaves = |facts: &mut Facts, node: u64, pulse| {
        let node = facts.nodes.get_mut(&NodeId(node)).unwrap();
        (node.state, node.pulse) = (NodeState::Draining, pulse);
    };
    leaves(&mut facts, 4, Pulse::Silent);
    leaves(&mut facts, 3, Pulse::Alive);
    // They were begun while node 4 lived.
    facts.topics = (0..8).map(|n| TopicFacts { target: Some(ids([1])), ..topic(n, ids([4])) }).collect();
    facts.topics.push(topic(9, ids([3])));
    let plan = facts.plan(PlanLimits { moves: 8, per_node: 4 });
    assert_eq!(plan.moves.len(), 1, "{plan:?}");
    assert_eq!(plan.stuck.len(), 8, "{plan:?}");
}

#[test]
fn a_removed_node_is_replaced_as_soon_as_there_is_another() {
    let mut facts = flat(3);
    let gone = facts.nodes.get_mut(&NodeId(3)).unwrap();
    (gone.state, gone.pulse) = (NodeState::Removed, Pulse::Lost);
    facts.topics = vec![topic(0, ids([1, 2, 3]))];
    let plan = facts.plan(PlanLimits::default());
    assert_eq!(plan.moves, [], "two of three are no better than two of two");
    assert!(plan.stuck[0].1.to_string().contains("3 replicas need 3 active nodes, and there are 2"), "{plan:?}");
    facts.nodes.insert(NodeId(4), node("", ""));
    let plan = facts.plan(PlanLimits::default());
    assert_eq!(plan.moves[0].target, ids([1, 2, 4]));
    assert_eq!(plan.stuck, []);
}
