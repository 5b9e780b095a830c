//! openraft's own suite, on our log and state machine adapters.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use ensign_proto::{GroupId, NodeId};
use ensign_storage::{MemoryLog, NodeLog as _};
use openraft::AsyncRuntime as _;
use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use tokio_util::sync::CancellationToken;

use crate::apply::{Applier, Shared};
use crate::replica::Replica;
use crate::store::Store;
use crate::testing::{Journal, quick};
use crate::types::{AsyncRuntime, Types};

struct InMemory;

impl StoreBuilder<Types, Store, Applier> for InMemory {
    async fn build(&self) -> Result<((), Store, Applier), StorageError<Types>> {
        let log = MemoryLog::new().group(GroupId(16));
        let machine = Box::new(Shared(Arc::new(Mutex::new(Journal::default()))));
        let stop = CancellationToken::new();
        let replica = Replica::new(GroupId(16), BTreeSet::new(), quick(NodeId(0)), log, machine, stop);
        let replica = Arc::new(replica);
        Ok(((), Store::new(Arc::clone(&replica)), Applier::take_over(replica)))
    }
}

#[test]
fn the_log_in_memory_passes_openrafts_suite() {
    AsyncRuntime::new(1).block_on(Suite::test_all(InMemory)).unwrap();
}
