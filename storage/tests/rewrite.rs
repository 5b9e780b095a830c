//! The file is written anew: what was purged and replaced is in no file any more, whenever the power fails.

use std::io::BufRead as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use ensign_storage::fault::{Crash, Fault, FaultDisk};
use ensign_storage::{Done, Entry, EntryId, FrameLog, GroupLog, LogConfig, LogError, NodeLog as _, Writer};

const DIR: &str = "vault";
const GROUP: GroupId = GroupId(2);
const SECRET: &[u8] = b"a wrapped key, which was destroyed";
const LIVING: &[u8] = b"a wrapped key that is still needed";
const MARK: u64 = 9_124;

type Outcome = Receiver<Result<(), LogError>>;

fn told() -> (Done, Outcome) {
    let (sender, receiver) = channel();
    (Box::new(move |outcome| drop(sender.send(outcome))), receiver)
}

fn config() -> LogConfig {
    LogConfig { prefill: ByteCount(256 << 10), ..LogConfig::tiny() }
}

fn open(disk: &FaultDisk) -> Result<(Arc<FrameLog>, Writer), ensign_storage::OpenError> {
    FrameLog::open(Arc::new(disk.clone()), Path::new(DIR), config())
}

fn entry(index: u64, payload: &[u8]) -> Entry {
    Entry { id: EntryId { term: Term(1), index: LogIndex(index) }, payload: Bytes::copy_from_slice(payload) }
}

/// A log that held the secret in an entry and in a snapshot, and holds neither any more. Closed, so every start finds the same.
fn used_disk() -> FaultDisk {
    let disk = FaultDisk::new();
    let (log, mut writer) = open(&disk).expect("the log opens");
    let group = log.group(GROUP);
    let ignore = || told().0;
    group.save_vote(Bytes::from_static(b"vote"), ignore());
    group.append((1..40).map(|index| entry(index, &[SECRET, &[index as u8; 300]].concat())).collect(), ignore());
    group.put_snapshot(Bytes::from([SECRET, &[7; 9_000]].concat()), ignore());
    writer.commit_queued().expect("the disk is healthy");
    group.append((40..50).map(|index| entry(index, LIVING)).collect(), ignore());
    group.put_snapshot(Bytes::from([LIVING, &[8; 9_000]].concat()), ignore());
    group.save_committed(Some(Bytes::from_static(b"committed")));
    group.purge(EntryId { term: Term(1), index: LogIndex(41) }, ignore());
    while writer.commit_queued().expect("the disk is healthy").records > 0 {}
    drop(group);
    drop(log);
    writer.close();
    disk
}

/// A search that is quick in a build for tests: it goes from one first byte of the pattern to the next.
fn contains(bytes: &[u8], pattern: &[u8]) -> bool {
    let mut rest = bytes;
    while rest.skip_until(pattern[0]).is_ok_and(|skipped| skipped > 0) {
        if bytes[bytes.len() - rest.len() - 1..].starts_with(pattern) {
            return true;
        }
    }
    false
}

fn holds(disk: &FaultDisk, what: &[u8]) -> bool {
    let files = disk.files().into_iter().filter_map(|(path, _)| disk.contents(&path));
    // Also what a file that was removed has left on the disk.
    files.chain(disk.remains()).any(|bytes| contains(&bytes, what))
}

fn check(group: &dyn GroupLog) {
    let state = group.state();
    assert_eq!(state.vote, Some(Bytes::from_static(b"vote")));
    assert_eq!(state.committed, Some(Bytes::from_static(b"committed")));
    assert_eq!(state.purged.map(|id| id.index), Some(LogIndex(41)));
    let entries = group.read(LogIndex(42)..LogIndex(50), ByteCount(u64::MAX)).expect("they are there");
    assert!(entries.len() == 8 && entries.iter().all(|entry| entry.payload == LIVING));
    assert_eq!(group.snapshot().expect("it is sound").expect("there is one"), [LIVING, &[8; 9_000]].concat());
}

fn rewrite(log: &FrameLog, writer: &mut Writer) -> Result<(), LogError> {
    let (done, outcome) = told();
    log.group(GROUP).rewrite(MARK, done);
    let _ = writer.commit_queued();
    outcome.recv().expect("it is called back")
}

#[test]
fn what_was_purged_and_replaced_is_in_no_file_after_a_rewrite_and_the_rest_is() {
    let disk = used_disk();
    assert!(holds(&disk, SECRET), "redb keeps the bytes of free pages");
    let (log, mut writer) = open(&disk).unwrap();
    assert_eq!(log.group(GROUP).mark(), 0);
    rewrite(&log, &mut writer).unwrap();
    assert!(!holds(&disk, SECRET) && !holds(&disk, &SECRET[..16]));
    assert!(holds(&disk, LIVING));
    check(&*log.group(GROUP));
    assert_eq!(log.group(GROUP).mark(), MARK);
    assert_eq!(disk.files().len(), 1, "{:?}", disk.files());
    // It goes on as before, also after a crash and after a clean close.
    log.group(GROUP).append(vec![entry(50, b"next")], told().0);
    log.group(GROUP).put_snapshot(Bytes::from_static(b"next"), told().0);
    writer.commit_queued().unwrap();
    disk.fence();
    drop((log, writer));
    disk.crash(Crash::DropAll, 1);
    for _ in 0..2 {
        let (log, writer) = open(&disk).unwrap();
        let group = log.group(GROUP);
        assert_eq!((group.mark(), group.state().last.map(|id| id.index)), (MARK, Some(LogIndex(50))));
        assert_eq!(group.snapshot().unwrap().unwrap(), "next");
        drop((group, log));
        writer.close();
    }
}

#[test]
fn a_power_failure_at_any_moment_of_a_rewrite_leaves_a_whole_log_and_a_mark_that_is_true() {
    let (mut marked, mut unmarked) = (0, 0);
    for crash in [Crash::DropAll, Crash::KeepAll, Crash::Sectors] {
        for moment in 0.. {
            let disk = used_disk();
            let (log, mut writer) = open(&disk).unwrap();
            disk.inject(Fault::PowerOff(moment));
            let outcome = rewrite(&log, &mut writer);
            let done = outcome.is_ok() && !disk.powered_off();
            disk.fence();
            drop((log, writer));
            disk.crash(crash, moment);
            // The start may be cut short as well.
            for again in 0..3 {
                disk.inject(Fault::PowerOff(moment % 7 + again));
                let opened = open(&disk);
                disk.fence();
                drop(opened);
                disk.crash(crash, moment + again);
            }
            let (log, mut writer) = open(&disk).unwrap_or_else(|error| panic!("{crash:?} at {moment}: {error}"));
            check(&*log.group(GROUP));
            match log.group(GROUP).mark() {
                MARK => {
                    assert!(!holds(&disk, SECRET), "{crash:?} at {moment}: it says that the secret is gone");
                    marked += 1;
                }
                mark => {
                    assert_eq!(mark, 0);
                    assert!(!done, "{crash:?} at {moment}: it was done");
                    unmarked += 1;
                }
            }
            assert_eq!(disk.files().len(), 1, "{crash:?} at {moment}: {:?}", disk.files());
            rewrite(&log, &mut writer).unwrap();
            assert!(!holds(&disk, SECRET), "{crash:?} at {moment}");
            check(&*log.group(GROUP));
            if done {
                break;
            }
        }
    }
    assert!(marked > 10 && unmarked > 30, "{marked} with the new file, {unmarked} with the old one");
}

#[test]
fn a_rewrite_for_which_there_is_no_room_changes_nothing_and_works_later() {
    let disk = used_disk();
    let (log, mut writer) = open(&disk).unwrap();
    disk.set_capacity(Some(ByteCount(disk.allocated().0 + (64 << 10))));
    assert!(matches!(rewrite(&log, &mut writer), Err(LogError::Full { .. })));
    assert_eq!(disk.files().len(), 1, "half a file is left: {:?}", disk.files());
    check(&*log.group(GROUP));
    log.group(GROUP).save_vote(Bytes::from_static(b"vote"), told().0);
    writer.commit_queued().unwrap();
    disk.set_capacity(None);
    rewrite(&log, &mut writer).unwrap();
    check(&*log.group(GROUP));
    assert!(!holds(&disk, SECRET));
}

#[test]
fn a_log_that_is_gone_while_what_it_replaced_is_there_is_not_begun_anew() {
    let disk = used_disk();
    let log = Path::new(DIR).join("log.redb");
    disk.replace(&Path::new(DIR).join("log.redb.old"), disk.contents(&log).unwrap());
    ensign_storage::Disk::remove(&disk, &log).unwrap();
    let refused = open(&disk).unwrap_err();
    assert!(matches!(refused, ensign_storage::OpenError::Missing { .. }), "{refused}");
    assert!(!disk.files().iter().any(|(path, _)| *path == log), "nothing is made in its place");
}
