//! The public API: what clients call, checked, authorized, and handed to the partitions.
//!
//! Publish, Subscribe and EnSQL carry events and are served by hand: their replies are spliced from stored bytes into gRPC frames
//! ([`wire`]), so a delivered event is copied once and decoded never. Every other call goes through the generated service.

pub(crate) mod auth;
mod consistency;
mod gathering;
mod guard;
mod info;
pub(crate) mod opening;
mod publish;
mod query;
mod replies;
mod scope;
mod subscribe;
mod topics;
mod unary;
mod unreadable;
mod wire;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use ensign_proto::NodeId;
use ensign_proto::pb::ensign::v1beta1::ensign_server::EnsignServer;
use ensign_raft::env::{Clock, Rng, Tasks, UnixNanos};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::server::NamedService;

use crate::catalog::Catalog;
use crate::health::Phase;
use crate::identity::Identity;
use crate::partition::{FairRoom, Partitions};
use crate::quota::Quotas;

pub(crate) use guard::Guarded;

/// The largest request message: an event of the largest size with room to spare, so that one that is too large can be nacked.
pub(crate) const REQUEST_MAX: usize = 8 << 20;

/// The largest first message of a stream, and the largest message of every call that carries no events.
pub(crate) const OPENING_MAX: usize = 64 << 10;

/// The largest event, as its publisher encoded it.
pub const EVENT_MAX: usize = 5_243_000;

/// The largest reply that the SDKs receive.
pub(crate) const REPLY_MAX: usize = 4 << 20;

/// What the public API needs.
pub struct RpcParts {
    /// This node.
    pub node: NodeId,
    /// Which topics and API keys there are.
    pub catalog: Catalog,
    /// Who is calling.
    pub identity: Identity,
    /// The events.
    pub partitions: Partitions,
    /// How much projects may use.
    pub quotas: Quotas,
    /// What time it is.
    pub clock: Arc<dyn Clock>,
    /// For producer sessions.
    pub rng: Arc<dyn Rng>,
    /// Owner of the streams' tasks. Stopped after the streams have ended, so that what was received is committed.
    pub tasks: Tasks,
    /// Streams end when the node is stopping.
    pub phase: watch::Receiver<Phase>,
}

impl std::fmt::Debug for RpcParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RpcParts").field("node", &self.node).finish_non_exhaustive()
    }
}

/// Bytes of events on their way to a commit, over all publish streams of a node; more wait in their clients. No project takes all
/// of it.
const PUBLISH_ROOM: u64 = 256 << 20;

pub(crate) struct Shared {
    parts: RpcParts,
    publish_room: FairRoom,
    started: UnixNanos,
}

/// The `ensign.v1beta1.Ensign` service. Add it to the client listener's routes.
#[derive(Clone)]
pub struct Ensign {
    shared: Arc<Shared>,
    unary: Guarded<EnsignServer<unary::Unary>>,
}

impl std::fmt::Debug for Ensign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ensign").field("node", &self.shared.parts.node).finish_non_exhaustive()
    }
}

impl Ensign {
    /// The service.
    pub fn new(parts: RpcParts) -> Self {
        let started = parts.clock.wall();
        let publish_room = FairRoom::new(PUBLISH_ROOM);
        let shared = Arc::new(Shared { parts, publish_room, started });
        let unary = EnsignServer::new(unary::Unary(Arc::clone(&shared))).max_decoding_message_size(OPENING_MAX);
        let identity = shared.parts.identity.clone();
        // Whether the node is well is nobody's secret.
        let unary = Guarded::new(unary, identity, &["/ensign.v1beta1.Ensign/Status"]);
        Self { shared, unary }
    }
}

impl NamedService for Ensign {
    const NAME: &'static str = "ensign.v1beta1.Ensign";
}

impl tower::Service<http::Request<Body>> for Ensign {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        match request.uri().path() {
            "/ensign.v1beta1.Ensign/Publish" => Box::pin(async move { Ok(publish::serve(shared, request)) }),
            "/ensign.v1beta1.Ensign/Subscribe" => Box::pin(async move { Ok(subscribe::serve(shared, request)) }),
            "/ensign.v1beta1.Ensign/EnSQL" => Box::pin(async move { Ok(query::serve(shared, request)) }),
            _ => self.unary.call(request),
        }
    }
}

#[cfg(test)]
mod tests;
