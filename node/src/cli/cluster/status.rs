//! The whole cluster at one look: `ensign cluster status`.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use ensign_proto::GroupId;
use ensign_proto::pb::admin::v1 as pb;
use prost::Message as _;
use serde::Serialize;

use crate::cli::args::{Output, ReportArgs};
use crate::cli::connect::connect;
use crate::cli::exit::{Exit, exit_code};
use crate::cli::output::{self, line, list};
use crate::cli::watch::watched;

/// How long a node may take to put a report together and send it.
const DIRECT_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Serialize)]
struct Shown {
    cluster: String,
    answered_by: u64,
    nodes: Vec<ShownNode>,
    partitions: usize,
    /// Groups by the node that leads them; groups without a leader are not among them.
    led: usize,
    /// The groups that span the cluster, as their leaders tell.
    groups: Vec<ShownGroup>,
}

#[derive(Serialize)]
struct ShownGroup {
    name: String,
    /// None, where no node that answers leads it.
    leader: Option<u64>,
    voters: Vec<u64>,
    learners: Vec<u64>,
}

#[derive(Serialize)]
struct ShownNode {
    id: u64,
    name: String,
    region: String,
    zone: String,
    address: String,
    /// `serving`, `starting`, `stopping`, `silent` or `never seen`.
    state: String,
    failure: Option<String>,
    version: Option<String>,
    uptime_seconds: Option<u64>,
    leads: Option<u64>,
    replicas: Option<u64>,
    disk_bytes: Option<u64>,
    disk_free_bytes: Option<u64>,
    clock_offset_seconds: Option<f64>,
    lease_left_seconds: Option<f64>,
    certificate_expires: Option<String>,
    troubles: BTreeMap<String, String>,
}

/// Runs `ensign cluster status`.
pub(super) async fn run(args: ReportArgs) -> anyhow::Result<()> {
    let output = args.client.output;
    watching(&args, |report| show(output, &report)).await
}

/// Shows a report once, or again and again with `--watch`.
pub(in crate::cli) async fn watching(
    args: &ReportArgs,
    mut show: impl FnMut(pb::ClusterReportReply) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    watched(args.watch, args.client.output, async || show(report(args).await?)).await
}

/// Asks for a report: with the operator's key, or without any from a node's own metrics port.
pub(in crate::cli) async fn report(args: &ReportArgs) -> anyhow::Result<pb::ClusterReportReply> {
    let Some(url) = &args.direct else {
        let report = async { anyhow::Ok(connect(&args.client)?.admin()?.cluster_report().await?) };
        return report.await.map_err(|error| match exit_code(&error) {
            Exit::Unavailable => error.context("without a quorum, ask a node itself: --direct http://HOST:1205"),
            _ => error,
        });
    };
    let url = format!("{}/report", url.trim_end_matches('/'));
    let client = reqwest::Client::builder().timeout(DIRECT_PATIENCE).build()?;
    let answer = async { client.get(&url).send().await?.error_for_status()?.bytes().await }.await;
    let bytes =
        answer.with_context(|| format!("cannot get {url}: --direct wants the metrics address of a node that runs"))?;
    pb::ClusterReportReply::decode(bytes).with_context(|| format!("{url} is not the report of an Ensign node"))
}

fn show(output: Output, report: &pb::ClusterReportReply) -> anyhow::Result<()> {
    let shown = Shown {
        cluster: report.cluster_id.clone(),
        answered_by: report.answered_by,
        nodes: report.nodes.iter().map(node).collect(),
        partitions: report.partitions.len(),
        led: report.nodes.iter().filter_map(|it| it.report.as_ref()).map(|it| it.leads as usize).sum(),
        groups: [(GroupId::CATALOG, "catalog"), (GroupId::VAULT, "vault")]
            .map(|(id, name)| group(report, id, name))
            .into(),
    };
    if output == Output::Json {
        return output::json(&shown);
    }
    let answering = shown.nodes.iter().filter(|node| node.failure.is_none()).count();
    line(format_args!(
        "cluster {}: {answering} of {} nodes answer, {} partitions, {} groups have a leader (asked by node {})",
        shown.cluster,
        shown.nodes.len(),
        shown.partitions,
        shown.led,
        shown.answered_by,
    ))?;
    for group in &shown.groups {
        line(format_args!("{}", of_group(group)))?;
    }
    let headings =
        ["node", "name", "place", "address", "state", "version", "up", "leads", "replicas", "disk free", "clock"];
    list(output, &headings, &shown.nodes, row, "no nodes")?;
    shown.nodes.iter().flat_map(not_well).try_for_each(line)
}

/// What is wrong with a node, a sentence each: too long for a table.
fn not_well(node: &ShownNode) -> Vec<String> {
    let silent = node.failure.iter().map(|failure| match node.state.as_str() {
        "never seen" => format!("node {} has joined and never served", node.id),
        _ => format!("node {} is silent: {failure}", node.id),
    });
    let troubles =
        node.troubles.iter().map(|(what, trouble)| format!("node {} is not well: {what}: {trouble}", node.id));
    silent.chain(troubles).collect()
}

/// What the newest leader of a group says of its members.
fn group(report: &pb::ClusterReportReply, id: GroupId, name: &str) -> ShownGroup {
    let reports = report.nodes.iter().filter_map(|it| it.report.as_ref());
    let led = reports.flat_map(|it| it.groups.iter().filter(|group| group.leader == it.node_id));
    let leader = led.filter(|group| group.group_id == id.0).max_by_key(|group| group.term);
    let members = |votes: bool| {
        let members = leader.iter().flat_map(|group| &group.members).filter(move |it| it.voter == votes);
        members.map(|it| it.node_id).collect()
    };
    let (voters, learners) = (members(true), members(false));
    ShownGroup { name: name.to_owned(), leader: leader.map(|group| group.leader), voters, learners }
}

fn of_group(group: &ShownGroup) -> String {
    let list = |nodes: &[u64]| nodes.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let Some(leader) = group.leader else { return format!("{}: no node that answers leads it", group.name) };
    let voters = list(&group.voters);
    match &group.learners[..] {
        [] => format!("{}: led by node {leader}; voters {voters}", group.name),
        learners => format!("{}: led by node {leader}; voters {voters}; learners {}", group.name, list(learners)),
    }
}

fn node(peer: &pb::PeerReport) -> ShownNode {
    let report = peer.report.as_ref();
    let seconds = |span: &prost_types::Duration| span.seconds as f64 + f64::from(span.nanos) / 1e9;
    ShownNode {
        id: peer.node_id,
        name: peer.name.clone(),
        region: peer.region.clone(),
        zone: peer.zone.clone(),
        address: peer.address.clone(),
        state: report
            .map_or_else(|| if peer.never_started { "never seen" } else { "silent" }.to_owned(), |it| it.phase.clone()),
        failure: (!peer.failure.is_empty()).then(|| peer.failure.clone()),
        version: report.map(|it| it.version.clone()),
        uptime_seconds: report.and_then(|it| it.uptime.as_ref()).map(|it| it.seconds.unsigned_abs()),
        leads: report.map(|it| it.leads),
        replicas: report.map(|it| it.replicas),
        disk_bytes: report.map(|it| it.disk_bytes),
        disk_free_bytes: report.map(|it| it.disk_free_bytes),
        clock_offset_seconds: peer.clock_offset.as_ref().filter(|_| report.is_some()).map(seconds),
        lease_left_seconds: report.and_then(|it| it.lease_left.as_ref()).map(seconds),
        certificate_expires: report.and_then(|it| output::wire_time(it.certificate_expires.as_ref())),
        troubles: report.map(|it| it.troubles.clone().into_iter().collect()).unwrap_or_default(),
    }
}

fn row(node: &ShownNode) -> Vec<String> {
    let number = |number: Option<u64>| number.map_or_else(String::new, output::thousands);
    let free = node.disk_free_bytes.zip(node.disk_bytes).and_then(|(free, all)| (free * 100).checked_div(all));
    let uptime = node.uptime_seconds.map(|it| humantime::format_duration(Duration::from_secs(it)).to_string());
    vec![
        node.id.to_string(),
        node.name.clone(),
        [&*node.region, &*node.zone].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/"),
        node.address.clone(),
        node.state.clone(),
        node.version.clone().unwrap_or_default(),
        uptime.unwrap_or_default(),
        number(node.leads),
        number(node.replicas),
        free.map_or_else(String::new, |free| format!("{free} %")),
        node.clock_offset_seconds.map_or_else(String::new, |offset| format!("{:+.0} ms", offset * 1e3)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_groups_of_the_cluster_show_who_votes_and_who_learns() {
        let said = |node: u64, term: u64, members: &[(u64, bool)]| {
            let members =
                members.iter().map(|(node_id, voter)| pb::MemberReport { node_id: *node_id, voter: *voter, lag: 0 });
            let members = members.collect();
            let group = pb::GroupReport { group_id: 1, term, leader: node, members, ..Default::default() };
            let report = pb::NodeReport { node_id: node, groups: vec![group], ..Default::default() };
            pb::PeerReport { node_id: node, report: Some(report), ..Default::default() }
        };
        // Node 1 believes to lead still.
        let nodes = vec![
            said(1, 4, &[(1, true), (2, true), (3, true)]),
            said(2, 7, &[(1, false), (2, true), (3, true), (4, true)]),
        ];
        let report = pb::ClusterReportReply { nodes, ..Default::default() };
        let shown =
            [(GroupId::CATALOG, "catalog"), (GroupId::VAULT, "vault")].map(|(id, name)| group(&report, id, name));
        assert_eq!(
            shown.each_ref().map(of_group),
            ["catalog: led by node 2; voters 2, 3, 4; learners 1", "vault: no node that answers leads it"]
        );
    }

    #[test]
    fn a_silent_node_says_why_and_shows_nothing_else() {
        let peer = pb::PeerReport {
            node_id: 3,
            name: "three".to_owned(),
            region: "north".to_owned(),
            zone: "a".to_owned(),
            address: "node-3:5357".to_owned(),
            failure: "connection refused".to_owned(),
            clock_offset: Some(prost_types::Duration { seconds: 9, nanos: 0 }),
            ..Default::default()
        };
        let silent = node(&peer);
        assert_eq!(row(&silent), ["3", "three", "north/a", "node-3:5357", "silent", "", "", "", "", "", ""]);
        assert_eq!(not_well(&silent), ["node 3 is silent: connection refused"]);
    }

    #[test]
    fn a_node_shows_its_disk_and_its_clock() {
        let peer = pb::PeerReport {
            node_id: 1,
            clock_offset: Some(prost_types::Duration { seconds: 0, nanos: -12_000_000 }),
            report: Some(pb::NodeReport {
                phase: "serving".to_owned(),
                version: "1.0.0".to_owned(),
                uptime: Some(prost_types::Duration { seconds: 3_661, nanos: 0 }),
                disk_bytes: 1_000,
                disk_free_bytes: 555,
                leads: 1_234,
                replicas: 3_000,
                troubles: [("vault".to_owned(), "sealed".to_owned())].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let shown = node(&peer);
        assert_eq!(row(&shown), ["1", "", "", "", "serving", "1.0.0", "1h 1m 1s", "1,234", "3,000", "55 %", "-12 ms"]);
        assert_eq!(not_well(&shown), ["node 1 is not well: vault: sealed"]);
    }
}
