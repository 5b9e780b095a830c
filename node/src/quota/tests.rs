//! Several nodes and one book.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use ensign_raft::env::{OsRng, SystemClock};
use futures::FutureExt as _;

use super::*;
use crate::catalog::{Change, Limit, NodeRecord, QuotaChange, testing};

/// The way to node 1, which leads, unless it is cut.
#[derive(Clone, Default)]
struct Wire {
    leader: Arc<Mutex<Option<Quotas>>>,
    cut: Arc<AtomicBool>,
}

impl Wire {
    fn leader(&self) -> Result<Quotas, String> {
        let leader = lock(&self.leader).clone().filter(|_| !self.cut.load(Ordering::SeqCst));
        leader.ok_or_else(|| "cut off".to_owned())
    }
}

impl QuotaLink for Wire {
    fn take(&self, _: NodeId, take: Take) -> BoxFuture<'static, Result<Taken, String>> {
        let taken = self.leader().map(|leader| leader.serve_take(take));
        async move { taken }.boxed()
    }

    fn report(&self, _: NodeId, uses: Vec<(ProjectId, Use)>) -> BoxFuture<'static, Result<Option<Reported>, String>> {
        // Who calls is known from the connection; here there is one other node.
        let reported = self.leader().map(|leader| leader.serve_report(NodeId(2), uses));
        async move { reported }.boxed()
    }

    fn usage(&self, _: NodeId, projects: Vec<ProjectId>) -> BoxFuture<'static, Result<Option<Vec<Total>>, String>> {
        let totals = self.leader().map(|leader| leader.serve_usage(&projects));
        async move { totals }.boxed()
    }
}

struct Cluster {
    catalog: Catalog,
    wire: Wire,
    nodes: Vec<Quotas>,
    project: ProjectId,
    stored: Arc<Mutex<BTreeMap<NodeId, u64>>>,
}

/// Two nodes; the catalog of these tests is always led by node 1.
async fn cluster() -> Cluster {
    let catalog = testing::solo(Arc::new(SystemClock), Arc::new(OsRng));
    for id in [1, 2] {
        let record = NodeRecord { id: NodeId(id), name: format!("node-{id}"), ..NodeRecord::default() };
        catalog.put_node(record).await.unwrap();
    }
    let org = catalog.create_organization("Example").await.unwrap();
    let project = catalog.create_project(org.id, "first").await.unwrap().id;
    let (wire, stored) = (Wire::default(), Arc::<Mutex<BTreeMap<NodeId, u64>>>::default());
    let node = |id: u64| {
        let stored = Arc::clone(&stored);
        Quotas::new(QuotaParts {
            me: NodeId(id),
            catalog: catalog.clone(),
            link: Arc::new(wire.clone()),
            stored: Arc::new(move || {
                lock(&stored).get(&NodeId(id)).map(|bytes| (project, *bytes)).into_iter().collect()
            }),
        })
    };
    let nodes = vec![node(1), node(2)];
    *lock(&wire.leader) = Some(nodes[0].clone());
    Cluster { catalog, wire, nodes, project, stored }
}

impl Cluster {
    async fn limit(&self, change: QuotaChange) {
        self.catalog.set_quota(Some(self.project), change).await.unwrap();
    }

    /// How many events a node lets in during some time, when somebody always wants to publish ten more.
    async fn flood(&self, node: usize, time: Duration) -> u64 {
        let meter = self.nodes[node].meter(self.project);
        let until = Instant::now() + time;
        let mut events = 0;
        while Instant::now() < until {
            if meter.admit(10, 1).await.is_ok() {
                events += 10;
            }
        }
        events
    }
}

fn events(limit: u64) -> QuotaChange {
    QuotaChange { events_per_second: Change::Set(Limit::At(limit)), ..QuotaChange::default() }
}

#[tokio::test(start_paused = true)]
async fn two_nodes_together_let_in_what_the_project_may_wherever_its_clients_are() {
    let cluster = cluster().await;
    cluster.limit(events(1_000)).await;
    let time = Duration::from_mins(1);
    let (first, second) = tokio::join!(cluster.flood(0, time), cluster.flood(1, time));
    // The limit for the time and a burst; what each node took ahead; a last run.
    let most = 1_000 * 61 + (50 + 10) + 2 * 50;
    assert!((59_000..=most).contains(&(first + second)), "{first} + {second}");
    assert!(first > 20_000 && second > 20_000, "{first} and {second}: neither is starved");
    // All of it on one node, too.
    let alone = cluster.flood(1, time).await;
    assert!((59_000..=most).contains(&alone), "{alone}");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_reach_the_leader_lets_in_its_even_share() {
    let cluster = cluster().await;
    cluster.limit(events(1_000)).await;
    cluster.wire.cut.store(true, Ordering::SeqCst);
    let time = Duration::from_mins(1);
    let apart = cluster.flood(1, time).await;
    assert!((29_000..=500 * 62 + 100).contains(&apart), "{apart}");
    cluster.wire.cut.store(false, Ordering::SeqCst);
    let together = cluster.flood(1, time).await;
    assert!(together > 58_000, "{together}");
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_is_told_when_to_come_back_and_a_large_run_is_let_in_once() {
    let cluster = cluster().await;
    cluster.limit(events(10)).await;
    let meter = cluster.nodes[1].meter(cluster.project);
    meter.admit(1_000, 1).await.expect("larger than the limit of a second: it goes, and is paid back");
    let begun = Instant::now();
    let exhausted = meter.admit(2, 1).await.unwrap_err();
    let Exhausted::Rate { resource: Resource::EventsPerSecond, limit: 10, retry_after } = exhausted else {
        panic!("{exhausted:?}")
    };
    assert!(retry_after > Duration::from_secs(5) && begun.elapsed() <= meter::PATIENCE, "{retry_after:?}");
    // Of bytes it is said that they are bytes.
    let bytes = Change::Set(Limit::At(10));
    cluster
        .limit(QuotaChange { events_per_second: Change::Unset, bytes_per_second: bytes, ..Default::default() })
        .await;
    meter.admit(1, 1_000).await.unwrap();
    let exhausted = meter.admit(1, 2).await.unwrap_err();
    assert_eq!(exhausted.resource(), Resource::BytesPerSecond);
    // And a limit that is lifted lets everybody in.
    cluster.limit(QuotaChange { bytes_per_second: Change::Unset, ..Default::default() }).await;
    meter.admit(1_000_000, 1 << 40).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_stored_anywhere_counts_everywhere() {
    let cluster = cluster().await;
    let stored = Change::Set(Limit::At(100));
    cluster.limit(QuotaChange { stored_bytes: stored, ..Default::default() }).await;
    *lock(&cluster.stored) = BTreeMap::from([(NodeId(1), 60), (NodeId(2), 50)]);
    let meter = cluster.nodes[1].meter(cluster.project);
    meter.admit(1, 1).await.expect("nobody knows yet");
    for _ in 0..4 {
        for node in &cluster.nodes {
            node.report(REPORT_EVERY).await;
        }
        tokio::time::advance(REPORT_EVERY).await;
    }
    for node in &cluster.nodes {
        let refused = node.meter(cluster.project).admit(1, 1).await.unwrap_err();
        assert_eq!(refused, Exhausted::Stored { limit: 100, stored: 110 });
        let total = node.usage(vec![cluster.project]).await.unwrap()[0];
        assert_eq!(total.sum.stored_bytes, 110);
    }
    // A topic was destroyed.
    lock(&cluster.stored).remove(&NodeId(1));
    for node in [0, 1, 0] {
        cluster.nodes[node].report(REPORT_EVERY).await;
    }
    cluster.nodes[0].meter(cluster.project).admit(1, 49).await.unwrap();
    let refused = cluster.nodes[0].meter(cluster.project).admit(1, 1).await;
    assert!(matches!(refused, Ok(())), "99 of 100: {refused:?}");
    let refused = cluster.nodes[0].meter(cluster.project).admit(1, 1).await.unwrap_err();
    assert_eq!(refused, Exhausted::Stored { limit: 100, stored: 100 }, "what was let in since counts at once");
}

#[tokio::test]
async fn streams_have_so_many_places_and_meters_that_nobody_uses_are_forgotten() {
    let cluster = cluster().await;
    let streams = Change::Set(Limit::At(2));
    cluster.limit(QuotaChange { streams, ..Default::default() }).await;
    let node = &cluster.nodes[0];
    let open = || node.meter(cluster.project).open_stream();
    let (first, second) = (open().unwrap(), open().unwrap());
    assert_eq!(open().unwrap_err(), Exhausted::Streams { limit: 2 });
    drop(first);
    let third = open().unwrap();
    node.report(REPORT_EVERY).await;
    assert_eq!(lock(&node.0.meters).len(), 1);
    drop((second, third));
    node.report(REPORT_EVERY).await;
    assert!(lock(&node.0.meters).is_empty());
}
