//! A node's word about itself, as gauges: what the alert rules in docs/operations rest on.

use ensign_proto::GroupId;
use ensign_proto::pb::admin::v1 as pb;
use metrics::{Unit, describe_gauge, gauge};

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
    describe_gauge!(LEARNERS, "Their members without a vote, told likewise");
    describe_gauge!(READY, "1 while the node serves and nothing is not well, as /readyz says");
}

/// Publishes a report; `alive` tells which nodes answer.
pub(super) fn observe(report: &pb::NodeReport, alive: impl Fn(u64) -> bool) {
    let led = || report.groups.iter().filter(|group| group.leader == report.node_id);
    let silent = |member: &&pb::MemberReport| member.node_id != report.node_id && !alive(member.node_id);
    let under = led().filter(|group| group.members.iter().any(|it| it.voter && silent(&it))).count();
    let lost = |group: &&pb::GroupReport| {
        let voters = || group.members.iter().filter(|it| it.voter);
        let gone = voters().filter(silent).count();
        gone > 0 && gone * 2 >= voters().count()
    };
    let lag = led().flat_map(|group| &group.members).filter(|it| !silent(it)).map(|it| it.lag).max();
    let fenced = report.groups.iter().filter(|group| group.health == "fenced").count();
    gauge!(REPLICAS).set(report.replicas as f64);
    gauge!(LEADERLESS).set(report.groups.iter().filter(|group| group.leader == 0).count() as f64);
    gauge!(DAMAGED).set(report.damaged as f64 + fenced as f64);
    gauge!(UNDER_REPLICATED).set(under as f64);
    gauge!(WITHOUT_QUORUM).set(led().filter(lost).count() as f64);
    gauge!(LAG).set(lag.unwrap_or(0) as f64);
    gauge!(UNCOMMITTED).set(led().filter(|group| group.last_log_index > group.committed_index).count() as f64);
    for (id, name) in [(GroupId::CATALOG, "catalog"), (GroupId::VAULT, "vault")] {
        let members = || led().filter(|group| group.group_id == id.0).flat_map(|group| &group.members);
        gauge!(VOTERS, "group" => name).set(members().filter(|it| it.voter).count() as f64);
        gauge!(LEARNERS, "group" => name).set(members().filter(|it| !it.voter).count() as f64);
    }
    gauge!(DISK).set(report.disk_bytes as f64);
    gauge!(DISK_FREE).set(report.disk_free_bytes as f64);
    gauge!(READY).set(f64::from(u8::from(report.phase == "serving" && report.troubles.is_empty())));
}
