//! What peers may call on this node.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::pb::peer::v1::peer_server::{Peer, PeerServer as PeerService};
use ensign_proto::pb::peer::v1::{
    HelloReply, HelloRequest, PipeMessage, ProposeCommitted, ProposeRefusal, ProposeReply, ProposeRequest,
    ReadIndexReply, ReadIndexRequest, propose_refusal, propose_reply, read_index_reply,
};
use ensign_proto::pb::vault::v1 as vault_pb;
use ensign_proto::pb::vault::v1::keyholder_server::{Keyholder, KeyholderServer};
use ensign_proto::pb::vault::v1::vault_server::{Vault, VaultServer};
use ensign_proto::{ClusterId, GroupId, NodeId};
use ensign_raft::Runtime;
use ensign_raft::env::{Lane, Tasks};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use rustls::server::ClientHello;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};
use tracing::{error, warn};

use super::gate::{CallingNode, GateLayer, Speaks};
use super::propose::{propose_refusal, read_refusal};
use super::tls::{CONTROL_ALPN, JOIN_ALPN, PeerTls};
use super::transport::{LANE, MESSAGE_MAX, accept, lane_of};
use crate::catalog::Catalog;
use crate::door::{Door, Guest};
use crate::handshake::{Choose, Entrance, Stream};

/// The vault on this node, as peers reach it. Implemented by the vault; tests use doubles.
pub trait VaultEndpoint: Send + Sync + 'static {
    /// Answers a call of `caller`, which its certificate names.
    fn call(&self, caller: NodeId, request: vault_pb::Request) -> BoxFuture<'static, vault_pb::Reply>;
}

/// The keys this node holds, as the vault's leader reaches them.
pub trait HolderEndpoint: Send + Sync + 'static {
    /// Gives keys up; answers once no use of them is in progress.
    fn surrender(
        &self,
        request: vault_pb::SurrenderRequest,
    ) -> BoxFuture<'static, Result<vault_pb::SurrenderReply, Status>>;

    /// Hears news; answers once it has.
    fn refresh(&self, request: vault_pb::RefreshRequest) -> BoxFuture<'static, Result<vault_pb::RefreshReply, Status>>;
}

/// What a node offers its peers.
pub struct Services {
    /// This node.
    pub node: NodeId,
    /// Its cluster.
    pub cluster: ClusterId,
    /// Every node that may call.
    pub peers: super::Peers,
    /// Takes Raft pipes.
    pub runtime: Runtime,
    /// Takes the catalog's proposals.
    pub catalog: Catalog,
    /// The vault.
    pub vault: Arc<dyn VaultEndpoint>,
    /// The keys held here.
    pub holder: Arc<dyn HolderEndpoint>,
    /// Services of the data plane.
    pub more: Routes,
    /// What machines without a certificate may call, and nothing else.
    pub join: Routes,
    /// Owner of the server's tasks.
    pub tasks: Tasks,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Services").field("node", &self.node).field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// Serves peers on `listener` until the tasks stop.
pub fn serve(listener: TcpListener, tls: &PeerTls, services: Services) {
    let tasks = services.tasks.clone();
    let (more, join) = (services.more.clone(), services.join.clone());
    let gate = Arc::clone(services.peers.gate());
    let shared = Shared(Arc::new(services));
    let routes = more
        .add_service(
            PeerService::new(shared.clone())
                .max_decoding_message_size(MESSAGE_MAX)
                .max_encoding_message_size(MESSAGE_MAX),
        )
        .add_service(VaultServer::new(shared.clone()))
        .add_service(KeyholderServer::new(shared));
    let server = Server::builder()
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(4096)
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        // In front of every service alike, whoever adds one.
        .layer(GateLayer(gate))
        .add_routes(routes);
    let joiners = Server::builder()
        .concurrency_limit_per_connection(1)
        .max_concurrent_streams(1)
        .max_connection_age(JOIN_TIME)
        .timeout(JOIN_TIME)
        .add_routes(join);
    let (bulk_tx, bulk_rx) = mpsc::channel(READY);
    let (control_tx, control_rx) = mpsc::channel(READY);
    let (join_tx, join_rx) = mpsc::channel(READY);
    split(listener, tls, Doors { bulk: bulk_tx, control: control_tx, join: join_tx }, &tasks);
    for (lane, connections) in [(Lane::Bulk, bulk_rx), (Lane::Control, control_rx)] {
        let server = server.clone();
        let incoming = ReceiverStream::new(connections).map(Ok::<_, std::io::Error>);
        tasks.for_lane(lane).spawn("peer-server", |stop| async move {
            if let Err(error) = server.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await {
                error!(%error, "the peer listener failed");
            }
        });
    }
    let incoming = ReceiverStream::new(join_rx).map(Ok::<_, std::io::Error>);
    tasks.spawn("join-server", |stop| async move {
        if let Err(error) = joiners.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await {
            error!(%error, "the listener for joining machines failed");
        }
    });
}

type Ready = mpsc::Sender<TlsStream<Guest>>;

/// Where connections go.
struct Doors {
    bulk: Ready,
    control: Ready,
    join: Ready,
}

/// Parts who shows a certificate of the cluster from who asks to join, and the two lanes of peers, by what the handshake was about.
fn split(listener: TcpListener, tls: &PeerTls, doors: Doors, tasks: &Tasks) {
    let tls = tls.clone();
    let choose: Choose = Arc::new(move |hello: &ClientHello<'_>| {
        let joins = hello.alpn().is_some_and(|mut names| names.any(|name| name == JOIN_ALPN));
        if joins { tls.join() } else { tls.server() }
    });
    let mut entrance = Entrance::new("peer-server", Door::new("peer-server", listener, PLACES), Some(choose), tasks);
    let places = Arc::new(Semaphore::new(JOINERS));
    let control = tasks.control().cloned();
    tasks.spawn("peer-entrance", |stop| async move {
        while let Some(Some((stream, address))) = stop.run_until_cancelled(entrance.next()).await {
            let Stream::Secure(mut stream) = stream else { continue };
            // Sending fails when the server is gone: then so is everything.
            if stream.get_ref().1.alpn_protocol() == Some(CONTROL_ALPN) {
                if let Some(runtime) = &control
                    && let Err(error) = stream.get_mut().0.move_to(runtime)
                {
                    warn!(%address, %error, "a control connection stays with everything else, and waits with it");
                }
                let _ = doors.control.send(*stream).await;
            } else if stream.get_ref().1.alpn_protocol() != Some(JOIN_ALPN) {
                let _ = doors.bulk.send(*stream).await;
            } else if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                stream.get_mut().0.hold(place);
                let _ = doors.join.send(*stream).await;
            } else {
                warn!(%address, "too many machines want to join at once: one was turned away, and may try again");
            }
        }
    });
}

/// Connections of peers at once, and of who wants to be taken for one.
const PLACES: usize = 1024;
/// Of these, machines that join.
const JOINERS: usize = 32;
/// How long one of them may stay.
const JOIN_TIME: Duration = Duration::from_mins(1);
/// Connections that wait to be taken over.
const READY: usize = 16;

#[derive(Clone)]
struct Shared(Arc<Services>);

impl Shared {
    /// The node that the caller's certificate names, as the gate has checked.
    fn caller<T>(request: &Request<T>) -> Result<NodeId, Status> {
        let node = request.extensions().get::<CallingNode>().map(|calling| calling.0);
        node.ok_or_else(|| Status::unauthenticated("peers must show a certificate"))
    }

    fn unknown_group(group: u64) -> ProposeRefusal {
        ProposeRefusal {
            reason: propose_refusal::Reason::UnknownGroup.into(),
            leader: 0,
            message: format!("group {group} takes no proposals from peers"),
        }
    }
}

#[tonic::async_trait]
impl Peer for Shared {
    type PipeStream = BoxStream<'static, Result<PipeMessage, Status>>;

    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        Self::caller(&request)?;
        Ok(Response::new(HelloReply {
            node: self.0.node.0,
            cluster: self.0.cluster.as_bytes().to_vec().into(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }))
    }

    async fn pipe(&self, request: Request<Streaming<PipeMessage>>) -> Result<Response<Self::PipeStream>, Status> {
        let peer = Self::caller(&request)?;
        let lane = request
            .metadata()
            .get(LANE)
            .and_then(|name| name.to_str().ok())
            .and_then(lane_of)
            .ok_or_else(|| Status::invalid_argument(format!("{LANE} must be bulk or control")))?;
        let gone = self.0.peers.gate().gone(peer, request.metadata().as_ref());
        let version = Speaks::of(request.metadata().as_ref()).newest;
        let (pipe, replies) = accept(&self.0.tasks.for_lane(lane), request.into_inner(), gone.clone(), version);
        self.0.runtime.accept(peer, lane, pipe);
        // Open pipes must not keep a stopping server waiting.
        let stop = self.0.tasks.stop_token().clone();
        let ended = async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = gone.cancelled() => {}
            }
        };
        Ok(Response::new(replies.take_until(ended).boxed()))
    }

    async fn propose(&self, request: Request<ProposeRequest>) -> Result<Response<ProposeReply>, Status> {
        Self::caller(&request)?;
        let ProposeRequest { group, payload } = request.into_inner();
        let result = if GroupId(group) == GroupId::CATALOG {
            match self.0.catalog.serve_propose(payload).await {
                Ok((id, response)) => {
                    propose_reply::Result::Committed(ProposeCommitted { term: id.term.0, index: id.index.0, response })
                }
                Err(error) => propose_reply::Result::Refusal(propose_refusal(&error)),
            }
        } else {
            propose_reply::Result::Refusal(Self::unknown_group(group))
        };
        Ok(Response::new(ProposeReply { result: Some(result) }))
    }

    async fn read_index(&self, request: Request<ReadIndexRequest>) -> Result<Response<ReadIndexReply>, Status> {
        Self::caller(&request)?;
        let group = request.into_inner().group;
        let result = if GroupId(group) == GroupId::CATALOG {
            match self.0.catalog.serve_read_index().await {
                Ok(index) => read_index_reply::Result::Index(index.0),
                Err(error) => read_index_reply::Result::Refusal(read_refusal(&error)),
            }
        } else {
            read_index_reply::Result::Refusal(Self::unknown_group(group))
        };
        Ok(Response::new(ReadIndexReply { result: Some(result) }))
    }
}

#[tonic::async_trait]
impl Vault for Shared {
    async fn call(&self, request: Request<vault_pb::Request>) -> Result<Response<vault_pb::Reply>, Status> {
        let caller = Self::caller(&request)?;
        Ok(Response::new(self.0.vault.call(caller, request.into_inner()).await))
    }
}

#[tonic::async_trait]
impl Keyholder for Shared {
    async fn surrender(
        &self,
        request: Request<vault_pb::SurrenderRequest>,
    ) -> Result<Response<vault_pb::SurrenderReply>, Status> {
        Self::caller(&request)?;
        self.0.holder.surrender(request.into_inner()).await.map(Response::new)
    }

    async fn refresh(
        &self,
        request: Request<vault_pb::RefreshRequest>,
    ) -> Result<Response<vault_pb::RefreshReply>, Status> {
        Self::caller(&request)?;
        self.0.holder.refresh(request.into_inner()).await.map(Response::new)
    }
}
