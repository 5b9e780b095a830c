//! The contract suite against every implementation.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ensign_storage::testing::{self, Subject};
use ensign_storage::{Disk, FaultDisk, FileDisk, FrameLog, LogConfig, MemoryLog, NodeLog, Writer};

#[test]
fn the_memory_log_keeps_the_contract() {
    testing::suite(MemoryLog::new);
    testing::suite(MemoryLog::flushed_by_hand);
}

/// A frame log whose writer has its own thread.
struct Threaded {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    config: LogConfig,
    log: Arc<FrameLog>,
    thread: JoinHandle<()>,
}

impl Threaded {
    fn open(disk: Arc<dyn Disk>, dir: &Path, config: LogConfig) -> Self {
        let (log, writer) = FrameLog::open(Arc::clone(&disk), dir, config).expect("it opens");
        Self { disk, dir: dir.to_owned(), config, log, thread: writer.spawn().expect("a thread starts") }
    }
}

impl Subject for Threaded {
    fn log(&self) -> Arc<dyn NodeLog> {
        Arc::clone(&self.log) as Arc<dyn NodeLog>
    }

    fn reopen(self) -> Self {
        self.log.close();
        self.thread.join().expect("the writer ends in order");
        Self::open(self.disk, &self.dir, self.config)
    }
}

/// A frame log whose writer is driven by hand, as in a simulation.
struct Inline {
    disk: FaultDisk,
    config: LogConfig,
    log: Arc<FrameLog>,
    writer: Mutex<Writer>,
}

impl Inline {
    fn open(disk: FaultDisk, config: LogConfig) -> Self {
        let (log, writer) = FrameLog::open(Arc::new(disk.clone()), Path::new("log"), config).expect("it opens");
        Self { disk, config, log, writer: Mutex::new(writer) }
    }
}

impl Subject for Inline {
    fn log(&self) -> Arc<dyn NodeLog> {
        Arc::clone(&self.log) as Arc<dyn NodeLog>
    }

    fn settle(&self) {
        let mut writer = self.writer.lock().expect("not poisoned");
        while writer.commit_queued().expect("a healthy disk").records > 0 {}
    }

    fn reopen(self) -> Self {
        self.writer.into_inner().expect("not poisoned").close();
        Self::open(self.disk, self.config)
    }
}

#[test]
fn the_frame_log_keeps_the_contract_on_files() {
    let folder = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0);
    for config in [LogConfig::tiny(), LogConfig { prefill: LogConfig::tiny().commit, ..LogConfig::default() }] {
        testing::suite(|| {
            count.set(count.get() + 1);
            Threaded::open(Arc::new(FileDisk), &folder.path().join(count.get().to_string()), config)
        });
    }
}

#[test]
fn the_frame_log_keeps_the_contract_driven_by_hand() {
    testing::suite(|| Inline::open(FaultDisk::new(), LogConfig::tiny()));
}
