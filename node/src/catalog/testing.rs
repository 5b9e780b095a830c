//! A catalog without Raft, network or vault, for tests of what builds on it: one node that always leads.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ClusterVersion, GroupId, LogIndex, NodeId, ProjectId, RingId, Term, TopicName};
use ensign_raft::env::{Clock, Rng};
use ensign_raft::{CommittedEntry, CompactError, Leadership, ProposeError, ReadError, StateMachine as _};
use ensign_storage::EntryId;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::command::{Command, NewTopic, Outcome, Response};
use super::errors::{CreateTopicError, VaultFailure};
use super::handle::{Catalog, CatalogParts};
use super::link::{AllAlive, Custody, Liveness, ProposeLink, ProposeLinkError, Replica, VaultHas, VaultWrites};
use super::machine::CatalogMachine;
use super::moves::Placement;
use super::records::{Topic, TopicPolicies};

/// How long a catalog of these tests vouches for its view.
pub const FRESH_FOR: Duration = Duration::from_secs(10);

/// A catalog whose changes are applied as they are proposed.
pub fn solo(clock: Arc<dyn Clock>, rng: Arc<dyn Rng>) -> Catalog {
    solo_with(Arc::new(YesVault), clock, rng)
}

/// The same, in front of this vault.
pub fn solo_with(vault: Arc<dyn VaultWrites>, clock: Arc<dyn Clock>, rng: Arc<dyn Rng>) -> Catalog {
    cuttable_with(vault, clock, rng).0
}

/// The same, where `liveness` says which nodes answer.
pub fn solo_where(liveness: Arc<dyn Liveness>, clock: Arc<dyn Clock>, rng: Arc<dyn Rng>) -> Catalog {
    made(ClusterVersion::NEWEST, Arc::new(YesVault), liveness, clock, rng).0
}

/// Nodes answer, but for those that are silenced.
#[derive(Debug, Default)]
pub struct HandLiveness(Mutex<BTreeMap<NodeId, Duration>>);

impl HandLiveness {
    fn silent(&self) -> MutexGuard<'_, BTreeMap<NodeId, Duration>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the node has been silent for so long.
    pub fn silence(&self, node: NodeId, since: Duration) {
        self.silent().insert(node, since);
    }

    /// It answers again.
    pub fn wake(&self, node: NodeId) {
        self.silent().remove(&node);
    }
}

impl Liveness for HandLiveness {
    fn silent_for(&self, node: NodeId) -> Option<Duration> {
        self.silent().get(&node).copied()
    }
}

/// The same, and a switch that cuts the way to its leader: it goes on showing what it knew.
pub fn cuttable(clock: Arc<dyn Clock>, rng: Arc<dyn Rng>) -> (Catalog, Arc<AtomicBool>) {
    cuttable_with(Arc::new(YesVault), clock, rng)
}

fn cuttable_with(vault: Arc<dyn VaultWrites>, clock: Arc<dyn Clock>, rng: Arc<dyn Rng>) -> (Catalog, Arc<AtomicBool>) {
    let (catalog, switch, _) = made(ClusterVersion::NEWEST, vault, Arc::new(AllAlive), clock, rng);
    (catalog, switch)
}

/// What was proposed, in order.
#[derive(Debug, Clone, Default)]
pub struct Proposed(Arc<Mutex<Vec<Bytes>>>);

impl Proposed {
    /// All of it.
    pub fn all(&self) -> Vec<Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The catalog of a cluster that is at this version, and what is proposed to it.
pub fn of_version(version: ClusterVersion, clock: Arc<dyn Clock>, rng: Arc<dyn Rng>) -> (Catalog, Proposed) {
    let (catalog, _, proposed) = made(version, Arc::new(YesVault), Arc::new(AllAlive), clock, rng);
    (catalog, proposed)
}

fn made(
    version: ClusterVersion,
    vault: Arc<dyn VaultWrites>,
    liveness: Arc<dyn Liveness>,
    clock: Arc<dyn Clock>,
    rng: Arc<dyn Rng>,
) -> (Catalog, Arc<AtomicBool>, Proposed) {
    let (cut, proposed) = (Arc::<AtomicBool>::default(), Proposed::default());
    let (mut machine, view) = CatalogMachine::new();
    let id = EntryId { term: Term(1), index: LogIndex(1) };
    let payload = Command::SetClusterVersion(version).encode();
    let _ = machine.apply(&CommittedEntry { id, payload });
    let replica = Solo {
        machine: Mutex::new((machine, id.index)),
        applied: watch::Sender::new(id.index),
        cut: Arc::clone(&cut),
        leadership: watch::Sender::new(Leadership { term: Term(1), leader: Some(NodeId(1)), ready: true }),
        proposed: proposed.clone(),
    };
    let (me, replica, link, fresh_for) = (NodeId(1), Arc::new(replica), Arc::new(NoLink), FRESH_FOR);
    let (founders, lost_after) = (BTreeSet::from([me]), Duration::from_mins(10));
    let parts = CatalogParts { me, founders, replica, view, link, vault, fresh_for, liveness, lost_after, clock, rng };
    (Catalog::new(parts), cut, proposed)
}

/// Makes a topic whose replicas are on these nodes.
///
/// # Errors
/// See [`CreateTopicError`].
pub async fn create_topic_on(
    catalog: &Catalog,
    project: ProjectId,
    name: TopicName,
    replicas: BTreeSet<NodeId>,
) -> Result<Arc<Topic>, CreateTopicError> {
    let owner = catalog.project(project).ok_or(CreateTopicError::ProjectUnknown)?;
    let (policies, at) = (TopicPolicies::default(), catalog.now());
    let id = catalog.fresh_topic();
    catalog.parts.vault.put_custodies(catalog.custody_of(project, id)).await?;
    let (ring, placement) = (owner.ring, Placement::anywhere(replicas.len() as u32));
    let topic = NewTopic { id, project, name, ring, replicas, placement, policies, at };
    match catalog.write(Command::CreateTopic(topic)).await? {
        Ok(Outcome::Topic(topic)) => Ok(topic),
        _ => Err(CreateTopicError::NameTaken),
    }
}

struct Solo {
    machine: Mutex<(CatalogMachine, LogIndex)>,
    applied: watch::Sender<LogIndex>,
    leadership: watch::Sender<Leadership>,
    cut: Arc<AtomicBool>,
    proposed: Proposed,
}

impl Replica for Solo {
    fn propose(&self, payload: Bytes) -> BoxFuture<'static, Result<(EntryId, Response), ProposeError>> {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        machine.1 = machine.1.next();
        self.proposed.0.lock().unwrap_or_else(PoisonError::into_inner).push(payload.clone());
        let entry = CommittedEntry { id: EntryId { term: Term(1), index: machine.1 }, payload };
        let response = machine.0.apply(&entry);
        self.applied.send_replace(entry.id.index);
        futures::future::ready(Ok((entry.id, response))).boxed()
    }

    fn read_index(&self) -> BoxFuture<'static, Result<LogIndex, ReadError>> {
        let cut = self.cut.load(Ordering::SeqCst);
        let index = if cut { Err(ReadError::NotLeader { leader: None }) } else { Ok(*self.applied.borrow()) };
        futures::future::ready(index).boxed()
    }

    fn applied(&self) -> watch::Receiver<LogIndex> {
        self.applied.subscribe()
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    fn members(&self) -> BTreeSet<NodeId> {
        BTreeSet::from([NodeId(1)])
    }

    fn compact(&self, _keep_entries: u64) -> BoxFuture<'static, Result<LogIndex, CompactError>> {
        futures::future::ready(Ok(*self.applied.borrow())).boxed()
    }
}

struct NoLink;

impl ProposeLink for NoLink {
    fn propose(&self, _: GroupId, _: Bytes) -> BoxFuture<'static, Result<(EntryId, Bytes), ProposeLinkError>> {
        let cause = "there is no other node".to_owned();
        futures::future::ready(Err(ProposeLinkError::Unreachable { cause })).boxed()
    }

    fn read_index(&self, _: GroupId) -> BoxFuture<'static, Result<LogIndex, ProposeLinkError>> {
        let cause = "there is no other node".to_owned();
        futures::future::ready(Err(ProposeLinkError::Unreachable { cause })).boxed()
    }
}

struct YesVault;

impl VaultWrites for YesVault {
    fn list(&self) -> BoxFuture<'static, Result<VaultHas, VaultFailure>> {
        futures::future::ready(Ok(VaultHas::default())).boxed()
    }

    fn create_ring(&self, _: ProjectId, _: RingId) -> BoxFuture<'static, Result<(), VaultFailure>> {
        futures::future::ready(Ok(())).boxed()
    }

    fn destroy_ring(&self, _: RingId) -> BoxFuture<'static, Result<(), VaultFailure>> {
        futures::future::ready(Ok(())).boxed()
    }

    fn put_custodies(&self, _: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>> {
        futures::future::ready(Ok(())).boxed()
    }

    fn drop_custodies(&self, _: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>> {
        futures::future::ready(Ok(())).boxed()
    }
}
