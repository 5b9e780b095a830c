//! The arithmetic of leases: how long a holder may use its keys, and how long the vault waits before it calls one dead.
//!
//! ```text
//! holder   t0 ──send──────reply──────────── t0 + L        usable(now) ⇔ base ≤ now < expiry, on the holder's boot clock
//! vault            grant ──────────────────────────── W   W = L·(1+ρ)/(1−ρ) + M, on the vault leader's boot clock
//! ```
//!
//! A lease counts from before its request was handed to the transport, so however long the reply travels, it cannot outlive
//! what the vault waits. Both clocks may be off by ρ in either direction, hence ρ on both sides. Not here: timers (they only
//! tidy up; every use asks [`Lease::usable`]).

use std::time::Duration;

use ensign_proto::{LogIndex, SessionId};
use ensign_raft::env::BootTime;
use thiserror::Error;

/// How long leases last and how far clocks are trusted: what a node's settings ask for. What counts is in the vault's state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LeaseConfig {
    /// L: how long a holder may use its keys after it asked. 3 s to 60 s.
    pub length: Duration,
    /// ρ: by how much a clock may run fast or slow. 0.001 to 0.2; the kernel may slew a clock by 10 %.
    pub drift: f64,
    /// M: what the vault waits beyond the arithmetic, for a guest that its host paused. At most 30 s.
    pub margin: Duration,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self { length: Duration::from_secs(10), drift: 0.11, margin: Duration::from_secs(2) }
    }
}

/// Settings under which a revoked key could stay in use, or a failover would outlast every lease.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum InvalidLease {
    /// L is out of bounds.
    #[error("a lease of {0:?} is not between 3 s and 60 s")]
    Length(Duration),
    /// ρ is out of bounds.
    #[error("a clock drift of {0} is not between 0.001 and 0.2")]
    Drift(f64),
    /// M is out of bounds.
    #[error("a margin of {0:?} is above 30 s")]
    Margin(Duration),
    /// The vault's worst election takes longer than a lease can bridge.
    #[error("a lease of {length:?} does not outlast a vault election of up to {election:?}: it takes {needed:?}")]
    Election {
        /// L.
        length: Duration,
        /// Twice the longest election timeout.
        election: Duration,
        /// The shortest L that would do.
        needed: Duration,
    },
}

impl LeaseConfig {
    /// Checks the bounds, and that a lease outlasts the vault's worst election, twice `election_max`.
    ///
    /// # Errors
    /// See [`InvalidLease`]: change the setting it names.
    pub fn check(&self, election_max: Duration) -> Result<(), InvalidLease> {
        if !(Duration::from_secs(3)..=Duration::from_mins(1)).contains(&self.length) {
            return Err(InvalidLease::Length(self.length));
        }
        if !(0.001..=0.2).contains(&self.drift) {
            return Err(InvalidLease::Drift(self.drift));
        }
        if self.margin > Duration::from_secs(30) {
            return Err(InvalidLease::Margin(self.margin));
        }
        let election = election_max * 2;
        if self.length.mul_f64(0.45) <= election {
            let needed = election.mul_f64(1.0 / 0.45);
            return Err(InvalidLease::Election { length: self.length, election, needed });
        }
        Ok(())
    }

    /// W: after this long on the vault leader's clock, no lease that was granted before can still be running.
    ///
    /// A holder stops after at most L/(1−ρ) of true time; the leader's own clock may run fast by ρ.
    pub fn wait(&self) -> Duration {
        self.length.mul_f64((1.0 + self.drift) / (1.0 - self.drift)) + self.margin
    }

    /// How long whoever orders a revoke should wait for its receipt: W, an election of the vault, and the commits. A leader that is
    /// lost near the end of W takes longer still; then the order goes on, and asking again brings the receipt.
    pub fn revoke_patience(&self) -> Duration {
        self.wait() + Duration::from_secs(15)
    }

    /// Between two renewals, before jitter: two may fail before a lease runs out.
    pub(crate) fn renew_every(&self) -> Duration {
        self.length.mul_f64(0.3)
    }

    /// The deadline of one call.
    pub(crate) fn call_deadline(&self) -> Duration {
        self.length.mul_f64(0.2)
    }
}

/// The same as the vault's state keeps it: one for all nodes, whatever their settings say.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct LeaseTerms {
    /// L.
    #[prost(uint64, tag = "1")]
    pub(crate) length_ms: u64,
    /// ρ, in millionths.
    #[prost(uint32, tag = "2")]
    pub(crate) drift_ppm: u32,
    /// M.
    #[prost(uint64, tag = "3")]
    pub(crate) margin_ms: u64,
}

impl LeaseTerms {
    /// The longest that any settings ever allowed: what a vault may have granted that did not write it down.
    pub(crate) const LONGEST: Self = Self { length_ms: 60_000, drift_ppm: 200_000, margin_ms: 30_000 };

    pub(crate) fn of(config: &LeaseConfig) -> Self {
        Self {
            length_ms: config.length.as_millis() as u64,
            // Rounded up: a clock is never trusted further than the settings say.
            drift_ppm: (config.drift * 1e6).ceil() as u32,
            margin_ms: config.margin.as_millis() as u64,
        }
    }

    pub(crate) fn length(&self) -> Duration {
        Duration::from_millis(self.length_ms)
    }

    /// W of these.
    pub(crate) fn wait(&self) -> Duration {
        let (drift, margin) = (f64::from(self.drift_ppm) / 1e6, Duration::from_millis(self.margin_ms));
        LeaseConfig { length: self.length(), drift, margin }.wait()
    }

    /// Whether every build takes them to be within bounds.
    pub(crate) fn are_safe(&self) -> bool {
        (3_000..=60_000).contains(&self.length_ms)
            && (1_000..=200_000).contains(&self.drift_ppm)
            && self.margin_ms <= 30_000
    }
}

/// A holder's side of its lease: what it may still do, and which replies it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    session: SessionId,
    /// Replies from before this index are ignored.
    seen: LogIndex,
    /// Everything up to here was acted on. A surrender tells of one change only: what else the vault did before it, it has yet to say.
    acted: LogIndex,
    /// The highest epoch seen: a vault that was set back answers below it.
    floor: u64,
    base: BootTime,
    expiry: BootTime,
}

/// What a reply says about the lease itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReplyHead {
    pub(crate) session: SessionId,
    pub(crate) index: LogIndex,
    pub(crate) epoch: u64,
}

/// Why a reply is ignored, whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Ignored {
    #[error("it is older than what was seen already")]
    Stale,
    #[error("it comes from a vault that was set back")]
    EpochBelowFloor,
    #[error("it belongs to another session")]
    OtherSession,
}

impl Lease {
    /// No lease yet. `floor` is the highest epoch that this node ever saw.
    pub(crate) fn new(session: SessionId, floor: u64) -> Self {
        Self {
            session,
            seen: LogIndex(0),
            acted: LogIndex(0),
            floor,
            base: BootTime::default(),
            expiry: BootTime::default(),
        }
    }

    /// Whether keys may be used at `now`. A clock behind the last renewal was set back: no.
    pub(crate) fn usable(&self, now: BootTime) -> bool {
        self.base <= now && now < self.expiry
    }

    /// Whether a reply may be acted on. Nothing of a reply that is ignored may have any effect.
    pub(crate) fn accepts(&self, head: &ReplyHead) -> Result<(), Ignored> {
        if head.session != self.session {
            return Err(Ignored::OtherSession);
        }
        if head.index < self.seen {
            return Err(Ignored::Stale);
        }
        if head.epoch < self.floor {
            return Err(Ignored::EpochBelowFloor);
        }
        Ok(())
    }

    /// Acts on an accepted reply to a request that was sent at `t0`, and runs for `length` from then.
    pub(crate) fn renew(&mut self, head: &ReplyHead, t0: BootTime, length: Duration) {
        debug_assert!(self.accepts(head).is_ok());
        self.base = t0;
        self.expiry = self.expiry.max(BootTime(t0.0 + length));
        self.saw(head.index);
        self.acted = self.acted.max(head.index);
        self.floor = self.floor.max(head.epoch);
    }

    /// Never again acts on a reply from before `index`.
    pub(crate) fn saw(&mut self, index: LogIndex) {
        self.seen = self.seen.max(index);
    }

    /// Ends it now.
    pub(crate) fn end(&mut self) {
        self.expiry = self.base;
    }

    /// Since when the vault must tell what it did.
    pub(crate) fn acted(&self) -> LogIndex {
        self.acted
    }

    pub(crate) fn floor(&self) -> u64 {
        self.floor
    }

    pub(crate) fn expiry(&self) -> BootTime {
        self.expiry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const L: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    fn session(byte: u8) -> SessionId {
        SessionId::from_bytes([byte; 16])
    }

    fn head(index: u64, epoch: u64) -> ReplyHead {
        ReplyHead { session: session(1), index: LogIndex(index), epoch }
    }

    #[test]
    fn the_defaults_wait_fourteen_and_a_half_seconds() {
        let config = LeaseConfig::default();
        config.check(Duration::from_millis(900)).unwrap();
        // (W − M)/(1 + ρ) ≥ L/(1 − ρ)
        let w = config.wait().as_secs_f64();
        assert!((w - 14.47).abs() < 0.01, "{w}");
        assert!((w - 2.0) / 1.11 >= 10.0 / 0.89 - 1e-6);
    }

    #[test]
    fn a_revoke_is_waited_for_longer_than_the_vault_waits_under_any_lease() {
        for seconds in [3, 10, 16, 60] {
            let config = LeaseConfig { length: Duration::from_secs(seconds), ..LeaseConfig::default() };
            assert!(config.revoke_patience() >= config.wait() + Duration::from_secs(10), "{config:?}");
        }
    }

    #[test]
    fn settings_out_of_bounds_are_refused() {
        let good = LeaseConfig::default();
        let lan = Duration::from_millis(900);
        let refused = |config: LeaseConfig| config.check(lan).unwrap_err();
        let millis = Duration::from_millis;
        assert_eq!(refused(LeaseConfig { length: millis(2_999), ..good }), InvalidLease::Length(millis(2_999)));
        assert_eq!(refused(LeaseConfig { length: millis(60_001), ..good }), InvalidLease::Length(millis(60_001)));
        assert_eq!(refused(LeaseConfig { drift: 0.0, ..good }), InvalidLease::Drift(0.0));
        assert_eq!(refused(LeaseConfig { drift: 0.21, ..good }), InvalidLease::Drift(0.21));
        assert!(matches!(refused(LeaseConfig { drift: f64::NAN, ..good }), InvalidLease::Drift(_)));
        assert_eq!(refused(LeaseConfig { margin: millis(30_001), ..good }), InvalidLease::Margin(millis(30_001)));
        // Across regions an election takes up to 10 s, so a lease takes 23.
        let wan = Duration::from_secs(5);
        assert!(matches!(good.check(wan), Err(InvalidLease::Election { .. })));
        LeaseConfig { length: Duration::from_secs(23), ..good }.check(wan).unwrap();
    }

    #[test]
    fn a_lease_counts_from_before_the_request_was_sent() {
        let mut lease = Lease::new(session(1), 0);
        assert!(!lease.usable(at(0)), "without a grant nothing is usable");
        // Sent at 100; the reply took its time, which changes nothing.
        lease.renew(&head(5, 1), at(100), L);
        assert!(lease.usable(at(100)));
        assert!(lease.usable(BootTime(Duration::from_nanos(109_999_999_999))));
        assert!(!lease.usable(at(110)), "equality is expired");
    }

    #[test]
    fn a_clock_behind_the_last_renewal_is_expired() {
        let mut lease = Lease::new(session(1), 0);
        lease.renew(&head(5, 1), at(100), L);
        assert!(!lease.usable(at(99)));
    }

    #[test]
    fn an_old_reply_never_shortens_a_lease() {
        let mut lease = Lease::new(session(1), 0);
        lease.renew(&head(5, 1), at(100), L);
        lease.renew(&head(5, 1), at(95), L);
        assert_eq!(lease.expiry(), at(110));
    }

    #[test]
    fn a_reply_from_before_what_was_seen_is_ignored() {
        let mut lease = Lease::new(session(1), 0);
        lease.saw(LogIndex(7));
        assert_eq!(lease.accepts(&head(6, 0)), Err(Ignored::Stale));
        assert_eq!(lease.accepts(&head(7, 0)), Ok(()));
        lease.saw(LogIndex(3));
        assert_eq!(lease.accepts(&head(6, 0)), Err(Ignored::Stale));
    }

    #[test]
    fn a_surrender_leaves_what_came_before_it_to_be_told() {
        let mut lease = Lease::new(session(1), 0);
        lease.renew(&head(5, 1), at(100), L);
        lease.saw(LogIndex(14));
        assert_eq!(lease.acted(), LogIndex(5));
        lease.renew(&head(20, 1), at(103), L);
        assert_eq!(lease.acted(), LogIndex(20));
    }

    #[test]
    fn a_reply_of_a_vault_that_was_set_back_is_ignored() {
        let mut lease = Lease::new(session(1), 9);
        assert_eq!(lease.accepts(&head(100, 8)), Err(Ignored::EpochBelowFloor));
        lease.renew(&head(100, 12), at(1), L);
        assert_eq!(lease.accepts(&head(101, 11)), Err(Ignored::EpochBelowFloor));
        assert_eq!(lease.floor(), 12);
    }

    #[test]
    fn a_reply_to_another_session_is_ignored() {
        let lease = Lease::new(session(2), 0);
        assert_eq!(lease.accepts(&head(1, 1)), Err(Ignored::OtherSession));
    }

    #[test]
    fn an_ended_lease_is_not_usable() {
        let mut lease = Lease::new(session(1), 0);
        lease.renew(&head(5, 1), at(100), L);
        lease.end();
        assert!(!lease.usable(at(100)) && !lease.usable(at(105)));
    }
}
