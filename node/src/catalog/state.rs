//! The catalog's state and how a command changes it: no clock, no randomness, no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::{
    ApiKeyId, ClusterVersion, GroupId, NodeId, OrgId, Partition, ProjectId, RingId, TopicId, TopicNameHash,
};
use ensign_raft::env::UnixNanos;

use super::command::{Command, JOIN_TOKENS_MAX, Join, NewTopic, Outcome, Refusal, Response};
use super::moves::PlacementDefaults;
use super::quota::{Limit, PerResource, Quota, QuotaChange};
use super::records::{
    ApiKey, ClusterAuthority, JoinToken, NodeRecord, Organization, Project, SigningKey, Topic, TopicState,
};

/// For how long, in the proposers' time, a destroyed topic's id answers a late retry of its creation.
const TOMBSTONE_NANOS: u64 = 24 * 3600 * 1_000_000_000;
const TOMBSTONES_MAX: usize = 10_000;
/// For how long a join token that lets nobody in any more is shown.
const JOIN_TOKEN_KEPT_NANOS: u64 = 7 * TOMBSTONE_NANOS;

/// Everything the catalog knows. Records are shared, so a reader takes a copy for the price of a counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    pub(super) nodes: BTreeMap<NodeId, Arc<NodeRecord>>,
    pub(super) organizations: BTreeMap<OrgId, Arc<Organization>>,
    pub(super) projects: BTreeMap<ProjectId, Arc<Project>>,
    pub(super) topics: BTreeMap<TopicId, Arc<Topic>>,
    pub(super) api_keys: BTreeMap<ApiKeyId, Arc<ApiKey>>,
    pub(super) signing_keys: BTreeMap<[u8; 16], Arc<SigningKey>>,
    /// Destroyed topics and when: their ids are never given out again by a delayed retry.
    pub(super) tombstones: BTreeMap<TopicId, UnixNanos>,
    /// Limits of projects that have some of their own, and of all others.
    pub(super) quotas: BTreeMap<ProjectId, Quota>,
    pub(super) default_quota: Quota,
    pub(super) next_group: GroupId,
    /// Topics that were changed or forgotten since [`State::take_touched`]; no part of what is replicated.
    touched: Vec<TopicId>,
    pub(super) authority: Option<Arc<ClusterAuthority>>,
    pub(super) join_tokens: BTreeMap<[u8; 16], Arc<JoinToken>>,
    /// The number that the next machine to join is given; only ever rises.
    pub(super) next_node: NodeId,
    /// Nodes that are none any more, and since when. For ever: a certificate of theirs may still be valid.
    pub(super) revoked_nodes: BTreeMap<NodeId, UnixNanos>,
    /// What every node can read; only ever rises.
    pub(super) version: ClusterVersion,
    /// None in a cluster from before placement was kept, until its catalog's leader writes them.
    pub(super) defaults: Option<PlacementDefaults>,
    // Indexes; rebuilt from the records on restore.
    topics_by_name: BTreeMap<(ProjectId, TopicNameHash), TopicId>,
    topics_by_project: BTreeSet<(ProjectId, TopicId)>,
    api_keys_by_client: BTreeMap<String, ApiKeyId>,
    pub(super) api_keys_by_ring: BTreeSet<(RingId, ApiKeyId)>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            nodes: BTreeMap::new(),
            organizations: BTreeMap::new(),
            projects: BTreeMap::new(),
            topics: BTreeMap::new(),
            api_keys: BTreeMap::new(),
            signing_keys: BTreeMap::new(),
            tombstones: BTreeMap::new(),
            quotas: BTreeMap::new(),
            default_quota: Quota::default(),
            next_group: GroupId::FIRST_PARTITION,
            touched: Vec::new(),
            authority: None,
            join_tokens: BTreeMap::new(),
            next_node: NodeId(1),
            revoked_nodes: BTreeMap::new(),
            version: ClusterVersion::V1,
            defaults: None,
            topics_by_name: BTreeMap::new(),
            topics_by_project: BTreeSet::new(),
            api_keys_by_client: BTreeMap::new(),
            api_keys_by_ring: BTreeSet::new(),
        }
    }
}

impl State {
    /// Applies a command; a refusal has changed nothing.
    pub(super) fn apply(&mut self, command: Command) -> Response {
        let needs = command.needs();
        let response = self.change(command);
        if response.is_ok() {
            // Whoever wrote it could not have while there were older nodes: for what was written before the version was kept.
            self.version = self.version.max(needs);
        }
        response
    }

    fn change(&mut self, command: Command) -> Response {
        match command {
            Command::PutNode(node) => self.put_node(node),
            Command::CreateOrganization { id, name, at } => {
                self.create_organization(Organization { id, name, created: at })
            }
            Command::CreateProject(project) => self.create_project(project),
            Command::CreateTopic(topic) => self.create_topic(topic).map(Outcome::Topic),
            Command::CreateTopics(topics) => {
                Ok(Outcome::Topics(topics.into_iter().map(|topic| self.create_topic(topic)).collect()))
            }
            Command::SetTopicState { topic, state, at } => self.set_topic_state(topic, state, at),
            Command::SetTopicPolicies { topic, policies, at } => {
                let old = self.topics.get(&topic).ok_or(Refusal::TopicUnknown)?;
                if old.state != TopicState::Ready {
                    return Err(Refusal::TopicState(old.state));
                }
                if old.policies == policies {
                    return Ok(Outcome::Topic(Arc::clone(old)));
                }
                let modified = old.modified.max(at);
                Ok(self.put_topic(Topic { policies, modified, ..(**old).clone() }))
            }
            Command::FinishDestroy { topic, at } => self.finish_destroy(topic, at),
            Command::SetTopicRing { topic, ring, at } => self.set_topic_ring(topic, ring, at),
            Command::CreateApiKey(key) => self.create_api_key(key),
            Command::RevokeApiKey { key, at } => {
                let old = self.api_keys.get(&key).ok_or(Refusal::ApiKeyUnknown)?;
                // The first revocation is the one that counts.
                let revoked = ApiKey { revoked_at: old.revoked_at.or(Some(at)), ..(**old).clone() };
                Ok(self.put_api_key(revoked))
            }
            Command::ShredApiKey { key, at } => self.shred_api_key(key, at),
            Command::AddSigningKey(key) => match self.signing_keys.get(&key.kid) {
                Some(old) if old.public_key == key.public_key => Ok(Outcome::Done),
                Some(_) => Err(Refusal::IdTaken),
                None => {
                    self.signing_keys.insert(key.kid, Arc::new(key));
                    Ok(Outcome::Done)
                }
            },
            Command::RetireSigningKey { kid, verifies_until } => self.retire_signing_key(kid, verifies_until),
            Command::SetQuota { project, change } => self.set_quota(project, &change),
            Command::SetAuthority(authority) => match &self.authority {
                Some(old) if old.certificate != authority.certificate => Err(Refusal::AuthorityExists),
                Some(_) => Ok(Outcome::Done),
                None => {
                    self.authority = Some(Arc::new(authority));
                    Ok(Outcome::Done)
                }
            },
            Command::CreateJoinToken(token) => self.create_join_token(token),
            Command::RevokeJoinToken { token, at } => {
                let old = self.join_tokens.get(&token).ok_or(Refusal::TokenUnknown)?;
                let revoked = JoinToken { revoked_at: old.revoked_at.or(Some(at)), ..(**old).clone() };
                self.join_tokens.insert(token, Arc::new(revoked));
                Ok(Outcome::Done)
            }
            Command::Join(join) => self.join(join),
            Command::RevokeNode { node, at } => {
                self.end_node(node, at);
                Ok(Outcome::Done)
            }
            Command::SetClusterVersion(version) => {
                self.version = self.version.max(version);
                Ok(Outcome::Done)
            }
            Command::SetPlacementDefaults { founders, replication } => {
                self.set_placement_defaults(founders, replication)
            }
            Command::SetNodeState { node, state, at } => self.set_node_state(node, state, at),
            Command::AlterTopic { topic, placement, at } => self.alter_topic(topic, placement, at),
            Command::StartMove { topic, assignment, target, reason, at } => {
                self.start_move(topic, assignment, target, reason, at)
            }
            Command::CancelMove { topic, assignment, at } => self.cancel_move(topic, assignment, at),
            Command::FinishMove { topic, assignment, replicas } => self.finish_move(topic, assignment, replicas),
            Command::ReportMove { topic, assignment, report } => self.report_move(topic, assignment, report),
        }
    }

    fn put_node(&mut self, mut new: NodeRecord) -> Response {
        if self.revoked_nodes.contains_key(&new.id) {
            return Err(Refusal::NodeRevoked);
        }
        if new.speaks() < self.version {
            return Err(Refusal::VersionTooOld);
        }
        if self.is_name_taken(&new.name, new.id) {
            return Err(Refusal::NameTaken);
        }
        if let Some(old) = self.nodes.get(&new.id) {
            // The one that registered first is the node; its twin has a copy of the directory, or the same number by mistake.
            let twin = new.incarnation == old.incarnation && new.process != old.process;
            if new.incarnation < old.incarnation || twin {
                return Err(Refusal::LifeOver);
            }
            new.key = old.key.clone();
            new.state = old.state;
        }
        self.next_node = self.next_node.max(NodeId(new.id.0.saturating_add(1)));
        self.nodes.insert(new.id, Arc::new(new));
        Ok(Outcome::Done)
    }

    /// Whether a node other than `id`, and one that still is one, has the name.
    fn is_name_taken(&self, name: &str, id: NodeId) -> bool {
        let mut others = self.nodes.values().filter(|node| node.id != id && !self.revoked_nodes.contains_key(&node.id));
        !name.is_empty() && others.any(|other| other.name == name)
    }

    /// The node that others reach at this address, unless it was removed. Names of hosts have no case.
    pub(super) fn node_at(&self, address: &str) -> Option<&Arc<NodeRecord>> {
        let mut nodes = self.nodes.values().filter(|node| !self.revoked_nodes.contains_key(&node.id));
        nodes.find(|node| !address.is_empty() && node.peer.eq_ignore_ascii_case(address))
    }

    fn create_join_token(&mut self, new: JoinToken) -> Response {
        if let Some(old) = self.join_tokens.get(&new.id) {
            return if old.hash == new.hash { Ok(Outcome::Done) } else { Err(Refusal::IdTaken) };
        }
        // What lets nobody in any more is kept for a while, so that an operator can see what became of it.
        self.join_tokens.retain(|_, old| {
            let ended = old.revoked_at.unwrap_or(old.expires).min(old.expires);
            new.created.0.saturating_sub(ended.0) < JOIN_TOKEN_KEPT_NANOS
        });
        if self.join_tokens.len() >= JOIN_TOKENS_MAX {
            return Err(Refusal::TokensTooMany);
        }
        self.join_tokens.insert(new.id, Arc::new(new));
        Ok(Outcome::Done)
    }

    fn join(&mut self, join: Join) -> Response {
        let token = self.join_tokens.get(&join.token).ok_or(Refusal::TokenUnknown)?;
        if let Some(known) = self.nodes.values().find(|node| node.key == join.key[..]) {
            let revoked = self.revoked_nodes.contains_key(&known.id);
            return if revoked { Err(Refusal::NodeRevoked) } else { Ok(Outcome::Node(Arc::clone(known))) };
        }
        if token.revoked_at.is_some() {
            return Err(Refusal::TokenRevoked);
        }
        if join.at >= token.expires {
            return Err(Refusal::TokenExpired);
        }
        if token.used >= token.uses {
            return Err(Refusal::TokenUsedUp);
        }
        if join.version < self.version {
            return Err(Refusal::VersionTooOld);
        }
        let id = self.next_node.max(NodeId(join.above.0.saturating_add(1)));
        let name = if join.name.is_empty() { format!("node-{id}") } else { join.name };
        if self.is_name_taken(&name, id) {
            return Err(Refusal::NameTaken);
        }
        if self.node_at(&join.peer).is_some() {
            return Err(Refusal::AddressTaken);
        }
        let (peer, region, zone) = (join.peer, join.region, join.zone);
        let key = Bytes::copy_from_slice(&join.key);
        let node =
            Arc::new(NodeRecord { id, peer, name, region, zone, key, version: join.version, ..NodeRecord::default() });
        let token = JoinToken { used: token.used + 1, ..(**token).clone() };
        self.join_tokens.insert(token.id, Arc::new(token));
        self.next_node = NodeId(id.0.saturating_add(1));
        self.nodes.insert(id, Arc::clone(&node));
        Ok(Outcome::Node(node))
    }

    fn create_organization(&mut self, new: Organization) -> Response {
        if let Some(old) = self.organizations.get(&new.id) {
            return if old.name == new.name {
                Ok(Outcome::Organization(Arc::clone(old)))
            } else {
                Err(Refusal::IdTaken)
            };
        }
        if self.organizations.values().any(|other| other.name == new.name) {
            return Err(Refusal::NameTaken);
        }
        let new = Arc::new(new);
        self.organizations.insert(new.id, Arc::clone(&new));
        Ok(Outcome::Organization(new))
    }

    fn create_project(&mut self, new: Project) -> Response {
        if let Some(old) = self.projects.get(&new.id) {
            let same = (old.org, &old.name, old.ring) == (new.org, &new.name, new.ring);
            return if same { Ok(Outcome::Project(Arc::clone(old))) } else { Err(Refusal::IdTaken) };
        }
        if !self.organizations.contains_key(&new.org) {
            return Err(Refusal::OrganizationUnknown);
        }
        if self.projects.values().any(|other| other.org == new.org && other.name == new.name) {
            return Err(Refusal::NameTaken);
        }
        let new = Arc::new(new);
        self.projects.insert(new.id, Arc::clone(&new));
        Ok(Outcome::Project(new))
    }

    fn create_topic(&mut self, new: NewTopic) -> Result<Arc<Topic>, Refusal> {
        if let Some(old) = self.topics.get(&new.id) {
            let had_ring = old.ring == new.ring || old.former_rings.contains(&new.ring);
            let same = had_ring && (old.project, &old.name) == (new.project, &new.name);
            return if same { Ok(Arc::clone(old)) } else { Err(Refusal::IdTaken) };
        }
        if self.tombstones.contains_key(&new.id) {
            return Err(Refusal::IdTaken);
        }
        let project = self.projects.get(&new.project).ok_or(Refusal::ProjectUnknown)?;
        if self.topics_by_name.contains_key(&(new.project, new.name.hash())) {
            return Err(Refusal::NameTaken);
        }
        if self.is_ring_shredded(new.ring) {
            return Err(Refusal::RingShredded);
        }
        // Here, where creations have one order: two at once cannot both have the last place.
        if let Some(limit) = self.quota(new.project).topics.at()
            && self.topics_after(new.project, None).count() as u64 >= limit
        {
            return Err(Refusal::TopicQuota);
        }
        // Without defaults it is a command from before placement was kept, or a test of something else.
        let (mut replicas, mut placement) = (new.replicas, new.placement);
        if let Some(defaults) = &self.defaults {
            if replicas.is_empty() {
                replicas.clone_from(&defaults.founders);
            }
            if placement.replication == 0 {
                placement.replication = replicas.len() as u32;
            }
            if placement.replication as usize != replicas.len() {
                return Err(Refusal::Replication);
            }
            self.check_placement(&placement)?;
            self.check_nodes(&replicas, &placement)?;
        }
        let topic = Topic {
            id: new.id,
            project: new.project,
            org: project.org,
            name: new.name,
            group: self.next_group,
            partition: Partition(0),
            replicas,
            placement,
            assignment: 0,
            reassignment: None,
            ring: new.ring,
            former_rings: BTreeSet::new(),
            state: TopicState::Ready,
            policies: new.policies,
            created: new.at,
            modified: new.at,
        };
        self.next_group = GroupId(self.next_group.0 + 1);
        Ok(self.insert_topic(topic))
    }

    fn set_topic_state(&mut self, topic: TopicId, state: TopicState, at: UnixNanos) -> Response {
        let old = self.topics.get(&topic).ok_or(Refusal::TopicUnknown)?;
        if old.state == state {
            return Ok(Outcome::Topic(Arc::clone(old)));
        }
        if state < old.state {
            return Err(Refusal::TopicState(old.state));
        }
        let modified = old.modified.max(at);
        // Nothing is left to move of a topic that goes.
        let reassignment = old.reassignment.clone().filter(|_| state != TopicState::Deleting);
        Ok(self.put_topic(Topic { reassignment, state, modified, ..(**old).clone() }))
    }

    fn finish_destroy(&mut self, topic: TopicId, at: UnixNanos) -> Response {
        let Some(old) = self.topics.get(&topic) else {
            // Finished before, or never made: gone either way.
            return Ok(Outcome::Done);
        };
        if old.state != TopicState::Deleting {
            return Err(Refusal::TopicState(old.state));
        }
        self.topics_by_name.remove(&(old.project, old.name.hash()));
        self.topics_by_project.remove(&(old.project, topic));
        self.topics.remove(&topic);
        self.touched.push(topic);
        self.tombstones.insert(topic, at);
        self.tombstones.retain(|_, since| at.0.saturating_sub(since.0) < TOMBSTONE_NANOS);
        while self.tombstones.len() > TOMBSTONES_MAX {
            // Ids sort by age.
            self.tombstones.pop_first();
        }
        Ok(Outcome::Done)
    }

    fn create_api_key(&mut self, new: ApiKey) -> Response {
        if let Some(old) = self.api_keys.get(&new.id) {
            // A retry after a revocation answers the revoked key, never a fresh one.
            let living = |key: &ApiKey| ApiKey { revoked_at: None, shredded: false, ..key.clone() };
            let same = living(old) == living(&new);
            return if same { Ok(Outcome::ApiKey(Arc::clone(old))) } else { Err(Refusal::IdTaken) };
        }
        if self.api_keys_by_client.contains_key(&new.client_id) {
            return Err(Refusal::NameTaken);
        }
        if !self.organizations.contains_key(&new.org) {
            return Err(Refusal::OrganizationUnknown);
        }
        if let Some(project) = new.project
            && self.projects.get(&project).is_none_or(|project| project.org != new.org)
        {
            return Err(Refusal::ProjectUnknown);
        }
        if new.ring.is_some_and(|ring| self.is_ring_shredded(ring)) {
            return Err(Refusal::RingShredded);
        }
        Ok(self.put_api_key(new))
    }

    fn retire_signing_key(&mut self, kid: [u8; 16], until: UnixNanos) -> Response {
        let old = self.signing_keys.get(&kid).ok_or(Refusal::SigningKeyUnknown)?;
        // Only ever sooner: a late retry must not give a retired key more time.
        let until = old.verifies_until.map_or(until, |before| before.min(until));
        let retired = SigningKey { verifies_until: Some(until), ..(**old).clone() };
        self.signing_keys.insert(kid, Arc::new(retired));
        Ok(Outcome::Done)
    }

    fn set_quota(&mut self, project: Option<ProjectId>, change: &QuotaChange) -> Response {
        let Some(project) = project else {
            self.default_quota = self.default_quota.changed(change);
            return Ok(Outcome::Done);
        };
        if !self.projects.contains_key(&project) {
            return Err(Refusal::ProjectUnknown);
        }
        let changed = self.quotas.get(&project).copied().unwrap_or_default().changed(change);
        if changed.is_empty() {
            self.quotas.remove(&project);
        } else {
            self.quotas.insert(project, changed);
        }
        Ok(Outcome::Done)
    }

    /// The limits that hold for a project.
    pub(super) fn quota(&self, project: ProjectId) -> PerResource<Limit> {
        self.quotas.get(&project).unwrap_or(&Quota::default()).or(&self.default_quota)
    }

    pub(super) fn put_topic(&mut self, topic: Topic) -> Outcome {
        Outcome::Topic(self.insert_topic(topic))
    }

    fn insert_topic(&mut self, topic: Topic) -> Arc<Topic> {
        let topic = Arc::new(topic);
        self.touched.push(topic.id);
        self.topics_by_name.insert((topic.project, topic.name.hash()), topic.id);
        self.topics_by_project.insert((topic.project, topic.id));
        self.topics.insert(topic.id, Arc::clone(&topic));
        topic
    }

    pub(super) fn put_api_key(&mut self, key: ApiKey) -> Outcome {
        let key = Arc::new(key);
        self.api_keys_by_ring.extend(key.ring.map(|ring| (ring, key.id)));
        self.api_keys_by_client.insert(key.client_id.clone(), key.id);
        self.api_keys.insert(key.id, Arc::clone(&key));
        Outcome::ApiKey(key)
    }

    /// The state of these records.
    pub(super) fn with_indexes(mut self) -> Self {
        // As it is since both are kept.
        for (node, at) in self.revoked_nodes.clone() {
            self.end_node(node, at);
        }
        self.topics_by_name = self.topics.values().map(|t| ((t.project, t.name.hash()), t.id)).collect();
        self.topics_by_project = self.topics.values().map(|t| (t.project, t.id)).collect();
        self.api_keys_by_client = self.api_keys.values().map(|k| (k.client_id.clone(), k.id)).collect();
        self.api_keys_by_ring = self.api_keys.values().filter_map(|k| Some((k.ring?, k.id))).collect();
        self
    }

    /// Which topics were changed or forgotten since the last call.
    pub(super) fn take_touched(&mut self) -> Vec<TopicId> {
        std::mem::take(&mut self.touched)
    }

    /// The topic that has a name of this hash.
    pub(super) fn topic_by_hash(&self, project: ProjectId, hash: TopicNameHash) -> Option<&Arc<Topic>> {
        self.topics.get(self.topics_by_name.get(&(project, hash))?)
    }

    /// The API key that logs in with this client id.
    pub(super) fn api_key_by_client(&self, client_id: &str) -> Option<&Arc<ApiKey>> {
        self.api_keys.get(self.api_keys_by_client.get(client_id)?)
    }

    /// A project's topics in the order of their ids, from past `after` on.
    pub(super) fn topics_after(&self, project: ProjectId, after: Option<TopicId>) -> impl Iterator<Item = &Arc<Topic>> {
        let from = match after {
            Some(after) => Bound::Excluded((project, after)),
            None => Bound::Included((project, TopicId::from_bytes([0; 16]))),
        };
        let to = Bound::Included((project, TopicId::from_bytes([0xff; 16])));
        self.topics_by_project.range((from, to)).filter_map(|(_, id)| self.topics.get(id))
    }

    /// A project's topics in the order of their names' hashes, from past `after` on.
    pub(super) fn names_after(
        &self,
        project: ProjectId,
        after: Option<TopicNameHash>,
    ) -> impl Iterator<Item = (&TopicNameHash, &Arc<Topic>)> {
        let from = match after {
            Some(after) => Bound::Excluded((project, after)),
            None => Bound::Included((project, TopicNameHash::from_bytes([0; 16]))),
        };
        let to = Bound::Included((project, TopicNameHash::from_bytes([0xff; 16])));
        self.topics_by_name.range((from, to)).filter_map(|((_, hash), id)| Some((hash, self.topics.get(id)?)))
    }
}
