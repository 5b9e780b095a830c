//! Bytes on disk: the frame log that all groups of a node share, its recovery, and the disk seam.
//!
//! Everything here is ciphertext or opaque to it; this crate cannot name a key, a peer or a clock.

mod backend;
pub mod datadir;
pub mod disk;
#[cfg(any(test, feature = "testing"))]
pub mod fault;
pub mod frame;
pub mod log;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
pub mod metrics;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use datadir::{DataDir, DataDirError};
pub use disk::{Disk, DiskFile, FileDisk};
#[cfg(any(test, feature = "testing"))]
pub use fault::FaultDisk;
pub use frame::{Committed, FrameLog, LogConfig, LogStats, OpenError, Writer};
pub use log::{Done, Door, Entry, EntryId, GroupLog, GroupState, LogError, NodeLog};
#[cfg(any(test, feature = "testing"))]
pub use memory::MemoryLog;
