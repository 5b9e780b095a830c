//! Room that is reserved while much is queued, on a disk that gives only a part of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use ensign_storage::fault::{Crash, Fault};
use ensign_storage::testing::{ALL, outcome, span};
use ensign_storage::{
    Door, Entry, EntryId, FaultDisk, FrameLog, GroupLog, LogConfig, LogError, NodeLog, OpenError, Writer,
};

const GROUP: GroupId = GroupId(16);

fn open(disk: &FaultDisk) -> Result<(Arc<FrameLog>, Writer), OpenError> {
    FrameLog::open(Arc::new(disk.clone()), Path::new("log"), LogConfig::tiny())
}

fn file() -> PathBuf {
    Path::new("log").join("log.redb")
}

fn sized(index: u64, size: usize) -> Entry {
    Entry { id: EntryId { term: Term(1), index: LogIndex(index) }, payload: Bytes::from(vec![index as u8; size]) }
}

/// A log with much in its queue, which therefore grows by reservations, on a disk that fills up.
struct Flood {
    log: Arc<FrameLog>,
    group: Arc<dyn GroupLog>,
    writer: Writer,
    /// What was taken, and whether it is durable.
    waiting: Vec<(u64, Receiver<Result<(), LogError>>)>,
    /// The last index that was acknowledged.
    promised: u64,
}

impl Flood {
    const SIZE: usize = 30_000;

    fn new(disk: &FaultDisk) -> Self {
        let (log, mut writer) = open(disk).expect("a healthy disk");
        // The first room is written out while nothing waits.
        writer.commit_queued().expect("a healthy disk");
        Self { group: log.group(GROUP), log, writer, waiting: Vec::new(), promised: 0 }
    }

    /// Commits, with more than 256 KiB queued before each commit, until `enough` or until an append is refused.
    fn pour(&mut self, mut enough: impl FnMut(&Self) -> bool) -> Option<LogError> {
        for _ in 0..1_000 {
            if enough(self) {
                return None;
            }
            while self.log.stats().queued < 400_000 {
                let index = self.group.state().last.map_or(1, |last| last.index.0 + 1);
                let (done, receiver) = outcome();
                self.group.append(vec![sized(index, Self::SIZE)], done);
                if let Ok(Err(refused)) = receiver.try_recv() {
                    return Some(refused);
                }
                self.waiting.push((index, receiver));
            }
            let outcome = self.commit();
            assert!(matches!(outcome, Ok(()) | Err(LogError::Full { .. })), "{outcome:?}");
        }
        panic!("it never was enough, and no append was refused");
    }

    fn commit(&mut self) -> Result<(), LogError> {
        let outcome = self.writer.commit_queued().map(drop);
        self.waiting.retain(|(index, receiver)| match receiver.try_recv() {
            Ok(Ok(())) => {
                assert_eq!(*index, self.promised + 1, "acknowledged out of order");
                self.promised = *index;
                false
            }
            Ok(Err(error)) => panic!("entry {index} was taken and then failed: {error}"),
            Err(_) => true,
        });
        outcome
    }
}

/// Everything that was promised is there, as it was written.
fn assert_kept(log: &FrameLog, promised: u64, spare: u64) {
    let found = log.group(GROUP).read(span(1..promised + 1), ALL).expect("it can be read");
    assert_eq!(found.len() as u64, promised, "spare {spare}");
    assert!(found.iter().zip(1..).all(|(entry, index)| *entry == sized(index, Flood::SIZE)), "spare {spare}");
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_reservation_costs_nothing_that_was_acknowledged() {
    let mut cut_short = 0;
    for spare in (0..12).map(|n| n * 1203 * 1024 + n) {
        let disk = FaultDisk::new();
        let mut flood = Flood::new(&disk);
        disk.set_capacity(Some(ByteCount(disk.allocated().0 + spare)));
        let refused = flood.pour(|flood| flood.promised > 10_000).expect("the disk fills up");
        assert!(matches!(refused, LogError::Full { .. }), "spare {spare}: {refused:?}");
        assert!(matches!(flood.log.writable(), Err(LogError::Full { .. })), "spare {spare}");
        assert!(!flood.group.has_room(ByteCount(1000), Door::Proposal), "spare {spare}");
        // What it could not use is left to others.
        let file_bytes = flood.log.stats().file;
        assert_eq!(disk.contents(&file()).unwrap().len() as u64, file_bytes, "spare {spare}");
        assert_eq!(disk.allocated(), ByteCount(file_bytes), "spare {spare}");
        assert!(flood.group.read(span(1..2), ALL).is_ok(), "spare {spare}");
        // What was taken before is written into the room that is there.
        while flood.log.stats().queued > 0 {
            flood.commit().unwrap();
        }
        assert!(flood.waiting.is_empty() && flood.promised > 10, "spare {spare}: {}", flood.promised);
        assert_kept(&flood.log, flood.promised, spare);
        cut_short += disk.reservations().1;

        let promised = flood.promised;
        if spare % 2 == 0 {
            // The power fails while it is full.
            disk.crash(Crash::Sectors, spare);
            drop(flood);
            disk.set_capacity(None);
            let (log, _writer) = open(&disk).unwrap();
            assert_kept(&log, promised, spare);
            continue;
        }
        // Room appears, and it goes on, with reservations as before.
        disk.set_capacity(None);
        flood.commit().unwrap();
        flood.log.writable().unwrap();
        let before = disk.reservations();
        let more = promised + 300;
        assert!(flood.pour(|flood| flood.promised > more).is_none(), "spare {spare}");
        let after = disk.reservations();
        assert!(after.0 > before.0 && after.1 == before.1, "spare {spare}: {before:?}, then {after:?}");
        let promised = flood.promised;
        disk.crash(Crash::Sectors, spare);
        drop(flood);
        let (log, _writer) = open(&disk).unwrap();
        assert_kept(&log, promised, spare);
    }
    assert!(cut_short >= 12, "{cut_short} reservations were cut short");
}

#[test]
fn a_reservation_that_fails_for_another_reason_fences_the_log_and_a_restart_finds_what_was_promised() {
    // The commit before which room is reserved for the first time.
    let disk = FaultDisk::new();
    let mut flood = Flood::new(&disk);
    flood.pour(|_| disk.reservations().0 > 0);
    let commits = flood.log.stats().commits;

    let disk = FaultDisk::new();
    let mut flood = Flood::new(&disk);
    flood.pour(|flood| flood.log.stats().commits + 1 == commits);
    assert!(disk.reservations().0 == 0 && flood.promised > 10);
    disk.inject(Fault::Write(0));
    let failed = flood.writer.commit_queued().unwrap_err().to_string();
    assert!(failed.contains("the file cannot be written ahead"), "{failed}");
    assert_eq!(disk.reservations(), (1, 1), "it was no reservation that failed");
    assert!(matches!(flood.log.writable(), Err(LogError::Fenced { .. })));
    for (index, receiver) in &flood.waiting {
        assert!(matches!(receiver.try_recv(), Ok(Err(LogError::Fenced { .. }))), "entry {index} waits for ever");
    }
    let promised = flood.promised;
    disk.crash(Crash::KeepAll, 0);
    drop(flood);
    let (log, _writer) = open(&disk).unwrap();
    assert_kept(&log, promised, 0);
}
