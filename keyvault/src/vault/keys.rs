//! The vault master key, unwrapped, and what it wraps.

use std::fmt;

use bytes::Bytes;
use ensign_proto::{Algorithm, ClusterId, KeyVersion, ProjectId, RingId};
use zeroize::Zeroizing;

use crate::arena::KeySlot;
use crate::entropy::Entropy;
use crate::lease::{LeaseConfig, LeaseTerms};
use crate::link::{Reason, Refusal};
use crate::machine::{Change, Initialize, Kek, PutSecret, Version};
use crate::root::{BLOB_MAX, MasterName, Passphrase, REFERENCE_MAX, RootError, RootProvider, Unwrapped};
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

/// Makes the first vault master key and has it wrapped: what bootstrap proposes.
pub(crate) async fn first_master(
    cluster: ClusterId,
    root: &dyn RootProvider,
    phrase: Option<&Passphrase>,
    lease: &LeaseConfig,
    entropy: &Entropy,
) -> Result<Change, RootError> {
    let master = seal::fresh_key(entropy);
    let wrapped = root.wrap(MasterName { cluster, epoch: 1 }, &master, phrase).await?;
    if wrapped.blob.len() > BLOB_MAX || wrapped.reference.len() > REFERENCE_MAX {
        return Err(RootError::provider(format!(
            "what keeps the root key made {} bytes of a master key, under a name of {} bytes: {BLOB_MAX} and {REFERENCE_MAX} are taken",
            wrapped.blob.len(),
            wrapped.reference.len()
        )));
    }
    Ok(Change::Initialize(Initialize {
        cluster: wire::bytes(cluster.as_bytes()),
        master_box: wrapped.blob,
        root_id: wire::bytes(&wrapped.id.0),
        root_version: wrapped.version,
        lease: Some(LeaseTerms::of(lease)),
        kind: wrapped.kind as u32,
        reference: wrapped.reference,
    }))
}

impl MasterKey {
    /// The master key of this name.
    pub(crate) fn new(name: MasterName, unwrapped: Unwrapped) -> Self {
        Self { slot: unwrapped.into_slot(), cluster: name.cluster, epoch: name.epoch }
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Overwrites it, now, whoever still has it.
    pub(crate) fn wipe(&self) {
        self.slot.wipe();
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
            alg: stored.alg,
            origin: Origin::Generated,
            epoch: stored.master_epoch,
        };
        Self { name, id: stored.kek_id, boxed: stored.boxed.clone() }
    }

    pub(crate) fn key(&self) -> (RingId, KeyVersion) {
        (self.name.ring, self.name.version)
    }
}
