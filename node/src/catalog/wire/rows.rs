//! Rows: how a record looks in bytes. Shared by commands, answers and snapshots, so that a field is described once.

use std::collections::BTreeSet;

use bytes::Bytes;
use ensign_proto::{
    ApiKeyId, ClusterVersion, GroupId, NodeId, OrgId, Partition, Permission, PermissionSet, ProjectId, RingId, TopicId,
    TopicName,
};
use ensign_raft::env::UnixNanos;
use prost::Message;

use super::DecodeError;
use super::moves::{
    DefaultsRow, MoveRow, NodeStateRow, PlacementRow, ReassignmentRow, node_state_number, node_state_of, placement_row,
};
use crate::catalog::command::{Join, NewTopic};
use crate::catalog::quota::{Change, Limit, Quota, QuotaChange};
use crate::catalog::records::{
    ApiKey, ClusterAuthority, JoinToken, NodeRecord, Organization, Project, SigningKey, Topic, TopicPolicies,
    TopicState,
};

#[derive(Clone, PartialEq, Message)]
pub(super) struct NodeRow {
    #[prost(uint64, tag = "1")]
    pub(super) id: u64,
    #[prost(string, tag = "2")]
    pub(super) peer: String,
    #[prost(string, tag = "3")]
    pub(super) grpc: String,
    #[prost(string, tag = "4")]
    pub(super) http: String,
    // 0 active, 1 draining, 2 removed; 0 in a command.
    #[prost(uint32, tag = "20")]
    pub(super) state: u32,
    // Empty or zero, all six, in what was written before nodes had names and lives.
    #[prost(string, tag = "40")]
    pub(super) name: String,
    #[prost(string, tag = "41")]
    pub(super) region: String,
    #[prost(string, tag = "42")]
    pub(super) zone: String,
    #[prost(uint64, tag = "43")]
    pub(super) incarnation: u64,
    #[prost(uint64, tag = "44")]
    pub(super) process: u64,
    // Empty, or 32 bytes.
    #[prost(bytes = "bytes", tag = "45")]
    pub(super) key: Bytes,
    // 0 in what was written before nodes told it.
    #[prost(uint32, tag = "90")]
    version: u32,
    // False in what was written before nodes said so.
    #[prost(bool, tag = "30")]
    pub(super) vault: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct AuthorityRow {
    #[prost(string, tag = "1")]
    certificate: String,
    #[prost(uint64, tag = "2")]
    created: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct JoinTokenRow {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    hash: Bytes,
    #[prost(uint64, tag = "3")]
    created: u64,
    #[prost(uint64, tag = "4")]
    expires: u64,
    #[prost(uint32, tag = "5")]
    uses: u32,
    #[prost(uint32, tag = "6")]
    used: u32,
    #[prost(uint64, optional, tag = "7")]
    revoked_at: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct JoinRow {
    #[prost(bytes = "bytes", tag = "1")]
    token: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    key: Bytes,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    region: String,
    #[prost(string, tag = "5")]
    zone: String,
    #[prost(string, tag = "6")]
    peer: String,
    #[prost(uint64, tag = "7")]
    above: u64,
    #[prost(uint64, tag = "8")]
    at: u64,
    #[prost(uint32, tag = "90")]
    version: u32,
}

/// A node that is none any more.
#[derive(Clone, PartialEq, Message)]
pub(super) struct RevokedNodeRow {
    #[prost(uint64, tag = "1")]
    pub(super) node: u64,
    #[prost(uint64, tag = "2")]
    pub(super) at: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct OrganizationRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(string, tag = "2")]
    pub(super) name: String,
    #[prost(uint64, tag = "3")]
    pub(super) created: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ProjectRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) org: Bytes,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) ring: Bytes,
    #[prost(uint64, tag = "5")]
    pub(super) created: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PoliciesRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) deduplication: Bytes,
    #[prost(int32, tag = "2")]
    pub(super) sharding: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TopicRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) project: Bytes,
    // Empty in a command, which leaves it to the catalog.
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) org: Bytes,
    #[prost(string, tag = "4")]
    pub(super) name: String,
    // Likewise zero in a command.
    #[prost(uint64, tag = "5")]
    pub(super) group: u64,
    #[prost(bytes = "bytes", tag = "6")]
    pub(super) ring: Bytes,
    // 1 ready, 2 readonly, 3 deleting; 0 in a command.
    #[prost(uint32, tag = "7")]
    pub(super) state: u32,
    #[prost(message, optional, tag = "8")]
    pub(super) policies: Option<PoliciesRow>,
    #[prost(uint64, tag = "9")]
    pub(super) created: u64,
    #[prost(uint64, tag = "10")]
    pub(super) modified: u64,
    // Ascending. Empty in what was written before placement was kept.
    #[prost(uint64, repeated, tag = "11")]
    pub(super) replicas: Vec<u64>,
    // Absent likewise.
    #[prost(message, optional, tag = "20")]
    pub(super) placement: Option<PlacementRow>,
    #[prost(uint64, tag = "21")]
    pub(super) assignment: u64,
    #[prost(message, optional, tag = "22")]
    pub(super) reassignment: Option<ReassignmentRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ApiKeyRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(string, tag = "2")]
    pub(super) client_id: String,
    #[prost(string, tag = "3")]
    pub(super) name: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) org: Bytes,
    // Empty for none.
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) project: Bytes,
    // Wire strings: numbers could be renumbered by mistake.
    #[prost(string, repeated, tag = "6")]
    pub(super) permissions: Vec<String>,
    #[prost(bool, tag = "7")]
    pub(super) admin: bool,
    #[prost(uint64, tag = "8")]
    pub(super) created: u64,
    #[prost(uint64, optional, tag = "9")]
    pub(super) revoked_at: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SigningKeyRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) kid: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    public_key: Bytes,
    #[prost(uint64, tag = "3")]
    pub(super) created: u64,
    #[prost(uint64, tag = "4")]
    pub(super) signs_from: u64,
    #[prost(uint64, optional, tag = "5")]
    pub(super) verifies_until: Option<u64>,
}

/// Something happens to the record of this id.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ChangeRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) id: Bytes,
    #[prost(uint64, tag = "2")]
    pub(super) at: u64,
    #[prost(uint32, tag = "3")]
    pub(super) state: u32,
    #[prost(message, optional, tag = "4")]
    pub(super) policies: Option<PoliciesRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CommandRow {
    #[prost(
        oneof = "CommandKind",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23, 24, 25, 26, 40, 41, 42, 43, 44, 60, 80, 90"
    )]
    pub(super) kind: Option<CommandKind>,
}

#[allow(clippy::large_enum_variant, reason = "one value for each command, for a moment")]
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum CommandKind {
    #[prost(message, tag = "1")]
    PutNode(NodeRow),
    #[prost(message, tag = "2")]
    CreateOrganization(OrganizationRow),
    #[prost(message, tag = "3")]
    CreateProject(ProjectRow),
    #[prost(message, tag = "4")]
    CreateTopic(TopicRow),
    #[prost(message, tag = "5")]
    SetTopicState(ChangeRow),
    #[prost(message, tag = "6")]
    SetTopicPolicies(ChangeRow),
    #[prost(message, tag = "7")]
    FinishDestroy(ChangeRow),
    #[prost(message, tag = "8")]
    CreateApiKey(ApiKeyRow),
    #[prost(message, tag = "9")]
    RevokeApiKey(ChangeRow),
    #[prost(message, tag = "10")]
    AddSigningKey(SigningKeyRow),
    #[prost(message, tag = "11")]
    RetireSigningKey(ChangeRow),
    #[prost(message, tag = "40")]
    SetAuthority(AuthorityRow),
    #[prost(message, tag = "41")]
    CreateJoinToken(JoinTokenRow),
    #[prost(message, tag = "42")]
    RevokeJoinToken(ChangeRow),
    #[prost(message, tag = "43")]
    Join(JoinRow),
    #[prost(message, tag = "44")]
    RevokeNode(RevokedNodeRow),
    #[prost(message, tag = "20")]
    SetPlacementDefaults(DefaultsRow),
    #[prost(message, tag = "21")]
    SetNodeState(NodeStateRow),
    #[prost(message, tag = "22")]
    AlterTopic(MoveRow),
    #[prost(message, tag = "23")]
    StartMove(MoveRow),
    #[prost(message, tag = "24")]
    CancelMove(MoveRow),
    #[prost(message, tag = "25")]
    FinishMove(MoveRow),
    #[prost(message, tag = "26")]
    ReportMove(MoveRow),
    #[prost(message, tag = "60")]
    SetQuota(QuotaChangeRow),
    #[prost(message, tag = "80")]
    CreateTopics(TopicsRow),
    #[prost(uint32, tag = "90")]
    SetClusterVersion(u32),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TopicsRow {
    #[prost(message, repeated, tag = "1")]
    pub(super) topics: Vec<TopicRow>,
}

/// An answer for each of many: a refusal, or what there is now.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ResponsesRow {
    #[prost(message, repeated, tag = "1")]
    pub(super) each: Vec<ResponseRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ResponseRow {
    #[prost(oneof = "ResponseKind", tags = "1, 2, 3, 4, 5, 6, 40, 80")]
    pub(super) kind: Option<ResponseKind>,
}

#[allow(clippy::large_enum_variant, reason = "one value for each answer, for a moment")]
#[derive(Clone, PartialEq, prost::Oneof)]
pub(super) enum ResponseKind {
    #[prost(uint32, tag = "1")]
    Refusal(u32),
    #[prost(bool, tag = "2")]
    Done(bool),
    #[prost(message, tag = "3")]
    Organization(OrganizationRow),
    #[prost(message, tag = "4")]
    Project(ProjectRow),
    #[prost(message, tag = "5")]
    Topic(TopicRow),
    #[prost(message, tag = "6")]
    ApiKey(ApiKeyRow),
    #[prost(message, tag = "40")]
    Node(NodeRow),
    #[prost(message, tag = "80")]
    Topics(ResponsesRow),
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SnapshotRow {
    #[prost(uint64, tag = "1")]
    pub(super) next_group: u64,
    #[prost(message, repeated, tag = "2")]
    pub(super) nodes: Vec<NodeRow>,
    #[prost(message, repeated, tag = "3")]
    pub(super) organizations: Vec<OrganizationRow>,
    #[prost(message, repeated, tag = "4")]
    pub(super) projects: Vec<ProjectRow>,
    #[prost(message, repeated, tag = "5")]
    pub(super) topics: Vec<TopicRow>,
    #[prost(message, repeated, tag = "6")]
    pub(super) api_keys: Vec<ApiKeyRow>,
    #[prost(message, repeated, tag = "7")]
    pub(super) signing_keys: Vec<SigningKeyRow>,
    #[prost(message, repeated, tag = "8")]
    pub(super) tombstones: Vec<ChangeRow>,
    // The last entry that the state holds.
    #[prost(uint64, tag = "9")]
    pub(super) applied: u64,
    #[prost(message, optional, tag = "40")]
    pub(super) authority: Option<AuthorityRow>,
    #[prost(message, repeated, tag = "41")]
    pub(super) join_tokens: Vec<JoinTokenRow>,
    // The number that the next machine is given; 0 in what was written before machines joined.
    #[prost(uint64, tag = "42")]
    pub(super) next_node: u64,
    #[prost(message, repeated, tag = "43")]
    pub(super) revoked_nodes: Vec<RevokedNodeRow>,
    #[prost(message, optional, tag = "20")]
    pub(super) defaults: Option<DefaultsRow>,
    #[prost(message, optional, tag = "60")]
    pub(super) default_quota: Option<QuotaRow>,
    #[prost(message, repeated, tag = "61")]
    pub(super) quotas: Vec<ProjectQuotaRow>,
    // 0 in what was written before clusters had a version.
    #[prost(uint32, tag = "90")]
    pub(super) version: u32,
}

/// A limit, or in a change what to do with it.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct LimitRow {
    // 1 unlimited, 2 at `at`; in a change also 3 unset.
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(uint64, tag = "2")]
    at: u64,
}

/// The limits that are set; in a change, those that are changed.
#[derive(Clone, PartialEq, Message)]
pub(super) struct QuotaRow {
    #[prost(message, optional, tag = "1")]
    events_per_second: Option<LimitRow>,
    #[prost(message, optional, tag = "2")]
    bytes_per_second: Option<LimitRow>,
    #[prost(message, optional, tag = "3")]
    stored_bytes: Option<LimitRow>,
    #[prost(message, optional, tag = "4")]
    topics: Option<LimitRow>,
    #[prost(message, optional, tag = "5")]
    streams: Option<LimitRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ProjectQuotaRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) project: Bytes,
    #[prost(message, optional, tag = "2")]
    pub(super) limits: Option<QuotaRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct QuotaChangeRow {
    // Empty for the cluster's default.
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) project: Bytes,
    #[prost(message, optional, tag = "2")]
    pub(super) limits: Option<QuotaRow>,
}

pub(super) fn id<'a, T: TryFrom<&'a [u8]>>(bytes: &'a Bytes, what: &'static str) -> Result<T, DecodeError> {
    T::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid(what))
}

pub(super) fn kid(bytes: &Bytes) -> Result<[u8; 16], DecodeError> {
    <[u8; 16]>::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid("kid"))
}

pub(super) fn raw(id: &[u8; 16]) -> Bytes {
    Bytes::copy_from_slice(id)
}

impl From<&NodeRecord> for NodeRow {
    fn from(node: &NodeRecord) -> Self {
        Self {
            id: node.id.0,
            peer: node.peer.clone(),
            grpc: node.grpc.clone(),
            http: node.http.clone(),
            name: node.name.clone(),
            region: node.region.clone(),
            zone: node.zone.clone(),
            incarnation: node.incarnation,
            process: node.process,
            key: node.key.clone(),
            version: number(node.version),
            vault: node.vault,
            state: node_state_number(node.state),
        }
    }
}

impl TryFrom<NodeRow> for NodeRecord {
    type Error = DecodeError;

    fn try_from(row: NodeRow) -> Result<Self, DecodeError> {
        Ok(Self {
            id: NodeId(row.id),
            peer: row.peer,
            grpc: row.grpc,
            http: row.http,
            name: row.name,
            region: row.region,
            zone: row.zone,
            incarnation: row.incarnation,
            process: row.process,
            key: Bytes::copy_from_slice(&row.key),
            version: ClusterVersion::or_first(row.version),
            vault: row.vault,
            state: node_state_of(row.state)?,
        })
    }
}

/// As it is stored: the first version is not, as it never was.
pub(super) fn number(version: ClusterVersion) -> u32 {
    if version == ClusterVersion::V1 { 0 } else { version.0 }
}

impl From<&ClusterAuthority> for AuthorityRow {
    fn from(authority: &ClusterAuthority) -> Self {
        Self { certificate: authority.certificate.clone(), created: authority.created.0 }
    }
}

impl From<AuthorityRow> for ClusterAuthority {
    fn from(row: AuthorityRow) -> Self {
        Self { certificate: row.certificate, created: UnixNanos(row.created) }
    }
}

impl From<&JoinToken> for JoinTokenRow {
    fn from(token: &JoinToken) -> Self {
        Self {
            id: raw(&token.id),
            hash: Bytes::copy_from_slice(&token.hash),
            created: token.created.0,
            expires: token.expires.0,
            uses: token.uses,
            used: token.used,
            revoked_at: token.revoked_at.map(|at| at.0),
        }
    }
}

impl TryFrom<JoinTokenRow> for JoinToken {
    type Error = DecodeError;

    fn try_from(row: JoinTokenRow) -> Result<Self, DecodeError> {
        Ok(Self {
            id: kid(&row.id)?,
            hash: digest(&row.hash)?,
            created: UnixNanos(row.created),
            expires: UnixNanos(row.expires),
            uses: row.uses,
            used: row.used,
            revoked_at: row.revoked_at.map(UnixNanos),
        })
    }
}

impl From<&Join> for JoinRow {
    fn from(join: &Join) -> Self {
        Self {
            token: raw(&join.token),
            key: Bytes::copy_from_slice(&join.key),
            name: join.name.clone(),
            region: join.region.clone(),
            zone: join.zone.clone(),
            peer: join.peer.clone(),
            above: join.above.0,
            at: join.at.0,
            version: number(join.version),
        }
    }
}

impl TryFrom<JoinRow> for Join {
    type Error = DecodeError;

    fn try_from(row: JoinRow) -> Result<Self, DecodeError> {
        Ok(Self {
            token: kid(&row.token)?,
            key: digest(&row.key)?,
            name: row.name,
            region: row.region,
            zone: row.zone,
            peer: row.peer,
            above: NodeId(row.above),
            at: UnixNanos(row.at),
            version: ClusterVersion::or_first(row.version),
        })
    }
}

fn digest(bytes: &Bytes) -> Result<[u8; 32], DecodeError> {
    <[u8; 32]>::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid("digest"))
}

impl From<&Organization> for OrganizationRow {
    fn from(org: &Organization) -> Self {
        Self { id: raw(org.id.as_bytes()), name: org.name.clone(), created: org.created.0 }
    }
}

impl TryFrom<OrganizationRow> for Organization {
    type Error = DecodeError;

    fn try_from(row: OrganizationRow) -> Result<Self, DecodeError> {
        Ok(Self { id: id::<OrgId>(&row.id, "organization")?, name: row.name, created: UnixNanos(row.created) })
    }
}

impl From<&Project> for ProjectRow {
    fn from(project: &Project) -> Self {
        Self {
            id: raw(project.id.as_bytes()),
            org: raw(project.org.as_bytes()),
            name: project.name.clone(),
            ring: raw(project.ring.as_bytes()),
            created: project.created.0,
        }
    }
}

impl TryFrom<ProjectRow> for Project {
    type Error = DecodeError;

    fn try_from(row: ProjectRow) -> Result<Self, DecodeError> {
        Ok(Self {
            id: id::<ProjectId>(&row.id, "project")?,
            org: id::<OrgId>(&row.org, "organization")?,
            name: row.name,
            ring: id::<RingId>(&row.ring, "ring")?,
            created: UnixNanos(row.created),
        })
    }
}

impl From<&TopicPolicies> for PoliciesRow {
    fn from(policies: &TopicPolicies) -> Self {
        Self { deduplication: policies.deduplication.clone(), sharding: policies.sharding }
    }
}

impl From<Option<PoliciesRow>> for TopicPolicies {
    fn from(row: Option<PoliciesRow>) -> Self {
        let row = row.unwrap_or_default();
        // A copy: a slice would keep the whole message that it came in alive.
        Self { deduplication: Bytes::copy_from_slice(&row.deduplication), sharding: row.sharding }
    }
}

pub(super) fn state_number(state: TopicState) -> u32 {
    match state {
        TopicState::Ready => 1,
        TopicState::Readonly => 2,
        TopicState::Deleting => 3,
    }
}

pub(super) fn state_of(number: u32) -> Result<TopicState, DecodeError> {
    match number {
        1 => Ok(TopicState::Ready),
        2 => Ok(TopicState::Readonly),
        3 => Ok(TopicState::Deleting),
        _ => Err(DecodeError::Invalid("topic state")),
    }
}

/// Strict: a permission that this version does not know must not get lost in the next snapshot.
fn permissions(texts: &[String]) -> Result<PermissionSet, DecodeError> {
    let known: Result<PermissionSet, _> = texts.iter().map(|text| text.parse::<Permission>()).collect();
    known.map_err(|_| DecodeError::Invalid("permission"))
}

fn topic_name(text: &str) -> Result<TopicName, DecodeError> {
    text.parse().map_err(|_| DecodeError::Invalid("topic name"))
}

impl From<&Topic> for TopicRow {
    fn from(topic: &Topic) -> Self {
        Self {
            id: raw(topic.id.as_bytes()),
            project: raw(topic.project.as_bytes()),
            org: raw(topic.org.as_bytes()),
            name: topic.name.as_str().to_owned(),
            group: topic.group.0,
            ring: raw(topic.ring.as_bytes()),
            state: state_number(topic.state),
            policies: Some((&topic.policies).into()),
            created: topic.created.0,
            modified: topic.modified.0,
            replicas: numbers(&topic.replicas),
            placement: placement_row(&topic.placement),
            assignment: topic.assignment,
            reassignment: topic.reassignment.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<TopicRow> for Topic {
    type Error = DecodeError;

    fn try_from(row: TopicRow) -> Result<Self, DecodeError> {
        if row.group < GroupId::FIRST_PARTITION.0 {
            return Err(DecodeError::Invalid("group"));
        }
        Ok(Self {
            id: id::<TopicId>(&row.id, "topic")?,
            project: id::<ProjectId>(&row.project, "project")?,
            org: id::<OrgId>(&row.org, "organization")?,
            name: topic_name(&row.name)?,
            group: GroupId(row.group),
            partition: Partition(0),
            replicas: nodes(&row.replicas),
            placement: row.placement.into(),
            assignment: row.assignment,
            reassignment: row.reassignment.map(TryInto::try_into).transpose()?,
            ring: id::<RingId>(&row.ring, "ring")?,
            state: state_of(row.state)?,
            policies: row.policies.into(),
            created: UnixNanos(row.created),
            modified: UnixNanos(row.modified),
        })
    }
}

impl From<&NewTopic> for TopicRow {
    fn from(topic: &NewTopic) -> Self {
        Self {
            id: raw(topic.id.as_bytes()),
            project: raw(topic.project.as_bytes()),
            name: topic.name.as_str().to_owned(),
            ring: raw(topic.ring.as_bytes()),
            policies: Some((&topic.policies).into()),
            created: topic.at.0,
            replicas: numbers(&topic.replicas),
            placement: placement_row(&topic.placement),
            ..Self::default()
        }
    }
}

impl TryFrom<TopicRow> for NewTopic {
    type Error = DecodeError;

    fn try_from(row: TopicRow) -> Result<Self, DecodeError> {
        Ok(Self {
            id: id::<TopicId>(&row.id, "topic")?,
            project: id::<ProjectId>(&row.project, "project")?,
            name: topic_name(&row.name)?,
            ring: id::<RingId>(&row.ring, "ring")?,
            replicas: nodes(&row.replicas),
            placement: row.placement.into(),
            policies: row.policies.into(),
            at: UnixNanos(row.created),
        })
    }
}

impl From<&ApiKey> for ApiKeyRow {
    fn from(key: &ApiKey) -> Self {
        Self {
            id: raw(key.id.as_bytes()),
            client_id: key.client_id.clone(),
            name: key.name.clone(),
            org: raw(key.org.as_bytes()),
            project: key.project.map(|project| raw(project.as_bytes())).unwrap_or_default(),
            permissions: key.permissions.to_texts().into_iter().map(str::to_owned).collect(),
            admin: key.admin,
            created: key.created.0,
            revoked_at: key.revoked_at.map(|at| at.0),
        }
    }
}

impl TryFrom<ApiKeyRow> for ApiKey {
    type Error = DecodeError;

    fn try_from(row: ApiKeyRow) -> Result<Self, DecodeError> {
        let project = (!row.project.is_empty()).then(|| id::<ProjectId>(&row.project, "project")).transpose()?;
        Ok(Self {
            id: id::<ApiKeyId>(&row.id, "API key")?,
            client_id: row.client_id,
            name: row.name,
            org: id::<OrgId>(&row.org, "organization")?,
            project,
            permissions: permissions(&row.permissions)?,
            admin: row.admin,
            created: UnixNanos(row.created),
            revoked_at: row.revoked_at.map(UnixNanos),
        })
    }
}

impl From<&SigningKey> for SigningKeyRow {
    fn from(key: &SigningKey) -> Self {
        Self {
            kid: raw(&key.kid),
            public_key: key.public_key.clone(),
            created: key.created.0,
            signs_from: key.signs_from.0,
            verifies_until: key.verifies_until.map(|until| until.0),
        }
    }
}

impl TryFrom<SigningKeyRow> for SigningKey {
    type Error = DecodeError;

    fn try_from(row: SigningKeyRow) -> Result<Self, DecodeError> {
        Ok(Self {
            kid: kid(&row.kid)?,
            public_key: Bytes::copy_from_slice(&row.public_key),
            created: UnixNanos(row.created),
            signs_from: UnixNanos(row.signs_from),
            verifies_until: row.verifies_until.map(UnixNanos),
        })
    }
}

impl From<Limit> for LimitRow {
    fn from(limit: Limit) -> Self {
        match limit {
            Limit::Unlimited => Self { kind: 1, at: 0 },
            Limit::At(at) => Self { kind: 2, at },
        }
    }
}

impl LimitRow {
    const UNSET: Self = Self { kind: 3, at: 0 };

    /// None: forget it.
    fn limit(self) -> Result<Option<Limit>, DecodeError> {
        match self.kind {
            1 => Ok(Some(Limit::Unlimited)),
            2 => Ok(Some(Limit::At(self.at))),
            3 => Ok(None),
            // Strict: a limit that this version does not know must not get lost in the next snapshot.
            _ => Err(DecodeError::Invalid("limit")),
        }
    }
}

impl From<&Quota> for QuotaRow {
    fn from(quota: &Quota) -> Self {
        Self {
            events_per_second: quota.events_per_second.map(Into::into),
            bytes_per_second: quota.bytes_per_second.map(Into::into),
            stored_bytes: quota.stored_bytes.map(Into::into),
            topics: quota.topics.map(Into::into),
            streams: quota.streams.map(Into::into),
        }
    }
}

impl TryFrom<QuotaRow> for Quota {
    type Error = DecodeError;

    fn try_from(row: QuotaRow) -> Result<Self, DecodeError> {
        let limit = |row: Option<LimitRow>| row.map_or(Ok(None), LimitRow::limit);
        Ok(Self {
            events_per_second: limit(row.events_per_second)?,
            bytes_per_second: limit(row.bytes_per_second)?,
            stored_bytes: limit(row.stored_bytes)?,
            topics: limit(row.topics)?,
            streams: limit(row.streams)?,
        })
    }
}

impl From<&QuotaChange> for QuotaRow {
    fn from(change: &QuotaChange) -> Self {
        let row = |change: Change| match change {
            Change::Keep => None,
            Change::Unset => Some(LimitRow::UNSET),
            Change::Set(limit) => Some(limit.into()),
        };
        Self {
            events_per_second: row(change.events_per_second),
            bytes_per_second: row(change.bytes_per_second),
            stored_bytes: row(change.stored_bytes),
            topics: row(change.topics),
            streams: row(change.streams),
        }
    }
}

impl TryFrom<QuotaRow> for QuotaChange {
    type Error = DecodeError;

    fn try_from(row: QuotaRow) -> Result<Self, DecodeError> {
        let change = |row: Option<LimitRow>| match row {
            None => Ok(Change::Keep),
            Some(row) => Ok(row.limit()?.map_or(Change::Unset, Change::Set)),
        };
        Ok(Self {
            events_per_second: change(row.events_per_second)?,
            bytes_per_second: change(row.bytes_per_second)?,
            stored_bytes: change(row.stored_bytes)?,
            topics: change(row.topics)?,
            streams: change(row.streams)?,
        })
    }
}

pub(super) fn numbers(nodes: &BTreeSet<NodeId>) -> Vec<u64> {
    nodes.iter().map(|node| node.0).collect()
}

pub(super) fn nodes(numbers: &[u64]) -> BTreeSet<NodeId> {
    numbers.iter().copied().map(NodeId).collect()
}

pub(super) fn change(id: &[u8; 16], at: UnixNanos) -> ChangeRow {
    ChangeRow { id: raw(id), at: at.0, ..ChangeRow::default() }
}
