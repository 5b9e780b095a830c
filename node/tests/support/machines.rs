//! A cluster as an operator makes it by token: `ensign cluster init` on one machine, `ensign cluster join` on each further one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use ensign_client::{Client, CredentialsFile, Options};

use super::process::ensign;
use super::{Process, free_port};

/// Whether a machine is given the cluster's root key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RootKey {
    Copied,
    Missing,
}

struct Machine {
    process: Process,
    args: Vec<String>,
    log: PathBuf,
    grpc: u16,
    http: u16,
}

/// Machines that joined one after the other.
pub struct Machines {
    dir: tempfile::TempDir,
    seed: String,
    token: PathBuf,
    machines: BTreeMap<u64, Machine>,
}

/// Runs a command to its end and reads the JSON that it printed.
pub fn json(args: &[String]) -> anyhow::Result<serde_json::Value> {
    let output = ensign().args(args).stdin(std::process::Stdio::null()).output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{args:?}: {error}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn words(typed: &str) -> Vec<String> {
    typed.split_whitespace().map(str::to_owned).collect()
}

impl Machines {
    /// Makes a cluster of one node, and a token that lets others in.
    pub fn found() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name).display().to_string();
        let seed = format!("127.0.0.1:{}", free_port()?);
        let (first, root, credentials) = (at("node-1"), at("root.key"), at("credentials.json"));
        let made = json(&words(&format!(
            "cluster init --address {seed} --dir {first} --data-dir {first}/data --root-key {root} --output json"
        )))?;
        let config = made["config"].as_str().context("no settings")?;
        let bootstrap = format!("--bootstrap --authority-key {first}/ca.key --credentials {credentials}");
        let mut machines = Self { seed, token: dir.path().join("token"), machines: BTreeMap::new(), dir };
        machines.start(1, config, &bootstrap)?;
        let token = json(&words(&format!("cluster token create --uses 20 --credentials {credentials} --output json")))?;
        std::fs::write(&machines.token, token["token"].as_str().context("no token")?)?;
        Ok(machines)
    }

    /// A machine joins by token and is started. Returns its number once it is ready.
    pub fn join(&mut self, key: RootKey) -> anyhow::Result<u64> {
        let folder = self.dir.path().join(format!("joined-{}", self.machines.len() + 1));
        let root = match key {
            RootKey::Copied => self.dir.path().join("root.key"),
            RootKey::Missing => folder.join("root.key"),
        };
        let (folder, root, token, seed) = (folder.display(), root.display(), self.token.display(), &self.seed);
        let joined = json(&words(&format!(
            "cluster join --token-file {token} --seed {seed} --dir {folder} --data-dir {folder}/data --root-key {root} \
             --address 127.0.0.1:{} --output json",
            free_port()?
        )))?;
        let id = joined["node"].as_u64().context("no number")?;
        self.start(id, joined["config"].as_str().context("no settings")?, "")?;
        Ok(id)
    }

    fn start(&mut self, id: u64, config: &str, besides: &str) -> anyhow::Result<()> {
        let (grpc, http) = (free_port()?, free_port()?);
        let settings = format!(
            "serve --config {config} --grpc-listen 127.0.0.1:{grpc} --http-listen 127.0.0.1:{http} --metrics-listen 127.0.0.1:{} \
             --log-prefill 64MiB --vote-lost-after 5s",
            free_port()?
        );
        let log = self.dir.path().join(format!("log-{id}"));
        let process = Process::start(&format!("node {id}"), &words(&format!("{settings} {besides}")), &log, None)?;
        self.machines.insert(id, Machine { process, args: words(&settings), log, grpc, http });
        Ok(())
    }

    /// `kill -9`.
    pub fn kill(&mut self, id: u64) -> anyhow::Result<()> {
        self.machine(id)?.process.kill()
    }

    /// Starts a node again that was killed.
    pub fn restart(&mut self, id: u64) -> anyhow::Result<()> {
        let machine = self.machine(id)?;
        machine.process = Process::start(&format!("node {id}"), &machine.args, &machine.log, None)?;
        Ok(())
    }

    /// What node `id` printed.
    pub fn output(&self, id: u64) -> String {
        let log = self.machines.get(&id).map(|machine| std::fs::read_to_string(&machine.log));
        log.and_then(Result::ok).unwrap_or_default()
    }

    /// The credentials file of the bootstrap.
    pub fn credentials(&self) -> PathBuf {
        self.dir.path().join("credentials.json")
    }

    /// A client of node `id` alone.
    pub fn client_of(&self, id: u64) -> anyhow::Result<Client> {
        self.connect(id, Options::from_file(CredentialsFile::read(&self.credentials())?).0)
    }

    /// A client of node `id` alone, with the operator's key.
    pub fn admin_of(&self, id: u64) -> anyhow::Result<Client> {
        let (_, operator) = Options::from_file(CredentialsFile::read(&self.credentials())?);
        self.connect(id, operator.context("the credentials file has no admin key")?)
    }

    fn connect(&self, id: u64, mut options: Options) -> anyhow::Result<Client> {
        let machine = self.machines.get(&id).context("no such node")?;
        options.set_endpoints(&format!("127.0.0.1:{}", machine.grpc));
        options.set_auth_urls(&format!("http://127.0.0.1:{}", machine.http));
        Ok(Client::connect(options)?)
    }

    fn machine(&mut self, id: u64) -> anyhow::Result<&mut Machine> {
        self.machines.get_mut(&id).context("no such node")
    }
}
