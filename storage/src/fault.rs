//! A disk that fails as disks do, for tests. Its files live in memory, twice: as the process sees them, and as they
//! would be found after the power failed.
//!
//! ```text
//! live     what reads see: every write so far
//! pending  writes and cuts since the last sync, in order
//! durable  what the last sync left
//! ```
//!
//! A crash rebuilds `live` from `durable` and a part of `pending` ([`Crash`]). Handles opened before it are dead, so a
//! database that is dropped after the crash cannot flush what the crash took.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::ByteCount;

use crate::disk::{Disk, DiskFile, LockGuard};

const SECTOR: usize = 512;

/// What a power failure leaves of the writes that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// All of them: only the process died.
    KeepAll,
    /// None.
    DropAll,
    /// The first few, the last of those torn at a sector.
    Prefix,
    /// Any sectors of any of them.
    Sectors,
}

/// Which call to fail, and how. Counts are from now: 0 is the next such call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The n-th write fails, once, and writes nothing.
    Write(u64),
    /// The n-th write and every one after it fail.
    EveryWriteFrom(u64),
    /// The n-th sync fails, and what it should have kept is lost, however often sync is called again.
    Sync(u64),
    /// The n-th read fails, once.
    Read(u64),
    /// The n-th write lands one page further on, and reports success.
    Misdirect(u64),
    /// From now on every sync reports success and does nothing.
    LyingSync,
    /// The power fails during the n-th change (write, cut or sync): it may count or not, and nothing works after it.
    PowerOff(u64),
}

#[derive(Debug, Clone)]
enum Change {
    Write { offset: u64, data: Vec<u8> },
    SetLen(u64),
}

#[derive(Debug, Default, Clone)]
struct Image {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Change>,
    /// Bytes that have room on the disk: the end of the furthest write.
    allocated: u64,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<PathBuf, Image>,
    folders: BTreeSet<PathBuf>,
    locks: BTreeSet<PathBuf>,
    generation: u64,
    powered_off: bool,
    lying: bool,
    capacity: Option<u64>,
    faults: Vec<Fault>,
    writes: u64,
    syncs: u64,
    trace: u64,
}

/// The disk. Cheap clone; all clones are one disk.
#[derive(Debug, Clone, Default)]
pub struct FaultDisk(Arc<Mutex<State>>);

impl FaultDisk {
    /// An empty, healthy disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plans a fault.
    pub fn inject(&self, fault: Fault) {
        let mut state = self.lock();
        match fault {
            Fault::LyingSync => state.lying = true,
            fault => state.faults.push(fault),
        }
    }

    /// Forgets every planned fault; what it did stays done.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.faults.clear();
        state.lying = false;
    }

    /// Lets files hold this many bytes altogether; `None` is no limit.
    pub fn set_capacity(&self, capacity: Option<ByteCount>) {
        self.lock().capacity = capacity.map(|capacity| capacity.0);
    }

    /// Bytes that files take now.
    pub fn allocated(&self) -> ByteCount {
        ByteCount(self.lock().files.values().map(|file| file.allocated).sum())
    }

    /// Whether a planned power failure has happened.
    pub fn powered_off(&self) -> bool {
        self.lock().powered_off
    }

    /// Ends every open handle and lock without running anything else of theirs: call it before dropping a "killed" process.
    pub fn fence(&self) {
        let mut state = self.lock();
        state.generation += 1;
        state.locks.clear();
    }

    /// The power fails (unless it has already) and comes back. `seed` picks what survives.
    pub fn crash(&self, crash: Crash, seed: u64) {
        self.fence();
        let mut state = self.lock();
        let mut rng = SplitMix(seed);
        state.powered_off = false;
        state.faults.clear();
        for file in state.files.values_mut() {
            for change in survivors(std::mem::take(&mut file.pending), crash, &mut rng) {
                change.apply(&mut file.durable);
            }
            file.live.clone_from(&file.durable);
            file.allocated = file.live.len() as u64;
        }
    }

    /// Flips one bit at rest.
    ///
    /// # Panics
    /// When there is no such byte.
    pub fn flip_bit(&self, path: &Path, offset: u64, bit: u8) {
        let mut state = self.lock();
        let file = state.files.get_mut(path).expect("the file exists");
        file.live[offset as usize] ^= 1 << (bit & 7);
        if let Some(byte) = file.durable.get_mut(offset as usize) {
            *byte ^= 1 << (bit & 7);
        }
    }

    /// The bytes of a file as the process sees them.
    pub fn contents(&self, path: &Path) -> Option<Vec<u8>> {
        self.lock().files.get(path).map(|file| file.live.clone())
    }

    /// Replaces a file, durably: a stopped node's disk was tampered with.
    pub fn replace(&self, path: &Path, bytes: Vec<u8>) {
        let allocated = bytes.len() as u64;
        let image = Image { live: bytes.clone(), durable: bytes, pending: Vec::new(), allocated };
        self.lock().files.insert(path.to_owned(), image);
    }

    /// Every file and its length.
    pub fn files(&self) -> Vec<(PathBuf, ByteCount)> {
        self.lock().files.iter().map(|(path, file)| (path.clone(), ByteCount(file.live.len() as u64))).collect()
    }

    /// Writes (with cuts) and syncs so far.
    pub fn counts(&self) -> (u64, u64) {
        let state = self.lock();
        (state.writes, state.syncs)
    }

    /// A digest of every change so far: two runs of one seed must agree on it.
    pub fn trace(&self) -> u64 {
        self.lock().trace
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn alive(&self, generation: u64) -> io::Result<()> {
        if self.powered_off || self.generation != generation {
            return Err(io::Error::other("the power is off"));
        }
        Ok(())
    }

    /// Counts down the faults of one kind; true when one is due.
    fn due(&mut self, of: impl Fn(&mut Fault) -> Option<&mut u64>) -> bool {
        let mut due = false;
        self.faults.retain_mut(|fault| {
            let sticky = matches!(fault, Fault::EveryWriteFrom(_));
            let Some(left) = of(fault) else { return true };
            if *left > 0 {
                *left -= 1;
                return true;
            }
            due = true;
            sticky
        });
        due
    }

    fn power_fails(&mut self) -> bool {
        let fails = self.due(|fault| if let Fault::PowerOff(left) = fault { Some(left) } else { None });
        self.powered_off |= fails;
        fails
    }

    fn note(&mut self, what: u8, path: &Path, offset: u64, data: &[u8]) {
        let mut crc = crc32c::crc32c_append(u32::from(what), path.as_os_str().as_encoded_bytes());
        crc = crc32c::crc32c_append(crc, &offset.to_le_bytes());
        crc = crc32c::crc32c_append(crc, data);
        self.trace = SplitMix(self.trace ^ u64::from(crc)).next();
    }
}

impl Change {
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::Write { offset, data } => {
                let end = *offset as usize + data.len();
                if image.len() < end {
                    image.resize(end, 0);
                }
                image[*offset as usize..end].copy_from_slice(data);
            }
            Self::SetLen(len) => image.resize(*len as usize, 0),
        }
    }
}

/// What a crash leaves of `pending`.
fn survivors(pending: Vec<Change>, crash: Crash, rng: &mut SplitMix) -> Vec<Change> {
    match crash {
        Crash::KeepAll => pending,
        Crash::DropAll => Vec::new(),
        Crash::Prefix => {
            let whole = rng.below(pending.len() as u64 + 1) as usize;
            let mut kept: Vec<Change> = pending.iter().take(whole).cloned().collect();
            if let Some(Change::Write { offset, data }) = pending.get(whole) {
                let sectors = rng.below(data.len().div_ceil(SECTOR) as u64) as usize;
                kept.push(Change::Write { offset: *offset, data: data[..(sectors * SECTOR).min(data.len())].to_vec() });
            }
            kept
        }
        Crash::Sectors => {
            let mut kept = Vec::new();
            for change in pending {
                match change {
                    // A length may be lost while a write past it survives, which lengthens the file again.
                    Change::SetLen(_) if rng.below(2) == 0 => {}
                    Change::SetLen(len) => kept.push(Change::SetLen(len)),
                    Change::Write { offset, data } => {
                        for (n, sector) in data.chunks(SECTOR).enumerate() {
                            if rng.below(2) == 0 {
                                kept.push(Change::Write {
                                    offset: offset + (n * SECTOR) as u64,
                                    data: sector.to_vec(),
                                });
                            }
                        }
                    }
                }
            }
            kept
        }
    }
}

#[derive(Debug)]
struct FaultFile {
    disk: FaultDisk,
    path: PathBuf,
    generation: u64,
}

impl FaultFile {
    fn change(&self, change: Change) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.alive(self.generation)?;
        let mut change = change;
        if let Change::Write { offset, .. } = &mut change {
            if state.due(|fault| match fault {
                Fault::Write(left) | Fault::EveryWriteFrom(left) => Some(left),
                _ => None,
            }) {
                return Err(io::Error::other("injected: the write failed"));
            }
            if state.due(|fault| if let Fault::Misdirect(left) = fault { Some(left) } else { None }) {
                *offset += 4096;
            }
        }
        let (what, at, data): (u8, u64, &[u8]) = match &change {
            Change::Write { offset, data } => (1, *offset, data),
            Change::SetLen(len) => (2, *len, &[]),
        };
        let end = at + data.len() as u64;
        let taken: u64 = state.files.values().map(|file| file.allocated).sum();
        let own = state.files.get(&self.path).map_or(0, |file| file.allocated);
        if what == 1 && end > own && state.capacity.is_some_and(|capacity| taken + (end - own) > capacity) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        state.note(what, &self.path, at, data);
        state.writes += 1;
        let fails = state.power_fails();
        let file = state.files.entry(self.path.clone()).or_default();
        change.apply(&mut file.live);
        file.allocated = if what == 1 { own.max(end) } else { own.min(at) };
        file.pending.push(change);
        // The change was issued, so it may survive; its caller never learns.
        if fails { Err(io::Error::other("the power is off")) } else { Ok(()) }
    }
}

impl DiskFile for FaultFile {
    fn len(&self) -> io::Result<u64> {
        let state = self.disk.lock();
        state.alive(self.generation)?;
        Ok(state.files.get(&self.path).map_or(0, |file| file.live.len() as u64))
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.alive(self.generation)?;
        if state.due(|fault| if let Fault::Read(left) = fault { Some(left) } else { None }) {
            return Err(io::Error::other("injected: the read failed"));
        }
        let file = state.files.get(&self.path).ok_or(io::ErrorKind::NotFound)?;
        let found = file.live.get(offset as usize..offset as usize + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Change::Write { offset, data: data.to_vec() })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::SetLen(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.alive(self.generation)?;
        let failed = state.due(|fault| if let Fault::Sync(left) = fault { Some(left) } else { None });
        let off = state.power_fails();
        state.note(3, &self.path, 0, &[]);
        state.syncs += 1;
        let lying = state.lying;
        let file = state.files.entry(self.path.clone()).or_default();
        if off {
            return Err(io::Error::other("the power is off"));
        }
        if failed {
            // As Linux does: the pages are marked clean, so no later sync writes them.
            file.pending.clear();
            return Err(io::Error::other("injected: the sync failed"));
        }
        if !lying {
            for change in std::mem::take(&mut file.pending) {
                change.apply(&mut file.durable);
            }
        }
        Ok(())
    }
}

struct FaultLock {
    disk: FaultDisk,
    path: PathBuf,
    generation: u64,
}

impl Drop for FaultLock {
    fn drop(&mut self) {
        let mut state = self.disk.lock();
        // A crash has taken it already, and somebody else may hold it now.
        if state.generation == self.generation {
            state.locks.remove(&self.path);
        }
    }
}

impl Disk for FaultDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.lock();
        let generation = state.generation;
        state.alive(generation)?;
        state.files.entry(path.to_owned()).or_default();
        Ok(Box::new(FaultFile { disk: self.clone(), path: path.to_owned(), generation }))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let state = self.lock();
        Ok(state.files.contains_key(path) || state.folders.contains(path))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.contents(path).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn write_atomically(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        state.alive(state.generation)?;
        if state.power_fails() {
            return Err(io::Error::other("the power is off"));
        }
        state.note(4, path, 0, bytes);
        drop(state);
        self.replace(path, bytes.to_vec());
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        state.alive(state.generation)?;
        state.files.remove(path).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.lock().folders.insert(path.to_owned());
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>> {
        let mut state = FaultDisk::lock(self);
        let generation = state.generation;
        state.alive(generation)?;
        if !state.locks.insert(path.to_owned()) {
            return Ok(None);
        }
        Ok(Some(Box::new(FaultLock { disk: self.clone(), path: path.to_owned(), generation })))
    }

    fn free_space(&self, _path: &Path) -> io::Result<ByteCount> {
        let taken = self.allocated();
        Ok(ByteCount(FaultDisk::lock(self).capacity.map_or(1 << 40, |capacity| capacity.saturating_sub(taken.0))))
    }

    fn elapsed(&self) -> Duration {
        Duration::ZERO
    }
}

/// A small generator for tests: one seed, one sequence.
#[derive(Debug, Clone)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "it never ends, so it is no iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`; 0 when that is 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next().checked_rem(limit).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "file";

    fn open(disk: &FaultDisk) -> Box<dyn DiskFile> {
        disk.open(Path::new(PATH)).unwrap()
    }

    fn read(disk: &FaultDisk, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        open(disk).read_at(0, &mut out).unwrap();
        out
    }

    #[test]
    fn unsynced_writes_are_lost_and_old_handles_are_dead() {
        let disk = FaultDisk::new();
        let file = open(&disk);
        file.write_at(0, b"kept").unwrap();
        file.sync_data().unwrap();
        file.write_at(0, b"lost").unwrap();
        disk.crash(Crash::DropAll, 0);
        assert_eq!(read(&disk, 4), b"kept");
        assert!(file.write_at(0, b"late").is_err());
        assert_eq!(read(&disk, 4), b"kept");
    }

    #[test]
    fn a_torn_write_keeps_whole_sectors() {
        let disk = FaultDisk::new();
        let seen: BTreeSet<_> = (0..40)
            .map(|seed| {
                let file = open(&disk);
                file.write_at(0, &[1; 2048]).unwrap();
                file.sync_data().unwrap();
                file.write_at(0, &[2; 2048]).unwrap();
                disk.crash(Crash::Sectors, seed);
                let found = read(&disk, 2048);
                assert!(found.chunks(SECTOR).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
                found.iter().step_by(SECTOR).copied().collect::<Vec<_>>()
            })
            .collect();
        assert!(seen.len() > 8, "{seen:?}");
    }

    #[test]
    fn a_failed_sync_loses_its_pages_for_good() {
        let disk = FaultDisk::new();
        let file = open(&disk);
        disk.inject(Fault::Sync(0));
        file.write_at(0, b"data").unwrap();
        assert!(file.sync_data().is_err());
        file.sync_data().unwrap();
        disk.crash(Crash::DropAll, 0);
        assert_eq!(disk.contents(Path::new(PATH)).unwrap(), b"");
    }

    #[test]
    fn a_full_disk_refuses_growth_and_takes_overwrites() {
        let disk = FaultDisk::new();
        let file = open(&disk);
        file.write_at(0, &[0; 100]).unwrap();
        disk.set_capacity(Some(ByteCount(100)));
        assert_eq!(file.write_at(50, &[0; 51]).unwrap_err().kind(), io::ErrorKind::StorageFull);
        file.write_at(50, &[0; 50]).unwrap();
        disk.set_capacity(None);
        file.write_at(50, &[0; 51]).unwrap();
    }

    #[test]
    fn the_power_fails_at_the_chosen_change() {
        let disk = FaultDisk::new();
        let file = open(&disk);
        disk.inject(Fault::PowerOff(1));
        file.write_at(0, b"a").unwrap();
        assert!(file.sync_data().is_err() && disk.powered_off());
        assert!(disk.open(Path::new(PATH)).is_err());
        disk.crash(Crash::DropAll, 0);
        assert!(open(&disk).is_empty().unwrap());
    }
}
