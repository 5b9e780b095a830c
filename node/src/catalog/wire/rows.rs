//! Rows: how commands, answers and the snapshot look in bytes. Those of records are beside this file, by kind, and shared by all
//! three, so that a field is described once.

use std::collections::BTreeSet;

use bytes::Bytes;
use ensign_proto::NodeId;
use ensign_raft::env::UnixNanos;
use prost::Message;

use super::DecodeError;
use super::moves::{DefaultsRow, MoveRow, NodeStateRow};
use super::nodes::{AuthorityRow, JoinRow, JoinTokenRow, NodeRow, RevokedNodeRow};
use super::quota::{ProjectQuotaRow, QuotaChangeRow, QuotaRow};
use super::tenants::{ApiKeyRow, OrganizationRow, ProjectRow, SigningKeyRow};
use super::topics::{PoliciesRow, TopicRow, TopicsRow};

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
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) ring: Bytes,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CommandRow {
    #[prost(
        oneof = "CommandKind",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23, 24, 25, 26, 27, 28, 40, 41, 42, 43, 44, 60, 80, 90"
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
    #[prost(message, tag = "27")]
    SetTopicRing(ChangeRow),
    #[prost(message, tag = "28")]
    ShredApiKey(ChangeRow),
    #[prost(message, tag = "60")]
    SetQuota(QuotaChangeRow),
    #[prost(message, tag = "80")]
    CreateTopics(TopicsRow),
    #[prost(uint32, tag = "90")]
    SetClusterVersion(u32),
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

pub(super) fn id<'a, T: TryFrom<&'a [u8]>>(bytes: &'a Bytes, what: &'static str) -> Result<T, DecodeError> {
    T::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid(what))
}

pub(super) fn raw(id: &[u8; 16]) -> Bytes {
    Bytes::copy_from_slice(id)
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
