//! The rows of a header's `ext`.
//!
//! ```text
//! | kind u8 | rows u32 | row | row | …    sections in ascending order of kind; a section without rows is left out
//! ```

use bytes::BufMut as _;

use super::{BatchError, EXT_BYTES_MAX, Fields};
use crate::SessionId;

const SECTION_BYTES: usize = 5;

/// A run of consecutively numbered events of one producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerRow {
    /// The producer's session: random, never a client's name.
    pub session: SessionId,
    /// Which life of the session.
    pub epoch: u32,
    /// The number of the run's first event.
    pub first_sequence: u64,
    /// How many events, at least one.
    pub count: u32,
}

impl ProducerRow {
    /// The number of the run's last event.
    pub fn last_sequence(&self) -> u64 {
        self.first_sequence + u64::from(self.count) - 1
    }

    pub(super) fn is_sound(&self) -> bool {
        self.count >= 1 && self.first_sequence.checked_add(u64::from(self.count)).is_some()
    }
}

/// How much of one type is in the batch. What the handle stands for is sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TypeRow {
    /// The type's number within its topic.
    pub handle: u32,
    /// How many events.
    pub count: u32,
    /// How many bytes they have, envelopes included, before compression.
    pub bytes: u64,
}

/// The keyed fingerprint of one event's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FingerprintRow {
    /// The event's offset, counted from the batch's first.
    pub delta: u32,
    /// The fingerprint.
    pub fingerprint: [u8; 16],
}

pub(super) trait Row: Sized {
    const KIND: u8;
    const BYTES: usize;
    fn put(&self, out: &mut Vec<u8>);
    fn take(fields: &mut Fields<'_>) -> Self;
}

impl Row for ProducerRow {
    const KIND: u8 = 1;
    const BYTES: usize = 32;

    fn put(&self, out: &mut Vec<u8>) {
        out.put_slice(self.session.as_bytes());
        out.put_u32(self.epoch);
        out.put_u64(self.first_sequence);
        out.put_u32(self.count);
    }

    fn take(fields: &mut Fields<'_>) -> Self {
        Self {
            session: SessionId::from_bytes(fields.array()),
            epoch: fields.u32(),
            first_sequence: fields.u64(),
            count: fields.u32(),
        }
    }
}

impl Row for TypeRow {
    const KIND: u8 = 2;
    const BYTES: usize = 16;

    fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(self.handle);
        out.put_u32(self.count);
        out.put_u64(self.bytes);
    }

    fn take(fields: &mut Fields<'_>) -> Self {
        Self { handle: fields.u32(), count: fields.u32(), bytes: fields.u64() }
    }
}

impl Row for FingerprintRow {
    const KIND: u8 = 3;
    const BYTES: usize = 20;

    fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(self.delta);
        out.put_slice(&self.fingerprint);
    }

    fn take(fields: &mut Fields<'_>) -> Self {
        Self { delta: fields.u32(), fingerprint: fields.array() }
    }
}

pub(super) fn len<R: Row>(rows: &[R]) -> usize {
    if rows.is_empty() { 0 } else { SECTION_BYTES + rows.len() * R::BYTES }
}

pub(super) fn put<R: Row>(rows: &[R], out: &mut Vec<u8>) {
    if rows.is_empty() {
        return;
    }
    out.put_u8(R::KIND);
    out.put_u32(rows.len() as u32);
    for row in rows {
        row.put(out);
    }
}

/// Takes the section of `R` off the front of `ext`, if that is what is there.
pub(super) fn take<R: Row>(ext: &mut &[u8]) -> Result<Vec<R>, BatchError> {
    if ext.first() != Some(&R::KIND) {
        return Ok(Vec::new());
    }
    let invalid = BatchError::Invalid { field: "ext" };
    let Some((head, rest)) = ext.split_first_chunk::<SECTION_BYTES>() else { return Err(invalid) };
    let count = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    // Bounded before it is multiplied or allocated: the count comes from bytes nobody has authenticated yet.
    if count == 0 || count > EXT_BYTES_MAX / R::BYTES || count * R::BYTES > rest.len() {
        return Err(invalid);
    }
    let (rows, rest) = rest.split_at(count * R::BYTES);
    *ext = rest;
    Ok(rows.chunks_exact(R::BYTES).map(|row| R::take(&mut Fields(row))).collect())
}
