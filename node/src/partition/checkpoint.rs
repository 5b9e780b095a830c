//! The applied state as bytes: a partition's snapshot descriptor, and the checkpoint that spares a restart the replay.
//!
//! ```text
//! "EPRT" | version u8 = 1 | body | CRC-32C of all before it, u32
//! body: context[52] | log start, next offset, applied index u64 | link[32] | last id[10] | bytes u64
//!   | keys u32, each: dek[16], length u32, wrapped | types u32, each: dek[16], length u32, sealed, events, bytes, modified u64
//!   | dropped flag u8, dropped through u64 | sessions u32, oldest first, each: id[16], epoch u32, last, seen u64,
//!     runs u8, each: first, last, offset, committed u64
//!   | stride, since last u64 | marks u32, each: offset, committed, index u64
//!   | refused in place u32, each: index u64
//! ```
//!
//! Big-endian. Format: docs/format.md. Everything in it is on the list of what may be known without a key.

use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use ensign_proto::{DekId, Link, LogIndex, Offset, PartitionContext, Rlid, SessionId};
use ensign_raft::RestoreError;

use super::index::{Mark, SparseIndex};
use super::machine::{DekRow, State, TypeCount};
use super::producers::{Producers, Run, Session};

const MAGIC: &[u8; 4] = b"EPRT";
const VERSION: u8 = 1;

pub(super) fn encode(context: &PartitionContext, state: &State) -> Bytes {
    let mut out = BytesMut::with_capacity(1024 + state.producers.len() * 80);
    out.put_slice(MAGIC);
    out.put_u8(VERSION);
    out.put_slice(&context.to_bytes());
    out.put_u64(state.log_start.0);
    out.put_u64(state.next_offset.0);
    out.put_u64(state.applied.0);
    out.put_slice(&state.link.0);
    out.put_slice(state.last_id.as_bytes());
    out.put_u64(state.bytes);
    out.put_u32(state.deks.len() as u32);
    for row in &state.deks {
        out.put_slice(row.dek.as_bytes());
        put_bytes(&row.wrapped, &mut out);
    }
    out.put_u32(state.types.len() as u32);
    for counted in &state.types {
        out.put_slice(counted.dek.as_bytes());
        put_bytes(&counted.sealed, &mut out);
        out.put_u64(counted.events);
        out.put_u64(counted.bytes);
        out.put_u64(counted.modified_ms);
    }
    let dropped = state.producers.dropped_through_ms();
    out.put_u8(u8::from(dropped.is_some()));
    out.put_u64(dropped.unwrap_or(0));
    out.put_u32(state.producers.len() as u32);
    for (id, session) in state.producers.oldest_first() {
        out.put_slice(id.as_bytes());
        out.put_u32(session.epoch);
        out.put_u64(session.last);
        out.put_u64(session.seen_ms);
        out.put_u8(session.runs.len() as u8);
        for run in &session.runs {
            for number in [run.first, run.last, run.offset.0, run.committed_ms] {
                out.put_u64(number);
            }
        }
    }
    let (stride, since_last) = state.index.spacing();
    out.put_u64(stride);
    out.put_u64(since_last);
    out.put_u32(state.index.marks().len() as u32);
    for mark in state.index.marks() {
        out.put_u64(mark.offset.0);
        out.put_u64(mark.committed_ms);
        out.put_u64(mark.index.0);
    }
    out.put_u32(state.refused_in_place.len() as u32);
    for index in &state.refused_in_place {
        out.put_u64(index.0);
    }
    let checksum = crc32c::crc32c(&out);
    out.put_u32(checksum);
    out.freeze()
}

fn put_bytes(bytes: &Bytes, out: &mut BytesMut) {
    out.put_u32(bytes.len() as u32);
    out.put_slice(bytes);
}

pub(super) fn decode(context: &PartitionContext, bytes: &Bytes) -> Result<State, RestoreError> {
    let Some((body, checksum)) = bytes.split_last_chunk::<4>() else {
        return Err(RestoreError::new("a partition's state is cut short"));
    };
    if !body.starts_with(MAGIC) {
        return Err(RestoreError::new("not a partition's state"));
    }
    // A newer version is told from damage: its checksum may be of another kind.
    let version = body.get(4).copied();
    if version != Some(VERSION) {
        return Err(RestoreError::new(format!(
            "a partition's state of version {version:?}; this build reads {VERSION}"
        )));
    }
    if crc32c::crc32c(body) != u32::from_be_bytes(*checksum) {
        return Err(RestoreError::new("a partition's state fails its checksum"));
    }
    let mut fields = Fields(bytes.slice(5..bytes.len() - 4));
    let state = fields.state(context).ok_or_else(|| RestoreError::new("a partition's state does not read as one"))?;
    if fields.0.has_remaining() {
        return Err(RestoreError::new("bytes follow a partition's state"));
    }
    Ok(state)
}

struct Fields(Bytes);

impl Fields {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = *self.0.first_chunk::<N>()?;
        self.0.advance(N);
        Some(array)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    fn bytes(&mut self) -> Option<Bytes> {
        let length = self.u32()? as usize;
        (length <= self.0.len()).then(|| Bytes::copy_from_slice(&self.0.split_to(length)))
    }

    fn list<T>(&mut self, mut item: impl FnMut(&mut Self, u32) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()?;
        (0..count).map(|n| item(self, n)).collect()
    }

    fn state(&mut self, context: &PartitionContext) -> Option<State> {
        if self.array::<{ PartitionContext::BYTES }>()? != context.to_bytes() {
            return None;
        }
        let log_start = Offset(self.u64()?);
        let next_offset = Offset(self.u64()?);
        let applied = LogIndex(self.u64()?);
        let link = Link(self.array()?);
        let last_id = Rlid::from_bytes(self.array()?);
        let bytes = self.u64()?;
        let deks = self.list(|f, _| Some(DekRow { dek: DekId::from_bytes(f.array()?), wrapped: f.bytes()? }))?;
        let types = self.list(|f, n| {
            Some(TypeCount {
                handle: n + 1,
                dek: DekId::from_bytes(f.array()?),
                sealed: f.bytes()?,
                events: f.u64()?,
                bytes: f.u64()?,
                modified_ms: f.u64()?,
            })
        })?;
        let dropped = self.u8()? == 1;
        let dropped_through = self.u64()?;
        let sessions = self.list(|f, _| f.session())?;
        let producers = Producers::rebuild(sessions, dropped.then_some(dropped_through));
        let spacing = (self.u64()?, self.u64()?);
        let marks = self
            .list(|f, _| Some(Mark { offset: Offset(f.u64()?), committed_ms: f.u64()?, index: LogIndex(f.u64()?) }))?;
        let index = SparseIndex::rebuild(marks, spacing);
        let refused_in_place = self.list(|f, _| f.u64().map(LogIndex))?;
        Some(State {
            log_start,
            next_offset,
            link,
            last_id,
            deks,
            types,
            producers,
            bytes,
            index,
            refused_in_place,
            applied,
            halted: None,
        })
    }

    fn session(&mut self) -> Option<(SessionId, Session)> {
        let id = SessionId::from_bytes(self.array()?);
        let (epoch, last, seen_ms) = (self.u32()?, self.u64()?, self.u64()?);
        let runs = self.u8()?;
        let runs = (0..runs).map(|_| {
            Some(Run { first: self.u64()?, last: self.u64()?, offset: Offset(self.u64()?), committed_ms: self.u64()? })
        });
        let runs = runs.collect::<Option<_>>()?;
        Some((id, Session { epoch, last, seen_ms, runs }))
    }
}
