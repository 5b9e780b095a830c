//! How long ago this node was sure to know what the cluster knows.
//!
//! A view trails the cluster, and a node that is cut off from the catalog's leader trails it for ever, without noticing: a revoked
//! API key would go on being good there. So a node vouches for what its view says (that a key is *not* revoked) only for as long
//! as a lease from the last time a majority confirmed that the view was complete. Like a lease it counts on the boot clock,
//! from before the question was sent, and equality is too late.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ensign_raft::env::{BootTime, Clock};
use tokio::sync::watch;
use tracing::{info, warn};

pub(super) struct Freshness {
    clock: Arc<dyn Clock>,
    lasts: Duration,
    /// Boot time of the last confirmation, in nanoseconds and one more; 0 for none.
    confirmed_ns: AtomicU64,
    /// What streams watch. Trails the truth by one look; every verification asks the clock.
    fresh: watch::Sender<bool>,
}

impl Freshness {
    /// Nothing is confirmed yet.
    pub(super) fn new(clock: Arc<dyn Clock>, lasts: Duration) -> Self {
        Self { clock, lasts, confirmed_ns: AtomicU64::new(0), fresh: watch::Sender::new(false) }
    }

    pub(super) fn now(&self) -> BootTime {
        self.clock.boot()
    }

    /// How long a confirmation lasts.
    pub(super) fn lasts(&self) -> Duration {
        self.lasts
    }

    /// The view held all that was committed at `asked`.
    pub(super) fn confirmed(&self, asked: BootTime) {
        self.confirmed_ns.fetch_max(asked.0.as_nanos() as u64 + 1, Ordering::SeqCst);
        self.look();
    }

    /// Whether the view may be vouched for. A clock behind the last confirmation was set back: no.
    pub(super) fn is_fresh(&self) -> bool {
        let Some(confirmed) = self.confirmed_ns.load(Ordering::SeqCst).checked_sub(1) else { return false };
        let (since, now) = (Duration::from_nanos(confirmed), self.now().0);
        since <= now && now < since + self.lasts
    }

    /// Tells whoever watches.
    pub(super) fn look(&self) {
        let fresh = self.is_fresh();
        let changed = self.fresh.send_if_modified(|known| std::mem::replace(known, fresh) != fresh);
        if changed && fresh {
            info!("this node is in touch with the catalog's leader");
        } else if changed {
            warn!(
                within = ?self.lasts,
                "the catalog's leader did not confirm what this node knows: clients are refused until it does"
            );
        }
    }

    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.confirmed_ns.store(0, Ordering::SeqCst);
        self.look();
    }

    pub(super) fn watch(&self) -> watch::Receiver<bool> {
        self.fresh.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use ensign_raft::env::UnixNanos;

    use super::*;

    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn boot(&self) -> BootTime {
            BootTime(Duration::from_secs(self.0.load(Ordering::SeqCst)))
        }

        fn wall(&self) -> UnixNanos {
            UnixNanos(0)
        }
    }

    #[test]
    fn a_confirmation_lasts_from_when_it_was_asked_for_and_no_longer() {
        let clock = Arc::new(Hand::default());
        let set = |seconds| clock.0.store(seconds, Ordering::SeqCst);
        let freshness = Freshness::new(Arc::clone(&clock) as _, Duration::from_secs(10));
        set(100);
        assert!(!freshness.is_fresh(), "nothing was confirmed");
        // The answer took four seconds.
        set(104);
        freshness.confirmed(BootTime(Duration::from_secs(100)));
        assert!(freshness.is_fresh() && *freshness.watch().borrow());
        set(109);
        assert!(freshness.is_fresh());
        set(110);
        assert!(!freshness.is_fresh(), "equality is too late");
        freshness.look();
        assert!(!*freshness.watch().borrow());
        // An answer that was overtaken takes nothing back.
        freshness.confirmed(BootTime(Duration::from_secs(108)));
        freshness.confirmed(BootTime(Duration::from_secs(101)));
        assert!(freshness.is_fresh());
        set(107);
        assert!(!freshness.is_fresh(), "the clock was set back");
    }
}
