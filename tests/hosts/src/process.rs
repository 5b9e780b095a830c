//! One `ensign serve` process: started, killed, paused, asked to stop, and always reaped.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

/// How long a process may take to say `ready`: a loaded two-core machine, not a promise.
const READY: Duration = Duration::from_mins(2);

/// In which the kernel tells processes of time (`USER_HZ`): the same on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process that dies with its owner.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
    /// How often earlier processes with this log have said `ready`.
    ready_before: usize,
}

impl Process {
    /// Starts `command`, whose first word is a program, and waits for nothing. It appends what it says to `log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: String, command: &[String], log: &Path) -> anyhow::Result<Self> {
        let (program, args) = command.split_first().context("a command has a program")?;
        let out = std::fs::OpenOptions::new().create(true).append(true).open(log)?;
        let ready_before = ready_lines(log);
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stderr(out.try_clone()?).stdout(out);
        // Not the settings of whoever runs the tests.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"ENSIGN_")) {
            command.env_remove(name);
        }
        let child = command.spawn().with_context(|| format!("cannot start {name} with `{program}`"))?;
        Ok(Self { child, name, log: log.to_owned(), ready_before })
    }

    /// Waits until it says `ready`.
    ///
    /// # Errors
    /// It ended, or takes longer than any start does.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while ready_lines(&self.log) <= self.ready_before {
            let ended = self.child.try_wait()?;
            if ended.is_some() || begun.elapsed() > READY {
                let what = ended.map_or("was not ready in time".to_owned(), |status| format!("ended with {status}"));
                bail!("{} {what}; it said:\n{}", self.name, tail(&self.log));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process has an id")?;
        kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// The processor time that it has used.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        cpu_of(&self.child.id().to_string())
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGSTOP: it stands still where it is.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    /// SIGTERM, and waits for its end. How long it took.
    ///
    /// # Errors
    /// It does not end within `limit`, or not in success.
    pub async fn terminate(&mut self, limit: Duration) -> anyhow::Result<Duration> {
        let begun = Instant::now();
        self.signal(Signal::TERM)?;
        loop {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "{} ended with {status}; it said:\n{}", self.name, tail(&self.log));
                return Ok(begun.elapsed());
            }
            ensure!(
                begun.elapsed() < limit,
                "{} did not stop within {limit:?}; it said:\n{}",
                self.name,
                tail(&self.log)
            );
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether it ended by itself, and how.
    ///
    /// # Errors
    /// The kernel refuses to say.
    pub fn ended(&mut self) -> anyhow::Result<Option<std::process::ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The processor time that a process has used, all its threads together; `self` is this one.
///
/// # Errors
/// There is none, or it is gone.
pub fn cpu_of(process: &str) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    ticks(&stat)
        .map(|ticks| Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND))
        .with_context(|| format!("/proc/{process}/stat is not understood: {stat}"))
}

/// In user and in kernel mode: fields 14 and 15 (proc_pid_stat(5)). The name before them may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

fn ready_lines(log: &Path) -> usize {
    std::fs::read_to_string(log).unwrap_or_default().lines().filter(|line| *line == "ready").count()
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 900 0 0 0 120 30 0 0 20 0 1 0 5 1 2 3";
        assert_eq!(ticks(stat), Some(150));
        assert_eq!(ticks("7 (short) S 1"), None);
    }

    #[test]
    fn this_process_has_used_some() {
        assert!(cpu_of("self").unwrap() < Duration::from_hours(24));
        assert!(cpu_of("none").is_err());
    }
}
