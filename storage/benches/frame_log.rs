//! The frame log beside the disk's own floor: the same bytes appended to a plain file with one fdatasync a commit.
//!
//! `cargo bench -p ensign-storage`. Criterion times single commits; the table that follows runs each shape for two seconds
//! and prints events/s, MB/s, p50, bytes written per byte, and the ratio to the floor measured in the same run. Set
//! `BENCH_DIR` to choose the disk; the temporary folder may be one in memory. `-- --table` prints the table alone.
#![expect(clippy::print_stdout, reason = "a benchmark reports")]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use ensign_proto::{ByteCount, GroupId, LogIndex, Term};
use ensign_storage::{Disk, DiskFile, Entry, EntryId, FileDisk, FrameLog, GroupLog, LogConfig, NodeLog, Writer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// One shape of load: this many entries of this size in a commit, spread over the groups.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    groups: u64,
    entries: u64,
    size: usize,
}

const SHAPES: [Shape; 6] = [
    Shape { name: "1 x 1 KiB", groups: 1, entries: 1, size: 1024 },
    Shape { name: "100 x 1 KiB, 100 groups", groups: 100, entries: 100, size: 1024 },
    Shape { name: "900 x 1 KiB, 1 group", groups: 1, entries: 900, size: 1024 },
    Shape { name: "900 x 1 KiB, 900 groups", groups: 900, entries: 900, size: 1024 },
    Shape { name: "4000 x 200 B, 100 groups", groups: 100, entries: 4000, size: 200 },
    Shape { name: "3 x 256 KiB, 3 groups", groups: 3, entries: 3, size: 256 << 10 },
];

/// Frames are dropped beyond this, so that the file stays in its steady state.
const KEEP: u64 = 256 << 20;

struct Load {
    shape: Shape,
    log: Arc<FrameLog>,
    groups: Vec<Arc<dyn GroupLog>>,
    writer: Writer,
    payload: Bytes,
    next: u64,
    durable: Arc<AtomicU64>,
}

impl Load {
    fn new(dir: &Path, shape: Shape) -> Self {
        let config = LogConfig { prefill: ByteCount(1 << 30), tail: ByteCount(32 << 20), ..LogConfig::default() };
        let (log, writer) = FrameLog::open(Arc::new(FileDisk), dir, config).expect("the log opens");
        let groups = (0..shape.groups).map(|group| log.group(GroupId(16 + group))).collect();
        // As ciphertext is: nothing to compress.
        let mut payload = vec![0; shape.size * 2];
        ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut payload);
        Self { shape, log, groups, writer, payload: payload.into(), next: 1, durable: Arc::default() }
    }

    /// Submits one commit's worth and commits it.
    fn commit(&mut self) {
        let each = self.shape.entries / self.shape.groups;
        for group in &self.groups {
            let entry = |index: u64| {
                let from = (index * 61) as usize % self.shape.size;
                let payload = self.payload.slice(from..from + self.shape.size);
                Entry { id: EntryId { term: Term(1), index: LogIndex(index) }, payload }
            };
            let durable = Arc::clone(&self.durable);
            let done = Box::new(move |outcome: Result<(), _>| {
                durable.fetch_add(each * u64::from(outcome.is_ok()), Ordering::Relaxed);
            });
            group.append((self.next..self.next + each).map(entry).collect(), done);
        }
        self.next += each;
        // Retention at work, as in service.
        let kept = KEEP / (self.shape.size as u64 * self.shape.entries);
        if self.next > each * kept && (self.next / each).is_multiple_of(64) {
            for group in &self.groups {
                let through = EntryId { term: Term(1), index: LogIndex(self.next - each * kept) };
                group.purge(through, Box::new(|_| ()));
            }
        }
        while self.writer.commit_queued().expect("the disk works").records > 0 {}
    }
}

/// The floor: a plain file, pre-written and recycled, one write and one fdatasync a commit.
struct Floor {
    file: Box<dyn DiskFile>,
    buffer: Vec<u8>,
    at: u64,
}

const FLOOR_FILE: u64 = 512 << 20;

impl Floor {
    fn new(dir: &Path, bytes: usize) -> Self {
        let file = FileDisk.open(&dir.join("floor")).expect("a file opens");
        let mut buffer = vec![0; 1 << 20];
        ChaCha8Rng::seed_from_u64(2).fill_bytes(&mut buffer);
        if file.len().expect("it has a length") < FLOOR_FILE {
            for at in (0..FLOOR_FILE).step_by(1 << 20) {
                file.write_at(at, &buffer).expect("it is written");
            }
        }
        file.sync_data().expect("it is synced");
        buffer.resize(bytes.max(512), 7);
        Self { file, buffer, at: 0 }
    }

    fn commit(&mut self) {
        if self.at + self.buffer.len() as u64 > FLOOR_FILE {
            self.at = 0;
        }
        self.file.write_at(self.at, &self.buffer).expect("it is written");
        self.file.sync_data().expect("it is synced");
        self.at += self.buffer.len() as u64;
    }
}

/// Commits a second in a run of `length`, and the median.
fn run(length: Duration, mut commit: impl FnMut()) -> (f64, Duration) {
    let begun = FileDisk.elapsed();
    let mut took = Vec::new();
    while FileDisk.elapsed().saturating_sub(begun) < length {
        let at = FileDisk.elapsed();
        commit();
        took.push(FileDisk.elapsed().saturating_sub(at));
    }
    let rate = took.len() as f64 / FileDisk.elapsed().saturating_sub(begun).as_secs_f64();
    took.sort_unstable();
    (rate, took[took.len() / 2])
}

fn table(dir: &Path, length: Duration) {
    println!(
        "{:<28} {:>12} {:>8} {:>9} {:>7} {:>9} {:>9}",
        "commit", "events/s", "MB/s", "p50 ms", "bytes x", "floor ms", "x floor"
    );
    for (n, shape) in SHAPES.into_iter().enumerate() {
        let mut load = Load::new(&dir.join(format!("table-{n}")), shape);
        // Into the steady state: the file has its size and pages are recycled.
        run(length / 2, || load.commit());
        let (before, first) = (load.log.stats(), load.next);
        let (rate, p50) = run(length, || load.commit());
        let after = load.log.stats();
        let mut floor = Floor::new(dir, shape.size * shape.entries as usize);
        let (_, floor_p50) = run(length / 2, || floor.commit());
        let payload = (shape.size as u64 * shape.entries) as f64;
        let appended = ((load.next - first) * shape.groups * shape.size as u64) as f64;
        println!(
            "{:<28} {:>12.0} {:>8.0} {:>9.3} {:>7.2} {:>9.3} {:>9.2}",
            shape.name,
            rate * shape.entries as f64,
            rate * payload / 1e6,
            p50.as_secs_f64() * 1e3,
            (after.written - before.written) as f64 / appended,
            floor_p50.as_secs_f64() * 1e3,
            p50.as_secs_f64() / floor_p50.as_secs_f64(),
        );
        let submitted = load.next - 1;
        assert_eq!(black_box(load.durable.load(Ordering::Relaxed)), submitted * shape.groups, "every callback came");
        assert!(
            after.syncs - before.syncs <= after.commits - before.commits + 8,
            "more than one sync a commit: {after:?}"
        );
    }
}

fn main() {
    let smoke = std::env::args().any(|argument| argument == "--test");
    let root = std::env::var_os("BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(root).expect("a folder is made");
    if smoke {
        return table(folder.path(), Duration::from_millis(20));
    }
    if std::env::args().any(|argument| argument == "--table") {
        return table(folder.path(), Duration::from_secs(1));
    }
    let mut criterion = Criterion::default().configure_from_args().sample_size(30);
    let mut group = criterion.benchmark_group("commit");
    for (n, shape) in SHAPES.into_iter().enumerate() {
        let mut load = Load::new(&folder.path().join(format!("criterion-{n}")), shape);
        group.throughput(Throughput::Bytes(shape.size as u64 * shape.entries));
        group.bench_function(BenchmarkId::new("frame_log", shape.name), |bencher| bencher.iter(|| load.commit()));
        let mut floor = Floor::new(folder.path(), shape.size * shape.entries as usize);
        group.bench_function(BenchmarkId::new("floor", shape.name), |bencher| bencher.iter(|| floor.commit()));
    }
    group.finish();
    criterion.final_summary();
    table(folder.path(), Duration::from_secs(2));
}
