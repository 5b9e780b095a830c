//! Topics: list, create, look up, archive, destroy.

use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::convert::{TopicChange, timestamp};
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::pb::ensign::v1beta1::deduplication::{OffsetPosition, Strategy};
use ensign_proto::{Offset, Permission, ProjectId, TopicId, TopicName};
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::Shared;
use super::auth::{self, Caller, Need};
use super::scope::refresh;
use super::unary::not_found;
use crate::catalog::{PageRequest, PlacementWish, Topic, TopicPolicies, TopicState};
use crate::status::{self, text};

const READERS: Need = Need::Any(&[Permission::TopicsRead, Permission::Publisher, Permission::Subscriber]);

pub(super) async fn list(
    shared: &Shared,
    request: Request<api::PageInfo>,
) -> Result<Response<api::TopicsPage>, Status> {
    let caller = auth::authorize(shared, request.metadata(), Need::All(&[Permission::TopicsRead])).await?;
    let project = caller.project()?;
    let page = request.get_ref();
    let page = PageRequest { size: page.page_size, token: &page.next_page_token };
    refresh(shared).await;
    let view = shared.parts.catalog.view();
    let page = view.topics_page(project, &page, shared.parts.clock.wall()).map_err(status::invalid_page)?;
    let ends = shared.parts.partitions.ends(&page.items).await;
    let topics = page.items.iter().map(|topic| on_wire(topic, ends.get(&topic.id))).collect();
    Ok(Response::new(api::TopicsPage { topics, next_page_token: page.next }))
}

pub(super) async fn names(
    shared: &Shared,
    request: Request<api::PageInfo>,
) -> Result<Response<api::TopicNamesPage>, Status> {
    let caller = auth::authorize(shared, request.metadata(), READERS).await?;
    // A caller without a project is told that it has no topics, as ever.
    let Ok(project) = caller.project() else { return Ok(Response::new(api::TopicNamesPage::default())) };
    let page = request.get_ref();
    let page = PageRequest { size: page.page_size, token: &page.next_page_token };
    refresh(shared).await;
    let view = shared.parts.catalog.view();
    let page = view.names_page(project, &page, shared.parts.clock.wall()).map_err(status::invalid_page)?;
    let name = |(hash, topic): &(ensign_proto::TopicNameHash, Arc<Topic>)| api::TopicName {
        topic_id: topic.id.to_string(),
        project_id: topic.project.to_string(),
        name: hash.to_string(),
    };
    let topic_names = page.items.iter().map(name).collect();
    Ok(Response::new(api::TopicNamesPage { topic_names, next_page_token: page.next }))
}

/// The project that a request names in sixteen bytes, or that of the caller.
fn requested_project(caller: &Caller, named: Option<Result<ProjectId, ()>>) -> Result<ProjectId, Status> {
    match (named, caller.claims.project) {
        (None, None) => Err(Status::invalid_argument("missing project id field")),
        (None, Some(own)) => Ok(own),
        (Some(Err(())), _) => Err(Status::invalid_argument("invalid project id field")),
        (Some(Ok(named)), Some(own)) if named == own => Ok(own),
        (Some(Ok(_)), _) => Err(Status::permission_denied(text::NOT_AUTHORIZED)),
    }
}

/// Creates a topic. Of what the caller sends, name, project and deduplication count; the rest is the server's.
pub(super) async fn create(shared: &Shared, request: Request<api::Topic>) -> Result<Response<api::Topic>, Status> {
    let caller = auth::authorize(shared, request.metadata(), Need::All(&[Permission::TopicsCreate])).await?;
    let wanted = request.into_inner();
    let named = (!wanted.project_id.is_empty()).then(|| ProjectId::try_from(&wanted.project_id[..]).map_err(|_| ()));
    let project = requested_project(&caller, named)?;
    if !wanted.id.is_empty() && TopicId::try_from(&wanted.id[..]).is_err() {
        return Err(Status::invalid_argument("cannot parse id field"));
    }
    let name: TopicName = wanted.name.parse().map_err(status::invalid_name)?;
    let deduplication = normalized(wanted.deduplication.unwrap_or_default());
    let unsupported = deduplication.strategy() != Strategy::None;
    if unsupported {
        return Err(Status::unimplemented(
            "deduplication by content is not supported yet; supported is the strategy NONE",
        ));
    }
    let policies = TopicPolicies { deduplication: deduplication.encode_to_vec().into(), ..TopicPolicies::default() };
    let wish = PlacementWish {
        replication: wanted.replication,
        regions: wanted.regions.iter().cloned().collect(),
        leader_region: wanted.leader_region.clone(),
    };
    let created = shared.parts.catalog.create_topic_at(project, name, policies, wish).await;
    let topic = created.map_err(|error| status::create_topic_failed(&error))?;
    // Usable at once, also here: the partition starts with the topic.
    // If it takes longer, whoever uses it waits.
    let _ = shared.parts.partitions.reach(topic.id, std::time::Duration::from_secs(2)).await;
    described(shared, topic).await
}

/// A topic, with the offset of its newest event.
async fn described(shared: &Shared, topic: Arc<Topic>) -> Result<Response<api::Topic>, Status> {
    let topic = [topic];
    let ends = shared.parts.partitions.ends(&topic).await;
    Ok(Response::new(on_wire(&topic[0], ends.get(&topic[0].id))))
}

pub(super) async fn retrieve(shared: &Shared, request: Request<api::Topic>) -> Result<Response<api::Topic>, Status> {
    let caller = auth::authorize(shared, request.metadata(), Need::All(&[Permission::TopicsRead])).await?;
    let id = &request.get_ref().id;
    if id.is_empty() {
        return Err(Status::invalid_argument("missing topic id field"));
    }
    let id = TopicId::try_from(&id[..]).map_err(|_| Status::invalid_argument("invalid topic id field"))?;
    let topic = find(shared, &caller, id).await?;
    described(shared, topic).await
}

/// The caller's topic of this id.
async fn find(shared: &Shared, caller: &Caller, id: TopicId) -> Result<Arc<Topic>, Status> {
    refresh(shared).await;
    let topic = shared.parts.catalog.view().topic(id);
    topic.filter(|topic| Some(topic.project) == caller.claims.project).ok_or_else(not_found)
}

fn parse_id(text: &str) -> Result<TopicId, Status> {
    if text.trim().is_empty() {
        return Err(Status::invalid_argument("missing id field"));
    }
    text.parse().map_err(|_| Status::invalid_argument("invalid id field"))
}

pub(super) async fn delete(
    shared: &Shared,
    request: Request<api::TopicMod>,
) -> Result<Response<api::TopicStatus>, Status> {
    let caller = auth::authenticate(shared, request.metadata()).await?;
    let wanted = request.get_ref();
    let change = TopicChange::try_from(wanted).map_err(|error| status::invalid_field(&error))?;
    caller.permits(match change {
        TopicChange::Archive => Permission::TopicsEdit,
        TopicChange::Destroy => Permission::TopicsDestroy,
    })?;
    let id = parse_id(&wanted.id)?;
    let topic = find(shared, &caller, id).await?;
    if topic.state == TopicState::Deleting {
        return Err(status::cannot_change(topic.state));
    }
    let (changed, state) = match change {
        TopicChange::Archive => (shared.parts.catalog.archive_topic(id).await, api::TopicState::Readonly),
        TopicChange::Destroy => (shared.parts.catalog.destroy_topic(id).await, api::TopicState::Deleting),
    };
    changed.map_err(|error| status::change_topic_failed(&error))?;
    Ok(Response::new(api::TopicStatus { id: id.to_string(), state: state.into() }))
}

pub(super) async fn exists(
    shared: &Shared,
    request: Request<api::TopicName>,
) -> Result<Response<api::TopicExistsInfo>, Status> {
    let caller = auth::authorize(shared, request.metadata(), READERS).await?;
    let asked = request.get_ref();
    let named = (!asked.project_id.is_empty()).then(|| asked.project_id.parse().map_err(|_| ()));
    let project = requested_project(&caller, named)?;
    if asked.name.is_empty() && asked.topic_id.is_empty() {
        return Err(Status::invalid_argument("must specify either or both topic name and id"));
    }
    let id = match asked.topic_id.as_str() {
        "" => None,
        text => {
            let id: Option<TopicId> = text.parse().ok().filter(|id: &TopicId| !id.is_zero());
            Some(id.ok_or_else(|| Status::invalid_argument("invalid topic id field"))?)
        }
    };
    refresh(shared).await;
    let view = shared.parts.catalog.view();
    let by_id = id.map(|id| view.topic(id).filter(|topic| topic.project == project));
    let by_name = (!asked.name.is_empty()).then(|| {
        // A name that could never be valid names nothing.
        asked.name.parse().ok().and_then(|name: TopicName| view.topic_by_name(project, &name))
    });
    let exists = match (by_name, by_id) {
        (Some(named), Some(identified)) => named.is_some() && named.map(|t| t.id) == identified.map(|t| t.id),
        (Some(found), None) | (None, Some(found)) => found.is_some(),
        (None, None) => false,
    };
    Ok(Response::new(api::TopicExistsInfo { query: question(asked), exists }))
}

/// The question, as it is echoed.
fn question(asked: &api::TopicName) -> String {
    let name = (!asked.name.is_empty()).then(|| format!("name={:?}", asked.name));
    let topic = (!asked.topic_id.is_empty()).then(|| format!("topic={:?}", asked.topic_id));
    let parts: Vec<_> = name.into_iter().chain(topic).collect();
    parts.join(" and ")
}

/// Checks a change of policies as it will be checked; the only change that is carried out is none.
pub(super) async fn set_policy(
    shared: &Shared,
    request: Request<api::TopicPolicy>,
) -> Result<Response<api::TopicStatus>, Status> {
    let caller = auth::authorize(shared, request.metadata(), Need::All(&[Permission::TopicsEdit])).await?;
    let wanted = request.get_ref();
    if wanted.id.trim().is_empty() {
        return Err(Status::invalid_argument("missing id field"));
    }
    let policy = wanted.deduplication_policy.clone().unwrap_or_default();
    let shards = wanted.sharding_strategy != api::ShardingStrategy::Unknown as i32;
    if policy.strategy() == Strategy::Unknown && !shards {
        return Err(Status::invalid_argument("no policies defined to set on topic"));
    }
    let id = parse_id(&wanted.id)?;
    let topic = find(shared, &caller, id).await?;
    match topic.state {
        TopicState::Ready => {}
        TopicState::Readonly => {
            return Err(Status::failed_precondition("cannot change policies of an archived topic"));
        }
        TopicState::Deleting => {
            let message = format!("cannot change a topic that is in the {} state", status::state_name(topic.state));
            return Err(Status::failed_precondition(message));
        }
    }
    if shards {
        let message = "changing the sharding strategy of a topic is currently not supported";
        return Err(Status::unimplemented(message));
    }
    let policy = normalized(policy);
    let strategy = policy.strategy();
    if policy == stored_policy(&topic) {
        return Ok(Response::new(api::TopicStatus { id: id.to_string(), state: api::TopicState::Ready.into() }));
    }
    if matches!(strategy, Strategy::KeyGrouped | Strategy::UniqueKey) && policy.keys.is_empty() {
        return Err(Status::invalid_argument("no keys specified for key based hashing"));
    }
    if strategy == Strategy::UniqueField && policy.fields.is_empty() {
        return Err(Status::invalid_argument("no fields specified for field based hashing"));
    }
    Err(Status::unimplemented("deduplication by content is not supported yet; supported is the strategy NONE"))
}

/// A deduplication policy in its one form.
fn normalized(mut policy: api::Deduplication) -> api::Deduplication {
    if policy.offset() == OffsetPosition::OffsetUnknown {
        policy.set_offset(OffsetPosition::OffsetEarliest);
    }
    if policy.strategy() == Strategy::Unknown {
        policy.set_strategy(Strategy::None);
    }
    if !matches!(policy.strategy(), Strategy::KeyGrouped | Strategy::UniqueKey) {
        policy.keys.clear();
    }
    if policy.strategy() != Strategy::UniqueField {
        policy.fields.clear();
    }
    policy.keys.sort();
    policy.keys.dedup();
    policy.fields.sort();
    policy.fields.dedup();
    policy
}

fn stored_policy(topic: &Topic) -> api::Deduplication {
    normalized(api::Deduplication::decode(&topic.policies.deduplication[..]).unwrap_or_default())
}

/// A topic as clients see it, which ends at `end` as far as is known.
fn on_wire(topic: &Topic, end: Option<&Offset>) -> api::Topic {
    let newest = end.map_or(0, |end| end.0 - 1);
    let state = match topic.state {
        // Archived topics are marked by `readonly`; their status stays READY.
        TopicState::Ready | TopicState::Readonly => api::TopicState::Ready,
        TopicState::Deleting => api::TopicState::Deleting,
    };
    api::Topic {
        id: Bytes::copy_from_slice(topic.id.as_bytes()),
        project_id: Bytes::copy_from_slice(topic.project.as_bytes()),
        name: topic.name.as_str().to_owned(),
        readonly: topic.state == TopicState::Readonly,
        offset: newest,
        shards: 1,
        status: state.into(),
        deduplication: Some(stored_policy(topic)),
        created: Some(timestamp(topic.created.0)),
        modified: Some(timestamp(topic.modified.0)),
        ..api::Topic::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_is_echoed() {
        let ask = |name: &str, topic: &str| {
            question(&api::TopicName { name: name.to_owned(), topic_id: topic.to_owned(), ..Default::default() })
        };
        assert_eq!(ask("x", ""), r#"name="x""#);
        assert_eq!(ask("", "01AB"), r#"topic="01AB""#);
        assert_eq!(ask("x", "01AB"), r#"name="x" and topic="01AB""#);
    }

    #[test]
    fn a_policy_has_one_form() {
        let sloppy = api::Deduplication {
            strategy: Strategy::UniqueKey.into(),
            keys: vec!["b".to_owned(), "a".to_owned(), "b".to_owned()],
            fields: vec!["x".to_owned()],
            ..Default::default()
        };
        let tidy = normalized(sloppy);
        assert_eq!(tidy.keys, ["a", "b"]);
        assert!(tidy.fields.is_empty());
        assert_eq!(tidy.offset(), OffsetPosition::OffsetEarliest);
        assert_eq!(normalized(api::Deduplication::default()).strategy(), Strategy::None);
    }
}
