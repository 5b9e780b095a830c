//! What key rings are bound to: topics, and API keys whose events are sealed under a ring of their own.
//!
//! The rings themselves are the vault's. Here is only which of them a topic's or an API key's events are sealed under, and that one is
//! destroyed together with an API key only if nothing else is sealed under it.

use std::collections::BTreeSet;
use std::sync::Arc;

use ensign_proto::{ApiKeyId, ProjectId, RingId, TopicId};
use ensign_raft::env::UnixNanos;

use super::command::{FORMER_RINGS_MAX, Outcome, Refusal, Response};
use super::records::{ApiKey, Project, Topic, TopicState};
use super::state::State;

/// Everything that a ring is bound to, each list by age.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bound {
    /// Projects that began with it.
    pub projects: Vec<Arc<Project>>,
    /// Topics that are sealed under it.
    pub topics: Vec<Arc<Topic>>,
    /// Topics that were, before they were bound to another one.
    pub former_topics: Vec<Arc<Topic>>,
    /// API keys whose events are, also those that are revoked.
    pub api_keys: Vec<Arc<ApiKey>>,
}

impl State {
    /// Whether an API key was revoked together with the ring.
    pub(super) fn is_ring_shredded(&self, ring: RingId) -> bool {
        self.api_keys_of(ring).any(|key| key.shredded)
    }

    /// Whether an API key of the project has the ring.
    pub(super) fn has_api_key_ring(&self, project: ProjectId, ring: RingId) -> bool {
        self.api_keys_of(ring).any(|key| key.project == Some(project))
    }

    /// The rings that API keys were revoked together with, in the order of their ids.
    pub(super) fn shredded_rings(&self) -> impl Iterator<Item = RingId> {
        let keys = self.api_keys_by_ring.iter().filter_map(|(ring, key)| Some((*ring, self.api_keys.get(key)?)));
        keys.filter(|(_, key)| key.shredded).map(|(ring, _)| ring)
    }

    fn api_keys_of(&self, ring: RingId) -> impl Iterator<Item = &Arc<ApiKey>> {
        let all = (ring, ApiKeyId::from_bytes([0; 16]))..=(ring, ApiKeyId::from_bytes([0xff; 16]));
        self.api_keys_by_ring.range(all).filter_map(|(_, key)| self.api_keys.get(key))
    }

    pub(super) fn bound_to(&self, ring: RingId) -> Bound {
        Bound {
            projects: self.projects.values().filter(|project| project.ring == ring).cloned().collect(),
            topics: self.topics.values().filter(|topic| topic.ring == ring).cloned().collect(),
            former_topics: self.topics.values().filter(|topic| topic.former_rings.contains(&ring)).cloned().collect(),
            api_keys: self.api_keys_of(ring).cloned().collect(),
        }
    }

    pub(super) fn set_topic_ring(&mut self, topic: TopicId, ring: RingId, at: UnixNanos) -> Response {
        let old = self.topics.get(&topic).ok_or(Refusal::TopicUnknown)?;
        if old.state != TopicState::Ready {
            return Err(Refusal::TopicState(old.state));
        }
        if old.ring == ring {
            return Ok(Outcome::Topic(Arc::clone(old)));
        }
        if self.is_ring_shredded(ring) {
            return Err(Refusal::RingShredded);
        }
        let mut former_rings: BTreeSet<RingId> = old.former_rings.clone();
        former_rings.insert(old.ring);
        former_rings.remove(&ring);
        if former_rings.len() > FORMER_RINGS_MAX {
            return Err(Refusal::RingsTooMany);
        }
        let modified = old.modified.max(at);
        Ok(self.put_topic(Topic { ring, former_rings, modified, ..(**old).clone() }))
    }

    pub(super) fn shred_api_key(&mut self, key: ApiKeyId, at: UnixNanos) -> Response {
        let old = self.api_keys.get(&key).ok_or(Refusal::ApiKeyUnknown)?;
        let ring = old.ring.ok_or(Refusal::NoRing)?;
        let Bound { projects, topics, former_topics, api_keys } = self.bound_to(ring);
        let alone = projects.is_empty() && topics.is_empty() && former_topics.is_empty() && api_keys.len() == 1;
        if !alone {
            return Err(Refusal::RingShared);
        }
        let revoked_at = old.revoked_at.or(Some(at));
        Ok(self.put_api_key(ApiKey { revoked_at, shredded: true, ..(**old).clone() }))
    }
}
