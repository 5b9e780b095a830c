//! One redb file, with its room reserved ahead.
//!
//! redb sizes its file itself: it doubles it when no page is free and cuts it when the end is. Both cost: a file that
//! grows waits for the journal of the file system at every sync, and a growth that the disk refuses ends the database,
//! since redb never works on after a failed call. So the file on disk (`physical`) is written out with zeros ahead of
//! need and never shrinks, while redb sees the length that it asked for (`logical`). `physical >= logical`, always.
//!
//! After a clean close the logical length is what redb's header says; after a crash redb rebuilds its layout from the
//! file's length, so it is given the physical one.
//!
//! A file that was there before is on [`Trial`] until [`Space::accept`]: nothing that opening it changes is written before the
//! log in it is known to be sound.

mod trial;

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

use self::trial::Trial;
use crate::disk::{Disk, DiskFile};
use crate::metrics;

/// redb's page size, which only its own tests can change.
pub(crate) const PAGE: u64 = 4096;
/// Zeros are written in pieces of this size.
const FILL: u64 = 1 << 20;
/// redb allots pages in regions of this size, and from there on grows by one or two of them.
const REGION: u64 = 4 << 30;

const MAGIC: &[u8; 9] = b"redb\x1a\x0a\xa9\x0d\x0a";
const RECOVERY_REQUIRED: u8 = 2;

#[derive(Debug, Clone, Copy)]
struct Sizes {
    physical: u64,
    logical: u64,
}

/// How a file gets longer. The room is the disk's to give in either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Written with zeros: costs as much as data does, once, and then syncs are as fast as can be.
    Zeros,
    /// Reserved: costs nothing now. The first sync after each piece is written waits for the file system's journal.
    Reserved,
}

/// The file below a redb database. Cheap clone; all clones are one file.
#[derive(Clone)]
pub(crate) struct Space {
    file: Arc<dyn DiskFile>,
    sizes: Arc<Mutex<Sizes>>,
    /// Set while the trial runs; asked before the lock is, which is then free for all.
    on_trial: Arc<AtomicBool>,
    trial: Arc<Mutex<Option<Trial>>>,
    growth_refused: Arc<AtomicBool>,
    disk: Arc<dyn Disk>,
    traffic: Arc<Traffic>,
}

/// What went to the disk.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    /// Bytes of pages.
    pub(crate) written: AtomicU64,
    /// Bytes of zeros ahead of need.
    pub(crate) room: AtomicU64,
    pub(crate) syncs: AtomicU64,
    pub(crate) sync_nanos: AtomicU64,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("file", &self.file).field("sizes", &*self.sizes()).finish_non_exhaustive()
    }
}

impl Space {
    /// Opens the file. A fresh one is written out to `prefill` bytes at once, any other is on trial until it is accepted.
    pub(crate) fn open(disk: Arc<dyn Disk>, path: &Path, prefill: u64) -> io::Result<Self> {
        let file: Arc<dyn DiskFile> = disk.open(path)?.into();
        let len = file.len()?;
        // A crash may have left a length that ends inside a page, which redb would refuse.
        let physical = len.div_ceil(PAGE) * PAGE;
        let logical = logical_len(&*file, len, physical)?;
        let fresh = logical == 0;
        if fresh && physical > len {
            file.set_len(physical)?;
        }
        let mut trial = Trial::new(len);
        if physical > len {
            trial.extend(physical);
        }
        let space = Self {
            file,
            sizes: Arc::new(Mutex::new(Sizes { physical, logical })),
            on_trial: Arc::new(AtomicBool::new(!fresh)),
            trial: Arc::new(Mutex::new((!fresh).then_some(trial))),
            growth_refused: Arc::default(),
            disk,
            traffic: Arc::default(),
        };
        // A fresh file only: zeros past the end of one that must be repaired would all be walked.
        if fresh {
            space.extend(prefill.div_ceil(PAGE) * PAGE, Fill::Zeros)?;
            space.file.sync_data()?;
        }
        Ok(space)
    }

    /// Writes what opening has changed: the log is sound. Nothing else uses the file meanwhile.
    ///
    /// # Errors
    /// As after a crash in the middle of opening: the next one begins anew.
    pub(crate) fn accept(&self) -> io::Result<()> {
        let mut trial = self.trial();
        if let Some(trial) = trial.take() {
            trial.accept(&*self.file, |len| {
                let there = self.file.len()?;
                if there < len { self.fill(there, len, Fill::Zeros) } else { Ok(()) }
            })?;
        }
        self.on_trial.store(false, Ordering::Release);
        Ok(())
    }

    fn trial(&self) -> MutexGuard<'_, Option<Trial>> {
        self.trial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the trial, if there is one.
    fn if_on_trial<T>(&self, run: impl FnOnce(&mut Trial) -> T) -> Option<T> {
        if !self.on_trial.load(Ordering::Acquire) {
            return None;
        }
        self.trial().as_mut().map(run)
    }

    /// Lengthens the file to `len`; the next commit syncs that. Does nothing when the file is that long.
    ///
    /// # Errors
    /// Out of space: the file is as long as before, and nothing else has failed.
    pub(crate) fn extend(&self, len: u64, how: Fill) -> io::Result<()> {
        let (before, len) = (self.physical(), len.div_ceil(PAGE) * PAGE);
        if len <= before {
            return Ok(());
        }
        if self.if_on_trial(|trial| trial.extend(len)).is_some() {
            self.sizes().physical = len;
            return Ok(());
        }
        self.fill(before, len, how)
    }

    /// Lengthens the file from `before`, its end, to `len`.
    fn fill(&self, before: u64, len: u64, how: Fill) -> io::Result<()> {
        if how == Fill::Reserved {
            if let Err(error) = self.file.reserve(before, len) {
                self.file.set_len(before)?;
                return Err(error);
            }
            self.sizes().physical = len;
            return Ok(());
        }
        let mut at = before;
        while at < len {
            let piece = FILL.min(len - at);
            if let Err(error) = self.file.write_zeros(at, at + piece) {
                // Give back what a full disk took, so that others find it and the length is a whole number of pages.
                self.file.set_len(before)?;
                self.sizes().physical = before;
                return Err(error);
            }
            metrics::observe_room(piece);
            at += piece;
            self.traffic.room.fetch_add(piece, Ordering::Relaxed);
            // Not locked while the disk works: only the writer changes the length, but others ask for it.
            self.sizes().physical = at;
        }
        Ok(())
    }

    pub(crate) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// The same file, counted together with another one that it replaces.
    pub(crate) fn counted_with(self, other: &Self) -> Self {
        Self { traffic: Arc::clone(&other.traffic), ..self }
    }

    /// Where the file is.
    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Bytes on disk.
    pub(crate) fn physical(&self) -> u64 {
        self.sizes().physical
    }

    /// Bytes that redb may place pages in now.
    pub(crate) fn logical(&self) -> u64 {
        self.sizes().logical
    }

    /// Whether a growth failed for want of room, which nobody has dealt with yet. Then, and only then, a failed transaction
    /// has changed nothing that counts: redb writes its header after the last page, and had not begun to.
    pub(crate) fn growth_refused(&self) -> bool {
        self.growth_refused.load(Ordering::Acquire)
    }

    /// It was dealt with.
    pub(crate) fn forget_refusal(&self) {
        self.growth_refused.store(false, Ordering::Release);
    }

    /// After redb gave the database up: it will rebuild its layout from the length, so that must be the physical one.
    pub(crate) fn reset(&self) {
        let mut sizes = self.sizes();
        sizes.logical = sizes.physical;
    }

    fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The length that redb asks for when no page of a file of this length is free.
pub(crate) fn grown(len: u64) -> u64 {
    let usable = len.saturating_sub(PAGE);
    if usable >= REGION {
        (usable / REGION + 2) * REGION + PAGE
    } else {
        (usable * 2).max(usable + (4 << 20)).min(2 * REGION) + PAGE
    }
}

/// Whether the file holds no database yet.
pub(crate) fn is_fresh(file: &dyn DiskFile) -> io::Result<bool> {
    let len = file.len()?;
    Ok(logical_len(file, len, len)? == 0)
}

/// What redb believes the length to be: its header's layout after a clean close, else all there is.
fn logical_len(file: &dyn DiskFile, len: u64, physical: u64) -> io::Result<u64> {
    let mut header = [0_u8; 32];
    file.read_at(0, &mut header[..len.min(32) as usize])?;
    if header.starts_with(MAGIC) {
        let number =
            |at: usize| u64::from(u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
        let (page, head, data, full, trailing) = (number(12), number(16), number(20), number(24), number(28));
        let trailing = if trailing > 0 { head + trailing } else { 0 };
        let layout = page * (1 + full * (head + data) + trailing);
        let clean = header[9] & RECOVERY_REQUIRED == 0;
        return Ok(if clean && page == PAGE && layout <= physical { layout } else { physical });
    }
    // redb writes its magic number last of all when it creates a file: until then there is no database, only our zeros.
    Ok(if header[..9] == [0; 9] { 0 } else { physical })
}

impl StorageBackend for Space {
    fn len(&self) -> io::Result<u64> {
        Ok(self.logical())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        if self.on_trial.load(Ordering::Acquire) && offset + out.len() as u64 > self.physical() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let tried = self.if_on_trial(|trial| trial.read(&*self.file, offset, out));
        tried.unwrap_or_else(|| self.file.read_at(offset, out))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.extend(len, Fill::Zeros).inspect_err(|error| {
            if is_full(error) {
                self.growth_refused.store(true, Ordering::Release);
            }
        })?;
        self.sizes().logical = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.if_on_trial(Trial::sync).is_some() {
            return Ok(());
        }
        let begun = self.disk.elapsed();
        self.file.sync_data()?;
        let took = self.disk.elapsed().saturating_sub(begun);
        self.traffic.syncs.fetch_add(1, Ordering::Relaxed);
        self.traffic.sync_nanos.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        metrics::observe_sync(took);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if self.if_on_trial(|trial| trial.write(offset, data)).is_some() {
            return Ok(());
        }
        self.traffic.written.fetch_add(data.len() as u64, Ordering::Relaxed);
        metrics::observe_written(data.len() as u64);
        self.file.write_at(offset, data)
    }
}

/// Whether the error says that there is no room.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use redb::{Builder, Database, ReadableDatabase, TableDefinition};

    use super::*;
    use crate::fault::{Crash, FaultDisk};

    const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("table");
    const MB: u64 = 1 << 20;

    /// Opens the database and tells how often redb reported on a repair.
    fn open(disk: &FaultDisk, prefill: u64) -> (Space, Database, usize) {
        let space = Space::open(Arc::new(disk.clone()), Path::new("file"), prefill).expect("the file opens");
        let repairs = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&repairs);
        let db = Builder::new()
            .set_repair_callback(move |_| {
                seen.fetch_add(1, Ordering::Relaxed);
            })
            .create_with_backend(space.clone())
            .expect("the database opens");
        space.accept().expect("the disk is healthy");
        let repairs = repairs.load(Ordering::Relaxed);
        (space, db, repairs)
    }

    fn write(db: &Database, keys: std::ops::Range<u64>) {
        let txn = db.begin_write().unwrap();
        for key in keys {
            txn.open_table(TABLE).unwrap().insert(key, &vec![key as u8; 100_000][..]).unwrap();
        }
        txn.commit().unwrap();
    }

    fn clear(db: &Database) {
        let txn = db.begin_write().unwrap();
        txn.open_table(TABLE).unwrap().retain(|_, _| false).unwrap();
        txn.commit().unwrap();
    }

    #[test]
    fn redb_gives_free_space_back_and_the_file_keeps_it() {
        let disk = FaultDisk::new();
        let (space, db, _) = open(&disk, 4 * MB);
        assert!(space.physical() >= 4 * MB && space.logical() < 2 * MB);
        write(&db, 0..200);
        let peak = space.physical();
        assert!(peak > 20 * MB && space.logical() == peak);
        clear(&db);
        (0..20).for_each(|_| write(&db, 0..1));
        assert!(space.logical() < 4 * MB, "redb keeps {} bytes now", space.logical());
        assert_eq!(space.physical(), peak);
        let (writes, _) = disk.counts();
        write(&db, 0..100);
        // It grows again into what is there: nothing is written but pages.
        assert!(disk.counts().0 - writes < 150 && space.physical() == peak);
    }

    #[test]
    fn a_clean_close_needs_no_repair_and_a_crash_finds_all_room() {
        let disk = FaultDisk::new();
        let (_, db, _) = open(&disk, 8 * MB);
        write(&db, 0..10);
        drop(db);
        let (space, db, repairs) = open(&disk, 8 * MB);
        assert_eq!(repairs, 0);
        assert!(space.logical() < space.physical());
        write(&db, 10..20);
        disk.crash(Crash::DropAll, 0);
        drop(db);
        let (space, db, repairs) = open(&disk, 8 * MB);
        assert!(repairs > 0, "it was not closed");
        assert_eq!(space.logical(), space.physical());
        let table = db.begin_read().unwrap().open_table(TABLE).unwrap();
        assert!((0..20).all(|key| table.get(key).unwrap().unwrap().value()[0] == key as u8));
    }

    #[test]
    fn a_crash_while_the_file_is_made_leaves_a_fresh_one() {
        for fails in 0..12 {
            let disk = FaultDisk::new();
            disk.inject(crate::fault::Fault::PowerOff(fails));
            let space = Space::open(Arc::new(disk.clone()), Path::new("file"), 3 * MB);
            let db = space.map(|space| Builder::new().create_with_backend(space));
            disk.fence();
            drop(db);
            disk.crash(Crash::Sectors, fails);
            let (_, db, _) = open(&disk, 3 * MB);
            write(&db, 0..3);
        }
    }
}
