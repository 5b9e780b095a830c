//! Blobs: a group's snapshot, or the index, in chunks with a checksum each.

use bytes::{Bytes, BytesMut};
use redb::{Database, TableDefinition};

use super::{ReadFailure, failed, open_if_there};
use crate::frame::codec::{CHUNK_HEAD, u32_at, u64_at};

pub(super) const BLOBS: TableDefinition<'_, (u64, u64), &[u8]> = TableDefinition::new("blobs");
const MAGIC: [u8; 4] = *b"ENSB";
const VERSION: u8 = 1;

/// Writes a chunk.
pub(super) fn encode(id: u64, n: u64, total: u64, piece: &[u8], out: &mut [u8]) {
    out[..CHUNK_HEAD].fill(0);
    out[..4].copy_from_slice(&MAGIC);
    out[4] = VERSION;
    out[8..16].copy_from_slice(&id.to_le_bytes());
    out[16..24].copy_from_slice(&n.to_le_bytes());
    out[24..32].copy_from_slice(&total.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&out[..40]), piece);
    out[40..44].copy_from_slice(&crc.to_le_bytes());
    out[CHUNK_HEAD..].copy_from_slice(piece);
}

/// Reads a blob and checks it; `None` when there is none.
pub(super) fn read(db: &Database, id: u64) -> Result<Option<Bytes>, ReadFailure> {
    let Some(table) = open_if_there(db, BLOBS)? else { return Ok(None) };
    let mut out = BytesMut::new();
    let mut total = None;
    for (expected, row) in (0_u64..).zip(table.range((id, 0)..(id + 1, 0)).map_err(failed)?) {
        let (key, value) = row.map_err(failed)?;
        let (n, chunk) = (key.value().1, value.value());
        let bad = |why: &str| ReadFailure::Damaged(format!("blob {id}, chunk {expected}: {why}"));
        if n != expected || chunk.len() < CHUNK_HEAD {
            return Err(bad("it is missing or cut short"));
        }
        let (head, piece) = chunk.split_at(CHUNK_HEAD);
        if head[..4] != MAGIC || crc32c::crc32c_append(crc32c::crc32c(&head[..40]), piece) != u32_at(head, 40) {
            return Err(bad("it fails its checksum"));
        }
        if head[4] != VERSION {
            return Err(bad("it is of a newer format"));
        }
        if u64_at(head, 8) != id || u64_at(head, 16) != n || total.is_some_and(|total| total != u64_at(head, 24)) {
            return Err(bad("it belongs elsewhere"));
        }
        total = Some(u64_at(head, 24));
        out.extend_from_slice(piece);
    }
    match total {
        None => Ok(None),
        Some(total) if total == out.len() as u64 => Ok(Some(out.freeze())),
        Some(_) => Err(ReadFailure::Damaged(format!("blob {id} is cut short"))),
    }
}
