//! The frame log: the last word on what this node's replicas have promised.
//!
//! ```text
//! | frame | frame | frame being filled |      frame = one commit: the records of every group in it, each with its CRC-32C
//! ^ log_start     ^ durable            ^ queued
//! ```
//!
//! Invariants: `log_start <= durable <= queued`. Only a commit moves `durable`, and only forward. Nothing past `durable` is
//! acknowledged to anyone. After a failed write or sync the log is fenced: never retried, only opened again.
//!
//! # What happens in a crash
//!
//! One commit is one redb transaction and one sync ([`redb::Durability::Immediate`]); callbacks run after it. So:
//!
//! * **The process dies, or the power fails, before the sync returned:** redb keeps the transaction whole or drops it
//!   whole. Its callers were never called back, so either is right; an entry that survives unacknowledged is for Raft to
//!   judge. Torn and reordered sectors fail redb's page checksums, and it falls back to the commit before.
//! * **After the sync:** everything is there. A disk that lies about syncs breaks this promise, and only a power cut shows it.
//! * **During a start:** nothing is written but what redb repairs, so a start may crash and be tried again.
//! * **Votes, truncations, purges, removals, snapshots** are records of the same frame or rows of the same transaction, so
//!   they become durable with what was submitted before them, and never before it.
//! * **Committed marks and checkpoints** ride along with a later commit, after everything that was submitted before them;
//!   a crash may bring back older ones.
//! * **A frame is removed** only when no entry in it is needed and the stored index covers it, both durable one commit
//!   earlier. Entries that were moved forward keep their old copy until the new one is durable.
//! * **The disk is full:** room for everything that may be queued is written out ahead, so appends and snapshots are
//!   refused before anything fails, while votes, truncations and purges go on. If redb is refused growth all the same,
//!   it had not begun to publish the transaction: the database is opened again, and the batch waits.
//! * **A sync or write fails:** the kernel may have thrown the pages away, so asking again would lie. Fenced.
//! * **Bits rot, or a write lands elsewhere:** every head, record, entry and blob has a checksum that covers its place,
//!   and sequences have no gaps. The read, or the start, fails and names the file; nothing is skipped.
//!
//! Not here: what to append (`raft`), finding an event by offset (`node`), history. Format: docs/format.md.

mod codec;
mod group;
mod index;
mod queue;
mod recover;
mod state;
mod store;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use ensign_proto::{ByteCount, GroupId};
use thiserror::Error;
use tracing::{error, info};

use crate::backend::Space;
use crate::disk::Disk;
use crate::frame::group::{Group, Handle};
use crate::frame::queue::{Queue, Work, full};
use crate::frame::store::{ReadFailure, Store};
use crate::log::{Done, GroupLog, LogError, NodeLog};
use crate::metrics;

pub use writer::{Committed, Writer};

/// The database's file in its folder.
pub const LOG_FILE: &str = "log.redb";

/// Settings of a frame log. Sizes are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    /// Written out with zeros when the file is created: pages that exist need no journal at a sync.
    pub prefill: ByteCount,
    /// redb's page cache. Small is fast: a log is written once and seldom read.
    pub cache: ByteCount,
    /// Recent entries kept in memory, over all groups. Entries that are not durable are kept in any case.
    pub tail: ByteCount,
    /// What may wait for the writer before submitters do.
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
    /// For a throw-away or development node.
    pub fn dev() -> Self {
        Self {
            prefill: ByteCount(64 << 20),
            tail: ByteCount(64 << 20),
            queue: ByteCount(8 << 20),
            pinned_max: ByteCount(256 << 20),
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
    fn headroom(&self) -> u64 {
        2 * self.queue.0 + 2 * self.commit.0 + RESERVE
    }
}

/// Kept for votes, truncations and purges when the disk is full.
const RESERVE: u64 = 1 << 20;

/// Why a log cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// What is stored is not what was written.
    #[error("{what}")]
    Corrupt {
        /// Which file, which check, and what to do.
        what: String,
    },
    /// The file system or redb said no.
    #[error("{} cannot be opened: {cause}", path.display())]
    Failed {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        cause: String,
    },
    /// There is no room for the file.
    #[error("{} needs {} bytes on its disk, and there is no room: free some space, or lower the log's prefill", path.display(), prefill.0)]
    Full {
        /// The file.
        path: PathBuf,
        /// What it is written out to when created.
        prefill: ByteCount,
    },
}

fn open_error(path: &Path, failure: ReadFailure) -> OpenError {
    let failed = |cause: String| OpenError::Failed { path: path.to_owned(), cause };
    match failure {
        ReadFailure::Damaged(what) => OpenError::Corrupt { what: corrupt_text(path, &what) },
        ReadFailure::Failed(cause) => failed(cause),
        ReadFailure::Closed => failed("it was closed".to_owned()),
    }
}

fn corrupt_text(path: &Path, what: &str) -> String {
    format!(
        "{} is damaged ({what}): nothing was changed; set the folder aside and let the node be rebuilt from its peers, or restore a backup",
        path.display()
    )
}

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
    /// Bytes written to the file, redb's own pages included.
    pub written: u64,
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
struct Counters {
    commits: AtomicU64,
    records: AtomicU64,
    bytes: AtomicU64,
    kept: AtomicU64,
    purged_frames: AtomicU64,
    moved: AtomicU64,
    indexes: AtomicU64,
    reopened: AtomicU64,
}

/// What the writer and all handles share.
pub(crate) struct Shared {
    queue: Queue,
    store: Store,
    groups: RwLock<BTreeMap<GroupId, Arc<Group>>>,
    tail_bytes: AtomicU64,
    ended: OnceLock<LogError>,
    counters: Counters,
}

impl Shared {
    fn group(&self, id: GroupId) -> Arc<Group> {
        let known = self.groups.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        known.unwrap_or_else(|| {
            let mut groups = self.groups.write().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(groups.entry(id).or_insert_with(|| Arc::new(Group::new(id, state::Durable::default()))))
        })
    }

    fn all_groups(&self) -> Vec<Arc<Group>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Ends the log: the first cause stays. Every waiting callback gets it.
    fn end(&self, error: LogError) {
        if let LogError::Fenced { cause } = &error {
            error!(%cause, path = %self.store.path.display(), "the log is fenced");
            metrics::set_fenced();
        }
        let error = self.ended.get_or_init(|| error).clone();
        for op in self.queue.end(error.clone()) {
            (op.done)(Err(error.clone()));
        }
    }

    fn read_failed(&self, failure: ReadFailure) -> LogError {
        match failure {
            ReadFailure::Damaged(what) => {
                let what = corrupt_text(&self.store.path, &what);
                error!(%what, "a read met damage");
                LogError::Corrupt { what: what.into() }
            }
            // redb refuses every call after a failed one, so nothing can be written any more either.
            ReadFailure::Failed(cause) => {
                let error = LogError::Fenced { cause: format!("a read failed: {cause}").into() };
                self.end(error.clone());
                error
            }
            ReadFailure::Closed => self.ended.get().cloned().unwrap_or(LogError::Closed),
        }
    }
}

/// Lives as long as anybody may submit.
pub(crate) struct Alive(Arc<Shared>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.queue.close();
    }
}

/// The log of a node: all groups, one file, one writer.
pub struct FrameLog {
    shared: Arc<Shared>,
    alive: Arc<Alive>,
}

impl fmt::Debug for FrameLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameLog").field("path", &self.shared.store.path).finish_non_exhaustive()
    }
}

impl FrameLog {
    /// Opens the log in `dir`, creating it if need be. Blocks: after a crash redb first repairs its file (1.4–2 s per GB).
    ///
    /// Nothing becomes durable before the [`Writer`] runs. The caller holds the folder's lock ([`crate::DataDir`]).
    ///
    /// # Errors
    /// [`OpenError::Corrupt`] names the damage; nothing was changed that was readable.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, config: LogConfig) -> Result<(Arc<Self>, Writer), OpenError> {
        let path = dir.join(LOG_FILE);
        let failed = |error: io::Error| {
            if crate::backend::is_full(&error) {
                OpenError::Full { path: path.clone(), prefill: config.prefill }
            } else {
                OpenError::Failed { path: path.clone(), cause: error.to_string() }
            }
        };
        disk.create_dir(dir).map_err(failed)?;
        let space = Space::open(disk, &path, config.prefill.0).map_err(failed)?;
        let store = Store::open(space, &path, config.cache.0 as usize).map_err(|failure| open_error(&path, failure))?;
        let mut recovered = recover::recover(&store)?;
        info!(
            path = %path.display(),
            groups = recovered.groups.len(),
            frames = recovered.census.frames.len(),
            bytes = recovered.census.total,
            scanned = recovered.scanned,
            "opened the log"
        );
        let groups = std::mem::take(&mut recovered.groups);
        let groups = groups.into_iter().map(|(id, disk)| (id, Arc::new(Group::new(id, disk)))).collect();
        let shared = Arc::new(Shared {
            queue: Queue::new(config.queue.0),
            store,
            groups: RwLock::new(groups),
            tail_bytes: AtomicU64::new(0),
            ended: OnceLock::new(),
            counters: Counters::default(),
        });
        let writer = Writer::new(Arc::clone(&shared), config, recovered);
        let alive = Arc::new(Alive(Arc::clone(&shared)));
        Ok((Arc::new(Self { shared, alive }), writer))
    }

    /// Takes no more, lets the writer finish what is queued, and closes the file. The writer's thread then ends; join it.
    pub fn close(&self) {
        self.shared.queue.close();
    }

    /// What the log has done so far.
    pub fn stats(&self) -> LogStats {
        let (shared, traffic) = (&self.shared, self.shared.store.space.traffic());
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LogStats {
            commits: read(&shared.counters.commits),
            syncs: read(&traffic.syncs),
            sync_nanos: read(&traffic.sync_nanos),
            records: read(&shared.counters.records),
            bytes: read(&shared.counters.bytes),
            written: read(&traffic.written),
            queued: shared.queue.bytes(),
            tail: read(&shared.tail_bytes),
            kept: read(&shared.counters.kept),
            file: shared.store.space.physical(),
            purged_frames: read(&shared.counters.purged_frames),
            moved: read(&shared.counters.moved),
            indexes: read(&shared.counters.indexes),
            reopened: read(&shared.counters.reopened),
        }
    }

    fn handle(&self, id: GroupId) -> Handle {
        Handle { group: self.shared.group(id), shared: Arc::clone(&self.shared), _alive: Arc::clone(&self.alive) }
    }
}

impl NodeLog for FrameLog {
    fn group(&self, id: GroupId) -> Arc<dyn GroupLog> {
        Arc::new(self.handle(id))
    }

    fn groups(&self) -> Vec<GroupId> {
        self.shared.all_groups().iter().filter(|group| group.exists()).map(|group| group.id).collect()
    }

    fn remove(&self, id: GroupId, done: Done) {
        self.handle(id).submit(Work::Remove, done);
    }

    fn writable(&self) -> Result<(), LogError> {
        if let Some(error) = self.shared.ended.get() {
            return Err(error.clone());
        }
        let waiting = self.shared.queue.lock();
        match waiting.room {
            _ if waiting.closing => Err(LogError::Closed),
            Some(room) if room < RESERVE => Err(full()),
            _ => Ok(()),
        }
    }
}
