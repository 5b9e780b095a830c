//! A node's word about itself, as gauges: what the alert rules in docs/operations rest on.

use ensign_proto::GroupId;
use ensign_proto::pb::admin::v1 as pb;
use metrics::{Unit, describe_gauge, gauge};

use crate::members::voters_wanted;

const REPLICAS: &str = "ensign_replicas";
const LEADERLESS: &str = "ensign_replicas_without_leader";
const DAMAGED: &str = "ensign_replicas_damaged";
const UNDER_REPLICATED: &str = "ensign_groups_under_replicated";
const WITHOUT_QUORUM: &str = "ensign_groups_without_quorum";
const LAG: &str = "ensign_replica_lag_entries_max";
const UNCOMMITTED: &str = "ensign_groups_uncommitted";
const DISK: &str = "ensign_disk_bytes";
const DISK_FREE: &str = "ensign_disk_free_bytes";
const VOTERS: &str = "ensign_group_voters";
const VOTERS_WANTED: &str = "ensign_group_voters_wanted";
const VERSION: &str = "ensign_cluster_version";
const SPEAKS: &str = "ensign_cluster_version_spoken";
const LEARNERS: &str = "ensign_group_learners";
const READY: &str = "ensign_ready";

/// Names, units and help.
pub(crate) fn describe() {
    describe_gauge!(REPLICAS, "Replicas of groups on this node");
    describe_gauge!(LEADERLESS, "Replicas on this node that know no leader");
    describe_gauge!(DAMAGED, "Replicas on this node that do not start, or are fenced");
    describe_gauge!(
        UNDER_REPLICATED,
        "Groups that this node leads and that have a voter on a node that does not answer"
    );
    describe_gauge!(WITHOUT_QUORUM, "Groups that this node believes to lead and whose majority does not answer");
    describe_gauge!(
        LAG,
        "The most entries that a member of a group that this node leads is behind, of those on live nodes"
    );
    describe_gauge!(UNCOMMITTED, "Groups that this node leads and that have entries which are not committed yet");
    describe_gauge!(DISK, Unit::Bytes, "Size of the file system of the data directory");
    describe_gauge!(DISK_FREE, Unit::Bytes, "Free bytes of the file system of the data directory");
    describe_gauge!(VOTERS, "Voters of the catalog and of the vault, told by the node that leads them; 0 elsewhere");
    describe_gauge!(
        VOTERS_WANTED,
        "As many voters as they could have with their members that answer and are not drained, told likewise"
    );
    describe_gauge!(VERSION, "The cluster's version, as this node knows it");
    describe_gauge!(SPEAKS, "The newest version of the cluster that this node speaks");
    describe_gauge!(LEARNERS, "Their members without a vote, told likewise");
    describe_gauge!(READY, "1 while the node serves and nothing is not well, as /readyz says");
}

/// Publishes a report; `alive` tells which nodes answer, and `stays` which are not to leave.
pub(super) fn observe(report: &pb::NodeReport, alive: impl Fn(u64) -> bool, stays: impl Fn(u64) -> bool) {
    let led = || report.groups.iter().filter(|group| group.leader == report.node_id);
    let silent = |member: &&pb::MemberReport| member.node_id != report.node_id && !alive(member.node_id);
    let unwell = unwell(report, &alive);
    let lag = led().flat_map(|group| &group.members).filter(|it| !silent(it)).map(|it| it.lag).max();
    let fenced = report.groups.iter().filter(|group| group.health == "fenced").count();
    gauge!(REPLICAS).set(report.replicas as f64);
    gauge!(LEADERLESS).set(unwell.leaderless as f64);
    gauge!(DAMAGED).set(report.damaged as f64 + fenced as f64);
    gauge!(UNDER_REPLICATED).set(unwell.under_replicated as f64);
    gauge!(WITHOUT_QUORUM).set(unwell.without_quorum as f64);
    gauge!(LAG).set(lag.unwrap_or(0) as f64);
    gauge!(UNCOMMITTED).set(led().filter(|group| group.last_log_index > group.committed_index).count() as f64);
    for (id, name) in [(GroupId::CATALOG, "catalog"), (GroupId::VAULT, "vault")] {
        let members = || led().filter(|group| group.group_id == id.0).flat_map(|group| &group.members);
        gauge!(VOTERS, "group" => name).set(members().filter(|it| it.voter).count() as f64);
        gauge!(VOTERS_WANTED, "group" => name).set(wanted(report, id, &alive, &stays) as f64);
        gauge!(LEARNERS, "group" => name).set(members().filter(|it| !it.voter).count() as f64);
    }
    gauge!(VERSION).set(f64::from(report.cluster_version));
    gauge!(SPEAKS).set(f64::from(report.speaks));
    gauge!(DISK).set(report.disk_bytes as f64);
    gauge!(DISK_FREE).set(report.disk_free_bytes as f64);
    gauge!(READY).set(f64::from(u8::from(report.phase == "serving" && report.troubles.is_empty())));
}

/// How many groups lack something.
#[derive(Debug, PartialEq, Eq)]
struct Unwell {
    leaderless: usize,
    under_replicated: usize,
    without_quorum: usize,
}

/// Who leads tells of its group; of one that nobody leads, whoever is left.
fn unwell(report: &pb::NodeReport, alive: impl Fn(u64) -> bool) -> Unwell {
    let answers = |node: u64| node == report.node_id || alive(node);
    // A replica goes on naming its leader when that has died.
    let leaderless = |group: &&pb::GroupReport| group.leader == 0 || !answers(group.leader);
    let told = || report.groups.iter().filter(|group| group.leader == report.node_id || leaderless(group));
    let voters = |group: &pb::GroupReport| group.members.iter().filter(|it| it.voter).count();
    let gone = |group: &pb::GroupReport| group.members.iter().filter(|it| it.voter && !answers(it.node_id)).count();
    Unwell {
        leaderless: report.groups.iter().filter(leaderless).count(),
        under_replicated: told().filter(|group| gone(group) > 0).count(),
        without_quorum: told().filter(|group| gone(group) > 0 && gone(group) * 2 >= voters(group)).count(),
    }
}

/// How many voters a group that this node leads could have with those of its members that answer and stay; 0 if another node
/// leads it.
fn wanted(report: &pb::NodeReport, id: GroupId, alive: impl Fn(u64) -> bool, stays: impl Fn(u64) -> bool) -> usize {
    let led = report.groups.iter().find(|group| group.group_id == id.0 && group.leader == report.node_id);
    let answers = |member: &&pb::MemberReport| member.node_id == report.node_id || alive(member.node_id);
    led.map_or(0, |group| {
        voters_wanted(group.members.iter().filter(answers).filter(|member| stays(member.node_id)).count())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn led_by(leader: u64, voters: u64, learners: u64) -> pb::NodeReport {
        let member = |node_id| pb::MemberReport { node_id, voter: node_id <= voters, lag: 0 };
        let members = (1..=voters + learners).map(member).collect();
        let group = pb::GroupReport { group_id: GroupId::CATALOG.0, leader, members, ..pb::GroupReport::default() };
        pb::NodeReport { node_id: 1, groups: vec![group], ..pb::NodeReport::default() }
    }

    #[test]
    fn whoever_is_left_tells_of_a_group_whose_leader_died() {
        let counts = |leader, alive: &[u64]| {
            let Unwell { leaderless, under_replicated, without_quorum } =
                unwell(&led_by(leader, 3, 0), |node| alive.contains(&node));
            [leaderless, under_replicated, without_quorum]
        };
        assert_eq!(counts(1, &[2, 3]), [0, 0, 0]);
        assert_eq!(counts(1, &[2]), [0, 1, 0]);
        assert_eq!(counts(1, &[]), [0, 1, 1], "it leads in name only");
        assert_eq!(counts(2, &[2]), [0, 0, 0], "its leader tells");
        assert_eq!(counts(2, &[3]), [1, 1, 0], "an election is on");
        assert_eq!(counts(2, &[]), [1, 1, 1]);
        assert_eq!(counts(0, &[2, 3]), [1, 0, 0]);
    }

    #[test]
    fn a_group_could_have_as_many_voters_as_its_living_members_allow() {
        let wanted =
            |report: &pb::NodeReport, dead: u64| wanted(report, GroupId::CATALOG, |node| node != dead, |_| true);
        // One node, or two, can have no three voters: nothing is missing there.
        assert_eq!((wanted(&led_by(1, 1, 0), 0), wanted(&led_by(1, 1, 1), 0)), (1, 1));
        assert_eq!((wanted(&led_by(1, 1, 2), 0), wanted(&led_by(1, 1, 2), 3)), (3, 1));
        assert_eq!(wanted(&led_by(1, 3, 2), 0), 5);
        assert_eq!(wanted(&led_by(2, 3, 2), 0), 0, "another node tells");
    }

    #[test]
    fn a_node_that_is_drained_is_no_candidate() {
        let wanted = |report: &pb::NodeReport, drained: &[u64]| {
            wanted(report, GroupId::CATALOG, |_| true, |node| !drained.contains(&node))
        };
        assert_eq!(wanted(&led_by(1, 3, 2), &[5]), 3, "three of four vote, and nothing is missing");
        assert_eq!(wanted(&led_by(1, 1, 2), &[3]), 1);
        assert_eq!(wanted(&led_by(1, 3, 3), &[1]), 5, "also when it is the leader");
        assert_eq!(wanted(&led_by(1, 3, 2), &[1]), 3);
    }
}
