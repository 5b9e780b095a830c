//! Bytes on disk: the frame log that all groups of a node share, its recovery, and the disk seam.
//!
//! Everything here is ciphertext or opaque to it; this crate cannot name a key, a peer or a clock.

pub mod log;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use log::{Done, Entry, EntryId, GroupLog, GroupState, LogError, NodeLog};
#[cfg(any(test, feature = "testing"))]
pub use memory::MemoryLog;
