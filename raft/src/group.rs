//! A handle to one group: propose, read, watch.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, NodeId, Term};
use ensign_storage::EntryId;
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::errors::{CompactError, MembershipError, ProposeError, ReadError, TransferError};
use crate::machine::{CommittedEntry, StateMachine};
use crate::membership::{GroupMembers, Members};
use crate::replica::Replica;

/// Who leads, as far as this node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leadership {
    /// The term that this node is in.
    pub term: Term,
    /// Its leader, once known.
    pub leader: Option<NodeId>,
    /// This node leads, and has applied an entry of its own term: its applied state is the head of the log.
    pub ready: bool,
}

impl Leadership {
    /// Whether `node` leads.
    pub fn leads(&self, node: NodeId) -> bool {
        self.leader == Some(node)
    }
}

/// How a replica is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It takes part.
    Running,
    /// It failed and is being re-created from storage.
    Recovering,
    /// The log's disk is full: appends wait for room, proposals are refused.
    DiskFull,
    /// Its storage, or its state machine, failed for good.
    Fenced {
        /// The first failure.
        cause: Arc<str>,
    },
    /// It was stopped; its data stays.
    Stopped,
}

/// A replica in numbers; zero stands for "none yet".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// Which group.
    pub id: GroupId,
    /// How it is doing.
    pub health: Health,
    /// Who leads.
    pub leadership: Leadership,
    /// The last entry of the log.
    pub last: LogIndex,
    /// The last entry known to be committed.
    pub committed: LogIndex,
    /// The last entry applied.
    pub applied: LogIndex,
    /// The last entry that the snapshot covers.
    pub snapshot: LogIndex,
    /// The last entry that was purged.
    pub purged: LogIndex,
    /// The members that count.
    pub voters: BTreeSet<NodeId>,
    /// On the leader: how far each member's log is known to agree.
    pub matched: BTreeMap<NodeId, LogIndex>,
    /// How often this replica was re-created after a failure.
    pub restarts: u64,
    /// It sleeps: nothing was asked of its group for a while, and its core does not tick.
    pub asleep: bool,
}

/// A proof that a majority of the voters holds the entry on disk and that this node has applied it. Only this crate can make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Committed<R> {
    /// The entry's place.
    pub id: EntryId,
    /// What the state machine answered.
    pub response: R,
    proof: Proof,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Proof;

impl<R> Committed<R> {
    pub(crate) fn new(id: EntryId, response: R) -> Self {
        Self { id, response, proof: Proof }
    }

    /// The same proof, with the response turned into something else.
    pub fn map<T>(self, f: impl FnOnce(R) -> T) -> Committed<T> {
        Committed { id: self.id, response: f(self.response), proof: self.proof }
    }
}

/// The outcome of a queued proposal. Dropping it gives up the answer, not the entry.
#[must_use = "a proposal's outcome decides whether it may be acknowledged"]
pub struct Pending<R> {
    outcome: BoxFuture<'static, Result<Committed<crate::replica::Response>, ProposeError>>,
    response: PhantomData<fn() -> R>,
}

impl<R> fmt::Debug for Pending<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pending")
    }
}

impl<R: Send + 'static> Future for Pending<R> {
    type Output = Result<Committed<R>, ProposeError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.outcome.as_mut().poll(cx).map(|outcome| outcome.map(|committed| committed.map(downcast)))
    }
}

fn downcast<R: 'static>(response: crate::replica::Response) -> R {
    // A replica is built around one machine, so it cannot answer with another one's type.
    *response.downcast::<R>().expect("a group's machine answers with its own response type")
}

/// One group on this node. Clones are cheap and share it.
pub struct Group<S: StateMachine> {
    replica: Arc<Replica>,
    machine: Arc<Mutex<S>>,
}

impl<S: StateMachine> Clone for Group<S> {
    fn clone(&self) -> Self {
        Self { replica: Arc::clone(&self.replica), machine: Arc::clone(&self.machine) }
    }
}

impl<S: StateMachine> fmt::Debug for Group<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl<S: StateMachine> Group<S> {
    pub(crate) fn new(replica: Arc<Replica>, machine: Arc<Mutex<S>>) -> Self {
        Self { replica, machine }
    }

    /// The group's number.
    pub fn id(&self) -> GroupId {
        self.replica.id
    }

    /// Who leads; changes whenever this node learns better.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.replica.leadership()
    }

    /// The last applied entry, zero before the first.
    pub fn applied(&self) -> watch::Receiver<LogIndex> {
        self.replica.applied()
    }

    /// Queues a proposal and returns once its place among this node's proposals is fixed: the order of submits is the
    /// order in the log. Waits while the queue is full.
    ///
    /// With `expected`, the entry is appended only while this node leads that term, so what was prepared under one
    /// leadership never lands under another. Dropping the future before it returns may or may not have queued the entry.
    ///
    /// # Errors
    /// See [`ProposeError`]; every variant but `OutcomeUnknown` proves that nothing was appended.
    pub async fn submit(&self, expected: Option<Term>, payload: Bytes) -> Result<Pending<S::Response>, ProposeError> {
        let outcome = self.replica.submit(expected, payload).await?;
        Ok(Pending { outcome, response: PhantomData })
    }

    /// Proposes and waits until the entry is committed and applied here. When the leader's lease has run out, it is renewed
    /// first, for at most an election's time; [`Group::submit`] answers `NotLeader` with this node as the leader instead.
    ///
    /// # Errors
    /// See [`ProposeError`]; every variant but `OutcomeUnknown` proves that nothing was appended.
    pub async fn propose(
        &self,
        expected: Option<Term>,
        payload: Bytes,
    ) -> Result<Committed<S::Response>, ProposeError> {
        Ok(self.replica.propose(expected, payload).await?.map(downcast))
    }

    /// On the leader: asks a majority in a round that begins after this call, waits until everything committed by then is
    /// applied here, and returns that index. What [`Group::inspect`] shows afterwards is linearizable. Never rests on a lease.
    ///
    /// # Errors
    /// [`ReadError::NotLeader`]: ask the leader. [`ReadError::NoQuorum`]: retry.
    pub async fn read_index(&self) -> Result<LogIndex, ReadError> {
        self.replica.read_index().await
    }

    /// Looks at the applied state. Keep it short: applying waits meanwhile.
    pub fn inspect<T>(&self, f: impl FnOnce(&S) -> T) -> T {
        f(&self.machine.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Applied entries of `range`, in order, without Raft's own ones, from memory or disk.
    ///
    /// Ends early at the applied index or once `limit` bytes of payload are reached, yet returns one entry if there is any.
    /// An empty answer means that `range` holds nothing for a state machine, or nothing yet.
    ///
    /// # Errors
    /// [`ReadError::Purged`]: restart at its `first`. [`ReadError::Fenced`]: ask another replica.
    pub async fn read_log(&self, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<CommittedEntry>, ReadError> {
        self.replica.read_log(range, limit).await
    }

    /// Hands leadership to `to`; returns once this node sees it lead.
    ///
    /// # Errors
    /// See [`TransferError`]; a failed transfer leaves the group able to elect.
    pub async fn transfer_leader(&self, to: NodeId) -> Result<(), TransferError> {
        self.replica.transfer_leader(to).await
    }

    /// Who belongs to the group, by the newest membership in this replica's log; it may not be committed yet.
    /// Nobody, on a replica that waits to be added, and for a moment on one that has just started.
    pub fn members(&self) -> Members {
        self.replica.membership()
    }

    /// On the leader: who belongs to the group, once that is committed and a majority of those who vote by it has confirmed that nobody
    /// else leads. What [`Group::members`] shows may have been overtaken on a leader that was deposed and does not know; what others
    /// give up for good, they may give up by this alone.
    ///
    /// # Errors
    /// [`ReadError::NotLeader`]: ask the leader, or again: the members have just changed. [`ReadError::NoQuorum`]: retry.
    pub async fn confirmed_members(&self) -> Result<Members, ReadError> {
        self.replica.confirmed_members().await
    }

    /// The group's members alone, for who cares for many kinds of groups.
    pub fn membership(&self) -> GroupMembers {
        GroupMembers::new(Arc::clone(&self.replica))
    }

    /// On the leader: lets `node` receive the log without a vote, and returns once that is committed, not once it has caught
    /// up: [`GroupStatus::matched`] tells how far it is. The node runs the group as [`Mode::Member`](crate::Mode), or will.
    /// Does nothing for a member. Dropping the future may or may not have done it.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_learner(&self, node: NodeId) -> Result<(), MembershipError> {
        self.replica.add_learner(node).await
    }

    /// On the leader: sends `node`, which does not vote, nothing more. Does nothing for who is no member.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove_learner(&self, node: NodeId) -> Result<(), MembershipError> {
        self.replica.remove_learner(node).await
    }

    /// On the leader: makes `voters` the voters in place of `expected`, by joint consensus (Raft §6): from the first entry on,
    /// what commits needs a majority of both. Returns once the new voters are alone. Who no longer votes is removed, and not
    /// kept as a learner. New voters must be learners that have caught up.
    ///
    /// A leader that is not among `voters` hands leadership to one that is, and answers `NotLeader`: repeat it there.
    /// A change that was cut short, by a crash or a dropped future, leaves [`Members::outgoing`] voting too. To end it, change
    /// the voters again: with `expected` and `voters` both [`Members::voters`], it is just completed.
    ///
    /// Which members are alive is not looked at: whoever drives changes must not leave a majority of dead voters.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn change_voters(
        &self,
        expected: &BTreeSet<NodeId>,
        voters: BTreeSet<NodeId>,
    ) -> Result<(), MembershipError> {
        self.replica.change_voters(expected, voters).await
    }

    /// Takes a snapshot of the applied state, stores it, and drops the log behind it but for `keep_entries`.
    /// Returns the last entry that the snapshot covers.
    ///
    /// # Errors
    /// See [`CompactError`].
    pub async fn compact(&self, keep_entries: u64) -> Result<LogIndex, CompactError> {
        self.replica.compact(keep_entries).await
    }

    /// How this replica is doing.
    pub fn status(&self) -> GroupStatus {
        self.replica.status()
    }
}
