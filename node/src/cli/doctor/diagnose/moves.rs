//! Replicas that should be elsewhere and do not get there, and votes that drained nodes keep.

use std::collections::{BTreeMap, BTreeSet};

use ensign_proto::GroupId;
use ensign_proto::pb::admin::v1 as pb;
use pb::obstacle::Kind;

use super::{Finding, Group, Named, Severity, has, ids, join, named};

/// What lasts from the earlier report to this one: a restart of a node is no reason to call an operator.
pub(super) fn of_moves(
    before: &pb::ClusterReportReply,
    now: &pb::ClusterReportReply,
    groups: &BTreeMap<u64, Group<'_>>,
    findings: &mut Vec<Finding>,
) {
    let obstacle = |partition: &pb::PartitionAssignment| partition.obstacle.as_ref().map(pb::Obstacle::kind);
    let earlier: BTreeMap<u64, Kind> =
        before.partitions.iter().filter_map(|it| Some((it.group_id, obstacle(it)?))).collect();
    let mut found: BTreeMap<(i32, &str, &[u64]), Named<'_>> = BTreeMap::new();
    for partition in &now.partitions {
        let Some(obstacle) = &partition.obstacle else { continue };
        let Some(group) = groups.get(&partition.group_id) else { continue };
        // One that waits for its turn has a leader; what has none is found as such.
        if earlier.get(&partition.group_id) != Some(&obstacle.kind()) || obstacle.kind() == Kind::Untaken {
            continue;
        }
        let key = (obstacle.kind, obstacle.what.as_str(), obstacle.nodes.as_slice());
        found.entry(key).or_default().push((partition.group_id, &group.name));
    }
    for ((kind, what, nodes), groups) in found {
        let kind = Kind::try_from(kind).unwrap_or(Kind::Unspecified);
        findings.push(Finding {
            severity: Severity::Warning,
            code: "move-stuck",
            nodes: nodes.to_vec(),
            groups: ids(&groups),
            what: match kind {
                Kind::Slow => format!("{} new replicas that come no closer: {what}", has(&groups)),
                _ => format!("{} replicas that should be elsewhere and cannot go: {what}", has(&groups)),
            },
            remedy: remedy(kind, &there(now, nodes)),
        });
    }
}

/// Those of the nodes that are part of the cluster: who was removed never comes back.
fn there(now: &pb::ClusterReportReply, nodes: &[u64]) -> Vec<u64> {
    nodes.iter().copied().filter(|node| now.nodes.iter().any(|it| it.node_id == *node)).collect()
}

fn remedy(kind: Kind, nodes: &[u64]) -> String {
    match kind {
        Kind::Nodes => "let a machine join (`ensign cluster join`), undrain a node (`ensign node undrain`), or ask for fewer replicas or more \
                        regions (`ensign topic alter`)"
            .to_owned(),
        Kind::Majority => {
            let bring = match nodes.len() {
                0 => "the nodes were removed for good:".to_owned(),
                1 => format!("bring {} back with its disk. If that is lost for good:", named(nodes)),
                _ => format!("bring {} back with their disks. If these are lost for good:", named(nodes)),
            };
            format!(
                "{bring} read what other nodes still have (`ensign subscribe TOPIC --from earliest`), destroy the topics (`ensign topic \
                 destroy`), then remove the node (`ensign node remove --force`): docs/operations/placement.md"
            )
        }
        Kind::Waits => "start the node that it waits for; or turn the move round (`ensign partition cancel`)".to_owned(),
        Kind::Slow => "do what it says; `ensign partition describe --watch` shows how far it is".to_owned(),
        Kind::Untaken | Kind::Unspecified => "see `ensign partition list --unsettled`".to_owned(),
    }
}

/// Drained nodes that keep a vote which nobody else could take.
pub(super) fn of_kept_votes(
    now: &pb::ClusterReportReply,
    groups: &BTreeMap<u64, Group<'_>>,
    findings: &mut Vec<Finding>,
) {
    let draining: BTreeSet<u64> = now.nodes.iter().filter(|it| it.draining).map(|it| it.node_id).collect();
    for (id, name) in [(GroupId::CATALOG.0, "catalog"), (GroupId::VAULT.0, "vault")] {
        let Some(group) = groups.get(&id).filter(|group| group.leader.is_some()) else { continue };
        let voters = group.voters();
        let keeps: Vec<u64> = voters.intersection(&draining).copied().collect();
        // While somebody could take it over, it is on its way.
        if keeps.is_empty() || super::councils::able(now, id).difference(&voters).next().is_some() {
            continue;
        }
        findings.push(Finding {
            severity: Severity::Warning,
            code: "vote-kept",
            nodes: keeps.clone(),
            groups: vec![id],
            what: format!("{name}: {} drained and votes, and no other node could take the vote", is_or_are(&keeps)),
            remedy:
                "let a machine join (`ensign cluster join`), with the root key; until then the node cannot be removed"
                    .to_owned(),
        });
    }
}

fn is_or_are(nodes: &[u64]) -> String {
    if nodes.len() == 1 { format!("node {} is", nodes[0]) } else { format!("nodes {} are", join(nodes)) }
}
