//! Follows leadership: while this node leads, one stretch of appending after another; otherwise chunks find their way elsewhere.

use std::collections::VecDeque;
use std::time::Duration;

use ensign_proto::{DekId, NodeId, PartitionContext, RingId, Term};
use ensign_raft::env::Stop;
use ensign_raft::{Leadership, ProposeError};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tracing::{debug, warn};

use super::stretch::{End, Stretch};
use super::{Admission, BatcherParts, Job};
use crate::partition::append::AppendError;
use crate::partition::entry::Payload;
use crate::partition::keys::{KEY_DEADLINE, KeysError, NewDek};
use crate::partition::machine::{Applied, DekRow};

pub(super) struct Task {
    parts: BatcherParts,
    jobs: mpsc::UnboundedReceiver<Job>,
    /// Chunks to take again before new ones, in order.
    retry: VecDeque<Job>,
}

/// Why there is no key to seal with.
pub(super) enum NoKey {
    /// The vault, or the key itself.
    Key(KeysError),
    /// The new key could not be introduced to the partition.
    Introduction(ProposeError),
}

impl From<KeysError> for NoKey {
    fn from(error: KeysError) -> Self {
        Self::Key(error)
    }
}

impl Task {
    pub(super) fn new(parts: BatcherParts, jobs: mpsc::UnboundedReceiver<Job>) -> Self {
        Self { parts, jobs, retry: VecDeque::new() }
    }

    pub(super) async fn run(mut self, stop: Stop) {
        let mut leadership = self.parts.group.leadership();
        while !stop.is_cancelled() {
            let now = *leadership.borrow_and_update();
            if now.ready {
                match self.lead(now, &mut leadership, &stop).await {
                    End::Stopped => break,
                    End::Again => {}
                    End::Key(error) => self.key_failed(&error, &stop).await,
                }
                continue;
            }
            let elected = now.leader == Some(self.parts.me);
            if !elected {
                self.refuse_queued(now.leader);
            }
            tokio::select! {
                () = stop.cancelled() => break,
                changed = leadership.changed() => if changed.is_err() { break },
                // Just elected: what arrives now waits the moment until this node may append.
                job = self.jobs.recv(), if !elected => match job {
                    Some(job) => job.refuse(AppendError::NotLeader { leader: now.leader }),
                    None => break,
                },
            }
        }
        self.jobs.close();
        self.refuse_queued(None);
    }

    /// What waits, in order.
    fn queued(&mut self) -> Option<Job> {
        self.retry.pop_front().or_else(|| self.jobs.try_recv().ok())
    }

    /// Sends back what waits, so that it finds its way to whoever leads.
    fn refuse_queued(&mut self, leader: Option<NodeId>) {
        let deleted = *self.parts.admission.borrow() == Admission::Deleted;
        while let Some(job) = self.queued() {
            job.refuse(if deleted { AppendError::Deleted } else { AppendError::NotLeader { leader } });
        }
    }

    /// Without a lease nothing can be appended, under whichever ring; the senders know how long their events may wait.
    async fn key_failed(&mut self, error: &KeysError, stop: &Stop) {
        let refusal = no_key(&self.parts.context, error);
        // What is here already needs no key.
        while let Some(job) = self.queued() {
            if let Some(job) = self.parts.answer_held(job) {
                job.refuse(refusal.clone());
            }
        }
        // A vault that is away is not asked in a tight loop.
        let _ = tokio::time::timeout(Duration::from_millis(50), stop.cancelled()).await;
    }

    async fn lead(&mut self, now: Leadership, leadership: &mut watch::Receiver<Leadership>, stop: &Stop) -> End {
        // Keys are made when there is something to seal, not for every topic that nobody writes to.
        if self.retry.is_empty() {
            tokio::select! {
                () = stop.cancelled() => return End::Stopped,
                changed = leadership.changed() => return if changed.is_err() { End::Stopped } else { End::Again },
                job = self.jobs.recv() => match job {
                    Some(job) => self.retry.push_back(job),
                    None => return End::Stopped,
                },
            }
        }
        // On the heap, and only from the first event on: a partition that nobody writes to stays small.
        Box::pin(self.append(now, leadership, stop)).await
    }

    /// Seals and proposes what is queued and what comes, for as long as its keys and one leadership last.
    async fn append(&mut self, now: Leadership, leadership: &mut watch::Receiver<Leadership>, stop: &Stop) -> End {
        let mut stretch = Stretch::begin(&self.parts, now.term);
        let end = stretch.run(&mut self.jobs, &mut self.retry, leadership, stop).await;
        let (again, failure) = stretch.resolve().await;
        // What failed comes before what was never taken.
        for job in again.into_iter().rev() {
            self.retry.push_front(job);
        }
        let full = matches!(failure, Some(ProposeError::DiskFull));
        self.answer_failure(failure, leadership).await;
        if full {
            // Neither the disk nor the vault is asked in a tight loop.
            let _ = tokio::time::timeout(Duration::from_millis(100), stop.cancelled()).await;
        }
        end
    }

    /// Sends failed chunks back if another attempt here would be of no use.
    async fn answer_failure(&mut self, failure: Option<ProposeError>, leadership: &mut watch::Receiver<Leadership>) {
        let Some(failure) = failure else { return };
        debug!(topic = %self.parts.context.topic, error = %failure, "a proposal failed");
        let refusal = match failure {
            ProposeError::NotLeader { leader } => AppendError::NotLeader { leader },
            ProposeError::OutcomeUnknown => {
                // Still, or again, the ready leader: whatever became of it is applied by now or never will be, and the table of
                // producers knows. Otherwise its sender has to ask the next leader.
                if leadership.borrow().ready {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    return;
                }
                AppendError::OutcomeUnknown
            }
            ProposeError::DiskFull => AppendError::DiskFull,
            ProposeError::TooLarge { .. } => AppendError::TooLarge,
            ProposeError::Stopped | ProposeError::Fenced { .. } => AppendError::NotLeader { leader: None },
        };
        while let Some(job) = self.retry.pop_front() {
            if let Some(job) = self.parts.answer_held(job) {
                job.refuse(refusal.clone());
            }
        }
    }
}

impl BatcherParts {
    /// The key to seal with under a ring: the newest of the partition if this process can hold it and it is not worn out, else a new one.
    pub(super) async fn sealing_key(&self, term: Term, ring: RingId) -> Result<DekId, NoKey> {
        let newest = self.group.inspect(|machine| {
            let under = |row: &&DekRow| self.keys.ring_of(&row.wrapped) == Some(ring);
            machine.state().deks.iter().rev().find(under).cloned()
        });
        if let Some(row) = newest {
            let ensured = within_deadline(self.keys.ensure(self.context, row.wrapped)).await;
            match ensured {
                Ok(()) if !self.keys.should_roll_over(row.dek) => return Ok(row.dek),
                // Its version is revoked or disabled, or it is worn out.
                Ok(()) | Err(KeysError::Unusable(_) | KeysError::Disabled(_) | KeysError::NotHeld(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let new = within_deadline(self.keys.create_dek(self.context, ring)).await?;
        self.introduce(term, new).await
    }

    async fn introduce(&self, term: Term, new: NewDek) -> Result<DekId, NoKey> {
        let payload = Payload::dek_introduced(new.dek, &new.wrapped);
        match self.group.propose(Some(term), payload).await {
            Ok(committed) if committed.response == Applied::Introduced => Ok(new.dek),
            Ok(_) => Err(KeysError::Failed("the partition refused a new data key".to_owned()).into()),
            Err(error) => Err(NoKey::Introduction(error)),
        }
    }
}

/// What a chunk is told that there is no key for.
pub(super) fn no_key(context: &PartitionContext, error: &KeysError) -> AppendError {
    match error {
        KeysError::Unusable(detail) => AppendError::KeyUnusable { detail: detail.clone() },
        KeysError::Disabled(detail) => AppendError::KeyDisabled { detail: detail.clone() },
        KeysError::Unavailable(_) | KeysError::NotHeld(_) | KeysError::Damaged | KeysError::Failed(_) => {
            warn!(topic = %context.topic, %error, "no key to seal with");
            AppendError::Busy { detail: error.to_string() }
        }
    }
}

async fn within_deadline<T>(call: BoxFuture<'static, Result<T, KeysError>>) -> Result<T, KeysError> {
    let late = || Err(KeysError::Unavailable("the vault does not answer".to_owned()));
    tokio::time::timeout(KEY_DEADLINE, call).await.unwrap_or_else(|_| late())
}
