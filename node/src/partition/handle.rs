//! One partition on this node: what publishers, readers and counters hold on to.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{
    BatchHeader, ByteCount, DekId, Link, LogIndex, NodeId, Offset, PartitionContext, ProjectId, RingId, Rlid,
    SealedBytes, TopicId, link,
};
use ensign_raft::env::{Clock, Tasks};
use ensign_raft::{CommittedEntry, Group, Leadership, ReadError as LogReadError};
use futures::future::BoxFuture;
use thiserror::Error;
use tokio::sync::watch;

use super::batcher::{Admission, Batcher};
use super::entry::Payload;
use super::freshness::{Confirmed, Freshness};
use super::index::Mark;
use super::keys::{Keys, KeysError};
use super::machine::{DekRow, PartitionMachine, TypeCount};
use super::open::OpenBatch;
use super::tail::{StoredBatch, Tail};
use super::types;

/// Confirms with the leader how far a reader must have applied. Over the network; `forward` implements it.
pub trait BarrierLink: Send + Sync + 'static {
    /// The index that `leader` confirmed in a round that began after the call.
    fn barrier(&self, leader: NodeId, topic: TopicId) -> BoxFuture<'static, Result<LogIndex, String>>;
}

/// Why events could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReadError {
    /// Retention has passed the place; begin at `log_start`.
    #[error("events before offset {log_start} are no longer kept")]
    Trimmed {
        /// The first offset that is kept.
        log_start: Offset,
    },
    /// The partition is stopped here: the topic is gone, or the node is going.
    #[error("the partition is stopped on this node")]
    Stopped,
    /// The leader could not be asked how far to read. Retry.
    #[error("the partition has no leader that a majority confirms: {cause}")]
    NoLeader {
        /// The last thing that went wrong.
        cause: String,
    },
    /// No node that holds the partition could be asked. Retry.
    #[error("no node that holds the partition can be reached: {cause}")]
    Unreachable {
        /// The last thing that went wrong.
        cause: String,
    },
    /// The keys of what is to be read cannot be used.
    #[error(transparent)]
    Key(#[from] KeysError),
    /// This replica is damaged; ask another node.
    #[error("this replica is damaged: {what}")]
    Corrupt {
        /// What was found.
        what: String,
    },
}

impl From<LogReadError> for ReadError {
    fn from(error: LogReadError) -> Self {
        match error {
            LogReadError::Stopped => Self::Stopped,
            LogReadError::Fenced { cause } => Self::Corrupt { what: cause.to_string() },
            LogReadError::Purged { first } => Self::Corrupt { what: format!("the log begins at entry {first}") },
            LogReadError::NotLeader { .. } | LogReadError::NoQuorum => Self::NoLeader { cause: error.to_string() },
        }
    }
}

/// Counters of a partition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    /// Events kept.
    pub events: u64,
    /// Their size as they are delivered.
    pub bytes: u64,
    /// The newest event's id; none of an empty partition.
    pub last_id: Option<Rlid>,
    /// By type. The name is an encoded `EventKind`; none if its key is gone.
    pub types: Vec<(TypeCount, Option<Bytes>)>,
}

/// What a handle is made of.
pub(super) struct Parts {
    pub(super) me: NodeId,
    pub(super) context: PartitionContext,
    pub(super) group: Group<PartitionMachine>,
    pub(super) tail: Arc<Tail>,
    pub(super) batcher: Batcher,
    pub(super) admission: watch::Receiver<Admission>,
    pub(super) clock: Arc<dyn Clock>,
    /// Stopped when the partition is.
    pub(super) tasks: Tasks,
}

/// One partition on this node. Clones share it.
#[derive(Clone)]
pub struct PartitionHandle {
    parts: Arc<Parts>,
    keys: Arc<dyn Keys>,
    barrier: Arc<dyn BarrierLink>,
    confirmed: Arc<Confirmed>,
}

impl std::fmt::Debug for PartitionHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PartitionHandle").field("context", &self.parts.context).finish_non_exhaustive()
    }
}

impl PartitionHandle {
    pub(super) fn new(parts: Parts, keys: Arc<dyn Keys>, barrier: Arc<dyn BarrierLink>) -> Self {
        Self { parts: Arc::new(parts), keys, barrier, confirmed: Arc::default() }
    }

    /// Where it is.
    pub fn context(&self) -> &PartitionContext {
        &self.parts.context
    }

    /// The group that agrees on it.
    pub(super) fn group(&self) -> &Group<PartitionMachine> {
        &self.parts.group
    }

    /// The topic.
    pub fn topic(&self) -> TopicId {
        self.parts.context.topic
    }

    /// The topic's project.
    pub fn project(&self) -> ProjectId {
        self.parts.context.project
    }

    /// The keys that its batches are opened with.
    pub(super) fn keys(&self) -> &Arc<dyn Keys> {
        &self.keys
    }

    /// Whether it does not run here any more: the topic is gone, its replica moved away, or the node stops.
    pub(super) fn is_stopped(&self) -> bool {
        self.parts.tasks.stop_token().is_cancelled()
    }

    /// Whether nothing of it is left here, at the cost of one load. It is stopped a little earlier.
    pub(super) fn is_closed(&self) -> bool {
        self.parts.admission.has_changed().is_err()
    }

    /// Returns once it does not run here any more.
    pub(super) async fn stopped(&self) {
        self.parts.tasks.stop_token().cancelled().await;
    }

    /// Whether the topic takes events.
    pub fn admission(&self) -> Admission {
        *self.parts.admission.borrow()
    }

    /// Follows whether the topic takes events.
    pub fn watch_admission(&self) -> watch::Receiver<Admission> {
        self.parts.admission.clone()
    }

    /// Who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.parts.group.leadership()
    }

    /// This node's batcher; it appends only while this node leads.
    pub(super) fn batcher(&self) -> &Batcher {
        &self.parts.batcher
    }

    pub(super) fn me(&self) -> NodeId {
        self.parts.me
    }

    /// The first offset that is not committed, as far as this node has applied.
    pub fn high_watermark(&self) -> Offset {
        self.parts.tail.high_watermark()
    }

    /// Follows the high watermark.
    pub fn watch(&self) -> watch::Receiver<Offset> {
        self.parts.tail.watch()
    }

    /// The first offset that is kept.
    pub fn log_start(&self) -> Offset {
        self.parts.group.inspect(|machine| machine.state().log_start)
    }

    /// Bytes of its events as they are delivered, as far as this node has applied.
    pub fn stored_bytes(&self) -> u64 {
        self.parts.group.inspect(|machine| machine.state().bytes)
    }

    /// The partition's time: that of its newest event, as far as this node has applied.
    pub fn entry_time_ms(&self) -> u64 {
        self.parts.group.inspect(|machine| machine.state().last_id.unix_ms())
    }

    /// On the leader: the index that a majority confirms.
    pub(super) async fn confirm(&self) -> Result<LogIndex, ReadError> {
        Ok(self.parts.group.read_index().await?)
    }

    /// Waits until what this node has applied is as fresh as is asked for.
    ///
    /// # Errors
    /// [`ReadError::NoLeader`] when nobody confirms in time: what this node has may be old.
    pub async fn freshen(&self, freshness: Freshness, deadline: Duration) -> Result<(), ReadError> {
        match freshness {
            Freshness::Known => self.readable(),
            Freshness::Latest => self.catch_up(deadline).await,
            Freshness::Bounded => {
                let now = self.parts.clock.boot();
                if !self.confirmed.is_within_bound(now) {
                    return self.catch_up(deadline).await;
                }
                // Renewed on the side, so that nobody has to wait for it while reads go on.
                if self.confirmed.begins_to_age(now) {
                    let this = self.clone();
                    self.parts.tasks.spawn("confirm", |stop| async move {
                        // Those who read after the bound ask again, and are told.
                        let _ = stop.run_until_cancelled(this.catch_up(deadline)).await;
                    });
                }
                self.readable()
            }
        }
    }

    /// Whether it has ever been known, since it was started, to hold what was committed then.
    pub(super) fn was_confirmed(&self) -> bool {
        self.confirmed.ever()
    }

    /// Waits until this node has applied everything that was committed when the call was made, anywhere.
    ///
    /// # Errors
    /// [`ReadError::NoLeader`] when nobody confirms in time: what this node has may be old.
    pub async fn catch_up(&self, deadline: Duration) -> Result<(), ReadError> {
        let mut cause = "no leader is known".to_owned();
        let attempt = async {
            loop {
                let asked = self.parts.clock.boot();
                match self.barrier_once().await {
                    Ok(index) => {
                        self.wait_applied(index).await?;
                        self.confirmed.note(asked);
                        return Ok(());
                    }
                    Err(ReadError::Stopped) => return Err(ReadError::Stopped),
                    Err(error) => cause = error.to_string(),
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let late = tokio::time::timeout(deadline, attempt).await;
        late.unwrap_or(Err(ReadError::NoLeader { cause }))
    }

    async fn barrier_once(&self) -> Result<LogIndex, ReadError> {
        let leadership = *self.parts.group.leadership().borrow();
        match leadership.leader {
            Some(leader) if leader == self.parts.me => self.confirm().await,
            Some(leader) => {
                let asked = self.barrier.barrier(leader, self.topic()).await;
                asked.map_err(|cause| ReadError::NoLeader { cause })
            }
            None => Err(ReadError::NoLeader { cause: "an election is on".to_owned() }),
        }
    }

    async fn wait_applied(&self, index: LogIndex) -> Result<(), ReadError> {
        let mut applied = self.parts.group.applied();
        let reached = applied.wait_for(|applied| *applied >= index).await;
        reached.map(|_| ()).map_err(|_| ReadError::Stopped)
    }

    /// Sealed batches from the one that holds `from`: from memory, else from the log. Empty at the high watermark.
    ///
    /// `place` remembers where in the log the reader is; it begins as `None` and belongs to one reader.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read(
        &self,
        from: Offset,
        limit: ByteCount,
        place: &mut Option<LogPlace>,
    ) -> Result<Vec<StoredBatch>, ReadError> {
        if from >= self.high_watermark() {
            return self.readable().map(|()| Vec::new());
        }
        if let Some(recent) = self.parts.tail.read(from, limit) {
            *place = recent.last().and_then(|last| LogPlace::after(&self.parts.context, last));
            return Ok(recent);
        }
        self.readable()?;
        let (log_start, mark, applied) = self.parts.group.inspect(|machine| {
            let state = machine.state();
            (state.log_start, state.index.at_or_before(from), state.applied)
        });
        if from < log_start {
            return Err(ReadError::Trimmed { log_start });
        }
        let here = place.take().filter(|place| place.is_before(from));
        let mut here = here.or(mark.map(LogPlace::at)).unwrap_or_default();
        while here.next <= applied {
            let entries = self.parts.group.read_log(here.next..applied.next(), limit).await?;
            let Some(last) = entries.last().map(|entry| entry.id.index) else { break };
            let refused = self.parts.group.inspect(|machine| machine.state().refused_in_place.clone());
            let mut batches = Vec::new();
            for entry in entries {
                if let Some(batch) = here.accept(&self.parts.context, entry, &refused)
                    && batch.end() > from
                {
                    batches.push(batch);
                }
            }
            here.next = last.next();
            if !batches.is_empty() {
                *place = Some(here);
                return Ok(batches);
            }
        }
        // Below the high watermark every offset is in the log; not finding it is no "nothing new yet".
        Err(ReadError::Corrupt { what: format!("offset {from} is not in the log") })
    }

    fn readable(&self) -> Result<(), ReadError> {
        let halted = self.parts.group.inspect(|machine| machine.state().halted.clone());
        halted.map_or(Ok(()), |what| Err(ReadError::Corrupt { what }))
    }

    /// Opens a batch of this partition, fetching its key under the lease if this process does not hold it yet.
    ///
    /// # Errors
    /// [`ReadError::Key`], [`ReadError::Corrupt`].
    pub(crate) async fn open(&self, batch: &StoredBatch) -> Result<OpenBatch, ReadError> {
        OpenBatch::open(&*self.keys, &self.parts.context, batch, |dek| self.data_key(dek)).await
    }

    /// Whether the log introduced a data key under the ring.
    pub(super) fn has_key_under(&self, ring: RingId) -> bool {
        let under = |row: &DekRow| self.keys.ring_of(&row.wrapped) == Some(ring);
        self.parts.group.inspect(|machine| machine.state().deks.iter().any(under))
    }

    /// A data key that the log introduced.
    pub(super) fn data_key(&self, dek: DekId) -> Option<DekRow> {
        self.parts.group.inspect(|machine| machine.state().deks.iter().find(|row| row.dek == dek).cloned())
    }

    /// The offset of the first event that was committed at `ms` or later; the high watermark if there is none yet.
    pub async fn offset_at_time(&self, ms: u64) -> Result<Offset, ReadError> {
        self.first_that(ms, |header| (header.first_id.unix_ms() >= ms).then_some(0)).await
    }

    /// The offset of the event that follows `id`; the high watermark if there is none yet.
    pub async fn offset_after(&self, id: Rlid) -> Result<Offset, ReadError> {
        // Ids within a batch follow one by one.
        let passed = |header: &BatchHeader| (0..u64::from(header.count)).find(|n| header.first_id.plus(*n) > id);
        self.first_that(id.unix_ms(), |header| (header.last_id > id).then(|| passed(header).unwrap_or(0))).await
    }

    /// The first event of the first batch that `wanted` finds one in, beginning with batches committed about `ms`.
    async fn first_that(&self, ms: u64, wanted: impl Fn(&BatchHeader) -> Option<u64>) -> Result<Offset, ReadError> {
        let mark = self.parts.group.inspect(|machine| machine.state().index.before_time(ms));
        let mut place = None;
        let mut next = mark.map_or(Offset::FIRST, |mark| mark.offset).max(self.log_start());
        loop {
            let batches = self.read(next, ByteCount(1 << 20), &mut place).await?;
            let Some(last) = batches.last() else { return Ok(next) };
            for batch in &batches {
                let decoded = BatchHeader::decode(&batch.sealed).ok();
                if let Some(delta) = decoded.and_then(|decoded| wanted(&decoded.header)) {
                    return Ok(batch.base.plus(delta));
                }
            }
            next = last.end();
        }
    }

    /// The partition's counters, as far as this node has applied, with the names of types as they are stored.
    pub(super) fn counts(&self) -> Counts {
        self.parts.group.inspect(|machine| {
            let state = machine.state();
            let used = |row: &&DekRow| state.types.iter().any(|counted| counted.dek == row.dek);
            Counts {
                events: state.next_offset.0 - state.log_start.0,
                bytes: state.bytes,
                last_id: (state.next_offset > Offset::FIRST).then_some(state.last_id),
                types: state.types.clone(),
                keys: state.deks.iter().filter(used).cloned().collect(),
            }
        })
    }
}

/// What is counted in a partition, with the names of types as they are stored: sealed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counts {
    /// Events kept.
    pub events: u64,
    /// Their size as they are delivered.
    pub bytes: u64,
    /// The newest event's id; none of an empty partition.
    pub last_id: Option<Rlid>,
    /// By type.
    pub types: Vec<TypeCount>,
    /// The keys that their names are sealed under.
    pub keys: Vec<DekRow>,
}

impl Counts {
    /// Opens the names of the types.
    pub(super) async fn open(self, keys: &dyn Keys, context: &PartitionContext) -> Counters {
        let Self { events, bytes, last_id, types: counted, keys: deks } = self;
        let names = types::open_names(keys, context, &deks, &counted).await;
        let types = counted.into_iter().zip(names).collect();
        Counters { events, bytes, last_id, types }
    }
}

/// A reader's place in the log. The log also holds batches that apply refused; the chain tells which ones it took.
#[derive(Debug, Clone, Default)]
pub struct LogPlace {
    /// The next entry to look at.
    next: LogIndex,
    /// What the next batch must be; unknown at a mark, which always points at a batch that apply took.
    expect: Option<(Offset, Link)>,
}

impl LogPlace {
    fn at(mark: Mark) -> Self {
        Self { next: mark.index, expect: None }
    }

    /// After the batch at `index`, whose successor begins at `base` and names `link`.
    pub(super) fn following(index: LogIndex, base: Offset, link: Link) -> Self {
        Self { next: index.next(), expect: Some((base, link)) }
    }

    /// An entry after which the next batch is found, where that one has to begin, and the link that it has to name.
    pub(super) fn last(&self) -> Option<(LogIndex, Offset, Link)> {
        let before = LogIndex(self.next.0.checked_sub(1)?);
        self.expect.map(|(base, link)| (before, base, link))
    }

    fn after(context: &PartitionContext, batch: &StoredBatch) -> Option<Self> {
        let sealed = SealedBytes::parse(batch.sealed.clone()).ok()?;
        Some(Self { next: batch.index.next(), expect: Some((batch.end(), link(context, &sealed))) })
    }

    fn is_before(&self, offset: Offset) -> bool {
        self.expect.is_some_and(|(base, _)| base <= offset)
    }

    /// The entry's batch, if apply took it, too; the place moves past it.
    fn accept(
        &mut self,
        context: &PartitionContext,
        entry: CommittedEntry,
        refused: &[LogIndex],
    ) -> Option<StoredBatch> {
        let Payload::Batch(bytes) = Payload::read(&entry.payload) else { return None };
        let sealed = SealedBytes::parse(bytes).ok()?;
        let header = sealed.header();
        let fits = self.expect.is_none_or(|(base, prev)| {
            header.term == entry.id.term && header.base_offset == base && header.prev == prev
        });
        if !fits || refused.contains(&entry.id.index) {
            return None;
        }
        self.expect = Some((header.next_offset(), link(context, &sealed)));
        let (base, count) = (header.base_offset, header.count);
        Some(StoredBatch { base, count, index: entry.id.index, sealed: sealed.into_bytes() })
    }
}
