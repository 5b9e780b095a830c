//! openraft's log on top of `storage`: one `GroupLog`, read through memory first.

use std::fmt::Debug;
use std::future::poll_fn;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ensign_proto::{ByteCount, LogIndex};
use ensign_storage::{Done, Entry, EntryId, GroupLog, LogError};
use futures::Stream;
use futures::stream;
use openraft::OptionalSend;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::type_config::alias::EntryOf;
use tokio::sync::oneshot;
use tracing::warn;

use crate::codec;
use crate::config::DiskReads;
use crate::replica::Replica;
use crate::types::{LogId, RaftEntry, Types, Vote, entry_id, log_id};

/// How much one step of applying reads at a time.
const APPLY_READ: ByteCount = ByteCount(4 << 20);
/// Between two tries of an append that a full disk refused.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// The log of one group, for one incarnation of its Raft core.
#[derive(Clone)]
pub(crate) struct Store {
    replica: Arc<Replica>,
}

impl Store {
    pub(crate) fn new(replica: Arc<Replica>) -> Self {
        Self { replica }
    }

    fn log(&self) -> &Arc<dyn GroupLog> {
        &self.replica.log
    }

    /// Submits an operation and waits until it is durable. A full disk is waited out: openraft would give the group up.
    async fn durable(&self, submit: impl Fn(&dyn GroupLog, Done)) -> io::Result<()> {
        durable(&self.replica, submit).await.map_err(|error| self.replica.storage_failed(&error))
    }

    /// Submits an operation whose order matters and whose completion nobody waits for: the queue is ordered, and an
    /// operation that depends on it cannot be durable before it.
    fn ordered(&self, what: &'static str, submit: impl FnOnce(&dyn GroupLog, Done)) {
        let replica = Arc::clone(&self.replica);
        submit(
            &**self.log(),
            Box::new(move |result| {
                if let Err(error) = result {
                    warn!(group = %replica.id, %error, "the log refused a {what}");
                    replica.storage_failed(&error);
                }
            }),
        );
    }
}

/// See [`Store::durable`].
pub(crate) async fn durable(replica: &Replica, submit: impl Fn(&dyn GroupLog, Done)) -> Result<(), LogError> {
    loop {
        match once(replica, &submit).await {
            Err(LogError::Full { cause }) => replica.wait_for_room(&cause, FULL_PAUSE).await?,
            result => {
                replica.has_room();
                return result;
            }
        }
    }
}

/// Submits an operation and waits until it is durable, or refused.
pub(crate) async fn once(replica: &Replica, submit: impl Fn(&dyn GroupLog, Done)) -> Result<(), LogError> {
    let (sender, receiver) = oneshot::channel();
    submit(
        &*replica.log,
        Box::new(move |result| {
            let _ = sender.send(result);
        }),
    );
    receiver.await.unwrap_or(Err(LogError::Closed))
}

/// Waits until the log has space for an append or a snapshot, or would refuse it.
pub(crate) async fn space(replica: &Replica) {
    poll_fn(|context| replica.log.poll_space(context)).await;
}

/// Reads entries of `range` up to `limit` bytes, from memory or else where blocking is allowed. Never empty unless `range` is.
pub(crate) async fn read(replica: &Replica, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<Entry>, LogError> {
    if range.start >= range.end {
        return Ok(Vec::new());
    }
    if let Some(entries) = replica.log.read_cached(range.clone(), limit) {
        return Ok(entries);
    }
    blocking(replica, move |log| log.read(range, limit)).await
}

/// Runs a call that may block on the disk.
pub(crate) async fn blocking<T: Send + 'static>(
    replica: &Replica,
    call: impl FnOnce(&dyn GroupLog) -> Result<T, LogError> + Send + 'static,
) -> Result<T, LogError> {
    match replica.config.disk_reads {
        DiskReads::Inline => call(&*replica.log),
        DiskReads::Pool => {
            let log = Arc::clone(&replica.log);
            tokio::task::spawn_blocking(move || call(&*log)).await.unwrap_or(Err(LogError::Closed))
        }
    }
}

/// What an append's callback and the append itself tell each other: a refusal for want of room comes back before the
/// append returns, and then the callback must live on for the next try.
struct Attempt {
    flushed: Option<IOFlushed<Types>>,
    full: Option<Arc<str>>,
}

impl RaftLogStorage<Types> for Store {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        let state = self.log().state();
        Ok(LogState { last_purged_log_id: state.purged.map(log_id), last_log_id: state.last.map(log_id) })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        // Durable before the answer: a restart that forgot it could elect two leaders in one term (Raft, fig. 2).
        let bytes = codec::encode_vote(vote, self.replica.floor.as_ref());
        self.durable(move |log, done| log.save_vote(bytes.clone(), done)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.log().save_committed(committed.as_ref().map(codec::encode_mark));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        self.log().state().committed.map(codec::decode_mark).transpose().map_err(io::Error::other)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = RaftEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().map(|entry| codec::to_storage(&entry)).collect();
        let attempt = Arc::new(Mutex::new(Attempt { flushed: Some(callback), full: None }));
        loop {
            // The core waits, and no thread does.
            space(&self.replica).await;
            let (shared, replica) = (Arc::clone(&attempt), Arc::clone(&self.replica));
            self.log().append(
                entries.clone(),
                Box::new(move |result| {
                    let mut attempt = shared.lock().unwrap_or_else(PoisonError::into_inner);
                    match result {
                        Err(LogError::Full { cause }) => attempt.full = Some(cause),
                        result => {
                            let flushed = attempt.flushed.take();
                            drop(attempt);
                            if let Some(flushed) = flushed {
                                flushed.io_completed(result.map_err(|error| replica.storage_failed(&error)));
                            }
                        }
                    }
                }),
            );
            let full = attempt.lock().unwrap_or_else(PoisonError::into_inner).full.take();
            let Some(cause) = full else {
                self.replica.has_room();
                return Ok(());
            };
            // The core waits here, and with it this replica: openraft would take an error for the end of the group.
            let waited = self.replica.wait_for_room(&cause, FULL_PAUSE).await;
            waited.map_err(|error| self.replica.storage_failed(&error))?;
        }
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let from = last.map_or(LogIndex(0), |last| LogIndex(last.index + 1));
        self.ordered("truncation", move |log, done| log.truncate(from, done));
        Ok(())
    }

    async fn purge(&mut self, through: LogId) -> Result<(), io::Error> {
        let through: EntryId = entry_id(&through);
        self.ordered("purge", move |log, done| log.purge(through, done));
        Ok(())
    }
}

impl Store {
    /// The part of `range` that the log holds.
    fn held(&self, range: impl RangeBounds<u64>) -> Range<LogIndex> {
        let state = self.log().state();
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => end.saturating_add(1),
            Bound::Excluded(end) => *end,
            Bound::Unbounded => u64::MAX,
        };
        let first = state.purged.map_or(0, |purged| purged.index.0 + 1);
        let past = state.last.map_or(0, |last| last.index.0 + 1);
        LogIndex(start.max(first))..LogIndex(end.min(past))
    }

    async fn first_is_missing(&self) -> bool {
        let first = read(&self.replica, LogIndex(0)..LogIndex(1), ByteCount(1)).await;
        matches!(first, Err(LogError::Refused { .. }))
    }

    async fn entries(&self, range: Range<LogIndex>, limit: ByteCount) -> Result<Vec<RaftEntry>, io::Error> {
        let entries = read(&self.replica, range, limit).await.map_err(|error| self.replica.storage_failed(&error))?;
        entries.into_iter().map(codec::from_storage).collect::<Result<_, _>>().map_err(|error| {
            let what = error.to_string().into();
            self.replica.storage_failed(&LogError::Corrupt { what })
        })
    }
}

impl RaftLogReader<Types> for Store {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<RaftEntry>, io::Error> {
        let mut held = self.held(range);
        let mut found = Vec::new();
        // Ours begin at 0; but a log that was never purged may begin at 1, as the ones of openraft's suite do.
        if held.start.0 == 0 && self.log().state().purged.is_none() && self.first_is_missing().await {
            held.start = LogIndex(1);
        }
        while held.start < held.end {
            let entries = self.entries(held.clone(), ByteCount(u64::MAX)).await?;
            let Some(last) = entries.last() else { break };
            held.start = LogIndex(last.log_id.index + 1);
            found.extend(entries);
        }
        Ok(found)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<RaftEntry>, io::Error> {
        self.entries(LogIndex(start)..LogIndex(end), self.replica.config.limits.append).await
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<EntryOf<Types>, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        // Bounded steps, so that applying a long backlog neither holds all of it in memory nor starves the other tasks.
        let held = self.held(range);
        let steps = stream::try_unfold((self.clone(), held), |(store, mut held)| async move {
            if held.start >= held.end {
                return Ok::<_, io::Error>(None);
            }
            tokio::task::consume_budget().await;
            let entries = store.entries(held.clone(), APPLY_READ).await?;
            let Some(last) = entries.last() else { return Ok(None) };
            held.start = LogIndex(last.log_id.index + 1);
            Ok(Some((stream::iter(entries.into_iter().map(Ok)), (store, held))))
        });
        Box::pin(futures::TryStreamExt::try_flatten(steps))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        let stored = self.log().state().vote.map(codec::decode_vote).transpose().map_err(io::Error::other)?;
        Ok(stored.map(|(vote, _floor)| vote))
    }
}
