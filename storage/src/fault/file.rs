//! The fault disk as a [`Disk`]: its open files and its locks.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ensign_proto::ByteCount;

use super::{Change, Fault, FaultDisk};
use crate::disk::{Disk, DiskFile, LockGuard};

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
            if state.write_fails() {
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

    /// As `fallocate` does on a file system that fills up: what it found stays reserved, and the file is as much longer.
    fn reserve(&self, _end: u64, len: u64) -> io::Result<()> {
        let mut state = self.disk.lock();
        state.alive(self.generation)?;
        let failed = state.write_fails();
        let taken: u64 = state.files.values().map(|file| file.allocated).sum();
        let own = state.files.get(&self.path).map_or(0, |file| file.allocated);
        let free = state.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(taken));
        let wanted = len.saturating_sub(own);
        let given = if failed { wanted / 2 } else { wanted.min(free) };
        state.note(5, &self.path, len, &given.to_le_bytes());
        state.writes += 1;
        state.reservations.0 += 1;
        state.reservations.1 += u64::from(0 < given && given < wanted);
        let off = state.power_fails();
        let file = state.files.entry(self.path.clone()).or_default();
        file.allocated = own + given;
        let change = Change::SetLen(file.allocated.max(file.live.len() as u64));
        change.apply(&mut file.live);
        file.pending.push(change);
        if off {
            return Err(io::Error::other("the power is off"));
        }
        if failed {
            return Err(io::Error::other("injected: the reservation failed"));
        }
        if given < wanted { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
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
        if state.power_fails() {
            return Err(io::Error::other("the power is off"));
        }
        let removed = state.files.remove(path).ok_or(io::ErrorKind::NotFound)?;
        state.remains.push(removed.durable);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.lock();
        state.alive(state.generation)?;
        if state.power_fails() {
            return Err(io::Error::other("the power is off"));
        }
        state.note(6, from, 0, to.as_os_str().as_encoded_bytes());
        let file = state.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        if let Some(replaced) = state.files.insert(to.to_owned(), file) {
            state.remains.push(replaced.durable);
        }
        Ok(())
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
