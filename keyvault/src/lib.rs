//! The key vault: who may open what, and until when.
//!
//! ```text
//! root key ── wraps ─> vault master key ── wraps ─> KEK of a ring version ── wraps ─> DEK ── derives ─> one key per batch
//!  a file, outside      in the vault's state        in the vault's state      in the partition            never stored
//!
//! node:  Holder ── lease, HPKE-sealed DEKs ──> Vault (a Raft group of its own)         seal and open only while the lease runs
//!           ^────────── surrender ────────────────┘                                    a revoke waits until nobody can
//! ```
//!
//! What is promised: a node without a lease neither seals nor opens ([`Holder`]); once a revoke is answered, no node can open
//! what was sealed under that key ([`Vault`]). Left of this crate event data is ciphertext, since nothing there can name a key.
//! Not here: who may read (the node decides), sockets (the node implements [`VaultPeer`] and [`HolderLink`]).

mod arena;
mod batch;
mod client;
mod entropy;
mod error;
mod grant;
mod holder;
mod lease;
mod link;
mod machine;
pub mod metrics;
mod receipt;
mod root;
mod seal;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vault;
mod wire;
mod wrap;

pub use batch::{BatchFull, PlainBatch, RAW_BYTES_MAX, SealedBatch};
pub use client::{
    CUSTODY_BATCH_MAX, Held, Receipt, ReceiptKeyInfo, ReceiptKind, RingInfo, RingReceipts, RingState, ScheduledInfo,
    Secret, SecretInfo, SecretKind, SignedReceipt, VaultClient, VersionInfo, VersionState,
};
pub use entropy::Entropy;
pub use error::{CallError, KeyError};
#[cfg(feature = "planted-bugs")]
pub use holder::Plant;
pub use holder::{EpochFloor, Holder, HolderConfig, MemoryFloor, RefreshError, SurrenderError, Use};
pub use lease::{InvalidLease, LeaseConfig};
pub use link::{HolderLink, LinkError, Reason, Refusal, RoutedLink, VaultLink, VaultPeer};
pub use receipt::receipt_fingerprint;
#[cfg(any(test, feature = "testing"))]
pub use root::TestRoot;
pub use root::{
    BLOB_MAX, Cost, FileRoot, MasterName, PASSPHRASE_BYTES, Passphrase, PassphraseRoot, REFERENCE_MAX, RootError,
    RootId, RootKey, RootKeyError, RootKind, RootProvider, Unwrapped, WrappedMaster, check_kind, master_id,
};
pub use vault::{
    Caller, InitializeError, RootName, SealStatus, UnsealError, Unsealed, Vault, VaultConfig, VaultLinks,
    VaultStartError,
};
pub use wrap::{DekUse, InvalidWrap, KekId, WrappedDek};
