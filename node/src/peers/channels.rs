//! Connections to peers: two each, opened when first used, re-opened by themselves.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::NodeId;
use ensign_raft::env::Lane;
use tonic::transport::{Channel, Endpoint};

use super::gate::{Gate, Membership, PeerChannel};
use super::tls::{PeerTls, TlsError};
use crate::config::PeerAddress;

const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// The cluster's nodes and the way to each. Clones are cheap and share the connections.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    me: NodeId,
    addresses: Vec<PeerAddress>,
    channels: BTreeMap<(NodeId, Lane), PeerChannel>,
    gate: Arc<Gate>,
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers")
            .field("me", &self.inner.me)
            .field("addresses", &self.inner.addresses)
            .finish_non_exhaustive()
    }
}

impl Peers {
    /// Prepares the connections; opens none yet. Call it within a tokio runtime. A node without a cluster may only say hello.
    ///
    /// # Errors
    /// [`TlsError::Malformed`]: an address or the certificates cannot be used.
    pub fn new(
        me: NodeId,
        own: Option<Membership>,
        addresses: &[PeerAddress],
        tls: &PeerTls,
    ) -> Result<Self, TlsError> {
        let others = addresses.iter().map(|peer| peer.id).filter(|id| *id != me);
        let gate = Arc::new(Gate::new(me, own, others));
        let mut channels = BTreeMap::new();
        for peer in addresses.iter().filter(|peer| peer.id != me) {
            for lane in [Lane::Bulk, Lane::Control] {
                let channel = PeerChannel::new(connect_lazily(peer, tls)?, peer.id, Arc::clone(&gate));
                channels.insert((peer.id, lane), channel);
            }
        }
        Ok(Self { inner: Arc::new(Inner { me, addresses: addresses.to_vec(), channels, gate }) })
    }

    /// This node.
    pub fn me(&self) -> NodeId {
        self.inner.me
    }

    /// Every node of the cluster, this one included.
    pub fn addresses(&self) -> &[PeerAddress] {
        &self.inner.addresses
    }

    /// Every other node.
    pub fn others(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.inner.addresses.iter().map(|peer| peer.id).filter(|id| *id != self.inner.me)
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
        self.inner.channels.get(&(peer, lane)).cloned()
    }

    /// What calls of peers, and answers to this node's, must pass.
    pub(super) fn gate(&self) -> &Arc<Gate> {
        &self.inner.gate
    }
}

fn connect_lazily(peer: &PeerAddress, tls: &PeerTls) -> Result<Channel, TlsError> {
    let malformed = |error: tonic::transport::Error| TlsError::Malformed {
        what: "the connection to a peer,",
        path: peer.to_string().into(),
        message: std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string),
    };
    let endpoint = Endpoint::from_shared(format!("https://{}", peer.address))
        .and_then(|endpoint| endpoint.tls_config(tls.client(peer.id)))
        .map_err(malformed)?;
    Ok(endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        // A dead peer is noticed by its silence, long before TCP gives up.
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(4))
        .keep_alive_while_idle(true)
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .connect_lazy())
}
