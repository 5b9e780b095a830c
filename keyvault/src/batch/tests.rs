use ensign_proto::{
    Algorithm, ClusterId, DekId, Link, Offset, Partition, ProducerRow, ProjectId, Rlid, SessionId, Term, TopicId,
};
use proptest::prelude::*;

use super::*;
use crate::arena::Arena;

fn ctx() -> PartitionContext {
    PartitionContext {
        cluster: ClusterId::from_bytes([1; 16]),
        project: ProjectId::from_bytes([2; 16]),
        topic: TopicId::from_bytes([3; 16]),
        partition: Partition(0),
    }
}

fn header(rows: usize) -> BatchHeader {
    BatchHeader {
        algorithm: Algorithm::Aes256Gcm,
        count: rows.max(1) as u32,
        term: Term(1),
        base_offset: Offset(1),
        first_id: Rlid::new(1, 1),
        last_id: Rlid::new(1, rows.max(1) as u32),
        dek: DekId::from_bytes([4; 16]),
        prev: Link([5; 32]),
        producers: vec![
            ProducerRow { session: SessionId::from_bytes([6; 16]), epoch: 0, first_sequence: 1, count: 1 };
            rows
        ],
        types: Vec::new(),
        fingerprints: Vec::new(),
    }
}

fn key(byte: u8) -> KeySlot {
    let slot = Arena::new(1).take().unwrap();
    slot.fill::<()>(|key| {
        key.fill(byte);
        Ok(())
    })
    .unwrap();
    slot
}

fn plain(blocks: &[u8]) -> PlainBatch {
    let mut plain = PlainBatch::with_capacity(blocks.len());
    plain.append(blocks).unwrap();
    plain
}

fn open(key: &KeySlot, ctx: &PartitionContext, bytes: &Bytes) -> Result<Vec<u8>, OpenError> {
    let sealed = SealedBytes::parse(bytes.clone()).map_err(|_| OpenError)?;
    open_batch(key, ctx, &sealed).unwrap().map(|plain| plain.blocks().to_vec())
}

#[test]
fn a_batch_is_sealed_where_it_lies() {
    let plain = plain(&[7; 1000]);
    let at = plain.buffer.as_ptr() as usize + plain.start;
    let sealed = seal_batch(&key(1), &ctx(), &header(1), plain, &Entropy::kernel()).unwrap();
    assert_eq!(sealed.parts().ciphertext().as_ptr() as usize, at, "nothing is copied");
    assert_eq!(sealed.bytes().len(), header(1).encoded_len() + SealedBytes::OVERHEAD + PREFIX + 1000);
    assert_eq!(open(&key(1), &ctx(), sealed.bytes()).unwrap(), [7; 1000]);
}

#[test]
fn a_header_longer_than_the_head_room_costs_a_copy_and_nothing_else() {
    let sealed = seal_batch(&key(1), &ctx(), &header(200), plain(b"event"), &Entropy::kernel()).unwrap();
    assert!(header(200).encoded_len() > HEAD_ROOM);
    assert_eq!(open(&key(1), &ctx(), sealed.bytes()).unwrap(), b"event");
}

#[test]
fn a_sealed_batch_is_proposed_and_kept_without_a_copy_or_room_to_spare() {
    for (blocks, rows) in [(10, 1), (256 << 10, 1), (256 << 10, 200)] {
        let sealed = seal_batch(&key(1), &ctx(), &header(rows), plain(&vec![7; blocks]), &Entropy::kernel()).unwrap();
        let (at, len) = (sealed.bytes().as_ptr(), sealed.bytes().len());
        let mut entry = sealed.into_bytes().try_into_mut().expect("nobody else holds its bytes");
        // A log keeps the buffer in memory, so what is left over is paid for as long.
        assert_eq!(entry.capacity() - len, ensign_raft::PROPOSAL_ROOM);
        entry.extend_from_slice(&[0; ensign_raft::PROPOSAL_ROOM]);
        assert_eq!(entry.as_ptr(), at, "nothing is copied");
    }
}

#[test]
fn every_bit_of_a_batch_and_of_its_place_counts() {
    let sealed = seal_batch(&key(1), &ctx(), &header(1), plain(b"event"), &Entropy::kernel()).unwrap();
    let bytes = sealed.bytes();
    for bit in 0..bytes.len() * 8 {
        let mut wrong = bytes.to_vec();
        wrong[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(open(&key(1), &ctx(), &wrong.into()), Err(OpenError), "bit {bit}");
    }
    for place in [
        PartitionContext { cluster: ClusterId::from_bytes([0; 16]), ..ctx() },
        PartitionContext { project: ProjectId::from_bytes([0; 16]), ..ctx() },
        PartitionContext { topic: TopicId::from_bytes([0; 16]), ..ctx() },
        PartitionContext { partition: Partition(1), ..ctx() },
    ] {
        assert_eq!(open(&key(1), &place, bytes), Err(OpenError), "{place:?}");
    }
    assert_eq!(open(&key(2), &ctx(), bytes), Err(OpenError));
}

#[test]
fn a_payload_that_lies_about_its_length_is_refused() {
    for payload in [&[][..], &[0, 0, 0], &[0, 0, 0, 0, 2, 1], &[1, 0, 0, 0, 1, 1], &[0, 0xff, 0, 0, 0, 1]] {
        assert_eq!(PlainBatch::from_payload(payload.to_vec()).map(|_| ()), Err(OpenError), "{payload:?}");
    }
    let padded = PlainBatch::from_payload(vec![0, 0, 0, 0, 2, 8, 9, 0, 0, 0]).unwrap();
    assert_eq!(padded.blocks(), [8, 9]);
}

#[test]
fn a_batch_has_an_end() {
    let mut plain = PlainBatch::with_capacity(0);
    plain.append_with(RAW_BYTES_MAX, |_| ()).unwrap();
    assert_eq!(plain.append(&[1]), Err(BatchFull));
    assert_eq!(plain.blocks().len(), RAW_BYTES_MAX);
}

#[test]
fn a_batch_tells_its_size_and_nothing_else() {
    assert_eq!(format!("{:?}", plain(b"secret")), "PlainBatch { bytes: 11, .. }");
    assert_eq!(plain(b"secret").into_bytes(), Bytes::from_static(b"secret"));
}

proptest! {
    #[test]
    fn what_is_sealed_opens_to_itself(
        pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..500), 0..20), capacity in 0..200_usize,
        rows in 0..100_usize,
    ) {
        let mut plain = PlainBatch::with_capacity(capacity);
        for piece in &pieces {
            plain.append(piece).unwrap();
        }
        prop_assert_eq!(plain.blocks(), pieces.concat());
        let sealed = seal_batch(&key(1), &ctx(), &header(rows), plain, &Entropy::kernel()).unwrap();
        prop_assert_eq!(sealed.header(), &header(rows));
        prop_assert_eq!(open(&key(1), &ctx(), sealed.bytes()).unwrap(), pieces.concat());
    }
}
