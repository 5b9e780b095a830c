//! The publisher's side of appending: one task per publish stream and topic, on the node that holds the client's connection.
//!
//! It numbers events for publishers that do not, sends chunks in order to whoever leads, and retries on the publisher's behalf
//! across leader changes, lost connections and unknown outcomes: the numbers keep a retry from appending twice. An answer means
//! what it says. If time runs out, the publisher is told that the outcome is unknown; it never gets a false ack or nack.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{NodeId, RingId, SessionId};
use ensign_raft::env::{Rng, Stop};
use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;
use tracing::debug;

use super::append::{AppendError, Appended, Chunk};
use super::batcher::Admission;
use super::block::BodyShape;
use super::elsewhere::Counting;
use super::freshness::Freshness;
use super::handle::PartitionHandle;
use super::producers::{Sequenced, made_at};
use super::reach::Reach;
use super::room::Share;
use super::route::{ForwardLink, Route};

/// How long an event may wait for its outcome, from its arrival.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a full disk is waited for before the event is refused.
const DISK_PATIENCE: Duration = Duration::from_secs(2);

/// How much longer events wait once the node is stopping.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Chunks sent and not answered.
const WINDOW: usize = 64;

/// Chunks taken from the stream and not answered.
const QUEUE: usize = 1024;

/// How long one attempt to learn who leads may take, and one to reach it.
const ATTEMPT: Duration = Duration::from_secs(2);

/// How long what was heard of a partition without a replica here is gone by.
const KNOWN_FOR: Duration = Duration::from_mins(1);

const BACK_OFF_MIN: Duration = Duration::from_millis(5);
const BACK_OFF_MAX: Duration = Duration::from_millis(250);

/// Who numbers the events, and from what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbering {
    /// We do.
    Ours,
    /// The publisher does.
    Theirs {
        /// Its session.
        session: SessionId,
        /// Which life of it.
        epoch: u32,
        /// The number of the first event; the others follow one by one.
        first: u64,
    },
}

/// Consecutive events of one stream for one topic.
#[derive(Debug)]
pub struct Submission {
    /// Who numbers them.
    pub numbering: Numbering,
    /// Who publishes: an encoded `Publisher`.
    pub publisher: Bytes,
    /// Kinds of event: encoded `EventKind`s.
    pub kinds: Vec<Bytes>,
    /// Per event, its length.
    pub shapes: Vec<BodyShape>,
    /// Per event, its place in `kinds` from 1, or 0.
    pub kind_of: Vec<u16>,
    /// The bodies, joined.
    pub bodies: Bytes,
    /// Where the outcome goes.
    pub reply: oneshot::Sender<Result<Appended, PublishError>>,
    /// The rights to be in memory, held until there is an outcome: the stream's and its project's.
    pub(crate) room: (OwnedSemaphorePermit, Share),
}

/// Why events were not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PublishError {
    /// Not stored: the topic is archived.
    #[error("cannot publish to an archived topic")]
    Archived,
    /// Not stored: the topic is being destroyed.
    #[error("topic is currently being deleted")]
    Deleted,
    /// Not stored, for certain. The publisher may try again when there is room.
    #[error("could not commit event: the disk of the topic's leader is full")]
    DiskFull,
    /// Not stored, and it never will be: it does not fit into a batch.
    #[error("maximum event size has been exceeded")]
    TooLarge,
    /// Not stored: the topic's keys are revoked.
    #[error("the topic cannot be written: {detail}")]
    KeyUnusable {
        /// Why.
        detail: String,
    },
    /// Not stored: nothing can be sealed until an operator enables the key or makes another.
    #[error("the topic cannot be written now: {detail}")]
    KeyDisabled {
        /// Why, and what to do.
        detail: String,
    },
    /// Not stored: a newer epoch of the producer session writes.
    #[error("epoch {epoch} of the producer session has taken over")]
    Fenced {
        /// The newest epoch.
        epoch: u32,
    },
    /// Not stored under this number, which the producer session has passed over: the event needs a new one.
    #[error(
        "sequence {sequence} was passed over by its producer session, or its event was refused: give the event a new sequence"
    )]
    Spent {
        /// The first such number.
        sequence: u64,
    },
    /// Not stored now: the session was idle for too long to tell a retry from a new event. Whether an earlier attempt of the
    /// publisher was stored cannot be told.
    #[error("the producer session is no longer remembered: go on with a session made after {now_ms} ms since 1970")]
    Forgotten {
        /// The partition's time, in milliseconds.
        now_ms: u64,
    },
    /// Not stored as far as this node knows, and no attempt is in doubt: nobody could take it in time.
    #[error("the topic's partition is not available: {cause}")]
    Unavailable {
        /// The last thing that went wrong.
        cause: String,
    },
    /// Not known: it may be stored, or may be yet.
    #[error("it is not known whether the event was committed: {cause}")]
    OutcomeUnknown {
        /// The last thing that went wrong.
        cause: String,
    },
}

struct Item {
    chunk: Chunk,
    ours: bool,
    since: Instant,
    /// An attempt of it may have been appended.
    doubtful: bool,
    reply: oneshot::Sender<Result<Appended, PublishError>>,
    _room: (OwnedSemaphorePermit, Share),
}

impl Item {
    /// Answers with an error; if an earlier attempt may have been appended, a refusal would be a lie.
    fn refuse(self, error: PublishError) {
        let error = if self.doubtful { PublishError::OutcomeUnknown { cause: error.to_string() } } else { error };
        self.answer(Err(error));
    }

    fn answer(self, outcome: Result<Appended, PublishError>) {
        // The stream may be gone; the events were committed all the same.
        let _ = self.reply.send(outcome);
    }
}

/// The task.
pub struct Appender {
    partition: Reach,
    link: Arc<dyn ForwardLink>,
    rng: Arc<dyn Rng>,
    /// The publisher's own.
    ring: Option<RingId>,
    submissions: mpsc::Receiver<Submission>,
    queue: VecDeque<Item>,
    open: bool,
    /// Our session; made with the first event.
    session: Option<SessionId>,
    next_sequence: u64,
    /// Something was sent under our session.
    used: bool,
    /// The producer that sent last, and its last sequence that was not refused.
    last: Option<(SessionId, u32, u64)>,
    back_off: Duration,
    cause: String,
    stopping_since: Option<Instant>,
}

impl std::fmt::Debug for Appender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Appender").field("topic", &self.partition.topic()).finish_non_exhaustive()
    }
}

/// What to do after an attempt.
enum Next {
    /// Everything is answered and no more will come.
    Done,
    /// Find the leader, then start over with the oldest unanswered chunk.
    Again { hint: Option<NodeId> },
    /// Nothing of this stream can be appended any more.
    GiveUp(PublishError),
}

impl Appender {
    /// An appender and the way to it.
    pub fn new(partition: Reach, link: Arc<dyn ForwardLink>, rng: Arc<dyn Rng>) -> (mpsc::Sender<Submission>, Self) {
        let (sender, submissions) = mpsc::channel(256);
        let appender = Self {
            partition,
            link,
            rng,
            ring: None,
            submissions,
            queue: VecDeque::new(),
            open: true,
            session: None,
            next_sequence: 1,
            used: false,
            last: None,
            back_off: BACK_OFF_MIN,
            cause: "no leader is known".to_owned(),
            stopping_since: None,
        };
        (sender, appender)
    }

    /// Has the events be sealed under the publisher's own key ring, if it has one.
    #[must_use]
    pub fn sealed_under(mut self, ring: Option<RingId>) -> Self {
        self.ring = ring;
        self
    }

    /// Runs until the stream closes its end and everything is answered.
    pub async fn run(mut self, stop: Stop) {
        let mut hint = None;
        loop {
            if self.queue.is_empty() && !self.wait_for_work().await {
                return;
            }
            let next = match self.route(hint.take(), &stop).await {
                Ok(route) => self.drive(route, &stop).await,
                Err(next) => next,
            };
            match next {
                Next::Done => return,
                Next::Again { hint: found } => {
                    hint = found;
                    self.pause(&stop).await;
                }
                Next::GiveUp(error) => return self.give_up(error).await,
            }
        }
    }

    async fn wait_for_work(&mut self) -> bool {
        match self.submissions.recv().await {
            Some(submission) => self.push(submission),
            None => self.open = false,
        }
        self.open
    }

    fn push(&mut self, submission: Submission) {
        let count = submission.shapes.len() as u32;
        let (session, epoch, first, ours) = match submission.numbering {
            Numbering::Theirs { session, epoch, first } => (session, epoch, first, false),
            Numbering::Ours => {
                let first = self.next_sequence;
                self.next_sequence += u64::from(count);
                (self.own_session(), 1, first, true)
            }
        };
        // What a publisher with its own numbers sent on an earlier stream is not known here.
        let known = self.last.filter(|(of, life, _)| (*of, *life) == (session, epoch)).map(|(_, _, last)| last);
        let previous = known.filter(|last| *last < first).or(ours.then_some(0));
        self.last = Some((session, epoch, (first + u64::from(count) - 1).max(known.unwrap_or(0))));
        let chunk = Chunk {
            producer: Sequenced { session, epoch, first, count },
            previous,
            publisher: submission.publisher,
            kinds: submission.kinds,
            shapes: submission.shapes.into(),
            kind_of: submission.kind_of.into(),
            bodies: submission.bodies,
            ring: self.ring,
        };
        let (reply, room) = (submission.reply, submission.room);
        self.queue.push_back(Item { chunk, ours, since: Instant::now(), doubtful: false, reply, _room: room });
    }

    /// A session of this stream. It begins at the partition's time as this node knows it, which the leader's never precedes.
    fn own_session(&mut self) -> SessionId {
        let (partition, rng) = (&self.partition, &self.rng);
        *self.session.get_or_insert_with(|| new_session(partition.entry_time_ms(), &**rng))
    }

    /// When the oldest chunk has waited long enough.
    fn deadline(&self) -> Instant {
        let oldest = self.queue.front().map_or_else(Instant::now, |item| item.since) + PATIENCE;
        self.stopping_since.map_or(oldest, |since| oldest.min(since + STOP_PATIENCE))
    }

    fn out_of_time(&self) -> Next {
        Next::GiveUp(PublishError::Unavailable { cause: self.cause.clone() })
    }

    /// The way to the leader, once there is one.
    async fn route(&mut self, hint: Option<NodeId>, stop: &Stop) -> Result<Route, Next> {
        self.note_stop(stop);
        match self.partition.replica() {
            Some(replica) => self.route_from(&replica, hint, stop).await,
            None => self.route_from_afar(hint).await,
        }
    }

    /// By what the replica here knows of leaders.
    async fn route_from(
        &mut self,
        replica: &PartitionHandle,
        hint: Option<NodeId>,
        stop: &Stop,
    ) -> Result<Route, Next> {
        let mut leadership = replica.leadership();
        let mut admission = replica.watch_admission();
        loop {
            if *admission.borrow_and_update() == Admission::Deleted {
                return Err(Next::GiveUp(PublishError::Deleted));
            }
            let now = *leadership.borrow_and_update();
            let leader = hint.or(now.leader);
            if leader == Some(replica.me()) {
                return Ok(Route::local(replica.batcher().clone()));
            }
            if let Some(leader) = leader {
                return self.open(leader).await;
            }
            let deadline = self.deadline();
            tokio::select! {
                changed = leadership.changed() => if changed.is_err() { return Err(self.stopped()) },
                changed = admission.changed() => if changed.is_err() { return Err(self.stopped()) },
                () = replica.stopped() => return Err(self.stopped()),
                () = tokio::time::sleep_until(deadline) => return Err(self.out_of_time()),
                () = stop.cancelled(), if self.stopping_since.is_none() => self.note_stop(stop),
            }
        }
    }

    /// By what other nodes say: the last leader that was heard of first, else whom a node that holds the partition names.
    async fn route_from_afar(&mut self, hint: Option<NodeId>) -> Result<Route, Next> {
        if self.partition.is_going() {
            return Err(Next::GiveUp(PublishError::Deleted));
        }
        let Some(elsewhere) = self.partition.elsewhere().cloned() else { return Err(self.stopped()) };
        let topic = self.partition.topic();
        let known = elsewhere.known(topic).filter(|known| known.at.elapsed() < KNOWN_FOR);
        let mut leader = hint.or(known.and_then(|known| known.leader));
        if leader.is_none() || known.is_none() {
            match elsewhere.stand(topic, Freshness::Known, Counting::Unwanted, ATTEMPT).await {
                Ok(stand) => leader = hint.or(stand.leader),
                Err(error) => return Err(self.again(error.to_string())),
            }
        }
        self.renew_unused();
        match leader {
            // Before it began to look elsewhere, this node may have been the leader itself.
            None => Err(self.again("an election is on".to_owned())),
            Some(leader) if Some(leader) == self.partition.me() => {
                elsewhere.note_leader(topic, None);
                Err(self.again("this node holds no replica any more".to_owned()))
            }
            Some(leader) => {
                let route = self.open(leader).await;
                elsewhere.note_leader(topic, route.is_ok().then_some(leader));
                route
            }
        }
    }

    async fn open(&mut self, leader: NodeId) -> Result<Route, Next> {
        match tokio::time::timeout(ATTEMPT, self.link.open(leader, self.partition.topic())).await {
            Ok(Ok(route)) => Ok(route),
            Ok(Err(cause)) => Err(self.again(format!("node {leader} cannot be reached: {cause}"))),
            Err(_) => Err(self.again(format!("node {leader} does not answer"))),
        }
    }

    /// The partition does not run here any more: it moved away, or the node is going.
    fn stopped(&mut self) -> Next {
        "the partition is stopped on this node".clone_into(&mut self.cause);
        if self.partition.elsewhere().is_some() { self.again(self.cause.clone()) } else { self.out_of_time() }
    }

    /// A session that was made before the partition's time was known here is made anew, if nothing was sent under it: the leader
    /// would take it for one that it has forgotten.
    fn renew_unused(&mut self) {
        let now_ms = self.partition.entry_time_ms();
        let stale = self.session.is_some_and(|session| made_at(session) < now_ms);
        if stale && !self.used && self.queue.iter().all(|item| item.ours) {
            self.renumber(now_ms);
        }
    }

    fn again(&mut self, cause: String) -> Next {
        debug!(topic = %self.partition.topic(), cause, "an append is tried again");
        self.cause = cause;
        if Instant::now() >= self.deadline() { self.out_of_time() } else { Next::Again { hint: None } }
    }

    fn note_stop(&mut self, stop: &Stop) {
        if stop.is_cancelled() {
            self.stopping_since.get_or_insert_with(Instant::now);
        }
    }

    /// Sends what is queued and takes answers, until something goes wrong.
    async fn drive(&mut self, route: Route, stop: &Stop) -> Next {
        let (mut out, mut replies) = route.split();
        let mut sent = 0;
        loop {
            if self.queue.is_empty() && !self.open {
                return Next::Done;
            }
            let next_size = self.queue.get(sent).map(|item| item.chunk.size());
            let deadline = self.deadline();
            tokio::select! {
                biased;
                outcome = replies.next(), if sent > 0 => match outcome {
                    Ok(appended) => {
                        sent -= 1;
                        self.back_off = BACK_OFF_MIN;
                        if let Some(item) = self.queue.pop_front() {
                            item.answer(Ok(appended));
                        }
                    }
                    Err(error) => {
                        drop(out);
                        self.queue[0].doubtful |= is_unknown(&error);
                        let settled = self.settle(&mut replies, 1, &mut sent);
                        if tokio::time::timeout_at(deadline, settled).await.is_err() {
                            self.doubt(sent);
                        }
                        return self.after(error);
                    }
                },
                ready = out.ready(next_size), if next_size.is_some() && sent < WINDOW => match ready {
                    Ok(()) => {
                        out.send(&self.queue[sent].chunk);
                        self.used |= self.queue[sent].ours;
                        sent += 1;
                    }
                    Err(_) if sent > 0 => {
                        // The way is gone; answers may still be on it.
                        let settled = self.settle(&mut replies, 0, &mut sent);
                        let _ = tokio::time::timeout_at(deadline, settled).await;
                        self.doubt(sent);
                        return self.after(AppendError::OutcomeUnknown);
                    }
                    Err(error) => return self.after(error),
                },
                submission = self.submissions.recv(), if self.open && self.queue.len() < QUEUE => match submission {
                    Some(submission) => self.push(submission),
                    None => self.open = false,
                },
                () = tokio::time::sleep_until(deadline), if !self.queue.is_empty() => {
                    self.doubt(sent);
                    return self.out_of_time();
                }
                () = stop.cancelled(), if self.stopping_since.is_none() => self.note_stop(stop),
            }
        }
    }

    /// Waits until everything that was sent is resolved, from the one at `from` on. What was appended is acknowledged; `sent`
    /// counts what was not. Cancel safe.
    async fn settle(&mut self, replies: &mut super::route::Replies, from: usize, sent: &mut usize) {
        let mut at = from;
        while at < *sent {
            match replies.next().await {
                Ok(appended) => {
                    *sent -= 1;
                    if let Some(item) = self.queue.remove(at) {
                        item.answer(Ok(appended));
                    }
                }
                Err(error) => {
                    self.queue[at].doubtful |= is_unknown(&error);
                    at += 1;
                }
            }
        }
    }

    /// Whatever was sent and is still unanswered may have been appended.
    fn doubt(&mut self, sent: usize) {
        self.queue.iter_mut().take(sent).for_each(|item| item.doubtful = true);
    }

    /// What the refusal of the oldest chunk means for it and for those behind it.
    fn after(&mut self, error: AppendError) -> Next {
        let refusal = match error {
            AppendError::NotLeader { leader } => {
                self.cause = error.to_string();
                if let Some(elsewhere) = self.partition.elsewhere() {
                    elsewhere.note_leader(self.partition.topic(), leader);
                }
                let out_of_time = Instant::now() >= self.deadline();
                return if out_of_time { self.out_of_time() } else { Next::Again { hint: leader } };
            }
            AppendError::OutcomeUnknown | AppendError::Gap { .. } | AppendError::Busy { .. } => {
                return self.again(error.to_string());
            }
            AppendError::DiskFull => {
                let waited = self.queue.front().is_some_and(|item| item.since.elapsed() >= DISK_PATIENCE);
                let doubtful = self.queue.front().is_some_and(|item| item.doubtful);
                if !waited || doubtful {
                    return self.again(error.to_string());
                }
                PublishError::DiskFull
            }
            AppendError::Spent { sequence } => PublishError::Spent { sequence },
            AppendError::Forgotten { now_ms } => return self.forgotten(now_ms),
            AppendError::Fenced { epoch } => return Next::GiveUp(PublishError::Fenced { epoch }),
            AppendError::KeyUnusable { detail } => return Next::GiveUp(PublishError::KeyUnusable { detail }),
            // The stream lives on: an operator may rotate the ring or enable a version at any moment.
            AppendError::KeyDisabled { detail } => PublishError::KeyDisabled { detail },
            AppendError::Archived => PublishError::Archived,
            AppendError::Deleted => PublishError::Deleted,
            AppendError::TooLarge => PublishError::TooLarge,
        };
        self.refuse_front(refusal);
        let replica = self.partition.replica();
        Next::Again { hint: replica.filter(|it| it.leadership().borrow().leads(it.me())).map(|it| it.me()) }
    }

    /// Answers the oldest chunk with a refusal and closes the gap that its numbers leave.
    fn refuse_front(&mut self, refusal: PublishError) {
        let Some(item) = self.queue.pop_front() else { return };
        let (of, previous) = (item.chunk.producer, item.chunk.previous);
        if item.doubtful {
            return item.refuse(refusal);
        }
        item.refuse(refusal);
        let same = |other: &Sequenced| (other.session, other.epoch) == (of.session, of.epoch);
        match self.queue.iter_mut().find(|item| same(&item.chunk.producer)) {
            Some(next) => next.chunk.previous = previous,
            None => self.last = previous.map(|previous| (of.session, of.epoch, previous)),
        }
    }

    /// Our session was dropped, or is older than one that was. If nothing is in doubt, a younger one serves as well.
    fn forgotten(&mut self, now_ms: u64) -> Next {
        if self.queue.iter().any(|item| item.doubtful || !item.ours) {
            return Next::GiveUp(PublishError::Forgotten { now_ms });
        }
        self.renumber(now_ms.max(self.partition.entry_time_ms()));
        Next::Again { hint: None }
    }

    /// Numbers everything that waits anew, under a session made at `now_ms`. Nothing of it may be appended, or be yet.
    fn renumber(&mut self, now_ms: u64) {
        let session = new_session(now_ms, &*self.rng);
        self.session = Some(session);
        self.used = false;
        let mut last = 0;
        for item in &mut self.queue {
            let count = item.chunk.producer.count;
            item.chunk.producer = Sequenced { session, epoch: 1, first: last + 1, count };
            item.chunk.previous = Some(last);
            last += u64::from(count);
        }
        self.next_sequence = last + 1;
        self.last = Some((session, 1, last));
    }

    async fn pause(&mut self, stop: &Stop) {
        let leadership = self.partition.replica().map(|replica| replica.leadership());
        let changed = async {
            match leadership {
                Some(mut leadership) => {
                    leadership.mark_unchanged();
                    let _ = leadership.changed().await;
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = tokio::time::sleep(self.back_off) => {}
            () = changed => {}
            () = stop.cancelled(), if self.stopping_since.is_none() => self.note_stop(stop),
        }
        self.back_off = (self.back_off * 2).min(BACK_OFF_MAX);
    }

    /// Answers everything that waits, and everything that still comes.
    async fn give_up(mut self, error: PublishError) {
        for item in std::mem::take(&mut self.queue) {
            item.refuse(error.clone());
        }
        while let Some(submission) = self.submissions.recv().await {
            let _ = submission.reply.send(Err(error.clone()));
        }
    }
}

fn is_unknown(error: &AppendError) -> bool {
    matches!(error, AppendError::OutcomeUnknown)
}

fn new_session(made_ms: u64, rng: &dyn Rng) -> SessionId {
    let mut random = [0; 10];
    rng.fill(&mut random);
    SessionId::new(made_ms, random)
}
