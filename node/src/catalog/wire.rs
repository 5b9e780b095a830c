//! The catalog's bytes: commands and answers in the log and between nodes, and the snapshot.
//!
//! ```text
//! version u8 = 1 ‖ crc32c u32, little endian, of version and body ‖ body: a protobuf message
//! ```
//! Rows are shared by all three, so a field is described once. Fields are only ever added. Format: docs/format.md.

mod moves;
mod nodes;
mod quota;
mod rows;
mod tenants;
mod topics;

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use ensign_proto::{ApiKeyId, ClusterVersion, GroupId, NodeId, ProjectId, RingId, TopicId};
use ensign_raft::env::UnixNanos;
use prost::Message;
use thiserror::Error;

use self::moves::{DefaultsRow, MoveRow, NodeStateRow, node_state_number, node_state_of, reason_number, reason_of};
use self::nodes::{RevokedNodeRow, number};
use self::quota::{ProjectQuotaRow, QuotaChangeRow, QuotaRow};
use self::rows::{
    ChangeRow, CommandKind, CommandRow, ResponseKind, ResponseRow, ResponsesRow, SnapshotRow, change, id, nodes,
    numbers, raw,
};
use self::tenants::{OrganizationRow, kid};
use self::topics::{TopicsRow, state_number, state_of};
use super::command::{Command, NewTopic, Outcome, Refusal, Response, TOPICS_BATCH_MAX};
use super::quota::Quota;
use super::records::{ApiKey, JoinToken, NodeRecord, Organization, Project, SigningKey, Topic};
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
        Command::CreateTopics(topics) => {
            CommandKind::CreateTopics(TopicsRow { topics: topics.iter().map(Into::into).collect() })
        }
        Command::SetTopicState { topic, state, at } => {
            CommandKind::SetTopicState(ChangeRow { state: state_number(*state), ..change(topic.as_bytes(), *at) })
        }
        Command::SetTopicPolicies { topic, policies, at } => CommandKind::SetTopicPolicies(ChangeRow {
            policies: Some(policies.into()),
            ..change(topic.as_bytes(), *at)
        }),
        Command::FinishDestroy { topic, at } => CommandKind::FinishDestroy(change(topic.as_bytes(), *at)),
        Command::SetTopicRing { topic, ring, at } => {
            let row = change(topic.as_bytes(), *at);
            CommandKind::SetTopicRing(ChangeRow { ring: raw(ring.as_bytes()), ..row })
        }
        Command::ShredApiKey { key, at } => CommandKind::ShredApiKey(change(key.as_bytes(), *at)),
        Command::CreateApiKey(key) => CommandKind::CreateApiKey(key.into()),
        Command::RevokeApiKey { key, at } => CommandKind::RevokeApiKey(change(key.as_bytes(), *at)),
        Command::AddSigningKey(key) => CommandKind::AddSigningKey(key.into()),
        Command::RetireSigningKey { kid, verifies_until } => {
            CommandKind::RetireSigningKey(change(kid, *verifies_until))
        }
        Command::SetQuota { project, change } => CommandKind::SetQuota(QuotaChangeRow {
            project: project.map(|project| raw(project.as_bytes())).unwrap_or_default(),
            limits: Some(change.into()),
        }),
        Command::SetAuthority(authority) => CommandKind::SetAuthority(authority.into()),
        Command::CreateJoinToken(token) => CommandKind::CreateJoinToken(token.into()),
        Command::RevokeJoinToken { token, at } => CommandKind::RevokeJoinToken(change(token, *at)),
        Command::Join(join) => CommandKind::Join(join.into()),
        Command::RevokeNode { node, at } => CommandKind::RevokeNode(RevokedNodeRow { node: node.0, at: at.0 }),
        Command::SetClusterVersion(version) => CommandKind::SetClusterVersion(version.0),
        Command::SetPlacementDefaults { founders, replication } => {
            CommandKind::SetPlacementDefaults(DefaultsRow { founders: numbers(founders), replication: *replication })
        }
        Command::SetNodeState { node, state, at } => {
            CommandKind::SetNodeState(NodeStateRow { node: node.0, state: node_state_number(*state), at: at.0 })
        }
        Command::AlterTopic { topic, placement, at } => {
            CommandKind::AlterTopic(MoveRow { placement: Some(placement.into()), at: at.0, ..MoveRow::of(*topic, 0) })
        }
        Command::StartMove { topic, assignment, target, reason, at } => CommandKind::StartMove(MoveRow {
            nodes: numbers(target),
            reason: reason_number(*reason),
            at: at.0,
            ..MoveRow::of(*topic, *assignment)
        }),
        Command::CancelMove { topic, assignment, at } => {
            CommandKind::CancelMove(MoveRow { at: at.0, ..MoveRow::of(*topic, *assignment) })
        }
        Command::FinishMove { topic, assignment, replicas } => {
            CommandKind::FinishMove(MoveRow { nodes: numbers(replicas), ..MoveRow::of(*topic, *assignment) })
        }
        Command::ReportMove { topic, assignment, report } => {
            CommandKind::ReportMove(MoveRow { report: Some(report.into()), ..MoveRow::of(*topic, *assignment) })
        }
    };
    frame(&CommandRow { kind: Some(kind) })
}

pub(super) fn decode_command(bytes: &Bytes) -> Result<Command, DecodeError> {
    let topic = |row: &ChangeRow| id::<TopicId>(&row.id, "topic");
    let row: CommandRow = unframe(bytes)?;
    Ok(match row.kind.ok_or(DecodeError::Invalid("command"))? {
        CommandKind::PutNode(row) => Command::PutNode(row.try_into()?),
        CommandKind::CreateOrganization(row) => {
            let Organization { id, name, created: at } = row.try_into()?;
            Command::CreateOrganization { id, name, at }
        }
        CommandKind::CreateProject(row) => Command::CreateProject(row.try_into()?),
        CommandKind::CreateTopic(row) => Command::CreateTopic(row.try_into()?),
        CommandKind::CreateTopics(row) => {
            if row.topics.len() > TOPICS_BATCH_MAX {
                return Err(DecodeError::Invalid("topics"));
            }
            let topics = row.topics.into_iter().map(NewTopic::try_from).collect::<Result<Vec<NewTopic>, _>>()?;
            // An id that is given twice would be answered differently the second time.
            let ids: BTreeSet<TopicId> = topics.iter().map(|topic| topic.id).collect();
            if ids.len() != topics.len() {
                return Err(DecodeError::Invalid("topics"));
            }
            Command::CreateTopics(topics)
        }
        CommandKind::SetTopicState(row) => {
            let state = state_of(row.state)?;
            Command::SetTopicState { topic: topic(&row)?, state, at: UnixNanos(row.at) }
        }
        CommandKind::SetTopicPolicies(row) => {
            let topic = topic(&row)?;
            Command::SetTopicPolicies { topic, policies: row.policies.into(), at: UnixNanos(row.at) }
        }
        CommandKind::FinishDestroy(row) => Command::FinishDestroy { topic: topic(&row)?, at: UnixNanos(row.at) },
        CommandKind::SetTopicRing(row) => {
            let ring = id::<RingId>(&row.ring, "ring")?;
            Command::SetTopicRing { topic: topic(&row)?, ring, at: UnixNanos(row.at) }
        }
        CommandKind::ShredApiKey(row) => {
            Command::ShredApiKey { key: id::<ApiKeyId>(&row.id, "API key")?, at: UnixNanos(row.at) }
        }
        CommandKind::CreateApiKey(row) => Command::CreateApiKey(row.try_into()?),
        CommandKind::RevokeApiKey(row) => {
            Command::RevokeApiKey { key: id::<ApiKeyId>(&row.id, "API key")?, at: UnixNanos(row.at) }
        }
        CommandKind::AddSigningKey(row) => Command::AddSigningKey(row.try_into()?),
        CommandKind::RetireSigningKey(row) => {
            Command::RetireSigningKey { kid: kid(&row.id)?, verifies_until: UnixNanos(row.at) }
        }
        CommandKind::SetQuota(row) => Command::SetQuota {
            project: (!row.project.is_empty()).then(|| id::<ProjectId>(&row.project, "project")).transpose()?,
            change: row.limits.unwrap_or_default().try_into()?,
        },
        CommandKind::SetAuthority(row) => Command::SetAuthority(row.into()),
        CommandKind::CreateJoinToken(row) => Command::CreateJoinToken(row.try_into()?),
        CommandKind::RevokeJoinToken(row) => Command::RevokeJoinToken { token: kid(&row.id)?, at: UnixNanos(row.at) },
        CommandKind::Join(row) => Command::Join(row.try_into()?),
        CommandKind::RevokeNode(row) => Command::RevokeNode { node: NodeId(row.node), at: UnixNanos(row.at) },
        CommandKind::SetClusterVersion(version) => Command::SetClusterVersion(ClusterVersion::or_first(version)),
        CommandKind::SetPlacementDefaults(row) => {
            Command::SetPlacementDefaults { founders: nodes(&row.founders), replication: row.replication }
        }
        CommandKind::SetNodeState(row) => {
            Command::SetNodeState { node: NodeId(row.node), state: node_state_of(row.state)?, at: UnixNanos(row.at) }
        }
        CommandKind::AlterTopic(row) => {
            Command::AlterTopic { topic: row.topic()?, placement: row.placement.into(), at: UnixNanos(row.at) }
        }
        CommandKind::StartMove(row) => Command::StartMove {
            topic: row.topic()?,
            assignment: row.assignment,
            target: nodes(&row.nodes),
            reason: reason_of(row.reason)?,
            at: UnixNanos(row.at),
        },
        CommandKind::CancelMove(row) => {
            Command::CancelMove { topic: row.topic()?, assignment: row.assignment, at: UnixNanos(row.at) }
        }
        CommandKind::FinishMove(row) => {
            Command::FinishMove { topic: row.topic()?, assignment: row.assignment, replicas: nodes(&row.nodes) }
        }
        CommandKind::ReportMove(row) => Command::ReportMove {
            topic: row.topic()?,
            assignment: row.assignment,
            report: row.report.ok_or(DecodeError::Invalid("report"))?.try_into()?,
        },
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
        Refusal::TopicQuota => 60,
        Refusal::TopicState(state) => 16 + state_number(state),
        Refusal::LifeOver => 40,
        Refusal::TokenUnknown => 41,
        Refusal::TokenExpired => 42,
        Refusal::TokenUsedUp => 43,
        Refusal::TokenRevoked => 44,
        Refusal::TokensTooMany => 45,
        Refusal::NodeRevoked => 46,
        Refusal::AuthorityExists => 47,
        Refusal::VersionTooOld => 90,
        Refusal::AddressTaken => 110,
        Refusal::NodeUnknown => 20,
        Refusal::NodeHolds => 22,
        Refusal::NodeActive => 23,
        Refusal::LastNode => 24,
        Refusal::MoveOn => 25,
        Refusal::NoMove => 26,
        Refusal::MoveStale => 27,
        Refusal::TargetUnusable => 28,
        Refusal::RegionForbidden => 29,
        Refusal::Replication => 30,
        Refusal::TooFewNodes => 31,
        Refusal::RegionUnknown => 32,
        Refusal::RingShredded => 33,
        Refusal::RingShared => 34,
        Refusal::NoRing => 35,
        Refusal::RingsTooMany => 36,
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
        60 => Refusal::TopicQuota,
        17..=19 => Refusal::TopicState(state_of(number - 16)?),
        40 => Refusal::LifeOver,
        41 => Refusal::TokenUnknown,
        42 => Refusal::TokenExpired,
        43 => Refusal::TokenUsedUp,
        44 => Refusal::TokenRevoked,
        45 => Refusal::TokensTooMany,
        46 => Refusal::NodeRevoked,
        47 => Refusal::AuthorityExists,
        90 => Refusal::VersionTooOld,
        110 => Refusal::AddressTaken,
        20 => Refusal::NodeUnknown,
        22 => Refusal::NodeHolds,
        23 => Refusal::NodeActive,
        24 => Refusal::LastNode,
        25 => Refusal::MoveOn,
        26 => Refusal::NoMove,
        27 => Refusal::MoveStale,
        28 => Refusal::TargetUnusable,
        29 => Refusal::RegionForbidden,
        30 => Refusal::Replication,
        31 => Refusal::TooFewNodes,
        32 => Refusal::RegionUnknown,
        33 => Refusal::RingShredded,
        34 => Refusal::RingShared,
        35 => Refusal::NoRing,
        36 => Refusal::RingsTooMany,
        _ => return Err(DecodeError::Invalid("refusal")),
    })
}

/// An answer as it travels between nodes.
pub(super) fn encode_response(response: &Response) -> Bytes {
    frame(&response_row(response))
}

fn response_row(response: &Response) -> ResponseRow {
    let kind = match response {
        Err(refusal) => ResponseKind::Refusal(refusal_number(*refusal)),
        Ok(Outcome::Done) => ResponseKind::Done(true),
        Ok(Outcome::Organization(org)) => ResponseKind::Organization((&**org).into()),
        Ok(Outcome::Project(project)) => ResponseKind::Project((&**project).into()),
        Ok(Outcome::Topic(topic)) => ResponseKind::Topic((&**topic).into()),
        Ok(Outcome::Topics(each)) => {
            let row = |topic: &Result<Arc<Topic>, Refusal>| response_row(&topic.clone().map(Outcome::Topic));
            ResponseKind::Topics(ResponsesRow { each: each.iter().map(row).collect() })
        }
        Ok(Outcome::ApiKey(key)) => ResponseKind::ApiKey((&**key).into()),
        Ok(Outcome::Node(node)) => ResponseKind::Node((&**node).into()),
    };
    ResponseRow { kind: Some(kind) }
}

pub(super) fn decode_response(bytes: &Bytes) -> Result<Response, DecodeError> {
    response_of(unframe(bytes)?)
}

fn response_of(row: ResponseRow) -> Result<Response, DecodeError> {
    Ok(match row.kind.ok_or(DecodeError::Invalid("response"))? {
        ResponseKind::Refusal(number) => Err(refusal_of(number)?),
        ResponseKind::Done(_) => Ok(Outcome::Done),
        ResponseKind::Organization(row) => Ok(Outcome::Organization(Arc::new(row.try_into()?))),
        ResponseKind::Project(row) => Ok(Outcome::Project(Arc::new(row.try_into()?))),
        ResponseKind::Topic(row) => Ok(Outcome::Topic(Arc::new(row.try_into()?))),
        ResponseKind::Topics(row) => {
            let topic = |row| match response_of(row)? {
                Ok(Outcome::Topic(topic)) => Ok(Ok(topic)),
                Err(refusal) => Ok(Err(refusal)),
                Ok(_) => Err(DecodeError::Invalid("topics")),
            };
            Ok(Outcome::Topics(row.each.into_iter().map(topic).collect::<Result<_, _>>()?))
        }
        ResponseKind::ApiKey(row) => Ok(Outcome::ApiKey(Arc::new(row.try_into()?))),
        ResponseKind::Node(row) => Ok(Outcome::Node(Arc::new(row.try_into()?))),
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
        default_quota: (!state.default_quota.is_empty()).then(|| (&state.default_quota).into()),
        quotas: state
            .quotas
            .iter()
            .map(|(project, quota)| ProjectQuotaRow { project: raw(project.as_bytes()), limits: Some(quota.into()) })
            .collect(),
        authority: state.authority.as_deref().map(Into::into),
        join_tokens: state.join_tokens.values().map(|token| (&**token).into()).collect(),
        next_node: state.next_node.0,
        revoked_nodes: state.revoked_nodes.iter().map(|(node, at)| RevokedNodeRow { node: node.0, at: at.0 }).collect(),
        version: number(state.version),
        defaults: state.defaults.as_ref().map(Into::into),
    })
}

fn limits(row: Option<QuotaRow>) -> Result<Quota, DecodeError> {
    row.unwrap_or_default().try_into()
}

pub(super) fn decode_snapshot(bytes: &Bytes) -> Result<(State, u64), DecodeError> {
    let row: SnapshotRow = unframe(bytes)?;
    let mut state = State::default();
    state.next_group = state.next_group.max(GroupId(row.next_group));
    state.version = ClusterVersion::or_first(row.version);
    state.defaults = row.defaults.map(Into::into);
    state.authority = row.authority.map(|authority| Arc::new(authority.into()));
    for token in row.join_tokens {
        let token = JoinToken::try_from(token)?;
        state.join_tokens.insert(token.id, Arc::new(token));
    }
    state.next_node = state.next_node.max(NodeId(row.next_node));
    state.revoked_nodes = row.revoked_nodes.iter().map(|row| (NodeId(row.node), UnixNanos(row.at))).collect();
    for node in row.nodes {
        let node = NodeRecord::try_from(node)?;
        state.next_node = state.next_node.max(NodeId(node.id.0.saturating_add(1)));
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
    state.default_quota = limits(row.default_quota)?;
    for row in row.quotas {
        state.quotas.insert(id::<ProjectId>(&row.project, "project")?, limits(row.limits)?);
    }
    Ok((state.with_indexes(), row.applied))
}
