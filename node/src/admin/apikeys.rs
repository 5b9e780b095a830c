//! API keys whose events are sealed under a key ring of their own, and how both end together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::RingState;
use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::{Algorithm, ApiKeyId, ClusterVersion, Permission, ProjectId, RingId};
use tokio::time::timeout;
use tonic::Status;
use tracing::{info, warn};

use super::keys::describe_ring;
use super::scope::Caller;
use super::{Service, Shared, convert, keys, status};
use crate::catalog::{ApiKey, Bound, Project};
use crate::status::text;

/// How long a list of API keys waits for the vault.
const TELLS_WITHIN: Duration = Duration::from_secs(3);

/// The ring that a new API key is to have: one that is named, or one that is made for it.
pub(super) async fn ring(
    shared: &Shared,
    caller: &Caller,
    project: &Project,
    id: ApiKeyId,
    sealing: Option<pb::create_api_key_request::Sealing>,
) -> Result<Option<RingId>, Status> {
    use pb::create_api_key_request::Sealing;
    let Some(sealing) = sealing else { return Ok(None) };
    shared.catalog.require(ClusterVersion::V2).await.map_err(|failure| status::write_failed(&failure))?;
    match sealing {
        Sealing::Ring(named) => keys::usable_ring(shared, project, &named).await.map(Some),
        Sealing::OwnRing(false) => Err(Status::invalid_argument("own_ring: say true, or leave it out")),
        Sealing::OwnRing(true) => {
            if !caller.claims.permits(Permission::ProjectsEdit) {
                return Err(Status::permission_denied(text::NOT_AUTHORIZED));
            }
            // No other ring is called so, and people see whose it is.
            let name = format!("apikey-{id}");
            let actor = Service::actor(caller);
            let made = shared.vault.create_named_ring(&actor, project.id, &name, Algorithm::default()).await;
            let made = made.map_err(|error| status::vault(&error))?;
            info!(ring = %made.ring, project = %project.id, by = %caller.claims.subject, "a key ring was made for an API key");
            Ok(Some(made.ring))
        }
    }
}

/// Says of API keys that were shredded whether their rings are destroyed. Asks the vault only where there are such keys, and not for long.
pub(super) async fn tell_destroyed(shared: &Shared, project: Option<ProjectId>, keys: &mut [pb::ApiKey]) {
    if !keys.iter().any(|key| key.shredded) {
        return;
    }
    match timeout(TELLS_WITHIN, shared.vault.list_rings(project)).await {
        Ok(Ok(rings)) => tell(&rings.iter().map(|ring| (ring.ring.to_string(), ring.is_destroyed())).collect(), keys),
        Ok(Err(error)) => warn!(%error, "the vault does not say which rings of API keys are destroyed"),
        Err(_) => warn!("the vault does not say in time which rings of API keys are destroyed"),
    }
}

fn tell(destroyed: &BTreeMap<String, bool>, keys: &mut [pb::ApiKey]) {
    for key in keys.iter_mut().filter(|key| key.shredded) {
        key.ring_destroyed = destroyed.get(&key.ring_id).copied();
    }
}

/// An API key, its ring, and where events are sealed under that, as far as this node can tell.
pub(super) async fn describe(shared: &Shared, key: &ApiKey) -> Result<pb::ApiKeyDescription, Status> {
    let mut description = pb::ApiKeyDescription { key: Some(convert::api_key(key)), ..Default::default() };
    let Some(ring) = key.ring else { return Ok(description) };
    description.ring = Some(describe_ring(shared, ring).await?);
    tell_destroyed(shared, key.project, description.key.as_mut_slice()).await;
    let topics = key.project.map(|project| shared.catalog.view().topics(project)).unwrap_or_default();
    for topic in topics {
        match shared.partitions.holds_under(topic.id, ring) {
            Some(true) => description.topics.push(topic.name.as_str().to_owned()),
            Some(false) => {}
            None => description.topics_elsewhere += 1,
        }
    }
    description.topics.sort_unstable();
    Ok(description)
}

/// Revokes an API key, and destroys the ring that belongs to it alone. Whatever was done is found done by a repetition.
pub(super) async fn shred(shared: &Shared, caller: &Caller, key: &ApiKey) -> Result<pb::RevokeApiKeyReply, Status> {
    if !caller.claims.permits(Permission::ProjectsDelete) {
        return Err(Status::permission_denied(text::NOT_AUTHORIZED));
    }
    shared.catalog.require(ClusterVersion::V2).await.map_err(|failure| status::write_failed(&failure))?;
    let Some(ring) = key.ring else {
        return Err(Status::failed_precondition(
            "the API key has no key ring of its own: its events are sealed under those of their topics, with others'; \
             nothing was revoked",
        ));
    };
    if let Some(others) = sharing(&shared.catalog.view().bound_to(ring), key) {
        return Err(Status::failed_precondition(format!(
            "key ring {ring} is not the API key's alone: {others}; nothing was revoked. `ensign key revoke --ring {ring} --all` destroys it \
             for all of them",
        )));
    }
    // First nobody publishes under it any more, and nothing can be bound to it; then it goes.
    let shredded = shared.identity.shred_api_key(key.id).await.map_err(|error| status::api_key(&error))?;
    let begin = shared.clock.boot();
    let patience = shared.lease.revoke_patience();
    let revoked = shared.vault.revoke(&Service::actor(caller), ring, None, patience).await;
    let receipt = revoked.map_err(|error| half_done(key.id, ring, &status::vault(&error)))?;
    info!(key = %key.id, %ring, by = %caller.claims.subject, "an API key was revoked, and its key ring destroyed");
    Ok(pb::RevokeApiKeyReply {
        key: Some(pb::ApiKey { ring_destroyed: Some(true), ..convert::api_key(&shredded) }),
        versions: receipt.versions.iter().map(|(version, _)| version.0).collect(),
        waited: convert::span(shared.clock.boot().0.saturating_sub(begin.0)),
        receipt: receipt.jws,
    })
}

/// The API key is revoked, but the vault has not destroyed its ring: the catalog's leader has it done from now on.
fn half_done(key: ApiKeyId, ring: RingId, why: &Status) -> Status {
    let (code, why) = (why.code(), why.message());
    warn!(%key, %ring, why, "an API key was revoked, but its key ring is still to be destroyed");
    let message = format!(
        "API key {key} is revoked, but its key ring {ring} is still to be destroyed: {why}. The cluster goes on with it; \
         `ensign apikey describe {key}` says when it is done"
    );
    Status::new(code, message)
}

/// What else is sealed under the ring of an API key, named for people; none if nothing is.
fn sharing(bound: &Bound, key: &ApiKey) -> Option<String> {
    let projects = bound.projects.iter().map(|project| format!("project {:?} began with it", project.name));
    let topics = bound.topics.iter().map(|topic| format!("topic {} is bound to it", topic.name.as_str()));
    let former = bound
        .former_topics
        .iter()
        .map(|topic| format!("topic {} was bound to it, and holds events of those days", topic.name.as_str()));
    let others = bound.api_keys.iter().filter(|other| other.id != key.id);
    let keys = others.map(|other: &Arc<ApiKey>| format!("API key {:?} ({}) has it, too", other.name, other.id));
    let mut all = projects.chain(topics).chain(former).chain(keys);
    let first: Vec<String> = all.by_ref().take(3).collect();
    if first.is_empty() {
        return None;
    }
    let more = match all.count() {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    Some(first.join(", ") + &more)
}

/// Refuses a ring that nothing can be sealed under now, with what to do about it.
pub(super) fn check_usable(ring: &ensign_keyvault::RingInfo) -> Result<(), Status> {
    let id = ring.ring;
    match ring.state {
        RingState::Revoked => {
            Err(Status::failed_precondition(format!("key ring {id} was revoked, for ever: name another one")))
        }
        RingState::Disabling | RingState::Disabled => Err(Status::failed_precondition(format!(
            "key ring {id} is disabled: `ensign key enable --ring {id} --all` takes it back into use"
        ))),
        RingState::Enabled if ring.active().is_none() => Err(Status::failed_precondition(format!(
            "key ring {id} has no active version: `ensign key rotate --ring {id}` makes one"
        ))),
        RingState::Enabled => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::{OrgId, PermissionSet, ProjectId};
    use ensign_raft::env::UnixNanos;

    use super::*;

    fn key(n: u8) -> Arc<ApiKey> {
        Arc::new(ApiKey {
            id: ApiKeyId::from_bytes([n; 16]),
            client_id: format!("client-{n}"),
            name: format!("key {n}"),
            org: OrgId::from_bytes([1; 16]),
            project: Some(ProjectId::from_bytes([1; 16])),
            permissions: PermissionSet::api_key(),
            admin: false,
            created: UnixNanos(0),
            revoked_at: None,
            ring: Some(RingId::from_bytes([1; 16])),
            shredded: false,
        })
    }

    #[test]
    fn of_what_was_shredded_it_is_told_whether_it_is_destroyed_or_that_nobody_knows() {
        let key = |id: &str, shredded| pb::ApiKey { ring_id: id.to_owned(), shredded, ..Default::default() };
        let mut keys = [key("gone", true), key("lives", true), key("unknown", true), key("gone", false)];
        tell(&BTreeMap::from([("gone".to_owned(), true), ("lives".to_owned(), false)]), &mut keys);
        assert_eq!(keys.map(|key| key.ring_destroyed), [Some(true), Some(false), None, None]);
    }

    #[test]
    fn a_shredding_that_the_vault_did_not_end_says_how_far_it_is() {
        let (key, ring) = (ApiKeyId::from_bytes([1; 16]), RingId::from_bytes([2; 16]));
        let told = half_done(key, ring, &Status::unavailable("the key vault is sealed"));
        assert_eq!(told.code(), tonic::Code::Unavailable, "whoever repeats it on that code does right");
        let begin = format!(
            "API key {key} is revoked, but its key ring {ring} is still to be destroyed: the key vault is sealed. "
        );
        assert!(told.message().starts_with(&begin), "{}", told.message());
    }

    #[test]
    fn a_ring_that_is_shared_says_with_whom_and_with_how_many_more() {
        let mut bound = Bound { api_keys: vec![key(1)], ..Bound::default() };
        assert_eq!(sharing(&bound, &key(1)), None, "with itself is with nobody");
        bound.api_keys.push(key(2));
        let id = key(2).id;
        assert_eq!(sharing(&bound, &key(1)), Some(format!("API key \"key 2\" ({id}) has it, too")));
        bound.api_keys.extend([3, 4, 5].map(key));
        assert!(sharing(&bound, &key(1)).unwrap().ends_with(", and 1 more"));
    }
}
