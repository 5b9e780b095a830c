//! How calls begin: the caller is known before anything of what it sends is kept, and what it opens a stream with is small.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::StreamExt as _;
use hyper::body::{Body as _, Frame};
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::{Status, Streaming};

use super::auth::{self, Caller, Need};
use super::wire::Call;
use super::{OPENING_MAX, Shared};
use crate::quota::{Meter, StreamPlace};
use crate::status;

/// How long the first message of a stream, and the only one of another call, may take.
pub(super) const OPENING: Duration = Duration::from_secs(30);

/// How long the first bytes of a caller that is refused are waited for.
const LINGER: Duration = Duration::from_secs(1);

/// The longest name that a client gives itself, in bytes.
const CLIENT_ID_MAX: usize = 512;

/// The longest user agent that is kept, in bytes.
const USER_AGENT_MAX: usize = 512;

/// Lets a caller in who may do what it asks for; of any other no message is read.
pub(super) async fn authorize(shared: &Shared, call: &Call, body: &mut Body, need: Need) -> Result<Caller, Status> {
    let caller = auth::authorize(shared, &call.metadata, need).await;
    let caller = caller.and_then(|caller| caller.project().map(|_| caller));
    if caller.is_err() {
        linger(body).await;
    }
    caller
}

/// A place among the streams of the caller's project, for as long as it is kept.
///
/// # Errors
/// RESOURCE_EXHAUSTED: there are too many.
pub(super) async fn place(meter: &Meter, body: &mut Body) -> Result<StreamPlace, Status> {
    let place = meter.open_stream().map_err(|error| status::quota_exhausted(&error));
    if place.is_err() {
        linger(body).await;
    }
    place
}

/// Waits a moment for the first bytes of a refused call, and drops them: a client that has not sent them yet would miss the reason.
pub(crate) async fn linger(body: &mut Body) {
    // Late, or gone: it is answered all the same.
    let _ = tokio::time::timeout(LINGER, frame(body)).await;
}

async fn frame(body: &mut Body) -> Option<Result<Frame<bytes::Bytes>, Status>> {
    std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await
}

/// Why a call has no first message.
#[derive(Debug)]
pub(super) enum Unopened {
    /// It did not come in time.
    Late,
    /// It has more bytes than a first message may have.
    TooLarge(Status),
    /// It is no message, or the client went away.
    Unreadable(Status),
}

/// The first message of a call; none if the client has closed its side without one.
pub(super) async fn first<T>(messages: &mut Streaming<T>) -> Result<Option<T>, Unopened> {
    first_within(messages, OPENING).await
}

async fn first_within<T>(messages: &mut Streaming<T>, patience: Duration) -> Result<Option<T>, Unopened> {
    match tokio::time::timeout(patience, messages.next()).await {
        Err(_) => Err(Unopened::Late),
        Ok(None) => Ok(None),
        Ok(Some(Ok(message))) => Ok(Some(message)),
        Ok(Some(Err(status))) if status.code() == tonic::Code::InvalidArgument => Err(Unopened::TooLarge(status)),
        Ok(Some(Err(status))) => Err(Unopened::Unreadable(status)),
    }
}

/// A body whose first message has at most [`OPENING_MAX`] bytes.
pub(super) fn limited(body: Body) -> Body {
    Body::new(Limited { body, prefix: [0; 5], seen: 0 })
}

struct Limited {
    body: Body,
    /// Of the first message: whether it is compressed, and its length.
    prefix: [u8; 5],
    seen: usize,
}

impl Limited {
    fn look(&mut self, data: &[u8]) -> Result<(), Status> {
        let wanted = (self.prefix.len() - self.seen).min(data.len());
        self.prefix[self.seen..self.seen + wanted].copy_from_slice(&data[..wanted]);
        self.seen += wanted;
        let [_, length @ ..] = self.prefix;
        let length = u32::from_be_bytes(length) as usize;
        if self.seen < self.prefix.len() || length <= OPENING_MAX {
            return Ok(());
        }
        let message = format!("the first message of this call has {length} bytes, and may have {OPENING_MAX} at most");
        Err(Status::invalid_argument(message))
    }
}

impl hyper::body::Body for Limited {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && self.seen < self.prefix.len()
        {
            self.look(data)?;
        }
        Poll::Ready(frame)
    }
}

/// A body that has to arrive in time.
pub(crate) fn timely(body: Body) -> Body {
    timely_within(body, OPENING)
}

fn timely_within(body: Body, patience: Duration) -> Body {
    Body::new(Timely { body, patience, deadline: Box::pin(tokio::time::sleep(patience)) })
}

struct Timely {
    body: Body,
    patience: Duration,
    deadline: Pin<Box<tokio::time::Sleep>>,
}

impl hyper::body::Body for Timely {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame);
        }
        ready!(self.deadline.as_mut().poll(cx));
        let message = format!("the request did not arrive within {:?}", self.patience);
        Poll::Ready(Some(Err(Status::deadline_exceeded(message))))
    }
}

/// The name that a client gives itself: it goes with every batch of its events.
pub(super) fn check_client_id(client_id: &str) -> Result<(), Status> {
    if client_id.len() <= CLIENT_ID_MAX {
        return Ok(());
    }
    let length = client_id.len();
    let message = format!("invalid client id field: it has {length} bytes, and may have {CLIENT_ID_MAX} at most");
    Err(Status::invalid_argument(message))
}

/// What the client's software calls itself, cut to what is kept.
pub(super) fn user_agent(metadata: &MetadataMap) -> String {
    let agents: Vec<_> = metadata.get_all("user-agent").iter().filter_map(|value| value.to_str().ok()).collect();
    let mut agent = agents.join(",");
    // Header values that read as text are ASCII.
    agent.truncate(agent.floor_char_boundary(USER_AGENT_MAX));
    agent
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use bytes::Bytes;
    use ensign_proto::pb::ensign::v1beta1 as api;
    use prost::Message as _;

    use super::super::{REQUEST_MAX, wire};
    use super::*;

    /// A body of these pieces, after which nothing more comes, not even its end.
    struct Pieces(VecDeque<Bytes>);

    impl hyper::body::Body for Pieces {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0.pop_front().map_or(Poll::Pending, |piece| Poll::Ready(Some(Ok(Frame::data(piece)))))
        }
    }

    fn body(pieces: Vec<Bytes>) -> Body {
        Body::new(Pieces(pieces.into()))
    }

    fn silent() -> Body {
        body(Vec::new())
    }

    fn query(length: usize) -> api::Query {
        // Two bytes of tag and type, three of length.
        api::Query { query: "q".repeat(length - 4), ..Default::default() }
    }

    #[tokio::test]
    async fn a_first_message_of_the_largest_size_is_taken_and_a_larger_one_is_not_even_awaited() {
        let largest = wire::message(&query(OPENING_MAX));
        assert_eq!(largest.len(), 5 + OPENING_MAX);
        // However it is cut, and whatever follows in the same frame.
        let follows = [largest.clone(), wire::message(&query(1 << 20))].concat();
        for pieces in [vec![follows.clone().into()], follows.chunks(3).map(Bytes::copy_from_slice).collect()] {
            let mut messages = wire::messages::<api::Query>(body(pieces), REQUEST_MAX);
            let taken = first(&mut messages).await.unwrap().unwrap();
            assert_eq!(taken.encoded_len(), OPENING_MAX);
            assert_eq!(messages.message().await.unwrap().unwrap().encoded_len(), 1 << 20);
        }
        let prefix = wire::message(&query(OPENING_MAX + 1)).slice(..5);
        for piece in [1, 5] {
            // Its bytes never come.
            let pieces = prefix.chunks(piece).map(Bytes::copy_from_slice).collect();
            let mut messages = wire::messages::<api::Query>(body(pieces), REQUEST_MAX);
            let Err(Unopened::TooLarge(status)) = first(&mut messages).await else { panic!("taken") };
            let expected = "the first message of this call has 65537 bytes, and may have 65536 at most";
            assert_eq!(status.message(), expected);
        }
    }

    #[tokio::test]
    async fn nobody_is_waited_for_for_ever() {
        let patience = Duration::from_millis(1);
        let late = first_within(&mut wire::messages::<api::Query>(silent(), REQUEST_MAX), patience).await;
        assert!(matches!(late, Err(Unopened::Late)));
        let Some(Err(status)) = frame(&mut timely_within(silent(), patience)).await else {
            panic!("a frame, or an end")
        };
        assert_eq!(status.message(), "the request did not arrive within 1ms");
        linger(&mut silent()).await;
    }

    #[test]
    fn what_a_client_says_about_itself_is_short() {
        assert!(check_client_id(&"c".repeat(512)).is_ok());
        let status = check_client_id(&"c".repeat(513)).unwrap_err();
        assert_eq!(status.message(), "invalid client id field: it has 513 bytes, and may have 512 at most");
        let mut metadata = MetadataMap::new();
        for _ in 0..3 {
            metadata.append("user-agent", "a".repeat(300).parse().unwrap());
        }
        let agent = user_agent(&metadata);
        assert_eq!((agent.len(), agent.matches(',').count()), (512, 1));
    }
}
