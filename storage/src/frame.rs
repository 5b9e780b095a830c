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
//! * **During a start:** nothing is written but what redb repairs, and that only once the whole log is known to be sound. So
//!   a start may crash and be tried again, and a log that is refused stays as it was found.
//! * **Votes, truncations, purges, removals, snapshots** are records of the same frame or rows of the same transaction, so
//!   they become durable with what was submitted before them, and never before it.
//! * **Committed marks and checkpoints** ride along with a later commit, after everything that was submitted before them;
//!   a crash may bring back older ones.
//! * **A frame is removed** only when no entry in it is needed and the stored index covers it, both durable one commit
//!   earlier. Entries that were moved forward keep their old copy until the new one is durable.
//! * **While the file is written anew:** the new one is whole and on the disk before it takes the old one's place, by two renames
//!   that the next start completes; then the old one is overwritten and removed, by the next start if need be.
//! * **The disk is full:** room for everything that may be queued is written out ahead. Proposals are turned away first
//!   ([`crate::GroupLog::has_room`]), then appends and snapshots are refused, before anything fails, while votes,
//!   truncations and purges go on. If redb is refused growth all the same, it had not begun to publish the transaction: the
//!   database is opened again, and the batch waits.
//! * **A sync or write fails:** the kernel may have thrown the pages away, so asking again would lie. Fenced.
//! * **Bits rot in the newest commit of a log that was not closed:** nothing tells it from a commit that was never finished, and
//!   redb falls back to the one before. The other replicas hold what this one forgets.
//! * **Bits rot, or a write lands elsewhere:** every head, record, entry and blob has a checksum that covers its place,
//!   and sequences have no gaps. The read, or the start, fails and names the file; nothing is skipped.
//!
//! Not here: what to append (`raft`), finding an event by offset (`node`), history. Format: docs/format.md.

mod codec;
mod config;
mod group;
mod index;
mod plan;
mod queue;
mod recover;
mod rewrite;
mod room;
mod state;
mod store;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId};
use thiserror::Error;
use tracing::{error, info};

use crate::backend::{Space, is_fresh};
use crate::disk::Disk;
use crate::frame::group::{Group, Handle};
use crate::frame::queue::{Queue, Work, full};
use crate::frame::store::{ReadFailure, Store};
use crate::log::{Done, GroupLog, LogError, NodeLog};
use crate::metrics;

#[cfg(feature = "planted-bugs")]
pub use config::Plant;
pub use config::{LogConfig, LogStats};
pub use writer::{Committed, Writer};

use config::{Counters, RESERVE};

/// The database's file in its folder.
pub const LOG_FILE: &str = "log.redb";

/// Why a log cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// What is stored is not what was written.
    #[error("{what}")]
    Corrupt {
        /// Which file, which check, and what to do.
        what: String,
    },
    /// The log that must be there is not, or is empty.
    #[error(
        "{} is missing or empty, and this node has made promises on it: put the file back as it was when the node last stopped; \
         without it the node would forget what it has acknowledged and how it has voted",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
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
    format!("{}; it was left as it is", damage_text(path, what))
}

fn damage_text(path: &Path, what: &str) -> String {
    format!(
        "{} is damaged ({what}): set the folder aside and let the node be rebuilt from its peers, or restore a backup",
        path.display()
    )
}

/// What the writer and all handles share.
pub(crate) struct Shared {
    queue: Queue,
    store: Store,
    groups: RwLock<BTreeMap<GroupId, Arc<Group>>>,
    tail_bytes: AtomicU64,
    /// Of the last rewrite, once what it replaced is gone.
    mark: AtomicU64,
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

    /// Forgets the groups that hold nothing and that nobody has a handle to: removed ones, and those only asked about.
    fn forget_unused(&self) {
        let mut groups = self.groups.write().unwrap_or_else(PoisonError::into_inner);
        // A handle is made, and an operation queued, with a clone; and no clone is made while the map is locked.
        groups.retain(|_, group| Arc::strong_count(group) > 1 || group.is_used());
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
                let what = damage_text(&self.store.path, &what);
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
    /// Opens the log that `dir` must hold, since this node has had one there before: as [`Self::open`], but never a fresh one.
    ///
    /// # Errors
    /// [`OpenError::Missing`]: nothing was created.
    pub fn reopen(disk: Arc<dyn Disk>, dir: &Path, config: LogConfig) -> Result<(Arc<Self>, Writer), OpenError> {
        let path = dir.join(LOG_FILE);
        let failed = |error: io::Error| OpenError::Failed { path: path.clone(), cause: error.to_string() };
        rewrite::complete(&*disk, dir).map_err(failed)?;
        let there =
            disk.exists(&path).map_err(failed)? && !is_fresh(&*disk.open(&path).map_err(failed)?).map_err(failed)?;
        if there { Self::open(disk, dir, config) } else { Err(OpenError::Missing { path }) }
    }

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
        if !rewrite::complete(&*disk, dir).map_err(failed)? {
            return Err(OpenError::Missing { path });
        }
        let space = Space::open(Arc::clone(&disk), &path, config.prefill.0).map_err(failed)?;
        let store = Store::open(space, &path, config.cache.0 as usize).map_err(|failure| open_error(&path, failure))?;
        let mut recovered = recover::recover(&store)?;
        let mark = store.mark().map_err(|failure| open_error(&path, failure))?;
        store.space().accept().map_err(failed)?;
        // Only now, when what took its place is known to be sound.
        rewrite::clean(&*disk, dir).map_err(failed)?;
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
            mark: AtomicU64::new(mark),
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
        let (shared, space) = (&self.shared, self.shared.store.space());
        let traffic = space.traffic();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        LogStats {
            commits: read(&shared.counters.commits),
            syncs: read(&traffic.syncs),
            sync_nanos: read(&traffic.sync_nanos),
            records: read(&shared.counters.records),
            bytes: read(&shared.counters.bytes),
            written: read(&traffic.written),
            room: read(&traffic.room),
            queued: shared.queue.bytes(),
            tail: read(&shared.tail_bytes),
            kept: read(&shared.counters.kept),
            file: space.physical(),
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
        self.handle(id).submit(Work::Remove(None), done);
    }

    fn forget(&self, id: GroupId, vote: Bytes, done: Done) {
        self.handle(id).submit(Work::Remove(Some(vote)), done);
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

#[cfg(test)]
mod tests;
