//! A cluster of `ensign serve` processes, each with its own certificates, settings, data and, in a way, host.

mod operator;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{BeginWith, Client, CredentialsFile, Options};
use tokio::time::{Instant, sleep};

use crate::certificates::Authority;
use crate::links::{Links, Namespaces, Network, Node, Proxy, namespaces, patterns};
use crate::process::Process;

/// How the links between nodes are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mechanism {
    /// A network namespace for each node. Needs root, `ip` and `nft`; cuts only.
    Netns,
    /// A TCP proxy between each two nodes, all on loopback. Cuts, delays and throttles.
    Proxy,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The server.
    pub binary: PathBuf,
    /// How many nodes, from number 1.
    pub nodes: Node,
    /// How they are linked.
    pub mechanism: Mechanism,
    /// `cluster.timing` of every node.
    pub timing: &'static str,
    /// More settings of each node: lines of TOML for its section `[node]`.
    pub more: BTreeMap<Node, String>,
    /// More settings of all: lines of TOML for the sections `[cluster]` and `[storage]`.
    pub all: Settings,
    /// How many machines may join later, numbered after the nodes; see [`Cluster::join`].
    pub joining: Node,
}

/// Settings that every node has.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Lines of its section `[cluster]`.
    pub cluster: String,
    /// Lines of its section `[storage]`.
    pub storage: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cluster: String::new(), storage: "prefill = \"64MiB\"\ntail_cache = \"64MiB\"\n".to_owned() }
    }
}

/// Where a node listens.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// gRPC for clients.
    pub grpc: SocketAddr,
    /// HTTP for logging in.
    pub http: SocketAddr,
    /// Metrics and health.
    pub metrics: SocketAddr,
    /// Other nodes.
    pub peers: SocketAddr,
}

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    plan: Plan,
    dir: Option<tempfile::TempDir>,
    root: PathBuf,
    addresses: BTreeMap<Node, Addresses>,
    running: BTreeMap<Node, Process>,
    namespaces: Option<Namespaces>,
    http: reqwest::Client,
    /// The links between its nodes. Those of clients are sound.
    pub network: Network,
}

/// The private key of the cluster's own authority: made known to it where machines join later.
const AUTHORITY_KEY: &str = "ca.key";

/// Whether a build wants to be told that a cluster is to have no authority; the release before did not.
fn knows_own_certificates(binary: &Path) -> bool {
    let help = std::process::Command::new(binary).args(["serve", "--help"]).output();
    help.is_ok_and(|help| String::from_utf8_lossy(&help.stdout).contains("--own-certificates"))
}

/// Below the ports that the system gives to outgoing connections (32768 and up): one of those may carry a connection by the time that the
/// server gets to it, and again whenever a node that was killed comes back.
const PORTS: Range<u16> = 10_000..15_000;

/// An address on loopback that nobody listens on now, and that this process gives out once.
fn free_address() -> anyhow::Result<SocketAddr> {
    static GIVEN: AtomicU16 = AtomicU16::new(0);
    PORTS
        .map(|_| PORTS.start + GIVEN.fetch_add(1, Ordering::Relaxed) % (PORTS.end - PORTS.start))
        .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        .find(|address| TcpListener::bind(address).is_ok())
        .context("no port for a node is free")
}

impl Addresses {
    fn on_loopback() -> anyhow::Result<Self> {
        Ok(Self { grpc: free_address()?, http: free_address()?, metrics: free_address()?, peers: free_address()? })
    }

    fn of_host(host: Ipv4Addr) -> Self {
        let address = |port: u16| SocketAddr::from((host, port));
        Self { grpc: address(5356), http: address(8088), metrics: address(1205), peers: address(5357) }
    }
}

impl Cluster {
    /// Starts and bootstraps one; returns once every node is ready.
    ///
    /// # Errors
    /// What does not start, and what it said.
    pub async fn start(plan: Plan) -> anyhow::Result<Self> {
        ensure!(
            plan.binary.exists(),
            "there is no server at {}: build one with `cargo build --release`, or name it with --binary",
            plan.binary.display()
        );
        let dir = tempfile::Builder::new().prefix("ensign-hosts-").tempdir()?;
        let root = dir.path().to_owned();
        let nodes: BTreeSet<Node> = (1..=plan.nodes + plan.joining).collect();
        let addresses: BTreeMap<Node, Addresses> = match plan.mechanism {
            Mechanism::Netns => {
                nodes.iter().map(|node| (*node, Addresses::of_host(namespaces::address(*node)))).collect()
            }
            Mechanism::Proxy => {
                nodes.iter().map(|node| Ok((*node, Addresses::on_loopback()?))).collect::<anyhow::Result<_>>()?
            }
        };
        let mut seen_from: BTreeMap<(Node, Node), SocketAddr> = BTreeMap::new();
        let (links, namespaces): (Box<dyn Links>, _) = match plan.mechanism {
            Mechanism::Netns => (Box::new(Namespaces::of_this_hub()?), Some(Namespaces::of_this_hub()?)),
            Mechanism::Proxy => {
                let (proxy, through) = Proxy::start(patterns::ways(&nodes), |node| addresses[&node].peers)?;
                seen_from = through;
                (Box::new(proxy), None)
            }
        };
        let authority = Authority::generate()?;
        std::fs::write(root.join("ca.pem"), authority.certificate())?;
        std::fs::write(root.join(AUTHORITY_KEY), authority.private_key())?;
        std::fs::set_permissions(root.join(AUTHORITY_KEY), std::fs::Permissions::from_mode(0o600))?;
        for (node, own) in &addresses {
            let folder = root.join(format!("node-{node}"));
            std::fs::create_dir_all(&folder)?;
            let joins = *node > plan.nodes;
            if !joins {
                let (certificate, private_key) = authority.issue(*node)?;
                std::fs::write(folder.join("node.pem"), certificate)?;
                std::fs::write(folder.join("node.key"), private_key)?;
            }
            let peers: Vec<String> = addresses
                .iter()
                .filter(|(to, _)| **to <= plan.nodes || *to == node)
                .map(|(to, real)| match (plan.mechanism, seen_from.get(&(*node, *to))) {
                    (_, Some(through)) => format!("\"{to}={through}\""),
                    // The others know a machine that joins by what it says of itself alone.
                    (Mechanism::Proxy, None) if joins => format!("\"{to}={}\"", real.peers),
                    // What a node says of itself is told to all, and tried first; what each has in its own settings comes after. Nobody
                    // listens here, so that everybody goes through the proxy.
                    (Mechanism::Proxy, None) => format!("\"{to}=127.213.0.{to}:9\""),
                    (Mechanism::Netns, None) => format!("\"{to}={}\"", real.peers),
                })
                .collect();
            let settings = settings(*node, &root, own, &peers.join(", "), &plan);
            std::fs::write(folder.join("ensign.toml"), settings)?;
        }
        let http = reqwest::Client::builder().timeout(Duration::from_secs(1)).build()?;
        let network = Network::new(nodes.clone(), links);
        let mut cluster =
            Self { plan, dir: Some(dir), root, addresses, running: BTreeMap::new(), namespaces, http, network };
        for node in 1..=cluster.plan.nodes {
            cluster.spawn(node, node == 1)?;
        }
        for node in 1..=cluster.plan.nodes {
            cluster.ready(node).await?;
        }
        Ok(cluster)
    }

    /// Nodes that are started from now on run this program.
    pub fn run_from_now_on(&mut self, binary: &Path) {
        binary.clone_into(&mut self.plan.binary);
    }

    /// Leaves the directory where it is, for whoever wants to know what happened.
    pub fn keep(&mut self) -> &Path {
        if let Some(dir) = self.dir.take() {
            let _ = dir.keep();
        }
        &self.root
    }

    /// Where node `node` listens.
    pub fn addresses(&self, node: Node) -> Addresses {
        self.addresses[&node]
    }

    /// The SDK credentials that the bootstrap wrote.
    pub fn credentials(&self) -> PathBuf {
        self.root.join("credentials.json")
    }

    fn log(&self, node: Node) -> PathBuf {
        self.root.join(format!("node-{node}/log"))
    }

    fn spawn(&mut self, node: Node, bootstrap: bool) -> anyhow::Result<()> {
        let mut command = self.namespaces.as_ref().map(|it| it.command(node)).unwrap_or_default();
        command.push(self.plan.binary.display().to_string());
        command.push("serve".to_owned());
        command.push(format!("--config={}", self.root.join(format!("node-{node}/ensign.toml")).display()));
        if bootstrap {
            command.push("--bootstrap".to_owned());
            command.push(format!("--credentials={}", self.credentials().display()));
            if self.plan.joining > 0 {
                command.push(format!("--authority-key={}", self.root.join(AUTHORITY_KEY).display()));
            } else if self.namespaces.is_some() && knows_own_certificates(&self.plan.binary) {
                command.push("--own-certificates".to_owned());
            }
        }
        let process = Process::start(format!("node {node}"), &command, &self.log(node))?;
        self.running.insert(node, process);
        Ok(())
    }

    fn process(&mut self, node: Node) -> anyhow::Result<&mut Process> {
        self.running.get_mut(&node).with_context(|| format!("node {node} does not run"))
    }

    /// Starts a node that does not run; see [`Cluster::ready`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_node(&mut self, node: Node) -> anyhow::Result<()> {
        self.spawn(node, false)
    }

    /// Waits until a node that was started serves clients.
    ///
    /// # Errors
    /// It ended, or does not get there.
    pub async fn ready(&mut self, node: Node) -> anyhow::Result<()> {
        self.process(node)?.ready().await
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self, node: Node) -> anyhow::Result<()> {
        self.process(node)?.kill()?;
        self.running.remove(&node);
        Ok(())
    }

    /// SIGSTOP.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&mut self, node: Node) -> anyhow::Result<()> {
        self.process(node)?.pause()
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// It does not run.
    pub fn resume(&mut self, node: Node) -> anyhow::Result<()> {
        self.process(node)?.resume()
    }

    /// SIGTERM, and waits for the end. How long that took.
    ///
    /// # Errors
    /// It does not run, or does not stop in order.
    pub async fn terminate(&mut self, node: Node) -> anyhow::Result<Duration> {
        let took = self.process(node)?.terminate(Duration::from_mins(1)).await?;
        self.running.remove(&node);
        Ok(took)
    }

    /// The nodes that run, or are paused.
    pub fn running(&self) -> BTreeSet<Node> {
        self.running.keys().copied().collect()
    }

    /// A node that has ended by itself is an error, whatever was done to it.
    ///
    /// # Errors
    /// Which, and what it said.
    pub fn nobody_died(&mut self) -> anyhow::Result<()> {
        for (node, process) in &mut self.running {
            if let Some(status) = process.ended()? {
                let log = self.root.join(format!("node-{node}/log"));
                anyhow::bail!("node {node} ended by itself with {status}; it said:\n{}", crate::process::tail(&log));
            }
        }
        Ok(())
    }

    /// Whether `/readyz` of the node says that it may be sent work.
    pub async fn is_healthy(&self, node: Node) -> bool {
        let url = format!("http://{}/readyz", self.addresses[&node].metrics);
        self.http.get(url).send().await.is_ok_and(|reply| reply.status().is_success())
    }

    /// Waits until every node that runs is healthy.
    ///
    /// # Errors
    /// Which one is not, after two minutes.
    pub async fn healthy(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        for node in self.running.keys() {
            while !self.is_healthy(*node).await {
                ensure!(begun.elapsed() < Duration::from_mins(2), "node {node} does not become healthy");
                sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    fn options(&self, nodes: &[Node]) -> anyhow::Result<(Options, Option<Options>)> {
        let (mut options, mut admin) = Options::from_file(CredentialsFile::read(&self.credentials())?);
        let list = |address: fn(&Addresses) -> String| {
            nodes.iter().map(|node| address(&self.addresses[node])).collect::<Vec<_>>().join(",")
        };
        for options in std::iter::once(&mut options).chain(admin.as_mut()) {
            options.set_endpoints(&list(|it| it.grpc.to_string()));
            options.set_auth_urls(&list(|it| format!("http://{}", it.http)));
            options.begin_with = BeginWith::First;
            options.insecure = true;
        }
        Ok((options, admin))
    }

    /// A client that knows these nodes, and begins with the first.
    ///
    /// # Errors
    /// There are no credentials yet.
    pub fn client(&self, nodes: &[Node]) -> anyhow::Result<Client> {
        Ok(Client::connect(self.options(nodes)?.0)?)
    }

    /// A client that knows all nodes, and begins with `first`.
    ///
    /// # Errors
    /// There are no credentials yet.
    pub fn client_from(&self, first: Node) -> anyhow::Result<Client> {
        let all: Vec<Node> = self.addresses.keys().copied().collect();
        let begin = all.iter().position(|node| *node == first).unwrap_or(0);
        self.client(&[&all[begin..], &all[..begin]].concat())
    }

    /// The operator's client.
    ///
    /// # Errors
    /// There are no credentials yet.
    pub fn admin(&self) -> anyhow::Result<Client> {
        let all: Vec<Node> = self.addresses.keys().copied().collect();
        self.admin_of(&all)
    }

    /// The operator's client, which knows these nodes.
    ///
    /// # Errors
    /// There are no credentials yet.
    pub fn admin_of(&self, nodes: &[Node]) -> anyhow::Result<Client> {
        Ok(Client::connect(self.options(nodes)?.1.context("the credentials file has no admin key")?)?)
    }

    /// Who leads the topic, as the cluster's status says.
    ///
    /// # Errors
    /// The cluster does not answer, or nobody leads.
    pub async fn leader_of(&self, topic: &str) -> anyhow::Result<Node> {
        let admin = self.admin()?;
        let begun = Instant::now();
        loop {
            let status = admin.admin().cluster_status().await?;
            let group = status.groups.iter().find(|group| group.name.split(['/', ' ']).any(|part| part == topic));
            if let Some(leader) = group.map(|group| group.leader).filter(|leader| *leader > 0) {
                return Ok(leader);
            }
            ensure!(begun.elapsed() < Duration::from_secs(30), "nobody leads {topic}: {:?}", status.groups);
            sleep(Duration::from_millis(100)).await;
        }
    }
}

fn settings(node: Node, root: &Path, own: &Addresses, peers: &str, plan: &Plan) -> String {
    let folder = root.join(format!("node-{node}"));
    let plaintext = IpAddr::is_loopback(&own.grpc.ip());
    format!(
        "[node]\nid = {node}\ndata_dir = \"{folder}/data\"\nroot_key = \"{root}/root.key\"\n{more}\
         [listen]\ngrpc = \"{}\"\nhttp = \"{}\"\nmetrics = \"{}\"\npeers = \"{}\"\nplaintext = {}\n\
         [cluster]\npeers = [{peers}]\ncertificate = \"{folder}/node.pem\"\nprivate_key = \"{folder}/node.key\"\n\
         authority = \"{root}/ca.pem\"\ntiming = \"{}\"\n{cluster}\
         [storage]\n{storage}",
        own.grpc,
        own.http,
        own.metrics,
        own.peers,
        !plaintext,
        plan.timing,
        more = plan.more.get(&node).map_or("", String::as_str),
        cluster = plan.all.cluster,
        storage = plan.all.storage,
        folder = folder.display(),
        root = root.display(),
    )
}
