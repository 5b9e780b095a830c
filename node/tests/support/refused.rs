//! Starts that must fail.

use std::process::Stdio;
use std::time::Duration;

use anyhow::ensure;

use super::process::ensign;

/// Longer than any start takes: a process that runs on has refused nothing.
const LIMIT: Duration = Duration::from_mins(1);

/// Runs `ensign` with `args` until it ends by itself: its exit code, and what it said on stderr.
pub fn refused(args: &[String]) -> anyhow::Result<(Option<i32>, String)> {
    let said = tempfile::NamedTempFile::new()?;
    let mut child = ensign().args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.reopen()?).spawn()?;
    let begun = tokio::time::Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if begun.elapsed() > LIMIT {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = std::fs::read_to_string(said.path())?;
    ensure!(status.is_some(), "it was not refused: {args:?}\n{text}");
    Ok((status.and_then(|status| status.code()), text))
}
