//! The topics that a stream is for: those of the project, perhaps filtered by name, id or name hash; looked up live.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ProjectId, TopicId, TopicRef};
use tonic::Status;

use super::Shared;
use crate::catalog::{Topic, TopicState};
use crate::status::text;

/// How long a stream's opening waits for the newest catalog.
const REFRESH_PATIENCE: Duration = Duration::from_secs(2);

/// The topics of one stream.
#[derive(Debug, Clone)]
pub(super) struct Scope {
    project: ProjectId,
    /// Empty for all topics of the project.
    filter: Vec<TopicRef>,
}

impl Scope {
    pub(super) fn new(project: ProjectId, filter: &[String]) -> Self {
        Self { project, filter: filter.iter().map(|text| TopicRef::parse(text)).collect() }
    }

    /// Whether the stream takes every topic of the project, also later ones.
    pub(super) fn is_open(&self) -> bool {
        self.filter.is_empty()
    }

    /// Whether the topic belongs to the stream.
    pub(super) fn covers(&self, topic: &Topic) -> bool {
        let named = |reference: &TopicRef| {
            reference.name.as_ref().is_some_and(|name| *name == topic.name)
                || reference.id == Some(topic.id)
                || reference.hash == Some(topic.name.hash())
        };
        topic.project == self.project && (self.filter.is_empty() || self.filter.iter().any(named))
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
