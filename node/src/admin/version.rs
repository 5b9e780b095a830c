//! The cluster's version as administrators see it.

use std::collections::BTreeSet;

use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::{ClusterVersion, NodeId};
use tonic::Status;

use super::Shared;
use crate::catalog::WriteFailure;
use crate::upgrade::{RaiseError, Survey, Surveyed};

/// What every node speaks.
pub(super) async fn shown(shared: &Shared) -> pb::VersionReply {
    let (survey, newest) = (shared.upgrades.survey().await, shared.upgrades.newest());
    pb::VersionReply {
        active: survey.active.0,
        newest: newest.0,
        obstacle: obstacle(&survey, newest).unwrap_or_default(),
        nodes: survey.nodes.into_iter().map(|it| node(shared, it)).collect(),
    }
}

fn node(shared: &Shared, surveyed: Surveyed) -> pb::NodeVersion {
    let known = shared.catalog.view().node(surveyed.node);
    let node = pb::NodeVersion {
        node_id: surveyed.node.0,
        name: known.map(|node| node.name.clone()).unwrap_or_default(),
        ..pb::NodeVersion::default()
    };
    match surveyed.says {
        Ok(said) => {
            pb::NodeVersion { newest: said.speaks.newest.0, release: said.release, held: said.speaks.held, ..node }
        }
        Err(failure) => pb::NodeVersion { failure, ..node },
    }
}

fn obstacle(survey: &Survey, newest: ClusterVersion) -> Option<String> {
    if survey.active >= newest {
        return None;
    }
    survey.obstacle(newest, &BTreeSet::new()).or_else(|| survey.held_back())
}

/// A change that some nodes could not read yet: which, and what to do about it.
pub(super) async fn not_yet(shared: &Shared, failure: &WriteFailure) -> Status {
    let survey = shared.upgrades.survey().await;
    let why = obstacle(&survey, shared.upgrades.newest()).map(|why| format!(". Now: {why}")).unwrap_or_default();
    Status::failed_precondition(format!("{failure}{why}"))
}

/// Raises the cluster's version.
///
/// # Errors
/// FAILED_PRECONDITION: not every node speaks it. INVALID_ARGUMENT: there is no such version.
pub(super) async fn raise(shared: &Shared, request: &pb::RaiseVersionRequest) -> Result<(), Status> {
    let to = (request.to > 0).then_some(ClusterVersion(request.to));
    let lost = request.without.iter().copied().map(NodeId).collect();
    match shared.upgrades.raise(to, &lost).await {
        Ok(_) => Ok(()),
        Err(RaiseError::Write(failure)) => Err(super::status::write_failed(&failure)),
        Err(error @ (RaiseError::NotAll { .. } | RaiseError::Lower { .. })) => {
            Err(Status::failed_precondition(error.to_string()))
        }
        Err(error @ RaiseError::Unknown { .. }) => Err(Status::invalid_argument(error.to_string())),
    }
}
