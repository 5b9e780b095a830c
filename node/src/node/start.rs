//! Starting: everything that a node has before it serves clients, in the order of node.rs.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use anyhow::Context as _;
use ensign_keyvault::{Entropy, Holder, HolderConfig, RoutedLink, Vault, VaultClient, VaultConfig, VaultLinks};
use ensign_proto::{ByteCount, ClusterVersion, GroupId, NodeId};
use ensign_raft::env::{Clock, OsRng, Rng, SystemClock, Tasks};
use ensign_raft::{GroupSpec, Limits, Mode, Runtime, RuntimeConfig};
use ensign_storage::{DataDir, Disk, FrameLog, LogConfig, NodeLog as _, OpenError, Writer};
use tonic::service::Routes;
use tracing::{info, warn};

use super::ending::Ending;
use super::serving::watch_vault;
use super::{Addresses, Node, NodeEnd, NodeSpec};
use crate::catalog::{Catalog, CatalogMachine, CatalogParts, VaultRings};
use crate::config::{Config, Upgrade};
use crate::control::ControlThread;
use crate::edge;
use crate::files::{NodeFile, NodeFloor};
use crate::health::{self, Health};
use crate::identity::{Identity, IdentityConfig, VaultSecrets};
use crate::join::{self, JoinParts, Joins};
use crate::local::{self, LocalParts};
use crate::members;
use crate::partition::forward::{Channels, ForwardService, PeerForward};
use crate::partition::{BatchLimits, Partitions, PartitionsParts};
use crate::peers::{
    self, LeaderLink, Life, Membership, PeerChannel, PeerMemory, Peers, PipeTransport, Services, Speaks, VaultCalls,
};
use crate::plant;
use crate::quota::{PeerQuota, QuotaParts, QuotaService, Quotas};
use crate::report::{PeerReports, ReportService, Reporter, ReporterParts};
use crate::root;
use crate::telemetry;
use crate::upgrade::{Upgrades, UpgradesParts};
use crate::vault::{HolderService, VaultService};

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
        let memory = PeerMemory::open(dir);
        if memory.has_removed(me) {
            return Err(NodeEnd::removed(me).into());
        }
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
        let (version_view, nodes_view) = (view.clone(), view.clone());
        let version: Arc<dyn Fn() -> ClusterVersion + Send + Sync> = Arc::new(move || version_view.cluster_version());
        let links = VaultLinks {
            holders: Arc::new(calls.clone()),
            peers: Arc::new(calls.clone()),
            version: Arc::clone(&version),
            nodes: Arc::new(move || nodes_view.started()),
        };
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
            floor: Arc::clone(&floor),
        };
        let (upgrades, end) = (Upgrades::new(parts), Arc::<OnceLock<NodeEnd>>::default());
        let ending = Ending {
            me,
            incarnation: life.incarnation,
            peers: peers.clone(),
            view: catalog.view().clone(),
            floor: Arc::clone(&floor),
            health: health.clone(),
            end: Arc::clone(&end),
        };
        tasks.spawn("ending", |stop| ending.watch(stop));
        catalog.explain_not_yet(upgrades.why_not_yet());
        let (followed, reason) = (upgrades.clone(), Arc::clone(&end));
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
            end,
            floor,
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

/// A log database and the thread that writes it.
pub(super) struct OpenLog {
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
    pub(super) async fn close(self) {
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
