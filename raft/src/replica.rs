//! One group on this node, without its state machine's type. What handles ask for ends up here.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ensign_proto::{ByteCount, GroupId, LogIndex, NodeId};
use ensign_storage::{Door, GroupLog, LogError};
use futures::future::BoxFuture;
use openraft::async_runtime::watch::WatchReceiver as _;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::apply::{AnyMachine, Progress, index_or_zero};
use crate::codec;
use crate::config::RuntimeConfig;
use crate::errors::{CompactError, ProposeError, TransferError};
use crate::group::{Committed, GroupStatus, Health, Leadership};
use crate::membership::Members;
use crate::metrics;
use crate::nap::{Nap, NapState};
use crate::types::{LogId, Raft, StoredMembership};

/// What a machine answered, with its type erased.
pub(crate) type Response = Box<dyn Any + Send>;
pub(crate) type Outcome = BoxFuture<'static, Result<Committed<Response>, ProposeError>>;

/// Proposals are admitted in units of this many bytes, and each costs at least one.
pub(crate) const ADMISSION_UNIT: u64 = 1024;

pub(crate) struct Replica {
    pub(crate) id: GroupId,
    pub(crate) config: RuntimeConfig,
    pub(crate) voters: BTreeSet<NodeId>,
    pub(crate) log: Arc<dyn GroupLog>,
    /// Where the log ended that this replica gave up before it was asked back; see `parting`.
    pub(crate) floor: Option<LogId>,
    pub(crate) machine: Box<dyn AnyMachine>,
    /// Cancelled to stop the replica.
    pub(crate) stop: CancellationToken,
    /// Cancelled once its supervisor has ended.
    pub(crate) ended: CancellationToken,
    /// Cancelled when it is fenced.
    pub(crate) fence: CancellationToken,
    pub(crate) restarts: AtomicU64,
    /// Held by a change of the members: one at a time.
    pub(crate) changing: tokio::sync::Mutex<()>,
    members: Mutex<Members>,
    progress: Mutex<Progress>,
    raft: Mutex<Option<Raft>>,
    leadership: watch::Sender<Leadership>,
    applied: watch::Sender<LogIndex>,
    fenced: OnceLock<Arc<str>>,
    full: AtomicBool,
    pub(crate) admission: Arc<Semaphore>,
    pub(crate) nap: Nap,
}

/// Why there is no core to talk to.
pub(crate) enum Absent {
    Fenced(Arc<str>),
    Stopped,
    Recovering,
}

impl Replica {
    pub(crate) fn new(
        id: GroupId,
        voters: BTreeSet<NodeId>,
        config: RuntimeConfig,
        log: Arc<dyn GroupLog>,
        machine: Box<dyn AnyMachine>,
        stop: CancellationToken,
    ) -> Self {
        // Who cannot read it does not get as far as a core.
        let stored = log.state().vote.and_then(|vote| codec::decode_vote(vote).ok());
        let floor = stored.and_then(|(_vote, floor)| floor);
        let units = (config.limits.pending.0 / ADMISSION_UNIT).clamp(1, Semaphore::MAX_PERMITS as u64 / 2);
        Self {
            id,
            config,
            voters,
            log,
            floor,
            machine,
            stop,
            ended: CancellationToken::new(),
            fence: CancellationToken::new(),
            restarts: AtomicU64::new(0),
            changing: tokio::sync::Mutex::default(),
            members: Mutex::default(),
            progress: Mutex::default(),
            raft: Mutex::default(),
            leadership: watch::Sender::default(),
            applied: watch::Sender::new(LogIndex(0)),
            fenced: OnceLock::new(),
            full: AtomicBool::new(false),
            admission: Arc::new(Semaphore::new(units as usize)),
            nap: Nap::new(),
        }
    }

    pub(crate) fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    pub(crate) fn leadership_now(&self) -> Leadership {
        *self.leadership.borrow()
    }

    pub(crate) fn applied(&self) -> watch::Receiver<LogIndex> {
        self.applied.subscribe()
    }

    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn publish_applied(&self, applied: Option<LogId>) {
        self.applied.send_replace(index_or_zero(applied.as_ref()));
    }

    pub(crate) fn publish_leadership(&self, next: Leadership) {
        self.leadership.send_if_modified(|current| {
            let changed = *current != next;
            if changed {
                metrics::leadership_changed(current.leads(self.config.node), next.leads(self.config.node));
                *current = next;
            }
            changed
        });
    }

    /// Keeps the members at hand for those who must not wait for the core.
    pub(crate) fn note_members(&self, stored: &StoredMembership) {
        let now = Members::of(stored);
        let mut members = self.members.lock().unwrap_or_else(PoisonError::into_inner);
        if *members == now {
            return;
        }
        let me = self.config.node;
        if members.contains(me) && !now.contains(me) {
            warn!(group = %self.id, "this node was removed from the group; its replica takes no further part");
        } else if *members == Members::default() && !now.contains(me) {
            info!(group = %self.id, "the stored membership does not name this node: it was removed, or is being added; it does not vote");
        }
        *members = now;
    }

    /// The newest membership that this replica's core has told of.
    pub(crate) fn membership(&self) -> Members {
        self.members.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether `node` gets the log without having a vote, so that nothing that was acknowledged waits for it.
    pub(crate) fn is_learner(&self, node: NodeId) -> bool {
        self.members.lock().unwrap_or_else(PoisonError::into_inner).learners.contains(&node)
    }

    pub(crate) fn set_raft(&self, raft: Option<Raft>) {
        *self.raft.lock().unwrap_or_else(PoisonError::into_inner) = raft;
    }

    pub(crate) fn raft(&self) -> Option<Raft> {
        self.raft.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes the first failure that this replica cannot come back from, and gives it the shape openraft wants.
    pub(crate) fn fence(&self, cause: Arc<str>) -> io::Error {
        if self.fenced.set(Arc::clone(&cause)).is_ok() {
            error!(group = %self.id, %cause, "this replica is fenced; ask another node, and rebuild it from its peers");
            metrics::fenced();
            self.fence.cancel();
        }
        io::Error::other(cause.to_string())
    }

    pub(crate) fn fenced(&self) -> Option<Arc<str>> {
        self.fenced.get().cloned()
    }

    /// The same for a failure of the log; a full disk alone does not fence, nor does a log that was removed or closed after
    /// this replica was told to stop.
    pub(crate) fn storage_failed(&self, error: &LogError) -> io::Error {
        match error {
            LogError::Refused { .. } | LogError::Closed if self.stop.is_cancelled() => {
                io::Error::other(error.to_string())
            }
            LogError::Full { .. } => io::Error::other(error.to_string()),
            LogError::Fenced { .. } | LogError::Corrupt { .. } | LogError::Refused { .. } | LogError::Closed => {
                self.fence(error.to_string().into())
            }
        }
    }

    /// Pauses before a full disk is asked again.
    ///
    /// # Errors
    /// The replica is to stop: it must not hang in a core that waits for room.
    pub(crate) async fn wait_for_room(&self, cause: &str, pause: Duration) -> Result<(), LogError> {
        if !self.full.swap(true, Ordering::Relaxed) {
            warn!(group = %self.id, cause, "the disk is full; this replica waits for room and refuses proposals");
        }
        let wait = async {
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = self.fence.cancelled() => {}
                () = sleep(pause) => return true,
            }
            false
        };
        if wait.await { Ok(()) } else { Err(LogError::Full { cause: cause.into() }) }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    pub(crate) fn has_room(&self) {
        // A plain load first: this is on the path of every append.
        if self.full.load(Ordering::Relaxed) {
            self.full.store(false, Ordering::Relaxed);
        }
    }

    /// Everyone who holds a replica, as far as this one knows.
    pub(crate) fn members(&self) -> BTreeSet<NodeId> {
        let Some(raft) = self.raft() else { return self.voters.clone() };
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let stored = metrics.membership_config.nodes().map(|(node, ())| NodeId(*node));
        let members: BTreeSet<_> = stored.collect();
        // A group that nobody has created yet has none.
        if members.is_empty() { self.voters.clone() } else { members }
    }

    /// Its voters as the core knows them; none while the group was not created, or the core is gone.
    pub(crate) fn voters_now(&self) -> BTreeSet<NodeId> {
        let raft = self.raft();
        raft.map(|raft| raft.voter_ids().map(NodeId).collect()).unwrap_or_default()
    }

    /// On the leader: the last entry that `node` is known to hold.
    pub(crate) fn matched(&self, node: NodeId) -> Option<LogIndex> {
        let metrics = self.raft()?.metrics();
        let metrics = metrics.borrow_watched();
        metrics.replication.as_ref()?.get(&node.0).map(|matched| index_or_zero(matched.as_ref()))
    }

    pub(crate) fn core(&self) -> Result<Raft, Absent> {
        if let Some(cause) = self.fenced() {
            return Err(Absent::Fenced(cause));
        }
        if self.stop.is_cancelled() {
            return Err(Absent::Stopped);
        }
        self.raft().ok_or(Absent::Recovering)
    }

    pub(crate) fn leads(&self) -> bool {
        self.leadership.borrow().leads(self.config.node)
    }

    pub(crate) fn leader(&self) -> Option<NodeId> {
        self.leadership.borrow().leader
    }

    pub(crate) async fn transfer_leader(&self, to: NodeId) -> Result<(), TransferError> {
        let Ok(raft) = self.core() else { return Err(TransferError::Stopped) };
        if !self.leads() {
            return Err(TransferError::NotLeader { leader: self.leader() });
        }
        if to == self.config.node || !raft.voter_ids().any(|voter| voter == to.0) {
            return Err(TransferError::NotAVoter { to });
        }
        self.rouse().await;
        let mut leadership = self.leadership();
        raft.trigger().transfer_leader(to.0).await.map_err(|_fatal| TransferError::Stopped)?;
        let moved = leadership.wait_for(|now| now.leader == Some(to));
        match timeout(self.config.timing.election_max * 2, moved).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_closed)) => Err(TransferError::Stopped),
            Err(_elapsed) => Err(TransferError::TimedOut { to }),
        }
    }

    /// Where leadership should go when this node leaves: to the voter that misses least, of those that `may` take it.
    pub(crate) fn successor(&self, may: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        let raft = self.raft().filter(|_| self.leads())?;
        let matched = matched(&raft);
        let others = raft.voter_ids().map(NodeId).filter(|voter| *voter != self.config.node && may(*voter));
        others.max_by_key(|voter| matched.get(voter).copied())
    }

    pub(crate) async fn compact(&self, keep_entries: u64) -> Result<LogIndex, CompactError> {
        const PATIENCE: Duration = Duration::from_mins(1);
        let raft = match self.core() {
            Ok(raft) => raft,
            Err(Absent::Fenced(cause)) => return Err(CompactError::Fenced { cause }),
            Err(Absent::Stopped | Absent::Recovering) => return Err(CompactError::Stopped),
        };
        let Some(applied) = self.progress().applied else { return Ok(LogIndex(0)) };
        let gone = || match self.fenced() {
            Some(cause) => CompactError::Fenced { cause },
            None => CompactError::Stopped,
        };
        let mut metrics = raft.metrics();
        let covers = |snapshot: &Option<LogId>| snapshot.is_some_and(|id| id.index >= applied.index);
        let covered = covers(&metrics.borrow_watched().snapshot);
        if !covered {
            raft.trigger().snapshot().await.map_err(|_fatal| gone())?;
            let deadline = Instant::now() + PATIENCE;
            while !covers(&metrics.borrow_and_update().snapshot) {
                match timeout_at(deadline, metrics.changed()).await {
                    Err(_elapsed) => return Err(CompactError::TimedOut),
                    Ok(Err(_closed)) => return Err(gone()),
                    Ok(Ok(())) => {}
                }
            }
        }
        let snapshot = index_or_zero(metrics.borrow_watched().snapshot.as_ref());
        if let Some(upto) = snapshot.0.checked_sub(keep_entries) {
            raft.trigger().purge_log(upto).await.map_err(|_fatal| gone())?;
        }
        Ok(snapshot)
    }

    pub(crate) fn health(&self) -> Health {
        match self.core() {
            Err(Absent::Fenced(cause)) => Health::Fenced { cause },
            Err(Absent::Stopped) => Health::Stopped,
            Err(Absent::Recovering) => Health::Recovering,
            Ok(_) if self.is_full() || !self.log.has_room(ByteCount(0), Door::Proposal) => Health::DiskFull,
            Ok(_) => Health::Running,
        }
    }

    pub(crate) fn status(&self) -> GroupStatus {
        let log = self.log.state();
        let raft = self.raft();
        let (committed, snapshot) = raft.as_ref().map_or((None, None), |raft| {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.local_committed, metrics.snapshot)
        });
        GroupStatus {
            id: self.id,
            health: self.health(),
            leadership: *self.leadership.borrow(),
            last: log.last.map_or(LogIndex(0), |id| id.index),
            committed: index_or_zero(committed.as_ref()),
            applied: *self.applied.borrow(),
            snapshot: index_or_zero(snapshot.as_ref()),
            purged: log.purged.map_or(LogIndex(0), |id| id.index),
            voters: raft.as_ref().map_or_else(|| self.voters.clone(), |raft| raft.voter_ids().map(NodeId).collect()),
            matched: raft.as_ref().map(matched).unwrap_or_default(),
            restarts: self.restarts.load(Ordering::Relaxed),
            asleep: matches!(self.nap.state(), NapState::Asleep(_)),
        }
    }
}

pub(crate) fn matched(raft: &Raft) -> BTreeMap<NodeId, LogIndex> {
    let metrics = raft.metrics();
    let metrics = metrics.borrow_watched();
    let replication = metrics.replication.iter().flatten();
    replication.map(|(node, matched)| (NodeId(*node), index_or_zero(matched.as_ref()))).collect()
}
