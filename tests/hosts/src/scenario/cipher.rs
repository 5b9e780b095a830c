//! What encryption costs: the same load on a build that seals batches, and on one that passes them as they are.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tokio::process::Command;

use super::{Limits, say};

/// What is kept of the throughput without a cipher, at least.
const KEPT: f64 = 0.90;

/// As `ENSIGN_PLANT` has it.
const NULL_CIPHER: &str = "null-cipher";

/// What to run.
#[derive(Debug, Clone)]
pub struct Cipher {
    /// A server with the feature `planted-bugs`.
    pub binary: PathBuf,
    /// How often each is measured; the middle one counts.
    pub rounds: u32,
    /// Events of each measurement, of 1 KiB.
    pub events: u64,
    /// What a figure beyond its limit means.
    pub limits: Limits,
}

/// Measures publishing and catching up, with and without the cipher in turn.
///
/// # Errors
/// A limit was missed, or the run could not be carried out.
pub async fn run(cipher: Cipher) -> anyhow::Result<()> {
    ensure!(cipher.rounds > 0, "measure at least once");
    // Another server would take no notice of what it is told, and keep all of its throughput.
    let server = std::fs::read(&cipher.binary).with_context(|| format!("no {}", cipher.binary.display()))?;
    ensure!(
        server.windows(NULL_CIPHER.len()).any(|bytes| bytes == NULL_CIPHER.as_bytes()),
        "{} cannot do without a cipher: build it with --features planted-bugs",
        cipher.binary.display()
    );
    say("round  load       sealed        as they are");
    let mut missed = Vec::new();
    for load in ["publish", "subscribe"] {
        let (mut sealed, mut plain) = (Vec::new(), Vec::new());
        for round in 1..=cipher.rounds {
            sealed.push(measure(&cipher, load, None).await?);
            plain.push(measure(&cipher, load, Some(NULL_CIPHER)).await?);
            let last = |rates: &[f64]| rates.last().copied().unwrap_or_default();
            say(format!("{round:5}  {load:9}  {:8.0}/s    {:8.0}/s", last(&sealed), last(&plain)));
        }
        let kept = median(sealed) / median(plain);
        say(format!("{load}: encryption keeps {kept:.2} of the throughput (at least {KEPT})"));
        if kept < KEPT {
            missed.push(load);
        }
    }
    ensure!(missed.is_empty() || cipher.limits == Limits::Printed, "encryption costs too much: {missed:?}");
    Ok(())
}

/// Events a second of one run of `ensign bench`, on a cluster of its own.
async fn measure(cipher: &Cipher, load: &str, plant: Option<&str>) -> anyhow::Result<f64> {
    let binary = cipher.binary.canonicalize().with_context(|| format!("no {}", cipher.binary.display()))?;
    let mut command = Command::new(binary);
    command.args(["bench", load, "--output", "json", "--events", &cipher.events.to_string()]);
    command.env_remove("ENSIGN_PLANT").stdin(Stdio::null()).kill_on_drop(true);
    if let Some(plant) = plant {
        command.env("ENSIGN_PLANT", plant);
    }
    let output = command.output().await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ensign bench {load} failed: {said}");
    let report: Value = serde_json::from_slice(&output.stdout).context("ensign bench printed no JSON")?;
    report["events_per_second"].as_f64().context("ensign bench told no rate")
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or_default()
}
