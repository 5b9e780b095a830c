//! A throw-away cluster of real processes, one a node, so that each can be looked at and killed by itself.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Context as _;
use ensign_client::{BeginWith, Client, CredentialsFile, Options};
use ensign_proto::NodeId;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::cluster::{terminate, wait_ready};
use super::ports::free_port;
use crate::authority::Authority;

/// Running nodes. Dropping them kills them and removes their data.
pub(super) struct Nodes {
    dir: TempDir,
    running: BTreeMap<u64, Running>,
    /// gRPC and HTTP of each node, whether it runs or not.
    ports: BTreeMap<u64, [SocketAddr; 2]>,
}

struct Running {
    child: Child,
    pid: u32,
    grpc: SocketAddr,
    http: SocketAddr,
}

impl Nodes {
    /// Starts and bootstraps `count` nodes in a new folder under `dir`, and waits until each serves.
    ///
    /// # Errors
    /// One did not start; its last words are in the message.
    pub(super) async fn start(dir: &Path, count: u64) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ensign-bench-").tempdir_in(dir)?;
        let authority = Authority::generate("bench")?;
        std::fs::write(dir.path().join("ca.pem"), authority.certificate())?;
        let ports: Vec<[SocketAddr; 4]> = (1..=count)
            .map(|_| Ok([free_port()?, free_port()?, free_port()?, free_port()?]))
            .collect::<anyhow::Result<_>>()?;
        let peers: Vec<String> = (1..).zip(&ports).map(|(id, ports)| format!("\"{id}={}\"", ports[0])).collect();
        let of_clients = (1..).zip(&ports).map(|(id, [_, grpc, http, _])| (id, [*grpc, *http])).collect();
        let mut nodes = Self { dir, running: BTreeMap::new(), ports: of_clients };
        for (id, [peer, grpc, http, metrics]) in (1..=count).zip(ports) {
            let folder = nodes.folder(id);
            std::fs::create_dir_all(&folder)?;
            let issued = authority.issue(NodeId(id))?;
            std::fs::write(folder.join("node.pem"), issued.certificate)?;
            std::fs::write(folder.join("node.key"), issued.private_key)?;
            let config = format!(
                "[node]\nid = {id}\ndata_dir = \"{data}\"\nroot_key = \"{root}\"\n\
                 [listen]\ngrpc = \"{grpc}\"\nhttp = \"{http}\"\nmetrics = \"{metrics}\"\npeers = \"{peer}\"\n\
                 [cluster]\npeers = [{peers}]\ncertificate = \"{certificate}\"\nprivate_key = \"{key}\"\nauthority = \"{ca}\"\n\
                 [storage]\nprefill = \"512MiB\"\n[log]\nfilter = \"warn,openraft=error\"\n",
                data = folder.join("data").display(),
                root = nodes.dir.path().join("root.key").display(),
                peers = peers.join(", "),
                certificate = folder.join("node.pem").display(),
                key = folder.join("node.key").display(),
                ca = nodes.dir.path().join("ca.pem").display(),
            );
            std::fs::write(folder.join("ensign.toml"), config)?;
            let child = nodes.spawn(id)?;
            let pid = child.id().context("a node ended at once")?;
            nodes.running.insert(id, Running { child, pid, grpc, http });
        }
        for id in 1..=count {
            let log = nodes.log(id);
            let node = nodes.running.get_mut(&id).context("no such node")?;
            wait_ready(&mut node.child, &log).await?;
        }
        Ok(nodes)
    }

    fn spawn(&self, id: u64) -> anyhow::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg("--config").arg(self.folder(id).join("ensign.toml"));
        // Once: afterwards its data is there.
        if id == 1 && !self.folder(id).join("data").exists() {
            command.arg("--bootstrap").arg("--credentials").arg(self.credentials());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(std::fs::File::create(self.log(id))?);
        command.kill_on_drop(true).spawn().with_context(|| format!("cannot start node {id}"))
    }

    fn folder(&self, id: u64) -> PathBuf {
        self.dir.path().join(format!("node-{id}"))
    }

    fn log(&self, id: u64) -> PathBuf {
        self.folder(id).join("server.log")
    }

    fn credentials(&self) -> PathBuf {
        self.dir.path().join("credentials.json")
    }

    /// Where its files are.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The nodes that run, and their processes.
    pub(super) fn pids(&self) -> impl Iterator<Item = (u64, u32)> {
        self.running.iter().map(|(id, node)| (*id, node.pid))
    }

    /// Clients with the project's key and with the operator's, of these nodes alone.
    ///
    /// # Errors
    /// The credentials cannot be read.
    pub(super) fn clients(&self, of: impl Fn(u64) -> bool) -> anyhow::Result<(Client, Client)> {
        let nodes: Vec<&Running> = self.running.iter().filter(|(id, _)| of(**id)).map(|(_, node)| node).collect();
        self.clients_of(&nodes)
    }

    /// So many clients with the project's key, each with another node before the others, as a balancer would have it.
    ///
    /// # Errors
    /// The credentials cannot be read.
    pub(super) fn spread_clients(&self, count: usize) -> anyhow::Result<Vec<Client>> {
        let mut nodes: Vec<&Running> = self.running.values().collect();
        let clients = (0..count).map(|_| {
            nodes.rotate_left(1);
            Ok(self.clients_of(&nodes)?.0)
        });
        clients.collect()
    }

    fn clients_of(&self, nodes: &[&Running]) -> anyhow::Result<(Client, Client)> {
        let (mut project, operator) = Options::from_file(CredentialsFile::read(&self.credentials())?);
        let mut operator = operator.context("the credentials have no administrator's key")?;
        let list = |text: fn(&Running) -> String| nodes.iter().map(|node| text(node)).collect::<Vec<_>>().join(",");
        for options in [&mut project, &mut operator] {
            options.set_endpoints(&list(|node| node.grpc.to_string()));
            options.set_auth_urls(&list(|node| format!("http://{}", node.http)));
            // The same in every run, so that runs compare.
            options.begin_with = BeginWith::First;
        }
        Ok((Client::connect(project)?, Client::connect(operator)?))
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// There is no such node.
    pub(super) async fn kill(&mut self, id: u64) -> anyhow::Result<()> {
        let mut node = self.running.remove(&id).context("no such node")?;
        Ok(node.child.kill().await?)
    }

    /// Starts a node again that was killed, and waits until it serves.
    ///
    /// # Errors
    /// It did not start; its last words are in the message.
    pub(super) async fn restart(&mut self, id: u64) -> anyhow::Result<()> {
        let mut child = self.spawn(id)?;
        let pid = child.id().context("a node ended at once")?;
        wait_ready(&mut child, &self.log(id)).await?;
        let [grpc, http] = self.ports[&id];
        self.running.insert(id, Running { child, pid, grpc, http });
        Ok(())
    }

    /// Stops every node in an orderly way and removes the data.
    ///
    /// # Errors
    /// One did not stop, or ended with an error.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        let logs: BTreeMap<u64, PathBuf> = self.running.keys().map(|id| (*id, self.log(*id))).collect();
        let stops = self.running.iter_mut().map(|(id, node)| terminate(&mut node.child, &logs[id]));
        futures::future::try_join_all(stops).await?;
        self.dir.close().context("cannot remove the cluster's data")
    }
}
