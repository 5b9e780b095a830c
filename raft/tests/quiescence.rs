//! Many groups that sleep, over the network in memory and in paused time: what wakes them, and what does not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{GroupId, NodeId, Term};
use ensign_raft::env::{SeededRng, SystemClock, Tasks};
use ensign_raft::testing::{Journal, MemoryNet, QUICK, quick};
use ensign_raft::{DiskReads, Group, GroupSpec, Mode, Runtime, RuntimeConfig};
use ensign_storage::{MemoryLog, NodeLog as _};
use tokio::time::{Instant, sleep};

const GROUPS: u64 = 30;
/// Far above what anything here takes in simulated time.
const PATIENCE: Duration = Duration::from_secs(20);

struct Node {
    runtime: Runtime,
    groups: BTreeMap<GroupId, Group<Journal>>,
    log: MemoryLog,
    tasks: Tasks,
}

struct Cluster {
    net: MemoryNet,
    nodes: BTreeMap<NodeId, Node>,
    lives: u64,
    quiesce_after: Duration,
}

const VOTERS: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];

fn ids() -> impl Iterator<Item = GroupId> {
    (16..16 + GROUPS).map(GroupId)
}

impl Cluster {
    async fn start() -> Self {
        let cluster = Self::start_awake(Duration::from_secs(1)).await;
        cluster.all_sleep(&VOTERS).await;
        cluster
    }

    async fn start_awake(quiesce_after: Duration) -> Self {
        let mut cluster = Self { net: MemoryNet::new(), nodes: BTreeMap::new(), lives: 0, quiesce_after };
        for node in VOTERS {
            cluster.start_node(node, MemoryLog::new()).await;
        }
        cluster.all_led().await;
        cluster
    }

    async fn start_node(&mut self, node: NodeId, log: MemoryLog) {
        self.lives += 1;
        let config = RuntimeConfig {
            incarnation: self.lives,
            quiesce_after: Some(self.quiesce_after),
            disk_reads: DiskReads::Inline,
            ..quick(node)
        };
        let rng = Arc::new(SeededRng::new(self.lives));
        let tasks = Tasks::new();
        let runtime = Runtime::new(config, self.net.transport(node), Arc::new(SystemClock), rng, tasks.clone());
        self.net.attach(&runtime);
        let mut groups = BTreeMap::new();
        for id in ids() {
            let spec = GroupSpec { id, voters: VOTERS.into(), mode: Mode::Found };
            let group = runtime.start(spec, log.group(id), Journal::default()).await.expect("the group starts");
            groups.insert(id, group);
        }
        self.nodes.insert(node, Node { runtime, groups, log, tasks });
    }

    async fn kill(&mut self, node: NodeId) -> MemoryLog {
        let dead = self.nodes.remove(&node).expect("the node runs");
        self.net.detach(node);
        let log = dead.log.crash();
        assert!(dead.tasks.shut_down(PATIENCE).await, "its tasks end");
        log
    }

    /// Who leads a group, says a majority-backed leader itself.
    fn leader(&self, id: GroupId) -> Option<(NodeId, Term)> {
        let leading = self.nodes.iter().filter_map(|(node, there)| {
            let now = *there.groups[&id].leadership().borrow();
            (now.ready && now.leads(*node)).then_some((*node, now.term))
        });
        leading.max_by_key(|(_, term)| *term)
    }

    fn leaders(&self) -> BTreeMap<GroupId, (NodeId, Term)> {
        ids().filter_map(|id| Some((id, self.leader(id)?))).collect()
    }

    async fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !holds() {
            assert!(Instant::now() < end, "not within {PATIENCE:?}: {what}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn all_led(&self) {
        self.until("every group has a leader", || self.leaders().len() as u64 == GROUPS).await;
    }

    fn asleep(&self, node: NodeId) -> BTreeSet<GroupId> {
        let groups = self.nodes[&node].runtime.groups();
        groups.into_iter().filter(|status| status.asleep).map(|status| status.id).collect()
    }

    async fn all_sleep(&self, nodes: &[NodeId]) {
        let awake = || nodes.iter().map(|node| GROUPS - self.asleep(*node).len() as u64).sum::<u64>();
        self.until(&format!("all groups sleep on {nodes:?}"), || awake() == 0).await;
    }

    async fn write(&self, id: GroupId) {
        let (leader, _) = self.leader(id).expect("the group has a leader");
        let group = &self.nodes[&leader].groups[&id];
        group.propose(None, Bytes::from_static(b"x")).await.expect("the leader takes it");
    }

    async fn write_everywhere(&self) {
        for id in ids() {
            let end = Instant::now() + PATIENCE;
            loop {
                if let Some((leader, _)) = self.leader(id)
                    && self.nodes[&leader].groups[&id].propose(None, Bytes::from_static(b"x")).await.is_ok()
                {
                    break;
                }
                assert!(Instant::now() < end, "group {id} takes no write within {PATIENCE:?}");
                sleep(Duration::from_millis(5)).await;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_publisher_never_notices_that_a_group_slept() {
    let cluster = Cluster::start().await;
    let before = cluster.leaders();
    sleep(Duration::from_mins(1)).await;
    cluster.all_sleep(&VOTERS).await;
    for id in ids() {
        let (leader, term) = before[&id];
        let group = &cluster.nodes[&leader].groups[&id];
        // `submit` is what publishers use, and it retries nothing.
        let submitted = group.submit(Some(term), Bytes::from_static(b"x")).await.expect("the leader takes it");
        submitted.await.expect("it is committed");
    }
    assert_eq!(cluster.leaders(), before, "nobody was elected");
}

#[tokio::test(start_paused = true)]
async fn a_read_index_wakes_a_group() {
    let cluster = Cluster::start().await;
    let (id, (leader, _)) = cluster.leaders().pop_first().expect("a group");
    cluster.nodes[&leader].groups[&id].read_index().await.expect("a majority answers");
    assert!(!cluster.asleep(leader).contains(&id));
    cluster.all_sleep(&VOTERS).await;
}

#[tokio::test(start_paused = true)]
async fn leadership_moves_while_a_group_sleeps() {
    let cluster = Cluster::start().await;
    let (id, (leader, _)) = cluster.leaders().pop_first().expect("a group");
    let to = VOTERS.into_iter().find(|node| *node != leader).expect("another voter");
    cluster.nodes[&leader].groups[&id].transfer_leader(to).await.expect("it moves");
    cluster.all_led().await;
    cluster.write(id).await;
    cluster.all_sleep(&VOTERS).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_dies_and_each_of_its_groups_elects_once() {
    let mut cluster = Cluster::start().await;
    let before = cluster.leaders();
    let dead = NodeId(1);
    let led: Vec<_> = before.iter().filter(|(_, (leader, _))| *leader == dead).map(|(id, _)| *id).collect();
    assert!(led.len() as u64 >= GROUPS / 4, "leaders are spread: {before:?}");
    cluster.kill(dead).await;
    cluster.all_led().await;
    let after = cluster.leaders();
    let mut heirs: BTreeMap<NodeId, u64> = BTreeMap::new();
    for (id, (leader, term)) in &before {
        let (now, then) = after[id];
        if *leader == dead {
            *heirs.entry(now).or_default() += 1;
            assert!(then.0 - term.0 <= 2, "group {id} needed {} elections", then.0 - term.0);
        } else {
            assert_eq!((now, then), (*leader, *term), "group {id} lost a follower only");
        }
    }
    assert_eq!(heirs.len(), 2, "both survivors took some: {heirs:?}");
    cluster.write_everywhere().await;
}

#[tokio::test(start_paused = true)]
async fn the_lease_of_a_dead_leader_is_not_waited_for() {
    let mut cluster = Cluster::start().await;
    // Partitions beat five times slower than the cluster, and so long do leases of their leaders last.
    let lease = QUICK.election_max * 5;
    cluster.write_everywhere().await;
    let killed = Instant::now();
    cluster.kill(NodeId(1)).await;
    cluster.all_led().await;
    assert!(killed.elapsed() < lease, "new leaders after {:?}", killed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_dead_follower_wakes_nobody() {
    let mut cluster = Cluster::start().await;
    let before = cluster.leaders();
    let dead = NodeId(3);
    let kept: BTreeSet<_> = before.iter().filter(|(_, (leader, _))| *leader != dead).map(|(id, _)| *id).collect();
    cluster.kill(dead).await;
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        for node in [1, 2].map(NodeId) {
            let asleep = cluster.asleep(node);
            assert!(kept.is_subset(&asleep), "woken by the death of a follower: {:?}", kept.difference(&asleep));
        }
        sleep(Duration::from_millis(20)).await;
    }
    cluster.all_sleep(&[1, 2].map(NodeId)).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_that_returns_catches_up_and_what_it_did_not_miss_sleeps_on() {
    let mut cluster = Cluster::start().await;
    let back = NodeId(3);
    let log = cluster.kill(back).await;
    cluster.all_led().await;
    cluster.all_sleep(&[1, 2].map(NodeId)).await;
    let written = GroupId(16);
    cluster.write(written).await;
    cluster.all_sleep(&[1, 2].map(NodeId)).await;
    let before = cluster.leaders();
    cluster.start_node(back, log).await;
    cluster.all_sleep(&VOTERS).await;
    assert_eq!(cluster.leaders(), before, "its return deposed nobody");
    let applied = |node: NodeId| *cluster.nodes[&node].groups[&written].applied().borrow();
    assert_eq!(applied(back), applied(NodeId(1)), "it holds what was written without it");
    cluster.write_everywhere().await;
}

#[tokio::test(start_paused = true)]
async fn every_group_is_led_again_after_all_nodes_restart() {
    let mut cluster = Cluster::start().await;
    let before = cluster.leaders();
    let mut logs = Vec::new();
    for node in VOTERS {
        logs.push((node, cluster.kill(node).await));
    }
    for (node, log) in logs {
        cluster.start_node(node, log).await;
    }
    cluster.all_led().await;
    for (id, (_, term)) in cluster.leaders() {
        assert!(term.0 - before[&id].1.0 <= 3, "group {id} went from {:?} to {term}", before[&id]);
    }
    cluster.write_everywhere().await;
    cluster.all_sleep(&VOTERS).await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_was_cut_off_in_its_sleep_finds_out() {
    let cluster = Cluster::start().await;
    let before = cluster.leaders();
    cluster.net.isolate(NodeId(1));
    let led = |id: &GroupId| cluster.leader(*id).is_some_and(|(leader, _)| leader != NodeId(1));
    cluster.until("the others lead everything", || ids().all(|id| led(&id))).await;
    cluster.net.heal();
    cluster.all_sleep(&VOTERS).await;
    for (id, (leader, term)) in cluster.leaders() {
        let there = *cluster.nodes[&NodeId(1)].groups[&id].leadership().borrow();
        assert_eq!((there.leader, there.term), (Some(leader), term), "group {id} was led by {:?}", before[&id]);
    }
}

/// Node 3 loses its vote in every group while it is away, and is told nothing when it comes back.
async fn remove_the_third_while_it_is_away(cluster: &mut Cluster) -> MemoryLog {
    let away = NodeId(3);
    let log = cluster.kill(away).await;
    cluster.all_led().await;
    let stay: BTreeSet<_> = [1, 2].map(NodeId).into();
    for id in ids() {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some((leader, _)) = cluster.leader(id)
                && cluster.nodes[&leader].groups[&id].change_voters(&VOTERS.into(), stay.clone()).await.is_ok()
            {
                break;
            }
            assert!(Instant::now() < end, "group {id} keeps its voters for {PATIENCE:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }
    log
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_was_removed_while_it_was_away_keeps_nobody_awake() {
    let mut cluster = Cluster::start().await;
    let log = remove_the_third_while_it_is_away(&mut cluster).await;
    let stay = [1, 2].map(NodeId);
    cluster.all_sleep(&stay).await;
    let before = cluster.leaders();
    cluster.start_node(NodeId(3), log).await;
    for node in stay {
        // As a node watches all that its cluster lists.
        cluster.nodes[&node].runtime.watch_peers([NodeId(3)].into());
    }
    let end = Instant::now() + Duration::from_secs(15);
    while Instant::now() < end {
        for node in stay {
            assert_eq!(
                cluster.asleep(node).len() as u64,
                GROUPS,
                "node {node} was woken by a replica that is no member"
            );
        }
        sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(cluster.leaders(), before, "it deposed nobody");
    cluster.write_everywhere().await;
}

#[tokio::test(start_paused = true)]
async fn groups_sleep_beside_a_learner_that_is_dead() {
    let mut cluster = Cluster::start().await;
    for id in ids() {
        let (leader, _) = cluster.leader(id).expect("the group has a leader");
        cluster.nodes[&leader].groups[&id].add_learner(NodeId(4)).await.expect("it is added");
    }
    cluster.all_sleep(&VOTERS).await;
    cluster.kill(NodeId(3)).await;
    cluster.all_led().await;
    cluster.write_everywhere().await;
    cluster.all_sleep(&[1, 2].map(NodeId)).await;
}

/// The sweep beats for the cores, and only those tick that hear nothing.
#[tokio::test(start_paused = true)]
async fn a_group_that_is_awake_and_idle_keeps_its_leader_and_its_lease() {
    let cluster = Cluster::start_awake(Duration::from_hours(1)).await;
    let before = cluster.leaders();
    for _ in 0..20 {
        sleep(Duration::from_secs(3)).await;
        for id in ids() {
            let (leader, term) = before[&id];
            let group = &cluster.nodes[&leader].groups[&id];
            assert!(!cluster.asleep(leader).contains(&id));
            // `submit` retries nothing: with an expired lease it is refused.
            let submitted = group.submit(Some(term), Bytes::from_static(b"x")).await.expect("the leader takes it");
            submitted.await.expect("it is committed");
        }
    }
    sleep(Duration::from_mins(1)).await;
    assert_eq!(cluster.leaders(), before, "nobody was elected");
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_stops_on_a_living_node_is_replaced_though_its_group_was_awake() {
    let cluster = Cluster::start_awake(Duration::from_hours(1)).await;
    sleep(Duration::from_secs(10)).await;
    let (id, (leader, term)) = cluster.leaders().pop_first().expect("a group");
    cluster.nodes[&leader].runtime.stop(id).await;
    let others = || cluster.leader(id).is_some_and(|(now, newer)| now != leader && newer > term);
    let since = Instant::now();
    cluster.until("another one leads", others).await;
    // Its followers tick again before their time is up, so it takes no longer than an election timer and an election.
    assert!(since.elapsed() < Duration::from_secs(3), "it took {:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_group_that_is_written_every_few_seconds_does_not_fall_asleep_each_time() {
    let cluster = Cluster::start().await;
    let (id, (leader, _)) = cluster.leaders().pop_first().expect("a group");
    let asleep = || cluster.asleep(leader).contains(&id);
    let mut slept = Vec::new();
    for _ in 0..10 {
        slept.push(asleep());
        cluster.write(id).await;
        sleep(Duration::from_millis(2500)).await;
    }
    assert!(slept[0] && slept[1], "a first pause puts it to sleep: {slept:?}");
    assert!(slept[4..].iter().all(|slept| !slept), "it was put to sleep again and again: {slept:?}");
    // Left alone it sleeps, and after a long sleep it falls asleep as soon as others do.
    cluster.until("it sleeps", asleep).await;
    sleep(Duration::from_mins(5)).await;
    cluster.write(id).await;
    sleep(Duration::from_millis(2500)).await;
    assert!(asleep(), "a group that had slept long stays awake");
}
