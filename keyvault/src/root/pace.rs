//! How fast attempts may follow each other: after the first failure a second passes, after each further one twice as much.

use std::time::Duration;

use ensign_raft::env::BootTime;

const FIRST: Duration = Duration::from_secs(1);

/// Counts failures in a row. It keeps no clock; whoever asks says what time it is.
#[derive(Debug)]
pub(crate) struct Pace {
    failures: u32,
    not_before: BootTime,
    pause_max: Duration,
}

impl Pace {
    /// Nothing has failed yet. Never makes anyone wait for longer than `pause_max`.
    pub(crate) fn new(pause_max: Duration) -> Self {
        Self { failures: 0, not_before: BootTime(Duration::ZERO), pause_max }
    }

    /// Whether an attempt may be made now.
    ///
    /// # Errors
    /// How long it has to wait.
    pub(crate) fn permit(&self, now: BootTime) -> Result<(), Duration> {
        let left = self.not_before.0.saturating_sub(now.0);
        if left.is_zero() { Ok(()) } else { Err(left) }
    }

    /// An attempt failed, at `now`.
    pub(crate) fn failed(&mut self, now: BootTime) {
        let pause = FIRST.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(self.pause_max);
        self.failures = self.failures.saturating_add(1);
        self.not_before = BootTime(now.0 + pause);
    }

    /// An attempt succeeded.
    pub(crate) fn succeeded(&mut self) {
        *self = Self::new(self.pause_max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_doubles_the_pause_up_to_a_minute() {
        let mut pace = Pace::new(Duration::from_mins(1));
        let mut now = BootTime(Duration::from_secs(1_000));
        let mut pauses = Vec::new();
        for _ in 0..9 {
            assert_eq!(pace.permit(now), Ok(()));
            pace.failed(now);
            let pause = pace.permit(now).unwrap_err();
            pauses.push(pause.as_secs());
            let almost = BootTime(now.0 + pause.saturating_sub(Duration::from_nanos(1)));
            assert_eq!(pace.permit(almost), Err(Duration::from_nanos(1)));
            now = BootTime(now.0 + pause);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        pace.succeeded();
        pace.failed(now);
        assert_eq!(pace.permit(now), Err(Duration::from_secs(1)));
    }

    #[test]
    fn many_failures_overflow_nothing() {
        let mut pace = Pace::new(Duration::from_mins(1));
        for _ in 0..100 {
            pace.failed(BootTime(Duration::ZERO));
        }
        assert_eq!(pace.permit(BootTime(Duration::ZERO)), Err(Duration::from_mins(1)));
    }
}
