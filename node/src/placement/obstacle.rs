//! What keeps replicas from where they should be, put together for operators from what the planner and the leaders of moves say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ensign_proto::{NodeId, TopicId};
use ensign_raft::env::UnixNanos;

use super::planner::{PlanLimits, Unplaceable};
use crate::catalog::{Catalog, MovePhase, Reassignment};

/// After how long a move that nobody has taken up is worth a word: an election takes seconds.
const UNTAKEN: Duration = Duration::from_mins(1);

/// Why a partition's replicas are not where they should be, and do not get there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// What it is, for programs.
    pub kind: ObstacleKind,
    /// What it is, for people: a sentence without a full stop, which says what to do.
    pub what: String,
    /// Of [`ObstacleKind::Majority`]: who has to come back.
    pub nodes: BTreeSet<NodeId>,
}

/// Kinds of obstacles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObstacleKind {
    /// Too few nodes could take the replicas.
    Nodes,
    /// Too few of those that have the partition answer.
    Majority,
    /// The partition's leader says what its move waits for.
    Waits,
    /// New replicas come no closer to the end of the log.
    Slow,
    /// Nobody has taken the move up.
    Untaken,
}

impl Obstacle {
    fn of_plan(why: &Unplaceable) -> Self {
        let what = why.to_string();
        match why {
            Unplaceable::NoMajority { silent, .. } => {
                Self { kind: ObstacleKind::Majority, what, nodes: silent.clone() }
            }
            Unplaceable::Replication { .. }
            | Unplaceable::RegionUnknown { .. }
            | Unplaceable::LeaderRegion { .. }
            | Unplaceable::TooFewNodes { .. } => Self { kind: ObstacleKind::Nodes, what, nodes: BTreeSet::new() },
        }
    }

    /// Of a move that somebody could lead, at this time.
    fn of_move(on: &Reassignment, now: UnixNanos) -> Option<Self> {
        let found = |kind, what| Some(Self { kind, what, nodes: BTreeSet::new() });
        match &on.report {
            Some(report) if report.waiting.is_empty() => None,
            Some(report) if report.phase == MovePhase::Waiting => found(ObstacleKind::Waits, report.waiting.clone()),
            Some(report) => found(ObstacleKind::Slow, report.waiting.clone()),
            None => {
                let waited = Duration::from_nanos(now.0.saturating_sub(on.started.0));
                let what = format!(
                    "nobody has taken the move up for {} s: the partition has no leader, or its leader drives as many moves as it may",
                    waited.as_secs()
                );
                if waited < UNTAKEN { None } else { found(ObstacleKind::Untaken, what) }
            }
        }
    }
}

/// The obstacles of all partitions that have one, as this node sees the others.
pub fn obstacles(catalog: &Catalog, now: UnixNanos) -> BTreeMap<TopicId, Obstacle> {
    let plan = catalog.facts().plan(PlanLimits::default());
    let mut found: BTreeMap<TopicId, Obstacle> =
        plan.stuck.iter().map(|(topic, why)| (*topic, Obstacle::of_plan(why))).collect();
    for topic in catalog.view().moving() {
        let Some(on) = topic.reassignment.as_ref().filter(|_| !found.contains_key(&topic.id)) else { continue };
        found.extend(Obstacle::of_move(on, now).map(|obstacle| (topic.id, obstacle)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::{MoveReason, MoveReport};

    fn on(report: Option<(MovePhase, &str)>) -> Reassignment {
        let report = report.map(|(phase, waiting)| MoveReport {
            phase,
            behind: 0,
            waiting: waiting.to_owned(),
            by: NodeId(1),
            at: UnixNanos(0),
        });
        Reassignment {
            target: BTreeSet::from([NodeId(1)]),
            reason: MoveReason::Drain,
            started: UnixNanos(1_000_000_000),
            cancelled: false,
            report,
        }
    }

    fn seen(on: &Reassignment, seconds: u64) -> Option<(ObstacleKind, String)> {
        Obstacle::of_move(on, UnixNanos(seconds * 1_000_000_000)).map(|it| (it.kind, it.what))
    }

    #[test]
    fn a_move_that_gets_on_has_no_obstacle() {
        for phase in [MovePhase::CatchingUp, MovePhase::Switching, MovePhase::HandingOver, MovePhase::Waiting] {
            assert_eq!(seen(&on(Some((phase, ""))), 9_999), None, "{phase:?}");
        }
        assert_eq!(seen(&on(None), 60), None, "its leader may be being elected");
    }

    #[test]
    fn what_the_leader_of_a_move_says_is_passed_on() {
        let waits = seen(&on(Some((MovePhase::Waiting, "node 4 does not answer"))), 1);
        assert_eq!(waits, Some((ObstacleKind::Waits, "node 4 does not answer".to_owned())));
        let slow = seen(&on(Some((MovePhase::CatchingUp, "node 4 catches up no faster"))), 1);
        assert_eq!(slow, Some((ObstacleKind::Slow, "node 4 catches up no faster".to_owned())));
    }

    #[test]
    fn a_move_that_nobody_takes_up_is_told_of_after_a_while() {
        let (kind, what) = seen(&on(None), 61).expect("a minute has passed");
        assert_eq!(kind, ObstacleKind::Untaken);
        assert!(what.starts_with("nobody has taken the move up for 60 s: the partition has no leader"), "{what}");
        assert_eq!(seen(&on(None), 0), None, "clocks of two nodes differ");
    }
}
