//! A disk that fails in every other way than losing power: full, broken, rotten, misdirected; and what a log does about it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use ensign_storage::fault::{Crash, Fault, SplitMix};
use ensign_storage::testing::{ALL, entries, id, outcome, span};
use ensign_storage::{
    Door, Entry, EntryId, FaultDisk, FrameLog, GroupLog, LogConfig, LogError, NodeLog, OpenError, Writer,
};

const GROUP: GroupId = GroupId(16);

fn open(disk: &FaultDisk, config: LogConfig) -> Result<(Arc<FrameLog>, Writer), OpenError> {
    FrameLog::open(Arc::new(disk.clone()), Path::new("log"), config)
}

fn file() -> PathBuf {
    Path::new("log").join("log.redb")
}

fn sized(index: u64, size: usize) -> Entry {
    Entry { id: EntryId { term: Term(1), index: LogIndex(index) }, payload: Bytes::from(vec![index as u8; size]) }
}

/// Appends, commits, and returns what the callback heard; `None` while it waits.
fn append(log: &Arc<dyn GroupLog>, writer: &mut Writer, entries: Vec<Entry>) -> Option<Result<(), LogError>> {
    let (done, receiver) = outcome();
    log.append(entries, done);
    // What was queued before it may fill a commit of its own.
    while writer.commit_queued().is_ok_and(|committed| committed.records > 0) {}
    receiver.try_recv().ok()
}

#[test]
fn a_failed_write_fences_the_log_for_good() {
    for fault in [Fault::Write(0), Fault::Sync(0), Fault::EveryWriteFrom(3)] {
        let disk = FaultDisk::new();
        let (log, mut writer) = open(&disk, LogConfig::tiny()).unwrap();
        let group = log.group(GROUP);
        append(&group, &mut writer, entries(1, 1..3)).unwrap().unwrap();
        disk.inject(fault);
        let (done, early) = outcome();
        group.save_vote(Bytes::from_static(b"vote"), done);
        let failed = append(&group, &mut writer, entries(1, 3..5)).unwrap();
        assert!(matches!(failed, Err(LogError::Fenced { .. })), "{fault:?}: {failed:?}");
        assert!(matches!(early.recv().unwrap(), Err(LogError::Fenced { .. })));
        disk.heal();
        // The disk is well again, and still nothing may be retried.
        let failed = append(&group, &mut writer, entries(1, 5..6)).unwrap();
        assert!(matches!(failed, Err(LogError::Fenced { .. })), "{fault:?}: {failed:?}");
        assert!(matches!(group.read(span(1..3), ALL), Err(LogError::Fenced { .. })));
        assert!(matches!(log.writable(), Err(LogError::Fenced { .. })));
        drop(group);
        drop((log, writer));
        // A restart finds what was promised before.
        disk.crash(Crash::DropAll, 1);
        let (log, _writer) = open(&disk, LogConfig::tiny()).unwrap();
        assert_eq!(log.group(GROUP).read(span(1..3), ALL).unwrap(), entries(1, 1..3));
        assert_eq!(log.group(GROUP).state().last, Some(id(1, 2)));
    }
}

#[test]
fn a_read_error_fences_since_redb_will_not_go_on() {
    let disk = FaultDisk::new();
    let config = LogConfig { tail: ByteCount(0), cache: ByteCount(0), ..LogConfig::tiny() };
    let (log, mut writer) = open(&disk, config).unwrap();
    let group = log.group(GROUP);
    append(&group, &mut writer, vec![sized(1, 50_000)]).unwrap().unwrap();
    disk.inject(Fault::Read(0));
    assert!(matches!(group.read(span(1..2), ALL), Err(LogError::Fenced { .. })));
    assert!(matches!(log.writable(), Err(LogError::Fenced { .. })));
}

#[test]
fn the_writer_ends_with_the_log_and_nobody_waits_for_ever() {
    // A read that fails ends the log while the writer sleeps.
    let disk = FaultDisk::new();
    let config = LogConfig { tail: ByteCount(0), cache: ByteCount(0), ..LogConfig::tiny() };
    let (log, writer) = open(&disk, config).unwrap();
    let writer = writer.spawn().unwrap();
    let group = log.group(GROUP);
    let (done, receiver) = outcome();
    group.append(vec![sized(1, 50_000)], done);
    receiver.recv().unwrap().unwrap();
    disk.inject(Fault::Read(0));
    assert!(matches!(group.read(span(1..2), ALL), Err(LogError::Fenced { .. })));
    writer.join().unwrap();
    // A writer that is dropped, as a killed node's is, ends the log too.
    let (log, writer) = open(&FaultDisk::new(), config).unwrap();
    let (done, receiver) = outcome();
    log.group(GROUP).append(entries(1, 1..2), done);
    drop(writer);
    assert!(matches!(receiver.recv().unwrap(), Err(LogError::Closed)));
    assert!(matches!(log.writable(), Err(LogError::Closed)));
}

#[test]
fn a_full_disk_refuses_appends_serves_reads_takes_votes_and_resumes() {
    let disk = FaultDisk::new();
    let (log, mut writer) = open(&disk, LogConfig::tiny()).unwrap();
    let group = log.group(GROUP);
    disk.set_capacity(Some(ByteCount(12 << 20)));
    let mut index = 1;
    let refused = loop {
        match append(&group, &mut writer, vec![sized(index, 30_000)]) {
            Some(Ok(())) => index += 1,
            Some(Err(error)) => break error,
            None => panic!("the append neither failed nor succeeded at {index}"),
        }
        assert!(index < 10_000, "the disk never filled up");
    };
    assert!(matches!(refused, LogError::Full { .. }), "{refused:?}");
    assert!(index > 100, "refused much too early: {index}");
    let last = group.state().last.unwrap();
    assert_eq!(last, id(1, index - 1), "the refused entry is not kept");
    assert_eq!(group.read(span(1..2), ALL).unwrap(), [sized(1, 30_000)]);
    // What keeps a group alive still works, many times over.
    for n in 0..200_u32 {
        let (done, receiver) = outcome();
        group.save_vote(Bytes::copy_from_slice(&n.to_le_bytes()), done);
        writer.commit_queued().unwrap();
        receiver.try_recv().unwrap().unwrap();
    }
    // Small appends are refused as well once the last room is gone, and say so ahead.
    while let Some(Ok(())) = append(&group, &mut writer, vec![sized(index, 3000)]) {
        index += 1;
    }
    assert!(matches!(append(&group, &mut writer, vec![sized(index, 3000)]), Some(Err(LogError::Full { .. }))));
    // Room appears, and the same append succeeds.
    disk.set_capacity(None);
    writer.commit_queued().unwrap();
    log.writable().unwrap();
    append(&group, &mut writer, vec![sized(index, 30_000)]).unwrap().unwrap();
    drop(group);
    drop(log);
    writer.close();
    let (log, _writer) = open(&disk, LogConfig::tiny()).unwrap();
    assert_eq!(log.group(GROUP).state().last, Some(id(1, index)));
    let all = log.group(GROUP).read(span(1..index + 1), ALL).unwrap();
    assert!(all.iter().zip(1..).all(|(entry, index)| entry.id == id(1, index) && entry.payload[0] == index as u8));
}

#[test]
fn a_filling_disk_turns_proposals_away_while_it_still_takes_what_is_on_its_way() {
    let disk = FaultDisk::new();
    let (log, mut writer) = open(&disk, LogConfig::tiny()).unwrap();
    let group = log.group(GROUP);
    disk.set_capacity(Some(ByteCount(12 << 20)));
    let size = 30_000;
    let mut index = 1;
    while group.has_room(ByteCount(size), Door::Proposal) {
        append(&group, &mut writer, vec![sized(index, size as usize)]).unwrap().unwrap();
        index += 1;
    }
    let mut taken = 0;
    while group.has_room(ByteCount(size), Door::Replication) {
        append(&group, &mut writer, vec![sized(index, size as usize)]).unwrap().unwrap();
        (index, taken) = (index + 1, taken + size);
    }
    assert!(taken + size >= LogConfig::tiny().queue.0, "only {taken} bytes on their way would have been taken");
    assert!(matches!(append(&group, &mut writer, vec![sized(index, 60_000)]), Some(Err(LogError::Full { .. }))));
    disk.set_capacity(None);
    writer.commit_queued().unwrap();
    assert!(group.has_room(ByteCount(size), Door::Proposal));
}

#[test]
fn a_full_disk_is_relieved_by_a_purge() {
    let disk = FaultDisk::new();
    let (log, mut writer) = open(&disk, LogConfig::tiny()).unwrap();
    let group = log.group(GROUP);
    disk.set_capacity(Some(ByteCount(12 << 20)));
    let mut index = 1;
    while let Some(Ok(())) = append(&group, &mut writer, vec![sized(index, 30_000)]) {
        index += 1;
    }
    let (done, receiver) = outcome();
    group.purge(id(1, index - 5), done);
    writer.commit_queued().unwrap();
    receiver.try_recv().unwrap().unwrap();
    // Frames go with the commits that follow.
    for n in 0..60_u32 {
        let (done, _) = outcome();
        group.save_vote(Bytes::copy_from_slice(&n.to_le_bytes()), done);
        writer.commit_queued().unwrap();
    }
    append(&group, &mut writer, vec![sized(index, 30_000)]).unwrap().unwrap();
}

#[test]
fn a_growth_that_redb_is_refused_loses_nothing() {
    // The disk fills up at many different sizes, and what comes is larger than the room that is kept: whatever was promised
    // stays, and it goes on.
    let mut reopened = 0;
    for spare in (0..40).map(|n| n * 161 * 1024) {
        let disk = FaultDisk::new();
        let config = LogConfig { queue: ByteCount(1 << 10), commit: ByteCount(1 << 10), ..LogConfig::tiny() };
        let (log, mut writer) = open(&disk, config).unwrap();
        let group = log.group(GROUP);
        append(&group, &mut writer, vec![sized(1, 10)]).unwrap().unwrap();
        disk.set_capacity(Some(ByteCount(disk.allocated().0 + spare)));
        let mut promised = 1;
        let mut waiting = Vec::new();
        for index in 2..20 {
            if group.state().last != Some(id(1, index - 1)) {
                break;
            }
            match append(&group, &mut writer, vec![sized(index, 2_000_000)]) {
                Some(Ok(())) => promised = index,
                Some(Err(LogError::Full { .. })) => break,
                Some(Err(error)) => panic!("spare {spare}: {error}"),
                None => waiting.push(index),
            }
        }
        assert_eq!(group.read(span(1..promised + 1), ALL).unwrap().len() as u64, promised);
        disk.set_capacity(None);
        while writer.commit_queued().unwrap().records > 0 {}
        reopened += log.stats().reopened;
        let next = group.state().last.unwrap().index.0 + 1;
        append(&group, &mut writer, vec![sized(next, 400_000)]).unwrap().unwrap();
        drop((log, writer));
        disk.crash(Crash::DropAll, spare);
        let (log, _writer) = open(&disk, config).unwrap();
        assert_eq!(
            log.group(GROUP).read(span(1..next + 1), ALL).unwrap().len() as u64,
            next,
            "spare {spare}, waited {waiting:?}"
        );
    }
    assert!(reopened > 0, "no growth was refused");
}

/// A closed log of a few groups, with every kind of record in it.
fn written(config: LogConfig) -> FaultDisk {
    let disk = FaultDisk::new();
    let (log, mut writer) = open(&disk, config).expect("a healthy disk");
    for n in 0..40_u64 {
        let group = log.group(GroupId(16 + n % 3));
        let first = group.state().last.map_or(1, |last| last.index.0 + 1);
        append(&group, &mut writer, (first..first + 4).map(|index| sized(index, 1000 + 700 * n as usize)).collect())
            .expect("a healthy disk")
            .expect("a healthy disk");
        group.put_checkpoint(Bytes::from(vec![n as u8; 300]));
        group.save_committed(Some(Bytes::from(vec![n as u8; 16])));
        if n % 7 == 0 {
            group.put_snapshot(Bytes::from(vec![n as u8; 5000]), outcome().0);
            group.save_vote(Bytes::from(vec![n as u8; 9]), outcome().0);
        }
    }
    while writer.commit_queued().expect("a healthy disk").records > 0 {}
    drop(log);
    writer.close();
    disk
}

/// Everything that the log holds, or what it refuses with.
fn everything(disk: &FaultDisk, config: LogConfig) -> Result<String, String> {
    let before = disk.contents(&file());
    let (log, _writer) = open(disk, config).map_err(|error| {
        assert!(disk.contents(&file()) == before, "a file that was refused was changed: {error}");
        error.to_string()
    })?;
    let mut found = Vec::new();
    for id in log.groups() {
        let (group, error) = (log.group(id), |error: LogError| error.to_string());
        let state = group.state();
        let first = state.purged.map_or(1, |purged| purged.index.0 + 1);
        let end = state.last.map_or(first, |last| last.index.0 + 1);
        let all = group.read(span(first..end), ALL).map_err(error)?;
        let (snapshot, checkpoint) = (group.snapshot().map_err(error)?, group.checkpoint().map_err(error)?);
        let ids: Vec<_> = all.iter().map(|entry| (entry.id, entry.payload[0])).collect();
        let blobs = [snapshot, checkpoint].map(|blob| blob.map(|blob| (blob.len(), crc32c::crc32c(&blob))));
        found.push(format!("{id} {state:?} {blobs:?} {ids:?}"));
        let intact = |entry: &Entry| entry.payload == vec![entry.payload[0]; entry.payload.len()];
        assert!(all.iter().all(intact), "damage was served");
    }
    Ok(found.join("\n"))
}

#[test]
fn a_flipped_bit_is_refused_or_harmless_but_never_served() {
    std::panic::set_hook(Box::new(|info| {
        // redb panics on some damage; the log takes that for the damage it is, and the test log stays readable.
        let ours = info.location().is_some_and(|at| at.file().contains("tests/faults.rs"));
        if ours {
            std::io::Write::write_all(&mut std::io::stderr(), format!("{info}\n").as_bytes()).unwrap();
        }
    }));
    let config = LogConfig { tail: ByteCount(0), ..LogConfig::tiny() };
    let disk = written(config);
    let pristine = disk.contents(&file()).unwrap();
    let expected = everything(&disk, config).unwrap();
    let mut rng = SplitMix(7);
    let (mut refused, mut harmless) = (0, 0);
    for n in 0..600 {
        disk.replace(&file(), pristine.clone());
        // Half of them in the first pages, where redb keeps its roots and small pages.
        let within = if n % 2 == 0 { pristine.len() as u64 } else { 40 * 4096 };
        disk.flip_bit(&file(), rng.below(within), rng.below(8) as u8);
        match everything(&disk, config) {
            Ok(found) if found == expected => harmless += 1,
            Ok(_) => panic!("flip {n} changed what is served"),
            Err(error) => {
                assert!(error.contains("log.redb"), "flip {n}: the refusal names no file: {error}");
                assert!(
                    error.contains("damaged") || error.contains("cannot be opened") || error.contains("read failed"),
                    "{error}"
                );
                refused += 1;
            }
        }
    }
    let _ = std::panic::take_hook();
    assert!(refused > 150 && harmless > 50, "{refused} refused, {harmless} harmless");
}

#[test]
fn a_file_that_needs_repair_is_changed_only_if_it_is_sound() {
    let config = LogConfig { tail: ByteCount(0), ..LogConfig::tiny() };
    let disk = FaultDisk::new();
    let (log, mut writer) = open(&disk, config).unwrap();
    for index in 1..60 {
        append(&log.group(GROUP), &mut writer, vec![sized(index, 9_000)]).unwrap().unwrap();
    }
    disk.crash(Crash::DropAll, 0);
    drop((log, writer));
    let pristine = disk.contents(&file()).unwrap();
    let mut rng = SplitMix(8);
    let mut refused = 0;
    for n in 0..200 {
        disk.replace(&file(), pristine.clone());
        disk.flip_bit(&file(), rng.below(pristine.len() as u64), rng.below(8) as u8);
        if n % 10 == 0 {
            let mut cut = disk.contents(&file()).unwrap();
            cut.truncate(rng.below(pristine.len() as u64) as usize);
            disk.replace(&file(), cut);
        }
        let before = disk.contents(&file()).unwrap();
        if let Err(error) = open(&disk, config) {
            refused += 1;
            assert!(disk.contents(&file()).unwrap() == before, "flip {n}: a refused file was changed: {error}");
        }
    }
    assert!(refused > 20, "{refused}");
    disk.replace(&file(), pristine);
    assert_eq!(open(&disk, config).unwrap().0.group(GROUP).state().last, Some(id(1, 59)));
}

#[test]
fn a_log_that_must_be_there_is_not_made_anew() {
    let reopen = |disk: &FaultDisk| FrameLog::reopen(Arc::new(disk.clone()), Path::new("log"), LogConfig::tiny());
    let disk = FaultDisk::new();
    assert!(matches!(reopen(&disk), Err(OpenError::Missing { .. })));
    assert!(disk.contents(&file()).is_none(), "it was made");
    for left in [Vec::new(), vec![0; 5], vec![0; 8192]] {
        disk.replace(&file(), left.clone());
        let refused = reopen(&disk).unwrap_err().to_string();
        assert!(refused.starts_with("log/log.redb is missing or empty"), "{refused}");
        assert!(refused.contains("put the file back"), "{refused}");
        assert_eq!(disk.contents(&file()).unwrap(), left);
    }
    let disk = written(LogConfig::tiny());
    assert_eq!(reopen(&disk).unwrap().0.groups().len(), 3);
}

#[test]
fn a_truncated_file_is_refused_by_name() {
    let config = LogConfig::tiny();
    let disk = written(config);
    let pristine = disk.contents(&file()).unwrap();
    let expected = everything(&disk, config).unwrap();
    let mut refused = 0;
    for len in [5, 300, 4096, 100_000, 1_000_000, 1_500_000, pristine.len() / 2, pristine.len() - 4096] {
        disk.replace(&file(), pristine[..len].to_vec());
        match everything(&disk, config) {
            // Zeros that were written ahead may go.
            Ok(found) => assert!(found == expected, "{len} bytes serve something else"),
            Err(error) => {
                assert!(error.contains("log.redb is damaged") && error.contains("restore a backup"), "{len}: {error}");
                refused += 1;
            }
        }
    }
    assert!(refused >= 5, "{refused}");
    // A file of zeros is no database either, unless it never was one.
    let mut zeros = pristine.clone();
    zeros[..4096].fill(0xaa);
    disk.replace(&file(), zeros);
    assert!(everything(&disk, config).is_err_and(|error| error.contains("log.redb is damaged")));
}

#[test]
fn a_misdirected_write_is_noticed_or_harmless() {
    let config = LogConfig { tail: ByteCount(0), cache: ByteCount(0), ..LogConfig::tiny() };
    let mut noticed = 0;
    for at in 0..60 {
        let disk = FaultDisk::new();
        let (log, mut writer) = open(&disk, config).unwrap();
        let group = log.group(GROUP);
        disk.inject(Fault::Misdirect(at));
        let mut promised = 0;
        for index in 1..12 {
            match append(&group, &mut writer, vec![sized(index, 6000)]) {
                Some(Ok(())) => promised = index,
                _ => break,
            }
        }
        drop(group);
        drop(log);
        disk.fence();
        drop(writer);
        disk.crash(Crash::KeepAll, 0);
        let found = open(&disk, config).map_err(|error| error.to_string()).and_then(|(log, _writer)| {
            let group = log.group(GROUP);
            group.read(span(1..promised + 1), ALL).map_err(|error| error.to_string())
        });
        match found {
            Ok(found) => {
                assert!(found.iter().zip(1..).all(|(entry, index)| *entry == sized(index, 6000)), "write {at}");
            }
            Err(_) => noticed += 1,
        }
    }
    assert!(noticed > 5, "{noticed}");
}

#[test]
fn dead_frames_are_removed_and_a_slow_group_does_not_pin_them() {
    let disk = FaultDisk::new();
    let config = LogConfig { tail: ByteCount(0), ..LogConfig::tiny() };
    let (log, mut writer) = open(&disk, config).unwrap();
    let (slow, busy) = (log.group(GroupId(1)), log.group(GROUP));
    append(&slow, &mut writer, entries(1, 1..20)).unwrap().unwrap();
    slow.put_checkpoint(Bytes::from_static(b"slow checkpoint"));
    for index in 1..1500 {
        append(&busy, &mut writer, vec![sized(index, 8000)]).unwrap().unwrap();
        if index % 20 == 0 {
            busy.purge(id(1, index - 10), outcome().0);
        }
    }
    let stats = log.stats();
    assert!(stats.bytes > 12_000_000, "{stats:?}");
    assert!(stats.kept < 1_500_000, "the log is pinned: {stats:?}");
    assert!(stats.moved > 0 && stats.moved < 50_000, "{stats:?}");
    assert!(stats.file < 8_000_000, "{stats:?}");
    assert_eq!(slow.read(span(1..20), ALL).unwrap(), entries(1, 1..20));
    drop((slow, busy));
    drop((log, writer));
    disk.crash(Crash::DropAll, 3);
    let (log, _writer) = open(&disk, config).unwrap();
    assert_eq!(log.group(GroupId(1)).read(span(1..20), ALL).unwrap(), entries(1, 1..20));
    assert_eq!(log.group(GroupId(1)).checkpoint().unwrap().as_deref(), Some(&b"slow checkpoint"[..]));
    assert_eq!(log.group(GROUP).state().last, Some(id(1, 1499)));
}

#[test]
fn a_checkpoint_that_is_too_large_for_a_record_is_not_kept_and_harms_nothing() {
    let disk = FaultDisk::new();
    let (log, mut writer) = open(&disk, LogConfig::tiny()).unwrap();
    let group = log.group(GROUP);
    group.put_checkpoint(Bytes::from_static(b"small"));
    // Never written to, so it takes no memory.
    group.put_checkpoint(Bytes::from(vec![0; (256 << 20) + 1]));
    append(&group, &mut writer, entries(1, 1..3)).unwrap().unwrap();
    assert_eq!(group.checkpoint().unwrap().as_deref(), Some(&b"small"[..]));
    assert_eq!(group.read(span(1..3), ALL).unwrap(), entries(1, 1..3));
}
