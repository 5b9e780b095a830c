//! The unmodified PyEnsign, in a process of its own that says line by line what happens to it (tests/hosts/pyensign_worker.py).

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, timeout};

use super::Pulse;
use crate::history::{Following, Name, Published, Received, Row, Sending};

/// How long it may take to start, or to finish.
const PATIENCE: Duration = Duration::from_mins(2);

/// What a worker needs to know.
#[derive(Debug, Clone)]
pub struct Job {
    /// A Python that has `pyensign`.
    pub python: PathBuf,
    /// `host:port` of gRPC, usually a balancer's.
    pub endpoint: String,
    /// Where to log in.
    pub auth_url: String,
    /// The credentials file.
    pub credentials: PathBuf,
    /// The topic.
    pub topic: String,
    /// Its number among the publishers.
    pub publisher: u32,
    /// Events a second.
    pub rate: u32,
}

/// A publisher and a subscriber of one topic.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    published: Published,
    received: Received,
    begun: Instant,
    pulse: Pulse,
}

impl Worker {
    /// Starts it; returns once both of its streams are open.
    ///
    /// # Errors
    /// There is no such Python, or it has no `pyensign`, or the cluster cannot be reached.
    pub async fn start(job: &Job) -> anyhow::Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("pyensign_worker.py");
        let mut command = Command::new(&job.python);
        command
            .arg("-u")
            .arg(script)
            .args([&job.endpoint, &job.auth_url])
            .arg(&job.credentials)
            .args([&job.topic, &job.publisher.to_string(), &job.rate.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ENSIGN_")) {
            command.env_remove(name);
        }
        let missing = || {
            format!(
                "cannot run {}: `.ci/run pyensign` installs PyEnsign there; --python names another, --without-pyensign goes without",
                job.python.display()
            )
        };
        let mut child = command.spawn().with_context(missing)?;
        let stdin = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().context("its output is a pipe")?).lines();
        let received = Received { name: "PyEnsign".to_owned(), following: Following::Live, rows: Vec::new() };
        let published = Published::new(Sending::Once);
        let begun = Instant::now();
        let mut worker = Self { child, stdin, lines, published, received, begun, pulse: Pulse::default() };
        let ready = async {
            while let Some(line) = worker.lines.next_line().await? {
                if line == "ready" {
                    return Ok(());
                }
                worker.note(job.publisher, &line)?;
            }
            bail!("PyEnsign ended before it was ready")
        };
        timeout(PATIENCE, ready).await.context("PyEnsign is not ready in time")??;
        Ok(worker)
    }

    /// When its acks came.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Takes what it says until it ends; once `finish` completes it is told to. What both sides saw.
    ///
    /// # Errors
    /// It failed.
    pub async fn run(
        mut self,
        publisher: u32,
        finish: impl Future<Output = ()>,
    ) -> anyhow::Result<(Published, Received)> {
        let mut finish = std::pin::pin!(finish);
        let mut told = false;
        loop {
            let line = tokio::select! {
                line = self.lines.next_line() => line?,
                () = &mut finish, if !told => {
                    told = true;
                    // The end of its input is how it is told.
                    if let Some(mut stdin) = self.stdin.take() {
                        stdin.shutdown().await?;
                    }
                    continue;
                }
            };
            match line {
                Some(line) => self.note(publisher, &line)?,
                None => break,
            }
        }
        let status = timeout(PATIENCE, self.child.wait()).await.context("PyEnsign does not end")??;
        if !status.success() || !told {
            bail!("PyEnsign ended with {status}");
        }
        Ok((self.published, self.received))
    }

    fn note(&mut self, publisher: u32, line: &str) -> anyhow::Result<()> {
        let strange = || format!("PyEnsign's worker said {line:?}");
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        match words[..] {
            // How many it has begun to publish.
            ["begun", count] => self.published.begun = count.parse().with_context(strange)?,
            ["ack", number] => {
                self.published.acked.insert(number.parse().with_context(strange)?, None);
                self.pulse.beat(self.begun);
            }
            ["nack", number, why] => {
                self.published.refused.insert(number.parse().with_context(strange)?, why.to_owned());
            }
            ["got", id, payload] => {
                let name = Name::parse(payload.as_bytes()).with_context(strange)?;
                self.received.rows.push(Row { offset: None, id: unhex(id).with_context(strange)?, name });
            }
            ["trouble", ..] => self.published.trouble.push(line.to_owned()),
            _ => bail!("publisher {publisher}: {}", strange()),
        }
        Ok(())
    }
}

fn unhex(text: &str) -> Option<[u8; 10]> {
    let mut bytes = [0; 10];
    if text.len() != 20 {
        return None;
    }
    for (place, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * place..2 * place + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_as_they_were_written() {
        assert_eq!(unhex("000102030405060708ff"), Some([0, 1, 2, 3, 4, 5, 6, 7, 8, 255]));
        assert_eq!(unhex("0001"), None);
        assert_eq!(unhex("zz0102030405060708ff"), None);
    }
}
