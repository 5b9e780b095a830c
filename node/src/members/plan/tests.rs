use super::*;

fn ids<const N: usize>(ids: [u64; N]) -> BTreeSet<NodeId> {
    ids.map(NodeId).into()
}

fn standing(zone: &str) -> Standing {
    Standing { place: ("home".to_owned(), zone.to_owned()), pulse: Pulse::Alive, stay: Stay::Stays, fit: true }
}

/// Nodes 1 to `count`, each in a zone of its own, all well.
struct World {
    members: Members,
    nodes: BTreeMap<NodeId, Standing>,
    matched: BTreeMap<NodeId, LogIndex>,
}

impl World {
    fn new(count: u64, voters: BTreeSet<NodeId>) -> Self {
        let nodes: BTreeMap<_, _> = (1..=count).map(|id| (NodeId(id), standing(&id.to_string()))).collect();
        let learners = nodes.keys().copied().filter(|id| !voters.contains(id)).collect();
        let matched = nodes.keys().map(|id| (*id, LogIndex(1000))).collect();
        Self { members: Members { voters, learners, ..Members::default() }, nodes, matched }
    }

    fn with(mut self, id: u64, change: impl FnOnce(&mut Standing)) -> Self {
        change(self.nodes.get_mut(&NodeId(id)).unwrap());
        self
    }

    fn next(&self) -> Option<Step> {
        let Self { members, nodes, matched } = self;
        next_step(&Facts { members, matched, last: LogIndex(1000), nodes })
    }
}

fn lost(node: &mut Standing) {
    node.pulse = Pulse::Lost;
}

fn gone(node: &mut Standing) {
    (node.pulse, node.stay) = (Pulse::Silent, Stay::Gone);
}

fn voters<const N: usize>(set: [u64; N]) -> Step {
    Step::ChangeVoters(ids(set))
}

#[test]
fn a_cluster_that_is_well_changes_nothing() {
    assert_eq!(World::new(1, ids([1])).next(), None);
    assert_eq!(World::new(2, ids([1, 2])).next(), None);
    assert_eq!(World::new(3, ids([1, 2, 3])).next(), None);
    assert_eq!(World::new(4, ids([1, 2, 3])).next(), None, "the fourth is a learner");
    assert_eq!(World::new(9, ids([1, 2, 3, 4, 5])).next(), None);
    assert_eq!(World::new(7, ids([1, 2, 3, 4, 5, 6, 7])).next(), None, "founders keep their votes");
}

#[test]
fn a_new_node_learns_first() {
    let mut world = World::new(4, ids([1, 2, 3]));
    world.members.learners.clear();
    assert_eq!(world.next(), Some(Step::AddLearner(NodeId(4))));
    assert_eq!(world.with(4, |node| node.pulse = Pulse::Silent).next(), None, "when it is there");
}

#[test]
fn the_number_of_voters_grows_with_the_cluster_and_stays_odd() {
    assert_eq!(World::new(2, ids([1])).next(), None);
    assert_eq!(World::new(3, ids([1])).next(), Some(voters([1, 2, 3])));
    assert_eq!(World::new(3, ids([1, 2])).next(), Some(voters([1, 2, 3])));
    assert_eq!(World::new(5, ids([1, 2, 3])).next(), Some(voters([1, 2, 3, 4, 5])));
    let mut half = World::new(5, ids([1, 2, 3]));
    half.matched.insert(NodeId(5), LogIndex(900));
    assert_eq!(half.next(), None, "one alone would make four");
}

#[test]
fn a_lost_voter_is_replaced_by_who_has_caught_up_and_not_before() {
    let world = World::new(4, ids([1, 2, 3])).with(2, |node| node.pulse = Pulse::Silent);
    assert_eq!(world.next(), None, "it may be restarting");
    let mut world = world.with(2, lost);
    assert_eq!(world.next(), Some(voters([1, 3, 4])));
    world.matched.insert(NodeId(4), LogIndex(900));
    assert_eq!(world.next(), None);
    assert_eq!(World::new(3, ids([1, 2, 3])).with(2, lost).next(), None, "nobody is there to take its place");
}

#[test]
fn two_lost_votes_of_five_go_also_without_a_replacement() {
    let five = || World::new(5, ids([1, 2, 3, 4, 5]));
    assert_eq!(five().with(5, lost).next(), None, "four of five survive as much as four of four");
    assert_eq!(five().with(5, lost).with(2, lost).next(), Some(voters([1, 3, 4])));
    let silent = |node: &mut Standing| node.pulse = Pulse::Silent;
    assert_eq!(five().with(5, lost).with(2, lost).with(1, silent).next(), None, "the old voters would not agree");
    let mut back = World::new(5, ids([1, 3, 4]));
    assert_eq!(back.next(), Some(voters([1, 2, 3, 4, 5])), "they get their votes again when they are back");
    back = back.with(5, lost).with(2, lost);
    assert_eq!(back.next(), None);
}

#[test]
fn what_is_in_the_way_of_a_lost_vote_is_told() {
    let why = |world: &World| {
        let World { members, nodes, matched } = world;
        in_the_way(&Facts { members, matched, last: LogIndex(1000), nodes })
    };
    assert_eq!(why(&World::new(3, ids([1, 2, 3]))), None);
    let alone = World::new(3, ids([1, 2, 3])).with(2, lost);
    assert_eq!(why(&alone).as_deref(), Some("no other node is ready to take the votes of 2"));
    let few = World::new(4, ids([1, 2, 3])).with(2, lost).with(3, lost).with(1, |node| node.pulse = Pulse::Silent);
    assert_eq!(few.next(), None);
    assert!(why(&few).is_some_and(|why| why.contains("of 2, 3 too few")), "{:?}", why(&few));
}

#[test]
fn no_step_leaves_a_majority_of_dead_voters() {
    // The removed node still votes, and answers; a lost one is all that would be left beside the leader.
    let world = World::new(3, ids([1, 2, 3])).with(2, lost).with(3, |node| node.stay = Stay::Gone);
    assert_eq!(world.next(), None);
    let alone = World::new(1, ids([1])).with(1, |node| node.stay = Stay::Gone);
    assert_eq!(alone.next(), None, "the last voter stays");
}

#[test]
fn nodes_that_leave_lose_their_votes() {
    assert_eq!(World::new(4, ids([1, 2, 3])).with(3, |node| node.stay = Stay::Leaves).next(), Some(voters([1, 2, 4])));
    assert_eq!(
        World::new(3, ids([1, 2, 3])).with(3, |node| node.stay = Stay::Leaves).next(),
        None,
        "a drained node votes until another can"
    );
    assert_eq!(World::new(3, ids([1, 2, 3])).with(3, gone).next(), Some(voters([1, 2])), "a removed one does not");
    assert_eq!(World::new(4, ids([1, 2, 3])).with(4, gone).next(), Some(Step::RemoveLearner(NodeId(4))));
}

#[test]
fn a_cluster_of_five_can_be_made_smaller() {
    let leaves = |node: &mut Standing| node.stay = Stay::Leaves;
    let five = || World::new(5, ids([1, 2, 3, 4, 5]));
    assert_eq!(five().with(2, leaves).next(), Some(voters([1, 3, 4])), "four voters would survive no more than three");
    assert_eq!(five().with(2, leaves).with(5, leaves).next(), Some(voters([1, 3, 4])));
    let crowded = five().with(2, leaves).with(4, |node| node.place.1 = "1".to_owned());
    assert_eq!(crowded.next(), Some(voters([1, 3, 5])), "the vote goes from where two stand");
    let silent = five().with(2, leaves).with(1, lost);
    assert_eq!(silent.next(), Some(voters([3, 4, 5])), "the lost one is missed least");
    let three = five().with(2, leaves).with(4, leaves).with(5, leaves);
    assert_eq!(three.next(), None, "two that stay are no council");
    assert_eq!(World::new(6, ids([1, 2, 3, 4, 5])).with(2, leaves).next(), Some(voters([1, 3, 4, 5, 6])));
    let back = World::new(5, ids([1, 3, 4]));
    assert_eq!(back.next(), Some(voters([1, 2, 3, 4, 5])), "the drain was taken back");
}

#[test]
fn a_node_that_is_not_listed_yet_keeps_its_vote_and_learns_nothing() {
    let mut world = World::new(3, ids([1, 2, 3]));
    world.members.learners.insert(NodeId(9));
    assert_eq!(world.next(), Some(Step::RemoveLearner(NodeId(9))));
    world.members = Members { voters: ids([1, 2, 9]), learners: ids([3]), ..Members::default() };
    assert_eq!(world.next(), None);
}

#[test]
fn an_unfit_node_neither_learns_nor_gets_a_vote_and_keeps_one_until_it_can_be_replaced() {
    let unfit = |node: &mut Standing| node.fit = false;
    let mut world = World::new(4, ids([1, 2, 3])).with(4, unfit);
    world.members.learners.clear();
    assert_eq!(world.next(), None);
    assert_eq!(World::new(3, ids([1, 2, 3])).with(2, unfit).next(), None);
    assert_eq!(World::new(4, ids([1, 2, 3])).with(2, unfit).next(), Some(voters([1, 3, 4])));
}

#[test]
fn votes_spread_over_zones() {
    let crowded = World::new(4, ids([1, 2, 3])).with(2, |node| node.place.1 = "1".to_owned());
    assert_eq!(crowded.next(), Some(voters([2, 3, 4])));
    let replaced =
        World::new(5, ids([1, 2, 3])).with(4, |node| node.place.1 = "1".to_owned()).with(3, lost).with(2, |node| {
            node.place.1 = "2".to_owned();
        });
    assert_eq!(replaced.next(), Some(voters([1, 2, 5])), "the replacement stands where nobody stands yet");
}

#[test]
fn a_change_that_was_cut_short_is_finished_first() {
    let mut world = World::new(5, ids([1, 2, 4])).with(5, gone);
    world.members.outgoing = ids([1, 2, 3]);
    assert_eq!(world.next(), Some(Step::Finish));
}
