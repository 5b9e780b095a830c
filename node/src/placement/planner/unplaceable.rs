//! Why replicas cannot be where they should.

use std::collections::BTreeSet;
use std::fmt;

use ensign_proto::NodeId;
use thiserror::Error;

/// Why replicas cannot be where they should.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unplaceable {
    /// Not a number of replicas.
    #[error("a topic has 1 to {max} replicas, not {asked}")]
    Replication {
        /// What was asked for.
        asked: u32,
        /// What is possible.
        max: u32,
    },
    /// No active node is in the region.
    #[error("no active node is in region {region:?}; there are {}", Regions(.known))]
    RegionUnknown {
        /// The region.
        region: String,
        /// Those that there are.
        known: BTreeSet<String>,
    },
    /// The preferred region is not among those that replicas may be in.
    #[error("the leader region {region:?} is not among the topic's regions, {}", Regions(.allowed))]
    LeaderRegion {
        /// The region.
        region: String,
        /// Those that are allowed.
        allowed: BTreeSet<String>,
    },
    /// Fewer nodes than replicas may hold one.
    #[error("{wanted} replicas need {wanted} active nodes{}, and there are {eligible}: add nodes, or ask for fewer replicas", In(.regions))]
    TooFewNodes {
        /// How many replicas.
        wanted: u32,
        /// How many nodes may hold one.
        eligible: usize,
        /// The regions that replicas never leave; empty for any.
        regions: BTreeSet<String>,
    },
    /// So many of those that have it do not answer that nothing of it can be changed.
    #[error("{}", no_majority(.silent, *.replicas))]
    NoMajority {
        /// Who does not answer.
        silent: BTreeSet<NodeId>,
        /// How many have it.
        replicas: usize,
    },
}

fn no_majority(silent: &BTreeSet<NodeId>, replicas: usize) -> String {
    let names = silent.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let (nodes, do_not) = if silent.len() == 1 { ("node", "does not") } else { ("nodes", "do not") };
    let which = match (silent.len(), replicas) {
        (1, 1) => "its only replica".to_owned(),
        (gone, all) => format!("{gone} of its {all} replicas"),
    };
    let left = if silent.len() == replicas {
        "`ensign topic destroy` is all that is left to do"
    } else {
        "read what the others still have (`ensign subscribe NAME --from earliest`), and then destroy the topic (`ensign topic destroy`)"
    };
    format!(
        "{which}, on {nodes} {names}, {do_not} answer, and without a majority nothing can move: bring {nodes} {names} back; if what the \
         disks there held is lost for good, {left}"
    )
}

struct Regions<'a>(&'a BTreeSet<String>);

impl fmt::Display for Regions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("none");
        }
        let names: Vec<_> = self.0.iter().map(|region| format!("{region:?}")).collect();
        f.write_str(&names.join(", "))
    }
}

struct In<'a>(&'a BTreeSet<String>);

impl fmt::Display for In<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " in {}", Regions(self.0)) }
    }
}
