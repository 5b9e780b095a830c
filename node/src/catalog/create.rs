//! Making topics, one or many at a time: custody in the vault first, then the topics.
//!
//! However many there are, a batch costs one commit of the vault and one of the catalog. Each topic of a batch is decided for
//! itself: one whose name is taken does not keep the others from being made.

use std::sync::Arc;

use ensign_proto::{ClusterVersion, ProjectId, RingId, TopicName};
use tracing::info;

use super::command::{Command, NewTopic, Outcome, Refusal, TOPICS_BATCH_MAX};
use super::errors::{CreateTopicError, WriteFailure};
use super::handle::{Catalog, TOPICS_MAX, unexpected};
use super::link::Custody;
use super::placing::{PlacementWish, Placer};
use super::records::{Project, Topic, TopicPolicies};

/// A topic that was made, or why not.
type Made = Result<Arc<Topic>, CreateTopicError>;

impl Catalog {
    /// Makes a topic under its project's key ring: custody for every node first, then the topic.
    ///
    /// # Errors
    /// See [`CreateTopicError`]. Custody of a topic that was not made is dropped by [`Catalog::reconcile`].
    pub async fn create_topic(
        &self,
        project: ProjectId,
        name: TopicName,
        policies: TopicPolicies,
    ) -> Result<Arc<Topic>, CreateTopicError> {
        self.create_topic_at(project, name, policies, PlacementWish::default()).await
    }

    /// [`Catalog::create_topic`] with a say in where its replicas are.
    ///
    /// # Errors
    /// See [`CreateTopicError`].
    pub async fn create_topic_at(
        &self,
        project: ProjectId,
        name: TopicName,
        policies: TopicPolicies,
        wish: PlacementWish,
    ) -> Result<Arc<Topic>, CreateTopicError> {
        if wish != PlacementWish::default() {
            self.require(ClusterVersion::V2).await?;
        }
        let owner = self.owner(project).await?;
        self.admit(project, &name, 0)?;
        let topic = self.new_topic(owner.id, name, owner.ring, policies, &mut self.placer(wish))?;
        // As older builds write it, so that they can follow while a cluster is upgraded.
        let made = self.make(vec![topic], |mut one| one.pop().map(Command::CreateTopic)).await?;
        made.into_iter().next().unwrap_or_else(|| Err(unexpected(&Ok(Outcome::Done)).into()))
    }

    /// Makes many topics with the same policies, under `ring` or else the project's own, in as few commits as [`TOPICS_BATCH_MAX`] allows. Answers in the order of `names`;
    /// a name that is given twice is made once and taken the second time.
    ///
    /// # Errors
    /// Only [`CreateTopicError::ProjectUnknown`] and a project that could not be looked up: nothing was made. Everything else is
    /// answered for each name.
    pub async fn create_topics(
        &self,
        project: ProjectId,
        names: Vec<TopicName>,
        policies: &TopicPolicies,
        ring: Option<RingId>,
    ) -> Result<Vec<Made>, CreateTopicError> {
        if ring.is_some() {
            self.require(ClusterVersion::V2).await?;
        }
        let owner = self.owner(project).await?;
        let ring = ring.unwrap_or(owner.ring);
        let mut placer = self.placer(PlacementWish::default());
        let mut answers: Vec<Option<Made>> = Vec::with_capacity(names.len());
        let mut wanted: Vec<(usize, NewTopic)> = Vec::new();
        for (place, name) in names.into_iter().enumerate() {
            // The catalog decides; looking first only saves custody that would be dropped again.
            let admitted = self.admit(project, &name, wanted.len());
            let topic = admitted.and_then(|()| self.new_topic(project, name, ring, policies.clone(), &mut placer));
            answers.push(match topic {
                Ok(topic) => {
                    wanted.push((place, topic));
                    None
                }
                Err(error) => Some(Err(error)),
            });
        }
        let batches = self.cluster_version() >= ClusterVersion::V2;
        for batch in wanted.chunks(if batches { TOPICS_BATCH_MAX } else { 1 }) {
            let topics: Vec<NewTopic> = batch.iter().map(|(_, topic)| topic.clone()).collect();
            let command = |mut topics: Vec<NewTopic>| {
                if batches { Some(Command::CreateTopics(topics)) } else { topics.pop().map(Command::CreateTopic) }
            };
            let made = self.make(topics, command).await;
            for (n, (place, _)) in batch.iter().enumerate() {
                answers[*place] = Some(match &made {
                    Ok(made) => made.get(n).cloned().unwrap_or_else(|| Err(unexpected(&Ok(Outcome::Done)).into())),
                    Err(error) => Err(error.clone()),
                });
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    async fn owner(&self, project: ProjectId) -> Result<Arc<Project>, CreateTopicError> {
        if self.project(project).is_none() {
            // Perhaps made on another node just now.
            self.refresh().await.map_err(|error| WriteFailure::Unavailable { cause: error.to_string() })?;
        }
        self.project(project).ok_or(CreateTopicError::ProjectUnknown)
    }

    /// Whether a topic may be asked for, `besides` so many that are being made.
    fn admit(&self, project: ProjectId, name: &TopicName, besides: usize) -> Result<(), CreateTopicError> {
        if self.topic_by_name(project, name).is_some() {
            return Err(CreateTopicError::NameTaken);
        }
        if self.topic_count() + besides >= TOPICS_MAX {
            return Err(CreateTopicError::TooMany { limit: TOPICS_MAX });
        }
        if let Some(limit) = self.quota(project).topics.at()
            && self.topic_count_of(project).saturating_add(besides as u64) >= limit
        {
            return Err(CreateTopicError::Quota { limit });
        }
        Ok(())
    }

    fn new_topic(
        &self,
        project: ProjectId,
        name: TopicName,
        ring: RingId,
        policies: TopicPolicies,
        placer: &mut Placer,
    ) -> Result<NewTopic, CreateTopicError> {
        let id = self.fresh_topic();
        let (placement, replicas) = placer.place(id)?;
        let at = self.now();
        Ok(NewTopic { id, project, name, ring, replicas, placement, policies, at })
    }

    /// Custody of all of them, then the command, then back with the custody of those that were not made.
    async fn make(
        &self,
        topics: Vec<NewTopic>,
        command: impl FnOnce(Vec<NewTopic>) -> Option<Command>,
    ) -> Result<Vec<Made>, CreateTopicError> {
        let Some(project) = topics.first().map(|topic| topic.project) else { return Ok(Vec::new()) };
        let custody: Vec<Vec<Custody>> = topics.iter().map(|topic| self.custody_of(topic.project, topic.id)).collect();
        if let Err(failure) = self.parts.vault.put_custodies(custody.concat()).await {
            self.take_back(custody.concat()).await;
            return Err(failure.into());
        }
        let Some(command) = command(topics) else { return Ok(Vec::new()) };
        let limit = self.quota(project).topics.at().unwrap_or_default();
        let refused = |refusal| refused(refusal, limit);
        let made: Vec<Made> = match self.write(command).await {
            Ok(Ok(Outcome::Topic(topic))) => vec![Ok(topic)],
            Ok(Ok(Outcome::Topics(each))) => each.into_iter().map(|topic| topic.map_err(refused)).collect(),
            Ok(Err(refusal)) => vec![Err(refused(refusal)); custody.len()],
            Ok(other) => vec![Err(unexpected(&other).into()); custody.len()],
            // They may have been made after all: then they need their keys.
            Err(unknown @ WriteFailure::OutcomeUnknown { .. }) => return Err(unknown.into()),
            Err(failure) => vec![Err(failure.into()); custody.len()],
        };
        let unused = custody.into_iter().zip(&made).filter(|(_, made)| made.is_err()).flat_map(|(custody, _)| custody);
        self.take_back(unused.collect()).await;
        Ok(made)
    }

    /// Takes back what was given for topics that are not, or are no more. What stays is dropped when the vault is compared with
    /// the catalog next.
    pub(super) async fn take_back(&self, custody: Vec<Custody>) {
        if custody.is_empty() {
            return;
        }
        let records = custody.len();
        if let Err(error) = self.parts.vault.drop_custodies(custody).await {
            info!(records, %error, "custody of topics that do not exist stays in the vault for now");
        }
    }
}

/// `limit` is that of the project's topics.
fn refused(refusal: Refusal, limit: u64) -> CreateTopicError {
    match refusal {
        Refusal::NameTaken => CreateTopicError::NameTaken,
        Refusal::ProjectUnknown => CreateTopicError::ProjectUnknown,
        Refusal::TopicQuota => CreateTopicError::Quota { limit },
        Refusal::RingShredded => CreateTopicError::RingShredded,
        // A node was drained since the nodes were chosen.
        Refusal::TooFewNodes | Refusal::TargetUnusable | Refusal::RegionUnknown | Refusal::RegionForbidden => {
            WriteFailure::Unavailable { cause: refusal.to_string() }.into()
        }
        other => unexpected(&Err(other)).into(),
    }
}
