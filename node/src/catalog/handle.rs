//! Changing the catalog, from any node.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ApiKeyId, ClusterVersion, GroupId, LogIndex, NodeId, OrgId, ProjectId, RingId, TopicId};
use ensign_raft::env::{Clock, Rng, Stop};
use ensign_raft::{ProposeError, ReadError};
use ensign_storage::EntryId;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::warn;

use super::command::{Command, Join, Outcome, Refusal, Response};
use super::errors::{
    ApiKeyError, ChangeTopicError, CreateOrganizationError, CreateProjectError, JoinError, PutNodeError, RefreshError,
    SetQuotaError, VaultFailure, WriteFailure,
};
use super::freshness::Freshness;
use super::link::{Custody, Liveness, ProposeLink, ProposeLinkError, Replica, VaultWrites};
use super::moves::NodeState;
use super::quota::QuotaChange;
use super::records::{
    ApiKey, ClusterAuthority, JoinToken, NodeRecord, Organization, Project, SigningKey, Topic, TopicPolicies,
    TopicState,
};
use super::view::View;
use super::wire;

/// How many topics a cluster takes: each is a Raft group on every node.
pub(super) const TOPICS_MAX: usize = 10_000;
/// How long a change may take, failover included, before its caller hears that it did not happen (or that nobody knows).
const DEADLINE: Duration = Duration::from_secs(15);
/// How often a majority is asked whether this node's view is complete, and how often streams hear what became of it.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
const LOOK_EVERY: Duration = Duration::from_millis(200);
const BACK_OFF_MIN: Duration = Duration::from_millis(20);
const BACK_OFF_MAX: Duration = Duration::from_millis(500);
/// Vault calls in flight while custody is put right.
pub(super) const VAULT_CALLS_MAX: usize = 16;
/// Applied entries between two snapshots, and how many stay in the log for followers that are a little behind.
const COMPACT_EVERY: u64 = 4096;
const COMPACT_KEEP: u64 = 1024;

/// What a [`Catalog`] is made of.
pub struct CatalogParts {
    /// This node.
    pub me: NodeId,
    /// The nodes that the settings name: the founders, until the catalog says who they were.
    pub founders: BTreeSet<NodeId>,
    /// Its replica of the catalog's group.
    pub replica: Arc<dyn Replica>,
    /// The view of the same replica's machine.
    pub view: View,
    /// The way to the leader.
    pub link: Arc<dyn ProposeLink>,
    /// The vault.
    pub vault: Arc<dyn VaultWrites>,
    /// How long this node vouches for its view after a majority confirmed it: at most the lease of keys.
    pub fresh_for: Duration,
    /// Which nodes answer.
    pub liveness: Arc<dyn Liveness>,
    /// For how long a node must be silent before its replicas are made anew elsewhere.
    pub lost_after: Duration,
    /// For times.
    pub clock: Arc<dyn Clock>,
    /// For ids.
    pub rng: Arc<dyn Rng>,
}

/// Finds out which nodes keep the cluster from a version, or what else does, and what to do about it.
pub type WhyNotYet = dyn Fn(ClusterVersion) -> BoxFuture<'static, Option<String>> + Send + Sync;

/// As long as nobody can be asked.
const NOT_YET: &str = "run the new version of ensign on every node; `ensign cluster version` shows which are behind, or what else holds the \
                       cluster back";

/// The catalog on this node: everything a [`View`] reads, and changes. Clones are cheap and share it.
///
/// Dropping a change midway may or may not have carried it out. When a change returns, a majority holds it, and this node's
/// view shows it (unless this node's replica is stuck, which does not undo it).
#[derive(Clone)]
pub struct Catalog {
    pub(super) parts: Arc<CatalogParts>,
    freshness: Arc<Freshness>,
    why_not_yet: Arc<OnceLock<Arc<WhyNotYet>>>,
}

impl fmt::Debug for Catalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Catalog").field("me", &self.parts.me).finish_non_exhaustive()
    }
}

impl Deref for Catalog {
    type Target = View;

    fn deref(&self) -> &View {
        &self.parts.view
    }
}

impl Catalog {
    /// The catalog of this node.
    pub fn new(parts: CatalogParts) -> Self {
        let freshness = Arc::new(Freshness::new(Arc::clone(&parts.clock), parts.fresh_for));
        Self { parts: Arc::new(parts), freshness, why_not_yet: Arc::default() }
    }

    /// From now on a change that the cluster's version does not allow is refused with what this answers. The first one stays.
    pub fn explain_not_yet(&self, why: Arc<WhyNotYet>) {
        let _ = self.why_not_yet.set(why);
    }

    /// The reading half.
    pub fn view(&self) -> &View {
        &self.parts.view
    }

    /// Who leads the catalog's group, as this node knows it.
    pub fn leadership(&self) -> ensign_raft::Leadership {
        *self.parts.replica.leadership().borrow()
    }

    /// Whether this node leads the catalog's group, and is ready to.
    pub fn leads(&self) -> bool {
        self.parts.replica.leadership().borrow().ready
    }

    /// Catches up: what the view shows afterwards holds everything that was acknowledged, anywhere, before this call.
    ///
    /// # Errors
    /// No leader was reached in time; the view is as it was.
    pub async fn refresh(&self) -> Result<(), RefreshError> {
        let deadline = Instant::now() + DEADLINE;
        let mut cause = String::from("no answer in time");
        let mut back_off = BACK_OFF_MIN;
        loop {
            let asked = self.freshness.now();
            match timeout_at(deadline, self.read_index()).await {
                Err(_) => return Err(RefreshError { cause }),
                Ok(Ok(index)) => {
                    self.wait_applied(index, deadline).await?;
                    self.freshness.confirmed(asked);
                    return Ok(());
                }
                Ok(Err(error)) => cause = error,
            }
            if Instant::now() + back_off >= deadline {
                return Err(RefreshError { cause });
            }
            sleep(back_off).await;
            back_off = BACK_OFF_MAX.min(back_off * 2);
        }
    }

    /// Whether what the view does *not* say may be relied on: a majority confirmed lately that it is complete. If not,
    /// [`Catalog::refresh`] first.
    pub fn is_fresh(&self) -> bool {
        self.freshness.is_fresh()
    }

    /// Becomes false when the view is not fresh any more: what open streams watch. Kept by [`Catalog::keep_fresh`].
    pub fn freshness(&self) -> watch::Receiver<bool> {
        self.freshness.watch()
    }

    #[cfg(test)]
    pub(crate) fn forget_confirmation(&self) {
        self.freshness.forget();
    }

    /// Has the view confirmed about once a second, until `stop`: one round trip to the leader. One task a node that serves
    /// clients.
    pub async fn keep_fresh(self, stop: Stop) {
        let limit = self.freshness.lasts() / 4;
        let confirming = async {
            loop {
                // What goes wrong is said once, by the look, if it goes on.
                let _ = timeout(limit, self.refresh()).await;
                sleep(CONFIRM_EVERY.min(limit)).await;
            }
        };
        let looking = async {
            loop {
                self.freshness.look();
                sleep(LOOK_EVERY).await;
            }
        };
        stop.run_until_cancelled(async { tokio::join!(confirming, looking) }).await;
    }

    async fn read_index(&self) -> Result<LogIndex, String> {
        match self.parts.replica.read_index().await {
            Ok(index) => Ok(index),
            Err(ReadError::NotLeader { .. }) => {
                self.parts.link.read_index(GroupId::CATALOG).await.map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    async fn wait_applied(&self, index: LogIndex, deadline: Instant) -> Result<(), RefreshError> {
        let mut applied = self.parts.replica.applied();
        match timeout_at(deadline, applied.wait_for(|applied| *applied >= index)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(RefreshError { cause: "the catalog is stopped on this node".to_owned() }),
            Err(_) => Err(RefreshError { cause: "this node's replica lags behind".to_owned() }),
        }
    }

    /// Serves another node's proposal: checks it, proposes it here, and encodes the answer for the way back.
    ///
    /// # Errors
    /// [`ProposeError::NotLeader`]: the other node asks the leader. A payload that is no command comes back as an answer.
    pub async fn serve_propose(&self, payload: Bytes) -> Result<(EntryId, Bytes), ProposeError> {
        // What cannot be read must not enter the log: every replica would have to skip it for ever.
        if let Err(error) = Command::decode(&payload) {
            warn!(%error, "a peer proposed what is no catalog command");
            let place = EntryId { term: ensign_proto::Term(0), index: LogIndex(0) };
            return Ok((place, wire::encode_response(&Err(Refusal::Unreadable))));
        }
        let (id, response) = self.parts.replica.propose(payload).await?;
        Ok((id, wire::encode_response(&response)))
    }

    /// Serves another node's question for the read index.
    ///
    /// # Errors
    /// [`ReadError::NotLeader`]: the other node asks the leader.
    pub async fn serve_read_index(&self) -> Result<LogIndex, ReadError> {
        self.parts.replica.read_index().await
    }

    /// Carries a command out. It may be proposed more than once: commands answer a repetition as they did the first time.
    ///
    /// What some nodes could not read is not proposed: see [`Command::needs`].
    pub(super) async fn write(&self, command: Command) -> Result<Result<Outcome, Refusal>, WriteFailure> {
        let active = self.cluster_version();
        let command = command.for_version(active);
        self.require(command.needs()).await?;
        let payload = command.encode();
        let deadline = Instant::now() + DEADLINE;
        let mut back_off = BACK_OFF_MIN;
        let mut proposed = false;
        let mut cause = String::from("no answer in time");
        loop {
            match timeout_at(deadline, self.propose(payload.clone())).await {
                Ok(Ok((id, response))) => {
                    // The change is durable whatever happens here; waiting lets the caller read what it wrote.
                    let _ = self.wait_applied(id.index, deadline).await;
                    return Ok(response);
                }
                Ok(Err(ProposeLinkError::Refused { cause })) => return Err(WriteFailure::Internal { cause }),
                Ok(Err(ProposeLinkError::Unreachable { cause: why })) => cause = why,
                Ok(Err(ProposeLinkError::OutcomeUnknown { cause: why })) => (proposed, cause) = (true, why),
                Err(_) => proposed = true,
            }
            if Instant::now() + back_off >= deadline {
                return Err(if proposed {
                    WriteFailure::OutcomeUnknown { cause }
                } else {
                    WriteFailure::Unavailable { cause }
                });
            }
            sleep(back_off).await;
            back_off = BACK_OFF_MAX.min(back_off * 2);
        }
    }

    /// Whether the cluster's version is at least that. A view that trails says no too often, never yes. Asks around for who is behind.
    ///
    /// # Errors
    /// [`WriteFailure::NotYet`].
    pub async fn require(&self, needs: ClusterVersion) -> Result<(), WriteFailure> {
        let active = self.cluster_version();
        if needs <= active {
            return Ok(());
        }
        let asked = match self.why_not_yet.get() {
            Some(ask) => ask(needs).await,
            None => None,
        };
        Err(WriteFailure::NotYet { needs, active, why: asked.unwrap_or_else(|| NOT_YET.to_owned()) })
    }

    /// Raises the cluster's version, for ever. The caller has asked every node whether it speaks it: one that does not stops, and
    /// with enough of them the cluster does. Again changes nothing.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn raise_version(&self, to: ClusterVersion) -> Result<(), WriteFailure> {
        if to <= self.cluster_version() {
            return Ok(());
        }
        plain(self.write(Command::SetClusterVersion(to)).await?)
    }

    async fn propose(&self, payload: Bytes) -> Result<(EntryId, Result<Outcome, Refusal>), ProposeLinkError> {
        match self.parts.replica.propose(payload.clone()).await {
            Ok(committed) => Ok(committed),
            Err(ProposeError::NotLeader { .. }) => {
                let (id, response) = self.parts.link.propose(GroupId::CATALOG, payload).await?;
                // The leader carried it out, and says so in a way we cannot read: a mixed-version bug.
                let response = wire::decode_response(&response)
                    .map_err(|error| ProposeLinkError::OutcomeUnknown { cause: error.to_string() })?;
                Ok((id, response))
            }
            Err(error @ ProposeError::OutcomeUnknown) => {
                Err(ProposeLinkError::OutcomeUnknown { cause: error.to_string() })
            }
            Err(error @ ProposeError::TooLarge { .. }) => Err(ProposeLinkError::Refused { cause: error.to_string() }),
            Err(error @ (ProposeError::DiskFull | ProposeError::Stopped | ProposeError::Fenced { .. })) => {
                Err(ProposeLinkError::Unreachable { cause: error.to_string() })
            }
        }
    }

    pub(super) fn now(&self) -> ensign_raft::env::UnixNanos {
        self.parts.clock.wall()
    }

    /// The parts of a fresh ULID.
    fn fresh(&self) -> (u64, [u8; 10]) {
        let mut random = [0; 10];
        self.parts.rng.fill(&mut random);
        (self.now().as_millis(), random)
    }

    pub(super) fn fresh_topic(&self) -> TopicId {
        let (ms, random) = self.fresh();
        TopicId::new(ms, random)
    }

    /// A fresh API key id, for [`Catalog::create_api_key`].
    pub fn fresh_api_key(&self) -> ApiKeyId {
        let (ms, random) = self.fresh();
        ApiKeyId::new(ms, random)
    }

    /// Adds a node or replaces what is known of it. A node that registers for the first time gets custody of every topic first.
    ///
    /// # Errors
    /// See [`PutNodeError`].
    pub async fn put_node(&self, node: NodeRecord) -> Result<(), PutNodeError> {
        // What it speaks, and not what is left of that in a record for an older cluster, whose version may rise at this moment.
        let (id, speaks) = (node.id, node.speaks());
        let node = node.for_version(self.cluster_version());
        match self.node(id) {
            Some(known) if known.state == NodeState::Removed => return Err(PutNodeError::Revoked { node: id }),
            Some(known) if *known == (NodeRecord { state: known.state, ..node.clone() }) => return Ok(()),
            // It has custody already.
            Some(known) if known.incarnation > 0 => return self.write_node(node, speaks).await,
            Some(_) | None => {}
        }
        self.put_custody_of_all(&[id]).await?;
        self.write_node(node, speaks).await?;
        // Topics that were made meanwhile did not know of the node; from here on, they do.
        Ok(self.put_custody_of_all(&[id]).await?)
    }

    /// Makes a node known from afar, before it has a replica of the catalog: the leader gives it one because it is listed.
    /// Returns once a majority holds the record; what this node's view shows does not change by it.
    ///
    /// # Errors
    /// See [`PutNodeError`].
    pub async fn announce_node(&self, node: NodeRecord) -> Result<(), PutNodeError> {
        let (id, name, shown, speaks) = (node.id, node.name.clone(), node.incarnation, node.speaks());
        // What this node's view says of the cluster's version means nothing yet: first as the oldest nodes know a record. A cluster that
        // is past them refuses that, and can read all of it.
        let mut response = self.announce(node.clone().for_version(ClusterVersion::V1)).await?;
        if response == Err(Refusal::VersionTooOld) {
            response = self.announce(node).await?;
        }
        match response {
            Err(Refusal::NameTaken) => Err(PutNodeError::NameTaken { name }),
            Err(Refusal::NodeRevoked) => Err(PutNodeError::Revoked { node: id }),
            Err(Refusal::VersionTooOld) => {
                Err(PutNodeError::VersionTooOld { node: id, speaks, active: ClusterVersion(speaks.0 + 1) })
            }
            // It has registered with a life of its own already, and needs no announcement.
            Err(Refusal::LifeOver) => Err(PutNodeError::LifeOver { node: id, seen: shown + 1, shown }),
            response => Ok(plain(response)?),
        }
    }

    async fn announce(&self, node: NodeRecord) -> Result<Response, PutNodeError> {
        let proposed = self.propose(Command::PutNode(node).encode()).await;
        let (_, response) = proposed.map_err(|error| WriteFailure::Unavailable { cause: error.to_string() })?;
        Ok(response)
    }

    /// Writes the record, which may be one for an older cluster, of a node that speaks that.
    pub(super) async fn write_node(&self, node: NodeRecord, speaks: ClusterVersion) -> Result<(), PutNodeError> {
        let (id, name, shown) = (node.id, node.name.clone(), node.incarnation);
        match self.write(Command::PutNode(node)).await? {
            Err(Refusal::NameTaken) => Err(PutNodeError::NameTaken { name }),
            Err(Refusal::NodeRevoked) => Err(PutNodeError::Revoked { node: id }),
            Err(Refusal::VersionTooOld) => match self.cluster_version() {
                active if active <= speaks => Err(PutNodeError::VersionRaised),
                active => Err(PutNodeError::VersionTooOld { node: id, speaks, active }),
            },
            Err(Refusal::LifeOver) => {
                let seen = self.node(id).map_or(shown, |known| known.incarnation);
                Err(PutNodeError::LifeOver { node: id, seen, shown })
            }
            response => Ok(plain(response)?),
        }
    }

    /// Gives the cluster its certificate authority; the vault already has the key. Again changes nothing.
    ///
    /// # Errors
    /// [`JoinError`]: it has another one.
    pub async fn set_authority(&self, certificate: &str) -> Result<(), JoinError> {
        let authority = ClusterAuthority { certificate: certificate.to_owned(), created: self.now() };
        self.join_write(Command::SetAuthority(authority)).await.map(drop)
    }

    /// Adds a join token.
    ///
    /// # Errors
    /// [`JoinError`]: there are too many.
    pub async fn create_join_token(&self, token: JoinToken) -> Result<(), JoinError> {
        self.join_write(Command::CreateJoinToken(token)).await.map(drop)
    }

    /// Revokes a join token, for ever. Again changes nothing.
    ///
    /// # Errors
    /// [`JoinError`]: there is none.
    pub async fn revoke_join_token(&self, token: [u8; 16]) -> Result<(), JoinError> {
        self.join_write(Command::RevokeJoinToken { token, at: self.now() }).await.map(drop)
    }

    /// Lets a machine in whose token was checked. Asking again with the same key answers the same node.
    ///
    /// # Errors
    /// [`JoinError`]: the token is over, or the name is taken.
    pub async fn join(&self, join: Join) -> Result<Arc<NodeRecord>, JoinError> {
        match self.join_write(Command::Join(join)).await? {
            Outcome::Node(node) => Ok(node),
            other => Err(unexpected(&Ok(other)).into()),
        }
    }

    /// Ends a node's being one, for ever: every node refuses it as soon as it has applied this. Again changes nothing. It says
    /// nothing about what the node holds: move that away first.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn revoke_node(&self, node: NodeId) -> Result<(), WriteFailure> {
        plain(self.write(Command::RevokeNode { node, at: self.now() }).await?)
    }

    async fn join_write(&self, command: Command) -> Result<Outcome, JoinError> {
        self.write(command).await?.map_err(JoinError::Refused)
    }

    /// Makes an organization.
    ///
    /// # Errors
    /// See [`CreateOrganizationError`].
    pub async fn create_organization(&self, name: &str) -> Result<Arc<Organization>, CreateOrganizationError> {
        let (ms, random) = self.fresh();
        let id = OrgId::new(ms, random);
        match self.write(Command::CreateOrganization { id, name: name.to_owned(), at: self.now() }).await? {
            Ok(Outcome::Organization(org)) => Ok(org),
            Err(Refusal::NameTaken) => Err(CreateOrganizationError::NameTaken),
            other => Err(unexpected(&other).into()),
        }
    }

    /// Makes a project: its key ring in the vault first, then the project.
    ///
    /// # Errors
    /// See [`CreateProjectError`]. A ring whose project was not made stays in the vault, unused.
    pub async fn create_project(&self, org: OrgId, name: &str) -> Result<Arc<Project>, CreateProjectError> {
        // The catalog decides; looking first only saves rings that nobody would use.
        if self.organization(org).is_some() && self.projects(Some(org)).iter().any(|other| other.name == name) {
            return Err(CreateProjectError::NameTaken);
        }
        let (ms, random) = self.fresh();
        let id = ProjectId::new(ms, random);
        let (ms, random) = self.fresh();
        let ring = RingId::new(ms, random);
        self.parts.vault.create_ring(id, ring).await?;
        let project = Project { id, org, name: name.to_owned(), ring, created: self.now() };
        match self.write(Command::CreateProject(project)).await? {
            Ok(Outcome::Project(project)) => Ok(project),
            Err(Refusal::NameTaken) => Err(CreateProjectError::NameTaken),
            Err(Refusal::OrganizationUnknown) => Err(CreateProjectError::OrganizationUnknown),
            other => Err(unexpected(&other).into()),
        }
    }

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

    /// Changes a project's limits, or with none named those of every project that has none of its own. Doing it again changes
    /// nothing.
    ///
    /// # Errors
    /// See [`SetQuotaError`].
    pub async fn set_quota(&self, project: Option<ProjectId>, change: QuotaChange) -> Result<(), SetQuotaError> {
        match self.write(Command::SetQuota { project, change }).await? {
            Ok(_) => Ok(()),
            Err(Refusal::ProjectUnknown) => Err(SetQuotaError::ProjectUnknown),
            other => Err(unexpected(&other).into()),
        }
    }

    /// Adds an API key whose hash the vault already has. The caller chose every field; asking again answers the same key.
    ///
    /// # Errors
    /// See [`ApiKeyError`].
    pub async fn create_api_key(&self, key: ApiKey) -> Result<Arc<ApiKey>, ApiKeyError> {
        changed_api_key(self.write(Command::CreateApiKey(key)).await?)
    }

    /// Revokes an API key, for ever: every node refuses its tokens as soon as it has applied this. Again changes nothing.
    ///
    /// # Errors
    /// See [`ApiKeyError`].
    pub async fn revoke_api_key(&self, key: ApiKeyId) -> Result<Arc<ApiKey>, ApiKeyError> {
        changed_api_key(self.write(Command::RevokeApiKey { key, at: self.now() }).await?)
    }

    /// Publishes a token-signing key whose private half the vault already has. Again changes nothing.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn add_signing_key(&self, key: SigningKey) -> Result<(), WriteFailure> {
        plain(self.write(Command::AddSigningKey(key)).await?)
    }

    /// Lets a token-signing key verify tokens until `verifies_until` and no longer. A later time than before changes nothing.
    ///
    /// # Errors
    /// See [`WriteFailure`].
    pub async fn retire_signing_key(
        &self,
        kid: [u8; 16],
        verifies_until: ensign_raft::env::UnixNanos,
    ) -> Result<(), WriteFailure> {
        plain(self.write(Command::RetireSigningKey { kid, verifies_until }).await?)
    }

    /// The nodes that hold a replica of a topic.
    pub fn replicas_of(&self, topic: &Topic) -> BTreeSet<NodeId> {
        if topic.replicas.is_empty() { self.defaults().founders } else { topic.replicas.clone() }
    }

    /// Who shall have the keys of a topic: every node, and this one even if the catalog does not list it yet.
    pub(super) fn custodians(&self) -> Vec<NodeId> {
        let stays = |node: &&Arc<NodeRecord>| node.state != NodeState::Removed;
        let mut nodes: Vec<NodeId> = self.nodes().iter().filter(stays).map(|node| node.id).collect();
        if !nodes.contains(&self.parts.me) {
            nodes.push(self.parts.me);
        }
        nodes
    }

    /// Everyone's custody of a topic.
    pub(super) fn custody_of(&self, project: ProjectId, topic: TopicId) -> Vec<Custody> {
        self.custodians().into_iter().map(|node| Custody { node, project, topic }).collect()
    }

    async fn put_custody_of_all(&self, nodes: &[NodeId]) -> Result<(), VaultFailure> {
        let topics = self.all_topics();
        let wanted = topics.iter().filter(|topic| topic.state != TopicState::Deleting);
        let custody: Vec<_> = wanted
            .flat_map(|topic| {
                nodes.iter().map(move |node| Custody { node: *node, project: topic.project, topic: topic.id })
            })
            .collect();
        if custody.is_empty() { Ok(()) } else { self.parts.vault.put_custodies(custody).await }
    }

    /// Keeps the group's log short: a snapshot for every 4,096 applied entries, until `stop`. One task a node.
    pub async fn keep_compact(self, stop: Stop) {
        let mut applied = self.parts.replica.applied();
        let mut covered = 0;
        while let Some(Ok(index)) = stop
            .run_until_cancelled(async { applied.wait_for(|i| i.0 >= covered + COMPACT_EVERY).await.map(|i| *i) })
            .await
        {
            if self.stuck().is_some() {
                // A snapshot would pass for what this replica could not apply, and drop the entries that say it.
                return;
            }
            match self.parts.replica.compact(COMPACT_KEEP).await {
                Ok(through) => covered = through.0.max(index.0),
                Err(error) => {
                    warn!(%error, "the catalog's log could not be compacted");
                    // Wait for as many entries again, so that a lasting failure does not spin.
                    covered = index.0;
                }
            }
        }
    }
}

pub(super) fn unexpected(response: &Result<Outcome, Refusal>) -> WriteFailure {
    match response {
        Err(refusal) => WriteFailure::Internal { cause: refusal.to_string() },
        Ok(_) => WriteFailure::Internal { cause: "an answer of another kind".to_owned() },
    }
}

fn plain(response: Result<Outcome, Refusal>) -> Result<(), WriteFailure> {
    match response {
        Ok(_) => Ok(()),
        Err(_) => Err(unexpected(&response)),
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

fn changed_api_key(response: Result<Outcome, Refusal>) -> Result<Arc<ApiKey>, ApiKeyError> {
    match response {
        Ok(Outcome::ApiKey(key)) => Ok(key),
        Err(Refusal::ApiKeyUnknown) => Err(ApiKeyError::Unknown),
        Err(Refusal::OrganizationUnknown) => Err(ApiKeyError::OrganizationUnknown),
        Err(Refusal::ProjectUnknown) => Err(ApiKeyError::ProjectUnknown),
        Err(Refusal::NameTaken | Refusal::IdTaken) => Err(ApiKeyError::Taken),
        other => Err(unexpected(&other).into()),
    }
}
