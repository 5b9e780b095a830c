//! What many groups cost: three replicas of each in one process, network and logs in memory, so what is left is agreement itself.
//!
//! `cargo run --release -p ensign-raft --features testing --example groups -- [groups] [samples]`
//!
//! Prints how long they take to start, the CPU of idle groups before and after they sleep, resident memory a replica, how
//! long a write to a sleeping group takes, and how long the groups of a node that dies go without one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{GroupId, NodeId};
use ensign_raft::env::{OsRng, SystemClock, Tasks};
use ensign_raft::testing::MemoryNet;
use ensign_raft::{CommittedEntry, Group, GroupSpec, Mode, RestoreError, Runtime, RuntimeConfig, StateMachine};
use ensign_storage::{MemoryLog, NodeLog as _};
use futures::future::join_all;
use tokio::time::{Instant, sleep};

const NODES: [NodeId; 3] = [NodeId(1), NodeId(2), NodeId(3)];
const QUIESCE_AFTER: Duration = Duration::from_secs(20);
const WINDOW: Duration = Duration::from_secs(10);
/// How often progress is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// Counts entries; keeps nothing.
struct Counter(u64);

impl StateMachine for Counter {
    type Response = u64;

    fn apply(&mut self, _entry: &CommittedEntry) -> u64 {
        self.0 += 1;
        self.0
    }

    fn snapshot(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0.to_be_bytes())
    }

    fn restore(&mut self, _snapshot: &Bytes) -> Result<(), RestoreError> {
        Err(RestoreError::new("not needed here"))
    }
}

type Groups = BTreeMap<GroupId, Group<Counter>>;

#[tokio::main]
#[expect(clippy::print_stdout, reason = "the figures are what this program is for")]
async fn main() {
    let argument = |at: usize, usual: u64| std::env::args().nth(at).and_then(|text| text.parse().ok()).unwrap_or(usual);
    let (count, samples) = (argument(1, 1000), argument(2, 200));
    let net = MemoryNet::new();
    let empty = resident();
    let begun = Instant::now();
    let mut nodes: BTreeMap<NodeId, (Runtime, Groups)> = BTreeMap::new();
    for node in NODES {
        let config = RuntimeConfig { incarnation: 1, quiesce_after: Some(QUIESCE_AFTER), ..RuntimeConfig::new(node) };
        let runtime = Runtime::new(config, net.transport(node), Arc::new(SystemClock), Arc::new(OsRng), Tasks::new());
        net.attach(&runtime);
        nodes.insert(node, (runtime, Groups::new()));
    }
    for (runtime, groups) in nodes.values_mut() {
        let log = MemoryLog::new();
        let starts = (16..16 + count).map(GroupId).map(|id| {
            let spec = GroupSpec { id, voters: NODES.into(), mode: Mode::Found };
            let starting = runtime.start(spec, log.group(id), Counter(0));
            async move { (id, starting.await.expect("the group starts")) }
        });
        groups.extend(join_all(starts).await);
    }
    let started = begun.elapsed();
    until(|| leaders(&nodes).len() as u64 == count).await;
    println!("{count} groups x 3: started in {started:.2?}, all led after {:.2?}", begun.elapsed());

    let (awake, cpu) = (asleep(&nodes), cpu_share(WINDOW).await);
    println!("awake and idle: {cpu:.2} % of a core for three nodes ({awake} of {} replicas asleep)", 3 * count);
    let ticking = cpu;
    until(|| asleep(&nodes) == 3 * count).await;
    let cpu = cpu_share(WINDOW).await;
    println!("asleep: {cpu:.2} % of a core for three nodes, {:.3} of what awake groups take", cpu / ticking);
    let each = resident().saturating_sub(empty) as f64 / (3 * count) as f64;
    println!("resident: {:.0} KiB a replica", each / 1024.0);

    let mut latencies = Vec::new();
    for (id, leader) in leaders(&nodes).into_iter().take(samples as usize) {
        let group = &nodes[&leader].1[&id];
        let begun = Instant::now();
        let term = group.leadership().borrow().term;
        let pending = group.submit(Some(term), Bytes::from_static(b"x")).await.expect("a sleeping leader takes it");
        pending.await.expect("it is committed");
        latencies.push(begun.elapsed());
    }
    latencies.sort_unstable();
    let at = |share: usize| latencies[(latencies.len() - 1) * share / 100];
    println!("a write to a sleeping group: p50 {:.2?}, p99 {:.2?}, max {:.2?}", at(50), at(99), at(100));

    until(|| asleep(&nodes) == 3 * count).await;
    let dead = NODES[0];
    let orphans: Vec<_> = leaders(&nodes).into_iter().filter(|(_, leader)| *leader == dead).map(|(id, _)| id).collect();
    let begun = Instant::now();
    net.detach(dead);
    let (runtime, groups) = nodes.remove(&dead).expect("it runs");
    let mut waits: Vec<_> = join_all(orphans.iter().map(|id| write(*id, &nodes, begun))).await;
    waits.sort_unstable();
    let at = |share: usize| waits[(waits.len() - 1) * share / 100];
    println!(
        "a node dies: {} groups take writes again, p50 {:.2?}, p99 {:.2?}, last {:.2?}; {} replicas sleep on",
        waits.len(),
        at(50),
        at(99),
        at(100),
        asleep(&nodes),
    );
    drop((runtime, groups));
}

fn leaders(nodes: &BTreeMap<NodeId, (Runtime, Groups)>) -> BTreeMap<GroupId, NodeId> {
    let led = nodes.iter().flat_map(|(node, (_, groups))| {
        groups.iter().filter_map(|(id, group)| {
            let now = *group.leadership().borrow();
            (now.ready && now.leads(*node)).then_some((*id, *node))
        })
    });
    led.collect()
}

fn asleep(nodes: &BTreeMap<NodeId, (Runtime, Groups)>) -> u64 {
    let sleeping = nodes.values().flat_map(|(runtime, _)| runtime.groups()).filter(|status| status.asleep);
    sleeping.count() as u64
}

/// How long after `since` a group takes a write on one of `nodes`.
async fn write(id: GroupId, nodes: &BTreeMap<NodeId, (Runtime, Groups)>, since: Instant) -> Duration {
    loop {
        for (_, groups) in nodes.values() {
            if groups[&id].propose(None, Bytes::from_static(b"x")).await.is_ok() {
                return since.elapsed();
            }
        }
        sleep(LOOK).await;
    }
}

async fn until(holds: impl Fn() -> bool) {
    while !holds() {
        sleep(LOOK).await;
    }
}

/// What this process took of one core while `window` passed.
async fn cpu_share(window: Duration) -> f64 {
    let (begun, before) = (Instant::now(), cpu_seconds());
    sleep(window).await;
    (cpu_seconds() - before) / begun.elapsed().as_secs_f64() * 100.0
}

/// User and system time of this process.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").expect("this runs on Linux");
    let fields = stat.rsplit(')').next().map(|rest| rest.split_whitespace().collect::<Vec<_>>()).unwrap_or_default();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).expect("a number of ticks");
    (ticks(11) + ticks(12)) / TICKS_PER_SECOND
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("this runs on Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it says how much is resident");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|field| field.parse().ok()).expect("a number of KiB");
    kib * 1024
}
