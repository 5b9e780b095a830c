//! Agreement: many Raft groups behind one small face. No openraft type leaves this crate.
//!
//! ```text
//! submit ──> openraft ──> log store ──> storage::GroupLog        one fsync for all groups of the node
//!               │  ▲          │
//!               ▼  │          └──> entries are read back to replicate and to apply
//!            network ──> Transport pipes                          one bulk and one control pipe per peer, all groups
//!               ▲
//! Runtime::accept ── pipes that peers opened
//! ```
//!
//! What is promised: a [`Committed`] exists only once a majority of the voters holds the entry on disk and this node has
//! applied it. [`ProposeError::NotLeader`] proves that nothing was appended; [`ProposeError::OutcomeUnknown`] promises nothing.
//! Entries are opaque bytes here: left of `keyvault` event data is ciphertext.

pub mod env;

mod apply;
mod codec;
mod config;
mod errors;
mod group;
mod liveness;
mod machine;
mod membership;
mod metrics;
mod nap;
mod net;
mod parting;
mod propose;
mod read;
mod replica;
mod runtime;
mod store;
mod supervise;
mod sweep;
#[cfg(feature = "testing")]
pub mod testing;
mod throttle;
mod ticks;
mod types;

#[cfg(test)]
mod suite;

pub use config::{DiskReads, GroupSpec, Limits, Mode, RuntimeConfig, Timing};
pub use errors::{CompactError, MembershipError, ProposeError, ReadError, RestoreError, StartError, TransferError};
pub use group::{Committed, Group, GroupStatus, Health, Leadership, Pending};
pub use liveness::{Liveness, PeerLiveness, PeerState};
pub use machine::{CommittedEntry, PROPOSAL_ROOM, StateMachine};
pub use membership::{GroupMembers, Members};
pub use parting::{PartingError, parting};
pub use runtime::Runtime;
