//! openraft's side of a call: requests of one group to one peer.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{GroupId, NodeId};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, FuturesOrdered, Stream};
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption, RPCTypes,
    RaftNetworkFactory,
};
use openraft::raft::{
    SnapshotResponse, StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::codec;
use crate::env::Lane;
use crate::metrics;
use crate::net::conn::{Broken, Conn, Peers, Urgency};
use crate::net::message::{Answer, Refusal, Request, SnapshotPart};
use crate::replica::Replica;
use crate::types::{AppendRequest, Snapshot, Types, Vote};

/// How long a follower may take to make appended entries durable before the stream is given up.
const APPEND_DEADLINE: Duration = Duration::from_secs(15);
const SNAPSHOT_PART: usize = 1 << 20;
const SNAPSHOT_PART_DEADLINE: Duration = Duration::from_secs(10);
const SNAPSHOT_INSTALL_DEADLINE: Duration = Duration::from_mins(1);
/// Requests of one stream that may be unanswered.
const STREAM_DEPTH: usize = 64;
/// A stream's share of a peer's unanswered bytes: one group whose follower is stuck must not stop the others.
const STREAM_SHARE: u64 = 4;
/// Between two calls for a vote to a peer that does not know the group yet.
const UNKNOWN_GROUP_PAUSE: Duration = Duration::from_millis(20);

/// Makes the clients of one group.
pub(crate) struct Factory {
    peers: Arc<Peers>,
    replica: Arc<Replica>,
}

impl Factory {
    pub(crate) fn new(peers: Arc<Peers>, replica: Arc<Replica>) -> Self {
        Self { peers, replica }
    }

    fn client(&self, target: u64, lane: Lane) -> Client {
        Client {
            peers: Arc::clone(&self.peers),
            group: self.replica.id,
            replica: Arc::clone(&self.replica),
            target: NodeId(target),
            append_lane: lane,
        }
    }
}

impl RaftNetworkFactory<Types> for Factory {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _node: &()) -> Client {
        self.client(target, Lane::Bulk)
    }

    async fn new_heartbeat_client(&mut self, target: u64, _node: &()) -> Client {
        self.client(target, Lane::Control)
    }
}

/// One group's calls to one peer.
pub(crate) struct Client {
    peers: Arc<Peers>,
    group: GroupId,
    replica: Arc<Replica>,
    target: NodeId,
    append_lane: Lane,
}

fn unreachable(cause: impl ToString) -> RPCError<Types> {
    RPCError::Unreachable(Unreachable::from_string(cause))
}

fn refused(refusal: Refusal) -> RPCError<Types> {
    match refusal {
        Refusal::UnknownGroup => unreachable("the peer does not know the group"),
        Refusal::Stopped => unreachable("the peer's replica is down"),
        Refusal::Busy => unreachable("the peer is busy"),
        Refusal::UnknownKind => unreachable("the peer is older and does not know the request"),
        Refusal::StreamClosed => RPCError::Network(NetworkError::from_string("the stream was closed")),
    }
}

fn unexpected() -> RPCError<Types> {
    unreachable("the peer answered something else")
}

impl Client {
    fn timed_out(&self, action: RPCTypes, after: Duration) -> RPCError<Types> {
        let (id, target) = (self.peers.config.node.0, self.target.0);
        RPCError::Timeout(Timeout { action, id, target, timeout: after })
    }

    async fn control(&self) -> Result<Arc<Conn>, RPCError<Types>> {
        let link = self.peers.link(self.target, Lane::Control);
        self.peers.conn(&link).await.map_err(unreachable)
    }

    async fn ask(&self, request: Request) -> Result<Answer, RPCError<Types>> {
        let conn = self.control().await?;
        conn.call(self.group, request).await.map_err(unreachable)?.await.map_err(unreachable)
    }

    /// Asks for a vote until the deadline, since a group that was created just now may start on this peer any moment.
    async fn ask_for_vote(
        &self,
        request: impl Fn() -> Request,
        option: &RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let ttl = option.hard_ttl();
        let deadline = Instant::now() + ttl;
        loop {
            match timeout_at(deadline, self.ask(request())).await {
                Err(_elapsed) => return Err(self.timed_out(RPCTypes::Vote, ttl)),
                Ok(Ok(Answer::Vote(response))) => return Ok(response),
                Ok(Ok(Answer::Refused(Refusal::UnknownGroup))) if Instant::now() + UNKNOWN_GROUP_PAUSE < deadline => {
                    sleep(UNKNOWN_GROUP_PAUSE).await;
                }
                Ok(Ok(Answer::Refused(refusal))) => return Err(refused(refusal)),
                Ok(Ok(_)) => return Err(unexpected()),
                Ok(Err(error)) => return Err(error),
            }
        }
    }

    async fn send_snapshot(
        &self,
        vote: Vote,
        snapshot: Snapshot,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let (meta, data) = (snapshot.meta, snapshot.snapshot);
        let limit = self.peers.config.limits.snapshot.0;
        if data.len() as u64 > limit {
            let cause = format!("a snapshot of {} bytes is above the limit of {limit}", data.len());
            return Err(Unreachable::from_string(cause).into());
        }
        let conn = self.control().await?;
        let transfer = conn.fresh();
        let mut offset = 0;
        loop {
            let end = (offset + SNAPSHOT_PART).min(data.len());
            let last = end == data.len();
            let part = SnapshotPart {
                transfer,
                vote,
                meta: meta.clone(),
                total: data.len() as u64,
                offset: offset as u64,
                data: data.slice(offset..end),
            };
            if self.replica.is_learner(self.target) {
                self.peers.throttle.take(part.data.len() as u64).await;
                metrics::copied(part.data.len() as u64);
            }
            let patience = if last { SNAPSHOT_INSTALL_DEADLINE } else { SNAPSHOT_PART_DEADLINE };
            let call = conn.call(self.group, Request::Snapshot(part)).await.map_err(unreachable)?;
            match timeout(patience, call).await {
                Err(_elapsed) => return Err(self.timed_out(RPCTypes::InstallSnapshot, patience).into()),
                Ok(Ok(Answer::SnapshotContinue)) if !last => offset = end,
                Ok(Ok(Answer::SnapshotDone(vote))) => return Ok(SnapshotResponse::new(vote)),
                Ok(Ok(Answer::Refused(refusal))) => return Err(refused(refusal).into()),
                Ok(Ok(_)) => return Err(unexpected().into()),
                Ok(Err(broken)) => return Err(unreachable(broken).into()),
            }
        }
    }
}

impl NetBackoff<Types> for Client {
    fn backoff(&self) -> Option<Backoff> {
        // The sweeper ends the pause as soon as the peer is back.
        let pauses = [20, 40, 80, 160].into_iter().chain([250; 8]).chain(std::iter::repeat(2000));
        Some(Backoff::new(pauses.map(Duration::from_millis)))
    }
}

impl NetVote<Types> for Client {
    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask_for_vote(|| Request::Vote(rpc.clone()), &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        self.ask_for_vote(|| Request::PreVote(rpc.clone()), &option).await
    }
}

impl NetTransferLeader<Types> for Client {
    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let ttl = option.hard_ttl();
        match timeout(ttl, self.ask(Request::Transfer(req))).await {
            Err(_elapsed) => Err(self.timed_out(RPCTypes::TransferLeader, ttl)),
            Ok(Ok(Answer::Transfer(response))) => Ok(response),
            Ok(Ok(Answer::Refused(refusal))) => Err(refused(refusal)),
            Ok(Ok(_)) => Err(unexpected()),
            Ok(Err(error)) => Err(error),
        }
    }
}

impl NetSnapshot<Types> for Client {
    type SnapshotData = Bytes;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(vote, snapshot) => sent,
        }
    }
}

impl NetStreamAppend<Types> for Client {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>>
    where
        S: Stream<Item = AppendRequest> + OptionalSend + Unpin + 'static,
    {
        // The first request comes before the pipe: openraft's pause after a failure is in its stream of requests, so a
        // client that failed without asking for one would be called again at once, for ever.
        let answers = stream::once(self.open(input, option)).flat_map(|opened| match opened {
            Ok(appends) => stream::unfold(Some(appends), Appends::step).boxed(),
            Err(error) => stream::once(async move { Err(error) }).boxed(),
        });
        let answers: BoxStream<'s, _> = Box::pin(answers);
        Box::pin(async move { Ok(answers) })
    }
}

impl Client {
    /// Waits for the first request, then for the pipe.
    async fn open<S>(&self, mut input: S, option: RPCOption) -> Result<Appends<S>, RPCError<Types>>
    where
        S: Stream<Item = AppendRequest> + Unpin,
    {
        let first = input.next().await;
        let link = self.peers.link(self.target, self.append_lane);
        let ttl = option.hard_ttl().max(self.peers.config.timing.heartbeat);
        let conn = match timeout(ttl, self.peers.conn(&link)).await {
            Err(_elapsed) => return Err(self.timed_out(RPCTypes::AppendEntries, ttl)),
            Ok(conn) => conn.map_err(unreachable)?,
        };
        // A heartbeat is a request on its own; it must not wait behind what is in flight.
        let (stream, deadline) = match self.append_lane {
            Lane::Control => (0, ttl),
            Lane::Bulk => (conn.fresh(), APPEND_DEADLINE),
        };
        let share = self.peers.config.limits.in_flight.0 / STREAM_SHARE;
        Ok(Appends {
            input: first.is_some().then_some(input),
            next: first.map(|request| {
                let cost = cost(&request, share);
                (request, cost)
            }),
            answers: FuturesOrdered::new(),
            unanswered: 0,
            share,
            in_flight: Arc::clone(&link.in_flight),
            pace: (self.append_lane == Lane::Bulk).then(|| Pace {
                peers: Arc::clone(&self.peers),
                replica: Arc::clone(&self.replica),
                target: self.target,
            }),
            paced: false,
            deadline,
            channel: Channel { conn, group: self.group, stream },
            urgency: match self.append_lane {
                Lane::Control if !self.replica.nap.is_hurried() => Urgency::Lingers,
                _ => Urgency::Prompt,
            },
        })
    }
}

/// A stream's name on its pipe; tells the peer when it ends.
struct Channel {
    conn: Arc<Conn>,
    group: GroupId,
    stream: u64,
}

impl Drop for Channel {
    fn drop(&mut self) {
        if self.stream != 0 {
            self.conn.tell(self.group, Request::Close { stream: self.stream });
        }
    }
}

/// An answer and the room that its request took.
type Answered = (u64, Result<Result<Answer, Broken>, tokio::time::error::Elapsed>);

/// One stream of appends: requests go out as they come, answers come back in their order.
struct Appends<S> {
    input: Option<S>,
    next: Option<(AppendRequest, u64)>,
    answers: FuturesOrdered<BoxFuture<'static, Answered>>,
    unanswered: u64,
    share: u64,
    in_flight: Arc<Semaphore>,
    /// Absent for heartbeats.
    pace: Option<Pace>,
    /// The next request has waited for its pace.
    paced: bool,
    deadline: Duration,
    channel: Channel,
    urgency: Urgency,
}

/// Slows down what goes to a learner.
struct Pace {
    peers: Arc<Peers>,
    replica: Arc<Replica>,
    target: NodeId,
}

impl Pace {
    /// Waits until `bytes` more may go to the target. A learner that gets its vote meanwhile waits for no more after this.
    async fn admit(&self, bytes: u64) {
        if bytes > 0 && self.replica.is_learner(self.target) {
            self.peers.throttle.take(bytes).await;
            metrics::copied(bytes);
        }
    }
}

/// What a request takes of the room in flight. Never more than there is, so that the largest can still go.
fn cost(request: &AppendRequest, limit: u64) -> u64 {
    let payloads = request.entries.iter().map(|entry| codec::stored(&entry.payload).len() as u64);
    payloads.sum::<u64>().min(limit)
}

impl<S: Stream<Item = AppendRequest> + Unpin> Appends<S> {
    async fn step(state: Option<Self>) -> Option<(Result<StreamAppendResult<Types>, RPCError<Types>>, Option<Self>)> {
        let mut this = state?;
        loop {
            let depth = this.answers.len() < STREAM_DEPTH;
            let fits = this
                .next
                .as_ref()
                .is_some_and(|(_, cost)| this.unanswered == 0 || this.unanswered + cost <= this.share);
            let room = this.next.as_ref().map_or(0, |(_, cost)| *cost) as u32;
            tokio::select! {
                biased;
                Some((cost, answer)) = this.answers.next(), if !this.answers.is_empty() => {
                    this.unanswered -= cost;
                    return Some(this.yielded(answer));
                }
                permit = admitted(this.pace.as_ref(), &mut this.paced, &this.in_flight, room), if fits => {
                    let Ok(permit) = permit else { return None };
                    if let Err(broken) = this.send(permit).await {
                        return Some((Err(unreachable(broken)), None));
                    }
                }
                request = next(&mut this.input), if this.next.is_none() && this.input.is_some() && depth => {
                    match request {
                        Some(request) => {
                            let cost = cost(&request, this.share);
                            this.next = Some((request, cost));
                        }
                        None => this.input = None,
                    }
                }
                else => return None,
            }
        }
    }

    async fn send(&mut self, permit: OwnedSemaphorePermit) -> Result<(), Broken> {
        let Some((request, cost)) = self.next.take() else { return Ok(()) };
        self.paced = false;
        let stream = self.channel.stream;
        let append = Request::Append { stream, request };
        let call = self.channel.conn.call_at(self.urgency, self.channel.group, append).await?;
        let answer = timeout(self.deadline, call);
        self.unanswered += cost;
        self.answers.push_back(Box::pin(async move {
            let answer = answer.await;
            drop(permit);
            (cost, answer)
        }));
        Ok(())
    }

    /// What openraft hears, and whether the stream goes on: it ends at the first answer that is not a success.
    fn yielded(
        self,
        answer: Result<Result<Answer, Broken>, tokio::time::error::Elapsed>,
    ) -> (Result<StreamAppendResult<Types>, RPCError<Types>>, Option<Self>) {
        match answer {
            Ok(Ok(Answer::Append(Ok(matched)))) => (Ok(Ok(matched)), Some(self)),
            Ok(Ok(Answer::Append(Err(error)))) => (Ok(Err(error)), None),
            Ok(Ok(Answer::Refused(refusal))) => (Err(refused(refusal)), None),
            Ok(Ok(_)) => (Err(unexpected()), None),
            Ok(Err(broken)) => (Err(unreachable(broken)), None),
            Err(_elapsed) => (Err(unreachable("no answer in time")), None),
        }
    }
}

/// Room in flight, after the pace of a learner: what waits for its pace takes no room from others.
async fn admitted(
    pace: Option<&Pace>,
    paced: &mut bool,
    in_flight: &Arc<Semaphore>,
    room: u32,
) -> Result<OwnedSemaphorePermit, tokio::sync::AcquireError> {
    if let Some(pace) = pace.filter(|_| !*paced) {
        pace.admit(room.into()).await;
        *paced = true;
    }
    Arc::clone(in_flight).acquire_many_owned(room).await
}

async fn next<S: Stream + Unpin>(input: &mut Option<S>) -> Option<S::Item> {
    match input {
        Some(input) => input.next().await,
        None => None,
    }
}
