//! The peer listener with all its services, as strangers and peers meet it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use ensign_proto::pb::peer::v1::HelloRequest;
use ensign_proto::pb::peer::v1::peer_client::PeerClient;
use ensign_proto::pb::vault::v1 as vault_pb;
use ensign_proto::{ByteCount, ClusterId, LogIndex, NodeId, TopicId};
use ensign_raft::Runtime;
use ensign_raft::env::{Lane, OsRng, SystemClock, Tasks, Transport as _};
use ensign_raft::testing::{MemoryNet, quick};
use ensign_storage::MemoryLog;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Service as _, ServiceExt as _};

use super::gate::is_refusal;
use super::*;
use crate::authority::{Authority, Subject};
use crate::catalog::{Catalog, testing};
use crate::config::PeerAddress;
use crate::control::ControlThread;
use crate::identity::MemorySecrets;
use crate::join::{JoinParts, JoinSpec, Joins, Token, join};
use crate::partition::forward::ForwardService;
use crate::partition::testing::{NoOthers, OpenKeys};
use crate::partition::{BarrierLink, BatchLimits, ForwardLink, Partitions, PartitionsParts, Route};

mod hostile;
mod joining;

const ME: NodeId = NodeId(1);
const HELLO: &str = "/ensign.peer.v1.Peer/Hello";

fn cluster(byte: u8) -> ClusterId {
    ClusterId::from_bytes([byte; 16])
}

fn member(byte: u8, incarnation: u64) -> Membership {
    Membership { cluster: cluster(byte), life: Life { incarnation, process: incarnation } }
}

struct Doubles;

impl ForwardLink for Doubles {
    fn open(&self, _: NodeId, _: TopicId) -> BoxFuture<'static, Result<Route, String>> {
        Box::pin(async { Err("there is no other node".to_owned()) })
    }
}

impl BarrierLink for Doubles {
    fn barrier(&self, _: NodeId, _: TopicId) -> BoxFuture<'static, Result<LogIndex, String>> {
        Box::pin(async { Err("there is no other node".to_owned()) })
    }
}

impl VaultEndpoint for Doubles {
    fn call(&self, _: NodeId, _: vault_pb::Request) -> BoxFuture<'static, vault_pb::Reply> {
        futures::future::ready(vault_pb::Reply::default()).boxed()
    }
}

impl HolderEndpoint for Doubles {
    fn surrender(&self, _: vault_pb::SurrenderRequest) -> BoxFuture<'static, Result<vault_pb::SurrenderReply, Status>> {
        futures::future::ready(Ok(vault_pb::SurrenderReply::default())).boxed()
    }

    fn refresh(&self, _: vault_pb::RefreshRequest) -> BoxFuture<'static, Result<vault_pb::RefreshReply, Status>> {
        futures::future::ready(Ok(vault_pb::RefreshReply::default())).boxed()
    }
}

/// Node 1 of cluster 7, in its third life, whose only other node is number 2.
struct Fixture {
    authority: Authority,
    address: String,
    tasks: Tasks,
    control: ControlThread,
    memory: tempfile::TempDir,
    inside: Option<(Peers, Joins, Catalog)>,
}

impl Fixture {
    async fn start() -> Self {
        let authority = Authority::generate("test").unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let control = ControlThread::start().unwrap();
        let tasks = Tasks::new().with_control(control.runtime());
        let fixture = Self { authority, address, tasks, control, memory: tempfile::tempdir().unwrap(), inside: None };
        let (clock, rng, tasks) = (Arc::new(SystemClock), Arc::new(OsRng), fixture.tasks.clone());
        let net = MemoryNet::new();
        let runtime = Runtime::new(quick(ME), net.transport(ME), clock.clone(), rng.clone(), tasks.clone());
        let catalog = testing::solo(clock.clone(), rng.clone());
        let partitions = Partitions::start(PartitionsParts {
            me: ME,
            cluster: cluster(7),
            runtime: runtime.clone(),
            log: Arc::new(MemoryLog::new()),
            catalog: catalog.clone(),
            keys: Arc::<OpenKeys>::default(),
            forward: Arc::new(Doubles),
            barrier: Arc::new(Doubles),
            reads: Arc::new(NoOthers),
            clock,
            rng,
            tasks: tasks.clone(),
            limits: BatchLimits::default(),
            tail_bytes: ByteCount(1 << 20),
        });
        let joins = Joins::new(JoinParts {
            cluster: cluster(7),
            above: NodeId(2),
            catalog: catalog.clone(),
            secrets: Arc::<MemorySecrets>::default(),
            clock: Arc::new(SystemClock),
            rng: Arc::new(OsRng),
        });
        let tls = fixture.tls(ME);
        let peers = Peers::new(ME, Some(member(7, 3)), &fixture.addresses(), &tls);
        let services = Services {
            node: ME,
            cluster: cluster(7),
            peers: peers.clone(),
            runtime,
            catalog: catalog.clone(),
            vault: Arc::new(Doubles),
            holder: Arc::new(Doubles),
            more: tonic::service::Routes::new(ForwardService::server(partitions, tasks.clone())),
            join: tonic::service::Routes::new(crate::join::service(joins.clone())),
            tasks,
        };
        serve(listener, &tls, services);
        Self { inside: Some((peers, joins, catalog)), ..fixture }
    }

    fn tls(&self, node: NodeId) -> PeerTls {
        let issued = self.authority.issue(node).unwrap();
        PeerTls::from_pem(issued.certificate, issued.private_key, self.authority.certificate()).unwrap()
    }

    fn addresses(&self) -> Vec<PeerAddress> {
        let address = |id| PeerAddress { id: NodeId(id), address: self.address.clone() };
        vec![address(1), address(2)]
    }

    /// How `node` reaches node 1, being what it says it is.
    fn as_node(&self, node: u64, own: Option<Membership>) -> Peers {
        Peers::new(NodeId(node), own, &self.addresses(), &self.tls(NodeId(node)))
    }
}

/// Calls a method with an empty message, and returns the status that the headers or the trailers tell.
async fn call(peers: &Peers, path: &str) -> Result<(), Status> {
    let mut channel = peers.channel(ME).unwrap();
    // A stream that ends after one empty message: every kind of method takes it.
    let message = Bytes::from_static(&[0; 5]);
    let request = http::Request::post(format!("https://peer{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(axum::body::Body::from(message)))
        .unwrap();
    let answer = channel.ready().await.unwrap().call(request).await.map_err(Status::from_error)?;
    match Status::from_header_map(answer.headers()) {
        Some(status) if status.code() != Code::Ok => Err(status),
        _ => Ok(()),
    }
}

/// Every method that the schema of the peer port knows: `/package.Service/Method`.
fn methods() -> Vec<String> {
    let mut methods = Vec::new();
    for file in ["ensign/peer/v1/peer.proto", "ensign/peer/v1/forward.proto", "ensign/vault/v1/vault.proto"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto/schema").join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        let after = |line: &str, word: &str| {
            let rest = line.trim().strip_prefix(word)?;
            Some(rest.split(|c: char| !c.is_alphanumeric() && c != '.').next().unwrap_or_default().to_owned())
        };
        let package = text.lines().find_map(|line| after(line, "package ")).unwrap();
        let mut service = String::new();
        for line in text.lines() {
            service = after(line, "service ").unwrap_or(service);
            methods.extend(after(line, "rpc ").map(|method| format!("/{package}.{service}/{method}")));
        }
    }
    methods
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_of_the_peer_port_refuses_strangers() {
    let fixture = Fixture::start().await;
    let methods = methods();
    assert!(methods.len() >= 8, "{methods:?}");
    // A node that the authority has certified, but that nobody named; and one that claims to be the callee.
    for stranger in [9, 1] {
        let mut addresses = fixture.addresses();
        addresses[1].id = NodeId(stranger);
        let others = [PeerAddress { id: ME, ..addresses[0].clone() }];
        let caller = if stranger == 1 { NodeId(2) } else { NodeId(stranger) };
        let peers = Peers::new(caller, Some(member(7, 1)), &others, &fixture.tls(NodeId(stranger)));
        for method in &methods {
            let status = call(&peers, method).await.unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied, "{method}: {status:?}");
            assert!(status.message().contains("is not a peer of node 1"), "{method}: {status:?}");
        }
    }
    // The same calls of a known peer get past the gate, so what was refused above is really served here.
    let peer = fixture.as_node(2, Some(member(7, 1)));
    for method in &methods {
        let status = call(&peer, method).await.err();
        assert!(
            !status.as_ref().is_some_and(|s| is_refusal(s) || s.code() == Code::Unimplemented),
            "{method}: {status:?}"
        );
    }
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_is_refused_and_told_both_names() {
    let fixture = Fixture::start().await;
    let other = fixture.as_node(2, Some(member(8, 1)));
    for method in methods().iter().filter(|method| !method.ends_with("/Hello")) {
        let status = call(&other, method).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{method}: {status:?}");
        let (theirs, ours) = (cluster(8).to_string(), cluster(7).to_string());
        assert!(status.message().contains(&theirs) && status.message().contains(&ours), "{status:?}");
    }
    // Raft's pipes are the same: nothing of either log reaches the other.
    let transport = PipeTransport::new(other, fixture.tasks.clone());
    let error = transport.connect(ME, Lane::Bulk).await.err().unwrap();
    assert!(error.cause.contains(&cluster(8).to_string()), "{}", error.cause);

    // A node that has no cluster yet learns this one's by hello, and may do nothing else.
    let fresh = fixture.as_node(2, None);
    let reply = PeerClient::new(fresh.channel(ME).unwrap()).hello(HelloRequest {}).await.unwrap().into_inner();
    assert_eq!(reply.cluster[..], cluster(7).as_bytes()[..]);
    assert_eq!(call(&fresh, "/ensign.peer.v1.Peer/Propose").await.unwrap_err().code(), Code::FailedPrecondition);
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_of_another_cluster_or_of_a_twin_is_not_believed() {
    let fixture = Fixture::start().await;
    // Hello is answered to everybody, so what refuses here is the caller.
    call(&fixture.as_node(2, Some(member(7, 1))), HELLO).await.unwrap();
    let status = call(&fixture.as_node(2, Some(member(8, 1))), HELLO).await.unwrap_err();
    assert!(status.message().contains(&cluster(8).to_string()), "{status:?}");

    // Node 2 has seen node 1 in its fourth life; who answers says that it is the third.
    let peers = fixture.as_node(2, Some(member(7, 1)));
    peers.gate().note(ME, Life { incarnation: 4, process: 4 });
    let status = call(&peers, HELLO).await.unwrap_err();
    assert!(status.message().contains("two processes run as node 1"), "{status:?}");
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_of_a_node_is_noticed() {
    let fixture = Fixture::start().await;
    let propose = "/ensign.peer.v1.Peer/ReadIndex";
    call(&fixture.as_node(2, Some(member(7, 5))), propose).await.unwrap();
    let twin = Membership { cluster: cluster(7), life: Life { incarnation: 5, process: 99 } };
    let status = call(&fixture.as_node(2, Some(twin)), propose).await.unwrap_err();
    assert!(status.message().contains("two processes run as node 2"), "{status:?}");
    assert!(is_refusal(&status));
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}

impl Fixture {
    fn peers(&self) -> &Peers {
        &self.inside.as_ref().unwrap().0
    }

    /// What node 1 is told of node 2 and of others.
    fn entries(&self, ids: &[u64]) -> Vec<PeerEntry> {
        let entry = |id: &u64| PeerEntry::from(&PeerAddress { id: NodeId(*id), address: self.address.clone() });
        ids.iter().map(entry).collect()
    }
}

const READ_INDEX: &str = "/ensign.peer.v1.Peer/ReadIndex";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_is_a_peer_from_when_it_is_told_until_it_is_told_otherwise() {
    let fixture = Fixture::start().await;
    let joined = Peers::new(NodeId(3), Some(member(7, 1)), &fixture.addresses()[..1], &fixture.tls(NodeId(3)));
    assert_eq!(call(&joined, READ_INDEX).await.unwrap_err().code(), Code::PermissionDenied);
    fixture.peers().update(&fixture.entries(&[1, 2, 3]));
    assert_eq!(fixture.peers().others(), [NodeId(2), NodeId(3)]);
    assert!(fixture.peers().channel(NodeId(3)).is_some());
    call(&joined, READ_INDEX).await.unwrap();

    // An open pipe is a call that was admitted: it must not outlive the peer's being one.
    let transport = PipeTransport::new(joined.clone(), fixture.tasks.clone());
    let mut pipe = transport.connect(ME, Lane::Control).await.unwrap();
    fixture.peers().update(&fixture.entries(&[1, 2]));
    while pipe.incoming.recv().await.is_some() {}
    assert_eq!(call(&joined, READ_INDEX).await.unwrap_err().code(), Code::PermissionDenied);
    assert!(fixture.peers().channel(NodeId(3)).is_none());
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_moved_is_found_at_its_new_address() {
    let fixture = Fixture::start().await;
    // A port that nobody listens on.
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let seeds = [PeerAddress { id: ME, address: gone.clone() }];
    let peers = Peers::new(NodeId(2), Some(member(7, 1)), &seeds, &fixture.tls(NodeId(2)));
    assert!(call(&peers, HELLO).await.is_err());
    peers.update(&[PeerEntry { id: ME, addresses: vec![gone, fixture.address.clone()], life: None }]);
    call(&peers, HELLO).await.unwrap();
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}

/// Both ends of this test's connections live on the control thread; everything else has no thread to run on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_calls_are_answered_while_every_other_thread_is_taken() {
    const WORKERS: usize = 2;
    let fixture = Fixture::start().await;
    let runtime = Some(fixture.control.runtime());
    let (own, tls) = (Some(member(7, 1)), fixture.tls(NodeId(2)));
    let peers = Peers::speaking(Speaks::NEWEST, NodeId(2), own, &fixture.addresses(), &tls, runtime);
    call(&peers, HELLO).await.unwrap();
    let all_taken = Arc::new(std::sync::Barrier::new(WORKERS + 1));
    let free = Arc::new(AtomicBool::new(false));
    for _ in 0..WORKERS {
        let (all_taken, free) = (Arc::clone(&all_taken), Arc::clone(&free));
        fixture.tasks.spawn("takes a thread", |_stop| async move {
            all_taken.wait();
            let begin = tokio::time::Instant::now();
            while !free.load(Ordering::SeqCst) && begin.elapsed() < std::time::Duration::from_secs(30) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            free.store(true, Ordering::SeqCst);
        });
    }
    all_taken.wait();
    call(&peers, HELLO).await.unwrap();
    let freed = free.swap(true, Ordering::SeqCst);
    assert!(!freed, "the call was answered only when the other threads were free again");
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_is_refused_by_peers_that_have_never_met_it() {
    let fixture = Fixture::start().await;
    // The peer has restarted: what it knows of node 2, the catalog has told it.
    let life = Some(Life { incarnation: 9, process: 90 });
    fixture.peers().update(&[PeerEntry { life, ..fixture.entries(&[2])[0].clone() }]);
    let status = call(&fixture.as_node(2, None), HELLO).await.unwrap_err();
    assert!(is_refusal(&status) && status.message().contains("comes back without its data"), "{status:?}");
    let status = call(&fixture.as_node(2, Some(member(7, 1))), READ_INDEX).await.unwrap_err();
    assert!(status.message().contains("this one is in life 1 of it, and life 9 is known"), "{status:?}");
    call(&fixture.as_node(2, Some(member(7, 10))), READ_INDEX).await.unwrap();
    fixture.tasks.shut_down(std::time::Duration::from_secs(5)).await;
}
