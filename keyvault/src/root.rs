//! The root key: the one secret that is not in the cluster. It wraps the vault master key and nothing else.
//!
//! The file provider: 32 random bytes, mode 0600, made once per cluster by bootstrap and by nobody else. Losing it is
//! losing all data; whoever holds it and a copy of the vault holds every key in that copy.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ensign_proto::{Algorithm, ClusterId};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::arena::{Arena, KeySlot};
use crate::entropy::Entropy;
use crate::seal::{self, OpenError, Purpose};

/// The first, and with this provider the only, version of a root key.
const VERSION: u32 = 1;

/// A root key, in locked memory.
pub struct RootKey {
    key: KeySlot,
    version: u32,
}

/// The public name of a root key: tells a wrong key from a damaged vault, and nothing about the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootId(pub [u8; 16]);

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

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

    /// A root key that lies in no file.
    #[cfg(any(test, feature = "testing"))]
    pub fn for_test(key: [u8; 32]) -> Self {
        Self::from_key(&key)
    }

    fn from_key(key: &[u8; 32]) -> Self {
        let slot = Arena::new(1).take().expect("an empty arena has room for one key");
        let filled = slot.fill::<std::convert::Infallible>(|out| {
            out.copy_from_slice(key);
            Ok(())
        });
        assert!(filled.is_ok());
        Self { key: slot, version: VERSION }
    }

    /// Its public name in `cluster`.
    pub fn id(&self, cluster: ClusterId) -> RootId {
        let info: [&[u8]; 3] = [b"ensign/root-id/v1", cluster.as_bytes(), &self.version.to_be_bytes()];
        RootId(self.key.with(|key| seal::fingerprint(key, &info)).unwrap_or_default())
    }

    /// Its version.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Wraps the vault master key of `epoch`.
    pub(crate) fn wrap(&self, cluster: ClusterId, epoch: u64, vmk: &[u8; 32], entropy: &Entropy) -> Vec<u8> {
        let aad = vmk_aad(cluster, epoch, self.version);
        self.key
            .with(|key| seal::seal_box(key, Purpose::VmkWrap, Algorithm::Aes256Gcm, &aad, vmk, entropy))
            .unwrap_or_default()
    }

    /// Unwraps the vault master key of `epoch` into `out`.
    pub(crate) fn unwrap(
        &self,
        cluster: ClusterId,
        epoch: u64,
        boxed: &[u8],
        out: &mut [u8; 32],
    ) -> Result<(), OpenError> {
        let aad = vmk_aad(cluster, epoch, self.version);
        self.key
            .with(|key| seal::open_key(key, Purpose::VmkWrap, Algorithm::Aes256Gcm, &aad, boxed, out))
            .unwrap_or(Err(OpenError))
    }
}

impl fmt::Debug for RootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootKey").field("version", &self.version).finish_non_exhaustive()
    }
}

fn vmk_aad(cluster: ClusterId, epoch: u64, version: u32) -> Vec<u8> {
    [&cluster.as_bytes()[..], &epoch.to_be_bytes(), &version.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const CLUSTER: ClusterId = ClusterId::from_bytes([3; 16]);

    #[test]
    fn a_root_key_is_made_once_and_loads_as_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("root.key");
        let made = RootKey::create(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (32, 0o600));
        assert_eq!(RootKey::load(&path).unwrap().id(CLUSTER), made.id(CLUSTER));
        assert_ne!(made.id(CLUSTER), made.id(ClusterId::from_bytes([4; 16])));

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

    #[test]
    fn a_master_key_opens_under_its_root_cluster_and_epoch_only() {
        let root = RootKey::for_test([7; 32]);
        let boxed = root.wrap(CLUSTER, 1, &[9; 32], &Entropy::kernel());
        let mut out = [0; 32];
        root.unwrap(CLUSTER, 1, &boxed, &mut out).unwrap();
        assert_eq!(out, [9; 32]);
        assert_eq!(root.unwrap(CLUSTER, 2, &boxed, &mut out), Err(OpenError));
        assert_eq!(root.unwrap(ClusterId::from_bytes([4; 16]), 1, &boxed, &mut out), Err(OpenError));
        assert_eq!(RootKey::for_test([8; 32]).unwrap(CLUSTER, 1, &boxed, &mut out), Err(OpenError));
        assert_eq!(out, [0; 32]);
    }
}
