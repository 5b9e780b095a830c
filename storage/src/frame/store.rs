//! The redb database below the log: its two tables, and the checks on everything that comes out of them.
//!
//! redb notices a damaged page only while it repairs, and may panic on one: so nothing here trusts a byte that has no
//! checksum of ours, and a panic inside redb is taken for the corruption that it is.

mod blob;

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::{Bytes, BytesMut};
use ensign_proto::{GroupId, LogIndex, Term};
use redb::{Builder, Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

use crate::backend::Space;
use crate::frame::codec::{
    CHUNK_HEAD, ChunkHead, ENTRY_HEAD, FrameBuilder, Head, Kind, RECORD_HEAD, entry_crc, pieces, u32_at, u64_at,
};
use crate::frame::state::{Blob, Place};
use crate::frame::store::blob::BLOBS;
use crate::log::{Entry, EntryId};

const FRAMES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("frames");
/// The blob that holds the index.
pub(crate) const INDEX_BLOB: u64 = 0;
/// How often one read waits for the database to be opened again.
const REOPENS: u32 = 64;

/// Why a read failed.
#[derive(Debug)]
pub(crate) enum ReadFailure {
    /// What is stored is not what was written.
    Damaged(String),
    /// The disk, or redb, gave up.
    Failed(String),
    Closed,
}

/// Why a commit failed.
#[derive(Debug)]
pub(crate) enum WriteFailure {
    /// The disk has no room for the file to grow, and nothing was changed.
    Full,
    /// Anything else. What was written is unknown.
    Failed(String),
}

/// Everything that one commit changes.
pub(crate) struct Commit<'a> {
    pub(crate) first: u64,
    pub(crate) frame: &'a mut FrameBuilder,
    pub(crate) max_order: u32,
    /// The oldest chunk that stays.
    pub(crate) log_start: u64,
    /// Whether anything older is there to remove.
    pub(crate) purge: bool,
    /// New blobs, which replace those of the same id.
    pub(crate) blobs: Vec<(u64, Bytes)>,
    pub(crate) dropped_blobs: Vec<u64>,
    pub(crate) durable: bool,
}

pub(crate) struct Store {
    db: RwLock<Option<Database>>,
    /// How often the database was opened again after the disk had refused it growth.
    reopens: Mutex<u64>,
    /// It was, or never will be.
    settled: Condvar,
    space: RwLock<Space>,
    cache: usize,
    pub(crate) path: PathBuf,
}

/// What the last rewrite of the file was marked with.
const MARK: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("mark");
const MARK_MAGIC: [u8; 4] = *b"ENSM";
const MARK_VERSION: u8 = 1;

impl Store {
    pub(crate) fn open(space: Space, path: &Path, cache: usize) -> Result<Self, ReadFailure> {
        let db = open_database(&space, cache)?;
        let (db, space) = (RwLock::new(Some(db)), RwLock::new(space));
        Ok(Self { db, reopens: Mutex::default(), settled: Condvar::new(), space, cache, path: path.to_owned() })
    }

    /// Opens the database again after a growth was refused: redb never works on after a failed call.
    pub(crate) fn reopen(&self) -> Result<(), ReadFailure> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        drop(db.take());
        let space = self.space();
        space.reset();
        let opened = open_database(&space, self.cache).map(|opened| *db = Some(opened));
        drop(db);
        self.settle(1);
        opened
    }

    /// Lets the reads go on that wait for the database to be opened again.
    pub(crate) fn abandon(&self) {
        self.settle(0);
    }

    fn settle(&self, reopens: u64) {
        let mut known = self.reopens();
        *known += reopens;
        // Under the lock, so that a reader sees both or neither.
        self.space().forget_refusal();
        drop(known);
        self.settled.notify_all();
    }

    fn reopens(&self) -> MutexGuard<'_, u64> {
        self.reopens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the database; a clean close saves the next start a repair.
    pub(crate) fn close(&self) -> Result<(), String> {
        let db = self.db.write().unwrap_or_else(PoisonError::into_inner).take();
        guarded(|| db.map_or(Ok(()), |db| db.close().map_err(text)))
    }

    /// The file below.
    pub(crate) fn space(&self) -> Space {
        self.space.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn cache(&self) -> usize {
        self.cache
    }

    /// Closes the database, lets `swap` put another file in its place, and opens that one. Nobody reads meanwhile; `moved` runs before
    /// anybody reads again.
    pub(crate) fn replace(
        &self,
        swap: impl FnOnce() -> Result<Space, String>,
        moved: impl FnOnce(),
    ) -> Result<(), String> {
        let mut db = self.db.write().unwrap_or_else(PoisonError::into_inner);
        let old = db.take();
        guarded(|| old.map_or(Ok(()), |old| old.close().map_err(text)))?;
        let space = swap()?;
        let opened = open_database(&space, self.cache).map_err(|failure| format!("{failure:?}"))?;
        space.accept().map_err(|error| error.to_string())?;
        *self.space.write().unwrap_or_else(PoisonError::into_inner) = space;
        *db = Some(opened);
        moved();
        Ok(())
    }

    /// Marks the file: one of its own commits.
    pub(crate) fn set_mark(&self, mark: u64) -> Result<(), String> {
        let mut bytes = [0_u8; 20];
        bytes[..4].copy_from_slice(&MARK_MAGIC);
        bytes[4] = MARK_VERSION;
        bytes[8..16].copy_from_slice(&mark.to_le_bytes());
        let crc = crc32c::crc32c(&bytes[..16]);
        bytes[16..].copy_from_slice(&crc.to_le_bytes());
        let set = |db: &Database| {
            guarded(|| {
                let txn = db.begin_write().map_err(text)?;
                txn.open_table(MARK).map_err(text)?.insert(0, &bytes[..]).map_err(text)?;
                txn.commit().map_err(text)
            })
        };
        self.with_db(|| Err("the database is closed".to_owned()), set)
    }

    /// The file's mark; 0 when it has none.
    pub(crate) fn mark(&self) -> Result<u64, ReadFailure> {
        self.read(|db| {
            let Some(table) = open_if_there(db, MARK)? else { return Ok(0) };
            let Some(value) = table.get(0).map_err(failed)? else { return Ok(0) };
            let bytes = value.value();
            let whole =
                bytes.len() == 20 && bytes[..4] == MARK_MAGIC && crc32c::crc32c(&bytes[..16]) == u32_at(bytes, 16);
            if !whole {
                return Err(ReadFailure::Damaged("the mark of the last rewrite fails its checksum".to_owned()));
            }
            if bytes[4] != MARK_VERSION {
                return Err(ReadFailure::Damaged("the mark of the last rewrite is of a newer format".to_owned()));
            }
            Ok(u64_at(bytes, 8))
        })
    }

    fn with_db<T>(&self, closed: impl FnOnce() -> T, run: impl FnOnce(&Database) -> T) -> T {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        db.as_ref().map_or_else(closed, run)
    }

    /// Writes one commit, and syncs it.
    pub(crate) fn commit(&self, commit: Commit<'_>) -> Result<(), WriteFailure> {
        let written = self.with_db(|| Err("the database is closed".to_owned()), |db| guarded(|| write(db, commit)));
        written.map_err(
            |cause| if self.space().growth_refused() { WriteFailure::Full } else { WriteFailure::Failed(cause) },
        )
    }

    /// Reads. A growth that the disk refuses shuts redb to readers as well, until the writer opens it again: on a full
    /// disk reads go on, so they wait for that.
    fn read<T>(&self, run: impl Fn(&Database) -> Result<T, ReadFailure>) -> Result<T, ReadFailure> {
        for _ in 0..REOPENS {
            let before = *self.reopens();
            match self.read_once(&run) {
                Err(ReadFailure::Failed(cause)) => {
                    if !self.opened_again(before) {
                        return Err(ReadFailure::Failed(cause));
                    }
                }
                found => return found,
            }
        }
        self.read_once(&run)
    }

    /// Waits while a refused growth keeps the database shut, and tells whether it was opened again since `before`.
    fn opened_again(&self, before: u64) -> bool {
        let mut now = self.reopens();
        while *now == before && self.space().growth_refused() {
            now = self.settled.wait(now).unwrap_or_else(PoisonError::into_inner);
        }
        *now != before
    }

    fn read_once<T>(&self, run: impl FnOnce(&Database) -> Result<T, ReadFailure>) -> Result<T, ReadFailure> {
        self.with_db(
            || Err(ReadFailure::Closed),
            |db| {
                catch_unwind(AssertUnwindSafe(|| run(db)))
                    .unwrap_or_else(|_| Err(ReadFailure::Damaged(UNREADABLE.to_owned())))
            },
        )
    }

    /// Reads entries, in the order asked.
    pub(crate) fn entries(&self, group: GroupId, places: &[(u64, Place)]) -> Result<Vec<Entry>, ReadFailure> {
        if places.is_empty() {
            return Ok(Vec::new());
        }
        self.read(|db| {
            let mut chunks = Chunks::new(db)?;
            let mut found = Vec::with_capacity(places.len());
            for (index, place) in places {
                let bytes = chunks.bytes(place.chunk, place.offset as usize, ENTRY_HEAD + place.len as usize)?;
                let id = EntryId { term: Term(place.term), index: LogIndex(*index) };
                let payload = bytes.slice(ENTRY_HEAD..);
                if u32_at(&bytes, 4) != place.len || u32_at(&bytes, 0) != entry_crc(group, id, &payload) {
                    return Err(damaged_chunk(
                        place.chunk,
                        &format!("entry {index} of group {group} fails its checksum"),
                    ));
                }
                found.push(Entry { id, payload });
            }
            Ok(found)
        })
    }

    /// Reads a checkpoint.
    pub(crate) fn checkpoint(&self, group: GroupId, place: Place) -> Result<Bytes, ReadFailure> {
        self.read(|db| {
            let mut chunks = Chunks::new(db)?;
            let bytes = chunks.bytes(place.chunk, place.offset as usize, RECORD_HEAD + place.len as usize)?;
            match Head::decode(&bytes) {
                Ok(head) if head.kind == Kind::Checkpoint && head.group == group => Ok(bytes.slice(RECORD_HEAD..)),
                _ => Err(damaged_chunk(place.chunk, &format!("the checkpoint of group {group} fails its checksum"))),
            }
        })
    }

    /// Reads a blob and checks it.
    pub(crate) fn blob(&self, blob: Blob) -> Result<Bytes, ReadFailure> {
        let found = self.read(|db| blob::read(db, blob.id))?;
        match found {
            Some(bytes) if bytes.len() as u64 == blob.len => Ok(bytes),
            _ => Err(ReadFailure::Damaged(format!("blob {} is missing or cut short", blob.id))),
        }
    }

    /// Reads the index, if there is one.
    pub(crate) fn index(&self) -> Result<Option<Bytes>, ReadFailure> {
        self.read(|db| blob::read(db, INDEX_BLOB))
    }

    /// The ids of all blobs.
    pub(crate) fn blob_ids(&self) -> Result<Vec<u64>, ReadFailure> {
        self.read(|db| {
            let Some(table) = open_if_there(db, BLOBS)? else { return Ok(Vec::new()) };
            let mut ids = Vec::new();
            let mut from = 0;
            while let Some(next) = table.range((from, 0)..).map_err(failed)?.next() {
                let id = next.map_err(failed)?.0.value().0;
                ids.push(id);
                from = id + 1;
            }
            Ok(ids)
        })
    }

    /// The first and last sequence and the number of chunks; `None` when there is none.
    pub(crate) fn extent(&self) -> Result<Option<(u64, u64, u64)>, ReadFailure> {
        self.read(|db| {
            let Some(table) = open_if_there(db, FRAMES)? else { return Ok(None) };
            let (first, last) = (table.first().map_err(failed)?, table.last().map_err(failed)?);
            let (Some(first), Some(last)) = (first, last) else { return Ok(None) };
            Ok(Some((first.0.value(), last.0.value(), table.len().map_err(failed)?)))
        })
    }

    /// Walks whole frames from the chunk `from` on: the first sequence, the lengths of its pieces, and the frame's bytes.
    pub(crate) fn walk(
        &self,
        from: u64,
        mut visit: impl FnMut(ChunkHead, &[usize], &Bytes) -> Result<bool, String>,
    ) -> Result<(), ReadFailure> {
        // Never while a growth is refused: only the writer walks, and it opens the database again before it goes on.
        self.read_once(|db| {
            let Some(table) = open_if_there(db, FRAMES)? else { return Ok(()) };
            let mut expected = from;
            let mut frame = BytesMut::new();
            let mut cuts = Vec::new();
            for row in table.range(from..).map_err(failed)? {
                let (key, value) = row.map_err(failed)?;
                let (sequence, chunk) = (key.value(), value.value());
                if sequence != expected {
                    return Err(damaged_chunk(expected, "it is missing"));
                }
                expected += 1;
                let head = ChunkHead::decode(sequence, chunk).map_err(|why| damaged_chunk(sequence, why))?;
                if head.frame + cuts.len() as u64 != sequence {
                    return Err(damaged_chunk(sequence, "it is not the next of its frame"));
                }
                cuts.push(chunk.len() - CHUNK_HEAD);
                frame.extend_from_slice(&chunk[CHUNK_HEAD..]);
                if frame.len() >= head.frame_len as usize {
                    if frame.len() > head.frame_len as usize {
                        return Err(damaged_chunk(sequence, "its frame is too long"));
                    }
                    let first = ChunkHead { sequence: head.frame, ..head };
                    if !visit(first, &cuts, &frame.split().freeze()).map_err(|why| damaged_chunk(sequence, &why))? {
                        return Ok(());
                    }
                    cuts.clear();
                }
            }
            if cuts.is_empty() { Ok(()) } else { Err(damaged_chunk(expected, "the last frame is cut short")) }
        })
    }
}

/// Reads pieces of frames, keeping the chunk at hand.
struct Chunks {
    table: redb::ReadOnlyTable<u64, &'static [u8]>,
    held: Option<(u64, redb::AccessGuard<'static, &'static [u8]>)>,
}

impl Chunks {
    fn new(db: &Database) -> Result<Self, ReadFailure> {
        let txn = db.begin_read().map_err(failed)?;
        Ok(Self { table: txn.open_table(FRAMES).map_err(failed)?, held: None })
    }

    fn chunk(&mut self, sequence: u64) -> Result<&[u8], ReadFailure> {
        if self.held.as_ref().is_none_or(|(held, _)| *held != sequence) {
            let value =
                self.table.get(sequence).map_err(failed)?.ok_or_else(|| damaged_chunk(sequence, "it is missing"))?;
            ChunkHead::decode(sequence, value.value()).map_err(|why| damaged_chunk(sequence, why))?;
            self.held = Some((sequence, value));
        }
        Ok(self.held.as_ref().map_or(&[], |(_, value)| value.value()))
    }

    /// `len` bytes from `offset` of the piece, running on into the next chunks.
    fn bytes(&mut self, sequence: u64, offset: usize, len: usize) -> Result<Bytes, ReadFailure> {
        let (mut sequence, mut at) = (sequence, CHUNK_HEAD + offset);
        let mut out = BytesMut::with_capacity(len);
        while out.len() < len {
            let chunk = self.chunk(sequence)?;
            let piece = chunk.get(at..).ok_or_else(|| damaged_chunk(sequence, "it is cut short"))?;
            out.extend_from_slice(&piece[..piece.len().min(len - out.len())]);
            (sequence, at) = (sequence + 1, CHUNK_HEAD);
        }
        Ok(out.freeze())
    }
}

fn open_database(space: &Space, cache: usize) -> Result<Database, ReadFailure> {
    let open = || Builder::new().set_cache_size(cache).create_with_backend(space.clone()).map_err(failed);
    catch_unwind(AssertUnwindSafe(open)).unwrap_or_else(|_| Err(ReadFailure::Damaged(UNREADABLE.to_owned())))
}

const UNREADABLE: &str = "redb met a page that it cannot read";

/// A panic inside redb is an error: its file was damaged in a way that it does not check.
fn guarded<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(UNREADABLE.to_owned()))
}

fn write(db: &Database, commit: Commit<'_>) -> Result<(), String> {
    let mut txn = db.begin_write().map_err(text)?;
    if !commit.durable {
        txn.set_durability(Durability::None).map_err(text)?;
    }
    {
        let mut frames = txn.open_table(FRAMES).map_err(text)?;
        let len = commit.frame.len();
        for (sequence, piece) in (commit.first..).zip(pieces(len, commit.max_order)) {
            let mut slot = frames.insert_reserve(sequence, CHUNK_HEAD + piece).map_err(text)?;
            let out: &mut [u8] = slot.as_mut();
            let head = ChunkHead { sequence, frame: commit.first, frame_len: len as u32, log_start: commit.log_start };
            head.encode(out);
            commit.frame.copy_to(&mut out[CHUNK_HEAD..]);
        }
        if commit.purge {
            frames.retain_in(..commit.log_start, |_, _| false).map_err(text)?;
        }
    }
    if !commit.blobs.is_empty() || !commit.dropped_blobs.is_empty() {
        let mut blobs = txn.open_table(BLOBS).map_err(text)?;
        for id in commit.dropped_blobs.iter().chain(commit.blobs.iter().map(|(id, _)| id)) {
            blobs.retain_in((*id, 0)..(id + 1, 0), |_, _| false).map_err(text)?;
        }
        for (id, bytes) in &commit.blobs {
            let mut rest = &bytes[..];
            // An empty blob has one chunk, like any other: it is there.
            let cuts = pieces(bytes.len(), commit.max_order).chain(bytes.is_empty().then_some(0));
            for (n, piece) in (0_u64..).zip(cuts) {
                let (now, later) = rest.split_at(piece);
                rest = later;
                let mut slot = blobs.insert_reserve((*id, n), CHUNK_HEAD + piece).map_err(text)?;
                blob::encode(*id, n, bytes.len() as u64, now, slot.as_mut());
            }
        }
    }
    txn.commit().map_err(text)
}

fn open_if_there<K: redb::Key + 'static, V: redb::Value + 'static>(
    db: &Database,
    table: TableDefinition<'_, K, V>,
) -> Result<Option<redb::ReadOnlyTable<K, V>>, ReadFailure> {
    match db.begin_read().map_err(failed)?.open_table(table) {
        Ok(table) => Ok(Some(table)),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn damaged_chunk(sequence: u64, why: &str) -> ReadFailure {
    ReadFailure::Damaged(format!("frame chunk {sequence}: {why}"))
}

fn failed(error: impl Into<redb::Error>) -> ReadFailure {
    match error.into() {
        redb::Error::Corrupted(what) => ReadFailure::Damaged(what),
        // A wrong magic number, or a file that ends too soon.
        redb::Error::Io(error) if matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::UnexpectedEof) => {
            ReadFailure::Damaged(error.to_string())
        }
        error => ReadFailure::Failed(error.to_string()),
    }
}

fn text(error: impl Into<redb::Error>) -> String {
    error.into().to_string()
}

#[cfg(test)]
mod tests;
