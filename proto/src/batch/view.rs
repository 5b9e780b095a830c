//! A sealed batch with its parts told apart.

use std::fmt;

use bytes::Bytes;

use super::{BatchError, BatchHeader, COMMIT_BYTES, SALT_BYTES, TAG_BYTES};

/// The bytes of a sealed batch, checked to have the parts they claim. Nothing is copied; a clone shares the bytes.
///
/// This says that the bytes are well formed, not that they are authentic: only opening them says that, in `keyvault`.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedBytes {
    bytes: Bytes,
    header: BatchHeader,
    header_len: usize,
    ct_len: usize,
}

impl SealedBytes {
    /// How many bytes a batch has beyond its header and ciphertext.
    pub const OVERHEAD: usize = SALT_BYTES + COMMIT_BYTES + TAG_BYTES;

    /// Tells the parts of `bytes` apart.
    ///
    /// # Errors
    /// Any [`BatchError`]. `UnknownFormat` and `UnknownAlgorithm` mean that a newer build wrote the batch, everything else
    /// that the bytes are damaged or were never a batch.
    pub fn parse(bytes: Bytes) -> Result<Self, BatchError> {
        let decoded = BatchHeader::decode(&bytes)?;
        let needed = decoded.len + Self::OVERHEAD + decoded.ct_len;
        if bytes.len() < needed {
            return Err(BatchError::Truncated { needed, found: bytes.len() });
        }
        if bytes.len() > needed {
            return Err(BatchError::Trailing { extra: bytes.len() - needed });
        }
        Ok(Self { bytes, header: decoded.header, header_len: decoded.len, ct_len: decoded.ct_len })
    }

    /// The header, read.
    pub fn header(&self) -> &BatchHeader {
        &self.header
    }

    /// The whole batch.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The whole batch.
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// The header as the seal binds it.
    pub fn header_bytes(&self) -> &[u8] {
        &self.bytes[..self.header_len]
    }

    /// The salt.
    pub fn salt(&self) -> &[u8; SALT_BYTES] {
        self.part(self.header_len)
    }

    /// The key commitment.
    pub fn commit(&self) -> &[u8; COMMIT_BYTES] {
        self.part(self.header_len + SALT_BYTES)
    }

    /// The sealed events.
    pub fn ciphertext(&self) -> &[u8] {
        &self.bytes[self.ciphertext_at()..][..self.ct_len]
    }

    /// The authentication tag.
    pub fn tag(&self) -> &[u8; TAG_BYTES] {
        self.part(self.ciphertext_at() + self.ct_len)
    }

    fn ciphertext_at(&self) -> usize {
        self.header_len + SALT_BYTES + COMMIT_BYTES
    }

    fn part<const N: usize>(&self, at: usize) -> &[u8; N] {
        self.bytes[at..].first_chunk().expect("`parse` checked the length of the whole")
    }
}

impl fmt::Debug for SealedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealedBytes")
            .field("header", &self.header)
            .field("ct_len", &self.ct_len)
            .finish_non_exhaustive()
    }
}

impl TryFrom<Bytes> for SealedBytes {
    type Error = BatchError;

    fn try_from(bytes: Bytes) -> Result<Self, BatchError> {
        Self::parse(bytes)
    }
}
