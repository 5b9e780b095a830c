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

mod file;
#[cfg(test)]
mod tests;
mod volatile;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ensign_proto::ByteCount;

pub use self::volatile::{Sync, VolatileDisk};

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
    /// The n-th write fails, once, and writes nothing. A reservation of room counts as one, and leaves half of it behind.
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
    /// The power fails during the n-th change (write, reservation, cut or sync): it may count or not, and nothing works after it.
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
    /// Bytes that have room on the disk: the end of the furthest write or reservation.
    allocated: u64,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<PathBuf, Image>,
    /// What was on the disk of files that were removed, or replaced by a rename: blocks that nobody has used again.
    remains: Vec<Vec<u8>>,
    folders: BTreeSet<PathBuf>,
    locks: BTreeSet<PathBuf>,
    generation: u64,
    powered_off: bool,
    lying: bool,
    capacity: Option<u64>,
    faults: Vec<Fault>,
    writes: u64,
    syncs: u64,
    /// Reservations of room, and those that left a part of it behind.
    reservations: (u64, u64),
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

    /// What files that were removed have left on the disk, oldest first.
    pub fn remains(&self) -> Vec<Vec<u8>> {
        self.lock().remains.clone()
    }

    /// Every file and its length.
    pub fn files(&self) -> Vec<(PathBuf, ByteCount)> {
        self.lock().files.iter().map(|(path, file)| (path.clone(), ByteCount(file.live.len() as u64))).collect()
    }

    /// Reservations of room so far, and how many of them failed with a part of the room taken.
    pub fn reservations(&self) -> (u64, u64) {
        self.lock().reservations
    }

    /// Writes (with cuts and reservations) and syncs so far.
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

    fn write_fails(&mut self) -> bool {
        self.due(|fault| match fault {
            Fault::Write(left) | Fault::EveryWriteFrom(left) => Some(left),
            _ => None,
        })
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
