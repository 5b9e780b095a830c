//! All groups of a node.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::{ByteCount, ClusterVersion, GroupId, NodeId};
use ensign_storage::GroupLog;
use futures::future::join_all;
use futures::{StreamExt as _, stream};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};

use crate::apply::Shared;
use crate::config::{GroupSpec, Mode, RuntimeConfig};
use crate::env::{Clock, Lane, Pipe, Rng, Tasks, Transport};
use crate::errors::StartError;
use crate::group::{Group, GroupStatus};
use crate::liveness::{Liveness, PeerState};
use crate::machine::StateMachine;
use crate::metrics;
use crate::net::{self, Local, Peers};
use crate::replica::Replica;
use crate::supervise;
use crate::sweep::Sweeper;
use crate::types::AsyncRuntime;

/// Leaderships that are handed over at once: a node that leads a thousand groups asks for a thousand elections.
const HAND_OVERS: usize = 64;

/// Runs a node's groups over one transport. Clones are cheap and share it.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    config: RuntimeConfig,
    peers: Arc<Peers>,
    local: Arc<Local>,
    rng: Arc<dyn Rng>,
    tasks: Tasks,
}

/// The groups that run here, for the network to find.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Groups>);

#[derive(Default)]
struct Groups {
    running: BTreeMap<GroupId, Arc<Replica>>,
    stopping: bool,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Groups> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn all(&self) -> Vec<Arc<Replica>> {
        self.lock().running.values().cloned().collect()
    }

    pub(crate) fn get(&self, group: GroupId) -> Option<Arc<Replica>> {
        self.lock().running.get(&group).cloned()
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Runtime").field("node", &self.inner.config.node).finish_non_exhaustive()
    }
}

impl Runtime {
    /// A runtime without groups. Call it within a tokio runtime; its tasks are children of `tasks`.
    pub fn new(
        config: RuntimeConfig,
        transport: Arc<dyn Transport>,
        clock: Arc<dyn Clock>,
        rng: Arc<dyn Rng>,
        tasks: Tasks,
    ) -> Self {
        // Raft's own timers run on tokio's clock, which a simulation controls; leases of the vault need `clock`, Raft does not.
        drop(clock);
        metrics::describe();
        let tasks = tasks.child();
        let peers = Arc::new(Peers::new(config, transport, Arc::clone(&rng), tasks.clone()));
        let liveness = Liveness::new(config.node, config.incarnation, config.timing, tasks.clone());
        let local = Arc::new(Local::new(config.limits, liveness, tasks.clone()));
        let sweeper = Sweeper::new(config, Arc::clone(&local), Arc::clone(&peers), Arc::clone(&rng));
        let seed = rng.next_u64();
        tasks.spawn("raft-sweep", move |stop| AsyncRuntime::scope(seed, sweeper.run(stop)));
        Self { inner: Arc::new(Inner { config, peers, local, rng, tasks }) }
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.inner.config.node
    }

    /// Which peers live. Watched are those that share a group with this node and those that [`Runtime::watch_peers`] names.
    pub fn liveness(&self) -> Liveness {
        self.inner.local.liveness.clone()
    }

    /// Watches these peers too, in place of those that an earlier call named. This node itself needs no watching.
    pub fn watch_peers(&self, peers: BTreeSet<NodeId>) {
        *self.inner.local.named.lock().unwrap_or_else(PoisonError::into_inner) = peers;
        self.inner.local.rewatch(&self.inner.peers);
    }

    /// What every node of the cluster speaks; the newest unless told otherwise. Groups that start from now on take it into account.
    pub fn set_version(&self, version: ClusterVersion) {
        self.inner.peers.set_version(version);
    }

    /// From now on sends at most so many bytes a second to replicas that do not vote, over all groups: what rebuilds a replica
    /// must not starve what clients wait for. Voters, votes and heartbeats are never slowed down.
    pub fn limit_learners(&self, bytes_per_second: ByteCount) {
        self.inner.peers.throttle.set_rate(bytes_per_second);
    }

    /// For how long, since this node started, that limit has kept replicas that do not vote waiting: where it grows as fast as time passes,
    /// they would take more than they are let.
    pub fn learners_waited(&self) -> Duration {
        self.inner.peers.throttle.waited()
    }

    /// Serves a pipe that `peer` opened; the caller has authenticated `peer`. Returns at once.
    pub fn accept(&self, peer: NodeId, lane: Lane, pipe: Pipe) {
        let local = Arc::clone(&self.inner.local);
        let seed = self.inner.rng.next_u64();
        self.inner.tasks.for_lane(lane).spawn("raft-accept", move |stop| {
            AsyncRuntime::scope(seed, async move {
                let serving = net::serve(&local, peer, lane, pipe);
                stop.run_until_cancelled(serving).await;
            })
        });
    }

    /// Starts a group on `log`: recovers `machine` from snapshot, checkpoint and log, and takes part from then on.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start<S: StateMachine>(
        &self,
        spec: GroupSpec,
        log: Arc<dyn GroupLog>,
        machine: S,
    ) -> Result<Group<S>, StartError> {
        self.inner.config.timing.check()?;
        if spec.mode == Mode::Found && !spec.voters.contains(&self.node()) {
            return Err(StartError::Invalid { what: format!("group {} is founded by one of its voters", spec.id) });
        }
        let machine = Arc::new(Mutex::new(machine));
        let replica = Arc::new(Replica::new(
            spec.id,
            spec.voters.clone(),
            self.inner.config,
            log,
            Box::new(Shared(Arc::clone(&machine))),
            self.inner.tasks.stop_token().child_token(),
        ));
        {
            let mut groups = self.inner.local.registry.lock();
            if groups.stopping {
                return Err(StartError::Stopping);
            }
            if groups.running.contains_key(&spec.id) {
                return Err(StartError::Running { group: spec.id });
            }
            groups.running.insert(spec.id, Arc::clone(&replica));
        }
        self.inner.local.liveness.watch(&self.inner.peers, spec.voters.iter().copied());
        let (started, outcome) = oneshot::channel();
        let seed = self.inner.rng.next_u64();
        let (supervised, peers, id) = (Arc::clone(&replica), Arc::clone(&self.inner.peers), spec.id);
        self.inner.tasks.spawn("raft-group", move |_stop| {
            AsyncRuntime::scope(seed, supervise::run(supervised, peers, spec, started))
        });
        let outcome = outcome.await.unwrap_or(Err(StartError::Stopping));
        if let Err(error) = outcome {
            self.forget(id, &replica);
            return Err(error);
        }
        self.inner.local.newcomers.notify_one();
        Ok(Group::new(replica, machine))
    }

    fn forget(&self, group: GroupId, replica: &Arc<Replica>) {
        let mut groups = self.inner.local.registry.lock();
        if groups.running.get(&group).is_some_and(|running| Arc::ptr_eq(running, replica)) {
            groups.running.remove(&group);
        }
    }

    /// Stops a group here, without a hand-over; its data stays. Does nothing if it does not run.
    pub async fn stop(&self, group: GroupId) {
        let Some(replica) = self.inner.local.registry.get(group) else { return };
        replica.stop.cancel();
        replica.ended.cancelled().await;
        self.forget(group, &replica);
    }

    /// The groups that run here and how each is doing.
    pub fn groups(&self) -> Vec<GroupStatus> {
        let running: Vec<_> = self.inner.local.registry.lock().running.values().cloned().collect();
        running.iter().map(|replica| replica.status()).collect()
    }

    /// Hands over what this node leads, to whoever misses least. Its groups run on, and it serves as one that follows: whoever asks
    /// it to append is told who leads. Returns once all are handed over, or at the deadline. Cancel safe; may be called again.
    pub async fn hand_over(&self, deadline: Duration) {
        let replicas: Vec<_> = self.inner.local.registry.lock().running.values().cloned().collect();
        hand_over(&replicas, &self.inner.local.liveness, deadline).await;
    }

    /// Hands leaderships over, then stops every group; what is not done by `deadline` is cut short.
    pub async fn shut_down(&self, deadline: Duration) {
        let end = Instant::now() + deadline;
        let replicas: Vec<_> = {
            let mut groups = self.inner.local.registry.lock();
            groups.stopping = true;
            groups.running.values().cloned().collect()
        };
        // Half of the time at most: a group whose peers are gone must still be closed in order.
        hand_over(&replicas, &self.inner.local.liveness, deadline / 2).await;
        let stops = join_all(replicas.iter().map(|replica| self.stop(replica.id)));
        if timeout_at(end, stops).await.is_err() {
            warn!("some groups were still stopping at the deadline");
        }
        self.inner.tasks.shut_down(end.saturating_duration_since(Instant::now())).await;
    }
}

/// First the groups that the others ask before they can take over: the vault hands out the keys that a partition's new leader seals with.
async fn hand_over(replicas: &[Arc<Replica>], liveness: &Liveness, deadline: Duration) {
    let (partitions, system): (Vec<_>, Vec<_>) =
        replicas.iter().partition(|replica| replica.id >= GroupId::FIRST_PARTITION);
    let one = |replica: &Arc<Replica>| {
        let replica = Arc::clone(replica);
        async move {
            let Some(to) = replica.successor(|node| liveness.state(node) != PeerState::Dead) else { return };
            match replica.transfer_leader(to).await {
                Ok(()) => info!(group = %replica.id, %to, "handed leadership over"),
                Err(error) => warn!(group = %replica.id, %error, "leadership was not handed over"),
            }
        }
    };
    let all = async {
        for groups in [system, partitions] {
            stream::iter(groups).for_each_concurrent(HAND_OVERS, one).await;
        }
    };
    let _ = timeout(deadline, all).await;
}
