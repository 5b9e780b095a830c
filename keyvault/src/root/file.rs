//! The file provider: 32 random bytes, mode 0600, made once per cluster by bootstrap and by nobody else.

use std::error::Error as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::BoxFuture;
use thiserror::Error;
use zeroize::Zeroizing;

use super::{MasterName, Passphrase, RootError, RootKey, RootKind, RootProvider, Unwrapped, WrappedMaster, check_kind};
use crate::entropy::Entropy;
use crate::seal;

/// Why there is no root key.
#[derive(Debug, Error)]
pub enum RootKeyError {
    /// Bootstrap happens once: the file is there already, and stays as it is.
    #[error("{path} exists already; a root key is made once and never replaced")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Anyone but its owner could read it: `chmod 600` it, and think about who has a copy.
    #[error("{path} has mode {mode:04o}; a root key is readable by its owner alone (chmod 600)")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is not a root key.
    #[error("{path} is not a root key: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The file system refused.
    #[error("cannot use the root key {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

/// The whole story on one line.
pub(super) fn explain(error: &RootKeyError) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

impl RootKey {
    /// Makes a root key and its file, and syncs both the file and its folder. For bootstrap alone.
    ///
    /// # Errors
    /// [`RootKeyError::Exists`]: load it instead. Nothing is ever overwritten.
    pub fn create(path: &Path) -> Result<Self, RootKeyError> {
        let io = |source| RootKeyError::Io { path: path.to_owned(), source };
        let key = seal::fresh_key(&Entropy::kernel());
        let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(RootKeyError::Exists { path: path.to_owned() });
            }
            Err(error) => return Err(io(error)),
        };
        file.write_all(&*key).and_then(|()| file.sync_all()).map_err(io)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        Self::load(path)
    }

    /// Loads the root key of `path`.
    ///
    /// # Errors
    /// See [`RootKeyError`]: a file that others may read, or of another length, is refused.
    pub fn load(path: &Path) -> Result<Self, RootKeyError> {
        let io = |source| RootKeyError::Io { path: path.to_owned(), source };
        let malformed = |what| RootKeyError::Malformed { path: path.to_owned(), what };
        let mut file = File::open(path).map_err(io)?;
        // Of the open file, so that nobody can swap it in between.
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(malformed("not a regular file"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(RootKeyError::Exposed { path: path.to_owned(), mode: metadata.mode() & 0o7777 });
        }
        if metadata.len() != 32 {
            return Err(malformed("not 32 bytes long"));
        }
        let mut bytes = Zeroizing::new([0; 32]);
        file.read_exact(&mut *bytes).map_err(io)?;
        if bytes.iter().all(|byte| *byte == bytes[0]) {
            return Err(malformed("all its bytes are equal"));
        }
        Ok(Self::from_key(&bytes))
    }
}

/// Wraps under a root key that lies here.
pub(super) fn wrapped(root: &RootKey, name: MasterName, key: &[u8; 32], entropy: &Entropy) -> WrappedMaster {
    WrappedMaster {
        kind: RootKind::File,
        id: root.id(name.cluster),
        version: root.version,
        reference: String::new(),
        blob: root.wrap(name, key, entropy).into(),
    }
}

/// A root key in a file. It is read when it is needed and overwritten in memory at once, so a file that is put in its place
/// while the node runs is found.
#[derive(Debug)]
pub struct FileRoot {
    path: PathBuf,
}

impl FileRoot {
    /// The root key of this file, which need not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn load(&self) -> Result<RootKey, RootError> {
        RootKey::load(&self.path).map_err(|error| match error {
            RootKeyError::Io { source, path } if source.kind() == io::ErrorKind::NotFound => {
                RootError::Missing { path }
            }
            other => other.into(),
        })
    }
}

impl RootProvider for FileRoot {
    fn kind(&self) -> RootKind {
        RootKind::File
    }

    fn missing(&self) -> Option<RootError> {
        (!self.path.exists()).then(|| RootError::Missing { path: self.path.clone() })
    }

    // A look at a small file costs nothing, and whoever has just copied it there is waiting.
    fn pause_max(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn wrap<'a>(
        &'a self,
        name: MasterName,
        key: &'a [u8; 32],
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<WrappedMaster, RootError>> {
        Box::pin(async move { Ok(wrapped(&self.load()?, name, key, &Entropy::kernel())) })
    }

    fn unwrap<'a>(
        &'a self,
        name: MasterName,
        wrapped: &'a WrappedMaster,
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<Unwrapped, RootError>> {
        Box::pin(async move {
            check_kind(wrapped, RootKind::File)?;
            self.load()?.unwrap(name, wrapped.id, &wrapped.blob)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use ensign_proto::ClusterId;

    use super::*;

    const CLUSTER: ClusterId = ClusterId::from_bytes([3; 16]);
    const NAME: MasterName = MasterName { cluster: CLUSTER, epoch: 1 };

    #[test]
    fn a_root_key_is_made_once_and_loads_as_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.key");
        let made = RootKey::create(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (32, 0o600));
        assert_eq!(RootKey::load(&path).unwrap().id(CLUSTER), made.id(CLUSTER));

        let before = fs::read(&path).unwrap();
        assert!(matches!(RootKey::create(&path), Err(RootKeyError::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), before);
        assert!(!format!("{made:?}").contains(&format!("{}", before[0])) || format!("{made:?}").len() < 40);
    }

    #[test]
    fn a_root_key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.key");
        RootKey::create(&path).unwrap();
        for mode in [0o640, 0o604, 0o660, 0o601] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert!(matches!(RootKey::load(&path), Err(RootKeyError::Exposed { mode: found, .. }) if found == mode));
        }
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        RootKey::load(&path).unwrap();
    }

    #[test]
    fn what_is_no_root_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.key");
        assert!(matches!(RootKey::load(&path), Err(RootKeyError::Io { .. })));
        for bytes in [&b"short"[..], &[0; 32], &[7; 33]] {
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            assert!(matches!(RootKey::load(&path), Err(RootKeyError::Malformed { .. })), "{} bytes", bytes.len());
        }
    }

    #[tokio::test]
    async fn a_file_that_appears_later_is_found_and_each_trouble_has_its_message() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.key");
        let root = FileRoot::new(path.clone());
        let wrapped = {
            RootKey::create(&path).unwrap();
            root.wrap(NAME, &[9; 32], None).await.unwrap()
        };
        let right = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(matches!(root.missing(), Some(RootError::Missing { .. })));
        let why = async || root.unwrap(NAME, &wrapped, None).await.unwrap_err().to_string();
        let missing = why().await;
        assert!(
            missing.contains("there is no root key at") && missing.contains("copy it there, mode 0600"),
            "{missing}"
        );
        fs::write(&path, &right).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert!(why().await.contains("chmod 600"), "{}", why().await);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert_eq!(root.unwrap(NAME, &wrapped, None).await.unwrap().key(), [9; 32]);
        assert!(root.missing().is_none());
        fs::write(&path, [&right[..31], &[right[31] ^ 1]].concat()).unwrap();
        assert!(why().await.starts_with("wrong root key: the vault needs root key"), "{}", why().await);
        let versions = [root.rotate().await.unwrap_err(), root.destroy(1).await.unwrap_err()];
        assert!(
            versions.iter().all(|error| error.to_string().contains("kept by file has no versions")),
            "{versions:?}"
        );
        let foreign = WrappedMaster { kind: RootKind::Passphrase, ..wrapped.clone() };
        let refused = root.unwrap(NAME, &foreign, None).await.unwrap_err().to_string();
        assert!(refused.contains("set root.provider = \"passphrase\""), "{refused}");
    }
}
