//! Who keeps an awake partition going: the sweep, which passes by anyway, and not the core's own ticks.
//!
//! ```text
//!   leads                          the sweep has it send its heartbeats      ticks off
//!   follows, and hears its leader  there is nothing to do                    ticks off
//!   hears nothing, or has no leader                                          ticks on: its core counts down to an election
//! ```
//!
//! A core ticks five times in a heartbeat, and with each tick it tells all of its state anew. A thousand partitions that are awake
//! took a quarter of a core a node in that way. The cluster's own groups beat as fast as the sweep passes, and so do partitions beside
//! nodes of the first version: these tick by themselves.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ensign_proto::{ClusterVersion, GroupId, NodeId};
use tokio::time::Instant;

use crate::config::RuntimeConfig;
use crate::replica::Replica;

/// Whether a core ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ticks {
    On,
    Off,
}

/// When a partition's leader last made itself heard.
pub(crate) struct Beat {
    origin: Instant,
    /// Milliseconds between two heartbeats; 0 for a core that ticks by itself.
    every: AtomicU64,
    /// Milliseconds after `origin`: on a follower, when its leader sent something; on the leader, when it was to send a heartbeat.
    last: AtomicU64,
}

impl Beat {
    pub(crate) fn new() -> Self {
        Self { origin: Instant::now(), every: AtomicU64::new(0), last: AtomicU64::new(0) }
    }

    /// A core has started that is to beat so often, if not by itself.
    pub(crate) fn begin(&self, every: Option<Duration>) {
        self.every.store(every.map_or(0, |every| every.as_millis() as u64), Ordering::Relaxed);
    }

    fn every(&self) -> Option<Duration> {
        let every = self.every.load(Ordering::Relaxed);
        (every > 0).then(|| Duration::from_millis(every))
    }

    fn note(&self) {
        self.last.store(self.origin.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        self.origin.elapsed().saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

/// How often the sweep has a group beat; none for one that ticks by itself.
pub(crate) fn swept(config: &RuntimeConfig, group: GroupId, version: ClusterVersion) -> Option<Duration> {
    let swept = config.quiesce_after.is_some() && group >= GroupId::FIRST_PARTITION && version >= ClusterVersion::V2;
    swept.then(|| config.timing.of(group, version).heartbeat)
}

impl Replica {
    pub(crate) fn set_ticks(&self, ticks: Ticks) {
        if let Some(raft) = self.raft() {
            raft.runtime_config().tick(ticks == Ticks::On);
        }
    }

    /// A peer has sent entries or a heartbeat. A leader of the past that goes on sending does not count.
    pub(crate) fn heard(&self, peer: NodeId) {
        if self.leadership_now().leader == Some(peer) {
            self.nap.beat.note();
        }
    }

    /// What an awake replica needs.
    pub(crate) fn ticks_wanted(&self) -> Ticks {
        let Some(every) = self.nap.beat.every() else { return Ticks::On };
        match self.leadership_now().leader {
            Some(leader) if leader == self.config.node => Ticks::Off,
            Some(_) if self.nap.beat.silence() < every * 3 / 2 => Ticks::Off,
            Some(_) | None => Ticks::On,
        }
    }

    /// Whether this leader is to send a heartbeat now, seen `passes` apart.
    pub(crate) fn is_to_beat(&self, passes: Duration) -> bool {
        let beat = &self.nap.beat;
        let due = beat.every().is_some_and(|every| beat.silence() + passes / 2 >= every);
        if due {
            beat.note();
        }
        due
    }
}
