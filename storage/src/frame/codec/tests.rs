use ensign_proto::{LogIndex, Term};

use super::*;

fn entry(index: u64, size: usize) -> Entry {
    Entry { id: EntryId { term: Term(3), index: LogIndex(index) }, payload: Bytes::from(vec![index as u8; size]) }
}

#[test]
fn pieces_add_up_and_fill_their_pages() {
    for len in (1..20_000).step_by(7).chain([65_536, 824_000, 1_048_576, 5_300_000, 16_000_001]) {
        for order in [MAX_ORDER, SMALL_ORDER] {
            let all: Vec<usize> = pieces(len, order).collect();
            assert_eq!(all.iter().sum::<usize>(), len);
            let stored: u64 = all.iter().map(|piece| stored_len(*piece)).sum();
            assert!(stored as f64 <= len as f64 * 8.0 / 7.0 + 8.0 * 128.0, "{len} takes {stored}");
        }
    }
}

#[test]
fn entries_of_one_group_and_term_share_a_head() {
    let mut frame = FrameBuilder::default();
    frame.entry(Kind::Append, GroupId(16), &entry(1, 100));
    frame.entry(Kind::Append, GroupId(16), &entry(2, 10));
    frame.entry(Kind::Append, GroupId(16), &entry(4, 10));
    frame.record(Kind::Vote, GroupId(16), (0, 0), Some(&Bytes::from_static(b"vote")));
    frame.finish();
    let mut bytes = vec![0; frame.len()];
    let (first, second) = bytes.split_at_mut(61);
    frame.copy_to(first);
    frame.copy_to(second);
    let run = Head::decode(&bytes).unwrap();
    assert_eq!((run.kind, run.count, run.index, run.body), (Kind::Append, 2, 1, 126));
    assert_eq!(frame.places()[..2], [40, 148]);
    let next = &bytes[RECORD_HEAD + run.body as usize..];
    assert_eq!(Head::decode(next).unwrap().index, 4);
    let vote = &next[RECORD_HEAD + 18..];
    assert_eq!(Head::decode(vote).unwrap().kind, Kind::Vote);
    for bit in 0..vote.len() * 8 {
        let mut damaged = vote.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Head::decode(&damaged).is_err(), "bit {bit}");
    }
}

#[test]
fn a_chunk_head_is_bound_to_its_key() {
    let head = ChunkHead { sequence: 7, frame: 6, frame_len: 99, log_start: 2 };
    let mut bytes = [0; CHUNK_HEAD];
    head.encode(&mut bytes);
    assert_eq!(ChunkHead::decode(7, &bytes), Ok(head));
    assert!(ChunkHead::decode(8, &bytes).is_err());
    for bit in 0..44 * 8 {
        let mut damaged = bytes;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(ChunkHead::decode(7, &damaged).is_err(), "bit {bit}");
    }
}

/// Format 1, byte for byte. If this fails, every log on every disk has become unreadable: raise the version instead.
#[test]
fn the_first_format_is_what_it_was() {
    let body = Bytes::from_static(b"body");
    let mut frame = FrameBuilder::default();
    frame.entry(Kind::Append, GroupId(16), &entry(1, 3));
    frame.entry(Kind::Moved, GroupId(17), &entry(9, 0));
    frame.record(Kind::Vote, GroupId(16), (0, 0), Some(&body));
    frame.record(Kind::Committed, GroupId(16), (0, 0), None);
    frame.record(Kind::Truncate, GroupId(16), (0, 5), None);
    frame.record(Kind::Purge, GroupId(16), (3, 4), None);
    frame.record(Kind::Snapshot, GroupId(16), (100, 7), None);
    frame.record(Kind::Checkpoint, GroupId(16), (0, 0), Some(&body));
    frame.record(Kind::Remove, GroupId(16), (0, 0), None);
    frame.finish();
    let mut chunk = vec![0; CHUNK_HEAD + frame.len()];
    ChunkHead { sequence: 7, frame: 7, frame_len: frame.len() as u32, log_start: 2 }.encode(&mut chunk);
    frame.copy_to(&mut chunk[CHUNK_HEAD..]);
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    assert_eq!(
        hex(&chunk[..99]),
        "454e53460100000007000000000000000700000000000000830100000000000002000000000000002681410800000000018ea11a010000000b000000010000001000000000000000030000000000000001000000000000005725578803000000010101"
    );
    assert_eq!((chunk.len(), crc32c::crc32c(&chunk)), (435, 112_670_077));
}
