//! What a node does all the while it serves: it registers, drives moves, keeps members, and watches how it is.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::NodeId;
use ensign_raft::Runtime;
use ensign_raft::env::Stop;
use tracing::{error, warn};

use super::{Addresses, HEALTH_WATCH, Node, NodeEnd};
use crate::catalog::{Catalog, NodeRecord, NodeState, PutNodeError};
use crate::files::NodeFloor;
use crate::members::{Council, Steward};
use crate::placement::{self, Mover, MoverParts};

/// How often the catalog's leader compares the vault with the catalog.
const RECONCILE_EVERY: Duration = Duration::from_mins(1);

impl Node {
    /// Long-lived chores that need a quorum now and then, and are patient about it.
    pub(super) fn tend(&self) {
        let identity = self.identity.clone();
        self.tasks.spawn("identity", |stop| identity.tend(stop));
        let (holder, health) = (self.holder.clone(), self.health.clone());
        let (leadership, partitions) = (self.catalog_group.leadership(), self.partitions.clone());
        self.tasks.spawn("health-watch", |stop| async move {
            while stop.run_until_cancelled(tokio::time::sleep(HEALTH_WATCH)).await.is_some() {
                let lost = holder.lease_left().is_none();
                let what = "no lease on any key: is a majority of the vault up, and unsealed? See `ensign status`";
                health.trouble("lease", lost.then(|| what.to_owned()));
                let damaged = partitions.damaged();
                let what = || format!("{damaged} replicas are damaged: the log names the file and says what to do");
                health.trouble("partitions", (damaged > 0).then(what));
                let leaderless = leadership.borrow().leader.is_none();
                let what = "the catalog has no leader: are a majority of the nodes up, and can they reach each other?";
                health.trouble("catalog", leaderless.then(|| what.to_owned()));
            }
        });
        let quotas = self.quotas.clone();
        self.tasks.spawn("quota-reports", |stop| quotas.keep_reported(stop));
        let catalog = self.catalog.clone();
        self.tasks.spawn("catalog-compaction", |stop| catalog.keep_compact(stop));
        let catalog = self.catalog.clone();
        self.tasks.spawn("placement", |stop| placement::control(catalog, stop));
        let mover = Mover::new(MoverParts {
            me: self.config.node_id(),
            catalog: self.catalog.clone(),
            seats: Arc::new(self.partitions.clone()),
            clock: Arc::clone(&self.clock),
            tasks: self.tasks.clone(),
        });
        self.tasks.spawn("moves", |stop| mover.run(stop));
        let catalog = self.catalog.clone();
        self.tasks.spawn("reconciliation", |stop| catalog.keep_reconciled(RECONCILE_EVERY, stop));
        let upgrades = self.upgrades.clone();
        self.tasks.spawn("upgrades", |stop| upgrades.keep(stop));
        let (catalog, runtime) = (self.catalog.clone(), self.runtime.clone());
        self.tasks.spawn("watched-nodes", |stop| watch_nodes(catalog, runtime, stop));
        let catalog = self.catalog.clone();
        let (record, end, vault, floor) =
            (self.record(), Arc::clone(&self.end), self.vault.clone(), Arc::clone(&self.floor));
        let patience = self.config.cluster.vote_lost_after.into();
        for (council, group) in
            [(Council::Catalog, self.catalog_group.membership()), (Council::Vault, self.vault.members())]
        {
            let steward = Steward::new(council, group, self.catalog.view().clone(), self.runtime.clone(), patience);
            self.tasks.spawn("members", |stop| steward.keep(stop));
        }
        self.tasks.spawn("registration", |stop| async move {
            let mut changes = catalog.changes();
            let registering = async {
                let mut record = record;
                loop {
                    let told = catalog.cluster_version();
                    record.vault |= vault.has_root_key();
                    while let Err(error) = register(&catalog, &record).await {
                        if is_final(&error) {
                            // No later attempt could end otherwise, and a node that lives twice must not vote.
                            keep_life(&floor, &error);
                            let _ = end.set(NodeEnd::unregistered(&error));
                            stop.cancel();
                            return;
                        }
                        warn!(%error, "cannot register this node with the catalog and the vault yet");
                        tokio::time::sleep(Duration::from_secs(2)).await;
                    }
                    // A newer version may keep more of a node's record than the one that was registered under.
                    let risen = changes.wait_for(|_| catalog.cluster_version() > told);
                    // And a root key that is copied to the node makes it one that the vault can be on.
                    let given = async {
                        while record.vault || !vault.has_root_key() {
                            tokio::time::sleep(HEALTH_WATCH).await;
                        }
                    };
                    let closed = tokio::select! {
                        risen = risen => risen.is_err(),
                        () = given => false,
                    };
                    if closed {
                        return;
                    }
                }
            };
            stop.run_until_cancelled(registering).await;
        });
    }

    pub(super) fn record(&self) -> NodeRecord {
        let me = self.config.node_id();
        let peer = self.config.cluster.peers.iter().find(|peer| peer.id == me).map(|peer| peer.address.clone());
        let address = |pick: fn(&Addresses) -> SocketAddr| {
            self.addresses.as_ref().map(|addresses| pick(addresses).to_string()).unwrap_or_default()
        };
        NodeRecord {
            id: me,
            peer: peer.unwrap_or_default(),
            grpc: address(|a| a.grpc),
            http: address(|a| a.http),
            name: self.config.node_name(),
            region: self.config.node.region.to_string(),
            zone: self.config.node.zone.to_string(),
            incarnation: self.life.incarnation,
            process: self.life.process,
            version: self.upgrades.newest(),
            vault: self.vault.has_root_key(),
            ..NodeRecord::default()
        }
    }
}

/// Takes care that the next start begins a life that nobody has begun yet: who starts the right one of two processes, starts it once.
fn keep_life(floor: &NodeFloor, error: &anyhow::Error) {
    if let Some(PutNodeError::LifeOver { seen, .. }) = error.downcast_ref()
        && let Err(error) = floor.raise_life(*seen)
    {
        error!(%error, "what is known of this node's lives cannot be kept in node.json: it takes two restarts to come back");
    }
}

/// Whether this node can never register.
fn is_final(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(
            PutNodeError::NameTaken { .. }
                | PutNodeError::LifeOver { .. }
                | PutNodeError::Revoked { .. }
                | PutNodeError::VersionTooOld { .. }
        )
    )
}

/// Has every node of the cluster watched, also those that share no group with this one: placement asks who lives.
async fn watch_nodes(catalog: Catalog, runtime: Runtime, stop: Stop) {
    let mut changes = catalog.view().changes();
    let mut watched = BTreeSet::new();
    loop {
        changes.mark_unchanged();
        let stays = |node: &&Arc<NodeRecord>| node.state != NodeState::Removed;
        let nodes: BTreeSet<NodeId> = catalog.view().nodes().iter().filter(stays).map(|node| node.id).collect();
        if nodes != watched {
            runtime.watch_peers(nodes.clone());
            watched = nodes;
        }
        if !matches!(stop.run_until_cancelled(changes.changed()).await, Some(Ok(()))) {
            return;
        }
    }
}

async fn register(catalog: &Catalog, record: &NodeRecord) -> anyhow::Result<()> {
    catalog.refresh().await?;
    catalog.put_node(record.clone()).await?;
    Ok(())
}
