//! For tests: a network in memory that can be cut, quick timing, and a machine that keeps what it is given.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use ensign_proto::{ClusterVersion, LogIndex, NodeId, Term};
use ensign_storage::EntryId;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::{RuntimeConfig, Timing};
use crate::env::{Lane, Pipe, Tasks, Transport, TransportError};
use crate::errors::RestoreError;
use crate::machine::{CommittedEntry, StateMachine};
use crate::runtime::Runtime;

/// Elections within a tenth of a second, for clusters in one process.
pub const QUICK: Timing = Timing {
    heartbeat: Duration::from_millis(40),
    election_min: Duration::from_millis(120),
    election_max: Duration::from_millis(200),
};

/// `node` with [`QUICK`] timing.
pub fn quick(node: NodeId) -> RuntimeConfig {
    RuntimeConfig { timing: QUICK, incarnation: 1, ..RuntimeConfig::new(node) }
}

/// Messages on their way through one pipe.
const DEPTH: usize = 64;

/// A network in memory. Cheap clone; all clones are one network.
#[derive(Clone, Default)]
pub struct MemoryNet {
    state: Arc<Mutex<NetState>>,
    tasks: Tasks,
}

#[derive(Default)]
struct NetState {
    nodes: BTreeMap<NodeId, Runtime>,
    cut: BTreeSet<(NodeId, NodeId)>,
    open: Vec<(NodeId, NodeId, CancellationToken)>,
}

impl std::fmt::Debug for MemoryNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MemoryNet")
    }
}

impl MemoryNet {
    /// A network without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, NetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `node` opens pipes with.
    pub fn transport(&self, node: NodeId) -> Arc<dyn Transport> {
        Arc::new(MemoryTransport { net: self.clone(), node })
    }

    /// From now on pipes to this runtime's node arrive there.
    pub fn attach(&self, runtime: &Runtime) {
        self.lock().nodes.insert(runtime.node(), runtime.clone());
    }

    /// Takes a node off the network and breaks its pipes, as a crash does.
    pub fn detach(&self, node: NodeId) {
        self.lock().nodes.remove(&node);
        self.break_pipes(|a, b| a == node || b == node);
    }

    /// Cuts `node` off from every other node, both ways.
    pub fn isolate(&self, node: NodeId) {
        {
            let mut state = self.lock();
            let others: Vec<_> = state.nodes.keys().copied().filter(|other| *other != node).collect();
            for other in others {
                state.cut.insert((node, other));
                state.cut.insert((other, node));
            }
        }
        self.break_pipes(|a, b| a == node || b == node);
    }

    /// Undoes every cut.
    pub fn heal(&self) {
        self.lock().cut.clear();
    }

    fn break_pipes(&self, which: impl Fn(NodeId, NodeId) -> bool) {
        self.lock().open.retain(|(from, to, pipe)| {
            let breaks = which(*from, *to);
            if breaks {
                pipe.cancel();
            }
            !breaks && !pipe.is_cancelled()
        });
    }

    /// One direction of a pipe.
    fn carry(&self, broken: &CancellationToken) -> (mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>) {
        let (sender, mut accepted) = mpsc::channel::<Bytes>(DEPTH);
        let (delivery, receiver) = mpsc::channel(DEPTH);
        let broken = broken.clone();
        self.tasks.spawn("memory-pipe", move |_stop| async move {
            let carrying = async {
                while let Some(message) = accepted.recv().await {
                    if delivery.send(message).await.is_err() {
                        break;
                    }
                }
            };
            broken.run_until_cancelled(carrying).await;
        });
        (sender, receiver)
    }

    fn connect(&self, from: NodeId, to: NodeId, lane: Lane) -> Result<Pipe, TransportError> {
        let refused = |cause: &str| TransportError { peer: to, cause: cause.to_owned() };
        let runtime = {
            let state = self.lock();
            if state.cut.contains(&(from, to)) {
                return Err(refused("the network is cut"));
            }
            state.nodes.get(&to).cloned().ok_or_else(|| refused("the node is down"))?
        };
        let broken = CancellationToken::new();
        let ((outgoing, there), (back, incoming)) = (self.carry(&broken), self.carry(&broken));
        self.lock().open.push((from, to, broken));
        runtime.accept(from, lane, Pipe { outgoing: back, incoming: there, version: ClusterVersion::NEWEST });
        Ok(Pipe { outgoing, incoming, version: ClusterVersion::NEWEST })
    }
}

struct MemoryTransport {
    net: MemoryNet,
    node: NodeId,
}

impl Transport for MemoryTransport {
    fn connect(&self, peer: NodeId, lane: Lane) -> BoxFuture<'static, Result<Pipe, TransportError>> {
        let (net, node) = (self.net.clone(), self.node);
        async move { net.connect(node, peer, lane) }.boxed()
    }
}

/// A machine that keeps every entry in order; its response is how many it holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Journal {
    /// What was applied.
    pub entries: Vec<CommittedEntry>,
    /// Whether it makes checkpoints.
    pub checkpoints: bool,
}

impl Journal {
    /// A journal that lets restarts skip what its checkpoint covers.
    pub fn with_checkpoints() -> Self {
        Self { checkpoints: true, ..Self::default() }
    }
}

impl StateMachine for Journal {
    type Response = u64;

    fn apply(&mut self, entry: &CommittedEntry) -> u64 {
        self.entries.push(entry.clone());
        self.entries.len() as u64
    }

    fn snapshot(&self) -> Bytes {
        let mut out = BytesMut::new();
        for entry in &self.entries {
            out.put_u64(entry.id.term.0);
            out.put_u64(entry.id.index.0);
            out.put_u32(entry.payload.len() as u32);
            out.put_slice(&entry.payload);
        }
        out.freeze()
    }

    fn restore(&mut self, snapshot: &Bytes) -> Result<(), RestoreError> {
        let (mut rest, mut entries) = (snapshot.clone(), Vec::new());
        while !rest.is_empty() {
            if rest.len() < 20 {
                return Err(RestoreError::new("a journal entry is cut short"));
            }
            let id = EntryId { term: Term(rest.get_u64()), index: LogIndex(rest.get_u64()) };
            let length = rest.get_u32() as usize;
            if rest.len() < length {
                return Err(RestoreError::new("a journal payload is cut short"));
            }
            entries.push(CommittedEntry { id, payload: rest.split_to(length) });
        }
        self.entries = entries;
        Ok(())
    }

    fn checkpoint(&self) -> Option<Bytes> {
        self.checkpoints.then(|| self.snapshot())
    }

    fn restore_checkpoint(&mut self, bytes: &Bytes) -> Result<(), RestoreError> {
        self.restore(bytes)
    }
}
