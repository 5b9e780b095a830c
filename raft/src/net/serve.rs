//! The other end of a call: takes a peer's requests to their groups.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use ensign_proto::{ByteCount, GroupId, NodeId};
use ensign_storage::Door;
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, unfold};
use openraft::raft::StreamAppendResult;
use tokio::sync::{Notify, mpsc};
use tracing::{debug, warn};

use crate::codec;
use crate::config::Limits;
use crate::env::{Lane, Pipe, Tasks};
use crate::liveness::Liveness;
use crate::metrics;
use crate::nap::PreVote;
use crate::net::conn::{self, Peers};
use crate::net::message::{Answer, Body, Message, NO_CALL, PART_MAX, Refusal, Request, SnapshotPart};
use crate::net::sleeper::{Sleeper, Verdict};
use crate::replica::Replica;
use crate::runtime::Registry;
use crate::types::{AppendRequest, Raft, Snapshot, Types, Vote};

/// Answers that wait for the pipe; more wait in their requests.
const ANSWERS: usize = 1024;
/// Requests under way at once, and streams open at once, on one pipe; beyond it a peer is told to come back later.
const WORK_MAX: usize = 8192;
/// Snapshots being put together at once, on one pipe.
const SNAPSHOTS_MAX: usize = 4;

/// What a pipe's requests are about: this node.
pub(crate) struct Local {
    pub(crate) registry: Registry,
    pub(crate) liveness: Liveness,
    pub(crate) limits: Limits,
    pub(crate) tasks: Tasks,
    /// Peers that are watched whether or not they share a group with this node.
    pub(crate) named: Mutex<BTreeSet<NodeId>>,
    /// A group has started.
    pub(crate) newcomers: Notify,
}

impl Local {
    pub(crate) fn new(limits: Limits, liveness: Liveness, tasks: Tasks) -> Self {
        let (registry, named, newcomers) = (Registry::default(), Mutex::default(), Notify::new());
        Self { registry, liveness, limits, tasks, named, newcomers }
    }

    /// Watches everyone that this node has to do with, and nobody else.
    pub(crate) fn rewatch(&self, peers: &Arc<Peers>) {
        let mut watched = self.named.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for replica in self.registry.all() {
            watched.extend(replica.members());
        }
        self.liveness.watch_only(peers, &watched);
    }
}

/// Serves one pipe until it ends or its peer breaks the protocol.
pub(crate) async fn serve(local: &Local, peer: NodeId, lane: Lane, pipe: Pipe) {
    let (answers, queued) = mpsc::channel(ANSWERS);
    let (outgoing, mut incoming) = (pipe.outgoing, pipe.incoming);
    local.tasks.for_lane(lane).spawn("raft-pipe-answer", move |stop| async move {
        stop.run_until_cancelled(conn::send(queued, None, outgoing)).await;
    });
    let mut server = Server {
        local,
        peer,
        answers,
        held: Arc::default(),
        streams: BTreeMap::new(),
        snapshots: BTreeMap::new(),
        work: FuturesUnordered::new(),
        puzzled: false,
    };
    loop {
        tokio::select! {
            frame = incoming.recv() => {
                let Some(frame) = frame else { break };
                let taken = match conn::receive(frame, &mut incoming).await {
                    Ok(messages) => messages.into_iter().try_for_each(|message| server.take(message)),
                    Err(error) => Err(error),
                };
                if let Err(error) = taken {
                    warn!(%peer, ?lane, error, "a peer broke the protocol; closing the pipe");
                    break;
                }
            }
            Some(ended) = server.work.next(), if !server.work.is_empty() => {
                if let Some(stream) = ended {
                    server.ended(stream);
                }
            }
        }
    }
    metrics::pipe_broken();
    debug!(%peer, ?lane, "a peer's pipe ended");
}

type StreamKey = (GroupId, u64);

struct Server<'a> {
    local: &'a Local,
    peer: NodeId,
    answers: mpsc::Sender<Message>,
    /// Bytes of appends that are not answered yet.
    held: Arc<AtomicU64>,
    /// Open streams; `None` is one that has ended here and waits for its sender to notice.
    streams: BTreeMap<StreamKey, Option<mpsc::UnboundedSender<Append>>>,
    snapshots: BTreeMap<GroupId, Assembly>,
    /// A stream that ended yields its key.
    work: FuturesUnordered<BoxFuture<'static, Option<StreamKey>>>,
    /// The peer has sent something that this node does not understand, and this was said.
    puzzled: bool,
}

struct Append {
    call: u64,
    held: Held,
    request: AppendRequest,
}

/// Bytes of an append that is not answered yet; gone with it, whatever becomes of it.
struct Held {
    total: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.total.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A snapshot that has not arrived whole.
struct Assembly {
    transfer: u64,
    data: BytesMut,
}

impl Server<'_> {
    /// Starts the work that a message asks for.
    ///
    /// # Errors
    /// What no honest peer would send.
    fn take(&mut self, message: Message) -> Result<(), String> {
        let Message { group, call, body } = message;
        let Body::Request(request) = body else { return Err("an answer on a pipe that it opened".to_owned()) };
        match request {
            // Whoever asks must not rely on a node that does nothing else any more.
            Request::Ping | Request::Alive { .. } | Request::Sleep(_) | Request::Check(_)
                if self.local.liveness.is_stuck() => {}
            Request::Ping => self.answer(group, call, Answer::Pong),
            Request::Alive { incarnation } => {
                self.local.liveness.pinged(self.peer, incarnation);
                self.answer(group, call, Answer::Alive { incarnation: self.local.liveness.incarnation() });
            }
            Request::Sleep(asked) => {
                let agrees = |asked: &Sleeper| {
                    let replica = self.local.registry.get(asked.group);
                    replica.is_some_and(|replica| replica.agree(self.peer, asked, &self.local.liveness))
                };
                let asleep = asked.iter().filter(|asked| agrees(asked)).map(|asked| asked.group).collect();
                self.answer(group, call, Answer::Asleep(asleep));
            }
            Request::Check(asked) => {
                let verdict = |asked: Sleeper| {
                    let replica = self.local.registry.get(asked.group);
                    let verdict = replica.map_or(Verdict::NotLeader, |replica| replica.confirm(self.peer, &asked));
                    (asked.group, verdict)
                };
                self.answer(group, call, Answer::Checked(asked.into_iter().map(verdict).collect()));
            }
            Request::Unknown { kind } => {
                if !std::mem::replace(&mut self.puzzled, true) {
                    warn!(peer = %self.peer, kind, "a peer is newer and sends what this node does not know; it is refused");
                }
                if call != NO_CALL {
                    self.answer(group, call, Answer::Refused(Refusal::UnknownKind));
                }
            }
            Request::Close { stream } => {
                self.streams.remove(&(group, stream));
            }
            Request::Append { stream, request } => {
                self.is_own(&request.vote)?;
                return self.append(group, call, stream, request);
            }
            Request::Vote(request) => {
                self.is_own(&request.vote)?;
                let replica = self.local.registry.get(group);
                if let Some(response) = replica.and_then(|replica| replica.remembers_more(&request)) {
                    self.answer(group, call, Answer::Vote(response));
                    return Ok(());
                }
                self.with_core(group, call, move |raft| async move {
                    Ok(Answer::Vote(raft.vote(request).await.map_err(|_| Refusal::Stopped)?))
                });
            }
            Request::PreVote(request) => {
                self.is_own(&request.vote)?;
                let replica = self.local.registry.get(group);
                if let Some(response) = replica.as_ref().and_then(|replica| replica.remembers_more(&request)) {
                    self.answer(group, call, Answer::Vote(response));
                    return Ok(());
                }
                let holds = request.last_log_id.as_ref();
                let met = replica.map(|replica| replica.pre_vote(self.peer, holds, &self.local.liveness));
                if let Some(PreVote::Refuse(response)) = met {
                    self.answer(group, call, Answer::Vote(response));
                    return Ok(());
                }
                self.with_core(group, call, move |raft| async move {
                    Ok(Answer::Vote(raft.pre_vote(request).await.map_err(|_| Refusal::Stopped)?))
                });
            }
            Request::Transfer(request) => {
                self.is_own(request.from_leader())?;
                self.with_core(group, call, move |raft| async move {
                    Ok(Answer::Transfer(raft.handle_transfer_leader(request).await.map_err(|_| Refusal::Stopped)?))
                });
            }
            Request::Snapshot(part) => {
                self.is_own(&part.vote)?;
                return self.snapshot(group, call, part);
            }
        }
        Ok(())
    }

    /// A stream's work is done. Its sender learns of it with its next append, unless it has closed the stream already.
    fn ended(&mut self, stream: StreamKey) {
        if let Some(open) = self.streams.get_mut(&stream) {
            *open = None;
        }
    }

    /// A peer speaks for itself alone.
    fn is_own(&self, vote: &Vote) -> Result<(), String> {
        let named = vote.leader_id.voted_for;
        (named == self.peer.0).then_some(()).ok_or_else(|| format!("node {} speaks for node {named}", self.peer))
    }

    fn core(&self, group: GroupId) -> Result<Raft, Refusal> {
        let replica = self.local.registry.get(group).ok_or(Refusal::UnknownGroup)?;
        let raft = self.core_of(&replica)?;
        replica.stir();
        Ok(raft)
    }

    fn core_of(&self, replica: &Replica) -> Result<Raft, Refusal> {
        // The core of a replica whose disk is full waits for room; what is sent to it would only pile up.
        if self.work.len() >= WORK_MAX || replica.is_full() {
            return Err(Refusal::Busy);
        }
        replica.raft().ok_or(Refusal::Stopped)
    }

    /// The same for `bytes` of entries. Turned away here, they leave the core free to answer its leader and to vote.
    fn core_with_room(&self, group: GroupId, bytes: u64) -> Result<Raft, Refusal> {
        let replica = self.local.registry.get(group).ok_or(Refusal::UnknownGroup)?;
        if bytes > 0 && !replica.log.has_room(ByteCount(bytes), Door::Replication) {
            return Err(Refusal::Busy);
        }
        let raft = self.core_of(&replica)?;
        replica.heard(self.peer);
        replica.stir();
        Ok(raft)
    }

    fn answer(&self, group: GroupId, call: u64, answer: Answer) {
        let (answers, message) = (self.answers.clone(), Message { group, call, body: Body::Answer(answer) });
        if let Err(mpsc::error::TrySendError::Full(message)) = answers.try_send(message) {
            self.work.push(Box::pin(async move {
                let _ = answers.send(message).await;
                None
            }));
        }
    }

    fn with_core<F>(&self, group: GroupId, call: u64, work: impl FnOnce(Raft) -> F)
    where
        F: Future<Output = Result<Answer, Refusal>> + Send + 'static,
    {
        self.run(group, call, self.core(group), work);
    }

    fn run<F>(&self, group: GroupId, call: u64, core: Result<Raft, Refusal>, work: impl FnOnce(Raft) -> F)
    where
        F: Future<Output = Result<Answer, Refusal>> + Send + 'static,
    {
        match core {
            Err(refusal) => self.answer(group, call, Answer::Refused(refusal)),
            Ok(raft) => {
                let (answers, work) = (self.answers.clone(), work(raft));
                self.work.push(Box::pin(async move {
                    let answer = work.await.unwrap_or_else(Answer::Refused);
                    let _ = answers.send(Message { group, call, body: Body::Answer(answer) }).await;
                    None
                }));
            }
        }
    }

    fn append(&mut self, group: GroupId, call: u64, stream: u64, request: AppendRequest) -> Result<(), String> {
        let bytes = request.entries.iter().map(|entry| codec::stored(&entry.payload).len() as u64).sum();
        if stream == 0 {
            let raft = self.core_with_room(group, bytes);
            self.run(group, call, raft, move |raft| async move {
                let response = raft.append_entries(request.clone()).await.map_err(|_| Refusal::Stopped)?;
                let last = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
                Ok(Answer::Append(response.into_stream_result(request.prev_log_id, last)))
            });
            return Ok(());
        }
        let key = (group, stream);
        let total = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let held = Held { total: Arc::clone(&self.held), bytes };
        // The sender keeps to `in_flight`, one message aside; twice that leaves room for another setting over there.
        if total > 2 * self.local.limits.in_flight.0 + PART_MAX as u64 {
            return Err(format!("{total} bytes of appends at once"));
        }
        let raft = match self.core_with_room(group, bytes) {
            Ok(raft) => raft,
            Err(refusal) => {
                self.answer(group, call, Answer::Refused(refusal));
                return Ok(());
            }
        };
        let (answers, work) = (&self.answers, &self.work);
        let open = self.streams.entry(key).or_insert_with(|| {
            let (sender, receiver) = mpsc::unbounded_channel();
            let answers = answers.clone();
            work.push(Box::pin(async move {
                run_stream(group, raft, receiver, answers).await;
                Some(key)
            }));
            Some(sender)
        });
        let taken = open.as_ref().is_some_and(|sender| sender.send(Append { call, held, request }).is_ok());
        if !taken {
            self.answer(group, call, Answer::Refused(Refusal::StreamClosed));
        }
        Ok(())
    }

    fn snapshot(&mut self, group: GroupId, call: u64, part: SnapshotPart) -> Result<(), String> {
        let length = part.data.len() as u64;
        if part.total > self.local.limits.snapshot.0
            || part.offset.checked_add(length).is_none_or(|end| end > part.total)
        {
            return Err(format!("a snapshot part of {length} bytes at {} of {}", part.offset, part.total));
        }
        let data = if part.offset == 0 && length == part.total {
            self.snapshots.remove(&group);
            part.data
        } else {
            if part.offset == 0 {
                self.snapshots.remove(&group);
                if self.snapshots.len() >= SNAPSHOTS_MAX {
                    self.answer(group, call, Answer::Refused(Refusal::Busy));
                    return Ok(());
                }
                self.snapshots.insert(group, Assembly { transfer: part.transfer, data: BytesMut::new() });
            }
            let assembly = self.snapshots.get_mut(&group);
            let Some(assembly) =
                assembly.filter(|known| known.transfer == part.transfer && known.data.len() as u64 == part.offset)
            else {
                self.answer(group, call, Answer::Refused(Refusal::StreamClosed));
                return Ok(());
            };
            assembly.data.extend_from_slice(&part.data);
            if (assembly.data.len() as u64) < part.total {
                self.answer(group, call, Answer::SnapshotContinue);
                return Ok(());
            }
            self.snapshots.remove(&group).map_or_else(Bytes::new, |whole| whole.data.freeze())
        };
        let (vote, snapshot) = (part.vote, Snapshot { meta: part.meta, snapshot: data });
        self.with_core(group, call, move |raft| async move {
            let response = raft.install_full_snapshot(vote, snapshot).await.map_err(|_| Refusal::Stopped)?;
            Ok(Answer::SnapshotDone(response.vote))
        });
        Ok(())
    }
}

/// Feeds one stream of appends to its group and answers in order, until the first refusal.
async fn run_stream(
    group: GroupId,
    raft: Raft,
    receiver: mpsc::UnboundedReceiver<Append>,
    answers: mpsc::Sender<Message>,
) {
    // openraft takes the requests in a task of its own; what it took is remembered here until it is answered.
    let taken: Arc<Mutex<VecDeque<(u64, Held)>>> = Arc::default();
    let input = unfold((receiver, Arc::clone(&taken)), |(mut receiver, taken)| async move {
        let append: Append = receiver.recv().await?;
        taken.lock().unwrap_or_else(PoisonError::into_inner).push_back((append.call, append.held));
        Some((append.request, (receiver, taken)))
    });
    let mut results = std::pin::pin!(raft.stream_append(input));
    let pop = || taken.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    while let Some(result) = results.next().await {
        let Some((call, _held)) = pop() else { break };
        let result: Result<StreamAppendResult<Types>, _> = result;
        let (answer, goes_on) = match result {
            Ok(result) => {
                let goes_on = result.is_ok();
                (Answer::Append(result), goes_on)
            }
            Err(_fatal) => (Answer::Refused(Refusal::Stopped), false),
        };
        if answers.send(Message { group, call, body: Body::Answer(answer) }).await.is_err() || !goes_on {
            break;
        }
    }
    while let Some((call, _held)) = pop() {
        let answer = Body::Answer(Answer::Refused(Refusal::StreamClosed));
        if answers.send(Message { group, call, body: answer }).await.is_err() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Timing;

    #[test]
    fn a_stream_that_its_sender_closes_leaves_nothing_behind() {
        let tasks = Tasks::new();
        let liveness = Liveness::new(NodeId(1), 1, Timing::LAN, tasks.clone());
        let local = Local::new(Limits::default(), liveness, tasks);
        let mut server = Server {
            local: &local,
            peer: NodeId(2),
            answers: mpsc::channel(1).0,
            held: Arc::default(),
            streams: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            work: FuturesUnordered::new(),
            puzzled: false,
        };
        let group = GroupId(16);
        let close = |stream| Message { group, call: 0, body: Body::Request(Request::Close { stream }) };
        for stream in [1, 2] {
            server.streams.insert((group, stream), Some(mpsc::unbounded_channel().0));
        }
        // As a rule the work ends because the sender closes the stream; but a refusal ends it first.
        server.take(close(1)).unwrap();
        server.ended((group, 1));
        assert_eq!(server.streams.keys().collect::<Vec<_>>(), [&(group, 2)]);
        server.ended((group, 2));
        assert!(server.streams[&(group, 2)].is_none(), "its sender is told once more");
        server.take(close(2)).unwrap();
        assert!(server.streams.is_empty());
    }
}
