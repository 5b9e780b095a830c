//! The catalog's bytes: commands and answers in the log and between nodes, and the snapshot.
//!
//! ```text
//! version u8 = 1 ‖ crc32c u32, little endian, of version and body ‖ body: a protobuf message
//! ```
//! Rows are shared by all three, so a field is described once. Fields are only ever added. Format: docs/format.md.

use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use ensign_proto::{
    ApiKeyId, GroupId, NodeId, OrgId, Partition, Permission, PermissionSet, ProjectId, RingId, TopicId, TopicName,
};
use ensign_raft::env::UnixNanos;
use prost::Message;
use thiserror::Error;

use super::command::{Command, NewTopic, Outcome, Refusal, Response};
use super::records::{ApiKey, NodeRecord, Organization, Project, SigningKey, Topic, TopicPolicies, TopicState};
use super::state::State;

const VERSION: u8 = 1;
const HEAD: usize = 5;

/// Bytes that are not what they were taken for. Nothing was changed by them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// Too short, or the checksum is wrong: damaged on the way or on disk.
    #[error("damaged catalog bytes")]
    Damaged,
    /// Written by a newer version: upgrade this node.
    #[error("catalog format {0} is newer than this version knows")]
    Newer(u8),
    /// A field cannot be what it is.
    #[error("invalid catalog field: {0}")]
    Invalid(&'static str),
}

#[derive(Clone, PartialEq, Message)]
struct NodeRow {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(string, tag = "2")]
    peer: String,
    #[prost(string, tag = "3")]
    grpc: String,
    #[prost(string, tag = "4")]
    http: String,
}

#[derive(Clone, PartialEq, Message)]
struct OrganizationRow {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(uint64, tag = "3")]
    created: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ProjectRow {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    org: Bytes,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(bytes = "bytes", tag = "4")]
    ring: Bytes,
    #[prost(uint64, tag = "5")]
    created: u64,
}

#[derive(Clone, PartialEq, Message)]
struct PoliciesRow {
    #[prost(bytes = "bytes", tag = "1")]
    deduplication: Bytes,
    #[prost(int32, tag = "2")]
    sharding: i32,
}

#[derive(Clone, PartialEq, Message)]
struct TopicRow {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    project: Bytes,
    // Empty in a command, which leaves it to the catalog.
    #[prost(bytes = "bytes", tag = "3")]
    org: Bytes,
    #[prost(string, tag = "4")]
    name: String,
    // Likewise zero in a command.
    #[prost(uint64, tag = "5")]
    group: u64,
    #[prost(bytes = "bytes", tag = "6")]
    ring: Bytes,
    // 1 ready, 2 readonly, 3 deleting; 0 in a command.
    #[prost(uint32, tag = "7")]
    state: u32,
    #[prost(message, optional, tag = "8")]
    policies: Option<PoliciesRow>,
    #[prost(uint64, tag = "9")]
    created: u64,
    #[prost(uint64, tag = "10")]
    modified: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ApiKeyRow {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(string, tag = "2")]
    client_id: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(bytes = "bytes", tag = "4")]
    org: Bytes,
    // Empty for none.
    #[prost(bytes = "bytes", tag = "5")]
    project: Bytes,
    // Wire strings: numbers could be renumbered by mistake.
    #[prost(string, repeated, tag = "6")]
    permissions: Vec<String>,
    #[prost(bool, tag = "7")]
    admin: bool,
    #[prost(uint64, tag = "8")]
    created: u64,
    #[prost(uint64, optional, tag = "9")]
    revoked_at: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct SigningKeyRow {
    #[prost(bytes = "bytes", tag = "1")]
    kid: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    public_key: Bytes,
    #[prost(uint64, tag = "3")]
    created: u64,
    #[prost(uint64, tag = "4")]
    signs_from: u64,
    #[prost(uint64, optional, tag = "5")]
    verifies_until: Option<u64>,
}

/// Something happens to the record of this id.
#[derive(Clone, PartialEq, Message)]
struct ChangeRow {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(uint64, tag = "2")]
    at: u64,
    #[prost(uint32, tag = "3")]
    state: u32,
    #[prost(message, optional, tag = "4")]
    policies: Option<PoliciesRow>,
}

#[derive(Clone, PartialEq, Message)]
struct CommandRow {
    #[prost(oneof = "CommandKind", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
    kind: Option<CommandKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum CommandKind {
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
}

#[derive(Clone, PartialEq, Message)]
struct ResponseRow {
    #[prost(oneof = "ResponseKind", tags = "1, 2, 3, 4, 5, 6")]
    kind: Option<ResponseKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum ResponseKind {
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
}

#[derive(Clone, PartialEq, Message)]
struct SnapshotRow {
    #[prost(uint64, tag = "1")]
    next_group: u64,
    #[prost(message, repeated, tag = "2")]
    nodes: Vec<NodeRow>,
    #[prost(message, repeated, tag = "3")]
    organizations: Vec<OrganizationRow>,
    #[prost(message, repeated, tag = "4")]
    projects: Vec<ProjectRow>,
    #[prost(message, repeated, tag = "5")]
    topics: Vec<TopicRow>,
    #[prost(message, repeated, tag = "6")]
    api_keys: Vec<ApiKeyRow>,
    #[prost(message, repeated, tag = "7")]
    signing_keys: Vec<SigningKeyRow>,
    #[prost(message, repeated, tag = "8")]
    tombstones: Vec<ChangeRow>,
    // The last entry that the state holds.
    #[prost(uint64, tag = "9")]
    applied: u64,
}

fn frame(body: &impl Message) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEAD + body.encoded_len());
    bytes.put_u8(VERSION);
    bytes.put_u32_le(0);
    // A `BytesMut` grows, so encoding into it cannot run out of room.
    body.encode(&mut bytes).expect("a growing buffer has room");
    let crc = checksum(&bytes);
    bytes[1..HEAD].copy_from_slice(&crc.to_le_bytes());
    bytes.freeze()
}

fn unframe<M: Message + Default>(bytes: &Bytes) -> Result<M, DecodeError> {
    let head = bytes.get(..HEAD).ok_or(DecodeError::Damaged)?;
    // The checksum first: a flipped version bit is damage, not the future.
    if head[1..] != checksum(bytes).to_le_bytes() {
        return Err(DecodeError::Damaged);
    }
    if head[0] != VERSION {
        return Err(DecodeError::Newer(head[0]));
    }
    M::decode(bytes.slice(HEAD..)).map_err(|_| DecodeError::Invalid("message"))
}

fn checksum(framed: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&framed[..1]), &framed[HEAD..])
}

fn id<'a, T: TryFrom<&'a [u8]>>(bytes: &'a Bytes, what: &'static str) -> Result<T, DecodeError> {
    T::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid(what))
}

fn kid(bytes: &Bytes) -> Result<[u8; 16], DecodeError> {
    <[u8; 16]>::try_from(&bytes[..]).map_err(|_| DecodeError::Invalid("kid"))
}

fn raw(id: &[u8; 16]) -> Bytes {
    Bytes::copy_from_slice(id)
}

impl From<&NodeRecord> for NodeRow {
    fn from(node: &NodeRecord) -> Self {
        Self { id: node.id.0, peer: node.peer.clone(), grpc: node.grpc.clone(), http: node.http.clone() }
    }
}

impl From<NodeRow> for NodeRecord {
    fn from(row: NodeRow) -> Self {
        Self { id: NodeId(row.id), peer: row.peer, grpc: row.grpc, http: row.http }
    }
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

fn state_number(state: TopicState) -> u32 {
    match state {
        TopicState::Ready => 1,
        TopicState::Readonly => 2,
        TopicState::Deleting => 3,
    }
}

fn state_of(number: u32) -> Result<TopicState, DecodeError> {
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

fn change(id: &[u8; 16], at: UnixNanos) -> ChangeRow {
    ChangeRow { id: raw(id), at: at.0, ..ChangeRow::default() }
}

pub(super) fn encode_command(command: &Command) -> Bytes {
    let kind = match command {
        Command::PutNode(node) => CommandKind::PutNode(node.into()),
        Command::CreateOrganization { id, name, at } => CommandKind::CreateOrganization(OrganizationRow {
            id: raw(id.as_bytes()),
            name: name.clone(),
            created: at.0,
        }),
        Command::CreateProject(project) => CommandKind::CreateProject(project.into()),
        Command::CreateTopic(topic) => CommandKind::CreateTopic(topic.into()),
        Command::SetTopicState { topic, state, at } => {
            CommandKind::SetTopicState(ChangeRow { state: state_number(*state), ..change(topic.as_bytes(), *at) })
        }
        Command::SetTopicPolicies { topic, policies, at } => CommandKind::SetTopicPolicies(ChangeRow {
            policies: Some(policies.into()),
            ..change(topic.as_bytes(), *at)
        }),
        Command::FinishDestroy { topic, at } => CommandKind::FinishDestroy(change(topic.as_bytes(), *at)),
        Command::CreateApiKey(key) => CommandKind::CreateApiKey(key.into()),
        Command::RevokeApiKey { key, at } => CommandKind::RevokeApiKey(change(key.as_bytes(), *at)),
        Command::AddSigningKey(key) => CommandKind::AddSigningKey(key.into()),
        Command::RetireSigningKey { kid, verifies_until } => {
            CommandKind::RetireSigningKey(change(kid, *verifies_until))
        }
    };
    frame(&CommandRow { kind: Some(kind) })
}

pub(super) fn decode_command(bytes: &Bytes) -> Result<Command, DecodeError> {
    let topic = |row: &ChangeRow| id::<TopicId>(&row.id, "topic");
    let row: CommandRow = unframe(bytes)?;
    Ok(match row.kind.ok_or(DecodeError::Invalid("command"))? {
        CommandKind::PutNode(row) => Command::PutNode(row.into()),
        CommandKind::CreateOrganization(row) => {
            let Organization { id, name, created: at } = row.try_into()?;
            Command::CreateOrganization { id, name, at }
        }
        CommandKind::CreateProject(row) => Command::CreateProject(row.try_into()?),
        CommandKind::CreateTopic(row) => Command::CreateTopic(row.try_into()?),
        CommandKind::SetTopicState(row) => {
            let state = state_of(row.state)?;
            Command::SetTopicState { topic: topic(&row)?, state, at: UnixNanos(row.at) }
        }
        CommandKind::SetTopicPolicies(row) => {
            let topic = topic(&row)?;
            Command::SetTopicPolicies { topic, policies: row.policies.into(), at: UnixNanos(row.at) }
        }
        CommandKind::FinishDestroy(row) => Command::FinishDestroy { topic: topic(&row)?, at: UnixNanos(row.at) },
        CommandKind::CreateApiKey(row) => Command::CreateApiKey(row.try_into()?),
        CommandKind::RevokeApiKey(row) => {
            Command::RevokeApiKey { key: id::<ApiKeyId>(&row.id, "API key")?, at: UnixNanos(row.at) }
        }
        CommandKind::AddSigningKey(row) => Command::AddSigningKey(row.try_into()?),
        CommandKind::RetireSigningKey(row) => {
            Command::RetireSigningKey { kid: kid(&row.id)?, verifies_until: UnixNanos(row.at) }
        }
    })
}

fn refusal_number(refusal: Refusal) -> u32 {
    match refusal {
        Refusal::OrganizationUnknown => 1,
        Refusal::ProjectUnknown => 2,
        Refusal::TopicUnknown => 3,
        Refusal::ApiKeyUnknown => 4,
        Refusal::SigningKeyUnknown => 5,
        Refusal::NameTaken => 6,
        Refusal::IdTaken => 7,
        Refusal::Unreadable => 8,
        Refusal::TopicState(state) => 16 + state_number(state),
    }
}

fn refusal_of(number: u32) -> Result<Refusal, DecodeError> {
    Ok(match number {
        1 => Refusal::OrganizationUnknown,
        2 => Refusal::ProjectUnknown,
        3 => Refusal::TopicUnknown,
        4 => Refusal::ApiKeyUnknown,
        5 => Refusal::SigningKeyUnknown,
        6 => Refusal::NameTaken,
        7 => Refusal::IdTaken,
        8 => Refusal::Unreadable,
        17..=19 => Refusal::TopicState(state_of(number - 16)?),
        _ => return Err(DecodeError::Invalid("refusal")),
    })
}

/// An answer as it travels between nodes.
pub(super) fn encode_response(response: &Response) -> Bytes {
    let kind = match response {
        Err(refusal) => ResponseKind::Refusal(refusal_number(*refusal)),
        Ok(Outcome::Done) => ResponseKind::Done(true),
        Ok(Outcome::Organization(org)) => ResponseKind::Organization((&**org).into()),
        Ok(Outcome::Project(project)) => ResponseKind::Project((&**project).into()),
        Ok(Outcome::Topic(topic)) => ResponseKind::Topic((&**topic).into()),
        Ok(Outcome::ApiKey(key)) => ResponseKind::ApiKey((&**key).into()),
    };
    frame(&ResponseRow { kind: Some(kind) })
}

pub(super) fn decode_response(bytes: &Bytes) -> Result<Response, DecodeError> {
    let row: ResponseRow = unframe(bytes)?;
    Ok(match row.kind.ok_or(DecodeError::Invalid("response"))? {
        ResponseKind::Refusal(number) => Err(refusal_of(number)?),
        ResponseKind::Done(_) => Ok(Outcome::Done),
        ResponseKind::Organization(row) => Ok(Outcome::Organization(Arc::new(row.try_into()?))),
        ResponseKind::Project(row) => Ok(Outcome::Project(Arc::new(row.try_into()?))),
        ResponseKind::Topic(row) => Ok(Outcome::Topic(Arc::new(row.try_into()?))),
        ResponseKind::ApiKey(row) => Ok(Outcome::ApiKey(Arc::new(row.try_into()?))),
    })
}

pub(super) fn encode_snapshot(state: &State, applied: u64) -> Bytes {
    frame(&SnapshotRow {
        next_group: state.next_group.0,
        nodes: state.nodes.values().map(|node| (&**node).into()).collect(),
        organizations: state.organizations.values().map(|org| (&**org).into()).collect(),
        projects: state.projects.values().map(|project| (&**project).into()).collect(),
        topics: state.topics.values().map(|topic| (&**topic).into()).collect(),
        api_keys: state.api_keys.values().map(|key| (&**key).into()).collect(),
        signing_keys: state.signing_keys.values().map(|key| (&**key).into()).collect(),
        tombstones: state.tombstones.iter().map(|(topic, since)| change(topic.as_bytes(), *since)).collect(),
        applied,
    })
}

pub(super) fn decode_snapshot(bytes: &Bytes) -> Result<(State, u64), DecodeError> {
    let row: SnapshotRow = unframe(bytes)?;
    let mut state = State::default();
    state.next_group = state.next_group.max(GroupId(row.next_group));
    for node in row.nodes {
        let node = NodeRecord::from(node);
        state.nodes.insert(node.id, Arc::new(node));
    }
    for org in row.organizations {
        let org = Organization::try_from(org)?;
        state.organizations.insert(org.id, Arc::new(org));
    }
    for project in row.projects {
        let project = Project::try_from(project)?;
        state.projects.insert(project.id, Arc::new(project));
    }
    for topic in row.topics {
        let topic = Topic::try_from(topic)?;
        // A group that is handed out twice would mix two topics' events.
        if topic.group >= state.next_group {
            return Err(DecodeError::Invalid("group"));
        }
        state.topics.insert(topic.id, Arc::new(topic));
    }
    for key in row.api_keys {
        let key = ApiKey::try_from(key)?;
        state.api_keys.insert(key.id, Arc::new(key));
    }
    for key in row.signing_keys {
        let key = SigningKey::try_from(key)?;
        state.signing_keys.insert(key.kid, Arc::new(key));
    }
    for tombstone in row.tombstones {
        state.tombstones.insert(id::<TopicId>(&tombstone.id, "topic")?, UnixNanos(tombstone.at));
    }
    Ok((state.with_indexes(), row.applied))
}
