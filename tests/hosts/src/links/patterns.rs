//! Ways to break a network.

use std::collections::BTreeSet;

use super::{Node, Way};

/// Both directions of every link between `nodes`.
pub fn ways(nodes: &BTreeSet<Node>) -> BTreeSet<Way> {
    nodes.iter().flat_map(|from| nodes.iter().map(|to| (*from, *to))).filter(|(from, to)| from != to).collect()
}

/// Both directions of every link between `side` and the others.
pub fn halves(nodes: &BTreeSet<Node>, side: &BTreeSet<Node>) -> BTreeSet<Way> {
    ways(nodes).into_iter().filter(|(from, to)| side.contains(from) != side.contains(to)).collect()
}

/// What `side` sends to the others is lost; it hears everything.
pub fn muted(nodes: &BTreeSet<Node>, side: &BTreeSet<Node>) -> BTreeSet<Way> {
    halves(nodes, side).into_iter().filter(|(from, _)| side.contains(from)).collect()
}

/// What the others send to `side` is lost; they hear it.
pub fn deafened(nodes: &BTreeSet<Node>, side: &BTreeSet<Node>) -> BTreeSet<Way> {
    halves(nodes, side).into_iter().filter(|(_, to)| side.contains(to)).collect()
}

/// Nodes in a ring, in this order, each of which hears its nearest neighbours only: just enough for a majority with itself, and
/// no two nodes see the same one. With three nodes each hears only the one before it, since both neighbours would be all there are.
pub fn ring(order: &[Node]) -> BTreeSet<Way> {
    let count = order.len();
    let hears = |to: usize, from: usize| {
        let ahead = (to + count - from) % count;
        let distance = ahead.min(count - ahead);
        if count == 3 { ahead == 1 } else { distance <= (count / 2).div_ceil(2) }
    };
    let mut cut = BTreeSet::new();
    for (to, receiver) in order.iter().enumerate() {
        for (from, sender) in order.iter().enumerate() {
            if from != to && !hears(to, from) {
                cut.insert((*sender, *receiver));
            }
        }
    }
    cut
}

/// Two halves that only `bridge` hears and reaches both of.
pub fn bridge(nodes: &BTreeSet<Node>, side: &BTreeSet<Node>, bridge: Node) -> BTreeSet<Way> {
    halves(nodes, side).into_iter().filter(|(from, to)| *from != bridge && *to != bridge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(count: Node) -> BTreeSet<Node> {
        (1..=count).collect()
    }

    #[test]
    fn a_side_that_is_muted_still_hears() {
        let (all, side) = (nodes(3), [1].into());
        assert_eq!(muted(&all, &side), [(1, 2), (1, 3)].into());
        assert_eq!(deafened(&all, &side), [(2, 1), (3, 1)].into());
        assert_eq!(halves(&all, &side).len(), 4);
    }

    #[test]
    fn in_a_ring_of_five_each_hears_a_majority_and_no_two_hear_the_same() {
        let cut = ring(&[3, 1, 5, 2, 4]);
        let heard =
            |to: Node| -> BTreeSet<Node> { nodes(5).into_iter().filter(|from| !cut.contains(&(*from, to))).collect() };
        let all: BTreeSet<_> = nodes(5).into_iter().map(heard).collect();
        assert_eq!(all.len(), 5);
        assert!(all.iter().all(|heard| heard.len() == 3), "{all:?}");
        assert!(cut.iter().all(|(from, to)| cut.contains(&(*to, *from))), "both directions: {cut:?}");
    }

    #[test]
    fn in_a_ring_of_three_each_hears_the_one_before_it() {
        assert_eq!(ring(&[1, 2, 3]), [(2, 1), (3, 2), (1, 3)].into());
    }

    #[test]
    fn a_bridge_hears_both_halves() {
        let cut = bridge(&nodes(5), &[1, 2, 3].into(), 3);
        assert!(cut.contains(&(1, 4)) && cut.contains(&(4, 1)));
        assert!(!cut.iter().any(|(from, to)| *from == 3 || *to == 3));
    }
}
