use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const ALGORITHMS: [Algorithm; 3] = [Algorithm::Aes256Gcm, Algorithm::Aes192Gcm, Algorithm::Aes128Gcm];

fn count<const N: usize>(first: u8) -> [u8; N] {
    std::array::from_fn(|i| first + i as u8)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[test]
fn the_vector_of_the_design_seals_to_its_bytes() {
    let mut buffer = *b"hello, sealed world";
    let parts = seal_in_place(&count(0), Purpose::Batch, Algorithm::Aes256Gcm, b"ensign", count(0x80), &mut buffer);
    assert_eq!(hex(&parts.commit), "2d1c47664f0a6deb960421c6d701a32bcce1c36c9dd00b4e827a8736aa8b1283");
    assert_eq!(hex(&buffer), "102edd034c75997e33d193966846c6430df49d");
    assert_eq!(hex(&parts.tag), "1af58e884c192aa72a57371fc0dba42d");
    open_in_place(&count(0), Purpose::Batch, Algorithm::Aes256Gcm, b"ensign", &parts, &mut buffer).unwrap();
    assert_eq!(&buffer, b"hello, sealed world");
}

#[test]
fn every_bit_of_a_box_and_of_its_aad_counts() {
    let key = count(7);
    for alg in ALGORITHMS {
        let aad = b"the place".to_vec();
        let boxed = seal_box(&key, Purpose::Secret, alg, &aad, b"a secret of some length", &Entropy::kernel());
        for bit in 0..boxed.len() * 8 {
            let mut wrong = boxed.clone();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                open_box(&key, Purpose::Secret, alg, &aad, &wrong),
                Err(OpenError),
                "{alg:?}, bit {bit} of the box"
            );
        }
        for bit in 0..aad.len() * 8 {
            let mut wrong = aad.clone();
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                open_box(&key, Purpose::Secret, alg, &wrong, &boxed),
                Err(OpenError),
                "{alg:?}, bit {bit} of the aad"
            );
        }
        for len in 0..boxed.len() {
            assert_eq!(
                open_box(&key, Purpose::Secret, alg, &aad, &boxed[..len]),
                Err(OpenError),
                "{alg:?}, {len} bytes"
            );
        }
    }
}

#[test]
fn a_box_that_fails_leaves_zeros() {
    let key = count(7);
    let mut buffer = *b"not for everyone";
    let parts = seal_in_place(&key, Purpose::Batch, Algorithm::Aes256Gcm, b"", count(1), &mut buffer);
    for wrong in
        [Parts { commit: count(9), ..parts }, Parts { tag: count(9), ..parts }, Parts { salt: count(9), ..parts }]
    {
        let mut copy = buffer;
        assert_eq!(open_in_place(&key, Purpose::Batch, Algorithm::Aes256Gcm, b"", &wrong, &mut copy), Err(OpenError));
        assert_eq!(copy, [0; 16]);
    }
}

#[test]
fn a_box_opens_under_its_own_key_purpose_and_algorithm_only() {
    let purposes =
        [Purpose::Batch, Purpose::DekWrap, Purpose::KekWrap, Purpose::Secret, Purpose::VmkWrap, Purpose::Dictionary];
    for sealed_for in purposes {
        let boxed = seal_box(&count(0), sealed_for, Algorithm::Aes256Gcm, b"a", b"p", &Entropy::kernel());
        assert_eq!(open_box(&count(1), sealed_for, Algorithm::Aes256Gcm, b"a", &boxed), Err(OpenError));
        for opened_as in purposes {
            for alg in ALGORITHMS {
                let opened = open_box(&count(0), opened_as, alg, b"a", &boxed);
                assert_eq!(opened.is_ok(), opened_as == sealed_for && alg == Algorithm::Aes256Gcm);
            }
        }
    }
}

#[test]
fn a_key_of_another_length_is_refused_and_its_copy_overwritten() {
    let key = count(0);
    let boxed = seal_box(&key, Purpose::DekWrap, Algorithm::Aes256Gcm, b"", &[5; 33], &Entropy::kernel());
    let mut out = [1; 32];
    assert_eq!(open_key(&key, Purpose::DekWrap, Algorithm::Aes256Gcm, b"", &boxed, &mut out), Err(OpenError));
    let boxed = seal_box(&key, Purpose::DekWrap, Algorithm::Aes256Gcm, b"", &[5; 32], &Entropy::kernel());
    open_key(&key, Purpose::DekWrap, Algorithm::Aes256Gcm, b"", &boxed, &mut out).unwrap();
    assert_eq!(out, [5; 32]);
    assert_eq!(open_key(&key, Purpose::DekWrap, Algorithm::Aes256Gcm, b"x", &boxed, &mut out), Err(OpenError));
    assert_eq!(out, [0; 32]);
}

#[test]
fn no_two_salts_are_alike() {
    let salts: HashSet<[u8; 32]> = (0..10_000).map(|_| Entropy::kernel().array()).collect();
    assert_eq!(salts.len(), 10_000);
}

proptest! {
    #[test]
    fn what_is_sealed_opens_to_itself(
        key: [u8; 32], salt: [u8; 32], alg in 0..3_usize, aad in prop::collection::vec(any::<u8>(), 0..200),
        plaintext in prop::collection::vec(any::<u8>(), 0..2_000),
    ) {
        let alg = ALGORITHMS[alg];
        let mut buffer = plaintext.clone();
        let parts = seal_in_place(&key, Purpose::Batch, alg, &aad, salt, &mut buffer);
        prop_assert!(plaintext.len() < 16 || buffer != plaintext);
        open_in_place(&key, Purpose::Batch, alg, &aad, &parts, &mut buffer).unwrap();
        prop_assert_eq!(buffer, plaintext);
    }
}
