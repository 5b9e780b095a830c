//! Why a key cannot be used.

use ensign_proto::{BatchError, DekId, KeyVersion, RingId};
use thiserror::Error;

use crate::link::{LinkError, Reason, Refusal};

/// Why nothing was sealed or opened, or no key obtained.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum KeyError {
    /// The vault did not renew this node's lease in time. Nothing can be sealed or opened here until it does: UNAVAILABLE.
    #[error("this node has no lease on its keys: the vault cannot be reached")]
    NoLease,
    /// The key was destroyed, or is being destroyed. For ever.
    #[error("{}", revoked(*ring, *version))]
    Revoked {
        /// Which ring.
        ring: RingId,
        /// Which version; zero where all of them are.
        version: KeyVersion,
    },
    /// The key is disabled: nobody seals or opens with it until it is enabled.
    #[error("{}", disabled(*ring, *version))]
    Disabled {
        /// Which ring.
        ring: RingId,
        /// Which version; zero where the whole ring is.
        version: KeyVersion,
    },
    /// The ring has no version to seal with, until somebody enables one or makes one.
    #[error("{cause}")]
    NoActiveVersion {
        /// What the vault said: it names the commands that change it.
        cause: String,
    },
    /// The vault did not grant the key to this node.
    #[error("the key was not granted: {cause}")]
    NotGranted {
        /// What the vault said.
        cause: String,
    },
    /// This node does not hold the key (any more): call `ensure` with its wrapped form, then try again.
    #[error("data key {dek} is not held by this node")]
    Unknown {
        /// Which one.
        dek: DekId,
    },
    /// The batch, or the wrapped key, is not what belongs in this place.
    #[error("the sealed data does not open: it is damaged or out of its place")]
    Damaged,
    /// A newer build wrote the batch.
    #[error("the batch is of a newer format")]
    Newer(#[source] BatchError),
    /// The header does not fit the batch or its key: our own mistake.
    #[error("the batch cannot be sealed: {cause}")]
    Unsealable {
        /// What does not fit.
        cause: String,
    },
    /// Too many keys are held, or wanted, at once. Retry later.
    #[error("too many keys: {cause}")]
    Busy {
        /// Which bound.
        cause: &'static str,
    },
    /// The vault did not answer, or refused for another reason.
    #[error("the vault did not do it")]
    Vault(#[source] CallError),
}

fn revoked(ring: RingId, version: KeyVersion) -> String {
    if version == KeyVersion(0) {
        return format!("key ring {ring} was revoked");
    }
    format!("version {version} of key ring {ring} was revoked")
}

fn disabled(ring: RingId, version: KeyVersion) -> String {
    let enable = crate::machine::enable_with(ring, version);
    if version == KeyVersion(0) {
        return format!("key ring {ring} is disabled until {enable}");
    }
    format!("version {version} of key ring {ring} is disabled until {enable}")
}

/// Why a call to the vault brought nothing.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CallError {
    /// It may or may not have arrived.
    #[error(transparent)]
    Unreachable(#[from] LinkError),
    /// The vault refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The vault answered something else.
    #[error("the vault's answer makes no sense: {what}")]
    Malformed {
        /// What was wrong with it.
        what: &'static str,
    },
}

impl CallError {
    /// Why the vault refused, if that is what it did.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused(refusal) => Some(refusal.reason),
            Self::Unreachable(_) | Self::Malformed { .. } => None,
        }
    }
}

impl From<CallError> for KeyError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Refused(refusal) => refusal.into(),
            other => Self::Vault(other),
        }
    }
}

impl From<Refusal> for KeyError {
    fn from(refusal: Refusal) -> Self {
        match refusal.reason {
            Reason::Revoked => Self::Revoked { ring: refusal.ring, version: refusal.version },
            Reason::Disabled => Self::Disabled { ring: refusal.ring, version: refusal.version },
            Reason::NoActiveVersion => Self::NoActiveVersion { cause: refusal.message },
            Reason::NotGranted | Reason::NotFound => Self::NotGranted { cause: refusal.message },
            Reason::Damaged => Self::Damaged,
            Reason::NotLeader
            | Reason::Unavailable
            | Reason::Sealed
            | Reason::AlreadyExists
            | Reason::Conflict
            | Reason::Invalid
            | Reason::Exhausted
            | Reason::OutcomeUnknown
            | Reason::Pending => Self::Vault(CallError::Refused(refusal)),
        }
    }
}
