//! Raft's pipes over gRPC streams.

use std::fmt;

use bytes::Bytes;
use ensign_proto::pb::peer::v1::PipeMessage;
use ensign_proto::pb::peer::v1::peer_client::PeerClient;
use ensign_proto::{ClusterVersion, NodeId};
use ensign_raft::env::{Lane, Pipe, Tasks, Transport, TransportError};
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status, Streaming};

use super::{Peers, Speaks};

/// The metadata key that says which lane a pipe is.
pub(super) const LANE: &str = "ensign-lane";
/// Messages that wait in one direction of a pipe; raft bounds their bytes.
const PIPE_MESSAGES: usize = 64;
/// The largest message that a peer may send: raft chunks what is larger.
pub(super) const MESSAGE_MAX: usize = 64 << 20;

/// Opens Raft pipes over the peers' connections.
#[derive(Clone)]
pub struct PipeTransport {
    peers: Peers,
    tasks: Tasks,
}

impl fmt::Debug for PipeTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PipeTransport").field("peers", &self.peers).finish_non_exhaustive()
    }
}

impl PipeTransport {
    /// A transport whose pumps belong to `tasks`.
    pub fn new(peers: Peers, tasks: Tasks) -> Self {
        Self { peers, tasks }
    }
}

impl Transport for PipeTransport {
    fn connect(&self, peer: NodeId, lane: Lane) -> BoxFuture<'static, Result<Pipe, TransportError>> {
        let channel = self.peers.lane(peer, lane);
        let (tasks, peers) = (self.tasks.for_lane(lane), self.peers.clone());
        Box::pin(async move {
            let failed = |cause: String| TransportError { peer, cause };
            let channel = channel.ok_or_else(|| failed("it is no node of this cluster".to_owned()))?;
            let mut client = PeerClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
            let (outgoing, pipe_rx) = mpsc::channel::<Bytes>(PIPE_MESSAGES);
            let mut request = Request::new(messages(pipe_rx));
            request.metadata_mut().insert(LANE, MetadataValue::from_static(lane_name(lane)));
            let replies = client.pipe(request).await.map_err(|status| failed(status.message().to_owned()))?;
            let headers: &http::HeaderMap = replies.metadata().as_ref();
            let (version, gone) = (Speaks::of(headers).newest, peers.gate().gone(peer, headers));
            Ok(Pipe { outgoing, incoming: pump(&tasks, replies.into_inner(), gone), version })
        })
    }
}

/// The name of a lane in metadata.
fn lane_name(lane: Lane) -> &'static str {
    match lane {
        Lane::Bulk => "bulk",
        Lane::Control => "control",
    }
}

/// The lane of that name.
pub(super) fn lane_of(name: &str) -> Option<Lane> {
    [Lane::Bulk, Lane::Control].into_iter().find(|lane| lane_name(*lane) == name)
}

/// The callee's end of a pipe: what raft gets, and the stream that answers the caller.
pub(super) fn accept(
    tasks: &Tasks,
    incoming: Streaming<PipeMessage>,
    gone: CancellationToken,
    version: ClusterVersion,
) -> (Pipe, impl tokio_stream::Stream<Item = Result<PipeMessage, Status>> + use<>) {
    let (outgoing, pipe_rx) = mpsc::channel::<Bytes>(PIPE_MESSAGES);
    (Pipe { outgoing, incoming: pump(tasks, incoming, gone), version }, messages(pipe_rx).map(Ok))
}

fn messages(pipe: mpsc::Receiver<Bytes>) -> impl tokio_stream::Stream<Item = PipeMessage> {
    ReceiverStream::new(pipe).map(|data| PipeMessage { data })
}

/// Moves a stream's messages into a channel until either side ends, or the peer's life is over (`gone`).
fn pump(tasks: &Tasks, mut stream: Streaming<PipeMessage>, gone: CancellationToken) -> mpsc::Receiver<Bytes> {
    let (tx, rx) = mpsc::channel(PIPE_MESSAGES);
    tasks.spawn("peer-pipe", |stop| async move {
        let pumping = async {
            while let Ok(Some(message)) = stream.message().await {
                if tx.send(message.data).await.is_err() {
                    break;
                }
            }
        };
        stop.run_until_cancelled(gone.run_until_cancelled(pumping)).await;
    });
    rx
}
