//! Partitions that this node has no replica of: who holds them, and how those are asked.
//!
//! ```text
//! reader ─┬─ tail, shared by all readers of the partition here <── Follow ── a holder        follow.rs
//!         └─ history, page by page                             <── Fetch  ── a holder
//! publisher: who leads; queries, counters: where it stands     <── Stand  ── a holder
//! ```
//!
//! What comes is ciphertext, wrapped keys and places. Every batch is held against the one before it (chain.rs), whichever node it
//! came from, so a reader that goes on at another holder neither misses nor repeats anything.

mod chain;
mod follow;
mod link;
pub(super) mod serve;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ensign_proto::{ByteCount, NodeId, Offset, PartitionContext, TopicId};
use ensign_raft::env::Tasks;
use ensign_raft::{Liveness, PeerState};
use futures::future::BoxFuture;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;
use tracing::{debug, error};

use self::chain::Chain as ReadChain;
use self::follow::Follower;
use super::freshness::Freshness;
use super::handle::ReadError;
use super::machine::DekRow;
use super::tail::{StoredBatch, TailBudget};
use crate::catalog::{Catalog, NodeRecord};

pub(crate) use self::chain::Chain;
pub(crate) use self::follow::Following;
pub(crate) use self::link::malformed;
pub use self::link::{Counting, Page, Pages, Place, ReadLink, Stand, Unread, Wanted};

/// How long a small question may take.
const ASK: Duration = Duration::from_secs(4);

/// How long a page may take.
const FETCH: Duration = Duration::from_secs(15);

/// The largest page that is asked for; one batch may be larger.
const PAGE_BYTES: u64 = 1 << 20;

/// Pages on their way to this node at once.
const FETCHES: usize = 64;

/// How long a node that failed is asked last.
const AVOID: Duration = Duration::from_secs(5);

const BACK_OFF_MIN: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_millis(500);

/// Partitions of which something is remembered.
const KNOWN_MAX: usize = 20_000;

/// What was last heard of a partition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    pub(crate) leader: Option<NodeId>,
    pub(crate) high_watermark: Offset,
    pub(crate) entry_time_ms: u64,
    /// When it was heard.
    pub(crate) at: Instant,
}

/// The way to partitions on other nodes. Clones share it.
#[derive(Clone)]
pub(crate) struct Elsewhere {
    inner: Arc<Inner>,
}

struct Inner {
    me: NodeId,
    catalog: Catalog,
    link: Arc<dyn ReadLink>,
    liveness: Liveness,
    budget: Arc<TailBudget>,
    tasks: Tasks,
    fetches: Arc<Semaphore>,
    failed: Mutex<HashMap<NodeId, Instant>>,
    known: Mutex<HashMap<TopicId, Known>>,
    following: Mutex<HashMap<TopicId, Weak<Following>>>,
}

impl std::fmt::Debug for Elsewhere {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Elsewhere").field("node", &self.inner.me).finish_non_exhaustive()
    }
}

/// How far a node is from this one: in its zone, in its region, or anywhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Distance {
    Zone,
    Region,
    Anywhere,
}

fn distance(mine: Option<&NodeRecord>, other: Option<&NodeRecord>) -> Distance {
    let (Some(mine), Some(other)) = (mine, other) else { return Distance::Anywhere };
    match (mine.region == other.region, mine.zone == other.zone) {
        (true, true) => Distance::Zone,
        (true, false) => Distance::Region,
        (false, _) => Distance::Anywhere,
    }
}

impl Elsewhere {
    pub(super) fn new(
        me: NodeId,
        catalog: Catalog,
        link: Arc<dyn ReadLink>,
        liveness: Liveness,
        budget: Arc<TailBudget>,
        tasks: Tasks,
    ) -> Self {
        let fetches = Arc::new(Semaphore::new(FETCHES));
        let (failed, known, following) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self {
            inner: Arc::new(Inner { me, catalog, link, liveness, budget, tasks, fetches, failed, known, following }),
        }
    }

    /// The other nodes that hold a partition, the best to ask first.
    pub(crate) fn holders(&self, topic: TopicId) -> Vec<NodeId> {
        let catalog = &self.inner.catalog;
        let Some(record) = catalog.view().topic(topic) else { return Vec::new() };
        let now = Instant::now();
        let failed = self.inner.failed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut holders: Vec<_> =
            catalog.replicas_of(&record).into_iter().filter(|node| *node != self.inner.me).collect();
        // Readers of different partitions, and on different nodes, spread over equals.
        let turn = topic.as_bytes()[15] as usize + self.inner.me.0 as usize;
        let turn = turn % holders.len().max(1);
        holders.rotate_left(turn);
        let failed = |node: &NodeId| self.is_dead(*node) || failed.get(node).is_some_and(|until| *until > now);
        let mine = catalog.view().node(self.inner.me);
        let distance = |node: &NodeId| distance(mine.as_deref(), catalog.view().node(*node).as_deref());
        holders.sort_by_cached_key(|node| (failed(node), distance(node)));
        holders
    }

    /// Whether a node is known not to answer.
    fn is_dead(&self, node: NodeId) -> bool {
        self.inner.liveness.state(node) == PeerState::Dead
    }

    /// Notes that a node does not answer: others are asked first for a while.
    fn note_failed(&self, node: NodeId) {
        self.inner.failed.lock().unwrap_or_else(PoisonError::into_inner).insert(node, Instant::now() + AVOID);
    }

    fn note_answered(&self, node: NodeId) {
        self.inner.failed.lock().unwrap_or_else(PoisonError::into_inner).remove(&node);
    }

    /// What was last heard of a partition.
    pub(crate) fn known(&self, topic: TopicId) -> Option<Known> {
        self.inner.known.lock().unwrap_or_else(PoisonError::into_inner).get(&topic).copied()
    }

    fn note_known(&self, topic: TopicId, stand: &Stand) {
        let mut known = self.inner.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KNOWN_MAX && !known.contains_key(&topic) {
            let newest = Instant::now();
            known.retain(|_, known| newest.duration_since(known.at) < Duration::from_mins(1));
        }
        let before = known.get(&topic).copied();
        let latest = Known {
            leader: stand.leader,
            high_watermark: before.map_or(stand.high_watermark, |it| it.high_watermark.max(stand.high_watermark)),
            entry_time_ms: before.map_or(stand.entry_time_ms, |it| it.entry_time_ms.max(stand.entry_time_ms)),
            at: Instant::now(),
        };
        known.insert(topic, latest);
    }

    /// Notes who leads, or that it is not known any more.
    pub(crate) fn note_leader(&self, topic: TopicId, leader: Option<NodeId>) {
        if let Some(known) = self.inner.known.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&topic) {
            known.leader = leader;
        }
    }

    /// Where the partition stands on one of the nodes that hold it.
    pub(crate) async fn stand(
        &self,
        topic: TopicId,
        freshness: Freshness,
        counting: Counting,
        patience: Duration,
    ) -> Result<Stand, ReadError> {
        let link = Arc::clone(&self.inner.link);
        let ask = move |holder| link.stand(holder, topic, freshness, counting);
        let stand = self.ask(topic, patience, ASK, ask).await?;
        self.note_known(topic, &stand);
        Ok(stand)
    }

    /// The offset of a place.
    pub(crate) async fn locate(&self, topic: TopicId, place: Place, patience: Duration) -> Result<Offset, ReadError> {
        let link = Arc::clone(&self.inner.link);
        self.ask(topic, patience, FETCH, move |holder| link.locate(holder, topic, place)).await
    }

    /// Batches from `from` on, at least one; `chain` goes past them. The keys that they need are put to `keys`.
    pub(crate) async fn fetch(
        &self,
        context: &PartitionContext,
        from: Offset,
        limit: ByteCount,
        chain: &mut ReadChain,
        keys: &mut Vec<DekRow>,
        patience: Duration,
    ) -> Result<Vec<StoredBatch>, ReadError> {
        let topic = context.topic;
        let wanted = Wanted { from, bytes: limit.0.min(PAGE_BYTES), after: chain.before(from) };
        let (before, context) = (chain.clone(), *context);
        let this = self.clone();
        let ask = move |holder| {
            let (this, mut chain) = (this.clone(), before.clone());
            Box::pin(async move {
                let page = this.fetch_once(holder, topic, wanted).await?;
                if page.batches.is_empty() {
                    // It has not got that far itself.
                    let cause = format!("it has nothing from offset {from} on, only up to {}", page.high_watermark);
                    return Err(Unread::NoLeader { cause });
                }
                let batches = chain.accept_all(&context, from, page.batches).map_err(|broken| {
                    error!(%topic, node = %holder, %broken, "a replica on another node does not fit what was read before");
                    Unread::Damaged { what: broken.to_string() }
                })?;
                Ok((batches, page.keys, chain))
            }) as BoxFuture<'static, _>
        };
        let (batches, new_keys, after) = self.ask(topic, patience, FETCH, ask).await?;
        *chain = after;
        keys.extend(new_keys);
        Ok(batches)
    }

    /// In a task of its own, so that the page is taken from the connection even if whoever wanted it waits for a slow client: what
    /// lies in a connection holds up everything else that comes over it.
    async fn fetch_once(&self, holder: NodeId, topic: TopicId, wanted: Wanted) -> Result<Page, Unread> {
        let stopping = || Unread::Unreachable { cause: "this node is stopping".to_owned() };
        let turn = Arc::clone(&self.inner.fetches).acquire_owned().await.map_err(|_| stopping())?;
        let (sender, page) = oneshot::channel();
        let link = Arc::clone(&self.inner.link);
        self.inner.tasks.spawn("fetch", move |stop| async move {
            let fetched = tokio::time::timeout(FETCH, link.fetch(holder, topic, wanted));
            let Some(fetched) = stop.run_until_cancelled(fetched).await else { return };
            drop(turn);
            let late = || Unread::Unreachable { cause: "it does not answer".to_owned() };
            // Whoever wanted it may be gone.
            let _ = sender.send(fetched.unwrap_or_else(|_| Err(late())));
        });
        page.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Asks the nodes that hold a partition, one after another and again, until one answers or patience ends.
    async fn ask<T>(
        &self,
        topic: TopicId,
        patience: Duration,
        each: Duration,
        call: impl Fn(NodeId) -> BoxFuture<'static, Result<T, Unread>>,
    ) -> Result<T, ReadError> {
        let deadline = Instant::now() + patience;
        let mut back_off = BACK_OFF_MIN;
        let mut cause = "the catalog names none".to_owned();
        loop {
            let mut damaged = 0;
            let holders = self.holders(topic);
            for holder in &holders {
                let until = deadline.min(Instant::now() + each);
                let late = || Unread::Unreachable { cause: "it does not answer".to_owned() };
                let answer = tokio::time::timeout_at(until, call(*holder)).await.unwrap_or_else(|_| Err(late()));
                let unread = match answer {
                    Ok(answer) => {
                        self.note_answered(*holder);
                        return Ok(answer);
                    }
                    Err(Unread::Trimmed { log_start }) => return Err(ReadError::Trimmed { log_start }),
                    Err(unread) => unread,
                };
                debug!(%topic, node = %holder, %unread, "a read is not answered");
                cause = format!("node {holder}: {unread}");
                match unread {
                    Unread::Unreachable { .. } => self.note_failed(*holder),
                    Unread::Damaged { .. } => damaged += 1,
                    Unread::NotHeld | Unread::Trimmed { .. } | Unread::NoLeader { .. } | Unread::Busy => {}
                }
                if Instant::now() >= deadline {
                    return Err(ReadError::Unreachable { cause });
                }
            }
            if damaged > 0 && damaged == holders.len() {
                return Err(ReadError::Corrupt { what: cause });
            }
            if Instant::now() + back_off >= deadline {
                return Err(ReadError::Unreachable { cause });
            }
            tokio::time::sleep(back_off).await;
            back_off = (back_off * 2).min(BACK_OFF_MAX);
        }
    }

    /// The tail of a partition, followed from `from` on unless somebody here follows it already.
    pub(crate) fn follow(&self, context: PartitionContext, from: Offset) -> Arc<Following> {
        let mut following = self.inner.following.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = following.get(&context.topic).and_then(Weak::upgrade) {
            return shared;
        }
        // Of those that nobody follows any more, nothing but their names is left.
        following.retain(|_, shared| shared.strong_count() > 0);
        let (shared, follower) = Follower::new(self.clone(), context, from);
        following.insert(context.topic, Arc::downgrade(&shared));
        self.inner.tasks.spawn("follow", move |stop| follower.run(stop));
        shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_are_those_of_the_same_zone_then_of_the_same_region() {
        let node = |region: &str, zone: &str| NodeRecord {
            region: region.to_owned(),
            zone: zone.to_owned(),
            ..NodeRecord::default()
        };
        let mine = node("north", "a");
        let far = |other: &NodeRecord| distance(Some(&mine), Some(other));
        assert_eq!(far(&node("north", "a")), Distance::Zone);
        assert_eq!(far(&node("north", "b")), Distance::Region);
        // Zones are named within their regions.
        assert_eq!(far(&node("south", "a")), Distance::Anywhere);
        assert_eq!(distance(Some(&mine), None), Distance::Anywhere);
        assert!(Distance::Zone < Distance::Region && Distance::Region < Distance::Anywhere);
    }
}
