//! A throw-away cluster in a process of its own, so that its CPU and its writes can be told from the client's.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::ports::free_port;
use super::usage::{self, Usage};

/// The counters of syncs and of written bytes on a node's metrics page. The system's own count of written bytes is of no
/// use: it counts a whole run of cached pages for one that was changed.
const SYNCS: &str = "ensign_log_syncs_total";
const WRITTEN: &str = "ensign_log_written_bytes_total";
/// Logs of nodes that have run for a while have room in them; what a run stores should find it.
const ROOM: std::ops::RangeInclusive<u64> = 64..=2048;
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
    /// Starts `ensign dev` with this many replicas in a new folder under `dir`, with room for `stored` bytes in each log,
    /// and waits until it is ready.
    ///
    /// # Errors
    /// It did not start; its last words are in the message.
    pub(super) async fn start(dir: &Path, replicas: u64, stored: u64) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ensign-bench-").tempdir_in(dir)?;
        let (grpc, http, metrics) = (free_port()?, free_port()?, free_port()?);
        let log = dir.path().join("server.log");
        let mut child = Command::new(std::env::current_exe()?)
            .arg("dev")
            .args(["--nodes", &replicas.to_string()])
            .args(["--grpc", &grpc.to_string(), "--http", &http.to_string(), "--metrics", &metrics.to_string()])
            .env("ENSIGN_SERVER_STORAGE_PREFILL", room(stored))
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
        wait_ready(&mut child, &log).await?;
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
        Usage { cpu: usage::cpu(self.pid), ..traffic(&format!("http://{}/metrics", self.metrics)).await }
    }

    /// Stops it in an orderly way and removes its data.
    ///
    /// # Errors
    /// It did not stop, or ended with an error.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        terminate(&mut self.child, &self.dir.path().join("server.log")).await?;
        self.dir.close().context("cannot remove the cluster's data")
    }
}

/// Waits until a process that was just started says `ready`.
///
/// # Errors
/// It did not in time, or ended; its last words are in the message.
pub(super) async fn wait_ready(child: &mut Child, log: &Path) -> anyhow::Result<()> {
    let stdout = child.stdout.take().context("the process has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let ready = async {
        while let Some(line) = lines.next_line().await? {
            if line.trim() == "ready" {
                return Ok(());
            }
        }
        bail!("a process of the cluster ended before it was ready")
    };
    let started = timeout(START, ready).await.unwrap_or_else(|_| bail!("the cluster was not ready within {START:?}"));
    started.with_context(|| last_words(log))
}

/// Stops a process in an orderly way.
///
/// # Errors
/// It did not stop, or ended with an error.
pub(super) async fn terminate(child: &mut Child, log: &Path) -> anyhow::Result<()> {
    if let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    }
    let status = timeout(STOP, child.wait()).await.context("a process of the cluster did not stop")??;
    if !status.success() {
        bail!("a process of the cluster ended with {status}: {}", last_words(log));
    }
    Ok(())
}

/// What the nodes behind a metrics page have written and synced.
pub(super) async fn traffic(url: &str) -> Usage {
    let Ok(Ok(page)) = timeout(Duration::from_secs(5), fetch(url)).await else { return Usage::default() };
    Usage { cpu: None, written: usage::counter(&page, WRITTEN), syncs: usage::counter(&page, SYNCS) }
}

/// How large each log starts, as the setting takes it: the power of two that is at least twice what it will hold, since redb
/// doubles its file and a log asks for more when a quarter is left.
fn room(stored: u64) -> String {
    format!("{}MiB", (stored >> 19).clamp(*ROOM.start(), *ROOM.end()).next_power_of_two())
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
