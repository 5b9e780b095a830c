//! Real files on a disk that loses what was not synced when its process is killed: a power cut without root, mounts or luck.
//!
//! ```text
//! reads ── pages written since the last sync, in memory ── else the file, as far as it was not cut
//! sync  ── pages in order ─> the file ─> fdatasync
//! ```
//!
//! `kill -9` alone cannot show a missing sync, since the page cache survives it. Here nothing reaches the page cache before
//! a sync, and a kill in the middle of one leaves some of its pages.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::ByteCount;

use crate::disk::{Disk, DiskFile, FileDisk, LockGuard};

const PAGE: u64 = 4096;

/// What a sync of a [`VolatileDisk`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// Its duty.
    Honest,
    /// Nothing, and it reports success: everything since the start is lost with the process.
    Lying,
}

/// The disk.
#[derive(Debug, Clone, Copy)]
pub struct VolatileDisk {
    sync: Sync,
}

impl VolatileDisk {
    /// A disk whose syncs do this.
    pub fn new(sync: Sync) -> Self {
        Self { sync }
    }
}

#[derive(Debug)]
struct VolatileFile {
    file: Box<dyn DiskFile>,
    sync: Sync,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Pages that were written since the last sync, by number.
    pages: BTreeMap<u64, Box<[u8]>>,
    len: u64,
    /// From here on the file's own bytes are void: it was cut here, or ends here.
    kept: u64,
}

impl VolatileFile {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page as a reader sees it.
    fn page(&self, state: &State, number: u64) -> io::Result<Box<[u8]>> {
        if let Some(page) = state.pages.get(&number) {
            return Ok(page.clone());
        }
        let mut page = vec![0; PAGE as usize].into_boxed_slice();
        let there = state.kept.saturating_sub(number * PAGE).min(PAGE) as usize;
        self.file.read_at(number * PAGE, &mut page[..there])?;
        Ok(page)
    }
}

/// The pages that `len` bytes from `offset` touch: the number, where in the page, and which of the bytes.
fn pages(offset: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>, std::ops::Range<usize>)> {
    let end = offset + len as u64;
    (offset / PAGE..end.div_ceil(PAGE)).map(move |number| {
        let (from, to) = (offset.max(number * PAGE), end.min((number + 1) * PAGE));
        let inside = (from - number * PAGE) as usize..(to - number * PAGE) as usize;
        (number, inside, (from - offset) as usize..(to - offset) as usize)
    })
}

impl DiskFile for VolatileFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().len)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        if offset + out.len() as u64 > state.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (number, inside, of) in pages(offset, out.len()) {
            out[of].copy_from_slice(&self.page(&state, number)?[inside]);
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state();
        for (number, inside, of) in pages(offset, data.len()) {
            let mut page = self.page(&state, number)?;
            page[inside].copy_from_slice(&data[of]);
            state.pages.insert(number, page);
        }
        state.len = state.len.max(offset + data.len() as u64);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state();
        if !len.is_multiple_of(PAGE) && len < state.len {
            let number = len / PAGE;
            let mut page = self.page(&state, number)?;
            page[(len % PAGE) as usize..].fill(0);
            state.pages.insert(number, page);
        }
        state.pages.split_off(&len.div_ceil(PAGE));
        state.kept = state.kept.min(len);
        state.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.sync == Sync::Lying {
            return Ok(());
        }
        let mut state = self.state();
        if state.kept < self.file.len()? {
            self.file.set_len(state.kept)?;
        }
        for (number, page) in &state.pages {
            let len = (state.len - number * PAGE).min(PAGE) as usize;
            self.file.write_at(number * PAGE, &page[..len])?;
        }
        self.file.set_len(state.len)?;
        self.file.sync_data()?;
        state.pages.clear();
        state.kept = state.len;
        Ok(())
    }
}

impl Disk for VolatileDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = FileDisk.open(path)?;
        let len = file.len()?;
        let state = Mutex::new(State { pages: BTreeMap::new(), len, kept: len });
        Ok(Box::new(VolatileFile { file, sync: self.sync, state }))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        FileDisk.exists(path)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        FileDisk.read(path)
    }

    fn write_atomically(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        FileDisk.write_atomically(path, bytes)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        FileDisk.remove(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        FileDisk.rename(from, to)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        FileDisk.create_dir(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>> {
        FileDisk.lock(path)
    }

    fn free_space(&self, path: &Path) -> io::Result<ByteCount> {
        FileDisk.free_space(path)
    }

    fn elapsed(&self) -> Duration {
        FileDisk.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::SplitMix;

    #[test]
    fn what_was_not_synced_is_lost_with_the_process_and_a_lie_loses_all() {
        for (sync, found) in [(Sync::Honest, &b"kept"[..]), (Sync::Lying, b"")] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            let file = VolatileDisk::new(sync).open(&path).unwrap();
            file.write_at(0, b"kept").unwrap();
            file.sync_data().unwrap();
            file.write_at(2, b"lost").unwrap();
            let mut seen = [0; 6];
            file.read_at(0, &mut seen).unwrap();
            assert_eq!(&seen, b"kelost");
            assert_eq!(std::fs::read(&path).unwrap(), found, "{sync:?}");
        }
    }

    #[test]
    fn it_reads_as_a_file_does_whatever_is_done_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = VolatileDisk::new(Sync::Honest).open(&path).unwrap();
        let (mut model, mut rng) = (Vec::<u8>::new(), SplitMix(1));
        for step in 0..2_000 {
            match rng.below(8) {
                0 => {
                    file.sync_data().unwrap();
                    assert_eq!(std::fs::read(&path).unwrap(), model, "step {step}");
                }
                1 => {
                    let len = rng.below(40_000);
                    file.set_len(len).unwrap();
                    model.resize(len as usize, 0);
                }
                _ => {
                    let (at, data) = (rng.below(30_000), vec![rng.below(256) as u8; rng.below(9_000) as usize]);
                    file.write_at(at, &data).unwrap();
                    let end = at as usize + data.len();
                    if !data.is_empty() {
                        model.resize(model.len().max(end), 0);
                        model[at as usize..end].copy_from_slice(&data);
                    }
                }
            }
            let mut seen = vec![0; model.len()];
            assert_eq!(file.len().unwrap(), model.len() as u64, "step {step}");
            file.read_at(0, &mut seen).unwrap();
            assert_eq!(seen, model, "step {step}");
        }
    }
}
