//! What a file has in the page cache only because it was written.
//!
//! A log only grows, and what was written last is in the node's own memory: in the cache it would push everything else out.

use std::ops::Range;

/// What the system caches by.
const PAGE: u64 = 4096;
/// The cache is told to let go of so much at a time.
const ENOUGH: u64 = 4 << 20;
/// And of so many stretches at most. One more, and it is time as well.
const RANGES_MAX: usize = 1024;

/// Whole pages written since the cache was last told to let go.
#[derive(Debug, Default)]
pub(super) struct Cached {
    ranges: Vec<Range<u64>>,
    bytes: u64,
}

impl Cached {
    /// Notes a write. A part of a page stays in the cache: whoever writes the rest of it would have to read it first.
    pub(super) fn add(&mut self, offset: u64, len: u64) {
        let (start, end) = (offset.next_multiple_of(PAGE), (offset + len) / PAGE * PAGE);
        if start >= end {
            return;
        }
        self.bytes += end - start;
        match self.ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => self.ranges.push(start..end),
        }
    }

    /// All of it, if that is enough to be worth a call; else nothing. To be taken before the sync that puts it on the disk: the cache
    /// keeps what is not there yet.
    pub(super) fn take_enough(&mut self) -> Vec<Range<u64>> {
        if self.bytes < ENOUGH && self.ranges.len() < RANGES_MAX {
            return Vec::new();
        }
        self.bytes = 0;
        std::mem::take(&mut self.ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn neighbours_are_one_stretch_and_parts_of_pages_stay() {
        let mut cached = Cached::default();
        cached.add(0, 320);
        cached.add(100, PAGE);
        cached.add(PAGE, 2 * PAGE);
        cached.add(3 * PAGE, 4 * MIB + 5);
        cached.add(64 * MIB, PAGE);
        assert_eq!(cached.take_enough(), [PAGE..3 * PAGE + 4 * MIB, 64 * MIB..64 * MIB + PAGE]);
        assert_eq!(cached.take_enough(), []);
    }

    #[test]
    fn little_is_kept_for_later_unless_it_is_in_many_pieces() {
        let mut cached = Cached::default();
        for number in 0..RANGES_MAX as u64 - 1 {
            cached.add(number * 2 * PAGE, PAGE);
            assert_eq!(cached.take_enough(), []);
        }
        cached.add(u64::from(u32::MAX) / PAGE * PAGE, PAGE);
        assert_eq!(cached.take_enough().len(), RANGES_MAX);
    }
}
