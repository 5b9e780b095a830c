//! Administration: organizations, projects, API keys, key rings, and how the cluster is.

use std::time::Duration;

use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::pb::admin::v1::admin_client::AdminClient;
use ensign_proto::{ApiKeyId, KeyVersion, NodeId, OrgId, ProjectId, RingId};
use tonic::transport::Channel;

use crate::client::Client;
use crate::connection::Repeat;
use crate::error::CallError;

/// How long a report may take: nodes that are silent are waited for 3 s, and an operator is waiting.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long [`Admin::revoke_key`] waits: longer than a cluster with the longest leases takes.
pub const REVOKE_TIMEOUT: Duration = Duration::from_mins(3);

/// The largest report of a cluster: some 200 bytes for each group.
const REPORT_MAX: usize = 64 << 20;

/// Administrative calls. Each needs a permission that the client's key must carry; see `admin.proto`.
#[derive(Clone, Debug)]
pub struct Admin {
    client: Client,
}

/// Which key ring is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ring {
    /// That of the key's project, or of the only project of its organization.
    Own,
    /// That of a project.
    Project(ProjectId),
    /// This one.
    Id(RingId),
    /// The one of this name, in the key's project or in the one that is named.
    Name(String, Option<ProjectId>),
}

impl Ring {
    /// `ring_id` and `project_id` as the wire has them.
    fn wire(self) -> (String, String) {
        match self {
            Self::Own => (String::new(), String::new()),
            Self::Project(project) => (String::new(), project.to_string()),
            Self::Id(ring) => (ring.to_string(), String::new()),
            Self::Name(name, project) => (name, text(project)),
        }
    }
}

/// What the events of an API key are sealed under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sealing {
    /// The ring of the topic that they go to.
    Topic,
    /// This ring of the project, by its id or its name, whichever topic they go to.
    Ring(String),
    /// A ring that is made for the API key, and belongs to it alone.
    Own,
}

/// Which versions of a key ring to destroy, or what of it to disable or enable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoke {
    /// One.
    Version(KeyVersion),
    /// Every one there is.
    All,
}

fn switch(ring: Ring, which: Revoke) -> pb::SwitchKeyRequest {
    use pb::switch_key_request::Which;
    let which = Some(match which {
        Revoke::Version(version) => Which::Version(version.0),
        Revoke::All => Which::All(true),
    });
    let (ring_id, project_id) = ring.wire();
    pb::SwitchKeyRequest { ring_id, project_id, which }
}

/// A span on the wire; the longest there is for one that is longer.
fn span(span: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(span).unwrap_or(prost_types::Duration { seconds: i64::MAX, nanos: 0 })
}

fn text<T: ToString>(id: Option<T>) -> String {
    id.map(|id| id.to_string()).unwrap_or_default()
}

macro_rules! call {
    ($self:ident, $repeat:ident, $message:expr, $method:ident) => {{
        let send = |channel: Channel, request| async move { AdminClient::new(channel).$method(request).await };
        $self.client.connection().call(Repeat::$repeat, $message, send).await
    }};
}

/// # Errors
/// Every method answers [`CallError`]; an outcome that is unknown is said to be so.
impl Admin {
    pub(crate) fn new(client: Client) -> Self {
        Self { client }
    }

    /// Makes an organization.
    pub async fn create_organization(&self, name: &str) -> Result<pb::Organization, CallError> {
        call!(self, OnlyIfUnsent, pb::CreateOrganizationRequest { name: name.to_owned() }, create_organization)
    }

    /// Every organization that the key may see, oldest first.
    pub async fn organizations(&self) -> Result<Vec<pb::Organization>, CallError> {
        call!(self, Harmless, pb::ListOrganizationsRequest {}, list_organizations).map(|reply| reply.organizations)
    }

    /// Makes a project, in the key's own organization unless another is named.
    pub async fn create_project(&self, name: &str, organization: Option<OrgId>) -> Result<pb::Project, CallError> {
        let message = pb::CreateProjectRequest { name: name.to_owned(), organization_id: text(organization) };
        call!(self, OnlyIfUnsent, message, create_project)
    }

    /// The projects of an organization, or all that the key may see, oldest first.
    pub async fn projects(&self, organization: Option<OrgId>) -> Result<Vec<pb::Project>, CallError> {
        let message = pb::ListProjectsRequest { organization_id: text(organization) };
        call!(self, Harmless, message, list_projects).map(|reply| reply.projects)
    }

    /// Makes an API key. Its secret is in the reply and nowhere else. No permissions means all seven.
    pub async fn create_api_key(
        &self,
        name: &str,
        project: Option<ProjectId>,
        permissions: Vec<String>,
    ) -> Result<pb::CreateApiKeyReply, CallError> {
        self.create_api_key_sealed(name, project, permissions, Sealing::Topic).await
    }

    /// [`Admin::create_api_key`] with a say in what its events are sealed under.
    pub async fn create_api_key_sealed(
        &self,
        name: &str,
        project: Option<ProjectId>,
        permissions: Vec<String>,
        sealing: Sealing,
    ) -> Result<pb::CreateApiKeyReply, CallError> {
        use pb::create_api_key_request::Sealing as Wire;
        let sealing = match sealing {
            Sealing::Topic => None,
            Sealing::Ring(named) => Some(Wire::Ring(named)),
            Sealing::Own => Some(Wire::OwnRing(true)),
        };
        let message =
            pb::CreateApiKeyRequest { name: name.to_owned(), project_id: text(project), permissions, sealing };
        call!(self, OnlyIfUnsent, message, create_api_key)
    }

    /// The API keys of a project, oldest first.
    pub async fn api_keys(&self, project: Option<ProjectId>) -> Result<Vec<pb::ApiKey>, CallError> {
        let message = pb::ListApiKeysRequest { project_id: text(project) };
        call!(self, Harmless, message, list_api_keys).map(|reply| reply.keys)
    }

    /// Revokes an API key by its id or its client id.
    pub async fn revoke_api_key(&self, key: &str) -> Result<Option<pb::ApiKey>, CallError> {
        let message = pb::RevokeApiKeyRequest { key: key.to_owned(), shred: false };
        call!(self, Harmless, message, revoke_api_key).map(|reply| reply.key)
    }

    /// Revokes an API key by its id or its client id, and destroys the key ring that belongs to it alone: nobody reads again what was
    /// published with it. Waits as [`Admin::revoke_key`] does; asking again goes on where an earlier call was cut off.
    pub async fn shred_api_key(&self, key: &str) -> Result<pb::RevokeApiKeyReply, CallError> {
        let message = pb::RevokeApiKeyRequest { key: key.to_owned(), shred: true };
        let send = |channel: Channel, request| async move { AdminClient::new(channel).revoke_api_key(request).await };
        self.client.connection().call_within(REVOKE_TIMEOUT, Repeat::Harmless, message, send).await
    }

    /// An API key by its id or its client id, its own key ring, and where events are sealed under that.
    pub async fn api_key(&self, key: &str) -> Result<pb::ApiKeyDescription, CallError> {
        call!(self, Harmless, pb::DescribeApiKeyRequest { key: key.to_owned() }, describe_api_key)
    }

    /// [`Admin::revoke_api_key`] for who holds the typed id.
    pub async fn revoke_api_key_by_id(&self, key: ApiKeyId) -> Result<Option<pb::ApiKey>, CallError> {
        self.revoke_api_key(&key.to_string()).await
    }

    /// Seals the vault: no node gets keys any more. Lifted on a node's own machine.
    pub async fn seal_vault(&self) -> Result<pb::SealVaultReply, CallError> {
        call!(self, Harmless, pb::SealVaultRequest {}, seal_vault)
    }

    /// Makes a token that lets `uses` machines join within `ttl`.
    pub async fn create_join_token(&self, ttl: Duration, uses: u32) -> Result<pb::CreateJoinTokenReply, CallError> {
        let ttl = prost_types::Duration::try_from(ttl).ok();
        call!(self, OnlyIfUnsent, pb::CreateJoinTokenRequest { ttl, uses }, create_join_token)
    }

    /// Every join token, oldest first.
    pub async fn join_tokens(&self) -> Result<Vec<pb::JoinToken>, CallError> {
        call!(self, Harmless, pb::ListJoinTokensRequest {}, list_join_tokens).map(|reply| reply.tokens)
    }

    /// Revokes a join token by its id.
    pub async fn revoke_join_token(&self, id: &str) -> Result<(), CallError> {
        let message = pb::RevokeJoinTokenRequest { id: id.to_owned() };
        call!(self, Harmless, message, revoke_join_token).map(drop)
    }

    /// The key rings of a project with their versions.
    pub async fn key_rings(&self, project: Option<ProjectId>) -> Result<Vec<pb::KeyRing>, CallError> {
        let message = pb::ListKeysRequest { project_id: text(project) };
        call!(self, Harmless, message, list_keys).map(|reply| reply.rings)
    }

    /// Makes a new active version of a ring.
    pub async fn rotate_key(&self, ring: Ring) -> Result<pb::RotateKeyReply, CallError> {
        let (ring_id, project_id) = ring.wire();
        call!(self, OnlyIfUnsent, pb::RotateKeyRequest { ring_id, project_id }, rotate_key)
    }

    /// Destroys versions of a ring for ever, and waits until no node opens what they sealed: with everyone there a moment, at
    /// worst as long as a silent node's lease can run. Waits for up to [`REVOKE_TIMEOUT`], whatever the time for other calls is.
    pub async fn revoke_key(&self, ring: Ring, which: Revoke) -> Result<pb::RevokeKeyReply, CallError> {
        use pb::revoke_key_request::Which;
        let which = match which {
            Revoke::Version(version) => Which::Version(version.0),
            Revoke::All => Which::All(true),
        };
        let (ring_id, project_id) = ring.wire();
        let message = pb::RevokeKeyRequest { ring_id, project_id, which: Some(which) };
        let send = |channel: Channel, request| async move { AdminClient::new(channel).revoke_key(request).await };
        self.client.connection().call_within(REVOKE_TIMEOUT, Repeat::Harmless, message, send).await
    }

    /// What the vault signed of a ring, and how far its erasure is.
    pub async fn key_receipts(&self, ring: Ring) -> Result<pb::ListKeyReceiptsReply, CallError> {
        let (ring_id, project_id) = ring.wire();
        call!(self, Harmless, pb::ListKeyReceiptsRequest { ring_id, project_id }, list_key_receipts)
    }

    /// Makes a key ring beside the one that a project began with.
    pub async fn create_key_ring(
        &self,
        name: &str,
        project: Option<ProjectId>,
        algorithm: pb::KeyAlgorithm,
    ) -> Result<pb::KeyRing, CallError> {
        let (name, algorithm) = (name.to_owned(), algorithm.into());
        let message = pb::CreateKeyRingRequest { project_id: text(project), name, algorithm };
        call!(self, OnlyIfUnsent, message, create_key_ring)
    }

    /// One key ring, with its settings.
    pub async fn key_ring(&self, ring: Ring) -> Result<pb::KeyRing, CallError> {
        let (ring_id, project_id) = ring.wire();
        call!(self, Harmless, pb::DescribeKeyRequest { ring_id, project_id }, describe_key)
    }

    /// Takes a version or a whole ring out of use until it is enabled, and waits until no node seals or opens under it, as
    /// [`Admin::revoke_key`] waits.
    pub async fn disable_key(&self, ring: Ring, which: Revoke) -> Result<pb::KeyRing, CallError> {
        let message = switch(ring, which);
        let send = |channel: Channel, request| async move { AdminClient::new(channel).disable_key(request).await };
        self.client.connection().call_within(REVOKE_TIMEOUT, Repeat::Harmless, message, send).await
    }

    /// Takes it back into use. What is revoked stays revoked.
    pub async fn enable_key(&self, ring: Ring, which: Revoke) -> Result<pb::KeyRing, CallError> {
        call!(self, Harmless, switch(ring, which), enable_key)
    }

    /// Has it be destroyed once it has cooled off for `after` (absent: seven days), unless that is cancelled.
    pub async fn schedule_revoke_key(
        &self,
        ring: Ring,
        which: Revoke,
        after: Option<Duration>,
    ) -> Result<pb::KeyRing, CallError> {
        use pb::schedule_revoke_key_request::Which;
        let which = Some(match which {
            Revoke::Version(version) => Which::Version(version.0),
            Revoke::All => Which::All(true),
        });
        let (ring_id, project_id) = ring.wire();
        let after = after.map(span);
        let message = pb::ScheduleRevokeKeyRequest { ring_id, project_id, which, after };
        call!(self, Harmless, message, schedule_revoke_key)
    }

    /// Cancels that.
    pub async fn cancel_revoke_key(&self, ring: Ring, which: Revoke) -> Result<pb::KeyRing, CallError> {
        call!(self, OnlyIfUnsent, switch(ring, which), cancel_revoke_key)
    }

    /// Sets how often a ring is rotated, and how data keys that are made from now on seal. What is absent stays.
    pub async fn set_key(
        &self,
        ring: Ring,
        rotation: Option<Duration>,
        algorithm: Option<pb::KeyAlgorithm>,
    ) -> Result<pb::KeyRing, CallError> {
        let (ring_id, project_id) = ring.wire();
        let algorithm = algorithm.unwrap_or_default().into();
        let message = pb::SetKeyRequest { ring_id, project_id, rotation: rotation.map(span), algorithm };
        call!(self, Harmless, message, set_key)
    }

    /// Changes limits of a project, or with none named of every project that has none of its own; answers what holds then. Only
    /// an operator's key may.
    pub async fn set_quota(&self, project: Option<ProjectId>, change: pb::Quota) -> Result<pb::QuotaStatus, CallError> {
        use pb::set_quota_request::Whose;
        let whose = Some(project.map_or(Whose::ClusterDefault(true), |project| Whose::ProjectId(project.to_string())));
        call!(self, Harmless, pb::SetQuotaRequest { whose, change: Some(change) }, set_quota)
    }

    /// The limits and the use of a project, or of every project that the key may see, oldest first; an operator's key sees the
    /// cluster's default before them.
    pub async fn quotas(&self, project: Option<ProjectId>) -> Result<Vec<pb::QuotaStatus>, CallError> {
        let message = pb::ShowQuotasRequest { project_id: text(project) };
        call!(self, Harmless, message, show_quotas).map(|reply| reply.quotas)
    }

    /// The nodes and groups of the cluster, as the answering node sees them.
    pub async fn cluster_status(&self) -> Result<pb::ClusterStatusReply, CallError> {
        call!(self, Harmless, pb::ClusterStatusRequest {}, cluster_status)
    }

    /// The cluster's version, and what every node speaks.
    pub async fn cluster_version(&self) -> Result<pb::VersionReply, CallError> {
        call!(self, Harmless, pb::ShowVersionRequest {}, show_version)
    }

    /// Raises the cluster's version, for ever; `to` absent: to the newest that the answering node speaks. Nodes in `without` are lost, and
    /// need not answer.
    pub async fn raise_cluster_version(&self, to: Option<u32>, without: &[u64]) -> Result<pb::VersionReply, CallError> {
        let message = pb::RaiseVersionRequest { to: to.unwrap_or_default(), without: without.to_vec() };
        call!(self, Harmless, message, raise_version)
    }

    /// What every node says of itself. Without a quorum nobody can be known to be allowed to ask, and this is UNAVAILABLE: then a
    /// node's own metrics port tells.
    pub async fn cluster_report(&self) -> Result<pb::ClusterReportReply, CallError> {
        let send = |channel: Channel, request| async move {
            AdminClient::new(channel).max_decoding_message_size(REPORT_MAX).cluster_report(request).await
        };
        let connection = self.client.connection();
        let patience = REPORT_TIMEOUT.min(connection.call_timeout());
        connection.call_within(patience, Repeat::Harmless, pb::ClusterReportRequest {}, send).await
    }

    /// The cluster's nodes, or one of them.
    pub async fn nodes(&self, node: Option<NodeId>) -> Result<Vec<pb::Node>, CallError> {
        let message = pb::ListNodesRequest { node_id: node.map_or(0, |node| node.0) };
        call!(self, Harmless, message, list_nodes).map(|reply| reply.nodes)
    }

    /// Drains a node, takes that back, or removes it for ever.
    pub async fn set_node_state(&self, node: NodeId, state: pb::NodeState) -> Result<pb::Node, CallError> {
        let message = pb::SetNodeStateRequest { node_id: node.0, state: state.into(), force: false };
        call!(self, Harmless, message, set_node_state)
    }

    /// Removes for ever a node that does not answer, although it was not drained.
    ///
    /// # Errors
    /// [`CallError::Precondition`]: it answers, or a group has no majority without it; the message names the topics.
    pub async fn remove_node_by_force(&self, node: NodeId) -> Result<pb::Node, CallError> {
        let message = pb::SetNodeStateRequest { node_id: node.0, state: pb::NodeState::Removed.into(), force: true };
        call!(self, Harmless, message, set_node_state)
    }

    /// Where replicas are, and the moves that are on: every page of what `filter` asks for.
    pub async fn partitions(&self, mut filter: pb::ListPartitionsRequest) -> Result<Vec<pb::PartitionInfo>, CallError> {
        let mut all = Vec::new();
        loop {
            let reply = call!(self, Harmless, filter.clone(), list_partitions)?;
            all.extend(reply.partitions);
            if reply.next.is_empty() {
                return Ok(all);
            }
            filter.after = reply.next;
        }
    }

    /// Begins to move a partition's replicas to the nodes of `target`.
    pub async fn move_partition(
        &self,
        topic: &str,
        target: impl IntoIterator<Item = NodeId>,
    ) -> Result<pb::PartitionInfo, CallError> {
        let target = target.into_iter().map(|node| node.0).collect();
        call!(self, Harmless, pb::MovePartitionRequest { topic: topic.to_owned(), target }, move_partition)
    }

    /// Turns a move round.
    pub async fn cancel_move(&self, topic: &str) -> Result<pb::PartitionInfo, CallError> {
        call!(self, Harmless, pb::CancelMoveRequest { topic: topic.to_owned() }, cancel_move)
    }

    /// Changes where a topic's replicas may be, and how many.
    pub async fn alter_topic(&self, change: pb::AlterTopicRequest) -> Result<pb::PartitionInfo, CallError> {
        call!(self, Harmless, change, alter_topic)
    }
}
