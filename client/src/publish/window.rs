//! The events that a publisher still answers for, in order.
//!
//! ```text
//! | settled … | sent, not answered | accepted, not sent |        numbers rise by one from left to right
//!             ^ first              ^ next_to_send       ^ next
//! ```
//!
//! An event enters with the next number and leaves once its outcome is known: acknowledged, refused, or given up. A lost
//! connection moves `next_to_send` back to `first`; numbers stay, so the server recognises what it already has.
//! Not here: connections, time, waiting for room.

use std::collections::VecDeque;
use std::task::Waker;

use bytes::{Bytes, BytesMut};
use ensign_proto::pb::ensign::v1beta1 as pb;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Ack, PublishError};
use crate::error::CallError;

/// How many local ids are cut from one allocation.
const IDS: u64 = 512;
const ID_BYTES: usize = 8;

pub(super) type Outcome = Result<Ack, PublishError>;

/// What one event brings along.
pub(super) struct Entry {
    pub(super) key: Bytes,
    pub(super) event: Bytes,
    pub(super) deadline: Instant,
    pub(super) outcome: oneshot::Sender<Outcome>,
}

struct Slot {
    key: Bytes,
    event: Bytes,
    deadline: Instant,
    /// `None` once the outcome is known, while older events still wait for theirs.
    outcome: Option<oneshot::Sender<Outcome>>,
    sent: bool,
}

/// Room that became free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) events: usize,
    pub(super) bytes: usize,
}

pub(super) struct Window {
    slots: VecDeque<Slot>,
    first: u64,
    next_to_send: u64,
    /// Numbers below it were sent on a connection before this one.
    repeated: u64,
    ids: Bytes,
    ids_from: u64,
    /// Which connection sends; an older one that is still being torn down gets nothing more.
    pub(super) generation: u64,
    /// Woken when there is something to send, or nothing more will come.
    pub(super) waker: Option<Waker>,
    /// No more events will enter.
    pub(super) closing: bool,
    /// Why the publisher has ended, if it has.
    pub(super) ended: Option<PublishError>,
}

impl Window {
    pub(super) fn new() -> Self {
        Self {
            slots: VecDeque::new(),
            first: 1,
            next_to_send: 1,
            repeated: 1,
            ids: Bytes::new(),
            ids_from: 0,
            generation: 0,
            waker: None,
            closing: false,
            ended: None,
        }
    }

    /// The number that the next event gets.
    pub(super) fn next(&self) -> u64 {
        self.first + self.slots.len() as u64
    }

    /// The oldest number whose outcome is not known; [`Window::next`] when there is none.
    pub(super) fn first(&self) -> u64 {
        self.first
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// When the oldest event is given up.
    pub(super) fn oldest_deadline(&self) -> Option<Instant> {
        self.slots.front().map(|slot| slot.deadline)
    }

    pub(super) fn push(&mut self, entry: Entry) {
        let Entry { key, event, deadline, outcome } = entry;
        self.slots.push_back(Slot { key, event, deadline, outcome: Some(outcome), sent: false });
    }

    /// Whether everything that entered has been handed to the connection.
    pub(super) fn all_sent(&self) -> bool {
        self.next_to_send == self.next()
    }

    /// Moves up to `most` unsent events, as wire messages, to the end of `out`.
    pub(super) fn take_unsent(&mut self, topic: &Bytes, most: usize, out: &mut VecDeque<pb::EventWrapper>) {
        let from = (self.next_to_send - self.first) as usize;
        let until = self.slots.len().min(from.saturating_add(most));
        for place in from..until {
            let number = self.first + place as u64;
            let local_id = self.local_id(number);
            let slot = &mut self.slots[place];
            slot.sent = true;
            if slot.outcome.is_none() {
                // Decided before the connection broke; nobody waits for it.
                continue;
            }
            out.push_back(pb::EventWrapper {
                topic_id: topic.clone(),
                key: slot.key.clone(),
                event: slot.event.clone(),
                local_id,
                producer_sequence: number,
                ..pb::EventWrapper::default()
            });
        }
        self.next_to_send = self.first + until as u64;
    }

    /// Forgets what was sent: a new connection, whose number this returns, starts with the oldest undecided event.
    pub(super) fn rewind(&mut self) -> u64 {
        self.repeated = self.repeated.max(self.next_to_send);
        self.next_to_send = self.first;
        self.waker = None;
        self.generation += 1;
        self.generation
    }

    /// Decides the event that the server calls `local_id`. `false`: there is no such event in flight.
    pub(super) fn settle(&mut self, local_id: &[u8], outcome: Outcome, freed: &mut Freed) -> bool {
        let Ok(number) = <[u8; ID_BYTES]>::try_from(local_id).map(u64::from_be_bytes) else { return false };
        if number >= self.next_to_send {
            return false;
        }
        let Some(place) = number.checked_sub(self.first) else {
            // Settled before: an answer that overtook our giving up, or the server repeats itself.
            return true;
        };
        if let Some(waiting) = self.slots[place as usize].outcome.take() {
            // The caller may have dropped its receipt.
            let _ = waiting.send(outcome);
        }
        self.drop_decided(freed);
        true
    }

    /// Gives up every event that was sent on more than one connection, and takes the others for unsent: the server is certain
    /// that it has stored none of those.
    pub(super) fn give_up_repeated(&mut self, cause: &CallError, freed: &mut Freed) {
        let repeated = self.repeated.saturating_sub(self.first) as usize;
        for (place, slot) in self.slots.iter_mut().enumerate() {
            if place >= repeated {
                slot.sent = false;
            } else if let Some(waiting) = slot.outcome.take() {
                let _ = waiting.send(Err(PublishError::OutcomeUnknown { cause: Some(cause.clone()) }));
            }
        }
        self.next_to_send = self.first;
        self.drop_decided(freed);
        self.next_to_send = self.first;
        self.repeated = self.first;
    }

    /// Gives up every event, as the stream ended with `cause`, of which the server is certain that it stored none that it had not
    /// answered: what was sent on that stream at most gets `refusal`.
    pub(super) fn refuse(&mut self, refusal: &PublishError, cause: &CallError, freed: &mut Freed) {
        let repeated = self.repeated.saturating_sub(self.first) as usize;
        for (place, slot) in self.slots.iter_mut().enumerate() {
            if let Some(waiting) = slot.outcome.take() {
                let unknown = || PublishError::OutcomeUnknown { cause: Some(cause.clone()) };
                let _ = waiting.send(Err(if place < repeated { unknown() } else { refusal.clone() }));
            }
        }
        self.drop_decided(freed);
    }

    /// Gives up every event whose deadline has passed; `cause`: what the last stream ended with, while there is none.
    pub(super) fn expire(&mut self, now: Instant, cause: Option<&CallError>, freed: &mut Freed) {
        // Deadlines rise with the numbers, as all events of a publisher get the same time.
        for slot in &mut self.slots {
            if slot.deadline > now {
                break;
            }
            if let Some(waiting) = slot.outcome.take() {
                let cause = cause.cloned();
                let verdict =
                    if slot.sent { PublishError::OutcomeUnknown { cause } } else { PublishError::NotSent { cause } };
                let _ = waiting.send(Err(verdict));
            }
        }
        self.drop_decided(freed);
    }

    /// Ends: every event in flight gets `error`, or what is true of it.
    pub(super) fn end(&mut self, error: PublishError, freed: &mut Freed) {
        for slot in &mut self.slots {
            if let Some(waiting) = slot.outcome.take() {
                // Something that was sent may have been stored, whatever the stream died of.
                let verdict = match (&error, slot.sent) {
                    (PublishError::Stream(cause), true) => PublishError::OutcomeUnknown { cause: Some(cause.clone()) },
                    (_, true) => PublishError::OutcomeUnknown { cause: None },
                    (error, false) => error.clone(),
                };
                let _ = waiting.send(Err(verdict));
            }
        }
        self.ended.get_or_insert(error);
        self.drop_decided(freed);
    }

    fn drop_decided(&mut self, freed: &mut Freed) {
        while self.slots.front().is_some_and(|slot| slot.outcome.is_none()) {
            if let Some(slot) = self.slots.pop_front() {
                freed.events += 1;
                freed.bytes += super::weight(&slot.key, &slot.event);
                self.first += 1;
            }
        }
        self.next_to_send = self.next_to_send.max(self.first);
    }

    /// The number's eight bytes. Cut from a block, so that an event costs no allocation for its name.
    fn local_id(&mut self, number: u64) -> Bytes {
        // A re-send goes back to numbers before the block.
        let place = number.checked_sub(self.ids_from).map_or(usize::MAX, |nth| (nth as usize).saturating_mul(ID_BYTES));
        if place >= self.ids.len() {
            let mut block = BytesMut::with_capacity(IDS as usize * ID_BYTES);
            for id in number..number + IDS {
                block.extend_from_slice(&id.to_be_bytes());
            }
            (self.ids, self.ids_from) = (block.freeze(), number);
            return self.ids.slice(..ID_BYTES);
        }
        self.ids.slice(place..place + ID_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    type Waiting = oneshot::Receiver<Outcome>;

    fn push(window: &mut Window, deadline: Instant) -> Waiting {
        let (outcome, waiting) = oneshot::channel();
        window.push(Entry { key: Bytes::new(), event: Bytes::from_static(b"12345"), deadline, outcome });
        waiting
    }

    fn send(window: &mut Window) -> Vec<u64> {
        let mut out = VecDeque::new();
        window.take_unsent(&Bytes::from_static(b"t"), usize::MAX, &mut out);
        out.iter().map(|wrapper| wrapper.producer_sequence).collect()
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_mins(1)
    }

    #[tokio::test]
    async fn under_a_new_session_only_what_was_sent_once_goes_on() {
        let mut window = Window::new();
        let mut waiting: Vec<_> = (0..2).map(|_| push(&mut window, later())).collect();
        assert_eq!(send(&mut window), [1, 2]);
        window.rewind();
        assert_eq!(send(&mut window), [1, 2]);
        waiting.extend((0..2).map(|_| push(&mut window, later())));
        assert_eq!(send(&mut window), [3, 4]);
        let (mut freed, cause) = (Freed::default(), CallError::protocol("forgotten"));
        window.give_up_repeated(&cause, &mut freed);
        assert_eq!(freed.events, 2);
        for repeated in waiting.drain(..2) {
            assert!(matches!(repeated.await, Ok(Err(PublishError::OutcomeUnknown { cause: Some(_) }))));
        }
        window.rewind();
        assert_eq!(send(&mut window), [3, 4], "they were sent once, under the session that stored nothing");
        window.give_up_repeated(&cause, &mut freed);
        assert_eq!(freed.events, 2, "still only once under the new session");
    }

    #[tokio::test]
    async fn what_a_spent_quota_refuses_is_certain_but_for_what_an_earlier_stream_sent() {
        let mut window = Window::new();
        let repeated = push(&mut window, later());
        assert_eq!(send(&mut window), [1]);
        window.rewind();
        assert_eq!(send(&mut window), [1]);
        let (sent, mut waiting) = (push(&mut window, later()), Vec::new());
        assert_eq!(send(&mut window), [2]);
        waiting.extend([sent, push(&mut window, later())]);
        let mut freed = Freed::default();
        let cause = CallError::QuotaSpent { message: "full".to_owned() };
        window.refuse(&PublishError::QuotaSpent { message: "full".to_owned() }, &cause, &mut freed);
        assert_eq!((freed.events, window.is_empty()), (3, true));
        assert!(matches!(repeated.await, Ok(Err(PublishError::OutcomeUnknown { cause: Some(_) }))));
        for waiting in waiting {
            assert!(matches!(waiting.await, Ok(Err(PublishError::QuotaSpent { .. }))));
        }
        let _next = push(&mut window, later());
        window.rewind();
        assert_eq!(send(&mut window), [4], "later events go on");
    }

    #[tokio::test]
    async fn what_was_not_answered_is_sent_again_under_its_number() {
        let mut window = Window::new();
        let mut waiting: Vec<_> = (0..4).map(|_| push(&mut window, later())).collect();
        assert_eq!(send(&mut window), [1, 2, 3, 4]);
        let mut freed = Freed::default();
        assert!(window.settle(&1_u64.to_be_bytes(), Ok(Ack::default()), &mut freed));
        assert!(window.settle(&3_u64.to_be_bytes(), Ok(Ack::default()), &mut freed));
        assert_eq!(freed, Freed { events: 1, bytes: super::super::weight(b"", b"12345") });
        window.rewind();
        assert_eq!(send(&mut window), [2, 4]);
        assert!(waiting[2].try_recv().unwrap().is_ok());
        assert!(waiting[1].try_recv().is_err());
    }

    #[tokio::test]
    async fn an_answer_to_something_never_sent_is_noticed() {
        let mut window = Window::new();
        let _waiting = push(&mut window, later());
        let mut freed = Freed::default();
        assert!(!window.settle(&1_u64.to_be_bytes(), Ok(Ack::default()), &mut freed));
        assert!(!window.settle(b"odd", Ok(Ack::default()), &mut freed));
        send(&mut window);
        assert!(!window.settle(&2_u64.to_be_bytes(), Ok(Ack::default()), &mut freed));
    }

    #[tokio::test]
    async fn giving_up_tells_what_was_sent_from_what_was_not() {
        let mut window = Window::new();
        let past = Instant::now();
        let mut sent = push(&mut window, past);
        send(&mut window);
        let mut unsent = push(&mut window, past);
        let mut kept = push(&mut window, later());
        let mut freed = Freed::default();
        window.expire(Instant::now(), None, &mut freed);
        assert!(matches!(sent.try_recv().unwrap(), Err(PublishError::OutcomeUnknown { cause: None })));
        assert!(matches!(unsent.try_recv().unwrap(), Err(PublishError::NotSent { cause: None })));
        assert!(kept.try_recv().is_err());
        assert_eq!((freed.events, window.first(), window.next()), (2, 3, 4));
        assert_eq!(send(&mut window), [3]);
    }

    proptest! {
        /// Against a model: whatever the order of sends, answers, breaks: every event is sent until decided, decided once, freed once.
        #[test]
        fn every_event_is_decided_once_and_freed_once(steps in proptest::collection::vec(0_u8..5, 1..200)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let mut window = Window::new();
                let mut waiting = Vec::new();
                let mut in_flight: VecDeque<u64> = VecDeque::new();
                let mut decided = std::collections::BTreeSet::new();
                let mut freed = Freed::default();
                for step in steps {
                    match step {
                        0 | 1 => waiting.push(push(&mut window, later())),
                        2 => in_flight.extend(send(&mut window)),
                        3 => if let Some(number) = in_flight.pop_front() {
                            assert!(window.settle(&number.to_be_bytes(), Ok(Ack::default()), &mut freed));
                            decided.insert(number);
                        },
                        _ => {
                            in_flight.clear();
                            window.rewind();
                        }
                    }
                }
                window.rewind();
                let again: Vec<_> = send(&mut window);
                let expected: Vec<_> = (1..window.next()).filter(|number| !decided.contains(number)).collect();
                assert_eq!(again, expected);
                for number in again {
                    assert!(window.settle(&number.to_be_bytes(), Ok(Ack::default()), &mut freed));
                }
                assert!(window.is_empty());
                assert_eq!(freed.events, waiting.len());
                for mut waiting in waiting {
                    assert!(waiting.try_recv().unwrap().is_ok());
                }
            });
        }
    }
}
