//! Topics, once they are made.

use std::sync::Arc;

use ensign_proto::{RingId, TopicId};

use super::{Catalog, unexpected};
use crate::catalog::command::{Command, Outcome, Refusal};
use crate::catalog::errors::{BindRingError, ChangeTopicError};
use crate::catalog::records::{Topic, TopicPolicies, TopicState};

impl Catalog {
    /// Archives a topic: it takes no more events. Doing it again changes nothing.
    ///
    /// # Errors
    /// See [`ChangeTopicError`].
    pub async fn archive_topic(&self, topic: TopicId) -> Result<Arc<Topic>, ChangeTopicError> {
        let command = Command::SetTopicState { topic, state: TopicState::Readonly, at: self.now() };
        changed_topic(self.write(command).await?)
    }

    /// Begins to destroy a topic: it is gone for clients at once, and its name is free after [`Catalog::finish_destroy`].
    /// Doing it again changes nothing.
    ///
    /// # Errors
    /// See [`ChangeTopicError`].
    pub async fn destroy_topic(&self, topic: TopicId) -> Result<Arc<Topic>, ChangeTopicError> {
        let command = Command::SetTopicState { topic, state: TopicState::Deleting, at: self.now() };
        changed_topic(self.write(command).await?)
    }

    /// Forgets a topic whose data is gone from the nodes. Doing it again changes nothing.
    ///
    /// # Errors
    /// [`ChangeTopicError::State`]: it is not being destroyed.
    pub async fn finish_destroy(&self, topic: TopicId) -> Result<(), ChangeTopicError> {
        let known = self.topic(topic);
        match self.write(Command::FinishDestroy { topic, at: self.now() }).await? {
            Ok(_) => {}
            Err(Refusal::TopicState(state)) => return Err(ChangeTopicError::State(state)),
            Err(refusal) => return Err(unexpected(&Err(refusal)).into()),
        }
        if let Some(topic) = known {
            self.take_back(self.custody_of(topic.project, topic.id)).await;
        }
        Ok(())
    }

    /// Binds what a topic is given from now on to another key ring of its project, which the caller has seen in the vault. Again
    /// changes nothing. A leader on another node hears of it a moment later.
    ///
    /// # Errors
    /// See [`BindRingError`].
    pub async fn set_topic_ring(&self, topic: TopicId, ring: RingId) -> Result<Arc<Topic>, BindRingError> {
        match self.write(Command::SetTopicRing { topic, ring, at: self.now() }).await? {
            Ok(Outcome::Topic(topic)) => Ok(topic),
            Err(Refusal::TopicUnknown) => Err(BindRingError::Unknown),
            Err(Refusal::TopicState(state)) => Err(BindRingError::State(state)),
            Err(refusal @ (Refusal::RingShredded | Refusal::RingsTooMany)) => Err(BindRingError::Refused(refusal)),
            other => Err(unexpected(&other).into()),
        }
    }

    /// Replaces a topic's policies.
    ///
    /// # Errors
    /// [`ChangeTopicError::State`]: it is archived or being destroyed.
    pub async fn set_topic_policies(
        &self,
        topic: TopicId,
        policies: TopicPolicies,
    ) -> Result<Arc<Topic>, ChangeTopicError> {
        changed_topic(self.write(Command::SetTopicPolicies { topic, policies, at: self.now() }).await?)
    }
}

fn changed_topic(response: Result<Outcome, Refusal>) -> Result<Arc<Topic>, ChangeTopicError> {
    match response {
        Ok(Outcome::Topic(topic)) => Ok(topic),
        Err(Refusal::TopicUnknown) => Err(ChangeTopicError::Unknown),
        Err(Refusal::TopicState(state)) => Err(ChangeTopicError::State(state)),
        other => Err(unexpected(&other).into()),
    }
}
