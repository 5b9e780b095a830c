//! Moves, driven by whoever leads the partition: this node's part in carrying out what the catalog says.
//!
//! Once started, a move needs nobody but the partition's leader. It looks at the catalog and at the group, takes the next step, and
//! looks again; what it knows is in these two, so the next leader goes on where the last one stopped. A bounded number runs at
//! once; the bytes that new replicas are sent are bounded by the Raft runtime.
//!
//! The same task keeps leaders where they should be: in a topic's preferred region, and in equal shares. It waits until the
//! better leader has been fit for a while, so that nodes that come and go do not pull leaderships back and forth.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::{NodeId, TopicId};
use ensign_raft::env::{Clock, Stop, Tasks};
use futures::future::BoxFuture;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::pace::Pace;
use super::step::{Seen, Step, next_step};
use crate::catalog::{Catalog, MovePhase, MoveReport, PlaceError, Reassignment, Topic, TopicState};

/// Moves that one node drives at once.
const MOVES_MAX: usize = 4;
/// How often topics are looked through, at least and at most.
const LOOK_AT_LEAST: Duration = Duration::from_millis(500);
const LOOK_AT_MOST: Duration = Duration::from_millis(100);
/// Between two steps that change nothing.
const PAUSE: Duration = Duration::from_millis(100);
/// Before a step that failed is tried again.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(500);
/// How often the catalog hears of a move that goes on in the same phase.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// How often leaderships are looked through, and how many move in one look.
const BALANCE_EVERY: Duration = Duration::from_secs(5);
const BALANCE_AGAIN: Duration = Duration::from_secs(1);
const TRANSFERS_MAX: usize = 8;
/// How long another node must have been the better leader before it leads: longer than a node takes to stop.
const FIT_FOR: Duration = Duration::from_secs(30);

/// A partition's group on this node, as a move needs it. Failures come as text: a move says them and tries again.
pub trait Seat: Send + Sync + 'static {
    /// Whether this node leads, and has applied everything from before it did.
    fn leads(&self) -> bool;
    /// Who belongs to the group, and how far each is.
    fn seen(&self) -> Seen;
    /// Returns once the group's membership is committed, and a majority of those who vote by it has confirmed that this node leads.
    fn settle(&self) -> BoxFuture<'static, Result<(), String>>;
    /// Lets a node receive the log.
    fn add_learner(&self, node: NodeId) -> BoxFuture<'static, Result<(), String>>;
    /// Sends a node without a vote nothing more.
    fn remove_learner(&self, node: NodeId) -> BoxFuture<'static, Result<(), String>>;
    /// Makes `voters` the voters in place of `expected`.
    fn change_voters(
        &self,
        expected: BTreeSet<NodeId>,
        voters: BTreeSet<NodeId>,
    ) -> BoxFuture<'static, Result<(), String>>;
    /// Leaves the lead to a voter.
    fn hand_over(&self, to: NodeId) -> BoxFuture<'static, Result<(), String>>;
}

/// The partitions of this node.
pub trait Seats: Send + Sync + 'static {
    /// The group of a topic's partition, if it runs here.
    fn seat(&self, topic: TopicId) -> Option<Arc<dyn Seat>>;
}

/// What a [`Mover`] is made of.
pub struct MoverParts {
    /// This node.
    pub me: NodeId,
    /// Says what shall be.
    pub catalog: Catalog,
    /// Where it is done.
    pub seats: Arc<dyn Seats>,
    /// For the times of reports.
    pub clock: Arc<dyn Clock>,
    /// Owner of the moves' tasks.
    pub tasks: Tasks,
}

/// Moves the replicas of the partitions that this node leads. One a node.
pub struct Mover {
    parts: MoverParts,
    /// Moves that are driven here.
    active: Mutex<BTreeSet<TopicId>>,
}

impl std::fmt::Debug for Mover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mover").field("node", &self.parts.me).finish_non_exhaustive()
    }
}

impl Mover {
    /// A mover that does nothing yet.
    pub fn new(parts: MoverParts) -> Arc<Self> {
        Arc::new(Self { parts, active: Mutex::default() })
    }

    fn active(&self) -> MutexGuard<'_, BTreeSet<TopicId>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seat(&self, topic: TopicId) -> Option<Arc<dyn Seat>> {
        self.parts.seats.seat(topic).filter(|seat| seat.leads())
    }

    /// Drives moves and balances leaders until `stop`.
    pub async fn run(self: Arc<Self>, stop: Stop) {
        let balancer = Arc::clone(&self);
        let looking = async {
            let mut changes = self.parts.catalog.view().changes();
            loop {
                changes.mark_unchanged();
                self.look();
                sleep(LOOK_AT_MOST).await;
                // The catalog ends only with the node.
                let _ = tokio::time::timeout(LOOK_AT_LEAST, changes.changed()).await;
            }
        };
        stop.run_until_cancelled(async { tokio::join!(looking, balancer.balance()) }).await;
    }

    /// Takes up the moves of partitions that this node leads, as many as may run.
    fn look(self: &Arc<Self>) {
        for topic in self.parts.catalog.view().moving() {
            let mut active = self.active();
            if active.len() >= MOVES_MAX {
                return;
            }
            if self.seat(topic.id).is_none() || !active.insert(topic.id) {
                continue;
            }
            drop(active);
            let this = Arc::clone(self);
            self.parts.tasks.spawn("move", move |stop| async move {
                stop.run_until_cancelled(this.drive(topic.id)).await;
                this.active().remove(&topic.id);
            });
        }
    }

    /// The topic and its move, while there is one.
    fn moving(&self, topic: TopicId) -> Option<(Arc<Topic>, Reassignment)> {
        let topic = self.parts.catalog.view().topic(topic)?;
        let on = topic.reassignment.clone()?;
        (topic.state != TopicState::Deleting).then_some((topic, on))
    }

    /// Takes step after step, until the move is over or this node does not lead any more.
    async fn drive(&self, id: TopicId) {
        let mut said: Option<(MoveReport, Instant)> = None;
        let mut pace = Pace::default();
        while let Some((topic, on)) = self.moving(id) {
            let Some(seat) = self.seat(id) else { return };
            let seen = seat.seen();
            let facts = self.parts.catalog.node_facts();
            let prefers = facts.preferred_leader(&self.parts.catalog.facts_of(&topic));
            let step = next_step(self.parts.me, &on.target, &seen, prefers, |node| self.parts.catalog.is_alive(node));
            debug!(topic = %id, ?step, ?seen, "a move");
            let slow = if let Step::CatchUp { .. } = step {
                let arriving = on.target.difference(&seen.voters).copied().collect();
                pace.look(&arriving, &seen, Instant::now())
            } else {
                pace = Pace::default();
                ""
            };
            self.report(&topic, &step, slow, &mut said).await;
            let outcome = self.take(&topic, &*seat, &seen, &on, step.clone()).await;
            if let Err(why) = outcome {
                debug!(topic = %id, ?step, why, "a step of a move failed");
                self.report(&topic, &Step::Wait { why }, "", &mut said).await;
                sleep(PAUSE_AFTER_FAILURE).await;
            }
        }
    }

    async fn take(
        &self,
        topic: &Arc<Topic>,
        seat: &dyn Seat,
        seen: &Seen,
        on: &Reassignment,
        step: Step,
    ) -> Result<(), String> {
        match step {
            Step::Wait { .. } | Step::CatchUp { .. } => {
                sleep(PAUSE).await;
                Ok(())
            }
            Step::RemoveLearner(node) => seat.remove_learner(node).await,
            Step::AddLearner(node) => seat.add_learner(node).await,
            Step::HandOver(to) => {
                info!(topic = %topic.id, %to, "this node leaves the partition and hands it over");
                seat.hand_over(to).await
            }
            Step::Switch(voters) => {
                info!(topic = %topic.id, from = ?seen.voters, to = ?voters, "the voters of a partition change");
                seat.change_voters(seen.voters.clone(), voters).await
            }
            Step::Finish => {
                // What the log says may not be committed yet, or not be true any more, and nodes remove what they have once the catalog
                // says so.
                seat.settle().await?;
                let now = seat.seen();
                if !seat.leads() || (&now.voters, &now.outgoing) != (&seen.voters, &seen.outgoing) {
                    return Ok(());
                }
                match self.parts.catalog.finish_move(topic, on.target.clone()).await {
                    Ok(_) => {
                        info!(topic = %topic.id, replicas = ?on.target, reason = ?on.reason, "a move is over");
                        Ok(())
                    }
                    // Turned round, or ended by another leader: look again.
                    Err(PlaceError::Refused(_)) => Ok(()),
                    Err(error) => Err(error.to_string()),
                }
            }
        }
    }

    /// Tells the catalog, and so everybody, how far a move is: when that changes, and now and then. `slow` says why new replicas do not
    /// arrive.
    async fn report(&self, topic: &Arc<Topic>, step: &Step, slow: &str, said: &mut Option<(MoveReport, Instant)>) {
        let (phase, behind, waiting) = match step {
            Step::Wait { why } => (MovePhase::Waiting, 0, why.chars().take(200).collect()),
            Step::AddLearner(_) => (MovePhase::CatchingUp, 0, String::new()),
            Step::CatchUp { behind } => (MovePhase::CatchingUp, *behind, slow.to_owned()),
            Step::HandOver(_) => (MovePhase::HandingOver, 0, String::new()),
            Step::Switch(_) => (MovePhase::Switching, 0, String::new()),
            // Said by what comes next.
            Step::Finish | Step::RemoveLearner(_) => return,
        };
        let report = MoveReport { phase, behind, waiting, by: self.parts.me, at: self.parts.clock.wall() };
        let known = said.as_ref().is_some_and(|(last, when)| {
            let same = (last.phase, &last.waiting) == (report.phase, &report.waiting);
            let quiet = last.behind == report.behind || when.elapsed() < REPORT_EVERY;
            same && quiet
        });
        if known {
            return;
        }
        if !slow.is_empty() && said.as_ref().is_none_or(|(last, _)| last.waiting != slow) {
            warn!(topic = %topic.id, why = slow, "new replicas come no closer to the end of the log");
        }
        if let Err(error) = self.parts.catalog.report_move(topic, report.clone()).await {
            debug!(topic = %topic.id, %error, "how far a move is was not noted");
        }
        *said = Some((report, Instant::now()));
    }

    /// Lets better leaders lead, a few at a time.
    async fn balance(&self) {
        let mut better: BTreeMap<TopicId, (NodeId, Instant)> = BTreeMap::new();
        let mut pause = BALANCE_EVERY;
        loop {
            sleep(pause).await;
            let catalog = &self.parts.catalog;
            let facts = catalog.node_facts();
            let mut wanted = BTreeMap::new();
            let settled = |topic: &&Arc<Topic>| topic.reassignment.is_none() && topic.state != TopicState::Deleting;
            for topic in catalog.view().all_topics().iter().filter(settled) {
                let Some(seat) = self.seat(topic.id) else { continue };
                let preferred = facts.preferred_leader(&catalog.facts_of(topic));
                let Some(to) = preferred.filter(|to| *to != self.parts.me) else { continue };
                let seen = seat.seen();
                let fit = seen.outgoing.is_none()
                    && seen.voters.contains(&to)
                    && seen.missing.get(&to).is_some_and(|missing| *missing <= super::step::LAG_MAX)
                    && catalog.is_alive(to);
                if fit {
                    let since = better.get(&topic.id).filter(|(node, _)| *node == to).map(|(_, since)| *since);
                    wanted.insert(topic.id, (to, since.unwrap_or_else(Instant::now)));
                }
            }
            better = wanted;
            let due: Vec<_> = better.iter().filter(|(_, (_, since))| since.elapsed() >= FIT_FOR).collect();
            let mut tried = Vec::new();
            for (topic, (to, _)) in due.into_iter().take(TRANSFERS_MAX) {
                tried.push(*topic);
                let Some(seat) = self.seat(*topic) else { continue };
                match seat.hand_over(*to).await {
                    Ok(()) => info!(%topic, %to, "handed a partition to its preferred leader"),
                    Err(error) => warn!(%topic, %to, error, "a partition was not handed to its preferred leader"),
                }
            }
            pause = if tried.is_empty() { BALANCE_EVERY } else { BALANCE_AGAIN };
            for topic in tried {
                better.remove(&topic);
            }
        }
    }
}

#[cfg(test)]
mod tests;
