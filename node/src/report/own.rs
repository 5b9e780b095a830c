//! A node's word about itself.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ensign_keyvault::{Holder, Vault};
use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::{ClusterVersion, NodeId};
use ensign_raft::env::{Clock, Stop, UnixNanos};
use ensign_raft::{GroupStatus, Health as GroupHealth, Runtime};

use crate::health::{Health, Phase};
use crate::partition::Partitions;
use crate::peers::Speaks;

use super::metrics;

/// The most groups that one report lists.
const GROUPS_MAX: usize = 100_000;
/// How often metrics tell how the node is: a look at every group, so not at every scrape.
const PUBLISH_EVERY: Duration = Duration::from_secs(5);

/// What a node looks at to tell how it is.
pub struct ReporterParts {
    /// This node.
    pub me: NodeId,
    /// Where its data lies.
    pub data_dir: PathBuf,
    /// Its groups.
    pub runtime: Runtime,
    /// Its partitions.
    pub partitions: Partitions,
    /// Its replica of the vault.
    pub vault: Vault,
    /// Its keys.
    pub holder: Holder,
    /// What it tells `/readyz`.
    pub health: Health,
    /// When its certificate for peers runs out, where that is known.
    pub certificate_expires: Arc<dyn Fn() -> Option<UnixNanos> + Send + Sync>,
    /// What it speaks, and whether it holds the cluster back.
    pub speaks: Speaks,
    /// The cluster's version, as it knows it.
    pub cluster_version: Arc<dyn Fn() -> ClusterVersion + Send + Sync>,
    /// Whether a node is one that is to stay, and so may be given a vote.
    pub stays: Arc<dyn Fn(NodeId) -> bool + Send + Sync>,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
}

/// Tells how this node is. Clones share it.
#[derive(Clone)]
pub struct Reporter {
    parts: Arc<ReporterParts>,
    started: UnixNanos,
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reporter").field("node", &self.parts.me).finish_non_exhaustive()
    }
}

impl Reporter {
    /// A reporter of a node that has just started.
    pub fn new(parts: ReporterParts) -> Self {
        let started = parts.clock.wall();
        Self { parts: Arc::new(parts), started }
    }

    /// This node.
    pub fn me(&self) -> NodeId {
        self.parts.me
    }

    pub(super) fn wall(&self) -> UnixNanos {
        self.parts.clock.wall()
    }

    /// Publishes how this node is as metrics, again and again, until `stop`. One task a node.
    pub async fn keep_published(self, stop: Stop) {
        let liveness = self.parts.runtime.liveness();
        loop {
            let stays = |node| (self.parts.stays)(NodeId(node));
            metrics::observe(&self.own(), |node| liveness.is_alive(NodeId(node)), stays);
            if stop.run_until_cancelled(tokio::time::sleep(PUBLISH_EVERY)).await.is_none() {
                return;
            }
        }
    }

    /// How this node is now. Names of groups are empty.
    pub fn own(&self) -> pb::NodeReport {
        let parts = &self.parts;
        let (groups, liveness) = (parts.runtime.groups(), parts.runtime.liveness());
        let answers = |node| node == parts.me || liveness.is_alive(node);
        let wall = parts.clock.wall();
        let (disk_bytes, disk_free_bytes) = disk(&parts.data_dir).unwrap_or_default();
        pb::NodeReport {
            node_id: parts.me.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime: span(Duration::from_nanos(wall.0.saturating_sub(self.started.0))),
            wall_clock: timestamp(wall),
            phase: phase(parts.health.phase()).to_owned(),
            troubles: parts.health.troubles().into_iter().map(|(part, what)| (part.to_owned(), what)).collect(),
            disk_bytes,
            disk_free_bytes,
            lease_left: parts.holder.lease_left().and_then(span),
            sealed: parts.vault.sealed().unwrap_or_default(),
            certificate_expires: (parts.certificate_expires)().and_then(timestamp),
            replicas: groups.len() as u64,
            leads: groups.iter().filter(|group| group.leadership.leads(parts.me)).count() as u64,
            damaged: parts.partitions.damaged() as u64,
            groups: groups
                .iter()
                .filter(|group| group.leadership.leads(parts.me) || !is_well(group, answers))
                .take(GROUPS_MAX)
                .map(group_report)
                .collect(),
            speaks: parts.speaks.newest.0,
            holds_version: parts.speaks.held,
            cluster_version: (parts.cluster_version)().0,
            vault: Some(vault_report(&parts.vault)),
        }
    }
}

/// How the vault is on this node.
pub(crate) fn vault_report(vault: &Vault) -> pb::VaultReport {
    let status = vault.seal_status();
    let root = status.root.as_ref();
    let kind = |root: &ensign_keyvault::RootName| root.kind.map_or("newer", ensign_keyvault::RootKind::name).to_owned();
    pb::VaultReport {
        sealed: status.sealed.unwrap_or_default(),
        held: status.held,
        provider: status.provider.name().to_owned(),
        root_kind: root.map(kind).unwrap_or_default(),
        root_id: root.map(|root| root.id.to_string()).unwrap_or_default(),
        root_version: root.map_or(0, |root| root.version),
        root_reference: root.map(|root| root.reference.clone()).unwrap_or_default(),
        leader: status.leader.map_or(0, |node| node.0),
        term: status.term.0,
        epoch: status.epoch,
        voter: status.votes,
        applied_index: status.applied.0,
    }
}

/// A replica goes on naming its leader when that has died, and without a majority nobody follows it.
fn is_well(group: &GroupStatus, answers: impl Fn(NodeId) -> bool) -> bool {
    group.health == GroupHealth::Running && group.leadership.leader.is_some_and(answers)
}

fn group_report(status: &GroupStatus) -> pb::GroupReport {
    let (health, cause) = match &status.health {
        GroupHealth::Running => ("running", String::new()),
        GroupHealth::Recovering => ("recovering", String::new()),
        GroupHealth::DiskFull => ("disk full", String::new()),
        GroupHealth::Fenced { cause } => ("fenced", cause.to_string()),
        GroupHealth::Stopped => ("stopped", String::new()),
    };
    let members: BTreeSet<NodeId> = status.voters.iter().chain(status.matched.keys()).copied().collect();
    let lag = |node: &NodeId| {
        let matched = status.matched.get(node).copied().unwrap_or_default();
        // Elsewhere than on the leader there is nothing to compare with.
        if status.matched.is_empty() { 0 } else { status.last.0.saturating_sub(matched.0) }
    };
    pb::GroupReport {
        group_id: status.id.0,
        name: String::new(),
        term: status.leadership.term.0,
        leader: status.leadership.leader.map_or(0, |leader| leader.0),
        last_log_index: status.last.0,
        committed_index: status.committed.0,
        applied_index: status.applied.0,
        health: health.to_owned(),
        cause,
        members: members
            .iter()
            .map(|node| pb::MemberReport { node_id: node.0, voter: status.voters.contains(node), lag: lag(node) })
            .collect(),
    }
}

fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Serving => "serving",
        Phase::Stopping => "stopping",
    }
}

/// Size and free bytes, for whoever is not root, of the file system that holds `dir`.
fn disk(dir: &std::path::Path) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    Some((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
}

pub(super) fn span(span: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(span).ok()
}

fn timestamp(time: UnixNanos) -> Option<prost_types::Timestamp> {
    let nanos = (time.0 % 1_000_000_000) as i32;
    Some(prost_types::Timestamp { seconds: i64::try_from(time.as_secs()).ok()?, nanos })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ensign_proto::{GroupId, LogIndex, Term};
    use ensign_raft::Leadership;

    use super::*;

    fn status(leader: Option<u64>, matched: &[(u64, u64)]) -> GroupStatus {
        GroupStatus {
            id: GroupId(17),
            health: GroupHealth::Running,
            leadership: Leadership { term: Term(3), leader: leader.map(NodeId), ready: leader.is_some() },
            last: LogIndex(100),
            committed: LogIndex(90),
            applied: LogIndex(80),
            snapshot: LogIndex(0),
            purged: LogIndex(0),
            voters: [1, 2, 3].map(NodeId).into(),
            matched: matched.iter().map(|(node, index)| (NodeId(*node), LogIndex(*index))).collect::<BTreeMap<_, _>>(),
            restarts: 0,
            asleep: false,
        }
    }

    #[test]
    fn a_leader_tells_how_far_each_member_is_behind() {
        let report = group_report(&status(Some(1), &[(1, 100), (2, 95), (4, 10)]));
        let members: Vec<_> = report.members.iter().map(|it| (it.node_id, it.voter, it.lag)).collect();
        assert_eq!(members, [(1, true, 0), (2, true, 5), (3, true, 100), (4, false, 90)]);
        let follower = group_report(&status(Some(2), &[]));
        assert!(follower.members.iter().all(|it| it.lag == 0), "a follower knows of no lag");
    }

    #[test]
    fn a_group_whose_leader_died_is_not_well() {
        let led = |leader| status(Some(leader), &[]);
        assert!(is_well(&led(2), |node| node == NodeId(2)));
        assert!(!is_well(&led(2), |node| node != NodeId(2)));
        assert!(!is_well(&status(None, &[]), |_| true));
    }

    #[test]
    fn a_fenced_replica_says_why() {
        let fenced = GroupStatus { health: GroupHealth::Fenced { cause: "bad page".into() }, ..status(None, &[]) };
        assert!(!is_well(&fenced, |_| true));
        let report = group_report(&fenced);
        assert_eq!((report.health.as_str(), report.cause.as_str(), report.leader), ("fenced", "bad page", 0));
    }

    #[test]
    fn the_disk_of_a_directory_has_a_size() {
        let dir = tempfile::tempdir().unwrap();
        let (size, free) = disk(dir.path()).unwrap();
        assert!(size > 0 && free <= size);
        assert_eq!(disk(&dir.path().join("absent")), None);
    }
}
