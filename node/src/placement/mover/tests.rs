//! Moves from the catalog to a group and back, with two nodes that share a group in memory.

use std::sync::atomic::{AtomicBool, Ordering};

use ensign_proto::{ClusterVersion, TopicName};
use ensign_raft::env::{SeededRng, SystemClock};

use super::*;
use crate::catalog::testing::{HandLiveness, solo_where};
use crate::catalog::{MoveReason, NodeRecord, TopicPolicies};

/// A group that does what it is told, whoever leads it.
struct Shared {
    seen: Mutex<Seen>,
    leader: Mutex<NodeId>,
    /// Whether learners catch up.
    flows: AtomicBool,
    switches: Mutex<Vec<BTreeSet<NodeId>>>,
}

impl Shared {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leader(&self) -> MutexGuard<'_, NodeId> {
        self.leader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The group on one node.
#[derive(Clone)]
struct Member(NodeId, Arc<Shared>);

fn ready(outcome: Result<(), String>) -> BoxFuture<'static, Result<(), String>> {
    Box::pin(std::future::ready(outcome))
}

impl Seat for Member {
    fn leads(&self) -> bool {
        *self.1.leader() == self.0
    }

    fn seen(&self) -> Seen {
        self.1.seen().clone()
    }

    fn settle(&self) -> BoxFuture<'static, Result<(), String>> {
        ready(Ok(()))
    }

    fn add_learner(&self, node: NodeId) -> BoxFuture<'static, Result<(), String>> {
        let mut seen = self.1.seen();
        seen.learners.insert(node);
        let missing = if self.1.flows.load(Ordering::SeqCst) { 0 } else { 5_000 };
        seen.missing.insert(node, missing);
        ready(Ok(()))
    }

    fn remove_learner(&self, node: NodeId) -> BoxFuture<'static, Result<(), String>> {
        self.1.seen().learners.remove(&node);
        ready(Ok(()))
    }

    fn change_voters(
        &self,
        expected: BTreeSet<NodeId>,
        voters: BTreeSet<NodeId>,
    ) -> BoxFuture<'static, Result<(), String>> {
        let mut seen = self.1.seen();
        if seen.voters != expected {
            return ready(Err("the voters are others by now".to_owned()));
        }
        seen.learners.retain(|node| !voters.contains(node));
        seen.voters.clone_from(&voters);
        self.1.switches.lock().unwrap_or_else(PoisonError::into_inner).push(voters.clone());
        let mut leader = self.1.leader();
        if !voters.contains(&leader) {
            // The first of those that are left is elected.
            *leader = *voters.first().expect("a group has voters");
            return ready(Err("not the leader".to_owned()));
        }
        ready(Ok(()))
    }

    fn hand_over(&self, to: NodeId) -> BoxFuture<'static, Result<(), String>> {
        *self.1.leader() = to;
        ready(Ok(()))
    }
}

struct OneSeat(Member);

impl Seats for OneSeat {
    fn seat(&self, _: TopicId) -> Option<Arc<dyn Seat>> {
        Some(Arc::new(self.0.clone()))
    }
}

struct World {
    catalog: Catalog,
    liveness: Arc<HandLiveness>,
    topic: Arc<Topic>,
    group: Arc<Shared>,
    tasks: Tasks,
}

impl World {
    /// A topic with one replica on node 1, and movers on nodes 1 and 2.
    async fn new(flows: bool) -> Self {
        let liveness = Arc::new(HandLiveness::default());
        let (clock, rng) = (Arc::new(SystemClock), Arc::new(SeededRng::new(1)));
        let catalog = solo_where(Arc::clone(&liveness) as _, Arc::clone(&clock) as _, rng);
        let register = async |id: u64| {
            let version = ClusterVersion::NEWEST;
            let node = NodeRecord { id: NodeId(id), version, ..NodeRecord::default() };
            catalog.put_node(node).await.unwrap();
        };
        register(1).await;
        catalog.keep_defaults().await.unwrap();
        let org = catalog.create_organization("org").await.unwrap();
        let project = catalog.create_project(org.id, "project").await.unwrap();
        let create = async |name: &str| {
            let name: TopicName = name.parse().unwrap();
            catalog.create_topic(project.id, name, TopicPolicies::default()).await.unwrap()
        };
        // Leaders take turns: of the second topic, the second node leads if it can.
        create("first").await;
        let topic = create("topic").await;
        register(2).await;
        let voters = BTreeSet::from([NodeId(1)]);
        let seen = Seen { missing: BTreeMap::from([(NodeId(1), 0)]), voters, ..Seen::default() };
        let group = Arc::new(Shared {
            seen: Mutex::new(seen),
            leader: Mutex::new(NodeId(1)),
            flows: AtomicBool::new(flows),
            switches: Mutex::default(),
        });
        let tasks = Tasks::new();
        for id in [1, 2].map(NodeId) {
            let seats = Arc::new(OneSeat(Member(id, Arc::clone(&group))));
            let (catalog, clock) = (catalog.clone(), Arc::clone(&clock) as _);
            let mover = Mover::new(MoverParts { me: id, catalog, seats, clock, tasks: tasks.clone() });
            tasks.spawn("mover", |stop| mover.run(stop));
        }
        Self { catalog, liveness, topic, group, tasks }
    }

    fn now(&self) -> Arc<Topic> {
        self.catalog.view().topic(self.topic.id).unwrap()
    }

    async fn until(&self, what: impl Fn(&Topic) -> bool) -> Arc<Topic> {
        let mut changes = self.catalog.view().changes();
        loop {
            changes.mark_unchanged();
            let topic = self.now();
            if what(&topic) {
                return topic;
            }
            changes.changed().await.unwrap();
        }
    }

    async fn move_to(&self, node: u64) {
        let target = BTreeSet::from([NodeId(node)]);
        self.catalog.start_move(&self.now(), target, MoveReason::Operator).await.unwrap();
    }

    fn phase(topic: &Topic) -> Option<MovePhase> {
        topic.reassignment.as_ref()?.report.as_ref().map(|report| report.phase)
    }
}

#[tokio::test(start_paused = true)]
async fn a_move_goes_from_the_catalog_to_the_group_and_back() {
    let world = World::new(true).await;
    world.move_to(2).await;
    let moved = world.until(|topic| topic.reassignment.is_none()).await;
    assert_eq!((moved.replicas.clone(), moved.assignment), (BTreeSet::from([NodeId(2)]), 1));
    assert_eq!(world.group.seen().voters, moved.replicas);
    assert_eq!(*world.group.leader(), NodeId(2), "the other node went on where the first could not");
    world.move_to(1).await;
    world.until(|topic| topic.assignment == 2).await;
    world.tasks.shut_down(Duration::from_secs(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_move_leaves_the_group_as_it_was() {
    let world = World::new(false).await;
    world.move_to(2).await;
    let on = world.until(|topic| World::phase(topic) == Some(MovePhase::CatchingUp)).await;
    assert!(on.reassignment.is_some());
    world
        .until(|topic| {
            topic.reassignment.as_ref().and_then(|on| on.report.as_ref()).is_some_and(|it| it.behind == 5_000)
        })
        .await;
    world.catalog.cancel_move(&world.now()).await.unwrap();
    let back = world.until(|topic| topic.reassignment.is_none()).await;
    assert_eq!((back.replicas.clone(), back.assignment), (BTreeSet::from([NodeId(1)]), 1));
    assert_eq!(world.group.seen().learners, BTreeSet::new());
    assert!(world.group.switches.lock().unwrap_or_else(PoisonError::into_inner).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_move_says_what_it_waits_for_and_goes_on_once_it_can() {
    let world = World::new(true).await;
    world.liveness.silence(NodeId(2), Duration::from_secs(3));
    world.move_to(2).await;
    let waits = world.until(|topic| World::phase(topic) == Some(MovePhase::Waiting)).await;
    let report = waits.reassignment.as_ref().and_then(|on| on.report.clone()).unwrap();
    assert_eq!((report.waiting.as_str(), report.by), ("node 2 does not answer", NodeId(1)));
    assert_eq!(world.group.seen().learners, BTreeSet::new(), "nothing is sent to who does not answer");
    world.liveness.wake(NodeId(2));
    world.until(|topic| topic.assignment == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_move_that_catches_up_no_faster_than_is_written_says_so_until_it_does() {
    let world = World::new(false).await;
    let report = |topic: &Topic| topic.reassignment.as_ref().and_then(|on| on.report.clone());
    world.move_to(2).await;
    world.until(|topic| report(topic).is_some_and(|it| it.behind == 5_000)).await;
    // Once a second: so many entries are written, and so many arrive.
    let traffic = async |written: u64, taken: u64| {
        loop {
            sleep(Duration::from_secs(1)).await;
            let mut seen = world.group.seen();
            seen.last += written;
            seen.throttled += Duration::from_secs(1);
            let missing = seen.missing.get_mut(&NodeId(2)).expect("it is a learner");
            *missing = (*missing + written).saturating_sub(taken);
        }
    };
    let during = async |written, taken, what: &dyn Fn(&Topic) -> bool| {
        tokio::select! {
            () = traffic(written, taken) => unreachable!("it goes on for ever"),
            topic = world.until(what) => topic,
            () = sleep(Duration::from_mins(10)) => panic!("the move says {:?}", report(&world.now())),
        }
    };
    let begun = Instant::now();
    let slow = during(20, 20, &|topic| report(topic).is_some_and(|it| !it.waiting.is_empty())).await;
    assert!(begun.elapsed() >= Duration::from_secs(30), "not at once: {:?}", begun.elapsed());
    let said = report(&slow).unwrap();
    assert_eq!((said.phase, said.behind), (MovePhase::CatchingUp, 5_000));
    let expected = "node 2 catches up no faster than the partition is written: raise storage.move_rate on the nodes that hold it, \
                    or write less";
    assert_eq!(said.waiting, expected);
    // A higher rate: it is taken back, and the move arrives.
    let fast = during(20, 40, &|topic| report(topic).is_some_and(|it| it.waiting.is_empty())).await;
    assert!(report(&fast).unwrap().behind < 5_000);
    during(20, 40, &|topic| topic.assignment == 1).await;
}

#[tokio::test(start_paused = true)]
async fn leadership_goes_to_the_preferred_leader_once_it_has_been_fit_for_a_while() {
    let world = World::new(true).await;
    world.tasks.shut_down(Duration::from_secs(1)).await;
    let altered = crate::catalog::Placement::anywhere(2);
    world.catalog.alter_topic(world.topic.id, altered).await.unwrap();
    let both = BTreeSet::from([1, 2].map(NodeId));
    world.catalog.start_move(&world.now(), both.clone(), MoveReason::Policy).await.unwrap();
    world.catalog.finish_move(&world.now(), both.clone()).await.unwrap();
    {
        let mut seen = world.group.seen();
        seen.voters = both;
        seen.missing.insert(NodeId(2), 0);
    }
    let preferred = world.catalog.facts().preferred_leader(&world.catalog.facts_of(&world.now())).unwrap();
    assert_eq!((preferred, *world.group.leader()), (NodeId(2), NodeId(1)));
    let (me, catalog, tasks) = (NodeId(1), world.catalog.clone(), Tasks::new());
    let seats = Arc::new(OneSeat(Member(me, Arc::clone(&world.group))));
    let mover = Mover::new(MoverParts { me, catalog, seats, clock: Arc::new(SystemClock), tasks: tasks.clone() });
    world.liveness.silence(preferred, Duration::from_secs(1));
    tasks.spawn("mover", |stop| mover.run(stop));
    sleep(FIT_FOR * 3).await;
    assert_eq!(*world.group.leader(), me, "not to who does not answer");
    world.liveness.wake(preferred);
    sleep(FIT_FOR / 2).await;
    assert_eq!(*world.group.leader(), me, "not at once");
    sleep(FIT_FOR).await;
    assert_eq!(*world.group.leader(), preferred);
}
