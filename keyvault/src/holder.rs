//! The keys that one node process holds, and the lease under which it may use them.
//!
//! ```text
//! ensure, create_dek ──> wants ──┐                       ┌──> table: lease, held keys, tombstones
//!                                ├─ one call at a time ──┤
//! every 0.3 L ───────> renewal ──┘  (at most 256 wants)  └──> whoever waits
//! seal, open, begin_use ──> table: usable(now)?  ──> the arena lends the key
//! surrender ──> table: dead, from now on ──> wait for the uses in progress ──> overwrite ──> answer
//! ```
//!
//! Invariants: no key is lent outside `base ≤ now < expiry`, asked of the clock at every use; a key that died is never held
//! again; a surrender is answered only when no use is in progress and the memory is overwritten. Everything fails closed.

mod dictionary;
mod renew;
mod table;
mod told;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{
    BatchError, BatchHeader, ClusterId, DekId, KeyVersion, LogIndex, NodeId, PartitionContext, RingId, SealedBytes,
    SessionId,
};
use ensign_raft::env::{Clock, Tasks};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::renew::{Ask, Want};
use self::table::{Held, Table};
pub use self::told::{RefreshError, SurrenderError};
use crate::arena::Arena;
use crate::batch::{PlainBatch, SealFailure, SealedBatch, open_batch, seal_batch};
use crate::entropy::Entropy;
use crate::error::{CallError, KeyError};
use crate::grant::ProcessKey;
use crate::lease::{Lease, LeaseConfig};
use crate::link::VaultLink;
use crate::metrics;
use crate::wire;
use crate::wrap::{DekUse, WrappedDek};

/// Remembers the highest epoch that a node has seen of its vault, from one life to the next.
pub trait EpochFloor: fmt::Debug + Send + Sync + 'static {
    /// The highest that was kept.
    fn kept(&self) -> u64;

    /// Keeps it, durably, before anything of a reply of that epoch is used. Blocking; called seldom: epochs rise with
    /// destructions.
    ///
    /// # Errors
    /// It could not be kept: the reply is not used.
    fn raise(&self, epoch: u64) -> Result<(), String>;
}

/// A floor that lasts as long as the process: for tests, and for processes whose life is a session.
#[derive(Debug, Default)]
pub struct MemoryFloor(AtomicU64);

impl EpochFloor for MemoryFloor {
    fn kept(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn raise(&self, epoch: u64) -> Result<(), String> {
        self.0.fetch_max(epoch, Ordering::Relaxed);
        Ok(())
    }
}

/// Settings of a node's holder.
#[derive(Debug, Clone)]
pub struct HolderConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeId,
    /// The longest lease that this node takes; how long it really is, the vault says.
    pub lease: LeaseConfig,
    /// How many keys may be held; above it, the longest unused give way. 100,000 take 6.4 MB.
    pub keys_max: usize,
    /// How many wants may wait; above it, callers are refused.
    pub wants_max: usize,
    /// The highest epoch that this node ever saw: a vault that was set back below it is not believed.
    pub floor: Arc<dyn EpochFloor>,
    /// Where salts come from.
    pub entropy: Entropy,
    /// A bug to find.
    #[cfg(feature = "planted-bugs")]
    pub plant: Option<Plant>,
}

/// A bug that a byte search must find.
#[cfg(feature = "planted-bugs")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// Batches get their header, and stay plaintext.
    Unsealed,
    /// No bug to find, but what encryption costs: batches are neither sealed nor opened, in the whole process.
    NullCipher,
}

impl HolderConfig {
    /// Default bounds.
    pub fn new(cluster: ClusterId, node: NodeId) -> Self {
        Self {
            cluster,
            node,
            lease: LeaseConfig::default(),
            keys_max: 100_000,
            wants_max: 4_096,
            floor: Arc::new(MemoryFloor::default()),
            entropy: Entropy::kernel(),
            #[cfg(feature = "planted-bugs")]
            plant: None,
        }
    }
}

/// The keys of this process. Clones are cheap and share them.
#[derive(Clone)]
pub struct Holder(Arc<Inner>);

struct Inner {
    config: HolderConfig,
    session: SessionId,
    process: ProcessKey,
    clock: Arc<dyn Clock>,
    link: Arc<dyn VaultLink>,
    arena: Arena,
    table: RwLock<Table>,
    wants: mpsc::Sender<Ask>,
    /// Told whenever the last use of a dead key ends.
    ended: Notify,
    /// Counts up whenever keys die.
    deaths: watch::Sender<u64>,
    /// Renew now.
    nudge: Notify,
    /// The index of the newest reply that was acted on.
    renewed: watch::Sender<LogIndex>,
    /// How long the last lease was granted for, in milliseconds.
    granted_ms: AtomicU64,
}

impl Holder {
    /// A holder without keys, and the tasks that renew its lease and overwrite keys when it ends.
    pub fn new(config: HolderConfig, link: Arc<dyn VaultLink>, clock: Arc<dyn Clock>, tasks: &Tasks) -> Self {
        #[cfg(feature = "planted-bugs")]
        if config.plant == Some(Plant::NullCipher) {
            crate::seal::plant_null_cipher();
        }
        let (wants, asks) = mpsc::channel(config.wants_max.max(1));
        let session = SessionId::from_bytes(config.entropy.array());
        let inner = Inner {
            session,
            process: ProcessKey::generate(&config.entropy),
            arena: Arena::new(config.keys_max + 1_024),
            table: RwLock::new(Table::new(Lease::new(session, config.floor.kept()), config.keys_max)),
            clock,
            link,
            wants,
            ended: Notify::new(),
            deaths: watch::Sender::new(0),
            nudge: Notify::new(),
            renewed: watch::Sender::new(LogIndex(0)),
            granted_ms: AtomicU64::new(config.lease.length.as_millis() as u64),
            config,
        };
        let holder = Self(Arc::new(inner));
        let (renewing, tidying) = (holder.clone(), holder.clone());
        tasks.spawn("key-lease", |stop| renewing.renew_until(stop, asks));
        tasks.spawn("key-expiry", |stop| tidying.expire_until(stop));
        holder
    }

    /// Has the vault make a data key for `ctx` under the active version of `ring`. It is held from then on.
    ///
    /// Commit the wrapped key before its first use: without it, nobody ever opens what was sealed.
    ///
    /// # Errors
    /// [`KeyError::Revoked`] and [`KeyError::NotGranted`] last, [`KeyError::Disabled`] until it is enabled; everything else may be
    /// retried.
    pub async fn create_dek(&self, ctx: &PartitionContext, ring: RingId) -> Result<WrappedDek, KeyError> {
        self.ask(Want::Create { ctx: *ctx, ring, usage: DekUse::Batches }).await
    }

    /// Sees to it that this node holds the key, under a lease that runs: asks the vault unless that is so already.
    ///
    /// # Errors
    /// [`KeyError::Revoked`], [`KeyError::NotGranted`] and [`KeyError::Damaged`] last, [`KeyError::Disabled`] until it is enabled;
    /// everything else may be retried.
    pub async fn ensure(&self, ctx: &PartitionContext, wrapped: &WrappedDek) -> Result<(), KeyError> {
        {
            let table = self.0.table();
            table.refuse_dead(wrapped)?;
            if table.lease.usable(self.0.clock.boot()) && table.keys.contains_key(&wrapped.dek) {
                return Ok(());
            }
        }
        self.ask(Want::Unwrap { ctx: *ctx, wrapped: wrapped.clone() }).await.map(drop)
    }

    /// Seals a batch where it lies: CPU only, some 120 µs for 256 KiB. Sets the header's key and algorithm.
    ///
    /// Hold a [`Use`] of the key until the proposal is resolved, so that no event is acknowledged under a key that this node
    /// has reported dead.
    ///
    /// # Errors
    /// [`KeyError::NoLease`] or [`KeyError::Unknown`]: `ensure`, then seal anew. [`KeyError::Revoked`]: under another key.
    pub fn seal(
        &self,
        ctx: &PartitionContext,
        dek: DekId,
        mut header: BatchHeader,
        payload: PlainBatch,
    ) -> Result<SealedBatch, KeyError> {
        let sealed = self.begin_use(dek).and_then(|using| {
            let held = &using.held;
            if held.ctx != *ctx {
                return Err(KeyError::Unsealable { cause: "the key belongs to another partition".to_owned() });
            }
            if held.wrapped.usage != DekUse::Batches {
                return Err(KeyError::Unsealable { cause: "the key is not for batches".to_owned() });
            }
            header.dek = dek;
            header.algorithm = held.wrapped.alg;
            #[cfg(feature = "planted-bugs")]
            if self.0.config.plant == Some(Plant::Unsealed) {
                return crate::batch::leave_unsealed(&header, &payload)
                    .map_err(|error| KeyError::Unsealable { cause: error.to_string() });
            }
            let sealed =
                seal_batch(&held.slot, ctx, &header, payload, &self.0.config.entropy).map_err(
                    |failure| match failure {
                        SealFailure::Gone => KeyError::NoLease,
                        SealFailure::Header(error) => KeyError::Unsealable { cause: error.to_string() },
                    },
                )?;
            held.count(sealed.bytes().len() as u64);
            Ok(sealed)
        });
        metrics::sealed(sealed.as_ref().map(|sealed| sealed.bytes().len()));
        sealed
    }

    /// Opens a batch that is expected at `ctx`. Ask [`Holder::usable`] once more right before its events are handed to the
    /// transport. What is opened is a [`Use`] of the key by itself, until it is dropped; hold another one for copies of it.
    ///
    /// # Errors
    /// [`KeyError::Unknown`] or [`KeyError::NoLease`]: `ensure`, then open again. [`KeyError::Revoked`]: never again.
    /// [`KeyError::Damaged`]: this replica is damaged; ask another.
    pub fn open(&self, ctx: &PartitionContext, batch: &Bytes) -> Result<PlainBatch, KeyError> {
        let opened = self.open_inner(ctx, batch);
        metrics::opened(opened.as_ref().map(|_| batch.len()));
        opened
    }

    fn open_inner(&self, ctx: &PartitionContext, batch: &Bytes) -> Result<PlainBatch, KeyError> {
        let sealed = SealedBytes::parse(batch.clone()).map_err(|error| match error {
            BatchError::UnknownFormat { .. } | BatchError::UnknownAlgorithm { .. } => KeyError::Newer(error),
            BatchError::Truncated { .. } | BatchError::Trailing { .. } | BatchError::Invalid { .. } => {
                KeyError::Damaged
            }
        })?;
        let using = self.begin_use(sealed.header().dek)?;
        let held = &using.held;
        if held.ctx != *ctx || held.wrapped.alg != sealed.header().algorithm {
            return Err(KeyError::Damaged);
        }
        let opened = open_batch(&held.slot, ctx, &sealed);
        // It may have died meanwhile, which is the reason to give, whatever came of it.
        using.check()?;
        match opened {
            None => Err(KeyError::NoLease),
            Some(Err(_)) => Err(KeyError::Damaged),
            Some(Ok(plain)) => Ok(plain.guard(using)),
        }
    }

    /// Whether the key may be used now.
    pub fn usable(&self, dek: DekId) -> bool {
        self.0.table().usable(dek, self.0.clock.boot()).is_ok()
    }

    /// Whether it is time to move to another key: its ring has a newer version, or it has sealed 90 % of what one key may.
    pub fn should_roll_over(&self, dek: DekId) -> bool {
        let table = self.0.table();
        table.keys.get(&dek).is_some_and(|held| {
            let newest = table.active.get(&held.wrapped.ring).copied().unwrap_or_default();
            newest > held.wrapped.version || held.is_worn(self.0.clock.wall())
        })
    }

    /// Begins a use of the key: a surrender waits until it is dropped, for at most two seconds before it asks it to end.
    ///
    /// # Errors
    /// [`KeyError::NoLease`], [`KeyError::Unknown`], [`KeyError::Revoked`]: as for [`Holder::open`].
    pub fn begin_use(&self, dek: DekId) -> Result<Use, KeyError> {
        // The use is counted under the lock, so a surrender, which takes it to mark the key dead, sees it or prevents it.
        let table = self.0.table();
        let now = self.0.clock.boot();
        let held = table.usable(dek, now)?;
        held.begin(now);
        Ok(Use { held: Arc::clone(held), holder: self.clone() })
    }

    /// Counts up whenever keys die, are disabled or enabled, held here or not, so that idle streams notice.
    pub fn deaths(&self) -> watch::Receiver<u64> {
        self.0.deaths.subscribe()
    }

    /// Refuses a ring that this process knows to be revoked or disabled as a whole: nothing is sealed or opened under it, for ever or
    /// until it is enabled.
    ///
    /// # Errors
    /// [`KeyError::Revoked`], [`KeyError::Disabled`].
    pub fn refuse_ring(&self, ring: RingId) -> Result<(), KeyError> {
        self.0.table().refuse_ring(ring)
    }

    /// The name of this process's life.
    pub fn session(&self) -> SessionId {
        self.0.session
    }

    /// How long the lease still runs; `None` when it does not.
    pub fn lease_left(&self) -> Option<Duration> {
        let (table, now) = (self.0.table(), self.0.clock.boot());
        table.lease.usable(now).then(|| table.lease.expiry().0.saturating_sub(now.0))
    }

    /// The highest epoch seen: what the next life of this node passes as its floor.
    pub fn floor(&self) -> u64 {
        self.0.table().lease.floor()
    }

    /// How many keys are held.
    pub fn held(&self) -> usize {
        self.0.table().keys.len()
    }

    /// A clean stop: overwrites all keys, then tells the vault that this session holds none. Best effort; the lease ends anyway.
    pub async fn release(&self) {
        {
            let mut table = self.0.table_mut();
            // A renewal may be on its way back: it must not give this session a lease that the vault has forgotten.
            table.released = true;
            table.drop_all(true);
        }
        let request = pb::Request {
            actor: format!("node {}", self.0.config.node),
            call: Some(pb::request::Call::Release(pb::ReleaseRequest {
                session: wire::bytes(self.0.session.as_bytes()),
            })),
        };
        // Nobody needs the outcome: an unreleased session costs the next revoke a wait, and nothing else.
        let _ = timeout(self.lease_config().call_deadline(), self.0.link.call(request)).await;
    }

    /// The settings, with the length of the lease that was really granted: renewals must fit into that one.
    fn lease_config(&self) -> LeaseConfig {
        let granted = Duration::from_millis(self.0.granted_ms.load(Ordering::Relaxed));
        LeaseConfig { length: granted.min(self.0.config.lease.length), ..self.0.config.lease }
    }

    async fn ask(&self, want: Want) -> Result<WrappedDek, KeyError> {
        let (reply, outcome) = oneshot::channel();
        let deadline = Instant::now() + self.lease_config().length / 2;
        let ask = Ask { want, deadline, reply };
        self.0.wants.try_send(ask).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => KeyError::Busy { cause: "too many keys are being asked for" },
            mpsc::error::TrySendError::Closed(_) => KeyError::NoLease,
        })?;
        // The task drops what waits when the node stops.
        outcome.await.unwrap_or(Err(KeyError::NoLease))
    }

    /// Overwrites keys soon after the lease ended. Only tidies up: every use asks the clock itself.
    async fn expire_until(self, stop: ensign_raft::env::Stop) {
        while stop.run_until_cancelled(tokio::time::sleep(self.lease_config().length / 20)).await.is_some() {
            self.expire();
        }
    }

    /// Overwrites all keys if the lease has ended.
    fn expire(&self) {
        let expired = {
            let mut table = self.0.table_mut();
            let expired = !table.lease.usable(self.0.clock.boot()) && !table.keys.is_empty();
            if expired {
                table.drop_all(true);
            }
            expired
        };
        if expired {
            metrics::lease_lost();
            tracing::warn!("the lease on this node's keys ended before the vault renewed it: keys are overwritten");
            self.0.deaths.send_modify(|count| *count += 1);
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").field("session", &self.0.session).field("held", &self.held()).finish_non_exhaustive()
    }
}

impl Inner {
    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    async fn uses_ended(&self, dying: &[Arc<Held>]) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Registered before the look, so that an end in between is not missed.
            ended.as_mut().enable();
            if dying.iter().all(|held| !held.in_use()) {
                return;
            }
            ended.await;
        }
    }
}

/// A use of a key in progress.
pub struct Use {
    held: Arc<Held>,
    holder: Holder,
}

impl Use {
    /// The key in use.
    pub fn dek(&self) -> DekId {
        self.held.wrapped.dek
    }

    /// The version that it dies with.
    pub fn version(&self) -> (RingId, KeyVersion) {
        (self.held.wrapped.ring, self.held.wrapped.version)
    }

    /// Whether the key may still be used.
    pub fn is_live(&self) -> bool {
        self.check().is_ok()
    }

    /// Whether the key may still be used, and why not: ask right before bytes are handed over.
    ///
    /// # Errors
    /// As for [`Holder::begin_use`].
    pub fn check(&self) -> Result<(), KeyError> {
        let table = self.holder.0.table();
        match table.usable(self.dek(), self.holder.0.clock.boot()) {
            // Taken away meanwhile; by whom, its version knows.
            Err(KeyError::Unknown { .. }) => table.refuse_dead(&self.held.wrapped)?,
            usable => return usable.map(drop),
        }
        Err(KeyError::Unknown { dek: self.dek() })
    }

    /// Cancelled when a surrender has waited long enough: reset the stream and drop this, now.
    pub fn severed(&self) -> &CancellationToken {
        &self.held.severed
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        if self.held.end() {
            self.holder.0.ended.notify_waiters();
        }
    }
}

impl fmt::Debug for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Use").field(&self.dek()).finish()
    }
}

/// The vault's answer to a call, or why there is none.
pub(crate) fn reply_result(reply: pb::Reply) -> Result<pb::reply::Result, CallError> {
    match reply.result {
        Some(pb::reply::Result::Refusal(refusal)) => Err(CallError::Refused(refusal.into())),
        Some(result) => Ok(result),
        None => Err(CallError::Malformed { what: "it is empty" }),
    }
}

#[cfg(test)]
mod tests;
