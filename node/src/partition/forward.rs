//! Between nodes: appends that arrive where the partition's leader is not, barriers for reads, and reads of nodes without a replica.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::ensign::peer::v1 as peer;
use ensign_proto::pb::ensign::peer::v1::forward_client::ForwardClient;
use ensign_proto::pb::ensign::peer::v1::forward_server::{Forward, ForwardServer};
use ensign_proto::{LogIndex, NodeId, Offset, ProjectId, RingId, TopicId};
use ensign_raft::env::Tasks;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use super::append::{self, AppendError, Chunk, Outcome};
use super::elsewhere::serve::{self, Reads};
use super::elsewhere::{Counting, Page, Pages, Place, ReadLink, Stand, Unread, Wanted, malformed};
use super::freshness::Freshness;
use super::handle::{BarrierLink, PartitionHandle};
use super::registry::Partitions;
use super::room::FairRoom;
use super::route::{ForwardLink, Route};
use crate::catalog::Catalog;
use crate::peers::{CallingNode, PeerChannel};

/// The largest message of a forward stream: a chunk with one event of the largest size fits well.
const MESSAGE_MAX: usize = 16 << 20;

/// Bytes of chunks from other nodes on their way to a commit, over all partitions that this node leads; more wait at their
/// senders, and no project takes all of it. Not taken from what this node's own publishers share: two nodes that wait for each other's room would wait for ever.
const ROOM: u64 = 256 << 20;

/// How long this node may take to learn of an API key under whose ring a peer's chunk is to be sealed.
const LEARN: Duration = Duration::from_secs(2);

/// Unanswered chunks of one stream.
const WINDOW: usize = 64;

/// The connections to other nodes.
pub trait Channels: Send + Sync + 'static {
    /// The connection to `peer` for event data; none for strangers.
    fn bulk(&self, peer: NodeId) -> Option<PeerChannel>;

    /// The connection to `peer` for small calls; none for strangers.
    fn control(&self, peer: NodeId) -> Option<PeerChannel>;
}

/// Calls [`Forward`] on other nodes.
#[derive(Clone)]
pub struct PeerForward(Arc<dyn Channels>);

impl std::fmt::Debug for PeerForward {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerForward")
    }
}

impl PeerForward {
    /// Over these connections.
    pub fn new(channels: Arc<dyn Channels>) -> Self {
        Self(channels)
    }
}

fn client(channel: PeerChannel) -> ForwardClient<PeerChannel> {
    ForwardClient::new(channel).max_decoding_message_size(MESSAGE_MAX).max_encoding_message_size(MESSAGE_MAX)
}

impl ForwardLink for PeerForward {
    fn open(&self, leader: NodeId, topic: TopicId) -> BoxFuture<'static, Result<Route, String>> {
        let channel = self.0.bulk(leader);
        Box::pin(async move {
            let channel = channel.ok_or("it is not a node of this cluster")?;
            let (requests, outgoing) = mpsc::channel(4);
            let topic_id = Bytes::copy_from_slice(topic.as_bytes());
            let open = peer::AppendOpen { topic_id, partition: 0 };
            let open = peer::AppendRequest { kind: Some(peer::append_request::Kind::Open(open)) };
            requests.send(open).await.map_err(|_| "the stream closed at once")?;
            let replies = client(channel).append(ReceiverStream::new(outgoing)).await;
            Ok(Route::remote(requests, replies.map_err(|status| status.to_string())?.into_inner()))
        })
    }
}

impl BarrierLink for PeerForward {
    fn barrier(&self, leader: NodeId, topic: TopicId) -> BoxFuture<'static, Result<LogIndex, String>> {
        let channel = self.0.control(leader);
        Box::pin(async move {
            let channel = channel.ok_or("it is not a node of this cluster")?;
            let mut request =
                Request::new(peer::BarrierRequest { topic_id: Bytes::copy_from_slice(topic.as_bytes()), partition: 0 });
            request.set_timeout(Duration::from_secs(2));
            let reply = client(channel).barrier(request).await.map_err(|status| status.message().to_owned())?;
            Ok(LogIndex(reply.into_inner().applied))
        })
    }
}

/// How long the one who asks waits, told to the other side so that it does not go on for nobody.
const ANSWER_BY: Duration = Duration::from_secs(20);

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER_BY);
    request
}

fn bytes_of(topic: TopicId) -> Bytes {
    Bytes::copy_from_slice(topic.as_bytes())
}

fn unreachable(status: &Status) -> Unread {
    Unread::Unreachable { cause: format!("{:?}: {}", status.code(), status.message()) }
}

fn stranger() -> Unread {
    Unread::Unreachable { cause: "it is not a node of this cluster".to_owned() }
}

fn to_page(reply: peer::FetchReply) -> Result<Page, Unread> {
    match reply.kind {
        Some(peer::fetch_reply::Kind::Page(page)) => page.try_into(),
        Some(peer::fetch_reply::Kind::Refused(refused)) => Err(refused.into()),
        None => Err(malformed("nothing in it")),
    }
}

impl ReadLink for PeerForward {
    fn stand(
        &self,
        holder: NodeId,
        topic: TopicId,
        freshness: Freshness,
        counting: Counting,
    ) -> BoxFuture<'static, Result<Stand, Unread>> {
        let channel = self.0.control(holder);
        Box::pin(async move {
            let counts = counting == Counting::Wanted;
            let freshness = peer::Freshness::from(freshness).into();
            let ask = peer::StandRequest { topic_id: bytes_of(topic), partition: 0, freshness, counts };
            let asked = client(channel.ok_or_else(stranger)?).stand(request(ask)).await;
            match asked.map_err(|status| unreachable(&status))?.into_inner().kind {
                Some(peer::stand_reply::Kind::Stand(stand)) => stand.try_into(),
                Some(peer::stand_reply::Kind::Refused(refused)) => Err(refused.into()),
                None => Err(malformed("nothing in it")),
            }
        })
    }

    fn locate(&self, holder: NodeId, topic: TopicId, place: Place) -> BoxFuture<'static, Result<Offset, Unread>> {
        let channel = self.0.control(holder);
        Box::pin(async move {
            let place = match place {
                Place::Time(ms) => peer::locate_request::Place::TimeMs(ms),
                Place::After(id) => peer::locate_request::Place::AfterId(Bytes::copy_from_slice(id.as_bytes())),
            };
            let ask = peer::LocateRequest { topic_id: bytes_of(topic), partition: 0, place: Some(place) };
            let asked = client(channel.ok_or_else(stranger)?).locate(request(ask)).await;
            match asked.map_err(|status| unreachable(&status))?.into_inner().kind {
                Some(peer::locate_reply::Kind::Offset(offset)) => {
                    serve::offset(offset).map_err(|_| malformed("offset"))
                }
                Some(peer::locate_reply::Kind::Refused(refused)) => Err(refused.into()),
                None => Err(malformed("nothing in it")),
            }
        })
    }

    fn fetch(&self, holder: NodeId, topic: TopicId, wanted: Wanted) -> BoxFuture<'static, Result<Page, Unread>> {
        let channel = self.0.bulk(holder);
        Box::pin(async move {
            let (after_index, after_link) = serve::after(&wanted);
            let (from, bytes) = (wanted.from.0, wanted.bytes);
            let ask =
                peer::FetchRequest { topic_id: bytes_of(topic), partition: 0, from, bytes, after_index, after_link };
            let asked = client(channel.ok_or_else(stranger)?).fetch(request(ask)).await;
            to_page(asked.map_err(|status| unreachable(&status))?.into_inner())
        })
    }

    fn follow(&self, holder: NodeId, topic: TopicId, from: Offset) -> BoxFuture<'static, Result<Pages, Unread>> {
        let channel = self.0.bulk(holder);
        Box::pin(async move {
            let ask = peer::FollowRequest { topic_id: bytes_of(topic), partition: 0, from: from.0 };
            let asked = client(channel.ok_or_else(stranger)?).follow(ask).await;
            let pages = asked.map_err(|status| unreachable(&status))?.into_inner();
            let pages = pages.map(|reply| reply.map_err(|status| unreachable(&status)).and_then(to_page));
            Ok(pages.boxed() as Pages)
        })
    }
}

/// Serves [`Forward`] to other nodes.
#[derive(Debug, Clone)]
pub struct ForwardService {
    partitions: Partitions,
    tasks: Tasks,
    room: FairRoom,
    reads: Reads,
}

impl ForwardService {
    /// The service, ready to be added to the peer server.
    pub fn server(partitions: Partitions, tasks: Tasks) -> ForwardServer<Self> {
        let reads = Reads::new(partitions.clone());
        ForwardServer::new(Self { partitions, tasks, room: FairRoom::new(ROOM), reads })
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX)
    }
}

fn topic_of(bytes: &[u8]) -> Result<TopicId, Status> {
    TopicId::try_from(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

/// The node that calls, as the gate has checked.
fn caller<T>(request: &Request<T>) -> Result<NodeId, Status> {
    let node = request.extensions().get::<CallingNode>().map(|calling| calling.0);
    node.ok_or_else(|| Status::unauthenticated("peers must show a certificate"))
}

#[tonic::async_trait]
impl Forward for ForwardService {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<peer::AppendReply, Status>> + Send>>;
    type FollowStream = Pin<Box<dyn Stream<Item = Result<peer::FetchReply, Status>> + Send>>;

    async fn append(
        &self,
        request: Request<Streaming<peer::AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let mut requests = request.into_inner();
        let Some(peer::append_request::Kind::Open(open)) = requests.message().await?.and_then(|first| first.kind)
        else {
            return Err(Status::invalid_argument("a forward stream begins with its opening"));
        };
        let topic = topic_of(&open.topic_id)?;
        let handle = self.partitions.wait_for(topic, Duration::from_secs(1)).await;
        let handle = handle.map_err(|_| Status::not_found("the partition does not run on this node"))?;
        let (outcomes, answers) = mpsc::channel::<oneshot::Receiver<Outcome>>(WINDOW);
        let (room, catalog) = (self.room.clone(), self.partitions.catalog().clone());
        self.tasks.spawn("forward-append", move |stop| async move {
            // Ends with the stream; what was queued is appended all the same.
            while let Some(Ok(Some(request))) = stop.run_until_cancelled(requests.message()).await {
                let Some(peer::append_request::Kind::Chunk(chunk)) = request.kind else { return };
                let Ok(outcome) = check_and_queue(&handle, &room, &catalog, chunk).await else { return };
                if outcomes.send(outcome).await.is_err() {
                    return;
                }
            }
        });
        let replies = ReceiverStream::new(answers).then(|outcome| async move {
            let outcome = outcome.await.unwrap_or(Err(AppendError::OutcomeUnknown));
            Ok(append::to_reply(&outcome))
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn barrier(&self, request: Request<peer::BarrierRequest>) -> Result<Response<peer::BarrierReply>, Status> {
        let topic = topic_of(&request.get_ref().topic_id)?;
        let handle = self.partitions.get(topic);
        let handle = handle.ok_or_else(|| Status::not_found("the partition does not run on this node"))?;
        let index = handle.confirm().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(peer::BarrierReply { applied: index.0 }))
    }

    async fn stand(&self, request: Request<peer::StandRequest>) -> Result<Response<peer::StandReply>, Status> {
        let asked = request.get_ref();
        let counting = if asked.counts { Counting::Wanted } else { Counting::Unwanted };
        let stand = self.reads.stand(topic_of(&asked.topic_id)?, asked.freshness().into(), counting).await;
        let kind = match stand {
            Ok(stand) => peer::stand_reply::Kind::Stand(stand.into()),
            Err(unread) => peer::stand_reply::Kind::Refused(unread.into()),
        };
        Ok(Response::new(peer::StandReply { kind: Some(kind) }))
    }

    async fn locate(&self, request: Request<peer::LocateRequest>) -> Result<Response<peer::LocateReply>, Status> {
        let asked = request.into_inner();
        let found = self.reads.locate(topic_of(&asked.topic_id)?, serve::place(asked.place)?).await;
        let kind = match found {
            Ok(offset) => peer::locate_reply::Kind::Offset(offset.0),
            Err(unread) => peer::locate_reply::Kind::Refused(unread.into()),
        };
        Ok(Response::new(peer::LocateReply { kind: Some(kind) }))
    }

    async fn fetch(&self, request: Request<peer::FetchRequest>) -> Result<Response<peer::FetchReply>, Status> {
        let caller = caller(&request)?;
        let asked = request.get_ref();
        let page = self.reads.fetch(caller, topic_of(&asked.topic_id)?, serve::wanted(asked)?).await;
        Ok(Response::new(serve::fetch_reply(page)))
    }

    async fn follow(&self, request: Request<peer::FollowRequest>) -> Result<Response<Self::FollowStream>, Status> {
        let caller = caller(&request)?;
        let asked = request.get_ref();
        let pages = match self.reads.follow(caller, topic_of(&asked.topic_id)?, serve::offset(asked.from)?) {
            Ok(pages) => pages,
            Err(unread) => futures::stream::iter([Err(unread)]).boxed(),
        };
        // An open stream must not keep a stopping server waiting.
        let stop = self.tasks.stop_token().clone().cancelled_owned();
        let replies = pages.map(|page| Ok(serve::fetch_reply(page))).take_until(stop);
        Ok(Response::new(Box::pin(replies)))
    }
}

/// Queues a peer's chunk, if its publisher can have the ring that the peer names. The vault refuses rings of other projects, but a node
/// that was taken over must not choose among the project's rings either.
async fn check_and_queue(
    handle: &PartitionHandle,
    room: &FairRoom,
    catalog: &Catalog,
    chunk: peer::AppendChunk,
) -> Result<oneshot::Receiver<Outcome>, AppendError> {
    match check_ring(catalog, handle.project(), &chunk.ring).await {
        Ok(()) => queue(handle, room, chunk).await,
        Err(refusal) => {
            let (reply, outcome) = oneshot::channel();
            // Both ends are here.
            let _ = reply.send(Err(refusal));
            Ok(outcome)
        }
    }
}

/// Whether an API key of the project has this ring of its own; none is named for those that have none.
async fn check_ring(catalog: &Catalog, project: ProjectId, ring: &Bytes) -> Result<(), AppendError> {
    // What is no id is refused with the chunk.
    let Ok(ring) = RingId::try_from(&ring[..]) else { return Ok(()) };
    if catalog.view().has_api_key_ring(project, ring) {
        return Ok(());
    }
    // Perhaps the API key was made a moment ago.
    match timeout(LEARN, catalog.refresh()).await {
        Ok(Ok(())) if catalog.view().has_api_key_ring(project, ring) => Ok(()),
        Ok(Ok(())) => {
            warn!(%project, %ring, "a peer sent events for a key ring that no API key of their project has");
            let detail = format!("no API key of the project has key ring {ring}");
            Err(AppendError::KeyUnusable { detail })
        }
        Ok(Err(error)) => Err(AppendError::Busy { detail: error.to_string() }),
        Err(_) => Err(AppendError::Busy { detail: "the catalog's leader does not answer".to_owned() }),
    }
}

/// Queues a peer's chunk. Its event bytes are copied out of the message that they came in, which is freed sooner for it.
pub(super) async fn queue(
    handle: &PartitionHandle,
    room: &FairRoom,
    chunk: peer::AppendChunk,
) -> Result<oneshot::Receiver<Outcome>, AppendError> {
    let chunk = Chunk::try_from(chunk).map_err(|error| AppendError::Busy { detail: error.to_string() })?;
    // First its own partition's share, so that one that is stuck takes none of what all of them have.
    let slot = handle.batcher().reserve(chunk.size()).await?;
    let share = room.acquire(handle.project(), chunk.size().0).await;
    Ok(slot.with_share(share).send(chunk))
}
