//! Who belongs to the group: changes of members, nodes that are lost, groups that move and turn round.

use std::collections::BTreeSet;
use std::time::Duration;

use ensign_proto::NodeId;
use ensign_storage::fault::Crash;

use super::SimCluster;
use crate::check::Violation;
use crate::host::name;

impl SimCluster {
    /// Three of the nodes that are left shall vote from now on.
    pub(super) fn want_others(&mut self) {
        let mut left: Vec<_> = self.nodes.iter().copied().filter(|node| !self.lost.contains(node)).collect();
        while left.len() > 3 {
            let out = self.below(left.len() as u64) as usize;
            left.remove(out);
        }
        self.want(left);
    }

    pub(super) fn want(&mut self, voters: impl IntoIterator<Item = NodeId>) {
        let voters: BTreeSet<_> = voters.into_iter().collect();
        self.note(&format!("wanted: {voters:?}"));
        self.world.lock().plan.want(voters);
    }

    /// A voter goes and never comes back, if the group can go on without it and another node is left for its place.
    pub(super) fn lose_one(&mut self) {
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
    pub(super) fn is_settled(&self) -> bool {
        let state = self.world.lock();
        let is_so = |node: &NodeId| match (state.plan.holders.contains(node), state.nodes.get(node)) {
            (true, slot) => slot.is_some_and(|slot| slot.running.is_some()),
            (false, slot) => slot.is_none_or(|slot| slot.running.is_none() && (slot.gone || slot.lives == 0)),
        };
        state.plan.is_settled() && self.nodes.iter().filter(|node| !self.lost.contains(node)).all(is_so)
    }

    /// Two voters of a group of three that was moved away from both: one that slept meanwhile, and one that left, and was asked back.
    /// By what the first one knows they are a majority, and nobody else is near to tell it better.
    pub(super) fn ambush(&mut self) -> Result<(), Violation> {
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
    pub(super) fn turn_round(&mut self) -> Result<(), Violation> {
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
    pub(super) fn leave_alone(&mut self, sleeper: NodeId, leaver: NodeId) {
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

    pub(super) fn has_left(&self, node: NodeId) -> bool {
        let state = self.world.lock();
        state.nodes.get(&node).is_some_and(|slot| slot.gone && slot.running.is_none())
    }

    /// Who belongs to the group, as its leader has it.
    pub(super) fn members_now(&self) -> Option<Vec<NodeId>> {
        let leader = self.leader()?;
        let state = self.world.lock();
        let members = state.nodes.get(&leader)?.running.as_ref()?.group.members();
        Some(self.nodes.iter().copied().filter(|node| members.contains(*node)).collect())
    }
}
