//! Publishing: events in, acknowledgements out, in order, across broken connections.
//!
//! A [`Publisher`] numbers its events within a session of its own. When a stream breaks it opens another, to another node if
//! need be, and sends again everything that is not acknowledged, under the same numbers: the server stores each number once.
//! So an event that [`Publisher::publish`] accepted is stored exactly once, or its [`Receipt`] says why not, or says that
//! nobody knows ([`PublishError::OutcomeUnknown`]) when its deadline passes first.

mod driver;
mod outgoing;
mod window;

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ensign_proto::pb::ensign::v1beta1 as pb;
use ensign_proto::{Offset, SessionId, TopicId};
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::Client;
use crate::error::CallError;
use crate::event::{EVENT_BYTES_MAX, Event, wall_now};

pub(crate) use self::driver::the_topic;

use self::driver::Driver;
use self::window::{Entry, Freed, Outcome, Window};

/// What an event costs of the window besides its own bytes.
const OVERHEAD: usize = 128;

/// How a publisher behaves.
#[derive(Debug, Clone)]
pub struct PublisherOptions {
    /// How many events may wait for their acknowledgement; `publish` waits beyond that. At least 1.
    pub window_events: usize,
    /// How many bytes may wait for their acknowledgement. One event always fits.
    pub window_bytes: usize,
    /// How long an event is sent again and again before its receipt says that it failed.
    pub deadline: Duration,
    /// The producer session, whose first 48 bits are the millisecond it was made at: give one to continue the numbering rules of an earlier publisher with a higher `epoch`.
    pub session: Option<SessionId>,
    /// Which life of the session this is, from 1. The server refuses lower epochs once it has seen a higher one.
    pub epoch: u32,
}

impl Default for PublisherOptions {
    fn default() -> Self {
        Self { window_events: 4_096, window_bytes: 32 << 20, deadline: Duration::from_mins(1), session: None, epoch: 1 }
    }
}

/// An event is stored: synced by a majority of the topic's replicas.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ack {
    /// When, by the leader's clock.
    pub committed: Option<SystemTime>,
    /// Where. `None` from servers that do not say.
    pub offset: Option<Offset>,
}

/// Why an event was not, or may not have been, stored.
#[derive(Debug, Clone, Error)]
pub enum PublishError {
    /// It is larger than any server accepts. Nothing was sent.
    #[error("the event has {size} bytes; at most {limit} are accepted")]
    TooLarge {
        /// Its encoded size.
        size: usize,
        /// The most there may be.
        limit: usize,
    },
    /// The server refused it, and it is certain not to be stored.
    #[error("{message}")]
    Refused {
        /// The reason, for programs.
        code: pb::nack::Code,
        /// The reason, for people.
        message: String,
    },
    /// A quota of the project is used up, and time alone does not help. It is certain not to be stored; the publisher goes on with
    /// later events.
    #[error("{message}")]
    QuotaSpent {
        /// The server's words.
        message: String,
    },
    /// It was sent, but no answer came before the deadline, or before the stream ended for good: it may be stored, or may yet
    /// be.
    #[error("the event may or may not be stored: {}", .cause.as_ref().map_or("no acknowledgement came before the deadline".to_owned(), ToString::to_string))]
    OutcomeUnknown {
        /// What the last stream ended with; `None` where one was open at the deadline.
        cause: Option<CallError>,
    },
    /// The deadline passed before it could be sent. It is not stored.
    #[error("the event could not be sent before the deadline; it is not stored{}", .cause.as_ref().map_or(String::new(), |cause| format!(": {cause}")))]
    NotSent {
        /// Why there was no stream, where there was none.
        cause: Option<CallError>,
    },
    /// The stream cannot go on, and neither will another. What was not sent is not stored.
    #[error("cannot publish: {0}")]
    Stream(#[source] CallError),
    /// The publisher was closed.
    #[error("the publisher is closed")]
    Closed,
}

/// The outcome of one event, to be awaited. Dropping it does not take the event back.
#[derive(Debug)]
pub struct Receipt(oneshot::Receiver<Outcome>);

impl Future for Receipt {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        Pin::new(&mut self.0)
            .poll(context)
            .map(|outcome| outcome.unwrap_or(Err(PublishError::OutcomeUnknown { cause: None })))
    }
}

/// Publishes to one topic. Dropping it abandons what is not acknowledged; [`Publisher::close`] waits for it.
pub struct Publisher {
    shared: Arc<Shared>,
    deadline: Duration,
    bytes_max: usize,
    /// Owns the task that keeps a stream open; it ends with us.
    driver: JoinSet<()>,
}

/// What the publisher, its driver and the request stream have in common.
struct Shared {
    topic: TopicId,
    window: Mutex<Window>,
    events: Semaphore,
    bytes: Semaphore,
    /// The oldest number whose outcome is not known.
    settled: watch::Sender<u64>,
}

impl Shared {
    fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, freed: Freed) {
        if freed.events > 0 {
            self.events.add_permits(freed.events);
            self.bytes.add_permits(freed.bytes);
            let first = self.window().first();
            self.settled.send_replace(first);
        }
    }

    fn end(&self, error: PublishError) {
        let mut freed = Freed::default();
        let waker = {
            let mut window = self.window();
            window.end(error, &mut freed);
            window.waker.take()
        };
        self.free(freed);
        // Whoever waits for room must hear that there will be none.
        self.events.close();
        self.bytes.close();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// What an event takes of the byte window.
fn weight(key: &[u8], event: &[u8]) -> usize {
    OVERHEAD + key.len() + event.len()
}

impl Publisher {
    /// Opens a stream to `topic`, a name or an id, and waits until the server is ready for it.
    pub(crate) async fn open(client: Client, topic: &str, options: PublisherOptions) -> Result<Self, CallError> {
        let bytes_max = options.window_bytes.max(weight(&[], &[0; 0]) + EVENT_BYTES_MAX).min(u32::MAX as usize);
        let session = match options.session {
            Some(session) => session,
            None => new_session(0)?,
        };
        let handshake = pb::OpenStream {
            client_id: client.connection().client_id.clone(),
            topics: vec![topic.to_owned()],
            producer_session: Bytes::copy_from_slice(session.as_bytes()),
            producer_epoch: options.epoch,
        };
        let events = options.window_events.clamp(1, Semaphore::MAX_PERMITS);
        let (driver, shared) = Driver::connect(client, handshake, |topic| Shared {
            topic,
            window: Mutex::new(Window::new()),
            events: Semaphore::new(events),
            bytes: Semaphore::new(bytes_max),
            settled: watch::Sender::new(1),
        })
        .await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(driver.run());
        Ok(Self { shared, deadline: options.deadline, bytes_max, driver: tasks })
    }

    /// The topic that this publishes to.
    pub fn topic(&self) -> TopicId {
        self.shared.topic
    }

    /// Accepts an event, once there is room in the window, and tells its place in line by returning: receipts resolve in the
    /// order of these calls. Cancel safe: an event whose call was dropped is not sent.
    ///
    /// # Errors
    /// [`PublishError::TooLarge`]: never will be. [`PublishError::Stream`], [`PublishError::Closed`]: open another publisher.
    pub async fn publish(&self, event: Event) -> Result<Receipt, PublishError> {
        self.publish_encoded(Bytes::new(), event.encode()).await
    }

    /// [`Publisher::publish`] for an event with a key: events of one key stay in order wherever the topic is split.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    pub async fn publish_keyed(&self, key: impl Into<Bytes>, event: Event) -> Result<Receipt, PublishError> {
        self.publish_encoded(key.into(), event.encode()).await
    }

    async fn publish_encoded(&self, key: Bytes, event: Bytes) -> Result<Receipt, PublishError> {
        if event.len() > EVENT_BYTES_MAX {
            return Err(PublishError::TooLarge { size: event.len(), limit: EVENT_BYTES_MAX });
        }
        // A huge key still gets through a window that is otherwise empty.
        let weight = weight(&key, &event);
        if weight > self.bytes_max {
            return Err(PublishError::TooLarge { size: key.len() + event.len(), limit: EVENT_BYTES_MAX });
        }
        let event_room = self.shared.events.acquire().await;
        let byte_room = self.shared.bytes.acquire_many(weight as u32).await;
        let (outcome, receipt) = oneshot::channel();
        let mut window = self.shared.window();
        if let Some(error) = &window.ended {
            return Err(error.clone());
        }
        let (Ok(event_room), Ok(byte_room)) = (event_room, byte_room) else { return Err(PublishError::Closed) };
        // Given back by `Shared::free` when the outcome is known.
        event_room.forget();
        byte_room.forget();
        window.push(Entry { key, event, deadline: Instant::now() + self.deadline, outcome });
        let waker = window.waker.take();
        drop(window);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(Receipt(receipt))
    }

    /// Waits until the outcome of every event accepted so far is known.
    pub async fn flush(&self) {
        let until = self.shared.window().next();
        let mut settled = self.shared.settled.subscribe();
        // The sender lives in `shared`, which we hold.
        let _ = settled.wait_for(|first| *first >= until).await;
    }

    /// Waits for every outcome, then ends the stream in an orderly way.
    pub async fn close(mut self) {
        self.flush().await;
        let waker = {
            let mut window = self.shared.window();
            window.closing = true;
            window.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        while self.driver.join_next().await.is_some() {}
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.shared.end(PublishError::Closed);
    }
}

/// A session made now, or after `after_ms` by the server's clock. Servers tell old sessions from new ones by the millisecond at
/// the front of the id.
fn new_session(after_ms: u64) -> Result<SessionId, CallError> {
    let mut random = [0; 10];
    getrandom::fill(&mut random).map_err(|error| CallError::protocol(format!("no random bytes: {error}")))?;
    let since = wall_now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Ok(SessionId::new((since.as_millis() as u64).max(after_ms + 1), random))
}
