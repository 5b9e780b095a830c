//! One node, put together: logs, Raft, vault, catalog, identity, partitions, and the listeners in front of them.
//!
//! ```text
//! start: lock the data directory ─> open logs ─> count this life ─> raft ─> vault, catalog ─> keys, identity, partitions ─> peers
//! serve: gRPC and HTTP for clients
//! hand over: leaderships move, clients are served on     drain: streams end
//! close: what is led still moves, groups stop, the lease is given back, logs close, LOCK goes
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use ensign_keyvault::{Entropy, Holder, HolderConfig, RoutedLink, Vault, VaultClient, VaultConfig, VaultLinks};
use ensign_proto::{ByteCount, ClusterId, ClusterVersion, GroupId, NodeId};
use ensign_raft::env::{Clock, OsRng, Rng, Stop, SystemClock, Tasks};
use ensign_raft::{Group, GroupSpec, Limits, Members, Mode, Runtime, RuntimeConfig};
use ensign_storage::{DataDir, Disk, FrameLog, LogConfig, NodeLog as _, OpenError, Writer};
use tokio::net::TcpListener;
use tonic::service::Routes;
use tracing::{info, warn};

use crate::admin::{self, AdminParts};
use crate::catalog::{Catalog, CatalogMachine, CatalogParts, NodeRecord, NodeState, PutNodeError, VaultRings};
use crate::certificates::{Certificates, ClientTls};
use crate::config::{Config, Upgrade};
use crate::control::ControlThread;
use crate::edge;
use crate::files::{NodeFile, NodeFloor};
use crate::health::{self, Health, Phase};
use crate::identity::{Availability, Identity, IdentityConfig, VaultSecrets};
use crate::join::{self, JoinParts, Joins, Renewal};
use crate::local::{self, LocalParts};
use crate::members::{self, Council, Steward};
use crate::partition::forward::{Channels, ForwardService, PeerForward};
use crate::partition::{BatchLimits, Partitions, PartitionsParts};
use crate::peers::{
    self, LeaderLink, Life, Membership, PeerChannel, PeerMemory, PeerTls, Peers, PipeTransport, Services, Speaks,
    VaultCalls,
};
use crate::placement::{self, Mover, MoverParts};
use crate::plant;
use crate::quota::{PeerQuota, QuotaParts, QuotaService, Quotas};
use crate::report::{PeerReports, ReportService, Reporter, ReporterParts};
use crate::root;
use crate::rpc::{Ensign, Guarded, OPENING_MAX, RpcParts};
use crate::telemetry;
use crate::upgrade::{Upgrades, UpgradesParts};
use crate::vault::{HolderService, VaultService};

/// How long a starting node waits for its first lease before it serves without one.
const FIRST_LEASE: Duration = Duration::from_secs(15);
const LEASE_POLL: Duration = Duration::from_millis(20);
/// The largest message of a call that anyone may make.
const ANYONES_MAX: usize = 4 << 10;
/// How often the catalog's leader compares the vault with the catalog.
const RECONCILE_EVERY: Duration = Duration::from_mins(1);
/// How often a node without a leader makes itself known, and after how many attempts it says so again.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(1);
const COMPLAIN_EVERY: u32 = 15;
/// How often readiness looks at the lease and at the replicas.
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
    fatal: Arc<OnceLock<String>>,
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
    /// Starts a node: recovers everything it stored and takes part in its groups. It serves peers from here on, and clients
    /// after [`Node::serve`].
    ///
    /// # Errors
    /// The data directory is in use, damaged or of a newer format; the certificates cannot be used.
    pub async fn start(spec: NodeSpec) -> anyhow::Result<Self> {
        let NodeSpec { config, cluster, listeners, tls, initialize } = spec;
        let me = config.node_id();
        let health = Health::default();
        let control = ControlThread::start()?;
        let tasks = Tasks::new().with_control(control.runtime());
        let edge = tasks.child();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let rng: Arc<dyn Rng> = Arc::new(OsRng);
        let disk = plant::disk()?;
        let addresses = Addresses::of(&listeners).ok();
        let reports = Arc::new(OnceLock::new());
        if let Some(listener) = listeners.metrics {
            let router = health::router(health.clone(), telemetry::metrics()?, Arc::clone(&reports));
            edge::serve_http("metrics-server", listener, None, router, &tasks);
        }

        let dir = &config.node.data_dir;
        let data_dir = DataDir::lock(Arc::clone(&disk), dir)?;
        // It is written once both logs are there: a node that has lived before never starts on fresh ones.
        let speaks = Speaks { newest: plant::newest_version()?, held: config.cluster.upgrade == Upgrade::Manual };
        let lived = NodeFile::read(dir, me)?;
        if let Some((file, _)) = &lived {
            file.check_version(dir, speaks.newest)?;
        }
        let lived = lived.is_some();
        let open = if lived { FrameLog::reopen } else { FrameLog::open };
        let log = OpenLog::open(open, &disk, &dir.join("log"), plant::log(log_config(&config))?)?;
        // The vault shares its file with no other group: after a revoke, that file is rewritten.
        let small = LogConfig { prefill: ByteCount(4 << 20), ..LogConfig::small() };
        let vault_log = OpenLog::open(open, &disk, &dir.join("vault"), plant::log(small)?)?;
        let life = NodeFile::begin_life(dir, me, cluster)?;
        info!(node = %me, %cluster, incarnation = life.incarnation, data_dir = %dir.display(), "starting");

        let mut process = [0; 8];
        rng.fill(&mut process);
        let floor = Arc::new(NodeFloor::new(dir, life.clone()));
        let kept_version = life.cluster_version();
        let life = Life { incarnation: life.incarnation, process: u64::from_le_bytes(process) };
        let peers = Peers::speaking(
            speaks,
            me,
            Some(Membership { cluster, life }),
            &config.cluster.peers,
            &tls,
            tasks.control().cloned(),
        );
        peers.require(kept_version);
        let (machine, view) = CatalogMachine::speaking(speaks.newest);
        // Before a word is exchanged with anyone: what was known of the peers holds until the catalog can be read.
        let (followed, seeds, catalog_view) = (peers.clone(), config.cluster.peers.clone(), view.clone());
        let memory = PeerMemory::open(dir);
        tasks.spawn("peers", |stop| peers::follow(followed, seeds, catalog_view, memory, stop));
        let voters: std::collections::BTreeSet<NodeId> = config.cluster.peers.iter().map(|peer| peer.id).collect();
        let timing = config.cluster.timing.elections();
        let limits = Limits { learners: config.storage.move_rate.into(), ..Limits::default() };
        let raft_config = RuntimeConfig { timing, incarnation: life.incarnation, limits, ..RuntimeConfig::new(me) };
        let transport = Arc::new(PipeTransport::new(peers.clone(), tasks.clone()));
        let runtime = Runtime::new(raft_config, transport, Arc::clone(&clock), Arc::clone(&rng), tasks.clone());

        runtime.set_version(kept_version);
        let calls = VaultCalls::new(peers.clone());
        let lease = config.lease();
        let vault_config = VaultConfig {
            cluster,
            node: me,
            voters: voters.clone(),
            create: initialize,
            lease,
            election_max: timing.election_max,
            entropy: Entropy::kernel(),
        };
        let vault_group_log = vault_log.log.group(GroupId::VAULT);
        let links = VaultLinks { holders: Arc::new(calls.clone()), peers: Arc::new(calls.clone()) };
        let root = root::provider(&config);
        let vault = Vault::start(vault_config, &runtime, vault_group_log, root, links, Arc::clone(&clock), &tasks)
            .await
            .context("the vault cannot start")?;
        let link = RoutedLink::new(Arc::new(calls.clone()), voters.clone(), &lease).with_replica(vault.leadership());
        let link = Arc::new(link);
        let holder_config = plant::holder(HolderConfig {
            lease,
            floor: Arc::<NodeFloor>::clone(&floor),
            ..HolderConfig::new(cluster, me)
        })?;
        let holder = Holder::new(holder_config, link.clone(), Arc::clone(&clock), &tasks);
        calls.connect(Arc::new(VaultService(vault.clone())), Arc::new(HolderService(holder.clone())));
        let vault_client = VaultClient::new(link.clone(), cluster, me, &Entropy::kernel());
        // From here on, also while there is no quorum: somebody may be waiting to unseal.
        let (watched, told) = (vault.clone(), health.clone());
        tasks.spawn("vault-health", |stop| watch_vault(watched, told, stop));

        let mode = if initialize { Mode::Found } else { Mode::Member };
        let catalog_spec = GroupSpec { id: GroupId::CATALOG, voters: voters.clone(), mode };
        let catalog_group = runtime
            .start(catalog_spec, log.log.group(GroupId::CATALOG), machine)
            .await
            .context("the catalog cannot start")?;
        let version_view = view.clone();
        let version: Arc<dyn Fn() -> ClusterVersion + Send + Sync> = Arc::new(move || version_view.cluster_version());
        let local =
            LocalParts { node: me, vault: vault.clone(), client: vault_client.clone(), version: Arc::clone(&version) };
        local::serve(config.operator_socket(), local, &tasks);
        let (routed, vault_members, founders, catalog_view) =
            (link.clone(), vault.members(), voters.clone(), view.clone());
        tasks.spawn("vault-nodes", |stop| members::follow_vault(routed, vault_members, founders, catalog_view, stop));
        let leader_link = LeaderLink::new(peers.clone(), GroupId::CATALOG, catalog_group.leadership());
        let catalog = Catalog::new(CatalogParts {
            me,
            founders: voters.clone(),
            replica: Arc::new(catalog_group.clone()),
            view,
            link: Arc::new(leader_link),
            vault: Arc::new(VaultRings::new(vault_client.clone(), cluster, me, version)),
            // As long as a lease: within W of a revocation, no node vouches for the API key any more.
            fresh_for: lease.length,
            liveness: Arc::new(runtime.liveness()),
            lost_after: config.cluster.lost_after.into(),
            clock: Arc::clone(&clock),
            rng: Arc::clone(&rng),
        });
        let parts = UpgradesParts {
            speaks,
            founders: voters,
            catalog: catalog.clone(),
            peers: peers.clone(),
            runtime: runtime.clone(),
            floor,
        };
        let (upgrades, fatal) = (Upgrades::new(parts), Arc::<OnceLock<String>>::default());
        catalog.explain_not_yet(upgrades.why_not_yet());
        let (followed, reason) = (upgrades.clone(), Arc::clone(&fatal));
        tasks.spawn("cluster-version", |stop| followed.follow(reason, stop));
        let mut identity_config = IdentityConfig::new(cluster);
        if !config.auth.issuer.is_empty() {
            config.auth.issuer.trim_end_matches('/').clone_into(&mut identity_config.issuer);
        }
        if let Some(addresses) = &addresses {
            let scheme = if listeners.tls.is_some() { "https" } else { "http" };
            identity_config.public_url = format!("{scheme}://localhost:{}", addresses.http.port());
        }
        identity_config.access_ttl = config.auth.access_ttl.into();
        identity_config.refresh_ttl = config.auth.refresh_ttl.into();
        identity_config.trusted_proxies = config.auth.trusted_proxies.iter().map(IpAddr::to_canonical).collect();
        let secrets = Arc::new(VaultSecrets::new(vault_client.clone(), me));
        let joins = Joins::new(JoinParts {
            cluster,
            above: config.cluster.peers.iter().map(|peer| peer.id).max().unwrap_or(me),
            catalog: catalog.clone(),
            secrets: Arc::<VaultSecrets>::clone(&secrets),
            clock: Arc::clone(&clock),
            rng: Arc::clone(&rng),
        });
        let identity = Identity::new(identity_config, catalog.clone(), secrets, Arc::clone(&clock), Arc::clone(&rng));
        let forward = PeerForward::new(Arc::new(peers.clone()));
        let partitions = Partitions::start(PartitionsParts {
            me,
            cluster,
            runtime: runtime.clone(),
            log: log.log.clone(),
            catalog: catalog.clone(),
            keys: Arc::new(holder.clone()),
            forward: Arc::new(forward.clone()),
            barrier: Arc::new(forward.clone()),
            reads: Arc::new(forward),
            clock: Arc::clone(&clock),
            rng: Arc::clone(&rng),
            tasks: tasks.clone(),
            limits: BatchLimits::default(),
            tail_bytes: ByteCount(config.storage.tail_cache.get() / 2),
        });
        let stored = partitions.clone();
        let quotas = Quotas::new(QuotaParts {
            me,
            catalog: catalog.clone(),
            link: Arc::new(PeerQuota::new(Arc::new(peers.clone()))),
            stored: Arc::new(move || stored.stored_by_project()),
        });
        let (certificate, version_shown, listed) = (tls.clone(), catalog.view().clone(), catalog.view().clone());
        let reporter = Reporter::new(ReporterParts {
            me,
            data_dir: dir.clone(),
            runtime: runtime.clone(),
            partitions: partitions.clone(),
            vault: vault.clone(),
            holder: holder.clone(),
            health: health.clone(),
            certificate_expires: Arc::new(move || certificate.expires()),
            speaks,
            cluster_version: Arc::new(move || version_shown.cluster_version()),
            stays: Arc::new(move |node| members::stays(&listed, node)),
            clock: Arc::clone(&clock),
        });
        let asked = PeerReports::new(cluster, reporter.clone(), catalog.clone(), Arc::new(peers.clone()));
        let reports = reports.get_or_init(|| asked).clone();
        let published = reporter.clone();
        tasks.spawn("report-metrics", |stop| published.keep_published(stop));
        let services = Services {
            node: me,
            cluster,
            peers: peers.clone(),
            runtime: runtime.clone(),
            catalog: catalog.clone(),
            vault: Arc::new(VaultService(vault.clone())),
            holder: Arc::new(HolderService(holder.clone())),
            more: Routes::new(ForwardService::server(partitions.clone(), tasks.clone()))
                .add_service(QuotaService::server(quotas.clone()))
                .add_service(ReportService::server(reporter)),
            join: Routes::new(join::service(joins.clone())),
            tasks: tasks.clone(),
        };
        peers::serve(listeners.peers, &tls, services);
        let client_listeners = std::sync::Mutex::new(listeners.grpc.zip(listeners.http));
        Ok(Self {
            config,
            cluster,
            life,
            addresses,
            fatal,
            health,
            tasks,
            edge,
            runtime,
            vault,
            holder,
            catalog_group,
            catalog,
            identity,
            joins,
            upgrades,
            client_tls: listeners.tls,
            partitions,
            quotas,
            reports,
            vault_client,
            clock,
            rng,
            client_listeners,
            logs: vec![log, vault_log],
            _control: control,
            _data_dir: data_dir,
        })
    }
}

impl Channels for Peers {
    fn bulk(&self, peer: NodeId) -> Option<PeerChannel> {
        self.bulk_channel(peer)
    }

    fn control(&self, peer: NodeId) -> Option<PeerChannel> {
        self.channel(peer)
    }
}

/// Tells `/readyz` why the vault is sealed here, again and again.
async fn watch_vault(vault: Vault, health: Health, stop: Stop) {
    while stop.run_until_cancelled(tokio::time::sleep(HEALTH_WATCH)).await.is_some() {
        note_vault(&vault, &health);
    }
}

fn note_vault(vault: &Vault, health: &Health) {
    health.trouble("vault", vault.trouble().map(|why| format!("sealed: {why}")));
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
            edge::serve_http("http-server", http, tls, crate::identity::router(self.identity.clone()), &self.edge);
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

    /// Long-lived chores that need a quorum now and then, and are patient about it.
    fn tend(&self) {
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
        let (record, fatal, vault) = (self.record(), Arc::clone(&self.fatal), self.vault.clone());
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
                            let _ = fatal.set(format!("{error:#}"));
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

    fn record(&self) -> NodeRecord {
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

    /// Returns when the node cannot go on, with the reason.
    pub async fn failed(&self) -> String {
        self.tasks.stop_token().cancelled().await;
        let reason = self.tasks.panicked().or_else(|| self.fatal.get().cloned());
        reason.unwrap_or_else(|| "the node was asked to stop".to_owned())
    }

    /// Hands over every leadership while clients are still served, so that none of them waits for an election: what they publish from
    /// now on is passed on to the new leaders. A balancer is told first, by `/readyz`.
    pub async fn hand_over(&self) {
        let what = "this node is asked to stop: it hands its leaderships over";
        self.health.trouble("stopping", Some(what.to_owned()));
        let deadline: Duration = self.config.shutdown.deadline.into();
        self.runtime.hand_over(deadline / 2).await;
    }

    /// Refuses new work and ends streams, in order; what is in progress is finished or told that it is not.
    pub async fn drain(&self) {
        self.health.set(Phase::Stopping);
        self.identity.set_availability(Availability::Stopping);
        let deadline: Duration = self.config.shutdown.deadline.into();
        if !self.edge.shut_down(deadline).await {
            warn!("some client calls did not end in time; their connections are closed");
        }
    }

    /// Hands leaderships over, stops every group, gives the lease back and closes the logs.
    pub async fn close(self) {
        let deadline: Duration = self.config.shutdown.deadline.into();
        self.runtime.shut_down(deadline).await;
        self.holder.release().await;
        if !self.tasks.shut_down(deadline).await {
            warn!("some tasks did not end in time");
        }
        for log in self.logs {
            log.close().await;
        }
        info!(node = self.config.node.id, "stopped");
    }
}

/// A log database and the thread that writes it.
struct OpenLog {
    log: Arc<FrameLog>,
    writer: JoinHandle<()>,
}

type OpenFn = fn(Arc<dyn Disk>, &Path, LogConfig) -> Result<(Arc<FrameLog>, Writer), OpenError>;

impl OpenLog {
    fn open(open: OpenFn, disk: &Arc<dyn Disk>, folder: &Path, config: LogConfig) -> anyhow::Result<Self> {
        let (log, writer) = open(Arc::clone(disk), folder, config)?;
        Ok(Self { log, writer: writer.spawn()? })
    }

    /// Closes the file cleanly, so that the next start needs no repair.
    async fn close(self) {
        self.log.close();
        let writer = self.writer;
        if !matches!(tokio::task::spawn_blocking(move || writer.join()).await, Ok(Ok(()))) {
            warn!("a log was not closed cleanly; it is repaired at the next start");
        }
    }
}

fn log_config(config: &Config) -> LogConfig {
    LogConfig {
        prefill: config.storage.prefill.into(),
        tail: config.storage.tail_cache.into(),
        cache: config.storage.page_cache.into(),
        ..LogConfig::default()
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
