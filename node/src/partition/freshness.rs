//! How old what a replica shows may be.
//!
//! A replica that hears nothing cannot tell a partition that is quiet from one that it is cut off from: a quiet group sends no
//! heartbeats. So freshness rests on one thing only: a round with the leader, and through it with a majority, that began at a
//! known time. It counts on the boot clock, which goes on while the machine is suspended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ensign_raft::env::BootTime;

/// The most that a read which prefers latency may miss: what was committed less than this before it was asked.
pub const STALENESS_MAX: Duration = Duration::from_secs(5);

/// How fresh an answer has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Freshness {
    /// As far as the replica that is asked has applied; it may be cut off.
    #[default]
    Known,
    /// Nothing is missing that was committed more than [`STALENESS_MAX`] ago.
    Bounded,
    /// Nothing is missing that was committed when the question was asked.
    Latest,
}

/// When a replica was last known to hold everything.
#[derive(Debug, Default)]
pub(super) struct Confirmed {
    /// When the newest round began that a majority confirmed: milliseconds of the boot clock, from 1; 0 for never.
    at: AtomicU64,
    /// The confirmation that somebody is already looking to renew.
    renewing: AtomicU64,
}

fn millis(time: BootTime) -> u64 {
    u64::try_from(time.0.as_millis()).unwrap_or(u64::MAX - 1) + 1
}

impl Confirmed {
    /// A round that began at `asked` was confirmed, and everything that it told of is applied.
    pub(super) fn note(&self, asked: BootTime) {
        self.at.fetch_max(millis(asked), Ordering::AcqRel);
    }

    pub(super) fn ever(&self) -> bool {
        self.at.load(Ordering::Acquire) != 0
    }

    pub(super) fn is_within_bound(&self, now: BootTime) -> bool {
        self.age(now).is_some_and(|age| age <= STALENESS_MAX)
    }

    /// Whether the confirmation should be renewed soon. Only one caller is told so about each.
    pub(super) fn begins_to_age(&self, now: BootTime) -> bool {
        let at = self.at.load(Ordering::Acquire);
        self.age(now).is_some_and(|age| age > STALENESS_MAX / 2) && self.renewing.swap(at, Ordering::AcqRel) != at
    }

    fn age(&self, now: BootTime) -> Option<Duration> {
        let at = self.at.load(Ordering::Acquire);
        (at != 0).then(|| Duration::from_millis(millis(now).saturating_sub(at)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> BootTime {
        BootTime(Duration::from_millis(ms))
    }

    #[test]
    fn a_confirmation_counts_from_before_it_was_asked_for_and_ages() {
        let confirmed = Confirmed::default();
        assert!(!confirmed.ever() && !confirmed.is_within_bound(at(0)));
        confirmed.note(at(1_000));
        assert!(confirmed.ever() && confirmed.is_within_bound(at(6_000)));
        assert!(!confirmed.is_within_bound(at(6_001)));
        // A round that began earlier proves less.
        confirmed.note(at(500));
        assert!(confirmed.is_within_bound(at(6_000)));
    }

    #[test]
    fn one_reader_is_asked_to_renew_each_confirmation() {
        let confirmed = Confirmed::default();
        confirmed.note(at(0));
        assert!(!confirmed.begins_to_age(at(2_500)));
        assert!(confirmed.begins_to_age(at(2_501)));
        assert!(!confirmed.begins_to_age(at(2_502)));
        confirmed.note(at(2_600));
        assert!(confirmed.begins_to_age(at(6_000)));
    }
}
