//! The catalog and the vault: who of their voters is lost, and whether they have as many as they should.

use std::collections::{BTreeMap, BTreeSet};

use ensign_proto::GroupId;
use ensign_proto::pb::admin::v1 as pb;

use super::{Finding, Group, Severity, named};
use crate::members::voters_wanted;

/// Whether it is a group whose voters the cluster chooses by itself.
pub(super) fn is_one(group: u64) -> bool {
    [GroupId::CATALOG.0, GroupId::VAULT.0].contains(&group)
}

/// Voters that are silent, and groups that have fewer voters than there could be.
pub(super) fn of_voters(
    now: &pb::ClusterReportReply,
    groups: &BTreeMap<u64, Group<'_>>,
    silent: &BTreeSet<u64>,
    findings: &mut Vec<Finding>,
) {
    // Without a majority nothing can be changed, and that is said already.
    let led = groups.iter().filter(|(id, group)| is_one(**id) && !group.has_lost_its_majority(silent));
    for (id, group) in led {
        let Some(leader) = group.leader else { continue };
        let voters = group.voters();
        let able = able(now, *id);
        let spare = able.difference(&voters).count();
        for node in group.gone(silent) {
            let remedy = if spare > 0 {
                "its vote goes to another node once it was silent for cluster.vote_lost_after. If that does not happen, the log of \
                 the group's leader says what it waits for"
            } else {
                "bring the node back with its disk. If it is lost for good, let a new machine join (`ensign cluster join`), with the \
                 root key: it takes the vote over by itself. Until then one more lost voter may stop the cluster"
            };
            findings.push(Finding {
                severity: Severity::Warning,
                code: "voter-lost",
                nodes: vec![node],
                groups: vec![*id],
                what: format!("{}: node {node} has a vote and is silent", group.name),
                remedy: remedy.to_owned(),
            });
        }
        let wanted = voters_wanted(able.len());
        if voters.len() < wanted {
            let waits: Vec<u64> = able.difference(&voters).copied().collect();
            findings.push(Finding {
                severity: Severity::Warning,
                code: "too-few-voters",
                nodes: waits.clone(),
                groups: vec![*id],
                what: format!("{}: {} voters, and {wanted} nodes could be", group.name, voters.len()),
                remedy: format!(
                    "{} to get a vote: that follows as soon as the log is caught up with, in seconds as a rule. If it lasts, the log of node {} \
                     says what it waits for",
                    named(&waits),
                    leader.leader
                ),
            });
        }
    }
}

/// The nodes that answer, are to stay and could vote in a group: in the vault, only those that can unseal it.
pub(super) fn able(now: &pb::ClusterReportReply, group: u64) -> BTreeSet<u64> {
    let reports = now.nodes.iter().filter(|it| !it.draining).filter_map(|it| it.report.as_ref());
    let able = reports.filter(|report| group != GroupId::VAULT.0 || report.sealed.is_empty());
    able.map(|report| report.node_id).collect()
}
