//! Small files of a node: who it is, and credentials that are shown once.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ensign_keyvault::EpochFloor;
use ensign_proto::{ClusterId, ClusterVersion, NodeId};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

/// The newest version of `node.json` that this program knows. It is written once the cluster is at version 2, so that until then
/// the program before this one can be put back.
const FORMAT: u32 = 3;
const FORMAT_BEFORE: u32 = 2;

/// Who this data directory belongs to. Kept as `node.json` beside the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    /// The version of this file.
    pub format: u32,
    /// The cluster, a ULID.
    pub cluster: String,
    /// The node.
    pub node: u64,
    /// How often the node has started; never goes back.
    pub incarnation: u64,
    /// The highest epoch of the vault that this node has seen; never goes back. Format 1 did not keep it.
    #[serde(default)]
    pub vault_epoch: u64,
    /// The highest version of the cluster that this node has seen; never goes back. Formats 1 and 2 did not keep it: then 1.
    #[serde(default)]
    pub cluster_version: u32,
}

/// Why a small file cannot be used. Each message says what to do.
#[derive(Debug, Error)]
pub enum FileError {
    /// Reading or writing failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error(
        "{path} is damaged ({message}): restore it from a copy, or give the node an empty data directory and a new node.id"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A newer program wrote it.
    #[error(
        "{path} has format {found}, and this program knows formats up to {FORMAT}: run the version that wrote it, or a newer one"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It belongs to a cluster that this program is too old for.
    #[error(
        "{path}: the cluster is at version {active}, and this program speaks versions up to {speaks} only. Nothing was changed; run the \
         version of ensign that ran here before, or a newer one"
    )]
    ClusterNewer {
        /// The file.
        path: PathBuf,
        /// The cluster's version.
        active: ClusterVersion,
        /// What this program speaks.
        speaks: ClusterVersion,
    },
    /// A secret that others than its owner may read.
    #[error("{path} has mode {mode:04o}; a secret is readable by its owner alone (chmod 600)")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is longer than what it should be could be.
    #[error("{path} is longer than {bytes_max} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// What it could be.
        bytes_max: usize,
    },
    /// The directory belongs to another node.
    #[error("{path} belongs to node {found}, not to node {expected}: set node.data_dir or node.id right")]
    WrongNode {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: NodeId,
        /// Who asked.
        expected: NodeId,
    },
}

impl NodeFile {
    /// Reads the file of `data_dir` for `node`; `None` when the directory is new.
    ///
    /// # Errors
    /// [`FileError`]: it is damaged, newer than this program, or another node's.
    pub fn read(data_dir: &Path, node: NodeId) -> Result<Option<(Self, ClusterId)>, FileError> {
        let path = Self::path(data_dir);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(FileError::Io { action: "read", path, source }),
        };
        let file: Self = serde_json::from_str(&text)
            .map_err(|error| FileError::Damaged { path: path.clone(), message: error.to_string() })?;
        if file.format > FORMAT {
            return Err(FileError::Newer { path, found: file.format });
        }
        if file.node != node.0 {
            return Err(FileError::WrongNode { path, found: NodeId(file.node), expected: node });
        }
        let cluster = file
            .cluster
            .parse()
            .map_err(|_| FileError::Damaged { path, message: "the cluster's id is malformed".to_owned() })?;
        Ok(Some((file, cluster)))
    }

    /// The cluster's version when the node last saw it.
    pub fn cluster_version(&self) -> ClusterVersion {
        ClusterVersion::or_first(self.cluster_version)
    }

    /// Whether a program that speaks versions up to this one may start on the directory. Call it before anything is touched.
    ///
    /// # Errors
    /// [`FileError::ClusterNewer`].
    pub fn check_version(&self, data_dir: &Path, speaks: ClusterVersion) -> Result<(), FileError> {
        let active = self.cluster_version();
        if active > speaks {
            return Err(FileError::ClusterNewer { path: Self::path(data_dir), active, speaks });
        }
        Ok(())
    }

    /// Notes one more start of `node` in `cluster`, durably, before it says a word to anybody. Its logs are there by then.
    ///
    /// # Errors
    /// As [`NodeFile::read`].
    pub fn begin_life(data_dir: &Path, node: NodeId, cluster: ClusterId) -> Result<Self, FileError> {
        let before = Self::read(data_dir, node)?.map(|(file, _)| file);
        let incarnation = before.as_ref().map_or(0, |file| file.incarnation) + 1;
        let vault_epoch = before.as_ref().map_or(0, |file| file.vault_epoch);
        let cluster_version = before.map_or(0, |file| file.cluster_version);
        let (cluster, node) = (cluster.to_string(), node.0);
        let file = Self { format: 0, cluster, node, incarnation, vault_epoch, cluster_version }.in_its_format();
        file.write(data_dir)?;
        Ok(file)
    }

    /// The oldest format that can hold it.
    fn in_its_format(self) -> Self {
        let format = if self.cluster_version() >= ClusterVersion::V2 { FORMAT } else { FORMAT_BEFORE };
        Self { format, ..self }
    }

    fn write(&self, data_dir: &Path) -> Result<(), FileError> {
        let text = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        write_secret(&Self::path(data_dir), text.as_bytes())
    }

    fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("node.json")
    }
}

/// Keeps in `node.json` what never goes back: the highest epoch of the vault (one that was set back below it is refused, also after a
/// restart) and the highest version of the cluster (a program that is too old for it is refused).
#[derive(Debug)]
pub struct NodeFloor {
    data_dir: PathBuf,
    file: Mutex<NodeFile>,
}

impl NodeFloor {
    /// The floor of the node whose life `file` describes.
    pub fn new(data_dir: &Path, file: NodeFile) -> Self {
        Self { data_dir: data_dir.to_owned(), file: Mutex::new(file) }
    }

    /// Keeps that the cluster has this version; durable when it returns.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn keep_version(&self, version: ClusterVersion) -> Result<(), FileError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if version > file.cluster_version() {
            let raised = NodeFile { cluster_version: version.0, ..file.clone() }.in_its_format();
            raised.write(&self.data_dir)?;
            *file = raised;
        }
        Ok(())
    }
}

impl NodeFloor {
    /// Keeps that this life of the node has begun elsewhere, so that the next start on this directory begins a later one; durable when it
    /// returns.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub fn raise_life(&self, seen: u64) -> Result<(), FileError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if seen > file.incarnation {
            let raised = NodeFile { incarnation: seen, ..file.clone() };
            raised.write(&self.data_dir)?;
            *file = raised;
        }
        Ok(())
    }
}

impl EpochFloor for NodeFloor {
    fn kept(&self) -> u64 {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).vault_epoch
    }

    fn raise(&self, epoch: u64) -> Result<(), String> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if epoch > file.vault_epoch {
            let raised = NodeFile { vault_epoch: epoch, ..file.clone() };
            raised.write(&self.data_dir).map_err(|error| error.to_string())?;
            *file = raised;
        }
        Ok(())
    }
}

/// Reads a small secret, which only its owner may read.
///
/// # Errors
/// [`FileError::Io`], [`FileError::Exposed`], [`FileError::TooLong`].
pub fn read_secret(path: &Path, bytes_max: usize) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let io = |source| FileError::Io { action: "read", path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(io)?;
    // Of the open file, so that nobody can swap it in between.
    let mode = file.metadata().map_err(io)?.mode();
    if mode & 0o077 != 0 {
        return Err(FileError::Exposed { path: path.to_owned(), mode: mode & 0o7777 });
    }
    // Never grown, so that no copy stays behind.
    let mut contents = Zeroizing::new(Vec::with_capacity(bytes_max + 1));
    file.take(bytes_max as u64 + 1).read_to_end(&mut contents).map_err(io)?;
    if contents.len() > bytes_max {
        return Err(FileError::TooLong { path: path.to_owned(), bytes_max });
    }
    Ok(contents)
}

/// Replaces `path` by `contents`, readable by its owner alone; durable when it returns, never half written.
///
/// # Errors
/// [`FileError::Io`].
pub fn write_secret(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    replace(path, contents, 0o600)
}

/// The same, readable by everybody: certificates and settings.
///
/// # Errors
/// [`FileError::Io`].
pub fn write_public(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    replace(path, contents, 0o644)
}

fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<(), FileError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.new"));
    let write = || {
        let _ = fs::remove_file(&temporary);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(folder)?.sync_all()
    };
    write().map_err(|source| FileError::Io { action: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> ClusterId {
        ClusterId::new(1_700_000_000_000, [3; 10])
    }

    #[test]
    fn every_start_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(NodeFile::read(dir.path(), NodeId(1)).unwrap(), None);
        assert_eq!(NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap().incarnation, 1);
        assert_eq!(NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap().incarnation, 2);
        assert_eq!(NodeFile::read(dir.path(), NodeId(1)).unwrap().unwrap().1, cluster());
    }

    #[test]
    fn the_vaults_epoch_is_kept_from_life_to_life_and_never_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let floor = NodeFloor::new(dir.path(), NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap());
        assert_eq!(floor.kept(), 0);
        floor.raise(7).unwrap();
        floor.raise(5).unwrap();
        let next = NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap();
        assert_eq!((next.incarnation, next.vault_epoch), (2, 7));
        let floor = NodeFloor::new(&dir.path().join("gone"), next);
        assert!(floor.raise(8).unwrap_err().starts_with("cannot write"));
        assert_eq!(floor.kept(), 7, "what is not on disk is not kept");
    }

    #[test]
    fn a_life_that_another_process_has_begun_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let floor = NodeFloor::new(dir.path(), NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap());
        floor.raise_life(4).unwrap();
        floor.raise_life(2).unwrap();
        floor.raise(7).unwrap();
        let next = NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap();
        assert_eq!(
            (next.incarnation, next.vault_epoch),
            (5, 7),
            "later than what was seen, and nothing else is forgotten"
        );
    }

    #[test]
    fn a_file_of_the_first_format_opens() {
        let dir = tempfile::tempdir().unwrap();
        let stored = "{\n  \"format\": 1,\n  \"cluster\": \"01HF7YAT0061R30C1G60R30C1G\",\n  \"node\": 1,\n  \"incarnation\": 4\n}\n";
        fs::write(dir.path().join("node.json"), stored).unwrap();
        let (file, cluster) = NodeFile::read(dir.path(), NodeId(1)).unwrap().unwrap();
        assert_eq!((file.incarnation, file.vault_epoch), (4, 0));
        let next = NodeFile::begin_life(dir.path(), NodeId(1), cluster).unwrap();
        assert_eq!((next.format, next.incarnation), (FORMAT_BEFORE, 5), "the program before this one can be put back");
    }

    #[test]
    fn once_the_cluster_is_at_a_version_older_programs_are_refused_and_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        let floor = NodeFloor::new(dir.path(), NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap());
        floor.keep_version(ClusterVersion::V1).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("\"format\": 2"));
        floor.keep_version(ClusterVersion(3)).unwrap();
        floor.keep_version(ClusterVersion::V2).unwrap();
        // What the first program that kept versions reads first, and refuses.
        let kept = fs::read_to_string(&path).unwrap();
        assert!(kept.contains("\"format\": 3"), "{kept}");
        let (file, _) = NodeFile::read(dir.path(), NodeId(1)).unwrap().unwrap();
        file.check_version(dir.path(), ClusterVersion(3)).unwrap();
        let error = file.check_version(dir.path(), ClusterVersion::V2).unwrap_err().to_string();
        assert!(error.contains("is at version 3, and this program speaks versions up to 2 only"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), kept);
        let next = NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap();
        assert_eq!((next.incarnation, next.cluster_version()), (2, ClusterVersion(3)));
    }

    #[test]
    fn a_directory_of_another_node_or_a_newer_program_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        NodeFile::begin_life(dir.path(), NodeId(1), cluster()).unwrap();
        let error = NodeFile::read(dir.path(), NodeId(2)).unwrap_err().to_string();
        assert!(error.contains("belongs to node 1, not to node 2"), "{error}");

        let path = dir.path().join("node.json");
        let newer = fs::read_to_string(&path).unwrap().replace("\"format\": 2", "\"format\": 4");
        fs::write(&path, newer).unwrap();
        let error = NodeFile::read(dir.path(), NodeId(1)).unwrap_err().to_string();
        assert!(error.contains("has format 4"), "{error}");

        fs::write(&path, "{").unwrap();
        assert!(matches!(NodeFile::read(dir.path(), NodeId(1)), Err(FileError::Damaged { .. })));
    }

    #[test]
    fn secrets_are_for_their_owner_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials.json");
        write_secret(&path, b"{}").unwrap();
        write_secret(&path, b"{ }").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"{ }");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
