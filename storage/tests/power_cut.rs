//! Real processes on a real file system: killed at any moment, and cut off from their disk at any moment.
//!
//! The child appends and says on its standard output what was called back. A kill shows a missing commit, but not a
//! missing sync, since the page cache survives it; for that, the file system itself is shut down under the child
//! (`EXT4_IOC_SHUTDOWN` without flushing its journal, on a loop device), unmounted and mounted again. That needs root,
//! loop devices, ext4 and perl; without them the test says so and passes.
#![expect(clippy::print_stderr, reason = "a skipped test says why")]

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use ensign_storage::disk::LockGuard;
use ensign_storage::fault::SplitMix;
use ensign_storage::frame::Plant;
use ensign_storage::testing::{ALL, LoopFs};
use ensign_storage::{Disk, DiskFile, Entry, EntryId, FileDisk, FrameLog, LogConfig, NodeLog};

const DIR: &str = "POWER_CUT_DIR";
const BUG: &str = "POWER_CUT_BUG";
const GROUPS: u64 = 4;
/// Of the file system that is cut off.
const SIZE: ByteCount = ByteCount(96 << 20);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A disk whose syncs do nothing.
#[derive(Debug)]
struct LyingDisk;

#[derive(Debug)]
struct LyingFile(Box<dyn DiskFile>);

impl DiskFile for LyingFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, out)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Disk for LyingDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(LyingFile(FileDisk.open(path)?)))
    }
    fn exists(&self, path: &Path) -> io::Result<bool> {
        FileDisk.exists(path)
    }
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        FileDisk.read(path)
    }
    fn write_atomically(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        FileDisk.write_atomically(path, bytes)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        FileDisk.remove(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        FileDisk.rename(from, to)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        FileDisk.create_dir(path)
    }
    fn lock(&self, path: &Path) -> io::Result<Option<LockGuard>> {
        FileDisk.lock(path)
    }
    fn free_space(&self, path: &Path) -> io::Result<ByteCount> {
        FileDisk.free_space(path)
    }
    fn elapsed(&self) -> Duration {
        FileDisk.elapsed()
    }
}

fn config() -> LogConfig {
    LogConfig { prefill: ByteCount(4 << 20), ..LogConfig::tiny() }
}

fn payload(group: u64, index: u64) -> Bytes {
    let mut rng = SplitMix(group << 32 | index);
    let stamp = rng.next().to_le_bytes();
    Bytes::from(stamp.repeat(1 + rng.below(400) as usize))
}

/// What the child does until it dies: appends, votes and purges in every group, and a line for each that was called back.
fn be_the_child(dir: &Path) -> Result<(), Failure> {
    let bug = std::env::var(BUG).unwrap_or_default();
    let disk: Arc<dyn Disk> = if bug == "lying-sync" { Arc::new(LyingDisk) } else { Arc::new(FileDisk) };
    let plant = (bug == "no-durability").then_some(Plant::DurabilityNone);
    let (log, writer) = FrameLog::open(disk, dir, LogConfig { plant, ..config() })?;
    let writer = writer.spawn()?;
    let say = |line: String| {
        Box::new(move |outcome: Result<(), _>| {
            if outcome.is_ok() {
                // One call a line, and no buffer that could die with the process.
                let _ = io::stdout().lock().write_all(line.as_bytes()).and_then(|()| io::stdout().flush());
            }
        })
    };
    for round in 0_u64.. {
        for id in 16..16 + GROUPS {
            let group = log.group(GroupId(id));
            let next = group.state().last.map_or(1, |last| last.index.0 + 1);
            let entry =
                |index| Entry { id: EntryId { term: Term(1), index: LogIndex(index) }, payload: payload(id, index) };
            group.append((next..next + 3).map(entry).collect(), say(format!("entry {id} {}\n", next + 2)));
            if round % 5 == 0 {
                let vote =
                    group.state().vote.map_or(0, |vote| vote.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))) + 1;
                group.save_vote(Bytes::copy_from_slice(&vote.to_be_bytes()), say(format!("vote {id} {vote}\n")));
            }
            if round % 40 == 39 {
                group.purge(EntryId { term: Term(1), index: LogIndex(next - 50) }, Box::new(|_| ()));
            }
        }
        if writer.is_finished() {
            return Ok(());
        }
        // Not so fast that the queue is all there is.
        while log.stats().queued > 64 << 10 {
            thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(())
}

/// The child, when this binary is started by another test; nothing otherwise.
#[test]
fn child() {
    if let Some(dir) = std::env::var_os(DIR) {
        be_the_child(Path::new(&dir)).expect("the child works until it dies");
    }
}

/// What the child said was done: the highest number by kind and group.
type Promises = BTreeMap<(String, u64), u64>;

fn start(dir: &Path, bug: &str) -> io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .env(DIR, dir)
        .env(BUG, bug)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
}

/// Reads what the child said until its end.
fn listen(child: &mut Child) -> thread::JoinHandle<Promises> {
    let output = child.stdout.take().expect("it is piped");
    thread::spawn(move || {
        let mut promises = Promises::new();
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            let mut words = line.split_whitespace().rev();
            let (Some(number), Some(group), Some(kind)) = (words.next(), words.next(), words.next()) else { continue };
            if let (Ok(number), Ok(group)) = (number.parse::<u64>(), group.parse()) {
                let highest = promises.entry((kind.to_owned(), group)).or_default();
                *highest = number.max(*highest);
            }
        }
        promises
    })
}

/// Opens what the child left and compares it with what it had promised.
fn check(dir: &Path, promises: &Promises) -> Result<(), Failure> {
    let (log, writer) = FrameLog::open(Arc::new(FileDisk), dir, config())?;
    for id in 16..16 + GROUPS {
        let group = log.group(GroupId(id));
        let state = group.state();
        let promised = |kind: &str| promises.get(&(kind.to_owned(), id)).copied().unwrap_or_default();
        let last = state.last.map_or(0, |last| last.index.0);
        if last < promised("entry") {
            return Err(format!("group {id} ends at {last}, and {} was promised", promised("entry")).into());
        }
        let vote = state.vote.map_or(0, |vote| vote.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)));
        if vote < promised("vote") {
            return Err(format!("group {id} has vote {vote}, and {} was promised", promised("vote")).into());
        }
        let first = state.purged.map_or(1, |purged| purged.index.0 + 1);
        for entry in group.read(LogIndex(first)..LogIndex(last + 1), ALL)? {
            if entry.payload != payload(id, entry.id.index.0) {
                return Err(format!("group {id}, index {} has other bytes", entry.id.index).into());
            }
        }
    }
    writer.close();
    Ok(())
}

/// Kills the child at a random moment. How many promises it had made, or what was broken.
fn kill_once(dir: &Path, bug: &str, rng: &mut SplitMix) -> Result<u64, Failure> {
    let mut child = start(dir, bug)?;
    let listener = listen(&mut child);
    thread::sleep(Duration::from_millis(150 + rng.below(500)));
    child.kill()?;
    child.wait()?;
    let promises = listener.join().map_err(|_| "the listener panicked")?;
    check(dir, &promises)?;
    Ok(promises.values().sum())
}

#[test]
fn a_killed_process_keeps_its_promises() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = SplitMix(1);
    let promised: u64 = (0..8).map(|_| kill_once(folder.path(), "", &mut rng).unwrap()).sum();
    assert!(promised > 500, "{promised}");
}

#[test]
fn a_kill_finds_commits_that_were_never_durable() {
    let mut rng = SplitMix(2);
    let broken = (0..12).any(|_| {
        let folder = tempfile::tempdir().unwrap();
        kill_once(folder.path(), "no-durability", &mut rng).is_err()
    });
    assert!(broken, "nothing was lost without durability");
}

fn cut_once(fs: &mut LoopFs, bug: &str, rng: &mut SplitMix) -> Result<u64, Failure> {
    let dir = fs.path().join("log");
    let mut child = start(&dir, bug)?;
    let listener = listen(&mut child);
    thread::sleep(Duration::from_millis(150 + rng.below(500)));
    fs.cut()?;
    // Only now: what it promised until the cut counts.
    thread::sleep(Duration::from_millis(20));
    let _ = child.kill();
    child.wait()?;
    let promises = listener.join().map_err(|_| "the listener panicked")?;
    fs.restore()?;
    check(&dir, &promises)?;
    Ok(promises.values().sum())
}

#[test]
fn a_power_cut_keeps_promises_and_finds_a_sync_that_does_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut fs = match LoopFs::new(folder.path(), SIZE) {
        Ok(fs) => fs,
        Err(reason) => return eprintln!("skipped: no file system can be mounted and cut off here ({reason})"),
    };
    let mut rng = SplitMix(3);
    let promised: u64 = (0..6).map(|_| cut_once(&mut fs, "", &mut rng).unwrap()).sum();
    assert!(promised > 200, "{promised}");
    let broken = (0..8).any(|_| {
        let folder = tempfile::tempdir().unwrap();
        let mut fs = LoopFs::new(folder.path(), SIZE).unwrap();
        cut_once(&mut fs, "lying-sync", &mut rng).is_err()
    });
    assert!(broken, "nothing was lost without syncs");
}
