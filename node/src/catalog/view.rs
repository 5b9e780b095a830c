//! Reads of the catalog as this node has applied it: no waiting, no network.

use std::collections::BTreeSet;
use std::sync::Arc;

use ensign_proto::{
    ApiKeyId, ClusterVersion, LogIndex, NodeId, OrgId, ProjectId, RingId, TopicId, TopicName, TopicNameHash,
};
use ensign_raft::env::UnixNanos;
use tokio::sync::watch;

use super::machine::Shared;
use super::moves::{NodeState, PlacementDefaults};
use super::paging::{Page, PageError, PageRequest, Paged};
use super::quota::{Limit, PerResource, Quota};
use super::records::{ApiKey, ClusterAuthority, JoinToken, NodeRecord, Organization, Project, SigningKey, Topic};
use super::rings::Bound;

/// How much of the topics' changes a follower has seen. The default has seen nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TopicsSeen(pub(super) Option<u64>);

/// The catalog as this node knows it. Clones are cheap; every answer is a shared, unchanging record.
///
/// It may trail the cluster by a moment; [`super::Catalog::refresh`] catches up first.
#[derive(Debug, Clone)]
pub struct View {
    shared: Arc<Shared>,
}

impl View {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Changes with every entry that is applied. What woke the receiver is visible to it.
    pub fn changes(&self) -> watch::Receiver<LogIndex> {
        self.shared.changes()
    }

    /// Where this node's replica met an entry that only a newer version can read; from there on the view stands still, and what
    /// must not be stale (tokens, for one) is refused. The node has to be upgraded.
    pub fn stuck(&self) -> Option<LogIndex> {
        self.shared.stuck()
    }

    /// The topic of this id, whatever its state.
    pub fn topic(&self, id: TopicId) -> Option<Arc<Topic>> {
        self.shared.read().topics.get(&id).cloned()
    }

    /// The project's topic of this name, whatever its state.
    pub fn topic_by_name(&self, project: ProjectId, name: &TopicName) -> Option<Arc<Topic>> {
        self.topic_by_hash(project, name.hash())
    }

    /// The project's topic whose name has this hash.
    pub fn topic_by_hash(&self, project: ProjectId, hash: TopicNameHash) -> Option<Arc<Topic>> {
        self.shared.read().topic_by_hash(project, hash).cloned()
    }

    /// The project's topics, oldest id first, whatever their state. For what clients list, see [`View::topics_page`].
    pub fn topics(&self, project: ProjectId) -> Vec<Arc<Topic>> {
        self.shared.read().topics_after(project, None).cloned().collect()
    }

    /// Every topic of the cluster: what this node's replicas follow.
    pub fn all_topics(&self) -> Vec<Arc<Topic>> {
        self.shared.read().topics.values().cloned().collect()
    }

    /// The topics that were made, changed or forgotten since `seen`, in that order and perhaps more than once, and what has been
    /// seen after that. `None`: look at all topics. Costs what has changed, not what there is.
    pub fn changed_topics(&self, seen: TopicsSeen) -> (TopicsSeen, Option<Vec<TopicId>>) {
        self.shared.changed_topics(seen)
    }

    /// A page of the project's topics, oldest id first.
    ///
    /// # Errors
    /// [`PageError`]: the token is expired, garbled, or of another project or call.
    pub fn topics_page(
        &self,
        project: ProjectId,
        request: &PageRequest<'_>,
        now: UnixNanos,
    ) -> Result<Page<Arc<Topic>>, PageError> {
        let cut = request.open(Paged::Topics, project, now)?;
        let state = self.shared.read();
        let topics = state.topics_after(project, cut.after.map(TopicId::from_bytes)).map(|t| (*t.id.as_bytes(), t));
        Ok(cut.fill(topics.map(|(key, topic)| (key, Arc::clone(topic)))))
    }

    /// A page of the project's topics in the order of their names' hashes, each with the hash.
    ///
    /// # Errors
    /// As [`View::topics_page`].
    pub fn names_page(
        &self,
        project: ProjectId,
        request: &PageRequest<'_>,
        now: UnixNanos,
    ) -> Result<Page<(TopicNameHash, Arc<Topic>)>, PageError> {
        let cut = request.open(Paged::TopicNames, project, now)?;
        let state = self.shared.read();
        let names = state.names_after(project, cut.after.map(TopicNameHash::from_bytes));
        Ok(cut.fill(names.map(|(hash, topic)| (*hash.as_bytes(), (*hash, Arc::clone(topic))))))
    }

    /// The project of this id.
    pub fn project(&self, id: ProjectId) -> Option<Arc<Project>> {
        self.shared.read().projects.get(&id).cloned()
    }

    /// Every project, oldest id first; with `org`, only its own.
    pub fn projects(&self, org: Option<OrgId>) -> Vec<Arc<Project>> {
        let state = self.shared.read();
        state.projects.values().filter(|project| org.is_none_or(|org| project.org == org)).cloned().collect()
    }

    /// The organization of this id.
    pub fn organization(&self, id: OrgId) -> Option<Arc<Organization>> {
        self.shared.read().organizations.get(&id).cloned()
    }

    /// Every organization, oldest id first.
    pub fn organizations(&self) -> Vec<Arc<Organization>> {
        self.shared.read().organizations.values().cloned().collect()
    }

    /// The API key of this id, revoked or not.
    pub fn api_key(&self, id: ApiKeyId) -> Option<Arc<ApiKey>> {
        self.shared.read().api_keys.get(&id).cloned()
    }

    /// The API key that logs in with this client id, revoked or not.
    pub fn api_key_by_client(&self, client_id: &str) -> Option<Arc<ApiKey>> {
        self.shared.read().api_key_by_client(client_id).cloned()
    }

    /// Every API key, revoked ones too, oldest id first; with `project`, only its own.
    pub fn api_keys(&self, project: Option<ProjectId>) -> Vec<Arc<ApiKey>> {
        let state = self.shared.read();
        state.api_keys.values().filter(|key| project.is_none() || key.project == project).cloned().collect()
    }

    /// Everything that a key ring is bound to. Costs a look at every topic.
    pub fn bound_to(&self, ring: RingId) -> Bound {
        self.shared.read().bound_to(ring)
    }

    /// The rings of `among` that an API key was revoked together with.
    pub(super) fn shredded_rings(&self, among: &BTreeSet<RingId>) -> Vec<RingId> {
        self.shared.read().shredded_rings().filter(|ring| among.contains(ring)).collect()
    }

    /// Whether an API key of the project, revoked or not, has this ring of its own.
    pub fn has_api_key_ring(&self, project: ProjectId, ring: RingId) -> bool {
        self.shared.read().has_api_key_ring(project, ring)
    }

    /// Whether the key is revoked. A key that this node does not know is not: it may be too young to be known here.
    pub fn is_revoked(&self, id: ApiKeyId) -> bool {
        self.shared.read().api_keys.get(&id).is_some_and(|key| key.revoked_at.is_some())
    }

    /// Every token-signing key, oldest id first, retired ones too.
    pub fn signing_keys(&self) -> Vec<Arc<SigningKey>> {
        self.shared.read().signing_keys.values().cloned().collect()
    }

    /// The token-signing key of this id.
    pub fn signing_key(&self, kid: &[u8; 16]) -> Option<Arc<SigningKey>> {
        self.shared.read().signing_keys.get(kid).cloned()
    }

    /// The cluster's nodes.
    pub fn nodes(&self) -> Vec<Arc<NodeRecord>> {
        self.shared.read().nodes.values().cloned().collect()
    }

    /// Every node that was ever started and is not removed.
    pub fn started(&self) -> Vec<NodeId> {
        let nodes = self.shared.read();
        let started = nodes.nodes.values().filter(|node| node.has_started() && node.state != NodeState::Removed);
        started.map(|node| node.id).collect()
    }

    /// The node of this id.
    pub fn node(&self, id: NodeId) -> Option<Arc<NodeRecord>> {
        self.shared.read().nodes.get(&id).cloned()
    }

    /// The node that others reach at this address; none of one that was removed.
    pub fn node_at(&self, address: &str) -> Option<Arc<NodeRecord>> {
        self.shared.read().node_at(address).cloned()
    }

    /// Whether the node was removed, for ever.
    pub fn is_node_revoked(&self, id: NodeId) -> bool {
        self.shared.read().revoked_nodes.contains_key(&id)
    }

    /// Every node that was removed, for ever.
    pub fn revoked_nodes(&self) -> Vec<NodeId> {
        self.shared.read().revoked_nodes.keys().copied().collect()
    }

    /// The version that every node of the cluster speaks, and that may be written: it only ever rises. What needs more is gated by
    /// [`super::Command::needs`].
    pub fn cluster_version(&self) -> ClusterVersion {
        self.shared.read().version
    }

    /// A version that the cluster has and this build does not speak: it must stop, and be upgraded.
    pub fn outdated_by(&self) -> Option<ClusterVersion> {
        self.shared.outdated_by()
    }

    /// The certificate authority whose key is in the vault; none where an operator's own signs by hand.
    pub fn authority(&self) -> Option<Arc<ClusterAuthority>> {
        self.shared.read().authority.clone()
    }

    /// The join token of this id.
    pub fn join_token(&self, id: &[u8; 16]) -> Option<Arc<JoinToken>> {
        self.shared.read().join_tokens.get(id).cloned()
    }

    /// Every join token, oldest first, also those that let nobody in any more.
    pub fn join_tokens(&self) -> Vec<Arc<JoinToken>> {
        self.shared.read().join_tokens.values().cloned().collect()
    }

    /// The limits that hold for a project: its own, else the cluster's default, else what is built in.
    pub fn quota(&self, project: ProjectId) -> PerResource<Limit> {
        self.shared.read().quota(project)
    }

    /// The limits that were set for a project itself.
    pub fn own_quota(&self, project: ProjectId) -> Quota {
        self.shared.read().quotas.get(&project).copied().unwrap_or_default()
    }

    /// The limits that were set for every project that has none of its own.
    pub fn default_quota(&self) -> Quota {
        self.shared.read().default_quota
    }

    /// How many topics a project has, those that are being destroyed included.
    pub fn topic_count_of(&self, project: ProjectId) -> u64 {
        self.shared.read().topics_after(project, None).count() as u64
    }

    /// What is done where a topic asks for nothing; none in a cluster from before placement was kept, for a moment.
    pub fn placement_defaults(&self) -> Option<PlacementDefaults> {
        self.shared.read().defaults.clone()
    }

    /// Topics whose replicas are being moved.
    pub fn moving(&self) -> Vec<Arc<Topic>> {
        self.shared.read().topics.values().filter(|topic| topic.reassignment.is_some()).cloned().collect()
    }

    /// How many topics have a replica on the node, or shall have one there.
    pub fn holds(&self, node: NodeId) -> usize {
        self.shared.read().holds(node)
    }

    /// How many topics the cluster has.
    pub fn topic_count(&self) -> usize {
        self.shared.read().topics.len()
    }
}
