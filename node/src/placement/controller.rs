//! The planner at work: on the catalog's leader, every few seconds, or sooner when the catalog changes.
//!
//! It writes moves to the catalog and nothing else. When leadership of the catalog changes, the next leader plans from what is there;
//! how long a node has been silent it counts from when it began to listen itself.

use std::time::Duration;

use ensign_proto::ClusterVersion;
use ensign_raft::env::Stop;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::planner::{Facts, Plan, PlanLimits};
use crate::catalog::{Catalog, PlaceError};

/// Between two plans, at most and at least.
const PLAN_EVERY: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_secs(1);

/// Plans whenever this node leads the catalog, until `stop`. One task a node.
pub async fn control(catalog: Catalog, stop: Stop) {
    let planning = async {
        let mut changes = catalog.view().changes();
        let mut seen: Option<Facts> = None;
        loop {
            changes.mark_unchanged();
            // Before, older nodes could not read what it writes.
            if catalog.leads() && catalog.cluster_version() >= ClusterVersion::V2 {
                seen = pass(&catalog, seen).await;
            } else {
                seen = None;
            }
            sleep(PAUSE).await;
            // The catalog ends only with the node.
            let _ = timeout(PLAN_EVERY, changes.changed()).await;
        }
    };
    stop.run_until_cancelled(planning).await;
}

/// Plans once, unless nothing has changed since `seen`. What it has seen, if all that was to do is done.
async fn pass(catalog: &Catalog, seen: Option<Facts>) -> Option<Facts> {
    if let Err(error) = catalog.keep_defaults().await {
        warn!(%error, "the cluster's defaults of placement are not kept yet; tried again");
        return None;
    }
    let facts = catalog.facts();
    if seen.as_ref() == Some(&facts) {
        return seen;
    }
    let plan = facts.plan(PlanLimits::default());
    for (topic, why) in &plan.stuck {
        info!(%topic, %why, "replicas cannot be where they should");
    }
    match carry_out(catalog, &plan).await {
        Ok(()) => Some(facts),
        Err(error) => {
            warn!(%error, "a move was not begun; tried again");
            None
        }
    }
}

async fn carry_out(catalog: &Catalog, plan: &Plan) -> Result<(), PlaceError> {
    for id in &plan.cancels {
        let Some(topic) = catalog.view().topic(*id) else { continue };
        info!(topic = %id, "a move leads to a node that is lost or leaves: it is turned round");
        passable(catalog.cancel_move(&topic).await)?;
    }
    for planned in &plan.moves {
        let Some(topic) = catalog.view().topic(planned.topic) else { continue };
        info!(
            topic = %planned.topic, from = ?topic.replicas, to = ?planned.target, reason = ?planned.reason,
            "replicas are to move"
        );
        passable(catalog.start_move(&topic, planned.target.clone(), planned.reason).await)?;
    }
    Ok(())
}

/// Somebody was faster, or a node was drained meanwhile: the next plan sees it.
fn passable<T>(outcome: Result<T, PlaceError>) -> Result<(), PlaceError> {
    match outcome {
        Ok(_) | Err(PlaceError::Refused(_) | PlaceError::Unplaceable(_)) => Ok(()),
        Err(error @ PlaceError::Write(_)) => Err(error),
    }
}
