//! Publishers and subscribers at work, and what they see.

pub mod load;
pub mod ours;
pub mod pyensign;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Tells publishers to finish.
#[derive(Debug, Clone, Default)]
pub struct Finish(Arc<AtomicBool>);

impl Finish {
    /// From now on.
    pub fn now(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it is time.
    pub fn is_time(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// When acks came, of however many publishers.
#[derive(Debug, Clone)]
pub struct Pulse(Arc<Mutex<Beats>>);

#[derive(Debug)]
struct Beats {
    begun: Instant,
    last: Option<Instant>,
    gap: Gap,
    acks: u64,
    slowest: Duration,
}

/// The longest time without an ack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Gap {
    /// How long.
    pub length: Duration,
    /// When it ended, from the start of the run.
    pub ended: Duration,
}

impl Default for Pulse {
    fn default() -> Self {
        let beats = Beats { begun: Instant::now(), last: None, gap: Gap::default(), acks: 0, slowest: Duration::ZERO };
        Self(Arc::new(Mutex::new(beats)))
    }
}

impl Pulse {
    fn beats(&self) -> std::sync::MutexGuard<'_, Beats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An ack came for an event that was published at `since`.
    pub fn beat(&self, since: Instant) {
        let mut beats = self.beats();
        let now = Instant::now();
        let length = beats.last.map_or(Duration::ZERO, |last| now - last);
        if length > beats.gap.length {
            beats.gap = Gap { length, ended: now - beats.begun };
        }
        beats.last = Some(now);
        beats.acks += 1;
        beats.slowest = beats.slowest.max(now - since);
    }

    /// How many acks there were.
    pub fn acks(&self) -> u64 {
        self.beats().acks
    }

    /// The longest gap, and the longest that one event waited for its ack, since the start or since this was asked last.
    pub fn take(&self) -> (Gap, Duration) {
        let mut beats = self.beats();
        (std::mem::take(&mut beats.gap), std::mem::take(&mut beats.slowest))
    }
}
