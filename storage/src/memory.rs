//! A log in memory, for tests: the simplest thing that keeps the contract, and the model that the frame log is compared with.
//!
//! Every operation changes `live` at once and waits in a queue; a flush repeats the queue on `durable`. So a crash is
//! "forget `live`", and a test can lose exactly the tail whose `done` was never called.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex};

use crate::log::{
    Done, Entry, EntryId, GroupLog, GroupState, LogError, NodeLog, check_append, check_truncate, refuse_read,
};

/// One change of a group.
#[derive(Debug, Clone)]
pub enum Op {
    /// [`GroupLog::append`].
    Append(Vec<Entry>),
    /// [`GroupLog::save_vote`].
    Vote(Bytes),
    /// [`GroupLog::save_committed`].
    Committed(Option<Bytes>),
    /// [`GroupLog::truncate`].
    Truncate(LogIndex),
    /// [`GroupLog::purge`].
    Purge(EntryId),
    /// [`GroupLog::put_snapshot`].
    Snapshot(Bytes),
    /// [`GroupLog::put_checkpoint`].
    Checkpoint(Bytes),
    /// [`NodeLog::remove`].
    Remove,
    /// [`NodeLog::forget`].
    Forget(Bytes),
    /// [`GroupLog::rewrite`].
    Rewrite(u64),
}

impl Op {
    /// Whether the operation may wait for another one's commit.
    pub fn is_lazy(&self) -> bool {
        matches!(self, Self::Committed(_) | Self::Checkpoint(_))
    }
}

/// What one group holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupModel {
    /// The vote.
    pub vote: Option<Bytes>,
    /// The committed mark.
    pub committed: Option<Bytes>,
    /// The last purged entry.
    pub purged: Option<EntryId>,
    /// The entries, in order and without a hole.
    pub entries: VecDeque<Entry>,
    /// The snapshot.
    pub snapshot: Option<Bytes>,
    /// The checkpoint.
    pub checkpoint: Option<Bytes>,
    /// The mark of the last rewrite.
    pub mark: u64,
}

impl GroupModel {
    /// What [`GroupLog::state`] answers.
    pub fn state(&self) -> GroupState {
        GroupState {
            vote: self.vote.clone(),
            committed: self.committed.clone(),
            purged: self.purged,
            last: self.entries.back().map(|entry| entry.id).or(self.purged),
        }
    }

    /// Makes one change, or refuses it and changes nothing.
    pub fn apply(&mut self, op: Op) -> Result<(), LogError> {
        match op {
            Op::Append(entries) => {
                check_append(self.state().last, &entries)?;
                self.entries.extend(entries);
            }
            Op::Vote(vote) => self.vote = Some(vote),
            Op::Committed(committed) => self.committed = committed,
            Op::Truncate(from) => {
                check_truncate(self.purged, from)?;
                while self.entries.back().is_some_and(|last| last.id.index >= from) {
                    self.entries.pop_back();
                }
            }
            Op::Purge(through) => {
                if self.purged.is_none_or(|purged| purged.index < through.index) {
                    self.purged = Some(through);
                    while self.entries.front().is_some_and(|first| first.id.index <= through.index) {
                        self.entries.pop_front();
                    }
                }
            }
            Op::Snapshot(snapshot) => self.snapshot = Some(snapshot),
            Op::Checkpoint(checkpoint) => self.checkpoint = Some(checkpoint),
            Op::Remove => *self = Self::default(),
            // There is no file that could hold more than this.
            Op::Rewrite(mark) => self.mark = mark,
            Op::Forget(vote) => *self = Self { vote: Some(vote), ..Self::default() },
        }
        Ok(())
    }

    /// What [`GroupLog::read`] answers.
    pub fn read(&self, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<Entry>, LogError> {
        if range.start >= range.end {
            return Ok(Vec::new());
        }
        let (Some(first), Some(last)) = (self.entries.front(), self.entries.back()) else {
            return Err(refuse_read(&range, None));
        };
        let (first, last) = (first.id.index, last.id.index);
        if range.start < first || range.end > last.next() {
            return Err(refuse_read(&range, Some(first..last.next())));
        }
        let mut found = Vec::new();
        let mut bytes = 0;
        for entry in self.entries.range((range.start.0 - first.0) as usize..(range.end.0 - first.0) as usize) {
            bytes += entry.payload.len() as u64;
            if bytes > limit.0 && !found.is_empty() {
                break;
            }
            found.push(entry.clone());
        }
        Ok(found)
    }
}

#[derive(Default)]
struct Shared {
    live: BTreeMap<GroupId, GroupModel>,
    durable: BTreeMap<GroupId, GroupModel>,
    queue: VecDeque<(GroupId, Op, Option<Done>)>,
    flush_by_hand: bool,
    refusal: Option<LogError>,
}

/// A [`NodeLog`] in memory. Cheap clone; all clones are one log.
#[derive(Clone, Default)]
pub struct MemoryLog {
    shared: Arc<Mutex<Shared>>,
}

impl std::fmt::Debug for MemoryLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryLog").field("groups", &self.groups()).finish_non_exhaustive()
    }
}

impl MemoryLog {
    /// An empty log in which every operation is durable at once: `done` is called before the operation returns.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty log in which nothing is durable until [`Self::flush`].
    pub fn flushed_by_hand() -> Self {
        let log = Self::new();
        log.lock().flush_by_hand = true;
        log
    }

    /// Makes everything submitted so far durable and calls the callbacks, in order. Returns how many operations that were.
    pub fn flush(&self) -> usize {
        self.flush_some(usize::MAX)
    }

    /// Like [`Self::flush`], for the oldest `count` operations only.
    pub fn flush_some(&self, count: usize) -> usize {
        let mut flushed = 0;
        while flushed < count {
            // One at a time, with the lock released: a callback may submit the next operation.
            let mut shared = self.lock();
            let Some((group, op, done)) = shared.queue.pop_front() else { break };
            if matches!(op, Op::Remove) {
                shared.durable.remove(&group);
            } else {
                // It was accepted by `live`, whose history `durable` repeats.
                shared.durable.entry(group).or_default().apply(op).expect("live accepted it");
            }
            drop(shared);
            if let Some(done) = done {
                done(Ok(()));
            }
            flushed += 1;
        }
        flushed
    }

    /// What a restart after a crash finds: everything flushed and nothing else. The callbacks that were waiting are dropped.
    #[must_use]
    pub fn crash(&self) -> Self {
        let mut shared = self.lock();
        shared.queue.clear();
        shared.refusal = Some(LogError::Closed);
        let (durable, flush_by_hand) = (shared.durable.clone(), shared.flush_by_hand);
        let next = Shared { live: durable.clone(), durable, flush_by_hand, ..Shared::default() };
        Self { shared: Arc::new(Mutex::new(next)) }
    }

    /// From now on every operation, and every one still waiting, fails with this error. `None` heals a full disk.
    pub fn fail(&self, error: Option<LogError>) {
        let mut shared = self.lock();
        shared.refusal.clone_from(&error);
        let waiting = if matches!(error, Some(LogError::Fenced { .. } | LogError::Closed)) {
            std::mem::take(&mut shared.queue)
        } else {
            VecDeque::new()
        };
        drop(shared);
        for done in waiting.into_iter().filter_map(|(_, _, done)| done) {
            done(Err(error.clone().unwrap_or(LogError::Closed)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, group: GroupId, op: Op, done: Option<Done>) {
        let mut shared = self.lock();
        let refused = match &shared.refusal {
            Some(error @ LogError::Full { .. }) if matches!(op, Op::Append(_) | Op::Snapshot(_)) => Err(error.clone()),
            Some(LogError::Full { .. }) | None => shared.live.entry(group).or_default().apply(op.clone()),
            Some(error) => Err(error.clone()),
        };
        if let Err(error) = refused {
            drop(shared);
            if let Some(done) = done {
                done(Err(error));
            }
            return;
        }
        if matches!(op, Op::Remove) {
            shared.live.remove(&group);
        }
        let flush = !shared.flush_by_hand && !op.is_lazy();
        shared.queue.push_back((group, op, done));
        drop(shared);
        if flush {
            self.flush();
        }
    }
}

impl NodeLog for MemoryLog {
    fn group(&self, id: GroupId) -> Arc<dyn GroupLog> {
        Arc::new(MemoryGroup { log: self.clone(), id })
    }

    fn groups(&self) -> Vec<GroupId> {
        self.lock().live.keys().copied().collect()
    }

    fn remove(&self, id: GroupId, done: Done) {
        self.submit(id, Op::Remove, Some(done));
    }

    fn forget(&self, id: GroupId, vote: Bytes, done: Done) {
        self.submit(id, Op::Forget(vote), Some(done));
    }

    fn writable(&self) -> Result<(), LogError> {
        self.lock().refusal.clone().map_or(Ok(()), Err)
    }
}

struct MemoryGroup {
    log: MemoryLog,
    id: GroupId,
}

impl MemoryGroup {
    fn view<T>(&self, read: impl FnOnce(&GroupModel) -> T) -> T {
        let shared = self.log.lock();
        read(shared.live.get(&self.id).unwrap_or(&GroupModel::default()))
    }

    fn unfenced(&self) -> Result<(), LogError> {
        match self.log.writable() {
            Err(LogError::Full { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl GroupLog for MemoryGroup {
    fn state(&self) -> GroupState {
        self.view(GroupModel::state)
    }

    fn poll_space(&self, _context: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn append(&self, entries: Vec<Entry>, done: Done) {
        self.log.submit(self.id, Op::Append(entries), Some(done));
    }

    fn save_vote(&self, vote: Bytes, done: Done) {
        self.log.submit(self.id, Op::Vote(vote), Some(done));
    }

    fn save_committed(&self, committed: Option<Bytes>) {
        self.log.submit(self.id, Op::Committed(committed), None);
    }

    fn truncate(&self, from: LogIndex, done: Done) {
        self.log.submit(self.id, Op::Truncate(from), Some(done));
    }

    fn purge(&self, through: EntryId, done: Done) {
        self.log.submit(self.id, Op::Purge(through), Some(done));
    }

    fn read_cached(&self, range: Range<LogIndex>, limit: ByteCount) -> Option<Vec<Entry>> {
        self.read(range, limit).ok()
    }

    fn read(&self, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<Entry>, LogError> {
        self.unfenced()?;
        self.view(|group| group.read(range, limit))
    }

    fn put_snapshot(&self, snapshot: Bytes, done: Done) {
        self.log.submit(self.id, Op::Snapshot(snapshot), Some(done));
    }

    fn snapshot(&self) -> Result<Option<Bytes>, LogError> {
        self.unfenced()?;
        Ok(self.view(|group| group.snapshot.clone()))
    }

    fn put_checkpoint(&self, checkpoint: Bytes) {
        self.log.submit(self.id, Op::Checkpoint(checkpoint), None);
    }

    fn checkpoint(&self) -> Result<Option<Bytes>, LogError> {
        self.unfenced()?;
        Ok(self.view(|group| group.checkpoint.clone()))
    }

    fn rewrite(&self, mark: u64, done: Done) {
        self.log.submit(self.id, Op::Rewrite(mark), Some(done));
    }

    fn mark(&self) -> u64 {
        self.view(|group| group.mark)
    }
}
