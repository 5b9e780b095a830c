//! The blocks of a batch: columns, so that building them copies each event once and delivering it copies it once more.
//!
//! ```text
//! version u8 = 1 | publishers u16, each: length u32, encoded Publisher | runs u32, each: publisher u16, count u32
//!   | lengths: u32 per event, top bit = "carries no event bytes" | bodies: per event the EventWrapper fields of its publisher
//! ```
//!
//! Big-endian. Id, topic, offset, epoch and commit time of an event follow from the batch's header and place; they are not stored,
//! but spliced around the body when it is delivered. Neither way decodes an event.

use std::ops::Range;

use bytes::{BufMut, Bytes};
use ensign_proto::{Offset, Rlid, Term, TopicId};
use prost::encoding::{encode_varint, encoded_len_varint};
use thiserror::Error;

const VERSION: u8 = 1;

/// Marks a length whose event carries no event bytes: stored and counted, and never delivered, since clients choke on it.
const EMPTY: u32 = 1 << 31;

/// An opened batch whose plaintext does not read as a block. The seal was good, so this is our bug or a newer version.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the plaintext of a batch is malformed: {0}")]
pub struct MalformedBlock(&'static str);

/// Length and emptiness of one body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyShape(u32);

impl BodyShape {
    /// A body of `length` bytes; `has_event` says whether it carries event bytes.
    pub fn new(length: u32, has_event: bool) -> Self {
        debug_assert!(length < EMPTY, "an event is at most a few megabytes");
        Self(if has_event { length } else { length | EMPTY })
    }

    /// As it is stored and forwarded.
    pub fn to_wire(self) -> u32 {
        self.0
    }

    /// What [`BodyShape::to_wire`] gave.
    pub fn from_wire(value: u32) -> Self {
        Self(value)
    }

    /// Bytes of the body.
    pub fn length(self) -> usize {
        (self.0 & !EMPTY) as usize
    }

    /// Whether the body carries event bytes.
    pub fn has_event(self) -> bool {
        self.0 & EMPTY == 0
    }
}

/// Consecutive bodies of one publisher, on their way into a block.
#[derive(Debug, Clone)]
pub(super) struct BlockRun<'a> {
    pub(super) publisher: &'a Bytes,
    pub(super) shapes: &'a [BodyShape],
    pub(super) bodies: &'a [u8],
}

/// The publishers of a block, each once, and for each run which one it is of.
fn publishers<'a>(runs: &[BlockRun<'a>]) -> (Vec<&'a Bytes>, Vec<u16>) {
    let mut distinct: Vec<&Bytes> = Vec::new();
    let of_run = runs.iter().map(|run| {
        let known = distinct.iter().position(|publisher| *publisher == run.publisher);
        known.unwrap_or_else(|| {
            distinct.push(run.publisher);
            distinct.len() - 1
        }) as u16
    });
    let of_run = of_run.collect();
    (distinct, of_run)
}

/// How many bytes a block of these runs takes.
pub(super) fn encoded_len(runs: &[BlockRun<'_>]) -> usize {
    let (distinct, _) = publishers(runs);
    let events: usize = runs.iter().map(|run| run.shapes.len()).sum();
    let bodies: usize = runs.iter().map(|run| run.bodies.len()).sum();
    let table: usize = distinct.iter().map(|publisher| 4 + publisher.len()).sum();
    1 + 2 + table + 4 + runs.len() * 6 + events * 4 + bodies
}

/// Writes a block.
pub(super) fn encode(runs: &[BlockRun<'_>], out: &mut impl BufMut) {
    let (distinct, of_run) = publishers(runs);
    out.put_u8(VERSION);
    out.put_u16(distinct.len() as u16);
    for publisher in distinct {
        out.put_u32(publisher.len() as u32);
        out.put_slice(publisher);
    }
    out.put_u32(runs.len() as u32);
    for (run, publisher) in runs.iter().zip(of_run) {
        out.put_u16(publisher);
        out.put_u32(run.shapes.len() as u32);
    }
    for run in runs {
        for shape in run.shapes {
            out.put_u32(shape.to_wire());
        }
    }
    for run in runs {
        out.put_slice(run.bodies);
    }
}

/// Where things are in a block, checked once; the bytes stay with their owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockMap {
    publishers: Vec<Range<usize>>,
    /// Publisher and the event after the run's last one.
    runs: Vec<(u16, u32)>,
    lengths: usize,
    bodies: usize,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], MalformedBlock> {
        let piece = self.bytes.get(self.at..self.at + N).ok_or(MalformedBlock("cut short"))?;
        self.at += N;
        piece.try_into().map_err(|_| MalformedBlock("cut short"))
    }

    fn u16(&mut self) -> Result<u16, MalformedBlock> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, MalformedBlock> {
        self.take().map(u32::from_be_bytes)
    }

    fn skip(&mut self, length: usize) -> Result<Range<usize>, MalformedBlock> {
        let range = self.at..self.at.checked_add(length).ok_or(MalformedBlock("cut short"))?;
        self.bytes.get(range.clone()).ok_or(MalformedBlock("cut short"))?;
        self.at = range.end;
        Ok(range)
    }
}

impl BlockMap {
    /// Reads the columns of a block of `count` events.
    pub(super) fn read(block: &[u8], count: u32) -> Result<Self, MalformedBlock> {
        let mut reader = Reader { bytes: block, at: 0 };
        if reader.take::<1>()? != [VERSION] {
            return Err(MalformedBlock("unknown version"));
        }
        let publishers = reader.u16()?;
        let publishers: Result<Vec<_>, _> = (0..publishers)
            .map(|_| {
                let length = reader.u32()? as usize;
                reader.skip(length)
            })
            .collect();
        let publishers = publishers?;
        let run_count = reader.u32()?;
        if run_count > count {
            return Err(MalformedBlock("more runs than events"));
        }
        let mut runs = Vec::with_capacity(run_count as usize);
        let mut end = 0_u32;
        for _ in 0..run_count {
            let publisher = reader.u16()?;
            end = end.checked_add(reader.u32()?).ok_or(MalformedBlock("too many events"))?;
            if usize::from(publisher) >= publishers.len() {
                return Err(MalformedBlock("an unknown publisher"));
            }
            runs.push((publisher, end));
        }
        if end != count {
            return Err(MalformedBlock("runs and header count differently"));
        }
        let lengths = reader.skip(count as usize * 4)?;
        let bodies = reader.at;
        let total: usize = block[lengths.clone()].chunks_exact(4).map(|chunk| shape(chunk).length()).sum();
        if total != block.len() - bodies {
            return Err(MalformedBlock("lengths and bodies differ"));
        }
        Ok(Self { publishers, runs, lengths: lengths.start, bodies })
    }

    /// A cursor at the first event.
    pub(super) fn start(&self) -> BlockCursor {
        BlockCursor { event: 0, run: 0, body: self.bodies }
    }
}

fn shape(chunk: &[u8]) -> BodyShape {
    BodyShape(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]))
}

/// A place in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockCursor {
    event: u32,
    run: usize,
    body: usize,
}

/// One event of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StoredEvent<'a> {
    /// Its number within the batch, from 0.
    pub(super) ordinal: u32,
    pub(super) publisher: &'a [u8],
    pub(super) body: &'a [u8],
    pub(super) has_event: bool,
}

impl BlockCursor {
    /// The next event; none after the last.
    pub(super) fn next<'a>(&mut self, map: &BlockMap, block: &'a [u8]) -> Option<StoredEvent<'a>> {
        let mut run = map.runs.get(self.run)?;
        while self.event >= run.1 {
            self.run += 1;
            run = map.runs.get(self.run)?;
        }
        let at = map.lengths + self.event as usize * 4;
        let shape = shape(block.get(at..at + 4)?);
        let body = block.get(self.body..self.body + shape.length())?;
        let publisher = block.get(map.publishers.get(usize::from(run.0))?.clone())?;
        let ordinal = self.event;
        self.event += 1;
        self.body += shape.length();
        Some(StoredEvent { ordinal, publisher, body, has_event: shape.has_event() })
    }
}

/// What all events of a batch share when they are delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// The topic.
    pub topic: TopicId,
    /// The leader epoch of the batch.
    pub term: Term,
    /// The offset of the batch's first event.
    pub base: Offset,
    /// The id of the batch's first event; its milliseconds are the commit time.
    pub first_rlid: Rlid,
}

impl Envelope {
    /// When the batch was committed.
    pub fn committed_ms(&self) -> u64 {
        self.first_rlid.unix_ms()
    }

    fn committed_len(&self) -> usize {
        let (seconds, nanos) = timestamp(self.committed_ms());
        field_len(seconds) + field_len(nanos)
    }

    /// The size of an event as it is delivered: its encoded `EventWrapper`.
    pub(super) fn wrapper_len(&self, ordinal: u32, publisher_len: usize, body_len: usize) -> usize {
        let offset = self.base.0 + u64::from(ordinal);
        let committed = self.committed_len();
        12 + 18
            + field_len(offset)
            + field_len(self.term.0)
            + 1
            + encoded_len_varint(publisher_len as u64)
            + publisher_len
            + body_len
            + 1
            + encoded_len_varint(committed as u64)
            + committed
    }

    /// Writes an event as it is delivered.
    pub(super) fn write_wrapper(&self, event: &StoredEvent<'_>, out: &mut impl BufMut) {
        out.put_slice(&[0x0a, 10]);
        out.put_slice(self.first_rlid.plus(u64::from(event.ordinal)).as_bytes());
        out.put_slice(&[0x12, 16]);
        out.put_slice(self.topic.as_bytes());
        put_field(0x18, self.base.0 + u64::from(event.ordinal), out);
        put_field(0x20, self.term.0, out);
        out.put_u8(0x32);
        encode_varint(event.publisher.len() as u64, out);
        out.put_slice(event.publisher);
        out.put_slice(event.body);
        out.put_u8(0x7a);
        encode_varint(self.committed_len() as u64, out);
        let (seconds, nanos) = timestamp(self.committed_ms());
        put_field(0x08, seconds, out);
        put_field(0x10, nanos, out);
    }
}

/// Seconds and nanoseconds of a `google.protobuf.Timestamp`.
fn timestamp(ms: u64) -> (u64, u64) {
    (ms / 1000, ms % 1000 * 1_000_000)
}

/// A varint field with a one-byte tag; absent when zero, as proto3 has it.
fn put_field(tag: u8, value: u64, out: &mut impl BufMut) {
    if value != 0 {
        out.put_u8(tag);
        encode_varint(value, out);
    }
}

fn field_len(value: u64) -> usize {
    if value == 0 { 0 } else { 1 + encoded_len_varint(value) }
}

#[cfg(test)]
mod tests {
    use ensign_proto::pb::ensign::v1beta1 as api;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn publisher(name: &str) -> Bytes {
        api::Publisher { publisher_id: name.to_owned(), ..api::Publisher::default() }.encode_to_vec().into()
    }

    fn body(event: &[u8]) -> Vec<u8> {
        api::EventWrapper { event: Bytes::copy_from_slice(event), ..api::EventWrapper::default() }.encode_to_vec()
    }

    type Run = (Bytes, Vec<BodyShape>, Vec<u8>);

    fn block(runs: &[Run]) -> Vec<u8> {
        let runs: Vec<_> =
            runs.iter().map(|(publisher, shapes, bodies)| BlockRun { publisher, shapes, bodies }).collect();
        let mut out = Vec::new();
        encode(&runs, &mut out);
        assert_eq!(out.len(), encoded_len(&runs));
        out
    }

    fn run(name: &str, events: &[Vec<u8>]) -> Run {
        let bodies: Vec<_> = events.iter().map(|event| body(event)).collect();
        let shape = |body: &Vec<u8>| BodyShape::new(body.len() as u32, !body.is_empty());
        (publisher(name), bodies.iter().map(shape).collect(), bodies.concat())
    }

    #[test]
    fn a_delivered_event_decodes_to_everything_a_subscriber_expects() {
        let runs = [run("a", &[b"one".to_vec()]), run("b", &[b"two".to_vec(), vec![]]), run("a", &[b"four".to_vec()])];
        let block = block(&runs);
        let map = BlockMap::read(&block, 4).unwrap();
        assert_eq!(map.publishers.len(), 2, "a publisher is stored once");
        let envelope = Envelope {
            topic: TopicId::from_bytes([7; 16]),
            term: Term(3),
            base: Offset(100),
            first_rlid: Rlid::new(1_700_000_000_123, 5),
        };
        let mut cursor = map.start();
        let mut seen = Vec::new();
        while let Some(event) = cursor.next(&map, &block) {
            let mut out = Vec::new();
            envelope.write_wrapper(&event, &mut out);
            assert_eq!(out.len(), envelope.wrapper_len(event.ordinal, event.publisher.len(), event.body.len()));
            seen.push((event.has_event, api::EventWrapper::decode(&out[..]).unwrap()));
        }
        assert_eq!(seen.iter().map(|(has_event, _)| *has_event).collect::<Vec<_>>(), [true, true, false, true]);
        let last = &seen[3].1;
        let expected = api::EventWrapper {
            id: Bytes::copy_from_slice(Rlid::new(1_700_000_000_123, 8).as_bytes()),
            topic_id: Bytes::copy_from_slice(&[7; 16]),
            offset: 103,
            epoch: 3,
            publisher: Some(api::Publisher { publisher_id: "a".to_owned(), ..api::Publisher::default() }),
            event: Bytes::from_static(b"four"),
            committed: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 123_000_000 }),
            ..api::EventWrapper::default()
        };
        assert_eq!(last, &expected);
    }

    #[test]
    fn a_block_of_another_version_or_count_is_refused() {
        let mut bytes = block(&[run("a", &[b"one".to_vec()])]);
        assert_eq!(BlockMap::read(&bytes, 2), Err(MalformedBlock("runs and header count differently")));
        bytes[0] = 9;
        assert_eq!(BlockMap::read(&bytes, 1), Err(MalformedBlock("unknown version")));
    }

    proptest! {
        #[test]
        fn no_damage_makes_a_block_panic(
            events in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..10),
            cut in 0_usize..400,
            flip in (0_usize..400, any::<u8>()),
        ) {
            let whole = block(&[run("a", &events)]);
            let count = events.len() as u32;
            prop_assert!(BlockMap::read(&whole, count).is_ok());
            prop_assert!(BlockMap::read(&whole[..cut.min(whole.len() - 1)], count).is_err());
            let mut flipped = whole.clone();
            let at = flip.0 % flipped.len();
            flipped[at] ^= flip.1;
            if let Ok(map) = BlockMap::read(&flipped, count) {
                let mut cursor = map.start();
                while cursor.next(&map, &flipped).is_some() {}
            }
        }
    }
}
