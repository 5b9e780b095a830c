//! Who belongs to the groups that span the whole cluster, the catalog and the vault, and who of them votes.
//!
//! ```text
//! nodes of the catalog ─┐
//! which of them live   ─┼─> plan ──> one step ──> the group's members          by the group's leader, again and again
//! members of the group ─┘
//! ```
//!
//! Every node learns the catalog; those that hold the root key learn the vault. Three of them vote, five once the cluster has
//! five nodes, spread over zones. A voter that does not come back is replaced once another node is ready to vote. Nothing is stored
//! besides the group's own membership: a leader that fails midway leaves a state from which the next one goes on.
//! Not here: partitions, whose places the placement controller chooses.

mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::RoutedLink;
use ensign_proto::{ClusterVersion, NodeId};
use ensign_raft::env::Stop;
use ensign_raft::{GroupMembers, MembershipError, Runtime};
use tokio::time::timeout;
use tracing::{info, warn};

pub(crate) use self::plan::voters_wanted;
use self::plan::{Facts, Pulse, Standing, Stay, Step, in_the_way, next_step};
use crate::catalog::{NodeRecord, NodeState, View};

/// How often a leader looks, and how long it pauses between two steps.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const STEP_PAUSE: Duration = Duration::from_millis(100);

/// Which group of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Council {
    /// The catalog, which every node holds.
    Catalog,
    /// The vault, for nodes that hold the root key.
    Vault,
}

impl fmt::Display for Council {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Catalog => "catalog",
            Self::Vault => "vault",
        })
    }
}

impl Council {
    fn takes(self, node: &NodeRecord) -> bool {
        match self {
            Self::Catalog => true,
            Self::Vault => node.vault,
        }
    }
}

/// Keeps the members of one group as they should be, whenever this node leads it.
pub struct Steward {
    council: Council,
    group: GroupMembers,
    view: View,
    runtime: Runtime,
    /// After how long a silent voter is replaced.
    patience: Duration,
}

impl fmt::Debug for Steward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steward").field("council", &self.council).finish_non_exhaustive()
    }
}

impl Steward {
    /// For `group`, whose members are nodes that `view` lists. A voter that stays silent for `patience` is replaced.
    pub fn new(council: Council, group: GroupMembers, view: View, runtime: Runtime, patience: Duration) -> Self {
        Self { council, group, view, runtime, patience }
    }

    /// Works until `stop`. One task a group and node.
    pub async fn keep(self, stop: Stop) {
        let mut leadership = self.group.leadership();
        let mut said = String::new();
        loop {
            let now = *leadership.borrow_and_update();
            let mut pause = LOOK_EVERY;
            // Nodes of the first version know nothing of members that come and go.
            if now.ready && now.leads(self.runtime.node()) && self.view.cluster_version() >= ClusterVersion::V2 {
                match stop.run_until_cancelled(self.step(&mut said)).await {
                    None => return,
                    Some(true) => pause = STEP_PAUSE,
                    Some(false) => {}
                }
            }
            let woken = stop.run_until_cancelled(timeout(pause, leadership.changed())).await;
            if woken.is_none() || matches!(woken, Some(Ok(Err(_)))) {
                return;
            }
        }
    }

    /// Does what is to be done next. Whether there may be more.
    async fn step(&self, said: &mut String) -> bool {
        let nodes = self.standings();
        let members = self.group.now();
        let status = self.group.status();
        let facts = Facts { members: &members, matched: &status.matched, last: status.last, nodes: &nodes };
        let council = self.council;
        let Some(step) = next_step(&facts) else {
            let why = in_the_way(&facts).unwrap_or_default();
            if *said != why {
                if !why.is_empty() {
                    warn!(%council, why, "votes stay with nodes that should not have them");
                }
                *said = why;
            }
            return false;
        };
        let outcome = match &step {
            Step::Finish => self.group.change_voters(&members.voters, members.voters.clone()).await,
            Step::AddLearner(node) => self.group.add_learner(*node).await,
            Step::RemoveLearner(node) => self.group.remove_learner(*node).await,
            Step::ChangeVoters(voters) => self.group.change_voters(&members.voters, voters.clone()).await,
        };
        match outcome {
            Ok(()) => {
                info!(%council, ?step, "the members were changed");
                said.clear();
                true
            }
            // Leadership went to a voter that stays; its own steward goes on.
            Err(MembershipError::NotLeader { .. }) => false,
            Err(error) => {
                let now = format!("{step:?}: {error}");
                if *said != now {
                    warn!(%council, ?step, %error, "the members are not changed yet; tried again");
                    *said = now;
                }
                false
            }
        }
    }

    fn standings(&self) -> BTreeMap<NodeId, Standing> {
        let liveness = self.runtime.liveness();
        let silent: BTreeMap<NodeId, Duration> = liveness
            .peers()
            .into_iter()
            .filter(|peer| !peer.alive)
            .map(|peer| (peer.node, peer.since.elapsed()))
            .collect();
        let standing = |node: &NodeRecord| Standing {
            place: (node.region.clone(), node.zone.clone()),
            pulse: match silent.get(&node.id) {
                _ if liveness.is_alive(node.id) => Pulse::Alive,
                Some(silence) if *silence >= self.patience => Pulse::Lost,
                Some(_) | None => Pulse::Silent,
            },
            stay: stay(&self.view, node),
            fit: self.council.takes(node),
        };
        // Whatever became of its record, a node that was removed is to leave.
        let revoked =
            self.view.revoked_nodes().into_iter().map(|id| (id, standing(&NodeRecord { id, ..NodeRecord::default() })));
        let listed = self.view.nodes();
        revoked.chain(listed.iter().map(|node| (node.id, standing(node)))).collect()
    }
}

fn stay(view: &View, node: &NodeRecord) -> Stay {
    match node.state {
        _ if view.is_node_revoked(node.id) => Stay::Gone,
        NodeState::Removed => Stay::Gone,
        NodeState::Draining => Stay::Leaves,
        NodeState::Active => Stay::Stays,
    }
}

/// Whether a node is listed and is to stay: only then is it to have votes.
pub(crate) fn stays(view: &View, node: NodeId) -> bool {
    view.node(node).is_some_and(|node| stay(view, &node) == Stay::Stays)
}

/// Keeps `link` pointed at the nodes that may lead the vault, until `stop`. One task a node.
pub async fn follow_vault(
    link: Arc<RoutedLink>,
    group: GroupMembers,
    founders: BTreeSet<NodeId>,
    view: View,
    stop: Stop,
) {
    let (mut changes, mut leadership) = (view.changes(), group.leadership());
    loop {
        changes.mark_unchanged();
        leadership.mark_unchanged();
        link.follow(vault_nodes(&group, &view, &founders));
        tokio::select! {
            () = stop.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
            changed = leadership.changed() => if changed.is_err() { return },
        }
    }
}

/// Who may lead the vault, for those that look for its leader: the members that this node's replica knows, and the nodes that
/// hold the root key. `founders`, until the catalog lists any.
fn vault_nodes(group: &GroupMembers, view: &View, founders: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    let members = group.now();
    let listed = view.nodes();
    let mut nodes: BTreeSet<NodeId> = members.voters.union(&members.outgoing).copied().collect();
    nodes.extend(listed.iter().filter(|node| node.vault && !view.is_node_revoked(node.id)).map(|node| node.id));
    if nodes.is_empty() { founders.clone() } else { nodes }
}

/// Returns once the catalog lists this node: only then does a topic that is made get a replica here.
pub async fn listed(view: &View, me: NodeId) {
    let mut changes = view.changes();
    loop {
        changes.mark_unchanged();
        // The catalog ends only with the node.
        if view.node(me).is_some() || changes.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use ensign_raft::env::{OsRng, SystemClock};
    use futures::FutureExt as _;

    use super::*;
    use crate::catalog::testing;

    #[tokio::test]
    async fn a_node_stays_that_is_listed_and_neither_drained_nor_removed() {
        let catalog = testing::solo(Arc::new(SystemClock), Arc::new(OsRng));
        for id in [1, 2, 3].map(NodeId) {
            let version = ClusterVersion::NEWEST;
            catalog.put_node(NodeRecord { id, version, ..NodeRecord::default() }).await.unwrap();
        }
        catalog.set_node_state(NodeId(2), NodeState::Draining).await.unwrap();
        catalog.revoke_node(NodeId(3)).await.unwrap();
        let staying: Vec<u64> = (1..=4).filter(|id| stays(catalog.view(), NodeId(*id))).collect();
        assert_eq!(staying, [1]);
        catalog.set_node_state(NodeId(2), NodeState::Active).await.unwrap();
        assert!(stays(catalog.view(), NodeId(2)), "the drain was taken back");
    }

    #[tokio::test]
    async fn a_node_is_listed_once_it_has_registered_and_not_because_another_has() {
        let catalog = testing::solo(Arc::new(SystemClock), Arc::new(OsRng));
        let record = |id| NodeRecord {
            id: NodeId(id),
            name: format!("node-{id}"),
            peer: format!("host-{id}:5357"),
            version: ClusterVersion::NEWEST,
            incarnation: 1,
            ..NodeRecord::default()
        };
        let mut waiting = Box::pin(listed(catalog.view(), NodeId(2)));
        assert!(waiting.as_mut().now_or_never().is_none(), "nobody has registered");
        catalog.put_node(record(1)).await.unwrap();
        assert!(waiting.as_mut().now_or_never().is_none(), "only node 1 has");
        catalog.put_node(record(2)).await.unwrap();
        waiting.await;
    }
}
