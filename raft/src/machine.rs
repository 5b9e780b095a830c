//! What a group agrees on: a state machine that is a pure function of its entries.

use bytes::Bytes;
use ensign_storage::EntryId;

use crate::errors::RestoreError;

/// Bytes that the buffer of a proposal should have to spare: what is put behind it then costs no copy.
pub const PROPOSAL_ROOM: usize = 1;

/// An entry that a majority holds. Only Raft's own bookkeeping (blank entries, memberships) is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedEntry {
    /// Its place; the term is that of the leader that proposed it.
    pub id: EntryId,
    /// What was proposed, byte for byte.
    pub payload: Bytes,
}

/// Replicated state. All replicas apply the same entries in the same order and must end up equal.
pub trait StateMachine: Send + 'static {
    /// What the proposer learns.
    type Response: Send + 'static;

    /// Applies the next entry: a pure function of the state and the entry. May notify watchers that the machine owns.
    ///
    /// Must not block and must not panic: a panic here would repeat on every replica.
    fn apply(&mut self, entry: &CommittedEntry) -> Self::Response;

    /// The state as bytes that [`StateMachine::restore`] accepts: whole for catalog and vault, a descriptor for a partition.
    fn snapshot(&self) -> Bytes;

    /// Replaces the state.
    ///
    /// # Errors
    /// The bytes are not a snapshot of this machine; the group is then fenced.
    fn restore(&mut self, snapshot: &Bytes) -> Result<(), RestoreError>;

    /// The local applied state, if restarts shall skip what it covers; `None` replays from the snapshot.
    fn checkpoint(&self) -> Option<Bytes> {
        None
    }

    /// Replaces the state with a checkpoint that this machine made.
    ///
    /// # Errors
    /// The bytes are not a checkpoint of this machine; it is then ignored and the log is replayed.
    fn restore_checkpoint(&mut self, bytes: &Bytes) -> Result<(), RestoreError> {
        let _ = bytes;
        Err(RestoreError::new("this machine makes no checkpoints"))
    }
}
