//! Catalog and vault records as administrators see them.

use std::collections::BTreeMap;
use std::time::Duration;

use ensign_keyvault::{RingInfo, RingState, VersionState};
use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::{Algorithm, GroupId, NodeId, Permission, PermissionSet};
use ensign_raft::GroupStatus;
use ensign_raft::env::UnixNanos;
use tonic::Status;

use crate::catalog::{ApiKey, JoinToken, Organization, Project};

/// A catalog time on the wire.
pub(super) fn time(time: UnixNanos) -> Option<prost_types::Timestamp> {
    let nanos = (time.0 % 1_000_000_000) as i32;
    Some(prost_types::Timestamp { seconds: i64::try_from(time.as_secs()).ok()?, nanos })
}

/// A span on the wire.
pub(super) fn span(span: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(span).ok()
}

pub(super) fn millis(ms: u64) -> Option<prost_types::Timestamp> {
    time(UnixNanos(ms.saturating_mul(1_000_000)))
}

pub(super) fn organization(org: &Organization) -> pb::Organization {
    pb::Organization { id: org.id.to_string(), name: org.name.clone(), created: time(org.created) }
}

pub(super) fn project(project: &Project) -> pb::Project {
    pb::Project {
        id: project.id.to_string(),
        organization_id: project.org.to_string(),
        name: project.name.clone(),
        created: time(project.created),
        ring_id: project.ring.to_string(),
    }
}

pub(super) fn api_key(key: &ApiKey) -> pb::ApiKey {
    let mut permissions: Vec<String> = key.permissions.to_texts().into_iter().map(str::to_owned).collect();
    permissions.sort_unstable();
    pb::ApiKey {
        id: key.id.to_string(),
        client_id: key.client_id.clone(),
        name: key.name.clone(),
        project_id: key.project.map(|id| id.to_string()).unwrap_or_default(),
        permissions,
        created: time(key.created),
        revoked: key.revoked_at.is_some(),
        ring_id: key.ring.map(|ring| ring.to_string()).unwrap_or_default(),
        shredded: key.shredded,
        ring_destroyed: None,
    }
}

pub(super) fn join_token(token: &JoinToken) -> pb::JoinToken {
    pb::JoinToken {
        id: ulid::Ulid::from_bytes(token.id).to_string(),
        created: time(token.created),
        expires: time(token.expires),
        uses: token.uses,
        used: token.used,
        revoked: token.revoked_at.is_some(),
    }
}

pub(super) fn ring(ring: &RingInfo) -> pb::KeyRing {
    let versions = ring.versions.iter().map(|version| {
        let state = match version.state {
            VersionState::Active => pb::KeyState::Active,
            VersionState::Retired => pb::KeyState::Retired,
            VersionState::Disabling => pb::KeyState::Disabling,
            VersionState::Disabled => pb::KeyState::Disabled,
            VersionState::Revoking => pb::KeyState::Revoking,
            VersionState::Revoked => pb::KeyState::Revoked,
        };
        pb::KeyRingVersion {
            version: version.version.0,
            state: state as i32,
            created: millis(version.created_ms),
            kek_id: bytes::Bytes::copy_from_slice(&version.kek_id.0),
            changed: millis(version.changed_ms),
            erased: version.erased,
        }
    });
    let scheduled = ring.scheduled.iter().map(|it| pb::ScheduledRevocation {
        version: it.version.map_or(0, |version| version.0),
        ordered: millis(it.ordered_ms),
        actor: it.actor.clone(),
        after: span(it.after),
        left: span(it.left),
    });
    pb::KeyRing {
        id: ring.ring.to_string(),
        project_id: ring.project.to_string(),
        versions: versions.collect(),
        name: ring.name.clone(),
        state: match ring.state {
            RingState::Enabled => pb::KeyRingState::Enabled,
            RingState::Disabling => pb::KeyRingState::Disabling,
            RingState::Disabled => pb::KeyRingState::Disabled,
            RingState::Revoked => pb::KeyRingState::Revoked,
        }
        .into(),
        algorithm: match ring.alg {
            Algorithm::Aes256Gcm => pb::KeyAlgorithm::Aes256Gcm,
            Algorithm::Aes192Gcm => pb::KeyAlgorithm::Aes192Gcm,
            Algorithm::Aes128Gcm => pb::KeyAlgorithm::Aes128Gcm,
        }
        .into(),
        created: millis(ring.created_ms),
        rotation: span(ring.rotation),
        next_rotation: ring.next_rotation_ms().and_then(millis),
        scheduled: scheduled.collect(),
        index: ring.index.0,
        bindings: Vec::new(),
        bindings_left_out: 0,
    }
}

/// The permissions that a new API key shall have: those that are named, or all that API keys can have.
pub(super) fn permissions(texts: &[String]) -> Result<PermissionSet, Status> {
    if texts.is_empty() {
        return Ok(PermissionSet::api_key());
    }
    let mut set = PermissionSet::default();
    for text in texts {
        let known = PermissionSet::api_key().iter().find(|permission| permission.as_str() == text);
        set.insert(known.ok_or_else(|| {
            let known: Vec<_> = PermissionSet::api_key().iter().map(Permission::as_str).collect();
            Status::invalid_argument(format!(
                "permissions: {text:?} cannot be given to an API key; it is one of {}",
                known.join(", ")
            ))
        })?);
    }
    Ok(set)
}

/// A group, with the name of what it holds.
pub(super) fn group(status: &GroupStatus, names: &BTreeMap<GroupId, String>) -> pb::GroupStatus {
    let name = match status.id {
        GroupId::CATALOG => "catalog".to_owned(),
        GroupId::VAULT => "vault".to_owned(),
        id => names.get(&id).cloned().unwrap_or_default(),
    };
    let members = status.voters.iter().chain(status.matched.keys()).collect::<std::collections::BTreeSet<_>>();
    let replicas = members.into_iter().map(|node| {
        let matched = status.matched.get(node).copied().unwrap_or_default();
        // Only the leader knows; elsewhere there is nothing to compare with.
        let lag = if status.matched.is_empty() { 0 } else { status.last.0.saturating_sub(matched.0) };
        pb::ReplicaStatus { node_id: node.0, voter: status.voters.contains(node), matched_index: matched.0, lag }
    });
    pb::GroupStatus {
        id: status.id.0,
        name,
        term: status.leadership.term.0,
        leader: status.leadership.leader.map_or(0, |leader| leader.0),
        last_log_index: status.last.0,
        committed_index: status.committed.0,
        applied_index: status.applied.0,
        replicas: replicas.collect(),
    }
}

/// How many of the groups each node leads.
pub(super) fn leads(groups: &[GroupStatus]) -> BTreeMap<NodeId, u64> {
    let mut leads = BTreeMap::new();
    for leader in groups.iter().filter_map(|group| group.leadership.leader) {
        *leads.entry(leader).or_default() += 1;
    }
    leads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_permissions_means_all_that_an_api_key_can_have() {
        assert_eq!(permissions(&[]).unwrap(), PermissionSet::api_key());
        let one = permissions(&["subscriber".to_owned(), "subscriber".to_owned()]).unwrap();
        assert_eq!(one.to_texts(), ["subscriber"]);
    }

    #[test]
    fn a_permission_of_people_cannot_be_given_to_an_api_key() {
        for text in ["projects:edit", "apikeys:edit", "nonsense", ""] {
            let error = permissions(&[text.to_owned()]).unwrap_err();
            assert!(error.message().contains("topics:read"), "{}", error.message());
        }
    }
}
