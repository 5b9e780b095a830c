//! Rows of topics.

use bytes::Bytes;
use ensign_proto::{GroupId, OrgId, Partition, ProjectId, RingId, TopicId, TopicName};
use ensign_raft::env::UnixNanos;
use prost::Message;

use super::DecodeError;
use super::moves::{PlacementRow, ReassignmentRow, placement_row};
use super::rows::{id, nodes, numbers, raw};
use crate::catalog::command::NewTopic;
use crate::catalog::records::{Topic, TopicPolicies, TopicState};

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
    // Ascending. Empty in what was written before a topic's ring could change.
    #[prost(bytes = "bytes", repeated, tag = "23")]
    pub(super) former_rings: Vec<Bytes>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct TopicsRow {
    #[prost(message, repeated, tag = "1")]
    pub(super) topics: Vec<TopicRow>,
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
            former_rings: topic.former_rings.iter().map(|ring| raw(ring.as_bytes())).collect(),
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
            former_rings: row.former_rings.iter().map(|ring| id(ring, "ring")).collect::<Result<_, _>>()?,
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
