//! What `raft` may ask of a log: one per group, all groups of a node sharing one writer and one fsync.
//!
//! Contract, checked by `testing::suite` (feature `testing`) against every implementation:
//! entries are readable as soon as `append` returns; `done` is called once, after the bytes are on disk, in the order in
//! which a group's operations were submitted; after a failed write or sync every later call fails with [`LogError::Fenced`].

use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use thiserror::Error;

/// Called once when an operation is durable, or has failed for good. Must not block.
pub type Done = Box<dyn FnOnce(Result<(), LogError>) + Send>;

/// Where an entry stands in its group's log: Raft's log id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId {
    /// The term of the leader that wrote it.
    pub term: Term,
    /// Its place, from 1 (openraft's first entry may be 0).
    pub index: LogIndex,
}

/// One Raft entry. The log does not look into `payload`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place.
    pub id: EntryId,
    /// What `raft` encoded.
    pub payload: Bytes,
}

/// What a group's log holds, as of everything submitted so far (durable or not).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupState {
    /// The vote, as `raft` encoded it.
    pub vote: Option<Bytes>,
    /// The committed mark, as `raft` encoded it; may lag.
    pub committed: Option<Bytes>,
    /// The last purged entry.
    pub purged: Option<EntryId>,
    /// The last entry, or the last purged one when nothing is left.
    pub last: Option<EntryId>,
}

/// Why the log refused. Cheap to clone, since one failure answers every waiting caller.
#[derive(Debug, Clone, Error)]
pub enum LogError {
    /// A write or a sync failed earlier, or now. Final: the node must stop and be restarted; nothing unacked may be assumed.
    #[error("the log is fenced after a failed write: {cause}")]
    Fenced {
        /// The first failure.
        cause: Arc<str>,
    },
    /// The disk is full. Nothing of this operation was kept; the same call may succeed once there is room.
    #[error("the disk is full: {cause}")]
    Full {
        /// What the disk said.
        cause: Arc<str>,
    },
    /// Stored bytes do not match their checksum, or a sequence is missing. This replica must not serve or lead.
    #[error("corrupt log: {what}")]
    Corrupt {
        /// Which file, which frame, which check.
        what: Arc<str>,
    },
    /// An append that would leave a hole, or a read below the purge mark: a bug in the caller.
    #[error("refused by the log: {what}")]
    Refused {
        /// What was asked and why it cannot be.
        what: Arc<str>,
    },
    /// The log was closed.
    #[error("the log is closed")]
    Closed,
}

/// All groups of one log database.
pub trait NodeLog: Send + Sync + 'static {
    /// The group's log; created empty when the database does not know it.
    fn group(&self, id: GroupId) -> Arc<dyn GroupLog>;

    /// Every group that the database holds, in ascending order.
    fn groups(&self) -> Vec<GroupId>;

    /// Removes a group and all that it held; a crash before `done` may leave it whole. Handles to it start an empty log.
    fn remove(&self, id: GroupId, done: Done);

    /// Removes all that a group held but for a vote, which becomes `vote`: in one commit, so that a crash leaves the group whole
    /// or as `done` promises it.
    fn forget(&self, id: GroupId, vote: Bytes, done: Done);

    /// Whether appends are taken now. Ask before proposing, and before accepting entries from a leader: a log that is
    /// full refuses appends and snapshots, while votes, truncations, purges and reads go on.
    ///
    /// # Errors
    /// [`LogError::Full`]: refuse the write and ask again later. [`LogError::Fenced`], [`LogError::Closed`]: final.
    fn writable(&self) -> Result<(), LogError>;
}

/// Where entries come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// A client: nothing was promised yet.
    Proposal,
    /// The leader of the group: it has them in its own log.
    Replication,
}

/// One group's log.
pub trait GroupLog: Send + Sync + 'static {
    /// What the log holds now.
    fn state(&self) -> GroupState;

    /// Ready when there is space for an append or a snapshot: back-pressure for callers that must not block. Ready as well
    /// when neither would be taken, which the call itself then says. Otherwise the task is woken when it is worth asking again.
    fn poll_space(&self, context: &mut Context<'_>) -> Poll<()>;

    /// Appends `entries`, which follow the last one without a hole (an empty log that was never purged takes any first
    /// index). Readable on return, durable at `done`. A refusal calls `done` before this returns, and keeps nothing.
    ///
    /// Never blocks, whatever is queued: wait for [`Self::poll_space`] first.
    fn append(&self, entries: Vec<Entry>, done: Done);

    /// Whether entries of `size` bytes should be let in, to be appended soon.
    ///
    /// A log that is full refuses appends, and a replica that waits for room can neither lead nor answer. So new entries are
    /// turned away at the door, proposals first: what they leave is for entries that are on their way already.
    fn has_room(&self, size: ByteCount, door: Door) -> bool {
        let (_, _) = (size, door);
        true
    }

    /// Replaces the vote. Durable at `done`.
    fn save_vote(&self, vote: Bytes, done: Done);

    /// Notes the committed mark; it rides in the next commit and never causes one.
    fn save_committed(&self, committed: Option<Bytes>);

    /// Removes every entry from `from` on; past the end it does nothing, below the purge mark it is refused. Durable at `done`.
    fn truncate(&self, from: LogIndex, done: Done);

    /// Removes every entry through `through`, which becomes the purge mark (also when it lies past the last entry).
    ///
    /// A mark never moves back: an older one is taken, and changes nothing.
    fn purge(&self, through: EntryId, done: Done);

    /// The entries of `range` that memory holds, or `None` when the disk must be read. Never blocks.
    ///
    /// Stops before an entry that would pass `limit`, yet returns one if the range is not empty.
    fn read_cached(&self, range: Range<LogIndex>, limit: ByteCount) -> Option<Vec<Entry>>;

    /// The entries of `range`, from memory or disk. Blocks on the disk; call it where that is allowed. Limit as above.
    ///
    /// # Errors
    /// [`LogError::Corrupt`]: a stored entry fails its checksum. [`LogError::Refused`]: the range is purged or past the end.
    fn read(&self, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<Entry>, LogError>;

    /// Replaces the group's snapshot, atomically. Readable on return, durable at `done`. As with an append, ask for space first.
    fn put_snapshot(&self, snapshot: Bytes, done: Done);

    /// The group's snapshot, checked against its checksum. Blocks on the disk.
    fn snapshot(&self) -> Result<Option<Bytes>, LogError>;

    /// Notes the local applied state, replacing the one before; like the committed mark it rides in the next commit, after
    /// everything submitted earlier, and never causes one. After a crash an older one, or none, may come back. One of more
    /// than 256 MiB is not kept, and the log says so: the one before it stays.
    fn put_checkpoint(&self, checkpoint: Bytes);

    /// The newest checkpoint, checked against its checksum. Blocks on the disk.
    ///
    /// # Errors
    /// [`LogError::Corrupt`]: replay from the snapshot instead.
    fn checkpoint(&self) -> Result<Option<Bytes>, LogError>;

    /// Writes the file that this log is in anew, with what all groups in it hold now and nothing else, puts it in the place of the old
    /// one, and overwrites and removes that. At `done` no byte of what was purged, truncated or replaced before this call is in any
    /// file; and [`Self::mark`] answers `mark`, also after a restart. What is queued later waits for it.
    ///
    /// A refusal, also [`LogError::Full`], leaves everything as it was: call again later.
    fn rewrite(&self, mark: u64, done: Done) {
        let _ = mark;
        done(Err(LogError::Refused { what: "this log has no file to write anew".into() }));
    }

    /// The mark of the last rewrite of the file; 0 when there was none.
    fn mark(&self) -> u64 {
        0
    }
}

/// Refuses an append that would leave a hole or write over an entry.
pub(crate) fn check_append(last: Option<EntryId>, entries: &[Entry]) -> Result<(), LogError> {
    let mut last = last;
    for entry in entries {
        if last.is_some_and(|last| last.index.next() != entry.id.index) {
            return Err(LogError::Refused {
                what: format!("an append of index {} after {}", entry.id.index, last.map_or(0, |id| id.index.0)).into(),
            });
        }
        last = Some(entry.id);
    }
    Ok(())
}

/// Refuses a truncation of what was purged.
pub(crate) fn check_truncate(purged: Option<EntryId>, from: LogIndex) -> Result<(), LogError> {
    match purged {
        Some(purged) if from <= purged.index => Err(LogError::Refused {
            what: format!("a truncation from {from}, below the purge mark {}", purged.index).into(),
        }),
        _ => Ok(()),
    }
}

/// The refusal of a range outside what the log holds.
pub(crate) fn refuse_read(asked: &Range<LogIndex>, held: Option<Range<LogIndex>>) -> LogError {
    let held = held.map_or_else(|| "nothing".to_owned(), |held| format!("{}..{}", held.start, held.end));
    LogError::Refused { what: format!("a read of {}..{} while the log holds {held}", asked.start, asked.end).into() }
}
