//! The root key: the one secret that is not in the cluster. It wraps the vault master key and nothing else.
//!
//! ```text
//! file        32 bytes beside the node, mode 0600             ┐ the root key itself: wraps here, purpose 5 (`seal`)
//! passphrase  what Argon2id makes of a phrase and a salt      ┘
//! command     a program of the operator's                     ┐ a service that keeps the root key to itself and wraps for us
//! transit     a HashiCorp-Vault-compatible transit engine     ┘ (both in the node, which may open sockets)
//! ```
//!
//! Invariants: every voter unwraps by itself, and voters never hand each other the master key. What a wrong root key opens is
//! nothing, and it is told from a damaged vault by its public name. Losing the root key is losing all data; whoever holds it
//! and a copy of the vault holds every key in that copy. Not here: when it is asked for (`vault`). Format: docs/format.md.

mod file;
mod memory;
mod pace;
mod passphrase;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{Algorithm, ClusterId};
use futures::future::BoxFuture;
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::arena::{Arena, KeySlot};
use crate::entropy::Entropy;
use crate::seal::{self, Purpose};

pub use file::{FileRoot, RootKeyError};
pub use passphrase::{Cost, PASSPHRASE_BYTES, Passphrase, PassphraseRoot};

pub(crate) use pace::Pace;

/// The first version of a root key that lies here or is made of a passphrase.
const FIRST_VERSION: u32 = 1;
/// The most that a provider may make of a master key.
pub const BLOB_MAX: usize = 32 * 1024;
/// The most bytes of what a provider calls its key.
pub const REFERENCE_MAX: usize = 512;

/// What keeps the root key. The numbers are stored: they are never given to anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum RootKind {
    /// A file beside each node.
    #[default]
    File = 0,
    /// A phrase that people type.
    Passphrase = 1,
    /// A program of the operator's.
    Command = 2,
    /// A transit engine.
    Transit = 3,
}

impl RootKind {
    /// The kind of this number; `None`: a newer build's.
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::File, Self::Passphrase, Self::Command, Self::Transit].into_iter().find(|kind| *kind as u32 == number)
    }

    /// What settings call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Passphrase => "passphrase",
            Self::Command => "command",
            Self::Transit => "transit",
        }
    }
}

impl fmt::Display for RootKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The public name of a root key: tells a wrong key from a damaged vault, and nothing about the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootId(pub [u8; 16]);

impl RootId {
    /// The name of a key that only its provider has: made of what the provider calls it.
    pub fn of_reference(kind: RootKind, reference: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"ensign/root-reference/v1");
        hash.update([kind as u8]);
        hash.update(reference);
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        Self(id)
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Which vault master key: every wrap is for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MasterName {
    /// The cluster.
    pub cluster: ClusterId,
    /// The key's epoch.
    pub epoch: u64,
}

/// A vault master key as the vault's state keeps it: wrapped, and with the name of what wrapped it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedMaster {
    /// What wrapped it.
    pub kind: RootKind,
    /// The root key's public name.
    pub id: RootId,
    /// The root key's version.
    pub version: u32,
    /// What a provider outside calls its key; empty for a key of ours.
    pub reference: String,
    /// Means something to its provider alone.
    pub blob: Bytes,
}

/// A vault master key, unwrapped, in locked memory. Overwritten when it is dropped.
pub struct Unwrapped(KeySlot);

impl Unwrapped {
    /// Has `fill` write the key where it stays.
    ///
    /// # Errors
    /// Those of `fill`; what it wrote is overwritten.
    pub fn fill<E>(fill: impl FnOnce(&mut [u8; 32]) -> Result<(), E>) -> Result<Self, E> {
        let slot = Arena::new(1).take().expect("an empty arena has room for one key");
        slot.fill(fill)?;
        Ok(Self(slot))
    }

    pub(crate) fn into_slot(self) -> KeySlot {
        self.0
    }

    #[cfg(test)]
    pub(crate) fn key(&self) -> [u8; 32] {
        self.0.with(|key| *key).unwrap_or_default()
    }
}

impl fmt::Debug for Unwrapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unwrapped")
    }
}

/// Why a master key was not wrapped or unwrapped. The messages are shown to anyone who may see a node's health.
#[derive(Debug, Error)]
pub enum RootError {
    /// Somebody has to type the passphrase.
    #[error("it waits for the passphrase: run `ensign vault unseal` on this machine")]
    PassphraseNeeded,
    /// It is another one. Counts as a guess.
    #[error("wrong passphrase")]
    PassphraseWrong,
    /// No passphrase of the kind that is taken.
    #[error("{0}")]
    PassphraseRefused(&'static str),
    /// The vault's root key is kept by something else than this node is set to.
    #[error("the vault's root key is kept by {needs}, and this node is set to {has}: set root.provider = \"{needs}\"")]
    WrongKind {
        /// What wrapped the vault's master key.
        needs: RootKind,
        /// What this node has.
        has: RootKind,
    },
    /// Another key than the vault's.
    #[error("wrong root key: the vault needs root key {needs}, this node has {has}")]
    WrongKey {
        /// The name of the vault's.
        needs: String,
        /// The name of this node's.
        has: String,
    },
    /// There is none here. Put it in its place.
    #[error("there is no root key at {path}: copy it there, mode 0600; it is looked for again by itself")]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The file cannot be used.
    #[error("{}", file::explain(.0))]
    File(#[from] RootKeyError),
    /// The root key is right, and what it wrapped is not what was wrapped.
    #[error("the vault's master key is damaged: {what}")]
    Damaged {
        /// In which way.
        what: &'static str,
    },
    /// Argon2id needs more memory than there is.
    #[error(
        "the passphrase needs {needed_mib} MiB of memory to be checked, and {free_mib} MiB are free: free some, or unseal another node"
    )]
    Memory {
        /// What it needs.
        needed_mib: u64,
        /// What there is.
        free_mib: u64,
    },
    /// What keeps the root key has no versions of its own.
    #[error("a root key that is kept by {kind} has no versions that could be changed one by one")]
    Unsupported {
        /// What keeps it.
        kind: RootKind,
    },
    /// The program or the service that keeps the root key did not do it.
    #[error("{message}")]
    Provider {
        /// What happened, without a secret.
        message: String,
    },
}

impl RootError {
    /// A provider's failure.
    pub fn provider(message: impl Into<String>) -> Self {
        Self::Provider { message: message.into() }
    }
}

/// Keeps a root key, or reaches what keeps it.
///
/// The calls are repeated after failures, so they have no effect but their answer. Dropping their futures is safe.
pub trait RootProvider: Send + Sync + 'static {
    /// What it is.
    fn kind(&self) -> RootKind;

    /// What this node lacks before it could ever unseal; `None`: nothing that can be told without trying.
    fn missing(&self) -> Option<RootError> {
        None
    }

    /// How long at most between two attempts that nobody asked for.
    fn pause_max(&self) -> Duration {
        Duration::from_secs(30)
    }

    /// Wraps `key`. For bootstrap.
    fn wrap<'a>(
        &'a self,
        name: MasterName,
        key: &'a [u8; 32],
        phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<WrappedMaster, RootError>>;

    /// Unwraps what [`RootProvider::wrap`] made, here or on another node. `phrase` is what somebody typed.
    fn unwrap<'a>(
        &'a self,
        name: MasterName,
        wrapped: &'a WrappedMaster,
        phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<Unwrapped, RootError>>;

    /// Makes a new version of the root key, which wraps what is wrapped from then on, and says which. Not safe to repeat: each call makes
    /// one more.
    fn rotate(&self) -> BoxFuture<'_, Result<u32, RootError>> {
        let kind = self.kind();
        Box::pin(async move { Err(RootError::Unsupported { kind }) })
    }

    /// Destroys every version up to this one, and has its provider confirm that. What they wrapped is gone for ever. Safe to repeat.
    fn destroy(&self, version: u32) -> BoxFuture<'_, Result<(), RootError>> {
        let (kind, _) = (self.kind(), version);
        Box::pin(async move { Err(RootError::Unsupported { kind }) })
    }
}

/// Refuses what something else wrapped.
///
/// # Errors
/// [`RootError::WrongKind`].
pub fn check_kind(wrapped: &WrappedMaster, has: RootKind) -> Result<(), RootError> {
    if wrapped.kind == has { Ok(()) } else { Err(RootError::WrongKind { needs: wrapped.kind, has }) }
}

/// A root key that lies here, in locked memory, for as long as something is wrapped or unwrapped.
pub struct RootKey {
    key: KeySlot,
    version: u32,
}

impl RootKey {
    /// A root key that lies in no file.
    #[cfg(any(test, feature = "testing"))]
    pub fn for_test(key: [u8; 32]) -> Self {
        Self::from_key(&key)
    }

    fn from_key(key: &[u8; 32]) -> Self {
        let filled = Unwrapped::fill::<std::convert::Infallible>(|out| {
            out.copy_from_slice(key);
            Ok(())
        });
        match filled {
            Ok(Unwrapped(key)) => Self { key, version: FIRST_VERSION },
            Err(never) => match never {},
        }
    }

    /// Its public name in `cluster`.
    pub fn id(&self, cluster: ClusterId) -> RootId {
        let info: [&[u8]; 3] = [b"ensign/root-id/v1", cluster.as_bytes(), &self.version.to_be_bytes()];
        RootId(self.key.with(|key| seal::fingerprint(key, &info)).unwrap_or_default())
    }

    /// Wraps the vault master key.
    pub(crate) fn wrap(&self, name: MasterName, master: &[u8; 32], entropy: &Entropy) -> Vec<u8> {
        let aad = master_aad(name, self.version);
        self.key
            .with(|key| seal::seal_box(key, Purpose::VmkWrap, Algorithm::Aes256Gcm, &aad, master, entropy))
            .unwrap_or_default()
    }

    /// Unwraps a vault master key of this root key: whether it is, its public name says.
    pub(crate) fn unwrap(&self, name: MasterName, id: RootId, boxed: &[u8]) -> Result<Unwrapped, RootError> {
        let own = self.id(name.cluster);
        if own != id {
            return Err(RootError::WrongKey { needs: id.to_string(), has: own.to_string() });
        }
        let aad = master_aad(name, self.version);
        let damaged = |_| RootError::Damaged { what: "it does not open under its root key" };
        Unwrapped::fill(|out| {
            self.key
                .with(|key| seal::open_key(key, Purpose::VmkWrap, Algorithm::Aes256Gcm, &aad, boxed, out))
                .unwrap_or(Err(seal::OpenError))
        })
        .map_err(damaged)
    }
}

impl fmt::Debug for RootKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootKey").field("version", &self.version).finish_non_exhaustive()
    }
}

fn master_aad(name: MasterName, version: u32) -> Vec<u8> {
    [&name.cluster.as_bytes()[..], &name.epoch.to_be_bytes(), &version.to_be_bytes()].concat()
}

/// The public name of a vault master key that was wrapped outside: says whether what came back is what was sent.
pub fn master_id(name: MasterName, master: &[u8; 32]) -> [u8; 16] {
    seal::fingerprint(master, &[b"ensign/vmk-id/v1", name.cluster.as_bytes(), &name.epoch.to_be_bytes()])
}

/// A root key that lies in no file and is never lost.
#[cfg(any(test, feature = "testing"))]
#[derive(Debug)]
pub struct TestRoot(RootKey);

#[cfg(any(test, feature = "testing"))]
impl TestRoot {
    /// The root key of these bytes.
    pub fn new(key: [u8; 32]) -> Self {
        Self(RootKey::for_test(key))
    }
}

#[cfg(any(test, feature = "testing"))]
impl RootProvider for TestRoot {
    fn kind(&self) -> RootKind {
        RootKind::File
    }

    fn pause_max(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn wrap<'a>(
        &'a self,
        name: MasterName,
        key: &'a [u8; 32],
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<WrappedMaster, RootError>> {
        Box::pin(async move { Ok(file::wrapped(&self.0, name, key, &Entropy::kernel())) })
    }

    fn unwrap<'a>(
        &'a self,
        name: MasterName,
        wrapped: &'a WrappedMaster,
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<Unwrapped, RootError>> {
        Box::pin(async move {
            check_kind(wrapped, RootKind::File)?;
            self.0.unwrap(name, wrapped.id, &wrapped.blob)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: ClusterId = ClusterId::from_bytes([3; 16]);

    fn name(epoch: u64) -> MasterName {
        MasterName { cluster: CLUSTER, epoch }
    }

    #[test]
    fn a_master_key_opens_under_its_root_cluster_and_epoch_only() {
        let root = RootKey::for_test([7; 32]);
        let boxed = root.wrap(name(1), &[9; 32], &Entropy::kernel());
        let id = root.id(CLUSTER);
        assert_eq!(root.unwrap(name(1), id, &boxed).unwrap().key(), [9; 32]);
        let elsewhere = MasterName { cluster: ClusterId::from_bytes([4; 16]), epoch: 1 };
        let refused = |refused: Result<Unwrapped, RootError>| refused.unwrap_err().to_string();
        assert!(refused(root.unwrap(name(2), id, &boxed)).contains("is damaged"));
        assert!(refused(root.unwrap(elsewhere, root.id(elsewhere.cluster), &boxed)).contains("is damaged"));
        assert!(refused(root.unwrap(elsewhere, id, &boxed)).contains("wrong root key"));
        assert!(refused(RootKey::for_test([8; 32]).unwrap(name(1), id, &boxed)).contains("wrong root key"));
        assert_ne!(root.id(CLUSTER), root.id(elsewhere.cluster));
    }

    #[test]
    fn kinds_keep_their_numbers_and_names() {
        let all: Vec<_> = (0..5).map(|number| RootKind::from_number(number).map(RootKind::name)).collect();
        assert_eq!(all, [Some("file"), Some("passphrase"), Some("command"), Some("transit"), None]);
    }

    #[test]
    fn a_reference_names_one_key_of_one_kind() {
        let id = |kind, reference: &str| RootId::of_reference(kind, reference);
        assert_eq!(id(RootKind::Command, "a"), id(RootKind::Command, "a"));
        assert_ne!(id(RootKind::Command, "a"), id(RootKind::Transit, "a"));
        assert_ne!(id(RootKind::Command, "a"), id(RootKind::Command, "b"));
    }
}
