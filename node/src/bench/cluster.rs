//! A throw-away cluster in a process of its own, so that its CPU and its writes can be told from the client's.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::usage::{self, Usage};

/// The counter of fsyncs on a node's metrics page.
const SYNCS: &str = "ensign_log_syncs_total";
/// How long a cluster may take to start, and to stop.
const START: Duration = Duration::from_mins(2);
const STOP: Duration = Duration::from_secs(20);

/// A running cluster. Dropping it kills it and removes its data.
pub(super) struct Cluster {
    child: Child,
    pid: u32,
    dir: TempDir,
    metrics: SocketAddr,
}

impl Cluster {
    /// Starts `ensign dev` with this many replicas in a new folder under `dir`, and waits until it is ready.
    ///
    /// # Errors
    /// It did not start; its last words are in the message.
    pub(super) async fn start(dir: &Path, replicas: u64) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ensign-bench-").tempdir_in(dir)?;
        let [grpc, http, metrics] = free_ports()?;
        let log = dir.path().join("server.log");
        let mut child = Command::new(std::env::current_exe()?)
            .arg("dev")
            .args(["--nodes", &replicas.to_string()])
            .args(["--grpc", &grpc.to_string(), "--http", &http.to_string(), "--metrics", &metrics.to_string()])
            .arg("--data")
            .arg(dir.path().join("data"))
            .arg("--credentials")
            .arg(dir.path().join("credentials.json"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .kill_on_drop(true)
            .spawn()
            .context("cannot start a cluster")?;
        let pid = child.id().context("the cluster ended at once")?;
        let stdout = child.stdout.take().context("the cluster has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if line.trim() == "ready" {
                    return Ok(());
                }
            }
            bail!("the cluster ended before it was ready")
        };
        let started =
            timeout(START, ready).await.unwrap_or_else(|_| bail!("the cluster was not ready within {START:?}"));
        started.with_context(|| last_words(&log))?;
        Ok(Self { child, pid, dir, metrics })
    }

    /// The credentials file that it wrote.
    pub(super) fn credentials(&self) -> PathBuf {
        self.dir.path().join("credentials.json")
    }

    /// Where its files are.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What it has used so far.
    pub(super) async fn usage(&self) -> Usage {
        Usage {
            cpu: usage::cpu(self.pid),
            written: usage::written(self.pid),
            syncs: syncs(&format!("http://{}/metrics", self.metrics)).await,
        }
    }

    /// Stops it in an orderly way and removes its data.
    ///
    /// # Errors
    /// It did not stop, or ended with an error.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid.cast_signed()) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        let status = timeout(STOP, self.child.wait()).await.context("the cluster did not stop")??;
        if !status.success() {
            bail!("the cluster ended with {status}: {}", last_words(&self.dir.path().join("server.log")));
        }
        self.dir.close().context("cannot remove the cluster's data")
    }
}

/// How many syncs the nodes behind a metrics page have made.
pub(super) async fn syncs(url: &str) -> Option<u64> {
    let page = timeout(Duration::from_secs(5), fetch(url)).await.ok()?.ok()?;
    usage::counter(&page, SYNCS)
}

/// One GET, without TLS, whole: all that a metrics page needs.
async fn fetch(url: &str) -> anyhow::Result<String> {
    let uri: http::Uri = url.parse()?;
    let authority = uri.authority().context("no host")?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut stream = TcpStream::connect((authority.host(), authority.port_u16().unwrap_or(80))).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut page = String::new();
    stream.read_to_string(&mut page).await?;
    Ok(page)
}

fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Three ports that nobody uses now. Another process could take one before the cluster does; then it says so and ends.
fn free_ports() -> anyhow::Result<[SocketAddr; 3]> {
    let bind = || TcpListener::bind(("127.0.0.1", 0));
    let held = [bind()?, bind()?, bind()?];
    Ok([held[0].local_addr()?, held[1].local_addr()?, held[2].local_addr()?])
}
