//! The disk seam: everything this crate asks of a file system, so that tests can lose, tear, refuse and corrupt it.
//!
//! [`FileDisk`] is the real one. `FaultDisk` (feature `testing`) keeps its files in memory and injects what real disks do.

mod cached;

use std::any::Any;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
#[cfg(target_os = "linux")]
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::ByteCount;
use rustix::fs::FallocateFlags;
#[cfg(target_os = "linux")]
use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;
use tracing::debug;

use self::cached::Cached;

/// An open file. All calls take `&self`; the caller keeps its own writes apart.
pub trait DiskFile: Debug + Send + Sync + 'static {
    /// Its length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether it holds no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `out` from `offset`; reading past the end is an error.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `offset`, lengthening the file if need be. Durable after [`Self::sync_data`] only.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Cuts or lengthens the file; new bytes are zero, and may not have room on the disk yet.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Lengthens the file from `end`, where it ends, to `len`, with room on the disk. The new bytes read as zeros. An error may leave
    /// any part of that done.
    fn reserve(&self, end: u64, len: u64) -> io::Result<()> {
        self.write_zeros(end, len)
    }

    /// Writes zeros from `end` to `len`, where the file ends or over what it holds. Durable after [`Self::sync_data`] only. An error may leave any part of
    /// that done.
    fn write_zeros(&self, end: u64, len: u64) -> io::Result<()> {
        in_pieces(end, len, |at, zeros| self.write_at(at, zeros))
    }

    /// Returns when everything written, and the length, is on stable storage. After an error nothing may be assumed.
    fn sync_data(&self) -> io::Result<()>;
}

/// As the disk takes it without a copy.
#[repr(align(4096))]
struct Zeros([u8; 1 << 20]);

/// Zeros are written in pieces of this size.
static ZEROS: Zeros = Zeros([0; 1 << 20]);

fn in_pieces(end: u64, len: u64, write_at: impl Fn(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut at = end;
    while at < len {
        let piece = (ZEROS.0.len() as u64).min(len - at);
        write_at(at, &ZEROS.0[..piece as usize])?;
        at += piece;
    }
    Ok(())
}

/// Holds an exclusive lock for as long as it lives.
pub type LockGuard = Box<dyn Any + Send + Sync>;

/// A place for files.
pub trait Disk: Debug + Send + Sync + 'static {
    /// Opens a file for reading and writing, creating it (durably, mode 0600) when it does not exist.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Whether the path exists.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// Reads a small file whole.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// Creates or replaces a small file: after a crash it is the old one or the new one, whole. Durable on return.
    fn write_atomically(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Removes a file, durably.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Gives a file another name in its folder, durably, in place of any file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Creates a folder and its missing parents (mode 0700), durably.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Takes an exclusive lock on a file, creating it; `None` when somebody else holds it.
    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>>;

    /// Bytes that may still be written below `path`, which exists.
    fn free_space(&self, path: &Path) -> io::Result<ByteCount>;

    /// A reading that only grows, to measure how long calls take. Nothing is decided by it.
    fn elapsed(&self) -> Duration;
}

/// The real file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileDisk;

impl Disk for FileDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        // Also when it was there: whoever created it may have crashed before its name was durable.
        sync_parent(path)?;
        Ok(Box::new(RealFile { file, direct: open_direct(path), cached: Mutex::default() }))
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn write_atomically(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".tmp");
        let tmp = path.with_file_name(name);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&tmp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&tmp, path)?;
        sync_parent(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)?;
        sync_parent(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        sync_parent(to)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let ancestors = path.ancestors().filter(|folder| !folder.as_os_str().is_empty());
        let (known, missing): (Vec<_>, Vec<_>) = ancestors.partition(|folder| folder.exists());
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        missing.into_iter().try_for_each(sync_parent)?;
        // Whoever created the others may have crashed before their names were durable; but most are older than this program,
        // and some of their parents may not be ours to open.
        for folder in known {
            if let Err(error) = sync_parent(folder) {
                debug!(folder = %folder.display(), %error, "the name of a folder could not be synced");
                break;
            }
        }
        Ok(())
    }

    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Box::new(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn free_space(&self, path: &Path) -> io::Result<ByteCount> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(ByteCount(stat.f_bavail.saturating_mul(stat.f_frsize)))
    }

    fn elapsed(&self) -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
    }
}

/// A new name is durable only once its folder is.
fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[derive(Debug)]
struct RealFile {
    file: File,
    /// The same file past the page cache, where there is such a way: nobody will read the zeros.
    direct: Option<File>,
    /// What the page cache need not keep once it is on the disk.
    cached: Mutex<Cached>,
}

fn lock(cached: &Mutex<Cached>) -> MutexGuard<'_, Cached> {
    cached.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the page cache. Only a hint: where it is not heeded, the cache is fuller.
#[cfg(target_os = "linux")]
fn let_go(file: &File, Range { start, end }: Range<u64>) {
    let _ = rustix::fs::fadvise(file, start, NonZeroU64::new(end - start), Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
fn let_go(_: &File, _: Range<u64>) {}

/// The same file past the page cache.
#[cfg(target_os = "linux")]
fn open_direct(path: &Path) -> Option<File> {
    OpenOptions::new().write(true).custom_flags(OFlags::DIRECT.bits().cast_signed()).open(path).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_direct(_: &Path) -> Option<File> {
    None
}

impl DiskFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)?;
        lock(&self.cached).add(offset, data.len() as u64);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn reserve(&self, end: u64, len: u64) -> io::Result<()> {
        let reserve = || rustix::fs::fallocate(&self.file, FallocateFlags::empty(), end, len.saturating_sub(end));
        match rustix::io::retry_on_intr(reserve) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros(end, len),
            reserved => Ok(reserved?),
        }
    }

    fn write_zeros(&self, end: u64, len: u64) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            match in_pieces(end, len, |at, zeros| direct.write_all_at(zeros, at)) {
                // A disk of larger blocks, or an end within one.
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
                written => return written,
            }
        }
        in_pieces(end, len, |at, zeros| self.write_at(at, zeros))
    }

    fn sync_data(&self) -> io::Result<()> {
        let written = lock(&self.cached).take_enough();
        self.file.sync_data()?;
        for range in written {
            let_go(&self.file, range);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_excludes_a_second_holder_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("LOCK");
        let guard = FileDisk.lock(&path).unwrap();
        assert!(guard.is_some());
        assert!(FileDisk.lock(&path).unwrap().is_none());
        drop(guard);
        assert!(FileDisk.lock(&path).unwrap().is_some());
    }

    #[test]
    fn reserved_room_is_there_and_reads_as_zeros() {
        use std::os::unix::fs::MetadataExt as _;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let file = FileDisk.open(&path).unwrap();
        file.write_at(0, b"data").unwrap();
        file.reserve(4, 3 << 20).unwrap();
        assert_eq!(file.len().unwrap(), 3 << 20);
        let mut end = [1; 8];
        file.read_at((3 << 20) - 8, &mut end).unwrap();
        assert_eq!(end, [0; 8]);
        file.read_at(0, &mut end[..4]).unwrap();
        assert_eq!(&end[..4], b"data");
        let on_disk = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(on_disk >= 3 << 20, "{on_disk} bytes are on the disk");
    }

    #[test]
    fn zeros_are_written_to_any_end_and_spoil_nothing_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = FileDisk.open(&folder.path().join("file")).unwrap();
        file.write_at(0, b"data").unwrap();
        // Within a block, then at the end of one, which is where zeros can go past the page cache.
        for (end, len) in [(4, 4096), (4096, (2 << 20) + 4096), ((2 << 20) + 4096, (2 << 20) + 4101)] {
            file.write_zeros(end, len).unwrap();
            file.sync_data().unwrap();
            assert_eq!(file.len().unwrap(), len);
            let mut all = vec![1; len as usize];
            file.read_at(0, &mut all).unwrap();
            assert_eq!(&all[..4], b"data");
            assert!(all[4..].iter().all(|byte| *byte == 0));
            // Zeros past the cache, data through it.
            file.write_at(end, b"x").unwrap();
            file.read_at(end, &mut all[..1]).unwrap();
            assert_eq!(all[0], b'x');
            file.write_at(end, &[0]).unwrap();
        }
    }

    #[test]
    fn a_small_file_is_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/format");
        FileDisk.create_dir(path.parent().unwrap()).unwrap();
        FileDisk.write_atomically(&path, b"one").unwrap();
        FileDisk.write_atomically(&path, b"two").unwrap();
        assert_eq!(FileDisk.read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(FileDisk.free_space(folder.path()).unwrap().0 > 0);
    }
}
