//! One group as its callers see it: everything submitted, durable or not, and the way to what lies on disk.
//!
//! ```text
//! | purged | on disk only              | tail: in memory, newest last        |
//!          ^ start                     ^ end - tail.len()                    ^ end
//! ```
//!
//! Invariant: an entry that is not in the tail is durable, and `disk` holds its place. So only durable entries leave the
//! tail, and `disk`, which the writer moves forward, may lag behind `start` and `end` but never lacks what a reader needs.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use tracing::error;

use crate::frame::queue::{Lazy, Queue, Work};
use crate::frame::state::{Durable, Place};
use crate::frame::store::ReadFailure;
use crate::frame::{Alive, Shared};
use crate::log::{
    Done, Door, Entry, EntryId, GroupLog, GroupState, LogError, check_append, check_truncate, refuse_read,
};

/// What an entry in the tail is taken to cost beside its payload.
pub(crate) const TAIL_OVERHEAD: u64 = 80;
/// A reader that is overtaken by this many changes of place gives up.
const ATTEMPTS: usize = 8;
/// Larger payloads are refused: nothing above sends them, and a frame counts its bytes in 32 bits.
const PAYLOAD_MAX: usize = 256 << 20;

/// A group of the log.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) id: GroupId,
    inner: Mutex<Inner>,
}

/// Something that is replaced as a whole.
#[derive(Debug, Clone, Default)]
pub(crate) enum Slot {
    #[default]
    None,
    /// Not durable yet.
    Waiting(Bytes),
    Stored,
}

impl Slot {
    /// These bytes are durable now, unless newer ones wait.
    pub(crate) fn settle(&mut self, bytes: &Bytes) {
        if matches!(self, Self::Waiting(waiting) if waiting.as_ptr() == bytes.as_ptr() && waiting.len() == bytes.len())
        {
            *self = Self::Stored;
        }
    }
}

/// A group's state.
#[derive(Debug, Default)]
pub(crate) struct Inner {
    exists: bool,
    vote: Option<Bytes>,
    committed: Option<Bytes>,
    purged: Option<EntryId>,
    start: u64,
    end: u64,
    last: Option<EntryId>,
    /// With the serial of the operation that brought each.
    tail: VecDeque<(u64, Entry)>,
    pub(crate) snapshot: Slot,
    pub(crate) checkpoint: Slot,
    /// The writer's view.
    pub(crate) disk: Durable,
}

impl Group {
    pub(crate) fn new(id: GroupId, disk: Durable) -> Self {
        let slot = |stored| if stored { Slot::Stored } else { Slot::None };
        let inner = Inner {
            exists: disk.exists,
            vote: disk.vote.clone(),
            committed: disk.committed.clone(),
            purged: disk.purged,
            start: disk.first,
            end: disk.end(),
            last: disk.last(),
            tail: VecDeque::new(),
            snapshot: slot(disk.snapshot.is_some()),
            checkpoint: slot(disk.checkpoint.is_some()),
            disk,
        };
        Self { id, inner: Mutex::new(inner) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn exists(&self) -> bool {
        self.lock().exists
    }

    /// Whether it holds anything, here or on disk.
    pub(crate) fn is_used(&self) -> bool {
        let inner = self.lock();
        inner.exists || inner.disk.exists
    }
}

impl Inner {
    fn tail_start(&self) -> u64 {
        self.end - self.tail.len() as u64
    }

    /// Makes the change that `work` asks for and returns what is left for the writer; or refuses and changes nothing.
    fn submit(&mut self, work: Work, serial: u64, freed: &mut u64, added: &mut u64) -> Result<Work, LogError> {
        match &work {
            Work::Append(entries) => {
                check_append(self.last, entries)?;
                if let Some(large) = entries.iter().find(|entry| entry.payload.len() > PAYLOAD_MAX) {
                    return Err(LogError::Refused {
                        what: format!("an entry of {} bytes", large.payload.len()).into(),
                    });
                }
                let Some(first) = entries.first() else { return Ok(Work::Nothing) };
                if self.start == self.end {
                    (self.start, self.end) = (first.id.index.0, first.id.index.0);
                }
                for entry in entries {
                    *added += entry.payload.len() as u64 + TAIL_OVERHEAD;
                    self.tail.push_back((serial, entry.clone()));
                    self.last = Some(entry.id);
                    self.end = entry.id.index.0 + 1;
                }
            }
            Work::Vote(vote) => self.vote = Some(vote.clone()),
            Work::Truncate(from) => {
                check_truncate(self.purged, *from)?;
                if from.0 >= self.end || self.start == self.end {
                    return Ok(Work::Nothing);
                }
                while self.tail.back().is_some_and(|(_, entry)| entry.id.index >= *from) {
                    *freed += self.tail.pop_back().map_or(0, |(_, entry)| entry.payload.len() as u64 + TAIL_OVERHEAD);
                }
                self.end = from.0.max(self.start);
                self.last = if self.start == self.end {
                    self.purged
                } else if let Some((_, entry)) = self.tail.back() {
                    Some(entry.id)
                } else {
                    let index = self.end - 1;
                    let place = self.disk.place(index).expect("an entry that is not in the tail is durable");
                    Some(EntryId { term: Term(place.term), index: LogIndex(index) })
                };
            }
            Work::Purge(through) => {
                if self.purged.is_some_and(|purged| purged.index >= through.index) {
                    return Ok(Work::Nothing);
                }
                self.purged = Some(*through);
                while self.tail.front().is_some_and(|(_, entry)| entry.id.index <= through.index) {
                    *freed += self.tail.pop_front().map_or(0, |(_, entry)| entry.payload.len() as u64 + TAIL_OVERHEAD);
                }
                if through.index.0 + 1 >= self.end {
                    (self.start, self.end) = (self.end, self.end);
                    self.last = Some(*through);
                } else {
                    self.start = self.start.max(through.index.0 + 1);
                }
            }
            Work::Snapshot(snapshot) => self.snapshot = Slot::Waiting(snapshot.clone()),
            Work::Remove(vote) => {
                *freed += self.tail.iter().map(|(_, entry)| entry.payload.len() as u64 + TAIL_OVERHEAD).sum::<u64>();
                let disk = std::mem::take(&mut self.disk);
                *self = Self { disk, vote: vote.clone(), exists: vote.is_some(), ..Self::default() };
                return Ok(work);
            }
            Work::Rewrite(_) => return Ok(work),
            Work::Nothing => {}
        }
        self.exists = true;
        Ok(work)
    }

    /// Drops durable entries from the front of the tail, through `upto`, until it has freed `wanted` bytes. Returns the
    /// bytes freed, and whether there may be more to free.
    pub(crate) fn evict(&mut self, upto: u64, durable: u64, wanted: u64) -> (u64, bool) {
        let mut freed = 0;
        while self.tail.front().is_some_and(|(serial, entry)| entry.id.index.0 <= upto && *serial <= durable) {
            if freed >= wanted {
                return (freed, true);
            }
            freed += self.tail.pop_front().map_or(0, |(_, entry)| entry.payload.len() as u64 + TAIL_OVERHEAD);
        }
        (freed, false)
    }

    /// Where the entries of a range lie: first some on disk, then some in memory.
    fn plan(&self, range: &Range<LogIndex>, limit: ByteCount) -> Result<Plan, LogError> {
        let mut plan = Plan::default();
        if range.start >= range.end {
            return Ok(plan);
        }
        if range.start.0 < self.start || range.end.0 > self.end || self.start == self.end {
            let held = (self.start < self.end).then_some(LogIndex(self.start)..LogIndex(self.end));
            return Err(refuse_read(range, held));
        }
        let mut bytes = 0;
        for index in range.start.0..range.end.0 {
            let in_tail = index.checked_sub(self.tail_start()).map(|at| &self.tail[at as usize].1);
            let place = if in_tail.is_none() { self.disk.place(index) } else { None };
            let len = match (in_tail, place) {
                (Some(entry), _) => entry.payload.len() as u64,
                (None, Some(place)) => u64::from(place.len),
                (None, None) => return Err(LogError::Corrupt { what: format!("index {index} has no place").into() }),
            };
            bytes += len;
            if bytes > limit.0 && index > range.start.0 {
                break;
            }
            plan.tail.extend(in_tail.cloned());
            plan.disk.extend(place.map(|place| (index, place)));
        }
        Ok(plan)
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    disk: Vec<(u64, Place)>,
    tail: Vec<Entry>,
}

/// A group as [`crate::NodeLog::group`] hands it out.
pub(crate) struct Handle {
    pub(crate) group: Arc<Group>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) _alive: Arc<Alive>,
}

impl Handle {
    pub(crate) fn submit(&self, work: Work, done: Done) {
        let mut inner = self.group.lock();
        let waiting = self.shared.queue.lock();
        let (mut freed, mut added) = (0, 0);
        let admitted = Queue::admit(&waiting, &work);
        match admitted.and_then(|()| inner.submit(work, waiting.serial + 1, &mut freed, &mut added)) {
            Ok(work) => {
                self.shared.queue.push(waiting, Arc::clone(&self.group), work, done);
                // While the group is locked, so that an eviction never sees bytes that were not counted.
                self.shared.tail_bytes.fetch_add(added, Ordering::Relaxed);
                self.shared.tail_bytes.fetch_sub(freed, Ordering::Relaxed);
            }
            Err(error) => {
                drop(waiting);
                drop(inner);
                done(Err(error));
            }
        }
    }

    fn unfenced(&self) -> Result<(), LogError> {
        self.shared.ended.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Runs a read again when what it read was moved or removed meanwhile.
    fn attempt<K: PartialEq, T>(
        &self,
        plan: impl Fn(&Inner) -> Result<K, LogError>,
        read: impl Fn(&K) -> Result<T, ReadFailure>,
    ) -> Result<T, LogError> {
        self.unfenced()?;
        let mut known = plan(&self.group.lock())?;
        let mut left = ATTEMPTS;
        loop {
            match read(&known) {
                Ok(found) => return Ok(found),
                Err(failure) => {
                    let again = plan(&self.group.lock())?;
                    left -= 1;
                    if again == known || left == 0 {
                        return Err(self.shared.read_failed(failure));
                    }
                    known = again;
                }
            }
        }
    }
}

impl GroupLog for Handle {
    fn state(&self) -> GroupState {
        let inner = self.group.lock();
        GroupState {
            vote: inner.vote.clone(),
            committed: inner.committed.clone(),
            purged: inner.purged,
            last: inner.last,
        }
    }

    fn poll_space(&self, context: &mut Context<'_>) -> Poll<()> {
        self.shared.queue.poll_space(context)
    }

    fn append(&self, entries: Vec<Entry>, done: Done) {
        self.submit(Work::Append(entries), done);
    }

    fn has_room(&self, size: ByteCount, door: Door) -> bool {
        self.shared.queue.has_room(size.0, door)
    }

    fn save_vote(&self, vote: Bytes, done: Done) {
        self.submit(Work::Vote(vote), done);
    }

    fn save_committed(&self, committed: Option<Bytes>) {
        let mut inner = self.group.lock();
        inner.exists = true;
        inner.committed.clone_from(&committed);
        self.shared.queue.mark(&self.group, Lazy::Committed, committed);
    }

    fn truncate(&self, from: LogIndex, done: Done) {
        self.submit(Work::Truncate(from), done);
    }

    fn purge(&self, through: EntryId, done: Done) {
        self.submit(Work::Purge(through), done);
    }

    fn read_cached(&self, range: Range<LogIndex>, limit: ByteCount) -> Option<Vec<Entry>> {
        self.unfenced().ok()?;
        let inner = self.group.lock();
        if range.start < range.end && range.start.0 < inner.tail_start() {
            return None;
        }
        inner.plan(&range, limit).ok().map(|plan| plan.tail)
    }

    fn read(&self, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<Entry>, LogError> {
        self.attempt(
            |inner| inner.plan(&range, limit),
            |plan| {
                let mut found = self.shared.store.entries(self.group.id, &plan.disk)?;
                found.extend(plan.tail.iter().cloned());
                Ok(found)
            },
        )
    }

    fn put_snapshot(&self, snapshot: Bytes, done: Done) {
        self.submit(Work::Snapshot(snapshot), done);
    }

    fn snapshot(&self) -> Result<Option<Bytes>, LogError> {
        self.attempt(
            |inner| {
                Ok(match &inner.snapshot {
                    Slot::None => (None, None),
                    Slot::Waiting(bytes) => (Some(bytes.clone()), None),
                    Slot::Stored => (None, inner.disk.snapshot),
                })
            },
            |(waiting, stored)| match stored {
                Some(blob) => self.shared.store.blob(*blob).map(Some),
                None => Ok(waiting.clone()),
            },
        )
    }

    fn rewrite(&self, mark: u64, done: Done) {
        self.submit(Work::Rewrite(mark), done);
    }

    fn mark(&self) -> u64 {
        self.shared.mark.load(Ordering::Acquire)
    }

    fn put_checkpoint(&self, checkpoint: Bytes) {
        if checkpoint.len() > PAYLOAD_MAX {
            error!(
                group = %self.group.id,
                bytes = checkpoint.len(),
                limit = PAYLOAD_MAX,
                "a checkpoint is too large to be stored; a start replays the log instead"
            );
            return;
        }
        let mut inner = self.group.lock();
        inner.exists = true;
        inner.checkpoint = Slot::Waiting(checkpoint.clone());
        self.shared.queue.mark(&self.group, Lazy::Checkpoint, Some(checkpoint));
    }

    fn checkpoint(&self) -> Result<Option<Bytes>, LogError> {
        self.attempt(
            |inner| {
                Ok(match &inner.checkpoint {
                    Slot::None => (None, None),
                    Slot::Waiting(bytes) => (Some(bytes.clone()), None),
                    Slot::Stored => (None, inner.disk.checkpoint),
                })
            },
            |(waiting, stored)| match stored {
                Some(place) => self.shared.store.checkpoint(self.group.id, *place).map(Some),
                None => Ok(waiting.clone()),
            },
        )
    }
}
