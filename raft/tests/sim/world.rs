//! What the hosts of a simulation and the test that drives them share.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use ensign_proto::{LogIndex, NodeId};
use ensign_raft::env::Tasks;
use ensign_raft::testing::Journal;
use ensign_raft::{Group, ProposeError};
use ensign_storage::{EntryId, FaultDisk, GroupLog};

/// A replica that runs now.
#[derive(Clone)]
pub(crate) struct Running {
    pub(crate) life: u64,
    pub(crate) group: Group<Journal>,
    pub(crate) log: Arc<dyn GroupLog>,
    pub(crate) tasks: Tasks,
}

/// One node, running or not.
#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is something else that a test does to a node")]
pub(crate) struct Slot {
    pub(crate) disk: FaultDisk,
    pub(crate) running: Option<Running>,
    /// How often it was started.
    pub(crate) incarnation: u64,
    /// Its syncs wait.
    pub(crate) held: bool,
    /// It shall compact its log.
    pub(crate) compact: bool,
    /// The plan as the node last heard it.
    pub(crate) plan: Plan,
    /// It hears nothing of the plan.
    pub(crate) blind: bool,
    /// How often its replica was started: at every start of the node, and whenever it was asked back.
    pub(crate) lives: u64,
    /// It has given up its replica, and nothing of its log is left but what it promised.
    pub(crate) gone: bool,
}

/// What became of a proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Acked(EntryId),
    /// Proved not to be in any log.
    Refused,
    Unknown,
}

/// Where replicas shall be: what the catalog is to a partition. It does not depend on who can reach whom: a node that is cut off from
/// all other members of the group may still read and write it, unless it is blind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Plan {
    /// Who shall vote; whoever leads works towards it.
    pub(crate) wanted: BTreeSet<NodeId>,
    /// Which plan this is; who acts on an older one is refused.
    pub(crate) number: u64,
    /// Who may belong to the group: all that were wanted since the group was last as it should be. Nobody else holds a replica.
    pub(crate) holders: BTreeSet<NodeId>,
    /// How often the group became what was wanted.
    pub(crate) settled: u64,
}

impl Plan {
    /// From now on these shall vote.
    pub(crate) fn want(&mut self, voters: BTreeSet<NodeId>) {
        self.number += 1;
        self.holders.extend(&voters);
        self.wanted = voters;
    }

    /// The voters are those that plan `number` wants, so all others may go. Whether that is news.
    pub(crate) fn settle(&mut self, number: u64) -> bool {
        let news = number == self.number && !self.is_settled();
        if news {
            self.settled += 1;
            self.holders = self.wanted.clone();
        }
        news
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.holders == self.wanted
    }
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) nodes: BTreeMap<NodeId, Slot>,
    /// Clients propose while this is set.
    pub(crate) busy: bool,
    pub(crate) plan: Plan,
    /// How often a replica came back that had left.
    pub(crate) returns: u64,
    /// How many changes of voters were made.
    pub(crate) changes: u64,
    pub(crate) proposed: u64,
    /// In the order in which the clients learned them.
    pub(crate) outcomes: Vec<(Bytes, Outcome)>,
    pub(crate) acked_through: LogIndex,
    /// What a host itself saw go wrong.
    pub(crate) broken: Option<String>,
    pub(crate) trace: String,
}

#[derive(Clone, Default)]
pub(crate) struct World(Arc<Mutex<State>>);

impl World {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The plan as `node` knows it, which may be long out of date.
    pub(crate) fn plan(&self, node: NodeId) -> Plan {
        let state = &mut *self.lock();
        let slot = state.nodes.entry(node).or_default();
        if !slot.blind || slot.plan == Plan::default() {
            slot.plan = state.plan.clone();
        }
        slot.plan.clone()
    }

    /// The plan as it is, for who must not act on an older one. None: the node cannot learn it now.
    pub(crate) fn confirmed_plan(&self, node: NodeId) -> Option<Plan> {
        let state = self.lock();
        state.nodes.get(&node).filter(|slot| !slot.blind).map(|_| state.plan.clone())
    }

    /// A line of the trace.
    pub(crate) fn note(&self, line: &str) {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        let _ = writeln!(self.lock().trace, "{at:?} {line}");
    }

    pub(crate) fn next_payload(&self, node: NodeId) -> Bytes {
        let mut state = self.lock();
        state.proposed += 1;
        Bytes::from(format!("{}-{}", node, state.proposed))
    }

    pub(crate) fn settle(&self, payload: Bytes, outcome: Result<EntryId, ProposeError>) {
        let outcome = match outcome {
            Ok(id) => Outcome::Acked(id),
            Err(ProposeError::OutcomeUnknown) => Outcome::Unknown,
            Err(_) => Outcome::Refused,
        };
        self.note(&format!("{} {outcome:?}", String::from_utf8_lossy(&payload)));
        let mut state = self.lock();
        if let Outcome::Acked(id) = outcome {
            state.acked_through = state.acked_through.max(id.index);
        }
        state.outcomes.push((payload, outcome));
    }
}
