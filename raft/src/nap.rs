//! Whether one replica is awake: it beats, and its core may tick, only then. Idle groups sleep, and cost nothing.
//!
//! ```text
//!   start ──> waiting ── a message, or its turn ──> awake ── idle, all agree ──> dozing ──> asleep (leader)
//!                │                                   ^  └────── the leader asks ─────────> asleep (follower)
//!                └── the leader sleeps, logs agree ──┼───────────────────────────────────────────┘ │
//!                                                    └── a message, a proposal, a read, a death ───┘
//! ```
//!
//! A replica sleeps for a reason that somebody keeps checking: its leader's node lives, in the same incarnation, and leads
//! in the same term. The sweeper ([`crate::sweep`]) looks at the first at every heartbeat and asks for the second every few
//! seconds. Whatever else stirs a replica wakes it before it is handed to the core, so sleep changes when elections happen,
//! and never what they decide. Not here: when to sleep, whom to ask, who elects after a death.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::{NodeId, Term};
use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::raft::VoteResponse;
use tokio::time::{Instant, timeout};

use crate::config::RuntimeConfig;
use crate::group::Leadership;
use crate::liveness::Liveness;
use crate::metrics;
use crate::net::{Sleeper, Verdict};
use crate::replica::Replica;
use crate::ticks::{Beat, Ticks};
use crate::types::{LogId, Types, Vote, log_id};

/// One replica's sleep.
pub(crate) struct Nap {
    awake: AtomicBool,
    /// How often something came that a sleeping replica must wake for.
    stirs: AtomicU64,
    /// Milliseconds after `origin` of the last proposal, read or stir.
    active: AtomicU64,
    origin: Instant,
    state: Mutex<NapState>,
    /// This leader slept: it may have to hear from a majority before openraft takes a proposal.
    stale: AtomicBool,
    renewal: tokio::sync::Mutex<()>,
    /// Rounds of heartbeats that somebody waits for.
    hurries: Arc<AtomicU32>,
    pub(crate) beat: Beat,
    /// How often in a row, up to [`PATIENCE_MAX`], this leader was woken so soon that it should not have slept.
    patience: AtomicU32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NapState {
    Awake,
    /// The core has just started and waits to hear from a leader, or for its turn to elect one.
    Waiting {
        until: Instant,
        asks: Asks,
    },
    /// The leader has stopped its ticks and asks its peers whether all may sleep.
    Dozing,
    Asleep(Under),
}

/// Whether the peers shall be asked who leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    Due,
    Done,
}

/// Why a replica sleeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Under {
    pub(crate) leader: NodeId,
    pub(crate) incarnation: u64,
    pub(crate) term: Term,
    /// On the leader: members whose nodes were dead. They may lack entries.
    pub(crate) excluded: BTreeSet<NodeId>,
    /// On a follower: when the leader last confirmed this.
    pub(crate) checked: Instant,
    /// On a follower: a peer sees no leader, so this one is to be asked at once.
    pub(crate) doubted: bool,
}

impl Under {
    /// The sleep of the leader itself.
    pub(crate) fn leading(config: &RuntimeConfig, term: Term, excluded: BTreeSet<NodeId>) -> Self {
        let (leader, incarnation, checked) = (config.node, config.incarnation, Instant::now());
        Self { leader, incarnation, term, excluded, checked, doubted: false }
    }
}

/// What a pre-vote meets.
pub(crate) enum PreVote {
    /// The core shall decide.
    Pass,
    Refuse(VoteResponse<Types>),
}

impl Nap {
    pub(crate) fn new() -> Self {
        Self {
            awake: AtomicBool::new(true),
            stirs: AtomicU64::new(0),
            active: AtomicU64::new(0),
            origin: Instant::now(),
            state: Mutex::new(NapState::Awake),
            stale: AtomicBool::new(false),
            renewal: tokio::sync::Mutex::default(),
            hurries: Arc::default(),
            beat: Beat::new(),
            patience: AtomicU32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, NapState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note_activity(&self) {
        self.active.store(self.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// How long nothing was asked of this replica.
    pub(crate) fn idle(&self) -> Duration {
        let active = Duration::from_millis(self.active.load(Ordering::Relaxed));
        self.origin.elapsed().saturating_sub(active)
    }

    pub(crate) fn state(&self) -> NapState {
        self.lock().clone()
    }

    /// Whether somebody waits for this group's heartbeats.
    pub(crate) fn is_hurried(&self) -> bool {
        self.hurries.load(Ordering::Relaxed) > 0
    }

    /// Until it is dropped, this group's heartbeats do not linger.
    pub(crate) fn hurry(&self) -> Hurry {
        self.hurries.fetch_add(1, Ordering::Relaxed);
        Hurry(Arc::clone(&self.hurries))
    }

    /// A plain load, for the sweep over many groups.
    pub(crate) fn is_awake(&self) -> bool {
        self.awake.load(Ordering::SeqCst)
    }

    fn stirs(&self) -> u64 {
        self.stirs.load(Ordering::SeqCst)
    }
}

/// Somebody waits for heartbeats.
pub(crate) struct Hurry(Arc<AtomicU32>);

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a replica and its core say of themselves, at one moment.
pub(crate) struct Standing {
    pub(crate) vote: Vote,
    pub(crate) last: Option<LogId>,
    pub(crate) applied: Option<LogId>,
}

impl Standing {
    /// Whether `node` leads `term`, as this core knows it.
    pub(crate) fn is_led_by(&self, node: NodeId, term: Term) -> bool {
        self.vote.committed && self.vote.leader_id.voted_for == node.0 && self.vote.leader_id.term == term.0
    }
}

impl Replica {
    pub(crate) fn standing(&self) -> Option<Standing> {
        let metrics = self.raft()?.metrics();
        let vote = metrics.borrow_watched().vote;
        let last = self.log.state().last.map(log_id);
        Some(Standing { vote, last, applied: self.progress().applied })
    }

    /// A core has just started, with its ticks off unless groups never sleep; the sweep has it beat so often.
    pub(crate) fn begin_nap(&self, beats: Option<Duration>) {
        self.end_nap();
        let mut state = self.nap.lock();
        self.nap.beat.begin(beats);
        self.nap.note_activity();
        let sleeps = self.config.quiesce_after.is_some();
        *state = if sleeps {
            NapState::Waiting { until: Instant::now() + self.config.timing.election_max * 2, asks: Asks::Due }
        } else {
            NapState::Awake
        };
        self.nap.awake.store(!sleeps, Ordering::SeqCst);
        self.nap.stale.store(false, Ordering::SeqCst);
    }

    /// The core is gone.
    pub(crate) fn end_nap(&self) {
        let mut state = self.nap.lock();
        if matches!(*state, NapState::Asleep(_)) {
            metrics::woke();
        }
        *state = NapState::Awake;
        self.nap.awake.store(true, Ordering::SeqCst);
    }

    /// Something came that the core must be awake for.
    pub(crate) fn stir(&self) {
        // With `agree`, who stores and then loads: either this sees that the replica sleeps, or it sees this stir.
        self.nap.stirs.fetch_add(1, Ordering::SeqCst);
        if !self.nap.is_awake() {
            self.wake();
        }
    }

    /// Turns the ticks on. What made it sleep is forgotten.
    pub(crate) fn wake(&self) {
        let mut state = self.nap.lock();
        if *state == NapState::Awake {
            return;
        }
        if let NapState::Asleep(under) = &*state {
            metrics::woke();
            if under.leader == self.config.node {
                self.weigh_sleep(under.checked.elapsed());
            }
        }
        self.nap.note_activity();
        *state = NapState::Awake;
        self.nap.awake.store(true, Ordering::SeqCst);
        self.set_ticks(self.ticks_wanted());
    }

    /// How long nothing must be asked of this group before it sleeps.
    pub(crate) fn idle_max(&self) -> Option<Duration> {
        Some(self.config.idle_max()? * (1 << self.nap.patience.load(Ordering::Relaxed)))
    }

    /// A group that is written every few seconds would pay for falling asleep and for waking with each write. Whoever slept for
    /// less than twice as long as it had idled before stays awake for twice as long the next time.
    fn weigh_sleep(&self, slept: Duration) {
        let Some(idled) = self.idle_max() else { return };
        let patience = self.nap.patience.load(Ordering::Relaxed);
        let next = if slept < idled * 2 { (patience + 1).min(PATIENCE_MAX) } else { 0 };
        self.nap.patience.store(next, Ordering::Relaxed);
    }

    /// Gives an awake replica the ticks that it needs.
    pub(crate) fn tend(&self) {
        let state = self.nap.lock();
        if *state == NapState::Awake {
            self.set_ticks(self.ticks_wanted());
        }
    }

    /// Puts off the moment at which a replica that waits wakes by itself.
    pub(crate) fn keep_waiting(&self, until: Instant, asks: Asks) {
        let mut state = self.nap.lock();
        if matches!(*state, NapState::Asleep(_)) {
            metrics::woke();
        }
        if matches!(*state, NapState::Waiting { .. } | NapState::Asleep(_)) {
            *state = NapState::Waiting { until, asks };
        }
    }

    /// The same, but a replica that sleeps goes on sleeping.
    pub(crate) fn keep_waiting_if_lost(&self, until: Instant) {
        let mut state = self.nap.lock();
        if matches!(*state, NapState::Waiting { .. }) {
            *state = NapState::Waiting { until, asks: Asks::Done };
        }
    }

    /// The leader is being asked whether it still leads.
    pub(crate) fn checking(&self) {
        if let NapState::Asleep(under) = &mut *self.nap.lock() {
            (under.checked, under.doubted) = (Instant::now(), false);
        }
    }

    /// The leader stops its ticks for as long as it asks its peers. `false`: it was stirred meanwhile.
    pub(crate) fn doze(&self) -> bool {
        let mut state = self.nap.lock();
        if *state != NapState::Awake {
            return false;
        }
        let before = self.nap.stirs();
        self.nap.awake.store(false, Ordering::SeqCst);
        if self.nap.stirs() != before || self.nap.idle() < self.idle_max().unwrap_or(Duration::MAX) {
            self.nap.awake.store(true, Ordering::SeqCst);
            return false;
        }
        *state = NapState::Dozing;
        self.set_ticks(Ticks::Off);
        true
    }

    /// Everyone agreed. `false`: something stirred the leader while it asked.
    pub(crate) fn sleep_as_leader(&self, under: Under) -> bool {
        let mut state = self.nap.lock();
        let dozes = *state == NapState::Dozing;
        if dozes {
            self.nap.stale.store(true, Ordering::SeqCst);
            *state = NapState::Asleep(under);
            metrics::slept();
        }
        dozes
    }

    /// A follower's answer to a leader that wants its group to sleep. It agrees only while it holds and has applied exactly
    /// what the leader has, in the leader's term, and knows of the leader's node that it lives.
    pub(crate) fn agree(&self, leader: NodeId, asked: &Sleeper, liveness: &Liveness) -> bool {
        let before = self.nap.stirs();
        let Some(incarnation) = liveness.alive_as(leader) else { return false };
        let Some(standing) = self.standing() else { return false };
        let agrees = standing.is_led_by(leader, asked.term)
            && asked.last.is_some()
            && standing.last == asked.last
            && standing.applied == asked.last;
        if !agrees {
            return false;
        }
        self.sleep_as_follower(leader, incarnation, asked.term, before)
    }

    /// Falls asleep unless something stirred this replica since it had been stirred `before` times.
    fn sleep_as_follower(&self, leader: NodeId, incarnation: u64, term: Term, before: u64) -> bool {
        let mut state = self.nap.lock();
        self.nap.awake.store(false, Ordering::SeqCst);
        if self.nap.stirs() != before {
            *state = NapState::Awake;
            self.nap.awake.store(true, Ordering::SeqCst);
            self.set_ticks(self.ticks_wanted());
            return false;
        }
        if !matches!(*state, NapState::Asleep(_)) {
            metrics::slept();
        }
        let (excluded, checked) = (BTreeSet::new(), Instant::now());
        *state = NapState::Asleep(Under { leader, incarnation, term, excluded, checked, doubted: false });
        self.set_ticks(Ticks::Off);
        true
    }

    /// What this replica asks a peer about itself.
    pub(crate) fn sleeper(&self) -> Option<(Sleeper, u64)> {
        let before = self.nap.stirs();
        let standing = self.standing()?;
        Some((Sleeper { group: self.id, term: Term(standing.vote.leader_id.term), last: standing.last }, before))
    }

    /// Whether `node` is no voter by all that it can know: this replica, whose membership does not give it a vote, holds whatever
    /// it holds. It was removed while it was away, and nobody tells it. Where a log is all committed, as it is in a group that
    /// sleeps, a newer membership would be in a log that is longer.
    fn outlived(&self, node: NodeId, holds: Option<&LogId>) -> bool {
        let members = self.membership();
        let last = self.log.state().last.map(log_id);
        !members.voters.is_empty() && !members.contains(node) && holds <= last.as_ref()
    }

    /// The leader's answer to a peer that asks whether it may go on sleeping, or fall asleep, as it is.
    pub(crate) fn confirm(&self, peer: NodeId, asked: &Sleeper) -> Verdict {
        let Some(standing) = self.standing() else { return Verdict::NotLeader };
        let term = Term(standing.vote.leader_id.term);
        if !standing.is_led_by(self.config.node, term) {
            return Verdict::NotLeader;
        }
        if self.outlived(peer, asked.last.as_ref()) {
            return Verdict::Leads;
        }
        {
            let mut state = self.nap.lock();
            if let NapState::Asleep(under) = &mut *state
                && under.term == term
                && asked.term == term
                && asked.last == standing.last
            {
                under.excluded.remove(&peer);
                return Verdict::Sleeps;
            }
        }
        self.stir();
        Verdict::Leads
    }

    /// The leader has confirmed what this replica told it `before` so many stirs.
    pub(crate) fn confirmed(&self, leader: NodeId, asked: &Sleeper, before: u64, liveness: &Liveness) {
        let Some(incarnation) = liveness.alive_as(leader) else { return };
        let holds = self.standing().is_some_and(|now| now.is_led_by(leader, asked.term) && now.applied == asked.last);
        if holds && !self.nap.is_awake() && self.nap.stirs() == before {
            self.sleep_as_follower(leader, incarnation, asked.term, before);
        }
    }

    /// A peer that holds the log up to `holds` would stand for election. While this group sleeps under a leader whose node
    /// lives, nobody else gets a vote from it: a peer that merely lost sight of the leader must not depose it, and one that
    /// was removed asks for ever, and wakes nobody.
    pub(crate) fn pre_vote(&self, candidate: NodeId, holds: Option<&LogId>, liveness: &Liveness) -> PreVote {
        let outlived = self.outlived(candidate, holds);
        let mut state = self.nap.lock();
        let refuses = if let NapState::Asleep(under) = &mut *state {
            let own = under.leader == self.config.node;
            let lives = own || liveness.alive_as(under.leader) == Some(under.incarnation);
            // Somebody doubts this leader, so the next sweep asks it.
            under.doubted |= !outlived;
            // A leader that can reach the candidate wakes, and its heartbeat tells it.
            (under.leader != candidate && lives).then_some(own && !outlived && liveness.is_alive(candidate))
        } else {
            None
        };
        drop(state);
        if let (Some(wakes), Some(standing)) = (refuses, self.standing()) {
            if wakes {
                self.stir();
            }
            PreVote::Refuse(VoteResponse::new(standing.vote, standing.last, false))
        } else {
            self.stir();
            PreVote::Pass
        }
    }

    /// The core has another leader, or another term: what a sleeping replica relied on is over.
    pub(crate) fn observed(&self, now: Leadership) {
        if self.nap.is_awake() {
            return;
        }
        let over = match &*self.nap.lock() {
            NapState::Awake => false,
            NapState::Waiting { .. } => now.leads(self.config.node),
            NapState::Dozing => !now.leads(self.config.node),
            NapState::Asleep(under) => now.leader != Some(under.leader) || now.term != under.term,
        };
        if over {
            self.stir();
        }
    }

    /// Makes a group that this node leads ready for a proposal: wakes it, and renews the lease that ran out in its sleep.
    pub(crate) async fn rouse(&self) {
        self.nap.note_activity();
        self.stir();
        if self.nap.stale.load(Ordering::SeqCst) {
            // Boxed: it is rare, and its future is larger than all the rest of a proposal.
            Box::pin(self.renew_lease()).await;
        }
    }

    async fn renew_lease(&self) {
        let _turn = self.nap.renewal.lock().await;
        if !self.nap.stale.load(Ordering::SeqCst) {
            return;
        }
        if let Some(raft) = self.raft() {
            let _hurry = self.nap.hurry();
            // Without a majority the proposal is refused, with the usual words.
            let _ = timeout(self.config.timing.election_max, self.confirmed_by_majority(&raft)).await;
        }
        self.nap.stale.store(false, Ordering::SeqCst);
    }
}

/// How often a sleeping follower asks its leader whether it still leads.
pub(crate) const CHECK_EVERY: Duration = Duration::from_secs(5);

/// A group that is woken again and again stays awake for up to 2^3 times as long before it sleeps.
const PATIENCE_MAX: u32 = 3;
