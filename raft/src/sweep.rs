//! Puts idle groups to sleep, keeps an eye on those that sleep, and elects where a leader's node has died: one task for all
//! groups of a node.
//!
//! ```text
//! every heartbeat, and whenever a peer lives or dies:
//!   awake, leads, idle, all live members hold all  ─> doze ─> ask them, many groups in one message ─> asleep, or awake again
//!   awake, leads                                   ─> its heartbeats, when it is time
//!   awake, follows, and its leader is silent       ─> its core's own ticks
//!   awake or asleep, the leader's node has died    ─> its lease is over, and an election, in its turn
//!   awake, and nobody leads                        ─> an election after a while, in its turn
//!   asleep, leads                                  ─> wakes for a member that is back and lags, or without a live majority
//!   asleep, follows                                ─> asks its leader now and then whether it still leads
//!   has just started                               ─> asks the members who leads; nobody: an election, in its turn
//! ```
//!
//! Turns: of a group's live voters each has a rank, another one for each group, so that elections spread over the nodes. The
//! first stands at its next slot, and a node has a slot every [`SLOT`]; the others only turn their ticks on, later. What is
//! looked at is the state, never the event that led to it, so nothing is missed by coming late.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::{GroupId, NodeId, Term};
use futures::future::{BoxFuture, join_all};
use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::raft::TransferLeaderRequest;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use crate::config::RuntimeConfig;
use crate::env::{Lane, Rng, Stop};
use crate::group::Leadership;
use crate::liveness::{PeerState, UNTOLD};
use crate::metrics;
use crate::nap::{Asks, CHECK_EVERY, NapState, Under};
use crate::net::{Answer, Broken, Local, NO_GROUP, Peers, Request, SLEEPERS_MAX, Sleeper, Verdict};
use crate::replica::Replica;
use crate::types::log_id;

/// Between two elections that one node calls.
const SLOT: Duration = Duration::from_millis(5);
/// Groups that start together ask together.
const GATHER: Duration = Duration::from_millis(10);
/// Between a leader's last tick and its question, so that heartbeats on their way wake nobody who has agreed.
const HUSH: Duration = Duration::from_millis(30);
/// How often the first in turn stands, before it leaves that to its ticks.
const ATTEMPTS: u32 = 6;
/// How often the set of watched peers is made anew.
const REWATCH: Duration = Duration::from_secs(2);

/// The task, with its own memory.
pub(crate) struct Sweeper {
    config: RuntimeConfig,
    local: Arc<Local>,
    peers: Arc<Peers>,
    rng: Arc<dyn Rng>,
    /// What is to be done when; the number keeps apart what is due at once.
    agenda: BTreeMap<(Instant, u64), Due>,
    entries: u64,
    next_slot: Instant,
    /// Groups with something on the agenda, and until when they need nothing more.
    cared_for: BTreeMap<GroupId, Instant>,
    /// Groups that have just started, and who has not told them yet whether it leads.
    lost: BTreeMap<GroupId, BTreeSet<NodeId>>,
    /// The incarnation in which the last sweep saw each peer alive.
    lives: BTreeMap<NodeId, u64>,
    /// Who lived at the last sweep.
    seen: Lives,
    rewatch_at: Instant,
}

/// What was planned under a leadership, and is dropped under another.
#[derive(Debug, Clone, Copy)]
struct Due {
    group: GroupId,
    seen: (Term, Option<NodeId>),
    act: Act,
}

#[derive(Debug, Clone, Copy)]
enum Act {
    /// Stand for election.
    Elect { attempt: u32 },
    /// Turn the ticks on.
    Wake,
}

/// A group that its leader would like to sleep.
struct Candidate {
    asked: Sleeper,
    awaited: BTreeSet<NodeId>,
    excluded: BTreeSet<NodeId>,
}

type Asked = Vec<(Sleeper, u64)>;

enum Event {
    /// Of each candidate, whether everyone agrees.
    Heard(Vec<(Candidate, bool)>),
    Checked {
        peer: NodeId,
        asked: Asked,
        verdicts: BTreeMap<GroupId, Verdict>,
    },
    Done,
}

type Lives = BTreeMap<NodeId, (PeerState, u64)>;
type Work = FuturesUnordered<BoxFuture<'static, Event>>;

/// Who lives, at one moment.
struct View {
    me: NodeId,
    peers: Lives,
}

impl View {
    fn state(&self, node: NodeId) -> PeerState {
        if node == self.me {
            return PeerState::Alive;
        }
        self.peers.get(&node).map_or(PeerState::Unknown, |(state, _)| *state)
    }

    fn lives_as(&self, node: NodeId, incarnation: u64) -> bool {
        self.peers.get(&node) == Some(&(PeerState::Alive, incarnation))
    }
}

impl Sweeper {
    pub(crate) fn new(config: RuntimeConfig, local: Arc<Local>, peers: Arc<Peers>, rng: Arc<dyn Rng>) -> Self {
        let now = Instant::now();
        Self {
            config,
            local,
            peers,
            rng,
            agenda: BTreeMap::new(),
            entries: 0,
            next_slot: now,
            cared_for: BTreeMap::new(),
            lost: BTreeMap::new(),
            lives: BTreeMap::new(),
            seen: Lives::new(),
            rewatch_at: now,
        }
    }

    /// Sweeps until it is stopped.
    pub(crate) async fn run(mut self, stop: Stop) {
        let local = Arc::clone(&self.local);
        let mut changes = local.liveness.changes();
        let mut beat = interval(self.config.timing.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut work: Work = FuturesUnordered::new();
        let mut gathered: Option<Instant> = None;
        loop {
            let due = self.agenda.first_key_value().map(|((at, _), _)| *at);
            let next = due.into_iter().chain(gathered).min();
            let alarm = async {
                match next {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(event) = work.next(), if !work.is_empty() => self.happened(event),
                _ = changes.changed() => self.sweep(&work),
                () = local.newcomers.notified() => {
                    gathered.get_or_insert(Instant::now() + GATHER);
                }
                _ = beat.tick() => self.sweep(&work),
                () = alarm => {
                    if gathered.is_some_and(|at| at <= Instant::now()) {
                        gathered = None;
                        self.sweep(&work);
                    }
                    self.act(&work);
                }
            }
        }
    }

    fn view(&self) -> View {
        let peers = self.local.liveness.peers();
        let peers = peers.into_iter().map(|peer| (peer.node, (peer.state, peer.incarnation))).collect();
        View { me: self.config.node, peers }
    }

    /// Looks at every replica once.
    fn sweep(&mut self, work: &Work) {
        self.local.liveness.pulse();
        let now = Instant::now();
        let rewatches = now >= self.rewatch_at;
        if rewatches {
            self.rewatch_at = now + REWATCH;
            self.local.rewatch(&self.peers);
        }
        self.cared_for.retain(|_, until| *until > now);
        let view = self.view();
        // What wakes a leader's sleeping replica follows from who lives: where that is as it was, to look now and then is enough.
        let closely = rewatches || self.seen != view.peers;
        self.seen.clone_from(&view.peers);
        let (reborn, back) = self.news(&view);
        let mut candidates = Vec::new();
        let mut questions: BTreeMap<NodeId, Asked> = BTreeMap::new();
        for replica in self.local.registry.all() {
            if !back.is_empty() {
                self.hurry(&replica, &back, work);
            }
            let lead = replica.leadership_now();
            if replica.nap.is_awake() {
                let leader = lead.leader.filter(|leader| *leader != view.me);
                if lead.leads(view.me) {
                    match candidate(&replica, lead, &view) {
                        Some(candidate) => candidates.push(candidate),
                        None => self.beat(&replica),
                    }
                } else if leader.is_some_and(|it| view.state(it) == PeerState::Dead || reborn.contains(&it)) {
                    self.end_lease(&replica, work);
                    self.care_for(&replica, lead.leader, &view);
                } else if lead.leader.is_none() {
                    self.look_again(&replica, lead, &view);
                }
                replica.tend();
                continue;
            }
            match replica.nap.state() {
                NapState::Awake | NapState::Dozing => {}
                NapState::Waiting { until, asks } => self.wait(&replica, until, asks, &view, &mut questions),
                NapState::Asleep(under) if under.leader == view.me => {
                    if closely {
                        watch_over(&replica, &under, &view);
                    }
                }
                NapState::Asleep(under) => {
                    if !view.lives_as(under.leader, under.incarnation) {
                        if !planted_deep_sleep(&self.config) {
                            self.care_for(&replica, Some(under.leader), &view);
                        }
                    } else if under.doubted || under.checked.elapsed() >= CHECK_EVERY {
                        replica.checking();
                        questions.entry(under.leader).or_default().extend(replica.sleeper());
                    }
                }
            }
        }
        for (peer, asked) in questions {
            self.ask_who_leads(peer, asked, work);
        }
        if !candidates.is_empty() {
            work.push(self.ask_to_sleep(candidates));
        }
    }

    /// Has an awake leader send its heartbeats when it is time; those that entries have made superfluous it leaves out.
    fn beat(&self, replica: &Replica) {
        if replica.is_to_beat(self.config.timing.heartbeat)
            && let Some(raft) = replica.raft()
        {
            // A core whose queue is full has more to do than to beat, and is asked again.
            let _ = raft.trigger().heartbeat().now_or_never();
        }
    }

    /// Peers that live another life than at the last sweep, and peers that live again.
    fn news(&mut self, view: &View) -> (BTreeSet<NodeId>, BTreeSet<NodeId>) {
        let alive = view.peers.iter().filter(|(_, (state, _))| *state == PeerState::Alive);
        let alive: BTreeMap<_, _> = alive.map(|(node, (_, incarnation))| (*node, *incarnation)).collect();
        let before = std::mem::replace(&mut self.lives, alive);
        let reborn = self.lives.iter().filter(|(node, life)| before.get(*node).is_some_and(|old| old != *life));
        let reborn: BTreeSet<_> = reborn.map(|(node, _)| *node).collect();
        let back = self.lives.keys().filter(|node| !before.contains_key(*node) || reborn.contains(*node));
        let back = back.copied().collect();
        (reborn, back)
    }

    /// Replication to a peer that was gone pauses between its attempts; now that it is back it need not.
    fn hurry(&self, replica: &Arc<Replica>, back: &BTreeSet<NodeId>, work: &Work) {
        if !replica.leadership_now().leads(self.config.node) {
            return;
        }
        let last = replica.log.state().last.map(|id| id.index);
        let lags = |node: &&NodeId| replica.matched(**node).is_some_and(|at| Some(at) < last);
        let behind: Vec<u64> = back.iter().filter(lags).map(|node| node.0).collect();
        if let Some(raft) = replica.raft().filter(|_| !behind.is_empty()) {
            work.push(Box::pin(async move {
                let _ = raft.trigger().reset_backoff(behind).await;
                Event::Done
            }));
        }
    }

    /// Asks each peer about all candidates at once.
    fn ask_to_sleep(&self, candidates: Vec<Candidate>) -> BoxFuture<'static, Event> {
        let (peers, patience) = (Arc::clone(&self.peers), self.config.timing.heartbeat);
        Box::pin(async move {
            sleep(HUSH).await;
            let mut questions: BTreeMap<NodeId, Vec<Sleeper>> = BTreeMap::new();
            for candidate in &candidates {
                for peer in &candidate.awaited {
                    questions.entry(*peer).or_default().push(candidate.asked.clone());
                }
            }
            let asking = questions.iter().flat_map(|(peer, asked)| {
                let peers = &peers;
                asked.chunks(SLEEPERS_MAX).map(move |asked| async move {
                    match call(peers, *peer, Request::Sleep(asked.to_vec()), patience).await {
                        Ok(Answer::Asleep(groups)) => groups.into_iter().map(|group| (*peer, group)).collect(),
                        _ => Vec::new(),
                    }
                })
            });
            let agreed: BTreeSet<(NodeId, GroupId)> = join_all(asking).await.into_iter().flatten().collect();
            let heard = candidates.into_iter().map(|candidate| {
                let all = candidate.awaited.iter().all(|peer| agreed.contains(&(*peer, candidate.asked.group)));
                (candidate, all)
            });
            Event::Heard(heard.collect())
        })
    }

    /// Asks a peer whether it leads these groups.
    fn ask_who_leads(&self, peer: NodeId, asked: Asked, work: &Work) {
        for asked in asked.chunks(SLEEPERS_MAX) {
            let (peers, patience, asked) = (Arc::clone(&self.peers), self.config.timing.election_min, asked.to_vec());
            work.push(Box::pin(async move {
                let question = asked.iter().map(|(sleeper, _)| sleeper.clone()).collect();
                let verdicts = match call(&peers, peer, Request::Check(question), patience).await {
                    Ok(Answer::Checked(verdicts)) => verdicts.into_iter().collect(),
                    // It cannot say, and if it leads it does not sleep: its heartbeat is on the way.
                    Err(Broken::Older) => asked.iter().map(|(sleeper, _)| (sleeper.group, Verdict::Leads)).collect(),
                    Ok(_) | Err(Broken::Pipe | Broken::Unreachable(_)) => BTreeMap::new(),
                };
                Event::Checked { peer, asked, verdicts }
            }));
        }
    }

    /// A replica that has just started.
    fn wait(
        &mut self,
        replica: &Arc<Replica>,
        until: Instant,
        asks: Asks,
        view: &View,
        questions: &mut BTreeMap<NodeId, Asked>,
    ) {
        let now = Instant::now();
        let patience = now + self.config.timing.election_max * 2;
        if replica.voters_now().is_empty() {
            // Nobody has let this node in yet; whoever does will send something.
            if now >= until {
                replica.keep_waiting(patience, Asks::Due);
            }
        } else if asks == Asks::Due {
            replica.keep_waiting(patience, Asks::Done);
            let others: BTreeSet<_> = replica.members().into_iter().filter(|member| *member != view.me).collect();
            match replica.sleeper() {
                Some(sleeper) if !others.is_empty() => {
                    for other in &others {
                        questions.entry(*other).or_default().push(sleeper.clone());
                    }
                    self.lost.insert(replica.id, others);
                }
                _ => self.care_for(replica, None, view),
            }
        } else if now >= until {
            replica.wake();
        }
    }

    fn happened(&mut self, event: Event) {
        match event {
            Event::Done => {}
            Event::Heard(heard) => {
                for (candidate, all) in heard {
                    let Some(replica) = self.local.registry.get(candidate.asked.group) else { continue };
                    let under = Under::leading(&self.config, candidate.asked.term, candidate.excluded);
                    if !(all && replica.sleep_as_leader(under)) {
                        replica.wake();
                    }
                }
            }
            Event::Checked { peer, asked, verdicts } => {
                let view = self.view();
                for (sleeper, before) in asked {
                    let Some(replica) = self.local.registry.get(sleeper.group) else { continue };
                    self.heard(&replica, peer, &sleeper, before, verdicts.get(&sleeper.group).copied(), &view);
                }
            }
        }
    }

    fn heard(
        &mut self,
        replica: &Arc<Replica>,
        peer: NodeId,
        asked: &Sleeper,
        before: u64,
        verdict: Option<Verdict>,
        view: &View,
    ) {
        match verdict {
            Some(Verdict::Sleeps) => {
                self.lost.remove(&asked.group);
                replica.confirmed(peer, asked, before, &self.local.liveness);
            }
            Some(Verdict::Leads) => {
                self.lost.remove(&asked.group);
                // Its heartbeat is on the way, and wakes this replica.
                replica.keep_waiting(Instant::now() + self.config.timing.election_max * 2, Asks::Done);
            }
            Some(Verdict::NotLeader) | None => {
                if let Some(left) = self.lost.get_mut(&asked.group) {
                    left.remove(&peer);
                    if left.is_empty() {
                        self.lost.remove(&asked.group);
                        self.care_for(replica, None, view);
                    }
                } else if verdict.is_some() && !replica.nap.is_awake() {
                    self.care_for(replica, Some(peer), view);
                }
            }
        }
    }

    /// Nobody leads this group, or `gone` does no more: plans an election in this node's turn.
    fn care_for(&mut self, replica: &Arc<Replica>, gone: Option<NodeId>, view: &View) {
        if self.cared_for.contains_key(&replica.id) {
            return;
        }
        let voters = replica.voters_now();
        let able = voters.into_iter().filter(|voter| Some(*voter) != gone && view.state(*voter) != PeerState::Dead);
        let able: Vec<NodeId> = able.collect();
        let now = Instant::now();
        let rank = rank(replica.id, &able, view.me);
        let (at, act) = if rank == Some(0) {
            (self.slot(now), Act::Elect { attempt: 0 })
        } else {
            // After the first has had its slot, wherever in its row that is, and the time of an election.
            let queue = self.next_slot.max(now) + SLOT * u32::try_from(self.cared_for.len()).unwrap_or(u32::MAX);
            let turns = u32::try_from(rank.unwrap_or(able.len())).unwrap_or(1);
            (queue + self.config.timing.election_max * 3 / 2 * turns, Act::Wake)
        };
        replica.keep_waiting_if_lost(at + self.config.timing.election_max * 2);
        self.cared_for.insert(replica.id, at + self.config.timing.election_max * 4);
        let lead = replica.leadership_now();
        self.plan(at, Due { group: replica.id, seen: (lead.term, lead.leader), act });
    }

    /// A leader whose node has died is not waited for: what is left of its lease would keep its voters from electing another.
    fn end_lease(&self, replica: &Arc<Replica>, work: &Work) {
        if self.cared_for.contains_key(&replica.id) {
            return;
        }
        let (Some(raft), Some(standing)) = (replica.raft(), replica.standing()) else { return };
        // What openraft does with the leader's own word that it hands over; nobody is named here, so nobody stands because of it.
        let over = TransferLeaderRequest::new(standing.vote, standing.vote.leader_id.voted_for, standing.last);
        work.push(Box::pin(async move {
            let _ = raft.handle_transfer_leader(over).await;
            Event::Done
        }));
    }

    /// Awake, and nobody leads: an election is under way, or came to nothing. Its own timer is slow, so who stood stands again, as
    /// soon as a fast timer would have it; and if nobody stood whose vote is known here, it is the turn of the first.
    fn look_again(&mut self, replica: &Arc<Replica>, lead: Leadership, view: &View) {
        if self.cared_for.contains_key(&replica.id) {
            return;
        }
        let timing = self.config.timing;
        let stood = replica.standing().is_some_and(|now| now.vote.leader_id.voted_for == view.me.0);
        let able: Vec<NodeId> =
            replica.voters_now().into_iter().filter(|voter| view.state(*voter) != PeerState::Dead).collect();
        let patience = match rank(replica.id, &able, view.me) {
            Some(_) if stood => timing.election_min,
            Some(0) => timing.election_max * 2,
            _ => return,
        };
        let spread = timing.election_max.saturating_sub(timing.election_min);
        let at = Instant::now() + patience + spread.mul_f64(self.rng.next_u64() as f64 / u64::MAX as f64);
        self.cared_for.insert(replica.id, at + timing.election_max * 4);
        self.plan(at, Due { group: replica.id, seen: (lead.term, lead.leader), act: Act::Elect { attempt: 0 } });
    }

    fn slot(&mut self, now: Instant) -> Instant {
        let at = self.next_slot.max(now);
        self.next_slot = at + SLOT;
        at + Duration::from_micros(self.rng.next_u64() % SLOT.as_micros() as u64)
    }

    fn plan(&mut self, at: Instant, due: Due) {
        self.entries += 1;
        self.agenda.insert((at, self.entries), due);
    }

    /// Does what is due.
    fn act(&mut self, work: &Work) {
        let now = Instant::now();
        while let Some(entry) = self.agenda.first_entry()
            && entry.key().0 <= now
        {
            let due = entry.remove();
            let Some(replica) = self.local.registry.get(due.group) else { continue };
            let lead = replica.leadership_now();
            if due.seen != (lead.term, lead.leader) {
                self.cared_for.remove(&due.group);
                continue;
            }
            replica.wake();
            let Act::Elect { attempt } = due.act else { continue };
            let Some(raft) = replica.raft() else { continue };
            metrics::election_called();
            // With a pre-vote, so it changes nothing where a leader lives. It is refused while the lease of the old one
            // runs: then again, a little later.
            work.push(Box::pin(async move {
                let _ = raft.trigger().elect(true).await;
                Event::Done
            }));
            if attempt + 1 < ATTEMPTS {
                let pause = self.config.timing.election_min;
                self.plan(now + pause, Due { act: Act::Elect { attempt: attempt + 1 }, ..due });
            }
        }
    }
}

/// This group, if it has been idle and all of its live members hold and have applied everything.
fn candidate(replica: &Arc<Replica>, lead: Leadership, view: &View) -> Option<Candidate> {
    if !lead.ready || replica.nap.idle() < replica.idle_max()? {
        return None;
    }
    let last = replica.log.state().last.map(log_id)?;
    let metrics = replica.raft()?.metrics();
    let metrics = metrics.borrow_watched();
    let members = &metrics.membership_config;
    let settled = members.log_id() == metrics.committed_membership_config.log_id()
        && members.membership().get_joint_config().len() == 1;
    let applied = metrics.last_applied == Some(last) && replica.progress().applied == Some(last);
    let led = metrics.vote.committed && metrics.vote.leader_id.term == lead.term.0;
    if !(settled && applied && led && metrics.last_log_index == Some(last.index)) {
        return None;
    }
    let replication = metrics.replication.as_ref()?;
    let (mut awaited, mut excluded) = (BTreeSet::new(), BTreeSet::new());
    for (node, ()) in members.nodes().filter(|(node, ())| **node != view.me.0) {
        if view.lives_as(NodeId(*node), UNTOLD) {
            return None;
        }
        match view.state(NodeId(*node)) {
            PeerState::Dead => excluded.insert(NodeId(*node)),
            PeerState::Alive if replication.get(node) == Some(&Some(last)) => awaited.insert(NodeId(*node)),
            PeerState::Alive | PeerState::Unknown => return None,
        };
    }
    let voters: BTreeSet<_> = members.voter_ids().map(NodeId).collect();
    if !has_majority(&voters, view) || !replica.doze() {
        return None;
    }
    let asked = Sleeper { group: replica.id, term: lead.term, last: Some(last) };
    Some(Candidate { asked, awaited, excluded })
}

/// A group that sleeps under this node.
fn watch_over(replica: &Arc<Replica>, under: &Under, view: &View) {
    let last = replica.log.state().last.map(|id| id.index);
    let back = under
        .excluded
        .iter()
        .any(|node| view.state(*node) == PeerState::Alive && replica.matched(*node).is_none_or(|at| Some(at) < last));
    // Without a majority this may be the leader of the past, and has to find out as soon as it can.
    if back || !has_majority(&replica.voters_now(), view) {
        replica.wake();
    }
}

fn has_majority(voters: &BTreeSet<NodeId>, view: &View) -> bool {
    let alive = voters.iter().filter(|voter| view.state(**voter) == PeerState::Alive).count();
    alive * 2 > voters.len()
}

/// A node's turn among those that can stand, from 0: another one for each partition, so that leaders spread, and the lowest node first
/// for the groups that every cluster has.
pub(crate) fn rank(group: GroupId, able: &[NodeId], node: NodeId) -> Option<usize> {
    let at = able.iter().position(|voter| *voter == node)?;
    let first = (group.0.saturating_sub(GroupId::FIRST_PARTITION.0) % able.len() as u64) as usize;
    Some((at + able.len() - first) % able.len())
}

async fn call(peers: &Arc<Peers>, peer: NodeId, request: Request, patience: Duration) -> Result<Answer, Broken> {
    let asking = async {
        let link = peers.link(peer, Lane::Control);
        let conn = peers.conn(&link).await?;
        conn.call(NO_GROUP, request).await?.await
    };
    timeout(patience, asking).await.unwrap_or_else(|_elapsed| Err(Broken::Unreachable("no answer in time".to_owned())))
}

#[cfg(not(feature = "planted-bugs"))]
fn planted_deep_sleep(_config: &RuntimeConfig) -> bool {
    false
}

#[cfg(feature = "planted-bugs")]
fn planted_deep_sleep(config: &RuntimeConfig) -> bool {
    config.planted_deep_sleep
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_has_another_first_among_the_survivors() {
        let able = [2, 5, 9].map(NodeId);
        for group in 16..40 {
            let mut ranks: Vec<_> = able.iter().map(|node| rank(GroupId(group), &able, *node)).collect();
            assert_eq!(ranks[((group - 16) % 3) as usize], Some(0), "group {group}: {ranks:?}");
            ranks.sort_unstable();
            assert_eq!(ranks, [Some(0), Some(1), Some(2)]);
        }
        assert_eq!(rank(GroupId(16), &able, NodeId(7)), None, "who is no voter has no turn");
        for group in [GroupId::CATALOG, GroupId::VAULT] {
            assert_eq!(rank(group, &able, NodeId(2)), Some(0));
        }
    }
}
