//! The passphrase provider: the root key is what Argon2id (RFC 9106, version 1.3) makes of a phrase and a salt.
//!
//! ```text
//! blob = format u8=1 ‖ memory_kib u32 ‖ passes u32 ‖ lanes u32 ‖ salt[16] ‖ box[112] ‖ check[8]     check: SHA-256 of the rest, cut
//! ```
//!
//! The check tells a damaged blob before anything is derived from it, and the root key's public name a wrong phrase from a
//! right one; so whoever typed the right phrase into a damaged vault is not told to try again. Nothing of the phrase is kept.

use std::fmt;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use bytes::{BufMut as _, Bytes};
use futures::future::BoxFuture;
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use zeroize::{Zeroize as _, Zeroizing};

use super::memory::Memory;
use super::{
    FIRST_VERSION, MasterName, RootError, RootKey, RootKind, RootProvider, Unwrapped, WrappedMaster, check_kind,
};
use crate::entropy::Entropy;

/// The longest passphrase.
pub const PASSPHRASE_BYTES: usize = 1024;
/// The shortest that a vault is made with.
const OWN_MIN: usize = 16;
/// Of a phrase that is made here: 160 bits.
const RANDOM: usize = 20;
const LETTERS: &[u8; 32] = b"abcdefghjkmnpqrstvwxyz0123456789";

const FORMAT: u8 = 1;
const SALT: usize = 16;
const BOX: usize = 32 + crate::seal::OVERHEAD;
const CHECK: usize = 8;
const BLOB: usize = 1 + 3 * 4 + SALT + BOX + CHECK;

/// From this much memory on, the first choice.
const LARGE: u64 = 8 << 30;

/// What deriving the root key costs, and so what one guess costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

impl Cost {
    /// RFC 9106 §4, first choice: 2 GiB, one pass, four lanes.
    pub const FIRST: Self = Self { memory_kib: 2 << 20, passes: 1, lanes: 4 };
    /// RFC 9106 §4, second choice: 64 MiB, three passes, four lanes.
    pub const SECOND: Self = Self { memory_kib: 64 << 10, passes: 3, lanes: 4 };

    /// What this machine can bear: the first choice from 8 GiB of memory on, or as much as its control group is given.
    pub fn of_this_machine() -> Self {
        Self::of(Memory::now())
    }

    fn of(memory: Memory) -> Self {
        if memory.total >= LARGE { Self::FIRST } else { Self::SECOND }
    }

    /// Not cheaper than the second choice, and nothing that would keep a machine busy for ever.
    fn is_within_bounds(self) -> bool {
        let work = |cost: Self| u64::from(cost.memory_kib) * u64::from(cost.passes);
        (Self::SECOND.memory_kib..=4 << 20).contains(&self.memory_kib)
            && work(self) >= work(Self::SECOND)
            && self.passes <= 16
            && (4..=16).contains(&self.lanes)
    }
}

/// A passphrase. Overwritten when the last share of it is dropped; never printed.
pub struct Passphrase(Arc<Zeroizing<Vec<u8>>>);

impl Passphrase {
    /// What somebody typed, or a file holds: without the end of its line.
    ///
    /// # Errors
    /// It is empty, longer than [`PASSPHRASE_BYTES`], or several lines.
    pub fn new(mut text: Zeroizing<Vec<u8>>) -> Result<Self, RootError> {
        if text.last() == Some(&b'\n') {
            text.pop();
        }
        if text.last() == Some(&b'\r') {
            text.pop();
        }
        if text.is_empty() {
            return Err(RootError::PassphraseRefused("the passphrase is empty"));
        }
        if text.len() > PASSPHRASE_BYTES {
            return Err(RootError::PassphraseRefused("the passphrase is longer than 1024 bytes"));
        }
        if text.contains(&b'\n') {
            return Err(RootError::PassphraseRefused("the passphrase has more than one line"));
        }
        Ok(Self(Arc::new(text)))
    }

    /// A phrase of 160 random bits that people can copy from paper: eight groups of four letters and digits, none of which looks
    /// like another.
    pub fn generate(entropy: &Entropy) -> Self {
        let mut random = Zeroizing::new([0; RANDOM]);
        entropy.fill(&mut *random);
        let mut text = Zeroizing::new(Vec::with_capacity(RANDOM * 8 / 5 + 7));
        for (place, five) in random.chunks(5).flat_map(fives).enumerate() {
            if place > 0 && place % 4 == 0 {
                text.push(b'-');
            }
            text.push(LETTERS[usize::from(five)]);
        }
        Self(Arc::new(text))
    }

    /// Lends the phrase, to be sent or written where the operator wants it.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase")
    }
}

/// Forty bits as eight numbers below 32.
fn fives(bytes: &[u8]) -> [u8; 8] {
    let bits = bytes.iter().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
    std::array::from_fn(|place| (bits >> (35 - 5 * place)) as u8 & 31)
}

/// A root key that is made of what somebody types. Without that, it waits.
#[derive(Debug)]
pub struct PassphraseRoot {
    cost: Cost,
}

impl PassphraseRoot {
    /// New vaults are made at this cost; vaults that exist say what theirs is.
    pub fn new(cost: Cost) -> Self {
        Self { cost }
    }
}

struct Envelope<'a> {
    cost: Cost,
    salt: [u8; SALT],
    boxed: &'a [u8],
}

impl<'a> Envelope<'a> {
    fn encode(&self) -> Bytes {
        let mut blob = Vec::with_capacity(BLOB);
        blob.put_u8(FORMAT);
        for number in [self.cost.memory_kib, self.cost.passes, self.cost.lanes] {
            blob.put_u32(number);
        }
        blob.put_slice(&self.salt);
        blob.put_slice(self.boxed);
        let check = Sha256::digest(&blob);
        blob.put_slice(&check[..CHECK]);
        blob.into()
    }

    fn decode(blob: &'a [u8]) -> Result<Self, RootError> {
        let damaged = |what| RootError::Damaged { what };
        if blob.first().is_some_and(|format| *format > FORMAT) {
            return Err(RootError::provider("a newer build wrapped the vault's master key: upgrade this node"));
        }
        let (body, check) =
            blob.split_last_chunk::<CHECK>().ok_or(damaged("what the passphrase wrapped is cut short"))?;
        if Sha256::digest(body)[..CHECK] != check[..] {
            return Err(damaged("what the passphrase wrapped has a wrong checksum"));
        }
        let body: &[u8; BLOB - CHECK] =
            body.try_into().map_err(|_| damaged("what the passphrase wrapped is cut short"))?;
        let number = |at: usize| u32::from_be_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
        let cost = Cost { memory_kib: number(1), passes: number(5), lanes: number(9) };
        if body[0] != FORMAT || !cost.is_within_bounds() {
            return Err(damaged("its parameters of Argon2id are out of bounds"));
        }
        let (salt, boxed) = body[13..].split_at(SALT);
        Ok(Self { cost, salt: salt.try_into().map_err(|_| damaged("it has no salt"))?, boxed })
    }
}

/// Derives the root key, beside the async runtime: it takes seconds and up to gigabytes.
async fn derive(phrase: &Passphrase, salt: [u8; SALT], cost: Cost, version: u32) -> Result<RootKey, RootError> {
    let phrase = phrase.share();
    let derived = tokio::task::spawn_blocking(move || derive_now(&phrase, salt, cost, version, Memory::now()));
    derived.await.map_err(|_| RootError::provider("the passphrase could not be checked: see the log"))?
}

fn derive_now(
    phrase: &Passphrase,
    salt: [u8; SALT],
    cost: Cost,
    version: u32,
    memory: Memory,
) -> Result<RootKey, RootError> {
    let needed = u64::from(cost.memory_kib) << 10;
    let short = || RootError::Memory { needed_mib: needed >> 20, free_mib: memory.free >> 20 };
    // A kernel that overcommits gives the memory and then kills the process that uses it.
    if memory.free < needed {
        return Err(short());
    }
    let refused = |_| RootError::provider("Argon2id does not take these parameters");
    let params = Params::new(cost.memory_kib, cost.passes, cost.lanes, Some(32)).map_err(refused)?;
    let mut blocks: Vec<Block> = Vec::new();
    blocks.try_reserve_exact(params.block_count()).map_err(|_| short())?;
    blocks.resize(params.block_count(), Block::default());
    let mut key = Zeroizing::new([0; 32]);
    let argon = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hashed = argon.hash_password_into_with_memory(phrase.expose(), &salt, &mut *key, &mut blocks);
    // The last block of each lane is as good as the key.
    blocks.iter_mut().for_each(zeroize::Zeroize::zeroize);
    hashed.map_err(refused)?;
    let root = RootKey::from_key(&key);
    key.zeroize();
    Ok(RootKey { version, ..root })
}

impl RootProvider for PassphraseRoot {
    fn kind(&self) -> RootKind {
        RootKind::Passphrase
    }

    fn wrap<'a>(
        &'a self,
        name: MasterName,
        key: &'a [u8; 32],
        phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<WrappedMaster, RootError>> {
        Box::pin(async move {
            let phrase = phrase.ok_or(RootError::PassphraseNeeded)?;
            if phrase.expose().len() < OWN_MIN {
                return Err(RootError::PassphraseRefused("a new passphrase has 16 bytes at least"));
            }
            let entropy = Entropy::kernel();
            let salt = entropy.array();
            let root = derive(phrase, salt, self.cost, FIRST_VERSION).await?;
            let boxed = root.wrap(name, key, &entropy);
            Ok(WrappedMaster {
                kind: RootKind::Passphrase,
                id: root.id(name.cluster),
                version: root.version,
                reference: String::new(),
                blob: Envelope { cost: self.cost, salt, boxed: &boxed }.encode(),
            })
        })
    }

    fn unwrap<'a>(
        &'a self,
        name: MasterName,
        wrapped: &'a WrappedMaster,
        phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<Unwrapped, RootError>> {
        Box::pin(async move {
            check_kind(wrapped, RootKind::Passphrase)?;
            // Before anybody is asked for a phrase that would be no use.
            let envelope = Envelope::decode(&wrapped.blob)?;
            let phrase = phrase.ok_or(RootError::PassphraseNeeded)?;
            let root = derive(phrase, envelope.salt, envelope.cost, wrapped.version).await?;
            root.unwrap(name, wrapped.id, envelope.boxed).map_err(|error| match error {
                RootError::WrongKey { .. } => RootError::PassphraseWrong,
                other => other,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::ClusterId;

    use super::*;

    const NAME: MasterName = MasterName { cluster: ClusterId::from_bytes([3; 16]), epoch: 1 };

    fn phrase(text: &str) -> Passphrase {
        Passphrase::new(Zeroizing::new(text.as_bytes().to_vec())).unwrap()
    }

    #[tokio::test]
    async fn a_wrong_phrase_is_told_from_a_damaged_vault() {
        let root = PassphraseRoot::new(Cost::SECOND);
        let right = phrase("correct horse battery staple");
        let wrapped = root.wrap(NAME, &[9; 32], Some(&right)).await.unwrap();
        assert_eq!((wrapped.kind, wrapped.version, wrapped.blob.len()), (RootKind::Passphrase, 1, BLOB));
        assert_eq!(root.unwrap(NAME, &wrapped, Some(&right)).await.unwrap().key(), [9; 32]);

        let wrong = root.unwrap(NAME, &wrapped, Some(&phrase("correct horse battery stable"))).await.unwrap_err();
        assert!(matches!(wrong, RootError::PassphraseWrong), "{wrong}");
        let none = root.unwrap(NAME, &wrapped, None).await.unwrap_err();
        assert!(none.to_string().contains("ensign vault unseal"), "{none}");
        let other_epoch = MasterName { epoch: 2, ..NAME };
        let moved = root.unwrap(other_epoch, &wrapped, Some(&right)).await.unwrap_err();
        assert!(matches!(moved, RootError::Damaged { .. }), "{moved}");
        // Damage is told before anybody is asked to type, wherever it is.
        for place in [0, 1, 9, 13, 29, 100, BLOB - 1] {
            let mut blob = wrapped.blob.to_vec();
            blob[place] ^= 0x40;
            let damaged = WrappedMaster { blob: blob.into(), ..wrapped.clone() };
            let error = root.unwrap(NAME, &damaged, None).await.unwrap_err();
            let expected = if place == 0 { "upgrade this node" } else { "wrong checksum" };
            assert!(error.to_string().contains(expected), "byte {place}: {error}");
        }
        for length in [0, 7, BLOB - 1] {
            let cut = WrappedMaster { blob: wrapped.blob.slice(..length), ..wrapped.clone() };
            assert!(matches!(root.unwrap(NAME, &cut, None).await, Err(RootError::Damaged { .. })), "{length} bytes");
        }
    }

    #[test]
    fn the_cost_is_one_of_two_choices_and_its_bounds_are_kept() {
        let of = |gib: u64| Cost::of(Memory { total: gib << 30, free: 0 });
        assert_eq!([of(4), of(7), of(8), of(64)], [Cost::SECOND, Cost::SECOND, Cost::FIRST, Cost::FIRST]);
        let cost = |memory_kib, passes, lanes| Cost { memory_kib, passes, lanes };
        let (mib, gib) = (1 << 10, 1 << 20);
        for fine in [Cost::FIRST, Cost::SECOND, cost(4 * gib, 16, 16), cost(192 * mib, 1, 4)] {
            assert!(fine.is_within_bounds(), "{fine:?}");
        }
        let bad = [
            cost(64 * mib - 1, 3, 4),
            cost(64 * mib, 2, 4),
            cost(64 * mib, 3, 3),
            cost(4 * gib + 1, 1, 4),
            cost(64 * mib, 17, 4),
            cost(64 * mib, 3, 17),
        ];
        for bad in bad {
            assert!(!bad.is_within_bounds(), "{bad:?}");
            // With a right checksum: somebody who may write the vault must not choose what a guess costs.
            let blob = Envelope { cost: bad, salt: [1; SALT], boxed: &[2; BOX] }.encode();
            let error = Envelope::decode(&blob).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("out of bounds"), "{error}");
        }
    }

    #[test]
    fn a_machine_without_the_memory_says_so_and_is_not_killed() {
        let few = Memory { total: 1 << 30, free: 60 << 20 };
        let error = derive_now(&phrase("any"), [0; SALT], Cost::SECOND, 1, few).unwrap_err().to_string();
        assert!(error.contains("needs 64 MiB") && error.contains("60 MiB are free"), "{error}");
    }

    #[test]
    fn derivation_is_argon2id_as_the_rfc_has_it() {
        // Computed by argon2-cffi: hash_secret_raw(phrase, salt, 3, 65536, 4, 32, Type.ID, 19).
        let root =
            derive_now(&phrase("correct horse battery staple"), [7; SALT], Cost::SECOND, 1, Memory::now()).unwrap();
        let key = root.key.with(|key| *key).unwrap();
        let shown = super::super::RootId(key[..16].try_into().unwrap()).to_string();
        let rest = super::super::RootId(key[16..].try_into().unwrap()).to_string();
        assert_eq!(shown + &rest, "0b167e20ffb8a31f75eb3e471872ba0a5747d56ec494db5becb07108141bff24");
    }

    #[tokio::test]
    async fn phrases_that_cannot_be_right_are_refused() {
        let refused = |text: &[u8]| Passphrase::new(Zeroizing::new(text.to_vec())).map(|_| ()).unwrap_err().to_string();
        assert_eq!(refused(b""), "the passphrase is empty");
        assert_eq!(refused(b"\n"), "the passphrase is empty");
        assert_eq!(refused(b"a\nb"), "the passphrase has more than one line");
        assert_eq!(refused(&[b'a'; PASSPHRASE_BYTES + 1]), "the passphrase is longer than 1024 bytes");
        for typed in ["abc def\n", "abc def\r\n", "abc def"] {
            assert_eq!(phrase(typed).expose(), b"abc def");
        }
        let root = PassphraseRoot::new(Cost::SECOND);
        let short = root.wrap(NAME, &[9; 32], Some(&phrase("fifteen letters"))).await.unwrap_err();
        assert_eq!(short.to_string(), "a new passphrase has 16 bytes at least");
        assert!(matches!(root.wrap(NAME, &[9; 32], None).await, Err(RootError::PassphraseNeeded)));
    }

    #[test]
    fn a_generated_phrase_has_160_bits_and_is_shown_nowhere() {
        let made: Vec<_> = (0..3).map(|_| Passphrase::generate(&Entropy::kernel())).collect();
        for phrase in &made {
            let text = std::str::from_utf8(phrase.expose()).unwrap();
            assert_eq!((text.len(), text.split('-').count()), (39, 8), "{text}");
            assert!(text.split('-').all(|group| group.len() == 4 && group.bytes().all(|it| LETTERS.contains(&it))));
            assert_eq!(format!("{phrase:?}"), "Passphrase");
        }
        assert_ne!(made[0].expose(), made[1].expose());
        assert_eq!(fives(&[0xff, 0, 0xff, 0, 0xff]), [31, 28, 0, 15, 30, 0, 7, 31]);
    }
}
