//! The words of all nodes, put together by the one that was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::pb::admin::v1 as pb;
use ensign_proto::pb::ensign::peer::v1 as peer;
use ensign_proto::pb::ensign::peer::v1::report_client::ReportClient;
use ensign_proto::pb::ensign::peer::v1::report_server::{Report, ReportServer};
use ensign_proto::{ClusterId, GroupId, NodeId};
use futures::StreamExt as _;
use tokio::time::{Instant, timeout};
use tonic::{Request, Response, Status};

use super::own::{Reporter, span};
use crate::catalog::{Catalog, NodeRecord, NodeState};
use crate::partition::forward::Channels;
use crate::placement::{Obstacle, ObstacleKind, obstacles};

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long, where it is only to tell what it leads.
const LEADERS_PATIENCE: Duration = Duration::from_millis(1_500);
/// Nodes that are asked at once.
const ASKED_AT_ONCE: usize = 32;
/// The largest report of a node: some 100 bytes for each group.
const REPORT_MAX: usize = 32 << 20;
/// The most partitions that a reply lists.
const PARTITIONS_MAX: usize = 100_000;

/// Asks every node how it is. Clones share it.
#[derive(Clone)]
pub struct PeerReports {
    cluster: ClusterId,
    reporter: Reporter,
    catalog: Catalog,
    channels: Arc<dyn Channels>,
}

impl fmt::Debug for PeerReports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerReports").field("reporter", &self.reporter).finish_non_exhaustive()
    }
}

impl PeerReports {
    /// Asks over these channels the nodes that the catalog lists.
    pub fn new(cluster: ClusterId, reporter: Reporter, catalog: Catalog, channels: Arc<dyn Channels>) -> Self {
        Self { cluster, reporter, catalog, channels }
    }

    /// How every node is, and which partitions there are. Silent nodes are told as such.
    pub async fn gather(&self) -> pb::ClusterReportReply {
        let mut listed: BTreeMap<NodeId, pb::PeerReport> = self
            .catalog
            .nodes()
            .iter()
            .filter(|node| is_of_the_cluster(node))
            .map(|node| (node.id, listed(node)))
            .collect();
        let me = self.reporter.me();
        listed.entry(me).or_insert_with(|| pb::PeerReport { node_id: me.0, ..Default::default() });
        let names = self.names();
        let asked = listed.into_iter().map(|(node, reply)| self.ask(node, reply));
        let mut reports: Vec<_> = futures::stream::iter(asked).buffered(ASKED_AT_ONCE).collect().await;
        for group in reports.iter_mut().filter_map(|it| it.report.as_mut()).flat_map(|it| &mut it.groups) {
            group.name = names.get(&GroupId(group.group_id)).cloned().unwrap_or_default();
        }
        pb::ClusterReportReply {
            cluster_id: self.cluster.to_string(),
            answered_by: self.reporter.me().0,
            nodes: reports,
            partitions: self.partitions(),
            removed: self.catalog.revoked_nodes().iter().map(|node| node.0).collect(),
        }
    }

    /// Who leads which of these groups, as those of `nodes` say that answer in time. A node that leads in an older term is not believed.
    pub async fn leaders(&self, nodes: BTreeSet<NodeId>, wanted: &BTreeSet<GroupId>) -> BTreeMap<GroupId, NodeId> {
        let asked = nodes.into_iter().filter(|node| *node != self.reporter.me()).map(async |node| {
            let report = self.ask_peer(node, LEADERS_PATIENCE).await.ok()?;
            Some((node, report))
        });
        let reports: Vec<_> = futures::stream::iter(asked).buffer_unordered(ASKED_AT_ONCE).collect().await;
        newest_leaders(reports.into_iter().flatten(), wanted)
    }

    /// The same without the names of topics, for whoever has not logged in.
    pub async fn nameless(&self) -> pb::ClusterReportReply {
        let mut reply = self.gather().await;
        let reports = reply.nodes.iter_mut().filter_map(|it| it.report.as_mut());
        for group in reports.flat_map(|it| &mut it.groups).filter(|it| it.group_id >= GroupId::FIRST_PARTITION.0) {
            group.name.clear();
        }
        reply.partitions.iter_mut().for_each(|partition| partition.name.clear());
        reply
    }

    fn names(&self) -> BTreeMap<GroupId, String> {
        let topics = self.catalog.all_topics();
        let topics = topics.iter().map(|topic| (topic.group, topic.name.as_str().to_owned()));
        let own = [(GroupId::CATALOG, "catalog".to_owned()), (GroupId::VAULT, "vault".to_owned())];
        topics.chain(own).collect()
    }

    fn partitions(&self) -> Vec<pb::PartitionAssignment> {
        let topics = self.catalog.all_topics();
        let obstacles = obstacles(&self.catalog, self.reporter.wall());
        let numbers = |nodes: &BTreeSet<NodeId>| nodes.iter().map(|node| node.0).collect();
        let mut partitions: Vec<_> = topics
            .iter()
            .take(PARTITIONS_MAX)
            .map(|topic| pb::PartitionAssignment {
                group_id: topic.group.0,
                name: topic.name.as_str().to_owned(),
                replicas: numbers(&self.catalog.replicas_of(topic)),
                target: topic.reassignment.as_ref().map(|on| numbers(&on.target)).unwrap_or_default(),
                obstacle: obstacles.get(&topic.id).map(on_wire),
            })
            .collect();
        partitions.sort_by_key(|partition| partition.group_id);
        partitions
    }

    async fn ask(&self, node: NodeId, mut reply: pb::PeerReport) -> pb::PeerReport {
        let (asked, before) = (Instant::now(), self.reporter.wall());
        let answer =
            if node == self.reporter.me() { Ok(self.reporter.own()) } else { self.ask_peer(node, PATIENCE).await };
        let round_trip = asked.elapsed();
        reply.round_trip = span(round_trip);
        match answer {
            Ok(report) => {
                let theirs = report.wall_clock.as_ref().map(|time| nanos(time.seconds, time.nanos));
                let middle = i128::from(before.0) + (round_trip / 2).as_nanos().cast_signed();
                reply.clock_offset = theirs.map(|theirs| signed(theirs - middle));
                reply.report = Some(report);
            }
            Err(failure) => reply.failure = failure,
        }
        reply
    }

    async fn ask_peer(&self, node: NodeId, patience: Duration) -> Result<pb::NodeReport, String> {
        let channel = self.channels.bulk(node).ok_or("this node does not know how to reach it")?;
        let mut client = ReportClient::new(channel).max_decoding_message_size(REPORT_MAX);
        match timeout(patience, client.node(peer::NodeReportRequest {})).await {
            Ok(Ok(report)) => Ok(report.into_inner()),
            Ok(Err(status)) if status.code() == tonic::Code::Unimplemented => {
                Err("it runs a version that does not report".to_owned())
            }
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_elapsed) => Err(format!("no answer within {} s", patience.as_secs_f64())),
        }
    }
}

/// One that was removed is in the catalog for ever, so that its number never comes back; nobody waits for its answer.
fn is_of_the_cluster(node: &NodeRecord) -> bool {
    node.state != NodeState::Removed
}

/// What the catalog says of a node.
fn listed(node: &NodeRecord) -> pb::PeerReport {
    pb::PeerReport {
        node_id: node.id.0,
        address: node.peer.clone(),
        name: node.name.clone(),
        region: node.region.clone(),
        zone: node.zone.clone(),
        draining: node.state == NodeState::Draining,
        never_started: !node.has_started(),
        ..Default::default()
    }
}

/// Of those that say that they lead a group, the one in the newest term.
fn newest_leaders(
    reports: impl Iterator<Item = (NodeId, pb::NodeReport)>,
    wanted: &BTreeSet<GroupId>,
) -> BTreeMap<GroupId, NodeId> {
    let mut newest: BTreeMap<GroupId, (u64, NodeId)> = BTreeMap::new();
    for (node, report) in reports {
        let led =
            report.groups.iter().filter(|group| group.leader == node.0 && wanted.contains(&GroupId(group.group_id)));
        for group in led {
            let known = newest.entry(GroupId(group.group_id)).or_insert((group.term, node));
            *known = (*known).max((group.term, node));
        }
    }
    newest.into_iter().map(|(group, (_, node))| (group, node)).collect()
}

fn on_wire(obstacle: &Obstacle) -> pb::Obstacle {
    let kind = match obstacle.kind {
        ObstacleKind::Nodes => pb::obstacle::Kind::Nodes,
        ObstacleKind::Majority => pb::obstacle::Kind::Majority,
        ObstacleKind::Waits => pb::obstacle::Kind::Waits,
        ObstacleKind::Slow => pb::obstacle::Kind::Slow,
        ObstacleKind::Untaken => pb::obstacle::Kind::Untaken,
    };
    let nodes = obstacle.nodes.iter().map(|node| node.0).collect();
    pb::Obstacle { kind: kind.into(), what: obstacle.what.clone(), nodes }
}

fn nanos(seconds: i64, nanos: i32) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanos)
}

/// A span that may be negative; seconds and nanoseconds have the same sign.
fn signed(nanos: i128) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(nanos / 1_000_000_000).unwrap_or_default(),
        nanos: (nanos % 1_000_000_000) as i32,
    }
}

/// Answers other nodes that ask how this one is.
#[derive(Debug, Clone)]
pub struct ReportService(Reporter);

impl ReportService {
    /// The service, ready to be added to the peer server.
    pub fn server(reporter: Reporter) -> ReportServer<Self> {
        ReportServer::new(Self(reporter)).max_encoding_message_size(REPORT_MAX)
    }
}

#[tonic::async_trait]
impl Report for ReportService {
    async fn node(&self, _request: Request<peer::NodeReportRequest>) -> Result<Response<pb::NodeReport>, Status> {
        Ok(Response::new(self.0.own()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_drained_is_told_as_such() {
        let told = |state| listed(&NodeRecord { state, ..NodeRecord::default() }).draining;
        assert_eq!((told(NodeState::Active), told(NodeState::Draining)), (false, true));
    }

    #[test]
    fn of_two_that_say_that_they_lead_the_newer_is_believed() {
        let said = |node: u64, groups: &[(u64, u64, u64)]| {
            let groups = groups.iter().map(|(group_id, term, leader)| pb::GroupReport {
                group_id: *group_id,
                term: *term,
                leader: *leader,
                ..Default::default()
            });
            (NodeId(node), pb::NodeReport { node_id: node, groups: groups.collect(), ..Default::default() })
        };
        // Node 1 was cut off, and node 3 only repeats what it has heard.
        let reports = [said(2, &[(16, 7, 2), (17, 1, 2)]), said(1, &[(16, 5, 1), (18, 1, 1)]), said(3, &[(16, 9, 1)])];
        let leaders = newest_leaders(reports.into_iter(), &[16, 18, 19].map(GroupId).into());
        assert_eq!(leaders, [(GroupId(16), NodeId(2)), (GroupId(18), NodeId(1))].into());
    }

    #[test]
    fn an_offset_has_one_sign() {
        assert_eq!(signed(-1_500_000_000), prost_types::Duration { seconds: -1, nanos: -500_000_000 });
        assert_eq!(signed(250_000_000), prost_types::Duration { seconds: 0, nanos: 250_000_000 });
    }
}
