//! Real `ensign` processes for tests: started on free ports, killed, restarted, always reaped.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part, and none is a library")]

pub mod ledger;
pub mod machines;
pub mod process;
pub mod refused;
pub mod wiretap;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use ensign_client::{BeginWith, CallError, Client, CredentialsFile, Delivery, Options};
use ensign_node::authority::Authority;
use ensign_proto::NodeId;

use self::process::ready_lines;
pub use self::process::{Plant, Process};

/// A port that was free a moment ago.
pub fn free_port() -> anyhow::Result<u16> {
    Ok(ensign_node::bench::free_port()?.port())
}

/// `ensign dev` on a directory, restartable on the same ports.
pub struct Dev {
    /// The directory of everything.
    pub dir: tempfile::TempDir,
    /// What the next start plants.
    pub plant: Plant,
    data: PathBuf,
    args: Vec<String>,
    process: Process,
}

impl Dev {
    /// Starts a cluster of `nodes`.
    pub fn start(nodes: u32) -> anyhow::Result<Self> {
        Self::start_planted(nodes, None)
    }

    /// Starts a cluster of `nodes` with something wrong.
    pub fn start_planted(nodes: u32, plant: Plant) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let data = dir.path().join("data");
        Self::start_at(nodes, plant, dir, data)
    }

    /// Starts a cluster of `nodes` that keeps its data in `data`, and everything else in `dir`.
    pub fn start_at(nodes: u32, plant: Plant, dir: tempfile::TempDir, data: PathBuf) -> anyhow::Result<Self> {
        let (grpc, http, metrics) = (free_port()?, free_port()?, free_port()?);
        let path = |name: &str| dir.path().join(name).display().to_string();
        let args: Vec<String> = [
            "dev".to_owned(),
            format!("--nodes={nodes}"),
            format!("--data={}", data.display()),
            format!("--grpc=127.0.0.1:{grpc}"),
            format!("--http=127.0.0.1:{http}"),
            format!("--metrics=127.0.0.1:{metrics}"),
            format!("--credentials={}", path("credentials.json")),
        ]
        .into();
        let process = Process::start("ensign dev", &args, &dir.path().join("log"), plant)?;
        Ok(Self { dir, plant, data, args, process })
    }

    /// The SDK credentials file that it wrote.
    pub fn credentials(&self) -> PathBuf {
        self.dir.path().join("credentials.json")
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.data.clone()
    }

    /// The command line.
    pub fn args(&self) -> &[String] {
        &self.args
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What the process printed.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// A client with the project's key.
    pub fn client(&self) -> anyhow::Result<Client> {
        let (options, _) = Options::from_file(CredentialsFile::read(&self.credentials())?);
        Ok(Client::connect(options)?)
    }

    /// A client with the operator's key.
    pub fn admin(&self) -> anyhow::Result<Client> {
        let (_, admin) = Options::from_file(CredentialsFile::read(&self.credentials())?);
        Ok(Client::connect(admin.context("the credentials file has no admin key")?)?)
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill()
    }

    /// SIGTERM; see [`Process::terminate`].
    pub fn terminate(&mut self, limit: Duration) -> anyhow::Result<bool> {
        self.process.terminate(limit)
    }

    /// Starts it again after a kill.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.process = Process::start("ensign dev", &self.args, &self.dir.path().join("log"), self.plant)?;
        Ok(())
    }
}

/// Three `ensign serve` processes on loopback, with certificates of their own authority.
pub struct Cluster {
    /// The directory of everything.
    pub dir: tempfile::TempDir,
    plant: Plant,
    /// More settings of every node.
    settings: String,
    authority: Authority,
    nodes: BTreeMap<u64, Process>,
    peers: BTreeMap<u64, u16>,
    grpc: BTreeMap<u64, u16>,
    http: BTreeMap<u64, u16>,
    metrics: BTreeMap<u64, u16>,
    _taps: tokio::task::JoinSet<()>,
}

impl Cluster {
    /// Starts and bootstraps `count` nodes.
    pub fn start(count: u64) -> anyhow::Result<Self> {
        Self::start_tapped(count, None, None)
    }

    /// Starts and bootstraps `count` nodes with these settings more. Nothing waits for the root key of those that did not make it.
    pub fn start_set(count: u64, settings: &str) -> anyhow::Result<Self> {
        Self::start_whole(count, None, None, settings)
    }

    /// Starts and bootstraps `count` nodes with something wrong, whose peer connections all pass through a wiretap.
    pub fn start_tapped(count: u64, plant: Plant, seen: Option<&wiretap::Seen>) -> anyhow::Result<Self> {
        Self::start_whole(count, plant, seen, "")
    }

    fn start_whole(count: u64, plant: Plant, seen: Option<&wiretap::Seen>, settings: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let authority = Authority::generate("test")?;
        std::fs::write(dir.path().join("ca.pem"), authority.certificate())?;
        let ports: Vec<u16> = (1..=count).map(|_| free_port()).collect::<Result<_, _>>()?;
        let mut taps = tokio::task::JoinSet::new();
        // How node `from` reaches node `to`.
        let mut address = |from: u64, to: u64| -> anyhow::Result<String> {
            let real = format!("127.0.0.1:{}", ports[to as usize - 1]);
            let Some(seen) = seen else { return Ok(real) };
            if from == to {
                // What a node says of itself, the catalog tells the others: this one is reached through the taps only.
                return Ok("127.0.0.1:1".to_owned());
            }
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let tapped = listener.local_addr()?.to_string();
            wiretap::tap(&mut taps, &authority, (NodeId(from), NodeId(to)), listener, real, seen.clone())?;
            Ok(tapped)
        };
        let mut peers_of = BTreeMap::new();
        for from in 1..=count {
            let list: Vec<String> =
                (1..=count).map(|to| Ok(format!("\"{to}={}\"", address(from, to)?))).collect::<anyhow::Result<_>>()?;
            peers_of.insert(from, list.join(", "));
        }
        let mut cluster = Self {
            dir,
            plant,
            settings: settings.to_owned(),
            authority,
            nodes: BTreeMap::new(),
            peers: (1..=count).zip(ports).collect(),
            grpc: BTreeMap::new(),
            http: BTreeMap::new(),
            metrics: BTreeMap::new(),
            _taps: taps,
        };
        for id in 1..=count {
            cluster.prepare(id, &peers_of[&id])?;
        }
        for id in 1..=count {
            let process = Process::spawn(&format!("node {id}"), &cluster.args(id, id == 1), &cluster.log(id), plant)?;
            cluster.nodes.insert(id, process);
        }
        for id in 1..=count {
            let log = cluster.log(id);
            if let Some(process) = cluster.nodes.get_mut(&id) {
                process.wait_ready_after(&log, 0)?;
            }
        }
        Ok(cluster)
    }

    /// Gives node `id` its certificate, ports and settings.
    fn prepare(&mut self, id: u64, peers: &str) -> anyhow::Result<()> {
        let folder = self.folder(id);
        std::fs::create_dir_all(&folder)?;
        let issued = self.authority.issue(NodeId(id))?;
        std::fs::write(folder.join("node.pem"), issued.certificate)?;
        std::fs::write(folder.join("node.key"), issued.private_key)?;
        let (grpc, http, metrics) = (free_port()?, free_port()?, free_port()?);
        self.grpc.insert(id, grpc);
        self.http.insert(id, http);
        self.metrics.insert(id, metrics);
        let root = self.dir.path();
        let config = format!(
            "[node]\nid = {id}\ndata_dir = \"{folder}/data\"\nroot_key = \"{root}/root.key\"\n\
             [listen]\ngrpc = \"127.0.0.1:{grpc}\"\nhttp = \"127.0.0.1:{http}\"\nmetrics = \"127.0.0.1:{metrics}\"\n\
             peers = \"127.0.0.1:{port}\"\n\
             [cluster]\npeers = [{peers}]\ncertificate = \"{folder}/node.pem\"\nprivate_key = \"{folder}/node.key\"\n\
             authority = \"{root}/ca.pem\"\nvote_lost_after = \"5s\"\n[storage]\nprefill = \"64MiB\"\ntail_cache = \"64MiB\"\n\
             [shutdown]\ndeadline = \"5s\"\n{more}",
            more = self.settings,
            folder = folder.display(),
            root = root.display(),
            port = self.peers[&id],
        );
        Ok(std::fs::write(folder.join("ensign.toml"), config)?)
    }

    /// Adds node `id` to a cluster that runs: names it in the settings of the others, which are restarted one by one, and
    /// starts it on an empty data directory. Returns once it is ready.
    pub fn add(&mut self, id: u64) -> anyhow::Result<()> {
        self.peers.insert(id, free_port()?);
        let list = |peers: &BTreeMap<u64, u16>| {
            peers.iter().map(|(id, port)| format!("\"{id}=127.0.0.1:{port}\"")).collect::<Vec<_>>().join(", ")
        };
        let after = list(&self.peers);
        for known in self.ids() {
            let file = self.folder(known).join("ensign.toml");
            let settings = std::fs::read_to_string(&file)?;
            let lines = settings.lines().map(|line| {
                if line.starts_with("peers = [") { format!("peers = [{after}]\n") } else { format!("{line}\n") }
            });
            std::fs::write(&file, lines.collect::<String>())?;
            anyhow::ensure!(self.terminate(known, Duration::from_mins(1))?, "node {known} did not stop");
            self.restart(known)?;
        }
        self.prepare(id, &after)?;
        self.restart(id)
    }

    fn folder(&self, id: u64) -> PathBuf {
        self.dir.path().join(format!("node-{id}"))
    }

    fn log(&self, id: u64) -> PathBuf {
        self.folder(id).join("log")
    }

    /// What node `id` printed.
    pub fn output(&self, id: u64) -> String {
        std::fs::read_to_string(self.log(id)).unwrap_or_default()
    }

    fn args(&self, id: u64, bootstrap: bool) -> Vec<String> {
        let mut args = vec!["serve".to_owned(), format!("--config={}", self.folder(id).join("ensign.toml").display())];
        if bootstrap {
            args.push("--bootstrap".to_owned());
            args.push(format!("--credentials={}", self.credentials().display()));
            args.push(format!("--root-passphrase={}", self.passphrase().display()));
        }
        args
    }

    /// The command line of node `id` after its first start.
    pub fn serve_args(&self, id: u64) -> Vec<String> {
        self.args(id, false)
    }

    /// The credentials file of the bootstrap.
    pub fn credentials(&self) -> PathBuf {
        self.dir.path().join("credentials.json")
    }

    /// The file with the passphrase of the bootstrap, where the root key is made of one.
    pub fn passphrase(&self) -> PathBuf {
        self.dir.path().join("passphrase")
    }

    /// The settings of node `id`.
    pub fn config(&self, id: u64) -> PathBuf {
        self.folder(id).join("ensign.toml")
    }

    /// Where operators reach node `id` on this machine.
    pub fn socket(&self, id: u64) -> PathBuf {
        self.data(id).join("ensign.sock")
    }

    /// Where node `id` tells operators how it is.
    pub fn metrics_url(&self, id: u64) -> String {
        format!("http://127.0.0.1:{}", self.metrics[&id])
    }

    /// The numbers of the nodes.
    pub fn ids(&self) -> Vec<u64> {
        self.grpc.keys().copied().collect()
    }

    /// The data directory of node `id`.
    pub fn data(&self, id: u64) -> PathBuf {
        self.folder(id).join("data")
    }

    fn options(&self, admin: bool) -> anyhow::Result<Options> {
        let (options, operator) = Options::from_file(CredentialsFile::read(&self.credentials())?);
        if admin { operator.context("the credentials file has no admin key") } else { Ok(options) }
    }

    /// A client of node `id` alone.
    pub fn client_of(&self, id: u64) -> anyhow::Result<Client> {
        let mut options = self.options(false)?;
        options.set_endpoints(&format!("127.0.0.1:{}", self.grpc[&id]));
        options.set_auth_urls(&format!("http://127.0.0.1:{}", self.http[&id]));
        Ok(Client::connect(options)?)
    }

    /// A client of node `id` alone, with the operator's key.
    pub fn admin_of(&self, id: u64) -> anyhow::Result<Client> {
        let mut options = self.options(true)?;
        options.set_endpoints(&format!("127.0.0.1:{}", self.grpc[&id]));
        options.set_auth_urls(&format!("http://127.0.0.1:{}", self.http[&id]));
        Ok(Client::connect(options)?)
    }

    /// Where other nodes reach node `id`.
    pub fn peer_address(&self, id: u64) -> String {
        format!("127.0.0.1:{}", self.peers[&id])
    }

    /// Where clients reach node `id`: gRPC, and where they log in.
    pub fn client_addresses(&self, id: u64) -> (String, String) {
        (format!("127.0.0.1:{}", self.grpc[&id]), format!("http://127.0.0.1:{}", self.http[&id]))
    }

    /// A client that may use any node, and begins with the first.
    pub fn client(&self, admin: bool) -> anyhow::Result<Client> {
        let list = |ports: &BTreeMap<u64, u16>, prefix: &str| {
            ports.values().map(|port| format!("{prefix}127.0.0.1:{port}")).collect::<Vec<_>>().join(",")
        };
        let mut options = self.options(admin)?;
        options.set_endpoints(&list(&self.grpc, ""));
        options.set_auth_urls(&list(&self.http, "http://"));
        options.begin_with = BeginWith::First;
        Ok(Client::connect(options)?)
    }

    /// `kill -9` of node `id`.
    pub fn kill(&mut self, id: u64) -> anyhow::Result<()> {
        self.nodes.get_mut(&id).context("no such node")?.kill()
    }

    /// Waits until node `id` ends by itself; its exit code.
    pub fn ended(&mut self, id: u64, limit: Duration) -> anyhow::Result<Option<i32>> {
        self.nodes.get_mut(&id).context("no such node")?.ended(limit)
    }

    /// SIGTERM to node `id`; see [`Process::terminate`].
    pub fn terminate(&mut self, id: u64, limit: Duration) -> anyhow::Result<bool> {
        self.nodes.get_mut(&id).context("no such node")?.terminate(limit)
    }

    /// Starts all nodes again, after all were killed: none is ready before a majority is there.
    pub fn restart_all(&mut self) -> anyhow::Result<()> {
        let ids = self.ids();
        let mut started = Vec::new();
        for id in ids {
            let begun = ready_lines(&self.log(id));
            started.push((
                id,
                begun,
                Process::spawn(&format!("node {id}"), &self.args(id, false), &self.log(id), self.plant)?,
            ));
        }
        for (id, begun, mut process) in started {
            process.wait_ready_after(&self.log(id), begun)?;
            self.nodes.insert(id, process);
        }
        Ok(())
    }

    /// Starts node `id` again.
    pub fn restart(&mut self, id: u64) -> anyhow::Result<()> {
        self.restart_planted(id, self.plant)
    }

    /// Adds a line to the section `[cluster]` of the settings of node `id`, for its next start.
    pub fn configure(&self, id: u64, line: &str) -> anyhow::Result<()> {
        let path = self.folder(id).join("ensign.toml");
        let before = std::fs::read_to_string(&path)?;
        Ok(std::fs::write(&path, before.replace("[cluster]\n", &format!("[cluster]\n{line}\n")))?)
    }

    /// Starts node `id` again with something planted in it.
    pub fn restart_planted(&mut self, id: u64, plant: Plant) -> anyhow::Result<()> {
        let process = Process::start(&format!("node {id}"), &self.args(id, false), &self.log(id), plant)?;
        self.nodes.insert(id, process);
        Ok(())
    }
}

/// Everything that `topic` holds, by query, in the order given. Asks again while a cluster that has just started has no leaders.
pub async fn read_all(client: &Client, topic: &str) -> anyhow::Result<Vec<Delivery>> {
    let mut tries = 0;
    loop {
        match try_read_all(client, topic).await {
            Err(error) if error.is_transient() && tries < 60 => tries += 1,
            outcome => return Ok(outcome?),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn try_read_all(client: &Client, topic: &str) -> Result<Vec<Delivery>, CallError> {
    let mut rows = client.query(&format!("SELECT * FROM {topic}")).await?;
    let mut all = Vec::new();
    while let Some(row) = rows.next().await? {
        all.push(row);
    }
    Ok(all)
}
