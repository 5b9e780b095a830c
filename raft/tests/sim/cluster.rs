//! Drives a simulation: steps it, disturbs it, checks it.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{ByteCount, LogIndex, NodeId};
use ensign_raft::env::{Rng as _, SeededRng};
use ensign_storage::fault::{Crash, Fault};
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

    /// The node dies, and its disk keeps what the crash leaves.
    pub(crate) fn crash(&mut self, node: NodeId, crash: Crash) {
        if !self.sim.is_host_running(name(node)) {
            return;
        }
        self.note(&format!("crash {} {crash:?}", name(node)));
        let (disk, running) = {
            let mut state = self.world.lock();
            let slot = state.nodes.entry(node).or_default();
            (slot.disk.clone(), slot.running.take())
        };
        // First the disk: dropping a database flushes it, and a dead process flushes nothing.
        disk.fence();
        drop(running);
        // Its sockets fall silent: a dead machine says no goodbye. (They would say it in the order in which tokio drops
        // its tasks, which depends on task numbers of the whole process, and no seed would replay.)
        let others: Vec<_> = self.nodes.iter().copied().filter(|other| *other != node).collect();
        for other in &others {
            self.sim.partition_oneway(name(node), name(*other));
        }
        self.sim.crash(name(node));
        for other in others {
            if !self.cuts.contains(&(node, other)) {
                self.sim.repair_oneway(name(node), name(other));
            }
        }
        disk.crash(crash, self.rng.next_u64());
    }

    pub(crate) fn restart(&mut self, node: NodeId) {
        if !self.lost.contains(&node) && !self.sim.is_host_running(name(node)) {
            self.note(&format!("restart {}", name(node)));
            self.sim.bounce(name(node));
        }
    }

    pub(crate) fn hold_syncs(&mut self, node: NodeId, held: bool) {
        self.note(&format!("{} syncs held: {held}", name(node)));
        self.world.lock().nodes.entry(node).or_default().held = held;
    }

    fn blind(&mut self, node: NodeId, blind: bool) {
        self.note(&format!("{} blind: {blind}", name(node)));
        self.world.lock().nodes.entry(node).or_default().blind = blind;
    }

    fn limit_disk(&mut self, node: NodeId, capacity: Option<ByteCount>) {
        self.note(&format!("{} disk limited: {capacity:?}", name(node)));
        self.world.lock().nodes.entry(node).or_default().disk.set_capacity(capacity);
    }

    pub(crate) fn isolate(&mut self, node: NodeId) {
        self.note(&format!("isolate {}", name(node)));
        for other in self.nodes.clone().into_iter().filter(|other| *other != node) {
            self.cut(node, other);
            self.cut(other, node);
        }
    }

    pub(crate) fn cut(&mut self, from: NodeId, to: NodeId) {
        self.cuts.insert((from, to));
        self.sim.partition_oneway(name(from), name(to));
    }

    pub(crate) fn heal(&mut self) {
        self.note("heal");
        for (from, to) in std::mem::take(&mut self.cuts) {
            self.sim.repair_oneway(name(from), name(to));
        }
    }

    /// Every node loses power, with whatever it had not synced, and comes back: the followers within their next commit,
    /// while the leader's own sync is late.
    pub(crate) fn outage(&mut self) -> Result<(), Violation> {
        let leader = self.run_to_leader()?;
        self.hold_syncs(leader, true);
        for node in self.nodes.clone().into_iter().filter(|node| *node != leader) {
            self.world.lock().nodes.entry(node).or_default().disk.inject(Fault::PowerOff(0));
        }
        let end = self.sim.elapsed() + Duration::from_millis(60);
        while self.sim.elapsed() < end {
            self.sim.step().map_err(|error| Violation(format!("a host failed: {error}")))?;
        }
        self.checker.look(&self.world)?;
        for node in self.nodes.clone() {
            self.crash(node, Crash::DropAll);
            self.restart(node);
        }
        self.hold_syncs(leader, false);
        Ok(())
    }

    /// Something goes wrong somewhere.
    fn disturb(&mut self) {
        let now = self.sim.elapsed();
        let node = self.some_node();
        self.disturbances += 1;
        match self.below(17) {
            0..=2 => {
                let kinds = [Crash::KeepAll, Crash::DropAll, Crash::Prefix, Crash::Sectors];
                self.crash(node, kinds[self.below(4) as usize]);
                self.undo.push((now + self.millis(20, 1500), Undo::Restart(node)));
            }
            3 => {
                for node in self.nodes.clone() {
                    self.crash(node, Crash::Sectors);
                    self.undo.push((now + self.millis(20, 800), Undo::Restart(node)));
                }
            }
            4 | 5 => {
                let writes = self.below(40);
                self.note(&format!("{} loses power after {writes} writes", name(node)));
                self.world.lock().nodes.entry(node).or_default().disk.inject(Fault::PowerOff(writes));
            }
            6 | 7 => {
                self.isolate(node);
                self.undo.push((now + self.millis(200, 2500), Undo::Heal));
            }
            8 => {
                let other = self.some_node();
                if other != node {
                    self.note(&format!("{} cannot reach {}", name(node), name(other)));
                    self.cut(node, other);
                    self.undo.push((now + self.millis(200, 2500), Undo::Heal));
                }
            }
            9 | 10 => {
                self.hold_syncs(node, true);
                self.undo.push((now + self.millis(50, 1200), Undo::Release(node)));
            }
            11 | 12 => {
                let used = self.world.lock().nodes.entry(node).or_default().disk.allocated();
                self.limit_disk(node, Some(ByteCount(used.0 + self.below(64 << 10))));
                self.undo.push((now + self.millis(200, 1500), Undo::Grow(node)));
            }
            13 => self.world.lock().nodes.entry(node).or_default().compact = true,
            _ => {
                self.propose(false);
                self.undo.push((now + self.millis(500, 4000), Undo::Propose));
            }
        }
    }

    /// Disturbs the cluster for so long, while clients propose.
    pub(crate) fn storm(&mut self, length: Duration) -> Result<(), Violation> {
        self.run_to_leader()?;
        let end = self.sim.elapsed() + length;
        while self.sim.elapsed() < end {
            self.disturb();
            let pause = self.millis(150, 1200);
            self.run(pause)?;
        }
        Ok(())
    }

    /// Three of the nodes that are left shall vote from now on.
    fn want_others(&mut self) {
        let mut left: Vec<_> = self.nodes.iter().copied().filter(|node| !self.lost.contains(node)).collect();
        while left.len() > 3 {
            let out = self.below(left.len() as u64) as usize;
            left.remove(out);
        }
        self.want(left);
    }

    fn want(&mut self, voters: impl IntoIterator<Item = NodeId>) {
        let voters: BTreeSet<_> = voters.into_iter().collect();
        self.note(&format!("wanted: {voters:?}"));
        self.world.lock().plan.want(voters);
    }

    /// A voter goes and never comes back, if the group can go on without it and another node is left for its place.
    fn lose_one(&mut self) {
        let Some(leader) = self.leader() else { return };
        let members_of = |node: &NodeId| {
            let state = self.world.lock();
            Some(state.nodes.get(node)?.running.as_ref()?.group.members())
        };
        let Some(members) = members_of(&leader) else { return };
        // As long as an older membership could come back, a majority of that one would be needed too.
        let settled = members.voters.iter().all(|node| members_of(node).as_ref() == Some(&members));
        let left = self.nodes.len() - self.lost.len();
        let place = self.below(members.voters.len() as u64) as usize;
        let Some(victim) = members.voters.iter().copied().nth(place) else { return };
        if members.is_joint() || !settled || left <= 3 {
            return;
        }
        self.note(&format!("{} is lost for good", name(victim)));
        self.lost.insert(victim);
        self.crash(victim, Crash::DropAll);
        self.want_others();
    }

    /// The storm, while voters come and go. One disturbance at a time: with two nodes away besides those that are lost, no
    /// change would ever get through.
    pub(crate) fn migration(&mut self, length: Duration) -> Result<(), Violation> {
        self.run_to_leader()?;
        // Enough that who has nothing is not taken for one who has caught up.
        self.run_until_acked(100)?;
        self.ambush()?;
        self.run_until("the wanted members", |this| this.is_settled().then_some(()))?;
        self.run_to_leader()?;
        self.turn_round()?;
        let end = self.sim.elapsed() + length;
        while self.sim.elapsed() < end {
            match self.below(8) {
                0 => self.lose_one(),
                1..=3 => self.want_others(),
                4 => self.ambush()?,
                5 => self.turn_round()?,
                _ => self.disturb(),
            }
            let pause = self.millis(300, 1500);
            self.run(pause)?;
        }
        // Whether somebody could be spared was a matter of luck so far.
        if self.lost.is_empty() {
            self.run_until("an end of what was disturbed", |this| this.undo.is_empty().then_some(()))?;
            self.run_until("the wanted members", |this| this.is_settled().then_some(()))?;
            self.run_to_leader()?;
            self.lose_one();
        }
        Ok(())
    }

    /// Whether all is as it is wanted: who shall hold a replica runs it, who shall not has given it up.
    fn is_settled(&self) -> bool {
        let state = self.world.lock();
        let is_so = |node: &NodeId| match (state.plan.holders.contains(node), state.nodes.get(node)) {
            (true, slot) => slot.is_some_and(|slot| slot.running.is_some()),
            (false, slot) => slot.is_none_or(|slot| slot.running.is_none() && (slot.gone || slot.lives == 0)),
        };
        state.plan.is_settled() && self.nodes.iter().filter(|node| !self.lost.contains(node)).all(is_so)
    }

    /// Two voters of a group of three that was moved away from both: one that slept meanwhile, and one that left, and was asked back.
    /// By what the first one knows they are a majority, and nobody else is near to tell it better.
    fn ambush(&mut self) -> Result<(), Violation> {
        let now: Vec<_> = self.world.lock().plan.wanted.iter().copied().collect();
        let others = self.nodes.iter().copied().filter(|node| !self.lost.contains(node) && !now.contains(node));
        let others: Vec<_> = others.collect();
        if !self.undo.is_empty() || !self.is_settled() || others.len() < 2 {
            return Ok(());
        }
        // More often than not the leader: who follows would have to be elected first.
        let leader = self.leader().filter(|_| self.below(3) > 0);
        let sleeper = leader.filter(|leader| now.contains(leader)).unwrap_or(now[self.below(3) as usize]);
        let mut rest: Vec<_> = now.into_iter().filter(|node| *node != sleeper).collect();
        let leaver = rest.remove(self.below(2) as usize);
        self.note(&format!("{} sleeps, and {} leaves", name(sleeper), name(leaver)));
        self.blind(sleeper, true);
        if self.below(2) == 0 {
            self.isolate(sleeper);
        } else {
            self.crash(sleeper, Crash::DropAll);
        }
        self.want([rest[0], others[0], others[1]]);
        self.run_until("a move away from two", |this| this.has_left(leaver).then_some(()))?;
        // When it is alone it may have got nothing of the log yet, or all.
        let early = self.below(2) == 0;
        if early {
            self.leave_alone(sleeper, leaver);
        }
        self.want([rest[0], others[0], leaver]);
        self.run_until("a return", |this| this.world.lock().nodes.get(&leaver)?.running.as_ref().map(drop))?;
        if !early {
            let late = self.millis(0, 150);
            self.run(late)?;
            self.leave_alone(sleeper, leaver);
        }
        let alone = self.millis(2000, 5000);
        self.run(alone)?;
        self.blind(sleeper, false);
        self.heal();
        self.ambushes += 1;
        Ok(())
    }

    /// A group moves away from a leader that is cut off, and is called back when it is there. As far as the old leader knows all is as it
    /// shall be; if anybody believed it, those who hold the group now would go.
    fn turn_round(&mut self) -> Result<(), Violation> {
        let Some(leader) = self.leader() else { return Ok(()) };
        let now: Vec<_> = self.world.lock().plan.wanted.iter().copied().collect();
        let others = self.nodes.iter().copied().filter(|node| !self.lost.contains(node) && !now.contains(node));
        let others: Vec<_> = others.collect();
        if !self.undo.is_empty() || !self.is_settled() || !now.contains(&leader) || others.len() < 2 {
            return Ok(());
        }
        self.note(&format!("{} sees the group called back", name(leader)));
        self.blind(leader, true);
        self.isolate(leader);
        let stays = now.iter().copied().find(|node| *node != leader);
        let away: BTreeSet<_> = others.into_iter().take(2).chain(stays).collect();
        self.want(away.clone());
        self.run_until("a move away", |this| {
            let state = this.world.lock();
            let moved = state.nodes.values().filter_map(|slot| slot.running.as_ref()).any(|running| {
                let members = running.group.members();
                members.voters == away && !members.is_joint() && running.group.leadership().borrow().ready
            });
            moved.then_some(())
        })?;
        self.want(now);
        self.blind(leader, false);
        let alone = self.millis(300, 1500);
        self.run(alone)?;
        self.heal();
        self.turns += 1;
        Ok(())
    }

    /// Nobody reaches anybody but these two each other.
    fn leave_alone(&mut self, sleeper: NodeId, leaver: NodeId) {
        self.note(&format!("{} and {} are alone", name(sleeper), name(leaver)));
        self.heal();
        for other in self.nodes.clone().into_iter().filter(|other| ![sleeper, leaver].contains(other)) {
            for one in [sleeper, leaver] {
                self.cut(one, other);
                self.cut(other, one);
            }
        }
        self.restart(sleeper);
    }

    fn has_left(&self, node: NodeId) -> bool {
        let state = self.world.lock();
        state.nodes.get(&node).is_some_and(|slot| slot.gone && slot.running.is_none())
    }

    /// Who belongs to the group, as its leader has it.
    fn members_now(&self) -> Option<Vec<NodeId>> {
        let leader = self.leader()?;
        let state = self.world.lock();
        let members = state.nodes.get(&leader)?.running.as_ref()?.group.members();
        Some(self.nodes.iter().copied().filter(|node| members.contains(*node)).collect())
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
