//! The writer: takes what all groups have queued, makes it one frame, syncs once, then calls back, in order.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tracing::warn;

use crate::frame::codec::{FrameBuilder, MAX_ORDER, SMALL_ORDER, pieces};
use crate::frame::group::Group;
use crate::frame::index::Encoder;
use crate::frame::plan::{Plan, Planned, plan_marks};
use crate::frame::queue::{Batch, Mark, Op, Work};
use crate::frame::recover::{Locator, Recovered};
use crate::frame::state::{Census, Change, FrameInfo};
use crate::frame::store::{Commit, INDEX_BLOB, WriteFailure};
use crate::frame::{LogConfig, Shared};
use crate::log::LogError;
use crate::metrics;

/// Frames that one commit removes at most.
const PURGE_FRAMES: usize = 64;
/// Runs of entries in memory that are kept count of at most; the oldest leave memory beyond it.
const TAILS: usize = 1 << 17;
/// How often a full disk is asked again.
const FULL_RETRY: Duration = Duration::from_millis(500);

/// What a commit did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Committed {
    /// Entries and other records that became durable.
    pub records: usize,
    /// Bytes of the frame; 0 when nothing had to be written.
    pub bytes: usize,
}

/// The one that writes. Runs on its own thread, or is driven by hand in a simulation.
pub struct Writer {
    pub(super) shared: Arc<Shared>,
    pub(super) config: LogConfig,
    pub(super) census: Census,
    pub(super) next: u64,
    pub(super) covered: u64,
    pub(super) next_blob: u64,
    pub(super) index_len: u64,
    pub(super) since_index: u64,
    pub(super) snapshot_bytes: u64,
    pub(super) orphans: Vec<u64>,
    pub(super) frame: FrameBuilder,
    /// Durable entries in memory, oldest first: a group, and up to which index.
    pub(super) tails: VecDeque<(Arc<Group>, u64)>,
    pub(super) full: bool,
    /// A frame that cannot be read cannot be moved; its readers report it.
    pub(super) cannot_move: bool,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("next", &self.next).field("full", &self.full).finish_non_exhaustive()
    }
}

impl Drop for Writer {
    /// Without its writer a log would leave its callers waiting for ever.
    fn drop(&mut self) {
        self.shared.store.abandon();
        if self.shared.ended.get().is_none() {
            let panicked = LogError::Fenced { cause: "the log's writer panicked".into() };
            self.shared.end(if std::thread::panicking() { panicked } else { LogError::Closed });
        }
    }
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, config: LogConfig, recovered: Recovered) -> Self {
        let snapshots =
            shared.all_groups().iter().filter_map(|group| group.lock().disk.snapshot).map(|blob| blob.len).sum();
        Self {
            shared,
            config,
            census: recovered.census,
            next: recovered.next,
            covered: recovered.covered,
            next_blob: recovered.next_blob,
            index_len: recovered.index_len,
            since_index: recovered.scanned,
            snapshot_bytes: snapshots,
            orphans: recovered.orphans,
            frame: FrameBuilder::default(),
            tails: VecDeque::new(),
            full: false,
            cannot_move: false,
        }
    }

    /// Runs on a thread of its own until the log is closed or fenced.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn spawn(self) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name("log-writer".to_owned()).spawn(move || self.run())
    }

    /// Commits until the log is closed (then closes the file cleanly) or fenced. Blocks.
    pub fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        shared.queue.lock().drained = true;
        let mut full = false;
        while shared.ended.get().is_none() && shared.queue.wait(full.then_some(FULL_RETRY)) {
            match self.commit_queued() {
                Ok(_) => full = self.full,
                Err(LogError::Full { .. }) => {
                    full = true;
                    if shared.queue.lock().closing {
                        break;
                    }
                    std::thread::sleep(FULL_RETRY);
                }
                Err(_) => break,
            }
        }
        self.close();
    }

    /// Commits what is queued, up to one commit's worth, and calls back. Does nothing when nothing is queued.
    ///
    /// # Errors
    /// [`LogError::Full`]: the batch waits; call again later. [`LogError::Fenced`]: final, and every callback knows.
    pub fn commit_queued(&mut self) -> Result<Committed, LogError> {
        if let Some(error) = self.shared.ended.get() {
            return Err(error.clone());
        }
        self.make_room()?;
        if self.shared.queue.is_idle() {
            return Ok(Committed::default());
        }
        let batch = self.shared.queue.take(self.config.commit.0, self.config.commit_records);
        self.commit_batch(batch)
    }

    fn commit_batch(&mut self, batch: Batch) -> Result<Committed, LogError> {
        // It is taken alone.
        match batch.ops.first().map(|op| &op.work) {
            Some(Work::Rewrite(mark)) => {
                let outcome = self.rewrite(*mark);
                let fenced = matches!(outcome, Err(LogError::Fenced { .. }));
                call_back(batch.ops, &outcome);
                outcome.or_else(|error| if fenced { Err(error) } else { Ok(()) }).map(|()| Committed::default())
            }
            _ => self.commit(batch, false),
        }
    }

    /// Commits everything, stores the index, and closes the file. Later calls on the log answer [`LogError::Closed`].
    pub fn close(mut self) {
        self.shared.queue.close();
        if self.shared.ended.get().is_none() {
            if let Err(error) = self.finish() {
                warn!(%error, "the log was not closed cleanly; the next start repairs it");
            }
            self.shared.end(LogError::Closed);
        }
        if let Err(error) = self.shared.store.close() {
            warn!(%error, "the log's file was not closed cleanly; the next start repairs it");
        }
    }

    fn finish(&mut self) -> Result<(), LogError> {
        while !self.shared.queue.is_idle() {
            let batch = self.shared.queue.take(self.config.commit.0, self.config.commit_records);
            self.commit_batch(batch)?;
        }
        if self.since_index > 0 { self.commit(Batch::default(), true).map(drop) } else { Ok(()) }
    }

    fn commit(&mut self, batch: Batch, closing: bool) -> Result<Committed, LogError> {
        let Batch { ops, marks } = batch;
        let mut frame = std::mem::take(&mut self.frame);
        frame.clear();
        let mut plan = Plan::default();
        if !ops.is_empty() {
            self.plan_moves(&mut frame, &mut plan);
        }
        self.plan_ops(&ops, &mut frame, &mut plan);
        plan_marks(&marks, &mut frame, &mut plan);
        frame.finish();
        let store_index = closing || self.since_index >= self.config.index_every.0.max(8 * self.index_len);
        if frame.records() == 0 && !closing {
            self.frame = frame;
            call_back(ops, &Ok(()));
            return Ok(Committed::default());
        }

        plan.dropped.extend(&self.orphans);
        let purged = self.take_dead(frame.len() > 0);
        let log_start = self.census.log_start(self.next);
        if store_index {
            plan.blobs.push((INDEX_BLOB, self.encode_index()));
        }
        let index_len = if store_index { plan.blobs.last().map(|(_, bytes)| bytes.len() as u64) } else { None };
        let max_order = if self.full { SMALL_ORDER } else { MAX_ORDER };
        #[cfg(feature = "planted-bugs")]
        if self.config.plant == Some(crate::frame::Plant::AckEarly) {
            let early = ops.into_iter().map(|op| {
                (op.done)(Ok(()));
                Op { done: Box::new(|_| ()), ..op }
            });
            return self.commit_planned(early.collect(), marks, frame, plan, purged, log_start, index_len, max_order);
        }
        self.commit_planned(ops, marks, frame, plan, purged, log_start, index_len, max_order)
    }

    #[expect(clippy::too_many_arguments, reason = "one commit's parts, which are used once")]
    fn commit_planned(
        &mut self,
        ops: Vec<Op>,
        marks: Vec<Mark>,
        mut frame: FrameBuilder,
        plan: Plan,
        purged: Vec<FrameInfo>,
        log_start: u64,
        index_len: Option<u64>,
        max_order: u32,
    ) -> Result<Committed, LogError> {
        let commit = Commit {
            first: self.next,
            frame: &mut frame,
            max_order,
            log_start,
            purge: !purged.is_empty(),
            blobs: plan.blobs.clone(),
            dropped_blobs: plan.dropped.clone(),
            durable: self.is_durable(),
        };
        match self.shared.store.commit(commit) {
            Ok(()) => {}
            Err(WriteFailure::Full) => {
                purged.into_iter().rev().for_each(|frame| self.census.unpop(frame));
                self.shared.queue.put_back(Batch { ops, marks });
                return Err(self.recover_from_full());
            }
            Err(WriteFailure::Failed(cause)) => return Err(self.fence(cause, ops)),
        }
        self.orphans.clear();
        if let Some(len) = index_len {
            (self.covered, self.index_len, self.since_index) = (self.next, len, 0);
            self.shared.counters.indexes.fetch_add(1, Ordering::Relaxed);
        }
        let done = Committed { records: frame.records(), bytes: frame.len() };
        if let Err(why) = self.apply(&ops, &plan, &frame, max_order) {
            // The queue accepted what the disk's own view refuses: our bug, and no promise may be built on it.
            return Err(self.fence(format!("the index contradicts the log: {why}"), ops));
        }
        self.note(&plan, &purged, done);
        self.frame = frame;
        let removed = ops.iter().any(|op| matches!(op.work, Work::Remove(_)));
        call_back(ops, &Ok(()));
        drop(plan);
        if removed || index_len.is_some() {
            self.shared.forget_unused();
        }
        Ok(done)
    }

    #[cfg(feature = "planted-bugs")]
    fn is_durable(&self) -> bool {
        self.config.plant != Some(crate::frame::Plant::DurabilityNone)
    }

    #[cfg(not(feature = "planted-bugs"))]
    #[expect(clippy::unused_self, reason = "a planted bug asks")]
    fn is_durable(&self) -> bool {
        true
    }

    /// Takes the frames that nobody needs out of the census. With nothing to write, nothing is removed either.
    fn take_dead(&mut self, with_frame: bool) -> Vec<FrameInfo> {
        let dead = if with_frame { self.census.dead_prefix(self.covered, PURGE_FRAMES) } else { 0 };
        (0..dead).filter_map(|_| self.census.pop()).collect()
    }

    fn encode_index(&self) -> Bytes {
        let mut encoder = Encoder::new(self.next, self.next_blob, &self.census);
        for group in self.shared.all_groups() {
            let inner = group.lock();
            if inner.disk.exists {
                encoder.group(group.id, &inner.disk);
            }
        }
        encoder.finish()
    }

    /// Moves the disk's view forward: the commit is durable.
    fn apply(&mut self, ops: &[Op], plan: &Plan, frame: &FrameBuilder, max_order: u32) -> Result<(), String> {
        if frame.len() == 0 {
            return Ok(());
        }
        let cuts: Vec<usize> = pieces(frame.len(), max_order).collect();
        let first = self.next;
        self.next += cuts.len() as u64;
        self.since_index += frame.len() as u64;
        self.census.push(first, frame.len() as u32, cuts.iter().copied());
        let mut locate = Locator::new(first, cuts);
        let mut places = frame.places().iter();
        let mut place = |term: u64, len: usize| {
            let at = places.next().ok_or("a place is missing")?;
            Ok::<_, String>(locate.place(*at as usize, term, len))
        };
        let mut blobs = plan.blob_ids.iter();
        for step in &plan.steps {
            match step {
                Planned::Op(n) => {
                    let op = &ops[*n];
                    let mut inner = op.group.lock();
                    let change = match &op.work {
                        Work::Append(entries) => {
                            for entry in entries {
                                let place = place(entry.id.term.0, entry.payload.len())?;
                                inner.disk.apply(Change::Entry { index: entry.id.index.0, place }, &mut self.census)?;
                            }
                            drop(inner);
                            if let Some(last) = entries.last() {
                                self.remember(&op.group, last.id.index.0);
                            }
                            continue;
                        }
                        Work::Vote(vote) => Change::Vote(vote.clone()),
                        Work::Truncate(from) => Change::Truncate(from.0),
                        Work::Purge(through) => Change::Purge(*through),
                        Work::Snapshot(bytes) => {
                            let blob = blobs.next().ok_or("a blob is missing")?;
                            self.snapshot_bytes += blob.len;
                            self.snapshot_bytes -= inner.disk.snapshot.map_or(0, |old| old.len);
                            inner.snapshot.settle(bytes);
                            Change::Snapshot(*blob)
                        }
                        Work::Remove(vote) => {
                            // What this group remembers belongs to the life that ends.
                            self.tails.retain(|(group, _)| !Arc::ptr_eq(group, &op.group));
                            self.snapshot_bytes -= inner.disk.snapshot.map_or(0, |old| old.len);
                            inner.disk.apply(Change::Remove, &mut self.census)?;
                            match vote {
                                Some(vote) => Change::Vote(vote.clone()),
                                None => continue,
                            }
                        }
                        Work::Nothing | Work::Rewrite(_) => continue,
                    };
                    inner.disk.apply(change, &mut self.census)?;
                }
                Planned::Moved(group, index, term) => {
                    let mut inner = group.lock();
                    let len = inner.disk.place(*index).map_or(0, |place| place.len as usize);
                    let place = place(*term, len)?;
                    inner.disk.apply(Change::Moved { index: *index, place }, &mut self.census)?;
                }
                Planned::MovedCheckpoint(group) => {
                    let mut inner = group.lock();
                    let len = inner.disk.checkpoint.map_or(0, |place| place.len as usize);
                    let place = place(0, len)?;
                    inner.disk.apply(Change::Checkpoint(place), &mut self.census)?;
                }
                Planned::Committed(group, committed) => {
                    group.lock().disk.apply(Change::Committed(committed.clone()), &mut self.census)?;
                }
                Planned::Checkpoint(group, checkpoint) => {
                    let place = place(0, checkpoint.len())?;
                    let mut inner = group.lock();
                    inner.disk.apply(Change::Checkpoint(place), &mut self.census)?;
                    inner.checkpoint.settle(checkpoint);
                }
            }
        }
        self.evict(ops.last().map_or(0, |op| op.serial));
        Ok(())
    }

    /// Notes durable entries that are still in memory, so that they can be dropped in their turn.
    fn remember(&mut self, group: &Arc<Group>, upto: u64) {
        match self.tails.back_mut() {
            Some((last, end)) if Arc::ptr_eq(last, group) => *end = upto,
            _ => self.tails.push_back((Arc::clone(group), upto)),
        }
    }

    /// Drops the oldest durable entries from memory until the rest fits its budget.
    fn evict(&mut self, durable: u64) {
        let budget = self.config.tail.0;
        loop {
            let over = self.shared.tail_bytes.load(Ordering::Relaxed).saturating_sub(budget);
            let wanted = if self.tails.len() > TAILS { u64::MAX } else { over };
            if wanted == 0 {
                return;
            }
            let Some((group, upto)) = self.tails.pop_front() else { return };
            // A busy group's run may be most of the memory: no more of it goes than has to.
            let mut inner = group.lock();
            let (freed, more) = inner.evict(upto, durable, wanted);
            self.shared.tail_bytes.fetch_sub(freed, Ordering::Relaxed);
            drop(inner);
            if more {
                self.tails.push_front((group, upto));
            }
        }
    }

    fn note(&self, plan: &Plan, purged: &[FrameInfo], done: Committed) {
        let counters = &self.shared.counters;
        counters.commits.fetch_add(1, Ordering::Relaxed);
        counters.records.fetch_add(done.records as u64, Ordering::Relaxed);
        counters.bytes.fetch_add(done.bytes as u64, Ordering::Relaxed);
        counters.kept.store(self.census.total, Ordering::Relaxed);
        counters.purged_frames.fetch_add(purged.len() as u64, Ordering::Relaxed);
        counters.moved.fetch_add(plan.moved as u64, Ordering::Relaxed);
        metrics::observe_commit(done.records as u64, done.bytes as u64, self.shared.queue.bytes());
        metrics::observe_purge(purged.iter().map(|frame| u64::from(frame.len)).sum());
        metrics::observe_move(plan.moved as u64);
    }

    pub(super) fn fence(&self, cause: String, ops: Vec<Op>) -> LogError {
        let error = LogError::Fenced { cause: cause.into() };
        let error = self.shared.ended.get_or_init(|| error).clone();
        call_back(ops, &Err(error.clone()));
        self.shared.end(error.clone());
        error
    }
}

fn call_back(ops: Vec<Op>, outcome: &Result<(), LogError>) {
    for op in ops {
        (op.done)(outcome.clone());
    }
}
