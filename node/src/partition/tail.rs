//! What followers of the tail need: the high watermark, and recent batches as ciphertext.
//!
//! Bounded in bytes. A reader that falls behind finds its batches gone from here and reads the log instead; nobody is dropped.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use ensign_proto::{ByteCount, LogIndex, Offset};
use tokio::sync::watch;

/// A sealed batch and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBatch {
    /// The offset of its first event.
    pub base: Offset,
    /// How many events.
    pub count: u32,
    /// Its entry in the log.
    pub index: LogIndex,
    /// The batch, sealed.
    pub sealed: Bytes,
}

impl StoredBatch {
    /// The offset after its last event.
    pub fn end(&self) -> Offset {
        self.base.plus(u64::from(self.count))
    }
}

/// How much of the tails of all partitions of a node stays in memory.
#[derive(Debug)]
pub struct TailBudget {
    node: ByteCount,
    partition: ByteCount,
    used: AtomicU64,
}

impl TailBudget {
    /// `node` bytes for all partitions, and `partition` for any one.
    pub fn new(node: ByteCount, partition: ByteCount) -> Arc<Self> {
        Arc::new(Self { node, partition, used: AtomicU64::new(0) })
    }
}

/// The tail of one partition on this node, fed by apply.
#[derive(Debug)]
pub struct Tail {
    high_watermark: watch::Sender<Offset>,
    recent: Mutex<Recent>,
    budget: Arc<TailBudget>,
}

#[derive(Debug, Default)]
struct Recent {
    batches: VecDeque<StoredBatch>,
    bytes: u64,
}

impl Tail {
    /// An empty tail.
    pub fn new(budget: Arc<TailBudget>) -> Arc<Self> {
        Arc::new(Self { high_watermark: watch::Sender::new(Offset::FIRST), recent: Mutex::default(), budget })
    }

    /// The first offset that is not committed yet, as far as this node has applied.
    pub fn high_watermark(&self) -> Offset {
        *self.high_watermark.borrow()
    }

    /// Follows the high watermark.
    pub fn watch(&self) -> watch::Receiver<Offset> {
        self.high_watermark.subscribe()
    }

    /// Adds the next batch and tells everyone who waits for it.
    pub(super) fn push(&self, batch: StoredBatch) {
        let end = batch.end();
        {
            let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            let size = batch.sealed.len() as u64;
            recent.bytes += size;
            self.budget.used.fetch_add(size, Ordering::Relaxed);
            recent.batches.push_back(batch);
            while recent.bytes > self.budget.partition.0
                || self.budget.used.load(Ordering::Relaxed) > self.budget.node.0
            {
                let Some(oldest) = recent.batches.pop_front() else { break };
                recent.bytes -= oldest.sealed.len() as u64;
                self.budget.used.fetch_sub(oldest.sealed.len() as u64, Ordering::Relaxed);
            }
        }
        self.high_watermark.send_replace(end);
    }

    /// Forgets every batch, since the state was replaced, and moves the high watermark.
    pub(super) fn reset(&self, high_watermark: Offset) {
        self.clear();
        self.high_watermark.send_replace(high_watermark);
    }

    fn clear(&self) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        self.budget.used.fetch_sub(recent.bytes, Ordering::Relaxed);
        *recent = Recent::default();
    }

    /// Batches from the one that holds `from`, at least one and at most `limit` bytes; none if memory does not hold `from`.
    pub fn read(&self, from: Offset, limit: ByteCount) -> Option<Vec<StoredBatch>> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let first = recent.batches.front()?;
        if from < first.base {
            return None;
        }
        let start = recent.batches.partition_point(|batch| batch.end() <= from);
        let mut bytes = 0;
        let within = |batch: &&StoredBatch| {
            let before = bytes;
            bytes += batch.sealed.len() as u64;
            before == 0 || bytes <= limit.0
        };
        let found: Vec<_> = recent.batches.range(start..).take_while(within).cloned().collect();
        (!found.is_empty()).then_some(found)
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(base: u64, count: u32, size: usize) -> StoredBatch {
        StoredBatch { base: Offset(base), count, index: LogIndex(base), sealed: Bytes::from(vec![0; size]) }
    }

    #[test]
    fn the_tail_keeps_to_its_bytes_and_gives_from_the_middle_of_a_batch() {
        let tail = Tail::new(TailBudget::new(ByteCount(1 << 20), ByteCount(1_000)));
        for n in 0..10 {
            tail.push(batch(1 + n * 5, 5, 300));
        }
        assert_eq!(tail.high_watermark(), Offset(51));
        assert!(tail.read(Offset(1), ByteCount(10_000)).is_none(), "evicted: the log has it");
        let found = tail.read(Offset(43), ByteCount(10_000)).unwrap();
        assert_eq!(found.iter().map(|batch| batch.base.0).collect::<Vec<_>>(), [41, 46]);
        assert_eq!(tail.read(Offset(43), ByteCount(1)).unwrap().len(), 1);
        assert!(tail.read(Offset(51), ByteCount(1)).is_none());
    }

    #[test]
    fn all_tails_share_one_budget_and_give_it_back() {
        let budget = TailBudget::new(ByteCount(1_000), ByteCount(900));
        let (one, two) = (Tail::new(Arc::clone(&budget)), Tail::new(Arc::clone(&budget)));
        one.push(batch(1, 1, 800));
        two.push(batch(1, 1, 400));
        assert!(two.read(Offset(1), ByteCount(1)).is_none(), "over the node's budget: the log has it");
        assert_eq!(two.high_watermark(), Offset(2));
        drop(one);
        two.push(batch(2, 1, 400));
        two.push(batch(3, 1, 400));
        assert_eq!(two.read(Offset(2), ByteCount(10_000)).unwrap().len(), 2);
    }
}
