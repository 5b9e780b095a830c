//! Keeps a publish stream open: connects, hands out answers, connects again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::ensign::v1beta1 as pb;
use ensign_proto::pb::ensign::v1beta1::ensign_client::EnsignClient;
use ensign_proto::pb::ensign::v1beta1::publisher_reply::Embed;
use ensign_proto::{Offset, TopicId};
use futures::StreamExt as _;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tonic::{Code, Status, Streaming};
use tracing::{info, warn};

use super::outgoing::{Outgoing, Start};
use super::window::Freed;
use super::{Ack, PublishError, Shared, new_session};
use crate::backoff::Backoff;
use crate::client::Client;
use crate::connection::{Connection, MESSAGE_BYTES_MAX};
use crate::error::{CallError, is_broken_connection};
use crate::event::from_timestamp;

/// How many answers are handed out under one lock.
const CHUNK: usize = 256;
/// How often deadlines are looked at.
const EXPIRY: Duration = Duration::from_millis(100);
/// How long a server may take to answer the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long an orderly end may take once everything is acknowledged.
const FAREWELL: Duration = Duration::from_secs(5);

type Replies = Streaming<pb::PublisherReply>;

pub(super) struct Driver {
    client: Client,
    handshake: pb::OpenStream,
    shared: Arc<Shared>,
    replies: Replies,
    /// What the last stream ended with, until the next one brings an answer.
    trouble: Option<CallError>,
}

/// A stream whose handshake is done; nothing was published on it yet.
struct Opened {
    replies: Replies,
    topic: TopicId,
    start: tokio::sync::oneshot::Sender<Start>,
}

/// How a stream ended.
enum End {
    /// As the publisher wished.
    Closed,
    /// Otherwise. What is not acknowledged goes to the next stream.
    Broken(CallError),
}

impl Driver {
    /// Opens the first stream, for as long as one call may take. `shared` makes the common state once the topic is known.
    pub(super) async fn connect(
        client: Client,
        mut handshake: pb::OpenStream,
        shared: impl FnOnce(TopicId) -> Shared,
    ) -> Result<(Self, Arc<Shared>), CallError> {
        let deadline = Instant::now() + client.connection().call_timeout();
        let mut backoff = Backoff::reconnect();
        let mut rejected = false;
        let opened = loop {
            match open(client.connection(), &handshake).await {
                Ok(opened) => break opened,
                // A token that was good a moment ago may have aged: `open` has dropped it.
                Err(CallError::Unauthenticated { .. }) if !rejected => rejected = true,
                Err(error) => {
                    let pause = backoff.delay();
                    if !error.is_transient() || Instant::now() + pause > deadline {
                        return Err(error);
                    }
                    sleep(pause).await;
                }
            }
        };
        // From here on by id: a topic of the same name that replaces this one is another topic.
        handshake.topics = vec![opened.topic.to_string()];
        let shared = Arc::new(shared(opened.topic));
        begin(&shared, opened.start);
        Ok((Self { client, handshake, shared: Arc::clone(&shared), replies: opened.replies, trouble: None }, shared))
    }

    /// Runs until the publisher closes or no stream can help.
    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::reconnect();
        loop {
            let progress = self.shared.window().first();
            let error = match self.pump().await {
                End::Closed => return self.shared.end(PublishError::Closed),
                End::Broken(error) => error,
            };
            if self.shared.window().first() > progress {
                backoff.reset();
            }
            if let CallError::SessionForgotten { after_ms, .. } = &error {
                if let Err(error) = self.renew_session(*after_ms, &error) {
                    return self.shared.end(PublishError::Stream(error));
                }
            } else if let CallError::QuotaSpent { message } = &error {
                self.refuse(&PublishError::QuotaSpent { message: message.clone() }, &error);
                backoff.reset();
            } else if is_final(&error) {
                return self.shared.end(PublishError::Stream(error));
            }
            info!(%error, topic = %self.shared.topic, "publish stream broke; opening another");
            self.trouble = Some(error);
            if let Err(error) = self.reconnect(&mut backoff).await {
                return self.shared.end(PublishError::Stream(error));
            }
        }
    }

    /// The partition has forgotten the session, as it does after an hour without events. Events that an earlier stream may
    /// have stored cannot be told from new ones any more; the others go on under a new session.
    fn renew_session(&mut self, after_ms: u64, error: &CallError) -> Result<(), CallError> {
        let session = new_session(after_ms)?;
        self.handshake.producer_session = Bytes::copy_from_slice(session.as_bytes());
        self.handshake.producer_epoch = 1;
        let mut freed = Freed::default();
        self.shared.window().give_up_repeated(error, &mut freed);
        self.shared.free(freed);
        info!(topic = %self.shared.topic, "publishing under a new session");
        Ok(())
    }

    /// Answers every event with `refusal`: waiting would not change it. Not those that an earlier stream may have stored.
    fn refuse(&self, refusal: &PublishError, error: &CallError) {
        let mut freed = Freed::default();
        self.shared.window().refuse(refusal, error, &mut freed);
        self.shared.free(freed);
    }

    /// Hands out answers until the stream ends.
    async fn pump(&mut self) -> End {
        let mut expiry = interval(EXPIRY);
        expiry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut chunks = (&mut self.replies).ready_chunks(CHUNK);
        let mut farewell: Option<Instant> = None;
        loop {
            tokio::select! {
                chunk = chunks.next() => {
                    let Some(chunk) = chunk else {
                        if self.shared.window().closing {
                            return End::Closed;
                        }
                        return End::Broken(CallError::Unavailable { message: "the server ended the stream".to_owned() });
                    };
                    if let Err(error) = take_answers(&self.shared, chunk) {
                        return End::Broken(error);
                    }
                    self.trouble = None;
                }
                _ = expiry.tick() => {
                    expire(&self.shared, self.trouble.as_ref());
                    if self.shared.window().closing {
                        let until = *farewell.get_or_insert_with(|| Instant::now() + FAREWELL);
                        if Instant::now() > until {
                            return End::Closed;
                        }
                    }
                }
            }
        }
    }

    /// Opens the next stream, however long that takes; meanwhile deadlines go on passing.
    async fn reconnect(&mut self, backoff: &mut Backoff) -> Result<(), CallError> {
        let mut rejected = false;
        loop {
            let pause = backoff.delay();
            let attempt = async {
                sleep(pause).await;
                open(self.client.connection(), &self.handshake).await
            };
            tokio::pin!(attempt);
            let mut expiry = interval(EXPIRY);
            let outcome = loop {
                tokio::select! {
                    outcome = &mut attempt => break outcome,
                    _ = expiry.tick() => expire(&self.shared, self.trouble.as_ref()),
                }
            };
            match outcome {
                Ok(opened) if opened.topic == self.shared.topic => {
                    begin(&self.shared, opened.start);
                    self.replies = opened.replies;
                    return Ok(());
                }
                Ok(_) => return Err(CallError::protocol("the server opened the stream for another topic")),
                // As in `connect`.
                Err(CallError::Unauthenticated { .. }) if !rejected => rejected = true,
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => {
                    info!(%error, "no publish stream yet");
                    self.trouble = Some(error);
                }
            }
        }
    }
}

fn begin(shared: &Arc<Shared>, start: tokio::sync::oneshot::Sender<Start>) {
    let generation = shared.window().rewind();
    // The request half has gone only if the stream broke already, which its replies will tell.
    let _ = start.send(Start { shared: Arc::clone(shared), generation });
}

fn expire(shared: &Shared, cause: Option<&CallError>) {
    let mut freed = Freed::default();
    {
        let mut window = shared.window();
        if window.oldest_deadline().is_none_or(|deadline| deadline > Instant::now()) {
            return;
        }
        window.expire(Instant::now(), cause, &mut freed);
    }
    shared.free(freed);
}

fn take_answers(shared: &Shared, chunk: Vec<Result<pb::PublisherReply, Status>>) -> Result<(), CallError> {
    let mut freed = Freed::default();
    let mut verdict = Ok(());
    {
        let mut window = shared.window();
        for reply in chunk {
            let reply = match reply {
                Ok(reply) => reply,
                Err(status) => {
                    verdict = Err(status.into());
                    break;
                }
            };
            let known = match reply.embed {
                Some(Embed::Ack(ack)) => {
                    let offset = (ack.offset > 0).then_some(Offset(ack.offset));
                    let outcome = Ack { committed: ack.committed.and_then(from_timestamp), offset };
                    window.settle(&ack.id, Ok(outcome), &mut freed)
                }
                Some(Embed::Nack(nack)) => {
                    let code = nack.code();
                    window.settle(&nack.id, Err(PublishError::Refused { code, message: nack.error }), &mut freed)
                }
                Some(Embed::CloseStream(totals)) => {
                    info!(?totals, "publish stream closes");
                    true
                }
                Some(Embed::Ready(_)) | None => true,
            };
            if !known {
                warn!(topic = %shared.topic, "the server answered an event that was not sent");
            }
        }
    }
    shared.free(freed);
    verdict
}

/// Whether another stream would end the same way.
fn is_final(error: &CallError) -> bool {
    use crate::token::AuthError;
    match error {
        CallError::Unavailable { .. }
        | CallError::OutcomeUnknown { .. }
        | CallError::SessionForgotten { .. }
        | CallError::Exhausted { .. }
        | CallError::QuotaSpent { .. }
        | CallError::Internal { .. }
        | CallError::Auth(AuthError::Unreachable { .. } | AuthError::Malformed { .. }) => false,
        CallError::Auth(AuthError::Refused { .. })
        | CallError::Unauthenticated { .. }
        | CallError::PermissionDenied { .. }
        | CallError::NotFound { .. }
        | CallError::AlreadyExists { .. }
        | CallError::Invalid { .. }
        | CallError::Precondition { .. }
        | CallError::OutOfRange { .. }
        | CallError::Unimplemented { .. }
        | CallError::DataLoss { .. } => true,
    }
}

async fn open(connection: &Connection, handshake: &pb::OpenStream) -> Result<Opened, CallError> {
    let (outgoing, start) = Outgoing::new(handshake.clone());
    let bearer = connection.tokens.bearer().await?;
    let (number, channel) = connection.channel();
    let mut rpc = EnsignClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let exchange = async {
        let mut replies = rpc.publish(Connection::authorize(outgoing, bearer.clone())).await?.into_inner();
        Ok::<_, Status>((replies.message().await?, replies))
    };
    let status = match timeout(HANDSHAKE, exchange).await {
        Ok(Ok((Some(pb::PublisherReply { embed: Some(Embed::Ready(ready)) }), replies))) => {
            return Ok(Opened { replies, topic: the_topic(&ready)?, start });
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

/// The one topic that a stream was opened for.
pub(crate) fn the_topic(ready: &pb::StreamReady) -> Result<TopicId, CallError> {
    let mut topics = ready.topics.values();
    match (topics.next(), topics.next()) {
        (Some(id), None) => TopicId::try_from(&id[..]).map_err(|error| CallError::protocol(error.to_string())),
        (None, _) => Err(CallError::protocol("the server opened the stream for no topic")),
        (Some(_), Some(_)) => {
            Err(CallError::protocol("the server opened the stream for more topics than were asked for"))
        }
    }
}
