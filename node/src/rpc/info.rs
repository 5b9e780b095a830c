//! Info: what a project holds, counted as it is committed.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::convert::timestamp;
use ensign_proto::pb::ensign::peer::v1::EventKind;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::{Permission, TopicId};
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::Shared;
use super::auth::{self, Need};
use super::scope::refresh;
use crate::catalog::{Topic, TopicState};
use crate::partition::{Counters, TypeCount};

/// How long the newest counters are waited for; a topic without a leader is counted as far as this node knows.
const CATCH_UP: Duration = Duration::from_secs(2);

/// Topics counted at once.
const AT_ONCE: usize = 32;

/// What a type is called whose key is gone.
const SEALED: &str = "sealed type";

pub(super) async fn project(
    shared: &Shared,
    request: Request<api::InfoRequest>,
) -> Result<Response<api::ProjectInfo>, Status> {
    let need = Need::All(&[Permission::TopicsRead, Permission::MetricsRead]);
    let caller = auth::authorize(shared, request.metadata(), need).await?;
    let project = caller.project()?;
    let filter: Result<HashSet<TopicId>, _> =
        request.get_ref().topics.iter().map(|id| TopicId::try_from(&id[..])).collect();
    let filter = filter.map_err(|_| Status::invalid_argument("could not parse topic id in info request filter"))?;
    refresh(shared).await;
    let topics = shared.parts.catalog.view().topics(project);
    let topics: Vec<_> = topics.into_iter().filter(|topic| filter.is_empty() || filter.contains(&topic.id)).collect();
    let mut infos = Vec::with_capacity(topics.len());
    for together in topics.chunks(AT_ONCE) {
        infos.extend(futures::future::join_all(together.iter().map(|topic| count(shared, topic))).await);
    }
    let readonly = topics.iter().filter(|topic| topic.state == TopicState::Readonly).count();
    Ok(Response::new(api::ProjectInfo {
        project_id: Bytes::copy_from_slice(project.as_bytes()),
        num_topics: topics.len() as u64,
        num_readonly_topics: readonly as u64,
        events: infos.iter().map(|info| info.events).sum(),
        duplicates: infos.iter().map(|info| info.duplicates).sum(),
        data_size_bytes: infos.iter().map(|info| info.data_size_bytes).sum(),
        topics: infos,
    }))
}

async fn count(shared: &Shared, topic: &Arc<Topic>) -> api::TopicInfo {
    let counters = match shared.parts.partitions.get(topic.id) {
        Some(handle) => {
            if let Err(error) = handle.catch_up(CATCH_UP).await {
                tracing::debug!(topic = %topic.id, %error, "counters may be old");
            }
            handle.counters().await
        }
        None => Counters::default(),
    };
    let last_id = counters.last_id;
    api::TopicInfo {
        topic_id: Bytes::copy_from_slice(topic.id.as_bytes()),
        project_id: Bytes::copy_from_slice(topic.project.as_bytes()),
        event_offset_id: last_id.map(|id| Bytes::copy_from_slice(id.as_bytes())).unwrap_or_default(),
        events: counters.events,
        duplicates: 0,
        data_size_bytes: counters.bytes,
        types: counters.types.iter().map(type_info).collect(),
        modified: last_id.map(|id| timestamp(id.unix_ms() * 1_000_000)),
    }
}

fn type_info((counted, name): &(TypeCount, Option<Bytes>)) -> api::EventTypeInfo {
    let kind = name.as_ref().and_then(|name| EventKind::decode(&name[..]).ok());
    let kind = kind.unwrap_or_else(|| EventKind { name: SEALED.to_owned(), ..EventKind::default() });
    api::EventTypeInfo {
        r#type: Some(api::Type {
            name: kind.name,
            major_version: kind.major,
            minor_version: kind.minor,
            patch_version: kind.patch,
        }),
        mimetype: kind.mimetype,
        events: counted.events,
        duplicates: 0,
        data_size_bytes: counted.bytes,
        modified: (counted.modified_ms > 0).then(|| timestamp(counted.modified_ms * 1_000_000)),
    }
}
