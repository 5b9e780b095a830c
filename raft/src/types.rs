//! openraft's type parameters, as this crate fills them in, and the way between its ids and ours.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use ensign_proto::{LogIndex, Term};
use ensign_storage::EntryId;
use openraft_rt::deterministic_rng::DeterministicRng;

use crate::replica::Response;

// Randomness (election jitter) comes from a seed that our `Rng` gives to each group, in production as in a simulation.
#[allow(deprecated, reason = "the re-export saves a direct dependency on the runtime crate")]
pub(crate) type AsyncRuntime = DeterministicRng<openraft::impls::TokioRuntime>;

/// Standard Raft: one leader a term, log ids of term and index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Types;

impl openraft::RaftTypeConfig for Types {
    type D = Payload;
    type R = Reply;
    type NodeId = u64;
    type Node = ();
    type Term = u64;
    type LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Payload, u64, ()>;
    type Entry = openraft::impls::Entry<
        <Self::LeaderId as openraft::vote::RaftLeaderId>::Committed,
        openraft::EntryPayload<Payload, u64, ()>,
    >;
    type AsyncRuntime = AsyncRuntime;
    type Responder<T>
        = openraft::impls::OneshotResponder<Self, T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

pub(crate) type LogId = openraft::type_config::alias::LogIdOf<Types>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<Types>;
pub(crate) type LeaderId = openraft::type_config::alias::LeaderIdOf<Types>;
pub(crate) type Membership = openraft::Membership<u64, ()>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<Types>;
pub(crate) type RaftEntry = openraft::type_config::alias::EntryOf<Types>;
pub(crate) type RaftPayload = openraft::type_config::alias::PayloadOf<Types>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<Types>;
pub(crate) type Snapshot = openraft::type_config::alias::SnapshotOf<Types, Bytes>;
pub(crate) type AppendRequest = openraft::raft::AppendEntriesRequest<Types>;
pub(crate) type Raft = openraft::Raft<Types, crate::apply::Applier>;

/// A proposal as it is stored: the proposer's bytes, then the tag of [`crate::codec`]. Shares the buffer all the way.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Payload(pub(crate) Bytes);

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a machine answered. The lock only makes it `Sync`, which openraft asks for; nobody contends for it.
pub(crate) struct Reply(Mutex<Option<Response>>);

impl Reply {
    pub(crate) fn of(response: Response) -> Self {
        Self(Mutex::new(Some(response)))
    }

    pub(crate) fn none() -> Self {
        Self(Mutex::new(None))
    }

    pub(crate) fn into_response(self) -> Option<Response> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

pub(crate) fn log_id(id: EntryId) -> LogId {
    LogId::new_term_index(id.term.0, id.index.0)
}

pub(crate) fn entry_id(id: &LogId) -> EntryId {
    EntryId { term: Term(id.leader_id.term), index: LogIndex(id.index) }
}
