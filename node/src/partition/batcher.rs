//! The leader's side of appending: one task per partition that turns chunks into sealed batches and proposes them in order.
//!
//! Events gather while earlier proposals are in flight; an idle partition proposes at once. The task predicts the head of the
//! partition (offset, link, ids, producers) across what is in flight and seals for exactly that place, so at most one batch can
//! take it. On anything but success it stops sealing, lets everything in flight resolve, takes the applied head again and seals
//! anew. So a batch that was refused is never overtaken by its successor.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ByteCount, DekId, Link, NodeId, Offset, PartitionContext, RingId, Rlid, SessionId, Term, link};
use ensign_raft::env::{Clock, Stop};
use ensign_raft::{Group, Leadership, ProposeError};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tracing::{debug, warn};

use super::append::{AppendError, Appended, AppendedRun, Chunk, Outcome};
use super::entry::Payload;
use super::keys::{Keys, KeysError, NewDek};
use super::machine::{Applied, PartitionMachine, TYPES_MAX};
use super::producers::{Place, Sequenced, Verdict};
use super::{batch, metrics, rlid};

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

/// Jobs in one batch at most: each may add a row of 32 bytes to a header that has room for 64 KiB.
const JOBS_MAX: usize = 1_000;

/// How long a vault call may take before the events that wait for it are sent back.
const KEY_DEADLINE: Duration = Duration::from_secs(4);

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
    reply: oneshot::Sender<Outcome>,
    _room: OwnedSemaphorePermit,
}

impl Job {
    fn refuse(self, error: AppendError) {
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
        Ok(Slot { jobs: self.jobs.clone(), room })
    }
}

impl Slot {
    /// Queues the chunk. Chunks of one sender are taken in the order of these calls. A closed channel means that the task ended
    /// without an answer: the outcome is unknown.
    pub fn send(self, chunk: Chunk) -> oneshot::Receiver<Outcome> {
        let (reply, outcome) = oneshot::channel();
        let job = Job { chunk, held: Vec::new(), reply, _room: self.room };
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
    /// The ring that the topic is sealed under.
    pub ring: RingId,
    /// The keys.
    pub keys: Arc<dyn Keys>,
    /// For commit times and ids.
    pub clock: Arc<dyn Clock>,
    /// Whether the topic takes events.
    pub admission: watch::Receiver<Admission>,
    /// Bounds.
    pub limits: BatchLimits,
}

impl BatcherParts {
    /// The queue and the task that serves it until it is stopped.
    pub fn start(self) -> (Batcher, impl FnOnce(Stop) -> BoxFuture<'static, ()>) {
        let (batcher, jobs) = Batcher::queue(&self.limits);
        let task = Task { parts: self, jobs, retry: VecDeque::new() };
        (batcher, move |stop| Box::pin(task.run(stop)))
    }
}

struct Task {
    parts: BatcherParts,
    jobs: mpsc::UnboundedReceiver<Job>,
    /// Chunks to take again before new ones, in order.
    retry: VecDeque<Job>,
}

/// The head of the partition once everything in flight is applied.
struct Head {
    next_offset: Offset,
    link: Link,
    last_id: Rlid,
    types: u32,
}

/// What a proposal carries.
enum Cargo {
    Batch(Vec<Job>),
    Introduction,
}

type Resolved = (u64, Cargo, Result<Applied, ProposeError>);

/// One stretch of leadership, from an applied head to the first thing that goes wrong.
struct Stretch<'a> {
    parts: &'a BatcherParts,
    term: Term,
    dek: DekId,
    head: Head,
    kinds: HashMap<Bytes, u32>,
    /// The newest places of sessions with events pending or in flight, and in which batch.
    ahead: HashMap<SessionId, (Place, u64)>,
    /// The number of the last batch that was proposed, and of the last that was resolved.
    serial: u64,
    resolved: u64,
    pending: Vec<Job>,
    pending_bytes: u64,
    in_flight: FuturesOrdered<BoxFuture<'static, Resolved>>,
    /// Retries of what is pending or in flight, until that batch is resolved.
    waiting: Vec<(u64, Job)>,
    /// What has to be taken again, in order.
    again: Vec<Job>,
    failure: Option<ProposeError>,
}

/// How a stretch ended.
enum End {
    Stopped,
    /// Leadership changed, or something failed; begin anew from the applied state.
    Again,
    Key(KeysError),
}

impl End {
    /// A key that is gone, or was never held, is no obstacle: another one may do. Without any lease there is none.
    fn of_key(error: KeysError) -> Self {
        match error {
            KeysError::NotHeld(_) | KeysError::Unusable(_) => Self::Again,
            KeysError::Unavailable(_) | KeysError::Damaged | KeysError::Failed(_) => Self::Key(error),
        }
    }
}

impl Task {
    async fn run(mut self, stop: Stop) {
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

    /// Sends back what waits, so that it finds its way to whoever leads.
    fn refuse_queued(&mut self, leader: Option<NodeId>) {
        while let Some(job) = self.retry.pop_front() {
            job.refuse(AppendError::NotLeader { leader });
        }
        while let Ok(job) = self.jobs.try_recv() {
            job.refuse(AppendError::NotLeader { leader });
        }
    }

    /// Without a key nothing can be appended; the senders know how long their events may wait.
    async fn key_failed(&mut self, error: &KeysError, stop: &Stop) {
        let refusal = match error {
            KeysError::Unusable(detail) => AppendError::KeyUnusable { detail: detail.clone() },
            KeysError::Unavailable(_) | KeysError::NotHeld(_) | KeysError::Damaged | KeysError::Failed(_) => {
                warn!(topic = %self.parts.context.topic, %error, "no key to seal with");
                AppendError::Busy { detail: error.to_string() }
            }
        };
        while let Some(job) = self.retry.pop_front() {
            job.refuse(refusal.clone());
        }
        while let Ok(job) = self.jobs.try_recv() {
            job.refuse(refusal.clone());
        }
        // A vault that is away is not asked in a tight loop.
        let _ = tokio::time::timeout(Duration::from_millis(50), stop.cancelled()).await;
    }

    async fn lead(&mut self, now: Leadership, leadership: &mut watch::Receiver<Leadership>, stop: &Stop) -> End {
        // A key is made when there is something to seal, not for every topic that nobody writes to.
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
        let dek = match self.parts.sealing_key(now.term).await {
            Ok(Some(dek)) => dek,
            Ok(None) => return End::Again,
            Err(error) => return End::Key(error),
        };
        let mut stretch = Stretch::begin(&self.parts, now.term, dek).await;
        let end = stretch.run(&mut self.jobs, &mut self.retry, leadership, stop).await;
        let (again, failure) = stretch.resolve().await;
        // What failed comes before what was never taken.
        for job in again.into_iter().rev() {
            self.retry.push_front(job);
        }
        self.answer_failure(failure, leadership).await;
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
            job.refuse(refusal.clone());
        }
    }
}

impl BatcherParts {
    /// The key to seal with: the newest of the partition if this process can hold it and it is not worn out, else a new one.
    /// None if leadership was lost over it.
    async fn sealing_key(&self, term: Term) -> Result<Option<DekId>, KeysError> {
        let newest = self.group.inspect(|machine| machine.state().deks.last().cloned());
        if let Some(row) = newest {
            let ensured = within_deadline(self.keys.ensure(self.context, row.wrapped)).await;
            match ensured {
                Ok(()) if !self.keys.should_roll_over(row.dek) => return Ok(Some(row.dek)),
                // Its version is revoked, or it is worn out.
                Ok(()) | Err(KeysError::Unusable(_) | KeysError::NotHeld(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let new = within_deadline(self.keys.create_dek(self.context, self.ring)).await?;
        self.introduce(term, new).await
    }

    async fn introduce(&self, term: Term, new: NewDek) -> Result<Option<DekId>, KeysError> {
        let payload = Payload::dek_introduced(new.dek, &new.wrapped);
        match self.group.propose(Some(term), payload).await {
            Ok(committed) if committed.response == Applied::Introduced => Ok(Some(new.dek)),
            Ok(_) => Err(KeysError::Failed("the partition refused a new data key".to_owned())),
            Err(error) => {
                debug!(%error, "a new data key was not introduced");
                Ok(None)
            }
        }
    }
}

async fn within_deadline<T>(call: BoxFuture<'static, Result<T, KeysError>>) -> Result<T, KeysError> {
    let late = || Err(KeysError::Unavailable("the vault does not answer".to_owned()));
    tokio::time::timeout(KEY_DEADLINE, call).await.unwrap_or_else(|_| late())
}

impl<'a> Stretch<'a> {
    async fn begin(parts: &'a BatcherParts, term: Term, dek: DekId) -> Self {
        let kinds = batch::known_kinds(parts).await;
        let head = parts.group.inspect(|machine| {
            let state = machine.state();
            Head {
                next_offset: state.next_offset,
                link: state.link,
                last_id: state.last_id,
                types: state.types.len() as u32,
            }
        });
        Self {
            parts,
            term,
            dek,
            head,
            kinds,
            ahead: HashMap::new(),
            serial: 0,
            resolved: 0,
            pending: Vec::new(),
            pending_bytes: 0,
            in_flight: FuturesOrdered::new(),
            waiting: Vec::new(),
            again: Vec::new(),
            failure: None,
        }
    }

    async fn run(
        &mut self,
        jobs: &mut mpsc::UnboundedReceiver<Job>,
        retry: &mut VecDeque<Job>,
        leadership: &mut watch::Receiver<Leadership>,
        stop: &Stop,
    ) -> End {
        loop {
            while self.has_room() {
                let Some(job) = retry.pop_front().or_else(|| jobs.try_recv().ok()) else { break };
                self.admit(job);
            }
            if self.should_cut() {
                if self.parts.keys.should_roll_over(self.dek) {
                    return End::Again;
                }
                if let Err(error) = self.cut().await {
                    return error;
                }
                continue;
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return End::Stopped,
                Some(resolved) = self.in_flight.next(), if !self.in_flight.is_empty() => {
                    self.settle(resolved);
                    if self.failure.is_some() || !self.again.is_empty() {
                        return End::Again;
                    }
                    let resolved = self.resolved;
                    retry.extend(self.waiting.extract_if(.., |(of, _)| *of <= resolved).map(|(_, job)| job));
                }
                changed = leadership.changed() => {
                    let now = *leadership.borrow();
                    if changed.is_err() || now.term != self.term || !now.ready {
                        return End::Again;
                    }
                }
                job = jobs.recv(), if self.has_room() => match job {
                    Some(job) => self.admit(job),
                    None => return End::Stopped,
                },
            }
        }
    }

    fn has_room(&self) -> bool {
        self.pending_bytes < self.parts.limits.target.0 && self.pending.len() < JOBS_MAX
    }

    /// With nothing in flight, whatever there is goes at once. The more is in flight, the more a batch waits to gather: its
    /// events would wait for the disk in any case.
    fn should_cut(&self) -> bool {
        const GATHER: [u64; 4] = [1, 8 << 10, 32 << 10, 128 << 10];
        let in_flight = self.in_flight.len();
        if self.pending.is_empty() || in_flight >= self.parts.limits.in_flight {
            return false;
        }
        let enough = GATHER.get(in_flight).copied().unwrap_or(u64::MAX).min(self.parts.limits.target.0);
        self.pending_bytes >= enough || self.pending.len() >= JOBS_MAX
    }

    /// Decides what becomes of a chunk: append it, answer it, or refuse it.
    fn admit(&mut self, mut job: Job) {
        match *self.parts.admission.borrow() {
            Admission::Open => {}
            Admission::Archived => return job.refuse(AppendError::Archived),
            Admission::Deleted => return job.refuse(AppendError::Deleted),
        }
        let events = job.chunk.producer;
        let ahead = self.ahead.get(&events.session).copied();
        let place = match ahead {
            Some((place, _)) => Some(place),
            None => self.parts.group.inspect(|machine| machine.state().producers.place(events.session)),
        };
        let verdict = place.map_or(Verdict::Forgotten, |place| place.judge(&events, job.chunk.previous));
        match (verdict, ahead) {
            (Verdict::Fresh, _) => self.gather(job),
            (Verdict::Duplicate { .. }, Some((_, serial))) => self.waiting.push((serial, job)),
            (Verdict::Duplicate { held }, None) => {
                job.held = self.parts.held_runs(&events, held);
                if held == events.count {
                    job.acknowledge(None);
                } else {
                    job.chunk.drop_first(held);
                    self.gather(job);
                }
            }
            (Verdict::Gap { last }, _) => job.refuse(AppendError::Gap { last }),
            (Verdict::Fenced { epoch }, _) => job.refuse(AppendError::Fenced { epoch }),
            (Verdict::Forgotten, _) => {
                // Younger than every session that was dropped.
                let dropped = self.parts.group.inspect(|machine| machine.state().producers.dropped_through_ms());
                let now_ms = self.head.last_id.unix_ms().max(dropped.map_or(0, |dropped| dropped + 1));
                job.refuse(AppendError::Forgotten { now_ms });
            }
        }
    }

    fn gather(&mut self, job: Job) {
        let events = job.chunk.producer;
        let place = Place { epoch: events.epoch, last: events.first + u64::from(events.count) - 1 };
        self.ahead.insert(events.session, (place, self.serial + 1));
        self.pending_bytes += job.chunk.size().0;
        self.pending.push(job);
    }

    /// Seals what is pending for the predicted head and proposes it.
    async fn cut(&mut self) -> Result<(), End> {
        self.introduce_kinds().await?;
        let chunks: Vec<_> = self.pending.iter().map(|job| &job.chunk).collect();
        let place = batch::Place {
            term: self.term,
            base: self.head.next_offset,
            first_id: rlid::first_of_batch(self.parts.clock.wall().as_millis(), self.head.last_id),
            prev: self.head.link,
            dek: self.dek,
        };
        let context = self.parts.context;
        let Ok(draft) = batch::draft(&chunks, &place, &context, &self.kinds) else {
            return Err(self.refuse_oversize());
        };
        let (last_id, next_offset, events) = (draft.header.last_id, draft.header.next_offset(), draft.header.count);
        let in_use = self.parts.keys.begin_use(self.dek).map_err(End::of_key)?;
        let sealed = self.parts.keys.seal(&context, self.dek, draft.header, draft.payload).map_err(End::of_key)?;
        let next_link = link(&context, &sealed);
        let pending = match self.parts.group.submit(Some(self.term), sealed.into_bytes()).await {
            Ok(pending) => pending,
            Err(error) => {
                self.failure = Some(error);
                return Err(End::Again);
            }
        };
        self.serial += 1;
        self.head.next_offset = next_offset;
        self.head.last_id = last_id;
        self.head.link = next_link;
        self.pending_bytes = 0;
        metrics::observe_batch(events, draft.bytes);
        let (serial, jobs) = (self.serial, std::mem::take(&mut self.pending));
        self.in_flight.push_back(Box::pin(async move {
            let outcome = pending.await.map(|committed| committed.response);
            // The use lasts until the proposal is resolved: no event is acked under a key that was reported dead before.
            drop(in_use);
            (serial, Cargo::Batch(jobs), outcome)
        }));
        Ok(())
    }

    /// A batch is cut soon after its target, so only events that are too large by themselves can get here.
    fn refuse_oversize(&mut self) -> End {
        for job in std::mem::take(&mut self.pending) {
            job.refuse(AppendError::TooLarge);
        }
        End::Again
    }

    /// Introduces kinds of event that the partition has not counted yet, while there is room for more.
    async fn introduce_kinds(&mut self) -> Result<(), End> {
        let context = self.parts.context;
        let new: Vec<Bytes> = {
            let kinds = self.pending.iter().flat_map(|job| job.chunk.kinds.iter());
            kinds.filter(|kind| !self.kinds.contains_key(*kind)).map(|kind| Bytes::copy_from_slice(kind)).collect()
        };
        for kind in new {
            if self.kinds.contains_key(&kind) || self.head.types as usize >= TYPES_MAX {
                continue;
            }
            let handle = self.head.types + 1;
            let sealed = self.parts.keys.seal_type(&context, self.dek, handle, &kind).map_err(End::of_key)?;
            let payload = Payload::type_introduced(handle, self.dek, &sealed);
            let pending = match self.parts.group.submit(Some(self.term), payload).await {
                Ok(pending) => pending,
                Err(error) => {
                    self.failure = Some(error);
                    return Err(End::Again);
                }
            };
            self.head.types = handle;
            self.kinds.insert(kind, handle);
            self.in_flight.push_back(Box::pin(async move {
                (0, Cargo::Introduction, pending.await.map(|committed| committed.response))
            }));
        }
        Ok(())
    }

    /// Answers the chunks of a resolved proposal, or keeps them to be taken again.
    fn settle(&mut self, (serial, cargo, outcome): Resolved) {
        let jobs = match cargo {
            Cargo::Batch(jobs) => jobs,
            Cargo::Introduction => Vec::new(),
        };
        match outcome {
            Ok(Applied::Batch { base, committed_ms }) => {
                self.ahead.retain(|_, (_, of)| *of != serial);
                metrics::observe_committed(jobs.iter().map(|job| u64::from(job.chunk.count())).sum());
                self.resolved = serial;
                let mut offset = base;
                for job in jobs {
                    let count = job.chunk.count();
                    job.acknowledge(Some(AppendedRun { count, offset, committed_ms }));
                    offset = offset.plus(u64::from(count));
                }
            }
            Ok(Applied::Introduced) => {}
            Ok(Applied::Stale) => {
                self.again.extend(jobs);
                // Even a stale introduction of a type means that the head was predicted wrongly.
                self.failure.get_or_insert(ProposeError::OutcomeUnknown);
            }
            Ok(Applied::Unreadable) => {
                self.again.extend(jobs);
                self.failure = Some(ProposeError::Stopped);
            }
            Err(error) => {
                self.again.extend(jobs);
                // An unknown outcome outweighs a refusal: chunks of both kinds go back together.
                if self.failure.is_none() || matches!(error, ProposeError::OutcomeUnknown) {
                    self.failure = Some(error);
                }
            }
        }
    }

    /// Waits until everything in flight is resolved; what was not appended, in order, and the reason.
    async fn resolve(mut self) -> (Vec<Job>, Option<ProposeError>) {
        while let Some(resolved) = self.in_flight.next().await {
            self.settle(resolved);
        }
        let mut again = self.again;
        again.extend(self.pending);
        again.extend(self.waiting.into_iter().map(|(_, job)| job));
        (again, self.failure)
    }
}

impl BatcherParts {
    /// Where the first `held` of `events`, which the partition holds, were committed.
    fn held_runs(&self, events: &Sequenced, held: u32) -> Vec<AppendedRun> {
        self.group.inspect(|machine| {
            let producers = &machine.state().producers;
            let mut runs = Vec::new();
            let mut sequence = events.first;
            let end = events.first + u64::from(held);
            while sequence < end {
                let run = producers.committed(events.session, sequence);
                let last = run.map_or(end - 1, |run| run.last.min(end - 1));
                let (offset, committed_ms) = run.map_or((Offset(0), 0), |run| {
                    (run.offset.plus(sequence.saturating_sub(run.first)), run.committed_ms)
                });
                runs.push(AppendedRun { count: (last - sequence + 1) as u32, offset, committed_ms });
                sequence = last + 1;
            }
            runs
        })
    }
}
