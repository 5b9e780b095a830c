//! A frame log's settings, and what it counts.

use std::sync::atomic::AtomicU64;

use ensign_proto::ByteCount;

/// Settings of a frame log. Sizes are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    /// Written out with zeros when the file is created: pages that exist need no journal at a sync.
    pub prefill: ByteCount,
    /// redb's page cache. Small is fast: a log is written once and seldom read.
    pub cache: ByteCount,
    /// Recent entries kept in memory, over all groups. Entries that are not durable are kept in any case.
    pub tail: ByteCount,
    /// What may wait for the writer before there is no space for more.
    pub queue: ByteCount,
    /// What one commit takes at most, unless a single operation is larger.
    pub commit: ByteCount,
    /// Entries and other records that one commit takes at most.
    pub commit_records: usize,
    /// Frames after which the index is stored again, which bounds what a start must read.
    pub index_every: ByteCount,
    /// When this much, and half of the log, is dead but held up by older live entries, those are moved forward.
    pub pinned_max: ByteCount,
    /// A bug to find.
    #[cfg(feature = "planted-bugs")]
    pub plant: Option<Plant>,
}

/// A bug that the crash tests must find.
#[cfg(feature = "planted-bugs")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// Commits are not synced.
    DurabilityNone,
    /// Callbacks run before the commit.
    AckEarly,
}

impl Default for LogConfig {
    /// For production: a gigabyte, written out ahead.
    fn default() -> Self {
        Self {
            prefill: ByteCount(1 << 30),
            cache: ByteCount(16 << 20),
            tail: ByteCount(128 << 20),
            queue: ByteCount(16 << 20),
            commit: ByteCount(1 << 20),
            commit_records: 4096,
            index_every: ByteCount(64 << 20),
            pinned_max: ByteCount(1 << 30),
            #[cfg(feature = "planted-bugs")]
            plant: None,
        }
    }
}

impl LogConfig {
    /// For a log that holds little, such as the vault's.
    pub fn small() -> Self {
        Self {
            prefill: ByteCount(8 << 20),
            tail: ByteCount(4 << 20),
            queue: ByteCount(1 << 20),
            commit: ByteCount(256 << 10),
            pinned_max: ByteCount(16 << 20),
            index_every: ByteCount(8 << 20),
            ..Self::default()
        }
    }

    /// For tests with many logs: everything happens at small sizes.
    #[cfg(any(test, feature = "testing"))]
    pub fn tiny() -> Self {
        Self {
            prefill: ByteCount(0),
            cache: ByteCount(1 << 20),
            tail: ByteCount(64 << 10),
            queue: ByteCount(256 << 10),
            commit: ByteCount(64 << 10),
            commit_records: 64,
            index_every: ByteCount(64 << 10),
            pinned_max: ByteCount(128 << 10),
            #[cfg(feature = "planted-bugs")]
            plant: None,
        }
    }

    /// Room that must be there beyond what is used: what may be queued twice over, and the pages that redb copies.
    pub(crate) fn headroom(&self) -> u64 {
        2 * self.queue.0 + 2 * self.commit.0 + RESERVE
    }
}

/// Kept for votes, truncations and purges when the disk is full.
pub(crate) const RESERVE: u64 = 1 << 20;

/// What a log has done since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Group commits.
    pub commits: u64,
    /// Syncs, of which a commit needs one.
    pub syncs: u64,
    /// Nanoseconds spent in syncs.
    pub sync_nanos: u64,
    /// Entries and other records committed.
    pub records: u64,
    /// Bytes of frames committed.
    pub bytes: u64,
    /// Bytes of pages written to the file, redb's own included.
    pub written: u64,
    /// Bytes of zeros written to the file ahead of need, since it was opened.
    pub room: u64,
    /// Bytes waiting for the writer.
    pub queued: u64,
    /// Bytes of entries held in memory.
    pub tail: u64,
    /// Bytes of frames that are kept.
    pub kept: u64,
    /// Bytes of the file.
    pub file: u64,
    /// Frames that were removed.
    pub purged_frames: u64,
    /// Bytes of entries that were moved forward.
    pub moved: u64,
    /// Times that the stored index was replaced.
    pub indexes: u64,
    /// Times that the database was opened again after its growth was refused.
    pub reopened: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) commits: AtomicU64,
    pub(crate) records: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) kept: AtomicU64,
    pub(crate) purged_frames: AtomicU64,
    pub(crate) moved: AtomicU64,
    pub(crate) indexes: AtomicU64,
    pub(crate) reopened: AtomicU64,
}
