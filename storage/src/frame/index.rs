//! The index as one blob: what every frame before `covered` says, so that a start reads only the frames after it.
//!
//! ```text
//! version u8 ‖ covered ‖ next_blob ‖ #frames ‖ (first, chunks, len)… ‖ #groups ‖ group…
//! group = id ‖ flags u8 ‖ vote? ‖ committed? ‖ purged? ‖ snapshot? ‖ checkpoint? ‖ first ‖ #places ‖ place…
//! ```
//!
//! Numbers are LEB128, and differences from the one before where that is shorter. Its CRC is the blob's.

use std::collections::BTreeMap;

use bytes::Bytes;
use ensign_proto::{GroupId, LogIndex, Term};

use crate::frame::state::{Blob, Census, Durable, FrameInfo, Place};
use crate::log::EntryId;

const VERSION: u8 = 1;
const VOTE: u8 = 1;
const COMMITTED: u8 = 2;
const PURGED: u8 = 4;
const SNAPSHOT: u8 = 8;
const CHECKPOINT: u8 = 16;

/// What an index says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Index {
    /// The sequence of the first chunk that it does not know.
    pub(crate) covered: u64,
    pub(crate) next_blob: u64,
    pub(crate) census: Census,
    pub(crate) groups: BTreeMap<GroupId, Durable>,
}

/// Fills an index blob, group by group.
pub(crate) struct Encoder {
    out: Vec<u8>,
    groups: Vec<u8>,
    count: u64,
}

impl Encoder {
    pub(crate) fn new(covered: u64, next_blob: u64, census: &Census) -> Self {
        let mut out = vec![VERSION];
        for number in [covered, next_blob, census.stored, census.frames.len() as u64] {
            put(&mut out, number);
        }
        let mut expected = 0;
        for frame in &census.frames {
            put(&mut out, frame.first - expected);
            put(&mut out, u64::from(frame.chunks));
            put(&mut out, u64::from(frame.len));
            expected = frame.first + u64::from(frame.chunks);
        }
        Self { out, groups: Vec::new(), count: 0 }
    }

    pub(crate) fn group(&mut self, id: GroupId, group: &Durable) {
        self.count += 1;
        let out = &mut self.groups;
        put(out, id.0);
        let flag = |there: bool, flag: u8| if there { flag } else { 0 };
        out.push(
            flag(group.vote.is_some(), VOTE)
                | flag(group.committed.is_some(), COMMITTED)
                | flag(group.purged.is_some(), PURGED)
                | flag(group.snapshot.is_some(), SNAPSHOT)
                | flag(group.checkpoint.is_some(), CHECKPOINT),
        );
        for bytes in [&group.vote, &group.committed].into_iter().flatten() {
            put(out, bytes.len() as u64);
            out.extend_from_slice(bytes);
        }
        if let Some(purged) = group.purged {
            put(out, purged.term.0);
            put(out, purged.index.0);
        }
        if let Some(blob) = group.snapshot {
            put(out, blob.id);
            put(out, blob.len);
        }
        let mut last = Place { chunk: 0, term: 0, offset: 0, len: 0 };
        if let Some(place) = group.checkpoint {
            put_place(out, place, last);
        }
        put(out, group.first);
        put(out, group.places.len() as u64);
        for place in &group.places {
            put_place(out, *place, last);
            last = *place;
        }
    }

    pub(crate) fn finish(mut self) -> Bytes {
        put(&mut self.out, self.count);
        self.out.append(&mut self.groups);
        self.out.into()
    }
}

/// Reads an index blob.
pub(crate) fn decode(bytes: &[u8]) -> Result<Index, &'static str> {
    let mut from = Decoder { bytes };
    if from.byte()? != VERSION {
        return Err("the index is of a newer format");
    }
    let (covered, next_blob, stored) = (from.number()?, from.number()?, from.number()?);
    let mut index = Index { covered, next_blob, ..Index::default() };
    let mut expected = 0_u64;
    for _ in 0..from.number()? {
        let first = expected.checked_add(from.number()?).ok_or(BAD)?;
        let chunks = u32::try_from(from.number()?).map_err(|_| BAD)?;
        let len = u32::try_from(from.number()?).map_err(|_| BAD)?;
        index.census.frames.push_back(FrameInfo { first, chunks, len, live: 0 });
        index.census.total += u64::from(len);
        expected = first.checked_add(u64::from(chunks)).ok_or(BAD)?;
    }
    index.census.stored = stored;
    for _ in 0..from.number()? {
        let id = GroupId(from.number()?);
        let flags = from.byte()?;
        let mut group = Durable { exists: true, ..Durable::default() };
        if flags & VOTE != 0 {
            group.vote = Some(from.bytes()?);
        }
        if flags & COMMITTED != 0 {
            group.committed = Some(from.bytes()?);
        }
        if flags & PURGED != 0 {
            group.purged = Some(EntryId { term: Term(from.number()?), index: LogIndex(from.number()?) });
        }
        if flags & SNAPSHOT != 0 {
            group.snapshot = Some(Blob { id: from.number()?, len: from.number()? });
        }
        let mut last = Place { chunk: 0, term: 0, offset: 0, len: 0 };
        if flags & CHECKPOINT != 0 {
            let place = from.place(last)?;
            index.census.count(place);
            group.checkpoint = Some(place);
        }
        group.first = from.number()?;
        for _ in 0..from.number()? {
            last = from.place(last)?;
            index.census.count(last);
            group.places.push_back(last);
        }
        index.groups.insert(id, group);
    }
    if from.bytes.is_empty() { Ok(index) } else { Err(BAD) }
}

const BAD: &str = "the index does not decode";

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Differences may be negative: the sign goes to the lowest bit.
fn zigzag(number: i64) -> u64 {
    ((number << 1) ^ (number >> 63)) as u64
}

fn put_place(out: &mut Vec<u8>, place: Place, last: Place) {
    put(out, zigzag(place.chunk.wrapping_sub(last.chunk).cast_signed()));
    put(out, zigzag(place.term.wrapping_sub(last.term).cast_signed()));
    let end = if place.chunk == last.chunk { last.offset.wrapping_add(last.len) } else { 0 };
    put(out, zigzag(i64::from(place.offset) - i64::from(end)));
    put(out, u64::from(place.len));
}

struct Decoder<'a> {
    bytes: &'a [u8],
}

impl Decoder<'_> {
    fn byte(&mut self) -> Result<u8, &'static str> {
        let (first, rest) = self.bytes.split_first().ok_or(BAD)?;
        self.bytes = rest;
        Ok(*first)
    }

    fn number(&mut self) -> Result<u64, &'static str> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(BAD)
    }

    fn signed(&mut self) -> Result<i64, &'static str> {
        let number = self.number()?;
        Ok((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }

    fn bytes(&mut self) -> Result<Bytes, &'static str> {
        let len = self.number()? as usize;
        let (now, rest) = self.bytes.split_at_checked(len).ok_or(BAD)?;
        self.bytes = rest;
        Ok(Bytes::copy_from_slice(now))
    }

    fn place(&mut self, last: Place) -> Result<Place, &'static str> {
        let chunk = last.chunk.wrapping_add(self.signed()? as u64);
        let term = last.term.wrapping_add(self.signed()? as u64);
        let end = if chunk == last.chunk { last.offset.wrapping_add(last.len) } else { 0 };
        let offset = u32::try_from(i64::from(end).checked_add(self.signed()?).ok_or(BAD)?).map_err(|_| BAD)?;
        let len = u32::try_from(self.number()?).map_err(|_| BAD)?;
        Ok(Place { chunk, term, offset, len })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place() -> impl Strategy<Value = Place> {
        (0_u64..50, any::<u64>(), any::<u32>(), any::<u32>()).prop_map(|(chunk, term, offset, len)| Place {
            chunk,
            term,
            offset,
            len,
        })
    }

    fn durable() -> impl Strategy<Value = Durable> {
        let bytes = || proptest::option::of(proptest::collection::vec(any::<u8>(), 0..9).prop_map(Bytes::from));
        let id = proptest::option::of((any::<u64>(), any::<u64>()))
            .prop_map(|id| id.map(|(term, index)| EntryId { term: Term(term), index: LogIndex(index) }));
        let blob =
            proptest::option::of((any::<u64>(), any::<u64>())).prop_map(|blob| blob.map(|(id, len)| Blob { id, len }));
        let places = proptest::collection::vec(place(), 0..20);
        (bytes(), bytes(), id, blob, proptest::option::of(place()), any::<u64>(), places).prop_map(
            |(vote, committed, purged, snapshot, checkpoint, first, places)| Durable {
                exists: true,
                vote,
                committed,
                purged,
                first,
                places: places.into(),
                snapshot,
                checkpoint,
            },
        )
    }

    proptest! {
        #[test]
        fn an_index_comes_back_and_no_truncation_of_it_does(
            groups in proptest::collection::btree_map(any::<u64>().prop_map(GroupId), durable(), 0..5),
            lens in proptest::collection::vec((1_u32..4, 1_u32..1_000_000), 0..10),
        ) {
            let mut census = Census::default();
            let mut next = 3;
            for (chunks, len) in lens {
                census.push(next, len, (0..chunks).map(|_| 1000));
                next += u64::from(chunks);
            }
            let mut encoder = Encoder::new(next, 7, &census);
            for (id, group) in &groups {
                encoder.group(*id, group);
                for place in group.checkpoint.iter().chain(&group.places) {
                    census.count(*place);
                }
            }
            let bytes = encoder.finish();
            let expected = Index { covered: next, next_blob: 7, census, groups };
            prop_assert_eq!(decode(&bytes), Ok(expected));
            for len in 0..bytes.len() {
                prop_assert!(decode(&bytes[..len]).is_err());
            }
        }
    }
}
