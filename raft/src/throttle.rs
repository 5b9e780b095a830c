//! A bucket of bytes that everything which must not hurry takes from.
//!
//! Takers are served in the order in which they came. A taker may overdraw: what is larger than the bucket still goes, and
//! those behind it wait for the debt. Not here: who must take (`net::client`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ensign_proto::ByteCount;
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, sleep};

/// What an idle bucket saves up: this long of its rate.
const BURST: Duration = Duration::from_millis(100);
/// Slower than this, rebuilding one replica would take for ever.
const RATE_MIN: u64 = 64 << 10;

pub(crate) struct Throttle {
    /// Bytes a second.
    rate: AtomicU64,
    rate_changed: Notify,
    /// Nanoseconds for which somebody has waited.
    waited: AtomicU64,
    /// Held while waiting, so that the first to come is the first to go.
    bucket: Mutex<Bucket>,
}

struct Bucket {
    /// Negative: a debt.
    bytes: f64,
    filled: Instant,
}

impl Throttle {
    /// Lets so many bytes a second through, 64 KiB at least.
    pub(crate) fn new(rate: ByteCount) -> Self {
        Self {
            rate: AtomicU64::new(rate.0.max(RATE_MIN)),
            rate_changed: Notify::new(),
            waited: AtomicU64::new(0),
            bucket: Mutex::new(Bucket { bytes: 0.0, filled: Instant::now() }),
        }
    }

    /// Also for those who wait already.
    pub(crate) fn set_rate(&self, rate: ByteCount) {
        self.rate.store(rate.0.max(RATE_MIN), Ordering::Relaxed);
        self.rate_changed.notify_one();
    }

    /// For how long, so far, the bucket was empty and somebody waited: close to all of the time where the rate is what is in the way.
    pub(crate) fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited.load(Ordering::Relaxed))
    }

    /// Waits until `bytes` may go. Dropped before it returns, it has taken nothing.
    pub(crate) async fn take(&self, bytes: u64) {
        let mut bucket = self.bucket.lock().await;
        loop {
            let rate = self.rate.load(Ordering::Relaxed) as f64;
            let now = Instant::now();
            let earned = rate * now.duration_since(bucket.filled).as_secs_f64();
            bucket.bytes = (bucket.bytes + earned).min(rate * BURST.as_secs_f64());
            bucket.filled = now;
            if bucket.bytes >= 0.0 {
                bucket.bytes -= bytes as f64;
                return;
            }
            // A millisecond more, lest rounding wake it just too early again and again.
            let wait = Duration::from_secs_f64(-bucket.bytes / rate) + Duration::from_millis(1);
            tokio::select! {
                () = sleep(wait) => {}
                () = self.rate_changed.notified() => {}
            }
            // One waits at a time: the others wait for the bucket.
            self.waited.fetch_add(now.elapsed().as_nanos() as u64, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::future::join_all;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn many_takers_together_keep_to_the_rate() {
        let throttle = Arc::new(Throttle::new(ByteCount(8 * MIB)));
        let begun = Instant::now();
        join_all((0..8).map(|_| async {
            for _ in 0..10 {
                throttle.take(MIB).await;
            }
        }))
        .await;
        // 80 MiB, the last of which goes on credit.
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(9_800) && took <= Duration::from_millis(10_200), "{took:?}");
        assert!(
            throttle.waited() > Duration::from_millis(9_600) && throttle.waited() <= took,
            "{:?}",
            throttle.waited()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_less_than_the_rate_does_not_wait() {
        let throttle = Throttle::new(ByteCount(8 * MIB));
        for _ in 0..10 {
            throttle.take(MIB).await;
            sleep(Duration::from_millis(150)).await;
        }
        assert_eq!(throttle.waited(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_larger_than_the_bucket_goes_and_the_next_one_waits_for_it() {
        let throttle = Throttle::new(ByteCount(MIB));
        let begun = Instant::now();
        throttle.take(4 * MIB).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        throttle.take(1).await;
        assert!(begun.elapsed() >= Duration::from_secs(4), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_rate_holds_for_those_who_wait_already() {
        let throttle = Arc::new(Throttle::new(ByteCount(RATE_MIN)));
        throttle.take(100 * MIB).await;
        let begun = Instant::now();
        tokio::join!(throttle.take(1), async { throttle.set_rate(ByteCount(100 * MIB)) });
        assert!(begun.elapsed() <= Duration::from_millis(1_100), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_waiting_has_taken_nothing() {
        let throttle = Throttle::new(ByteCount(MIB));
        throttle.take(MIB).await;
        let given_up = tokio::time::timeout(Duration::from_millis(10), throttle.take(1000 * MIB)).await;
        assert!(given_up.is_err());
        let begun = Instant::now();
        throttle.take(1).await;
        assert!(begun.elapsed() <= Duration::from_millis(1_100), "{:?}", begun.elapsed());
    }
}
