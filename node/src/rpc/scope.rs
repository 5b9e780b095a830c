//! The topics that a stream is for: those of the project, perhaps filtered by name, id or name hash; looked up live.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ProjectId, TopicId, TopicName, TopicNameHash, TopicRef};
use tonic::Status;

use super::Shared;
use crate::catalog::{Topic, TopicState};
use crate::status::text;

/// How long a stream's opening waits for the newest catalog.
const REFRESH_PATIENCE: Duration = Duration::from_secs(2);

/// The most topics that a stream names.
const FILTER_MAX: usize = 1_000;

/// The topics of one stream.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    project: ProjectId,
    /// None for all topics of the project.
    filter: Option<Filter>,
}

/// What the texts of a filter may mean, each reading in a set of its own.
#[derive(Debug, Clone, Default)]
struct Filter {
    names: HashSet<TopicName>,
    ids: HashSet<TopicId>,
    hashes: HashSet<TopicNameHash>,
}

impl Filter {
    fn names(&self, topic: &Topic) -> bool {
        self.names.contains(&topic.name)
            || self.ids.contains(&topic.id)
            || (!self.hashes.is_empty() && self.hashes.contains(&topic.name.hash()))
    }
}

impl Scope {
    /// # Errors
    /// INVALID_ARGUMENT when the filter is too long.
    pub(super) fn new(project: ProjectId, filter: &[String]) -> Result<Self, Status> {
        if filter.is_empty() {
            return Ok(Self { project, filter: None });
        }
        if filter.len() > FILTER_MAX {
            let named = filter.len();
            return Err(Status::invalid_argument(format!(
                "invalid topics field: it names {named} topics, and may name {FILTER_MAX} at most; open another stream for the rest, \
                 or name none to have all topics of the project"
            )));
        }
        let mut readings = Filter::default();
        for text in filter {
            let TopicRef { name, id, hash } = TopicRef::parse(text);
            readings.names.extend(name);
            readings.ids.extend(id);
            readings.hashes.extend(hash);
        }
        Ok(Self { project, filter: Some(readings) })
    }

    /// Whose topics they are.
    pub(super) fn project(&self) -> ProjectId {
        self.project
    }

    /// Whether the stream takes every topic of the project, also later ones.
    pub(super) fn is_open(&self) -> bool {
        self.filter.is_none()
    }

    /// Whether the topic belongs to the stream.
    pub(super) fn covers(&self, topic: &Topic) -> bool {
        topic.project == self.project && self.filter.as_ref().is_none_or(|filter| filter.names(topic))
    }

    /// The topic, if it belongs to the stream.
    pub(super) fn topic(&self, shared: &Shared, id: TopicId) -> Option<Arc<Topic>> {
        shared.parts.catalog.view().topic(id).filter(|topic| self.covers(topic))
    }

    /// The stream's topics, those that are being destroyed left out.
    pub(super) fn topics(&self, shared: &Shared) -> Vec<Arc<Topic>> {
        let topics = shared.parts.catalog.view().topics(self.project);
        let usable = |topic: &Arc<Topic>| self.covers(topic) && topic.state != TopicState::Deleting;
        topics.into_iter().filter(usable).collect()
    }

    /// The stream's topics as of now, wherever they were made.
    ///
    /// # Errors
    /// FAILED_PRECONDITION when there is none.
    pub(super) async fn open(&self, shared: &Shared) -> Result<Vec<Arc<Topic>>, Status> {
        refresh(shared).await;
        let topics = self.topics(shared);
        if topics.is_empty() { Err(Status::failed_precondition(text::NO_TOPICS)) } else { Ok(topics) }
    }
}

/// Catches up with the catalog if that is possible soon; a stream can begin with what this node knows.
pub(super) async fn refresh(shared: &Shared) {
    match tokio::time::timeout(REFRESH_PATIENCE, shared.parts.catalog.refresh()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a stream begins with a catalog that may be old"),
        Err(_) => tracing::debug!("a stream begins with a catalog that may be old"),
    }
}

/// Name to id, as `ready` carries it.
pub(super) fn ready_topics(topics: &[Arc<Topic>]) -> HashMap<String, Bytes> {
    let entry = |topic: &Arc<Topic>| (topic.name.as_str().to_owned(), Bytes::copy_from_slice(topic.id.as_bytes()));
    topics.iter().map(entry).collect()
}
