//! The one sealing construction: for batches, wrapped keys and secrets alike.
//!
//! ```text
//! okm    = HKDF-Expand-SHA256(K, "ensign/seal/v1" ‖ purpose ‖ alg ‖ salt ‖ SHA-256(AAD), 76)      salt: 32 fresh random bytes
//! commit = okm[0..32]    key = okm[32..32+n]    nonce = okm[64..76]                              n = 32, 24, 16 for alg 1, 2, 3
//! box    = salt ‖ commit ‖ ciphertext ‖ tag[16] of AES-GCM(key, nonce, AAD, plaintext)
//! ```
//!
//! Every message has a key and nonce of its own, so there is no counter to repeat; the commitment makes a box open under
//! one key and one AAD only. A long-lived key never keys AES-GCM itself: that would leave copies of it on the stack.
//! Invariant: whatever fails to open is one error and leaves zeros, and no cipher is made before the commitment is right.

use aes_gcm::aead::KeyInit;
use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aes::Aes192;
use aes_gcm::aes::cipher::consts::U12;
use aes_gcm::{Aes128Gcm, Aes256Gcm, AesGcm};
use ensign_proto::Algorithm;
use hkdf::Hkdf;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::entropy::Entropy;

/// Bytes of salt in a box.
pub(crate) const SALT_LEN: usize = 32;
/// Bytes of key commitment in a box.
pub(crate) const COMMIT_LEN: usize = 32;
/// Bytes of authentication tag in a box.
pub(crate) const TAG_LEN: usize = 16;
/// What sealing adds to a plaintext.
pub(crate) const OVERHEAD: usize = SALT_LEN + COMMIT_LEN + TAG_LEN;

const LABEL: &[u8] = b"ensign/seal/v1";
const OKM_LEN: usize = 76;

/// What a box is for; a box of one purpose never opens as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Purpose {
    /// A batch of events, under a DEK.
    Batch = 1,
    /// A DEK, under a KEK.
    DekWrap = 2,
    /// A KEK, under the vault master key.
    KekWrap = 3,
    /// A secret of the vault, under the vault master key.
    Secret = 4,
    /// The vault master key, under a root key.
    VmkWrap = 5,
    /// An entry of a type dictionary, under a DEK.
    Dictionary = 6,
}

/// A box that does not open: altered, out of its place, or under another key. Which of these, nobody is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the box does not open")]
pub(crate) struct OpenError;

/// What a box carries beside its ciphertext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) salt: [u8; SALT_LEN],
    pub(crate) commit: [u8; COMMIT_LEN],
    pub(crate) tag: [u8; TAG_LEN],
}

/// Seals `buffer` where it lies.
pub(crate) fn seal_in_place(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    salt: [u8; SALT_LEN],
    buffer: &mut [u8],
) -> Parts {
    let parts = seal_inner(key, purpose, alg, aad, salt, buffer);
    // The cipher's registers and spills hold halves of the message key; the frame they lay in is below this one.
    zeroize::zeroize_stack::<16_384>();
    parts
}

/// Opens `buffer` where it lies; on failure it holds zeros.
pub(crate) fn open_in_place(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    parts: &Parts,
    buffer: &mut [u8],
) -> Result<(), OpenError> {
    let opened = open_inner(key, purpose, alg, aad, parts, buffer);
    zeroize::zeroize_stack::<16_384>();
    if opened.is_err() {
        wipe(buffer);
    }
    opened
}

/// Seals a short secret into a box.
pub(crate) fn seal_box(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    plaintext: &[u8],
    entropy: &Entropy,
) -> Vec<u8> {
    let mut boxed = Vec::with_capacity(plaintext.len() + OVERHEAD);
    boxed.resize(SALT_LEN + COMMIT_LEN, 0);
    boxed.extend_from_slice(plaintext);
    let parts = seal_in_place(key, purpose, alg, aad, entropy.array(), &mut boxed[SALT_LEN + COMMIT_LEN..]);
    boxed[..SALT_LEN].copy_from_slice(&parts.salt);
    boxed[SALT_LEN..SALT_LEN + COMMIT_LEN].copy_from_slice(&parts.commit);
    boxed.extend_from_slice(&parts.tag);
    boxed
}

/// Opens what [`seal_box`] made.
pub(crate) fn open_box(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    boxed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let (salt, rest) = boxed.split_first_chunk().ok_or(OpenError)?;
    let (commit, rest) = rest.split_first_chunk().ok_or(OpenError)?;
    let (ciphertext, tag) = rest.split_last_chunk().ok_or(OpenError)?;
    let parts = Parts { salt: *salt, commit: *commit, tag: *tag };
    let mut plaintext = Zeroizing::new(ciphertext.to_vec());
    open_in_place(key, purpose, alg, aad, &parts, &mut plaintext)?;
    Ok(plaintext)
}

/// Opens a box that holds a 32-byte key, straight into `out`, which is zeros on failure.
pub(crate) fn open_key(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    boxed: &[u8],
    out: &mut [u8; 32],
) -> Result<(), OpenError> {
    let (salt, rest) = boxed.split_first_chunk().ok_or(OpenError)?;
    let (commit, rest) = rest.split_first_chunk().ok_or(OpenError)?;
    let (ciphertext, tag) = rest.split_last_chunk().ok_or(OpenError)?;
    let ciphertext: &[u8; 32] = ciphertext.try_into().map_err(|_| OpenError)?;
    out.copy_from_slice(ciphertext);
    open_in_place(key, purpose, alg, aad, &Parts { salt: *salt, commit: *commit, tag: *tag }, out)
}

/// Overwrites `bytes` at the speed of memory, in a way that the compiler may not leave out.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    zeroize::optimization_barrier(bytes);
}

/// HKDF-Expand under a key that is uniform, so that no Extract is needed (RFC 5869 §3.3).
pub(crate) fn expand(key: &[u8; 32], info: &[&[u8]], out: &mut [u8]) {
    // Both refusals are about lengths, which are constants of this crate: 32 bytes of key, at most 8,160 of output.
    let hkdf = Hkdf::<Sha256>::from_prk(key).expect("a 32-byte key is as long as the hash");
    hkdf.expand_multi_info(info, out).expect("at most 255 blocks are asked for");
}

/// For measuring what sealing costs: batches pass as they are, in the whole process, from the first one on.
#[cfg(feature = "planted-bugs")]
static NULL_CIPHER: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

#[cfg(feature = "planted-bugs")]
pub(crate) fn plant_null_cipher() {
    NULL_CIPHER.store(true, std::sync::atomic::Ordering::Relaxed);
}

#[cfg(feature = "planted-bugs")]
fn is_planted(purpose: Purpose) -> bool {
    purpose == Purpose::Batch && NULL_CIPHER.load(std::sync::atomic::Ordering::Relaxed)
}

#[inline(never)]
fn seal_inner(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    salt: [u8; SALT_LEN],
    buffer: &mut [u8],
) -> Parts {
    #[cfg(feature = "planted-bugs")]
    if is_planted(purpose) {
        return Parts { salt, commit: [0; COMMIT_LEN], tag: [0; TAG_LEN] };
    }
    let okm = derive(key, purpose, alg, aad, &salt);
    let buffer = InOutBuf::from(buffer);
    let tag = match alg {
        Algorithm::Aes256Gcm => encrypt::<Aes256Gcm>(&okm, 32, aad, buffer),
        Algorithm::Aes192Gcm => encrypt::<AesGcm<Aes192, U12>>(&okm, 24, aad, buffer),
        Algorithm::Aes128Gcm => encrypt::<Aes128Gcm>(&okm, 16, aad, buffer),
    };
    let mut commit = [0; COMMIT_LEN];
    commit.copy_from_slice(&okm[..COMMIT_LEN]);
    Parts { salt, commit, tag }
}

#[inline(never)]
fn open_inner(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    parts: &Parts,
    buffer: &mut [u8],
) -> Result<(), OpenError> {
    #[cfg(feature = "planted-bugs")]
    if is_planted(purpose) {
        return Ok(());
    }
    let okm = derive(key, purpose, alg, aad, &parts.salt);
    // Before any cipher exists: a box is accepted under one key only (no partitioning oracle, no invisible salamander).
    if !bool::from(okm[..COMMIT_LEN].ct_eq(&parts.commit)) {
        return Err(OpenError);
    }
    let buffer = InOutBuf::from(buffer);
    match alg {
        Algorithm::Aes256Gcm => decrypt::<Aes256Gcm>(&okm, 32, aad, buffer, &parts.tag),
        Algorithm::Aes192Gcm => decrypt::<AesGcm<Aes192, U12>>(&okm, 24, aad, buffer, &parts.tag),
        Algorithm::Aes128Gcm => decrypt::<Aes128Gcm>(&okm, 16, aad, buffer, &parts.tag),
    }
}

fn derive(
    key: &[u8; 32],
    purpose: Purpose,
    alg: Algorithm,
    aad: &[u8],
    salt: &[u8; SALT_LEN],
) -> Zeroizing<[u8; OKM_LEN]> {
    let mut okm = Zeroizing::new([0; OKM_LEN]);
    let digest = Sha256::digest(aad);
    expand(key, &[LABEL, &[purpose as u8, alg as u8], salt, &digest], &mut *okm);
    okm
}

fn encrypt<C>(okm: &[u8; OKM_LEN], key_len: usize, aad: &[u8], buffer: InOutBuf<'_, '_, u8>) -> [u8; TAG_LEN]
where
    C: KeyInit + aes_gcm::AeadInOut,
{
    let cipher = C::new_from_slice(&okm[32..32 + key_len]).expect("the key length is the cipher's");
    let nonce = okm[64..].try_into().expect("the nonce is twelve bytes");
    // GCM refuses 64 GiB and more; no caller can hold that.
    let tag = cipher.encrypt_inout_detached(nonce, aad, buffer).expect("the message is shorter than 64 GiB");
    let mut bytes = [0; TAG_LEN];
    bytes.copy_from_slice(&tag);
    bytes
}

fn decrypt<C>(
    okm: &[u8; OKM_LEN],
    key_len: usize,
    aad: &[u8],
    buffer: InOutBuf<'_, '_, u8>,
    tag: &[u8; TAG_LEN],
) -> Result<(), OpenError>
where
    C: KeyInit + aes_gcm::AeadInOut,
{
    let cipher = C::new_from_slice(&okm[32..32 + key_len]).expect("the key length is the cipher's");
    let nonce = okm[64..].try_into().expect("the nonce is twelve bytes");
    let tag = tag[..].try_into().expect("the tag is sixteen bytes");
    cipher.decrypt_inout_detached(nonce, aad, buffer, tag).map_err(|_| OpenError)
}

/// Seals nothing of value: fills `out` with the fingerprint of `key` under `label`.
pub(crate) fn fingerprint<const N: usize>(key: &[u8; 32], info: &[&[u8]]) -> [u8; N] {
    let mut out = [0; N];
    fingerprint_inner(key, info, &mut out);
    zeroize::zeroize_stack::<4_096>();
    out
}

#[inline(never)]
fn fingerprint_inner(key: &[u8; 32], info: &[&[u8]], out: &mut [u8]) {
    expand(key, info, out);
}

/// A fresh key, for the few lines that its maker needs it.
pub(crate) fn fresh_key(entropy: &Entropy) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    entropy.fill(&mut *key);
    debug_assert!(key.iter().any(|byte| *byte != 0));
    key
}

#[cfg(test)]
mod tests;
