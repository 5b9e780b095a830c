//! What goes wrong, and when: drawn from a seed, so that one number names a whole run.
//!
//! The schedule depends on the seed and on the number of nodes alone, never on what the cluster does.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::cluster::Cluster;
use crate::links::{Node, Way, patterns};

/// One thing that goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9`; started again afterwards.
    Kill(BTreeSet<Node>),
    /// SIGSTOP; SIGCONT afterwards.
    Pause(BTreeSet<Node>),
    /// Links that are cut, and what that is called.
    Cut(&'static str, BTreeSet<Way>),
}

impl Fault {
    /// Its kind, for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Kill(_) => "kill -9",
            Self::Pause(_) => "pause",
            Self::Cut(kind, _) => kind,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(nodes) => write!(f, "kill -9 {nodes:?}"),
            Self::Pause(nodes) => write!(f, "pause {nodes:?}"),
            Self::Cut(kind, ways) => {
                let ways: Vec<String> = ways.iter().map(|(from, to)| format!("{from}->{to}")).collect();
                write!(f, "{kind}: {} cut", ways.join(" "))
            }
        }
    }
}

/// Faults that go together, and how long they and the rest after them last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// One, or two at once.
    pub faults: Vec<Fault>,
    /// From the fault to its end.
    pub hold: Duration,
    /// From its end to the next fault.
    pub rest: Duration,
}

/// The endless list of steps that a seed stands for.
#[derive(Debug)]
pub struct Schedule {
    rng: ChaCha8Rng,
    nodes: Vec<Node>,
}

impl Schedule {
    /// Of this seed, for nodes from 1 to `nodes`.
    pub fn new(seed: u64, nodes: Node) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed), nodes: (1..=nodes).collect() }
    }

    fn some(&mut self, count: usize) -> BTreeSet<Node> {
        self.nodes.shuffle(&mut self.rng);
        self.nodes[..count].iter().copied().collect()
    }

    /// As few nodes as leave a majority, or fewer.
    fn minority(&mut self) -> BTreeSet<Node> {
        let most = (self.nodes.len() - 1) / 2;
        let count = self.rng.random_range(1..=most.max(1));
        self.some(count)
    }

    fn cut(&mut self) -> Fault {
        let all: BTreeSet<Node> = self.nodes.iter().copied().collect();
        let side = self.minority();
        match self.rng.random_range(0..6) {
            0 => Fault::Cut("one-way partition, muted", patterns::muted(&all, &side)),
            1 => Fault::Cut("one-way partition, deafened", patterns::deafened(&all, &side)),
            2 => {
                let way = self.some(2).into_iter().collect::<Vec<_>>();
                let way = if self.rng.random_bool(0.5) { (way[0], way[1]) } else { (way[1], way[0]) };
                Fault::Cut("one way of one link", [way].into())
            }
            3 => Fault::Cut("half partition", patterns::halves(&all, &side)),
            4 => {
                self.nodes.shuffle(&mut self.rng);
                Fault::Cut("ring partition", patterns::ring(&self.nodes))
            }
            _ => {
                let bridge = self.nodes.iter().copied().find(|node| !side.contains(node)).unwrap_or(1);
                Fault::Cut("bridge partition", patterns::bridge(&all, &side, bridge))
            }
        }
    }

    fn stop(&mut self) -> Fault {
        // Now and then everybody at once.
        let everybody = self.rng.random_bool(0.1);
        let nodes = if everybody { self.nodes.iter().copied().collect() } else { self.minority() };
        if self.rng.random_bool(0.6) { Fault::Kill(nodes) } else { Fault::Pause(nodes) }
    }
}

impl Iterator for Schedule {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let faults = match self.rng.random_range(0..10) {
            0..=3 => vec![self.stop()],
            4..=7 => vec![self.cut()],
            _ => vec![self.cut(), self.stop()],
        };
        let hold = Duration::from_millis(self.rng.random_range(500..8_000));
        let rest = Duration::from_millis(self.rng.random_range(500..6_000));
        Some(Step { faults, hold, rest })
    }
}

/// Brings it about.
///
/// # Errors
/// The mechanism fails.
pub fn inject(cluster: &mut Cluster, fault: &Fault) -> anyhow::Result<()> {
    match fault {
        Fault::Kill(nodes) => nodes.iter().try_for_each(|node| cluster.kill(*node)),
        Fault::Pause(nodes) => nodes.iter().try_for_each(|node| cluster.pause(*node)),
        Fault::Cut(_, ways) => cluster.network.cut(ways.iter().copied()),
    }
}

/// Ends it. Nodes that were killed are started, and not waited for.
///
/// # Errors
/// The mechanism fails.
pub fn end(cluster: &mut Cluster, fault: &Fault) -> anyhow::Result<()> {
    match fault {
        Fault::Kill(nodes) => nodes.iter().try_for_each(|node| cluster.start_node(*node)),
        Fault::Pause(nodes) => nodes.iter().try_for_each(|node| cluster.resume(*node)),
        Fault::Cut(..) => cluster.network.heal(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(seed: u64, nodes: Node) -> Vec<Step> {
        Schedule::new(seed, nodes).take(300).collect()
    }

    #[test]
    fn a_seed_names_one_schedule() {
        assert_eq!(steps(7, 5), steps(7, 5));
        assert_ne!(steps(7, 5), steps(8, 5));
    }

    #[test]
    fn every_kind_of_fault_comes_up() {
        for nodes in [3, 5] {
            let kinds: BTreeSet<_> = steps(1, nodes).iter().flat_map(|step| &step.faults).map(Fault::kind).collect();
            assert_eq!(kinds.len(), 8, "{kinds:?}");
        }
    }

    #[test]
    fn every_cut_is_between_nodes_that_are_there() {
        for fault in steps(3, 5).into_iter().flat_map(|step| step.faults) {
            if let Fault::Cut(kind, ways) = fault {
                assert!(!ways.is_empty(), "{kind} cuts nothing");
                assert!(ways.iter().all(|(from, to)| from != to && (1..=5).contains(from) && (1..=5).contains(to)));
            }
        }
    }
}
