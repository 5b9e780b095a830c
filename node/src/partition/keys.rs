//! The keys, as a partition uses them. The one implementation outside of tests is `keyvault`'s holder.

use std::time::Duration;

use bytes::Bytes;
use ensign_keyvault::{Holder, KeyError, PlainBatch, Use, WrappedDek};
use ensign_proto::{BatchHeader, DekId, PartitionContext, RingId, SealedBytes};
use futures::future::BoxFuture;
use thiserror::Error;
use tokio::sync::watch;

/// How long a vault call may take before what waits for it does without.
pub(super) const KEY_DEADLINE: Duration = Duration::from_secs(4);

/// Why a key could not be used; nothing was sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeysError {
    /// No lease, or no vault to get one from. Retry later.
    #[error("encryption keys are not available now: {0}")]
    Unavailable(String),
    /// The key was revoked, or was never this project's. Retrying is of no use.
    #[error("{0}")]
    Unusable(String),
    /// The key is disabled, or none is active, until an operator changes that.
    #[error("{0}")]
    Disabled(String),
    /// The process does not hold the key: [`Keys::ensure`] it, then try again.
    #[error("the data key is not held by this process")]
    NotHeld(DekId),
    /// The bytes do not open: damaged, or not from this place.
    #[error("a sealed batch fails its authentication")]
    Damaged,
    /// A limit of the construction was passed: our bug.
    #[error("sealing failed: {0}")]
    Failed(String),
}

/// A data key as it was created: for [`super::machine::PartitionMachine`] to remember.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDek {
    /// Its id.
    pub dek: DekId,
    /// The wrapped key, encoded.
    pub wrapped: Bytes,
}

/// A use of a key in progress: a surrender of the key waits until it is dropped.
pub trait InUse: Send + Sync {
    /// Whether what the key opened may be handed on at this very moment, and why not.
    fn check(&self) -> Result<(), KeysError>;

    /// Resolves once a surrender has waited long enough: let go of what the key opened or sealed, and of this.
    fn severed(&self) -> BoxFuture<'static, ()>;
}

/// A use of a key in progress, as the keys hand it out.
pub type KeyUse = Box<dyn InUse>;

/// Creates, fetches and uses data keys under the process's lease.
pub trait Keys: Send + Sync + 'static {
    /// Creates a key under the ring's active version and holds it.
    fn create_dek(&self, context: PartitionContext, ring: RingId) -> BoxFuture<'static, Result<NewDek, KeysError>>;

    /// The ring that a key of the partition's log is wrapped under; none of what is no wrapped key.
    fn ring_of(&self, wrapped: &Bytes) -> Option<RingId>;

    /// Holds a key that the partition's log introduced.
    fn ensure(&self, context: PartitionContext, wrapped: Bytes) -> BoxFuture<'static, Result<(), KeysError>>;

    /// Seals a batch with this header. CPU only; checks the lease.
    fn seal(
        &self,
        context: &PartitionContext,
        dek: DekId,
        header: BatchHeader,
        payload: PlainBatch,
    ) -> Result<SealedBytes, KeysError>;

    /// Opens a batch that is expected at this partition. CPU only; checks the lease.
    fn open(&self, context: &PartitionContext, sealed: &Bytes) -> Result<PlainBatch, KeysError>;

    /// Seals a type's name.
    fn seal_type(&self, context: &PartitionContext, dek: DekId, handle: u32, name: &[u8]) -> Result<Bytes, KeysError>;

    /// Opens a type's name.
    fn open_type(
        &self,
        context: &PartitionContext,
        dek: DekId,
        handle: u32,
        sealed: &Bytes,
    ) -> Result<Bytes, KeysError>;

    /// Whether a new key should take over for sealing.
    fn should_roll_over(&self, dek: DekId) -> bool;

    /// Begins a use of the key.
    fn begin_use(&self, dek: DekId) -> Result<KeyUse, KeysError>;

    /// Refuses a ring that is known to be revoked or disabled as a whole: nothing is sealed or opened under it, for ever or for now.
    fn refuse_ring(&self, ring: RingId) -> Result<(), KeysError>;

    /// Changes whenever keys die, are disabled or enabled, so that whoever waits can look again.
    fn deaths(&self) -> watch::Receiver<u64>;
}

impl From<KeyError> for KeysError {
    fn from(error: KeyError) -> Self {
        let message = error.to_string();
        match error {
            KeyError::Revoked { .. } | KeyError::NotGranted { .. } => Self::Unusable(message),
            KeyError::Disabled { .. } | KeyError::NoActiveVersion { .. } => Self::Disabled(message),
            KeyError::Unknown { dek } => Self::NotHeld(dek),
            KeyError::NoLease | KeyError::Busy { .. } | KeyError::Vault(_) => Self::Unavailable(message),
            KeyError::Damaged | KeyError::Newer(_) => Self::Damaged,
            KeyError::Unsealable { .. } => Self::Failed(message),
        }
    }
}

impl Keys for Holder {
    fn create_dek(&self, context: PartitionContext, ring: RingId) -> BoxFuture<'static, Result<NewDek, KeysError>> {
        let holder = self.clone();
        Box::pin(async move {
            let wrapped = holder.create_dek(&context, ring).await?;
            Ok(NewDek { dek: wrapped.dek, wrapped: wrapped.encode() })
        })
    }

    fn ring_of(&self, wrapped: &Bytes) -> Option<RingId> {
        WrappedDek::decode(wrapped).ok().map(|wrapped| wrapped.ring)
    }

    fn ensure(&self, context: PartitionContext, wrapped: Bytes) -> BoxFuture<'static, Result<(), KeysError>> {
        let holder = self.clone();
        Box::pin(async move {
            let wrapped = WrappedDek::decode(&wrapped).map_err(|_| KeysError::Damaged)?;
            Ok(holder.ensure(&context, &wrapped).await?)
        })
    }

    fn seal(
        &self,
        context: &PartitionContext,
        dek: DekId,
        header: BatchHeader,
        payload: PlainBatch,
    ) -> Result<SealedBytes, KeysError> {
        Ok(Holder::seal(self, context, dek, header, payload)?.parts().clone())
    }

    fn open(&self, context: &PartitionContext, sealed: &Bytes) -> Result<PlainBatch, KeysError> {
        Ok(Holder::open(self, context, sealed)?)
    }

    fn seal_type(&self, context: &PartitionContext, dek: DekId, handle: u32, name: &[u8]) -> Result<Bytes, KeysError> {
        Ok(self.seal_name(context, dek, handle, name)?.into())
    }

    fn open_type(
        &self,
        context: &PartitionContext,
        dek: DekId,
        handle: u32,
        sealed: &Bytes,
    ) -> Result<Bytes, KeysError> {
        Ok(Bytes::copy_from_slice(&self.open_name(context, dek, handle, sealed)?))
    }

    fn should_roll_over(&self, dek: DekId) -> bool {
        Holder::should_roll_over(self, dek)
    }

    fn begin_use(&self, dek: DekId) -> Result<KeyUse, KeysError> {
        Ok(Box::new(Holder::begin_use(self, dek)?))
    }

    fn refuse_ring(&self, ring: RingId) -> Result<(), KeysError> {
        Ok(Holder::refuse_ring(self, ring)?)
    }

    fn deaths(&self) -> watch::Receiver<u64> {
        Holder::deaths(self)
    }
}

impl InUse for Use {
    fn check(&self) -> Result<(), KeysError> {
        Ok(Use::check(self)?)
    }

    fn severed(&self) -> BoxFuture<'static, ()> {
        Box::pin(Use::severed(self).clone().cancelled_owned())
    }
}
