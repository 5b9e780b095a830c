//! The vault master key, unwrapped, and what it wraps.

use std::fmt;

use bytes::Bytes;
use ensign_proto::{Algorithm, ClusterId, KeyVersion, ProjectId, RingId};
use zeroize::Zeroizing;

use crate::arena::{Arena, KeySlot};
use crate::entropy::Entropy;
use crate::lease::{LeaseConfig, LeaseTerms};
use crate::link::{Reason, Refusal};
use crate::machine::{Change, Initialize, Kek, PutSecret, State, Version};
use crate::root::RootKey;
use crate::seal::{self, Purpose};
use crate::wire;
use crate::wrap::{KekId, KekName, Origin, secret_aad};

/// The vault master key of one epoch, in locked memory.
pub(crate) struct MasterKey {
    slot: KeySlot,
    cluster: ClusterId,
    epoch: u64,
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MasterKey").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// Makes the first vault master key and wraps it: what bootstrap proposes.
pub(crate) fn first_master(cluster: ClusterId, root: &RootKey, lease: &LeaseConfig, entropy: &Entropy) -> Change {
    let master = seal::fresh_key(entropy);
    Change::Initialize(Initialize {
        cluster: wire::bytes(cluster.as_bytes()),
        master_box: root.wrap(cluster, 1, &master, entropy).into(),
        root_id: wire::bytes(&root.id(cluster).0),
        root_version: root.version(),
        lease: Some(LeaseTerms::of(lease)),
    })
}

impl MasterKey {
    /// Unwraps the master key of `state`. The message says why it cannot, and is fit for people.
    pub(crate) fn unseal(cluster: ClusterId, state: &State, root: Option<&RootKey>) -> Result<Self, String> {
        let stored = state.master.as_ref().ok_or("the vault is not initialized yet")?;
        let root = root.ok_or("this node has no root key")?;
        if state.cluster != cluster {
            return Err(format!("this vault belongs to cluster {}, not to {cluster}", state.cluster));
        }
        // Told by its public name, so that a wrong key is never taken for a damaged vault.
        let id = root.id(cluster);
        if id.0 != stored.root_id {
            let needed = crate::root::RootId(stored.root_id);
            return Err(format!("wrong root key: the vault needs root key {needed}, this node has {id}"));
        }
        let slot = Arena::new(1).take().map_err(|error| error.to_string())?;
        slot.fill(|key| root.unwrap(cluster, stored.epoch, &stored.boxed, key))
            .map_err(|_| "the vault's master key is damaged: it does not open under its root key")?;
        Ok(Self { slot, cluster, epoch: stored.epoch })
    }

    pub(crate) fn cluster(&self) -> ClusterId {
        self.cluster
    }

    fn with<T>(&self, borrow: impl FnOnce(&[u8; 32]) -> T) -> Result<T, Refusal> {
        self.slot.with(borrow).ok_or_else(|| Refusal::new(Reason::Sealed, "the vault was sealed"))
    }

    /// Makes a KEK for a version of a ring.
    pub(crate) fn make_kek(
        &self,
        project: ProjectId,
        ring: RingId,
        version: KeyVersion,
        alg: Algorithm,
        entropy: &Entropy,
    ) -> Result<Kek, Refusal> {
        let kek = seal::fresh_key(entropy);
        let name = KekName {
            cluster: self.cluster,
            project,
            ring,
            version,
            alg,
            origin: Origin::Generated,
            epoch: self.epoch,
        };
        let (id, boxed) = self.with(|master| name.wrap(master, &kek, entropy))?;
        Ok(Kek { id: Bytes::copy_from_slice(&id.0), boxed: boxed.into(), master_epoch: self.epoch })
    }

    pub(crate) fn unwrap(&self, stored: &StoredKek) -> Result<Zeroizing<[u8; 32]>, Refusal> {
        let mut kek = Zeroizing::new([0; 32]);
        self.with(|master| stored.name.unwrap(master, &stored.id, &stored.boxed, &mut kek))?.map_err(|_| {
            let (ring, version) = stored.key();
            Refusal::new(Reason::Damaged, format!("version {version} of key ring {ring} does not open in the vault"))
        })?;
        Ok(kek)
    }

    /// Seals a secret at its revision.
    pub(crate) fn seal_secret(
        &self,
        kind: u8,
        id: &[u8; 16],
        revision: u64,
        secret: &[u8],
        entropy: &Entropy,
    ) -> Result<PutSecret, Refusal> {
        let aad = secret_aad(self.cluster, kind, id, revision, self.epoch);
        let alg = Algorithm::Aes256Gcm;
        let boxed = self.with(|master| seal::seal_box(master, Purpose::Secret, alg, &aad, secret, entropy))?;
        Ok(PutSecret {
            kind: u32::from(kind),
            id: wire::bytes(id),
            revision,
            boxed: boxed.into(),
            master_epoch: self.epoch,
        })
    }

    pub(crate) fn open_secret(
        &self,
        kind: u8,
        id: &[u8; 16],
        revision: u64,
        boxed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let aad = secret_aad(self.cluster, kind, id, revision, self.epoch);
        self.with(|master| seal::open_box(master, Purpose::Secret, Algorithm::Aes256Gcm, &aad, boxed))?
            .map_err(|_| Refusal::new(Reason::Damaged, "the secret does not open in the vault"))
    }
}

/// A KEK as the state holds it, copied out from under the lock.
#[derive(Debug, Clone)]
pub(crate) struct StoredKek {
    name: KekName,
    id: KekId,
    boxed: Bytes,
}

impl StoredKek {
    pub(crate) fn of(
        cluster: ClusterId,
        id: RingId,
        ring: &crate::machine::Ring,
        version: KeyVersion,
        stored: &Version,
    ) -> Self {
        let name = KekName {
            cluster,
            project: ring.project,
            ring: id,
            version,
            alg: ring.alg,
            origin: Origin::Generated,
            epoch: stored.master_epoch,
        };
        Self { name, id: stored.kek_id, boxed: stored.boxed.clone() }
    }

    pub(crate) fn key(&self) -> (RingId, KeyVersion) {
        (self.name.ring, self.name.version)
    }

    pub(crate) fn alg(&self) -> Algorithm {
        self.name.alg
    }
}
