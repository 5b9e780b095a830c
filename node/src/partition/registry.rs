//! Which partitions run on this node: those of the catalog's topics, started and stopped as it says.
//!
//! A topic that is being destroyed, or that the catalog does not know any more, is stopped and its log removed. Every node does so
//! by itself whenever it looks, also after a restart, so a crash in between costs nothing but time. So is one whose replicas
//! were moved to other nodes.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use ensign_proto::{ByteCount, ClusterId, GroupId, NodeId, Offset, PartitionContext, ProjectId, RingId, TopicId};
use ensign_raft::env::{Clock, Rng, Stop, Tasks};
use ensign_raft::{GroupSpec, Mode, Runtime, StartError};
use ensign_storage::NodeLog;
use futures::{FutureExt as _, StreamExt as _};
use thiserror::Error;
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use super::batcher::{Admission, BatchLimits, BatcherParts, Crowd};
use super::elsewhere::{Counting, Elsewhere, ReadLink};
use super::freshness::Freshness;
use super::handle::{BarrierLink, PartitionHandle, Parts};
use super::keys::Keys;
use super::machine::PartitionMachine;
use super::reach::Reach;
use super::route::ForwardLink;
use super::tail::{Tail, TailBudget};
use crate::catalog::{Catalog, Topic, TopicState, TopicsSeen};

mod held;

/// How long a topic is seen as being deleted before it is gone: long enough for streams to learn of it.
const DELETING_FOR: Duration = Duration::from_secs(2);
/// Partitions that are started or stopped at once. Each waits for the disk and for its peers, and they share both.
const SETTLING_MAX: usize = 64;
/// How often every topic is looked at although nothing seems to have changed.
const LOOK_AT_ALL_EVERY: Duration = Duration::from_secs(30);

/// How long the ends of topics on other nodes are asked for, and how many at once.
const ENDS: Duration = Duration::from_secs(2);
const ENDS_AT_ONCE: usize = 64;

/// Why a topic's partition cannot be used on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum NotServed {
    /// It does not run here, or not yet: try again.
    #[error("the topic is not served by this node yet")]
    NotYet,
    /// Its replica here does not start: ask another node. This node's log says why.
    #[error("this replica of the topic is damaged; please ask another node")]
    Damaged,
}

/// What the partitions of a node need.
pub struct PartitionsParts {
    /// This node.
    pub me: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Runs the groups.
    pub runtime: Runtime,
    /// Holds their logs.
    pub log: Arc<dyn NodeLog>,
    /// Says which topics there are.
    pub catalog: Catalog,
    /// Seals and opens.
    pub keys: Arc<dyn Keys>,
    /// The way to leaders on other nodes.
    pub forward: Arc<dyn ForwardLink>,
    /// The way to what they have committed.
    pub barrier: Arc<dyn BarrierLink>,
    /// The way to replicas on other nodes.
    pub reads: Arc<dyn ReadLink>,
    /// For commit times.
    pub clock: Arc<dyn Clock>,
    /// For producer sessions.
    pub rng: Arc<dyn Rng>,
    /// Owner of the partitions' tasks.
    pub tasks: Tasks,
    /// Bounds of the batchers.
    pub limits: BatchLimits,
    /// Memory for the tails of all partitions.
    pub tail_bytes: ByteCount,
}

/// The partitions of this node. Clones share them.
#[derive(Clone)]
pub struct Partitions {
    inner: Arc<Inner>,
}

struct Inner {
    parts: PartitionsParts,
    budget: Arc<TailBudget>,
    crowd: Crowd,
    elsewhere: Elsewhere,
    running: RwLock<HashMap<TopicId, Running>>,
    /// Topics whose replica here does not start.
    damaged: RwLock<BTreeSet<TopicId>>,
    /// Destroyed topics that a task is about to make an end of in the catalog.
    finishing: Mutex<BTreeSet<TopicId>>,
    changes: watch::Sender<u64>,
    /// A majority confirmed, since this process began, that the catalog is at least as this node knows it.
    confirmed: AtomicBool,
    /// It was said that the catalog could not be read.
    unread: AtomicBool,
}

struct Running {
    group: GroupId,
    handle: PartitionHandle,
    admission: watch::Sender<Admission>,
    ring: watch::Sender<RingId>,
    tasks: Tasks,
}

impl std::fmt::Debug for Partitions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Partitions").field("node", &self.inner.parts.me).finish_non_exhaustive()
    }
}

impl Partitions {
    /// Follows the catalog from now on.
    pub fn start(parts: PartitionsParts) -> Self {
        let partition = ByteCount((parts.tail_bytes.0 / 8).max(1 << 20));
        let budget = TailBudget::new(parts.tail_bytes, partition);
        let tasks = parts.tasks.clone();
        let (catalog, reads) = (parts.catalog.clone(), Arc::clone(&parts.reads));
        let liveness = parts.runtime.liveness();
        let elsewhere = Elsewhere::new(parts.me, catalog, reads, liveness, Arc::clone(&budget), tasks.clone());
        let inner = Inner {
            parts,
            budget,
            crowd: Crowd::default(),
            elsewhere,
            running: RwLock::default(),
            damaged: RwLock::default(),
            finishing: Mutex::default(),
            changes: watch::Sender::new(0),
            confirmed: AtomicBool::new(false),
            unread: AtomicBool::new(false),
        };
        let partitions = Self { inner: Arc::new(inner) };
        let follower = partitions.clone();
        tasks.spawn("partitions", |stop| follower.follow(stop));
        partitions
    }

    /// The partition of a topic, if it runs here.
    pub fn get(&self, topic: TopicId) -> Option<PartitionHandle> {
        let running = self.inner.running.read().unwrap_or_else(PoisonError::into_inner);
        running.get(&topic).map(|running| running.handle.clone()).filter(|handle| !handle.is_stopped())
    }

    /// The partition of a topic, here or elsewhere. Waits for one that is about to run here.
    ///
    /// # Errors
    /// See [`NotServed`].
    pub async fn reach(&self, topic: TopicId, patience: Duration) -> Result<Reach, NotServed> {
        let found = match self.get(topic) {
            Some(handle) => Some(handle),
            None if self.is_elsewhere(topic) => None,
            None => match self.wait_for(topic, patience).await {
                Ok(handle) => Some(handle),
                // It is late here; that it is held elsewhere is as good.
                Err(NotServed::NotYet) if !self.inner.elsewhere.holders(topic).is_empty() => None,
                Err(error) => return Err(error),
            },
        };
        let context = if let Some(handle) = &found {
            *handle.context()
        } else {
            let topic = self.inner.parts.catalog.view().topic(topic).ok_or(NotServed::NotYet)?;
            self.context(&topic)
        };
        Ok(Reach::new(context, found, self.clone()))
    }

    /// The offset after a topic's last event, as far as this node knows: asks around for those that it has no replica of.
    pub async fn ends(&self, topics: &[Arc<Topic>]) -> HashMap<TopicId, Offset> {
        let away = topics.iter().filter(|topic| self.get(topic.id).is_none() && self.is_elsewhere(topic.id));
        let away: Vec<TopicId> = away.map(|topic| topic.id).collect();
        let ask = |topic| self.inner.elsewhere.stand(topic, Freshness::Known, Counting::Unwanted, ENDS);
        // Who does not answer in time leaves what was known before.
        futures::stream::iter(away).map(ask).buffer_unordered(ENDS_AT_ONCE).for_each(|_| async {}).await;
        let end = |topic: TopicId| match self.get(topic) {
            Some(handle) => Some(handle.high_watermark()),
            None => self.inner.elsewhere.known(topic).map(|known| known.high_watermark),
        };
        topics.iter().filter_map(|topic| Some((topic.id, end(topic.id)?))).collect()
    }

    /// Whether the catalog knows the topic and names this node among those that hold it.
    pub(super) fn belongs_here(&self, topic: TopicId) -> bool {
        let catalog = &self.inner.parts.catalog;
        catalog.view().topic(topic).is_some_and(|topic| catalog.replicas_of(&topic).contains(&self.inner.parts.me))
    }

    fn is_elsewhere(&self, topic: TopicId) -> bool {
        self.inner.parts.catalog.view().topic(topic).is_some() && !self.belongs_here(topic)
    }

    fn context(&self, topic: &Topic) -> PartitionContext {
        PartitionContext {
            cluster: self.inner.parts.cluster,
            project: topic.project,
            topic: topic.id,
            partition: topic.partition,
        }
    }

    /// This node.
    pub(super) fn node(&self) -> NodeId {
        self.inner.parts.me
    }

    pub(super) fn catalog(&self) -> &Catalog {
        &self.inner.parts.catalog
    }

    /// The way to partitions that this node has no replica of.
    pub(super) fn elsewhere(&self) -> &Elsewhere {
        &self.inner.elsewhere
    }

    /// How many topics have a replica here that does not start.
    pub fn damaged(&self) -> usize {
        self.inner.damaged.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The partition of a topic, once it runs here: a topic's group starts a moment after the topic is made.
    ///
    /// # Errors
    /// See [`NotServed`].
    pub async fn wait_for(&self, topic: TopicId, patience: Duration) -> Result<PartitionHandle, NotServed> {
        let mut changes = self.inner.changes.subscribe();
        let found = async {
            loop {
                changes.mark_unchanged();
                if let Some(handle) = self.get(topic) {
                    return Ok(handle);
                }
                if self.inner.damaged.read().unwrap_or_else(PoisonError::into_inner).contains(&topic) {
                    return Err(NotServed::Damaged);
                }
                changes.changed().await.map_err(|_| NotServed::NotYet)?;
            }
        };
        tokio::time::timeout(patience, found).await.unwrap_or(Err(NotServed::NotYet))
    }

    /// The keys of all partitions.
    pub(crate) fn keys(&self) -> &dyn Keys {
        &*self.inner.parts.keys
    }

    /// The way to leaders on other nodes.
    pub(crate) fn forward(&self) -> Arc<dyn ForwardLink> {
        Arc::clone(&self.inner.parts.forward)
    }

    /// Bytes of events in the partitions that this node leads, by project.
    pub fn stored_by_project(&self) -> HashMap<ProjectId, u64> {
        let running = self.inner.running.read().unwrap_or_else(PoisonError::into_inner);
        let mut stored = HashMap::new();
        for handle in running.values().map(|running| &running.handle) {
            if handle.leadership().borrow().ready {
                *stored.entry(handle.project()).or_default() += handle.stored_bytes();
            }
        }
        stored
    }

    /// This node.
    pub(super) fn me(&self) -> NodeId {
        self.inner.parts.me
    }

    /// What runs the groups of this node.
    pub(super) fn runtime(&self) -> &Runtime {
        &self.inner.parts.runtime
    }

    /// Whether the topic's partition has a data key under the ring, and so may hold events that are sealed under it; none if it does not
    /// run here.
    pub fn holds_under(&self, topic: TopicId, ring: RingId) -> Option<bool> {
        Some(self.get(topic)?.has_key_under(ring))
    }

    /// How many partitions run here.
    pub fn count(&self) -> usize {
        self.inner.running.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    async fn follow(self, stop: Stop) {
        let view = self.inner.parts.catalog.view().clone();
        let mut changes = view.changes();
        let mut swept = false;
        let mut seen = TopicsSeen::default();
        // Topics that are to be looked at again although nothing changes.
        let mut unsettled = BTreeSet::new();
        loop {
            changes.mark_unchanged();
            let (now, changed) = view.changed_topics(seen);
            seen = now;
            unsettled = match changed {
                Some(changed) => {
                    unsettled.extend(changed);
                    self.settle_all(unsettled, &stop).await
                }
                None => self.reconcile(&stop).await,
            };
            if !swept {
                swept = self.sweep(&stop).await;
            }
            // What failed is tried again even if nothing changes.
            let complete = unsettled.is_empty() && swept;
            let patience = if complete { LOOK_AT_ALL_EVERY } else { Duration::from_millis(500) };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(patience) => if complete { seen = TopicsSeen::default() },
            }
        }
    }

    /// Makes what runs match what the catalog says of every topic. Answers what is to be looked at again.
    async fn reconcile(&self, stop: &Stop) -> BTreeSet<TopicId> {
        let mut topics: BTreeSet<TopicId> =
            self.inner.parts.catalog.view().all_topics().iter().map(|topic| topic.id).collect();
        topics.extend(self.inner.running.read().unwrap_or_else(PoisonError::into_inner).keys());
        self.settle_all(topics, stop).await
    }

    /// The same for these topics, some at a time. Each is looked up when its turn comes, so none is settled by what was true before
    /// an earlier one, and two changes of one topic are never under way at once.
    async fn settle_all(&self, topics: BTreeSet<TopicId>, stop: &Stop) -> BTreeSet<TopicId> {
        let settling = topics.into_iter().map(|topic| {
            let (this, stop) = (self.clone(), stop.clone());
            async move { (!stop.is_cancelled() && !this.settle(topic, &stop).await).then_some(topic) }.boxed()
        });
        futures::stream::iter(settling)
            .buffer_unordered(SETTLING_MAX)
            .filter_map(futures::future::ready)
            .collect()
            .await
    }

    /// Makes what runs match what the catalog says of this topic. Whether it does.
    async fn settle(&self, id: TopicId, stop: &Stop) -> bool {
        let Some(topic) = self.inner.parts.catalog.view().topic(id) else {
            let running = self.inner.running.read().unwrap_or_else(PoisonError::into_inner).get(&id).map(|it| it.group);
            return match running {
                Some(group) => self.stop_and_remove(id, group).await,
                None => true,
            };
        };
        match topic.state {
            TopicState::Deleting => self.destroy(&topic, stop).await,
            TopicState::Ready | TopicState::Readonly if !self.is_held_here(&topic) => self.leave(&topic, stop).await,
            TopicState::Ready => self.ensure_running(&topic, Admission::Open, stop).await,
            TopicState::Readonly => self.ensure_running(&topic, Admission::Archived, stop).await,
        }
    }

    async fn ensure_running(&self, topic: &Topic, admission: Admission, stop: &Stop) -> bool {
        {
            let running = self.inner.running.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(running) = running.get(&topic.id) {
                running.admission.send_if_modified(|now| std::mem::replace(now, admission) != admission);
                running.ring.send_if_modified(|now| std::mem::replace(now, topic.ring) != topic.ring);
                return true;
            }
        }
        let Some(mode) = self.mode(topic, stop).await else { return false };
        match self.start_partition(topic, admission, mode).await {
            Ok(()) => {
                self.inner.damaged.write().unwrap_or_else(PoisonError::into_inner).remove(&topic.id);
                true
            }
            Err(error) => {
                if let StartError::DiskFull { .. } = error {
                    // That the disk is full is said where it is seen.
                    debug!(topic = %topic.id, %error, "a partition waits for room");
                    return false;
                }
                let broken = matches!(error, StartError::Storage { .. });
                // It is tried again and again, and said once.
                let known =
                    broken && !self.inner.damaged.write().unwrap_or_else(PoisonError::into_inner).insert(topic.id);
                if !known {
                    self.inner.changes.send_modify(|changes| *changes += 1);
                    error!(topic = %topic.id, group = %topic.group, %error, "a partition does not start on this node");
                }
                false
            }
        }
    }

    async fn start_partition(&self, topic: &Topic, admission: Admission, mode: Mode) -> Result<(), StartError> {
        let parts = &self.inner.parts;
        let context = self.context(topic);
        let tail = Tail::new(Arc::clone(&self.inner.budget));
        let machine = PartitionMachine::new(context, Arc::clone(&tail));
        let spec = GroupSpec { id: topic.group, voters: parts.catalog.replicas_of(topic), mode };
        let group = parts.runtime.start(spec, parts.log.group(topic.group), machine).await?;
        let (admission, admitted) = watch::channel(admission);
        let (ring, bound) = watch::channel(topic.ring);
        let (batcher, task) = BatcherParts {
            me: parts.me,
            context,
            group: group.clone(),
            ring: bound,
            keys: Arc::clone(&parts.keys),
            clock: Arc::clone(&parts.clock),
            admission: admitted.clone(),
            limits: parts.limits,
            crowd: self.inner.crowd.clone(),
        }
        .start();
        let tasks = parts.tasks.child();
        tasks.spawn("batcher", task);
        let handle_parts = Parts {
            me: parts.me,
            context,
            group,
            tail,
            batcher,
            admission: admitted,
            clock: Arc::clone(&parts.clock),
            tasks: tasks.clone(),
        };
        let handle = PartitionHandle::new(handle_parts, Arc::clone(&parts.keys), Arc::clone(&parts.barrier));
        let running = Running { group: topic.group, handle, admission, ring, tasks };
        self.inner.running.write().unwrap_or_else(PoisonError::into_inner).insert(topic.id, running);
        self.inner.changes.send_modify(|changes| *changes += 1);
        Ok(())
    }

    /// Stops a topic that is being destroyed, removes its log here, and makes an end of it in the catalog.
    async fn destroy(&self, topic: &Arc<Topic>, stop: &Stop) -> bool {
        let removed = self.stop_and_remove(topic.id, topic.group).await;
        let begin = || self.inner.finishing.lock().unwrap_or_else(PoisonError::into_inner).insert(topic.id);
        if removed && begin() {
            // Not awaited here: other topics need not wait for this one. A node that is down now finds the topic gone when it
            // comes back, and removes what it has.
            let (this, topic, stop) = (self.clone(), topic.id, stop.clone());
            self.inner.parts.tasks.spawn("destroy-topic", move |_| async move {
                let _ = tokio::time::timeout(DELETING_FOR, stop.cancelled()).await;
                let listed = !stop.is_cancelled() && this.inner.parts.catalog.view().topic(topic).is_some();
                if listed && let Err(error) = this.inner.parts.catalog.finish_destroy(topic).await {
                    warn!(%topic, %error, "a destroyed topic is still listed; tried again later");
                }
                this.inner.finishing.lock().unwrap_or_else(PoisonError::into_inner).remove(&topic);
            });
        }
        // Until the catalog forgets it, look again.
        false
    }

    async fn stop_and_remove(&self, topic: TopicId, group: GroupId) -> bool {
        let running = {
            let running = self.inner.running.read().unwrap_or_else(PoisonError::into_inner);
            running.get(&topic).map(|running| {
                running.admission.send_replace(Admission::Deleted);
                running.tasks.clone()
            })
        };
        if let Some(tasks) = running {
            info!(%topic, %group, "a topic is destroyed");
            tasks.shut_down(Duration::from_secs(5)).await;
            self.inner.parts.runtime.stop(group).await;
            self.inner.running.write().unwrap_or_else(PoisonError::into_inner).remove(&topic);
            self.inner.changes.send_modify(|changes| *changes += 1);
        }
        self.remove_log(group).await
    }

    /// Stops the replica here as a move does, while the catalog still names this node.
    #[cfg(test)]
    pub(crate) async fn give_replica_up(&self, topic: TopicId) {
        let running = {
            let mut running = self.inner.running.write().unwrap_or_else(PoisonError::into_inner);
            running.remove(&topic)
        };
        if let Some(running) = running {
            running.tasks.shut_down(Duration::from_secs(5)).await;
            self.inner.parts.runtime.stop(running.group).await;
        }
    }
}
