//! The way from an appender to the leader's batcher: a queue in this process, or a stream to another node.

use std::collections::VecDeque;

use ensign_proto::pb::ensign::peer::v1 as peer;
use ensign_proto::{ByteCount, NodeId, TopicId};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tonic::Streaming;

use super::append::{self, AppendError, Chunk, Outcome};
use super::batcher::{Batcher, Slot};

/// Opens a way to the partition's leader on another node.
pub trait ForwardLink: Send + Sync + 'static {
    /// Opens it; an error says why not, in words for the log.
    fn open(&self, leader: NodeId, topic: TopicId) -> BoxFuture<'static, Result<Route, String>>;
}

/// A way to a batcher. Answers come back in the order of what was sent.
#[derive(Debug)]
pub struct Route {
    out: Out,
    replies: Replies,
}

/// Where chunks go in.
#[derive(Debug)]
pub(super) enum Out {
    Local { batcher: Batcher, slot: Option<Slot>, outcomes: mpsc::UnboundedSender<oneshot::Receiver<Outcome>> },
    Remote { requests: mpsc::Sender<peer::AppendRequest>, permit: Option<mpsc::OwnedPermit<peer::AppendRequest>> },
}

/// Where answers come out.
#[derive(Debug)]
pub(super) enum Replies {
    Local {
        outcomes: mpsc::UnboundedReceiver<oneshot::Receiver<Outcome>>,
        waiting: VecDeque<oneshot::Receiver<Outcome>>,
    },
    Remote {
        replies: Box<Streaming<peer::AppendReply>>,
    },
}

impl Route {
    pub(super) fn local(batcher: Batcher) -> Self {
        let (sender, outcomes) = mpsc::unbounded_channel();
        Self {
            out: Out::Local { batcher, slot: None, outcomes: sender },
            replies: Replies::Local { outcomes, waiting: VecDeque::new() },
        }
    }

    /// A way over a `Forward.Append` stream that was opened for the topic.
    pub fn remote(requests: mpsc::Sender<peer::AppendRequest>, replies: Streaming<peer::AppendReply>) -> Self {
        Self { out: Out::Remote { requests, permit: None }, replies: Replies::Remote { replies: Box::new(replies) } }
    }

    pub(super) fn split(self) -> (Out, Replies) {
        (self.out, self.replies)
    }
}

impl Out {
    /// Waits until a chunk of `size` may be sent. Cancel safe: what was granted stays granted.
    pub(super) async fn ready(&mut self, size: Option<ByteCount>) -> Result<(), AppendError> {
        match self {
            Self::Local { batcher, slot, .. } => {
                if slot.is_none() {
                    *slot = Some(batcher.reserve(size.unwrap_or_default()).await?);
                }
            }
            Self::Remote { requests, permit } => {
                if permit.is_none() {
                    let granted = requests.clone().reserve_owned().await;
                    *permit = Some(granted.map_err(|_| AppendError::OutcomeUnknown)?);
                }
            }
        }
        Ok(())
    }

    /// Sends a chunk; `ready` has returned since the last one.
    pub(super) fn send(&mut self, chunk: &Chunk) {
        match self {
            Self::Local { slot, outcomes, .. } => {
                let slot = slot.take().expect("a chunk is sent only once there is room for it");
                // The other half lives as long as this one.
                let _ = outcomes.send(slot.send(chunk.clone()));
            }
            Self::Remote { permit, .. } => {
                let permit = permit.take().expect("a chunk is sent only once there is room for it");
                permit.send(peer::AppendRequest { kind: Some(peer::append_request::Kind::Chunk(chunk.into())) });
            }
        }
    }
}

impl Replies {
    /// The next answer. An answer that never comes is an unknown outcome. Cancel safe.
    pub(super) async fn next(&mut self) -> Outcome {
        match self {
            Self::Local { outcomes, waiting } => {
                if waiting.is_empty() {
                    let Some(outcome) = outcomes.recv().await else { return Err(AppendError::OutcomeUnknown) };
                    waiting.push_back(outcome);
                }
                let Some(front) = waiting.front_mut() else { return Err(AppendError::OutcomeUnknown) };
                let outcome = front.await;
                waiting.pop_front();
                outcome.unwrap_or(Err(AppendError::OutcomeUnknown))
            }
            Self::Remote { replies } => match replies.message().await {
                Ok(Some(reply)) => append::from_reply(reply),
                Ok(None) | Err(_) => Err(AppendError::OutcomeUnknown),
            },
        }
    }
}
