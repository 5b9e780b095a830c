//! Raft's promises, looked at from outside while a simulation runs (Raft, fig. 3).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use bytes::Bytes;
use ensign_proto::{ByteCount, LogIndex, NodeId, Term};
use ensign_storage::EntryId;

use crate::world::{Outcome, World};

/// A promise that was broken.
#[derive(Debug)]
pub(crate) struct Violation(pub(crate) String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn broken<T>(what: String) -> Result<T, Violation> {
    Err(Violation(what))
}

/// How much of a node was looked at.
#[derive(Default)]
struct Seen {
    life: u64,
    term: Term,
    applied: LogIndex,
    journal: usize,
}

#[derive(Default)]
pub(crate) struct Checker {
    leaders: BTreeMap<Term, NodeId>,
    /// The highest term that a node has led: its vote for itself was on disk by then.
    led: BTreeMap<NodeId, Term>,
    seen: BTreeMap<NodeId, Seen>,
    /// What some replica applied, or some client was told: it can never become something else.
    applied: BTreeMap<LogIndex, (Term, Bytes)>,
    places: BTreeMap<Bytes, LogIndex>,
    /// What was ever seen in a log under an id.
    written: BTreeMap<EntryId, Bytes>,
    refused: BTreeSet<Bytes>,
    outcomes: usize,
    pub(crate) acked: BTreeMap<LogIndex, Bytes>,
    pub(crate) unknown: usize,
}

/// Entries that one look at a log compares.
const TAIL: u64 = 32;

impl Checker {
    /// Looks at every node and at what clients learned since the last look.
    pub(crate) fn look(&mut self, world: &World) -> Result<(), Violation> {
        sleepers(world)?;
        let (running, outcomes) = {
            let mut state = world.lock();
            if let Some(what) = state.broken.take() {
                return broken(what);
            }
            let running: Vec<_> =
                state.nodes.iter().filter_map(|(id, slot)| Some((*id, slot.running.clone()?))).collect();
            (running, state.outcomes[self.outcomes..].to_vec())
        };
        for (node, running) in running {
            if let Some(panic) = running.tasks.panicked() {
                return broken(format!("node {node}: {panic}"));
            }
            self.leadership(node, *running.group.leadership().borrow())?;
            self.node(node, &running)?;
        }
        self.outcomes += outcomes.len();
        for (payload, outcome) in outcomes {
            match outcome {
                Outcome::Acked(id) => {
                    self.is_applied("the client's answer", id, &payload)?;
                    self.acked.insert(id.index, payload);
                }
                Outcome::Refused => {
                    if let Some(at) = self.places.get(&payload) {
                        return broken(format!("{payload:?} was refused, and is in the log at {at}"));
                    }
                    self.refused.insert(payload);
                }
                Outcome::Unknown => self.unknown += 1,
            }
        }
        Ok(())
    }

    pub(crate) fn elections(&self) -> usize {
        self.leaders.len()
    }

    /// Election safety: one leader a term. A leader never goes back behind a term that it led.
    fn leadership(&mut self, node: NodeId, now: ensign_raft::Leadership) -> Result<(), Violation> {
        let Some(leader) = now.leader else { return Ok(()) };
        let first = *self.leaders.entry(now.term).or_insert(leader);
        if first != leader {
            return broken(format!("term {} has two leaders, {first} and {leader} (says {node})", now.term));
        }
        if leader == node {
            let led = self.led.entry(node).or_default();
            *led = (*led).max(now.term);
        }
        Ok(())
    }

    fn node(&mut self, node: NodeId, running: &crate::world::Running) -> Result<(), Violation> {
        let seen = self.seen.entry(node).or_default();
        if seen.life != running.life {
            *seen = Seen { life: running.life, ..Seen::default() };
        }
        let status = running.group.status();
        let floor = seen.term.max(self.led.get(&node).copied().unwrap_or_default());
        let term = status.leadership.term;
        if status.health == ensign_raft::Health::Running && term < floor && term != Term(0) {
            return broken(format!("node {node} went back from term {floor} to {term}"));
        }
        seen.term = seen.term.max(term);
        if status.applied < seen.applied {
            return broken(format!("node {node} applied {}, and then {}", seen.applied, status.applied));
        }
        seen.applied = status.applied;
        // State-machine safety.
        let from = seen.journal;
        let fresh = running.group.inspect(|journal| journal.entries.get(from..).map(<[_]>::to_vec));
        let Some(fresh) = fresh else { return broken(format!("node {node} forgot applied entries")) };
        seen.journal += fresh.len();
        for entry in fresh {
            self.is_applied(&format!("node {node}"), entry.id, &entry.payload)?;
            if self.refused.contains(&entry.payload) {
                return broken(format!("{:?} was refused, and node {node} applied it", entry.payload));
            }
        }
        self.log(node, running)
    }

    /// Log matching: one id is one entry, in every log and for ever.
    fn log(&mut self, node: NodeId, running: &crate::world::Running) -> Result<(), Violation> {
        let state = running.log.state();
        let Some(last) = state.last else { return Ok(()) };
        let first = state.purged.map_or(0, |purged| purged.index.0 + 1).max(last.index.0.saturating_sub(TAIL));
        let range = LogIndex(first)..last.index.next();
        for entry in running.log.read_cached(range, ByteCount(u64::MAX)).unwrap_or_default() {
            let known = self.written.entry(entry.id).or_insert_with(|| entry.payload.clone());
            if *known != entry.payload {
                let what = format!("two entries share the id {:?}: {known:?}, and {:?}", entry.id, entry.payload);
                return broken(format!("{what} on node {node}"));
            }
        }
        Ok(())
    }

    fn is_applied(&mut self, who: &str, id: EntryId, payload: &Bytes) -> Result<(), Violation> {
        let (term, known) = self.applied.entry(id.index).or_insert_with(|| (id.term, payload.clone()));
        if (*term, &*known) != (id.term, payload) {
            let what =
                format!("two entries at {}: {known:?} of term {term}, and {payload:?} of term {}", id.index, id.term);
            return broken(format!("{what} ({who})"));
        }
        let place = *self.places.entry(payload.clone()).or_insert(id.index);
        if place != id.index {
            return broken(format!("{payload:?} is applied at {place} and at {}", id.index));
        }
        Ok(())
    }

    /// What was acknowledged is in this journal, each in its place.
    pub(crate) fn nothing_is_lost(&self, journal: &[(LogIndex, Bytes)]) -> Result<(), Violation> {
        let held: BTreeMap<_, _> = journal.iter().cloned().collect();
        for (index, payload) in &self.acked {
            if held.get(index) != Some(payload) {
                return broken(format!("{payload:?} was acknowledged at {index}, and is gone"));
            }
        }
        Ok(())
    }
}

/// A follower that sleeps under a leader that sleeps has applied all that the leader holds.
fn sleepers(world: &World) -> Result<(), Violation> {
    let state = world.lock();
    let running = state.nodes.iter().filter_map(|(node, slot)| Some((*node, slot.running.as_ref()?.group.status())));
    let sleeping: BTreeMap<_, _> = running.filter(|(_, status)| status.asleep).collect();
    for (node, status) in &sleeping {
        let Some(leader) = status.leadership.leader else {
            return broken(format!("node {node} sleeps, and knows no leader"));
        };
        let Some(there) = sleeping.get(&leader).filter(|there| there.leadership.term == status.leadership.term) else {
            continue;
        };
        if there.leadership.leads(leader) && status.applied != there.last {
            let what = format!("node {node} sleeps at {}, and its leader {leader} at {}", status.applied, there.last);
            return broken(what);
        }
    }
    Ok(())
}
