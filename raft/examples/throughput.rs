//! Proposals a second of a cluster in one process: network and logs in memory, so what is left is agreement itself.
//!
//! `cargo run --release -p ensign-raft --features testing --example throughput -- [blobs] [KiB] [in flight] [replicas]`

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{GroupId, NodeId};
use ensign_raft::env::{OsRng, SystemClock, Tasks};
use ensign_raft::testing::MemoryNet;
use ensign_raft::{CommittedEntry, Group, GroupSpec, Mode, RestoreError, Runtime, RuntimeConfig, StateMachine};
use ensign_storage::{MemoryLog, NodeLog as _};
use tokio::time::Instant;

/// Counts bytes; keeps nothing.
struct Counter(u64);

impl StateMachine for Counter {
    type Response = u64;

    fn apply(&mut self, entry: &CommittedEntry) -> u64 {
        self.0 += entry.payload.len() as u64;
        self.0
    }

    fn snapshot(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0.to_be_bytes())
    }

    fn restore(&mut self, _snapshot: &Bytes) -> Result<(), RestoreError> {
        Err(RestoreError::new("not needed here"))
    }
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the figures are what this program is for")]
async fn main() {
    let argument = |at: usize, usual: u64| std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (blobs, kib, window, replicas) = (argument(1, 2000), argument(2, 256), argument(3, 8), argument(4, 3));
    let net = MemoryNet::new();
    let mut groups = Vec::new();
    let voters: std::collections::BTreeSet<_> = (1..=replicas).map(NodeId).collect();
    for node in voters.clone() {
        let transport = net.transport(node);
        let runtime =
            Runtime::new(RuntimeConfig::new(node), transport, Arc::new(SystemClock), Arc::new(OsRng), Tasks::new());
        net.attach(&runtime);
        let spec = GroupSpec { id: GroupId(16), voters: voters.clone(), mode: Mode::Found };
        let log = MemoryLog::new().group(GroupId(16));
        groups.push(runtime.start(spec, log, Counter(0)).await.expect("the group starts"));
    }
    let leader = leader(&groups).await;
    let term = leader.leadership().borrow().term;
    let size = kib as usize * 1024;
    let template = vec![7; size];
    let begun = Instant::now();
    let mut in_flight = VecDeque::new();
    let mut latencies = Vec::new();
    for _ in 0..blobs {
        if in_flight.len() as u64 == window {
            latencies.push(settle(&mut in_flight).await);
        }
        // A fresh buffer each, as a sealer makes them, with room for the one byte that the log adds.
        let mut blob = Vec::with_capacity(size + 1);
        blob.extend_from_slice(&template);
        let pending = leader.submit(Some(term), Bytes::from(blob)).await.expect("the leader takes it");
        in_flight.push_back((Instant::now(), pending));
    }
    while !in_flight.is_empty() {
        latencies.push(settle(&mut in_flight).await);
    }
    let seconds = begun.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let at = |share: usize| latencies[(latencies.len() - 1) * share / 100];
    println!(
        "{replicas} replicas, {blobs} blobs of {kib} KiB, {window} in flight: {:.0} proposals/s, {:.0} MB/s, p50 {:?}, p99 {:?}",
        blobs as f64 / seconds,
        blobs as f64 * size as f64 / 1e6 / seconds,
        at(50),
        at(99),
    );
}

async fn settle(in_flight: &mut VecDeque<(Instant, ensign_raft::Pending<u64>)>) -> Duration {
    let (since, pending) = in_flight.pop_front().expect("something is in flight");
    pending.await.expect("it is committed");
    since.elapsed()
}

async fn leader(groups: &[Group<Counter>]) -> Group<Counter> {
    loop {
        let ready = groups.iter().find(|group| {
            let now = *group.leadership().borrow();
            now.ready && group.status().voters.iter().any(|node| now.leads(*node)) && {
                // Only the leader knows how far the others are.
                !group.status().matched.is_empty() || groups.len() == 1
            }
        });
        if let Some(group) = ready {
            return group.clone();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
