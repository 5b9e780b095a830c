//! openraft's state machine on top of ours: applies one entry after the other, and keeps snapshots and checkpoints.

use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use ensign_proto::LogIndex;
use ensign_storage::{GroupLog, LogError};
use futures::{Stream, StreamExt as _};
use openraft::OptionalSend;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use tracing::warn;

use crate::codec;
use crate::machine::{CommittedEntry, StateMachine};
use crate::replica::{Replica, Response};
use crate::store;
use crate::types::{LogId, RaftPayload, Reply, Snapshot, SnapshotMeta, StoredMembership, Types, entry_id};

/// A machine without its type, so that openraft is compiled once for all of them.
pub(crate) trait AnyMachine: Send + Sync {
    fn apply(&self, entry: &CommittedEntry) -> Result<Response, Broken>;
    fn snapshot(&self) -> Result<Bytes, Broken>;
    fn restore(&self, snapshot: &Bytes) -> Result<(), String>;
    fn checkpoint(&self) -> Option<Bytes>;
    fn restore_checkpoint(&self, bytes: &Bytes) -> Result<(), String>;
}

/// The machine panicked earlier: what it holds may be half of a change.
#[derive(Debug)]
pub(crate) struct Broken;

const BROKEN: &str = "the state machine panicked";

/// The machine that handles share with the applier.
pub(crate) struct Shared<S>(pub(crate) Arc<Mutex<S>>);

impl<S: StateMachine> AnyMachine for Shared<S> {
    fn apply(&self, entry: &CommittedEntry) -> Result<Response, Broken> {
        // A panic must not take openraft's worker with it: the core would live on and apply nothing. It poisons the lock.
        let response = panic::catch_unwind(AssertUnwindSafe(|| {
            let mut machine = self.0.lock().map_err(|_| Broken)?;
            Ok::<_, Broken>(machine.apply(entry))
        }));
        Ok(Box::new(response.map_err(|_| Broken)??))
    }

    fn snapshot(&self) -> Result<Bytes, Broken> {
        Ok(self.0.lock().map_err(|_| Broken)?.snapshot())
    }

    fn restore(&self, snapshot: &Bytes) -> Result<(), String> {
        let mut machine = self.0.lock().map_err(|_| BROKEN.to_owned())?;
        machine.restore(snapshot).map_err(|error| error.to_string())
    }

    fn checkpoint(&self) -> Option<Bytes> {
        self.0.lock().ok()?.checkpoint()
    }

    fn restore_checkpoint(&self, bytes: &Bytes) -> Result<(), String> {
        let mut machine = self.0.lock().map_err(|_| BROKEN.to_owned())?;
        machine.restore_checkpoint(bytes).map_err(|error| error.to_string())
    }
}

/// How far a group's machine is. Guards the machine too: whoever changes it holds this lock.
#[derive(Default)]
pub(crate) struct Progress {
    /// Which incarnation of the core may apply; an older one that is still winding down may not.
    pub(crate) generation: u64,
    pub(crate) applied: Option<LogId>,
    pub(crate) membership: StoredMembership,
    bytes_since_checkpoint: u64,
    entries_since_checkpoint: u64,
}

impl Progress {
    fn meta(&self) -> SnapshotMeta {
        SnapshotMeta { last_log_id: self.applied, last_membership: self.membership.clone() }
    }
}

/// The state machine of one incarnation of a group's core.
pub(crate) struct Applier {
    replica: Arc<Replica>,
    generation: u64,
}

impl Applier {
    /// Takes the machine over from an earlier incarnation, if there was one.
    pub(crate) fn take_over(replica: Arc<Replica>) -> Self {
        let generation = {
            let mut progress = replica.progress();
            progress.generation += 1;
            progress.generation
        };
        Self { replica, generation }
    }

    /// Brings the machine to the newest stored state that fits the log, so that only the rest is replayed.
    pub(crate) async fn recover(&self) -> Result<(), LogError> {
        if self.replica.progress().applied.is_some() {
            return Ok(()); // An earlier incarnation left it in memory.
        }
        let checkpoint = store::blocking(&self.replica, GroupLog::checkpoint).await.unwrap_or_else(|error| {
            warn!(group = %self.replica.id, %error, "the checkpoint cannot be read; the log is replayed");
            None
        });
        let Some(bytes) = checkpoint else { return Ok(()) };
        let state = self.replica.log.state();
        let snapshot_id = match store::blocking(&self.replica, GroupLog::snapshot).await? {
            Some(bytes) => codec::decode_state(bytes).ok().and_then(|(meta, _)| codec::state_id(&meta)),
            None => None,
        };
        let usable = codec::decode_state(bytes).ok().filter(|(meta, _)| {
            let id = codec::state_id(meta);
            // Beyond the log's end the log would be wrong about itself; before its start there would be a gap.
            id <= state.last && id >= state.purged && id > snapshot_id
        });
        if let Some((meta, bytes)) = usable {
            let mut progress = self.replica.progress();
            match self.replica.machine.restore_checkpoint(&bytes) {
                Ok(()) => self.replica.moved(&mut progress, &meta),
                Err(error) => warn!(group = %self.replica.id, error, "the checkpoint is ignored; the log is replayed"),
            }
        }
        Ok(())
    }

    fn superseded() -> io::Error {
        io::Error::other("a newer incarnation of this group has taken over")
    }

    fn broken(&self) -> io::Error {
        self.replica.fence(BROKEN.into())
    }
}

impl Replica {
    /// Says that the machine stands at `meta` now.
    fn moved(&self, progress: &mut Progress, meta: &SnapshotMeta) {
        progress.applied = meta.last_log_id;
        progress.membership = meta.last_membership.clone();
        progress.bytes_since_checkpoint = 0;
        progress.entries_since_checkpoint = 0;
        self.publish_applied(progress.applied);
    }

    /// Stores a checkpoint if the machine makes them. It rides in the next commit, behind every entry that it covers.
    pub(crate) fn put_checkpoint(&self) {
        let mut progress = self.progress();
        progress.bytes_since_checkpoint = 0;
        progress.entries_since_checkpoint = 0;
        if progress.applied.is_none() {
            return;
        }
        if let Some(state) = self.machine.checkpoint() {
            self.log.put_checkpoint(codec::encode_state(&progress.meta(), &state));
        }
    }
}

impl RaftStateMachine<Types> for Applier {
    type SnapshotData = Bytes;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let progress = self.replica.progress();
        Ok((progress.applied, progress.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        let limits = self.replica.config.limits;
        let mut due = false;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let mut progress = self.replica.progress();
            if progress.generation != self.generation {
                return Err(Self::superseded());
            }
            let reply = match entry.payload {
                RaftPayload::Blank => Reply::none(),
                RaftPayload::Membership(membership) => {
                    progress.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Reply::none()
                }
                RaftPayload::Normal(stored) => {
                    let payload = stored.0.slice(..stored.0.len() - 1);
                    progress.bytes_since_checkpoint += payload.len() as u64;
                    let entry = CommittedEntry { id: entry_id(&entry.log_id), payload };
                    Reply::of(self.replica.machine.apply(&entry).map_err(|Broken| self.broken())?)
                }
            };
            progress.applied = Some(entry.log_id);
            progress.entries_since_checkpoint += 1;
            due |= progress.bytes_since_checkpoint >= limits.checkpoint.0
                || progress.entries_since_checkpoint >= limits.checkpoint_entries;
            // Watchers first: who hears the response must find the entry among the applied ones.
            self.replica.publish_applied(progress.applied);
            drop(progress);
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        if due {
            self.replica.put_checkpoint();
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<Self::SnapshotBuilder> {
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        let progress = self.replica.progress();
        let state = self.replica.machine.snapshot();
        Builder { replica: Arc::clone(&self.replica), meta: progress.meta(), state }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Bytes) -> Result<(), io::Error> {
        {
            let mut progress = self.replica.progress();
            if progress.generation != self.generation {
                return Err(Self::superseded());
            }
            if let Err(error) = self.replica.machine.restore(&snapshot) {
                return Err(self.replica.fence(error.into()));
            }
            self.replica.moved(&mut progress, meta);
        }
        let stored = codec::encode_state(meta, &snapshot);
        store::space(&self.replica).await;
        store::durable(&self.replica, move |log, done| log.put_snapshot(stored.clone(), done))
            .await
            .map_err(|error| self.replica.storage_failed(&error))?;
        // An older checkpoint would send the next restart back behind the log.
        self.replica.put_checkpoint();
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let stored = store::blocking(&self.replica, GroupLog::snapshot)
            .await
            .map_err(|error| self.replica.storage_failed(&error))?;
        let Some(stored) = stored else { return Ok(None) };
        let (meta, snapshot) =
            codec::decode_state(stored).map_err(|error| self.replica.fence(error.to_string().into()))?;
        Ok(Some(Snapshot { meta, snapshot }))
    }
}

/// A view of the machine, taken while nothing was applied, on its way to the disk.
pub(crate) struct Builder {
    replica: Arc<Replica>,
    meta: SnapshotMeta,
    state: Result<Bytes, Broken>,
}

impl RaftSnapshotBuilder<Types> for Builder {
    type SnapshotData = Bytes;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let Ok(snapshot) = self.state.as_ref().cloned() else {
            return Err(self.replica.fence(BROKEN.into()));
        };
        let stored = codec::encode_state(&self.meta, &snapshot);
        // Durable before openraft hears of it, since it purges what the snapshot covers.
        store::space(&self.replica).await;
        store::durable(&self.replica, move |log, done| log.put_snapshot(stored.clone(), done))
            .await
            .map_err(|error| self.replica.storage_failed(&error))?;
        Ok(Snapshot { meta: self.meta.clone(), snapshot })
    }
}

/// The index that stands for "nothing yet".
pub(crate) fn index_or_zero(id: Option<&LogId>) -> LogIndex {
    LogIndex(id.map_or(0, |id| id.index))
}
