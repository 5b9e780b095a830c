//! Topics: create, find, list, retire.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ensign_proto::pb::admin::v1::admin_client::AdminClient;
use ensign_proto::pb::admin::v1::{CreateTopicsRequest, CreatedTopic, ListTopicRingsRequest, TopicRing};
use ensign_proto::pb::ensign::v1beta1 as pb;
use ensign_proto::{ProjectId, RingId, TopicId};

use crate::client::Client;
use crate::connection::Repeat;
use crate::error::CallError;
use crate::event::from_timestamp;

/// How many topics one page asks for.
const PAGE: u32 = 100;

/// How many topics [`Client::create_topics`] makes at once.
pub const TOPICS_BATCH_MAX: usize = 256;
/// How many bytes of names it sends at once: a server takes messages of 64 KiB, in which each name costs a few bytes more.
pub const TOPICS_BATCH_BYTES_MAX: usize = 48 << 10;
/// How long it waits: that many partitions start on every node before the answer.
const TOPICS_TIMEOUT: Duration = Duration::from_mins(1);

/// A topic as the server describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its id.
    pub id: TopicId,
    /// Its project.
    pub project: ProjectId,
    /// Its name, unique within the project.
    pub name: String,
    /// Whether it is archived.
    pub readonly: bool,
    /// Where it is in its life.
    pub state: pb::TopicState,
    /// When it was created.
    pub created: Option<SystemTime>,
    /// When it was last changed.
    pub modified: Option<SystemTime>,
}

/// Where a new topic shall be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Place {
    /// How many replicas; none for as many as the cluster's topics have.
    pub replication: Option<u32>,
    /// The regions that replicas never leave; empty for any.
    pub regions: Vec<String>,
    /// The region that should lead; empty for none.
    pub leader_region: String,
}

impl TryFrom<pb::Topic> for Topic {
    type Error = CallError;

    fn try_from(topic: pb::Topic) -> Result<Self, CallError> {
        let state = topic.status();
        let bad = |error: ensign_proto::InvalidId| CallError::protocol(error.to_string());
        Ok(Self {
            id: TopicId::try_from(&topic.id[..]).map_err(bad)?,
            project: ProjectId::try_from(&topic.project_id[..]).map_err(bad)?,
            name: topic.name,
            readonly: topic.readonly,
            state,
            created: topic.created.and_then(from_timestamp),
            modified: topic.modified.and_then(from_timestamp),
        })
    }
}

impl Client {
    /// Creates a topic in the key's project.
    ///
    /// # Errors
    /// [`CallError::AlreadyExists`], [`CallError::Invalid`] for a bad name, and the rest of [`CallError`].
    pub async fn create_topic(&self, name: &str) -> Result<Topic, CallError> {
        self.create_topic_at(name, &Place::default()).await
    }

    /// Creates a topic with a say in how many replicas it has and where they are.
    ///
    /// # Errors
    /// As [`Client::create_topic`]; [`CallError::Invalid`] for a region that no node is in, [`CallError::Precondition`] where
    /// the cluster has too few nodes.
    pub async fn create_topic_at(&self, name: &str, place: &Place) -> Result<Topic, CallError> {
        let Place { replication, regions, leader_region } = place.clone();
        let topic = pb::Topic { name: name.to_owned(), replication, regions, leader_region, ..pb::Topic::default() };
        let call = |channel, request| async move { Self::rpc(channel).create_topic(request).await };
        self.connection().call(Repeat::OnlyIfUnsent, topic, call).await?.try_into()
    }

    /// Creates many topics in the key's project, in few commits of the cluster: at most [`TOPICS_BATCH_MAX`] names, and
    /// [`TOPICS_BATCH_BYTES_MAX`] bytes of them. Each is decided for itself; the answers are in the order of the names.
    ///
    /// # Errors
    /// [`CallError`], about the call as a whole. With [`CallError::OutcomeUnknown`] ask again: what was made the first time is
    /// then said to exist.
    pub async fn create_topics(&self, names: &[String]) -> Result<Vec<CreatedTopic>, CallError> {
        self.create_topics_under(names, None).await
    }

    /// [`Client::create_topics`] under another key ring of the project than its own, by its id or its name.
    ///
    /// # Errors
    /// As there.
    pub async fn create_topics_under(
        &self,
        names: &[String],
        ring: Option<&str>,
    ) -> Result<Vec<CreatedTopic>, CallError> {
        let ring = ring.unwrap_or_default().to_owned();
        let message = CreateTopicsRequest { names: names.to_vec(), project_id: String::new(), ring };
        let send = |channel, request| async move { AdminClient::new(channel).create_topics(request).await };
        let reply = self.connection().call_within(TOPICS_TIMEOUT, Repeat::OnlyIfUnsent, message, send).await?;
        if reply.topics.len() != names.len() {
            return Err(CallError::protocol(format!("{} answers for {} names", reply.topics.len(), names.len())));
        }
        Ok(reply.topics)
    }

    /// The key rings that the project's topics are bound to; with `topic`, that of one.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn topic_rings(&self, topic: Option<TopicId>) -> Result<HashMap<TopicId, RingId>, CallError> {
        let topic_id = topic.map(|topic| topic.to_string()).unwrap_or_default();
        let message = ListTopicRingsRequest { project_id: String::new(), topic_id };
        let send = |channel, request| async move { AdminClient::new(channel).list_topic_rings(request).await };
        let reply = self.connection().call(Repeat::Harmless, message, send).await?;
        let strange = |error: ensign_proto::InvalidId| CallError::protocol(error.to_string());
        let row = |it: TopicRing| Ok((it.topic_id.parse().map_err(strange)?, it.ring_id.parse().map_err(strange)?));
        reply.topics.into_iter().map(row).collect()
    }

    /// Every topic of the project, oldest first.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn topics(&self) -> Result<Vec<Topic>, CallError> {
        let mut topics = Vec::new();
        let mut page = pb::PageInfo { page_size: PAGE, ..pb::PageInfo::default() };
        loop {
            let call = |channel, request| async move { Self::rpc(channel).list_topics(request).await };
            let reply = self.connection().call(Repeat::Harmless, page.clone(), call).await?;
            for topic in reply.topics {
                topics.push(topic.try_into()?);
            }
            if reply.next_page_token.is_empty() {
                return Ok(topics);
            }
            page.next_page_token = reply.next_page_token;
        }
    }

    /// One topic by its id.
    ///
    /// # Errors
    /// [`CallError::NotFound`], and the rest of [`CallError`].
    pub async fn topic(&self, id: TopicId) -> Result<Topic, CallError> {
        let topic = pb::Topic { id: Bytes::copy_from_slice(id.as_bytes()), ..pb::Topic::default() };
        let call = |channel, request| async move { Self::rpc(channel).retrieve_topic(request).await };
        self.connection().call(Repeat::Harmless, topic, call).await?.try_into()
    }

    /// One topic by its name or, where no topic has that name, by its id as text.
    ///
    /// # Errors
    /// [`CallError::NotFound`], and the rest of [`CallError`].
    pub async fn find_topic(&self, name_or_id: &str) -> Result<Topic, CallError> {
        let named = self.topics().await?.into_iter().find(|topic| topic.name == name_or_id);
        match (named, name_or_id.parse()) {
            (Some(topic), _) => Ok(topic),
            (None, Ok(id)) => self.topic(id).await,
            (None, Err(_)) => Err(CallError::NotFound { message: format!("topic {name_or_id:?} not found") }),
        }
    }

    /// The hashes of all topic names with the topics' ids, as `TopicNames` tells them.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn topic_names(&self) -> Result<Vec<(String, TopicId)>, CallError> {
        let mut names = Vec::new();
        let mut page = pb::PageInfo { page_size: PAGE, ..pb::PageInfo::default() };
        loop {
            let call = |channel, request| async move { Self::rpc(channel).topic_names(request).await };
            let reply = self.connection().call(Repeat::Harmless, page.clone(), call).await?;
            for name in reply.topic_names {
                let id = name.topic_id.parse().map_err(|_| CallError::protocol("a topic id is not one"))?;
                names.push((name.name, id));
            }
            if reply.next_page_token.is_empty() {
                return Ok(names);
            }
            page.next_page_token = reply.next_page_token;
        }
    }

    /// Whether the project has a topic of this name.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn topic_exists(&self, name: &str) -> Result<bool, CallError> {
        let question = pb::TopicName { name: name.to_owned(), ..pb::TopicName::default() };
        let call = |channel, request| async move { Self::rpc(channel).topic_exists(request).await };
        Ok(self.connection().call(Repeat::Harmless, question, call).await?.exists)
    }

    /// Makes a topic read-only, for ever. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`CallError::NotFound`], and the rest of [`CallError`].
    pub async fn archive_topic(&self, id: TopicId) -> Result<pb::TopicState, CallError> {
        self.modify_topic(id, pb::topic_mod::Operation::Archive, Repeat::Harmless).await
    }

    /// Destroys a topic and every event in it. Answers at once; the destruction goes on and survives crashes.
    ///
    /// # Errors
    /// [`CallError::NotFound`], and the rest of [`CallError`].
    pub async fn destroy_topic(&self, id: TopicId) -> Result<pb::TopicState, CallError> {
        self.modify_topic(id, pb::topic_mod::Operation::Destroy, Repeat::OnlyIfUnsent).await
    }

    async fn modify_topic(
        &self,
        id: TopicId,
        operation: pb::topic_mod::Operation,
        repeat: Repeat,
    ) -> Result<pb::TopicState, CallError> {
        let change = pb::TopicMod { id: id.to_string(), operation: operation as i32 };
        let call = |channel, request| async move { Self::rpc(channel).delete_topic(request).await };
        self.connection().call(repeat, change, call).await.map(|status| status.state())
    }
}
