//! Pipes that this node opened: one per peer and lane, opened when first needed and again after they break.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ClusterVersion, GroupId, NodeId};
use thiserror::Error;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::{RuntimeConfig, Timing};
use crate::env::{Lane, Pipe, Rng, Tasks, Transport};
use crate::metrics;
use crate::net::message::{self, Answer, Body, Frame, Message, NO_CALL, PART_MAX, Request};
use crate::throttle::Throttle;

/// Messages that wait for the pipe; more wait in their senders.
const QUEUE: usize = 1024;
/// Messages that are taken from the queue at once.
const BATCH: usize = 64;
/// Heartbeats that go out together.
const LINGERERS_MAX: usize = 1024;
/// The part of a heartbeat's interval for which one may wait for others, and the longest wait.
const LINGER_SHARE: u32 = 40;
const LINGER_MAX: Duration = Duration::from_millis(10);
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// Failures in a row after which a peer counts as lost: a restart of a cluster takes a few.
const LOST: u32 = 6;

/// Why a call has no answer. The call may have reached the peer.
#[derive(Debug, Clone, Error)]
pub(crate) enum Broken {
    #[error("cannot connect: {0}")]
    Unreachable(String),
    #[error("the pipe broke")]
    Pipe,
    /// The peer would break the pipe over it, so it was not sent.
    #[error("the peer is older and does not know the request")]
    Older,
}

/// All pipes that this node opens.
pub(crate) struct Peers {
    pub(crate) config: RuntimeConfig,
    transport: Arc<dyn Transport>,
    rng: Arc<dyn Rng>,
    tasks: Tasks,
    links: Mutex<BTreeMap<(NodeId, Lane), Arc<Link>>>,
    /// What goes to learners, of all groups and to all peers.
    pub(crate) throttle: Throttle,
    /// What every node speaks.
    version: AtomicU32,
}

/// One peer's one lane.
pub(crate) struct Link {
    peer: NodeId,
    lane: Lane,
    slot: tokio::sync::Mutex<Slot>,
    /// Bytes of appends that may be unanswered.
    pub(crate) in_flight: Arc<Semaphore>,
}

#[derive(Default)]
struct Slot {
    conn: Option<Arc<Conn>>,
    failures: u32,
    retry_at: Option<Instant>,
}

impl Peers {
    pub(crate) fn new(config: RuntimeConfig, transport: Arc<dyn Transport>, rng: Arc<dyn Rng>, tasks: Tasks) -> Self {
        let throttle = Throttle::new(config.limits.learners);
        let version = AtomicU32::new(ClusterVersion::NEWEST.0);
        Self { config, transport, rng, tasks, links: Mutex::default(), throttle, version }
    }

    pub(crate) fn version(&self) -> ClusterVersion {
        ClusterVersion(self.version.load(Ordering::SeqCst))
    }

    pub(crate) fn set_version(&self, version: ClusterVersion) {
        self.version.store(version.0, Ordering::SeqCst);
    }

    pub(crate) fn link(&self, peer: NodeId, lane: Lane) -> Arc<Link> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(links.entry((peer, lane)).or_insert_with(|| {
            Arc::new(Link {
                peer,
                lane,
                slot: tokio::sync::Mutex::default(),
                in_flight: Arc::new(Semaphore::new(self.config.limits.in_flight.0 as usize)),
            })
        }))
    }

    /// The open pipe, or a new one; fails at once while a broken one is backing off.
    pub(crate) async fn conn(&self, link: &Link) -> Result<Arc<Conn>, Broken> {
        let mut slot = link.slot.lock().await;
        if let Some(conn) = slot.conn.as_ref().filter(|conn| !conn.dead.is_cancelled()) {
            return Ok(Arc::clone(conn));
        }
        slot.conn = None;
        if slot.retry_at.is_some_and(|at| Instant::now() < at) {
            return Err(Broken::Unreachable("backing off".to_owned()));
        }
        let opened = match timeout(CONNECT_DEADLINE, self.transport.connect(link.peer, link.lane)).await {
            Ok(opened) => opened.map_err(|error| error.to_string()),
            Err(_elapsed) => Err("no answer in time".to_owned()),
        };
        match opened {
            Ok(pipe) => {
                metrics::connected();
                if slot.failures >= LOST && link.lane == Lane::Control {
                    info!(peer = %link.peer, "a peer can be reached again");
                }
                *slot = Slot::default();
                let conn = Conn::open(pipe, self.config.timing, &self.tasks.for_lane(link.lane));
                slot.conn = Some(Arc::clone(&conn));
                Ok(conn)
            }
            Err(cause) => {
                debug!(peer = %link.peer, lane = ?link.lane, cause, "cannot connect");
                let pause = RETRY_MIN.saturating_mul(1 << slot.failures.min(8)).min(RETRY_MAX);
                slot.failures += 1;
                if slot.failures == LOST && link.lane == Lane::Control {
                    warn!(peer = %link.peer, cause, "a peer cannot be reached; trying until it can");
                }
                slot.retry_at = Some(Instant::now() + jittered(pause, &*self.rng));
                Err(Broken::Unreachable(cause))
            }
        }
    }
}

/// Between half of `pause` and all of it, so that nodes do not call in step.
fn jittered(pause: Duration, rng: &dyn Rng) -> Duration {
    let half = pause / 2;
    half + half.mul_f64((rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64)
}

/// How soon a request must go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    Prompt,
    /// It may wait a little for others, so that the heartbeats of many groups share a frame.
    Lingers,
}

/// An open pipe, and the calls that wait for an answer on it.
pub(crate) struct Conn {
    queue: mpsc::Sender<Message>,
    lingering: mpsc::Sender<Message>,
    waiting: Mutex<Waiting>,
    called: Notify,
    dead: CancellationToken,
    version: ClusterVersion,
}

#[derive(Default)]
struct Waiting {
    calls: BTreeMap<u64, oneshot::Sender<Answer>>,
    last: u64,
}

impl Conn {
    fn open(pipe: Pipe, timing: Timing, tasks: &Tasks) -> Arc<Self> {
        let (queue, queued) = mpsc::channel(QUEUE);
        let (lingering, lingerers) = mpsc::channel(QUEUE);
        let conn = Arc::new(Self {
            queue,
            lingering,
            waiting: Mutex::default(),
            called: Notify::new(),
            dead: CancellationToken::new(),
            version: pipe.version,
        });
        let linger = (timing.heartbeat / LINGER_SHARE).min(LINGER_MAX);
        let (dead, outgoing) = (conn.dead.clone(), pipe.outgoing);
        tasks.spawn("raft-pipe-send", move |stop| async move {
            let sending = dead.run_until_cancelled(send(queued, Some((lingerers, linger)), outgoing));
            stop.run_until_cancelled(sending).await;
            dead.cancel();
        });
        let (pumped, incoming) = (Arc::clone(&conn), pipe.incoming);
        tasks.spawn("raft-pipe-receive", move |stop| async move {
            let dead = pumped.dead.clone();
            let pumping = dead.run_until_cancelled(pumped.pump(incoming, timing));
            stop.run_until_cancelled(pumping).await;
            pumped.die();
        });
        conn
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn die(&self) {
        if !self.dead.is_cancelled() {
            metrics::pipe_broken();
        }
        self.dead.cancel();
        // Dropping the senders tells the callers.
        self.waiting().calls.clear();
    }

    /// A number that no other call or stream of this pipe has had.
    pub(crate) fn fresh(&self) -> u64 {
        let mut waiting = self.waiting();
        waiting.last += 1;
        waiting.last
    }

    /// Queues a request; the answer comes through the returned future.
    pub(crate) async fn call(self: &Arc<Self>, group: GroupId, request: Request) -> Result<Call, Broken> {
        self.call_at(Urgency::Prompt, group, request).await
    }

    pub(crate) async fn call_at(
        self: &Arc<Self>,
        urgency: Urgency,
        group: GroupId,
        request: Request,
    ) -> Result<Call, Broken> {
        if request.needs() > self.version {
            return Err(Broken::Older);
        }
        let id = self.fresh();
        let (sender, answer) = oneshot::channel();
        let first = {
            let mut waiting = self.waiting();
            waiting.calls.insert(id, sender);
            waiting.calls.len() == 1
        };
        let call = Call { conn: Arc::clone(self), id, answer };
        if first {
            self.called.notify_one();
        }
        let message = Message { group, call: id, body: Body::Request(request) };
        let queue = match urgency {
            Urgency::Prompt => &self.queue,
            Urgency::Lingers => &self.lingering,
        };
        match self.dead.run_until_cancelled(queue.send(message)).await {
            Some(Ok(())) => Ok(call),
            Some(Err(_)) | None => Err(Broken::Pipe),
        }
    }

    /// Sends what needs no answer, unless the queue is full.
    pub(crate) fn tell(&self, group: GroupId, request: Request) {
        let _ = self.queue.try_send(Message { group, call: NO_CALL, body: Body::Request(request) });
    }

    /// Hands answers to their calls until the pipe breaks, or stays silent for too long while calls wait.
    async fn pump(&self, mut incoming: mpsc::Receiver<Bytes>, timing: Timing) {
        let patience = timing.election_max.max(Duration::from_secs(1));
        let mut heard = Instant::now();
        loop {
            let waits = !self.waiting().calls.is_empty();
            let next = if waits {
                timeout(timing.heartbeat, incoming.recv()).await
            } else {
                tokio::select! {
                    next = incoming.recv() => Ok(next),
                    () = self.called.notified() => {
                        heard = Instant::now();
                        continue;
                    }
                }
            };
            match next {
                Err(_elapsed) if heard.elapsed() >= patience => {
                    debug!("a pipe is silent; giving it up");
                    return;
                }
                // The other end answers by itself, however slow its groups are.
                Err(_elapsed) => self.tell(GroupId(0), Request::Ping),
                Ok(None) => return,
                Ok(Some(frame)) => {
                    heard = Instant::now();
                    match receive(frame, &mut incoming).await {
                        Ok(messages) => messages.into_iter().for_each(|message| self.answered(message)),
                        Err(error) => {
                            warn!(error, "a peer broke the protocol; closing the pipe");
                            return;
                        }
                    }
                }
            }
        }
    }

    fn answered(&self, message: Message) {
        if let Body::Answer(answer) = message.body
            && let Some(call) = self.waiting().calls.remove(&message.call)
        {
            match answer {
                // To its caller an answer that nobody understands is none: the call breaks.
                Answer::Unknown { kind } => warn!(kind, "a peer is newer and answers what this node does not know"),
                answer => drop(call.send(answer)),
            }
        }
    }
}

/// The answer to a request, or news that the pipe broke. Dropping it forgets the call.
pub(crate) struct Call {
    conn: Arc<Conn>,
    id: u64,
    answer: oneshot::Receiver<Answer>,
}

impl Future for Call {
    type Output = Result<Answer, Broken>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.answer).poll(cx).map_err(|_dropped| Broken::Pipe)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.conn.waiting().calls.remove(&self.id);
    }
}

/// Packs what is queued into frames and sends them, until either end closes.
///
/// What may linger waits for its time, or goes with whatever goes first.
pub(crate) async fn send(
    mut queued: mpsc::Receiver<Message>,
    mut lingering: Option<(mpsc::Receiver<Message>, Duration)>,
    outgoing: mpsc::Sender<Bytes>,
) {
    let mut batch = Vec::with_capacity(BATCH);
    let mut frame = Frame::new();
    while gather(&mut batch, &mut queued, lingering.as_mut()).await {
        let mut messages = batch.drain(..).peekable();
        while let Some(message) = messages.next() {
            frame.push(&message);
            if frame.is_full() || messages.peek().is_none() {
                debug_assert!(!frame.is_empty());
                let (head, attachments) = frame.take();
                for part in std::iter::once(head).chain(attachments) {
                    metrics::sent(part.len());
                    if outgoing.send(part).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// Takes the messages of the next frames; `false` once there will be none.
async fn gather(
    batch: &mut Vec<Message>,
    queued: &mut mpsc::Receiver<Message>,
    lingering: Option<&mut (mpsc::Receiver<Message>, Duration)>,
) -> bool {
    let Some((lingerers, linger)) = lingering else { return queued.recv_many(batch, BATCH).await > 0 };
    let open = tokio::select! {
        biased;
        count = queued.recv_many(batch, BATCH) => count > 0,
        Some(first) = lingerers.recv() => {
            batch.push(first);
            let until = Instant::now() + *linger;
            loop {
                let mut prompt = Vec::new();
                tokio::select! {
                    biased;
                    count = queued.recv_many(&mut prompt, BATCH) => {
                        batch.append(&mut prompt);
                        break count > 0;
                    }
                    () = sleep_until(until) => break true,
                    Some(next) = lingerers.recv(), if batch.len() < LINGERERS_MAX => batch.push(next),
                }
            }
        }
    };
    while batch.len() < LINGERERS_MAX
        && let Ok(next) = lingerers.try_recv()
    {
        batch.push(next);
    }
    open || !batch.is_empty()
}

/// Completes a frame with its attachments and takes it apart.
pub(crate) async fn receive(frame: Bytes, incoming: &mut mpsc::Receiver<Bytes>) -> Result<Vec<Message>, String> {
    let count = message::attachments(&frame).map_err(|error| error.to_string())?;
    let mut attached = Vec::with_capacity(count);
    for _ in 0..count {
        let part = incoming.recv().await.ok_or("the pipe ended within a frame")?;
        if part.len() > PART_MAX {
            return Err(format!("an attachment of {} bytes", part.len()));
        }
        attached.push(part);
    }
    message::decode(frame, attached).map_err(|error| error.to_string())
}
