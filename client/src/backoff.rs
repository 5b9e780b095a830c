//! Waiting between attempts: longer each time, never two clients in step.

use std::time::Duration;

use crate::random::fraction;

/// Delays that double from `first` to `most`, each drawn from the upper half of its range.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
    most: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self { next: first, first, most }
    }

    /// For reaching a node: quick at first, since a leader change takes about a second.
    pub(crate) fn reconnect() -> Self {
        Self::new(Duration::from_millis(25), Duration::from_secs(2))
    }

    /// The delay before the next attempt.
    pub(crate) fn delay(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.most);
        whole / 2 + (whole / 2).mul_f64(fraction())
    }

    /// An attempt worked: start again from the first delay.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_most_and_start_again_after_success() {
        let (first, most) = (Duration::from_millis(10), Duration::from_millis(45));
        let mut backoff = Backoff::new(first, most);
        for whole in [10, 20, 40, 45, 45] {
            let delay = backoff.delay();
            assert!(delay >= Duration::from_millis(whole) / 2 && delay <= Duration::from_millis(whole), "{delay:?}");
        }
        backoff.reset();
        assert!(backoff.delay() <= first);
    }
}
