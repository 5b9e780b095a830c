//! The vault on one of its voters: a Raft group of its own, unsealed with the root key.
//!
//! ```text
//! Lease:   request ──> ReadIndex round begun now ──> decide from state and note the session, in one section ──> keys, sealed to it
//! Revoke:  commit Revoking ──> push Surrender to every known session ──> all acked and start + W over, or W over
//!          ──> commit Drained: the wrapped key leaves the state ──> answer with the receipt
//! Rotate:  commit ──> tell every known session to renew now, for a moment ──> answer
//! Erase:   every member rewrites its file ──> the leader has heard so from all ──> commit Erase: the receipt of the erasure
//! ```
//!
//! Invariants: nothing is granted on a leader's lease; a revoke is answered only when no node can open; a new leader waits W
//! from its own start, and resumes what it finds in `Revoking`. Without the right root key a voter replicates and votes, hands
//! leadership to one that has it, grants nothing and says why (`seal`). Not here: what the state becomes (`machine`), who may call
//! (the node), what the root key is (`root`).

mod book;
mod custody;
mod erase;
mod grants;
mod keys;
mod receipts;
mod revoke;
mod rotate;
mod schedule;
mod seal;
mod secrets;
mod switch;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{
    Algorithm, ClusterId, ClusterVersion, GroupId, KeyVersion, LogIndex, NodeId, ProjectId, RingId, SessionId, Term,
};
use ensign_raft::env::{BootTime, Clock, Stop, Tasks};
use ensign_raft::{
    Committed, Group, GroupMembers, GroupSpec, Leadership, Mode, ProposeError, ReadError, Runtime, StartError,
};
use ensign_storage::GroupLog;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{info, warn};

pub(crate) use self::book::LeaseBook;
#[cfg(any(test, feature = "testing"))]
pub(crate) use self::custody::{custodies_from, custody_page};
use self::erase::EraseCare;
pub(crate) use self::grants::{LeaseCall, fulfil, plan};
pub(crate) use self::keys::{MasterKey, first_master};
use self::schedule::ScheduleCare;
pub(crate) use self::seal::refuse_held;
#[cfg(any(test, feature = "testing"))]
pub(crate) use self::seal::stored;
pub use self::seal::{RootName, SealStatus, UnsealError, Unsealed};
use self::seal::{Seal, Unsealing};
pub(crate) use self::secrets::read_aad;
#[cfg(any(test, feature = "testing"))]
pub(crate) use self::secrets::{name as secret_name, seal_reply};
#[cfg(any(test, feature = "testing"))]
pub(crate) use self::switch::target_of;
use crate::entropy::Entropy;
use crate::lease::{InvalidLease, LeaseConfig, LeaseTerms};
use crate::link::{HolderLink, Reason, Refusal, VaultPeer};
use crate::machine::{Change, Command, CreateRing, Done, Hold, Outcome, SetLease, SettleLease, State, VaultMachine};
use crate::metrics;
use crate::root::{Passphrase, RootError, RootProvider};
use crate::wire;

/// After how many entries the log is compacted, and how many are kept for voters that lag a little.
const COMPACT_EVERY: u64 = 4_096;
const COMPACT_KEEP: u64 = 256;
/// How often a voter looks after itself.
const UPKEEP: Duration = Duration::from_secs(1);
/// Between two attempts to initialize.
const INITIALIZE_AGAIN: Duration = Duration::from_millis(50);
const ACTOR_MAX: usize = 128;
const PAGE_MAX: usize = 1_000;

/// Settings of a vault voter.
#[derive(Debug, Clone)]
pub struct VaultConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeId,
    /// The vault's first voters, the same on all of them.
    pub voters: BTreeSet<NodeId>,
    /// Whether this node may create the group.
    pub create: bool,
    /// What leases this node asks for when it leads. What counts is in the vault's state, the same for all nodes.
    pub lease: LeaseConfig,
    /// The longest election timeout of the vault's group.
    pub election_max: Duration,
    /// Where salts and keys come from.
    pub entropy: Entropy,
}

/// How a voter reaches other nodes.
#[derive(Clone)]
pub struct VaultLinks {
    /// Those that hold keys.
    pub holders: Arc<dyn HolderLink>,
    /// The other voters.
    pub peers: Arc<dyn VaultPeer>,
    /// What every node of the cluster speaks: what older voters cannot read is not written.
    pub version: Arc<dyn Fn() -> ClusterVersion + Send + Sync>,
    /// Every node of the cluster that was ever started: each may have been a member of the vault's group, and have its log.
    pub nodes: Arc<dyn Fn() -> Vec<NodeId> + Send + Sync>,
}

impl fmt::Debug for VaultLinks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VaultLinks")
    }
}

/// Who calls, as its certificate says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The node.
    pub node: NodeId,
}

/// Why the vault did not start.
#[derive(Debug, Error)]
pub enum VaultStartError {
    /// The settings would not be safe.
    #[error(transparent)]
    Lease(#[from] InvalidLease),
    /// The group did not start.
    #[error("the vault's group did not start")]
    Group(#[from] StartError),
}

/// Why the vault could not be initialized.
#[derive(Debug, Error)]
pub enum InitializeError {
    /// It is initialized already, and this node cannot unseal it.
    #[error("the vault cannot be unsealed: {why}")]
    Sealed {
        /// For people.
        why: String,
    },
    /// No leader came to be in time. Retry.
    #[error("the vault elected no leader in time")]
    NoLeader,
    /// There is no root key to wrap the master key with.
    #[error("the vault's master key cannot be wrapped")]
    Root(#[source] RootError),
}

/// The vault, as one voter runs it. Clones are cheap and share it.
#[derive(Clone)]
pub struct Vault(Arc<Inner>);

struct Inner {
    config: VaultConfig,
    group: Group<VaultMachine>,
    root: Arc<dyn RootProvider>,
    clock: Arc<dyn Clock>,
    holders: Arc<dyn HolderLink>,
    /// The other voters, whom a sealed leader asks for a successor.
    peers: Arc<dyn VaultPeer>,
    version: Arc<dyn Fn() -> ClusterVersion + Send + Sync>,
    nodes: Arc<dyn Fn() -> Vec<NodeId> + Send + Sync>,
    /// The group's log, whose file is rewritten.
    log: Arc<dyn GroupLog>,
    /// How far each member's file has come, as this leader last heard.
    heard: Mutex<BTreeMap<NodeId, LogIndex>>,
    seal: Mutex<Seal>,
    unsealing: tokio::sync::Mutex<Unsealing>,
    book: Mutex<LeaseBook>,
    /// A revocation was ordered.
    ordered: Notify,
}

impl Vault {
    /// Starts this node's voter. It starts sealed, and unseals by itself as soon as `root` gives the key without asking anyone.
    ///
    /// # Errors
    /// See [`VaultStartError`].
    pub async fn start(
        config: VaultConfig,
        runtime: &Runtime,
        log: Arc<dyn GroupLog>,
        root: Arc<dyn RootProvider>,
        links: VaultLinks,
        clock: Arc<dyn Clock>,
        tasks: &Tasks,
    ) -> Result<Self, VaultStartError> {
        config.lease.check(config.election_max)?;
        let mode = if config.create { Mode::Found } else { Mode::Member };
        let spec = GroupSpec { id: GroupId::VAULT, voters: config.voters.clone(), mode };
        let group = runtime.start(spec, Arc::clone(&log), VaultMachine::default()).await?;
        let VaultLinks { holders, peers, version, nodes } = links;
        let vault = Self(Arc::new(Inner {
            group,
            clock,
            holders,
            peers,
            version,
            nodes,
            log,
            heard: Mutex::default(),
            seal: Mutex::new(Seal::new()),
            unsealing: tokio::sync::Mutex::new(Unsealing::new(root.pause_max())),
            root,
            book: Mutex::default(),
            ordered: Notify::new(),
            config,
        }));
        let care = vault.tend_file_at_start().await;
        let (draining, upkeep) = (vault.clone(), vault.clone());
        tasks.spawn("vault-revocations", |stop| draining.drain_until(stop));
        tasks.spawn("vault-upkeep", |stop| upkeep.upkeep_until(care, stop));
        Ok(vault)
    }

    /// Creates the vault master key, unless there is one, and unseals. Every voter may be asked; the leader does it, the others wait
    /// for it. `phrase` is for a root key that is made of one.
    ///
    /// # Errors
    /// See [`InitializeError`]. Safe to repeat, with the same phrase.
    pub async fn initialize(&self, deadline: Duration, phrase: Option<&Passphrase>) -> Result<(), InitializeError> {
        let deadline = Instant::now() + deadline;
        let inner = &self.0;
        loop {
            if inner.group.inspect(|machine| machine.state().is_some_and(|state| state.master.is_some())) {
                let unsealed = match phrase {
                    Some(_) => self.unseal(phrase).await.map(drop).map_err(|error| error.to_string()),
                    None => self.master().await.map(drop).map_err(|refusal| refusal.message),
                };
                return unsealed.map_err(|why| InitializeError::Sealed { why });
            }
            let leadership = *inner.group.leadership().borrow();
            if leadership.ready {
                let (cluster, lease) = (inner.config.cluster, &inner.config.lease);
                let change = first_master(cluster, &*inner.root, phrase, lease, &inner.config.entropy).await;
                let change = change.map_err(InitializeError::Root)?;
                let proposal = self.propose_in(Some(leadership.term), "bootstrap", change);
                // Whatever became of it is looked at next time round: at once if it worked.
                match timeout_at(deadline, proposal).await {
                    Ok(Ok(_)) => continue,
                    Ok(Err(refusal)) => info!(%refusal, "the vault is not initialized yet"),
                    Err(_) => return Err(InitializeError::NoLeader),
                }
            }
            if Instant::now() >= deadline {
                return Err(InitializeError::NoLeader);
            }
            sleep(INITIALIZE_AGAIN).await;
        }
    }

    /// Who leads the vault, as this node's replica knows it.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.0.group.leadership()
    }

    /// Who belongs to the vault's group.
    pub fn members(&self) -> GroupMembers {
        self.0.group.membership()
    }

    /// Whether this node may come to unseal the vault: without a root key file it never will.
    pub fn has_root_key(&self) -> bool {
        self.0.root.missing().is_none()
    }

    /// The group, for its status.
    pub fn group_status(&self) -> ensign_raft::GroupStatus {
        self.0.group.status()
    }

    /// Answers one call. A refusal is a reply, and a proof that nothing happened unless it says that the outcome is unknown.
    /// Dropping the future may leave a change committed.
    pub async fn handle(&self, caller: Caller, request: pb::Request) -> pb::Reply {
        let result = match self.dispatch(caller, request).await {
            Ok(result) => result,
            Err(mut refusal) => {
                if refusal.reason == Reason::NotLeader {
                    refusal.leader =
                        self.0.group.leadership().borrow().leader.filter(|node| *node != self.0.config.node);
                }
                metrics::vault_refusal(refusal.reason);
                pb::reply::Result::Refusal(refusal.into())
            }
        };
        pb::Reply { result: Some(result) }
    }

    async fn dispatch(&self, caller: Caller, request: pb::Request) -> Result<pb::reply::Result, Refusal> {
        use pb::reply::Result as Answer;
        use pb::request::Call;
        if request.actor.len() > ACTOR_MAX {
            return Err(wire::malformed("actor"));
        }
        let actor = &request.actor;
        match request.call.ok_or_else(|| wire::malformed("call"))? {
            Call::Lease(request) => self.lease(caller, &request).await.map(Answer::Lease),
            Call::Release(request) => {
                let session: SessionId = wire::id(&request.session, "session")?;
                self.must_lead()?;
                self.book().release(session, caller.node);
                Ok(Answer::Release(pb::ReleaseReply {}))
            }
            Call::CreateRing(request) => self.create_ring(actor, &request).await.map(Answer::Ring),
            Call::ListRings(request) => self.list_rings(&request).await.map(Answer::ListRings),
            Call::Rotate(request) => self.rotate(actor, &request).await.map(Answer::Ring),
            Call::Revoke(request) => {
                let receipt = self.revoke(actor, &request).await?;
                Ok(Answer::Receipt(self.signed(receipt).await))
            }
            Call::Disable(request) => self.disable(actor, &request).await.map(Answer::Ring),
            Call::Enable(request) => self.enable(actor, &request).await.map(Answer::Ring),
            Call::SetRing(request) => self.set_ring(actor, &request).await.map(Answer::Ring),
            Call::ScheduleRevoke(request) => self.schedule_revoke(actor, &request).await.map(Answer::Ring),
            Call::CancelRevoke(request) => self.cancel_revoke(actor, &request).await.map(Answer::Ring),
            Call::PutCustody(request) => self.custody(actor, &request, Change::PutCustody).await.map(Answer::Custody),
            Call::DropCustody(request) => self.custody(actor, &request, Change::DropCustody).await.map(Answer::Custody),
            Call::PutCustodies(request) => {
                self.custodies(actor, &request, Change::PutCustodies).await.map(Answer::Custody)
            }
            Call::DropCustodies(request) => {
                self.custodies(actor, &request, Change::DropCustodies).await.map(Answer::Custody)
            }
            Call::ListCustody(request) => self.list_custody(&request).await.map(Answer::ListCustody),
            Call::PutSecret(request) => self.put_secret(actor, request).await.map(Answer::SecretMeta),
            Call::Secret(request) => self.secret(caller, &request).await.map(Answer::Secret),
            Call::DeleteSecret(request) => self.delete_secret(actor, &request).await.map(Answer::SecretMeta),
            Call::ListSecrets(request) => self.list_secrets(&request).await.map(Answer::ListSecrets),
            Call::Status(_) => Ok(Answer::Status(self.status())),
            Call::ListReceipts(request) => self.list_receipts(&request).await.map(Answer::ListReceipts),
            Call::ReceiptKeys(_) => self.receipt_keys().await.map(Answer::ReceiptKeys),
            Call::Seal(_) => self.hold(actor, Change::Seal(Hold {})).await.map(Answer::Hold),
            Call::Lift(_) => self.hold(actor, Change::Lift(Hold {})).await.map(Answer::Hold),
        }
    }

    async fn lease(&self, caller: Caller, request: &pb::LeaseRequest) -> Result<pb::LeaseReply, Refusal> {
        let inner = &self.0;
        let call = LeaseCall::parse(inner.config.cluster, request)?;
        let master = self.master().await?;
        // Begun after the request arrived: its t0 is before this round, so a newer leader's wait covers what we grant.
        self.read_index().await?;
        let plan = self.inspect(|state| {
            let plan = plan(state, caller.node, &call)?;
            // Noted under the state's lock: a revoke that is applied next finds this session.
            self.book().note(call.session, caller.node, inner.clock.boot(), state.lease_wait())?;
            Ok(plan)
        })?;
        let now_ms = inner.clock.wall().as_millis();
        let reply = fulfil(plan, caller.node, &call, &master, now_ms, &inner.config.entropy)?;
        metrics::vault_lease(reply.results.len());
        Ok(reply)
    }

    async fn create_ring(&self, actor: &str, request: &pb::CreateRingRequest) -> Result<pb::Ring, Refusal> {
        self.must_lead()?;
        let project: ProjectId = wire::id(&request.project, "project")?;
        // Of a ring with a name, a repetition is told by that.
        let ring = match optional::<RingId>(&request.ring, "ring")? {
            None if !request.name.is_empty() => {
                RingId::new(self.0.clock.wall().as_millis(), self.0.config.entropy.array())
            }
            ring => ring.unwrap_or_default(),
        };
        if ring.is_zero() || project.is_zero() {
            return Err(wire::malformed("ring"));
        }
        let alg = if request.alg == 0 { Algorithm::default() } else { wire::algorithm_from(request.alg)? };
        let master = self.master().await?;
        let kek = master.make_kek(project, ring, KeyVersion(1), alg, &self.0.config.entropy)?;
        let change = CreateRing {
            ring: wire::bytes(ring.as_bytes()),
            project: request.project.clone(),
            alg: alg as u32,
            kek,
            name: request.name.clone(),
        };
        expect_ring(self.propose(actor, Change::CreateRing(change)).await?)
    }

    async fn list_rings(&self, request: &pb::ListRingsRequest) -> Result<pb::ListRingsReply, Refusal> {
        let one = optional::<RingId>(&request.ring, "ring")?;
        let project = optional::<ProjectId>(&request.project, "project")?;
        let after = optional::<RingId>(&request.after, "after")?;
        self.read_index().await?;
        self.inspect(|state| {
            let matching = state.rings.iter().filter(|(id, ring)| {
                one.is_none_or(|one| **id == one)
                    && project.is_none_or(|project| ring.project == project)
                    && after.is_none_or(|after| **id > after)
            });
            let (rings, more) = page(matching.map(|(id, ring)| ring.to_wire(*id)), request.limit);
            Ok(pb::ListRingsReply { rings, more, index: state.applied.0 })
        })
    }

    fn status(&self) -> pb::StatusReply {
        let inner = &self.0;
        let leadership = *inner.group.leadership().borrow();
        let wait = self.inspect(|state| Ok(state.lease_wait())).unwrap_or_default();
        let known = self.book().known(inner.clock.boot(), wait).len();
        let mut status = pb::StatusReply {
            node: inner.config.node.0,
            leader: leadership.leader.map_or(0, |node| node.0),
            term: leadership.term.0,
            sealed: self.sealed().unwrap_or_default(),
            sessions: known as u64,
            erased_through: self.erased_through().0,
            ..pb::StatusReply::default()
        };
        inner.group.inspect(|machine| {
            if let Some(state) = machine.state() {
                status.applied = state.applied.0;
                status.epoch = state.epoch;
                status.rings = state.rings.len() as u64;
                status.secrets = state.secrets.len() as u64;
                status.audit_seq = state.audit_seq;
                status.audit_head = state.audit_head.to_vec().into();
                status.erasures = state.erasures.len() as u64;
                status.erasing_since_ms = state.erasing_since_ms().unwrap_or_default();
            }
        });
        status
    }

    fn must_lead(&self) -> Result<Term, Refusal> {
        let leadership = *self.0.group.leadership().borrow();
        if leadership.ready { Ok(leadership.term) } else { Err(Refusal::new(Reason::NotLeader, "another voter leads")) }
    }

    async fn read_index(&self) -> Result<LogIndex, Refusal> {
        self.0.group.read_index().await.map_err(|error| match error {
            ReadError::NotLeader { .. } => Refusal::new(Reason::NotLeader, "another voter leads"),
            other => Refusal::new(Reason::Unavailable, other.to_string()),
        })
    }

    fn inspect<T>(&self, look: impl FnOnce(&State) -> Result<T, Refusal>) -> Result<T, Refusal> {
        let sealed = || Refusal::new(Reason::Sealed, "a newer build wrote to the vault: upgrade this node");
        self.0.group.inspect(|machine| look(machine.state().ok_or_else(sealed)?))
    }

    async fn propose(&self, actor: &str, change: Change) -> Outcome {
        self.propose_in(None, actor, change).await
    }

    async fn propose_in(&self, term: Option<Term>, actor: &str, change: Change) -> Outcome {
        let payload = Command::new(self.0.clock.wall().as_millis(), actor, change).to_payload();
        match self.0.group.propose(term, payload).await {
            Ok(Committed { response, .. }) => response,
            Err(ProposeError::NotLeader { .. }) => Err(Refusal::new(Reason::NotLeader, "another voter leads")),
            Err(error @ ProposeError::OutcomeUnknown) => Err(Refusal::new(Reason::OutcomeUnknown, error.to_string())),
            Err(error @ ProposeError::TooLarge { .. }) => Err(Refusal::new(Reason::Invalid, error.to_string())),
            Err(error @ ProposeError::DiskFull) => Err(Refusal::new(Reason::Exhausted, error.to_string())),
            Err(error @ (ProposeError::Stopped | ProposeError::Fenced { .. })) => {
                Err(Refusal::new(Reason::Unavailable, error.to_string()))
            }
        }
    }

    fn book(&self) -> MutexGuard<'_, LeaseBook> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Unseals as soon as that is possible, hands leadership away while it is not, and keeps the log short.
    async fn upkeep_until(self, mut erasing: EraseCare, stop: Stop) {
        let inner = &self.0;
        let mut lease = LeaseCare::default();
        let mut schedules = ScheduleCare::default();
        while stop.run_until_cancelled(sleep(UPKEEP)).await.is_some() {
            // A provider outside may take its time, and must not keep the node from stopping.
            let Some(master) = stop.run_until_cancelled(self.master()).await else { return };
            let sealed = master.is_err();
            // What an operator sealed is sealed everywhere: no other voter could do more.
            let elsewhere = inner
                .group
                .inspect(|machine| machine.state().is_none_or(|state| state.master.is_some() && state.hold.is_none()));
            let status = inner.group.status();
            metrics::vault_state(status.leadership.ready, sealed);
            if sealed
                && elsewhere
                && status.leadership.ready
                && let Some(successor) = self.unsealed_voter().await
            {
                warn!(%successor, "a sealed voter leads the vault: it hands its leadership over");
                if let Err(error) = inner.group.transfer_leader(successor).await {
                    warn!(%error, "leadership was not handed over");
                }
            }
            if !sealed {
                self.tend_lease(&mut lease, status.leadership).await;
                self.tend_schedules(&mut schedules, status.leadership).await;
                self.tend_receipt_keys(status.leadership).await;
            }
            self.tend_file(&mut erasing).await;
            self.tend_erasures(status.leadership).await;
            let readable = inner.group.inspect(|machine| machine.state().is_some());
            if readable && status.applied.0 >= status.snapshot.0 + COMPACT_EVERY {
                match inner.group.compact(COMPACT_KEEP).await {
                    Ok(index) => info!(%index, "the vault's log is compacted"),
                    Err(error) => warn!(%error, "the vault's log was not compacted"),
                }
            }
        }
    }
}

/// What one voter remembers while it looks after the leases' terms.
#[derive(Debug, Default)]
struct LeaseCare {
    /// The change that is being waited for: since when this leadership knows of it.
    waiting: Option<(Term, LogIndex, BootTime)>,
    /// The vault's terms that this node's settings were last found to differ from.
    complained: Option<LeaseTerms>,
}

impl Vault {
    /// Has the state say what this leader's settings say, and forget older terms when no lease on them can be running.
    ///
    /// Whichever node leads decides, so nodes should agree; while they do not, every wait is that of the longest lease.
    async fn tend_lease(&self, care: &mut LeaseCare, leadership: Leadership) {
        let mine = LeaseTerms::of(&self.0.config.lease);
        let state = self.inspect(|state| Ok((state.lease, state.lease_before, state.lease_changed)));
        let Ok((lease, before, changed)) = state else { return };
        if !leadership.ready {
            care.waiting = None;
            if let Some(theirs) = lease.filter(|theirs| *theirs != mine && care.complained != Some(*theirs)) {
                care.complained = Some(theirs);
                let (here, vault) = (mine.length(), theirs.length());
                warn!(
                    ?here,
                    ?vault,
                    "the vault's leader grants leases of another length: set vault.lease alike on all nodes"
                );
            }
            return;
        }
        let change = if lease != Some(mine) {
            info!(before = ?lease.map(|terms| terms.length()), now = ?mine.length(), "the vault's leases change to what vault.lease says here");
            Change::SetLease(SetLease { terms: mine })
        } else if let Some(before) = before {
            let now = self.0.clock.boot();
            // As for a revocation: nothing that an older leader granted outlives its W from this leadership's start, and
            // nothing that this one granted outlives it from the change.
            let since = match care.waiting {
                Some((term, index, since)) if (term, index) == (leadership.term, changed) => since,
                _ => now,
            };
            care.waiting = Some((leadership.term, changed, since));
            if now.0 < since.0 + before.wait() {
                return;
            }
            Change::SettleLease(SettleLease { changed: changed.0 })
        } else {
            return;
        };
        // With the term: the settings and the wait are this leadership's. What failed is done at the next look.
        if let Err(refusal) = self.propose_in(Some(leadership.term), "vault", change).await {
            warn!(%refusal, "the terms of the vault's leases are not settled yet");
        }
    }
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vault").field("node", &self.0.config.node).finish_non_exhaustive()
    }
}

fn expect_ring(done: Done) -> Result<pb::Ring, Refusal> {
    match done {
        Done::Ring(ring) => Ok(ring),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(done: &Done) -> Refusal {
    // The machine answers each command with its own kind of outcome; this is for a build that broke that.
    Refusal::new(Reason::OutcomeUnknown, format!("the vault answered something else: {done:?}"))
}

/// An id that may be left out.
fn optional<T: for<'a> TryFrom<&'a [u8]>>(bytes: &[u8], field: &'static str) -> Result<Option<T>, Refusal> {
    if bytes.is_empty() { Ok(None) } else { wire::id(bytes, field).map(Some) }
}

/// The first of `items`, and whether there are more.
fn page<T>(mut items: impl Iterator<Item = T>, limit: u32) -> (Vec<T>, bool) {
    let limit = if limit == 0 { PAGE_MAX } else { (limit as usize).min(PAGE_MAX) };
    let page = items.by_ref().take(limit).collect();
    (page, items.next().is_some())
}
