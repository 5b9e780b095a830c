//! What the disk holds: per group where each entry lies, and per frame how much of it is still needed.
//!
//! Both change only by [`Change`]s, in the order of the frames: the writer makes them after a commit, recovery while it
//! reads the frames again. So what a restart finds is what the writer believed, and one property test covers both.

use std::collections::VecDeque;

use bytes::Bytes;
use ensign_proto::{LogIndex, Term};

use crate::frame::codec::{ENTRY_HEAD, stored_len};
use crate::log::EntryId;

/// Where a stored entry (its own head, then the payload) or checkpoint (its record) begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// The chunk in which it begins; it may run on into the following ones of its frame.
    pub(crate) chunk: u64,
    pub(crate) term: u64,
    /// From the start of the chunk's piece.
    pub(crate) offset: u32,
    /// Of the payload.
    pub(crate) len: u32,
}

impl Place {
    fn bytes(self) -> u64 {
        u64::from(self.len) + ENTRY_HEAD as u64
    }
}

/// A stored snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) id: u64,
    pub(crate) len: u64,
}

/// One durable change of one group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Entry { index: u64, place: Place },
    Moved { index: u64, place: Place },
    Vote(Bytes),
    Committed(Option<Bytes>),
    Truncate(u64),
    Purge(EntryId),
    Snapshot(Blob),
    Checkpoint(Place),
    Remove,
}

/// What the disk holds of one group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Durable {
    /// Whether the database knows the group.
    pub(crate) exists: bool,
    pub(crate) vote: Option<Bytes>,
    pub(crate) committed: Option<Bytes>,
    pub(crate) purged: Option<EntryId>,
    /// The index of `places[0]`.
    pub(crate) first: u64,
    pub(crate) places: VecDeque<Place>,
    pub(crate) snapshot: Option<Blob>,
    pub(crate) checkpoint: Option<Place>,
}

impl Durable {
    /// The index after the last entry.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.places.len() as u64
    }

    pub(crate) fn place(&self, index: u64) -> Option<Place> {
        index.checked_sub(self.first).and_then(|at| self.places.get(at as usize)).copied()
    }

    /// The last entry, or the purge mark.
    pub(crate) fn last(&self) -> Option<EntryId> {
        let last = self.places.back().map(|place| EntryId { term: Term(place.term), index: LogIndex(self.end() - 1) });
        last.or(self.purged)
    }

    /// Makes the change. An error says how it contradicts what is held: the log was damaged.
    pub(crate) fn apply(&mut self, change: Change, census: &mut Census) -> Result<(), String> {
        self.exists = true;
        match change {
            Change::Entry { index, place } => {
                if self.places.is_empty() {
                    if self.purged.is_some_and(|purged| purged.index.0 + 1 != index) {
                        return Err(format!("index {index} follows the purge mark {:?}", self.purged));
                    }
                    self.first = index;
                } else if self.end() != index {
                    return Err(format!("index {index} follows {}", self.end() - 1));
                }
                self.places.push_back(place);
                census.add(place);
            }
            Change::Moved { index, place } => {
                let at = index.checked_sub(self.first).map(|at| at as usize);
                let held = at
                    .and_then(|at| self.places.get_mut(at))
                    .ok_or_else(|| format!("index {index} was moved, but is not held"))?;
                census.sub(*held);
                census.add(place);
                *held = place;
            }
            Change::Vote(vote) => self.vote = Some(vote),
            Change::Committed(committed) => self.committed = committed,
            Change::Truncate(from) => {
                while self.end() > from {
                    match self.places.pop_back() {
                        Some(place) => census.sub(place),
                        None => break,
                    }
                }
            }
            Change::Purge(through) => {
                self.purged = Some(through);
                while self.first <= through.index.0 {
                    match self.places.pop_front() {
                        Some(place) => census.sub(place),
                        None => break,
                    }
                    self.first += 1;
                }
            }
            Change::Snapshot(blob) => self.snapshot = Some(blob),
            Change::Checkpoint(place) => {
                self.drop_checkpoint(census);
                census.add(place);
                self.checkpoint = Some(place);
            }
            Change::Remove => {
                self.drop_checkpoint(census);
                for place in &self.places {
                    census.sub(*place);
                }
                *self = Self::default();
            }
        }
        Ok(())
    }

    fn drop_checkpoint(&mut self, census: &mut Census) {
        if let Some(old) = self.checkpoint.take() {
            census.sub(old);
        }
    }
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameInfo {
    /// The sequence of its first chunk.
    pub(crate) first: u64,
    pub(crate) chunks: u32,
    /// Bytes of records.
    pub(crate) len: u32,
    /// Bytes of entries and checkpoints that are still needed.
    pub(crate) live: u64,
}

/// Every frame of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Census {
    pub(crate) frames: VecDeque<FrameInfo>,
    /// Bytes of records in all frames.
    pub(crate) total: u64,
    pub(crate) live: u64,
    /// Bytes of file that the frames take.
    pub(crate) stored: u64,
}

impl Census {
    /// The sequence of the oldest chunk kept; `next` when there is none.
    pub(crate) fn log_start(&self, next: u64) -> u64 {
        self.frames.front().map_or(next, |frame| frame.first)
    }

    pub(crate) fn push(&mut self, first: u64, len: u32, pieces: impl Iterator<Item = usize>) {
        let mut chunks = 0;
        for piece in pieces {
            chunks += 1;
            self.stored += stored_len(piece);
        }
        self.total += u64::from(len);
        self.frames.push_back(FrameInfo { first, chunks, len, live: 0 });
    }

    pub(crate) fn pop(&mut self) -> Option<FrameInfo> {
        let frame = self.frames.pop_front()?;
        // How a frame was cut is not kept: it is taken to be as dense as the others.
        let share = u128::from(self.stored) * u128::from(frame.len) / u128::from(self.total.max(1));
        self.stored -= share as u64;
        self.total -= u64::from(frame.len);
        Some(frame)
    }

    /// Takes back a frame that was popped, when its removal could not be committed.
    pub(crate) fn unpop(&mut self, frame: FrameInfo) {
        self.total += u64::from(frame.len);
        self.stored += u64::from(frame.len);
        self.frames.push_front(frame);
    }

    fn add(&mut self, place: Place) {
        self.live += place.bytes();
        if let Some(frame) = self.frame(place.chunk) {
            frame.live += place.bytes();
        }
    }

    fn sub(&mut self, place: Place) {
        self.live = self.live.saturating_sub(place.bytes());
        if let Some(frame) = self.frame(place.chunk) {
            frame.live = frame.live.saturating_sub(place.bytes());
        }
    }

    /// Counts a place that a loaded index names.
    pub(crate) fn count(&mut self, place: Place) {
        self.add(place);
    }

    fn frame(&mut self, chunk: u64) -> Option<&mut FrameInfo> {
        let after = self.frames.partition_point(|frame| frame.first <= chunk);
        after.checked_sub(1).and_then(|at| self.frames.get_mut(at))
    }

    /// How many of the oldest frames nobody needs any more, of those that end before `covered`.
    pub(crate) fn dead_prefix(&self, covered: u64, limit: usize) -> usize {
        let dead = |frame: &&FrameInfo| frame.live == 0 && frame.first + u64::from(frame.chunks) <= covered;
        self.frames.iter().take(limit).take_while(dead).count()
    }

    /// Dead bytes from the frame `front` on, before which all is dead.
    pub(crate) fn pinned(&self, front: u64) -> u64 {
        let ahead: u64 =
            self.frames.iter().take_while(|frame| frame.first < front).map(|frame| u64::from(frame.len)).sum();
        self.total.saturating_sub(self.live + ahead)
    }

    /// Bytes of file taken by frames.
    pub(crate) fn stored(&self) -> u64 {
        self.stored.max(self.total)
    }
}
