//! Drives a simulation: steps it, disturbs it, checks it.

mod faults;
mod members;

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{LogIndex, NodeId};
use ensign_raft::env::{Rng as _, SeededRng};
use ensign_storage::fault::Crash;
use turmoil::{Builder, Sim};

use crate::check::{Checker, Violation};
use crate::host::{self, Plants, name};
use crate::world::{Plan, World};

/// How long anything that must happen may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at the cluster.
const LOOK: Duration = Duration::from_millis(4);

pub(crate) struct Options {
    pub(crate) seed: u64,
    pub(crate) plants: Plants,
    /// Nodes that wait to be added, besides the three founders.
    pub(crate) spares: u64,
}

impl Options {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, plants: Plants::default(), spares: 0 }
    }
}

/// What a run has shown.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) acked: usize,
    pub(crate) unknown: usize,
    pub(crate) disturbances: usize,
    /// Changes of the voters.
    pub(crate) changes: u64,
    /// Nodes that are gone for good.
    pub(crate) lost: usize,
    /// Replicas that left the group and came back.
    pub(crate) returns: u64,
    /// How often two that were moved away from were alone with each other.
    pub(crate) ambushes: usize,
    /// How often a leader that was cut off saw its group called back.
    pub(crate) turns: usize,
    /// Every event with its time, and each disk's digest: equal for equal seeds.
    pub(crate) trace: String,
}

/// Something that a disturbance undoes later.
#[derive(Debug, Clone, Copy)]
enum Undo {
    Restart(NodeId),
    Heal,
    Release(NodeId),
    Grow(NodeId),
    Propose,
}

pub(crate) struct SimCluster {
    sim: Sim<'static>,
    world: World,
    nodes: Vec<NodeId>,
    rng: SeededRng,
    checker: Checker,
    undo: Vec<(Duration, Undo)>,
    /// From whom to whom nothing gets through.
    cuts: BTreeSet<(NodeId, NodeId)>,
    looked: Duration,
    disturbances: usize,
    /// Nodes that never come back.
    lost: BTreeSet<NodeId>,
    ambushes: usize,
    turns: usize,
}

impl SimCluster {
    pub(crate) fn new(options: Options) -> Self {
        let mut sim = Builder::new()
            .rng_seed(options.seed)
            .simulation_duration(Duration::from_hours(1))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(8))
            .tcp_capacity(4096)
            .epoch(std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
            .build();
        let world = World::default();
        world.lock().busy = true;
        let founders: Vec<_> = [1, 2, 3].map(NodeId).to_vec();
        let founding: BTreeSet<_> = founders.iter().copied().collect();
        world.lock().plan = Plan { wanted: founding.clone(), holders: founding, ..Plan::default() };
        let nodes: Vec<_> = (1..=3 + options.spares).map(NodeId).collect();
        for node in nodes.clone() {
            let (world, voters) = (world.clone(), founders.clone());
            let (seed, plants) = (options.seed, options.plants);
            sim.host(name(node), move || host::run(world.clone(), node, voters.clone(), seed, plants));
        }
        let rng = SeededRng::new(options.seed);
        Self {
            sim,
            world,
            nodes,
            rng,
            checker: Checker::default(),
            undo: Vec::new(),
            cuts: BTreeSet::new(),
            looked: Duration::ZERO,
            disturbances: 0,
            lost: BTreeSet::new(),
            ambushes: 0,
            turns: 0,
        }
    }

    /// What the hosts and the test share; its trace survives the run.
    pub(crate) fn world(&self) -> World {
        self.world.clone()
    }

    fn note(&self, line: &str) {
        use std::fmt::Write as _;
        let at = self.sim.elapsed();
        let _ = writeln!(self.world.lock().trace, "{at:?} test: {line}");
    }

    fn below(&self, limit: u64) -> u64 {
        self.rng.next_u64() % limit
    }

    fn millis(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    fn some_node(&self) -> NodeId {
        self.nodes[self.below(self.nodes.len() as u64) as usize]
    }

    fn step(&mut self) -> Result<(), Violation> {
        self.sim.step().map_err(|error| Violation(format!("a host failed: {error}")))?;
        let now = self.sim.elapsed();
        if now < self.looked + LOOK {
            return Ok(());
        }
        self.looked = now;
        self.checker.look(&self.world)?;
        for node in self.nodes.clone() {
            let lost_power = self.world.lock().nodes.get(&node).is_some_and(|slot| slot.disk.powered_off());
            if lost_power && self.sim.is_host_running(name(node)) {
                self.crash(node, Crash::Sectors);
                let later = now + self.millis(50, 1500);
                self.undo.push((later, Undo::Restart(node)));
            }
        }
        while let Some(at) = self.undo.iter().position(|(due, _)| *due <= now) {
            match self.undo.swap_remove(at).1 {
                Undo::Restart(node) => self.restart(node),
                Undo::Heal => self.heal(),
                Undo::Release(node) => self.hold_syncs(node, false),
                Undo::Grow(node) => self.limit_disk(node, None),
                Undo::Propose => self.propose(true),
            }
        }
        Ok(())
    }

    pub(crate) fn run(&mut self, length: Duration) -> Result<(), Violation> {
        let end = self.sim.elapsed() + length;
        while self.sim.elapsed() < end {
            self.step()?;
        }
        Ok(())
    }

    fn run_until<T>(&mut self, what: &str, mut done: impl FnMut(&Self) -> Option<T>) -> Result<T, Violation> {
        let end = self.sim.elapsed() + PATIENCE;
        while self.sim.elapsed() < end {
            if let Some(found) = done(self) {
                return Ok(found);
            }
            self.step()?;
        }
        Err(Violation(format!("{what} did not happen within {PATIENCE:?}")))
    }

    fn leader(&self) -> Option<NodeId> {
        let state = self.world.lock();
        let mut leading = state.nodes.iter().filter(|(node, slot)| {
            slot.running.as_ref().is_some_and(|running| {
                let now = *running.group.leadership().borrow();
                now.ready && now.leads(**node)
            })
        });
        leading.next().map(|(node, _)| *node)
    }

    pub(crate) fn run_to_leader(&mut self) -> Result<NodeId, Violation> {
        self.run_until("an election", Self::leader)
    }

    pub(crate) fn run_to_leader_other_than(&mut self, old: NodeId) -> Result<(), Violation> {
        self.run_until("a new leader", |this| {
            let state = this.world.lock();
            let mut others = state.nodes.iter().filter(|(node, _)| **node != old);
            others
                .any(|(node, slot)| {
                    slot.running.as_ref().is_some_and(|running| running.group.leadership().borrow().leads(*node))
                })
                .then_some(())
        })
    }

    /// Whether clients propose from now on.
    pub(crate) fn propose(&mut self, busy: bool) {
        self.note(&format!("clients propose: {busy}"));
        self.world.lock().busy = busy;
    }

    /// Runs until every member that is up sleeps. A replica that waits to be added, or was removed, has no leader to sleep under.
    pub(crate) fn run_until_asleep(&mut self) -> Result<(), Violation> {
        self.propose(false);
        self.run_until("sleep", |this| {
            let members = this.members_now()?;
            let state = this.world.lock();
            let members = state.nodes.iter().filter(|(node, _)| members.contains(node));
            let running: Vec<_> = members.filter_map(|(_, slot)| slot.running.as_ref()).collect();
            (!running.is_empty() && running.iter().all(|running| running.group.status().asleep)).then_some(())
        })
    }

    /// How many terms have had a leader.
    pub(crate) fn elections(&self) -> usize {
        self.checker.elections()
    }

    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        self.nodes.clone()
    }

    pub(crate) fn acked(&self) -> usize {
        self.checker.acked.len()
    }

    pub(crate) fn run_until_acked(&mut self, count: usize) -> Result<(), Violation> {
        self.run_until("a commit", |this| (this.acked() >= count).then_some(()))
    }

    fn journal(&self, node: NodeId) -> Option<Vec<(LogIndex, Bytes)>> {
        let state = self.world.lock();
        let running = state.nodes.get(&node)?.running.as_ref()?;
        Some(
            running.group.inspect(|journal| {
                journal.entries.iter().map(|entry| (entry.id.index, entry.payload.clone())).collect()
            }),
        )
    }

    /// Ends every disturbance: the cluster must come together again, serve, and hold all that it acknowledged.
    pub(crate) fn finish(mut self) -> Result<Report, Violation> {
        self.undo.clear();
        self.heal();
        for node in self.nodes.clone() {
            self.hold_syncs(node, false);
            self.limit_disk(node, None);
            self.world.lock().nodes.entry(node).or_default().disk.heal();
            self.restart(node);
        }
        self.propose(true);
        self.run_to_leader()?;
        self.run_until("the wanted members", |this| {
            let wanted: Vec<_> = this.world.lock().plan.wanted.iter().copied().collect();
            (this.members_now()? == wanted).then_some(())
        })?;
        self.run_until("the leaving of all others", |this| this.is_settled().then_some(()))?;
        let acked = self.acked();
        self.run_until_acked(acked + 5)?;
        // Whatever the run has done to it, the group still falls asleep, and wakes for a proposal.
        self.run_until_asleep()?;
        let acked = self.acked();
        self.propose(true);
        self.run_until_acked(acked + 5)?;
        self.world.lock().busy = false;
        self.note("quiet");
        // What is still in flight may yet be acknowledged.
        self.run(Duration::from_secs(1))?;
        let journal = self.run_until("equal journals", |this| {
            let journals: Option<Vec<_>> = this.members_now()?.iter().map(|node| this.journal(*node)).collect();
            let journals = journals?;
            let settled = this.checker.acked.last_key_value().map(|(index, _)| *index);
            let whole = journals[0].last().map(|(index, _)| *index) >= settled;
            (whole && journals.windows(2).all(|pair| pair[0] == pair[1])).then(|| journals[0].clone())
        })?;
        if let Err(found) = self.checker.nothing_is_lost(&journal) {
            let trace = std::mem::take(&mut self.world.lock().trace);
            return Err(Violation(format!("{found}; the trace:\n{trace}")));
        }
        for node in self.nodes.clone() {
            let digest = self.world.lock().nodes.entry(node).or_default().disk.trace();
            self.note(&format!("{} disk {digest:016x}", name(node)));
        }
        let trace = std::mem::take(&mut self.world.lock().trace);
        let (changes, returns) = {
            let state = self.world.lock();
            (state.changes, state.returns)
        };
        Ok(Report {
            changes,
            returns,
            ambushes: self.ambushes,
            turns: self.turns,
            lost: self.lost.len(),
            acked: self.checker.acked.len(),
            unknown: self.checker.unknown,
            disturbances: self.disturbances,
            trace,
        })
    }
}
