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

use bytes::{Bytes, BytesMut};
use ensign_proto::convert::Producer;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::pb::ensign::v1beta1::nack::Code as NackCode;
use ensign_proto::{Permission, TopicId};
use futures::{FutureExt as _, StreamExt as _};
use prost::Message as _;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::{Status, Streaming};

use super::auth::{self, Caller, Need};
use super::scope::{self, Scope};
use super::wire::{self, Call};
use super::{EVENT_MAX, Shared};
use crate::catalog::TopicState;
use crate::partition::metrics::{Online, observe_ack};
use crate::partition::{
    Admission, Appended, Appender, BodyShape, Numbering, PartitionHandle, PublishError, RawKind, Submission,
    encode_body, made_at,
};
use crate::status::{self, Refusal, text};

/// Bytes of events that one stream may have in memory; more wait in the client.
const ROOM: u32 = 16 << 20;

/// Where a run of events is cut: that of a batch, so that a chunk never spans two.
const RUN_BYTES: usize = 256 << 10;

/// Events looked at in one go.
const GULP: usize = 512;

/// Runs that wait for their outcome.
const RUNS: usize = 1024;

/// How far ahead of ours a publisher's clock may be.
const CLOCK_TOLERANCE: Duration = Duration::from_mins(10);

pub(super) fn serve(shared: Arc<Shared>, request: http::Request<Body>) -> http::Response<Body> {
    let (call, messages) = wire::open::<api::PublisherRequest>(request);
    let (frames, body) = mpsc::channel(16);
    let tasks = shared.parts.tasks.clone();
    tasks.spawn("publish", move |_| async move {
        let refused = publish(shared, call, messages, frames.clone()).await.err();
        if let Some(status) = refused {
            // The client may be gone already.
            let _ = frames.send(Err(status)).await;
        }
    });
    wire::reply(ReceiverStream::new(body).boxed())
}

type Frames = mpsc::Sender<Result<Bytes, Status>>;

async fn publish(
    shared: Arc<Shared>,
    call: Call,
    mut messages: Streaming<api::PublisherRequest>,
    frames: Frames,
) -> Result<(), Status> {
    let caller = auth::authorize(&shared, &call.metadata, Need::All(&[Permission::Publisher])).await;
    let opening = wire::opening(&mut messages, &caller).await;
    let caller = caller?;
    let project = caller.project()?;
    let open = match opening {
        Ok(Ok(None)) => return Ok(()),
        Ok(Ok(Some(api::PublisherRequest { embed: Some(api::publisher_request::Embed::OpenStream(open)) }))) => open,
        Ok(Ok(Some(_))) | Err(_) => return Err(Status::failed_precondition(text::OPEN_FIRST)),
        Ok(Err(_)) => return Err(Status::aborted(text::RECEIVE_FAILED)),
    };
    let producer = Producer::of_stream(&open).map_err(|error| status::invalid_field(&error))?;
    check_session(&shared, producer)?;
    let scope = Scope::new(project, &open.topics);
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
        user_agent: user_agent(&call.metadata),
    };
    let (runs, answers) = mpsc::channel(RUNS);
    let ended = auth::ended(Arc::clone(&shared), caller.clone());
    let intake = Intake {
        shared: Arc::clone(&shared),
        caller,
        scope,
        producer,
        publisher: publisher.encode_to_vec().into(),
        topics: HashMap::new(),
        refreshed: None,
        room: Arc::new(Semaphore::new(ROOM as usize >> 10)),
        runs,
    };
    let (halt, halted) = oneshot::channel();
    shared.parts.tasks.spawn("publish-intake", move |_| intake.run(messages, ended, halted));
    let result = Replies { frames, totals: Totals::default() }.run(answers).await;
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

fn user_agent(metadata: &tonic::metadata::MetadataMap) -> String {
    let agents: Vec<_> = metadata.get_all("user-agent").iter().filter_map(|value| value.to_str().ok()).collect();
    agents.join(",")
}

async fn send_reply(frames: &Frames, embed: api::publisher_reply::Embed) {
    let reply = api::PublisherReply { embed: Some(embed) };
    // A client that is gone needs no reply; its events are committed all the same.
    let _ = frames.send(Ok(wire::message(&reply))).await;
}

/// What becomes of consecutive events.
enum Run {
    /// They were handed to an appender.
    Submitted {
        topic: TopicId,
        local_ids: Vec<Bytes>,
        since: Instant,
        outcome: oneshot::Receiver<Result<Appended, PublishError>>,
    },
    /// They were refused at once.
    Refused { local_ids: Vec<Bytes>, code: NackCode, reason: &'static str },
    /// There will be no more.
    End(Result<(), Status>),
}

/// The receiving side of a stream.
struct Intake {
    shared: Arc<Shared>,
    caller: Caller,
    scope: Scope,
    producer: Option<Producer>,
    publisher: Bytes,
    topics: HashMap<TopicId, Destination>,
    /// When the catalog was last caught up with for the sake of an unknown topic.
    refreshed: Option<Instant>,
    room: Arc<Semaphore>,
    runs: mpsc::Sender<Run>,
}

struct Destination {
    handle: PartitionHandle,
    submissions: mpsc::Sender<Submission>,
}

/// Events of one topic on their way into a submission.
struct Gathering {
    topic: TopicId,
    numbering: Numbering,
    local_ids: Vec<Bytes>,
    kinds: Vec<Bytes>,
    last_kind: Option<(RawKind, u16)>,
    shapes: Vec<BodyShape>,
    kind_of: Vec<u16>,
    bodies: Vec<u8>,
}

impl Gathering {
    /// Whether an event continues the run.
    fn continues(&self, topic: TopicId, numbering: Numbering, size: usize) -> bool {
        let follows = match (self.numbering, numbering) {
            (Numbering::Ours, Numbering::Ours) => true,
            (Numbering::Theirs { session, epoch, first }, Numbering::Theirs { session: s, epoch: e, first: f }) => {
                (session, epoch, first + self.shapes.len() as u64) == (s, e, f)
            }
            (Numbering::Ours, Numbering::Theirs { .. }) | (Numbering::Theirs { .. }, Numbering::Ours) => false,
        };
        follows && self.topic == topic && self.bodies.len() + size <= RUN_BYTES
    }

    /// The place of the event's kind in `kinds`, from 1; 0 if it has none.
    fn kind(&mut self, event: &Bytes) -> u16 {
        let Some(raw) = RawKind::of(event) else { return 0 };
        // Neighbours are mostly of one kind.
        if let Some((last, place)) = &self.last_kind
            && *last == raw
        {
            return *place;
        }
        let Some(kind) = raw.decode().map(|kind| Bytes::from(kind.encode_to_vec())) else { return 0 };
        let known = self.kinds.iter().position(|known| *known == kind);
        let place = known.unwrap_or_else(|| {
            self.kinds.push(kind);
            self.kinds.len() - 1
        }) as u16
            + 1;
        self.last_kind = Some((raw, place));
        place
    }

    fn push(&mut self, event: api::EventWrapper) {
        let kind = self.kind(&event.event);
        self.local_ids.push(event.local_id.clone());
        let has_event = !event.event.is_empty();
        let before = self.bodies.len();
        encode_body(event, &mut self.bodies);
        self.shapes.push(BodyShape::new((self.bodies.len() - before) as u32, has_event));
        self.kind_of.push(kind);
    }
}

impl Intake {
    async fn run(
        mut self,
        messages: Streaming<api::PublisherRequest>,
        ended: impl Future<Output = Status>,
        mut halted: oneshot::Receiver<()>,
    ) {
        let mut messages = messages.ready_chunks(GULP);
        let mut ended = std::pin::pin!(ended);
        let end = loop {
            tokio::select! {
                biased;
                // The replying side has ended the stream.
                _ = &mut halted => return,
                status = &mut ended => break Err(status),
                gulp = messages.next() => match gulp {
                    None => break Ok(()),
                    Some(gulp) => if let Err(end) = self.take(gulp).await { break end },
                },
            }
        };
        let _ = self.runs.send(Run::End(end)).await;
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
        let refusal = match self.admit(&event).await {
            Ok(topic) => {
                let numbering = self.numbering(&event)?;
                let size = event.event.len() + event.key.len();
                if let Some(run) = gathering.as_mut().filter(|run| run.continues(topic, numbering, size)) {
                    run.push(event);
                    return Ok(());
                }
                self.submit(gathering.take()).await?;
                let mut run = Gathering {
                    topic,
                    numbering,
                    local_ids: Vec::new(),
                    kinds: Vec::new(),
                    last_kind: None,
                    shapes: Vec::new(),
                    kind_of: Vec::new(),
                    bodies: Vec::with_capacity(size + 64),
                };
                run.push(event);
                *gathering = Some(run);
                return Ok(());
            }
            Err(refusal) => refusal,
        };
        self.submit(gathering.take()).await?;
        let (code, reason) = refusal;
        self.hand_on(Run::Refused { local_ids: vec![event.local_id], code, reason }).await
    }

    /// Whether the event may be appended, and where.
    async fn admit(&mut self, event: &api::EventWrapper) -> Result<TopicId, (NackCode, &'static str)> {
        if event.topic_id.is_empty() {
            return Err((NackCode::TopicUnknown, "no topic id specified"));
        }
        let topic = TopicId::try_from(&event.topic_id[..]);
        let topic = topic.map_err(|_| (NackCode::TopicUnknown, "invalid topic id"))?;
        let unknown = (NackCode::TopicUnknown, "topic unknown or unhandled");
        let mut admission = self.destination(topic).await.ok_or(unknown)?.handle.admission();
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
            Admission::Archived => Err((NackCode::TopicArchived, "cannot publish to an archived topic")),
            Admission::Deleted => Err((NackCode::TopicDeleted, "topic is currently being deleted")),
        }
    }

    /// The topic's appender; it is started with the stream's first event for the topic.
    async fn destination(&mut self, topic: TopicId) -> Option<&Destination> {
        if !self.topics.contains_key(&topic) {
            if self.scope.topic(&self.shared, topic).is_none() {
                // Perhaps it was made on another node just now. A client cannot make us ask all the time.
                if self.refreshed.is_some_and(|at| at.elapsed() < Duration::from_secs(1)) {
                    return None;
                }
                self.refreshed = Some(Instant::now());
                scope::refresh(&self.shared).await;
                self.scope.topic(&self.shared, topic)?;
            }
            let handle = self.shared.parts.partitions.wait_for(topic, Duration::from_secs(5)).await?;
            let forward = self.shared.parts.partitions.forward();
            let (submissions, appender) = Appender::new(handle.clone(), forward, Arc::clone(&self.shared.parts.rng));
            self.shared.parts.tasks.spawn("appender", move |stop| appender.run(stop));
            self.topics.insert(topic, Destination { handle, submissions });
        }
        self.topics.get(&topic)
    }

    fn numbering(&self, event: &api::EventWrapper) -> Result<Numbering, Status> {
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
        Ok(Numbering::Theirs { session: producer.session, epoch: producer.epoch, first: event.producer_sequence })
    }

    async fn submit(&mut self, gathering: Option<Gathering>) -> Result<(), Status> {
        let Some(run) = gathering else { return Ok(()) };
        let size = (run.bodies.len() + run.shapes.len() * 64) as u32 >> 10;
        let permits = (size + 1).min(ROOM >> 10);
        let mut room = Vec::with_capacity(2);
        // First its own share, so that a stream that has used it up holds none of what all streams share.
        for share in [&self.room, &self.shared.publish_room] {
            let granted = Arc::clone(share).acquire_many_owned(permits).await;
            room.push(granted.map_err(|_| Status::unavailable(text::STOPPING))?);
        }
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
        // Noted before it is handed over, so that answers keep the order of the events.
        let noted = Run::Submitted { topic: run.topic, local_ids: run.local_ids, since: Instant::now(), outcome };
        self.hand_on(noted).await?;
        if let Some(destination) = self.topics.get(&run.topic) {
            // An appender that is gone drops the submission, and with it the way of its outcome.
            let _ = destination.submissions.send(submission).await;
        }
        Ok(())
    }

    async fn hand_on(&self, run: Run) -> Result<(), Status> {
        let gone = |_| Status::cancelled(format!("the stream of {} has ended", self.caller.claims.subject));
        self.runs.send(run).await.map_err(gone)
    }
}

#[derive(Debug, Default)]
struct Totals {
    events: u64,
    topics: HashSet<TopicId>,
    acks: u64,
    nacks: u64,
}

/// The replying side of a stream.
struct Replies {
    frames: Frames,
    totals: Totals,
}

impl Replies {
    /// Answers runs in order, until the stream ends. All answers precede `close_stream`.
    async fn run(mut self, mut runs: mpsc::Receiver<Run>) -> Result<(), Status> {
        let mut out = BytesMut::new();
        let end = loop {
            let Some(run) = runs.recv().await else { break Ok(()) };
            let mut run = Some(run);
            let mut end = None;
            // Whatever is decided already goes into the same frame.
            while let Some(next) = run.take() {
                if let Run::End(result) = next {
                    end = Some(result);
                    break;
                }
                if let Err(status) = self.answer(next, &mut out).await {
                    end = Some(Err(status));
                    break;
                }
                if out.len() < 64 << 10 {
                    run = runs.recv().now_or_never().flatten();
                }
            }
            if !out.is_empty() && self.frames.send(Ok(out.split().freeze())).await.is_err() {
                // The client is gone. What was received is committed by its appenders; nobody waits for the answers.
                while let Some(run) = runs.recv().await {
                    if matches!(run, Run::End(_)) {
                        break;
                    }
                }
                return Ok(());
            }
            if let Some(end) = end {
                break end;
            }
        };
        let close = api::CloseStream {
            events: self.totals.events,
            topics: self.totals.topics.len() as u64,
            acks: self.totals.acks,
            nacks: self.totals.nacks,
        };
        send_reply(&self.frames, api::publisher_reply::Embed::CloseStream(close)).await;
        end
    }

    async fn answer(&mut self, run: Run, out: &mut BytesMut) -> Result<(), Status> {
        match run {
            Run::Refused { local_ids, code, reason } => self.nack(local_ids, code, reason, out),
            Run::Submitted { topic, local_ids, since, mut outcome } => {
                let outcome = if let Some(outcome) = (&mut outcome).now_or_never() {
                    outcome
                } else {
                    // What is decided goes out before what has to be waited for.
                    if !out.is_empty() {
                        let _ = self.frames.send(Ok(out.split().freeze())).await;
                    }
                    outcome.await
                };
                self.totals.events += local_ids.len() as u64;
                self.totals.topics.insert(topic);
                let cause = || "the appender of the topic ended".to_owned();
                match outcome.unwrap_or_else(|_| Err(PublishError::OutcomeUnknown { cause: cause() })) {
                    Ok(appended) => {
                        observe_ack(since.elapsed());
                        self.acks(local_ids, &appended, out);
                    }
                    Err(error) => match status::publish_failed(&error) {
                        Refusal::Nack(code, reason) => self.nack(local_ids, code, reason, out),
                        Refusal::End(status) => return Err(status),
                    },
                }
            }
            Run::End(_) => {}
        }
        Ok(())
    }

    fn acks(&mut self, local_ids: Vec<Bytes>, appended: &Appended, out: &mut BytesMut) {
        self.totals.acks += local_ids.len() as u64;
        let mut ids = local_ids.into_iter();
        for run in &appended.runs {
            let committed = Some(ensign_proto::convert::timestamp(run.committed_ms * 1_000_000));
            for (n, id) in (0..u64::from(run.count)).zip(&mut ids) {
                let offset = if run.offset.0 == 0 { 0 } else { run.offset.0 + n };
                let embed = Some(api::publisher_reply::Embed::Ack(api::Ack { id, committed, offset }));
                wire::put_message(&api::PublisherReply { embed }, out);
            }
        }
    }

    fn nack(&mut self, local_ids: Vec<Bytes>, code: NackCode, reason: &str, out: &mut BytesMut) {
        self.totals.nacks += local_ids.len() as u64;
        for id in local_ids {
            let nack = api::Nack { id, code: code.into(), error: reason.to_owned() };
            let embed = Some(api::publisher_reply::Embed::Nack(nack));
            wire::put_message(&api::PublisherReply { embed }, out);
        }
    }
}
