//! What is run, from its start to its verdict.

pub mod cipher;
pub mod drain;
pub mod failover;
pub mod ledger;
pub mod links;
pub mod live;
pub mod rebuild;
pub mod regions;
pub mod rolling;

use std::io::Write as _;

use crate::cluster::{Cluster, Plan};

/// What a figure beyond its limit means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limits {
    /// The run fails.
    Enforced,
    /// It is printed: a machine that does other work as well proves nothing about time. Broken promises fail all the same.
    Printed,
}

/// Runs a scenario on a cluster of its own, whose directory is kept if that fails.
async fn on_cluster(plan: &Plan, scenario: impl AsyncFnOnce(&mut Cluster) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut cluster = Cluster::start(plan.clone()).await?;
    let outcome = scenario(&mut cluster).await;
    if outcome.is_err() {
        say(format!("the cluster's directory is kept: {}", cluster.keep().display()));
    }
    outcome
}

/// Says a line at once: whoever watches a run of twenty minutes wants to know where it is.
pub(crate) fn say(line: impl AsRef<str>) {
    let mut out = std::io::stdout().lock();
    // A closed pipe is no reason to stop a run.
    let _ = writeln!(out, "{}", line.as_ref()).and_then(|()| out.flush());
}
