//! Many threads on one log: appends, reads of what is leaving memory, truncations and purges, all at once.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use ensign_storage::fault::SplitMix;
use ensign_storage::testing::{outcome, span, wait_for_space};
use ensign_storage::{Entry, EntryId, FaultDisk, FrameLog, GroupLog, LogConfig, LogError, NodeLog};

const GROUPS: u64 = 6;
const ENTRIES: u64 = 1500;

fn entry(group: u64, term: u64, index: u64) -> Entry {
    let stamp = SplitMix(group << 48 | term << 32 | index).next().to_le_bytes();
    Entry {
        id: EntryId { term: Term(term), index: LogIndex(index) },
        payload: Bytes::from(stamp.repeat(1 + index as usize % 90)),
    }
}

fn last_index(log: &dyn GroupLog) -> u64 {
    log.state().last.map_or(0, |last| last.index.0)
}

/// Appends with a window of unacknowledged entries, cuts its own tail now and then, and purges its head.
fn write(log: &dyn GroupLog, group: u64, stable: &AtomicU64) {
    let (sender, receiver) = channel();
    let (mut term, mut waiting) = (1, 0);
    let mut rng = SplitMix(group);
    while last_index(log) < ENTRIES {
        let next = last_index(log) + 1;
        if next > 20 && rng.below(40) == 0 {
            // What readers are told is stable stays.
            let from = (next - rng.below(8)).max(stable.load(Ordering::SeqCst) + 1);
            log.truncate(LogIndex(from), Box::new(|_| ()));
            term += 1;
            continue;
        }
        let count = 1 + rng.below(4);
        let sender = sender.clone();
        wait_for_space(log);
        log.append(
            (next..next + count).map(|index| entry(group, term, index)).collect(),
            Box::new(move |outcome| drop(sender.send(outcome))),
        );
        waiting += 1;
        if rng.below(30) == 0 {
            while waiting > 0 {
                receiver.recv().expect("the log calls back").expect("the disk works");
                waiting -= 1;
            }
            stable.store(last_index(log), Ordering::SeqCst);
        }
        if rng.below(60) == 0 && next > 400 {
            log.purge(EntryId { term: Term(1), index: LogIndex(next - 400) }, Box::new(|_| ()));
        }
    }
}

/// Reads stable ranges at random; an index keeps its bytes for as long as it is there.
fn read(log: &dyn GroupLog, group: u64, stable: &AtomicU64, stop: &AtomicBool) -> u64 {
    let (mut rng, mut reads) = (SplitMix(group ^ 0xbeef), 0);
    while !stop.load(Ordering::SeqCst) {
        let end = stable.load(Ordering::SeqCst) + 1;
        let first = log.state().purged.map_or(1, |purged| purged.index.0 + 1);
        if end <= first {
            thread::yield_now();
            continue;
        }
        let start = first + rng.below(end - first);
        match log.read(span(start..end.min(start + 50)), ByteCount(20_000)) {
            Ok(found) => {
                assert!(!found.is_empty());
                for (entry_read, index) in found.iter().zip(start..) {
                    assert_eq!(*entry_read, entry(group, entry_read.id.term.0, index), "group {group}, index {index}");
                }
                reads += 1;
            }
            // Purged meanwhile.
            Err(LogError::Refused { .. }) => {}
            Err(error) => panic!("group {group}: {error}"),
        }
    }
    reads
}

#[test]
fn readers_and_writers_of_many_groups_do_not_disturb_each_other() {
    let disk = FaultDisk::new();
    let config = LogConfig { tail: ByteCount(10_000), ..LogConfig::tiny() };
    let (log, writer) = FrameLog::open(Arc::new(disk.clone()), Path::new("log"), config).unwrap();
    let writer = writer.spawn().unwrap();
    let reads: u64 = thread::scope(|scope| {
        let pairs: Vec<_> = (16..16 + GROUPS)
            .map(|group| {
                let (stable, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
                let (reader, writer) = (log.group(GroupId(group)), log.group(GroupId(group)));
                let reader = {
                    let (stable, stop) = (Arc::clone(&stable), Arc::clone(&stop));
                    scope.spawn(move || read(&*reader, group, &stable, &stop))
                };
                (scope.spawn(move || write(&*writer, group, &stable)), stop, reader)
            })
            .collect();
        pairs
            .into_iter()
            .map(|(writer, stop, reader)| {
                let wrote = writer.join();
                stop.store(true, Ordering::SeqCst);
                wrote.expect("the writer ends");
                reader.join().expect("the reader saw nothing wrong")
            })
            .sum()
    });
    assert!(reads > 100, "{reads}");
    // What was submitted before it is durable with it, and leaves memory.
    let (done, durable) = outcome();
    log.group(GroupId(16)).save_vote(Bytes::from_static(b"vote"), done);
    durable.recv().unwrap().unwrap();
    let stats = log.stats();
    assert!(stats.purged_frames > 0 && stats.tail <= 10_000, "{stats:?}");
    let states: Vec<_> = (16..16 + GROUPS).map(|group| log.group(GroupId(group)).state()).collect();
    log.close();
    writer.join().unwrap();
    let (log, _writer) = FrameLog::open(Arc::new(disk), Path::new("log"), config).unwrap();
    assert_eq!((16..16 + GROUPS).map(|group| log.group(GroupId(group)).state()).collect::<Vec<_>>(), states);
}
