//! What is wrong with a cluster, and what to do about it: a pure function of what its nodes say.

mod councils;
mod moves;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ensign_proto::pb::admin::v1 as pb;
use serde::Serialize;

/// How far a wall clock may be off before it is worth a word, and before it is wrong. Leases do not count on it; commit times do.
const CLOCK_WARNING: Duration = Duration::from_millis(500);
const CLOCK_CRITICAL: Duration = Duration::from_secs(10);
/// The share of a disk, in percent, that should stay free, and must.
const DISK_WARNING: u64 = 25;
const DISK_CRITICAL: u64 = 10;
/// How long before its end a certificate is worth a word, and is urgent.
const CERTIFICATE_WARNING: Duration = Duration::from_hours(30 * 24);
const CERTIFICATE_CRITICAL: Duration = Duration::from_hours(7 * 24);
/// Entries behind its leader from which on a replica that does not come closer is said to lag.
const LAG: u64 = 1_000;
/// Names of groups that one line shows.
const NAMES: usize = 3;

/// How much it matters. Ordered: the worst is the greatest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// Worth knowing; nothing has to be done.
    Note,
    /// It works, and will not for ever.
    Warning,
    /// Something does not work, or the next failure loses it.
    Critical,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) severity: Severity,
    /// A stable name for scripts, as the alerts have it.
    pub(super) code: &'static str,
    /// The nodes that it is about; empty for the cluster.
    pub(super) nodes: Vec<u64>,
    /// The groups that it is about.
    pub(super) groups: Vec<u64>,
    pub(super) what: String,
    pub(super) remedy: String,
}

/// Groups, by id and name.
type Named<'a> = Vec<(u64, &'a str)>;

/// A group as its nodes see it together.
struct Group<'a> {
    name: String,
    /// The report of the replica that leads in the newest term.
    leader: Option<&'a pb::GroupReport>,
    /// What replicas that do not lead have said.
    others: Vec<(u64, &'a pb::GroupReport)>,
    /// The nodes that shall hold a replica, where the catalog says so.
    assigned: BTreeSet<u64>,
}

/// Everything that is wrong, the worst first. `before` is an earlier report of the same cluster: what stands still shows only
/// against it.
pub(super) fn diagnose(before: &pb::ClusterReportReply, now: &pb::ClusterReportReply) -> Vec<Finding> {
    let mut findings = Vec::new();
    let listed = now.nodes.iter().filter(|it| it.report.is_none()).map(|it| it.node_id);
    // A node that was removed by force may be a member of groups still, and answers none.
    let silent: BTreeSet<u64> = listed.chain(now.removed.iter().copied()).collect();
    for node in &now.nodes {
        match &node.report {
            Some(report) => of_node(node, report, &mut findings),
            None if node.never_started => findings.push(Finding {
                severity: Severity::Note,
                code: "node-never-started",
                nodes: vec![node.node_id],
                groups: Vec::new(),
                what: format!("node {} at {} has joined and never served", node.node_id, node.address),
                remedy: format!(
                    "run `ensign serve` on its machine with the settings that `ensign cluster join` wrote; or, if it is not to come, \
                     `ensign node drain {0}`, then `ensign node remove {0}`",
                    node.node_id
                ),
            }),
            None => findings.push(Finding {
                severity: Severity::Critical,
                code: "node-silent",
                nodes: vec![node.node_id],
                groups: Vec::new(),
                what: format!("node {} at {} does not answer: {}", node.node_id, node.address, node.failure),
                remedy: format!(
                    "start it and look at its log; check the network to its peer port. If it is lost for good: `ensign node remove {0} \
                     --force`; its replicas are rebuilt on other nodes",
                    node.node_id
                ),
            }),
        }
    }
    of_versions(now, &mut findings);
    of_held_back(now, &mut findings);
    let (earlier, groups) = (leaders(before), groups(now));
    of_leaderless(&groups, &silent, &mut findings);
    councils::of_voters(now, &groups, &silent, &mut findings);
    of_replicas(&groups, &silent, &mut findings);
    of_progress(&groups, &earlier, &silent, &mut findings);
    moves::of_moves(before, now, &groups, &mut findings);
    moves::of_kept_votes(now, &groups, &mut findings);
    findings.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| (a.code, &a.nodes).cmp(&(b.code, &b.nodes))));
    findings
}

fn of_node(node: &pb::PeerReport, report: &pb::NodeReport, findings: &mut Vec<Finding>) {
    let id = node.node_id;
    let mut find = |severity, code, what: String, remedy: &str| {
        findings.push(Finding { severity, code, nodes: vec![id], groups: Vec::new(), what, remedy: remedy.to_owned() });
    };
    let free = report.disk_free_bytes.saturating_mul(100).checked_div(report.disk_bytes);
    if let Some(free) = free.filter(|free| *free < DISK_WARNING) {
        let severity = if free < DISK_CRITICAL { Severity::Critical } else { Severity::Warning };
        let what = format!("node {id}: {free} % of the data directory's file system is free");
        find(
            severity,
            "disk-pressure",
            what,
            "make that file system larger, or move replicas away; never delete files there",
        );
    }
    if !report.sealed.is_empty() {
        let what = format!("node {id}: its replica of the vault is sealed: {}", report.sealed);
        find(
            Severity::Warning,
            "vault-sealed",
            what,
            "where it waits for the passphrase, run `ensign vault unseal` on its machine; else put the right root key in its place, which \
             is found by itself: docs/operations/root-keys.md",
        );
    }
    if report.lease_left.is_none() && report.phase == "serving" {
        let what = format!("node {id} holds no lease on keys: it refuses to publish and to read");
        let remedy = "see whether the vault (group 2) has a leader that is unsealed, and whether this node reaches it";
        find(Severity::Critical, "no-lease", what, remedy);
    }
    if report.damaged > 0 {
        let what = format!("node {id}: {} replicas do not start", report.damaged);
        find(
            Severity::Critical,
            "replica-damaged",
            what,
            "its log names the file; check the disk, then replace the node",
        );
    }
    // Half of the round trip is not the clock's.
    let offset = signed(node.clock_offset.as_ref()).saturating_sub(span(node.round_trip.as_ref()) / 2);
    if offset > CLOCK_WARNING {
        let severity = if offset > CLOCK_CRITICAL { Severity::Critical } else { Severity::Warning };
        let what = format!("node {id}: its clock is off by {:.1} s", offset.as_secs_f64());
        find(
            severity,
            "clock-skew",
            what,
            "run a time service (chrony, systemd-timesyncd) on every node: commit times come from it",
        );
    }
    if let (Some(expires), Some(wall)) = (&report.certificate_expires, &report.wall_clock) {
        let left = Duration::from_secs(u64::try_from(expires.seconds - wall.seconds).unwrap_or(0));
        if left < CERTIFICATE_WARNING {
            let severity = if left < CERTIFICATE_CRITICAL { Severity::Critical } else { Severity::Warning };
            let what = format!("node {id}: its certificate runs out in {} days", left.as_secs() / 86_400);
            find(
                severity,
                "certificate-expiry",
                what,
                "give it a new certificate at cluster.certificate and cluster.private_key",
            );
        }
    }
    // What has a finding of its own is not said twice.
    for (part, what) in
        report.troubles.iter().filter(|(part, _)| !["lease", "vault", "partitions"].contains(&part.as_str()))
    {
        find(Severity::Warning, "not-ready", format!("node {id}: {part}: {what}"), "see the node's log");
    }
}

fn of_versions(now: &pb::ClusterReportReply, findings: &mut Vec<Finding>) {
    let mut versions: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for report in now.nodes.iter().filter_map(|it| it.report.as_ref()) {
        versions.entry(&report.version).or_default().push(report.node_id);
    }
    if versions.len() > 1 {
        let list: Vec<_> = versions.iter().map(|(version, nodes)| format!("{version} on {}", join(nodes))).collect();
        findings.push(Finding {
            severity: Severity::Note,
            code: "mixed-versions",
            nodes: Vec::new(),
            groups: Vec::new(),
            what: format!("nodes run different versions: {}", list.join(", ")),
            remedy: "finish the rolling upgrade".to_owned(),
        });
    }
}

/// Nodes that speak a newer version than the cluster has, and which nodes keep it from them.
fn of_held_back(now: &pb::ClusterReportReply, findings: &mut Vec<Finding>) {
    let reports = || now.nodes.iter().filter_map(|it| it.report.as_ref());
    // Who does not tell speaks the first version.
    let speaks = |report: &pb::NodeReport| report.speaks.max(1);
    let active = reports().map(|report| report.cluster_version).max().unwrap_or_default().max(1);
    let newest = reports().map(speaks).max().unwrap_or_default();
    if newest <= active {
        return;
    }
    let mut held_back = |severity, nodes: Vec<u64>, why: String, remedy: String| {
        let what = format!("the cluster stays at version {active}, and could be at {newest}: {why}");
        findings.push(Finding { severity, code: "version-held-back", nodes, groups: Vec::new(), what, remedy });
    };
    for report in reports().filter(|report| speaks(report) < newest) {
        let (node, spoken) = (report.node_id, speaks(report));
        let why = format!("node {node} runs {} and speaks version {spoken}", report.version);
        held_back(Severity::Warning, vec![node], why, format!("run the new version of ensign on node {node}"));
    }
    for node in now.nodes.iter().filter(|it| it.report.is_none()).map(|it| it.node_id) {
        let remedy = format!(
            "start node {node} with the new version of ensign, or remove it, or go on without it: `ensign cluster upgrade --without {node}`"
        );
        held_back(Severity::Warning, vec![node], format!("node {node} does not say what it speaks"), remedy);
    }
    let holders: Vec<u64> = reports().filter(|report| report.holds_version).map(|report| report.node_id).collect();
    if !holders.is_empty() {
        let why = format!("cluster.upgrade is \"manual\" on {}", join(&holders));
        let remedy = "`ensign cluster upgrade` raises it, for ever, once every node speaks it".to_owned();
        held_back(Severity::Note, holders, why, remedy);
    }
}

fn of_leaderless(groups: &BTreeMap<u64, Group<'_>>, silent: &BTreeSet<u64>, findings: &mut Vec<Finding>) {
    let mut lost: BTreeMap<(bool, Vec<u64>), Named<'_>> = BTreeMap::new();
    for (id, group) in groups {
        // Whoever led goes on believing it, since nobody is left to tell it otherwise.
        let no_majority = group.has_lost_its_majority(silent);
        if group.leader.is_none() || no_majority {
            lost.entry((no_majority, group.gone(silent))).or_default().push((*id, &group.name));
        }
    }
    for ((no_majority, gone), groups) in lost {
        let remedy = if no_majority {
            format!(
                "a majority is missing: bring {} back, with {}; nothing acknowledged is lost meanwhile. Disks that are lost for good: \
                 docs/operations/placement.md",
                named(&gone),
                if gone.len() == 1 { "its disk" } else { "their disks" }
            )
        } else {
            "an election takes seconds. If it lasts, look at the logs of the nodes that hold the group, and at the network \
             between their peer ports"
                .to_owned()
        };
        findings.push(Finding {
            severity: Severity::Critical,
            code: if no_majority { "no-quorum" } else { "leaderless" },
            nodes: gone,
            what: format!(
                "{} no {}: nothing is written to {}",
                has(&groups),
                if no_majority { "majority" } else { "leader" },
                if groups.len() == 1 { "it" } else { "them" }
            ),
            groups: ids(&groups),
            remedy,
        });
    }
}

/// Replicas that are on silent nodes, not members yet, or not well.
fn of_replicas(groups: &BTreeMap<u64, Group<'_>>, silent: &BTreeSet<u64>, findings: &mut Vec<Finding>) {
    let mut by_node: BTreeMap<u64, Named<'_>> = BTreeMap::new();
    let mut missing: Named<'_> = Vec::new();
    let led = groups.iter().filter(|(_, group)| group.leader.is_some() && !group.has_lost_its_majority(silent));
    for (id, group) in led {
        let voters = group.voters();
        for node in group.gone(silent).into_iter().filter(|_| !councils::is_one(*id)) {
            by_node.entry(node).or_default().push((*id, &group.name));
        }
        if group.assigned.difference(&voters).next().is_some() {
            missing.push((*id, &group.name));
        }
    }
    for (node, groups) in by_node {
        findings.push(Finding {
            severity: Severity::Warning,
            code: "under-replicated",
            nodes: vec![node],
            what: format!("{} a replica on node {node}, which is silent", has(&groups)),
            groups: ids(&groups),
            remedy: "one more failure may stop them: bring the node back; or let others take over: after cluster.lost_after they do by \
                     themselves, earlier with `ensign node remove --force`, as far as there are nodes for it"
                .to_owned(),
        });
    }
    if !missing.is_empty() {
        findings.push(Finding {
            severity: Severity::Note,
            code: "moving",
            nodes: Vec::new(),
            what: format!("{} fewer voters than assigned: replicas are being built", has(&missing)),
            groups: ids(&missing),
            remedy: "wait; if it lasts, see why the move does not get on".to_owned(),
        });
    }
    for (id, group) in groups {
        for (node, report) in &group.others {
            if matches!(report.health.as_str(), "fenced" | "recovering" | "disk full") {
                let severity = if report.health == "fenced" { Severity::Critical } else { Severity::Warning };
                findings.push(Finding {
                    severity,
                    code: "replica-unwell",
                    nodes: vec![*node],
                    groups: vec![*id],
                    what: format!("{}: the replica on node {node} is {} {}", group.name, report.health, report.cause)
                        .trim_end()
                        .to_owned(),
                    remedy: "its log says why; check the disk, then replace the node".to_owned(),
                });
            }
        }
    }
}

/// Groups that have something to commit and do not, and replicas that are far behind and come no closer.
fn of_progress(
    groups: &BTreeMap<u64, Group<'_>>,
    earlier: &BTreeMap<u64, &pb::GroupReport>,
    silent: &BTreeSet<u64>,
    findings: &mut Vec<Finding>,
) {
    let mut stuck: Named<'_> = Vec::new();
    let mut lagging: BTreeMap<u64, Named<'_>> = BTreeMap::new();
    for (id, group) in groups {
        let Some((leader, was)) = group.leader.zip(earlier.get(id)) else { continue };
        let waits = |report: &pb::GroupReport| report.last_log_index > report.committed_index;
        if waits(was) && waits(leader) && was.committed_index == leader.committed_index {
            stuck.push((*id, &group.name));
        }
        for member in leader.members.iter().filter(|it| it.lag >= LAG && !silent.contains(&it.node_id)) {
            let before = was.members.iter().find(|it| it.node_id == member.node_id).map_or(0, |it| it.lag);
            if before >= LAG && member.lag >= before {
                lagging.entry(member.node_id).or_default().push((*id, &group.name));
            }
        }
    }
    if !stuck.is_empty() {
        findings.push(Finding {
            severity: Severity::Critical,
            code: "stuck",
            nodes: Vec::new(),
            what: format!("{} entries that are not committed, and none was meanwhile", has(&stuck)),
            groups: ids(&stuck),
            remedy: "the leader does not reach a majority: look at the network between the nodes, and at slow disks"
                .to_owned(),
        });
    }
    for (node, groups) in lagging {
        findings.push(Finding {
            severity: Severity::Warning,
            code: "lagging",
            nodes: vec![node],
            what: format!(
                "{} a replica on node {node} that is {LAG} entries or more behind and comes no closer",
                has(&groups)
            ),
            groups: ids(&groups),
            remedy: "look at the node's disk and network: it takes less than is published".to_owned(),
        });
    }
}

impl Group<'_> {
    /// Who votes: as the leader says, else as others do, else as the catalog wants it.
    fn voters(&self) -> BTreeSet<u64> {
        let said = self.leader.or(self.others.first().map(|(_, report)| *report));
        let voters: Option<BTreeSet<u64>> =
            said.map(|report| report.members.iter().filter(|it| it.voter).map(|it| it.node_id).collect());
        voters.filter(|voters| !voters.is_empty()).unwrap_or_else(|| self.assigned.clone())
    }

    /// Its voters on silent nodes.
    fn gone(&self, silent: &BTreeSet<u64>) -> Vec<u64> {
        self.voters().intersection(silent).copied().collect()
    }

    fn has_lost_its_majority(&self, silent: &BTreeSet<u64>) -> bool {
        let gone = self.gone(silent).len();
        gone > 0 && gone * 2 >= self.voters().len()
    }
}

fn groups(now: &pb::ClusterReportReply) -> BTreeMap<u64, Group<'_>> {
    let mut groups: BTreeMap<u64, Group<'_>> = BTreeMap::new();
    let named = |id: u64, name: &str| if name.is_empty() { format!("group {id}") } else { name.to_owned() };
    for partition in &now.partitions {
        groups.insert(
            partition.group_id,
            Group {
                name: named(partition.group_id, &partition.name),
                leader: None,
                others: Vec::new(),
                assigned: partition.replicas.iter().copied().collect(),
            },
        );
    }
    for report in now.nodes.iter().filter_map(|it| it.report.as_ref()) {
        for said in &report.groups {
            let group = groups.entry(said.group_id).or_insert_with(|| Group {
                name: named(said.group_id, &said.name),
                leader: None,
                others: Vec::new(),
                assigned: BTreeSet::new(),
            });
            if said.leader != report.node_id {
                group.others.push((report.node_id, said));
            } else if group.leader.is_none_or(|known| known.term < said.term) {
                group.leader = Some(said);
            }
        }
    }
    groups
}

fn leaders(report: &pb::ClusterReportReply) -> BTreeMap<u64, &pb::GroupReport> {
    let reports = report.nodes.iter().filter_map(|it| it.report.as_ref());
    reports
        .flat_map(|report| report.groups.iter().filter(|group| group.leader == report.node_id))
        .map(|group| (group.group_id, group))
        .collect()
}

/// `orders has`, `3 groups (a, b, c) have`.
fn has(groups: &[(u64, &str)]) -> String {
    if let [(_, name)] = groups {
        return format!("{name} has");
    }
    let names: Vec<_> = groups.iter().take(NAMES).map(|(_, name)| *name).collect();
    let more = if groups.len() > NAMES { ", …" } else { "" };
    format!("{} groups ({}{more}) have", groups.len(), names.join(", "))
}

fn ids(groups: &[(u64, &str)]) -> Vec<u64> {
    groups.iter().map(|(id, _)| *id).collect()
}

/// `node 7`, `nodes 2, 3`.
fn named(nodes: &[u64]) -> String {
    format!("node{} {}", if nodes.len() == 1 { "" } else { "s" }, join(nodes))
}

fn join(nodes: &[u64]) -> String {
    nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

fn span(span: Option<&prost_types::Duration>) -> Duration {
    span.and_then(|span| Duration::try_from(*span).ok()).unwrap_or_default()
}

/// How long, whichever way.
fn signed(span: Option<&prost_types::Duration>) -> Duration {
    let Some(span) = span else { return Duration::ZERO };
    Duration::new(span.seconds.unsigned_abs(), span.nanos.unsigned_abs().min(999_999_999))
}

#[cfg(test)]
mod tests;
