//! What waits for the writer: operations in the order in which they were submitted, and lazy marks that ride along.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{GroupId, LogIndex};

use crate::frame::group::Group;
use crate::log::{Done, Door, Entry, EntryId, LogError};

/// What an operation changes.
pub(crate) enum Work {
    Append(Vec<Entry>),
    Vote(Bytes),
    Truncate(LogIndex),
    Purge(EntryId),
    Snapshot(Bytes),
    /// All that the group holds; what it leaves behind is a vote, or nothing.
    Remove(Option<Bytes>),
    /// The file is written anew, and marked so. Taken alone.
    Rewrite(u64),
    /// Nothing is left to do, but its callback must not overtake those before it.
    Nothing,
}

/// One operation.
pub(crate) struct Op {
    pub(crate) serial: u64,
    pub(crate) group: Arc<Group>,
    pub(crate) work: Work,
    pub(crate) done: Done,
}

impl Op {
    /// What it takes in a frame or a blob, roughly.
    pub(crate) fn bytes(&self) -> u64 {
        work_bytes(&self.work)
    }

    pub(crate) fn records(&self) -> usize {
        match &self.work {
            Work::Append(entries) => entries.len(),
            _ => 1,
        }
    }
}

pub(crate) fn work_bytes(work: &Work) -> u64 {
    64 + match work {
        Work::Append(entries) => entries.iter().map(|entry| entry.payload.len() as u64 + 16).sum(),
        Work::Vote(bytes) | Work::Snapshot(bytes) | Work::Remove(Some(bytes)) => bytes.len() as u64,
        _ => 0,
    }
}

/// A kind of mark that causes no commit of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lazy {
    Committed,
    Checkpoint,
}

/// A mark that waits. It carries its value: by the time it is written, a newer one may be there, and that one may speak
/// of entries that this commit does not hold.
pub(crate) struct Mark {
    pub(crate) lazy: Lazy,
    pub(crate) group: Arc<Group>,
    pub(crate) value: Option<Bytes>,
    /// The serial of the operation that it follows.
    after: u64,
}

#[derive(Default)]
pub(crate) struct Waiting {
    ops: VecDeque<Op>,
    bytes: u64,
    /// The last serial given out.
    pub(crate) serial: u64,
    /// The newest mark of each kind and group.
    marks: BTreeMap<(GroupId, Lazy), Mark>,
    /// Bytes that may wait before the disk has to be asked again; below it everything is promised room.
    pub(crate) room: Option<u64>,
    pub(crate) closing: bool,
    /// Why nothing more is taken.
    pub(crate) ended: Option<LogError>,
    /// Whether a thread drains the queue: only then is there anything to wait for.
    pub(crate) drained: bool,
    /// Who waits for space.
    wakers: Vec<Waker>,
    /// Bytes that were taken and that `room` does not know of yet.
    in_flight: u64,
}

/// A commit's worth of operations.
#[derive(Default)]
pub(crate) struct Batch {
    pub(crate) ops: Vec<Op>,
    pub(crate) marks: Vec<Mark>,
}

/// The queue. Locked after a group, never before one.
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    /// Something was submitted, or the log is closing.
    submitted: Condvar,
    /// Past this, there is no space for appends and snapshots.
    limit: u64,
}

impl Queue {
    pub(crate) fn new(limit: u64) -> Self {
        Self { waiting: Mutex::default(), submitted: Condvar::new(), limit }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ready unless too much is queued. Also when nothing will be taken, so that whoever asks hears why.
    pub(crate) fn poll_space(&self, context: &Context<'_>) -> Poll<()> {
        let mut waiting = self.lock();
        let refuses = waiting.ended.is_some() || waiting.closing || waiting.room.is_some();
        if waiting.bytes <= self.limit || refuses || !waiting.drained {
            return Poll::Ready(());
        }
        if !waiting.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            waiting.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }

    /// Something has changed for those who wait for space.
    fn wake(mut waiting: MutexGuard<'_, Waiting>) {
        let wakers = std::mem::take(&mut waiting.wakers);
        drop(waiting);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Refuses what cannot be taken now. Call it, and then [`Self::push`], under the group's lock and with the same guard.
    pub(crate) fn admit(waiting: &Waiting, work: &Work) -> Result<(), LogError> {
        if let Some(error) = &waiting.ended {
            return Err(error.clone());
        }
        if waiting.closing {
            return Err(LogError::Closed);
        }
        let grows = matches!(work, Work::Append(_) | Work::Snapshot(_));
        match waiting.room {
            Some(room) if grows && waiting.bytes + waiting.in_flight + work_bytes(work) > room => Err(full()),
            _ => Ok(()),
        }
    }

    /// Whether entries of `size` bytes should be let in. Proposals leave room for a queue full of what others have sent.
    pub(crate) fn has_room(&self, size: u64, door: Door) -> bool {
        let kept_free = match door {
            Door::Proposal => self.limit,
            Door::Replication => 0,
        };
        let waiting = self.lock();
        waiting.room.is_none_or(|room| waiting.bytes + waiting.in_flight + size + kept_free <= room)
    }

    pub(crate) fn push(&self, mut waiting: MutexGuard<'_, Waiting>, group: Arc<Group>, work: Work, done: Done) -> u64 {
        if matches!(work, Work::Remove(_)) {
            // They belonged to the life that ends.
            waiting.marks.remove(&(group.id, Lazy::Committed));
            waiting.marks.remove(&(group.id, Lazy::Checkpoint));
        }
        waiting.serial += 1;
        let op = Op { serial: waiting.serial, group, work, done };
        waiting.bytes += op.bytes();
        waiting.ops.push_back(op);
        let serial = waiting.serial;
        drop(waiting);
        self.submitted.notify_one();
        serial
    }

    pub(crate) fn mark(&self, group: &Arc<Group>, lazy: Lazy, value: Option<Bytes>) {
        let mut waiting = self.lock();
        let mark = Mark { lazy, group: Arc::clone(group), value, after: waiting.serial };
        waiting.marks.insert((group.id, lazy), mark);
    }

    /// Takes the oldest operations up to a commit's worth, at least one; then the marks that follow no later operation.
    pub(crate) fn take(&self, bytes_max: u64, records_max: usize) -> Batch {
        let mut waiting = self.lock();
        let mut batch = Batch::default();
        let (mut bytes, mut records) = (0, 0);
        while let Some(next) = waiting.ops.front() {
            let alone = matches!(next.work, Work::Rewrite(_));
            if !batch.ops.is_empty()
                && (alone || bytes + next.bytes() > bytes_max || records + next.records() > records_max)
            {
                break;
            }
            bytes += next.bytes();
            records += next.records();
            batch.ops.extend(waiting.ops.pop_front());
            if alone {
                break;
            }
        }
        waiting.bytes -= bytes;
        waiting.in_flight += bytes;
        // Marks never cause a commit, but for the last one of all.
        let rewrites = batch.ops.iter().any(|op| matches!(op.work, Work::Rewrite(_)));
        if (!batch.ops.is_empty() && !rewrites) || waiting.closing {
            let taken = waiting.ops.front().map_or(u64::MAX, |next| next.serial - 1);
            // Checkpoints of many groups may come due together: no more of them at once than a commit takes.
            let mut left = bytes_max;
            let ready = waiting.marks.extract_if(.., |_, mark| {
                let ready = mark.after <= taken && left > 0;
                let len = mark.value.as_ref().map_or(0, |value| value.len() as u64);
                left = left.saturating_sub(if ready { len } else { 0 });
                ready
            });
            batch.marks.extend(ready.map(|(_, mark)| mark));
        }
        if waiting.bytes <= self.limit {
            Self::wake(waiting);
        }
        batch
    }

    /// Puts a batch back in front, as if it had never been taken.
    pub(crate) fn put_back(&self, batch: Batch) {
        let mut waiting = self.lock();
        for op in batch.ops.into_iter().rev() {
            waiting.bytes += op.bytes();
            waiting.ops.push_front(op);
        }
        for mark in batch.marks {
            let id = mark.group.id;
            let removed = waiting.ops.iter().any(|op| op.group.id == id && matches!(op.work, Work::Remove(_)));
            if !removed {
                waiting.marks.entry((id, mark.lazy)).or_insert(mark);
            }
        }
    }

    /// Whether there is something to commit.
    pub(crate) fn is_idle(&self) -> bool {
        let waiting = self.lock();
        waiting.ops.is_empty() && (!waiting.closing || waiting.marks.is_empty())
    }

    /// Waits for work. False when the log has ended, or is closing and all is done.
    pub(crate) fn wait(&self, at_most: Option<Duration>) -> bool {
        let mut waiting = self.lock();
        loop {
            if !waiting.ops.is_empty() || (waiting.closing && !waiting.marks.is_empty()) {
                return true;
            }
            if waiting.closing || waiting.ended.is_some() {
                return false;
            }
            match at_most {
                Some(limit) => {
                    let (guard, result) =
                        self.submitted.wait_timeout(waiting, limit).unwrap_or_else(PoisonError::into_inner);
                    if result.timed_out() {
                        return true;
                    }
                    waiting = guard;
                }
                None => waiting = self.submitted.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    pub(crate) fn close(&self) {
        let mut waiting = self.lock();
        waiting.closing = true;
        Self::wake(waiting);
        self.submitted.notify_all();
    }

    /// Ends the queue for good and hands back what still waits.
    pub(crate) fn end(&self, error: LogError) -> Vec<Op> {
        let mut waiting = self.lock();
        waiting.ended.get_or_insert(error);
        waiting.bytes = 0;
        waiting.marks.clear();
        let ops = std::mem::take(&mut waiting.ops);
        Self::wake(waiting);
        self.submitted.notify_all();
        ops.into()
    }

    pub(crate) fn set_room(&self, room: Option<u64>) {
        let mut waiting = self.lock();
        waiting.room = room;
        waiting.in_flight = 0;
        if room.is_some() {
            Self::wake(waiting);
        }
    }

    /// Bytes waiting.
    pub(crate) fn bytes(&self) -> u64 {
        self.lock().bytes
    }
}

pub(crate) fn full() -> LogError {
    LogError::Full { cause: "the log's file cannot grow: free some space on its disk".into() }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;
    use crate::frame::state::Durable;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A queue that a thread drains, with more in it than its limit.
    fn crowded() -> Queue {
        let queue = Queue::new(1000);
        queue.lock().drained = true;
        let group = Arc::new(Group::new(GroupId(16), Durable::default()));
        for _ in 0..3 {
            queue.push(queue.lock(), Arc::clone(&group), Work::Snapshot(vec![0; 500].into()), Box::new(|_| ()));
        }
        queue
    }

    /// Whether there is space now, and whether what `change` does wakes the one who was told that there is none.
    fn waits_until(queue: &Queue, change: impl FnOnce(&Queue)) -> (bool, bool, bool) {
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let poll = || queue.poll_space(&Context::from_waker(&waker)).is_ready();
        let before = poll() || poll();
        change(queue);
        (before, woken.0.load(Ordering::SeqCst) == 1, poll())
    }

    #[test]
    fn there_is_space_again_once_enough_was_taken() {
        let queue = crowded();
        assert_eq!(waits_until(&queue, |queue| drop(queue.take(1, 1))), (false, false, false));
        assert_eq!(waits_until(&queue, |queue| drop(queue.take(1, 1))), (false, true, true));
    }

    #[test]
    fn nobody_waits_for_space_where_nothing_will_be_taken() {
        let end = |queue: &Queue| drop(queue.end(LogError::Closed));
        for change in [&end as &dyn Fn(&Queue), &Queue::close, &|queue| queue.set_room(Some(0))] {
            let queue = crowded();
            assert_eq!(waits_until(&queue, change), (false, true, true));
        }
    }

    #[test]
    fn a_batch_that_is_put_back_leaves_no_one_waiting_on_a_full_disk() {
        let queue = crowded();
        let batch = queue.take(u64::MAX, usize::MAX);
        queue.set_room(Some(0));
        queue.put_back(batch);
        assert!(queue.bytes() > 1000);
        assert!(queue.poll_space(&Context::from_waker(Waker::noop())).is_ready(), "the answer is that it is full");
    }

    #[test]
    fn without_a_thread_that_drains_the_queue_nobody_waits() {
        let queue = crowded();
        queue.lock().drained = false;
        assert!(queue.poll_space(&Context::from_waker(Waker::noop())).is_ready());
    }
}
