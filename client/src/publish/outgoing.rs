//! The request half of a publish stream: the handshake, then whatever the window has to send.

use std::collections::VecDeque;
use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use ensign_proto::pb::ensign::v1beta1 as pb;
use futures::Stream;
use tokio::sync::oneshot;

use super::Shared;

/// Events taken from the window under one lock.
const CHUNK: usize = 64;

/// Sends the handshake at once and events once the server is ready. Ends when the publisher closes or this stream is given up.
pub(super) struct Outgoing {
    handshake: Option<pb::OpenStream>,
    state: State,
    chunk: VecDeque<pb::EventWrapper>,
}

/// Lets a stream send.
pub(super) struct Start {
    pub(super) shared: Arc<Shared>,
    /// From [`super::window::Window::rewind`].
    pub(super) generation: u64,
}

enum State {
    /// Until the server has answered the handshake; dropping the sender gives the stream up.
    Waiting(oneshot::Receiver<Start>),
    Open(Start, Bytes),
    Ended,
}

impl Outgoing {
    /// The stream, and where to put what it shall send from once the server is ready.
    pub(super) fn new(handshake: pb::OpenStream) -> (Self, oneshot::Sender<Start>) {
        let (open, waiting) = oneshot::channel();
        (Self { handshake: Some(handshake), state: State::Waiting(waiting), chunk: VecDeque::new() }, open)
    }
}

impl Stream for Outgoing {
    type Item = pb::PublisherRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        use pb::publisher_request::Embed;
        let message = |embed| Poll::Ready(Some(pb::PublisherRequest { embed: Some(embed) }));
        let this = &mut *self;
        if let Some(handshake) = this.handshake.take() {
            return message(Embed::OpenStream(handshake));
        }
        loop {
            if let Some(event) = this.chunk.pop_front() {
                return message(Embed::Event(event));
            }
            match &mut this.state {
                State::Ended => return Poll::Ready(None),
                State::Waiting(waiting) => match Pin::new(waiting).poll(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(_)) => this.state = State::Ended,
                    Poll::Ready(Ok(start)) => {
                        let topic = Bytes::copy_from_slice(start.shared.topic.as_bytes());
                        this.state = State::Open(start, topic);
                    }
                },
                State::Open(start, topic) => {
                    let mut window = start.shared.window();
                    if window.generation != start.generation {
                        drop(window);
                        this.state = State::Ended;
                        continue;
                    }
                    window.take_unsent(topic, CHUNK, &mut this.chunk);
                    if !this.chunk.is_empty() || !window.all_sent() {
                        continue;
                    }
                    if window.closing || window.ended.is_some() {
                        drop(window);
                        this.state = State::Ended;
                        continue;
                    }
                    window.waker = Some(context.waker().clone());
                    return Poll::Pending;
                }
            }
        }
    }
}
