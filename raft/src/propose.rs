//! From a payload to its place in the log, or to a proof that it has none.

use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::{ByteCount, NodeId, Term};
use ensign_storage::Door;
use openraft::errors::{ClientWriteError, ForwardReason};
use openraft::impls::OneshotResponder;
use openraft::raft::ClientWriteResult;
use tokio::time::{Instant, sleep};

use crate::codec;
use crate::errors::ProposeError;
use crate::group::Committed;
use crate::replica::{ADMISSION_UNIT, Absent, Outcome, Replica, Response};
use crate::types::{Raft, Types, entry_id};

/// A proposal that openraft refused before it appended anything.
enum Refused {
    NotLeader(Option<NodeId>),
    /// This node leads, but has not heard from a majority for a lease: the next heartbeat may mend that.
    LeaseExpired,
}

impl Replica {
    /// Queues a proposal. Nothing is retried behind the caller's back: a retry could overtake a later submit.
    pub(crate) async fn submit(&self, expected: Option<Term>, payload: Bytes) -> Result<Outcome, ProposeError> {
        let outcome = self.queue(expected, payload).await?;
        let (node, raft) = (self.config.node, self.raft());
        Ok(Box::pin(async move {
            match outcome.await? {
                Ok(committed) => Ok(committed),
                Err(Refused::NotLeader(leader)) => Err(ProposeError::NotLeader { leader }),
                Err(Refused::LeaseExpired) => {
                    if let Some(raft) = raft {
                        let _ = raft.trigger().heartbeat().await;
                    }
                    Err(ProposeError::NotLeader { leader: Some(node) })
                }
            }
        }))
    }

    /// Proposes and waits. An expired lease is renewed and the proposal made again, for as long as an election may take.
    pub(crate) async fn propose(
        &self,
        expected: Option<Term>,
        payload: Bytes,
    ) -> Result<Committed<Response>, ProposeError> {
        let deadline = Instant::now() + self.config.timing.election_max;
        loop {
            let leader = match self.queue(expected, payload.clone()).await?.await? {
                Ok(committed) => return Ok(committed),
                Err(Refused::NotLeader(leader)) => return Err(ProposeError::NotLeader { leader }),
                Err(Refused::LeaseExpired) => Some(self.config.node),
            };
            if Instant::now() >= deadline {
                return Err(ProposeError::NotLeader { leader });
            }
            if let Some(raft) = self.raft() {
                let _ = raft.trigger().heartbeat().await;
            }
            sleep(self.config.timing.heartbeat / 8).await;
        }
    }

    async fn queue(
        &self,
        expected: Option<Term>,
        payload: Bytes,
    ) -> Result<impl Future<Output = Result<Result<Committed<Response>, Refused>, ProposeError>> + use<>, ProposeError>
    {
        let limit = self.config.limits.proposal;
        let size = ByteCount(payload.len() as u64);
        if size > limit {
            return Err(ProposeError::TooLarge { size, limit });
        }
        self.check_proposable(expected, size)?;
        self.rouse().await;
        let units = (size.0 / ADMISSION_UNIT + 1).min(self.config.limits.pending.0 / ADMISSION_UNIT).max(1);
        let admitted = Arc::clone(&self.admission)
            .acquire_many_owned(units as u32)
            .await
            .map_err(|_closed| ProposeError::Stopped)?;
        // Admission may have waited for long.
        let raft = self.check_proposable(expected, size)?;
        let (responder, outcome) = OneshotResponder::<Types, ClientWriteResult<Types>>::new_pair();
        let mut write = raft.write(codec::proposal(payload)).responder(responder);
        if let Some(term) = expected {
            write = write.with_leader(term.0);
        }
        // An error here means that the core's queue is gone, and the proposal with it.
        write.await.map_err(|_fatal| self.absent())?;
        Ok(async move {
            let outcome = outcome.await;
            drop(admitted);
            resolve(outcome.ok())
        })
    }

    fn check_proposable(&self, expected: Option<Term>, size: ByteCount) -> Result<Raft, ProposeError> {
        let raft = self.core().map_err(propose_error)?;
        if self.is_full() || !self.log.has_room(size, Door::Proposal) {
            return Err(ProposeError::DiskFull);
        }
        let leadership = *self.leadership().borrow();
        if !leadership.leads(self.config.node) || expected.is_some_and(|term| term != leadership.term) {
            return Err(ProposeError::NotLeader { leader: leadership.leader });
        }
        Ok(raft)
    }

    fn absent(&self) -> ProposeError {
        propose_error(self.core().err().unwrap_or(Absent::Recovering))
    }
}

fn propose_error(absent: Absent) -> ProposeError {
    match absent {
        Absent::Fenced(cause) => ProposeError::Fenced { cause },
        Absent::Stopped => ProposeError::Stopped,
        Absent::Recovering => ProposeError::NotLeader { leader: None },
    }
}

/// What an answer proves. openraft says `ForwardToLeader` only before it appends; a discarded entry may still sit in the
/// log of a node that leads later and commits it; no answer at all says nothing.
fn resolve(outcome: Option<ClientWriteResult<Types>>) -> Result<Result<Committed<Response>, Refused>, ProposeError> {
    match outcome {
        Some(Ok(written)) => {
            let id = entry_id(&written.log_id);
            let response = written.data.into_response().ok_or(ProposeError::OutcomeUnknown)?;
            Ok(Ok(Committed::new(id, response)))
        }
        Some(Err(ClientWriteError::ForwardToLeader(forward))) => Ok(Err(match forward.reason {
            ForwardReason::LeaseExpired => Refused::LeaseExpired,
            ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
                Refused::NotLeader(forward.leader_id.map(NodeId))
            }
        })),
        Some(Err(
            ClientWriteError::LogEntryDiscarded(_)
            | ClientWriteError::ChangeMembershipError(_)
            | ClientWriteError::PreconditionFailed(_),
        ))
        | None => Err(ProposeError::OutcomeUnknown),
    }
}
