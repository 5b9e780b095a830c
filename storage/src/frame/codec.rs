//! The bytes of a frame: records, each with its CRC-32C, laid end to end and cut into chunks. See docs/format.md.
//!
//! ```text
//! chunk   = head(48) ‖ piece of the frame                 key: the chunk's sequence
//! frame   = record ‖ record ‖ …                           one commit
//! record  = head(40) ‖ body
//! entries = (crc u32 ‖ len u32 ‖ payload) …               the body of an append: a run of one group and term
//! ```
//!
//! Numbers are little-endian. A chunk's head names its own sequence, so a page in the wrong place is noticed; an entry's
//! CRC covers its group, term, index and length, so the right bytes in the wrong place are noticed too.

#[cfg(test)]
mod tests;

use bytes::Bytes;
use ensign_proto::GroupId;

use crate::log::{Entry, EntryId};

/// The length of a chunk's head.
pub(crate) const CHUNK_HEAD: usize = 48;
/// The length of a record's head.
pub(crate) const RECORD_HEAD: usize = 40;
/// What precedes each entry's payload.
pub(crate) const ENTRY_HEAD: usize = 8;
/// redb stores key, offsets and head of a page beside a value: a value this much shorter than a run of pages fills it.
const PAGE_SLACK: usize = 64;
const PAGE: usize = 4096;
/// The largest chunk takes `PAGE << MAX_ORDER`.
pub(crate) const MAX_ORDER: u32 = 8;
/// Chunks while the disk is nearly full: room for a large one may not be found in one piece.
pub(crate) const SMALL_ORDER: u32 = 1;

const MAGIC: [u8; 4] = *b"ENSF";
const VERSION: u8 = 1;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// `count` entries from `index` on, of one term.
    Append = 1,
    /// The same entries again, from a frame that is to be removed.
    Moved = 2,
    /// The body is the vote.
    Vote = 3,
    /// The body is the committed mark; `count` is 0 when there is none.
    Committed = 4,
    /// Everything from `index` on is gone.
    Truncate = 5,
    /// Everything through `(term, index)` is gone.
    Purge = 6,
    /// The snapshot is blob `index`, of `term` bytes.
    Snapshot = 7,
    /// The body is the checkpoint.
    Checkpoint = 8,
    /// The group is gone.
    Remove = 9,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        use Kind::{Append, Checkpoint, Committed, Moved, Purge, Remove, Snapshot, Truncate, Vote};
        [Append, Moved, Vote, Committed, Truncate, Purge, Snapshot, Checkpoint, Remove]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// A record's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) body: u32,
    pub(crate) count: u32,
    pub(crate) group: GroupId,
    pub(crate) term: u64,
    pub(crate) index: u64,
}

impl Head {
    /// Writes the head; `body` joins the CRC unless its entries carry their own.
    fn encode(&self, body: &[u8], out: &mut [u8]) {
        out[..RECORD_HEAD].fill(0);
        out[4] = self.kind as u8;
        out[8..12].copy_from_slice(&self.body.to_le_bytes());
        out[12..16].copy_from_slice(&self.count.to_le_bytes());
        out[16..24].copy_from_slice(&self.group.0.to_le_bytes());
        out[24..32].copy_from_slice(&self.term.to_le_bytes());
        out[32..40].copy_from_slice(&self.index.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out[4..RECORD_HEAD]), body);
        out[..4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads the head at the start of `bytes` and checks it, with its body unless that is a run of entries.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let head = bytes.get(..RECORD_HEAD).ok_or("a record's head is cut short")?;
        let kind = Kind::of(head[4]).ok_or("a record of unknown kind")?;
        let body = u32_at(head, 8);
        let covered = match kind {
            Kind::Append | Kind::Moved => &[][..],
            _ => bytes.get(RECORD_HEAD..RECORD_HEAD + body as usize).ok_or("a record's body is cut short")?,
        };
        if crc32c::crc32c_append(crc32c::crc32c(&head[4..]), covered) != u32_at(head, 0) {
            return Err("a record fails its checksum");
        }
        let (count, group) = (u32_at(head, 12), GroupId(u64_at(head, 16)));
        Ok(Self { kind, body, count, group, term: u64_at(head, 24), index: u64_at(head, 32) })
    }
}

/// The CRC of an entry, which binds it to its place.
pub(crate) fn entry_crc(group: GroupId, id: EntryId, payload: &[u8]) -> u32 {
    let mut place = [0_u8; 28];
    place[..8].copy_from_slice(&group.0.to_le_bytes());
    place[8..16].copy_from_slice(&id.term.0.to_le_bytes());
    place[16..24].copy_from_slice(&id.index.0.to_le_bytes());
    place[24..].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c(&place), payload)
}

/// A chunk's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkHead {
    /// The chunk's own key.
    pub(crate) sequence: u64,
    /// The sequence of its frame's first chunk.
    pub(crate) frame: u64,
    /// Bytes of the whole frame, heads of chunks not counted.
    pub(crate) frame_len: u32,
    /// The oldest chunk that is kept, as of this commit.
    pub(crate) log_start: u64,
}

impl ChunkHead {
    pub(crate) fn encode(&self, out: &mut [u8]) {
        out[..CHUNK_HEAD].fill(0);
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        out[16..24].copy_from_slice(&self.frame.to_le_bytes());
        out[24..28].copy_from_slice(&self.frame_len.to_le_bytes());
        out[32..40].copy_from_slice(&self.log_start.to_le_bytes());
        let crc = crc32c::crc32c(&out[..40]);
        out[40..44].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads the head of the chunk stored under `sequence`.
    pub(crate) fn decode(sequence: u64, chunk: &[u8]) -> Result<Self, &'static str> {
        let head = chunk.get(..CHUNK_HEAD).ok_or("the chunk is cut short")?;
        if head[..4] != MAGIC || crc32c::crc32c(&head[..40]) != u32_at(head, 40) {
            return Err("the chunk's head fails its checksum");
        }
        if head[4] != VERSION {
            return Err("the chunk is of a newer format");
        }
        if u64_at(head, 8) != sequence {
            return Err("the chunk belongs elsewhere");
        }
        Ok(Self { sequence, frame: u64_at(head, 16), frame_len: u32_at(head, 24), log_start: u64_at(head, 32) })
    }
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Cuts `len` bytes into pieces that fill their pages once a head is put before each.
///
/// Storing a value takes the next power of two of pages, so one byte over costs double. Each piece fills at least 7/8 of
/// its pages, but for a last one that shares a page with its neighbours.
pub(crate) fn pieces(len: usize, max_order: u32) -> impl Iterator<Item = usize> {
    let mut left = len;
    std::iter::from_fn(move || {
        let caps = (0..=max_order).rev().map(|order| (PAGE << order) - PAGE_SLACK - CHUNK_HEAD);
        let piece = caps.into_iter().find(|cap| left >= cap / 8 * 7).map_or(left, |cap| left.min(cap));
        left -= piece;
        (piece > 0).then_some(piece)
    })
}

/// The bytes of file that a piece takes.
pub(crate) fn stored_len(piece: usize) -> u64 {
    let value = piece + CHUNK_HEAD + PAGE_SLACK;
    if value > PAGE * 7 / 8 { value.next_power_of_two() as u64 } else { value as u64 }
}

enum Part {
    /// A range of the arena.
    Own(usize, usize),
    Shared(Bytes),
}

struct Run {
    head_at: usize,
    head: Head,
}

/// A frame being filled. Payloads are not copied before [`FrameBuilder::copy_to`] puts them where redb wants them.
#[derive(Default)]
pub(crate) struct FrameBuilder {
    arena: Vec<u8>,
    parts: Vec<Part>,
    len: usize,
    records: usize,
    run: Option<Run>,
    /// Where each entry and each checkpoint's body begins, in the order added.
    places: Vec<u32>,
    read: (usize, usize),
}

impl FrameBuilder {
    pub(crate) fn clear(&mut self) {
        let (mut arena, mut parts, mut places) =
            (std::mem::take(&mut self.arena), std::mem::take(&mut self.parts), std::mem::take(&mut self.places));
        arena.clear();
        parts.clear();
        places.clear();
        *self = Self { arena, parts, places, ..Self::default() };
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Entries and other records so far.
    pub(crate) fn records(&self) -> usize {
        self.records
    }

    pub(crate) fn places(&self) -> &[u32] {
        &self.places
    }

    /// Adds an entry, to the run before it if it continues that one.
    pub(crate) fn entry(&mut self, kind: Kind, group: GroupId, entry: &Entry) {
        let (term, index) = (entry.id.term.0, entry.id.index.0);
        let continues = self.run.as_ref().is_some_and(|run| {
            let head = &run.head;
            head.kind == kind && head.group == group && head.term == term && head.index + u64::from(head.count) == index
        });
        if !continues {
            self.end_run();
            let head = Head { kind, body: 0, count: 0, group, term, index };
            self.run = Some(Run { head_at: self.arena.len(), head });
            self.own(&[0; RECORD_HEAD]);
        }
        if let Some(run) = &mut self.run {
            run.head.count += 1;
            run.head.body += (ENTRY_HEAD + entry.payload.len()) as u32;
        }
        self.places.push(self.len as u32);
        let mut head = [0_u8; ENTRY_HEAD];
        head[..4].copy_from_slice(&entry_crc(group, entry.id, &entry.payload).to_le_bytes());
        head[4..].copy_from_slice(&(entry.payload.len() as u32).to_le_bytes());
        self.own(&head);
        self.shared(entry.payload.clone());
        self.records += 1;
    }

    /// Adds any other record.
    pub(crate) fn record(&mut self, kind: Kind, group: GroupId, (term, index): (u64, u64), body: Option<&Bytes>) {
        self.end_run();
        let head = Head {
            kind,
            body: body.map_or(0, |body| body.len() as u32),
            count: u32::from(body.is_some()),
            group,
            term,
            index,
        };
        let mut bytes = [0_u8; RECORD_HEAD];
        head.encode(body.map_or(&[], |body| body), &mut bytes);
        self.own(&bytes);
        if kind == Kind::Checkpoint {
            self.places.push(self.len as u32 - RECORD_HEAD as u32);
        }
        if let Some(body) = body {
            self.shared(body.clone());
        }
        self.records += 1;
    }

    /// Ends the frame. Nothing may be added after it.
    pub(crate) fn finish(&mut self) {
        self.end_run();
    }

    fn end_run(&mut self) {
        if let Some(run) = self.run.take() {
            run.head.encode(&[], &mut self.arena[run.head_at..run.head_at + RECORD_HEAD]);
        }
    }

    fn own(&mut self, bytes: &[u8]) {
        let start = self.arena.len();
        self.arena.extend_from_slice(bytes);
        match self.parts.last_mut() {
            Some(Part::Own(_, end)) => *end = self.arena.len(),
            _ => self.parts.push(Part::Own(start, self.arena.len())),
        }
        self.len += bytes.len();
    }

    fn shared(&mut self, bytes: Bytes) {
        self.len += bytes.len();
        if bytes.len() < 64 {
            self.len -= bytes.len();
            self.own(&bytes);
        } else {
            self.parts.push(Part::Shared(bytes));
        }
    }

    /// Copies the next bytes of the frame into `out`, which they fill.
    pub(crate) fn copy_to(&mut self, out: &mut [u8]) {
        let mut out = out;
        while !out.is_empty() {
            let (part, skip) = self.read;
            let bytes: &[u8] = match &self.parts[part] {
                Part::Own(start, end) => &self.arena[*start..*end],
                Part::Shared(bytes) => bytes,
            };
            let take = (bytes.len() - skip).min(out.len());
            let (now, later) = out.split_at_mut(take);
            now.copy_from_slice(&bytes[skip..skip + take]);
            out = later;
            self.read = if skip + take == bytes.len() { (part + 1, 0) } else { (part, skip + take) };
        }
    }
}
