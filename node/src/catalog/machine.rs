//! The catalog as a Raft state machine, and the view that everything on this node reads.

use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use bytes::Bytes;
use ensign_proto::LogIndex;
use ensign_raft::{CommittedEntry, RestoreError, StateMachine};
use tokio::sync::watch;

use super::command::{Command, Refusal, Response};
use super::state::State;
use super::view::View;
use super::wire;

/// What the machine writes and every [`View`] reads.
#[derive(Debug)]
pub(super) struct Shared {
    state: RwLock<State>,
    changes: watch::Sender<LogIndex>,
    stuck: OnceLock<LogIndex>,
}

impl Shared {
    /// Where the machine met what it cannot read.
    pub(super) fn stuck(&self) -> Option<LogIndex> {
        self.stuck.get().copied()
    }

    /// A short look at the state; applying waits meanwhile.
    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        // A reader that panicked left nothing half-written, and `State::apply` refuses before it changes anything.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changes(&self) -> watch::Receiver<LogIndex> {
        self.changes.subscribe()
    }
}

/// The catalog's state machine. Applying is a pure function of the state and the command.
#[derive(Debug)]
pub struct CatalogMachine {
    shared: Arc<Shared>,
}

impl CatalogMachine {
    /// An empty catalog and the view of it.
    pub fn new() -> (Self, View) {
        let shared = Arc::new(Shared {
            state: RwLock::default(),
            changes: watch::Sender::new(LogIndex(0)),
            stuck: OnceLock::new(),
        });
        (Self { shared: Arc::clone(&shared) }, View::new(shared))
    }

    /// Another view of the same state.
    pub fn view(&self) -> View {
        View::new(Arc::clone(&self.shared))
    }

    fn change<T>(&mut self, index: LogIndex, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.shared.state.write().unwrap_or_else(PoisonError::into_inner));
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
        self.change(LogIndex(applied), |current| *current = state);
        Ok(())
    }
}
