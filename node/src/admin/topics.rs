//! Making many topics at once, and the key rings that topics are bound to.

use std::sync::Arc;
use std::time::Duration;

use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::pb::admin::v1::created_topic::Outcome;
use ensign_proto::{ProjectId, TopicId, TopicName};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::scope::parse;
use super::{Shared, keys, status};
use crate::catalog::{CreateTopicError, Project, TOPICS_BATCH_MAX, Topic, TopicPolicies, WriteFailure};

/// How long the reply waits for partitions to run on this node. Whoever uses one that takes longer waits by itself.
const START: Duration = Duration::from_secs(10);

/// Makes topics of these names, each for itself.
pub(super) async fn create(
    shared: &Shared,
    project: &Project,
    names: Vec<String>,
    ring: &str,
) -> Result<pb::CreateTopicsReply, Status> {
    if names.is_empty() || names.len() > TOPICS_BATCH_MAX {
        let given = names.len();
        return Err(Status::invalid_argument(format!("names: give 1 to {TOPICS_BATCH_MAX} at once, not {given}")));
    }
    let parsed: Vec<Result<TopicName, _>> = names.iter().map(|name| name.parse::<TopicName>()).collect();
    let good = parsed.iter().flatten().cloned().collect();
    let ring = if ring.is_empty() { None } else { Some(keys::usable_ring(shared, project, ring).await?) };
    let made = shared.catalog.create_topics(project.id, good, &TopicPolicies::default(), ring).await;
    let mut made = made.map_err(|error| status::create_topics(&error))?.into_iter();
    let mut started = Vec::new();
    let mut topics = Vec::with_capacity(names.len());
    for (name, parsed) in names.into_iter().zip(parsed) {
        let topic = match parsed {
            Err(error) => answer(name, Outcome::Refused, error.to_string()),
            Ok(parsed) => match made.next() {
                Some(Ok(topic)) => {
                    let id = topic.id.to_string();
                    started.push(topic);
                    pb::CreatedTopic { name, outcome: Outcome::Created.into(), id, message: String::new() }
                }
                Some(Err(error)) => failed(shared, project.id, &parsed, &error),
                None => return Err(Status::internal("a topic has no answer")),
            },
        };
        topics.push(topic);
    }
    wait_until_started(shared, &started).await;
    Ok(pb::CreateTopicsReply { topics })
}

/// The key rings that topics are bound to.
pub(super) fn rings(shared: &Shared, project: &Project, topic: &str) -> Result<pb::ListTopicRingsReply, Status> {
    let view = shared.catalog.view();
    let topics = match parse::<TopicId>(topic, "topic_id")? {
        None => view.topics(project.id),
        Some(id) => {
            let topic = view.topic(id).filter(|topic| topic.project == project.id);
            vec![topic.ok_or_else(|| Status::not_found("topic not found"))?]
        }
    };
    let row = |it: &Arc<Topic>| pb::TopicRing { topic_id: it.id.to_string(), ring_id: it.ring.to_string() };
    Ok(pb::ListTopicRingsReply { topics: topics.iter().map(row).collect() })
}

fn answer(name: String, outcome: Outcome, message: String) -> pb::CreatedTopic {
    pb::CreatedTopic { name, outcome: outcome.into(), id: String::new(), message }
}

fn failed(shared: &Shared, project: ProjectId, name: &TopicName, error: &CreateTopicError) -> pb::CreatedTopic {
    let outcome = match error {
        CreateTopicError::NameTaken => Outcome::Exists,
        CreateTopicError::Write(WriteFailure::OutcomeUnknown { .. }) => Outcome::Unknown,
        CreateTopicError::Vault(_) | CreateTopicError::Write(WriteFailure::Unavailable { .. }) => Outcome::Unavailable,
        CreateTopicError::ProjectUnknown
        | CreateTopicError::Placement(_)
        | CreateTopicError::TooMany { .. }
        | CreateTopicError::Quota { .. }
        | CreateTopicError::RingShredded
        | CreateTopicError::Write(WriteFailure::NotYet { .. } | WriteFailure::Internal { .. }) => Outcome::Refused,
    };
    // What is told is what a call for one topic is told; causes stay in the log.
    let message = status::create_topics(error).message().to_owned();
    let known = shared.catalog.view().topic_by_name(project, name);
    let id = known.filter(|_| outcome == Outcome::Exists).map(|topic| topic.id.to_string()).unwrap_or_default();
    pb::CreatedTopic { id, ..answer(name.as_str().to_owned(), outcome, message) }
}

/// Usable at once, as far as they run here.
async fn wait_until_started(shared: &Shared, topics: &[Arc<Topic>]) {
    let deadline = Instant::now() + START;
    for topic in topics {
        if shared.catalog.replicas_of(topic).contains(&shared.node) {
            // One that is damaged or late is found so by whoever uses it.
            let _ = timeout_at(deadline, shared.partitions.wait_for(topic.id, START)).await;
        }
    }
}
