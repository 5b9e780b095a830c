//! Partitions on one node and on three, with real Raft groups over a network that can be cut, and keys that seal nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ensign_keyvault::PlainBatch;
use ensign_keyvault::testing::ManualClock;
use ensign_proto::pb::ensign::peer::v1 as peer;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::{
    BatchHeader, ByteCount, ClusterId, GroupId, LogIndex, NodeId, Offset, Partition, PartitionContext, ProjectId,
    RingId, SessionId, TopicId,
};
use ensign_raft::env::{Clock as _, OsRng, SystemClock, Tasks};
use ensign_raft::testing::{MemoryNet, quick};
use ensign_raft::{Group, GroupSpec, Mode, Runtime};
use ensign_storage::{MemoryLog, NodeLog};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use prost::Message as _;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::append::{AppendError, Appended};
use super::appender::{Appender, Numbering, PublishError, Submission};
use super::batcher::{Admission, BatchLimits, Batcher, BatcherParts, Crowd, Tapped};
use super::freshness::{Freshness, STALENESS_MAX};
use super::handle::{BarrierLink, PartitionHandle, Parts, ReadError};
use super::keys::{Keys as _, KeysError};
use super::reach::Reach;
use super::route::{ForwardLink, Route};
use super::testing::OpenKeys;
use super::{BodyShape, FairRoom, PartitionMachine, Tail, TailBudget, encode_body, forward};

mod gathering;
mod refusals;
mod retries;
mod rings;
mod trouble;

/// The way to other nodes of the test's cluster, unless it is cut.
#[derive(Default)]
struct TestLink {
    batchers: Mutex<BTreeMap<NodeId, Batcher>>,
    groups: Mutex<BTreeMap<NodeId, Group<PartitionMachine>>>,
    cut: Mutex<BTreeSet<NodeId>>,
    tap: Mutex<Option<Arc<Tap>>>,
}

impl ForwardLink for TestLink {
    fn open(&self, leader: NodeId, _: TopicId) -> BoxFuture<'static, Result<Route, String>> {
        let cut = self.cut.lock().unwrap().contains(&leader);
        let batcher = self.batchers.lock().unwrap().get(&leader).cloned().filter(|_| !cut);
        let tap = self.tap.lock().unwrap().clone();
        let batcher = batcher.map(|batcher| tap.map_or(batcher.clone(), |tap| tap(batcher)));
        Box::pin(async move { batcher.map(Route::local).ok_or_else(|| "cut off".to_owned()) })
    }
}

impl BarrierLink for TestLink {
    fn barrier(&self, leader: NodeId, _: TopicId) -> BoxFuture<'static, Result<LogIndex, String>> {
        let cut = self.cut.lock().unwrap().contains(&leader);
        let group = self.groups.lock().unwrap().get(&leader).cloned().filter(|_| !cut);
        Box::pin(async move {
            let group = group.ok_or("cut off")?;
            group.read_index().await.map_err(|error| error.to_string())
        })
    }
}

/// What becomes of chunks on their way to another node.
type Tap = dyn Fn(Batcher) -> Batcher + Send + Sync;

struct TestNode {
    handle: PartitionHandle,
    group: Group<PartitionMachine>,
    admission: watch::Sender<Admission>,
}

struct Cluster {
    net: MemoryNet,
    nodes: BTreeMap<NodeId, TestNode>,
    link: Arc<TestLink>,
    keys: Arc<OpenKeys>,
    /// What the age of confirmations is told by.
    clock: Arc<ManualClock>,
    tasks: Tasks,
    runtimes: BTreeMap<NodeId, Runtime>,
    logs: BTreeMap<NodeId, MemoryLog>,
    voters: BTreeSet<NodeId>,
    /// How large batches become.
    target: ByteCount,
    crowd: Crowd,
    /// What the topic is bound to.
    ring: watch::Sender<RingId>,
}

const GROUP: GroupId = GroupId(16);

fn context() -> PartitionContext {
    PartitionContext {
        cluster: ClusterId::from_bytes([1; 16]),
        project: ProjectId::from_bytes([2; 16]),
        topic: TopicId::from_bytes([3; 16]),
        partition: Partition(0),
    }
}

impl Cluster {
    async fn start(size: u64) -> Self {
        let mut cluster = Self::prepare(size, MemoryLog::new);
        for me in cluster.voters.clone() {
            cluster.run(me).await;
        }
        cluster
    }

    /// Nodes that run nothing yet.
    fn prepare(size: u64, log: impl Fn() -> MemoryLog) -> Self {
        let (net, link, keys, tasks) =
            (MemoryNet::new(), Arc::<TestLink>::default(), Arc::<OpenKeys>::default(), Tasks::new());
        let manual = ManualClock::new();
        let voters: BTreeSet<_> = (1..=size).map(NodeId).collect();
        let runtimes: Vec<_> = voters
            .iter()
            .map(|me| {
                let clock = Arc::new(SystemClock);
                let runtime = Runtime::new(quick(*me), net.transport(*me), clock, Arc::new(OsRng), tasks.clone());
                net.attach(&runtime);
                runtime
            })
            .collect();
        let runtimes = runtimes.into_iter().map(|runtime| (runtime.node(), runtime)).collect();
        let logs = voters.iter().map(|me| (*me, log())).collect();
        let (nodes, target, crowd) = (BTreeMap::new(), ByteCount(8 << 10), Crowd::default());
        let ring = watch::Sender::new(RingId::default());
        Self { net, nodes, link, keys, clock: manual, tasks, runtimes, logs, voters, target, crowd, ring }
    }

    /// Starts a node's replica on what its log holds.
    async fn run(&mut self, me: NodeId) {
        // A tail this small makes readers go to the log.
        let tail = Tail::new(TailBudget::new(ByteCount(64 << 10), ByteCount(16 << 10)));
        let machine = PartitionMachine::new(context(), Arc::clone(&tail));
        let spec = GroupSpec { id: GROUP, voters: self.voters.clone(), mode: Mode::Found };
        let group = self.runtimes[&me].start(spec, self.logs[&me].group(GROUP), machine).await.unwrap();
        let (admission, admitted) = watch::channel(Admission::Open);
        let (batcher, task) = BatcherParts {
            me,
            context: context(),
            group: group.clone(),
            ring: self.ring.subscribe(),
            keys: Arc::<OpenKeys>::clone(&self.keys),
            clock: Arc::new(SystemClock),
            admission: admitted.clone(),
            limits: BatchLimits { target: self.target, ..BatchLimits::default() },
            crowd: self.crowd.clone(),
        }
        .start();
        self.tasks.spawn("batcher", task);
        self.link.batchers.lock().unwrap().insert(me, batcher.clone());
        self.link.groups.lock().unwrap().insert(me, group.clone());
        let (context, group_too, clock) = (context(), group.clone(), Arc::clone(&self.clock));
        let tasks = self.tasks.child();
        let parts = Parts { me, context, group: group_too, tail, batcher, admission: admitted, clock, tasks };
        let handle =
            PartitionHandle::new(parts, Arc::<OpenKeys>::clone(&self.keys), Arc::<TestLink>::clone(&self.link));
        self.nodes.insert(me, TestNode { handle, group, admission });
    }

    /// Stops a node's replica, forgets what it had in memory, and starts it again.
    async fn restart(&mut self, me: NodeId) {
        self.nodes.remove(&me);
        self.link.batchers.lock().unwrap().remove(&me);
        self.link.groups.lock().unwrap().remove(&me);
        self.runtimes[&me].stop(GROUP).await;
        self.run(me).await;
    }

    /// What the catalog says, on every node.
    fn admit(&self, admission: Admission) {
        for node in self.nodes.values() {
            node.admission.send_replace(admission);
        }
    }

    fn publisher(&self, node: NodeId) -> Publisher {
        self.publisher_under(node, None)
    }

    /// With a key ring of its own.
    fn publisher_under(&self, node: NodeId, ring: Option<RingId>) -> Publisher {
        let handle = self.nodes[&node].handle.clone();
        let (submissions, appender) = Appender::new(handle.into(), Arc::<TestLink>::clone(&self.link), Arc::new(OsRng));
        let appender = appender.sealed_under(ring);
        self.tasks.spawn("appender", move |stop| appender.run(stop));
        Publisher { submissions, room: Arc::new(Semaphore::new(1 << 20)), shared: FairRoom::new(1 << 20) }
    }

    async fn leader(&self) -> NodeId {
        loop {
            for node in self.nodes.values() {
                let leadership = *node.group.leadership().borrow();
                if leadership.ready {
                    return leadership.leader.unwrap();
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Everything that a node has, in order: offset, event bytes.
    async fn read(&self, node: NodeId) -> Vec<(Offset, Bytes)> {
        let handle = &self.nodes[&node].handle;
        handle.catch_up(Duration::from_secs(10)).await.unwrap();
        let (mut next, mut place, mut events) = (Offset::FIRST, None, Vec::new());
        loop {
            let batches = handle.read(next, ByteCount(32 << 10), &mut place).await.unwrap();
            let Some(last) = batches.last() else { return events };
            for batch in &batches {
                assert_eq!(batch.base, next, "batches follow one another");
                next = batch.end();
                let mut open = handle.open(batch).await.unwrap();
                while let Some(event) = open.next() {
                    let mut wrapper = Vec::new();
                    event.write_wrapper(&mut wrapper);
                    let wrapper = api::EventWrapper::decode(&wrapper[..]).unwrap();
                    assert_eq!(wrapper.offset, event.offset().0);
                    events.push((event.offset(), wrapper.event));
                }
            }
            assert_eq!(next, last.end());
        }
    }
}

struct Publisher {
    submissions: mpsc::Sender<Submission>,
    room: Arc<Semaphore>,
    shared: FairRoom,
}

type Waiting = oneshot::Receiver<Result<Appended, PublishError>>;

impl Publisher {
    async fn send(&self, numbering: Numbering, events: &[String]) -> Waiting {
        let (mut bodies, mut shapes) = (Vec::new(), Vec::new());
        for event in events {
            let before = bodies.len();
            encode_body(api::EventWrapper { event: event.clone().into(), ..Default::default() }, &mut bodies);
            shapes.push(BodyShape::new((bodies.len() - before) as u32, true));
        }
        let (reply, outcome) = oneshot::channel();
        let submission = Submission {
            numbering,
            publisher: Bytes::from_static(b"\x0a\x01p"),
            kinds: vec![Bytes::from_static(b"\x0a\x04kind")],
            kind_of: vec![1; shapes.len()],
            shapes,
            bodies: bodies.into(),
            reply,
            room: (
                Arc::clone(&self.room).acquire_owned().await.unwrap(),
                self.shared.acquire(context().project, 1).await,
            ),
        };
        self.submissions.send(submission).await.unwrap();
        outcome
    }

    async fn publish(&self, events: &[String]) -> Result<Appended, PublishError> {
        self.send(Numbering::Ours, events).await.await.unwrap()
    }
}

fn names(prefix: &str, range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|n| format!("{prefix}-{n:06}")).collect()
}

#[tokio::test]
async fn what_is_acknowledged_is_read_back_in_order_at_its_offset() {
    let cluster = Cluster::start(1).await;
    let publisher = cluster.publisher(NodeId(1));
    let mut waiting = Vec::new();
    for n in 0..300 {
        waiting.push(publisher.send(Numbering::Ours, &names("e", n * 10..n * 10 + 10)).await);
    }
    let mut offset = Offset::FIRST;
    for outcome in waiting {
        for run in outcome.await.unwrap().unwrap().runs {
            assert_eq!(run.offset, offset);
            offset = offset.plus(u64::from(run.count));
        }
    }
    let events = cluster.read(NodeId(1)).await;
    let expected: Vec<_> = names("e", 0..3000).into_iter().map(Bytes::from).collect();
    assert_eq!(events.iter().map(|(_, event)| event.clone()).collect::<Vec<_>>(), expected);
    let partition = Reach::from(cluster.nodes[&NodeId(1)].handle.clone());
    let counters = partition.counters(Freshness::Latest, Duration::from_secs(5)).await.unwrap();
    assert_eq!((counters.events, counters.types.len(), counters.types[0].0.events), (3000, 1, 3000));
    assert_eq!(counters.types[0].1.as_deref(), Some(&b"\x0a\x04kind"[..]));
}

#[tokio::test]
async fn any_node_takes_events_and_gives_them() {
    let cluster = Cluster::start(3).await;
    for node in 1..=3 {
        let appended = cluster.publisher(NodeId(node)).publish(&names(&format!("n{node}"), 0..5)).await.unwrap();
        assert_eq!(appended.runs.iter().map(|run| run.count).sum::<u32>(), 5);
    }
    for node in 1..=3 {
        assert_eq!(cluster.read(NodeId(node)).await.len(), 15);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leader_changes_and_cuts_lose_nothing_repeat_nothing_and_keep_the_order() {
    let cluster = Cluster::start(3).await;
    let publishers: Vec<_> = (1..=3).map(|node| cluster.publisher(NodeId(node))).collect();
    let stop = AtomicBool::new(false);
    let publish = |at: usize| {
        let (publisher, stop) = (&publishers[at], &stop);
        async move {
            let mut waiting = Vec::new();
            let mut n = 0;
            while !stop.load(Ordering::SeqCst) {
                waiting.push(publisher.send(Numbering::Ours, &names(&format!("p{at}"), n..n + 3)).await);
                n += 3;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            for outcome in waiting {
                outcome.await.unwrap().expect("a publisher that waits never learns of a leader change");
            }
            n
        }
    };
    let trouble = async {
        for round in 0..6 {
            tokio::time::sleep(Duration::from_millis(250)).await;
            let leader = cluster.leader().await;
            if round % 2 == 0 {
                let to = NodeId(leader.0 % 3 + 1);
                let _ = cluster.nodes[&leader].group.transfer_leader(to).await;
            } else {
                cluster.net.isolate(leader);
                cluster.link.cut.lock().unwrap().insert(leader);
                tokio::time::sleep(Duration::from_millis(600)).await;
                cluster.net.heal();
                cluster.link.cut.lock().unwrap().clear();
            }
        }
        stop.store(true, Ordering::SeqCst);
    };
    let (sent_0, sent_1, sent_2, ()) = tokio::join!(publish(0), publish(1), publish(2), trouble);
    let reference = cluster.read(NodeId(1)).await;
    for (at, sent) in [sent_0, sent_1, sent_2].into_iter().enumerate() {
        let prefix = format!("p{at}-");
        let own: Vec<_> = reference.iter().filter(|(_, event)| event.starts_with(prefix.as_bytes())).collect();
        let expected: Vec<_> = names(&format!("p{at}"), 0..sent).into_iter().map(Bytes::from).collect();
        assert_eq!(own.into_iter().map(|(_, event)| event.clone()).collect::<Vec<_>>(), expected);
    }
    for node in 2..=3 {
        assert_eq!(cluster.read(NodeId(node)).await, reference, "every replica gives the same");
    }
}

#[tokio::test]
async fn times_and_event_ids_lead_to_offsets() {
    let cluster = Cluster::start(1).await;
    let publisher = cluster.publisher(NodeId(1));
    let mut committed = Vec::new();
    for n in 0..20 {
        let appended = publisher.publish(&names("e", n * 10..n * 10 + 10)).await.unwrap();
        committed.push((appended.runs[0].committed_ms, appended.runs[0].offset));
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    let handle = &cluster.nodes[&NodeId(1)].handle;
    for (ms, offset) in &committed {
        assert_eq!(handle.offset_at_time(*ms).await.unwrap(), *offset);
    }
    assert_eq!(handle.offset_at_time(0).await.unwrap(), Offset::FIRST);
    assert_eq!(handle.offset_at_time(u64::MAX >> 16).await.unwrap(), Offset(201));
    let batches = handle.read(Offset(101), ByteCount(1), &mut None).await.unwrap();
    let first = BatchHeader::decode(&batches[0].sealed).unwrap().header.first_id;
    assert_eq!(handle.offset_after(first).await.unwrap(), batches[0].base.plus(1));
    assert_eq!(handle.offset_after(first.plus(9)).await.unwrap(), batches[0].base.plus(10));
}

#[tokio::test]
async fn a_local_read_is_refused_once_its_replica_may_be_older_than_the_bound() {
    let cluster = Cluster::start(3).await;
    cluster.publisher(NodeId(1)).publish(&names("e", 0..10)).await.unwrap();
    let leader =
        cluster.nodes[&NodeId(1)].handle.leadership().wait_for(|now| now.leader.is_some()).await.unwrap().leader;
    let follower = cluster.nodes.keys().copied().find(|node| Some(*node) != leader).unwrap();
    let handle = &cluster.nodes[&follower].handle;
    let soon = Duration::from_millis(200);
    handle.freshen(Freshness::Bounded, Duration::from_secs(10)).await.unwrap();
    assert!(handle.high_watermark() >= Offset(11), "what was acknowledged before is here");

    // Nobody can be asked any more; what was confirmed holds for a while, and no longer.
    cluster.link.cut.lock().unwrap().extend(cluster.nodes.keys().copied());
    cluster.clock.advance(STALENESS_MAX);
    handle.freshen(Freshness::Bounded, soon).await.unwrap();
    cluster.clock.advance(Duration::from_millis(1));
    let refused = handle.freshen(Freshness::Bounded, soon).await.unwrap_err();
    assert!(matches!(refused, ReadError::NoLeader { .. }), "{refused}");
    // Who does not ask is not refused, and who asks for more is.
    handle.freshen(Freshness::Known, soon).await.unwrap();
    handle.freshen(Freshness::Latest, soon).await.unwrap_err();

    cluster.link.cut.lock().unwrap().clear();
    handle.freshen(Freshness::Bounded, Duration::from_secs(10)).await.unwrap();
}
