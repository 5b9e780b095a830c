//! The words of all nodes, put together by the one that was asked.

use std::collections::BTreeMap;
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

/// How long a node may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
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
        }
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
        let mut partitions: Vec<_> = topics
            .iter()
            .take(PARTITIONS_MAX)
            .map(|topic| pb::PartitionAssignment {
                group_id: topic.group.0,
                name: topic.name.as_str().to_owned(),
                replicas: self.catalog.replicas_of(topic).iter().map(|node| node.0).collect(),
            })
            .collect();
        partitions.sort_by_key(|partition| partition.group_id);
        partitions
    }

    async fn ask(&self, node: NodeId, mut reply: pb::PeerReport) -> pb::PeerReport {
        let (asked, before) = (Instant::now(), self.reporter.wall());
        let answer = if node == self.reporter.me() { Ok(self.reporter.own()) } else { self.ask_peer(node).await };
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

    async fn ask_peer(&self, node: NodeId) -> Result<pb::NodeReport, String> {
        let channel = self.channels.bulk(node).ok_or("this node does not know how to reach it")?;
        let mut client = ReportClient::new(channel).max_decoding_message_size(REPORT_MAX);
        match timeout(PATIENCE, client.node(peer::NodeReportRequest {})).await {
            Ok(Ok(report)) => Ok(report.into_inner()),
            Ok(Err(status)) if status.code() == tonic::Code::Unimplemented => {
                Err("it runs a version that does not report".to_owned())
            }
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_elapsed) => Err(format!("no answer within {} seconds", PATIENCE.as_secs())),
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
        ..Default::default()
    }
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
    fn an_offset_has_one_sign() {
        assert_eq!(signed(-1_500_000_000), prost_types::Duration { seconds: -1, nanos: -500_000_000 });
        assert_eq!(signed(250_000_000), prost_types::Duration { seconds: 0, nanos: 250_000_000 });
    }
}
