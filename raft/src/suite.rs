//! openraft's own suite, on our log and state machine adapters.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use ensign_proto::{GroupId, NodeId};
use ensign_storage::{FaultDisk, FrameLog, GroupLog, LogConfig, MemoryLog, NodeLog as _};
use openraft::AsyncRuntime as _;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tokio_util::sync::CancellationToken;

use crate::apply::{Applier, Shared};
use crate::replica::Replica;
use crate::store::Store;
use crate::testing::{Journal, quick};
use crate::types::{AsyncRuntime, Types};

/// Makes an empty log for each test of the suite.
struct On(fn() -> Arc<dyn GroupLog>);

impl StoreBuilder<Types, Store, Applier> for On {
    async fn build(&self) -> Result<((), Store, Applier), StorageError<Types>> {
        let machine = Box::new(Shared(Arc::new(Mutex::new(Journal::default()))));
        let stop = CancellationToken::new();
        let replica = Replica::new(GroupId(16), BTreeSet::new(), quick(NodeId(0)), (self.0)(), machine, stop);
        let replica = Arc::new(replica);
        Ok(((), Store::new(Arc::clone(&replica)), Applier::take_over(replica)))
    }
}

fn run(make: fn() -> Arc<dyn GroupLog>) {
    AsyncRuntime::new(1).block_on(Suite::test_all(On(make))).unwrap();
}

#[test]
fn the_log_in_memory_passes_openrafts_suite() {
    run(|| MemoryLog::new().group(GroupId(16)));
}

#[test]
fn the_frame_log_passes_openrafts_suite() {
    run(|| {
        let disk = Arc::new(FaultDisk::new());
        let (log, writer) = FrameLog::open(disk, Path::new("log"), LogConfig::tiny()).expect("an empty disk opens");
        // Its thread ends when the last handle is gone.
        writer.spawn().expect("a thread starts");
        log.group(GroupId(16))
    });
}
