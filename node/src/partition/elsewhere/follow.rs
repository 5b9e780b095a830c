//! The tail of a partition that this node has no replica of, shared by everyone here who reads it.
//!
//! One stream from one holder feeds it, however many read. It takes what comes at once and forgets the oldest, so a reader that is
//! slow holds up neither the stream nor the others: it fetches what is gone from here. When the holder dies, gives its replica
//! away or falls behind, another one is followed from the very next offset.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{DekId, NodeId, Offset, PartitionContext};
use ensign_raft::env::Stop;
use futures::StreamExt as _;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::DropGuard;
use tracing::{debug, error, info};

use super::chain::Chain;
use super::link::{Counting, Page, Pages, Unread};
use super::{BACK_OFF_MAX, BACK_OFF_MIN, Elsewhere};
use crate::partition::freshness::Freshness;
use crate::partition::machine::DekRow;
use crate::partition::tail::Tail;

/// How often a holder says something on a stream, if only that it lives.
pub(super) const SIGN_OF_LIFE: Duration = Duration::from_secs(3);

/// How long the silence of a holder is borne.
const SILENCE: Duration = Duration::from_secs(10);

/// How often another holder is asked whether it is ahead of the one that is followed.
const COMPARE: Duration = Duration::from_secs(10);

/// How long a holder that failed or fell behind is followed only if no other can be.
const AVOID: Duration = Duration::from_secs(30);

/// A tail that is followed, as long as somebody holds it.
pub(crate) struct Following {
    tail: Arc<Tail>,
    keys: Arc<Mutex<HashMap<DekId, Bytes>>>,
    /// Since when no holder is heard.
    lost: watch::Receiver<Option<Instant>>,
    _stop: DropGuard,
}

impl std::fmt::Debug for Following {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Following").field("high_watermark", &self.tail.high_watermark()).finish_non_exhaustive()
    }
}

impl Following {
    pub(crate) fn tail(&self) -> &Arc<Tail> {
        &self.tail
    }

    /// Since when no holder is heard; none while one is.
    pub(crate) fn lost(&self) -> watch::Receiver<Option<Instant>> {
        self.lost.clone()
    }

    /// A data key that came with the batches.
    pub(crate) fn data_key(&self, dek: DekId) -> Option<DekRow> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.get(&dek).map(|wrapped| DekRow { dek, wrapped: wrapped.clone() })
    }
}

/// The task that feeds a [`Following`].
pub(super) struct Follower {
    elsewhere: Elsewhere,
    context: PartitionContext,
    tail: Arc<Tail>,
    keys: Arc<Mutex<HashMap<DekId, Bytes>>>,
    lost: watch::Sender<Option<Instant>>,
    released: Stop,
    chain: Chain,
    avoid: HashMap<NodeId, Instant>,
    back_off: Duration,
}

impl Follower {
    pub(super) fn new(elsewhere: Elsewhere, context: PartitionContext, from: Offset) -> (Arc<Following>, Self) {
        let tail = Tail::new(Arc::clone(&elsewhere.inner.budget));
        tail.reset(from);
        let keys = Arc::<Mutex<HashMap<_, _>>>::default();
        // Until the first holder is heard, none is.
        let (lost, watched) = watch::channel(Some(Instant::now()));
        let released = Stop::new();
        let stop = released.clone().drop_guard();
        let shared = Following { tail: Arc::clone(&tail), keys: Arc::clone(&keys), lost: watched, _stop: stop };
        let (chain, avoid, back_off) = (Chain::default(), HashMap::new(), BACK_OFF_MIN);
        (Arc::new(shared), Self { elsewhere, context, tail, keys, lost, released, chain, avoid, back_off })
    }

    pub(super) async fn run(mut self, stop: Stop) {
        let released = self.released.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = released.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&mut self) {
        let topic = self.context.topic;
        loop {
            let Some(holder) = self.choose() else {
                self.pause("the catalog names no other holder").await;
                continue;
            };
            let left = match self.open(holder).await {
                Ok(pages) => self.take(holder, pages).await,
                Err(unread) => unread,
            };
            match &left {
                Unread::Trimmed { log_start } => {
                    // Everybody who wanted what is gone is told so when asking for it.
                    info!(%topic, node = %holder, %log_start, "a tail goes on at the first offset that is kept");
                    self.chain = Chain::default();
                    self.tail.reset(*log_start);
                    continue;
                }
                Unread::Unreachable { .. } => self.elsewhere.note_failed(holder),
                Unread::NotHeld | Unread::NoLeader { .. } | Unread::Damaged { .. } | Unread::Busy => {}
            }
            info!(%topic, node = %holder, why = %left, "a tail is followed at another node");
            self.lost.send_if_modified(|lost| {
                let first = lost.is_none();
                lost.get_or_insert_with(Instant::now);
                first
            });
            let others = self.untried();
            self.avoid.insert(holder, Instant::now() + AVOID);
            if others == 0 {
                self.pause("every holder was tried").await;
            }
        }
    }

    /// Other holders that have not failed lately.
    fn untried(&self) -> usize {
        let now = Instant::now();
        let holders = self.elsewhere.holders(self.context.topic);
        let tried = |node: &NodeId| self.avoid.get(node).is_some_and(|until| *until > now);
        holders.iter().filter(|node| !tried(node)).count().saturating_sub(1)
    }

    fn choose(&mut self) -> Option<NodeId> {
        let now = Instant::now();
        self.avoid.retain(|_, until| *until > now);
        let holders = self.elsewhere.holders(self.context.topic);
        // Of those to be avoided, the one that was so first.
        holders.into_iter().min_by_key(|node| self.avoid.get(node).copied())
    }

    async fn pause(&mut self, why: &str) {
        debug!(topic = %self.context.topic, why, "nobody can be followed");
        tokio::time::sleep(self.back_off).await;
        self.back_off = (self.back_off * 2).min(BACK_OFF_MAX);
    }

    async fn open(&self, holder: NodeId) -> Result<Pages, Unread> {
        let from = self.tail.high_watermark();
        let opened = self.elsewhere.inner.link.follow(holder, self.context.topic, from);
        let late = || Unread::Unreachable { cause: "it does not answer".to_owned() };
        tokio::time::timeout(super::ASK, opened).await.unwrap_or_else(|_| Err(late()))
    }

    /// Takes pages from a holder for as long as it serves; why it does not any more.
    async fn take(&mut self, holder: NodeId, mut pages: Pages) -> Unread {
        let mut compare = tokio::time::interval(COMPARE);
        compare.reset();
        // What another holder had at the last comparison.
        let mut ahead = None;
        let mut heard = Instant::now();
        let mut changes = true;
        let mut liveness = self.elsewhere.inner.liveness.changes();
        loop {
            let page = tokio::select! {
                page = tokio::time::timeout_at(heard + SILENCE, pages.next()) => match page {
                    Ok(Some(page)) => page,
                    Ok(None) => return Unread::Unreachable { cause: "its stream ended".to_owned() },
                    Err(_) => return Unread::Unreachable { cause: "it is silent".to_owned() },
                },
                changed = liveness.changed(), if changes => {
                    // It ends with the node.
                    changes = changed.is_ok();
                    if self.elsewhere.is_dead(holder) {
                        return Unread::Unreachable { cause: "its node is dead".to_owned() };
                    }
                    continue;
                }
                _ = compare.tick() => {
                    if let Some(behind) = self.behind(ahead) {
                        return behind;
                    }
                    ahead = self.look_elsewhere(holder).await;
                    continue;
                }
            };
            let taken = page.and_then(|page| self.push(page));
            if let Err(unread) = taken {
                return unread;
            }
            heard = Instant::now();
            self.back_off = BACK_OFF_MIN;
            self.elsewhere.note_answered(holder);
            self.lost.send_if_modified(|lost| lost.take().is_some());
        }
    }

    /// Whether what another holder had a while ago has still not come.
    fn behind(&self, ahead: Option<Offset>) -> Option<Unread> {
        let have = self.tail.high_watermark();
        let ahead = ahead.filter(|ahead| *ahead > have)?;
        Some(Unread::NoLeader { cause: format!("it is at offset {have}, and another node was at {ahead} a while ago") })
    }

    async fn look_elsewhere(&self, holder: NodeId) -> Option<Offset> {
        let topic = self.context.topic;
        let other = self.elsewhere.holders(topic).into_iter().find(|node| *node != holder)?;
        let link = &self.elsewhere.inner.link;
        let asked = link.stand(other, topic, Freshness::Known, Counting::Unwanted);
        let stand = tokio::time::timeout(Duration::from_secs(1), asked).await.ok()?.ok()?;
        self.elsewhere.note_known(topic, &stand);
        Some(stand.high_watermark)
    }

    fn push(&mut self, page: Page) -> Result<(), Unread> {
        {
            let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
            keys.extend(page.keys.into_iter().map(|row| (row.dek, row.wrapped)));
        }
        let from = self.tail.high_watermark();
        // Copied: a batch that stays must not keep the rest of its message in memory.
        let detached = page.batches.into_iter().map(|(index, sealed)| (index, Bytes::copy_from_slice(&sealed)));
        let accepted = self.chain.accept_all(&self.context, from, detached).map_err(|broken| {
            error!(topic = %self.context.topic, %broken, "a replica on another node does not fit what was read before");
            Unread::Damaged { what: broken.to_string() }
        })?;
        for batch in accepted {
            self.tail.push(batch);
        }
        Ok(())
    }
}
