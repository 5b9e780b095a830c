//! Serving clients, once the node is part of a cluster that has a quorum.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use ensign_keyvault::Vault;
use ensign_raft::Members;
use ensign_raft::env::Stop;
use tonic::service::Routes;
use tracing::{info, warn};

use super::{HEALTH_WATCH, Node};
use crate::admin::{self, AdminParts};
use crate::catalog::{NodeRecord, PutNodeError};
use crate::edge;
use crate::health::{Health, Phase};
use crate::members;
use crate::rpc::{Ensign, Guarded, OPENING_MAX, RpcParts};

/// How long a starting node waits for its first lease before it serves without one.
const FIRST_LEASE: Duration = Duration::from_secs(15);
const LEASE_POLL: Duration = Duration::from_millis(20);
/// The largest message of a call that anyone may make.
const ANYONES_MAX: usize = 4 << 10;
/// How often a node without a leader makes itself known, and after how many attempts it says so again.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(1);
const COMPLAIN_EVERY: u32 = 15;

impl Node {
    /// Returns once the catalog has a leader that this node can reach. A node that joins is made known first: the leader
    /// adds its replica because the catalog lists the node.
    ///
    /// # Errors
    /// The catalog is stopped.
    pub async fn quorum(&self) -> anyhow::Result<()> {
        let mut leadership = self.catalog_group.leadership();
        let mut tried = 0_u32;
        loop {
            let led = leadership.wait_for(|now| now.leader.is_some());
            match tokio::time::timeout(ANNOUNCE_EVERY, led).await {
                Ok(led) => return led.map(drop).context("the catalog is stopped"),
                Err(_elapsed) => tried += 1,
            }
            let me = self.config.node_id();
            let members = self.catalog_group.members();
            if members.contains(me) {
                continue;
            }
            if members != Members::default() && tried.is_multiple_of(COMPLAIN_EVERY) {
                warn!("the catalog does not name this node as a member: it was removed, or is not added yet");
            }
            // Without a life: the real registration comes when the node can read what the catalog knows of it.
            let record = NodeRecord { incarnation: 0, process: 0, ..self.record() };
            match self.catalog.announce_node(record).await {
                Ok(()) => info!("made known to the cluster; waiting to be added"),
                Err(PutNodeError::LifeOver { .. }) => {}
                Err(
                    error @ (PutNodeError::NameTaken { .. }
                    | PutNodeError::Revoked { .. }
                    | PutNodeError::VersionTooOld { .. }),
                ) => return Err(error.into()),
                Err(error) if tried.is_multiple_of(COMPLAIN_EVERY) => {
                    info!(%error, "not part of a cluster yet: no peer takes this node's announcement");
                }
                Err(_) => {}
            }
        }
    }

    /// Serves clients from here on.
    ///
    /// # Errors
    /// The node cannot reach a majority, or serves already.
    pub async fn serve(&self) -> anyhow::Result<()> {
        self.quorum().await?;
        self.tend();
        // Until the vault has granted a lease, every publish and every read would be refused.
        if tokio::time::timeout(FIRST_LEASE, self.leased()).await.is_err() {
            warn!(
                "serving without a lease on any key: publishing and reading are refused until the vault has a leader that is unsealed"
            );
        }
        // A client that finds all nodes ready may make a topic with a replica on each.
        if tokio::time::timeout(FIRST_LEASE, members::listed(self.catalog.view(), self.config.node_id())).await.is_err()
        {
            warn!("serving before the catalog lists this node: topics that are made now get no replica here");
        }
        // Whoever sees the node serve shall see whether its vault is sealed, too.
        if tokio::time::timeout(FIRST_LEASE, self.vault.settle()).await.is_err() {
            warn!("what keeps the root key takes its time: serving meanwhile");
        }
        note_vault(&self.vault, &self.health);
        let listeners = self.client_listeners.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some((grpc, http)) = listeners {
            let catalog = self.catalog.clone();
            self.edge.spawn("catalog-freshness", |stop| catalog.keep_fresh(stop));
            let tls = self.client_tls.as_ref();
            let routes = crate::identity::router(self.identity.clone());
            let routes = routes.merge(crate::receipts::router(self.vault_client.clone()));
            edge::serve_http("http-server", http, tls, routes, &self.edge);
            edge::serve_grpc(grpc, tls, self.routes().await?, &self.edge);
        }
        self.health.set(Phase::Serving);
        info!(node = self.config.node.id, "serving");
        Ok(())
    }

    /// Returns once every topic has a leader, or after `patience`.
    pub async fn led(&self, patience: Duration) {
        let all = async {
            let me = self.config.node_id();
            for topic in self.catalog.view().all_topics() {
                if !self.catalog.replicas_of(&topic).contains(&me) {
                    continue;
                }
                if let Ok(partition) = self.partitions.wait_for(topic.id, patience).await {
                    // Stopped meanwhile: destroyed, or the node is going.
                    let _ = partition.leadership().wait_for(|now| now.leader.is_some()).await;
                }
            }
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            warn!("some topics have no leader yet; they answer UNAVAILABLE until they do");
        }
    }

    /// Returns once this node has a lease on its keys.
    async fn leased(&self) {
        while self.holder.lease_left().is_none() {
            tokio::time::sleep(LEASE_POLL).await;
        }
    }

    /// What clients may call.
    async fn routes(&self) -> anyhow::Result<Routes> {
        let ensign = Ensign::new(RpcParts {
            node: self.config.node_id(),
            catalog: self.catalog.clone(),
            identity: self.identity.clone(),
            partitions: self.partitions.clone(),
            quotas: self.quotas.clone(),
            clock: Arc::clone(&self.clock),
            rng: Arc::clone(&self.rng),
            tasks: self.tasks.clone(),
            phase: self.health.watch(),
        });
        let (reporter, health) = tonic_health::server::health_reporter();
        for service in ["", "default", <Ensign as tonic::server::NamedService>::NAME] {
            reporter.set_service_status(service, tonic_health::ServingStatus::Serving).await;
        }
        let mut phase = self.health.watch();
        self.edge.spawn("grpc-health", |_| async move {
            if phase.wait_for(|phase| *phase == Phase::Stopping).await.is_ok() {
                for service in ["", "default", <Ensign as tonic::server::NamedService>::NAME] {
                    reporter.set_service_status(service, tonic_health::ServingStatus::NotServing).await;
                }
            }
        });
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(ensign_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let admin = admin::service(AdminParts {
            node: self.config.node_id(),
            cluster: self.cluster,
            catalog: self.catalog.clone(),
            identity: self.identity.clone(),
            partitions: self.partitions.clone(),
            joins: self.joins.clone(),
            upgrades: self.upgrades.clone(),
            vault: self.vault_client.clone(),
            lease: self.config.lease(),
            runtime: self.runtime.clone(),
            quotas: self.quotas.clone(),
            reports: self.reports.clone(),
            clock: Arc::clone(&self.clock),
        });
        let admin = admin.max_decoding_message_size(OPENING_MAX);
        let admin = Guarded::new(admin, self.identity.clone(), &[]);
        // Anyone may ask these two.
        let health = health.max_decoding_message_size(ANYONES_MAX);
        let reflection = reflection.max_decoding_message_size(ANYONES_MAX);
        Ok(Routes::new(ensign).add_service(admin).add_service(health).add_service(reflection))
    }
}

/// Tells `/readyz` why the vault is sealed here, again and again.
pub(super) async fn watch_vault(vault: Vault, health: Health, stop: Stop) {
    while stop.run_until_cancelled(tokio::time::sleep(HEALTH_WATCH)).await.is_some() {
        note_vault(&vault, &health);
    }
}

fn note_vault(vault: &Vault, health: &Health) {
    health.trouble("vault", vault.trouble().map(|why| format!("sealed: {why}")));
}
