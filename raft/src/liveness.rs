//! Which peers live: one ping a peer and heartbeat, for all groups together.
//!
//! ```text
//! unknown ── answer ──> alive ── silence ──> dead ── answer ──> alive
//!                         └── answer of another incarnation: a death and a birth at once
//! ```
//!
//! A peer is alive while a ping and its answer get through, so a link that is cut one way counts as silence on both sides.
//! It is dead after [`MISSED_MAX`] heartbeats without an answer and at least `election_min` of silence: what a follower takes
//! its leader for, but for all groups of the peer together, and also while these sleep. A peer whose answers have lately been slow
//! is given more time, within a bound: one with much to do is not dead, and to elect other leaders for all of its groups would only give the
//! rest as much to do. It is given none where it takes no connection, as when its process has died. A node whose other threads are stuck does
//! not answer.
//!
//! A ping carries the incarnation, which
//! a node raises with each start: a peer that restarted within a heartbeat has died all the same, with whatever it knew only
//! in memory. A peer of the first version answers a plain ping and tells no incarnation. Liveness is a hint that says when to act; no
//! promise rests on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::NodeId;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Timing;
use crate::env::{Lane, Tasks};
use crate::metrics;
use crate::net::{Answer, Broken, NO_GROUP, Peers, Request};

/// Heartbeats without an answer after which a peer may be dead.
const MISSED_MAX: u32 = 3;
/// Pings of one peer that may be unanswered.
const PINGS_MAX: usize = 32;
/// How many times `election_min` a peer may be silent whose answers are slow, and how many a ping is waited for: a slow answer counts.
const SLOW_MAX: u32 = 4;
const ANSWER_MAX: u32 = 8;
/// The incarnation of a peer that answers and does not tell it: it is older, and does not know groups that sleep.
pub(crate) const UNTOLD: u64 = 0;

/// What this node knows of a peer's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLiveness {
    /// The peer.
    pub node: NodeId,
    /// Whether it lives.
    pub state: PeerState,
    /// Shorthand for a state of alive.
    pub alive: bool,
    /// Since when it is what it is now.
    pub since: Instant,
    /// The incarnation that last answered; 0 before the first answer.
    pub incarnation: u64,
}

/// Whether a peer lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// It was not heard of yet, and has not been silent for long.
    Unknown,
    /// It answers.
    Alive,
    /// It does not answer.
    Dead,
}

/// The life of each watched peer. Clones are cheap and share it.
#[derive(Clone)]
pub struct Liveness {
    inner: Arc<Inner>,
}

struct Inner {
    node: NodeId,
    incarnation: u64,
    timing: Timing,
    tasks: Tasks,
    peers: Mutex<BTreeMap<NodeId, Watched>>,
    changes: watch::Sender<u64>,
    /// When this node's other threads were last seen at work, in milliseconds after `origin`.
    pulse: AtomicU64,
    origin: Instant,
}

struct Watched {
    state: PeerState,
    since: Instant,
    incarnation: u64,
    heard: Instant,
    missed: u32,
    /// How long answers have lately taken at most.
    slowest: Duration,
    stop: CancellationToken,
}

/// What came of a ping.
enum Pinged {
    Answered {
        incarnation: u64,
        took: Duration,
    },
    Unanswered,
    /// There is no connection.
    Unreachable,
}

impl fmt::Debug for Liveness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.peers()).finish()
    }
}

impl Liveness {
    pub(crate) fn new(node: NodeId, incarnation: u64, timing: Timing, tasks: Tasks) -> Self {
        let (peers, changes) = (Mutex::default(), watch::Sender::new(0));
        let (pulse, origin) = (AtomicU64::new(0), Instant::now());
        Self { inner: Arc::new(Inner { node, incarnation, timing, tasks, peers, changes, pulse, origin }) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Watched>> {
        self.inner.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `node` answers now. This node itself always does; a node that nobody watches never does.
    pub fn is_alive(&self, node: NodeId) -> bool {
        self.state(node) == PeerState::Alive
    }

    /// Whether `node` lives, as far as this node knows.
    pub fn state(&self, node: NodeId) -> PeerState {
        if node == self.inner.node {
            return PeerState::Alive;
        }
        self.lock().get(&node).map_or(PeerState::Unknown, |watched| watched.state)
    }

    /// The incarnation of `node`, if it lives.
    pub(crate) fn alive_as(&self, node: NodeId) -> Option<u64> {
        let peers = self.lock();
        peers.get(&node).filter(|watched| watched.state == PeerState::Alive).map(|watched| watched.incarnation)
    }

    /// Every watched peer, in the order of their numbers.
    pub fn peers(&self) -> Vec<PeerLiveness> {
        let peers = self.lock();
        peers.iter().map(|(node, watched)| watched.liveness(*node)).collect()
    }

    /// Changes whenever a peer lives, dies, or comes back as another incarnation; the number itself means nothing.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// This node's incarnation.
    pub(crate) fn incarnation(&self) -> u64 {
        self.inner.incarnation
    }

    /// Pings these peers from now on, besides those that are watched already.
    pub(crate) fn watch(&self, net: &Arc<Peers>, peers: impl IntoIterator<Item = NodeId>) {
        for peer in peers {
            if peer == self.inner.node {
                continue;
            }
            let stop = {
                let mut watched = self.lock();
                if watched.contains_key(&peer) {
                    continue;
                }
                let (now, stop) = (Instant::now(), CancellationToken::new());
                watched.insert(peer, Watched::new(now, stop.clone()));
                stop
            };
            let (liveness, net) = (self.clone(), Arc::clone(net));
            self.inner.tasks.for_lane(Lane::Control).spawn("raft-liveness", move |ending| async move {
                tokio::select! {
                    () = ending.cancelled() => {}
                    () = stop.cancelled() => {}
                    () = liveness.ping_for_ever(&net, peer) => {}
                }
            });
        }
    }

    /// Watches these peers and no others.
    pub(crate) fn watch_only(&self, net: &Arc<Peers>, peers: &BTreeSet<NodeId>) {
        let mut gone = false;
        self.lock().retain(|peer, watched| {
            let stays = peers.contains(peer);
            if !stays {
                watched.stop.cancel();
                gone = true;
            }
            stays
        });
        self.watch(net, peers.iter().copied());
        if gone {
            self.changed();
        }
    }

    async fn ping_for_ever(&self, net: &Arc<Peers>, peer: NodeId) {
        let mut beat = interval(self.inner.timing.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pings = FuturesUnordered::new();
        loop {
            tokio::select! {
                _ = beat.tick() => {
                    self.beat(peer);
                    if pings.len() < PINGS_MAX {
                        pings.push(self.ping(net, peer));
                    }
                }
                Some(pinged) = pings.next(), if !pings.is_empty() => match pinged {
                    Pinged::Answered { incarnation, took } => {
                        self.took(peer, took);
                        self.answered(peer, incarnation);
                    }
                    Pinged::Unreachable => self.lost(peer),
                    Pinged::Unanswered => {}
                }
            }
        }
    }

    async fn ping(&self, net: &Arc<Peers>, peer: NodeId) -> Pinged {
        let begin = Instant::now();
        let asking = async {
            let link = net.link(peer, Lane::Control);
            let conn = net.conn(&link).await?;
            let request = Request::Alive { incarnation: self.inner.incarnation };
            let call = match conn.call(NO_GROUP, request).await {
                Err(Broken::Older) => conn.call(NO_GROUP, Request::Ping).await,
                called => called,
            };
            call?.await
        };
        let patience = (self.inner.timing.election_min * ANSWER_MAX).max(Duration::from_secs(1));
        let answered = |incarnation| Pinged::Answered { incarnation, took: begin.elapsed() };
        match timeout(patience, asking).await {
            Ok(Ok(Answer::Alive { incarnation })) => answered(incarnation),
            Ok(Ok(Answer::Pong)) => answered(UNTOLD),
            Ok(Err(Broken::Unreachable(_))) => Pinged::Unreachable,
            // It breaks as well when this node waits in vain: the next connection tells.
            Ok(Ok(_) | Err(Broken::Pipe | Broken::Older)) | Err(_) => Pinged::Unanswered,
        }
    }

    fn took(&self, peer: NodeId, took: Duration) {
        if let Some(watched) = self.lock().get_mut(&peer) {
            watched.took(took);
        }
    }

    fn lost(&self, peer: NodeId) {
        if let Some(watched) = self.lock().get_mut(&peer) {
            watched.lost();
        }
    }

    /// This node's other threads do their work. Called with each heartbeat, by one of them.
    pub(crate) fn pulse(&self) {
        self.inner.pulse.store(self.inner.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether this node should be taken for dead although the thread that asks is well: it answers for a node that does nothing else.
    pub(crate) fn is_stuck(&self) -> bool {
        let pulse = Duration::from_millis(self.inner.pulse.load(Ordering::Relaxed));
        self.inner.origin.elapsed().saturating_sub(pulse) > self.inner.timing.election_min * SLOW_MAX
    }

    /// Another heartbeat has passed.
    fn beat(&self, peer: NodeId) {
        let now = Instant::now();
        let died = {
            let mut peers = self.lock();
            let Some(watched) = peers.get_mut(&peer) else { return };
            watched.beat(now, self.inner.timing.election_min)
        };
        if died {
            warn!(%peer, "a peer is dead: it does not answer");
            metrics::peer_died();
            self.changed();
        }
    }

    /// A peer has answered.
    pub(crate) fn answered(&self, peer: NodeId, incarnation: u64) {
        let now = Instant::now();
        let news = {
            let mut peers = self.lock();
            let Some(watched) = peers.get_mut(&peer) else { return };
            watched.answered(now, incarnation)
        };
        match news {
            News::None => return,
            News::Born => info!(%peer, incarnation, "a peer is alive"),
            News::Reborn { before } => {
                warn!(%peer, incarnation, before, "a peer has restarted");
                metrics::peer_died();
            }
        }
        self.changed();
    }

    /// A peer's own ping tells its incarnation. That it gets through one way makes nobody alive; that it is another one
    /// tells that the old one is dead: incarnations only grow.
    pub(crate) fn pinged(&self, peer: NodeId, incarnation: u64) {
        let reborn = self
            .lock()
            .get(&peer)
            .is_some_and(|watched| watched.state == PeerState::Alive && watched.incarnation < incarnation);
        if reborn {
            self.answered(peer, incarnation);
        }
    }

    fn changed(&self) {
        let alive = self.lock().values().filter(|watched| watched.state == PeerState::Alive).count();
        metrics::peers_alive(alive);
        self.inner.changes.send_modify(|version| *version += 1);
    }
}

enum News {
    None,
    Born,
    Reborn { before: u64 },
}

impl Watched {
    fn new(now: Instant, stop: CancellationToken) -> Self {
        Self {
            state: PeerState::Unknown,
            since: now,
            incarnation: 0,
            heard: now,
            missed: 0,
            slowest: Duration::ZERO,
            stop,
        }
    }

    fn liveness(&self, node: NodeId) -> PeerLiveness {
        let (state, since, incarnation) = (self.state, self.since, self.incarnation);
        PeerLiveness { node, state, alive: state == PeerState::Alive, since, incarnation }
    }

    /// An answer took this long. What was slow once is forgotten within some twenty answers.
    fn took(&mut self, took: Duration) {
        self.slowest = took.max(self.slowest * 7 / 8);
    }

    fn lost(&mut self) {
        self.slowest = Duration::ZERO;
    }

    /// Whether the peer has died by this.
    fn beat(&mut self, now: Instant, silence_min: Duration) -> bool {
        let patience = (self.slowest * 2).clamp(silence_min, silence_min * SLOW_MAX);
        let silent = self.missed >= MISSED_MAX && now.duration_since(self.heard) >= patience;
        self.missed = self.missed.saturating_add(1);
        let died = silent && self.state != PeerState::Dead;
        if died {
            (self.state, self.since) = (PeerState::Dead, now);
        }
        died
    }

    fn answered(&mut self, now: Instant, incarnation: u64) -> News {
        let (state, before) = (self.state, self.incarnation);
        (self.heard, self.missed) = (now, 0);
        let reborn = state == PeerState::Alive && before != incarnation;
        if state == PeerState::Alive && !reborn {
            return News::None;
        }
        (self.state, self.since, self.incarnation) = (PeerState::Alive, now, incarnation);
        if reborn { News::Reborn { before } } else { News::Born }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(600);
    const BEAT: Duration = Duration::from_millis(200);

    fn watched() -> (Watched, Instant) {
        let now = Instant::now();
        (Watched::new(now, CancellationToken::new()), now)
    }

    #[test]
    fn a_peer_that_answers_lives_and_one_that_is_silent_for_long_enough_dies_once() {
        let (mut peer, now) = watched();
        assert_eq!(peer.state, PeerState::Unknown);
        peer.answered(now, 7);
        assert_eq!((peer.state, peer.incarnation), (PeerState::Alive, 7));
        let deaths: Vec<_> = (1..=6).map(|beat| peer.beat(now + BEAT * beat, MIN)).collect();
        assert_eq!(deaths, [false, false, false, true, false, false]);
        assert_eq!((peer.state, peer.since), (PeerState::Dead, now + BEAT * 4));
        peer.answered(now + BEAT * 7, 7);
        assert_eq!((peer.state, peer.since), (PeerState::Alive, now + BEAT * 7));
    }

    #[test]
    fn a_node_that_was_stopped_itself_does_not_take_its_peers_for_dead() {
        let (mut peer, now) = watched();
        peer.answered(now, 7);
        let woken = now + Duration::from_mins(1);
        assert!(!peer.beat(woken, MIN), "the silence was this node's own");
        assert_eq!(peer.state, PeerState::Alive);
    }

    #[test]
    fn a_peer_that_never_answered_is_dead_after_the_same_silence() {
        let (mut peer, now) = watched();
        let died = (1..=4).any(|beat| peer.beat(now + BEAT * beat, MIN));
        assert!(died);
        assert_eq!((peer.state, peer.incarnation), (PeerState::Dead, 0));
    }

    #[test]
    fn beats_alone_kill_nobody_before_an_election_could() {
        let (mut peer, now) = watched();
        let died = (1..=20).any(|beat| peer.beat(now + Duration::from_millis(beat * 10), MIN));
        assert!(!died);
    }

    #[test]
    fn a_peer_that_answers_slowly_is_waited_for_within_a_bound() {
        let died_after = |slow: Duration, lost: bool| {
            let (mut peer, now) = watched();
            peer.took(slow);
            peer.answered(now, 7);
            if lost {
                peer.lost();
            }
            (1..=20).find(|beat| peer.beat(now + BEAT * *beat, MIN)).map(|beat| BEAT * beat)
        };
        assert_eq!(died_after(Duration::from_millis(5), false), Some(BEAT * 4));
        assert_eq!(died_after(Duration::from_millis(700), false), Some(BEAT * 7));
        assert_eq!(died_after(Duration::from_mins(1), false), Some(MIN * SLOW_MAX), "for so long and no longer");
        assert_eq!(died_after(Duration::from_mins(1), true), Some(BEAT * 4), "its process is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_whose_threads_are_stuck_knows() {
        let timing = Timing::LAN;
        let liveness = Liveness::new(NodeId(1), 1, timing, Tasks::new());
        let bound = timing.election_min * SLOW_MAX;
        tokio::time::advance(bound).await;
        assert!(!liveness.is_stuck());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(liveness.is_stuck());
        liveness.pulse();
        assert!(!liveness.is_stuck());
    }

    #[test]
    fn slowness_is_forgotten() {
        let (mut peer, now) = watched();
        peer.took(Duration::from_secs(3));
        for _ in 0..20 {
            peer.took(Duration::from_millis(5));
        }
        peer.answered(now, 7);
        assert!((1..=4).any(|beat| peer.beat(now + BEAT * beat, MIN)));
    }

    #[test]
    fn another_incarnation_is_a_death_and_a_birth() {
        let (mut peer, now) = watched();
        peer.answered(now, 7);
        assert!(matches!(peer.answered(now + BEAT, 7), News::None));
        assert!(matches!(peer.answered(now + BEAT * 2, 8), News::Reborn { before: 7 }));
        assert_eq!((peer.state, peer.since, peer.incarnation), (PeerState::Alive, now + BEAT * 2, 8));
    }
}
