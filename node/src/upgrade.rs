//! The cluster's version: who speaks what, and when the version is raised.
//!
//! ```text
//! every node    says with every call what it speaks (peers/gate.rs), and keeps the cluster's version in node.json
//! the leader    asks every node ── all speak more, none holds back ──> SetClusterVersion ──> the catalog, and with it every node
//! ```
//! A version is raised only when *every* node that was not removed has answered that it speaks it: one that is down may come back as
//! the old build. It never falls. What a version allows is gated where it is written ([`crate::catalog::Command::needs`]).

mod explain;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ensign_proto::pb::peer::v1::HelloRequest;
use ensign_proto::pb::peer::v1::peer_client::PeerClient;
use ensign_proto::{ClusterVersion, NodeId};
use ensign_raft::Runtime;
use ensign_raft::env::Stop;
use futures::{FutureExt as _, StreamExt as _};
use thiserror::Error;
use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::catalog::{Catalog, WhyNotYet, WriteFailure};
use crate::files::NodeFloor;
use crate::node::NodeEnd;
use crate::peers::{Peers, Speaks};

/// How long a node may take to say what it speaks.
const PATIENCE: Duration = Duration::from_secs(2);
const ASKED_AT_ONCE: usize = 32;
/// How often the catalog's leader looks whether the version can be raised.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What an [`Upgrades`] is made of.
pub struct UpgradesParts {
    /// What this node says of itself.
    pub speaks: Speaks,
    /// Nodes that are asked even if the catalog does not list them yet.
    pub founders: BTreeSet<NodeId>,
    /// Who is asked, and what is raised.
    pub catalog: Catalog,
    /// The way to them.
    pub peers: Peers,
    /// The groups of this node, which heed it.
    pub runtime: Runtime,
    /// Where the version is kept for the next start.
    pub floor: Arc<NodeFloor>,
}

/// The cluster's version on this node. Clones share it.
#[derive(Clone)]
pub struct Upgrades {
    parts: Arc<UpgradesParts>,
}

impl fmt::Debug for Upgrades {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upgrades").field("speaks", &self.parts.speaks).finish_non_exhaustive()
    }
}

/// What every node speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// The cluster's version.
    pub active: ClusterVersion,
    /// Every node that was not removed, in the order of their numbers.
    pub nodes: Vec<Surveyed>,
}

/// What one node speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Surveyed {
    /// Which.
    pub node: NodeId,
    /// What it says, or why it says nothing.
    pub says: Result<Said, String>,
}

/// What a node says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// What it speaks, and whether it holds the cluster back.
    pub speaks: Speaks,
    /// The release that it runs; empty if it does not tell.
    pub release: String,
}

/// Why the version was not raised.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RaiseError {
    /// Some node is not ready for it, or cannot be asked.
    #[error("the cluster stays at version {active}: {why}")]
    NotAll {
        /// The cluster's version.
        active: ClusterVersion,
        /// Which nodes, and what to do.
        why: String,
    },
    /// It is no version that this node speaks.
    #[error("node {node} speaks versions up to {newest}: ask a node that runs a newer version of ensign")]
    Unknown {
        /// This node.
        node: NodeId,
        /// What it speaks.
        newest: ClusterVersion,
    },
    /// The cluster is past it already.
    #[error("the cluster is at version {active} already, and a version is never lowered")]
    Lower {
        /// The cluster's version.
        active: ClusterVersion,
    },
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

impl Survey {
    /// The newest version that every node speaks, if all were heard.
    pub fn common(&self) -> Option<ClusterVersion> {
        self.nodes.iter().map(|it| it.says.as_ref().ok().map(|said| said.speaks.newest)).min().flatten()
    }

    /// Why the cluster cannot be raised to `to`; none if it can. Of a node that is `lost` no answer is expected.
    pub fn obstacle(&self, to: ClusterVersion, lost: &BTreeSet<NodeId>) -> Option<String> {
        let mut why = Vec::new();
        for Surveyed { node, says } in &self.nodes {
            match says {
                Ok(said) if said.speaks.newest < to => {
                    let speaks = said.speaks.newest;
                    why.push(format!("node {node} speaks version {speaks}: run the new version of ensign on it"));
                }
                Err(_) if lost.contains(node) => {}
                Ok(_) => {}
                Err(cause) => why.push(format!(
                    "node {node} does not answer ({cause}): start it, or remove it, or go on without it with `ensign cluster upgrade \
                     --without {node}`"
                )),
            }
        }
        (!why.is_empty()).then(|| why.join("; "))
    }

    /// What keeps the cluster from rising to `to`, and what to do about it: nodes that do not speak it, else those that hold it back.
    /// None if nothing does, or it is there.
    pub fn in_the_way(&self, to: ClusterVersion) -> Option<String> {
        if self.active >= to {
            return None;
        }
        self.obstacle(to, &BTreeSet::new()).or_else(|| self.held_back())
    }

    /// Which nodes want the version to be raised by command only, and how that is done; none if no node does.
    pub fn held_back(&self) -> Option<String> {
        let holds = |it: &&Surveyed| it.says.as_ref().is_ok_and(|said| said.speaks.held);
        let holders: Vec<String> = self.nodes.iter().filter(holds).map(|it| format!("node {}", it.node)).collect();
        let why = || {
            let holders = holders.join(", ");
            format!("cluster.upgrade is \"manual\" on {holders}: `ensign cluster upgrade` raises the version")
        };
        (!holders.is_empty()).then(why)
    }
}

impl Upgrades {
    /// The version on this node, at which peers are held to it from here on.
    pub fn new(parts: UpgradesParts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    /// The newest version that this node speaks.
    pub fn newest(&self) -> ClusterVersion {
        self.parts.speaks.newest
    }

    /// Answers, for a change that needs a version that the cluster has not, what is in the way. It does not keep these alive.
    pub fn why_not_yet(&self) -> Arc<WhyNotYet> {
        let parts = Arc::downgrade(&self.parts);
        explain::why_not_yet(move || {
            let parts = parts.upgrade();
            async move { Some(Self { parts: parts? }.survey().await) }.boxed()
        })
    }

    /// Asks every node what it speaks.
    pub async fn survey(&self) -> Survey {
        let view = self.parts.catalog.view();
        let mut nodes: BTreeSet<NodeId> = view.nodes().iter().map(|node| node.id).collect();
        nodes.extend(&self.parts.founders);
        nodes.insert(self.parts.peers.me());
        nodes.retain(|node| !view.is_node_revoked(*node));
        let asked = nodes.into_iter().map(|node| async move { Surveyed { node, says: self.ask(node).await } });
        let nodes = futures::stream::iter(asked).buffered(ASKED_AT_ONCE).collect().await;
        Survey { active: self.parts.catalog.cluster_version(), nodes }
    }

    async fn ask(&self, node: NodeId) -> Result<Said, String> {
        if node == self.parts.peers.me() {
            let release = env!("CARGO_PKG_VERSION").to_owned();
            return Ok(Said { speaks: self.parts.speaks, release });
        }
        let channel = self.parts.peers.channel(node).ok_or("it is no peer of this node")?;
        let mut request = tonic::Request::new(HelloRequest {});
        request.set_timeout(PATIENCE);
        let asking = async move { PeerClient::new(channel).hello(request).await };
        match tokio::time::timeout(PATIENCE, asking).await {
            Err(_) => Err("no answer in time".to_owned()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Ok(Ok(reply)) => {
                let speaks = Speaks::of(reply.metadata().as_ref());
                Ok(Said { speaks, release: reply.into_inner().version })
            }
        }
    }

    /// Raises the cluster's version to `to`, or to the newest, whether or not nodes hold it back. Answers the version that the cluster has
    /// then. Nodes that are `lost` need not answer: they could not be removed before version 2.
    ///
    /// # Errors
    /// See [`RaiseError`]; the version is as it was.
    pub async fn raise(
        &self,
        to: Option<ClusterVersion>,
        lost: &BTreeSet<NodeId>,
    ) -> Result<ClusterVersion, RaiseError> {
        let newest = self.newest();
        let active = self.parts.catalog.cluster_version();
        let to = to.unwrap_or(newest);
        if to > newest {
            return Err(RaiseError::Unknown { node: self.parts.peers.me(), newest });
        }
        if to < active {
            return Err(RaiseError::Lower { active });
        }
        if to > active {
            if let Some(why) = self.survey().await.obstacle(to, lost) {
                return Err(RaiseError::NotAll { active, why });
            }
            self.parts.catalog.raise_version(to).await?;
            info!(before = %active, version = %to, "the cluster's version was raised");
        }
        Ok(to)
    }

    /// Gives a cluster that is being made the newest version. One that has anything in it is left to [`Upgrades::keep`].
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn begin(&self) -> Result<(), WriteFailure> {
        let is_new = self.parts.catalog.organizations().is_empty();
        if is_new { self.parts.catalog.raise_version(self.newest()).await } else { Ok(()) }
    }

    /// Raises the version whenever this node leads the catalog and every node is ready, until `stop`. One task a node.
    pub async fn keep(self, stop: Stop) {
        let mut told = String::new();
        let looking = async {
            loop {
                sleep(LOOK_EVERY).await;
                if self.parts.catalog.leads() && self.parts.catalog.cluster_version() < self.newest() {
                    self.look(&mut told).await;
                }
            }
        };
        stop.run_until_cancelled(looking).await;
    }

    async fn look(&self, told: &mut String) {
        let survey = self.survey().await;
        let active = survey.active;
        let common = survey.common().map(|common| common.min(self.newest())).filter(|common| *common > active);
        let why = match (common, survey.held_back()) {
            (Some(to), None) => match self.parts.catalog.raise_version(to).await {
                Ok(()) => {
                    info!(before = %active, version = %to, "every node speaks it: the cluster's version was raised");
                    return;
                }
                Err(error) => error.to_string(),
            },
            (Some(_), Some(held)) => held,
            (None, _) => survey.obstacle(ClusterVersion(active.0 + 1), &BTreeSet::new()).unwrap_or_default(),
        };
        if *told != why {
            info!(version = %active, newest = %self.newest(), why, "the cluster's version stays as it is for now");
            *told = why;
        }
    }

    /// Keeps the cluster's version for the next start, and gives the reason when this build is too old for it. One task a node.
    pub async fn follow(self, end: Arc<OnceLock<NodeEnd>>, stop: Stop) {
        let view = self.parts.catalog.view();
        let mut changes = view.changes();
        let mut kept = ClusterVersion::V1;
        loop {
            changes.mark_unchanged();
            if let Some(active) = view.outdated_by() {
                let newest = self.newest();
                let why = format!(
                    "the cluster is at version {active}, and this program speaks versions up to {newest} only: run the version of ensign that \
                     ran here before, or a newer one"
                );
                error!(%active, speaks = %newest, "this program is too old for the cluster");
                let _ = end.set(NodeEnd::Failed(why));
                stop.cancel();
                return;
            }
            let active = view.cluster_version();
            if active > kept {
                self.parts.runtime.set_version(active);
                match self.parts.floor.keep_version(active) {
                    Ok(()) => kept = active,
                    Err(error) => warn!(%error, "the cluster's version cannot be kept in node.json; tried again"),
                }
            }
            if !matches!(stop.run_until_cancelled(changes.changed()).await, Some(Ok(()))) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: ClusterVersion = ClusterVersion::V1;
    const V2: ClusterVersion = ClusterVersion::V2;

    fn survey(said: impl IntoIterator<Item = Result<(ClusterVersion, bool), &'static str>>) -> Survey {
        let says = |said: Result<(ClusterVersion, bool), &str>| match said {
            Ok((newest, held)) => Ok(Said { speaks: Speaks { newest, held }, release: String::new() }),
            Err(cause) => Err(cause.to_owned()),
        };
        let nodes = (1..).map(NodeId).zip(said).map(|(node, said)| Surveyed { node, says: says(said) });
        Survey { active: V1, nodes: nodes.collect() }
    }

    #[test]
    fn the_version_rises_as_far_as_the_oldest_node_speaks_and_not_while_one_is_silent() {
        let all = survey([Ok((ClusterVersion(3), false)), Ok((V2, false))]);
        let nobody = BTreeSet::new();
        assert_eq!((all.common(), all.obstacle(V2, &nobody), all.held_back()), (Some(V2), None, None));
        let old = all.obstacle(ClusterVersion(3), &nobody).unwrap();
        assert_eq!(old, "node 2 speaks version 2: run the new version of ensign on it");
        let silent = survey([Ok((V2, false)), Err("connection refused"), Ok((V1, false))]);
        assert_eq!(silent.common(), None);
        assert_eq!(
            silent.obstacle(V2, &nobody).unwrap(),
            "node 2 does not answer (connection refused): start it, or remove it, or go on without it with `ensign cluster upgrade \
             --without 2`; node 3 speaks version 1: run the new version of ensign on it"
        );
    }

    #[test]
    fn a_lost_node_need_not_answer_and_one_that_answers_has_to_speak_it() {
        let silent = survey([Ok((V2, false)), Err("connection refused")]);
        assert_eq!(silent.obstacle(V2, &[NodeId(2)].into()), None);
        assert!(silent.obstacle(V2, &[NodeId(1)].into()).is_some());
        let old = survey([Ok((V2, false)), Ok((V1, false))]);
        assert!(old.obstacle(V2, &[NodeId(2)].into()).unwrap().contains("node 2 speaks version 1"));
    }

    #[test]
    fn one_node_is_enough_to_hold_the_version_back() {
        let held = survey([Ok((V2, false)), Ok((V2, true)), Ok((V2, true))]);
        assert_eq!((held.common(), held.obstacle(V2, &BTreeSet::new())), (Some(V2), None));
        let why = held.held_back().unwrap();
        assert!(why.starts_with("cluster.upgrade is \"manual\" on node 2, node 3:"), "{why}");
        assert!(why.contains("`ensign cluster upgrade`"), "{why}");
    }
}
