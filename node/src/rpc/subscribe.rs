//! Subscribe: committed events, from where the client asks, in the order of their partitions.
//!
//! The stream is driven by the transport: it reads, opens and encodes the next batch only when the client has room for it. So a
//! slow subscriber costs one batch of memory and loses nothing; it reads from the log what the tail no longer holds.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use ensign_proto::convert::Start;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::{ByteCount, LogIndex, Offset, Permission, TopicId};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use prost::encoding::{encode_varint, encoded_len_varint};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::{Status, Streaming};

use super::auth::{self, Caller, Need};
use super::opening::{self, Unopened};
use super::scope::{self, Scope};
use super::wire::{self, Call, Frame};
use super::{OPENING_MAX, REPLY_MAX, Shared, consistency, unreadable};
use crate::catalog::Topic;
use crate::partition::metrics::Online;
use crate::partition::{Freshness, Reader, StoredBatch};
use crate::quota::StreamPlace;
use crate::status::{self, text};

/// Sealed batches that a stream reads ahead, shared by its topics; each gets at least one batch.
const READ_AHEAD: u64 = 4 << 20;

/// The most that is read ahead of one topic.
const READ_AHEAD_TOPIC: u64 = 1 << 20;

/// How long a topic's replicas may take to say where they stand, when a stream opens.
const OPEN_PATIENCE: Duration = Duration::from_secs(5);

/// What a client that says nothing can receive, and the most that it can ask for.
pub(super) const MESSAGE_LIMIT_MAX: usize = 64 << 20;

pub(super) fn serve(shared: Arc<Shared>, request: http::Request<Body>) -> http::Response<Body> {
    let (call, body) = wire::open(request);
    let frames = futures::stream::once(async move {
        match open(shared, call, body).await {
            Ok(Some((ready, stream))) => {
                let first = futures::stream::iter([Ok(ready.into())]);
                first.chain(futures::stream::unfold(Some(stream), step)).left_stream()
            }
            Ok(None) => futures::stream::iter(Vec::new()).right_stream(),
            Err(status) => futures::stream::iter(vec![Err(status)]).right_stream(),
        }
    });
    wire::reply(frames.flatten().boxed())
}

/// The largest message that the client takes: what it says in its request, else in its metadata, else what every client takes.
pub(super) fn message_limit(call: &Call, in_request: u32) -> usize {
    if in_request != 0 {
        return (in_request as usize).min(MESSAGE_LIMIT_MAX);
    }
    let asked = call.metadata.get("ensign-max-message-bytes").and_then(|value| value.to_str().ok());
    asked.and_then(|text| text.parse().ok()).map_or(REPLY_MAX, |limit: usize| limit.min(MESSAGE_LIMIT_MAX))
}

async fn open(shared: Arc<Shared>, call: Call, mut body: Body) -> Result<Option<(Bytes, Subscriber)>, Status> {
    let need = Need::All(&[Permission::Subscriber]);
    let caller = opening::authorize(&shared, &call, &mut body, need).await?;
    let project = caller.project()?;
    let place = opening::place(&shared.parts.quotas.meter(project), &mut body).await?;
    let mut messages = wire::messages::<api::SubscribeRequest>(body, OPENING_MAX);
    let subscription = match opening::first(&mut messages).await {
        Ok(None) => return Ok(None),
        Ok(Some(request)) => match request.embed {
            Some(api::subscribe_request::Embed::Subscription(subscription)) => subscription,
            _ => return Err(Status::failed_precondition(text::SUBSCRIBE_FIRST)),
        },
        Err(Unopened::TooLarge(status)) => return Err(status),
        Err(Unopened::Late | Unopened::Unreadable(_)) => {
            return Err(Status::failed_precondition(text::SUBSCRIBE_FIRST));
        }
    };
    opening::check_client_id(&subscription.client_id)?;
    let start = Start::try_from(&subscription).map_err(|error| status::invalid_field(&error))?;
    // What was committed before is not live: a replica that lags would deliver what the same client was given elsewhere.
    let default = if matches!(start, Start::Latest) { Freshness::Latest } else { Freshness::Known };
    let freshness = consistency::of(subscription.consistency, default)?;
    let scope = Scope::new(project, &subscription.topics)?;
    let topics = scope.open(&shared).await?;
    let mut feeds = Vec::with_capacity(topics.len());
    for topic in &topics {
        // Registered before `ready`: what is committed from here on is delivered.
        feeds.push(Feed::open(&shared, topic.id, start, freshness).await?);
    }
    let next_offset = |(topic, feed): (&Arc<Topic>, &Feed)| (topic.name.as_str().to_owned(), feed.next.0);
    let ready = api::StreamReady {
        client_id: subscription.client_id,
        server_id: shared.parts.node.to_string(),
        topics: scope::ready_topics(&topics),
        next_offsets: topics.iter().zip(&feeds).map(next_offset).collect(),
    };
    let ready = api::SubscribeReply { embed: Some(api::subscribe_reply::Embed::Ready(ready)) };
    let ended = Box::pin(auth::ended(Arc::clone(&shared), caller.clone()));
    let catalog = shared.parts.catalog.view().changes();
    let mut deaths = shared.parts.partitions.keys().deaths();
    // What died before counts, too.
    deaths.mark_changed();
    let subscriber = Subscriber {
        limit: message_limit(&call, subscription.message_bytes_max),
        shared,
        _caller: caller,
        scope,
        feeds,
        next: 0,
        messages,
        ended,
        catalog,
        deaths,
        outdated: false,
        totals: api::CloseStream::default(),
        closing: false,
        _online: Online::subscriber(),
        _place: place,
    };
    Ok(Some((wire::message(&ready), subscriber)))
}

/// One topic of a stream: where it is, and what was read ahead, sealed.
struct Feed {
    reader: Reader,
    next: Offset,
    ahead: VecDeque<StoredBatch>,
    delivered: bool,
}

impl Feed {
    async fn open(shared: &Shared, topic: TopicId, start: Start, freshness: Freshness) -> Result<Self, Status> {
        let partition = shared.parts.partitions.reach(topic, Duration::from_secs(5)).await;
        let partition = partition.map_err(status::not_served)?;
        let opened = partition.follow(start, freshness, OPEN_PATIENCE).await;
        let (reader, next) = opened.map_err(|error| status::read_failed(&error))?;
        Ok(Self { reader, next, ahead: VecDeque::new(), delivered: false })
    }

    fn topic(&self) -> TopicId {
        self.reader.partition().topic()
    }

    fn has_more(&self) -> bool {
        !self.ahead.is_empty() || self.reader.has_more(self.next)
    }

    /// Forgets what lies before the next offset.
    fn skip_delivered(&mut self) {
        while self.ahead.front().is_some_and(|batch| batch.end() <= self.next) {
            self.ahead.pop_front();
        }
    }
}

struct Subscriber {
    shared: Arc<Shared>,
    _caller: Caller,
    scope: Scope,
    limit: usize,
    feeds: Vec<Feed>,
    /// Whose turn it is.
    next: usize,
    messages: Streaming<api::SubscribeRequest>,
    ended: Pin<Box<dyn Future<Output = Status> + Send>>,
    catalog: watch::Receiver<LogIndex>,
    /// Changes whenever keys die.
    deaths: watch::Receiver<u64>,
    /// The catalog has changed since the topics were looked at.
    outdated: bool,
    totals: api::CloseStream,
    closing: bool,
    _online: Online,
    _place: StreamPlace,
}

type Step = Option<(Result<Frame, Status>, Option<Subscriber>)>;

async fn step(stream: Option<Subscriber>) -> Step {
    let mut stream = stream?;
    match stream.next_frame().await {
        Ok(frame) if stream.closing => Some((Ok(frame), None)),
        Ok(frame) => Some((Ok(frame), Some(stream))),
        Err(status) => Some((Err(status), None)),
    }
}

/// What woke a stream that had nothing to deliver.
enum Woken {
    Events,
    Request(Box<Result<Option<api::SubscribeRequest>, Status>>),
    Catalog,
    Keys,
    Ended(Status),
}

impl Subscriber {
    async fn next_frame(&mut self) -> Result<Frame, Status> {
        loop {
            if let Some(status) = (&mut self.ended).now_or_never() {
                return Err(status);
            }
            // Acknowledgements are taken whenever they come, or their sender would block.
            while let Some(request) = self.messages.message().now_or_never() {
                if let Some(close) = self.take_request(request)? {
                    return Ok(close.into());
                }
            }
            self.follow_catalog().await?;
            self.follow_keys()?;
            if let Some(frame) = self.deliver().await? {
                return Ok(frame);
            }
            match self.wait().await {
                Woken::Events => {}
                Woken::Catalog => self.outdated = true,
                Woken::Keys => self.deaths.mark_changed(),
                Woken::Ended(status) => return Err(status),
                Woken::Request(request) => {
                    if let Some(close) = self.take_request(*request)? {
                        return Ok(close.into());
                    }
                }
            }
        }
    }

    /// Counts an answer; half-close is answered with the totals, and ends the stream.
    fn take_request(
        &mut self,
        request: Result<Option<api::SubscribeRequest>, Status>,
    ) -> Result<Option<Bytes>, Status> {
        match request? {
            None => {
                self.closing = true;
                self.totals.topics = self.feeds.iter().filter(|feed| feed.delivered).count() as u64;
                let embed = Some(api::subscribe_reply::Embed::CloseStream(self.totals));
                return Ok(Some(wire::message(&api::SubscribeReply { embed })));
            }
            Some(api::SubscribeRequest { embed: Some(api::subscribe_request::Embed::Ack(_)) }) => self.totals.acks += 1,
            Some(api::SubscribeRequest { embed: Some(api::subscribe_request::Embed::Nack(_)) }) => {
                self.totals.nacks += 1;
            }
            // A second subscription, or nothing at all: ignored, as ever.
            Some(_) => {}
        }
        Ok(None)
    }

    /// A stream for all topics takes those that are made while it lives, from their first event; destroyed ones leave it.
    async fn follow_catalog(&mut self) -> Result<(), Status> {
        if !std::mem::take(&mut self.outdated) && !self.catalog.has_changed().unwrap_or(false) {
            return Ok(());
        }
        self.catalog.mark_unchanged();
        let view = self.shared.parts.catalog.view();
        self.feeds.retain(|feed| view.topic(feed.topic()).is_some());
        if self.scope.is_open() {
            for topic in self.scope.topics(&self.shared) {
                if !self.feeds.iter().any(|feed| feed.topic() == topic.id) {
                    self.feeds.push(Feed::open(&self.shared, topic.id, Start::Earliest, Freshness::Known).await?);
                }
            }
        }
        if self.feeds.is_empty() {
            return Err(Status::failed_precondition(text::NO_TOPICS));
        }
        Ok(())
    }

    /// Who waits for the next event of a ring that was revoked as a whole is told that there will be none. A version that is
    /// revoked takes its own events only: who waits at the tail waits on.
    fn follow_keys(&mut self) -> Result<(), Status> {
        if !self.deaths.has_changed().unwrap_or(false) {
            return Ok(());
        }
        self.deaths.mark_unchanged();
        let mut refused = self.feeds.iter().filter_map(|feed| feed.reader.refuse_ring().err());
        refused.next().map_or(Ok(()), |error| Err(status::key_failed(&error)))
    }

    /// One batch of the next topic that has any, as frames; nothing when all are at their tails.
    async fn deliver(&mut self) -> Result<Option<Frame>, Status> {
        let ahead = ByteCount((READ_AHEAD / self.feeds.len().max(1) as u64).min(READ_AHEAD_TOPIC));
        for _ in 0..self.feeds.len() {
            self.next = (self.next + 1) % self.feeds.len();
            let feed = &mut self.feeds[self.next];
            if !feed.has_more() {
                continue;
            }
            feed.skip_delivered();
            if feed.ahead.is_empty() {
                let read = feed.reader.read(feed.next, ahead).await;
                feed.ahead = read.map_err(|error| status::read_failed(&error))?.into();
            }
            let Some(batch) = feed.ahead.pop_front() else { continue };
            if let Some((frame, events)) = feed.encode(&batch, self.limit).await? {
                self.totals.events += events;
                feed.delivered = true;
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    async fn wait(&mut self) -> Woken {
        let mut more: FuturesUnordered<_> = self.feeds.iter_mut().map(|feed| feed.reader.more(feed.next)).collect();
        tokio::select! {
            _ = more.next() => Woken::Events,
            request = self.messages.message() => Woken::Request(Box::new(request)),
            _ = self.catalog.changed() => Woken::Catalog,
            _ = self.deaths.changed() => Woken::Keys,
            status = &mut self.ended => Woken::Ended(status),
        }
    }
}

impl Feed {
    /// Opens a batch and encodes what of it is next, with the number of its events; nothing if none of them is delivered.
    async fn encode(&mut self, batch: &StoredBatch, limit: usize) -> Result<Option<(Frame, u64)>, Status> {
        let mut open = match self.reader.open(batch).await {
            Ok(open) => open,
            Err(error) => return Err(unreadable::status(&self.reader, &error, batch, &self.ahead).await),
        };
        let mut out = BytesMut::with_capacity(batch.sealed.len() + batch.count as usize * 96);
        let mut events = 0;
        let mut blocked = None;
        while let Some(event) = open.next() {
            if event.offset() < self.next || !event.has_event() {
                continue;
            }
            let wrapper = event.wrapper_len();
            let length = 1 + encoded_len_varint(wrapper as u64) + wrapper;
            if length > limit {
                blocked = Some((event.offset(), length));
                break;
            }
            wire::put_prefix(length, &mut out);
            // Field 1 of a reply: the event.
            out.put_u8(0x0a);
            encode_varint(wrapper as u64, &mut out);
            event.write_wrapper(&mut out);
            events += 1;
        }
        match blocked {
            // What precedes it is delivered first; the next round comes here again.
            Some((offset, _)) if events > 0 => self.next = offset,
            Some((offset, length)) => return Err(status::event_too_large(offset.0, length, limit)),
            None => self.next = batch.end(),
        }
        if self.next < batch.end() {
            self.ahead.push_front(batch.clone());
        }
        Ok((events > 0).then(|| (Frame::opened(out.freeze(), open.into_use()), events)))
    }
}
