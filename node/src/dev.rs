//! `ensign dev`: a whole cluster in one process, ready for an SDK.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use ensign_proto::{ClusterId, NodeId};
use ensign_raft::env::{Clock as _, OsRng, Rng as _, SystemClock};
use tokio::net::TcpListener;

use crate::authority::Authority;
use crate::bootstrap::{self, Credentials, Front};
use crate::cli::{DevArgs, UsageError};
use crate::config::{Config, LogFormat, LogSettings, PeerAddress, Provider};
use crate::files::{NodeFile, write_secret};
use crate::node::{Addresses, Listeners, Node, NodeSpec};
use crate::peers::PeerTls;
use crate::{harden, root, signals, telemetry};

/// A development cluster that runs.
pub struct DevCluster {
    nodes: Vec<Node>,
    /// What clients log in with, and where.
    pub credentials: Credentials,
    /// The addresses that clients use: those of the first node.
    pub addresses: Addresses,
    // Removed last, when everything that writes there has stopped.
    _scratch: Option<tempfile::TempDir>,
}

/// How long elections of topics' leaders may keep a cluster from being ready.
const LEADERS: Duration = Duration::from_secs(10);

/// Runs a development cluster until SIGINT or SIGTERM.
///
/// # Errors
/// An address is taken, the directory cannot be used, or a node fails.
pub async fn run(args: DevArgs) -> anyhow::Result<()> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "warn,openraft=error".to_owned());
    telemetry::start_logs(&LogSettings { format: LogFormat::Human, filter })?;
    crate::door::raise_open_files();
    harden::no_core_dumps();
    let stop = signals::stop()?;
    let Some(cluster) = stop.run_until_cancelled(DevCluster::start(&args)).await.transpose()? else { return Ok(()) };
    announce(&args, &cluster)?;
    cluster.run_until(stop.cancelled()).await
}

/// Prints the snippet, then the line `ready`.
fn announce(args: &DevArgs, cluster: &DevCluster) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let where_data = args.data.as_ref().map_or_else(
        || "a directory that is removed at the end (keep it with --data DIR)".to_owned(),
        |dir| dir.display().to_string(),
    );
    let credentials = args.credentials.display();
    let Addresses { grpc, http, metrics } = cluster.addresses;
    writeln!(out, "Ensign {}: {} replicas, data in {where_data}", env!("CARGO_PKG_VERSION"), args.nodes)?;
    writeln!(out, "  gRPC {grpc} · auth http://{http} · metrics http://{metrics}/metrics · credentials {credentials}")?;
    if let Some(dir) = &args.data {
        writeln!(
            out,
            "  root key {}: copy it off this machine; without it the data is lost",
            dir.join("root.key").display()
        )?;
    }
    writeln!(out, "\nPublish and read with PyEnsign (pip install --pre pyensign):\n")?;
    writeln!(out, "{}", snippet(&args.credentials, cluster.addresses))?;
    writeln!(out, "ready")?;
    Ok(out.flush()?)
}

/// A PyEnsign program that publishes one event and reads it back.
fn snippet(credentials: &Path, addresses: Addresses) -> String {
    format!(
        r#"import asyncio
from pyensign.ensign import Ensign
from pyensign.events import Event

async def main():
    ensign = Ensign(cred_path="{credentials}", endpoint="localhost:{grpc}", insecure=True,
                    auth_url="http://localhost:{http}")
    await ensign.ensure_topic_exists("greetings")
    event = Event(b'{{"hello": "world"}}', mimetype="application/json")
    await ensign.publish("greetings", event)
    await event.wait_for_ack()
    async for row in await ensign.query("SELECT * FROM greetings"):
        print(row.data)
    await ensign.close()

asyncio.run(main())
"#,
        credentials = credentials.display(),
        grpc = addresses.grpc.port(),
        http = addresses.http.port(),
    )
}

impl DevCluster {
    /// Starts the nodes and, on a new directory, makes the cluster; returns once all of it serves.
    ///
    /// # Errors
    /// An address is taken, the directory cannot be used, or a node fails.
    pub async fn start(args: &DevArgs) -> anyhow::Result<Self> {
        let settings = Config::development()?;
        if settings.root.provider != Provider::File {
            let what = "root.provider: `ensign dev` keeps its root key in a file; use `ensign serve` for the others";
            return Err(UsageError(what.to_owned()).into());
        }
        let scratch = args.data.is_none().then(tempfile::tempdir).transpose()?;
        let dir = match (&args.data, &scratch) {
            (Some(dir), _) => dir.clone(),
            (None, Some(scratch)) => scratch.path().to_owned(),
            (None, None) => anyhow::bail!("no directory to keep data in"),
        };
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make the directory {}", dir.display()))?;

        let listen = |what: &'static str, address: SocketAddr| async move {
            TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address} for {what}: is another Ensign running? Choose another address with --{what}"))
        };
        let grpc = listen("grpc", args.grpc).await?;
        let http = listen("http", args.http).await?;
        let metrics = listen("metrics", args.metrics).await?;
        let addresses =
            Addresses { grpc: grpc.local_addr()?, http: http.local_addr()?, metrics: metrics.local_addr()? };

        let mut peer_listeners = Vec::new();
        let mut peers = Vec::new();
        for id in 1..=args.nodes {
            let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
            peers.push(PeerAddress { id: NodeId(id), address: listener.local_addr()?.to_string() });
            peer_listeners.push(listener);
        }

        check_nodes(&dir, args.nodes)?;
        let cluster = cluster_of(&dir)?;
        if !dir.join("bootstrapped").exists() {
            root::make_key(&dir.join("root.key"))?;
        }
        // Every node lives in this process, so nobody else ever needs to trust this authority.
        let authority = Authority::generate("dev")?;
        let mut nodes = Vec::new();
        let mut client_listeners = Some((grpc, http, metrics));
        for (id, listener) in (1..=args.nodes).zip(peer_listeners) {
            let node_dir = dir.join(format!("node-{id}"));
            let issued = authority.issue(NodeId(id))?;
            let tls = PeerTls::from_pem(issued.certificate, issued.private_key, authority.certificate())?;
            let mut config = settings.clone();
            config.node.id = id;
            config.node.data_dir = node_dir;
            config.node.root_key = dir.join("root.key");
            config.cluster.peers = peers.clone();
            let listeners = match client_listeners.take() {
                Some((grpc, http, metrics)) => {
                    Listeners { grpc: Some(grpc), http: Some(http), metrics: Some(metrics), peers: listener, tls: None }
                }
                None => Listeners { grpc: None, http: None, metrics: None, peers: listener, tls: None },
            };
            let spec = NodeSpec { config, cluster, listeners, tls, initialize: id == 1 };
            nodes.push(Node::start(spec).await.with_context(|| format!("node {id} cannot start"))?);
        }

        let (kept, done) = (dir.join("credentials.json"), dir.join("bootstrapped"));
        let credentials = match Credentials::read(&kept)? {
            Some(credentials) if done.exists() => credentials.at(&Front::of(&settings, addresses)),
            _ => bootstrap::run(&nodes[0], &kept, addresses, None, None).await?,
        };
        write_secret(&done, b"")?;
        credentials.write(&args.credentials)?;
        for node in &nodes {
            node.serve().await?;
        }
        nodes[0].led(LEADERS).await;
        Ok(Self { nodes, credentials, addresses, _scratch: scratch })
    }

    /// Waits for `stop` or for a node to fail, then shuts every node down in order.
    ///
    /// # Errors
    /// A node failed.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let failures = futures::future::select_all(self.nodes.iter().map(|node| Box::pin(node.failed())));
        let failure = tokio::select! {
            () = stop => None,
            (failure, _, _) = failures => Some(failure),
        };
        self.shut_down().await;
        failure.map_or(Ok(()), |failure| Err(anyhow::anyhow!(failure)))
    }

    /// Drains and closes every node.
    pub async fn shut_down(self) {
        for node in &self.nodes {
            node.drain().await;
        }
        for node in self.nodes {
            node.close().await;
        }
    }
}

/// Refuses a directory whose cluster was made with other nodes: one without its data could forget what it has promised.
fn check_nodes(dir: &Path, nodes: u64) -> anyhow::Result<()> {
    if !dir.join("bootstrapped").exists() {
        return Ok(());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        let id = entry.file_name().to_str().and_then(|name| name.strip_prefix("node-")?.parse::<u64>().ok());
        found.extend(id.filter(|_| entry.path().join("node.json").exists()));
    }
    found.sort_unstable();
    if found.iter().copied().eq(1..=nodes) {
        return Ok(());
    }
    let list: Vec<String> = found.iter().map(u64::to_string).collect();
    Err(UsageError(format!(
        "{} holds the data of nodes {}, and {nodes} nodes were asked for: start it with the --nodes that it was made with, and put \
         back any folder that is missing",
        dir.display(),
        if list.is_empty() { "none".to_owned() } else { list.join(", ") },
    ))
    .into())
}

/// The cluster that the directory belongs to; a new one for a new directory.
fn cluster_of(dir: &Path) -> anyhow::Result<ClusterId> {
    if let Some((_, cluster)) = NodeFile::read(&dir.join("node-1"), NodeId(1))? {
        return Ok(cluster);
    }
    let mut random = [0; 10];
    OsRng.fill(&mut random);
    Ok(ClusterId::new(SystemClock.wall().as_millis(), random))
}
