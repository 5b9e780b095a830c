use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{ClusterId, Partition, PartitionContext, ProjectId, SessionId, TopicId, genesis, link};

fn sample() -> BatchHeader {
    BatchHeader {
        algorithm: Algorithm::Aes256Gcm,
        count: 3,
        term: Term(7),
        base_offset: Offset(41),
        first_id: Rlid::new(1_700_000_000_000, 9),
        last_id: Rlid::new(1_700_000_000_000, 11),
        dek: DekId::from_bytes([0xd0; 16]),
        prev: Link([0xee; 32]),
        producers: vec![ProducerRow {
            session: SessionId::from_bytes([5; 16]),
            epoch: 1,
            first_sequence: 100,
            count: 2,
        }],
        types: vec![TypeRow { handle: 4, count: 3, bytes: 1234 }],
        fingerprints: vec![FingerprintRow { delta: 2, fingerprint: [0xfe; 16] }],
    }
}

fn context() -> PartitionContext {
    PartitionContext {
        cluster: ClusterId::from_bytes([1; 16]),
        project: ProjectId::from_bytes([2; 16]),
        topic: TopicId::from_bytes([3; 16]),
        partition: Partition(0),
    }
}

/// The bytes of a batch with this header; the sealed part is made up, since nothing here can tell.
fn batch(header: &BatchHeader, ciphertext: &[u8]) -> Vec<u8> {
    let mut bytes = header.encode(ciphertext.len()).unwrap();
    bytes.extend([0xaa; SALT_BYTES]);
    bytes.extend([0xbb; COMMIT_BYTES]);
    bytes.extend(ciphertext);
    bytes.extend([0xcc; TAG_BYTES]);
    bytes
}

prop_compose! {
    fn rows(count: u32)(
        producers in vec((any::<[u8; 16]>(), any::<u32>(), 0..1_u64 << 40, 1..3_u32), 0..4),
        types in vec((any::<u32>(), 0..3_u32, any::<u64>()), 0..4),
        fingerprints in vec((0..count, any::<[u8; 16]>()), 0..4),
    ) -> (Vec<ProducerRow>, Vec<TypeRow>, Vec<FingerprintRow>) {
        (
            producers.into_iter()
                .map(|(session, epoch, first_sequence, count)| {
                    ProducerRow { session: SessionId::from_bytes(session), epoch, first_sequence, count }
                })
                .collect(),
            types.into_iter().map(|(handle, count, bytes)| TypeRow { handle, count, bytes }).collect(),
            fingerprints.into_iter().map(|(delta, fingerprint)| FingerprintRow { delta, fingerprint }).collect(),
        )
    }
}

prop_compose! {
    fn headers()(count in 12..5000_u32)(
        count in Just(count),
        algorithm in prop_oneof![Just(Algorithm::Aes256Gcm), Just(Algorithm::Aes192Gcm), Just(Algorithm::Aes128Gcm)],
        term in any::<u64>(),
        base_offset in 1..u64::MAX - 5000,
        first in (0..1_u64 << 47, any::<u32>()),
        gap in 0..100_u64,
        dek in any::<[u8; 16]>(),
        prev in any::<[u8; 32]>(),
        (producers, types, fingerprints) in rows(count),
    ) -> BatchHeader {
        let first_id = Rlid::new(first.0, first.1);
        BatchHeader {
            algorithm, count, first_id, producers, types, fingerprints,
            term: Term(term),
            base_offset: Offset(base_offset),
            last_id: first_id.plus(u64::from(count) - 1 + gap),
            dek: DekId::from_bytes(dek),
            prev: Link(prev),
        }
    }
}

proptest! {
    #[test]
    fn a_header_survives_its_bytes(header in headers(), ct_len in 0..CIPHERTEXT_BYTES_MAX) {
        let bytes = header.encode(ct_len).unwrap();
        prop_assert_eq!(bytes.len(), header.encoded_len());
        let decoded = BatchHeader::decode(&bytes).unwrap();
        prop_assert_eq!(decoded, DecodedHeader { len: bytes.len(), header, ct_len });
    }

    #[test]
    fn every_truncation_is_refused(header in headers(), ciphertext in vec(any::<u8>(), 0..64)) {
        let bytes = Bytes::from(batch(&header, &ciphertext));
        for len in 0..bytes.len() {
            let refused = SealedBytes::parse(bytes.slice(..len));
            prop_assert!(matches!(refused, Err(BatchError::Truncated { .. })), "{} of {}: {:?}", len, bytes.len(), refused);
        }
    }

    #[test]
    fn a_flipped_bit_is_refused_or_changes_the_link(header in headers(), ciphertext in vec(any::<u8>(), 0..64), at in any::<prop::sample::Index>()) {
        let good = SealedBytes::parse(batch(&header, &ciphertext).into()).unwrap();
        let mut bytes = good.bytes().to_vec();
        let bit = at.index(bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        let in_ciphertext = {
            let start = good.header_bytes().len() + SALT_BYTES + COMMIT_BYTES;
            (start..start + ciphertext.len()).contains(&(bit / 8))
        };
        if let Ok(bad) = SealedBytes::parse(bytes.into()) {
            // The ciphertext is the tag's business; everything else is the chain's too.
            prop_assert_eq!(link(&context(), &bad) == link(&context(), &good), in_ciphertext);
        }
    }

    #[test]
    fn arbitrary_bytes_decode_to_what_encodes_back(mut bytes in vec(any::<u8>(), 0..400), format in prop::bool::weighted(0.9)) {
        if format && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&[BATCH_FORMAT, 1, 0, 0]);
        }
        if let Ok(decoded) = BatchHeader::decode(&bytes) {
            prop_assert_eq!(&decoded.header.encode(decoded.ct_len).unwrap(), &bytes[..decoded.len]);
        }
    }
}

#[test]
fn a_header_has_these_bytes() {
    // A stored sample of format 1: it must decode for as long as this format is read.
    let hex: String = sample().encode(5).unwrap().iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    insta::assert_snapshot!(hex);
}

#[test]
fn a_batch_falls_into_its_parts() {
    let bytes = Bytes::from(batch(&sample(), b"hello"));
    let view = SealedBytes::parse(bytes.clone()).unwrap();
    assert_eq!(view.header(), &sample());
    assert_eq!(view.header_bytes(), sample().encode(5).unwrap());
    assert_eq!((view.salt(), view.commit()), (&[0xaa; 32], &[0xbb; 32]));
    assert_eq!((view.ciphertext(), view.tag()), (&b"hello"[..], &[0xcc; 16]));
    assert_eq!(view.bytes().as_ptr(), bytes.as_ptr(), "nothing is copied");
    assert_eq!(view.header().next_offset(), Offset(44));
}

#[test]
fn a_byte_too_many_is_refused() {
    let mut bytes = batch(&sample(), b"hello");
    bytes.push(0);
    assert_eq!(SealedBytes::parse(bytes.into()), Err(BatchError::Trailing { extra: 1 }));
}

#[test]
fn a_newer_format_is_told_from_damage() {
    let mut bytes = batch(&sample(), b"hello");
    bytes[0] = 2;
    assert_eq!(SealedBytes::parse(bytes.clone().into()), Err(BatchError::UnknownFormat { found: 2 }));
    bytes[..2].copy_from_slice(&[1, 9]);
    assert_eq!(SealedBytes::parse(bytes.into()), Err(BatchError::UnknownAlgorithm { found: 9 }));
}

#[test]
fn a_header_out_of_range_is_neither_written_nor_read() {
    let refused = |change: fn(&mut BatchHeader)| {
        let mut header = sample();
        change(&mut header);
        let Err(BatchError::Invalid { field }) = header.encode(5) else { panic!("{header:?} was written") };
        field
    };
    assert_eq!(refused(|header| header.count = 0), "count");
    assert_eq!(refused(|header| header.base_offset = Offset(0)), "base_offset");
    assert_eq!(refused(|header| header.base_offset = Offset(u64::MAX - 2)), "base_offset");
    assert_eq!(refused(|header| header.last_id = Rlid::new(1_700_000_000_000, 10)), "last_rlid");
    assert_eq!(refused(|header| header.producers[0].count = 4), "producers");
    assert_eq!(refused(|header| header.producers[0].count = 0), "producers");
    assert_eq!(refused(|header| header.producers[0].first_sequence = u64::MAX), "producers");
    assert_eq!(refused(|header| header.types[0].count = 4), "types");
    assert_eq!(refused(|header| header.fingerprints[0].delta = 3), "fingerprints");
    assert_eq!(refused(|header| header.types = vec![TypeRow { handle: 1, count: 0, bytes: 0 }; 4096]), "ext_len");
    assert_eq!(sample().encode(CIPHERTEXT_BYTES_MAX + 1), Err(BatchError::Invalid { field: "ct_len" }));

    let flagged = |at: usize, value: u8| {
        let mut bytes = batch(&sample(), b"hello");
        bytes[at] = value;
        SealedBytes::parse(bytes.into()).unwrap_err()
    };
    assert_eq!(flagged(2, 1), BatchError::Invalid { field: "flags" });
    assert_eq!(flagged(3, 1), BatchError::Invalid { field: "flags" });
    assert_eq!(flagged(97, 2), BatchError::Invalid { field: "ext_len" });
    assert_eq!(flagged(100, 2), BatchError::Invalid { field: "ext" }, "the same section twice");
    assert_eq!(flagged(104, 0), BatchError::Invalid { field: "ext" }, "a section without rows");
}

#[test]
fn a_link_depends_on_the_place_and_on_what_came_before() {
    let first = BatchHeader { prev: genesis(&context()), ..sample() };
    let view = |header: &BatchHeader| SealedBytes::parse(batch(header, b"hello").into()).unwrap();
    let here = link(&context(), &view(&first));
    assert_ne!(here, link(&PartitionContext { partition: Partition(1), ..context() }, &view(&first)));
    assert_ne!(here, link(&context(), &view(&sample())));
}
