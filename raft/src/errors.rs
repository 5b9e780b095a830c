//! What can go wrong, said as what the caller can do next.

use std::collections::BTreeSet;
use std::sync::Arc;

use ensign_proto::{ByteCount, GroupId, LogIndex, NodeId};
use thiserror::Error;

/// Bytes that are not a state of this machine.
#[derive(Debug, Clone, Error)]
#[error("cannot restore the state machine: {what}")]
pub struct RestoreError {
    what: String,
}

impl RestoreError {
    /// Says what is wrong with the bytes.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }
}

/// Why a group could not be started.
#[derive(Debug, Clone, Error)]
pub enum StartError {
    /// The group runs already on this node.
    #[error("group {group} runs already")]
    Running {
        /// Which one.
        group: GroupId,
    },
    /// The spec contradicts itself, or the timing does.
    #[error("invalid group: {what}")]
    Invalid {
        /// What is wrong.
        what: String,
    },
    /// The stored log or snapshot cannot be used; this replica takes no further part.
    #[error("group {group} cannot recover: {cause}")]
    Storage {
        /// Which one.
        group: GroupId,
        /// What the storage, or the state machine, said.
        cause: Arc<str>,
    },
    /// The group's first entry finds no room. Nothing is lost: start it again when there is some.
    #[error("group {group} cannot begin: the disk is full: {cause}")]
    DiskFull {
        /// Which one.
        group: GroupId,
        /// What the disk said.
        cause: Arc<str>,
    },
    /// The runtime is shutting down.
    #[error("the raft runtime is stopping")]
    Stopping,
}

/// Why a proposal has no [`crate::Committed`].
#[derive(Debug, Clone, Error)]
pub enum ProposeError {
    /// A proof that nothing was appended: propose at `leader`, or here again once one is known.
    #[error("not the leader (leader: {leader:?}); nothing was appended")]
    NotLeader {
        /// The leader, as far as this node knows.
        leader: Option<NodeId>,
    },
    /// The entry may have been committed, or may yet be. Only de-duplication in the state machine makes a retry safe.
    #[error("leadership was lost after the entry was proposed; it may still be committed")]
    OutcomeUnknown,
    /// Nothing was appended: the payload is above the limit.
    #[error("a proposal of {size} bytes is above the limit of {limit} bytes")]
    TooLarge {
        /// Its size.
        size: ByteCount,
        /// What is allowed.
        limit: ByteCount,
    },
    /// Nothing was appended: the log's disk is full. Retry once there is room.
    #[error("the disk of this node's log is full; nothing was appended")]
    DiskFull,
    /// Nothing was appended: the group does not run here.
    #[error("the group is stopped on this node; nothing was appended")]
    Stopped,
    /// Nothing was appended: this replica's storage failed. Ask another node; this one needs its operator.
    #[error("this replica is fenced: {cause}; nothing was appended")]
    Fenced {
        /// The first failure.
        cause: Arc<str>,
    },
}

/// Why a read was refused.
#[derive(Debug, Clone, Error)]
pub enum ReadError {
    /// Only the leader can answer; ask `leader`.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader {
        /// The leader, as far as this node knows.
        leader: Option<NodeId>,
    },
    /// This node leads, but no majority confirmed it in time. Retry.
    #[error("no majority confirmed the leader in time")]
    NoQuorum,
    /// The range begins before the log does; `first` is the first entry that is left.
    #[error("the log begins at {first}")]
    Purged {
        /// The first index that is kept.
        first: LogIndex,
    },
    /// The group does not run here.
    #[error("the group is stopped on this node")]
    Stopped,
    /// This replica's storage failed; ask another.
    #[error("this replica is fenced: {cause}")]
    Fenced {
        /// The first failure.
        cause: Arc<str>,
    },
}

/// Why leadership was not handed over.
#[derive(Debug, Clone, Error)]
pub enum TransferError {
    /// This node does not lead, so it has nothing to hand over.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader {
        /// The leader, as far as this node knows.
        leader: Option<NodeId>,
    },
    /// `to` is not another voter of the group.
    #[error("node {to} is not another voter of the group")]
    NotAVoter {
        /// The chosen node.
        to: NodeId,
    },
    /// The other node did not take over in time; leadership stays or is open.
    #[error("node {to} did not take over in time")]
    TimedOut {
        /// The chosen node.
        to: NodeId,
    },
    /// The group does not run here.
    #[error("the group is stopped on this node")]
    Stopped,
}

/// Why the members of a group were not changed. Every variant but `OutcomeUnknown` proves that nothing was appended.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum MembershipError {
    /// Only the leader changes members; ask `leader`, or here again once one is known.
    #[error("not the leader (leader: {leader:?})")]
    NotLeader {
        /// The leader, as far as this node knows.
        leader: Option<NodeId>,
    },
    /// An earlier change is still on its way. Retry once it is settled.
    #[error("another change of the group's members is on its way")]
    InProgress,
    /// The voters are not those that the caller expected: look again, and decide again.
    #[error("the group's voters are {voters:?} by now")]
    Changed {
        /// The voters as they are; in the middle of a change, those that it leads to.
        voters: BTreeSet<NodeId>,
    },
    /// A new voter must be a learner first.
    #[error("node {node} is no member of the group: add it as a learner first")]
    LearnerMissing {
        /// The node.
        node: NodeId,
    },
    /// A new voter must have caught up first: retry when it has.
    #[error("node {node} misses {missing} entries: it votes only once it has caught up")]
    Behind {
        /// The node.
        node: NodeId,
        /// How many entries it is not known to hold.
        missing: u64,
    },
    /// A voter is not removed as a learner: change the voters.
    #[error("node {node} is a voter of the group")]
    IsVoter {
        /// The node.
        node: NodeId,
    },
    /// A group has at least one voter.
    #[error("a group without voters could never do anything again")]
    NoVoters,
    /// The change may have been appended and may yet be committed, in part or whole: look at the members, and decide again.
    #[error("the change was not confirmed in time; it may still happen")]
    OutcomeUnknown,
    /// The group does not run here.
    #[error("the group is stopped on this node")]
    Stopped,
    /// This replica's storage failed.
    #[error("this replica is fenced: {cause}")]
    Fenced {
        /// The first failure.
        cause: Arc<str>,
    },
}

/// Why a log was not compacted.
#[derive(Debug, Clone, Error)]
pub enum CompactError {
    /// The snapshot was not finished in time; try later.
    #[error("the snapshot was not finished in time")]
    TimedOut,
    /// The group does not run here.
    #[error("the group is stopped on this node")]
    Stopped,
    /// This replica's storage failed.
    #[error("this replica is fenced: {cause}")]
    Fenced {
        /// The first failure.
        cause: Arc<str>,
    },
}
