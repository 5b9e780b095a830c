//! The catalog as a Raft state machine, and the view that everything on this node reads.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use ensign_proto::{ClusterVersion, LogIndex, TopicId};
use ensign_raft::{CommittedEntry, RestoreError, StateMachine};
use tokio::sync::watch;

use super::command::{Command, Refusal, Response};
use super::state::State;
use super::view::{TopicsSeen, View};
use super::wire;

/// How many changes of topics a follower may be behind before it has to look at all of them.
const JOURNAL_MAX: usize = 8_192;

/// The latest changes of topics, so that who follows them need not look at every topic after every change.
#[derive(Debug, Default)]
struct Journal {
    /// How many changes there were before the oldest of `recent`.
    dropped: u64,
    recent: VecDeque<TopicId>,
}

impl Journal {
    fn push(&mut self, touched: Vec<TopicId>) {
        self.recent.extend(touched);
        let excess = self.recent.len().saturating_sub(JOURNAL_MAX);
        self.recent.drain(..excess);
        self.dropped += excess as u64;
    }

    /// Every topic may have changed.
    fn reset(&mut self) {
        self.dropped += self.recent.len() as u64 + 1;
        self.recent.clear();
    }

    fn since(&self, seen: TopicsSeen) -> (TopicsSeen, Option<Vec<TopicId>>) {
        let now = TopicsSeen(Some(self.dropped + self.recent.len() as u64));
        let known = seen.0.and_then(|seen| seen.checked_sub(self.dropped));
        (now, known.map(|known| self.recent.iter().skip(known as usize).copied().collect()))
    }
}

/// What the machine writes and every [`View`] reads.
#[derive(Debug)]
pub(super) struct Shared {
    state: RwLock<State>,
    journal: Mutex<Journal>,
    changes: watch::Sender<LogIndex>,
    stuck: OnceLock<LogIndex>,
    outdated_by: OnceLock<ClusterVersion>,
}

impl Shared {
    pub(super) fn outdated_by(&self) -> Option<ClusterVersion> {
        self.outdated_by.get().copied()
    }

    /// Where the machine met what it cannot read.
    pub(super) fn stuck(&self) -> Option<LogIndex> {
        self.stuck.get().copied()
    }

    /// A short look at the state; applying waits meanwhile.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        // A reader that panicked left nothing half-written, and `State::apply` refuses before it changes anything.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which topics changed since `seen`; `None` when that is not known any more.
    pub(super) fn changed_topics(&self, seen: TopicsSeen) -> (TopicsSeen, Option<Vec<TopicId>>) {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner).since(seen)
    }

    pub(super) fn changes(&self) -> watch::Receiver<LogIndex> {
        self.changes.subscribe()
    }
}

/// The catalog's state machine. Applying is a pure function of the state and the command.
#[derive(Debug)]
pub struct CatalogMachine {
    shared: Arc<Shared>,
    /// The newest version that this build speaks.
    speaks: ClusterVersion,
}

impl CatalogMachine {
    /// An empty catalog and the view of it.
    pub fn new() -> (Self, View) {
        Self::speaking(ClusterVersion::NEWEST)
    }

    /// The same, of a build that speaks versions up to this one.
    pub fn speaking(speaks: ClusterVersion) -> (Self, View) {
        let shared = Arc::new(Shared {
            state: RwLock::default(),
            journal: Mutex::default(),
            changes: watch::Sender::new(LogIndex(0)),
            stuck: OnceLock::new(),
            outdated_by: OnceLock::new(),
        });
        (Self { shared: Arc::clone(&shared), speaks }, View::new(shared))
    }

    /// Another view of the same state.
    pub fn view(&self) -> View {
        View::new(Arc::clone(&self.shared))
    }

    fn change<T>(&mut self, index: LogIndex, change: impl FnOnce(&mut State) -> T) -> T {
        let (result, touched) = {
            let mut state = self.shared.state.write().unwrap_or_else(PoisonError::into_inner);
            (change(&mut state), state.take_touched())
        };
        // After the state too: what the journal tells can be looked up.
        self.shared.journal.lock().unwrap_or_else(PoisonError::into_inner).push(touched);
        // After the state, so that whoever is woken sees the change.
        self.shared.changes.send_replace(index);
        result
    }
}

impl StateMachine for CatalogMachine {
    type Response = Response;

    fn apply(&mut self, entry: &CommittedEntry) -> Response {
        if self.shared.stuck().is_some() {
            return Err(Refusal::Unreadable);
        }
        match Command::decode(&entry.payload) {
            Ok(Command::SetClusterVersion(version)) if version > self.speaks => {
                let index = self.shared.stuck.get_or_init(|| entry.id.index);
                self.shared.outdated_by.get_or_init(|| version);
                self.shared.changes.send_replace(*index);
                Err(Refusal::VersionTooOld)
            }
            Ok(command) => self.change(entry.id.index, |state| state.apply(command)),
            Err(error) => {
                // `Catalog` checks every payload before it is proposed, so a newer node wrote this. Applying what follows would
                // make this replica differ from the others, so it stays where it is until it is upgraded and starts again.
                let index = self.shared.stuck.get_or_init(|| entry.id.index);
                tracing::error!(%index, %error, "the catalog holds what this version cannot read; upgrade this node");
                self.shared.changes.send_replace(*index);
                Err(Refusal::Unreadable)
            }
        }
    }

    fn snapshot(&self) -> Bytes {
        let applied = *self.shared.changes.borrow();
        wire::encode_snapshot(&self.shared.read(), applied.0)
    }

    fn restore(&mut self, snapshot: &Bytes) -> Result<(), RestoreError> {
        let (state, applied) = wire::decode_snapshot(snapshot).map_err(|error| RestoreError::new(error.to_string()))?;
        if state.version > self.speaks {
            self.shared.outdated_by.get_or_init(|| state.version);
            self.shared.changes.send_replace(LogIndex(applied));
            return Err(RestoreError::new(format!(
                "it is of version {} of the cluster, and this build speaks versions up to {}: upgrade this node",
                state.version, self.speaks
            )));
        }
        self.change(LogIndex(applied), |current| *current = state);
        self.shared.journal.lock().unwrap_or_else(PoisonError::into_inner).reset();
        self.shared.changes.send_replace(LogIndex(applied));
        Ok(())
    }
}
