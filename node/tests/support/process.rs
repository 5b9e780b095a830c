//! One real `ensign` process.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};

/// How long a process may take to say `ready`: a loaded two-core machine, not a promise.
const READY: Duration = Duration::from_secs(90);

/// What a process has planted in it, if anything: a name that `ENSIGN_PLANT` knows.
pub type Plant = Option<&'static str>;

/// The command, without the variables of whoever runs the tests.
pub fn ensign() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ensign"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ENSIGN_")) {
        command.env_remove(name);
    }
    command
}

/// A process of the `ensign` binary that dies with its owner.
pub struct Process {
    pub child: Child,
    name: String,
}

impl Process {
    /// Starts `ensign` with `args` and waits for the line `ready`.
    pub fn start(name: &str, args: &[String], log: &Path, plant: Plant) -> anyhow::Result<Self> {
        let seen = ready_lines(log);
        let mut process = Self::spawn(name, args, log, plant)?;
        process.wait_ready_after(log, seen)?;
        Ok(process)
    }

    /// Starts `ensign` with `args` and waits for nothing. Its stdout and stderr go to `log`.
    pub fn spawn(name: &str, args: &[String], log: &Path, plant: Plant) -> anyhow::Result<Self> {
        let out = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let err = out.try_clone()?;
        let mut command = ensign();
        command.args(args).stdin(Stdio::null()).stdout(out).stderr(err);
        if let Some(plant) = plant {
            command.env("ENSIGN_PLANT", plant);
        }
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name: name.to_owned() })
    }

    /// Waits until the log says `ready` more than `seen` times.
    pub fn wait_ready_after(&mut self, log: &Path, seen: usize) -> anyhow::Result<()> {
        let started = tokio::time::Instant::now();
        loop {
            if ready_lines(log) > seen {
                return Ok(());
            }
            let text = std::fs::read_to_string(log).unwrap_or_default();
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status} before it was ready:\n{text}", self.name);
            }
            ensure!(started.elapsed() < READY, "{} was not ready in time:\n{text}", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until it ends by itself; its exit code.
    pub fn ended(&mut self, limit: Duration) -> anyhow::Result<Option<i32>> {
        let started = tokio::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            ensure!(started.elapsed() < limit, "{} does not end", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SIGTERM; returns whether it ended with success within `limit`.
    pub fn terminate(&mut self, limit: Duration) -> anyhow::Result<bool> {
        let killed = Command::new("kill").arg("-TERM").arg(self.child.id().to_string()).status()?;
        ensure!(killed.success(), "cannot signal {}", self.name);
        let started = tokio::time::Instant::now();
        while started.elapsed() < limit {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.success());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(false)
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How often the log says `ready`.
pub fn ready_lines(log: &Path) -> usize {
    std::fs::read_to_string(log).unwrap_or_default().lines().filter(|line| *line == "ready").count()
}
