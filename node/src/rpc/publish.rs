//! Publish: events in, one answer for each, in order.
//!
//! ```text
//! messages ─> intake ─┬─ runs, in order ─> replies ─> frames ─> client
//!                     └─ submissions ─> appender of the topic ─> outcome of the run
//! ```
//!
//! Intake and appenders are tasks of the node, not of the call: what was received is committed even if the client goes away.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::convert::Producer;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::pb::ensign::v1beta1::nack::Code as NackCode;
use ensign_proto::{Permission, RingId, SessionId, TopicId};
use futures::stream::Fuse;
use futures::{FutureExt as _, StreamExt as _};
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::{Status, Streaming};

use super::auth::{self, Caller, Need};
use super::gathering::{Gathering, LOCAL_ID_MAX, LocalIds};
use super::opening::{self, Unopened};
use super::replies::{Frames, Replies, Run, send_reply};
use super::scope::{self, Scope};
use super::wire::{self, Call};
use super::{EVENT_MAX, REQUEST_MAX, Shared};
use crate::catalog::TopicState;
use crate::partition::metrics::Online;
use crate::partition::{Admission, Appender, KeysError, Numbering, Reach, Submission, made_at};
use crate::quota::Meter;
use crate::status::{self, text};

/// Bytes of events that one stream may have in memory; more wait in the client.
const ROOM: usize = 16 << 20;

/// Bytes of local ids whose answers one stream may not have taken yet; events of a client that does not read wait in the client.
const ANSWER_ROOM: usize = 2 << 20;

/// Events, and bytes of them, that are taken in one go: so much is in memory before there is room for it, and one event more.
const GULP: usize = 512;
const GULP_BYTES: usize = 256 << 10;

/// Runs that wait for their outcome.
const RUNS: usize = 1024;

/// How long a stream that has to end may take to answer what was submitted before.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// Producer sessions of one stream: a partition remembers so many of all its publishers, and drops the oldest.
const SESSIONS_MAX: usize = 64;

/// How far ahead of ours a publisher's clock may be.
const CLOCK_TOLERANCE: Duration = Duration::from_mins(10);

pub(super) fn serve(shared: Arc<Shared>, request: http::Request<Body>) -> http::Response<Body> {
    let (call, body) = wire::open(request);
    let (frames, replies) = mpsc::channel(16);
    // A way of its own: a client that does not read its answers must not keep the task.
    let (end, ended) = oneshot::channel();
    let tasks = shared.parts.tasks.clone();
    tasks.spawn("publish", move |_| async move {
        // The client may be gone already.
        let _ = end.send(publish(shared, call, body, frames).await);
    });
    let end = futures::stream::once(ended).filter_map(|end| async move {
        let end = end.unwrap_or_else(|_| Err(Status::unavailable(text::STOPPING)));
        end.err().map(Err)
    });
    let replies = ReceiverStream::new(replies).chain(end);
    wire::reply(replies.map(|frame| frame.map(wire::Frame::from)).boxed())
}

async fn publish(shared: Arc<Shared>, call: Call, mut body: Body, frames: Frames) -> Result<(), Status> {
    let need = Need::All(&[Permission::Publisher]);
    let caller = opening::authorize(&shared, &call, &mut body, need).await?;
    let project = caller.project()?;
    // It never changes. A node that does not know the API key must not seal its events under another ring.
    let api_key = shared.parts.catalog.view().api_key(caller.claims.subject);
    let ring = api_key.ok_or_else(|| Status::unavailable(text::OUT_OF_TOUCH))?.ring;
    let meter = shared.parts.quotas.meter(project);
    // Before anything is waited for: a stream that says nothing has its place like any other.
    let _place = opening::place(&meter, &mut body).await?;
    let mut messages = wire::messages::<api::PublisherRequest>(body, REQUEST_MAX);
    let open = match opening::first(&mut messages).await {
        Ok(None) => return Ok(()),
        Ok(Some(api::PublisherRequest { embed: Some(api::publisher_request::Embed::OpenStream(open)) })) => open,
        Ok(Some(_)) | Err(Unopened::Late) => return Err(Status::failed_precondition(text::OPEN_FIRST)),
        Err(Unopened::TooLarge(status)) => return Err(status),
        Err(Unopened::Unreadable(_)) => return Err(Status::aborted(text::RECEIVE_FAILED)),
    };
    opening::check_client_id(&open.client_id)?;
    let producer = Producer::of_stream(&open).map_err(|error| status::invalid_field(&error))?;
    check_session(&shared, producer)?;
    let scope = Scope::new(project, &open.topics)?;
    let topics = scope.open(&shared).await?;
    let online = Online::publisher();
    let ready = api::StreamReady {
        client_id: if open.client_id.is_empty() { caller.claims.subject.to_string() } else { open.client_id.clone() },
        server_id: shared.parts.node.to_string(),
        topics: scope::ready_topics(&topics),
        ..api::StreamReady::default()
    };
    send_reply(&frames, api::publisher_reply::Embed::Ready(ready)).await;

    let publisher = api::Publisher {
        publisher_id: caller.claims.subject.to_string(),
        ipaddr: call.remote,
        client_id: open.client_id,
        user_agent: opening::user_agent(&call.metadata),
    };
    let (runs, answers) = mpsc::channel(RUNS);
    let ends = auth::Ends::of(&shared, &caller);
    let late = ends.clone();
    let intake = Intake {
        shared: Arc::clone(&shared),
        caller,
        meter,
        scope,
        ring,
        producer,
        sessions: HashSet::new(),
        publisher: publisher.encode_to_vec().into(),
        topics: HashMap::new(),
        refreshed: None,
        room: Arc::new(Semaphore::new((ROOM >> 10) + 1)),
        answer_room: Arc::new(Semaphore::new(ANSWER_ROOM)),
        runs,
    };
    let (halt, halted) = oneshot::channel();
    shared.parts.tasks.spawn("publish-intake", move |_| intake.run(messages, ends, halted));
    let late = async {
        let status = late.ended().await;
        tokio::time::sleep(LAST_ANSWERS).await;
        status
    };
    let result = tokio::select! {
        biased;
        result = Replies::new(frames).run(answers) => result,
        status = late => Err(status),
    };
    drop(halt);
    drop(online);
    result
}

/// A session id begins with the time at which it was made: partitions tell by it whether they may have forgotten the session.
fn check_session(shared: &Shared, producer: Option<Producer>) -> Result<(), Status> {
    let newest = shared.parts.clock.wall().as_millis() + CLOCK_TOLERANCE.as_millis() as u64;
    if producer.is_some_and(|producer| made_at(producer.session) > newest) {
        let message = "invalid producer session field: it must be a ULID of about now, its first six bytes the milliseconds since 1970";
        return Err(Status::invalid_argument(message));
    }
    Ok(())
}

/// The receiving side of a stream.
struct Intake {
    shared: Arc<Shared>,
    caller: Caller,
    meter: Meter,
    scope: Scope,
    /// The API key's own.
    ring: Option<RingId>,
    producer: Option<Producer>,
    /// Those that have numbered events of this stream.
    sessions: HashSet<SessionId>,
    publisher: Bytes,
    topics: HashMap<TopicId, Destination>,
    /// When the catalog was last caught up with for the sake of an unknown topic.
    refreshed: Option<Instant>,
    /// In KiB.
    room: Arc<Semaphore>,
    answer_room: Arc<Semaphore>,
    runs: mpsc::Sender<Run>,
}

struct Destination {
    partition: Reach,
    submissions: mpsc::Sender<Submission>,
}

/// What has arrived, and at least one message; empty at the end. Cancel safe.
async fn gulp(messages: &mut Fuse<Streaming<api::PublisherRequest>>) -> Vec<Result<api::PublisherRequest, Status>> {
    let mut gulp = Vec::new();
    let mut bytes = 0;
    let mut next = messages.next().await;
    while let Some(message) = next {
        let event = match &message {
            Ok(api::PublisherRequest { embed: Some(api::publisher_request::Embed::Event(event)) }) => Some(event),
            Ok(_) | Err(_) => None,
        };
        bytes += event.map_or(0, |event| event.event.len() + event.key.len() + event.local_id.len());
        gulp.push(message);
        if gulp.len() >= GULP || bytes >= GULP_BYTES {
            break;
        }
        next = messages.next().now_or_never().flatten();
    }
    gulp
}

impl Intake {
    async fn run(
        mut self,
        messages: Streaming<api::PublisherRequest>,
        ends: auth::Ends,
        mut halted: oneshot::Receiver<()>,
    ) {
        let mut messages = messages.fuse();
        let mut ended = std::pin::pin!(ends.clone().ended());
        let mut revoked = std::pin::pin!(ends.revoked());
        let mut deaths = self.shared.parts.partitions.keys().deaths();
        let end = loop {
            let gulp = tokio::select! {
                biased;
                // The replying side has ended the stream.
                _ = &mut halted => return,
                status = &mut ended => break Err(status),
                _ = deaths.changed() => match self.refuse_ring() {
                    Ok(()) => continue,
                    Err(status) => break Err(status),
                },
                gulp = gulp(&mut messages) => gulp,
            };
            if gulp.is_empty() {
                break Ok(());
            }
            // It may wait for room: a key that is revoked meanwhile publishes none of what has arrived.
            let taken = tokio::select! {
                biased;
                _ = &mut halted => return,
                status = &mut revoked => break Err(status),
                taken = self.take(gulp) => taken,
            };
            if let Err(end) = taken {
                break end;
            }
        };
        let _ = self.runs.send(Run::End(end)).await;
    }

    /// Ends the stream when the API key's own ring is revoked as a whole; if it has none, when that of a topic that it publishes to, or
    /// of every topic that it could, is. A ring that is disabled comes back: until then each event is refused by itself.
    fn refuse_ring(&self) -> Result<(), Status> {
        let keys = self.shared.parts.partitions.keys();
        let refusal = |ring| keys.refuse_ring(ring).err().filter(|error| matches!(error, KeysError::Unusable(_)));
        if let Some(ring) = self.ring {
            return refusal(ring).map_or(Ok(()), |error| Err(status::cannot_publish(&error)));
        }
        let used = self.topics.values().find_map(|destination| refusal(destination.partition.ring()?));
        let error = used.or_else(|| {
            let scope = self.scope.topics(&self.shared);
            scope.iter().map(|topic| refusal(topic.ring)).collect::<Option<Vec<_>>>()?.pop()
        });
        error.map_or(Ok(()), |error| Err(status::cannot_publish(&error)))
    }

    /// Takes what has arrived; an error is how the stream ends.
    async fn take(&mut self, gulp: Vec<Result<api::PublisherRequest, Status>>) -> Result<(), Result<(), Status>> {
        let mut gathering = None;
        let mut end = Ok(());
        for message in gulp {
            let event = match message.map(|message| message.embed) {
                Ok(Some(api::publisher_request::Embed::Event(event))) => event,
                Ok(Some(api::publisher_request::Embed::OpenStream(_))) => {
                    end = Err(Err(Status::aborted(text::OPEN_TWICE)));
                    break;
                }
                Ok(None) => {
                    end = Err(Err(Status::failed_precondition(text::EMPTY_REQUEST)));
                    break;
                }
                // The client went away, or sent what is no message.
                Err(status) => {
                    tracing::debug!(%status, "a publish stream broke off");
                    end = Err(Err(Status::aborted(text::RECEIVE_FAILED)));
                    break;
                }
            };
            if let Err(status) = self.event(event, &mut gathering).await {
                end = Err(Err(status));
                break;
            }
        }
        self.submit(gathering).await.map_err(Err)?;
        end
    }

    async fn event(&mut self, event: api::EventWrapper, gathering: &mut Option<Gathering>) -> Result<(), Status> {
        if event.local_id.len() > LOCAL_ID_MAX {
            let length = event.local_id.len();
            let message = format!("invalid local id field: it has {length} bytes, and may have {LOCAL_ID_MAX} at most");
            return Err(Status::invalid_argument(message));
        }
        let refusal = match self.admit(&event).await {
            Ok(topic) => {
                let numbering = self.numbering(&event)?;
                let size = event.event.len() + event.key.len();
                if let Some(run) = gathering.as_mut().filter(|run| run.continues(topic, numbering, size)) {
                    run.push(event);
                    return Ok(());
                }
                self.submit(gathering.take()).await?;
                let mut run = Gathering::new(topic, numbering, size);
                run.push(event);
                *gathering = Some(run);
                return Ok(());
            }
            Err(refusal) => refusal,
        };
        self.submit(gathering.take()).await?;
        let (code, reason) = refusal;
        let local_ids = LocalIds::of(&event.local_id);
        drop(event);
        let room = self.answer_room(&local_ids).await?;
        self.hand_on(Run::Refused { local_ids, code, reason: reason.into(), room }).await
    }

    /// Whether the event may be appended, and where.
    async fn admit(&mut self, event: &api::EventWrapper) -> Result<TopicId, (NackCode, &'static str)> {
        if event.topic_id.is_empty() {
            return Err((NackCode::TopicUnknown, "no topic id specified"));
        }
        let topic = TopicId::try_from(&event.topic_id[..]);
        let topic = topic.map_err(|_| (NackCode::TopicUnknown, "invalid topic id"))?;
        let unknown = (NackCode::TopicUnknown, "topic unknown or unhandled");
        let mut admission = self.destination(topic).await?.ok_or(unknown)?.partition.admission();
        if admission == Admission::Deleted {
            // Being destroyed until the catalog forgets it; afterwards unknown.
            if self.scope.topic(&self.shared, topic).is_none() {
                self.topics.remove(&topic);
                return Err(unknown);
            }
        } else if let Some(known) = self.scope.topic(&self.shared, topic) {
            // The partition follows the catalog a moment later.
            admission = match known.state {
                TopicState::Ready => admission,
                TopicState::Readonly => Admission::Archived,
                TopicState::Deleting => Admission::Deleted,
            };
        }
        if event.event.len() > EVENT_MAX {
            return Err((NackCode::MaxEventSizeExceeded, "maximum event size has been exceeded"));
        }
        match admission {
            Admission::Open => Ok(topic),
            // Perhaps it is here already, from an earlier stream whose answer was lost: the leader knows.
            Admission::Archived if event.producer_sequence != 0 => {
                self.archived_here(topic).await;
                Ok(topic)
            }
            Admission::Archived => Err((NackCode::TopicArchived, "cannot publish to an archived topic")),
            Admission::Deleted => Err((NackCode::TopicDeleted, "topic is currently being deleted")),
        }
    }

    /// Waits a moment until this node's partition knows what its catalog knows: that the topic takes nothing new.
    async fn archived_here(&self, topic: TopicId) {
        let Some(destination) = self.topics.get(&topic) else { return };
        let Some(mut admission) = destination.partition.watch_admission() else { return };
        let follows = admission.wait_for(|now| *now != Admission::Open);
        // Late: the leader has its own.
        let _ = tokio::time::timeout(Duration::from_secs(1), follows).await;
    }

    /// The topic's appender; it is started with the stream's first event for the topic. None: there is no such topic.
    async fn destination(&mut self, topic: TopicId) -> Result<Option<&Destination>, (NackCode, &'static str)> {
        if !self.topics.contains_key(&topic) {
            if self.scope.topic(&self.shared, topic).is_none() {
                // Perhaps it was made on another node just now. A client cannot make us ask all the time.
                if self.refreshed.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
                    return Ok(None);
                }
                self.refreshed = Some(Instant::now());
                scope::refresh(&self.shared).await;
                if self.scope.topic(&self.shared, topic).is_none() {
                    return Ok(None);
                }
            }
            let partition = self.shared.parts.partitions.reach(topic, Duration::from_secs(5)).await;
            let partition = partition.map_err(status::not_served_nack)?;
            let forward = self.shared.parts.partitions.forward();
            let (submissions, appender) = Appender::new(partition.clone(), forward, Arc::clone(&self.shared.parts.rng));
            let appender = appender.sealed_under(self.ring);
            self.shared.parts.tasks.spawn("appender", move |stop| appender.run(stop));
            self.topics.insert(topic, Destination { partition, submissions });
        }
        Ok(self.topics.get(&topic))
    }

    fn numbering(&mut self, event: &api::EventWrapper) -> Result<Numbering, Status> {
        if event.producer_sequence == 0 {
            return Ok(Numbering::Ours);
        }
        let own = Producer::of_event(event).map_err(|error| status::invalid_field(&error))?;
        check_session(&self.shared, own)?;
        let Some(producer) = own.or(self.producer) else {
            return Err(Status::invalid_argument("a producer sequence needs a producer session"));
        };
        if event.producer_sequence > u64::MAX >> 1 {
            return Err(Status::invalid_argument("invalid producer sequence field"));
        }
        if self.sessions.insert(producer.session) && self.sessions.len() > SESSIONS_MAX {
            return Err(Status::invalid_argument(format!(
                "a stream may carry events of {SESSIONS_MAX} producer sessions: open another stream for more"
            )));
        }
        Ok(Numbering::Theirs { session: producer.session, epoch: producer.epoch, first: event.producer_sequence })
    }

    async fn submit(&mut self, gathering: Option<Gathering>) -> Result<(), Status> {
        let Some(run) = gathering else { return Ok(()) };
        // While it waits for its turn, the client is not read: that slows it down before anything is refused.
        if let Err(exhausted) = self.meter.admit(run.shapes.len() as u64, run.bodies.len() as u64).await {
            if let Numbering::Theirs { .. } = run.numbering {
                // Perhaps it is here already, from an earlier stream whose answer was lost: not a nack. Its publisher comes back.
                return Err(status::quota_exhausted(&exhausted));
            }
            let (code, reason) = status::quota_nack(&exhausted);
            let room = self.answer_room(&run.local_ids).await?;
            return self.hand_on(Run::Refused { local_ids: run.local_ids, code, reason: reason.into(), room }).await;
        }
        let weight = (run.weight() + self.publisher.len()).min(ROOM);
        let answer_room = self.answer_room(&run.local_ids).await?;
        // First its own room, so that a stream that has used it up holds none of what all streams share.
        let own = Arc::clone(&self.room).acquire_many_owned((weight >> 10) as u32 + 1).await;
        let own = own.map_err(|_| Status::unavailable(text::STOPPING))?;
        let room = (own, self.shared.publish_room.acquire(self.scope.project(), weight as u64).await);
        let (reply, outcome) = oneshot::channel();
        let submission = Submission {
            numbering: run.numbering,
            publisher: self.publisher.clone(),
            kinds: run.kinds,
            shapes: run.shapes,
            kind_of: run.kind_of,
            bodies: run.bodies.into(),
            reply,
            room,
        };
        let slot = match self.topics.get(&run.topic) {
            Some(destination) => destination.submissions.reserve().await.ok(),
            None => None,
        };
        // Noted before it is handed over, so that answers keep the order of the events. From here on nothing waits: what is noted
        // is handed over, and what is not was never taken.
        let (topic, local_ids, since) = (run.topic, run.local_ids, Instant::now());
        self.hand_on(Run::Submitted { topic, local_ids, since, outcome, room: answer_room }).await?;
        // An appender that is gone drops the submission, and with it the way of its outcome.
        if let Some(slot) = slot {
            slot.send(submission);
        }
        Ok(())
    }

    /// Room for local ids until their answers are the transport's.
    async fn answer_room(&self, local_ids: &LocalIds) -> Result<OwnedSemaphorePermit, Status> {
        let permits = local_ids.weight().min(ANSWER_ROOM) as u32;
        let granted = Arc::clone(&self.answer_room).acquire_many_owned(permits).await;
        granted.map_err(|_| Status::unavailable(text::STOPPING))
    }

    async fn hand_on(&self, run: Run) -> Result<(), Status> {
        let gone = |_| Status::cancelled(format!("the stream of {} has ended", self.caller.claims.subject));
        self.runs.send(run).await.map_err(gone)
    }
}
