use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use ensign_proto::{LogIndex, Term};

use super::*;
use crate::fault::FaultDisk;
use crate::log::{Entry, EntryId};
use crate::testing::{entries, outcome};

fn open(config: LogConfig) -> (Arc<FrameLog>, Writer) {
    FrameLog::open(Arc::new(FaultDisk::new()), Path::new("log"), config).unwrap()
}

fn sized(index: u64, size: usize) -> Entry {
    Entry { id: EntryId { term: Term(1), index: LogIndex(index) }, payload: Bytes::from(vec![0; size]) }
}

fn commit(writer: &mut Writer) {
    while writer.commit_queued().unwrap().records > 0 {}
}

#[test]
fn a_removed_group_is_forgotten_once_nobody_asks_for_it() {
    let (log, mut writer) = open(LogConfig::tiny());
    let known = || log.shared.all_groups().len();
    for id in (16..32).map(GroupId) {
        let group = log.group(id);
        group.append(entries(1, 1..4), outcome().0);
        group.put_checkpoint(Bytes::from_static(b"checkpoint"));
        commit(&mut writer);
        let (done, receiver) = outcome();
        log.remove(id, done);
        commit(&mut writer);
        receiver.recv().unwrap().unwrap();
        // Its handle still works, and starts an empty log.
        assert_eq!(known(), 1);
        assert_eq!(group.state().last, None);
        drop(group);
    }
    let kept = log.group(GroupId(7));
    kept.append(entries(1, 1..4), outcome().0);
    log.remove(GroupId(99), outcome().0);
    commit(&mut writer);
    assert_eq!(known(), 1);
    assert_eq!(log.groups(), [GroupId(7)]);
}

#[test]
fn memory_gives_up_no_more_of_a_busy_group_than_it_has_to() {
    let config = LogConfig::tiny();
    let (log, mut writer) = open(config);
    let group = log.group(GroupId(16));
    for index in 1..200 {
        group.append(vec![sized(index, 2000)], outcome().0);
        commit(&mut writer);
        let tail = log.stats().tail;
        assert!(tail <= config.tail.0, "{tail}");
        assert!(index < 40 || tail > config.tail.0 - 3000, "{tail} of {} bytes are in memory", config.tail);
    }
    // So a reader that is not far behind never goes to the disk.
    let recent = LogIndex(180)..LogIndex(200);
    assert_eq!(group.read_cached(recent, ByteCount(u64::MAX)).map(|found| found.len()), Some(20));
}

#[test]
fn an_append_never_blocks_and_says_beforehand_that_it_should_wait() {
    let config = LogConfig::tiny();
    let (log, mut writer) = open(config);
    log.shared.queue.lock().drained = true;
    let group = log.group(GroupId(16));
    let mut context = Context::from_waker(Waker::noop());
    for index in 1..10 {
        group.append(vec![sized(index, 100_000)], outcome().0);
    }
    assert!(log.stats().queued > config.queue.0);
    assert_eq!(group.poll_space(&mut context), Poll::Pending);
    commit(&mut writer);
    assert_eq!(group.poll_space(&mut context), Poll::Ready(()));
}

#[test]
fn room_is_written_ahead_in_proportion_to_what_is_committed() {
    let config = LogConfig { commit: LogConfig::default().commit, ..LogConfig::tiny() };
    let (log, mut writer) = open(config);
    let group = log.group(GroupId(16));
    let (mut worst, mut index) = (0, 1);
    while log.stats().bytes < 100 << 20 {
        let before = log.stats();
        group.append(vec![sized(index, 30_000)], outcome().0);
        commit(&mut writer);
        index += 1;
        let after = log.stats();
        // Beyond what any log begins with.
        if after.bytes > 4 << 20 {
            worst = worst.max(after.room - before.room);
        }
    }
    let stats = log.stats();
    assert!(worst <= 2 << 20, "one commit of 30 KB had to wait for {worst} bytes of zeros");
    assert!(stats.room < 5 * stats.bytes / 2, "{stats:?}");
}

#[test]
fn room_is_only_reserved_while_much_is_queued() {
    let config = LogConfig { commit: LogConfig::default().commit, ..LogConfig::tiny() };
    let (log, mut writer) = open(config);
    let group = log.group(GroupId(16));
    let (mut index, mut grew) = (1, false);
    let (zeros, begin) = (log.stats().room, log.shared.store.space().physical());
    while log.stats().bytes < 32 << 20 {
        for _ in 0..20 {
            group.append(vec![sized(index, 30_000)], outcome().0);
            index += 1;
        }
        writer.commit_queued().unwrap();
        assert_eq!(log.stats().room, zeros, "the events had to wait for zeros");
        grew |= log.shared.store.space().physical() > begin;
    }
    assert!(grew, "there was no need for room");
}
