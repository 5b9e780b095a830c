//! Sealed and unsealed: how a voter gets the master key, and how it loses it.
//!
//! ```text
//! sealed ── the root provider unwraps, by itself or with what somebody typed ──> open      one attempt at a time, with pauses
//! open ── an operator's seal is applied ──> held: the key is overwritten, here and on every voter, also after restarts
//! held ── somebody proves the root key on a voter, and its lift is applied ──> sealed, and so open as above
//! ```
//!
//! Invariants: nothing is granted or read while the vault is held, whoever has the key; the master key is used only by way of
//! [`Vault::master`], which looks at the state each time; a failed attempt changes nothing that is stored. Not here: who may
//! ask for it (the node), what a root key is (`root`).

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{ClusterId, LogIndex, NodeId, Term};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use thiserror::Error;
use tracing::{error, info, warn};

use super::{MasterKey, Vault};
use crate::link::{Reason, Refusal};
use crate::machine::{Change, Done, State};
use crate::root::{MasterName, Pace, Passphrase, RootError, RootId, RootKind, WrappedMaster};

/// How long a voter may take to say whether it is sealed.
const ASK_DEADLINE: Duration = Duration::from_secs(1);
/// How long the pause after a wrong passphrase grows.
const TYPED_PAUSE_MAX: Duration = Duration::from_mins(1);

const UNINITIALIZED: &str = "the vault is not initialized yet";
const NEWER: &str = "a newer build wrote to the vault: upgrade this node";

/// Whether this process has the master key.
pub(super) enum Seal {
    Sealed {
        why: String,
    },
    Open {
        master: Arc<MasterKey>,
        /// The hold that was in force when the root key was proven, if there was one: it does not concern this key.
        proven: Option<LogIndex>,
    },
}

impl Seal {
    pub(super) fn new() -> Self {
        Self::Sealed { why: UNINITIALIZED.to_owned() }
    }
}

/// Attempts to unseal, one at a time.
pub(super) struct Unsealing {
    typed: Pace,
    unattended: Pace,
}

impl Unsealing {
    pub(super) fn new(pause_max: Duration) -> Self {
        Self { typed: Pace::new(TYPED_PAUSE_MAX), unattended: Pace::new(pause_max) }
    }
}

/// What can be done now.
enum Look {
    /// It is open.
    Open(Arc<MasterKey>),
    /// Nothing, and why.
    Shut(String),
    /// The provider may be asked.
    Try(Wrapped),
}

/// What is to be unwrapped.
struct Wrapped {
    name: MasterName,
    master: WrappedMaster,
    held: Option<LogIndex>,
}

/// Why a voter is still sealed after somebody asked for the opposite.
#[derive(Debug, Error)]
pub enum UnsealError {
    /// There is nothing to unseal: the vault is empty here, of another cluster, or of a newer build.
    #[error("{why}")]
    NotNow {
        /// For people.
        why: String,
    },
    /// Another attempt is being made. Wait for its end.
    #[error("somebody else is unsealing this node just now: wait for the outcome")]
    Busy,
    /// A passphrase was wrong a moment ago.
    #[error("a wrong passphrase was typed: the next attempt can be made in {} s", .wait.as_secs_f64().ceil())]
    TooSoon {
        /// How long to wait.
        wait: Duration,
    },
    /// This vault takes no passphrase.
    #[error("the vault's root key is kept by {kind}: it takes no passphrase")]
    NoPassphrase {
        /// What keeps it.
        kind: RootKind,
    },
    /// The root key was not had, or does not fit.
    #[error(transparent)]
    Root(#[from] RootError),
}

/// A voter has the master key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsealed {
    /// An operator's seal is still in force for the whole vault, and has to be lifted.
    pub held: bool,
    /// It was open before.
    pub already: bool,
}

/// How a vault's replica is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealStatus {
    /// Why it is sealed here; `None` where it is not.
    pub sealed: Option<String>,
    /// Whether an operator has sealed the vault.
    pub held: bool,
    /// What this node is set to.
    pub provider: RootKind,
    /// What keeps the vault's root key, and its name and version; `None` before the vault is initialized.
    pub root: Option<RootName>,
    /// Rises with every destruction of a key.
    pub epoch: u64,
    /// Who leads, as known here.
    pub leader: Option<NodeId>,
    /// In which term.
    pub term: Term,
    /// Whether this node votes.
    pub votes: bool,
    /// The state that this was read from.
    pub applied: LogIndex,
}

/// Which root key a vault needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootName {
    /// What keeps it; `None`: something that only a newer build knows.
    pub kind: Option<RootKind>,
    /// Its public name.
    pub id: RootId,
    /// Its version.
    pub version: u32,
    /// What its provider calls it.
    pub reference: String,
}

/// The hold of a vault that an operator has sealed.
pub(crate) fn refuse_held(state: &State) -> Result<(), Refusal> {
    state.hold.as_ref().map_or(Ok(()), |hold| Err(Refusal::new(Reason::Sealed, held(&hold.actor))))
}

fn held(actor: &str) -> String {
    let who = if actor.is_empty() { String::new() } else { format!(" ({actor})") };
    format!("an operator has sealed it{who}: `ensign vault unseal` on a machine of the vault lifts that")
}

/// What the state holds, if this node can make sense of it.
pub(crate) fn stored(cluster: ClusterId, state: &State) -> Result<(MasterName, WrappedMaster), String> {
    let master = state.master.as_ref().ok_or(UNINITIALIZED)?;
    if state.cluster != cluster {
        return Err(format!("this vault belongs to cluster {}, not to {cluster}", state.cluster));
    }
    let kind = RootKind::from_number(master.kind)
        .ok_or("its root key is kept by what only a newer build knows: upgrade this node")?;
    let wrapped = WrappedMaster {
        kind,
        id: RootId(master.root_id),
        version: master.root_version,
        reference: master.reference.clone(),
        blob: master.boxed.clone(),
    };
    Ok((MasterName { cluster, epoch: master.epoch }, wrapped))
}

impl Vault {
    /// The master key, unwrapped now if it was not before and nobody has to be asked.
    pub(super) async fn master(&self) -> Result<Arc<MasterKey>, Refusal> {
        let tried = match self.look() {
            Look::Open(master) => return Ok(master),
            Look::Shut(why) => Err(why),
            Look::Try(wrapped) => self.unseal_unattended(wrapped).await,
        };
        tried.map_err(|why| {
            let message = format!("the vault is sealed on node {}: {why}", self.0.config.node);
            Refusal::new(Reason::Sealed, message)
        })
    }

    /// Looks at the state before anything else, so that a key is never used that the state says is gone.
    fn look(&self) -> Look {
        let inner = &self.0;
        let state = inner.group.inspect(|machine| {
            let state = machine.state().ok_or_else(|| NEWER.to_owned())?;
            let (name, master) = stored(inner.config.cluster, state)?;
            let hold = state.hold.as_ref().map(|hold| (hold.index, held(&hold.actor)));
            Ok::<_, String>((Wrapped { name, master, held: hold.as_ref().map(|(index, _)| *index) }, hold))
        });
        let (wrapped, hold) = match state {
            Ok(state) => state,
            Err(why) if why == UNINITIALIZED => {
                return self.shut(inner.root.missing().map_or(why, |missing| missing.to_string()));
            }
            Err(why) => return self.shut(why),
        };
        let mut seal = self.seal();
        if let Seal::Open { master, proven } = &*seal {
            let concerned = wrapped.held.is_some() && wrapped.held != *proven;
            if concerned || master.epoch() != wrapped.name.epoch {
                master.wipe();
                *seal = Seal::Sealed { why: String::new() };
            } else if hold.is_none() {
                return Look::Open(Arc::clone(master));
            } else if let Some((_, why)) = hold {
                // Proven, and waiting for the lift: the key stays, and nobody gets it.
                return Look::Shut(why);
            }
        }
        drop(seal);
        match hold {
            Some((_, why)) => self.shut(why),
            None => Look::Try(wrapped),
        }
    }

    /// Remembers why it is sealed, and says so once.
    fn shut(&self, why: String) -> Look {
        let mut seal = self.seal();
        if let Seal::Sealed { why: before } = &mut *seal
            && *before != why
        {
            if why != UNINITIALIZED {
                error!(%why, "the vault is sealed on this node: it grants no keys");
            }
            before.clone_from(&why);
        }
        Look::Shut(why)
    }

    fn open(&self, wrapped: &Wrapped, unwrapped: crate::root::Unwrapped) -> Arc<MasterKey> {
        let master = Arc::new(MasterKey::new(wrapped.name, unwrapped));
        *self.seal() = Seal::Open { master: Arc::clone(&master), proven: wrapped.held };
        info!(root = %wrapped.master.id, "the vault is unsealed");
        master
    }

    /// Asks the provider, unless it has failed a moment ago.
    async fn unseal_unattended(&self, wrapped: Wrapped) -> Result<Arc<MasterKey>, String> {
        let inner = &self.0;
        // Whoever waits for a person must not wait here: a phrase that is being checked takes seconds, and calls have deadlines.
        let mut unsealing = if wrapped.master.kind == RootKind::Passphrase {
            match inner.unsealing.try_lock() {
                Ok(unsealing) => unsealing,
                Err(_) => return Err(self.why()),
            }
        } else {
            inner.unsealing.lock().await
        };
        // Another call may have done it meanwhile, or an operator undone it.
        let wrapped = match self.look() {
            Look::Open(master) => return Ok(master),
            Look::Shut(why) => return Err(why),
            Look::Try(wrapped) => wrapped,
        };
        if unsealing.unattended.permit(inner.clock.boot()).is_err() {
            return Err(self.why());
        }
        match inner.root.unwrap(wrapped.name, &wrapped.master, None).await {
            Ok(unwrapped) => {
                unsealing.unattended.succeeded();
                Ok(self.open(&wrapped, unwrapped))
            }
            Err(error) => {
                unsealing.unattended.failed(inner.clock.boot());
                let why = error.to_string();
                self.shut(why.clone());
                Err(why)
            }
        }
    }

    /// Unseals this voter because somebody asks for it: with a passphrase where the vault needs one. After an operator's seal this
    /// proves that the root key is here; [`Unsealed::held`] then says that the seal is still to be lifted, for all voters.
    ///
    /// # Errors
    /// See [`UnsealError`]. Nothing that is stored changes.
    pub async fn unseal(&self, phrase: Option<&Passphrase>) -> Result<Unsealed, UnsealError> {
        let inner = &self.0;
        let mut unsealing = match phrase {
            Some(_) => inner.unsealing.try_lock().map_err(|_| UnsealError::Busy)?,
            None => inner.unsealing.lock().await,
        };
        let held = |wrapped: &Wrapped| wrapped.held.is_some();
        let wrapped = inner.group.inspect(|machine| {
            let state = machine.state().ok_or_else(|| NEWER.to_owned())?;
            let (name, master) = stored(inner.config.cluster, state)?;
            Ok::<_, String>(Wrapped { name, master, held: state.hold.as_ref().map(|hold| hold.index) })
        });
        let wrapped = wrapped.map_err(|why| UnsealError::NotNow { why })?;
        if matches!(self.look(), Look::Open(_)) {
            return Ok(Unsealed { held: false, already: true });
        }
        if let Seal::Open { proven, .. } = &*self.seal()
            && *proven == wrapped.held
        {
            // Typed before, and not lifted since.
            return Ok(Unsealed { held: held(&wrapped), already: true });
        }
        match (wrapped.master.kind, phrase) {
            (RootKind::Passphrase, None) => return Err(RootError::PassphraseNeeded.into()),
            (RootKind::Passphrase, Some(_)) => {
                let permitted = unsealing.typed.permit(inner.clock.boot());
                permitted.map_err(|wait| UnsealError::TooSoon { wait })?;
            }
            (kind, Some(_)) => return Err(UnsealError::NoPassphrase { kind }),
            (_, None) => {}
        }
        match inner.root.unwrap(wrapped.name, &wrapped.master, phrase).await {
            Ok(unwrapped) => {
                unsealing.typed.succeeded();
                self.open(&wrapped, unwrapped);
                Ok(Unsealed { held: held(&wrapped), already: false })
            }
            Err(error) => {
                // Only a guess costs the next one time: whoever has the right phrase is not to wait for a full machine.
                if matches!(error, RootError::PassphraseWrong) {
                    unsealing.typed.failed(inner.clock.boot());
                    warn!("a wrong passphrase was typed");
                }
                Err(error.into())
            }
        }
    }

    /// Why the vault is sealed on this node; `None` when it is not. Tries nothing.
    pub fn sealed(&self) -> Option<String> {
        match self.look() {
            Look::Open(_) => None,
            Look::Shut(why) => Some(why),
            Look::Try(_) => Some(self.why()),
        }
    }

    /// What an operator should know of the seal: why it is sealed, unless it is on its way or there is no vault yet.
    pub fn trouble(&self) -> Option<String> {
        match self.look() {
            Look::Open(_) => None,
            Look::Shut(why) => Some(why).filter(|why| why != UNINITIALIZED),
            Look::Try(_) => match &*self.seal() {
                Seal::Sealed { why } if !why.is_empty() && why != UNINITIALIZED => Some(why.clone()),
                Seal::Sealed { .. } | Seal::Open { .. } => None,
            },
        }
    }

    /// Unseals if that takes nobody's help, and returns when it is known whether it does.
    pub async fn settle(&self) {
        // Why it did not work is what `trouble` tells.
        let _ = self.master().await;
    }

    fn why(&self) -> String {
        match &*self.seal() {
            Seal::Sealed { why } if why.is_empty() || why == UNINITIALIZED => "it is being unsealed".to_owned(),
            Seal::Sealed { why } => why.clone(),
            Seal::Open { .. } => "it was unsealed just now".to_owned(),
        }
    }

    /// How the vault is here. Tries nothing.
    pub fn seal_status(&self) -> SealStatus {
        let inner = &self.0;
        let (leadership, voters) = (*inner.group.leadership().borrow(), inner.group.status().voters);
        let mut status = SealStatus {
            sealed: self.sealed(),
            held: false,
            provider: inner.root.kind(),
            root: None,
            epoch: 0,
            leader: leadership.leader,
            term: leadership.term,
            votes: voters.contains(&inner.config.node),
            applied: LogIndex(0),
        };
        inner.group.inspect(|machine| {
            let Some(state) = machine.state() else { return };
            (status.held, status.epoch, status.applied) = (state.hold.is_some(), state.epoch, state.applied);
            status.root = state.master.as_ref().map(|master| RootName {
                kind: RootKind::from_number(master.kind),
                id: RootId(master.root_id),
                version: master.root_version,
                reference: master.reference.clone(),
            });
        });
        status
    }

    /// An operator's seal, or its lift: by a voter that leads, for all of them.
    pub(super) async fn hold(&self, actor: &str, change: Change) -> Result<pb::HoldReply, Refusal> {
        let term = self.must_lead()?;
        let done = self.propose_in(Some(term), actor, change).await?;
        // Overwrites the key now, and not at the next look.
        let _ = self.look();
        let (held, wait) = self.inspect(|state| Ok((state.hold.is_some(), state.lease_wait())))?;
        match done {
            Done::Hold(index) => Ok(pb::HoldReply { index: index.0, held, wait_ms: wait.as_millis() as u64 }),
            other => Err(super::unexpected(&other)),
        }
    }

    /// Another voter that is not sealed: asks all of them.
    pub(super) async fn unsealed_voter(&self) -> Option<NodeId> {
        let inner = &self.0;
        let others = inner.group.status().voters.into_iter().filter(|node| *node != inner.config.node);
        let mut asked: FuturesUnordered<_> = others
            .map(|node| {
                let call = Some(pb::request::Call::Status(pb::StatusRequest {}));
                let asked = inner.peers.call(node, pb::Request { actor: String::new(), call });
                async move {
                    let reply = tokio::time::timeout(ASK_DEADLINE, asked).await.ok()?.ok()?;
                    let Some(pb::reply::Result::Status(status)) = reply.result else { return None };
                    status.sealed.is_empty().then_some(node)
                }
            })
            .collect();
        while let Some(answer) = asked.next().await {
            if answer.is_some() {
                return answer;
            }
        }
        None
    }

    fn seal(&self) -> MutexGuard<'_, Seal> {
        self.0.seal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
