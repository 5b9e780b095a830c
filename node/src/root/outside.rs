//! What providers outside make of a master key, and how it is kept: the same for all of them.
//!
//! ```text
//! blob = format u8=1 ‖ master id[16] ‖ what the provider made ‖ check[8]      check: SHA-256 of the rest, cut
//! ```
//!
//! A provider's word is not taken for it: the master key's public name says whether what comes back is what was sent.

use ensign_keyvault::{BLOB_MAX, MasterName, RootError, RootId, RootKind, Unwrapped, WrappedMaster, master_id};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

const FORMAT: u8 = 1;
const ID: usize = 16;
const CHECK: usize = 8;

/// The longest text of a provider that is shown to people.
const WORDS_MAX: usize = 200;

/// What a provider made, with what it calls its key.
pub(super) struct Made<'a> {
    pub(super) reference: String,
    pub(super) version: u32,
    pub(super) made: &'a [u8],
}

/// What the vault's state is to keep.
pub(super) fn keep(
    kind: RootKind,
    name: MasterName,
    key: &[u8; 32],
    made: &Made<'_>,
) -> Result<WrappedMaster, RootError> {
    if made.made.is_empty() || made.made.len() > BLOB_MAX - 1 - ID - CHECK {
        return Err(RootError::provider(format!("it made {} bytes of the master key", made.made.len())));
    }
    let mut blob = [&[FORMAT][..], &master_id(name, key), made.made].concat();
    let check = Sha256::digest(&blob);
    blob.extend_from_slice(&check[..CHECK]);
    Ok(WrappedMaster {
        kind,
        id: RootId::of_reference(kind, &made.reference),
        version: made.version,
        reference: made.reference.clone(),
        blob: blob.into(),
    })
}

/// What the provider made, and the name of the key that must come back.
pub(super) fn kept(wrapped: &WrappedMaster) -> Result<([u8; ID], &[u8]), RootError> {
    let damaged = |what| RootError::Damaged { what };
    if wrapped.blob.first().is_some_and(|format| *format > FORMAT) {
        return Err(RootError::provider("a newer build wrapped the vault's master key: upgrade this node"));
    }
    let short = damaged("what the provider made is cut short");
    let Some((body, check)) = wrapped.blob.split_last_chunk::<CHECK>() else { return Err(short) };
    if Sha256::digest(body)[..CHECK] != check[..] {
        return Err(damaged("what the provider made has a wrong checksum"));
    }
    match body.get(1..).and_then(|rest| rest.split_first_chunk::<ID>()) {
        Some((id, made)) => Ok((*id, made)),
        None => Err(short),
    }
}

/// The master key, if it is the one that was wrapped.
pub(super) fn unwrapped(name: MasterName, id: [u8; ID], key: &[u8]) -> Result<Unwrapped, RootError> {
    Unwrapped::fill(|out| {
        let key: &[u8; 32] = key
            .try_into()
            .map_err(|_| RootError::provider(format!("it answered a key of {} bytes, not of 32", key.len())))?;
        if !bool::from(master_id(name, key).ct_eq(&id)) {
            return Err(RootError::provider("it answered another key than it was given to wrap"));
        }
        out.copy_from_slice(key);
        Ok(())
    })
}

/// What a provider says, fit to be shown: on one line, printable, cut.
pub(super) fn words(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let text: String = text.trim().chars().map(clean).take(WORDS_MAX + 1).collect();
    if text.chars().count() > WORDS_MAX { text.chars().take(WORDS_MAX).chain(['…']).collect() } else { text }
}

#[cfg(test)]
mod tests {
    use ensign_proto::ClusterId;

    use super::*;

    const NAME: MasterName = MasterName { cluster: ClusterId::from_bytes([3; 16]), epoch: 1 };

    #[test]
    fn what_comes_back_must_be_what_was_sent() {
        let made = Made { reference: "kms/a".to_owned(), version: 3, made: b"opaque" };
        let wrapped = keep(RootKind::Command, NAME, &[9; 32], &made).unwrap();
        assert_eq!((wrapped.version, &*wrapped.reference), (3, "kms/a"));
        let (id, made) = kept(&wrapped).unwrap();
        assert_eq!(made, b"opaque");
        unwrapped(NAME, id, &[9; 32]).unwrap();
        let refused = |key: &[u8]| unwrapped(NAME, id, key).unwrap_err().to_string();
        assert_eq!(refused(&[8; 32]), "it answered another key than it was given to wrap");
        assert_eq!(refused(&[9; 31]), "it answered a key of 31 bytes, not of 32");
        assert!(unwrapped(MasterName { epoch: 2, ..NAME }, id, &[9; 32]).is_err(), "of another epoch");
        for place in 0..wrapped.blob.len() {
            let mut blob = wrapped.blob.to_vec();
            blob[place] ^= 0x10;
            let damaged = WrappedMaster { blob: blob.into(), ..wrapped.clone() };
            assert!(kept(&damaged).is_err(), "byte {place}");
            let cut = WrappedMaster { blob: wrapped.blob.slice(..place), ..wrapped.clone() };
            assert!(kept(&cut).is_err(), "{place} bytes");
        }
        let large = vec![0; BLOB_MAX];
        assert!(
            keep(RootKind::Command, NAME, &[9; 32], &Made { reference: String::new(), version: 1, made: &large })
                .is_err()
        );
    }

    #[test]
    fn what_a_provider_says_is_made_harmless() {
        assert_eq!(words("  denied:\n\x1b[31mno\t "), "denied:  [31mno");
        assert_eq!(words(&"x".repeat(500)).chars().count(), WORDS_MAX + 1);
    }
}
