//! Subscribing: every event of a topic, in order, once, across broken connections.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ensign_proto::pb::ensign::v1beta1 as pb;
use ensign_proto::pb::ensign::v1beta1::subscribe_reply::Embed;
use ensign_proto::pb::ensign::v1beta1::subscribe_request::Embed as Asked;
use ensign_proto::{Offset, Rlid, TopicId};
use futures::StreamExt as _;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status, Streaming};
use tracing::info;

use crate::backoff::Backoff;
use crate::client::Client;
use crate::connection::{Connection, MESSAGE_BYTES_MAX};
use crate::consistency::Consistency;
use crate::error::{CallError, is_broken_connection};
use crate::event::{Delivery, to_timestamp};
use crate::publish::the_topic;

/// How long a server may take to answer the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Where a subscription begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With what is committed from now on.
    Live,
    /// With the oldest event there is.
    Earliest,
    /// With the event at this offset.
    Offset(Offset),
    /// With the first event committed at this time or later.
    Time(SystemTime),
    /// With the event that follows this one.
    After(Rlid),
}

/// How a subscriber behaves.
#[derive(Debug, Clone)]
pub struct SubscriberOptions {
    /// How long [`Subscriber::next`] tries to reach a server before it reports that it cannot.
    pub patience: Duration,
    /// How fresh the place is that a live subscription begins at. Whatever it is, no event after that place is missed.
    pub consistency: Consistency,
}

impl Default for SubscriberOptions {
    fn default() -> Self {
        Self { patience: Duration::from_mins(1), consistency: Consistency::Default }
    }
}

/// Why there is no next event.
#[derive(Debug, Clone, Error)]
pub enum SubscribeError {
    /// No server could be reached for a while. Calling [`Subscriber::next`] again goes on where it was.
    #[error("cannot reach the cluster: {0}")]
    Unavailable(#[source] CallError),
    /// Retention has passed the place we were at: subscribe anew, from [`Start::Earliest`].
    #[error("{message}")]
    Trimmed {
        /// The server's words.
        message: String,
    },
    /// The subscription cannot go on, and another would end the same way.
    #[error("cannot subscribe: {0}")]
    Stream(#[source] CallError),
    /// The server skipped events. It promises not to; nothing was delivered in their place.
    #[error("expected the event at offset {expected}, got {found}")]
    Gap {
        /// What had to come.
        expected: Offset,
        /// What came.
        found: Offset,
    },
}

/// A subscription to one topic. It reconnects by itself and goes on after the last event it returned.
pub struct Subscriber {
    client: Client,
    topic: TopicId,
    options: SubscriberOptions,
    /// Where to begin if the stream breaks.
    resume: Start,
    /// The offset that has to come next, once we know one.
    expected: Option<Offset>,
    replies: Option<Streaming<pb::SubscribeReply>>,
    /// Between streams that break before they deliver anything.
    backoff: Backoff,
    ended: Option<SubscribeError>,
}

impl std::fmt::Debug for Subscriber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscriber").field("topic", &self.topic).field("resume", &self.resume).finish_non_exhaustive()
    }
}

impl Subscriber {
    pub(crate) async fn open(
        client: Client,
        topic: &str,
        start: Start,
        options: SubscriberOptions,
    ) -> Result<Self, SubscribeError> {
        let deadline = Instant::now() + client.connection().call_timeout();
        let opened = open_patiently(&client, topic, start, options.consistency, deadline).await?;
        let mut subscriber = Self {
            client,
            topic: opened.topic,
            options,
            resume: start,
            expected: None,
            replies: None,
            backoff: Backoff::reconnect(),
            ended: None,
        };
        subscriber.begin(opened);
        Ok(subscriber)
    }

    fn begin(&mut self, opened: Opened) {
        self.replies = Some(opened.replies);
        match (self.resume, opened.next) {
            (Start::Offset(offset), _) => self.expected = Some(offset),
            // From now on the place is known, whatever happens to the stream.
            (Start::Live, Some(next)) => (self.expected, self.resume) = (Some(next), Start::Offset(next)),
            (Start::Live | Start::Earliest | Start::Time(_) | Start::After(_), _) => {}
        }
    }

    /// The topic that this is subscribed to.
    pub fn topic(&self) -> TopicId {
        self.topic
    }

    /// Waits for the next event. Cancel safe.
    ///
    /// A subscription from [`Start::Live`] that loses its stream before the first event starts live again where the server
    /// does not say at which offset it began.
    ///
    /// # Errors
    /// [`SubscribeError`]; after [`SubscribeError::Unavailable`] it may be called again.
    pub async fn next(&mut self) -> Result<Delivery, SubscribeError> {
        loop {
            if let Some(error) = &self.ended {
                return Err(error.clone());
            }
            if let Some(replies) = &mut self.replies {
                let reply = replies.message().await;
                match self.take(reply) {
                    Ok(Some(delivery)) => return Ok(delivery),
                    Ok(None) => continue,
                    Err(error) => {
                        self.replies = None;
                        let Some(error) = final_error(&error) else {
                            info!(%error, topic = %self.topic, "subscription broke; opening another");
                            continue;
                        };
                        self.ended = Some(error);
                        continue;
                    }
                }
            }
            sleep(self.backoff.delay()).await;
            let deadline = Instant::now() + self.options.patience;
            // The place is known by now, or was never asked to be fresher than this.
            let consistency = self.expected.map_or(self.options.consistency, |_| Consistency::Default);
            match open_patiently(&self.client, &self.topic.to_string(), self.resume, consistency, deadline).await {
                Ok(opened) => self.begin(opened),
                Err(error @ SubscribeError::Unavailable(_)) => return Err(error),
                Err(error) => self.ended = Some(error),
            }
        }
    }

    /// `Ok(None)`: nothing to deliver, go on. `Err`: this stream has ended.
    fn take(&mut self, reply: Result<Option<pb::SubscribeReply>, Status>) -> Result<Option<Delivery>, CallError> {
        let Some(reply) = reply? else {
            return Err(CallError::Unavailable { message: "the server ended the stream".to_owned() });
        };
        let Some(Embed::Event(wrapper)) = reply.embed else { return Ok(None) };
        let delivery = Delivery::try_from(wrapper).map_err(CallError::protocol)?;
        if let Some(expected) = self.expected {
            if delivery.offset < expected {
                info!(offset = %delivery.offset, "the server repeated an event");
                return Ok(None);
            }
            if delivery.offset > expected {
                self.ended = Some(SubscribeError::Gap { expected, found: delivery.offset });
                return Ok(None);
            }
        }
        self.backoff.reset();
        let next = delivery.offset.plus(1);
        (self.expected, self.resume) = (Some(next), Start::Offset(next));
        Ok(Some(delivery))
    }
}

/// The subscriber's own error, if another stream would not help.
fn final_error(error: &CallError) -> Option<SubscribeError> {
    use crate::token::AuthError;
    match error {
        CallError::Unavailable { .. }
        | CallError::OutcomeUnknown { .. }
        | CallError::SessionForgotten { .. }
        | CallError::Exhausted { .. }
        | CallError::QuotaSpent { .. }
        | CallError::Unauthenticated { .. }
        | CallError::Internal { .. }
        | CallError::Auth(AuthError::Unreachable { .. } | AuthError::Malformed { .. }) => None,
        CallError::OutOfRange { message } => Some(SubscribeError::Trimmed { message: message.clone() }),
        CallError::Auth(AuthError::Refused { .. })
        | CallError::PermissionDenied { .. }
        | CallError::NotFound { .. }
        | CallError::AlreadyExists { .. }
        | CallError::Invalid { .. }
        | CallError::Precondition { .. }
        | CallError::Unimplemented { .. }
        | CallError::DataLoss { .. } => Some(SubscribeError::Stream(error.clone())),
    }
}

/// A stream whose handshake is done.
struct Opened {
    topic: TopicId,
    /// The first offset that a live stream will deliver, where the server says.
    next: Option<Offset>,
    replies: Streaming<pb::SubscribeReply>,
}

async fn open_patiently(
    client: &Client,
    topic: &str,
    start: Start,
    consistency: Consistency,
    deadline: Instant,
) -> Result<Opened, SubscribeError> {
    let mut backoff = Backoff::reconnect();
    let mut rejected = false;
    loop {
        let error = match open(client.connection(), topic, start, consistency).await {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        if let Some(error) = final_error(&error) {
            return Err(error);
        }
        // The token may just have aged; a second fresh one will not be liked better.
        if matches!(error, CallError::Unauthenticated { .. }) && std::mem::replace(&mut rejected, true) {
            return Err(SubscribeError::Stream(error));
        }
        let pause = backoff.delay();
        if Instant::now() + pause > deadline {
            return Err(SubscribeError::Unavailable(error));
        }
        sleep(pause).await;
    }
}

async fn open(
    connection: &Connection,
    topic: &str,
    start: Start,
    consistency: Consistency,
) -> Result<Opened, CallError> {
    let subscription = pb::Subscription {
        client_id: connection.client_id.clone(),
        topics: vec![topic.to_owned()],
        start: wire(start)?,
        message_bytes_max: MESSAGE_BYTES_MAX as u32,
        consistency: consistency.to_wire(),
        ..pb::Subscription::default()
    };
    let request = pb::SubscribeRequest { embed: Some(Asked::Subscription(subscription)) };
    // The request half stays open: closing it ends the subscription.
    let requests = futures::stream::iter([request]).chain(futures::stream::pending());
    let bearer = connection.tokens.bearer().await?;
    let (number, channel) = connection.channel();
    let mut rpc = Client::rpc(channel);
    let exchange = async {
        let mut replies = rpc.subscribe(Connection::authorize(requests, bearer.clone())).await?.into_inner();
        Ok::<_, Status>((replies.message().await?, replies))
    };
    let status = match timeout(HANDSHAKE, exchange).await {
        Ok(Ok((Some(pb::SubscribeReply { embed: Some(Embed::Ready(ready)) }), replies))) => {
            let topic = the_topic(&ready)?;
            let next = ready.next_offsets.into_values().next().filter(|next| *next > 0).map(Offset);
            return Ok(Opened { topic, next, replies });
        }
        Ok(Ok((None, _))) => Status::unavailable("the server ended the stream at once"),
        Ok(Ok((Some(_), _))) => return Err(CallError::protocol("the server's first reply is not `ready`")),
        Ok(Err(status)) => status,
        Err(_) => {
            connection.avoid(number);
            Status::unavailable(format!("the server did not answer within {HANDSHAKE:?}"))
        }
    };
    if status.code() == Code::Unauthenticated {
        connection.tokens.reject(&bearer);
    }
    if status.code() == Code::Unavailable || is_broken_connection(&status) {
        connection.avoid(number);
    }
    Err(status.into())
}

fn wire(start: Start) -> Result<Option<pb::subscription::Start>, CallError> {
    use pb::subscription::Start as Wire;
    Ok(match start {
        Start::Live => None,
        Start::Earliest => Some(Wire::Earliest(true)),
        Start::Offset(offset) => Some(Wire::Offset(offset.0)),
        Start::Time(time) => {
            let time = to_timestamp(time)
                .ok_or_else(|| CallError::Invalid { message: "the start time is before 1970".to_owned() })?;
            Some(Wire::Time(time))
        }
        Start::After(id) => Some(Wire::AfterEvent(Bytes::copy_from_slice(id.as_bytes()))),
    })
}
