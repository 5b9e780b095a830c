//! A sealed batch as bytes: what a partition's Raft entry is, on disk and between nodes.
//!
//! ```text
//! | header, 100 bytes + ext | salt 32 | commit 32 | ciphertext, ct_len | tag 16 |
//! ```
//!
//! The header is readable without a key, and the seal binds every bit of it together with the partition it is for
//! ([`PartitionContext`](crate::PartitionContext)). Numbers are big-endian. There is exactly one encoding of a header: what
//! decodes encodes back to the same bytes. Making the sealed part is `keyvault`'s alone. Format: docs/format.md.

mod rows;
mod view;

use bytes::BufMut as _;
use thiserror::Error;

pub use self::rows::{FingerprintRow, ProducerRow, TypeRow};
pub use self::view::SealedBytes;
use crate::{DekId, Link, Offset, Rlid, Term};

/// The format that this build writes, and the only one it reads.
pub const BATCH_FORMAT: u8 = 1;
/// A header without `ext`.
pub const HEADER_BYTES: usize = 100;
/// The most that `ext` may take.
pub const EXT_BYTES_MAX: usize = 64 * 1024;
/// The random salt that the batch's own key is derived with.
pub const SALT_BYTES: usize = 32;
/// The commitment to that key.
pub const COMMIT_BYTES: usize = 32;
/// The authentication tag.
pub const TAG_BYTES: usize = 16;
/// The most ciphertext a batch may carry: 16 MiB of events and what padding can add to them.
pub const CIPHERTEXT_BYTES_MAX: usize = 20 * 1024 * 1024;

/// How a batch is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Algorithm {
    /// AES-256-GCM, the default.
    #[default]
    Aes256Gcm = 1,
    /// AES-192-GCM.
    Aes192Gcm = 2,
    /// AES-128-GCM.
    Aes128Gcm = 3,
}

impl TryFrom<u8> for Algorithm {
    type Error = BatchError;

    fn try_from(found: u8) -> Result<Self, BatchError> {
        match found {
            1 => Ok(Self::Aes256Gcm),
            2 => Ok(Self::Aes192Gcm),
            3 => Ok(Self::Aes128Gcm),
            _ => Err(BatchError::UnknownAlgorithm { found }),
        }
    }
}

/// Bytes that are not a sealed batch, or a header that cannot be written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BatchError {
    /// The bytes end too early. Read them again from another replica.
    #[error("a sealed batch needs {needed} bytes, there are {found}")]
    Truncated {
        /// How many there must be, as far as the bytes tell.
        needed: usize,
        /// How many there are.
        found: usize,
    },
    /// There are bytes after the end.
    #[error("{extra} bytes follow the end of a sealed batch")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// A newer build wrote it: a replica that meets it in its log must not go on.
    #[error("batch format {found} is newer than this build")]
    UnknownFormat {
        /// The version byte.
        found: u8,
    },
    /// A newer build sealed it.
    #[error("seal algorithm {found} is newer than this build")]
    UnknownAlgorithm {
        /// The algorithm byte.
        found: u8,
    },
    /// A field has a value that no writer gives it.
    #[error("a batch header's {field} is out of range")]
    Invalid {
        /// Which field.
        field: &'static str,
    },
}

/// What anyone may know about a batch: its place, its key's name, and what apply needs to judge it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchHeader {
    /// How the batch is sealed.
    pub algorithm: Algorithm,
    /// How many events it holds, at least one.
    pub count: u32,
    /// The leadership that sealed it.
    pub term: Term,
    /// The offset of its first event.
    pub base_offset: Offset,
    /// The id of its first event.
    pub first_id: Rlid,
    /// The id of its last event. Ids strictly increase within a batch.
    pub last_id: Rlid,
    /// The data key that it is sealed under.
    pub dek: DekId,
    /// The link of the batch before it.
    pub prev: Link,
    /// Runs of consecutively numbered events, for de-duplication of retries.
    pub producers: Vec<ProducerRow>,
    /// How many events and bytes of which type, for counters.
    pub types: Vec<TypeRow>,
    /// Keyed content fingerprints, for de-duplication by content.
    pub fingerprints: Vec<FingerprintRow>,
}

impl BatchHeader {
    /// How many bytes the header takes.
    pub fn encoded_len(&self) -> usize {
        HEADER_BYTES + self.ext_len()
    }

    /// The offset after the batch's last event.
    pub fn next_offset(&self) -> Offset {
        self.base_offset.plus(u64::from(self.count))
    }

    /// Appends the header of a batch with `ct_len` bytes of ciphertext to `out`.
    ///
    /// # Errors
    /// [`BatchError::Invalid`] if a reader would refuse it; nothing is appended then.
    pub fn encode_into(&self, ct_len: usize, out: &mut Vec<u8>) -> Result<(), BatchError> {
        self.check(ct_len)?;
        out.reserve(self.encoded_len());
        out.put_slice(&[BATCH_FORMAT, self.algorithm as u8, 0, 0]);
        out.put_u32(self.count);
        out.put_u64(self.term.0);
        out.put_u64(self.base_offset.0);
        out.put_slice(self.first_id.as_bytes());
        out.put_slice(self.last_id.as_bytes());
        out.put_u32(ct_len as u32);
        out.put_slice(self.dek.as_bytes());
        out.put_slice(&self.prev.0);
        out.put_u32(self.ext_len() as u32);
        rows::put(&self.producers, out);
        rows::put(&self.types, out);
        rows::put(&self.fingerprints, out);
        Ok(())
    }

    /// The header of a batch with `ct_len` bytes of ciphertext. Errors as [`Self::encode_into`].
    pub fn encode(&self, ct_len: usize) -> Result<Vec<u8>, BatchError> {
        let mut out = Vec::new();
        self.encode_into(ct_len, &mut out)?;
        Ok(out)
    }

    /// Reads the header at the start of `bytes`; what follows it is not looked at.
    ///
    /// # Errors
    /// Every [`BatchError`] but `Trailing`. [`BatchError::UnknownFormat`] is told from damage by the first byte alone.
    pub fn decode(bytes: &[u8]) -> Result<DecodedHeader, BatchError> {
        let truncated = |needed| BatchError::Truncated { needed, found: bytes.len() };
        match bytes.first() {
            None => return Err(truncated(HEADER_BYTES)),
            Some(&BATCH_FORMAT) => {}
            Some(&found) => return Err(BatchError::UnknownFormat { found }),
        }
        let mut fields = Fields(bytes.get(1..HEADER_BYTES).ok_or_else(|| truncated(HEADER_BYTES))?);
        let algorithm = Algorithm::try_from(fields.array::<1>()[0])?;
        if fields.array::<2>() != [0, 0] {
            return Err(BatchError::Invalid { field: "flags" });
        }
        let mut header = Self {
            algorithm,
            count: fields.u32(),
            term: Term(fields.u64()),
            base_offset: Offset(fields.u64()),
            first_id: Rlid::from_bytes(fields.array()),
            last_id: Rlid::from_bytes(fields.array()),
            dek: DekId::default(),
            prev: Link([0; 32]),
            producers: Vec::new(),
            types: Vec::new(),
            fingerprints: Vec::new(),
        };
        let ct_len = fields.u32() as usize;
        header.dek = DekId::from_bytes(fields.array());
        header.prev = Link(fields.array());
        let ext_len = fields.u32() as usize;
        if ext_len > EXT_BYTES_MAX {
            return Err(BatchError::Invalid { field: "ext_len" });
        }
        let len = HEADER_BYTES + ext_len;
        let mut ext = bytes.get(HEADER_BYTES..len).ok_or_else(|| truncated(len))?;
        header.producers = rows::take(&mut ext)?;
        header.types = rows::take(&mut ext)?;
        header.fingerprints = rows::take(&mut ext)?;
        if !ext.is_empty() {
            return Err(BatchError::Invalid { field: "ext" });
        }
        header.check(ct_len)?;
        Ok(DecodedHeader { header, len, ct_len })
    }

    /// The rules that hold for every header, of whatever age: writer and reader share them.
    fn check(&self, ct_len: usize) -> Result<(), BatchError> {
        let require = |holds: bool, field| if holds { Ok(()) } else { Err(BatchError::Invalid { field }) };
        require(self.count >= 1, "count")?;
        require(self.base_offset.0 >= 1, "base_offset")?;
        require(self.base_offset.0.checked_add(u64::from(self.count)).is_some(), "base_offset")?;
        let span = position(self.last_id).checked_sub(position(self.first_id));
        require(span.is_some_and(|span| span >= u128::from(self.count) - 1), "last_rlid")?;
        require(ct_len <= CIPHERTEXT_BYTES_MAX, "ct_len")?;
        require(self.ext_len() <= EXT_BYTES_MAX, "ext_len")?;
        let numbered: u64 = self.producers.iter().map(|row| u64::from(row.count)).sum();
        require(self.producers.iter().all(ProducerRow::is_sound) && numbered <= u64::from(self.count), "producers")?;
        let typed: u64 = self.types.iter().map(|row| u64::from(row.count)).sum();
        require(typed <= u64::from(self.count), "types")?;
        require(self.fingerprints.iter().all(|row| row.delta < self.count), "fingerprints")
    }

    fn ext_len(&self) -> usize {
        rows::len(&self.producers) + rows::len(&self.types) + rows::len(&self.fingerprints)
    }
}

/// A header as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodedHeader {
    /// The header.
    pub header: BatchHeader,
    /// How many bytes it took.
    pub len: usize,
    /// How many bytes of ciphertext it announces.
    pub ct_len: usize,
}

/// Where an id stands in the order of ids: milliseconds, then sequence.
fn position(id: Rlid) -> u128 {
    u128::from(id.unix_ms()) << 32 | u128::from(id.sequence())
}

/// Takes fixed-width fields off the front of a slice whose length was checked.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("the caller checked the length of the whole");
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }
}

#[cfg(test)]
mod tests;
