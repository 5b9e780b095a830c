//! A group that does what it is told, leaders that die at any moment, and a move that arrives all the same.

use proptest::prelude::*;

use super::*;

fn ids<const N: usize>(numbers: [u64; N]) -> BTreeSet<NodeId> {
    numbers.map(NodeId).into()
}

fn group<const N: usize>(voters: [u64; N]) -> Seen {
    let voters = ids(voters);
    let missing = voters.iter().map(|node| (*node, 0)).collect();
    Seen { voters, missing, ..Seen::default() }
}

fn step(me: u64, target: &BTreeSet<NodeId>, seen: &Seen) -> Step {
    next_step(NodeId(me), target, seen, None, |_| true)
}

#[test]
fn a_new_replica_is_added_catches_up_and_then_votes() {
    let (target, mut seen) = (ids([1, 2, 4]), group([1, 2, 3]));
    assert_eq!(step(1, &target, &seen), Step::AddLearner(NodeId(4)));
    seen.learners = ids([4]);
    assert_eq!(step(1, &target, &seen), Step::CatchUp { behind: 0 }, "nothing is known of it yet");
    seen.missing.insert(NodeId(4), LAG_MAX + 1);
    assert_eq!(step(1, &target, &seen), Step::CatchUp { behind: LAG_MAX + 1 });
    seen.missing.insert(NodeId(4), LAG_MAX);
    assert_eq!(step(1, &target, &seen), Step::Switch(target.clone()));
    assert_eq!(step(3, &target, &seen), Step::HandOver(NodeId(1)), "who leaves hands over first");
    assert_eq!(next_step(NodeId(3), &target, &seen, Some(NodeId(2)), |_| true), Step::HandOver(NodeId(2)));
    seen = Seen { outgoing: Some(ids([1, 2, 3])), ..group([1, 2, 4]) };
    assert_eq!(step(2, &target, &seen), Step::Switch(target.clone()), "what was cut short is completed");
    assert_eq!(step(2, &target, &group([1, 2, 4])), Step::Finish);
}

#[test]
fn a_cancelled_move_sends_the_new_replica_away() {
    let seen = Seen { learners: ids([4]), ..group([1, 2, 3]) };
    assert_eq!(step(1, &ids([1, 2, 3]), &seen), Step::RemoveLearner(NodeId(4)));
    assert_eq!(step(1, &ids([1, 2, 3]), &group([1, 2, 3])), Step::Finish);
}

#[test]
fn no_majority_is_given_away() {
    let mut seen = group([1, 2, 3]);
    let alive = |node: NodeId| node != NodeId(2) && node != NodeId(3);
    let why = |target: &BTreeSet<NodeId>, seen: &Seen| match next_step(NodeId(1), target, seen, None, alive) {
        Step::Wait { why } => why,
        other => panic!("{other:?}"),
    };
    let shrunk = ids([2, 3]);
    assert_eq!(why(&shrunk, &seen), "only 0 of the 2 nodes that stay answer: no majority");
    seen.learners = ids([4]);
    seen.missing.insert(NodeId(4), 0);
    assert_eq!(why(&ids([2, 3, 4]), &seen), "only 1 of the 3 nodes that stay answer: no majority");
    assert_eq!(why(&ids([1, 2, 3, 5]), &Seen { learners: ids([5]), ..group([1, 2]) }), "node 3 does not answer");
}

/// A group that does what it is told.
#[derive(Debug, Clone)]
struct World {
    seen: Seen,
    leader: NodeId,
    /// What each member holds.
    held: BTreeMap<NodeId, u64>,
}

const LAST: u64 = 1_000;

impl World {
    fn seen(&self) -> Seen {
        let members = self.seen.voters.iter().chain(&self.seen.learners);
        let missing = members.map(|node| (*node, LAST - self.held.get(node).copied().unwrap_or_default())).collect();
        Seen { missing, ..self.seen.clone() }
    }

    /// Carries a step out; `cut` of it only to the middle.
    fn carry_out(&mut self, step: Step, alive: &BTreeSet<NodeId>, cut: bool) {
        match step {
            Step::RemoveLearner(node) => {
                assert!(self.seen.learners.remove(&node));
            }
            Step::AddLearner(node) => {
                assert!(alive.contains(&node) && !self.seen.voters.contains(&node));
                self.seen.learners.insert(node);
            }
            Step::CatchUp { .. } => {
                for node in self.seen.learners.intersection(alive) {
                    *self.held.entry(*node).or_default() += 400;
                }
                self.held.values_mut().for_each(|held| *held = (*held).min(LAST));
            }
            Step::HandOver(to) => {
                assert!(self.seen.voters.contains(&to) && alive.contains(&to));
                self.leader = to;
            }
            Step::Switch(voters) => {
                assert!(voters.intersection(alive).count() > voters.len() / 2, "a majority is given away");
                let held = |node: &NodeId| LAST - self.held.get(node).copied().unwrap_or_default() <= LAG_MAX;
                assert!(
                    voters.difference(&self.seen.voters).all(|node| self.seen.learners.contains(node) && held(node))
                );
                let old = std::mem::replace(&mut self.seen.voters, voters);
                self.seen.learners.retain(|node| !self.seen.voters.contains(node));
                let joint = self.seen.outgoing.is_none() && cut;
                self.seen.outgoing = joint.then_some(old);
                if !joint && !self.seen.voters.contains(&self.leader) {
                    self.leader = *self.seen.voters.intersection(alive).next().unwrap();
                }
            }
            Step::Wait { .. } | Step::Finish => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn whoever_leads_and_wherever_it_is_cut_short_a_move_arrives(
        voters in proptest::collection::btree_set(1..7_u64, 1..5),
        turns in proptest::collection::vec(
            (proptest::collection::btree_set(1..7_u64, 1..5), 0..30_usize), 1..4
        ),
        chances in proptest::collection::vec((any::<bool>(), 0..6_usize), 40),
    ) {
        let set = |numbers: &BTreeSet<u64>| numbers.iter().copied().map(NodeId).collect::<BTreeSet<_>>();
        let voters = set(&voters);
        let alive: BTreeSet<NodeId> = (1..7).map(NodeId).collect();
        let held = voters.iter().map(|node| (*node, LAST)).collect();
        let leader = *voters.first().unwrap();
        let mut world = World { seen: Seen { voters, ..Seen::default() }, leader, held };
        let mut chances = chances.into_iter();
        // A move is turned round, or another follows, after any number of steps; the last one has time.
        for (place, (target, patience)) in turns.iter().enumerate() {
            let target = set(target);
            let steps = if place + 1 == turns.len() { 100 } else { *patience };
            for _ in 0..steps {
                let (cut, dies) = chances.next().unwrap_or((false, 0));
                if dies == 5 {
                    // The leader dies and another voter takes over, of either set in the middle of a change.
                    let electable: Vec<_> = world.seen.voters.iter().copied().collect();
                    world.leader = electable[place % electable.len()];
                }
                let step = next_step(world.leader, &target, &world.seen(), None, |node| alive.contains(&node));
                if step == Step::Finish {
                    break;
                }
                world.carry_out(step, &alive, cut);
            }
            if place + 1 == turns.len() {
                prop_assert_eq!(&world.seen.voters, &target);
                prop_assert!(world.seen.outgoing.is_none() && world.seen.learners.is_empty());
                prop_assert!(target.contains(&world.leader));
            }
        }
    }

    #[test]
    fn with_nodes_down_no_step_gives_a_majority_away(
        voters in proptest::collection::btree_set(1..7_u64, 1..5),
        target in proptest::collection::btree_set(1..7_u64, 1..5),
        alive in proptest::collection::btree_set(1..7_u64, 0..7),
    ) {
        let set = |numbers: &BTreeSet<u64>| numbers.iter().copied().map(NodeId).collect::<BTreeSet<_>>();
        let (voters, target, alive) = (set(&voters), set(&target), set(&alive));
        let Some(leader) = voters.intersection(&alive).next().copied() else { return Ok(()) };
        let held = voters.iter().map(|node| (*node, LAST)).collect();
        let mut world = World { seen: Seen { voters, ..Seen::default() }, leader, held };
        for _ in 0..50 {
            let step = next_step(world.leader, &target, &world.seen(), None, |node| alive.contains(&node));
            if matches!(step, Step::Finish | Step::Wait { .. }) {
                break;
            }
            // Asserts what it is told.
            world.carry_out(step, &alive, false);
        }
    }
}
