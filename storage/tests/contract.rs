//! The contract suite against every implementation.

use ensign_storage::{MemoryLog, testing};

#[test]
fn the_memory_log_keeps_the_contract() {
    testing::suite(MemoryLog::new);
    testing::suite(MemoryLog::flushed_by_hand);
}
