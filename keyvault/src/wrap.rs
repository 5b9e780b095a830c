//! Wrapped keys: a DEK under a KEK, a KEK under the vault master key, and what their boxes are bound to.

use std::fmt;

use bytes::Bytes;
use ensign_proto::{Algorithm, ClusterId, DekId, KeyVersion, PartitionContext, ProjectId, RingId};
use thiserror::Error;

use crate::entropy::Entropy;
use crate::seal::{self, OVERHEAD, OpenError, Purpose};

/// Bytes of the box of a 32-byte key.
pub(crate) const KEY_BOX_LEN: usize = 32 + OVERHEAD;

/// What a data key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DekUse {
    /// Seals batches.
    #[default]
    Batches = 1,
    /// Keys content fingerprints of a whole topic.
    Fingerprints = 2,
}

impl DekUse {
    pub(crate) fn from_byte(byte: u32) -> Option<Self> {
        match byte {
            1 => Some(Self::Batches),
            2 => Some(Self::Fingerprints),
            _ => None,
        }
    }
}

/// A data key as its partition stores it: a box that only the vault opens, and only for this partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedDek {
    /// The key's name; batches carry it.
    pub dek: DekId,
    /// The ring whose version wraps it.
    pub ring: RingId,
    /// That version: revoking it destroys this key.
    pub version: KeyVersion,
    /// How batches are sealed under it.
    pub alg: Algorithm,
    /// What it is for.
    pub usage: DekUse,
    /// The box: 112 bytes.
    pub boxed: Bytes,
}

/// Bytes that are not a wrapped data key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not a wrapped data key: {what}")]
pub struct InvalidWrap {
    what: &'static str,
}

impl WrappedDek {
    const FORMAT: u8 = 1;
    /// The length of [`WrappedDek::encode`].
    pub const BYTES: usize = 4 + 16 + 16 + 4 + KEY_BOX_LEN;

    /// `format u8=1 ‖ alg u8 ‖ use u8 ‖ 0 ‖ dek ‖ ring ‖ version u32 ‖ box[112]`.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(Self::BYTES);
        out.extend_from_slice(&[Self::FORMAT, self.alg as u8, self.usage as u8, 0]);
        out.extend_from_slice(self.dek.as_bytes());
        out.extend_from_slice(self.ring.as_bytes());
        out.extend_from_slice(&self.version.0.to_be_bytes());
        out.extend_from_slice(&self.boxed);
        out.into()
    }

    /// Reads what [`WrappedDek::encode`] wrote.
    ///
    /// # Errors
    /// [`InvalidWrap`]: damaged, or of a newer build. The box itself is judged by the vault alone.
    pub fn decode(bytes: &Bytes) -> Result<Self, InvalidWrap> {
        let invalid = |what| InvalidWrap { what };
        if bytes.len() != Self::BYTES {
            return Err(invalid("its length is wrong"));
        }
        let [format, alg, usage, zero] = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if format != Self::FORMAT || zero != 0 {
            return Err(invalid("its format is unknown"));
        }
        let id = |at: usize| -> [u8; 16] { bytes[at..at + 16].try_into().expect("the length was checked") };
        Ok(Self {
            alg: Algorithm::try_from(alg).map_err(|_| invalid("its algorithm is unknown"))?,
            usage: DekUse::from_byte(u32::from(usage)).ok_or_else(|| invalid("its use is unknown"))?,
            dek: DekId::from_bytes(id(4)),
            ring: RingId::from_bytes(id(20)),
            version: KeyVersion(u32::from_be_bytes([bytes[36], bytes[37], bytes[38], bytes[39]])),
            boxed: bytes.slice(40..),
        })
    }

    /// Wraps `dek` under the KEK of `version`.
    pub(crate) fn wrap(
        kek: &[u8; 32],
        ctx: &PartitionContext,
        name: DekName,
        dek: &[u8; 32],
        entropy: &Entropy,
    ) -> Self {
        let boxed = seal::seal_box(kek, Purpose::DekWrap, name.alg, &name.aad(ctx), dek, entropy);
        Self {
            dek: name.dek,
            ring: name.ring,
            version: name.version,
            alg: name.alg,
            usage: name.usage,
            boxed: boxed.into(),
        }
    }

    /// Unwraps it into `out`: proves that it belongs to `ctx`, to its ring, and to this version.
    pub(crate) fn unwrap(&self, kek: &[u8; 32], ctx: &PartitionContext, out: &mut [u8; 32]) -> Result<(), OpenError> {
        let name = DekName { dek: self.dek, ring: self.ring, version: self.version, alg: self.alg, usage: self.usage };
        seal::open_key(kek, Purpose::DekWrap, self.alg, &name.aad(ctx), &self.boxed, out)
    }
}

/// What a data key is called, before it has a box.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DekName {
    pub(crate) dek: DekId,
    pub(crate) ring: RingId,
    pub(crate) version: KeyVersion,
    pub(crate) alg: Algorithm,
    pub(crate) usage: DekUse,
}

impl DekName {
    /// `cluster ‖ project ‖ ring ‖ version u32 ‖ topic ‖ partition u32 ‖ dek_id ‖ use u8 ‖ alg`.
    fn aad(&self, ctx: &PartitionContext) -> Vec<u8> {
        [
            &ctx.cluster.as_bytes()[..],
            ctx.project.as_bytes(),
            self.ring.as_bytes(),
            &self.version.0.to_be_bytes(),
            ctx.topic.as_bytes(),
            &ctx.partition.0.to_be_bytes(),
            self.dek.as_bytes(),
            &[self.usage as u8, self.alg as u8],
        ]
        .concat()
    }
}

/// Where a KEK came from; later issues import keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    Generated = 1,
}

/// The public fingerprint of a KEK: names it, binds it, and is useless once it is gone.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KekId(pub [u8; 32]);

impl fmt::Display for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KekId({self})")
    }
}

/// What a KEK is called.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KekName {
    pub(crate) cluster: ClusterId,
    pub(crate) project: ProjectId,
    pub(crate) ring: RingId,
    pub(crate) version: KeyVersion,
    pub(crate) alg: Algorithm,
    pub(crate) origin: Origin,
    /// The epoch of the vault master key that wraps it.
    pub(crate) epoch: u64,
}

impl KekName {
    pub(crate) fn id(&self, kek: &[u8; 32]) -> KekId {
        let version = self.version.0.to_be_bytes();
        KekId(seal::fingerprint(kek, &[b"ensign/kek-id/v1", self.cluster.as_bytes(), self.ring.as_bytes(), &version]))
    }

    /// `cluster ‖ project ‖ ring ‖ version u32 ‖ alg ‖ origin u8 ‖ kek_id[32] ‖ epoch u64`.
    fn aad(&self, id: &KekId) -> Vec<u8> {
        [
            &self.cluster.as_bytes()[..],
            self.project.as_bytes(),
            self.ring.as_bytes(),
            &self.version.0.to_be_bytes(),
            &[self.alg as u8, self.origin as u8],
            &id.0,
            &self.epoch.to_be_bytes(),
        ]
        .concat()
    }

    /// Wraps `kek`. What the vault master key wraps is sealed with AES-256-GCM, whatever the ring's batches use.
    pub(crate) fn wrap(&self, vmk: &[u8; 32], kek: &[u8; 32], entropy: &Entropy) -> (KekId, Vec<u8>) {
        let id = self.id(kek);
        (id, seal::seal_box(vmk, Purpose::KekWrap, Algorithm::Aes256Gcm, &self.aad(&id), kek, entropy))
    }

    pub(crate) fn unwrap(&self, vmk: &[u8; 32], id: &KekId, boxed: &[u8], out: &mut [u8; 32]) -> Result<(), OpenError> {
        seal::open_key(vmk, Purpose::KekWrap, Algorithm::Aes256Gcm, &self.aad(id), boxed, out)
    }
}

/// What a secret's box is bound to: `cluster ‖ kind u8 ‖ object id ‖ revision u64 ‖ epoch u64`.
pub(crate) fn secret_aad(cluster: ClusterId, kind: u8, id: &[u8; 16], revision: u64, epoch: u64) -> Vec<u8> {
    [&cluster.as_bytes()[..], &[kind], id, &revision.to_be_bytes(), &epoch.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use ensign_proto::{Partition, TopicId};
    use proptest::prelude::*;

    use super::*;

    fn ctx() -> PartitionContext {
        PartitionContext {
            cluster: ClusterId::from_bytes([1; 16]),
            project: ProjectId::from_bytes([2; 16]),
            topic: TopicId::from_bytes([3; 16]),
            partition: Partition(4),
        }
    }

    fn name() -> DekName {
        DekName {
            dek: DekId::from_bytes([5; 16]),
            ring: RingId::from_bytes([6; 16]),
            version: KeyVersion(7),
            alg: Algorithm::Aes256Gcm,
            usage: DekUse::Batches,
        }
    }

    #[test]
    fn a_data_key_opens_in_its_place_only() {
        let kek = [9; 32];
        let wrapped = WrappedDek::wrap(&kek, &ctx(), name(), &[8; 32], &Entropy::kernel());
        assert_eq!(wrapped.boxed.len(), KEY_BOX_LEN);
        let mut out = [0; 32];
        wrapped.unwrap(&kek, &ctx(), &mut out).unwrap();
        assert_eq!(out, [8; 32]);

        let places = [
            PartitionContext { cluster: ClusterId::from_bytes([0; 16]), ..ctx() },
            PartitionContext { project: ProjectId::from_bytes([0; 16]), ..ctx() },
            PartitionContext { topic: TopicId::from_bytes([0; 16]), ..ctx() },
            PartitionContext { partition: Partition(0), ..ctx() },
        ];
        for place in places {
            assert_eq!(wrapped.unwrap(&kek, &place, &mut out), Err(OpenError), "{place:?}");
            assert_eq!(out, [0; 32]);
        }
        let forged = [
            WrappedDek { dek: DekId::from_bytes([0; 16]), ..wrapped.clone() },
            WrappedDek { ring: RingId::from_bytes([0; 16]), ..wrapped.clone() },
            WrappedDek { version: KeyVersion(8), ..wrapped.clone() },
            WrappedDek { alg: Algorithm::Aes128Gcm, ..wrapped.clone() },
            WrappedDek { usage: DekUse::Fingerprints, ..wrapped.clone() },
        ];
        for wrapped in forged {
            assert_eq!(wrapped.unwrap(&kek, &ctx(), &mut out), Err(OpenError), "{wrapped:?}");
        }
        assert_eq!(wrapped.unwrap(&[0; 32], &ctx(), &mut out), Err(OpenError));
    }

    #[test]
    fn a_ring_key_opens_under_its_name_only() {
        let name = KekName {
            cluster: ClusterId::from_bytes([1; 16]),
            project: ProjectId::from_bytes([2; 16]),
            ring: RingId::from_bytes([3; 16]),
            version: KeyVersion(1),
            alg: Algorithm::Aes256Gcm,
            origin: Origin::Generated,
            epoch: 1,
        };
        let (id, boxed) = name.wrap(&[9; 32], &[8; 32], &Entropy::kernel());
        let mut out = [0; 32];
        name.unwrap(&[9; 32], &id, &boxed, &mut out).unwrap();
        assert_eq!(out, [8; 32]);
        assert_eq!(id, name.id(&[8; 32]));
        assert_ne!(id, KekName { version: KeyVersion(2), ..name }.id(&[8; 32]));
        let forged = [
            KekName { cluster: ClusterId::from_bytes([0; 16]), ..name },
            KekName { project: ProjectId::from_bytes([0; 16]), ..name },
            KekName { ring: RingId::from_bytes([0; 16]), ..name },
            KekName { version: KeyVersion(2), ..name },
            KekName { alg: Algorithm::Aes192Gcm, ..name },
            KekName { epoch: 2, ..name },
        ];
        for name in forged {
            assert_eq!(name.unwrap(&[9; 32], &id, &boxed, &mut out), Err(OpenError), "{name:?}");
        }
        assert_eq!(name.unwrap(&[9; 32], &KekId([0; 32]), &boxed, &mut out), Err(OpenError));
    }

    #[test]
    fn a_secret_is_bound_to_its_name_revision_and_epoch() {
        let aad = secret_aad(ClusterId::from_bytes([1; 16]), 2, &[3; 16], 4, 5);
        assert_eq!(aad.len(), 16 + 1 + 16 + 8 + 8);
        assert_eq!((aad[16], aad[32], aad[40], aad[48]), (2, 3, 4, 5));
    }

    proptest! {
        #[test]
        fn a_wrapped_key_survives_its_bytes(dek: [u8; 16], ring: [u8; 16], version: u32, boxed in prop::collection::vec(any::<u8>(), KEY_BOX_LEN), at: prop::sample::Index) {
            let wrapped = WrappedDek {
                dek: DekId::from_bytes(dek),
                ring: RingId::from_bytes(ring),
                version: KeyVersion(version),
                boxed: boxed.into(),
                alg: Algorithm::Aes192Gcm,
                usage: DekUse::Fingerprints,
            };
            let bytes = wrapped.encode();
            prop_assert_eq!(WrappedDek::decode(&bytes), Ok(wrapped));
            prop_assert!(WrappedDek::decode(&bytes.slice(..at.index(bytes.len()))).is_err());
        }
    }
}
