//! Batches: `PlainBatch` in the memory of the node that serves a client, `SealedBatch` everywhere else.
//!
//! ```text
//! PlainBatch   | head room | codec u8 | raw_len u32 | blocks ……………… | tail room |      one buffer, sealed where it lies
//! SealedBatch  | header | salt | commit | ciphertext ……………………………… | tag |           the bytes of the Raft entry
//! ```
//!
//! The AAD is `context ‖ header`: a batch opens in its place only. Nothing of a batch is parsed before it has opened.

use std::fmt;

use bytes::Bytes;
use ensign_proto::{BatchHeader, CIPHERTEXT_BYTES_MAX, HEADER_BYTES, PartitionContext, SealedBytes};
use thiserror::Error;

use crate::arena::KeySlot;
use crate::entropy::Entropy;
use crate::holder::Use;
use crate::seal::{self, COMMIT_LEN, OpenError, Parts, Purpose, SALT_LEN, TAG_LEN, wipe};

/// Blocks that are not compressed: the only codec so far.
const CODEC_NONE: u8 = 0;
const PREFIX: usize = 5;
/// Room for a header with some 2 KiB of rows; a longer one costs a copy.
const HEAD_ROOM: usize = HEADER_BYTES + 2048 + SALT_LEN + COMMIT_LEN;
/// Room for the tag, and for what Raft puts behind a proposal.
const TAIL_ROOM: usize = TAG_LEN + ensign_raft::PROPOSAL_ROOM;
/// The most that a batch may hold once it is decompressed.
pub const RAW_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Events before they are sealed, or after they were opened. Its memory is overwritten when it is dropped.
///
/// An opened batch is a [`Use`] of its key: drop it, and all bytes taken from it, as soon as its events are handed over.
pub struct PlainBatch {
    buffer: Vec<u8>,
    /// Where the payload begins.
    start: usize,
    /// Of an opened batch: a surrender of its key waits until the plaintext is gone.
    using: Option<Use>,
}

/// There is no room in the batch for more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a batch holds at most {RAW_BYTES_MAX} bytes")]
pub struct BatchFull;

impl PlainBatch {
    /// An empty batch with room for `blocks` bytes before it has to grow.
    pub fn with_capacity(blocks: usize) -> Self {
        let mut buffer = Vec::with_capacity(HEAD_ROOM + PREFIX + blocks + TAIL_ROOM);
        buffer.resize(HEAD_ROOM, 0);
        buffer.extend_from_slice(&[CODEC_NONE, 0, 0, 0, 0]);
        Self { buffer, start: HEAD_ROOM, using: None }
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`BatchFull`]: nothing was appended; close this batch and begin another.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), BatchFull> {
        self.append_with(bytes.len(), |slot| slot.copy_from_slice(bytes))
    }

    /// Appends `len` bytes that `write` fills in; they are zeros when it gets them.
    ///
    /// # Errors
    /// [`BatchFull`]: nothing was appended; close this batch and begin another.
    pub fn append_with(&mut self, len: usize, write: impl FnOnce(&mut [u8])) -> Result<(), BatchFull> {
        let raw = self.blocks().len().checked_add(len).filter(|raw| *raw <= RAW_BYTES_MAX).ok_or(BatchFull)?;
        if !self.has_room(len + TAIL_ROOM, self.start) {
            self.relocate((len + TAIL_ROOM).max(self.payload_len() / 2), self.start);
        }
        let at = self.buffer.len();
        self.buffer.resize(at + len, 0);
        write(&mut self.buffer[at..]);
        self.buffer[self.start + 1..self.start + PREFIX].copy_from_slice(&(raw as u32).to_be_bytes());
        Ok(())
    }

    /// The events' bytes.
    pub fn blocks(&self) -> &[u8] {
        let prefix = &self.buffer[self.start..self.start + PREFIX];
        let raw_len = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        &self.buffer[self.start + PREFIX..self.start + PREFIX + raw_len]
    }

    /// The events' bytes, to be sliced and handed to a transport without a copy; overwritten when the last slice is dropped.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// Holds the key in use for as long as the plaintext is in memory.
    pub(crate) fn guard(mut self, using: Use) -> Self {
        self.using = Some(using);
        self
    }

    fn payload_len(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Whether there is room for `tail` more bytes behind and `head` bytes before the payload.
    fn has_room(&self, tail: usize, head: usize) -> bool {
        self.buffer.capacity() - self.buffer.len() >= tail && self.start >= head
    }

    /// Moves to a buffer that has this room, and no more. Leaves zeros behind.
    fn relocate(&mut self, tail: usize, head: usize) {
        let payload = self.payload_len();
        let mut moved = Vec::with_capacity(head + payload + tail);
        moved.resize(head, 0);
        moved.extend_from_slice(&self.buffer[self.start..]);
        wipe(&mut self.buffer);
        self.buffer = moved;
        self.start = head;
    }

    /// Takes an opened payload, if it is one.
    fn from_payload(payload: Vec<u8>) -> Result<Self, OpenError> {
        let plain = Self { buffer: payload, start: 0, using: None };
        let Some((&[codec, a, b, c, d], blocks)) = plain.buffer.split_first_chunk::<PREFIX>() else {
            return Err(OpenError);
        };
        let raw_len = u32::from_be_bytes([a, b, c, d]) as usize;
        // What follows the blocks is padding.
        if codec != CODEC_NONE || raw_len > blocks.len() || raw_len > RAW_BYTES_MAX {
            return Err(OpenError);
        }
        Ok(plain)
    }
}

impl AsRef<[u8]> for PlainBatch {
    fn as_ref(&self) -> &[u8] {
        self.blocks()
    }
}

impl Drop for PlainBatch {
    fn drop(&mut self) {
        // Before the use ends, which is when a surrender may say that nothing is left.
        wipe(&mut self.buffer);
        self.using = None;
    }
}

impl fmt::Debug for PlainBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainBatch").field("bytes", &self.payload_len()).finish_non_exhaustive()
    }
}

/// A batch that was sealed in this process, by the one function that can: ready to be proposed.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedBatch(SealedBytes);

impl SealedBatch {
    /// The parts, for the link to the next batch.
    pub fn parts(&self) -> &SealedBytes {
        &self.0
    }

    /// The header.
    pub fn header(&self) -> &BatchHeader {
        self.0.header()
    }

    /// The entry's bytes.
    pub fn bytes(&self) -> &Bytes {
        self.0.bytes()
    }

    /// The entry's bytes.
    pub fn into_bytes(self) -> Bytes {
        self.0.into_bytes()
    }
}

impl fmt::Debug for SealedBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SealedBatch").field(self.header()).finish()
    }
}

/// A header that does not fit its batch: our own mistake.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum SealFailure {
    #[error(transparent)]
    Header(#[from] ensign_proto::BatchError),
    #[error("the key is gone")]
    Gone,
}

/// Seals `plain` where it lies.
pub(crate) fn seal_batch(
    key: &KeySlot,
    ctx: &PartitionContext,
    header: &BatchHeader,
    mut plain: PlainBatch,
    entropy: &Entropy,
) -> Result<SealedBatch, SealFailure> {
    let ct_len = plain.payload_len();
    let mut aad = Vec::with_capacity(PartitionContext::BYTES + header.encoded_len());
    aad.extend_from_slice(&ctx.to_bytes());
    header.encode_into(ct_len, &mut aad)?;
    let encoded = &aad[PartitionContext::BYTES..];
    let prefix = encoded.len() + SALT_LEN + COMMIT_LEN;
    if !plain.has_room(TAIL_ROOM, prefix) {
        plain.relocate(TAIL_ROOM, prefix);
    }

    let start = plain.start;
    let salt = entropy.array();
    let parts = key
        .with(|key| seal::seal_in_place(key, Purpose::Batch, header.algorithm, &aad, salt, &mut plain.buffer[start..]))
        .ok_or(SealFailure::Gone)?;
    // From here on the buffer is ciphertext, so it may leave the type that overwrites it.
    let mut entry = std::mem::take(&mut plain.buffer);
    let first = start - prefix;
    let commit_at = start - COMMIT_LEN;
    entry[first..first + encoded.len()].copy_from_slice(encoded);
    entry[commit_at - SALT_LEN..commit_at].copy_from_slice(&parts.salt);
    entry[commit_at..start].copy_from_slice(&parts.commit);
    entry.extend_from_slice(&parts.tag);
    let sealed = SealedBytes::parse(Bytes::from(entry).slice(first..))?;
    Ok(SealedBatch(sealed))
}

/// What [`seal_batch`] would make if it forgot to seal.
#[cfg(feature = "planted-bugs")]
pub(crate) fn leave_unsealed(
    header: &BatchHeader,
    plain: &PlainBatch,
) -> Result<SealedBatch, ensign_proto::BatchError> {
    let payload = &plain.buffer[plain.start..];
    let entry = [&header.encode(payload.len())?, &[0; SALT_LEN + COMMIT_LEN][..], payload, &[0; TAG_LEN]].concat();
    SealedBytes::parse(Bytes::from(entry)).map(SealedBatch)
}

/// Opens a batch that is expected at `ctx`.
pub(crate) fn open_batch(
    key: &KeySlot,
    ctx: &PartitionContext,
    sealed: &SealedBytes,
) -> Option<Result<PlainBatch, OpenError>> {
    let aad = [&ctx.to_bytes()[..], sealed.header_bytes()].concat();
    let parts = Parts { salt: *sealed.salt(), commit: *sealed.commit(), tag: *sealed.tag() };
    let mut payload = sealed.ciphertext().to_vec();
    debug_assert!(payload.len() <= CIPHERTEXT_BYTES_MAX);
    let alg = sealed.header().algorithm;
    let opened = key.with(|key| seal::open_in_place(key, Purpose::Batch, alg, &aad, &parts, &mut payload))?;
    Some(opened.and_then(|()| PlainBatch::from_payload(payload)))
}

#[cfg(test)]
mod tests;
