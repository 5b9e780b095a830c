//! A node's data folder: one process at a time, and never a newer format than this build knows.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::disk::{Disk, LockGuard};

/// The format this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

const FORMAT_FILE: &str = "format";
const LOCK_FILE: &str = "LOCK";
const FORMAT_NAME: &str = "ensign-data";

/// Why a data folder cannot be used.
#[derive(Debug, Error)]
pub enum DataDirError {
    /// Another process has it.
    #[error("{} is in use by another process: stop that one first, or choose another data folder", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// A newer release wrote it.
    #[error(
        "{} was written by a newer release (format {found}, this one knows up to {FORMAT}): run that release, or restore a backup that is older",
        path.display()
    )]
    Newer {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// The folder holds files, but not ours.
    #[error("{} cannot be read ({what}): it is damaged or not a data folder of Ensign; restore it from a backup or choose another one", path.display())]
    Unreadable {
        /// The format file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// The file system said no.
    #[error("{}: {source}", path.display())]
    Io {
        /// What was asked for.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
}

/// A locked data folder. The lock ends with the value.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    _lock: Held,
}

struct Held(#[expect(dead_code, reason = "it is held, not used")] LockGuard);

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Held")
    }
}

impl DataDir {
    /// Creates the folder if need be, locks it, and checks (or, in a fresh one, writes) its format.
    ///
    /// # Errors
    /// Each says what to do; nothing in the folder was changed.
    pub fn lock(disk: Arc<dyn Disk>, path: &Path) -> Result<Self, DataDirError> {
        let io_at = |path: &Path| {
            let path = path.to_owned();
            move |source| DataDirError::Io { path, source }
        };
        disk.create_dir(path).map_err(io_at(path))?;
        let lock = disk.lock(&path.join(LOCK_FILE)).map_err(io_at(path))?;
        let Some(lock) = lock else { return Err(DataDirError::InUse { path: path.to_owned() }) };
        let format = path.join(FORMAT_FILE);
        if disk.exists(&format).map_err(io_at(&format))? {
            let text = disk.read(&format).map_err(io_at(&format))?;
            let found = parse(&text).map_err(|what| DataDirError::Unreadable { path: format, what })?;
            if found > FORMAT {
                return Err(DataDirError::Newer { path: path.to_owned(), found });
            }
        } else {
            let text = format!("{FORMAT_NAME} {FORMAT}\n");
            disk.write_atomically(&format, text.as_bytes()).map_err(io_at(&format))?;
        }
        Ok(Self { path: path.to_owned(), disk, _lock: Held(lock) })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The disk that it lies on.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }
}

fn parse(text: &[u8]) -> Result<u32, String> {
    let text = String::from_utf8_lossy(text);
    let mut words = text.split_whitespace();
    match (words.next(), words.next().map(str::parse), words.next()) {
        (Some(FORMAT_NAME), Some(Ok(found)), None) if found > 0 => Ok(found),
        _ => Err(format!("its format file says {:?}", text.chars().take(64).collect::<String>())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::FileDisk;

    fn lock(path: &Path) -> Result<DataDir, DataDirError> {
        DataDir::lock(Arc::new(FileDisk), path)
    }

    #[test]
    fn a_folder_in_use_is_refused_and_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node-1");
        let held = lock(&path).unwrap();
        let refused = lock(&path).unwrap_err();
        assert!(matches!(refused, DataDirError::InUse { .. }));
        assert!(refused.to_string().contains("is in use by another process: stop that one first"), "{refused}");
        drop(held);
        lock(&path).unwrap();
    }

    #[test]
    fn a_newer_format_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("node-1");
        drop(lock(&path).unwrap());
        std::fs::write(path.join("format"), "ensign-data 99\n").unwrap();
        let refused = lock(&path).unwrap_err();
        assert!(matches!(refused, DataDirError::Newer { found: 99, .. }), "{refused}");
        assert!(refused.to_string().contains("newer release"), "{refused}");
        assert_eq!(std::fs::read(path.join("format")).unwrap(), b"ensign-data 99\n");
    }

    #[test]
    fn a_damaged_format_file_is_refused() {
        for text in ["", "ensign-data", "ensign-data x", "ensign-data 0", "other 1", "ensign-data 1 2"] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?}");
        }
        assert_eq!(parse(b"ensign-data 1\n"), Ok(1));
    }
}
