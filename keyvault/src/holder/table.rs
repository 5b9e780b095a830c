//! What a holder knows: its lease, its keys, and which keys are dead for ever.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{DekId, KeyVersion, LogIndex, NodeId, PartitionContext, RingId};
use ensign_raft::env::{BootTime, UnixNanos};
use tokio_util::sync::CancellationToken;

use crate::arena::KeySlot;
use crate::error::KeyError;
use crate::lease::Lease;
use crate::link::Refusal;
use crate::wire::{self, Dead};
use crate::wrap::WrappedDek;

/// A key moves on after 90 % of 2³² seals, of 1 TiB, and of 30 days, so that its successor is there in time.
const SEALS_WORN: u64 = (1 << 32) / 10 * 9;
const BYTES_WORN: u64 = (1 << 40) / 10 * 9;
const AGE_WORN: Duration = Duration::from_hours(27 * 24);
/// How many dead data keys are remembered by name, so that their batches are refused for the right reason.
const SHREDDED_MAX: usize = 100_000;
/// How many dead versions and rings are remembered.
const TOMBSTONES_MAX: usize = 500_000;

/// In how many rings something may be remembered to be disabled.
const SWITCHED_MAX: usize = 200_000;

/// All that is disabled of a ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Switched {
    ring: RingId,
    all: bool,
    versions: BTreeSet<KeyVersion>,
    /// Of the vault's state that says so.
    index: LogIndex,
}

impl Switched {
    pub(super) fn parse(wire: &pb::Switched) -> Result<Self, Refusal> {
        Ok(Self {
            ring: wire::id(&wire.ring, "ring")?,
            all: wire.all,
            versions: wire.versions.iter().copied().map(KeyVersion).collect(),
            index: LogIndex(wire.index),
        })
    }

    fn covers(&self, version: KeyVersion) -> bool {
        self.all || self.versions.contains(&version)
    }
}

/// A key in memory.
pub(super) struct Held {
    pub(super) wrapped: WrappedDek,
    pub(super) ctx: PartitionContext,
    pub(super) slot: KeySlot,
    pub(super) severed: CancellationToken,
    uses: AtomicUsize,
    /// Out of the table: the end of its last use overwrites it.
    dead: AtomicBool,
    /// When it was made, in Unix milliseconds.
    made_ms: u64,
    seals: AtomicU64,
    bytes: AtomicU64,
    last_used: AtomicU64,
}

impl Held {
    /// A key that was just made counts from now. What an older one's name says is the vault's clock, which may be wrong; taken
    /// at its word, a new key could be worn at once, and its successor as well.
    pub(super) fn new(
        wrapped: WrappedDek,
        ctx: PartitionContext,
        slot: KeySlot,
        now: BootTime,
        made: Option<UnixNanos>,
    ) -> Self {
        let named = || wrapped.dek.as_bytes()[..6].iter().fold(0, |ms, byte| ms << 8 | u64::from(*byte));
        Self {
            made_ms: made.map_or_else(named, UnixNanos::as_millis),
            wrapped,
            ctx,
            slot,
            severed: CancellationToken::new(),
            uses: AtomicUsize::new(0),
            dead: AtomicBool::new(false),
            seals: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            last_used: AtomicU64::new(now.0.as_millis() as u64),
        }
    }

    pub(super) fn begin(&self, now: BootTime) {
        self.uses.fetch_add(1, Ordering::SeqCst);
        self.last_used.store(now.0.as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether this was the last use. If the key died meanwhile, it is overwritten.
    pub(super) fn end(&self) -> bool {
        let last = self.uses.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.dead.load(Ordering::SeqCst) {
            self.slot.wipe();
        }
        last
    }

    /// Overwrites the key now, or when its last use ends. Only for keys that are out of the table, so that no use begins.
    fn die(&self) {
        // Marked before the look at the uses: whoever ends the last one either sees the mark or is seen here.
        self.dead.store(true, Ordering::SeqCst);
        if !self.in_use() {
            self.slot.wipe();
        }
    }

    pub(super) fn in_use(&self) -> bool {
        self.uses.load(Ordering::SeqCst) > 0
    }

    pub(super) fn count(&self, bytes: u64) {
        self.seals.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn is_worn(&self, now: UnixNanos) -> bool {
        self.seals.load(Ordering::Relaxed) >= SEALS_WORN
            || self.bytes.load(Ordering::Relaxed) >= BYTES_WORN
            || now.as_millis().saturating_sub(self.made_ms) >= AGE_WORN.as_millis() as u64
    }
}

pub(super) struct Table {
    pub(super) lease: Lease,
    pub(super) keys: HashMap<DekId, Arc<Held>>,
    /// The newest version of each ring, as far as this node was told.
    pub(super) active: HashMap<RingId, KeyVersion>,
    /// Data keys that were held here and died.
    pub(super) shredded: HashMap<DekId, (RingId, KeyVersion)>,
    shredded_order: VecDeque<DekId>,
    /// Versions, and with `None` whole rings, that are dead for ever.
    tombstones: HashSet<(RingId, Option<KeyVersion>)>,
    /// What is disabled, as far as this node was told.
    switched: HashMap<RingId, Switched>,
    /// Keys that died while they were in use.
    dying: Vec<Arc<Held>>,
    keys_max: usize,
    /// The lease was given back: there is no other in this life.
    pub(super) released: bool,
}

impl Table {
    pub(super) fn new(lease: Lease, keys_max: usize) -> Self {
        Self {
            lease,
            keys: HashMap::new(),
            active: HashMap::new(),
            shredded: HashMap::new(),
            shredded_order: VecDeque::new(),
            tombstones: HashSet::new(),
            switched: HashMap::new(),
            dying: Vec::new(),
            keys_max,
            released: false,
        }
    }

    /// The key, if it may be used at `now`.
    pub(super) fn usable(&self, dek: DekId, now: BootTime) -> Result<&Arc<Held>, KeyError> {
        if let Some((ring, version)) = self.shredded.get(&dek) {
            return Err(KeyError::Revoked { ring: *ring, version: *version });
        }
        if !self.lease.usable(now) {
            return Err(KeyError::NoLease);
        }
        self.keys.get(&dek).ok_or(KeyError::Unknown { dek })
    }

    /// Refuses a key whose version is dead or disabled.
    pub(super) fn refuse_dead(&self, wrapped: &WrappedDek) -> Result<(), KeyError> {
        let (ring, version) = (wrapped.ring, wrapped.version);
        let whole = self.refuse_ring(ring);
        if self.tombstones.contains(&(ring, Some(version))) && !matches!(whole, Err(KeyError::Revoked { .. })) {
            return Err(KeyError::Revoked { ring, version });
        }
        whole?;
        let disabled = self.switched.get(&ring).is_some_and(|switched| switched.covers(version));
        if disabled { Err(KeyError::Disabled { ring, version }) } else { Ok(()) }
    }

    /// Refuses a ring that is dead or disabled as a whole.
    pub(super) fn refuse_ring(&self, ring: RingId) -> Result<(), KeyError> {
        let version = KeyVersion(0);
        if self.tombstones.contains(&(ring, None)) {
            return Err(KeyError::Revoked { ring, version });
        }
        let disabled = self.switched.get(&ring).is_some_and(|switched| switched.all);
        if disabled { Err(KeyError::Disabled { ring, version }) } else { Ok(()) }
    }

    /// Takes what is disabled out of use, until it is said to be enabled. Older news than this node has is passed over.
    pub(super) fn switch(&mut self, news: &Switched) {
        let newer = |known: &Switched| known.index > news.index;
        if news.index < self.lease.acted() || self.switched.get(&news.ring).is_some_and(newer) {
            return;
        }
        self.kill_where(false, |held| held.wrapped.ring == news.ring && news.covers(held.wrapped.version));
        if !news.all && news.versions.is_empty() {
            self.switched.remove(&news.ring);
        } else if self.switched.len() < SWITCHED_MAX || self.switched.contains_key(&news.ring) {
            self.switched.insert(news.ring, news.clone());
        }
    }

    /// Takes keys out of use, for ever where their version died.
    pub(super) fn kill(&mut self, dead: &[Dead], me: NodeId) {
        for dead in dead {
            match *dead {
                Dead::Version(ring, version) => {
                    self.bury((ring, Some(version)));
                    self.kill_where(true, |held| held.wrapped.ring == ring && held.wrapped.version == version);
                }
                Dead::Ring(ring) => {
                    self.bury((ring, None));
                    self.kill_where(true, |held| held.wrapped.ring == ring);
                }
                // Custody may come back, so this leaves no tombstone.
                Dead::Custody(node, ctx) if node == me => self.kill_where(false, |held| held.ctx == ctx),
                Dead::Custody(..) => {}
            }
        }
    }

    /// Remembers the dead. Beyond its bound this saves a call no more, but loses nothing: the vault refuses them, and replies
    /// from before their death are ignored.
    fn bury(&mut self, which: (RingId, Option<KeyVersion>)) {
        if self.tombstones.len() < TOMBSTONES_MAX {
            self.tombstones.insert(which);
        }
    }

    fn kill_where(&mut self, shred: bool, dies: impl Fn(&Held) -> bool) {
        let doomed: Vec<Arc<Held>> = self.keys.extract_if(|_, held| dies(held)).map(|(_, held)| held).collect();
        for held in doomed {
            if shred {
                self.remember_shredded(&held.wrapped);
            }
            held.die();
            self.dying.push(held);
        }
        self.dying.retain(|held| held.in_use());
    }

    fn remember_shredded(&mut self, wrapped: &WrappedDek) {
        if self.shredded.insert(wrapped.dek, (wrapped.ring, wrapped.version)).is_none() {
            self.shredded_order.push_back(wrapped.dek);
        }
        if self.shredded_order.len() > SHREDDED_MAX
            && let Some(oldest) = self.shredded_order.pop_front()
        {
            self.shredded.remove(&oldest);
        }
    }

    /// Every key that died and may still be in use.
    pub(super) fn dying(&mut self) -> Vec<Arc<Held>> {
        self.dying.retain(|held| held.in_use());
        self.dying.clone()
    }

    /// Drops all keys and what is known to be disabled: the vault says anew what is.
    pub(super) fn start_over(&mut self) {
        self.switched.clear();
        self.drop_all(false);
    }

    /// Drops all keys. With `wipe`, also from under uses in progress: their lease is over.
    pub(super) fn drop_all(&mut self, wipe: bool) {
        for (_, held) in self.keys.drain() {
            held.die();
            if wipe {
                held.slot.wipe();
            }
            self.dying.push(held);
        }
        self.dying.retain(|held| held.in_use());
        if wipe {
            self.lease.end();
        }
    }

    /// Holds a key that was just granted. The slot of a key that is dead or held already is overwritten as it drops.
    pub(super) fn install(&mut self, held: Held) -> Result<(), KeyError> {
        self.refuse_dead(&held.wrapped)?;
        if self.keys.len() >= self.keys_max {
            self.evict();
        }
        if self.keys.len() >= self.keys_max {
            return Err(KeyError::Busy { cause: "every key that may be held is in use" });
        }
        if let Entry::Vacant(vacant) = self.keys.entry(held.wrapped.dek) {
            vacant.insert(Arc::new(held));
        }
        Ok(())
    }

    /// A key of this ring was granted.
    pub(super) fn saw_active(&mut self, ring: RingId, version: KeyVersion) {
        let newest = self.active.entry(ring).or_default();
        *newest = version.max(*newest);
    }

    /// A ring was rotated; it matters where keys of it are held.
    pub(super) fn saw_rotated(&mut self, ring: RingId, version: KeyVersion) {
        if let Some(newest) = self.active.get_mut(&ring) {
            *newest = version.max(*newest);
        }
    }

    /// Gives up the sixteenth of the keys that has been unused for longest.
    fn evict(&mut self) {
        let mut idle: Vec<(u64, DekId)> = self
            .keys
            .iter()
            .filter(|(_, held)| !held.in_use())
            .map(|(dek, held)| (held.last_used.load(Ordering::Relaxed), *dek))
            .collect();
        idle.sort_unstable();
        for (_, dek) in idle.iter().take((self.keys_max / 16).max(1)) {
            self.keys.remove(dek);
        }
        let rings: HashSet<RingId> = self.keys.values().map(|held| held.wrapped.ring).collect();
        self.active.retain(|ring, _| rings.contains(ring));
    }
}
