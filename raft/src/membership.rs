//! Who belongs to a group, and how that changes.
//!
//! ```text
//! stranger ── add_learner ──> learner ── change_voters ──> voter ── change_voters ──> gone
//!                                │ remove_learner               (joint: a majority of both)
//!                                └──────────────> gone
//! ```
//!
//! Promised: one change at a time, each based on the membership that the caller saw; a vote only for who has caught up; no hang.
//! A change that is cut short leaves both sets of voters in force, which is safe and slow, until the next change.
//! Not here: which nodes should be members, and which of them are alive.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::NodeId;
use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, PreconditionFailed, RaftError};
use openraft::raft::Precondition;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::info;

use crate::apply::index_or_zero;
use crate::errors::{MembershipError, ReadError};
#[cfg(doc)]
use crate::group::Group;
use crate::group::{GroupStatus, Leadership};
use crate::read::read_error;
use crate::replica::{Absent, Replica, matched};
use crate::types::{LogId, Raft, StoredMembership, Types};

/// How far behind the head of the log a new voter may be: a few round trips of a busy group.
const BEHIND_MAX: u64 = 64;
/// How long a change may take to commit. The members that it needs hold all but the newest entries, so it takes a few syncs.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who belongs to a group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Members {
    /// Who votes; in the middle of a change, who shall.
    pub voters: BTreeSet<NodeId>,
    /// In the middle of a change, the voters that it began with: a majority of them is needed as well. Empty otherwise.
    pub outgoing: BTreeSet<NodeId>,
    /// Who receives the log without a vote.
    pub learners: BTreeSet<NodeId>,
}

impl Members {
    pub(crate) fn of(stored: &StoredMembership) -> Self {
        let membership = stored.membership();
        let nodes = |ids: &BTreeSet<u64>| ids.iter().copied().map(NodeId).collect::<BTreeSet<_>>();
        let mut sets = membership.get_joint_config().iter().map(nodes);
        let voters = sets.next_back().unwrap_or_default();
        let outgoing = sets.flatten().collect();
        let learners = membership.learner_ids().map(NodeId).collect();
        Self { voters, outgoing, learners }
    }

    /// Whether `node` votes, for the old or the new half of a change.
    pub fn votes(&self, node: NodeId) -> bool {
        self.voters.contains(&node) || self.outgoing.contains(&node)
    }

    /// Whether `node` is a voter or a learner.
    pub fn contains(&self, node: NodeId) -> bool {
        self.votes(node) || self.learners.contains(&node)
    }

    /// Whether a change of voters is not through yet.
    pub fn is_joint(&self) -> bool {
        !self.outgoing.is_empty()
    }
}

/// The members of one group, whatever its machine: to look at, and on the leader to change. Clones are cheap.
#[derive(Clone)]
pub struct GroupMembers(Arc<Replica>);

impl fmt::Debug for GroupMembers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GroupMembers").field("id", &self.0.id).finish_non_exhaustive()
    }
}

impl GroupMembers {
    pub(crate) fn new(replica: Arc<Replica>) -> Self {
        Self(replica)
    }

    /// Who leads; changes whenever this node learns better.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.0.leadership()
    }

    /// How this replica is doing.
    pub fn status(&self) -> GroupStatus {
        self.0.status()
    }

    /// Who belongs to the group, by the newest membership in this replica's log; it may not be committed yet.
    /// Nobody, on a replica that waits to be added.
    pub fn now(&self) -> Members {
        self.0.membership()
    }

    /// See [`Group::add_learner`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_learner(&self, node: NodeId) -> Result<(), MembershipError> {
        self.0.add_learner(node).await
    }

    /// See [`Group::remove_learner`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove_learner(&self, node: NodeId) -> Result<(), MembershipError> {
        self.0.remove_learner(node).await
    }

    /// See [`Group::change_voters`].
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn change_voters(
        &self,
        expected: &BTreeSet<NodeId>,
        voters: BTreeSet<NodeId>,
    ) -> Result<(), MembershipError> {
        self.0.change_voters(expected, voters).await
    }
}

/// The membership that a change is based on.
struct Base {
    members: Members,
    at: Option<LogId>,
    last: u64,
}

impl Base {
    fn of(raft: &Raft) -> Self {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let stored = &metrics.membership_config;
        Self { members: Members::of(stored), at: *stored.log_id(), last: metrics.last_log_index.unwrap_or(0) }
    }
}

impl Replica {
    pub(crate) async fn add_learner(&self, node: NodeId) -> Result<(), MembershipError> {
        let (raft, _alone) = self.begin()?;
        let base = Base::of(&raft);
        if base.members.contains(node) {
            return Ok(());
        }
        self.change(&raft, ChangeMembers::AddNodes([(node.0, ())].into()), &base).await?;
        info!(group = %self.id, %node, "a learner was added");
        Ok(())
    }

    pub(crate) async fn remove_learner(&self, node: NodeId) -> Result<(), MembershipError> {
        let (raft, _alone) = self.begin()?;
        let base = Base::of(&raft);
        if base.members.votes(node) {
            return Err(MembershipError::IsVoter { node });
        }
        if !base.members.contains(node) {
            return Ok(());
        }
        self.change(&raft, ChangeMembers::RemoveNodes([node.0].into()), &base).await?;
        info!(group = %self.id, %node, "a learner was removed");
        Ok(())
    }

    pub(crate) async fn change_voters(
        &self,
        expected: &BTreeSet<NodeId>,
        voters: BTreeSet<NodeId>,
    ) -> Result<(), MembershipError> {
        let (raft, _alone) = self.begin()?;
        if voters.is_empty() {
            return Err(MembershipError::NoVoters);
        }
        let base = Base::of(&raft);
        let members = &base.members;
        if members.voters != *expected {
            return Err(MembershipError::Changed { voters: members.voters.clone() });
        }
        if members.voters == voters && !members.is_joint() {
            return Ok(());
        }
        check_caught_up(&raft, &base, &voters)?;
        if !voters.contains(&self.config.node) {
            self.leave_the_lead(members, &voters).await?;
        }
        let next = voters.iter().map(|voter| voter.0).collect();
        self.change(&raft, ChangeMembers::ReplaceAllVoters(next), &base).await?;
        info!(group = %self.id, from = ?expected, to = ?voters, "the voters were changed");
        Ok(())
    }

    pub(crate) async fn confirmed_members(&self) -> Result<Members, ReadError> {
        let raft = self.core().map_err(read_error)?;
        let seen = Base::of(&raft);
        let written = index_or_zero(seen.at.as_ref());
        let mut applied = self.applied();
        let waited = timeout(PATIENCE, applied.wait_for(|applied| *applied >= written)).await;
        // The replica that is borrowed here holds the other end.
        drop(waited.map_err(|_elapsed| ReadError::NoQuorum)?);
        // Whoever was deposed and has not heard of it has applied all that it knows, and so has nothing to wait for: only its voters
        // can tell it.
        self.read_index().await?;
        let now = Base::of(&raft);
        if now.at == seen.at && self.leads() {
            Ok(now.members)
        } else {
            Err(ReadError::NotLeader { leader: self.leader() })
        }
    }

    /// The core, if this node leads, and the right to change its members.
    fn begin(&self) -> Result<(Raft, tokio::sync::MutexGuard<'_, ()>), MembershipError> {
        let raft = self.core().map_err(membership_error)?;
        if !self.leads() {
            return Err(MembershipError::NotLeader { leader: self.leader() });
        }
        let alone = self.changing.try_lock().map_err(|_held| MembershipError::InProgress)?;
        // Members learn of each other from a group that is awake.
        self.stir();
        Ok((raft, alone))
    }

    /// Hands leadership to a voter that stays, so that the change is made by who will lead after it. When none stays, the
    /// change is made from here, and leadership goes to a new voter once it is through.
    async fn leave_the_lead(&self, members: &Members, voters: &BTreeSet<NodeId>) -> Result<(), MembershipError> {
        let stays = |voter| voters.contains(&voter) && members.voters.contains(&voter);
        let Some(to) = self.successor(stays) else { return Ok(()) };
        match self.transfer_leader(to).await {
            Ok(()) => Err(MembershipError::NotLeader { leader: Some(to) }),
            Err(error) => {
                info!(group = %self.id, %to, %error, "a leader that is to leave could not hand over; ask again");
                Err(MembershipError::NotLeader { leader: self.leader() })
            }
        }
    }

    async fn change(&self, raft: &Raft, change: ChangeMembers<u64, ()>, base: &Base) -> Result<(), MembershipError> {
        // A leader that was removed leads on for a moment, until it has handed over. The next change is not its own to make.
        if !base.members.contains(self.config.node) {
            return Err(MembershipError::NotLeader { leader: None });
        }
        self.rouse().await;
        let unchanged = Precondition::<Types>::LastMembershipLogId { last_membership_log_id: base.at };
        let changing = raft.change_membership_if(change, false, [unchanged]);
        match timeout(PATIENCE.max(self.config.timing.election_max * 2), changing).await {
            Err(_elapsed) => Err(MembershipError::OutcomeUnknown),
            Ok(Ok(_)) => {
                // Whoever heard that it is done must find it done, and the task that follows the core may be a moment behind.
                self.note_members(&raft.metrics().borrow_watched().membership_config);
                Ok(())
            }
            Ok(Err(RaftError::Fatal(_))) => Err(MembershipError::OutcomeUnknown),
            Ok(Err(RaftError::APIError(error))) => Err(refused(raft, base, error)),
        }
    }
}

/// Whether every new voter may have a vote.
fn check_caught_up(raft: &Raft, base: &Base, voters: &BTreeSet<NodeId>) -> Result<(), MembershipError> {
    let matched = matched(raft);
    for node in voters.iter().copied().filter(|node| !base.members.votes(*node)) {
        if !base.members.learners.contains(&node) {
            return Err(MembershipError::LearnerMissing { node });
        }
        let holds = matched.get(&node).map_or(0, |index| index.0);
        let missing = base.last.saturating_sub(holds);
        if missing > BEHIND_MAX {
            return Err(MembershipError::Behind { node, missing });
        }
    }
    Ok(())
}

/// What a refusal proves. That of the second step comes after the first one was committed: then the members have changed,
/// and nothing else can tell.
fn refused(raft: &Raft, base: &Base, error: ClientWriteError<Types>) -> MembershipError {
    let now = Base::of(raft);
    if now.at != base.at && now.members.is_joint() {
        return MembershipError::OutcomeUnknown;
    }
    match error {
        ClientWriteError::ForwardToLeader(forward) => {
            MembershipError::NotLeader { leader: forward.leader_id.map(NodeId) }
        }
        ClientWriteError::PreconditionFailed(
            PreconditionFailed::LastMembershipLogIdMismatch { .. }
            | PreconditionFailed::LastLogIdMismatch { .. }
            | PreconditionFailed::CommittedLeaderIdMismatch { .. },
        ) => MembershipError::Changed { voters: now.members.voters },
        ClientWriteError::ChangeMembershipError(error) => match error {
            ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_) => {
                MembershipError::InProgress
            }
            ChangeMembershipError::EmptyMembership(_) => MembershipError::NoVoters,
            ChangeMembershipError::LearnerNotFound(missing) => {
                MembershipError::LearnerMissing { node: NodeId(missing.node_id) }
            }
            ChangeMembershipError::UnsupportedMembershipTransition(_)
            | ChangeMembershipError::NodeMetadataChanged(_) => MembershipError::Changed { voters: now.members.voters },
        },
        ClientWriteError::LogEntryDiscarded(_) => MembershipError::OutcomeUnknown,
    }
}

fn membership_error(absent: Absent) -> MembershipError {
    match absent {
        Absent::Fenced(cause) => MembershipError::Fenced { cause },
        Absent::Stopped => MembershipError::Stopped,
        Absent::Recovering => MembershipError::NotLeader { leader: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Membership;

    fn nodes(ids: &[u64]) -> BTreeSet<NodeId> {
        ids.iter().copied().map(NodeId).collect()
    }

    #[test]
    fn a_joint_membership_tells_who_comes_and_who_goes() {
        let all: BTreeSet<u64> = [1, 2, 3, 4, 5].into();
        let joint = Membership::new_with_defaults(vec![[1, 2, 3].into(), [2, 3, 4].into()], all);
        let members = Members::of(&StoredMembership::new(None, joint));
        assert_eq!(members, Members { voters: nodes(&[2, 3, 4]), outgoing: nodes(&[1, 2, 3]), learners: nodes(&[5]) });
        assert!(members.is_joint() && members.votes(NodeId(1)) && members.votes(NodeId(4)));
        assert!(!members.votes(NodeId(5)) && members.contains(NodeId(5)) && !members.contains(NodeId(6)));
    }

    #[test]
    fn a_replica_that_waits_to_be_added_has_no_members() {
        assert_eq!(Members::of(&StoredMembership::default()), Members::default());
    }
}
