//! A cluster in one process, over the network in memory and logs in memory.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{GroupId, LogIndex, NodeId};
use ensign_raft::env::{SeededRng, SystemClock, Tasks};
use ensign_raft::testing::{Journal, MemoryNet, quick};
use ensign_raft::{Group, GroupSpec, Mode, ProposeError, Runtime, RuntimeConfig, parting};
use ensign_storage::{MemoryLog, NodeLog as _};

pub(crate) const GROUP: GroupId = GroupId(16);

pub(crate) struct Node {
    pub(crate) runtime: Runtime,
    pub(crate) group: Group<Journal>,
    pub(crate) log: MemoryLog,
}

pub(crate) struct Cluster {
    pub(crate) net: MemoryNet,
    pub(crate) nodes: BTreeMap<NodeId, Node>,
    pub(crate) machine: Journal,
    ids: Vec<NodeId>,
    /// How many nodes were started; each start is another incarnation.
    pub(crate) lives: u64,
}

impl Cluster {
    pub(crate) async fn start(size: u64) -> Self {
        Self::start_with(size, Journal::default()).await
    }

    pub(crate) async fn start_with(size: u64, machine: Journal) -> Self {
        let ids = (1..=size).map(NodeId).collect();
        let mut cluster = Self { net: MemoryNet::new(), nodes: BTreeMap::new(), machine, ids, lives: 0 };
        for id in cluster.ids.clone() {
            cluster.start_node(id, MemoryLog::new()).await;
        }
        cluster
    }

    /// Starts a node, with the log that it left. One that is not a founder waits to be added.
    pub(crate) async fn start_node(&mut self, id: NodeId, log: MemoryLog) {
        self.lives += 1;
        let config = RuntimeConfig { incarnation: self.lives, ..quick(id) };
        let rng = Arc::new(SeededRng::new(id.0));
        let transport = self.net.transport(id);
        let runtime = Runtime::new(config, transport, Arc::new(SystemClock), rng, Tasks::new());
        self.net.attach(&runtime);
        let founds = self.ids.contains(&id);
        let (voters, mode) =
            if founds { (self.ids.iter().copied().collect(), Mode::Found) } else { (BTreeSet::new(), Mode::Member) };
        let spec = GroupSpec { id: GROUP, voters, mode };
        let group = runtime.start(spec, log.group(GROUP), self.machine.clone()).await.expect("the group starts");
        self.nodes.insert(id, Node { runtime, group, log });
    }

    /// Stops a node without a hand-over and gives back what a crash would leave of its log.
    pub(crate) async fn crash(&mut self, id: NodeId) -> MemoryLog {
        let node = self.nodes.remove(&id).expect("the node runs");
        self.net.detach(id);
        let survives = node.log.crash();
        node.runtime.stop(GROUP).await;
        survives
    }

    /// Has a node leave the group as one does whose replica is wanted elsewhere: it stops, and gives its log up.
    pub(crate) async fn leave(&mut self, id: NodeId) {
        let node = &self.nodes[&id];
        node.runtime.stop(GROUP).await;
        let kept = parting(&node.log.group(GROUP).state()).expect("the log is sound");
        node.log.forget(GROUP, kept.expect("it has made promises"), Box::new(|done| done.expect("durable")));
    }

    /// Has a node that left wait to be added again.
    pub(crate) async fn come_back(&mut self, id: NodeId) {
        let node = self.nodes.get_mut(&id).expect("the node runs");
        let spec = GroupSpec { id: GROUP, voters: BTreeSet::new(), mode: Mode::Member };
        let log = node.log.group(GROUP);
        node.group = node.runtime.start(spec, log, self.machine.clone()).await.expect("the group starts");
    }

    pub(crate) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[&id]
    }

    /// Waits until some node leads and is ready.
    pub(crate) async fn leader(&self) -> NodeId {
        self.leader_among(&self.nodes.keys().copied().collect::<Vec<_>>()).await
    }

    pub(crate) async fn leader_among(&self, ids: &[NodeId]) -> NodeId {
        within("a leader", async {
            loop {
                for id in ids {
                    let now = *self.nodes[id].group.leadership().borrow();
                    if now.ready && now.leader == Some(*id) {
                        return *id;
                    }
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }

    /// Proposes at whoever leads until it is committed.
    pub(crate) async fn propose(&self, payload: &'static str) -> LogIndex {
        within("a commit", async {
            loop {
                let leader = self.leader().await;
                match self.nodes[&leader].group.propose(None, Bytes::from_static(payload.as_bytes())).await {
                    Ok(committed) => return committed.id.index,
                    Err(ProposeError::NotLeader { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
                    Err(error) => panic!("{error}"),
                }
            }
        })
        .await
    }

    pub(crate) async fn applied(&self, id: NodeId, index: LogIndex) {
        let mut applied = self.nodes[&id].group.applied();
        within("an applied entry", async { applied.wait_for(|at| *at >= index).await.map(|_| ()) })
            .await
            .expect("the group lives");
    }

    pub(crate) fn journal(&self, id: NodeId) -> Vec<String> {
        self.nodes[&id].group.inspect(|journal| {
            journal.entries.iter().map(|entry| String::from_utf8_lossy(&entry.payload).into_owned()).collect()
        })
    }
}

pub(crate) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.unwrap_or_else(|_| panic!("no {what} within 20 s"))
}
