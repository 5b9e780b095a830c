//! A bucket of tokens that fills at a rate, without keeping tokens: it remembers when it would be full again.

use std::time::Duration;

use tokio::time::Instant;

/// How much a bucket holds: what its rate gives in this time.
pub(super) const BURST: Duration = Duration::from_secs(1);

/// Tokens at some rate. What is taken may exceed what there is, once, and is paid back before there is any again: so whatever is
/// asked for at once is given sooner or later, and in any time T no more than `rate · (T + BURST)` and one taking are given.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bucket {
    full_at: Instant,
}

impl Bucket {
    /// A bucket that is empty at `now`.
    pub(super) fn empty(now: Instant) -> Self {
        Self { full_at: now + BURST }
    }

    /// Whether nothing would change if it were new and old.
    pub(super) fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }

    /// How long until there is something in it; zero if there is. None: never.
    pub(super) fn wait(&self, now: Instant, rate: u64) -> Option<Duration> {
        if rate == 0 {
            return None;
        }
        let Some(short) = (self.full_at + Duration::from_nanos(1)).checked_duration_since(now + BURST) else {
            return Some(Duration::ZERO);
        };
        Some(short)
    }

    /// Takes, whether there is so much or not.
    pub(super) fn spend(&mut self, now: Instant, rate: u64, amount: u64) {
        self.full_at = self.full_at.max(now) + lasts(amount, rate);
    }
}

/// How long a rate takes to give an amount: at most an hour, which is longer than anybody waits.
fn lasts(amount: u64, rate: u64) -> Duration {
    let nanos = u128::from(amount) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(Duration::from_hours(1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_bucket_gives_nothing_and_an_idle_one_gives_a_burst() {
        let begin = Instant::now();
        let bucket = Bucket::empty(begin);
        assert!(bucket.wait(begin, 10).unwrap() > Duration::ZERO);
        assert_eq!(bucket.wait(begin + Duration::from_millis(1), 10), Some(Duration::ZERO));
        assert_eq!(bucket.wait(begin, 0), None, "a rate of nothing never gives");
        let mut idle = bucket;
        let later = begin + Duration::from_hours(5);
        // A hundred at ten a second: ten seconds, of which one was saved up.
        idle.spend(later, 10, 100);
        let wait = idle.wait(later, 10).unwrap();
        assert!(wait > Duration::from_secs(9) && wait <= Duration::from_secs(9) + Duration::from_nanos(1), "{wait:?}");
    }

    proptest! {
        /// Whoever takes whenever there is something gets no more than promised in any time, and loses nothing either.
        #[test]
        fn in_any_time_no_more_is_given_than_promised(
            rate in 1..10_000_u64,
            steps in proptest::collection::vec((0..400_u64, 1..500_u64), 1..100),
        ) {
            let begin = Instant::now();
            let (mut bucket, mut now) = (Bucket::empty(begin), begin);
            let mut given: Vec<(Instant, u64)> = Vec::new();
            for (millis, amount) in steps {
                now += Duration::from_millis(millis);
                if bucket.wait(now, rate) == Some(Duration::ZERO) {
                    bucket.spend(now, rate, amount);
                    given.push((now, amount));
                }
            }
            for (at, (from, _)) in given.iter().enumerate() {
                for upto in at..given.len() {
                    let time = given[upto].0 - *from + BURST;
                    let before_last: u64 = given[at..upto].iter().map(|(_, amount)| amount).sum();
                    // One that it was given beyond what there was is the last.
                    prop_assert!(u128::from(before_last) * 1_000_000_000 <= u128::from(rate) * (time.as_nanos() + 1_000));
                }
            }
        }
    }
}
