//! What the catalog takes from its surroundings: its replica on this node, the way to the leader, and the vault.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{GroupId, LogIndex, NodeId, ProjectId, RingId, TopicId};
use ensign_raft::{CompactError, Group, Leadership, Members, PeerState, ProposeError, ReadError};
use ensign_storage::EntryId;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use thiserror::Error;
use tokio::sync::watch;

use super::command::Response;
use super::errors::VaultFailure;
use super::machine::CatalogMachine;

/// Why the leader, wherever it is, gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ProposeLinkError {
    /// Nothing was appended: no leader is known, or it could not be reached, or it said so. Try again.
    #[error("the leader cannot be reached: {cause}")]
    Unreachable {
        /// What happened.
        cause: String,
    },
    /// The request was sent and the answer is missing; the entry may be committed.
    #[error("the leader's answer is missing: {cause}")]
    OutcomeUnknown {
        /// What happened.
        cause: String,
    },
    /// Nothing was appended, and trying again would not help.
    #[error("the leader refused the proposal: {cause}")]
    Refused {
        /// What it said.
        cause: String,
    },
}

/// Reaches the leader of a group from any node. It may retry only what is sure not to have been appended.
pub trait ProposeLink: Send + Sync + 'static {
    /// Proposes at the group's leader; answers the entry's place and the encoded response.
    fn propose(&self, group: GroupId, payload: Bytes)
    -> BoxFuture<'static, Result<(EntryId, Bytes), ProposeLinkError>>;

    /// Asks the group's leader for its read index, in a quorum round that begins after the call.
    fn read_index(&self, group: GroupId) -> BoxFuture<'static, Result<LogIndex, ProposeLinkError>>;
}

/// The catalog's replica on this node. Implemented by its [`Group`]; tests use one without Raft.
pub trait Replica: Send + Sync + 'static {
    /// Proposes here; only the leader can.
    fn propose(&self, payload: Bytes) -> BoxFuture<'static, Result<(EntryId, Response), ProposeError>>;

    /// The leader's read index, confirmed by a quorum.
    fn read_index(&self) -> BoxFuture<'static, Result<LogIndex, ReadError>>;

    /// How far this node has applied.
    fn applied(&self) -> watch::Receiver<LogIndex>;

    /// Who leads.
    fn leadership(&self) -> watch::Receiver<Leadership>;

    /// Who belongs to the catalog's group, with or without a vote, as far as this node knows; nobody while it waits to be added.
    fn members(&self) -> BTreeSet<NodeId>;

    /// Snapshots the state and drops the log behind it but for `keep_entries`.
    fn compact(&self, keep_entries: u64) -> BoxFuture<'static, Result<LogIndex, CompactError>>;
}

impl Replica for Group<CatalogMachine> {
    fn propose(&self, payload: Bytes) -> BoxFuture<'static, Result<(EntryId, Response), ProposeError>> {
        let group = self.clone();
        async move { group.propose(None, payload).await.map(|committed| (committed.id, committed.response)) }.boxed()
    }

    fn read_index(&self) -> BoxFuture<'static, Result<LogIndex, ReadError>> {
        let group = self.clone();
        async move { group.read_index().await }.boxed()
    }

    fn applied(&self) -> watch::Receiver<LogIndex> {
        Group::applied(self)
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        Group::leadership(self)
    }

    fn members(&self) -> BTreeSet<NodeId> {
        let Members { voters, outgoing, learners } = Group::members(self);
        voters.into_iter().chain(outgoing).chain(learners).collect()
    }

    fn compact(&self, keep_entries: u64) -> BoxFuture<'static, Result<LogIndex, CompactError>> {
        let group = self.clone();
        async move { group.compact(keep_entries).await }.boxed()
    }
}

/// Which nodes answer. Implemented by the Raft runtime's view of its peers; tests say what they like.
pub trait Liveness: Send + Sync + 'static {
    /// For how long a node has not answered this one; none of a node that does, and of this one.
    fn silent_for(&self, node: NodeId) -> Option<Duration>;
}

/// Every node answers, always: for tests, and for a cluster of one.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllAlive;

impl Liveness for AllAlive {
    fn silent_for(&self, _: NodeId) -> Option<Duration> {
        None
    }
}

impl Liveness for ensign_raft::Liveness {
    fn silent_for(&self, node: NodeId) -> Option<Duration> {
        let known = self.peers().into_iter().find(|peer| peer.node == node)?;
        // Who was not heard of yet may be on its way: only silence counts.
        (known.state == PeerState::Dead).then(|| known.since.elapsed())
    }
}

/// A node's right to have the keys of a topic's partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Custody {
    /// Whose.
    pub node: NodeId,
    /// The topic's project.
    pub project: ProjectId,
    /// The topic.
    pub topic: TopicId,
}

/// What the vault has of what the catalog lists.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VaultHas {
    /// Key rings.
    pub rings: BTreeSet<(ProjectId, RingId)>,
    /// Those of them that are not destroyed.
    pub living: BTreeSet<RingId>,
    /// Custody, of every node.
    pub custody: BTreeSet<Custody>,
}

/// The vault's part in making projects and topics. Every call is idempotent.
pub trait VaultWrites: Send + Sync + 'static {
    /// What is there, no older than the call.
    fn list(&self) -> BoxFuture<'static, Result<VaultHas, VaultFailure>>;

    /// Makes a project's key ring, with a first version.
    fn create_ring(&self, project: ProjectId, ring: RingId) -> BoxFuture<'static, Result<(), VaultFailure>>;

    /// Orders that a ring be destroyed, for ever. Done once [`VaultHas::living`] has it no more: that may take the vault a while.
    fn destroy_ring(&self, ring: RingId) -> BoxFuture<'static, Result<(), VaultFailure>>;

    /// Lets nodes have the keys of topics' partitions, in few commits. After a failure some may have them.
    fn put_custodies(&self, records: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>>;

    /// Ends that.
    fn drop_custodies(&self, records: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>>;

    /// Lets a node have the keys of a topic's partition.
    fn put_custody(
        &self,
        node: NodeId,
        project: ProjectId,
        topic: TopicId,
    ) -> BoxFuture<'static, Result<(), VaultFailure>> {
        self.put_custodies(vec![Custody { node, project, topic }])
    }

    /// Ends that.
    fn drop_custody(
        &self,
        node: NodeId,
        project: ProjectId,
        topic: TopicId,
    ) -> BoxFuture<'static, Result<(), VaultFailure>> {
        self.drop_custodies(vec![Custody { node, project, topic }])
    }
}
