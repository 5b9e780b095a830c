//! The public API over a real socket: one node with real Raft groups and logins, and keys that seal nothing.

mod elsewhere;
mod limits;
mod publish;
mod quotas;
mod revoke;
mod rings;
mod subscribe;
mod tokens;
mod topics;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use ensign_keyvault::testing::{ManualClock, TestVault};
use ensign_keyvault::{Entropy, VaultClient};
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::pb::ensign::v1beta1::ensign_client::EnsignClient;
use ensign_proto::{ByteCount, ClusterId, LogIndex, NodeId, PermissionSet, ProjectId, TopicId};
use ensign_raft::Runtime;
use ensign_raft::env::{BootTime, Clock, OsRng, SystemClock, Tasks, UnixNanos};
use ensign_raft::testing::{MemoryNet, quick};
use ensign_storage::MemoryLog;
use futures::future::BoxFuture;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::{Ensign, RpcParts, Shared};
use crate::catalog::{Catalog, VaultRings, testing};
use crate::health::Phase;
use crate::identity::{HashParams, Identity, IdentityConfig, MemorySecrets, NewApiKey};
use crate::partition::testing::{NoOthers, OpenKeys};
use crate::partition::{BarrierLink, BatchLimits, ForwardLink, Keys, Partitions, PartitionsParts, Route};
use crate::quota::{QuotaLink, QuotaParts, Quotas, Reported, Take, Taken, Total, Use};

const CLUSTER: ClusterId = ClusterId::from_bytes([9; 16]);
const ME: NodeId = NodeId(1);

struct Alone;

impl ForwardLink for Alone {
    fn open(&self, _: NodeId, _: TopicId) -> BoxFuture<'static, Result<Route, String>> {
        Box::pin(async { Err("there is no other node".to_owned()) })
    }
}

impl BarrierLink for Alone {
    fn barrier(&self, _: NodeId, _: TopicId) -> BoxFuture<'static, Result<LogIndex, String>> {
        Box::pin(async { Err("there is no other node".to_owned()) })
    }
}

impl QuotaLink for Alone {
    fn take(&self, _: NodeId, _: Take) -> BoxFuture<'static, Result<Taken, String>> {
        Box::pin(async { Err("there is no other node".to_owned()) })
    }

    fn report(&self, _: NodeId, _: Vec<(ProjectId, Use)>) -> BoxFuture<'static, Result<Option<Reported>, String>> {
        Box::pin(async { Err("there is no other node".to_owned()) })
    }

    fn usage(&self, _: NodeId, _: Vec<ProjectId>) -> BoxFuture<'static, Result<Option<Vec<Total>>, String>> {
        Box::pin(async { Err("there is no other node".to_owned()) })
    }
}

/// The clock that tokens are made and judged by: ahead of the real one by as many seconds as the test says.
#[derive(Default)]
struct TokenClock(AtomicU64);

impl TokenClock {
    fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_secs(), Ordering::SeqCst);
    }
}

impl Clock for TokenClock {
    fn boot(&self) -> BootTime {
        SystemClock.boot()
    }

    fn wall(&self) -> UnixNanos {
        let ahead = Duration::from_secs(self.0.load(Ordering::SeqCst));
        UnixNanos(SystemClock.wall().0 + ahead.as_nanos() as u64)
    }
}

struct Server {
    channel: Channel,
    catalog: Catalog,
    identity: Identity,
    secrets: Arc<MemorySecrets>,
    token_clock: Arc<TokenClock>,
    keys: Arc<OpenKeys>,
    address: std::net::SocketAddr,
    phase: watch::Sender<Phase>,
    project: ProjectId,
    token: String,
    tasks: Tasks,
    shared: Arc<Shared>,
}

type Client = EnsignClient<Channel>;

fn token_config(cluster: ClusterId) -> IdentityConfig {
    let cheap = HashParams { memory_kib: 64, passes: 1, lanes: 1 };
    IdentityConfig { hash: cheap, ..IdentityConfig::new(cluster) }
}

impl Server {
    async fn start() -> Self {
        let (keys, tasks) = (Arc::<OpenKeys>::default(), Tasks::new());
        let catalog = testing::solo(Arc::new(SystemClock), Arc::new(OsRng));
        Self::start_on(catalog, keys.clone(), keys, tasks).await
    }

    /// With the keys of a real vault, which clients of this node can be made of.
    async fn start_sealed() -> (Self, Arc<TestVault>) {
        let (vault, tasks) = (TestVault::new(CLUSTER), Tasks::new());
        let client = VaultClient::new(vault.link(ME), CLUSTER, ME, &Entropy::kernel());
        let rings = Arc::new(VaultRings::new(client, CLUSTER, ME, Arc::new(|| ensign_proto::ClusterVersion::NEWEST)));
        let catalog = testing::solo_with(rings, Arc::new(SystemClock), Arc::new(OsRng));
        // Its leases end when the test says so.
        let holder = Arc::new(vault.holder(ME, ManualClock::new(), &tasks));
        (Self::start_on(catalog, Arc::default(), holder, tasks).await, vault)
    }

    async fn start_on(catalog: Catalog, open: Arc<OpenKeys>, keys: Arc<dyn Keys>, tasks: Tasks) -> Self {
        let (clock, rng, cluster, me) = (Arc::new(SystemClock), Arc::new(OsRng), CLUSTER, ME);
        let net = MemoryNet::new();
        let runtime = Runtime::new(quick(me), net.transport(me), clock.clone(), rng.clone(), tasks.clone());
        net.attach(&runtime);
        let partitions = Partitions::start(PartitionsParts {
            me,
            cluster,
            runtime,
            log: Arc::new(MemoryLog::new()),
            catalog: catalog.clone(),
            keys,
            forward: Arc::new(Alone),
            barrier: Arc::new(Alone),
            reads: Arc::new(NoOthers),
            clock: clock.clone(),
            rng: rng.clone(),
            tasks: tasks.clone(),
            limits: BatchLimits::default(),
            // So small that readers go to the log.
            tail_bytes: ByteCount(1 << 20),
        });
        Self::serve(me, catalog, open, partitions, tasks).await
    }

    /// In front of these partitions.
    async fn serve(me: NodeId, catalog: Catalog, open: Arc<OpenKeys>, partitions: Partitions, tasks: Tasks) -> Self {
        let (clock, rng) = (Arc::new(SystemClock), Arc::new(OsRng));
        let secrets = Arc::new(MemorySecrets::default());
        let token_clock = Arc::<TokenClock>::default();
        let config = token_config(CLUSTER);
        let identity = Identity::new(config, catalog.clone(), secrets.clone(), token_clock.clone(), rng.clone());
        identity.ensure_signing_key().await.unwrap();
        let stored = partitions.clone();
        let quotas = Quotas::new(QuotaParts {
            me,
            catalog: catalog.clone(),
            link: Arc::new(Alone),
            stored: Arc::new(move || stored.stored_by_project()),
        });
        tasks.spawn("quota-reports", {
            let quotas = quotas.clone();
            move |stop| quotas.keep_reported(stop)
        });
        let phase = watch::Sender::new(Phase::Serving);
        let service = Ensign::new(RpcParts {
            node: me,
            catalog: catalog.clone(),
            identity: identity.clone(),
            partitions,
            quotas,
            clock,
            rng,
            tasks: tasks.clone(),
            phase: phase.subscribe(),
        });
        let shared = Arc::clone(&service.shared);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(16 << 20)
            .add_service(service);
        tasks.spawn("grpc", |stop| async move {
            let _ = server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled_owned()).await;
        });
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        let org = identity.ensure_organization("Example").await.unwrap();
        let project = identity.ensure_project(org.id, "first").await.unwrap().id;
        let token = String::new();
        let keys = open;
        let mut server = Self {
            channel,
            catalog,
            identity,
            secrets,
            token_clock,
            keys,
            address,
            phase,
            project,
            token,
            tasks,
            shared,
        };
        server.token = server.token(project, PermissionSet::api_key()).await.0;
        server
    }

    /// An access token, and the id of the API key behind it.
    async fn token(&self, project: ProjectId, permissions: PermissionSet) -> (String, ensign_proto::ApiKeyId) {
        let org = self.catalog.view().project(project).unwrap().org;
        let new =
            NewApiKey { name: "a key".to_owned(), org, project: Some(project), permissions, admin: false, ring: None };
        let (key, credentials) = self.identity.create_api_key(new).await.unwrap();
        let (id, secret) = (credentials.client_id.as_str(), credentials.secret.expose());
        let arrived = tokio::time::Instant::now();
        let pair = self.identity.authenticate(id, secret.to_owned(), None, arrived).await.unwrap();
        (pair.access, key.id)
    }

    fn client(&self) -> Client {
        EnsignClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// A client with a connection of its own.
    fn other_client(&self) -> Client {
        EnsignClient::new(Channel::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy())
    }

    fn request<T>(&self, message: T) -> Request<T> {
        with_token(message, &self.token)
    }

    async fn create(&self, name: &str) -> TopicId {
        let wanted = api::Topic { name: name.to_owned(), ..Default::default() };
        let topic = self.client().create_topic(self.request(wanted)).await.unwrap().into_inner();
        TopicId::try_from(&topic.id[..]).unwrap()
    }

    async fn publisher(&self) -> Publisher {
        let mut publisher = self.open(api::OpenStream::default()).await;
        let ready = publisher.next().await.unwrap().unwrap();
        assert!(matches!(ready, api::publisher_reply::Embed::Ready(_)), "{ready:?}");
        publisher
    }

    /// A publish stream with this opening; `ready` is still to come.
    async fn open(&self, open: api::OpenStream) -> Publisher {
        let publisher = self.raw_publisher(&self.token).await;
        publisher.send(api::publisher_request::Embed::OpenStream(open)).await;
        publisher
    }

    async fn raw_publisher(&self, token: &str) -> Publisher {
        let (requests, outgoing) = mpsc::channel(64);
        let request = with_token(ReceiverStream::new(outgoing), token);
        let replies = self.client().publish(request).await.unwrap().into_inner();
        Publisher { requests, replies, sent: 0 }
    }

    async fn publish(&self, topic: TopicId, events: &[&str]) {
        let mut publisher = self.publisher().await;
        for event in events {
            publisher.event(topic, event.as_bytes()).await;
        }
        for _ in events {
            publisher.ack().await;
        }
    }

    async fn subscribe(&self, subscription: api::Subscription) -> Subscriber {
        let mut subscriber = self.raw_subscriber(subscription).await;
        let ready = subscriber.next().await.unwrap().unwrap();
        assert!(matches!(ready, api::subscribe_reply::Embed::Ready(_)), "{ready:?}");
        subscriber
    }

    async fn raw_subscriber(&self, subscription: api::Subscription) -> Subscriber {
        let (requests, outgoing) = mpsc::channel(64);
        let first = api::subscribe_request::Embed::Subscription(subscription);
        requests.send(api::SubscribeRequest { embed: Some(first) }).await.unwrap();
        let request = self.request(ReceiverStream::new(outgoing));
        let replies = self.client().subscribe(request).await.unwrap().into_inner();
        Subscriber { requests, replies }
    }

    /// The events that a query gives, as text.
    async fn query(&self, text: &str) -> Result<Vec<String>, Status> {
        let query = api::Query { query: text.to_owned(), ..Default::default() };
        let mut replies = self.client().en_sql(self.request(query)).await?.into_inner();
        let mut events = Vec::new();
        while let Some(wrapper) = replies.message().await? {
            events.push(data(&wrapper));
        }
        Ok(events)
    }
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    if !token.is_empty() {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    request
}

/// An encoded event around `data`.
fn event(data: &[u8]) -> Bytes {
    let event = api::Event { data: Bytes::copy_from_slice(data), mimetype: 1, ..Default::default() };
    event.encode_to_vec().into()
}

fn data(wrapper: &api::EventWrapper) -> String {
    let event = api::Event::decode(&wrapper.event[..]).unwrap();
    String::from_utf8(event.data.to_vec()).unwrap()
}

fn shown(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

struct Publisher {
    requests: mpsc::Sender<api::PublisherRequest>,
    replies: Streaming<api::PublisherReply>,
    sent: u64,
}

impl Publisher {
    async fn send(&self, embed: api::publisher_request::Embed) {
        self.requests.send(api::PublisherRequest { embed: Some(embed) }).await.unwrap();
    }

    /// Publishes, with the number of the event as its local id.
    async fn event(&mut self, topic: TopicId, data: &[u8]) {
        self.wrapper(api::EventWrapper {
            topic_id: Bytes::copy_from_slice(topic.as_bytes()),
            event: event(data),
            ..Default::default()
        })
        .await;
    }

    async fn wrapper(&mut self, mut wrapper: api::EventWrapper) {
        self.sent += 1;
        wrapper.local_id = Bytes::copy_from_slice(&self.sent.to_be_bytes());
        self.send(api::publisher_request::Embed::Event(wrapper)).await;
    }

    async fn next(&mut self) -> Option<Result<api::publisher_reply::Embed, Status>> {
        let reply = tokio::time::timeout(Duration::from_secs(20), self.replies.message()).await;
        let reply = reply.expect("the server answers");
        reply.map(|reply| reply.map(|reply| reply.embed.unwrap())).transpose()
    }

    async fn ack(&mut self) -> api::Ack {
        match self.next().await.unwrap().unwrap() {
            api::publisher_reply::Embed::Ack(ack) => ack,
            other => panic!("not an ack: {other:?}"),
        }
    }

    async fn nack(&mut self) -> api::Nack {
        match self.next().await.unwrap().unwrap() {
            api::publisher_reply::Embed::Nack(nack) => nack,
            other => panic!("not a nack: {other:?}"),
        }
    }

    /// The status that ends the stream, whatever comes before it.
    async fn end(&mut self) -> Status {
        loop {
            match self.next().await {
                None => return Status::ok(""),
                Some(Err(status)) => return status,
                Some(Ok(_)) => {}
            }
        }
    }

    /// Half-closes and returns the totals; the call must then end with OK.
    async fn close(mut self) -> api::CloseStream {
        drop(std::mem::replace(&mut self.requests, mpsc::channel(1).0));
        let mut totals = None;
        while let Some(reply) = self.next().await {
            if let api::publisher_reply::Embed::CloseStream(close) = reply.unwrap() {
                totals = Some(close);
            }
        }
        totals.expect("the last reply is close_stream")
    }
}

struct Subscriber {
    requests: mpsc::Sender<api::SubscribeRequest>,
    replies: Streaming<api::SubscribeReply>,
}

impl Subscriber {
    async fn next(&mut self) -> Option<Result<api::subscribe_reply::Embed, Status>> {
        let reply = tokio::time::timeout(Duration::from_secs(20), self.replies.message()).await;
        let reply = reply.expect("the server delivers");
        reply.map(|reply| reply.map(|reply| reply.embed.unwrap())).transpose()
    }

    async fn event(&mut self) -> api::EventWrapper {
        match self.next().await.unwrap().unwrap() {
            api::subscribe_reply::Embed::Event(event) => event,
            other => panic!("not an event: {other:?}"),
        }
    }

    async fn data(&mut self, count: usize) -> Vec<String> {
        let mut events = Vec::new();
        for _ in 0..count {
            events.push(data(&self.event().await));
        }
        events
    }

    async fn end(&mut self) -> Status {
        loop {
            match self.next().await {
                None => return Status::ok(""),
                Some(Err(status)) => return status,
                Some(Ok(_)) => {}
            }
        }
    }
}
