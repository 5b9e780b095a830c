//! The contract of [`NodeLog`] and [`GroupLog`](crate::GroupLog) as tests, run against every implementation.
//!
//! A failure panics, as a test should; this module is compiled for tests only.

mod loop_fs;

use std::ops::Range;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};

use crate::log::{Done, Entry, EntryId, GroupLog, LogError, NodeLog};
use crate::memory::MemoryLog;

pub use self::loop_fs::LoopFs;

/// No limit.
pub const ALL: ByteCount = ByteCount(u64::MAX);

/// An implementation under test.
pub trait Subject: Sized {
    /// The log.
    fn log(&self) -> Arc<dyn NodeLog>;

    /// Makes everything submitted durable, where nothing else does it.
    fn settle(&self) {}

    /// Closes cleanly and opens again.
    fn reopen(self) -> Self;
}

impl Subject for MemoryLog {
    fn log(&self) -> Arc<dyn NodeLog> {
        Arc::new(self.clone())
    }

    fn settle(&self) {
        self.flush();
    }

    fn reopen(self) -> Self {
        self.flush();
        self.crash()
    }
}

/// An entry's place.
pub fn id(term: u64, index: u64) -> EntryId {
    EntryId { term: Term(term), index: LogIndex(index) }
}

/// An entry whose payload can be told from every other's.
pub fn entry(term: u64, index: u64) -> Entry {
    Entry { id: id(term, index), payload: Bytes::from(format!("payload {term}/{index}")) }
}

/// Entries of one term, `range` in index.
pub fn entries(term: u64, range: Range<u64>) -> Vec<Entry> {
    range.map(|index| entry(term, index)).collect()
}

/// A range of indexes.
pub fn span(range: Range<u64>) -> Range<LogIndex> {
    LogIndex(range.start)..LogIndex(range.end)
}

/// A callback and where its outcome arrives.
pub fn outcome() -> (Done, Receiver<Result<(), LogError>>) {
    let (sender, receiver) = channel();
    (Box::new(move |result| drop(sender.send(result))), receiver)
}

/// Blocks until the log has space, as an async caller would wait.
pub fn wait_for_space(log: &dyn GroupLog) {
    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    while log.poll_space(&mut Context::from_waker(&waker)).is_pending() {
        thread::park();
    }
}

/// Submits one operation, settles, and waits for its outcome.
pub fn wait<S: Subject>(subject: &S, submit: impl FnOnce(Done)) -> Result<(), LogError> {
    let (done, receiver) = outcome();
    submit(done);
    subject.settle();
    receiver.recv_timeout(Duration::from_secs(30)).expect("the callback is called")
}

/// Every behaviour of the contract, one after the other, each on a fresh log.
pub fn suite<S: Subject>(make: impl Fn() -> S) {
    appended_entries_are_readable_before_they_are_durable(make());
    callbacks_come_in_the_order_of_submission(make());
    an_append_with_a_hole_is_refused_and_keeps_nothing(make());
    a_read_stops_at_its_limit_yet_returns_one(make());
    a_read_outside_the_log_is_refused(make());
    a_truncated_tail_is_replaced(make());
    a_purge_may_pass_the_end(make());
    a_purge_never_moves_back(make());
    groups_do_not_see_each_other(make());
    everything_survives_a_clean_close(make());
    a_removed_group_starts_empty(make());
    a_forgotten_group_keeps_a_vote_alone(make());
    large_entries_keep_their_bytes(make());
    a_snapshot_is_replaced_whole(make());
}

fn group<S: Subject>(subject: &S) -> Arc<dyn GroupLog> {
    subject.log().group(GroupId(16))
}

fn appended_entries_are_readable_before_they_are_durable<S: Subject>(subject: S) {
    let log = group(&subject);
    assert_eq!(log.state().last, None);
    let (done, receiver) = outcome();
    log.append(entries(1, 1..4), done);
    assert_eq!(log.state().last, Some(id(1, 3)));
    assert_eq!(log.read(span(1..4), ALL).expect("readable"), entries(1, 1..4));
    assert_eq!(log.read_cached(span(2..3), ALL), Some(entries(1, 2..3)));
    subject.settle();
    assert!(receiver.recv_timeout(Duration::from_secs(30)).expect("called").is_ok());
}

fn callbacks_come_in_the_order_of_submission<S: Subject>(subject: S) {
    let log = group(&subject);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let note = |n: usize| -> Done {
        let seen = Arc::clone(&seen);
        Box::new(move |result| {
            result.expect("durable");
            seen.lock().expect("not poisoned").push(n);
        })
    };
    log.save_vote(Bytes::from_static(b"vote 1"), note(0));
    log.append(entries(1, 1..3), note(1));
    log.truncate(LogIndex(2), note(2));
    log.append(entries(2, 2..4), note(3));
    log.purge(id(1, 1), note(4));
    log.put_snapshot(Bytes::from_static(b"snapshot"), note(5));
    log.append(Vec::new(), note(6));
    wait(&subject, |done| log.save_vote(Bytes::from_static(b"vote 2"), done)).expect("durable");
    assert_eq!(*seen.lock().expect("not poisoned"), [0, 1, 2, 3, 4, 5, 6]);
}

fn an_append_with_a_hole_is_refused_and_keeps_nothing<S: Subject>(subject: S) {
    let log = group(&subject);
    wait(&subject, |done| log.append(entries(1, 0..3), done)).expect("an empty log takes index 0");
    for bad in [entries(1, 4..5), entries(1, 2..4), vec![entry(1, 3), entry(1, 5)]] {
        let refused = wait(&subject, |done| log.append(bad, done));
        assert!(matches!(refused, Err(LogError::Refused { .. })), "{refused:?}");
    }
    assert_eq!(log.state().last, Some(id(1, 2)));
    wait(&subject, |done| log.append(entries(1, 3..4), done)).expect("the next one fits");
}

fn a_read_stops_at_its_limit_yet_returns_one<S: Subject>(subject: S) {
    let log = group(&subject);
    let sized = |index| Entry { id: id(1, index), payload: Bytes::from(vec![index as u8; 100]) };
    wait(&subject, |done| log.append((1..11).map(sized).collect(), done)).expect("durable");
    let count = |limit| log.read(span(1..11), ByteCount(limit)).expect("readable").len();
    assert_eq!((count(0), count(99), count(100), count(250), count(1000)), (1, 1, 1, 2, 10));
    assert_eq!(log.read_cached(span(1..11), ByteCount(250)).map(|found| found.len()), Some(2));
    assert_eq!(log.read(span(3..3), ALL).expect("an empty range is no error"), []);
}

fn a_read_outside_the_log_is_refused<S: Subject>(subject: S) {
    let log = group(&subject);
    wait(&subject, |done| log.append(entries(1, 1..6), done)).expect("durable");
    wait(&subject, |done| log.purge(id(1, 2), done)).expect("durable");
    for range in [1..4, 2..3, 5..7, 9..10] {
        let refused = log.read(span(range.clone()), ALL);
        assert!(matches!(refused, Err(LogError::Refused { .. })), "{range:?}: {refused:?}");
        assert_eq!(log.read_cached(span(range), ALL), None);
    }
    assert_eq!(log.read(span(3..6), ALL).expect("readable"), entries(1, 3..6));
}

fn a_truncated_tail_is_replaced<S: Subject>(subject: S) {
    let log = group(&subject);
    wait(&subject, |done| log.append(entries(1, 1..6), done)).expect("durable");
    wait(&subject, |done| log.truncate(LogIndex(9), done)).expect("nothing to remove");
    assert_eq!(log.state().last, Some(id(1, 5)));
    wait(&subject, |done| log.truncate(LogIndex(3), done)).expect("durable");
    assert_eq!(log.state().last, Some(id(1, 2)));
    wait(&subject, |done| log.append(entries(2, 3..5), done)).expect("durable");
    let expected = [entries(1, 1..3), entries(2, 3..5)].concat();
    assert_eq!(log.read(span(1..5), ALL).expect("readable"), expected);
    let subject = subject.reopen();
    let log = group(&subject);
    assert_eq!(log.read(span(1..5), ALL).expect("readable"), expected);
    wait(&subject, |done| log.truncate(LogIndex(0), done)).expect("all of it");
    assert_eq!(log.state().last, None);
    assert_eq!(group(&subject.reopen()).state().last, None);
}

fn a_purge_may_pass_the_end<S: Subject>(subject: S) {
    let log = group(&subject);
    wait(&subject, |done| log.append(entries(1, 1..4), done)).expect("durable");
    wait(&subject, |done| log.purge(id(3, 10), done)).expect("durable");
    assert_eq!((log.state().purged, log.state().last), (Some(id(3, 10)), Some(id(3, 10))));
    let refused = wait(&subject, |done| log.append(entries(3, 4..5), done));
    assert!(matches!(refused, Err(LogError::Refused { .. })), "{refused:?}");
    wait(&subject, |done| log.append(entries(3, 11..13), done)).expect("follows the mark");
    let subject = subject.reopen();
    let log = group(&subject);
    assert_eq!((log.state().purged, log.state().last), (Some(id(3, 10)), Some(id(3, 12))));
    assert_eq!(log.read(span(11..13), ALL).expect("readable"), entries(3, 11..13));
}

fn a_purge_never_moves_back<S: Subject>(subject: S) {
    let log = group(&subject);
    wait(&subject, |done| log.append(entries(1, 2..9), done)).expect("any first index");
    wait(&subject, |done| log.purge(id(1, 1), done)).expect("below the first entry");
    assert_eq!(log.read(span(2..3), ALL).expect("readable"), entries(1, 2..3));
    wait(&subject, |done| log.purge(id(1, 5), done)).expect("durable");
    wait(&subject, |done| log.purge(id(1, 3), done)).expect("taken, changes nothing");
    assert_eq!(log.state().purged, Some(id(1, 5)));
    let refused = wait(&subject, |done| log.truncate(LogIndex(5), done));
    assert!(matches!(refused, Err(LogError::Refused { .. })), "{refused:?}");
    wait(&subject, |done| log.truncate(LogIndex(6), done)).expect("durable");
    assert_eq!(log.state().last, Some(id(1, 5)));
}

fn groups_do_not_see_each_other<S: Subject>(subject: S) {
    let node = subject.log();
    for group in (16..48).rev() {
        wait(&subject, |done| node.group(GroupId(group)).append(entries(group, 1..4), done)).expect("durable");
    }
    wait(&subject, |done| node.group(GroupId(20)).truncate(LogIndex(1), done)).expect("durable");
    drop(node);
    let subject = subject.reopen();
    let node = subject.log();
    assert_eq!(node.groups(), (16..48).map(GroupId).collect::<Vec<_>>());
    for group in (16..48).filter(|group| *group != 20) {
        let log = node.group(GroupId(group));
        assert_eq!(log.read(span(1..4), ALL).expect("readable"), entries(group, 1..4));
    }
    assert_eq!(node.group(GroupId(20)).state().last, None);
}

fn everything_survives_a_clean_close<S: Subject>(subject: S) {
    let log = group(&subject);
    log.save_committed(Some(Bytes::from_static(b"early")));
    wait(&subject, |done| log.save_vote(Bytes::from_static(b"vote"), done)).expect("durable");
    wait(&subject, |done| log.append(entries(1, 1..6), done)).expect("durable");
    wait(&subject, |done| log.put_snapshot(Bytes::from_static(b"snapshot"), done)).expect("durable");
    log.save_committed(Some(Bytes::from_static(b"late")));
    log.put_checkpoint(Bytes::from_static(b"checkpoint 1"));
    log.put_checkpoint(Bytes::from_static(b"checkpoint 2"));
    assert_eq!(log.checkpoint().expect("readable").as_deref(), Some(&b"checkpoint 2"[..]));
    let state = log.state();
    assert_eq!(state.committed.as_deref(), Some(&b"late"[..]));
    drop(log);
    let subject = subject.reopen();
    let log = group(&subject);
    assert_eq!(log.state(), state);
    assert_eq!(log.read(span(1..6), ALL).expect("readable"), entries(1, 1..6));
    assert_eq!(log.checkpoint().expect("readable").as_deref(), Some(&b"checkpoint 2"[..]));
    assert_eq!(log.snapshot().expect("readable").as_deref(), Some(&b"snapshot"[..]));
    log.save_committed(None);
    wait(&subject, |done| log.append(entries(1, 6..7), done)).expect("durable");
    let subject = subject.reopen();
    assert_eq!(group(&subject).state().committed, None);
    assert_eq!(group(&subject.reopen()).state().last, Some(id(1, 6)));
}

fn a_removed_group_starts_empty<S: Subject>(subject: S) {
    let node = subject.log();
    let log = node.group(GroupId(16));
    wait(&subject, |done| log.append(entries(1, 1..4), done)).expect("durable");
    wait(&subject, |done| log.put_snapshot(Bytes::from_static(b"snapshot"), done)).expect("durable");
    log.put_checkpoint(Bytes::from_static(b"checkpoint"));
    wait(&subject, |done| node.remove(GroupId(16), done)).expect("durable");
    assert_eq!(log.state(), crate::GroupState::default());
    assert_eq!(log.snapshot().expect("readable"), None);
    assert_eq!(log.checkpoint().expect("readable"), None);
    assert_eq!(node.groups(), []);
    wait(&subject, |done| log.append(entries(7, 1..2), done)).expect("a new life");
    drop((log, node));
    let subject = subject.reopen();
    let log = group(&subject);
    assert_eq!(log.read(span(1..2), ALL).expect("readable"), entries(7, 1..2));
    assert_eq!((log.snapshot().expect("readable"), log.checkpoint().expect("readable")), (None, None));
    let node = subject.log();
    wait(&subject, |done| node.remove(GroupId(16), done)).expect("durable");
    drop((log, node));
    assert_eq!(subject.reopen().log().groups(), []);
}

fn a_forgotten_group_keeps_a_vote_alone<S: Subject>(subject: S) {
    let node = subject.log();
    let log = node.group(GroupId(16));
    wait(&subject, |done| log.append(entries(1, 1..4), done)).expect("durable");
    wait(&subject, |done| log.save_vote(Bytes::from_static(b"before"), done)).expect("durable");
    wait(&subject, |done| log.put_snapshot(Bytes::from_static(b"snapshot"), done)).expect("durable");
    log.put_checkpoint(Bytes::from_static(b"checkpoint"));
    let vote = Bytes::from_static(b"after");
    wait(&subject, |done| node.forget(GroupId(16), vote.clone(), done)).expect("durable");
    let left = crate::GroupState { vote: Some(vote), ..crate::GroupState::default() };
    assert_eq!(log.state(), left);
    drop((log, node));
    let subject = subject.reopen();
    let log = group(&subject);
    assert_eq!(log.state(), left);
    assert_eq!((log.snapshot().expect("readable"), log.checkpoint().expect("readable")), (None, None));
    assert_eq!(subject.log().groups(), [GroupId(16)], "what is left of it can be found");
    wait(&subject, |done| log.append(entries(7, 5..6), done)).expect("a new life begins anywhere");
    let node = subject.log();
    wait(&subject, |done| node.remove(GroupId(16), done)).expect("durable");
    drop((log, node));
    assert_eq!(subject.reopen().log().groups(), []);
}

fn large_entries_keep_their_bytes<S: Subject>(subject: S) {
    let log = group(&subject);
    let large = |index: u64, size: usize| Entry {
        id: id(1, index),
        payload: (0..size).map(|at| (at as u64 * 31 + index) as u8).collect::<Vec<_>>().into(),
    };
    let sizes = [0, 1, 4031, 4032, 4033, 4096, 65_536, 1_048_512, 1_048_576, 5_300_000];
    let all: Vec<_> = sizes.iter().zip(1..).map(|(size, index)| large(index, *size)).collect();
    for entry in &all {
        wait(&subject, |done| log.append(vec![entry.clone()], done)).expect("durable");
    }
    drop(log);
    let subject = subject.reopen();
    let log = group(&subject);
    assert!(log.read(span(1..11), ALL).expect("readable") == all, "the bytes differ");
    wait(&subject, |done| log.append((11..21).map(|index| large(index, 600_000)).collect(), done)).expect("durable");
    drop(log);
    let subject = subject.reopen();
    let expected: Vec<_> = (11..21).map(|index| large(index, 600_000)).collect();
    assert!(group(&subject).read(span(11..21), ALL).expect("readable") == expected, "the bytes differ");
}

fn a_snapshot_is_replaced_whole<S: Subject>(subject: S) {
    let mut subject = subject;
    for size in [3_000_000_usize, 10, 0, 700_000] {
        let log = group(&subject);
        let bytes: Bytes = (0..size).map(|at| (at * 7 + size) as u8).collect::<Vec<_>>().into();
        wait(&subject, |done| log.put_snapshot(bytes.clone(), done)).expect("durable");
        assert!(log.snapshot().expect("readable").as_ref() == Some(&bytes), "the bytes differ");
        drop(log);
        subject = subject.reopen();
        assert!(group(&subject).snapshot().expect("readable").as_ref() == Some(&bytes), "the bytes differ");
    }
}
