//! EnSQL: a bounded scan of one topic, oldest event first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::{ByteCount, Offset, Permission, TopicName};
use futures::StreamExt as _;
use tonic::Status;
use tonic::body::Body;

use super::auth::{self, Need};
use super::opening::{self, Unopened};
use super::scope;
use super::subscribe::message_limit;
use super::wire::{self, Call, Frame};
use super::{OPENING_MAX, Shared, auth::Caller, consistency, unreadable};
use crate::catalog::{Topic, TopicState};
use crate::ensql::{self, Query};
use crate::partition::{Freshness, Reader, StoredBatch};
use crate::quota::StreamPlace;
use crate::status::{self, text};

/// How long a query waits to see everything that was committed before it.
const CATCH_UP: Duration = Duration::from_secs(5);

pub(super) fn serve(shared: Arc<Shared>, request: http::Request<Body>) -> http::Response<Body> {
    let (call, body) = wire::open(request);
    let frames = futures::stream::once(async move {
        match open(shared, call, body).await {
            Ok(scan) => futures::stream::unfold(Some(scan), step).left_stream(),
            Err(status) => futures::stream::iter([Err(status)]).right_stream(),
        }
    });
    wire::reply(frames.flatten().boxed())
}

async fn open(shared: Arc<Shared>, call: Call, mut body: Body) -> Result<Scan, Status> {
    let need = Need::Any(&[Permission::Subscriber, Permission::TopicsRead]);
    let caller = opening::authorize(&shared, &call, &mut body, need).await?;
    // The permission to read topics is enough for a query, and an operator's key has it; its promise is to carry no data.
    if shared.parts.catalog.view().api_key(caller.claims.subject).is_some_and(|key| key.admin) {
        return Err(Status::permission_denied(text::OPERATOR_READS_NO_EVENTS));
    }
    let place = opening::place(&shared.parts.quotas.meter(caller.project()?), &mut body).await?;
    let query = match opening::first(&mut wire::messages::<api::Query>(body, OPENING_MAX)).await {
        Ok(query) => query.ok_or_else(|| Status::invalid_argument("invalid query"))?,
        Err(Unopened::Late) => return Err(Status::deadline_exceeded("the query did not arrive in time")),
        Err(Unopened::TooLarge(status) | Unopened::Unreadable(status)) => return Err(status),
    };
    let freshness = consistency::of(query.consistency, Freshness::Latest)?;
    let (parsed, topic) = resolve(&shared, &caller, &query.query).await?;
    let partition = shared.parts.partitions.reach(topic.id, Duration::from_secs(5)).await;
    let scan = partition.map_err(status::not_served)?.scan(freshness, CATCH_UP).await;
    let (reader, extent) = scan.map_err(|error| status::read_failed(&error))?;
    let (log_start, end) = (extent.log_start, extent.high_watermark);
    // Offsets have no holes, so skipping is arithmetic.
    let next = Offset(log_start.0.saturating_add(parsed.offset).min(end.0));
    let ended = Box::pin(auth::ended(Arc::clone(&shared), caller));
    let left = parsed.limit.unwrap_or(u64::MAX);
    let limit = message_limit(&call, query.message_bytes_max);
    Ok(Scan { reader, next, end, left, ahead: VecDeque::new(), limit, ended, _place: place })
}

/// The query and the topic that it is for.
async fn resolve(shared: &Shared, caller: &Caller, text: &str) -> Result<(Query, Arc<Topic>), Status> {
    if text.is_empty() {
        return Err(Status::invalid_argument("invalid query"));
    }
    let query = ensql::parse(text).map_err(|error| status::invalid_query(&error))?;
    let project = caller.project()?;
    let find = |name: &str| {
        let name: TopicName = name.parse().ok()?;
        let topic = shared.parts.catalog.view().topic_by_name(project, &name);
        topic.filter(|topic| topic.state != TopicState::Deleting)
    };
    let mut topic = find(&query.from);
    if topic.is_none() {
        scope::refresh(shared).await;
        topic = find(&query.from);
    }
    if topic.is_none() && query.topic_prefixes().any(|prefix| find(prefix).is_some()) {
        let message = "selecting by schema is not supported yet; supported is SELECT * FROM topic [OFFSET n] [LIMIT n]";
        return Err(Status::unimplemented(message));
    }
    let topic = topic.ok_or_else(|| Status::invalid_argument(text::UNKNOWN_TOPIC_IN_QUERY))?;
    match query.unsupported() {
        Some(message) => Err(Status::unimplemented(message)),
        None => Ok((query, topic)),
    }
}

/// A scan in progress.
struct Scan {
    reader: Reader,
    next: Offset,
    /// Where it ends: the high watermark when it began.
    end: Offset,
    /// Events still wanted.
    left: u64,
    ahead: VecDeque<StoredBatch>,
    limit: usize,
    ended: std::pin::Pin<Box<dyn Future<Output = Status> + Send>>,
    _place: StreamPlace,
}

async fn step(scan: Option<Scan>) -> Option<(Result<Frame, Status>, Option<Scan>)> {
    let mut scan = scan?;
    let frame = tokio::select! {
        biased;
        status = &mut scan.ended => Some(Err(status)),
        frame = next_frame(&mut scan.reader, &mut scan.next, scan.end, &mut scan.left, &mut scan.ahead, scan.limit) => {
            frame.transpose()
        }
    };
    match frame? {
        Ok(frame) => Some((Ok(frame), Some(scan))),
        Err(status) => Some((Err(status), None)),
    }
}

/// The next batch's events as frames; nothing at the end.
async fn next_frame(
    reader: &mut Reader,
    next: &mut Offset,
    end: Offset,
    left: &mut u64,
    ahead: &mut VecDeque<StoredBatch>,
    limit: usize,
) -> Result<Option<Frame>, Status> {
    while *left > 0 && *next < end {
        if ahead.is_empty() {
            let read = reader.read(*next, ByteCount(1 << 20)).await;
            *ahead = read.map_err(|error| status::read_failed(&error))?.into();
        }
        let Some(batch) = ahead.pop_front() else { return Ok(None) };
        let mut open = match reader.open(&batch).await {
            Ok(open) => open,
            Err(error) => return Err(unreadable::status(reader, &error, &batch, ahead).await),
        };
        let mut out = BytesMut::with_capacity(batch.sealed.len() + batch.count as usize * 96);
        let mut blocked = None;
        while let Some(event) = open.next().filter(|event| event.offset() < end) {
            if event.offset() < *next || !event.has_event() {
                continue;
            }
            if *left == 0 {
                break;
            }
            let length = event.wrapper_len();
            if length > limit {
                blocked = Some((event.offset(), length));
                break;
            }
            wire::put_prefix(length, &mut out);
            event.write_wrapper(&mut out);
            *left -= 1;
        }
        *next = batch.end();
        if let Some((offset, length)) = blocked {
            if out.is_empty() {
                return Err(status::event_too_large(offset.0, length, limit));
            }
            *next = offset;
            ahead.push_front(batch);
        }
        if !out.is_empty() {
            return Ok(Some(Frame::opened(out.freeze(), open.into_use())));
        }
    }
    Ok(None)
}
