//! The cluster's version as administrators see it.

use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::{ClusterVersion, NodeId};
use tonic::Status;

use super::Shared;
use crate::upgrade::{RaiseError, Surveyed};

/// What every node speaks.
pub(super) async fn shown(shared: &Shared) -> pb::VersionReply {
    let (survey, newest) = (shared.upgrades.survey().await, shared.upgrades.newest());
    pb::VersionReply {
        active: survey.active.0,
        newest: newest.0,
        obstacle: survey.in_the_way(newest).unwrap_or_default(),
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
