//! The replying side of a publish stream: one answer for each event, in order, and the totals last.

use std::borrow::Cow;
use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use ensign_proto::TopicId;
use ensign_proto::pb::ensign::v1beta1 as api;
use ensign_proto::pb::ensign::v1beta1::nack::Code as NackCode;
use futures::FutureExt as _;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::Instant;
use tonic::Status;

use super::gathering::LocalIds;
use super::wire;
use crate::partition::metrics::{observe_ack, observe_refused};
use crate::partition::{Appended, PublishError};
use crate::status::{self, Refusal};

/// Where a frame of answers is cut.
const FRAME_BYTES: usize = 64 << 10;

/// The way to the transport. What is sent is the transport's once it has room.
pub(super) type Frames = mpsc::Sender<Result<Bytes, Status>>;

/// What becomes of consecutive events.
#[derive(Debug)]
pub(super) enum Run {
    /// They were handed to an appender.
    Submitted {
        topic: TopicId,
        local_ids: LocalIds,
        since: Instant,
        outcome: oneshot::Receiver<Result<Appended, PublishError>>,
        room: OwnedSemaphorePermit,
    },
    /// They were refused before anybody was asked.
    Refused { local_ids: LocalIds, code: NackCode, reason: Cow<'static, str>, room: OwnedSemaphorePermit },
    /// There will be no more.
    End(Result<(), Status>),
}

#[derive(Debug, Default)]
struct Totals {
    events: u64,
    topics: HashSet<TopicId>,
    acks: u64,
    nacks: u64,
}

pub(super) async fn send_reply(frames: &Frames, embed: api::publisher_reply::Embed) {
    let reply = api::PublisherReply { embed: Some(embed) };
    // A client that is gone needs no reply; its events are committed all the same.
    let _ = frames.send(Ok(wire::message(&reply))).await;
}

/// Answers runs, in order.
pub(super) struct Replies {
    frames: Frames,
    totals: Totals,
    /// Answers that are not the transport's yet.
    out: BytesMut,
    /// The room of the local ids in them.
    room: Option<OwnedSemaphorePermit>,
}

impl Replies {
    pub(super) fn new(frames: Frames) -> Self {
        Self { frames, totals: Totals::default(), out: BytesMut::new(), room: None }
    }

    /// Answers runs until the stream ends. All answers precede `close_stream`.
    pub(super) async fn run(mut self, mut runs: mpsc::Receiver<Run>) -> Result<(), Status> {
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
                if let Err(status) = self.answer(next).await {
                    end = Some(Err(status));
                    break;
                }
                if self.out.len() < FRAME_BYTES {
                    run = runs.recv().now_or_never().flatten();
                }
            }
            if !self.flush().await {
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

    /// Hands over what there is; `false` if the client is gone. Only then may more local ids be kept: a client that does not read
    /// its answers stops sending events, too.
    async fn flush(&mut self) -> bool {
        if self.out.is_empty() {
            return true;
        }
        let taken = self.frames.send(Ok(self.out.split().freeze())).await.is_ok();
        self.room = None;
        taken
    }

    fn keep(&mut self, room: OwnedSemaphorePermit) {
        match &mut self.room {
            Some(held) => held.merge(room),
            None => self.room = Some(room),
        }
    }

    async fn answer(&mut self, run: Run) -> Result<(), Status> {
        match run {
            Run::Refused { local_ids, code, reason, room } => {
                self.keep(room);
                observe_refused(status::edge_cause(code), local_ids.len() as u64);
                self.nack(local_ids, code, &reason);
            }
            Run::Submitted { topic, local_ids, since, mut outcome, room } => {
                let outcome = if let Some(outcome) = (&mut outcome).now_or_never() {
                    outcome
                } else {
                    // What is decided goes out before what has to be waited for.
                    self.flush().await;
                    outcome.await
                };
                self.keep(room);
                self.totals.events += local_ids.len() as u64;
                self.totals.topics.insert(topic);
                let cause = || "the appender of the topic ended".to_owned();
                match outcome.unwrap_or_else(|_| Err(PublishError::OutcomeUnknown { cause: cause() })) {
                    Ok(appended) => {
                        observe_ack(since.elapsed());
                        self.acks(local_ids, &appended);
                    }
                    Err(error) => {
                        observe_refused(status::publish_cause(&error), local_ids.len() as u64);
                        match status::publish_failed(&error) {
                            Refusal::Nack(code, reason) => self.nack(local_ids, code, &reason),
                            Refusal::End(status) => return Err(status),
                        }
                    }
                }
            }
            Run::End(_) => {}
        }
        Ok(())
    }

    fn acks(&mut self, local_ids: LocalIds, appended: &Appended) {
        self.totals.acks += local_ids.len() as u64;
        let mut ids = local_ids.into_iter();
        for run in &appended.runs {
            let committed = Some(ensign_proto::convert::timestamp(run.committed_ms * 1_000_000));
            for (n, id) in (0..u64::from(run.count)).zip(&mut ids) {
                let offset = if run.offset.0 == 0 { 0 } else { run.offset.0 + n };
                let embed = Some(api::publisher_reply::Embed::Ack(api::Ack { id, committed, offset }));
                wire::put_message(&api::PublisherReply { embed }, &mut self.out);
            }
        }
    }

    fn nack(&mut self, local_ids: LocalIds, code: NackCode, reason: &str) {
        self.totals.nacks += local_ids.len() as u64;
        for id in local_ids {
            let nack = api::Nack { id, code: code.into(), error: reason.to_owned() };
            let embed = Some(api::publisher_reply::Embed::Nack(nack));
            wire::put_message(&api::PublisherReply { embed }, &mut self.out);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn local_ids_have_their_room_until_the_transport_takes_their_answers() {
        let room = Arc::new(Semaphore::new(10));
        let (frames, mut transport) = mpsc::channel(1);
        let (runs, answers) = mpsc::channel(8);
        let refused = async |n: u8| {
            // Large enough for a frame of its own.
            let mut local_ids = LocalIds::default();
            (0..1_000).for_each(|_| local_ids.push(&[n; 128]));
            let room = Arc::clone(&room).acquire_many_owned(2).await.unwrap();
            runs.send(Run::Refused { local_ids, code: NackCode::TopicUnknown, reason: "no".into(), room })
                .await
                .unwrap();
        };
        let mut replies = std::pin::pin!(Replies::new(frames).run(answers));
        for n in 0..5 {
            refused(n).await;
        }
        // One frame is the transport's, and the next waits for it.
        assert!((&mut replies).now_or_never().is_none());
        for taken in 1..=4 {
            assert_eq!(room.available_permits(), 2 * taken);
            assert!(transport.recv().await.unwrap().unwrap().len() > FRAME_BYTES);
            assert!((&mut replies).now_or_never().is_none());
        }
        assert_eq!(room.available_permits(), 10);
    }
}
