//! Key rings as administrators change them. What a change does to keys is the vault's; here is who may ask for it, and for what.

use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::{CallError, ReceiptKind, RingInfo};
use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::{Algorithm, ClusterVersion, KeyVersion, LogIndex, NodeId, RingId};
use tonic::Status;
use tracing::info;

use super::apikeys::check_usable;
use super::scope::Caller;
use super::{Service, Shared, convert, status};
use crate::catalog::{Project, Topic};

/// How long a revocation cools off where nothing is said.
const COOLING_OFF: Duration = Duration::from_hours(7 * 24);

/// As many of each kind as are listed of what a ring is bound to.
const BINDINGS_MAX: usize = 1_000;

/// Older voters of the vault cannot read the commands that these calls write.
async fn require(shared: &Shared) -> Result<(), Status> {
    shared.catalog.require(ClusterVersion::V2).await.map_err(|failure| status::write_failed(&failure))
}

fn answer(changed: Result<RingInfo, CallError>) -> Result<pb::KeyRing, Status> {
    changed.map(|ring| convert::ring(&ring)).map_err(|error| status::vault(&error))
}

/// A version from 1, or all (`None`).
fn which(version: Option<u32>, all: bool) -> Result<Option<KeyVersion>, Status> {
    match (version, all) {
        (Some(version), false) if version > 0 => Ok(Some(KeyVersion(version))),
        (None, true) => Ok(None),
        _ => Err(Status::invalid_argument("say which version, from 1, or all")),
    }
}

fn algorithm(wire: i32) -> Result<Option<Algorithm>, Status> {
    match pb::KeyAlgorithm::try_from(wire) {
        Ok(pb::KeyAlgorithm::Unspecified) => Ok(None),
        Ok(pb::KeyAlgorithm::Aes256Gcm) => Ok(Some(Algorithm::Aes256Gcm)),
        Ok(pb::KeyAlgorithm::Aes192Gcm) => Ok(Some(Algorithm::Aes192Gcm)),
        Ok(pb::KeyAlgorithm::Aes128Gcm) => Ok(Some(Algorithm::Aes128Gcm)),
        Err(_) => Err(Status::invalid_argument("algorithm: it is AES256_GCM, AES192_GCM or AES128_GCM")),
    }
}

fn duration(wire: Option<prost_types::Duration>, field: &str) -> Result<Option<Duration>, Status> {
    let wrong = |_| Status::invalid_argument(format!("{field} is no span of time, or a negative one"));
    wire.map(Duration::try_from).transpose().map_err(wrong)
}

pub(super) async fn create(
    shared: &Shared,
    caller: &Caller,
    request: &pb::CreateKeyRingRequest,
) -> Result<pb::KeyRing, Status> {
    let project = caller.project(shared, &request.project_id)?;
    let algorithm = algorithm(request.algorithm)?.unwrap_or_default();
    if request.name.is_empty() {
        return Err(Status::invalid_argument("name: a key ring beside the project's own needs one"));
    }
    require(shared).await?;
    let made = shared.vault.create_named_ring(&Service::actor(caller), project.id, &request.name, algorithm).await;
    let ring = answer(made)?;
    info!(ring = %ring.id, project = %project.id, by = %caller.claims.subject, "a key ring was made");
    Ok(ring)
}

pub(super) async fn describe(
    shared: &Shared,
    caller: &Caller,
    request: &pb::DescribeKeyRequest,
) -> Result<pb::KeyRing, Status> {
    let ring = caller.ring(shared, &request.ring_id, &request.project_id).await?;
    describe_ring(shared, ring).await
}

/// A ring, and what is sealed under it.
pub(super) async fn describe_ring(shared: &Shared, ring: RingId) -> Result<pb::KeyRing, Status> {
    use pb::ring_binding::Kind;
    let mut described = answer(shared.vault.ring(ring).await)?;
    let bound = shared.catalog.view().bound_to(ring);
    let mut list = |kind: Kind, all: Vec<(String, String)>| {
        described.bindings_left_out += all.len().saturating_sub(BINDINGS_MAX) as u64;
        let shown = all.into_iter().take(BINDINGS_MAX);
        described.bindings.extend(shown.map(|(id, name)| pb::RingBinding { kind: kind.into(), id, name }));
    };
    let topics =
        |topics: &[Arc<Topic>]| topics.iter().map(|it| (it.id.to_string(), it.name.as_str().to_owned())).collect();
    list(Kind::Project, bound.projects.iter().map(|it| (it.id.to_string(), it.name.clone())).collect());
    list(Kind::Topic, topics(&bound.topics));
    list(Kind::FormerTopic, topics(&bound.former_topics));
    list(Kind::ApiKey, bound.api_keys.iter().map(|it| (it.id.to_string(), it.name.clone())).collect());
    Ok(described)
}

/// A ring of the project, by its id or its name, that something can be sealed under.
pub(super) async fn usable_ring(shared: &Shared, project: &Project, named: &str) -> Result<RingId, Status> {
    let rings = shared.vault.list_rings(Some(project.id)).await.map_err(|error| status::vault(&error))?;
    let id = named.parse::<RingId>().ok();
    // The one that the project began with has no name.
    let found = rings.iter().find(|ring| Some(ring.ring) == id || (!named.is_empty() && ring.name == named));
    let Some(ring) = found else {
        let named: String = named.chars().take(64).collect();
        let project = &project.name;
        return Err(Status::not_found(format!(
            "project {project:?} has no key ring {named:?}: `ensign key list` shows ids and names, `ensign key create` makes one"
        )));
    };
    check_usable(ring)?;
    Ok(ring.ring)
}

pub(super) async fn receipts(
    shared: &Shared,
    caller: &Caller,
    request: &pb::ListKeyReceiptsRequest,
) -> Result<pb::ListKeyReceiptsReply, Status> {
    let ring = caller.ring(shared, &request.ring_id, &request.project_id).await?;
    let known = shared.vault.receipts(ring).await.map_err(|error| status::vault(&error))?;
    let receipts = known.receipts.into_iter().map(|it| pb::KeyReceipt {
        kind: match it.kind {
            ReceiptKind::Revoked => pb::KeyReceiptKind::Revoked,
            ReceiptKind::Disabled => pb::KeyReceiptKind::Disabled,
            ReceiptKind::Erased => pb::KeyReceiptKind::Erased,
        }
        .into(),
        versions: it.versions.iter().map(|version| version.0).collect(),
        time: convert::millis(it.ms),
        index: it.index.0,
        receipt: it.jws,
        missing: it.missing.iter().map(|node| node.0).collect(),
    });
    let eraser = |(node, through): &(NodeId, LogIndex)| pb::KeyEraser { node_id: node.0, erased_through: through.0 };
    Ok(pb::ListKeyReceiptsReply {
        ring_id: ring.to_string(),
        receipts: receipts.collect(),
        erase_through: known.erase_through.map_or(0, |index| index.0),
        erasers: known.erasers.iter().map(eraser).collect(),
    })
}

/// What is done to what a request names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Switch {
    Disable,
    Enable,
    CancelRevoke,
}

pub(super) async fn switch(
    shared: &Shared,
    caller: &Caller,
    request: &pb::SwitchKeyRequest,
    switch: Switch,
) -> Result<pb::KeyRing, Status> {
    use pb::switch_key_request::Which;
    let version = match request.which {
        Some(Which::Version(version)) => which(Some(version), false)?,
        Some(Which::All(all)) => which(None, all)?,
        None => which(None, false)?,
    };
    let ring = caller.ring(shared, &request.ring_id, &request.project_id).await?;
    require(shared).await?;
    let (vault, actor) = (&shared.vault, Service::actor(caller));
    let answer = answer(match switch {
        Switch::Disable => vault.disable(&actor, ring, version, shared.lease.revoke_patience()).await,
        Switch::Enable => vault.enable(&actor, ring, version).await,
        Switch::CancelRevoke => vault.cancel_revoke(&actor, ring, version).await,
    })?;
    let by = &caller.claims.subject;
    match switch {
        Switch::Disable => info!(%ring, ?version, %by, "keys were disabled"),
        Switch::Enable => info!(%ring, ?version, %by, "keys were enabled"),
        Switch::CancelRevoke => info!(%ring, ?version, %by, "a scheduled revocation was cancelled"),
    }
    Ok(answer)
}

pub(super) async fn schedule_revoke(
    shared: &Shared,
    caller: &Caller,
    request: &pb::ScheduleRevokeKeyRequest,
) -> Result<pb::KeyRing, Status> {
    use pb::schedule_revoke_key_request::Which;
    let version = match request.which {
        Some(Which::Version(version)) => which(Some(version), false)?,
        Some(Which::All(all)) => which(None, all)?,
        None => which(None, false)?,
    };
    let after = duration(request.after, "after")?.unwrap_or(COOLING_OFF);
    let ring = caller.ring(shared, &request.ring_id, &request.project_id).await?;
    require(shared).await?;
    let scheduled = answer(shared.vault.schedule_revoke(&Service::actor(caller), ring, version, after).await)?;
    info!(%ring, ?version, ?after, by = %caller.claims.subject, "keys are scheduled to be destroyed");
    Ok(scheduled)
}

pub(super) async fn set(shared: &Shared, caller: &Caller, request: &pb::SetKeyRequest) -> Result<pb::KeyRing, Status> {
    let (rotation, algorithm) = (duration(request.rotation, "rotation")?, algorithm(request.algorithm)?);
    if rotation.is_none() && algorithm.is_none() {
        return Err(Status::invalid_argument("nothing is set: say rotation, algorithm, or both"));
    }
    if rotation.is_some_and(|rotation| rotation.as_millis() == 0) {
        return Err(Status::invalid_argument("rotation: it is a day at least, and two years (730 days) at most"));
    }
    let ring = caller.ring(shared, &request.ring_id, &request.project_id).await?;
    require(shared).await?;
    let changed = answer(shared.vault.set_ring(&Service::actor(caller), ring, rotation, algorithm).await)?;
    info!(%ring, ?rotation, ?algorithm, by = %caller.claims.subject, "a key ring was set");
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_version_is_named_or_all() {
        assert_eq!(which(Some(3), false).unwrap(), Some(KeyVersion(3)));
        assert_eq!(which(None, true).unwrap(), None);
        for (version, all) in [(Some(0), false), (None, false)] {
            assert_eq!(which(version, all).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
    }

    #[test]
    fn an_algorithm_that_is_not_known_is_refused_and_an_absent_one_is_absent() {
        assert_eq!(algorithm(0).unwrap(), None);
        assert_eq!(algorithm(3).unwrap(), Some(Algorithm::Aes128Gcm));
        assert!(algorithm(9).unwrap_err().message().contains("AES192_GCM"));
    }

    #[test]
    fn a_negative_span_is_refused_by_its_name() {
        let negative = prost_types::Duration { seconds: -1, nanos: 0 };
        assert_eq!(
            duration(Some(negative), "after").unwrap_err().message(),
            "after is no span of time, or a negative one"
        );
        assert_eq!(duration(None, "after").unwrap(), None);
    }
}
