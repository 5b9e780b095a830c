//! A vault whose root key is kept by a key service, reached by the example program of the operator's pages.

mod support;

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use ensign_client::{Event, Mime, PublisherOptions};
use support::{Cluster, read_all};
use tokio::time::{Instant, sleep};

const PATIENCE: Duration = Duration::from_secs(90);

/// The stand-in for a key service; ends with this.
struct Service {
    child: Child,
    _stdin: ChildStdin,
    url: String,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operations/examples").join(name)
}

impl Service {
    fn start(token: &str) -> anyhow::Result<Self> {
        let mut command = Command::new(example("kms-stub.py"));
        command.arg(token).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("the stand-in needs /usr/bin/python3")?;
        let stdin = child.stdin.take().context("a pipe")?;
        let mut url = String::new();
        BufReader::new(child.stdout.take().context("a pipe")?).read_line(&mut url)?;
        Ok(Self { child, _stdin: stdin, url: url.trim().to_owned() })
    }
}

fn write_settings(program: &Path, url: &str, token: &str) -> anyhow::Result<()> {
    let beside = format!("{}.json", program.display());
    let settings = serde_json::json!({ "url": url, "key": "ensign-root", "token": token });
    fs::write(&beside, settings.to_string())?;
    Ok(fs::set_permissions(beside, Permissions::from_mode(0o600))?)
}

async fn until_ready_says(cluster: &Cluster, node: u64, code: u16, text: &str) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let answer = reqwest::get(format!("{}/readyz", cluster.metrics_url(node))).await;
        let last = match answer {
            Ok(answer) => (answer.status().as_u16(), answer.text().await?),
            Err(error) => (0, error.to_string()),
        };
        if last.0 == code && last.1.contains(text) {
            return Ok(());
        }
        ensure!(Instant::now() < end, "not {code} with {text:?}, but {last:?}");
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_service_opens_the_vault_at_each_start_and_a_node_waits_while_it_is_away() -> anyhow::Result<()> {
    let service = Service::start("the-token")?;
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("root-command");
    fs::copy(example("root-command.py"), &program)?;
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    write_settings(&program, &service.url, "the-token")?;
    let settings = format!("[root]\nprovider = \"command\"\ncommand = \"{}\"\n", program.display());
    let mut cluster = Cluster::start_set(1, &settings)?;
    until_ready_says(&cluster, 1, 200, "ready").await?;
    cluster.client(false)?.create_topic("kept").await?;
    let publisher = cluster.client(false)?.publisher("kept", PublisherOptions::default()).await?;
    publisher.publish(Event::new("under a key of the service").with_mimetype(Mime::TextPlain)).await?.await?;
    publisher.close().await;

    // Its token is taken away: the node starts sealed, and says what the service said.
    cluster.kill(1)?;
    write_settings(&program, &service.url, "another-token")?;
    cluster.restart(1)?;
    until_ready_says(&cluster, 1, 503, "the key service answers 403").await?;
    ensure!(!cluster.output(1).contains("another-token"), "a token is in the log");
    write_settings(&program, &service.url, "the-token")?;
    until_ready_says(&cluster, 1, 200, "ready").await?;
    ensure!(read_all(&cluster.client(false)?, "kept").await?.len() == 1, "the event is there");
    Ok(())
}
