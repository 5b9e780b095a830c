//! The vault as a replicated state machine: rings, custody, secrets, and the chain of what was changed.
//!
//! Every key in it is wrapped, so a replica that is sealed applies like any other. Applying is a pure function; the leader
//! makes keys and boxes before it proposes. Not here: who may lease what and until when (`vault`), the clock.

mod command;
mod custody;
pub(crate) mod receipts;
mod rings;
mod secrets;
mod snapshot;
mod state;

use bytes::Bytes;
use ensign_raft::{CommittedEntry, RestoreError, StateMachine};

pub(crate) use self::command::{
    AddReceiptKey, Change, Command, CreateRing, Custodies, Custody, DeleteSecret, Drain, Elapse, Erase, Hold,
    Initialize, Kek, PutSecret, Revoke, RevokeDue, Rotate, ScheduleRevoke, SetLease, SetRing, SettleDisable,
    SettleLease, Target,
};
pub(crate) use self::custody::{CUSTODIES_MAX, CustodyKey};
pub(crate) use self::receipts::{ReceiptKey, endorsement};
pub(crate) use self::rings::{ELAPSE_MAX_MS, Scheduled, Switch, enable_with};
#[cfg(test)]
pub(crate) use self::state::EVENTS_MAX;
pub(crate) use self::state::{Done, Outcome, Revocation, Ring, State, Version, What};
use crate::link::{Reason, Refusal};

/// The machine of the vault's group.
#[derive(Debug, Default)]
pub(crate) struct VaultMachine {
    state: State,
    /// A command that this build cannot read. From there on its state is not the vault's state, and it serves nothing.
    newer: bool,
}

impl VaultMachine {
    /// The state; `None` when a newer build's command made it worthless.
    pub(crate) fn state(&self) -> Option<&State> {
        (!self.newer).then_some(&self.state)
    }
}

impl StateMachine for VaultMachine {
    type Response = Outcome;

    fn apply(&mut self, entry: &CommittedEntry) -> Outcome {
        let command = Command::from_payload(&entry.payload);
        let Some((command, change)) = command.filter(|_| !self.newer) else {
            self.newer = true;
            return Err(Refusal::new(Reason::Sealed, "a newer build wrote to the vault: upgrade this node"));
        };
        self.state.apply(entry.id, &command, change)
    }

    fn snapshot(&self) -> Bytes {
        // Of a state that is not the vault's, there is none: what this gives is refused by `restore`.
        if self.newer { Bytes::new() } else { snapshot::encode(&self.state) }
    }

    fn restore(&mut self, bytes: &Bytes) -> Result<(), RestoreError> {
        self.state = snapshot::decode(bytes)?;
        self.newer = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
