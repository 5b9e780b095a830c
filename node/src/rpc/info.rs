//! Info: what a project holds, counted as it is committed.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::convert::timestamp;
use ensign_proto::pb::ensign::peer::v1::EventKind;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::{DekId, Permission, TopicId};
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::auth::{self, Need};
use super::scope::refresh;
use super::{Shared, consistency};
use crate::catalog::{Topic, TopicState};
use crate::partition::{Counters, Freshness, Reach, ReadError, TypeCount};
use crate::status;

/// How long the newest counters are waited for; a topic without a leader is counted as far as this node knows.
const CATCH_UP: Duration = Duration::from_secs(2);

/// How long a topic that was just made is waited for.
const REACH: Duration = Duration::from_millis(500);

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
    let asked = consistency::asked(request.get_ref().consistency)?;
    refresh(shared).await;
    let topics = shared.parts.catalog.view().topics(project);
    let topics: Vec<_> = topics.into_iter().filter(|topic| filter.is_empty() || filter.contains(&topic.id)).collect();
    let mut infos = Vec::with_capacity(topics.len());
    for together in topics.chunks(AT_ONCE) {
        let counted = together.iter().map(|topic| count(shared, topic, asked));
        infos.extend(futures::future::try_join_all(counted).await?);
    }
    // What was opened earlier may have been revoked meanwhile. From here to the transport nothing waits.
    let infos: Vec<_> = infos.into_iter().map(Counted::show).collect();
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

/// A topic's counters, and the keys that the names of its types were opened with.
struct Counted {
    info: api::TopicInfo,
    partition: Option<Reach>,
    deks: Vec<DekId>,
}

impl Counted {
    /// The counters, with the names whose keys may still be used.
    fn show(mut self) -> api::TopicInfo {
        for (info, dek) in self.info.types.iter_mut().zip(&self.deks) {
            if !self.partition.as_ref().is_some_and(|partition| partition.usable(*dek)) {
                info.r#type = Some(api::Type { name: SEALED.to_owned(), ..api::Type::default() });
                info.mimetype = 0;
            }
        }
        self.info
    }
}

async fn count(shared: &Shared, topic: &Arc<Topic>, asked: Option<Freshness>) -> Result<Counted, Status> {
    let (partition, counters) = match shared.parts.partitions.reach(topic.id, REACH).await {
        Ok(partition) => {
            let counters = counters(&partition, asked).await;
            (Some(partition), counters.map_err(|error| status::read_failed(&error))?)
        }
        // A replica that is late, or damaged, has nothing to count: its topic is listed all the same.
        Err(error) if asked.is_some() => return Err(status::not_served(error)),
        Err(_) => (None, Counters::default()),
    };
    let last_id = counters.last_id;
    let deks = counters.types.iter().map(|(counted, _)| counted.dek).collect();
    let info = api::TopicInfo {
        topic_id: Bytes::copy_from_slice(topic.id.as_bytes()),
        project_id: Bytes::copy_from_slice(topic.project.as_bytes()),
        event_offset_id: last_id.map(|id| Bytes::copy_from_slice(id.as_bytes())).unwrap_or_default(),
        events: counters.events,
        duplicates: 0,
        data_size_bytes: counters.bytes,
        types: counters.types.iter().map(type_info).collect(),
        modified: last_id.map(|id| timestamp(id.unix_ms() * 1_000_000)),
    };
    Ok(Counted { info, partition, deks })
}

/// As fresh as is asked for; else as fresh as can be had soon.
async fn counters(partition: &Reach, asked: Option<Freshness>) -> Result<Counters, ReadError> {
    if let Some(freshness) = asked {
        return partition.counters(freshness, CATCH_UP).await;
    }
    match partition.counters(Freshness::Latest, CATCH_UP).await {
        Err(error @ (ReadError::NoLeader { .. } | ReadError::Unreachable { .. })) => {
            tracing::debug!(topic = %partition.topic(), %error, "counters may be old");
            partition.counters(Freshness::Known, CATCH_UP).await
        }
        counted => counted,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_whose_key_cannot_be_used_any_more_is_not_shown() {
        let named = api::Type { name: "Secret".to_owned(), major_version: 1, ..api::Type::default() };
        let counted = api::EventTypeInfo { r#type: Some(named), mimetype: 50, events: 7, ..Default::default() };
        let info = api::TopicInfo { types: vec![counted], ..api::TopicInfo::default() };
        let shown = Counted { info, partition: None, deks: vec![DekId::from_bytes([1; 16])] }.show();
        let sealed = &shown.types[0];
        assert_eq!(sealed.r#type.as_ref().unwrap().name, SEALED);
        assert_eq!((sealed.r#type.as_ref().unwrap().major_version, sealed.mimetype, sealed.events), (0, 0, 7));
    }
}
