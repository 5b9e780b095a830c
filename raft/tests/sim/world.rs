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
    pub(crate) group: Group<Journal>,
    pub(crate) log: Arc<dyn GroupLog>,
    pub(crate) tasks: Tasks,
}

/// One node, running or not.
#[derive(Default)]
pub(crate) struct Slot {
    pub(crate) disk: FaultDisk,
    pub(crate) running: Option<Running>,
    /// How often it was started.
    pub(crate) incarnation: u64,
    /// Its syncs wait.
    pub(crate) held: bool,
    /// It shall compact its log.
    pub(crate) compact: bool,
}

/// What became of a proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Acked(EntryId),
    /// Proved not to be in any log.
    Refused,
    Unknown,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) nodes: BTreeMap<NodeId, Slot>,
    /// Clients propose while this is set.
    pub(crate) busy: bool,
    /// Who shall vote; whoever leads works towards it. Empty: nothing changes.
    pub(crate) wanted: BTreeSet<NodeId>,
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
