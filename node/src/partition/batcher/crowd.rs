//! How much a batch gathers before it is proposed.
//!
//! What a batch costs beside its events, on each of its replicas, is what a hundred small events do. With nothing of its partition in
//! flight, whatever there is goes at once. The more is in flight, the more a batch gathers: its events would wait for the disk
//! in any case. And where many partitions of a node have something in flight, small batches of all of them wait for each other's
//! work: there a partition gathers as if two more of its own were in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes to gather, by how many batches of the partition are in flight.
const ENOUGH: [u64; 4] = [1, 8 << 10, 32 << 10, 128 << 10];
/// Batches in flight, over all partitions that a node leads, from which on it is crowded.
pub(in crate::partition) const CROWDED: usize = 128;

/// The batches in flight of all partitions that a node leads. Clones share it.
#[derive(Debug, Clone, Default)]
pub(in crate::partition) struct Crowd(Arc<AtomicUsize>);

/// One batch in flight, for as long as it lives.
#[derive(Debug)]
pub(in crate::partition) struct InCrowd(Arc<AtomicUsize>);

impl Drop for InCrowd {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Crowd {
    pub(in crate::partition) fn enter(&self) -> InCrowd {
        self.0.fetch_add(1, Ordering::Relaxed);
        InCrowd(Arc::clone(&self.0))
    }

    /// Bytes that the next batch of a partition gathers while so many of it are in flight.
    pub(super) fn enough(&self, in_flight: usize) -> u64 {
        let crowded = in_flight > 0 && self.0.load(Ordering::Relaxed) >= CROWDED;
        let step = if crowded { in_flight + 2 } else { in_flight };
        ENOUGH.get(step).copied().unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_gather_more_in_a_crowd_but_none_waits_for_others_alone() {
        let crowd = Crowd::default();
        let enough = || [0, 1, 2, 3, 4].map(|in_flight| crowd.enough(in_flight));
        let alone = [1, 8 << 10, 32 << 10, 128 << 10, u64::MAX];
        assert_eq!(enough(), alone);
        let others: Vec<_> = (0..CROWDED).map(|_| crowd.enter()).collect();
        assert_eq!(enough(), [1, 128 << 10, u64::MAX, u64::MAX, u64::MAX]);
        drop(others);
        assert_eq!(enough(), alone);
    }
}
