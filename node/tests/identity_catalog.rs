//! The catalog on three nodes: any node changes it, every node shows it, and a lost leader loses nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ensign_node::catalog::{
    AllAlive, ApiKey, Catalog, CatalogMachine, CatalogParts, ChangeTopicError, CreateProjectError, CreateTopicError,
    Custody, NodeRecord, ProposeLink, ProposeLinkError, Reconciled, Topic, TopicPolicies, TopicState, VaultFailure,
    VaultHas, VaultWrites,
};
use ensign_proto::{
    ApiKeyId, ClusterVersion, GroupId, LogIndex, NodeId, PermissionSet, ProjectId, RingId, TopicId, TopicName,
};
use ensign_raft::env::{Clock as _, SeededRng, SystemClock, Tasks};
use ensign_raft::testing::{MemoryNet, quick};
use ensign_raft::{Group, GroupSpec, Mode, ProposeError, Runtime};
use ensign_storage::{EntryId, MemoryLog, NodeLog as _};
use futures::FutureExt as _;
use futures::future::BoxFuture;

const LOCK: &str = "no test panics while it holds a lock";

/// What the vault was told, and whether it answers.
#[derive(Default)]
struct NotedVault {
    rings: Mutex<BTreeSet<(ProjectId, RingId)>>,
    custody: Mutex<BTreeSet<Custody>>,
    destroyed: Mutex<BTreeSet<RingId>>,
    /// Rings that were asked to be destroyed, again and again.
    orders: AtomicUsize,
    /// Changes of custody that were asked for.
    commits: AtomicUsize,
    down: Mutex<bool>,
}

impl NotedVault {
    fn answer(&self, act: impl FnOnce()) -> BoxFuture<'static, Result<(), VaultFailure>> {
        let down = *self.down.lock().expect(LOCK);
        if !down {
            act();
        }
        let result = if down { Err(VaultFailure::new("switched off")) } else { Ok(()) };
        futures::future::ready(result).boxed()
    }
}

impl VaultWrites for NotedVault {
    fn list(&self) -> BoxFuture<'static, Result<VaultHas, VaultFailure>> {
        if *self.down.lock().expect(LOCK) {
            return futures::future::ready(Err(VaultFailure::new("switched off"))).boxed();
        }
        let (rings, custody) = (self.rings.lock().expect(LOCK).clone(), self.custody.lock().expect(LOCK).clone());
        let destroyed = self.destroyed.lock().expect(LOCK).clone();
        let living = rings.iter().map(|(_, ring)| *ring).filter(|ring| !destroyed.contains(ring)).collect();
        futures::future::ready(Ok(VaultHas { rings, living, custody })).boxed()
    }

    fn create_ring(&self, project: ProjectId, ring: RingId) -> BoxFuture<'static, Result<(), VaultFailure>> {
        self.answer(|| {
            self.rings.lock().expect(LOCK).insert((project, ring));
        })
    }

    fn destroy_ring(&self, ring: RingId) -> BoxFuture<'static, Result<(), VaultFailure>> {
        self.answer(|| {
            self.orders.fetch_add(1, Ordering::Relaxed);
            self.destroyed.lock().expect(LOCK).insert(ring);
        })
    }

    fn put_custodies(&self, records: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>> {
        self.answer(|| {
            self.commits.fetch_add(1, Ordering::Relaxed);
            self.custody.lock().expect(LOCK).extend(records);
        })
    }

    fn drop_custodies(&self, records: Vec<Custody>) -> BoxFuture<'static, Result<(), VaultFailure>> {
        self.answer(|| {
            self.commits.fetch_add(1, Ordering::Relaxed);
            let gone: BTreeSet<Custody> = records.into_iter().collect();
            self.custody.lock().expect(LOCK).retain(|it| !gone.contains(it));
        })
    }
}

/// Asks every other node until one says that it leads, as the peer connections do.
#[derive(Clone, Default)]
struct Peers {
    catalogs: Arc<Mutex<BTreeMap<NodeId, Catalog>>>,
    cut: Arc<Mutex<BTreeSet<NodeId>>>,
}

struct PeerLink {
    me: NodeId,
    peers: Peers,
}

impl PeerLink {
    fn others(&self) -> Vec<Catalog> {
        let cut = self.peers.cut.lock().expect(LOCK).clone();
        let catalogs = self.peers.catalogs.lock().expect(LOCK);
        let reach = |node: &NodeId| *node != self.me && !cut.contains(node) && !cut.contains(&self.me);
        catalogs.iter().filter(|(node, _)| reach(node)).map(|(_, catalog)| catalog.clone()).collect()
    }
}

fn unreachable() -> ProposeLinkError {
    ProposeLinkError::Unreachable { cause: "nobody leads".to_owned() }
}

impl ProposeLink for PeerLink {
    fn propose(&self, _: GroupId, payload: Bytes) -> BoxFuture<'static, Result<(EntryId, Bytes), ProposeLinkError>> {
        let others = self.others();
        async move {
            for catalog in others {
                match catalog.serve_propose(payload.clone()).await {
                    Ok(answer) => return Ok(answer),
                    Err(ProposeError::OutcomeUnknown) => {
                        return Err(ProposeLinkError::OutcomeUnknown { cause: "it was deposed".to_owned() });
                    }
                    Err(_) => {}
                }
            }
            Err(unreachable())
        }
        .boxed()
    }

    fn read_index(&self, _: GroupId) -> BoxFuture<'static, Result<LogIndex, ProposeLinkError>> {
        let others = self.others();
        async move {
            for catalog in others {
                if let Ok(index) = catalog.serve_read_index().await {
                    return Ok(index);
                }
            }
            Err(unreachable())
        }
        .boxed()
    }
}

struct Node {
    runtime: Runtime,
    group: Group<CatalogMachine>,
    catalog: Catalog,
    log: MemoryLog,
}

struct Cluster {
    net: MemoryNet,
    peers: Peers,
    vault: Arc<NotedVault>,
    nodes: BTreeMap<NodeId, Node>,
}

impl Cluster {
    async fn start() -> Self {
        let (net, peers, vault) = (MemoryNet::new(), Peers::default(), Arc::default());
        let mut cluster = Self { net, peers, vault, nodes: BTreeMap::new() };
        for id in 1..=3 {
            cluster.start_node(NodeId(id), MemoryLog::new()).await;
        }
        cluster
    }

    async fn start_node(&mut self, id: NodeId, log: MemoryLog) {
        let (clock, rng) = (Arc::new(SystemClock), Arc::new(SeededRng::new(id.0)));
        let transport = self.net.transport(id);
        let runtime = Runtime::new(quick(id), transport, clock.clone(), rng.clone(), Tasks::new());
        self.net.attach(&runtime);
        let (machine, view) = CatalogMachine::new();
        let spec = GroupSpec { id: GroupId::CATALOG, voters: (1..=3).map(NodeId).collect(), mode: Mode::Found };
        let group = runtime.start(spec, log.group(GroupId::CATALOG), machine).await.expect("the group starts");
        let catalog = Catalog::new(CatalogParts {
            me: id,
            // What the settings of one node say, which is not what the others' say.
            founders: BTreeSet::from([id]),
            replica: Arc::new(group.clone()),
            view,
            link: Arc::new(PeerLink { me: id, peers: self.peers.clone() }),
            vault: Arc::clone(&self.vault) as _,
            fresh_for: Duration::from_secs(3),
            liveness: Arc::new(AllAlive),
            lost_after: Duration::from_mins(10),
            clock,
            rng,
        });
        self.peers.catalogs.lock().expect(LOCK).insert(id, catalog.clone());
        self.nodes.insert(id, Node { runtime, group, catalog, log });
    }

    fn catalog(&self, id: u64) -> &Catalog {
        &self.nodes[&NodeId(id)].catalog
    }

    async fn leader(&self) -> NodeId {
        for _ in 0..2_000 {
            if let Some((id, _)) = self.nodes.iter().find(|(_, node)| node.catalog.leads()) {
                return *id;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("no leader within 10 s");
    }

    /// Takes the node away as a crash does; what was durable is left of its log.
    async fn crash(&mut self, id: NodeId) -> MemoryLog {
        let node = self.nodes.remove(&id).expect("the node runs");
        self.peers.catalogs.lock().expect(LOCK).remove(&id);
        self.net.detach(id);
        let survives = node.log.crash();
        node.runtime.stop(GroupId::CATALOG).await;
        survives
    }

    async fn project(&self) -> ProjectId {
        let org = self.catalog(1).create_organization("Example").await.expect("an organization");
        self.catalog(2).create_project(org.id, "first").await.expect("a project").id
    }
}

fn name(text: &str) -> TopicName {
    text.parse().expect("a valid name")
}

async fn create(catalog: &Catalog, project: ProjectId, text: &str) -> Result<Arc<Topic>, CreateTopicError> {
    catalog.create_topic(project, name(text), TopicPolicies::default()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_changes_the_catalog_and_every_node_shows_it() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    for id in 1..=3 {
        let topic = create(cluster.catalog(id), project, &format!("from-{id}")).await.unwrap();
        // The node that made it shows it at once, every other one after it has caught up.
        assert_eq!(cluster.catalog(id).topic(topic.id), Some(Arc::clone(&topic)));
        for other in 1..=3 {
            cluster.catalog(other).refresh().await.unwrap();
            assert_eq!(cluster.catalog(other).topic_by_name(project, &topic.name), Some(Arc::clone(&topic)));
        }
    }
    let taken = create(cluster.catalog(3), project, "from-1").await;
    assert_eq!(taken, Err(CreateTopicError::NameTaken));
    let stranger = create(cluster.catalog(1), ProjectId::from_bytes([7; 16]), "x").await;
    assert_eq!(stranger, Err(CreateTopicError::ProjectUnknown));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_founders_are_who_votes_and_not_what_the_settings_of_one_node_say() {
    let cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    cluster.nodes[&leader].catalog.raise_version(ClusterVersion::NEWEST).await.unwrap();
    cluster.nodes[&leader].catalog.keep_defaults().await.unwrap();
    for id in 1..=3 {
        let catalog = cluster.catalog(id);
        catalog.refresh().await.unwrap();
        assert_eq!(catalog.defaults().founders, (1..=3).map(NodeId).collect());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_race_for_a_name_get_one_topic() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    for round in 0..10 {
        let title = format!("race-{round}");
        let (a, b, c) = tokio::join!(
            create(cluster.catalog(1), project, &title),
            create(cluster.catalog(2), project, &title),
            create(cluster.catalog(3), project, &title),
        );
        let winners: Vec<_> = [&a, &b, &c].into_iter().filter_map(|result| result.as_ref().ok()).collect();
        assert_eq!(winners.len(), 1, "{a:?} {b:?} {c:?}");
        for loser in [&a, &b, &c].into_iter().filter_map(|result| result.as_ref().err()) {
            assert_eq!(*loser, CreateTopicError::NameTaken);
        }
    }
    let groups: BTreeSet<_> = cluster.catalog(1).all_topics().iter().map(|topic| topic.group).collect();
    assert_eq!(groups.len(), 10, "each topic has a group of its own");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_outlives_its_leader() {
    let mut cluster = Cluster::start().await;
    let project = cluster.project().await;
    let mut made = Vec::new();
    for round in 0..3 {
        let leader = cluster.leader().await;
        made.push(create(&cluster.nodes[&leader].catalog, project, &format!("before-{round}")).await.unwrap());
        let log = cluster.crash(leader).await;
        let survivor = *cluster.nodes.keys().next().expect("two nodes are left");
        // Asked while nobody leads: it waits for the election instead of failing.
        made.push(create(&cluster.nodes[&survivor].catalog, project, &format!("after-{round}")).await.unwrap());
        cluster.start_node(leader, log).await;
        let back = &cluster.nodes[&leader].catalog;
        back.refresh().await.unwrap();
        for topic in &made {
            assert_eq!(back.topic(topic.id).as_ref(), Some(topic));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deposed_leader_changes_nothing_and_catches_up() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    let old = cluster.leader().await;
    cluster.net.isolate(old);
    cluster.peers.cut.lock().unwrap().insert(old);
    let cut_off = cluster.nodes[&old].catalog.clone();
    let waiting = tokio::time::timeout(Duration::from_secs(2), create(&cut_off, project, "cut-off")).await;
    assert!(waiting.is_err(), "it must not answer: {waiting:?}");
    let others: Vec<_> = cluster.nodes.iter().filter(|(id, _)| **id != old).map(|(_, node)| node).collect();
    let topic = create(&others[0].catalog, project, "majority").await.unwrap();
    assert_eq!(cut_off.topic(topic.id), None);
    cluster.net.heal();
    cluster.peers.cut.lock().unwrap().clear();
    cut_off.refresh().await.unwrap();
    assert_eq!(cut_off.topic(topic.id), Some(topic));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_comes_back_by_snapshot() {
    let mut cluster = Cluster::start().await;
    let project = cluster.project().await;
    let away = *cluster.nodes.keys().find(|id| !cluster.nodes[id].catalog.leads()).expect("a follower");
    cluster.crash(away).await;
    let leader = cluster.leader().await;
    for n in 0..20 {
        create(&cluster.nodes[&leader].catalog, project, &format!("topic-{n}")).await.unwrap();
    }
    cluster.nodes[&leader].group.compact(0).await.unwrap();
    // It has lost everything, so there is nothing but the snapshot to come back from.
    cluster.start_node(away, MemoryLog::new()).await;
    let back = &cluster.nodes[&away].catalog;
    back.refresh().await.unwrap();
    assert_eq!(back.topics(project).len(), 20);
    assert_eq!(back.topics(project), cluster.nodes[&leader].catalog.topics(project));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_vault_comes_first_and_what_it_lacks_is_put_right() {
    let cluster = Cluster::start().await;
    let catalog = cluster.catalog(1);
    for id in 1..=3 {
        let record = NodeRecord { id: NodeId(id), ..NodeRecord::default() };
        catalog.put_node(record).await.unwrap();
    }
    let project = cluster.project().await;
    let ring = catalog.project(project).unwrap().ring;
    assert!(cluster.vault.rings.lock().unwrap().contains(&(project, ring)));
    let topic = create(catalog, project, "kept").await.unwrap();
    let everybody: BTreeSet<_> = (1..=3).map(|id| Custody { node: NodeId(id), project, topic: topic.id }).collect();
    assert_eq!(*cluster.vault.custody.lock().unwrap(), everybody);

    *cluster.vault.down.lock().unwrap() = true;
    assert!(matches!(create(catalog, project, "lost").await, Err(CreateTopicError::Vault(_))));
    let org = catalog.project(project).unwrap().org;
    assert!(matches!(catalog.create_project(org, "lost").await, Err(CreateProjectError::Vault(_))));
    assert_eq!((catalog.topic_count(), catalog.projects(None).len()), (1, 1), "nothing is made without the vault");

    // A vault that was restored from a backup of before.
    *cluster.vault.down.lock().unwrap() = false;
    cluster.vault.rings.lock().unwrap().clear();
    cluster.vault.custody.lock().unwrap().clear();
    let done = catalog.reconcile().await.unwrap();
    assert_eq!(done, Reconciled { rings: 1, granted: 3, ..Reconciled::default() });
    assert_eq!(*cluster.vault.custody.lock().unwrap(), everybody);
    assert!(cluster.vault.rings.lock().unwrap().contains(&(project, ring)));
    assert_eq!(catalog.reconcile().await.unwrap(), Reconciled::default(), "what is right is left alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ring_that_goes_with_its_api_key_is_destroyed_although_whoever_asked_for_it_died() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    let leader = cluster.leader().await;
    let catalog = cluster.nodes[&leader].catalog.clone();
    catalog.raise_version(ClusterVersion::NEWEST).await.unwrap();
    let org = catalog.project(project).unwrap().org;
    let made = |n: u8| ApiKey {
        id: ApiKeyId::from_bytes([n; 16]),
        client_id: format!("client-{n}"),
        name: format!("device {n}"),
        org,
        project: Some(project),
        permissions: PermissionSet::api_key(),
        admin: false,
        created: SystemClock.wall(),
        revoked_at: None,
        ring: Some(RingId::from_bytes([n; 16])),
        shredded: false,
    };
    for n in 1..=3 {
        catalog.create_api_key(made(n)).await.unwrap();
        cluster.vault.rings.lock().unwrap().insert((project, RingId::from_bytes([n; 16])));
    }
    // One is shredded, one is only revoked, and one lives on.
    catalog.revoke_api_key(made(2).id).await.unwrap();
    assert_eq!(catalog.reconcile().await.unwrap(), Reconciled::default());
    catalog.shred_api_key(made(1).id).await.unwrap();
    *cluster.vault.down.lock().unwrap() = true;
    catalog.reconcile().await.expect_err("the vault is down");
    *cluster.vault.down.lock().unwrap() = false;

    let tasks = Tasks::new();
    let beginning = catalog.clone();
    // So rarely that only the beginning counts.
    tasks.spawn("reconciliation", |stop| beginning.keep_reconciled(Duration::from_hours(1), stop));
    let destroyed = async {
        while cluster.vault.destroyed.lock().expect(LOCK).is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), destroyed).await.expect("its ring is destroyed");
    assert_eq!(*cluster.vault.destroyed.lock().unwrap(), BTreeSet::from([RingId::from_bytes([1; 16])]));
    assert!(tasks.shut_down(Duration::from_secs(5)).await);

    // What is destroyed is asked for no more; a vault that came back from an old backup is asked again.
    let asked = cluster.vault.orders.load(Ordering::Relaxed);
    assert_eq!(catalog.reconcile().await.unwrap(), Reconciled::default());
    assert_eq!(cluster.vault.orders.load(Ordering::Relaxed), asked);
    cluster.vault.destroyed.lock().unwrap().clear();
    assert_eq!(catalog.reconcile().await.unwrap(), Reconciled { destroyed: 1, ..Reconciled::default() });
    assert_eq!(catalog.reconcile().await.unwrap(), Reconciled::default());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_crash_left_between_vault_and_catalog_is_put_right_without_a_restart() {
    let mut cluster = Cluster::start().await;
    let project = cluster.project().await;
    let topic = create(cluster.catalog(1), project, "kept").await.unwrap();
    for id in 1..=3 {
        let record = NodeRecord { id: NodeId(id), ..NodeRecord::default() };
        cluster.catalog(1).put_node(record).await.unwrap();
    }
    let all: BTreeSet<_> = (1..=3).map(|id| Custody { node: NodeId(id), project, topic: topic.id }).collect();
    // Whoever made this one died between the vault and the catalog, long ago; and this one is being made at this moment.
    let left_over = Custody { node: NodeId(2), project, topic: TopicId::new(1_700_000_000_000, [1; 10]) };
    let now = SystemClock.wall().as_millis();
    let in_the_making = Custody { node: NodeId(2), project, topic: TopicId::new(now, [2; 10]) };
    let break_it = |vault: &NotedVault| {
        let mut custody = vault.custody.lock().expect(LOCK);
        custody.remove(all.first().expect("three"));
        custody.extend([left_over, in_the_making]);
    };
    let whole: BTreeSet<_> = all.iter().copied().chain([in_the_making]).collect();
    let healed = |vault: Arc<NotedVault>| {
        let whole = whole.clone();
        let looking = async move {
            while *vault.custody.lock().expect(LOCK) != whole {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), looking)
    };
    let tasks = Tasks::new();
    break_it(&cluster.vault);
    // So rarely that only the beginning of a leadership counts.
    for node in cluster.nodes.values() {
        let catalog = node.catalog.clone();
        tasks.spawn("reconciliation", |stop| catalog.keep_reconciled(Duration::from_hours(1), stop));
    }
    healed(Arc::clone(&cluster.vault)).await.expect("put right by the leader");

    let leader = cluster.leader().await;
    break_it(&cluster.vault);
    cluster.crash(leader).await;
    healed(Arc::clone(&cluster.vault)).await.expect("put right by the next leader");

    // And by one that leads on.
    let leader = cluster.leader().await;
    let catalog = cluster.nodes[&leader].catalog.clone();
    tasks.spawn("frequent", |stop| catalog.keep_reconciled(Duration::from_millis(20), stop));
    healed(Arc::clone(&cluster.vault)).await.expect("still whole");
    break_it(&cluster.vault);
    healed(Arc::clone(&cluster.vault)).await.expect("put right in time");
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_goes_from_ready_to_gone_and_never_back() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    let topic = create(cluster.catalog(1), project, "short-lived").await.unwrap();
    assert_eq!(cluster.catalog(2).finish_destroy(topic.id).await, Err(ChangeTopicError::State(TopicState::Ready)));
    for _ in 0..2 {
        assert_eq!(cluster.catalog(2).archive_topic(topic.id).await.unwrap().state, TopicState::Readonly);
    }
    let refused = cluster.catalog(3).set_topic_policies(topic.id, TopicPolicies::default()).await;
    assert_eq!(refused, Err(ChangeTopicError::State(TopicState::Readonly)));
    for _ in 0..2 {
        assert_eq!(cluster.catalog(3).destroy_topic(topic.id).await.unwrap().state, TopicState::Deleting);
    }
    assert_eq!(cluster.catalog(1).archive_topic(topic.id).await, Err(ChangeTopicError::State(TopicState::Deleting)));
    cluster.catalog(1).refresh().await.unwrap();
    assert_eq!(create(cluster.catalog(1), project, "short-lived").await, Err(CreateTopicError::NameTaken));
    for _ in 0..2 {
        cluster.catalog(2).finish_destroy(topic.id).await.unwrap();
    }
    assert_eq!(cluster.catalog(2).destroy_topic(topic.id).await, Err(ChangeTopicError::Unknown));
    let again = create(cluster.catalog(2), project, "short-lived").await.unwrap();
    assert_ne!((again.id, again.group), (topic.id, topic.group));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_notices_and_does_not_vouch_for_what_it_shows() {
    let cluster = Cluster::start().await;
    cluster.project().await;
    let leader = cluster.leader().await;
    let away = *cluster.nodes.keys().find(|id| **id != leader).expect("a follower");
    let tasks = Tasks::new();
    let catalog = cluster.nodes[&away].catalog.clone();
    let mut fresh = catalog.freshness();
    let kept = catalog.clone();
    tasks.spawn("freshness", |stop| kept.keep_fresh(stop));
    fresh.wait_for(|fresh| *fresh).await.unwrap();
    assert!(catalog.is_fresh());

    // Both ways are cut: Raft's, and the one to the leader.
    cluster.net.isolate(away);
    cluster.peers.cut.lock().unwrap().insert(away);
    fresh.wait_for(|fresh| !*fresh).await.unwrap();
    assert!(!catalog.is_fresh());

    cluster.net.heal();
    cluster.peers.cut.lock().unwrap().clear();
    fresh.wait_for(|fresh| *fresh).await.unwrap();
    assert!(catalog.is_fresh());
    tasks.shut_down(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn custody_of_a_topic_that_was_not_made_does_not_stay() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    let (one, two) = (cluster.catalog(1), cluster.catalog(2));
    // However they race: one topic comes of it, and custody of that one alone.
    let (first, second) = futures::join!(create(one, project, "wanted"), create(two, project, "wanted"));
    let made: Vec<_> = [&first, &second].into_iter().filter_map(|made| made.as_ref().ok()).collect();
    assert_eq!(made.len(), 1, "{first:?} {second:?}");
    let id = made[0].id;
    assert!(cluster.vault.custody.lock().unwrap().iter().all(|custody| custody.topic == id));
    assert!(!cluster.vault.custody.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_topics_take_few_commits_and_one_that_cannot_be_made_keeps_none_back() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    cluster.catalog(1).raise_version(ClusterVersion::NEWEST).await.unwrap();
    let version = ClusterVersion::NEWEST;
    for id in 1..=3 {
        let record = NodeRecord { id: NodeId(id), version, ..NodeRecord::default() };
        cluster.catalog(1).put_node(record).await.unwrap();
    }
    create(cluster.catalog(1), project, "topic-7").await.unwrap();
    cluster.catalog(2).refresh().await.unwrap();
    let commits = || cluster.vault.commits.load(Ordering::Relaxed);
    let before = commits();
    let mut names: Vec<TopicName> = (0..600).map(|n| format!("topic-{n}").parse().unwrap()).collect();
    names.push("topic-3".parse().unwrap());
    let catalog = cluster.catalog(2);
    // This node may not have heard of the one that exists.
    let made = catalog.create_topics(project, names.clone(), &TopicPolicies::default(), None).await.unwrap();
    assert_eq!(made.len(), 601);
    for (place, (name, made)) in names.iter().zip(&made).enumerate() {
        match made {
            Ok(topic) => assert_eq!(topic.name, *name),
            Err(error) => {
                assert!(place == 7 || place == 600, "{name}: {error}");
                assert_eq!(*error, CreateTopicError::NameTaken);
            }
        }
    }
    // Three batches of custody, and what was taken back of the two that were refused.
    assert!(commits() - before <= 5, "{} commits of the vault", commits() - before);
    let groups: BTreeSet<_> = made.iter().flatten().map(|topic| topic.group).collect();
    assert_eq!(groups.len(), 599, "each topic has a group of its own");
    let listed: BTreeSet<TopicId> = catalog.all_topics().iter().map(|topic| topic.id).collect();
    assert_eq!(listed.len(), 600);
    let custody = cluster.vault.custody.lock().unwrap().clone();
    assert_eq!(custody.len(), 3 * 600);
    assert!(
        custody.iter().all(|custody| listed.contains(&custody.topic)),
        "custody of what was not made is taken back"
    );

    // A node that comes to know of them all does not cost the vault a commit each.
    let before = commits();
    let record = NodeRecord { id: NodeId(4), version, ..NodeRecord::default() };
    catalog.put_node(record).await.unwrap();
    assert_eq!(commits() - before, 2, "before it is listed, and after");
    assert_eq!(cluster.vault.custody.lock().unwrap().len(), 4 * 600);

    let stranger = catalog.create_topics(ProjectId::from_bytes([7; 16]), names, &TopicPolicies::default(), None).await;
    assert_eq!(stranger, Err(CreateTopicError::ProjectUnknown));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_vault_none_of_many_topics_is_made() {
    let cluster = Cluster::start().await;
    let project = cluster.project().await;
    *cluster.vault.down.lock().unwrap() = true;
    let names: Vec<TopicName> = (0..3).map(|n| format!("topic-{n}").parse().unwrap()).collect();
    let made = cluster.catalog(1).create_topics(project, names, &TopicPolicies::default(), None).await.unwrap();
    assert!(made.len() == 3 && made.iter().all(|made| matches!(made, Err(CreateTopicError::Vault(_)))), "{made:?}");
    assert_eq!(cluster.catalog(1).topic_count(), 0);
}
