//! Nodes and partitions as they are printed.

use ensign_client::admin_api as pb;
use serde::Serialize;

use crate::cli::output::{thousands, wire_time};

#[derive(Serialize)]
pub(super) struct ShownNode {
    pub(super) id: u64,
    pub(super) name: String,
    pub(super) state: &'static str,
    pub(super) alive: bool,
    pub(super) lost: bool,
    pub(super) silent_seconds: Option<u64>,
    pub(super) region: String,
    pub(super) zone: String,
    pub(super) address: String,
    pub(super) replicas: u64,
    pub(super) arriving: u64,
    pub(super) leaving: u64,
    pub(super) stuck: Vec<String>,
    /// The cluster's own groups in which it votes, as far as the node that was asked knows.
    pub(super) votes: Vec<String>,
    /// Its machine has joined, and has never served.
    pub(super) never_seen: bool,
}

impl From<pb::Node> for ShownNode {
    fn from(node: pb::Node) -> Self {
        let state = match node.state() {
            pb::NodeState::Unspecified => "unknown",
            pb::NodeState::Active => "active",
            pb::NodeState::Draining => "draining",
            pb::NodeState::Removed => "removed",
        };
        let silent_seconds = node.silent_for.as_ref().map(|silent| u64::try_from(silent.seconds).unwrap_or_default());
        Self {
            id: node.id,
            name: node.name,
            state,
            alive: silent_seconds.is_none() && !node.never_started && state != "removed",
            lost: node.lost,
            silent_seconds,
            region: node.region,
            zone: node.zone,
            address: node.address,
            replicas: node.replicas,
            arriving: node.arriving,
            leaving: node.leaving,
            stuck: node.stuck,
            votes: node.votes,
            never_seen: node.never_started,
        }
    }
}

impl ShownNode {
    /// Whether it answers, for people.
    pub(super) fn pulse(&self) -> String {
        match self.silent_seconds {
            _ if self.state == "removed" => String::new(),
            _ if self.never_seen => "never seen".to_owned(),
            None => "yes".to_owned(),
            Some(seconds) if self.lost => format!("lost, silent for {seconds} s"),
            Some(seconds) => format!("silent for {seconds} s"),
        }
    }

    pub(super) fn row(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.state.to_owned(),
            self.pulse(),
            self.region.clone(),
            self.zone.clone(),
            self.address.clone(),
            thousands(self.replicas),
            thousands(self.arriving),
            thousands(self.leaving),
        ]
    }
}

pub(super) const NODE_HEADINGS: [&str; 9] =
    ["id", "state", "answers", "region", "zone", "address", "replicas", "arriving", "leaving"];

#[derive(Serialize)]
pub(super) struct ShownMove {
    pub(super) target: Vec<u64>,
    pub(super) reason: &'static str,
    pub(super) cancelled: bool,
    pub(super) phase: &'static str,
    pub(super) behind: u64,
    pub(super) waiting: String,
    pub(super) started: Option<String>,
    pub(super) reported: Option<String>,
}

impl From<pb::Move> for ShownMove {
    fn from(on: pb::Move) -> Self {
        let reason = match on.reason() {
            pb::MoveReason::Unspecified => "unknown",
            pb::MoveReason::Operator => "operator",
            pb::MoveReason::Drain => "drain",
            pb::MoveReason::Lost => "lost node",
            pb::MoveReason::Rebalance => "rebalance",
            pb::MoveReason::Policy => "placement",
        };
        let phase = match on.phase() {
            pb::MovePhase::Unspecified => "queued",
            pb::MovePhase::Waiting => "waiting",
            pb::MovePhase::CatchingUp => "catching up",
            pb::MovePhase::Switching => "switching",
            pb::MovePhase::HandingOver => "handing over",
        };
        Self {
            reason,
            phase,
            cancelled: on.cancelled,
            behind: on.behind,
            started: wire_time(on.started.as_ref()),
            reported: wire_time(on.reported.as_ref()),
            waiting: on.waiting,
            target: on.target,
        }
    }
}

impl ShownMove {
    pub(super) fn sentence(&self) -> String {
        let behind = match self.behind {
            0 => String::new(),
            behind => format!(", {} entries behind", thousands(behind)),
        };
        let waiting = if self.waiting.is_empty() { String::new() } else { format!(": {}", self.waiting) };
        let cancelled = if self.cancelled { ", cancelled" } else { "" };
        format!("to {} ({}): {}{behind}{waiting}{cancelled}", numbers(&self.target), self.reason, self.phase)
    }
}

#[derive(Serialize)]
pub(super) struct ShownPartition {
    pub(super) topic: String,
    pub(super) topic_id: String,
    pub(super) project: String,
    pub(super) group: u64,
    pub(super) replicas: Vec<u64>,
    pub(super) silent: Vec<u64>,
    pub(super) replication: u32,
    pub(super) regions: Vec<String>,
    pub(super) leader_region: String,
    pub(super) leader: Option<u64>,
    pub(super) preferred_leader: Option<u64>,
    pub(super) assignment: u64,
    #[serde(rename = "move")]
    pub(super) on: Option<ShownMove>,
    pub(super) stuck: String,
}

impl From<pb::PartitionInfo> for ShownPartition {
    fn from(partition: pb::PartitionInfo) -> Self {
        let placement = partition.placement.unwrap_or_default();
        let some = |node: u64| (node != 0).then_some(node);
        Self {
            topic: partition.topic,
            topic_id: partition.topic_id,
            project: partition.project_id,
            group: partition.group,
            replicas: partition.replicas,
            silent: partition.silent,
            replication: placement.replication,
            regions: placement.regions,
            leader_region: placement.leader_region,
            leader: some(partition.leader),
            preferred_leader: some(partition.preferred_leader),
            assignment: partition.assignment,
            on: partition.r#move.map(Into::into),
            stuck: partition.stuck,
        }
    }
}

pub(super) fn numbers(nodes: &[u64]) -> String {
    nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

impl ShownPartition {
    pub(super) fn condition(&self) -> String {
        match &self.on {
            Some(on) if !self.stuck.is_empty() => format!("{}; {}", on.sentence(), self.stuck),
            Some(on) => on.sentence(),
            None if !self.stuck.is_empty() => self.stuck.clone(),
            None if !self.silent.is_empty() => format!("node {} does not answer", numbers(&self.silent)),
            None => "settled".to_owned(),
        }
    }

    pub(super) fn row(&self) -> Vec<String> {
        let leader = self.leader.map(|leader| leader.to_string()).unwrap_or_default();
        vec![self.topic.clone(), self.group.to_string(), numbers(&self.replicas), leader, self.condition()]
    }

    pub(super) fn fields(&self) -> Vec<(&'static str, String)> {
        let or = |text: String, none: &str| if text.is_empty() { none.to_owned() } else { text };
        let node = |node: Option<u64>| node.map_or_else(|| "none".to_owned(), |node| node.to_string());
        let mut fields = vec![
            ("topic", self.topic.clone()),
            ("id", self.topic_id.clone()),
            ("project", self.project.clone()),
            ("group", self.group.to_string()),
            ("replicas", numbers(&self.replicas)),
            ("wanted", format!("{} in {}", self.replication, or(self.regions.join(", "), "any region"))),
            ("leader", node(self.leader)),
            ("preferred leader", node(self.preferred_leader)),
            ("leader region", or(self.leader_region.clone(), "any")),
            ("moves over", self.assignment.to_string()),
            ("condition", self.condition()),
        ];
        if let Some(on) = &self.on {
            fields.push(("move began", on.started.clone().unwrap_or_default()));
            fields.push(("last heard", on.reported.clone().unwrap_or_else(|| "not yet".to_owned())));
        }
        fields
    }
}

pub(super) const PARTITION_HEADINGS: [&str; 5] = ["topic", "group", "replicas", "leader", "condition"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_never_served_does_not_pass_for_one_that_answers() {
        let shown: ShownNode = pb::Node { id: 4, never_started: true, ..Default::default() }.into();
        assert_eq!((shown.pulse().as_str(), shown.alive), ("never seen", false));
        let alive: ShownNode = pb::Node { id: 4, ..Default::default() }.into();
        assert_eq!((alive.pulse().as_str(), alive.alive), ("yes", true));
    }

    #[test]
    fn a_move_that_nobody_can_lead_says_why() {
        let on = pb::Move { target: vec![1], reason: pb::MoveReason::Drain.into(), ..Default::default() };
        let stuck = "its only replica, on node 3, does not answer".to_owned();
        let shown: ShownPartition = pb::PartitionInfo { r#move: Some(on), stuck, ..Default::default() }.into();
        assert_eq!(shown.condition(), "to 1 (drain): queued; its only replica, on node 3, does not answer");
    }
}
