//! From offsets and times to places in the log, in bounded memory.

use ensign_proto::{LogIndex, Offset};

/// Marks kept at most; then every second one goes and marks get twice as far apart.
const MARKS_MAX: usize = 4096;

/// Log bytes between two marks, at first.
const STRIDE: u64 = 256 * 1024;

/// A batch's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    /// The offset of its first event.
    pub(crate) offset: Offset,
    /// The commit time of the batch.
    pub(crate) committed_ms: u64,
    /// Its entry.
    pub(crate) index: LogIndex,
}

/// A sparse index: from a mark, the log is read forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SparseIndex {
    marks: Vec<Mark>,
    stride: u64,
    since_last: u64,
}

impl Default for SparseIndex {
    fn default() -> Self {
        Self { marks: Vec::new(), stride: STRIDE, since_last: STRIDE }
    }
}

impl SparseIndex {
    /// Notes a batch of `bytes` bytes; batches come in order.
    pub(crate) fn add(&mut self, mark: Mark, bytes: u64) {
        if self.since_last >= self.stride {
            if self.marks.len() == MARKS_MAX {
                let mut keep = false;
                self.marks.retain(|_| {
                    keep = !keep;
                    keep
                });
                self.stride *= 2;
            }
            self.marks.push(mark);
            self.since_last = 0;
        }
        self.since_last += bytes;
    }

    /// The last mark at or before `offset`: reading forward from it meets the offset.
    pub(crate) fn at_or_before(&self, offset: Offset) -> Option<Mark> {
        let after = self.marks.partition_point(|mark| mark.offset <= offset);
        after.checked_sub(1).map(|at| self.marks[at])
    }

    /// The last mark committed before `ms`: reading forward from it meets the first event committed at `ms` or later.
    pub(crate) fn before_time(&self, ms: u64) -> Option<Mark> {
        let after = self.marks.partition_point(|mark| mark.committed_ms < ms);
        after.checked_sub(1).or(if self.marks.is_empty() { None } else { Some(0) }).map(|at| self.marks[at])
    }

    pub(crate) fn marks(&self) -> &[Mark] {
        &self.marks
    }

    pub(crate) fn spacing(&self) -> (u64, u64) {
        (self.stride, self.since_last)
    }

    pub(crate) fn rebuild(marks: Vec<Mark>, (stride, since_last): (u64, u64)) -> Self {
        Self { marks, stride: stride.max(1), since_last }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_stays_small_and_never_points_past_what_is_sought() {
        let mut index = SparseIndex::default();
        let batches = 3 * MARKS_MAX as u64;
        for n in 0..batches {
            index.add(Mark { offset: Offset(1 + n * 10), committed_ms: 1_000 + n, index: LogIndex(n + 2) }, STRIDE);
        }
        assert!(index.marks().len() <= MARKS_MAX);
        for n in (0..batches).step_by(97) {
            let mark = index.at_or_before(Offset(1 + n * 10 + 3)).unwrap();
            assert!(mark.offset <= Offset(1 + n * 10) && mark.index <= LogIndex(n + 2), "{n}");
            assert!(LogIndex(n + 2).0 - mark.index.0 < 8, "reading forward stays short");
            let mark = index.before_time(1_000 + n).unwrap();
            assert!(mark.index <= LogIndex(n + 2));
        }
        assert_eq!(SparseIndex::default().at_or_before(Offset(5)), None);
    }
}
