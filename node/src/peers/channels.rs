//! Connections to peers: two each, opened when first used, re-opened by themselves.
//!
//! Who the peers are follows the catalog ([`Peers::update`], called by follow.rs). A connection that is open lives on when its
//! peer's address or this node's certificate changes; the next one is made with what is known then.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::{ClusterVersion, NodeId};
use ensign_raft::env::Lane;
use http::Uri;
use hyper::rt::Executor;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::ended::Ended;
use super::gate::{Gate, Life, Membership, PeerChannel, Speaks};
use super::tls::{PeerTls, server_name};
use crate::config::PeerAddress;

const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// How long one address may take, and how long all of a peer's together.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What is known of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerEntry {
    /// Which.
    pub id: NodeId,
    /// Where its peer listener is, as `HOST:PORT`; tried in this order.
    pub addresses: Vec<String>,
    /// The newest life of it that the catalog knows.
    pub life: Option<Life>,
}

impl From<&PeerAddress> for PeerEntry {
    fn from(peer: &PeerAddress) -> Self {
        Self { id: peer.id, addresses: vec![peer.address.clone()], life: None }
    }
}

/// The cluster's nodes and the way to each. Clones are cheap and share the connections.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    me: NodeId,
    tls: PeerTls,
    ways: Mutex<BTreeMap<NodeId, Way>>,
    gate: Arc<Gate>,
    /// Where the control connections live, if not with everything else.
    control: Option<Handle>,
}

/// The way to one peer.
struct Way {
    addresses: Arc<Mutex<Vec<String>>>,
    bulk: PeerChannel,
    control: PeerChannel,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers").field("me", &self.inner.me).field("others", &self.others()).finish_non_exhaustive()
    }
}

impl Peers {
    /// Prepares connections to these nodes; opens none yet. Call it within a tokio runtime. A node without a cluster may only
    /// say hello.
    pub fn new(me: NodeId, own: Option<Membership>, seeds: &[PeerAddress], tls: &PeerTls) -> Self {
        Self::speaking(Speaks::NEWEST, me, own, seeds, tls, None)
    }

    /// The same, of a node that says this of itself, with control connections on a runtime of their own.
    pub fn speaking(
        speaks: Speaks,
        me: NodeId,
        own: Option<Membership>,
        seeds: &[PeerAddress],
        tls: &PeerTls,
        control: Option<Handle>,
    ) -> Self {
        let gate = Arc::new(Gate::new(me, own, speaks));
        let peers = Self { inner: Arc::new(Inner { me, tls: tls.clone(), ways: Mutex::default(), gate, control }) };
        peers.update(&seeds.iter().map(PeerEntry::from).collect::<Vec<_>>());
        peers
    }

    /// Makes these the peers. A new one is admitted and can be called from here on. One that is not among them any more is
    /// refused from here on, its open pipes end, and calls to it fail. This node itself is left out, wherever it is named.
    pub fn update(&self, entries: &[PeerEntry]) {
        let others: Vec<&PeerEntry> = entries.iter().filter(|entry| entry.id != self.inner.me).collect();
        self.inner.gate.update(others.iter().map(|entry| (entry.id, entry.life)));
        let mut ways = self.ways();
        ways.retain(|known, _| others.iter().any(|entry| entry.id == *known));
        for entry in others {
            let way = ways.entry(entry.id).or_insert_with(|| self.way(entry.id));
            let mut addresses = way.addresses.lock().unwrap_or_else(PoisonError::into_inner);
            let last = addresses.first().cloned();
            addresses.clone_from(&entry.addresses);
            // The one that worked last stays first while it is among them.
            if let Some(place) = addresses.iter().position(|address| Some(address) == last.as_ref()) {
                addresses[..=place].rotate_right(1);
            }
        }
    }

    /// Tells these nodes, when they call, that they were removed. Leave them out of [`Peers::update`] too.
    pub fn remove(&self, removed: &[NodeId]) {
        self.inner.gate.remove(removed.iter().copied());
    }

    fn way(&self, peer: NodeId) -> Way {
        let addresses = Arc::<Mutex<Vec<String>>>::default();
        let channel = |lane| {
            let dialer = Dialer { peer, lane, addresses: Arc::clone(&addresses), tls: self.inner.tls.clone() };
            let runtime = self.inner.control.clone().filter(|_| lane == Lane::Control);
            PeerChannel::new(connect_lazily(dialer, runtime), peer, Arc::clone(&self.inner.gate))
        };
        Way { bulk: channel(Lane::Bulk), control: channel(Lane::Control), addresses }
    }

    /// Refuses who does not speak this version of the cluster, from here on.
    pub fn require(&self, version: ClusterVersion) {
        self.inner.gate.require(version);
    }

    /// Whether a peer of this cluster has said that this process is no part of it any more, and why.
    pub fn ended(&self) -> watch::Receiver<Option<Ended>> {
        self.inner.gate.ended()
    }

    /// This node.
    pub fn me(&self) -> NodeId {
        self.inner.me
    }

    /// Every other node, as far as it is known now.
    pub fn others(&self) -> Vec<NodeId> {
        self.ways().keys().copied().collect()
    }

    /// The control connection to `peer`; `None` for this node and for strangers.
    pub fn channel(&self, peer: NodeId) -> Option<PeerChannel> {
        self.lane(peer, Lane::Control)
    }

    /// The bulk connection to `peer`; `None` for this node and for strangers.
    pub fn bulk_channel(&self, peer: NodeId) -> Option<PeerChannel> {
        self.lane(peer, Lane::Bulk)
    }

    /// The connection to `peer` for `lane`.
    pub(super) fn lane(&self, peer: NodeId, lane: Lane) -> Option<PeerChannel> {
        self.ways().get(&peer).map(|way| match lane {
            Lane::Bulk => way.bulk.clone(),
            Lane::Control => way.control.clone(),
        })
    }

    /// What calls of peers, and answers to this node's, must pass.
    pub(super) fn gate(&self) -> &Arc<Gate> {
        &self.inner.gate
    }

    fn ways(&self) -> MutexGuard<'_, BTreeMap<NodeId, Way>> {
        self.inner.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes a peer's next connection.
#[derive(Clone)]
struct Dialer {
    peer: NodeId,
    lane: Lane,
    addresses: Arc<Mutex<Vec<String>>>,
    tls: PeerTls,
}

impl Dialer {
    /// Tries every address once. The first that works is tried first the next time.
    async fn dial(self) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
        let addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut failure = io::Error::new(io::ErrorKind::NotFound, format!("no address of node {} is known", self.peer));
        for address in addresses {
            match tokio::time::timeout(ADDRESS_TIMEOUT, self.connect(&address)).await {
                Ok(Ok(stream)) => {
                    let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(place) = addresses.iter().position(|known| *known == address) {
                        addresses[..=place].rotate_right(1);
                    }
                    return Ok(TokioIo::new(stream));
                }
                Ok(Err(error)) => failure = io::Error::new(error.kind(), format!("{address}: {error}")),
                Err(_) => failure = io::Error::new(io::ErrorKind::TimedOut, format!("{address}: no answer in time")),
            }
        }
        Err(failure)
    }

    async fn connect(&self, address: &str) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(self.tls.client(self.lane)).connect(server_name(self.peer), stream).await
    }
}

/// Runs a connection's tasks on the runtime of the control lane.
#[derive(Clone)]
struct On(Handle);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for On {
    fn execute(&self, task: F) {
        // hyper's own tasks, which end with their connection.
        self.0.spawn(task);
    }
}

fn connect_lazily(dialer: Dialer, runtime: Option<Handle>) -> Channel {
    // Letters, digits and hyphens: always an authority. The scheme is http because the dialer speaks TLS by itself.
    let uri = Uri::builder().scheme("http").authority(super::node_name(dialer.peer)).path_and_query("/").build();
    let endpoint = Endpoint::from(uri.expect("a node's name is an authority"));
    let endpoint = match runtime {
        Some(runtime) => endpoint.executor(On(runtime)),
        None => endpoint,
    };
    endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // A dead peer is noticed by its silence, long before TCP gives up.
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(4))
        .keep_alive_while_idle(true)
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector_lazy(service_fn(move |_: Uri| dialer.clone().dial()))
}
