//! Topics that the client's node has no replica of: some nodes, real connections between them, and a client of the first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use ensign_proto::Offset;
use ensign_proto::RingId;
use ensign_proto::pb::vault::v1 as vault_pb;
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::{Semaphore, oneshot};
use tonic::Code;

use super::*;
use crate::authority::Authority;
use crate::catalog::NodeRecord;
use crate::config::PeerAddress;
use crate::partition::forward::{ForwardService, PeerForward};
use crate::partition::{
    Appended, Appender, BodyShape, Counting, FairRoom, Freshness, Numbering, Page, Pages, Place, PublishError,
    ReadLink, Stand, Submission, Unread, Wanted, encode_body,
};
use crate::peers::{self, HolderEndpoint, Life, Membership, PeerTls, Peers, Services, VaultEndpoint};

struct NoVault;

impl VaultEndpoint for NoVault {
    fn call(&self, _: NodeId, _: vault_pb::Request) -> BoxFuture<'static, vault_pb::Reply> {
        futures::future::ready(vault_pb::Reply::default()).boxed()
    }
}

impl HolderEndpoint for NoVault {
    fn surrender(&self, _: vault_pb::SurrenderRequest) -> BoxFuture<'static, Result<vault_pb::SurrenderReply, Status>> {
        futures::future::ready(Ok(vault_pb::SurrenderReply::default())).boxed()
    }

    fn refresh(&self, _: vault_pb::RefreshRequest) -> BoxFuture<'static, Result<vault_pb::RefreshReply, Status>> {
        futures::future::ready(Ok(vault_pb::RefreshReply::default())).boxed()
    }
}

/// What a node reads of others, as it came.
#[derive(Clone, Default)]
struct Recorded(Arc<Mutex<Vec<u8>>>);

impl Recorded {
    fn add(&self, page: &Page) {
        let mut seen = self.0.lock().unwrap();
        page.batches.iter().for_each(|(_, sealed)| seen.extend_from_slice(sealed));
        page.keys.iter().for_each(|key| seen.extend_from_slice(&key.wrapped));
    }

    fn contains(&self, text: &str) -> bool {
        self.0.lock().unwrap().windows(text.len()).any(|window| window == text.as_bytes())
    }
}

/// A link that writes down what comes over it.
struct RecordingLink(Arc<PeerForward>, Recorded);

impl ReadLink for RecordingLink {
    fn stand(
        &self,
        at: NodeId,
        topic: TopicId,
        how: Freshness,
        what: Counting,
    ) -> BoxFuture<'static, Result<Stand, Unread>> {
        let (asked, recorded) = (self.0.stand(at, topic, how, what), self.1.clone());
        Box::pin(async move {
            let stand = asked.await?;
            let types = stand.counts.iter().flat_map(|counts| &counts.types);
            types.for_each(|counted| recorded.0.lock().unwrap().extend_from_slice(&counted.sealed));
            Ok(stand)
        })
    }

    fn locate(&self, at: NodeId, topic: TopicId, place: Place) -> BoxFuture<'static, Result<Offset, Unread>> {
        self.0.locate(at, topic, place)
    }

    fn fetch(&self, at: NodeId, topic: TopicId, wanted: Wanted) -> BoxFuture<'static, Result<Page, Unread>> {
        let (asked, recorded) = (self.0.fetch(at, topic, wanted), self.1.clone());
        Box::pin(async move { asked.await.inspect(|page| recorded.add(page)) })
    }

    fn follow(&self, at: NodeId, topic: TopicId, from: Offset) -> BoxFuture<'static, Result<Pages, Unread>> {
        let (asked, recorded) = (self.0.follow(at, topic, from), self.1.clone());
        Box::pin(async move {
            let pages = asked.await?;
            Ok(pages.inspect(move |page| page.iter().for_each(|page| recorded.add(page))).boxed() as Pages)
        })
    }
}

struct TestNode {
    partitions: Partitions,
    runtime: Runtime,
    tasks: Tasks,
}

/// Nodes that share a catalog; clients use the first.
struct Cluster {
    net: MemoryNet,
    vault: Arc<TestVault>,
    authority: Authority,
    catalog: Catalog,
    addresses: Vec<PeerAddress>,
    /// What a crash leaves.
    logs: BTreeMap<NodeId, Arc<MemoryLog>>,
    nodes: BTreeMap<NodeId, TestNode>,
    lives: u64,
    recorded: Recorded,
    sealing: Sealing,
    server: Server,
}

/// What the nodes seal with.
#[derive(Clone)]
enum Sealing {
    /// A vault.
    Vault(Arc<TestVault>),
    /// Nothing: what is sealed lies open.
    Open(Arc<OpenKeys>),
}

fn on(nodes: &[u64]) -> BTreeSet<NodeId> {
    nodes.iter().copied().map(NodeId).collect()
}

impl Cluster {
    async fn start(size: u64) -> Self {
        Self::start_with(size, |vault| Sealing::Vault(Arc::clone(vault))).await
    }

    async fn start_with(size: u64, sealing: impl FnOnce(&Arc<TestVault>) -> Sealing) -> Self {
        let (vault, net, authority) = (TestVault::new(CLUSTER), MemoryNet::new(), Authority::generate("test").unwrap());
        let client = VaultClient::new(vault.link(ME), CLUSTER, ME, &Entropy::kernel());
        let rings = Arc::new(VaultRings::new(client, CLUSTER, ME, Arc::new(|| ensign_proto::ClusterVersion::NEWEST)));
        let catalog = testing::solo_with(rings, Arc::new(SystemClock), Arc::new(OsRng));
        let (mut listeners, mut addresses) = (BTreeMap::new(), Vec::new());
        for id in (1..=size).map(NodeId) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(PeerAddress { id, address: listener.local_addr().unwrap().to_string() });
            listeners.insert(id, listener);
            let name = format!("node-{id}");
            catalog.put_node(NodeRecord { id, name, ..NodeRecord::default() }).await.unwrap();
        }
        let (sealing, recorded) = (sealing(&vault), Recorded::default());
        let parts = Start {
            catalog: &catalog,
            sealing: &sealing,
            recorded: &recorded,
            net: &net,
            authority: &authority,
            addresses: &addresses,
        };
        let logs: BTreeMap<_, _> = listeners.keys().map(|id| (*id, Arc::new(MemoryLog::new()))).collect();
        let mut nodes = BTreeMap::new();
        for (id, listener) in listeners {
            nodes.insert(id, parts.node(id, 1, listener, &logs[&id]));
        }
        let first = &nodes[&ME];
        let (partitions, tasks) = (first.partitions.clone(), first.tasks.clone());
        let server = Server::serve(ME, catalog.clone(), Arc::default(), partitions, tasks).await;
        Self { net, vault, authority, catalog, addresses, logs, nodes, lives: 1, recorded, sealing, server }
    }

    async fn create_on(&self, name: &str, nodes: &[u64]) -> TopicId {
        let project = self.server.project;
        testing::create_topic_on(&self.catalog, project, name.parse().unwrap(), on(nodes)).await.unwrap().id
    }

    /// As `kill -9` does it, as far as others can tell.
    async fn kill(&mut self, node: u64) {
        let node = NodeId(node);
        self.net.detach(node);
        let killed = self.nodes.remove(&node).unwrap();
        // Whoever is off the network hands nothing over, and whatever it still writes stays its own.
        killed.runtime.shut_down(Duration::from_secs(2)).await;
        assert!(killed.tasks.shut_down(Duration::from_secs(20)).await, "node {node} does not end");
    }

    async fn restart(&mut self, node: u64) {
        let node = NodeId(node);
        self.lives += 1;
        let address = self.addresses.iter().find(|peer| peer.id == node).unwrap().address.clone();
        let listener = TcpListener::bind(address).await.unwrap();
        let parts = Start {
            catalog: &self.catalog,
            sealing: &self.sealing,
            recorded: &self.recorded,
            net: &self.net,
            authority: &self.authority,
            addresses: &self.addresses,
        };
        let started = parts.node(node, self.lives, listener, &self.logs[&node]);
        self.nodes.insert(node, started);
    }

    fn ring(&self) -> RingId {
        self.catalog.view().project(self.server.project).unwrap().ring
    }
}

/// What nodes are started from.
struct Start<'a> {
    catalog: &'a Catalog,
    sealing: &'a Sealing,
    recorded: &'a Recorded,
    net: &'a MemoryNet,
    authority: &'a Authority,
    addresses: &'a [PeerAddress],
}

impl Start<'_> {
    fn node(&self, me: NodeId, life: u64, listener: TcpListener, log: &Arc<MemoryLog>) -> TestNode {
        let (clock, rng, tasks) = (Arc::new(SystemClock), Arc::new(OsRng), Tasks::new());
        let issued = self.authority.issue(me).unwrap();
        let tls = PeerTls::from_pem(issued.certificate, issued.private_key, self.authority.certificate()).unwrap();
        let member = Membership { cluster: CLUSTER, life: Life { incarnation: life, process: life } };
        let peers = Peers::new(me, Some(member), self.addresses, &tls);
        let runtime = Runtime::new(quick(me), self.net.transport(me), clock.clone(), rng.clone(), tasks.clone());
        self.net.attach(&runtime);
        let forward = Arc::new(PeerForward::new(Arc::new(peers.clone())));
        let keys: Arc<dyn Keys> = match self.sealing {
            // Its leases end when the test says so.
            Sealing::Vault(vault) => Arc::new(vault.holder(me, ManualClock::new(), &tasks)),
            Sealing::Open(keys) => Arc::clone(keys) as Arc<dyn Keys>,
        };
        let partitions = Partitions::start(PartitionsParts {
            me,
            cluster: CLUSTER,
            runtime: runtime.clone(),
            log: Arc::clone(log) as Arc<dyn ensign_storage::NodeLog>,
            catalog: self.catalog.clone(),
            keys,
            forward: forward.clone(),
            barrier: forward.clone(),
            reads: Arc::new(RecordingLink(forward, self.recorded.clone())),
            clock,
            rng,
            tasks: tasks.clone(),
            limits: BatchLimits::default(),
            // So small that readers fetch what is older.
            tail_bytes: ByteCount(1 << 20),
        });
        let services = Services {
            node: me,
            cluster: CLUSTER,
            peers,
            runtime: runtime.clone(),
            catalog: self.catalog.clone(),
            vault: Arc::new(NoVault),
            holder: Arc::new(NoVault),
            more: tonic::service::Routes::new(ForwardService::server(partitions.clone(), tasks.clone())),
            join: tonic::service::Routes::default(),
            tasks: tasks.clone(),
        };
        peers::serve(listener, &tls, services);
        TestNode { partitions, runtime, tasks }
    }
}

fn texts(range: std::ops::Range<usize>) -> Vec<String> {
    // Some hundred bytes each, so that there are many batches.
    range.map(|n| format!("e{n:06} {}", "x".repeat(400))).collect()
}

async fn publish(server: &Server, topic: TopicId, texts: &[String]) {
    for part in texts.chunks(50) {
        server.publish(topic, &part.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
}

fn earliest(topic: &str) -> api::Subscription {
    let start = Some(api::subscription::Start::Earliest(true));
    api::Subscription { topics: vec![topic.to_owned()], start, ..Default::default() }
}

fn live(topic: &str) -> api::Subscription {
    api::Subscription { topics: vec![topic.to_owned()], ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_replica_publishes_and_gives_history_and_tail() {
    let cluster = Cluster::start(3).await;
    let topic = cluster.create_on("far", &[2, 3]).await;
    let server = &cluster.server;
    let all = texts(0..8_000);
    let (old, new) = all.split_at(6_000);
    publish(server, topic, old).await;
    assert!(cluster.nodes[&ME].partitions.get(topic).is_none(), "node 1 holds no replica");

    let mut history = server.subscribe(earliest("far")).await;
    let mut tail = server.subscribe(live("far")).await;
    assert_eq!(history.data(100).await, old[..100]);
    publish(server, topic, new).await;
    assert_eq!(tail.data(new.len()).await, new);
    assert_eq!(history.data(all.len() - 100).await, all[100..]);

    let start = |start| api::Subscription { start: Some(start), ..live("far") };
    let mut since = server.subscribe(start(api::subscription::Start::Offset(5))).await;
    let fifth = since.event().await;
    assert_eq!((fifth.offset, data(&fifth)), (5, all[4].clone()));
    let mut after = server.subscribe(start(api::subscription::Start::AfterEvent(fifth.id.clone()))).await;
    assert_eq!(after.event().await.offset, 6);
    let mut at = server.subscribe(start(api::subscription::Start::Time(fifth.committed.unwrap()))).await;
    assert!(at.event().await.offset <= 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_counters_and_topics_see_what_was_acknowledged_through_a_node_without_a_replica() {
    let cluster = Cluster::start(3).await;
    let topic = cluster.create_on("far", &[2, 3]).await;
    let server = &cluster.server;
    let all = texts(0..500);
    publish(server, topic, &all).await;
    assert_eq!(server.query("SELECT * FROM far").await.unwrap(), all);
    assert_eq!(server.query("SELECT * FROM far OFFSET 490 LIMIT 5").await.unwrap(), all[490..495]);
    for consistency in [api::Consistency::Default, api::Consistency::Latest, api::Consistency::Local] {
        let asked = api::InfoRequest { topics: Vec::new(), consistency: consistency.into() };
        let info = server.client().info(server.request(asked)).await.unwrap().into_inner();
        assert_eq!((info.events, info.topics[0].events), (500, 500), "{consistency:?}");
        let types = &info.topics[0].types;
        assert_eq!((types.len(), types[0].events), (1, 500));
        assert_ne!(types[0].r#type.as_ref().unwrap().name, "sealed type", "opened under node 1's own lease");
    }
    let page = server.client().list_topics(server.request(api::PageInfo::default())).await.unwrap().into_inner();
    assert_eq!(page.topics[0].offset, 500);
    let wanted = api::Topic { id: page.topics[0].id.clone(), ..Default::default() };
    assert_eq!(server.client().retrieve_topic(server.request(wanted)).await.unwrap().into_inner().offset, 500);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_and_a_publisher_go_on_while_the_holders_restart_one_after_another() {
    let mut cluster = Cluster::start(4).await;
    let topic = cluster.create_on("far", &[2, 3, 4]).await;
    let all = texts(0..4_000);
    publish(&cluster.server, topic, &all[..1_000]).await;
    let mut history = cluster.server.subscribe(earliest("far")).await;
    let mut tail = cluster.server.subscribe(live("far")).await;
    assert_eq!(history.data(10).await, all[..10]);
    let mut publisher = cluster.server.publisher().await;
    for (round, node) in [2, 3, 4].into_iter().enumerate() {
        let part = &all[1_000 * (round + 1)..1_000 * (round + 2)];
        let (before, after) = part.split_at(50);
        // Some are on their way when the node dies.
        for text in before {
            publisher.event(topic, text.as_bytes()).await;
        }
        cluster.kill(node).await;
        for text in before {
            let ack = publisher.ack().await;
            assert!(ack.offset > 0, "{text}");
        }
        for some in after.chunks(50) {
            for text in some {
                publisher.event(topic, text.as_bytes()).await;
            }
            for _ in some {
                publisher.ack().await;
            }
        }
        assert_eq!(tail.data(part.len()).await, part, "while node {node} is down");
        cluster.restart(node).await;
    }
    assert_eq!(history.data(all.len() - 10).await, all[10..]);
    assert_eq!(cluster.server.query("SELECT * FROM far").await.unwrap(), all, "nothing twice, nothing lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_any_holder_a_read_is_refused_and_told_when_to_come_again() {
    let mut cluster = Cluster::start(3).await;
    let topic = cluster.create_on("far", &[2, 3]).await;
    publish(&cluster.server, topic, &texts(0..10)).await;
    let mut reader = cluster.server.subscribe(earliest("far")).await;
    assert_eq!(reader.data(10).await, texts(0..10));
    for node in [2, 3] {
        cluster.kill(node).await;
    }
    let refused = cluster.server.query("SELECT * FROM far").await.unwrap_err();
    assert_eq!(
        shown(&refused),
        "Unavailable: none of the nodes that hold the topic can be reached at the moment, please try again"
    );
    assert_eq!(refused.metadata().get("ensign-retry-after-ms").unwrap(), "1000");
    // Counters are not made up either.
    let asked = cluster.server.request(api::InfoRequest::default());
    assert_eq!(cluster.server.client().info(asked).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoke_reaches_those_who_read_through_a_node_without_a_replica() {
    let cluster = Cluster::start(3).await;
    let topic = cluster.create_on("far", &[2, 3]).await;
    let body = "x".repeat(16 << 10);
    let count = 2_000;
    let all: Vec<String> = (0..count).map(|n| format!("{n:08}{body}")).collect();
    publish(&cluster.server, topic, &all).await;
    let mut at_tail = cluster.server.subscribe(live("far")).await;
    // It has more to come than all buffers on the way hold, and stands still.
    let mut slow = cluster.server.subscribe(earliest("far")).await;
    assert_eq!(&slow.data(1).await[0][..8], "00000000");

    let ring = cluster.ring();
    let revoked = cluster.vault.revoke(ring, None);
    tokio::time::timeout(Duration::from_secs(20), revoked).await.expect("every use of the key ends");

    // The ring is named to who waits, and the version to who was about to be given what it sealed.
    let unreadable = |status: &Status| {
        let shown = shown(status);
        shown.starts_with("FailedPrecondition: these events cannot be read any more:")
            && shown.contains(&ring.to_string())
            && shown.contains("was revoked")
    };
    let status = at_tail.end().await;
    assert!(unreadable(&status), "{status:?}");
    let mut seen = 1;
    let status = loop {
        match slow.next().await.expect("a status, not an end") {
            Ok(api::subscribe_reply::Embed::Event(_)) => seen += 1,
            Ok(other) => panic!("not an event: {other:?}"),
            Err(status) => break status,
        }
    };
    assert!(unreadable(&status), "{status:?}");
    assert!(seen < count, "all {seen} events");
    let query = cluster.server.query("SELECT * FROM far").await.unwrap_err();
    assert!(query.message().contains("was revoked"), "{query:?}");
}

/// Sends an event to the topic's leader as node 1 does it, which here names a ring that none of its publishers has.
async fn forge(cluster: &Cluster, topic: TopicId, ring: RingId) -> Result<Appended, PublishError> {
    let partitions = &cluster.nodes[&ME].partitions;
    let reach = partitions.reach(topic, Duration::from_secs(20)).await.unwrap();
    let (submissions, appender) = Appender::new(reach, partitions.forward(), Arc::new(OsRng));
    let appender = appender.sealed_under(Some(ring));
    cluster.nodes[&ME].tasks.spawn("appender", move |stop| appender.run(stop));
    let mut body = Vec::new();
    encode_body(api::EventWrapper { event: event(b"forged"), ..Default::default() }, &mut body);
    let own = Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap();
    let (reply, outcome) = oneshot::channel();
    let submission = Submission {
        numbering: Numbering::Ours,
        publisher: Bytes::new(),
        kinds: Vec::new(),
        shapes: vec![BodyShape::new(body.len() as u32, true)],
        kind_of: vec![0],
        bodies: body.into(),
        reply,
        room: (own, FairRoom::new(1 << 20).acquire(cluster.server.project, 1).await),
    };
    submissions.send(submission).await.unwrap();
    tokio::time::timeout(Duration::from_mins(1), outcome).await.expect("an answer").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_cannot_have_events_sealed_under_a_ring_that_no_api_key_of_the_project_has() {
    let cluster = Cluster::start(3).await;
    let (server, vault) = (&cluster.server, &cluster.vault);
    let topic = cluster.create_on("far", &[2, 3]).await;
    let org = cluster.catalog.view().project(server.project).unwrap().org;
    let other = server.identity.ensure_project(org, "another").await.unwrap();
    let foreign = vault.create_ring(other.id);
    let permissions = [ensign_proto::Permission::Publisher].into_iter().collect();
    let (name, project) = ("theirs".to_owned(), Some(other.id));
    let new = NewApiKey { name, org, project, permissions, admin: false, ring: Some(foreign) };
    server.identity.create_api_key(new).await.unwrap();
    let (unbound, own) = (vault.create_ring(server.project), vault.create_ring(server.project));
    for ring in [other.ring, foreign, unbound, cluster.ring(), RingId::from_bytes([9; 16])] {
        let expected = format!("no API key of the project has key ring {ring}");
        assert_eq!(forge(&cluster, topic, ring).await, Err(PublishError::KeyUnusable { detail: expected }));
    }

    let token = server.token_under(own).await.0;
    let mut device = server.publisher_with(&token).await;
    device.event(topic, b"honest").await;
    device.ack().await;
    assert_eq!(server.query("SELECT * FROM far").await.unwrap(), ["honest"]);
    tokio::time::timeout(Duration::from_secs(20), vault.revoke(own, None)).await.unwrap();
    let status = server.query("SELECT * FROM far").await.unwrap_err();
    assert!(
        status.message().contains(&format!("version 1 of key ring {own} was revoked")),
        "sealed under it: {status:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_does_not_notice_that_the_replica_of_its_node_goes() {
    let cluster = Cluster::start(3).await;
    let topic = cluster.create_on("moves", &[1, 2, 3]).await;
    let all = texts(0..3_000);
    publish(&cluster.server, topic, &all[..2_000]).await;
    let mut history = cluster.server.subscribe(earliest("moves")).await;
    let mut tail = cluster.server.subscribe(live("moves")).await;
    let mut publisher = cluster.server.publisher().await;
    publisher.event(topic, all[2_000].as_bytes()).await;
    publisher.ack().await;
    assert_eq!(history.data(10).await, all[..10]);
    assert_eq!(tail.data(1).await, all[2_000..2_001]);

    cluster.nodes[&ME].partitions.give_replica_up(topic).await;
    for text in &all[2_001..] {
        publisher.event(topic, text.as_bytes()).await;
    }
    for _ in &all[2_001..] {
        publisher.ack().await;
    }
    assert_eq!(tail.data(999).await, all[2_001..]);
    assert_eq!(history.data(2_990).await, all[10..]);
    assert_eq!(cluster.server.query("SELECT * FROM moves").await.unwrap(), all);
}

/// Publishes a text, and reads it through the first node in every way; whether it was readable on the way.
async fn readable_on_the_way(cluster: &Cluster) -> bool {
    const PATTERN: &str = "kingfisher-5b21-under-the-bridge";
    let topic = cluster.create_on("far", &[2, 3]).await;
    let mut tail = cluster.server.subscribe(live("far")).await;
    let all: Vec<String> = texts(0..4_000).iter().map(|text| format!("{PATTERN} {text}")).collect();
    publish(&cluster.server, topic, &all).await;
    assert_eq!(tail.data(all.len()).await, all);
    assert_eq!(cluster.server.query("SELECT * FROM far").await.unwrap(), all);
    let asked = cluster.server.request(api::InfoRequest::default());
    assert_eq!(cluster.server.client().info(asked).await.unwrap().into_inner().events, 4_000);
    let seen = cluster.recorded.0.lock().unwrap().len();
    assert!(seen > 2 * 4_000 * 400, "only {seen} bytes were seen: the batches came another way");
    cluster.recorded.contains(PATTERN)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nodes_read_of_one_another_is_ciphertext() {
    assert!(!readable_on_the_way(&Cluster::start(3).await).await, "plaintext between nodes");
    // The search finds what is not sealed.
    let open = Cluster::start_with(3, |_| Sealing::Open(Arc::default())).await;
    assert!(readable_on_the_way(&open).await, "the search finds nothing at all");
}
