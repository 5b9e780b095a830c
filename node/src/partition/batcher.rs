//! The leader's side of appending: one task per partition that turns chunks into sealed batches and proposes them in order.
//!
//! Events gather while earlier proposals are in flight; an idle partition proposes at once. The task predicts the head of the
//! partition (offset, link, ids, producers) across what is in flight and seals for exactly that place, so at most one batch can
//! take it. A batch is sealed under one ring: what is under another goes into a batch of its own. On anything but success it stops sealing, lets everything in flight resolve, takes the applied head again and seals
//! anew. So a batch that was refused is never overtaken by its successor.

mod crowd;
mod lanes;
mod stretch;
mod task;

use std::sync::Arc;

use ensign_proto::{ByteCount, NodeId, PartitionContext, RingId};
use ensign_raft::Group;
use ensign_raft::env::{Clock, Stop};
use futures::future::BoxFuture;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

#[cfg(test)]
pub(super) use self::crowd::CROWDED;
pub(super) use self::crowd::Crowd;
use self::task::Task;
use super::append::{AppendError, Appended, AppendedRun, Chunk, Outcome};
use super::keys::Keys;
use super::machine::PartitionMachine;
use super::room::Share;

/// Bounds of the batcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// A batch is cut when it reaches this size.
    pub target: ByteCount,
    /// Proposals in flight.
    pub in_flight: usize,
    /// Bytes of chunks that wait or are in flight; more wait at their sender.
    pub queue: ByteCount,
}

impl Default for BatchLimits {
    fn default() -> Self {
        Self { target: ByteCount(256 << 10), in_flight: 8, queue: ByteCount(16 << 20) }
    }
}

/// Whether a topic takes events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Yes.
    Open,
    /// No: archived.
    Archived,
    /// No: being destroyed, or gone.
    Deleted,
}

/// A chunk in the queue, with the right to be there.
struct Job {
    chunk: Chunk,
    /// Runs of the chunk's first events, which were here already and have been cut off.
    held: Vec<AppendedRun>,
    /// An attempt of it may have been appended, or may yet be.
    doubtful: bool,
    /// It made a batch too large together with others; it gets one of its own.
    alone: bool,
    reply: oneshot::Sender<Outcome>,
    _room: OwnedSemaphorePermit,
    _shared: Option<Share>,
}

impl Job {
    /// Every refusal but an unknown outcome says that nothing was appended, which a doubtful chunk cannot be told.
    fn refuse(self, error: AppendError) {
        let error = if self.doubtful { AppendError::OutcomeUnknown } else { error };
        // Whoever asked may have gone; there is nobody else to tell.
        let _ = self.reply.send(Err(error));
    }

    fn acknowledge(mut self, fresh: Option<AppendedRun>) {
        self.held.extend(fresh);
        let _ = self.reply.send(Ok(Appended { runs: self.held }));
    }
}

/// The queue of one partition's batcher. Clones share it.
#[derive(Debug, Clone)]
pub struct Batcher {
    jobs: mpsc::UnboundedSender<Job>,
    room: Arc<Semaphore>,
    limit: u32,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("producer", &self.chunk.producer).finish_non_exhaustive()
    }
}

/// Room for one chunk.
#[derive(Debug)]
pub struct Slot {
    jobs: mpsc::UnboundedSender<Job>,
    room: OwnedSemaphorePermit,
    shared: Option<Share>,
}

impl Batcher {
    /// A queue, and the task's end of it. The queue is bounded by the bytes of what is in it.
    fn queue(limits: &BatchLimits) -> (Self, mpsc::UnboundedReceiver<Job>) {
        let (jobs, receiver) = mpsc::unbounded_channel();
        let limit = (limits.queue.0 >> 10) as u32;
        (Self { jobs, room: Arc::new(Semaphore::new(limit as usize)), limit }, receiver)
    }

    /// Waits for room for a chunk of `size` bytes. Cancel safe.
    ///
    /// # Errors
    /// [`AppendError::NotLeader`]: the partition is stopped on this node.
    pub async fn reserve(&self, size: ByteCount) -> Result<Slot, AppendError> {
        // One permit per KiB; a chunk larger than the queue takes all of it.
        let permits = ((size.0 >> 10) as u32 + 1).min(self.limit);
        let room = Arc::clone(&self.room).acquire_many_owned(permits).await;
        let room = room.map_err(|_| AppendError::NotLeader { leader: None })?;
        Ok(Slot { jobs: self.jobs.clone(), room, shared: None })
    }
}

impl Slot {
    /// Also keeps a share of what all partitions of the node have, for as long as the chunk is in memory.
    #[must_use]
    pub(super) fn with_share(mut self, share: Share) -> Self {
        self.shared = Some(share);
        self
    }

    /// Queues the chunk. Chunks of one sender are taken in the order of these calls. A closed channel means that the task ended
    /// without an answer: the outcome is unknown.
    pub fn send(self, chunk: Chunk) -> oneshot::Receiver<Outcome> {
        let (reply, outcome) = oneshot::channel();
        let job = Job {
            chunk,
            held: Vec::new(),
            doubtful: false,
            alone: false,
            reply,
            _room: self.room,
            _shared: self.shared,
        };
        if let Err(mpsc::error::SendError(job)) = self.jobs.send(job) {
            job.refuse(AppendError::NotLeader { leader: None });
        }
        outcome
    }
}

/// What a batcher works with.
pub struct BatcherParts {
    /// This node.
    pub me: NodeId,
    /// Where the partition is.
    pub context: PartitionContext,
    /// The partition.
    pub group: Group<PartitionMachine>,
    /// The ring that the topic is bound to: seals what its publishers have no ring of their own for.
    pub ring: watch::Receiver<RingId>,
    /// The keys.
    pub keys: Arc<dyn Keys>,
    /// For commit times and ids.
    pub clock: Arc<dyn Clock>,
    /// Whether the topic takes events.
    pub admission: watch::Receiver<Admission>,
    /// Bounds.
    pub limits: BatchLimits,
    /// What the node's other partitions have in flight.
    pub(super) crowd: Crowd,
}

impl BatcherParts {
    /// The queue and the task that serves it until it is stopped.
    pub fn start(self) -> (Batcher, impl FnOnce(Stop) -> BoxFuture<'static, ()>) {
        let (batcher, jobs) = Batcher::queue(&self.limits);
        let task = Task::new(self, jobs);
        (batcher, move |stop| Box::pin(task.run(stop)))
    }
}

#[cfg(test)]
impl Batcher {
    /// A batcher whose chunks the test takes, and answers as it likes; what it drops has no answer.
    pub(super) fn tapped() -> (Self, mpsc::UnboundedReceiver<Tapped>) {
        let (batcher, mut jobs) = Self::queue(&BatchLimits::default());
        let (sender, tapped) = mpsc::unbounded_channel();
        #[expect(clippy::disallowed_methods, reason = "ends with the batcher")]
        tokio::spawn(async move {
            while let Some(job) = jobs.recv().await {
                let Job { chunk, reply, _room, .. } = job;
                if sender.send(Tapped { chunk, reply }).is_err() {
                    return;
                }
            }
        });
        (batcher, tapped)
    }
}

/// A chunk on its way to a leader, in the hands of a test.
#[cfg(test)]
pub(super) struct Tapped {
    pub(super) chunk: Chunk,
    pub(super) reply: oneshot::Sender<Outcome>,
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use ensign_proto::SessionId;

    use super::*;
    use crate::partition::producers::Sequenced;

    fn chunk() -> Chunk {
        Chunk {
            producer: Sequenced { session: SessionId::new(1, [1; 10]), epoch: 1, first: 1, count: 1 },
            previous: None,
            publisher: Bytes::new(),
            kinds: Vec::new(),
            shapes: Arc::new([]),
            kind_of: Arc::new([]),
            bodies: Bytes::new(),
            ring: None,
        }
    }

    /// What was proposed once, and may be stored, is refused for whatever reason: the sender must not hear that it is not stored.
    #[tokio::test]
    async fn a_chunk_in_doubt_is_never_told_that_nothing_was_appended() {
        let room = Arc::new(Semaphore::new(8));
        let refusals = [
            AppendError::NotLeader { leader: Some(NodeId(2)) },
            AppendError::OutcomeUnknown,
            AppendError::Gap { last: 1 },
            AppendError::Fenced { epoch: 2 },
            AppendError::Spent { sequence: 1 },
            AppendError::Forgotten { now_ms: 1 },
            AppendError::Archived,
            AppendError::Deleted,
            AppendError::KeyUnusable { detail: String::new() },
            AppendError::KeyDisabled { detail: String::new() },
            AppendError::Busy { detail: String::new() },
            AppendError::DiskFull,
            AppendError::TooLarge,
        ];
        for refusal in refusals {
            for doubtful in [false, true] {
                let (reply, outcome) = oneshot::channel();
                let job = Job {
                    chunk: chunk(),
                    held: Vec::new(),
                    doubtful,
                    alone: false,
                    reply,
                    _room: Arc::clone(&room).try_acquire_owned().unwrap(),
                    _shared: None,
                };
                job.refuse(refusal.clone());
                let told = if doubtful { AppendError::OutcomeUnknown } else { refusal.clone() };
                assert_eq!(outcome.await.unwrap(), Err(told));
            }
        }
        assert_eq!(room.available_permits(), 8);
    }
}
