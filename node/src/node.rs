//! One node, put together: logs, Raft, vault, catalog, identity, partitions, and the listeners in front of them.
//!
//! ```text
//! start: lock the data directory ─> open logs ─> count this life ─> raft ─> vault, catalog ─> keys, identity, partitions ─> peers
//! serve: gRPC and HTTP for clients
//! hand over: leaderships move, clients are served on     drain: streams end
//! close: what is led still moves, groups stop, the lease is given back, logs close, LOCK goes
//! ```

mod chores;
mod ending;
mod serving;
mod start;
mod stopping;

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context as _;
use ensign_keyvault::{Holder, Vault, VaultClient};
use ensign_proto::ClusterId;
use ensign_raft::env::{Clock, Rng, Tasks};
use ensign_raft::{Group, Runtime};
use ensign_storage::DataDir;
use tokio::net::TcpListener;

use crate::catalog::{Catalog, CatalogMachine};
use crate::certificates::{Certificates, ClientTls};
use crate::config::Config;
use crate::control::ControlThread;
use crate::files::NodeFloor;
use crate::health::Health;
use crate::identity::Identity;
use crate::join::{Joins, Renewal};
use crate::partition::Partitions;
use crate::peers::{Life, PeerTls};
use crate::quota::Quotas;
use crate::report::PeerReports;
use crate::upgrade::Upgrades;

pub use ending::NodeEnd;
use start::OpenLog;

/// How often readiness looks at the lease, at the replicas and at the vault.
const HEALTH_WATCH: Duration = Duration::from_secs(1);

/// Where a node listens. What is absent is not served.
#[derive(Debug)]
pub struct Listeners {
    /// gRPC for clients.
    pub grpc: Option<TcpListener>,
    /// HTTP for authentication.
    pub http: Option<TcpListener>,
    /// Metrics and health.
    pub metrics: Option<TcpListener>,
    /// Other nodes.
    pub peers: TcpListener,
    /// What clients are shown; none: gRPC and HTTP are spoken in clear.
    pub tls: Option<ClientTls>,
}

/// Where clients reach a node, with the ports that it was really given.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// gRPC.
    pub grpc: SocketAddr,
    /// HTTP.
    pub http: SocketAddr,
    /// Metrics and health.
    pub metrics: SocketAddr,
}

impl Addresses {
    /// The addresses of these listeners.
    ///
    /// # Errors
    /// One of the three is absent or has no address.
    pub fn of(listeners: &Listeners) -> anyhow::Result<Self> {
        let address = |listener: &Option<TcpListener>| {
            listener.as_ref().context("this node serves no clients").and_then(|listener| Ok(listener.local_addr()?))
        };
        Ok(Self {
            grpc: address(&listeners.grpc)?,
            http: address(&listeners.http)?,
            metrics: address(&listeners.metrics)?,
        })
    }
}

/// What a node is made of.
#[derive(Debug)]
pub struct NodeSpec {
    /// Its settings; `config.cluster.peers` names every node.
    pub config: Config,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Where it listens.
    pub listeners: Listeners,
    /// How peers know it.
    pub tls: PeerTls,
    /// Whether it founds the catalog and the vault: exactly one node does, when the cluster is made.
    pub initialize: bool,
}

/// A node that runs.
pub struct Node {
    config: Config,
    cluster: ClusterId,
    life: Life,
    addresses: Option<Addresses>,
    /// Why it cannot go on.
    end: Arc<OnceLock<NodeEnd>>,
    floor: Arc<NodeFloor>,
    health: Health,
    tasks: Tasks,
    edge: Tasks,
    runtime: Runtime,
    vault: Vault,
    holder: Holder,
    catalog_group: Group<CatalogMachine>,
    catalog: Catalog,
    identity: Identity,
    joins: Joins,
    upgrades: Upgrades,
    client_tls: Option<ClientTls>,
    partitions: Partitions,
    quotas: Quotas,
    reports: PeerReports,
    vault_client: VaultClient,
    clock: Arc<dyn Clock>,
    rng: Arc<dyn Rng>,
    client_listeners: std::sync::Mutex<Option<(TcpListener, TcpListener)>>,
    logs: Vec<OpenLog>,
    _control: ControlThread,
    // Last: the directory is free only once everything above is closed.
    _data_dir: DataDir,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("id", &self.config.node.id).field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

impl Node {
    /// Its settings.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The vault's replica on this node.
    pub fn vault(&self) -> &Vault {
        &self.vault
    }

    /// The fingerprint of the key that the vault's first receipts are signed with: what a third party pins. `None` where the cluster's
    /// version knows no receipts. Waits a little for a vault whose leader has yet to hear of the version.
    ///
    /// # Errors
    /// The vault cannot be reached or is sealed.
    pub async fn receipt_fingerprint(&self) -> anyhow::Result<Option<String>> {
        crate::receipts::first_fingerprint(&self.catalog, &self.vault_client).await
    }

    /// The catalog.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Logins and tokens.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Join tokens, and the cluster's authority.
    pub fn joins(&self) -> &Joins {
        &self.joins
    }

    /// The cluster's version.
    pub fn upgrades(&self) -> &Upgrades {
        &self.upgrades
    }

    /// Watches the files that this node's certificates came from: what is replaced is taken over, what ends is renewed or warned of.
    pub fn keep_certificates(&self, peers: PeerTls) {
        let (node, cluster, clock) = (self.config.node_id(), self.config.cluster.clone(), Arc::clone(&self.clock));
        let own = cluster.peers.iter().find(|peer| peer.id == node);
        let host = own.and_then(|peer| peer.address.rsplit_once(':')).map(|(host, _)| host.trim_matches(['[', ']']));
        let names = host.map(str::to_owned).into_iter().collect();
        let renewal =
            Renewal { joins: self.joins.clone(), node, names, cluster: cluster.clone(), clock: Arc::clone(&clock) };
        self.tasks.spawn("certificate-renewal", |stop| renewal.keep(stop));
        let (clients, listen) = (self.client_tls.clone(), self.config.listen.clone());
        let certificates = Certificates { node, peers, cluster, clients, listen, clock };
        self.tasks.spawn("certificates", |stop| certificates.keep(stop));
    }
}
