//! What goes wrong: crashes, cuts, full disks and blind nodes, one by one and as a storm.

use std::time::Duration;

use ensign_proto::{ByteCount, NodeId};
use ensign_raft::env::Rng as _;
use ensign_storage::fault::{Crash, Fault};

use super::{SimCluster, Undo};
use crate::check::Violation;
use crate::host::name;

impl SimCluster {
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

    pub(super) fn blind(&mut self, node: NodeId, blind: bool) {
        self.note(&format!("{} blind: {blind}", name(node)));
        self.world.lock().nodes.entry(node).or_default().blind = blind;
    }

    pub(super) fn limit_disk(&mut self, node: NodeId, capacity: Option<ByteCount>) {
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
    pub(super) fn disturb(&mut self) {
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
}
