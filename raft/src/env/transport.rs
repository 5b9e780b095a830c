//! The network, as `raft` sees it: ordered pipes of byte messages to other nodes.

use bytes::Bytes;
use ensign_proto::{ClusterVersion, NodeId};
use futures::future::BoxFuture;
use thiserror::Error;
use tokio::sync::mpsc;

/// Which of a peer's two connections a pipe uses, so that votes and signs of life never wait behind bulk data; see also
/// [`Tasks::for_lane`](super::Tasks::for_lane).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Log entries.
    Bulk,
    /// Pings, votes, heartbeats, leader transfer, snapshots.
    Control,
}

/// Both ends of an ordered, bounded message pipe. It is broken when either channel closes; messages in flight may be lost.
#[derive(Debug)]
pub struct Pipe {
    /// Messages to the peer. Full means: wait.
    pub outgoing: mpsc::Sender<Bytes>,
    /// Messages from the peer.
    pub incoming: mpsc::Receiver<Bytes>,
    /// The newest version of the cluster that the peer speaks.
    pub version: ClusterVersion,
}

/// Why a pipe could not be opened.
#[derive(Debug, Clone, Error)]
#[error("node {peer} cannot be reached: {cause}")]
pub struct TransportError {
    /// Whom we called.
    pub peer: NodeId,
    /// What happened.
    pub cause: String,
}

/// Opens pipes to peers. The other side gets the same pipe through `Runtime::accept`.
pub trait Transport: Send + Sync + 'static {
    /// Opens a new pipe. The caller retries, with back-off; dropping the future is safe.
    fn connect(&self, peer: NodeId, lane: Lane) -> BoxFuture<'static, Result<Pipe, TransportError>>;
}
