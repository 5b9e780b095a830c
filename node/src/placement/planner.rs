//! Who shall hold what: a pure function of nodes and topics, without clock, network or randomness.
//!
//! In this order: never outside a topic's regions; as many replicas as asked for, on nodes that live; far from each other (regions,
//! then zones); equal shares. Ties go to the lower number, so that every node plans the same. A replica is moved for its share only
//! if that makes the difference between two nodes smaller by what it costs, so plans come to an end and never go back and forth.
//! Where a majority of a topic's replicas does not answer, nobody could lead a move: none is begun, and one that is on takes nobody's turn.

mod unplaceable;

use std::collections::{BTreeMap, BTreeSet};

use ensign_proto::{GroupId, NodeId, TopicId};

use crate::catalog::{MoveReason, NodeState, Placement};

pub use unplaceable::Unplaceable;

/// Whether a node answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pulse {
    /// It does.
    Alive,
    /// Not at the moment; it may come back.
    Silent,
    /// Not for so long that its replicas are made anew elsewhere.
    Lost,
}

/// What is known of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its region; empty when not told.
    pub region: String,
    /// Its zone within the region; empty when not told.
    pub zone: String,
    /// What it may hold.
    pub state: NodeState,
    /// Whether it answers.
    pub pulse: Pulse,
}

/// What is known of a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicFacts {
    /// Its id.
    pub id: TopicId,
    /// Its group.
    pub group: GroupId,
    /// Who holds its replicas.
    pub replicas: BTreeSet<NodeId>,
    /// Who shall, if a move is on.
    pub target: Option<BTreeSet<NodeId>>,
    /// The move was turned round already.
    pub cancelled: bool,
    /// Where they may be.
    pub placement: Placement,
}

impl TopicFacts {
    /// Who holds, or is about to.
    fn heading(&self) -> &BTreeSet<NodeId> {
        self.target.as_ref().unwrap_or(&self.replicas)
    }
}

/// What the planner looks at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// The nodes, removed ones too.
    pub nodes: BTreeMap<NodeId, NodeFacts>,
    /// The topics, but for those that are being destroyed.
    pub topics: Vec<TopicFacts>,
}

/// How much may be under way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanLimits {
    /// Moves in the cluster.
    pub moves: usize,
    /// Moves that bring a replica to one node.
    pub per_node: usize,
}

impl Default for PlanLimits {
    fn default() -> Self {
        Self { moves: 8, per_node: 4 }
    }
}

/// A move to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedMove {
    /// Of which topic.
    pub topic: TopicId,
    /// Who shall hold its replicas.
    pub target: BTreeSet<NodeId>,
    /// Why.
    pub reason: MoveReason,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Moves to begin.
    pub moves: Vec<PlannedMove>,
    /// Topics whose move leads to a node that is lost or leaves.
    pub cancels: Vec<TopicId>,
    /// Topics that should be elsewhere and cannot, with the reason.
    pub stuck: Vec<(TopicId, Unplaceable)>,
}

/// How many replicas each node holds, or is about to.
type Load = BTreeMap<NodeId, usize>;

impl Facts {
    /// Picks nodes for a new topic.
    ///
    /// # Errors
    /// See [`Unplaceable`].
    pub fn choose(&self, placement: &Placement) -> Result<BTreeSet<NodeId>, Unplaceable> {
        self.check(placement)?;
        let mut chosen = BTreeSet::new();
        let load = self.load();
        while chosen.len() < placement.replication as usize {
            // A node that is silent may be back sooner than anybody misses it: better than too few.
            let legal = |node: &NodeId| self.allowed(*node, placement, Pulse::Lost);
            match self.best(&chosen, placement, &load, legal) {
                Some(node) => chosen.insert(node),
                None => return Err(self.too_few(placement)),
            };
        }
        Ok(chosen)
    }

    /// Whether a placement can be asked for at all.
    ///
    /// # Errors
    /// See [`Unplaceable`].
    pub fn check(&self, placement: &Placement) -> Result<(), Unplaceable> {
        let max = crate::catalog::REPLICATION_MAX;
        if placement.replication == 0 || placement.replication > max {
            return Err(Unplaceable::Replication { asked: placement.replication, max });
        }
        let active = || self.nodes.values().filter(|node| node.state == NodeState::Active);
        let preferred = Some(&placement.leader_region).filter(|region| !region.is_empty());
        for region in placement.regions.iter().chain(preferred) {
            if !active().any(|node| node.region == *region) {
                let known = active().map(|node| node.region.clone()).filter(|region| !region.is_empty()).collect();
                return Err(Unplaceable::RegionUnknown { region: region.clone(), known });
            }
        }
        if let Some(region) = preferred.filter(|region| !placement.allows(region)) {
            let allowed = placement.regions.clone();
            return Err(Unplaceable::LeaderRegion { region: region.clone(), allowed });
        }
        let eligible = active().filter(|node| placement.allows(&node.region)).count();
        if eligible < placement.replication as usize { Err(self.too_few(placement)) } else { Ok(()) }
    }

    fn too_few(&self, placement: &Placement) -> Unplaceable {
        let eligible = self.nodes.keys().filter(|node| self.allowed(**node, placement, Pulse::Silent)).count();
        Unplaceable::TooFewNodes { wanted: placement.replication, eligible, regions: placement.regions.clone() }
    }

    /// Whether a node may hold a replica, and answers at least this well.
    fn allowed(&self, node: NodeId, placement: &Placement, worst: Pulse) -> bool {
        self.nodes.get(&node).is_some_and(|facts| {
            facts.state == NodeState::Active && facts.pulse <= worst && placement.allows(&facts.region)
        })
    }

    fn load(&self) -> Load {
        let active = self.nodes.iter().filter(|(_, facts)| facts.state == NodeState::Active);
        let mut load: Load = active.map(|(node, _)| (*node, 0)).collect();
        for node in self.topics.iter().flat_map(TopicFacts::heading) {
            *load.entry(*node).or_default() += 1;
        }
        load
    }

    /// How many of these nodes are in the region, and in the zone, of a node.
    fn near(&self, node: NodeId, others: &BTreeSet<NodeId>) -> (usize, usize) {
        let Some(own) = self.nodes.get(&node) else { return (0, 0) };
        let facts = || others.iter().filter(|other| **other != node).filter_map(|other| self.nodes.get(other));
        let region = facts().filter(|other| other.region == own.region).count();
        let zone = facts().filter(|other| other.region == own.region && other.zone == own.zone).count();
        (region, zone)
    }

    /// The best node to add.
    fn best(
        &self,
        chosen: &BTreeSet<NodeId>,
        placement: &Placement,
        load: &Load,
        legal: impl Fn(&NodeId) -> bool,
    ) -> Option<NodeId> {
        let leads = |node: &NodeId| {
            !placement.leader_region.is_empty()
                && self.nodes.get(node).is_some_and(|facts| facts.region == placement.leader_region)
        };
        // Somebody has to be where the leader shall be.
        let covered = placement.leader_region.is_empty() || chosen.iter().any(leads);
        let candidates = self.nodes.keys().filter(|node| !chosen.contains(node)).filter(|node| legal(node));
        candidates.copied().min_by_key(|node| {
            let (region, zone) = self.near(*node, chosen);
            let pulse = self.nodes.get(node).map_or(Pulse::Lost, |facts| facts.pulse);
            let held = load.get(node).copied().unwrap_or_default();
            (pulse, !covered && !leads(node), region, zone, held, *node)
        })
    }

    /// The node that is missed least.
    fn worst(&self, chosen: &BTreeSet<NodeId>, placement: &Placement, load: &Load) -> Option<NodeId> {
        chosen.iter().copied().filter(|node| !self.is_needed_to_lead(*node, chosen, placement)).max_by_key(|node| {
            let (region, zone) = self.near(*node, chosen);
            (region, zone, load.get(node).copied().unwrap_or_default(), *node)
        })
    }

    /// Whether it is the only one where the leader shall be, and others could go instead.
    fn is_needed_to_lead(&self, node: NodeId, chosen: &BTreeSet<NodeId>, placement: &Placement) -> bool {
        let leads = |node: &NodeId| self.nodes.get(node).is_some_and(|facts| facts.region == placement.leader_region);
        !placement.leader_region.is_empty()
            && chosen.len() > 1
            && leads(&node)
            && chosen.iter().filter(|other| leads(other)).count() == 1
    }

    /// Whether somebody is where the leader shall be.
    fn is_led(&self, chosen: &BTreeSet<NodeId>, placement: &Placement) -> bool {
        let leads = |node: &NodeId| self.nodes.get(node).is_some_and(|facts| facts.region == placement.leader_region);
        placement.leader_region.is_empty() || chosen.iter().any(leads)
    }

    /// Where a topic's replicas shall be for its own sake, and what keeps them from being there.
    fn settle(&self, topic: &TopicFacts, load: &Load) -> (BTreeSet<NodeId>, Option<Unplaceable>) {
        let placement = &topic.placement;
        let wanted = placement.replication as usize;
        // Silent nodes stay: they may be back any moment.
        let stays = |node: &NodeId| self.allowed(*node, placement, Pulse::Silent);
        let mut chosen: BTreeSet<NodeId> = topic.replicas.iter().copied().filter(stays).collect();
        while chosen.len() > wanted {
            let Some(node) = self.worst(&chosen, placement, load) else { break };
            chosen.remove(&node);
        }
        // Only who lives is given something new.
        let takes = |node: &NodeId| self.allowed(*node, placement, Pulse::Alive);
        while chosen.len() < wanted {
            let Some(node) = self.best(&chosen, placement, load, takes) else { break };
            chosen.insert(node);
        }
        if chosen.len() >= wanted {
            return (chosen, None);
        }
        // Better where it should not be than nowhere: what leaves but lives, then what may come back.
        let mut left: Vec<NodeId> = topic.replicas.difference(&chosen).copied().collect();
        left.sort_by_key(|node| {
            let facts = self.nodes.get(node);
            let abroad = facts.is_none_or(|facts| !placement.allows(&facts.region));
            (abroad, facts.map_or(Pulse::Lost, |facts| facts.pulse), *node)
        });
        for node in left {
            if chosen.len() < wanted {
                chosen.insert(node);
            }
        }
        (chosen, Some(self.too_few(placement)))
    }

    fn reason(&self, topic: &TopicFacts, target: &BTreeSet<NodeId>) -> MoveReason {
        let leaving = || topic.replicas.difference(target).filter_map(|node| self.nodes.get(node));
        if leaving().any(|facts| facts.pulse == Pulse::Lost) {
            MoveReason::Lost
        } else if leaving().any(|facts| facts.state != NodeState::Active) {
            MoveReason::Drain
        } else {
            MoveReason::Policy
        }
    }

    /// Whether a move leads to a node that will not take the replica.
    fn leads_nowhere(&self, topic: &TopicFacts) -> bool {
        let Some(target) = topic.target.as_ref().filter(|_| !topic.cancelled) else { return false };
        target.difference(&topic.replicas).any(|node| {
            self.nodes.get(node).is_none_or(|facts| facts.state != NodeState::Active || facts.pulse == Pulse::Lost)
        })
    }

    /// Why nobody can lead a change of the topic's replicas, if too few of them answer. In the middle of a move its new replicas may be the
    /// voters already: then this is wrong for as long as it takes to write that down.
    pub fn without_majority(&self, topic: &TopicFacts) -> Option<Unplaceable> {
        let answers = |node: &&NodeId| {
            self.nodes.get(node).is_some_and(|it| it.pulse == Pulse::Alive && it.state != NodeState::Removed)
        };
        let silent: BTreeSet<NodeId> = topic.replicas.iter().filter(|node| !answers(node)).copied().collect();
        let replicas = topic.replicas.len();
        (silent.len() * 2 >= replicas && !silent.is_empty()).then_some(Unplaceable::NoMajority { silent, replicas })
    }

    /// What to begin now. Moves that are on, and somebody can lead, count against `limits`.
    pub fn plan(&self, limits: PlanLimits) -> Plan {
        let mut plan = Plan::default();
        let mut load = self.load();
        let mut budget = Budget::new(self, limits);
        let mut repairs = false;
        for topic in &self.topics {
            let headless = self.without_majority(topic);
            if topic.target.is_some() {
                if self.leads_nowhere(topic) {
                    plan.cancels.push(topic.id);
                }
                plan.stuck.extend(headless.map(|why| (topic.id, why)));
                continue;
            }
            let (target, stuck) = self.settle(topic, &load);
            if let Some(why) = headless {
                // Silent nodes that are only waited for are no news.
                if stuck.is_some() || target != topic.replicas {
                    plan.stuck.push((topic.id, why));
                }
                continue;
            }
            plan.stuck.extend(stuck.map(|why| (topic.id, why)));
            if target == topic.replicas {
                continue;
            }
            repairs = true;
            if budget.take(&topic.replicas, &target) {
                shift(&mut load, &topic.replicas, &target);
                let reason = self.reason(topic, &target);
                plan.moves.push(PlannedMove { topic: topic.id, target, reason });
            }
        }
        let is_silent = |node: &NodeFacts| node.state == NodeState::Active && node.pulse == Pulse::Silent;
        let calm = !self.nodes.values().any(is_silent);
        // Shares are for quiet times: what must move goes first, and a node that is being restarted is not a reason to copy data.
        if calm && !repairs {
            self.rebalance(&mut plan, &mut load, &mut budget);
        }
        plan
    }

    fn rebalance(&self, plan: &mut Plan, load: &mut Load, budget: &mut Budget) {
        let movable = |topic: &&TopicFacts| topic.target.is_none() && self.without_majority(topic).is_none();
        for topic in self.topics.iter().filter(movable) {
            if budget.is_spent() {
                return;
            }
            let Some((from, to)) = self.improvement(topic, load) else { continue };
            let mut target = topic.replicas.clone();
            target.remove(&from);
            target.insert(to);
            if budget.take(&topic.replicas, &target) {
                shift(load, &topic.replicas, &target);
                plan.moves.push(PlannedMove { topic: topic.id, target, reason: MoveReason::Rebalance });
            }
        }
    }

    /// The exchange of one node that helps most, if one helps enough.
    fn improvement(&self, topic: &TopicFacts, load: &Load) -> Option<(NodeId, NodeId)> {
        let held = |node: &NodeId| number(load.get(node).copied().unwrap_or_default());
        let takes =
            |node: &&NodeId| !topic.replicas.contains(node) && self.allowed(**node, &topic.placement, Pulse::Alive);
        let mut best = None;
        for from in &topic.replicas {
            let mut rest = topic.replicas.clone();
            rest.remove(from);
            let (region_before, zone_before) = self.near(*from, &rest);
            for to in self.nodes.keys().filter(takes) {
                let (region, zone) = self.near(*to, &rest);
                let spread = (number(region) - number(region_before), number(zone) - number(zone_before));
                let mut after = rest.clone();
                after.insert(*to);
                // Where the leader shall be comes before everything else.
                let led = i64::from(self.is_led(&topic.replicas, &topic.placement))
                    - i64::from(self.is_led(&after, &topic.placement));
                let gain = held(from) - held(to);
                let helps =
                    (led, spread) < (0, (0, 0)) || ((led, spread) == (0, (0, 0)) && gain >= worthwhile(held(from)));
                let rank = (led, spread, -gain, *from, *to);
                if helps && best.is_none_or(|known| rank < known) {
                    best = Some(rank);
                }
            }
        }
        best.map(|(_, _, _, from, to)| (from, to))
    }

    /// Who should lead a topic: somebody in its preferred region if there is one, and another node for the next topic.
    /// None when no node that stays holds it.
    pub fn preferred_leader(&self, topic: &TopicFacts) -> Option<NodeId> {
        let heading = topic.heading();
        let stays = |node: &&NodeId| self.allowed(**node, &topic.placement, Pulse::Silent);
        let candidates: Vec<NodeId> = heading.iter().filter(stays).copied().collect();
        let preferred =
            |node: &NodeId| self.nodes.get(node).is_some_and(|facts| facts.region == topic.placement.leader_region);
        let near: Vec<NodeId> = candidates.iter().copied().filter(preferred).collect();
        let among = if topic.placement.leader_region.is_empty() || near.is_empty() { candidates } else { near };
        let turn = topic.group.0.saturating_sub(GroupId::FIRST_PARTITION.0) as usize;
        among.get(turn % among.len().max(1)).copied()
    }
}

fn number(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// By how much two nodes must differ before a replica is moved between them: by two, or a tenth of what the fuller one holds.
/// With less, the move would only turn the difference round.
fn worthwhile(held: i64) -> i64 {
    (held / 10).max(2)
}

fn shift(load: &mut Load, from: &BTreeSet<NodeId>, to: &BTreeSet<NodeId>) {
    for node in from.difference(to) {
        load.entry(*node).and_modify(|held| *held = held.saturating_sub(1));
    }
    for node in to.difference(from) {
        *load.entry(*node).or_default() += 1;
    }
}

/// What may still begin.
struct Budget {
    moves: usize,
    per_node: usize,
    arriving: BTreeMap<NodeId, usize>,
}

impl Budget {
    fn new(facts: &Facts, limits: PlanLimits) -> Self {
        let mut budget = Self { moves: limits.moves, per_node: limits.per_node, arriving: BTreeMap::new() };
        for topic in &facts.topics {
            let Some(target) = topic.target.as_ref().filter(|_| facts.without_majority(topic).is_none()) else {
                continue;
            };
            budget.moves = budget.moves.saturating_sub(1);
            for node in target.difference(&topic.replicas) {
                *budget.arriving.entry(*node).or_default() += 1;
            }
        }
        budget
    }

    fn is_spent(&self) -> bool {
        self.moves == 0
    }

    fn take(&mut self, from: &BTreeSet<NodeId>, to: &BTreeSet<NodeId>) -> bool {
        let full = |node: &NodeId| self.arriving.get(node).copied().unwrap_or_default() >= self.per_node;
        if self.moves == 0 || to.difference(from).any(full) {
            return false;
        }
        self.moves -= 1;
        for node in to.difference(from) {
            *self.arriving.entry(*node).or_default() += 1;
        }
        true
    }
}

#[cfg(test)]
mod tests;
