//! The floor under every durable acknowledgement: what the disk itself takes to sync a small append.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::Instant;

use crate::cli::UsageError;

/// Appends of this size, one fdatasync each.
const APPEND: usize = 4096;
const APPENDS_MAX: u32 = 2_000;
const TIME_MAX: Duration = Duration::from_secs(3);

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// Microseconds that one 4 KiB append to a growing file plus `fdatasync` takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floor {
    pub(super) p50_us: u64,
    pub(super) p99_us: u64,
}

/// Measures the disk under `dir`. Blocks for up to three seconds.
///
/// # Errors
/// Whatever writing a file there says.
pub(super) fn floor(dir: &Path) -> anyhow::Result<Floor> {
    let path = dir.join("fdatasync-floor");
    let open = || -> std::io::Result<File> { OpenOptions::new().create_new(true).append(true).open(&path) };
    let mut file = open().with_context(|| format!("cannot write to {}", dir.display()))?;
    let block = [0x5a; APPEND];
    let mut times = super::report::microseconds()?;
    let begin = Instant::now();
    for _ in 0..APPENDS_MAX {
        let before = Instant::now();
        file.write_all(&block)?;
        file.sync_data()?;
        times.saturating_record(before.elapsed().as_micros() as u64);
        if begin.elapsed() > TIME_MAX {
            break;
        }
    }
    drop(file);
    std::fs::remove_file(&path)?;
    Ok(Floor { p50_us: times.value_at_quantile(0.5), p99_us: times.value_at_quantile(0.99) })
}

/// Refuses a folder whose files live in memory: a sync costs nothing there, and the figures would mean nothing.
///
/// # Errors
/// [`UsageError`] for such a folder, or one that does not exist.
pub(super) fn refuse_memory(dir: &Path) -> anyhow::Result<()> {
    let stat = rustix::fs::statfs(dir).map_err(|error| UsageError(format!("cannot use {}: {error}", dir.display())))?;
    #[allow(clippy::cast_lossless, clippy::unnecessary_cast, reason = "the type of f_type differs between platforms")]
    let kind = stat.f_type as u32 as u64;
    if kind == TMPFS_MAGIC || kind == RAMFS_MAGIC {
        return Err(UsageError(format!(
            "{} is in memory (tmpfs), where fsync costs nothing: name a folder on a disk with --dir",
            dir.display()
        ))
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_has_a_middle_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let floor = floor(dir.path()).unwrap();
        assert!(floor.p50_us <= floor.p99_us);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_folder_in_memory_is_refused() {
        let shm = Path::new("/dev/shm");
        if shm.exists() {
            assert!(refuse_memory(shm).unwrap_err().to_string().contains("in memory"));
        }
        assert!(refuse_memory(Path::new("/no/such/folder")).is_err());
    }
}
