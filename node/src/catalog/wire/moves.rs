//! Rows of placement: node states, where a topic may be, and its move.

use bytes::Bytes;
use ensign_proto::{NodeId, TopicId};
use ensign_raft::env::UnixNanos;
use prost::Message;

use super::DecodeError;
use super::rows::{id, nodes, numbers, raw};
use crate::catalog::moves::{MovePhase, MoveReason, MoveReport, NodeState, Placement, PlacementDefaults, Reassignment};

#[derive(Clone, PartialEq, Message)]
pub(super) struct DefaultsRow {
    #[prost(uint64, repeated, tag = "1")]
    pub(super) founders: Vec<u64>,
    #[prost(uint32, tag = "2")]
    pub(super) replication: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct NodeStateRow {
    #[prost(uint64, tag = "1")]
    pub(super) node: u64,
    #[prost(uint32, tag = "2")]
    pub(super) state: u32,
    #[prost(uint64, tag = "3")]
    pub(super) at: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PlacementRow {
    #[prost(uint32, tag = "1")]
    replication: u32,
    // Ascending.
    #[prost(string, repeated, tag = "2")]
    regions: Vec<String>,
    #[prost(string, tag = "3")]
    leader_region: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ReassignmentRow {
    // Ascending.
    #[prost(uint64, repeated, tag = "1")]
    target: Vec<u64>,
    // 1 operator, 2 drain, 3 lost, 4 rebalance, 5 policy.
    #[prost(uint32, tag = "2")]
    reason: u32,
    #[prost(uint64, tag = "3")]
    started: u64,
    #[prost(bool, tag = "4")]
    cancelled: bool,
    #[prost(message, optional, tag = "5")]
    report: Option<ReportRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ReportRow {
    // 1 waiting, 2 catching up, 3 switching, 4 handing over.
    #[prost(uint32, tag = "1")]
    phase: u32,
    #[prost(uint64, tag = "2")]
    behind: u64,
    #[prost(string, tag = "3")]
    waiting: String,
    #[prost(uint64, tag = "4")]
    by: u64,
    #[prost(uint64, tag = "5")]
    at: u64,
}

/// Something happens to the placement, or the move, of a topic.
#[derive(Clone, PartialEq, Message)]
pub(super) struct MoveRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) topic: Bytes,
    #[prost(uint64, tag = "2")]
    pub(super) assignment: u64,
    #[prost(uint64, repeated, tag = "3")]
    pub(super) nodes: Vec<u64>,
    #[prost(uint32, tag = "4")]
    pub(super) reason: u32,
    #[prost(uint64, tag = "5")]
    pub(super) at: u64,
    #[prost(message, optional, tag = "6")]
    pub(super) report: Option<ReportRow>,
    #[prost(message, optional, tag = "7")]
    pub(super) placement: Option<PlacementRow>,
}

impl MoveRow {
    pub(super) fn of(topic: TopicId, assignment: u64) -> Self {
        Self { topic: raw(topic.as_bytes()), assignment, ..Self::default() }
    }

    pub(super) fn topic(&self) -> Result<TopicId, DecodeError> {
        id::<TopicId>(&self.topic, "topic")
    }
}

pub(super) fn node_state_number(state: NodeState) -> u32 {
    match state {
        NodeState::Active => 0,
        NodeState::Draining => 1,
        NodeState::Removed => 2,
    }
}

pub(super) fn node_state_of(number: u32) -> Result<NodeState, DecodeError> {
    match number {
        0 => Ok(NodeState::Active),
        1 => Ok(NodeState::Draining),
        2 => Ok(NodeState::Removed),
        _ => Err(DecodeError::Invalid("node state")),
    }
}

pub(super) fn reason_number(reason: MoveReason) -> u32 {
    match reason {
        MoveReason::Operator => 1,
        MoveReason::Drain => 2,
        MoveReason::Lost => 3,
        MoveReason::Rebalance => 4,
        MoveReason::Policy => 5,
    }
}

pub(super) fn reason_of(number: u32) -> Result<MoveReason, DecodeError> {
    match number {
        1 => Ok(MoveReason::Operator),
        2 => Ok(MoveReason::Drain),
        3 => Ok(MoveReason::Lost),
        4 => Ok(MoveReason::Rebalance),
        5 => Ok(MoveReason::Policy),
        _ => Err(DecodeError::Invalid("move reason")),
    }
}

fn phase_number(phase: MovePhase) -> u32 {
    match phase {
        MovePhase::Waiting => 1,
        MovePhase::CatchingUp => 2,
        MovePhase::Switching => 3,
        MovePhase::HandingOver => 4,
    }
}

fn phase_of(number: u32) -> Result<MovePhase, DecodeError> {
    match number {
        1 => Ok(MovePhase::Waiting),
        2 => Ok(MovePhase::CatchingUp),
        3 => Ok(MovePhase::Switching),
        4 => Ok(MovePhase::HandingOver),
        _ => Err(DecodeError::Invalid("move phase")),
    }
}

impl From<&PlacementDefaults> for DefaultsRow {
    fn from(defaults: &PlacementDefaults) -> Self {
        Self { founders: numbers(&defaults.founders), replication: defaults.replication }
    }
}

impl From<DefaultsRow> for PlacementDefaults {
    fn from(row: DefaultsRow) -> Self {
        Self { founders: nodes(&row.founders), replication: row.replication }
    }
}

impl From<&Placement> for PlacementRow {
    fn from(placement: &Placement) -> Self {
        Self {
            replication: placement.replication,
            regions: placement.regions.iter().cloned().collect(),
            leader_region: placement.leader_region.clone(),
        }
    }
}

/// Absent where nothing is kept, as in what was written before.
pub(super) fn placement_row(placement: &Placement) -> Option<PlacementRow> {
    (*placement != Placement::default()).then(|| placement.into())
}

impl From<Option<PlacementRow>> for Placement {
    fn from(row: Option<PlacementRow>) -> Self {
        let row = row.unwrap_or_default();
        let regions = row.regions.into_iter().collect();
        Self { replication: row.replication, regions, leader_region: row.leader_region }
    }
}

impl From<&Reassignment> for ReassignmentRow {
    fn from(on: &Reassignment) -> Self {
        Self {
            target: numbers(&on.target),
            reason: reason_number(on.reason),
            started: on.started.0,
            cancelled: on.cancelled,
            report: on.report.as_ref().map(Into::into),
        }
    }
}

impl TryFrom<ReassignmentRow> for Reassignment {
    type Error = DecodeError;

    fn try_from(row: ReassignmentRow) -> Result<Self, DecodeError> {
        Ok(Self {
            target: nodes(&row.target),
            reason: reason_of(row.reason)?,
            started: UnixNanos(row.started),
            cancelled: row.cancelled,
            report: row.report.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<&MoveReport> for ReportRow {
    fn from(report: &MoveReport) -> Self {
        Self {
            phase: phase_number(report.phase),
            behind: report.behind,
            waiting: report.waiting.clone(),
            by: report.by.0,
            at: report.at.0,
        }
    }
}

impl TryFrom<ReportRow> for MoveReport {
    type Error = DecodeError;

    fn try_from(row: ReportRow) -> Result<Self, DecodeError> {
        Ok(Self {
            phase: phase_of(row.phase)?,
            behind: row.behind,
            waiting: row.waiting,
            by: NodeId(row.by),
            at: UnixNanos(row.at),
        })
    }
}
