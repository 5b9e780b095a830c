//! Three vault voters and the nodes that hold its keys, in one process, over links that can be cut.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_keyvault::{
    Caller, Entropy, Holder, HolderConfig, HolderLink, LeaseConfig, LinkError, PlainBatch, RootProvider, RoutedLink,
    TestRoot, Vault, VaultClient, VaultConfig, VaultLink, VaultLinks, VaultPeer,
};
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{
    Algorithm, BatchHeader, ClusterId, ClusterVersion, DekId, GroupId, Link, NodeId, Offset, Partition,
    PartitionContext, ProjectId, Rlid, Term, TopicId,
};
use ensign_raft::Runtime;
use ensign_raft::env::{Clock, SeededRng, SystemClock, Tasks};
use ensign_raft::testing::{MemoryNet, QUICK, quick};
use ensign_storage::{MemoryLog, NodeLog as _};
use futures::future::BoxFuture;

pub(crate) const CLUSTER: ClusterId = ClusterId::from_bytes([1; 16]);
pub(crate) const PROJECT: ProjectId = ProjectId::from_bytes([2; 16]);
pub(crate) const VOTERS: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];
pub(crate) const ROOT: [u8; 32] = [0x11; 32];

pub(crate) fn lease() -> LeaseConfig {
    LeaseConfig { length: Duration::from_secs(3), drift: 0.001, margin: Duration::ZERO }
}

pub(crate) fn ctx() -> PartitionContext {
    PartitionContext {
        cluster: CLUSTER,
        project: PROJECT,
        topic: TopicId::from_bytes([3; 16]),
        partition: Partition(0),
    }
}

pub(crate) fn batch(text: &str) -> (BatchHeader, PlainBatch) {
    let header = BatchHeader {
        algorithm: Algorithm::Aes256Gcm,
        count: 1,
        term: Term(1),
        base_offset: Offset(1),
        first_id: Rlid::new(1, 1),
        last_id: Rlid::new(1, 1),
        dek: DekId::default(),
        prev: Link([0; 32]),
        producers: Vec::new(),
        types: Vec::new(),
        fingerprints: Vec::new(),
    };
    let mut plain = PlainBatch::with_capacity(text.len());
    plain.append(text.as_bytes()).expect("a short text fits");
    (header, plain)
}

pub(crate) async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.unwrap_or_else(|_| panic!("no {what} within 20 s"))
}

/// The peer connections of a whole cluster.
#[derive(Clone, Default)]
pub(crate) struct Wires(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    vaults: BTreeMap<NodeId, Vault>,
    holders: BTreeMap<NodeId, Holder>,
    /// Nodes that hear and say nothing.
    cut: BTreeSet<NodeId>,
}

impl Wires {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn cut(&self, node: NodeId) {
        self.lock().cut.insert(node);
    }

    fn link(&self, from: NodeId) -> Arc<dyn VaultLink> {
        let peer = Wire { wires: self.clone(), from };
        Arc::new(RoutedLink::new(Arc::new(peer), VOTERS.into(), &lease()))
    }
}

struct Wire {
    wires: Wires,
    from: NodeId,
}

impl VaultPeer for Wire {
    fn call(&self, node: NodeId, request: pb::Request) -> BoxFuture<'static, Result<pb::Reply, LinkError>> {
        let (wires, from) = (self.wires.clone(), self.from);
        Box::pin(async move {
            let vault = {
                let state = wires.lock();
                if state.cut.contains(&from) || state.cut.contains(&node) {
                    return Err(LinkError::new("cut"));
                }
                state.vaults.get(&node).cloned().ok_or_else(|| LinkError::new("down"))?
            };
            let answer = vault.handle(Caller { node: from }, request);
            let reply = tokio::time::timeout(Duration::from_secs(5), answer).await.map_err(LinkError::new)?;
            if wires.lock().cut.contains(&from) { Err(LinkError::new("cut")) } else { Ok(reply) }
        })
    }
}

impl Wires {
    fn holder(&self, node: NodeId) -> Result<Holder, LinkError> {
        let state = self.lock();
        if state.cut.contains(&node) {
            return Err(LinkError::new("cut"));
        }
        state.holders.get(&node).cloned().ok_or_else(|| LinkError::new("down"))
    }
}

impl HolderLink for Wires {
    fn surrender(
        &self,
        node: NodeId,
        request: pb::SurrenderRequest,
    ) -> BoxFuture<'static, Result<pb::SurrenderReply, LinkError>> {
        let holder = self.holder(node);
        Box::pin(async move { holder?.surrender(request).await.map_err(LinkError::new) })
    }

    fn refresh(
        &self,
        node: NodeId,
        request: pb::RefreshRequest,
    ) -> BoxFuture<'static, Result<pb::RefreshReply, LinkError>> {
        let holder = self.holder(node);
        Box::pin(async move { holder?.refresh(request).await.map_err(LinkError::new) })
    }
}

pub(crate) struct Voter {
    pub(crate) vault: Vault,
    runtime: Runtime,
    log: MemoryLog,
    tasks: Tasks,
}

pub(crate) struct Cluster {
    pub(crate) net: MemoryNet,
    pub(crate) wires: Wires,
    pub(crate) voters: BTreeMap<NodeId, Voter>,
    pub(crate) tasks: Tasks,
    /// Nodes of the cluster that are no members of the vault's group now.
    pub(crate) elsewhere: Arc<Mutex<Vec<NodeId>>>,
    /// What its voters read the time from.
    clock: Arc<dyn Clock>,
}

impl Cluster {
    /// Three initialized voters.
    pub(crate) async fn start() -> Self {
        Self::start_with(&[ROOT; 3], lease()).await
    }

    /// No voter yet.
    pub(crate) fn start_empty() -> Self {
        let (net, wires, clock) = (MemoryNet::new(), Wires::default(), Arc::new(SystemClock));
        let elsewhere = Arc::default();
        Self { net, wires, voters: BTreeMap::new(), tasks: Tasks::new(), elsewhere, clock }
    }

    pub(crate) async fn start_with(roots: &[[u8; 32]; 3], lease: LeaseConfig) -> Self {
        Self::start_on(Arc::new(SystemClock), roots, lease).await
    }

    /// The same with a clock of their own.
    pub(crate) async fn start_on(clock: Arc<dyn Clock>, roots: &[[u8; 32]; 3], lease: LeaseConfig) -> Self {
        let mut cluster = Self { clock, ..Self::start_empty() };
        for (node, root) in VOTERS.into_iter().zip(roots) {
            cluster.start_voter(node, MemoryLog::new(), *root, lease).await;
        }
        let first = cluster.voters[&VOTERS[0]].vault.clone();
        let deadline = Duration::from_secs(10);
        // As bootstrap does: whoever leads does it, the others wait for it.
        let second = cluster.voters[&VOTERS[1]].vault.clone();
        let (one, two) = tokio::join!(first.initialize(deadline, None), second.initialize(deadline, None));
        one.and(two).expect("the vault is initialized");
        cluster
    }

    pub(crate) async fn start_voter(&mut self, node: NodeId, log: MemoryLog, root: [u8; 32], lease: LeaseConfig) {
        let clock = Arc::clone(&self.clock);
        self.start_voter_with(node, log, Arc::new(TestRoot::new(root)), clock, lease).await;
    }

    pub(crate) async fn start_voter_with(
        &mut self,
        node: NodeId,
        log: MemoryLog,
        root: Arc<dyn RootProvider>,
        clock: Arc<dyn Clock>,
        lease: LeaseConfig,
    ) {
        let tasks = Tasks::new();
        let transport = self.net.transport(node);
        let rng = Arc::new(SeededRng::new(node.0));
        let runtime = Runtime::new(quick(node), transport, Arc::new(SystemClock), rng, tasks.clone());
        self.net.attach(&runtime);
        let config = VaultConfig {
            cluster: CLUSTER,
            node,
            voters: VOTERS.into(),
            create: true,
            lease,
            election_max: QUICK.election_max,
            entropy: Entropy::kernel(),
        };
        let group_log = log.group(GroupId::VAULT);
        let peers = Arc::new(Wire { wires: self.wires.clone(), from: node });
        let elsewhere = Arc::clone(&self.elsewhere);
        let links = VaultLinks {
            holders: Arc::new(self.wires.clone()),
            peers,
            version: Arc::new(|| ClusterVersion::V2),
            nodes: Arc::new(move || elsewhere.lock().expect("nobody panics with it").clone()),
        };
        let vault =
            Vault::start(config, &runtime, group_log, root, links, clock, &tasks).await.expect("the vault starts");
        self.wires.lock().vaults.insert(node, vault.clone());
        self.voters.insert(node, Voter { vault, runtime, log, tasks });
    }

    /// Takes a voter away as a crash does; gives back what is left of its log.
    pub(crate) async fn crash(&mut self, node: NodeId) -> MemoryLog {
        let voter = self.voters.remove(&node).expect("the voter runs");
        self.wires.lock().vaults.remove(&node);
        self.net.detach(node);
        let survives = voter.log.crash();
        voter.tasks.shut_down(Duration::ZERO).await;
        voter.runtime.stop(GroupId::VAULT).await;
        survives
    }

    pub(crate) fn leads(&self, node: NodeId) -> bool {
        let now = self.voters[&node].vault.group_status().leadership;
        now.ready && now.leader == Some(node)
    }

    pub(crate) async fn leader(&self) -> NodeId {
        self.leader_but(None).await
    }

    pub(crate) async fn leader_but(&self, not: Option<NodeId>) -> NodeId {
        within("a leader", async {
            loop {
                let mut voters = self.voters.keys().copied();
                if let Some(leader) = voters.find(|node| Some(*node) != not && self.leads(*node)) {
                    return leader;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
    }

    /// A node that holds keys.
    pub(crate) fn holder(&self, node: NodeId) -> Holder {
        self.holder_with(node, lease())
    }

    pub(crate) fn holder_with(&self, node: NodeId, lease: LeaseConfig) -> Holder {
        let config = HolderConfig { lease, ..HolderConfig::new(CLUSTER, node) };
        let holder = Holder::new(config, self.wires.link(node), Arc::new(SystemClock), &self.tasks);
        self.wires.lock().holders.insert(node, holder.clone());
        holder
    }

    pub(crate) fn client(&self, node: NodeId) -> VaultClient {
        VaultClient::new(self.wires.link(node), CLUSTER, node, &Entropy::kernel())
    }
}
