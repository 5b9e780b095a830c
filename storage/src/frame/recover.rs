//! Opening a log: the index, then every frame after it, each record checked, none skipped.

use std::collections::BTreeMap;

use bytes::Bytes;
use ensign_proto::{GroupId, LogIndex, Term};

use crate::frame::codec::{ENTRY_HEAD, Head, Kind, RECORD_HEAD, entry_crc, u32_at};
use crate::frame::index::{self, Index};
use crate::frame::state::{Blob, Census, Change, Durable, Place};
use crate::frame::store::Store;
use crate::frame::{OpenError, corrupt_text, open_error};
use crate::log::EntryId;

/// What a start found.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) groups: BTreeMap<GroupId, Durable>,
    pub(crate) census: Census,
    /// The next chunk's sequence.
    pub(crate) next: u64,
    pub(crate) covered: u64,
    pub(crate) next_blob: u64,
    /// Bytes of the index.
    pub(crate) index_len: u64,
    /// Bytes of frames that the index does not cover.
    pub(crate) scanned: u64,
    /// Blobs that nothing refers to.
    pub(crate) orphans: Vec<u64>,
}

/// Reads the log.
pub(crate) fn recover(store: &Store) -> Result<Recovered, OpenError> {
    let path = store.path.clone();
    let open_error = |failure| open_error(&path, failure);
    let damaged = |what: String| OpenError::Corrupt { what: corrupt_text(&path, &what) };

    let blob = store.index().map_err(open_error)?;
    let index_len = blob.as_ref().map_or(0, |blob| blob.len() as u64);
    let index = match &blob {
        Some(bytes) => index::decode(bytes).map_err(|why| damaged(why.to_owned()))?,
        None => Index { covered: 1, next_blob: 1, ..Index::default() },
    };
    let had_index = blob.is_some();
    let Index { covered, next_blob, census, groups } = index;
    let mut found =
        Recovered { groups, census, next: covered, covered, next_blob, index_len, scanned: 0, orphans: Vec::new() };

    let indexed_start = found.census.log_start(covered);
    let extent = store.extent().map_err(open_error)?;
    if let Some((first, last, count)) = extent {
        if last - first + 1 != count || last + 1 < covered {
            let missing = (last - first + 1).saturating_sub(count);
            return Err(damaged(format!(
                "frame chunks {first} to {last}: {missing} are missing, and chunk {} was the last known",
                covered - 1
            )));
        }
        if found.census.log_start(covered) > first {
            return Err(damaged(format!("frame chunk {first} should have been removed")));
        }
        // The frames that the index lists and that were purged after it was written.
        while found.census.frames.front().is_some_and(|frame| frame.first < first) {
            found.census.pop();
        }
    } else if had_index && covered > 1 {
        return Err(damaged("all frames are missing".to_owned()));
    }

    let mut log_start = None;
    store
        .walk(covered, |head, cuts, frame| {
            found.next = head.frame + cuts.len() as u64;
            found.scanned += frame.len() as u64;
            log_start = Some(head.log_start);
            found.census.push(head.frame, frame.len() as u32, cuts.iter().copied());
            replay(frame, head.frame, cuts, &mut found)?;
            Ok(true)
        })
        .map_err(open_error)?;

    if let Some((first, last, _)) = extent {
        // Every frame says where the log begins as of its commit, and so does the index.
        let start = log_start.unwrap_or(indexed_start);
        if first != start || last + 1 != found.next {
            return Err(damaged(format!(
                "frame chunks {start} to {} are expected, {first} to {last} were found",
                found.next - 1
            )));
        }
    }
    let used: Vec<u64> = found.groups.values().filter_map(|group| group.snapshot).map(|blob| blob.id).collect();
    for id in store.blob_ids().map_err(open_error)? {
        if id != super::store::INDEX_BLOB && !used.contains(&id) {
            found.orphans.push(id);
        }
        found.next_blob = found.next_blob.max(id + 1);
    }
    Ok(found)
}

/// Applies a frame's records.
fn replay(frame: &Bytes, first: u64, cuts: &[usize], found: &mut Recovered) -> Result<(), String> {
    let Recovered { groups, census, .. } = found;
    each(frame, first, cuts, |group, change| {
        let removed = change == Change::Remove;
        groups.entry(group).or_default().apply(change, census)?;
        if removed {
            groups.remove(&group);
        }
        Ok(())
    })
}

/// Visits every change that a frame holds, in order.
pub(crate) fn each(
    frame: &Bytes,
    first: u64,
    cuts: &[usize],
    mut visit: impl FnMut(GroupId, Change) -> Result<(), String>,
) -> Result<(), String> {
    let mut locate = Locator::new(first, cuts.to_vec());
    let mut at = 0;
    while at < frame.len() {
        let head = Head::decode(&frame[at..])?;
        let start = at + RECORD_HEAD;
        let end = start + head.body as usize;
        let body =
            if end <= frame.len() { frame.slice(start..end) } else { return Err("a record is cut short".to_owned()) };
        let id = EntryId { term: Term(head.term), index: LogIndex(head.index) };
        match head.kind {
            Kind::Append | Kind::Moved => {
                let mut inside = 0;
                for index in head.index..head.index + u64::from(head.count) {
                    let rest = body.get(inside..inside + ENTRY_HEAD).ok_or("a run of entries is cut short")?;
                    let len = u32_at(rest, 4) as usize;
                    let payload =
                        body.get(inside + ENTRY_HEAD..inside + ENTRY_HEAD + len).ok_or("an entry is cut short")?;
                    if entry_crc(head.group, EntryId { index: LogIndex(index), ..id }, payload) != u32_at(rest, 0) {
                        return Err(format!("entry {index} of group {} fails its checksum", head.group));
                    }
                    let place = locate.place(start + inside, head.term, len);
                    let change = if head.kind == Kind::Append {
                        Change::Entry { index, place }
                    } else {
                        Change::Moved { index, place }
                    };
                    visit(head.group, change).map_err(|why| format!("group {}: {why}", head.group))?;
                    inside += ENTRY_HEAD + len;
                }
            }
            Kind::Vote => visit(head.group, Change::Vote(Bytes::copy_from_slice(&body)))?,
            Kind::Committed => {
                visit(head.group, Change::Committed((head.count > 0).then(|| Bytes::copy_from_slice(&body))))?;
            }
            Kind::Truncate => visit(head.group, Change::Truncate(head.index))?,
            Kind::Purge => visit(head.group, Change::Purge(id))?,
            Kind::Snapshot => visit(head.group, Change::Snapshot(Blob { id: head.index, len: head.term }))?,
            Kind::Checkpoint => visit(head.group, Change::Checkpoint(locate.place(at, 0, body.len())))?,
            Kind::Remove => visit(head.group, Change::Remove)?,
        }
        at = end;
    }
    Ok(())
}

/// Turns positions in a frame, which come in ascending order, into places.
pub(crate) struct Locator {
    chunk: u64,
    cuts: std::vec::IntoIter<usize>,
    start: usize,
    end: usize,
}

impl Locator {
    pub(crate) fn new(first: u64, cuts: Vec<usize>) -> Self {
        let mut cuts = cuts.into_iter();
        let end = cuts.next().unwrap_or(usize::MAX);
        Self { chunk: first, cuts, start: 0, end }
    }

    pub(crate) fn place(&mut self, at: usize, term: u64, len: usize) -> Place {
        while at >= self.end {
            self.start = self.end;
            self.end += self.cuts.next().unwrap_or(usize::MAX / 2);
            self.chunk += 1;
        }
        Place { chunk: self.chunk, term, offset: (at - self.start) as u32, len: len as u32 }
    }
}
