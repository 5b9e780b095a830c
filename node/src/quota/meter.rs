//! What one project does on this node: its open streams, and what it publishes, held against its limits.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ensign_proto::ProjectId;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::debug;

use super::bucket::Bucket;
use super::{ANSWER, Bookkeeper, Exhausted, Inner, Take, Taken, lock, metrics};
use crate::catalog::{Limit, PerResource, Resource};

/// How long events wait for their turn before they are refused.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long nobody asks a leader that did not answer.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest sleep between two questions: an operator may raise a limit meanwhile.
const NAP_MAX: Duration = Duration::from_secs(1);
/// What a refused publisher is told to wait at least.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// A node takes ahead of need what the limit gives in 1/20 s.
const AHEAD: u64 = 20;

/// A project's meter on this node. Clones share it.
#[derive(Clone)]
pub(crate) struct Meter {
    project: ProjectId,
    quotas: Arc<Inner>,
    reading: Arc<Reading>,
}

/// What it shows.
#[derive(Default)]
pub(super) struct Reading {
    streams: AtomicU64,
    /// Let in since the last report.
    events: AtomicU64,
    bytes: AtomicU64,
    /// Whoever holds it asks for all; the others wait in order.
    allowance: Mutex<Allowance>,
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meter").field("project", &self.project).finish_non_exhaustive()
    }
}

/// What this node was given and has not used.
#[derive(Default)]
struct Allowance {
    events: u64,
    bytes: u64,
    /// While the leader cannot be asked: this node's even share.
    apart: Option<Apart>,
}

struct Apart {
    events: Bucket,
    bytes: Bucket,
    ask_again: Instant,
}

impl Allowance {
    fn covers(&self, limits: &PerResource<Limit>, run: Run) -> bool {
        let covers = |limit: Limit, left: u64, amount: u64| limit == Limit::Unlimited || left >= amount;
        covers(limits.events_per_second, self.events, run.events)
            && covers(limits.bytes_per_second, self.bytes, run.bytes)
    }

    fn spend(&mut self, limits: &PerResource<Limit>, run: Run) {
        let after = |limit: Limit, left: u64, spent: u64| match limit {
            // What a limit that is no more has left behind.
            Limit::Unlimited => 0,
            Limit::At(_) => left.saturating_sub(spent),
        };
        self.events = after(limits.events_per_second, self.events, run.events);
        self.bytes = after(limits.bytes_per_second, self.bytes, run.bytes);
    }
}

/// Events that are let in together.
#[derive(Debug, Clone, Copy)]
struct Run {
    events: u64,
    bytes: u64,
}

/// What is asked for: what is missing, and a little ahead.
fn wanted(limit: Limit, left: u64, amount: u64) -> u64 {
    match limit {
        Limit::At(rate) if left < amount => amount - left + (rate / AHEAD).max(1),
        Limit::At(_) | Limit::Unlimited => 0,
    }
}

impl Reading {
    /// Open streams; events and bytes let in since this was asked last.
    pub(super) fn settle(&self) -> (u64, u64, u64) {
        let (events, bytes) = (self.events.swap(0, Ordering::AcqRel), self.bytes.swap(0, Ordering::AcqRel));
        (self.streams.load(Ordering::Acquire), events, bytes)
    }
}

/// A place for a stream, given back when dropped.
pub(crate) struct StreamPlace(Arc<Reading>);

impl fmt::Debug for StreamPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StreamPlace")
    }
}

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Meter {
    pub(super) fn new(project: ProjectId, quotas: Arc<Inner>, reading: Arc<Reading>) -> Self {
        Self { project, quotas, reading }
    }

    /// A place for one more stream.
    ///
    /// # Errors
    /// [`Exhausted::Streams`].
    pub(crate) fn open_stream(&self) -> Result<StreamPlace, Exhausted> {
        let place = StreamPlace(Arc::clone(&self.reading));
        let before = self.reading.streams.fetch_add(1, Ordering::AcqRel);
        match self.quotas.parts.catalog.quota(self.project).streams {
            Limit::At(limit) if before >= limit => {
                metrics::refused(Resource::Streams, 1);
                Err(Exhausted::Streams { limit })
            }
            Limit::At(_) | Limit::Unlimited => Ok(place),
        }
    }

    /// Lets events in: at once, or when it is their turn. Cancel safe; what was let in counts as published.
    ///
    /// # Errors
    /// [`Exhausted::Stored`] at once, [`Exhausted::Rate`] after [`PATIENCE`].
    pub(crate) async fn admit(&self, events: u64, bytes: u64) -> Result<(), Exhausted> {
        let admitted = self.judge(events, bytes).await;
        match &admitted {
            Ok(()) => {
                self.reading.events.fetch_add(events, Ordering::AcqRel);
                self.reading.bytes.fetch_add(bytes, Ordering::AcqRel);
            }
            Err(exhausted) => metrics::refused(exhausted.resource(), events),
        }
        admitted
    }

    async fn judge(&self, events: u64, bytes: u64) -> Result<(), Exhausted> {
        let limits = self.limits();
        if let Limit::At(limit) = limits.stored_bytes {
            let heard = lock(&self.quotas.stored).get(&self.project).copied().unwrap_or_default();
            let stored = heard + self.reading.bytes.load(Ordering::Acquire);
            if stored >= limit {
                return Err(Exhausted::Stored { limit, stored });
            }
        }
        if (limits.events_per_second, limits.bytes_per_second) == (Limit::Unlimited, Limit::Unlimited) {
            return Ok(());
        }
        self.take_turn(Run { events, bytes }).await
    }

    fn limits(&self) -> PerResource<Limit> {
        self.quotas.parts.catalog.quota(self.project)
    }

    async fn take_turn(&self, run: Run) -> Result<(), Exhausted> {
        let begun = Instant::now();
        let deadline = begun + PATIENCE;
        let Ok(mut allowance) = timeout_at(deadline, self.reading.allowance.lock()).await else {
            return Err(exhausted(&self.limits(), None, run, RETRY_MIN));
        };
        let mut waited = begun.elapsed() > Duration::from_millis(1);
        loop {
            // Anew each time: what an operator changes holds for those who wait, too.
            let limits = self.limits();
            if allowance.covers(&limits, run) {
                allowance.spend(&limits, run);
                if waited {
                    metrics::waited(begun.elapsed());
                }
                return Ok(());
            }
            let Err(wait) = self.refill(&mut allowance, &limits, run).await else { continue };
            if Instant::now() + wait > deadline {
                return Err(exhausted(&limits, Some(&allowance), run, wait));
            }
            waited = true;
            sleep(wait.min(NAP_MAX)).await;
        }
    }

    /// Asks for more; an error says how long to wait.
    async fn refill(&self, allowance: &mut Allowance, limits: &PerResource<Limit>, run: Run) -> Result<(), Duration> {
        let take = Take {
            project: self.project,
            events: wanted(limits.events_per_second, allowance.events, run.events),
            bytes: wanted(limits.bytes_per_second, allowance.bytes, run.bytes),
        };
        match self.ask(allowance, take).await {
            Some(Taken::All) => {
                allowance.apart = None;
                allowance.events = allowance.events.saturating_add(take.events);
                allowance.bytes = allowance.bytes.saturating_add(take.bytes);
                Ok(())
            }
            Some(Taken::Wait(wait)) => {
                allowance.apart = None;
                Err(wait)
            }
            Some(Taken::NotLeader) | None => self.refill_apart(allowance, limits, take),
        }
    }

    /// Asks whoever keeps the books; none if nobody answers.
    async fn ask(&self, allowance: &Allowance, take: Take) -> Option<Taken> {
        if allowance.apart.as_ref().is_some_and(|apart| Instant::now() < apart.ask_again) {
            return None;
        }
        match self.quotas.bookkeeper() {
            Bookkeeper::Me(now) => Some(self.quotas.take_here(now, take)),
            Bookkeeper::Other(leader) => match timeout(ANSWER, self.quotas.parts.link.take(leader, take)).await {
                Ok(Ok(taken)) => Some(taken),
                Ok(Err(cause)) => {
                    debug!(%leader, cause, "the catalog's leader was not asked for quota");
                    None
                }
                Err(_) => None,
            },
            Bookkeeper::Nobody => None,
        }
    }

    /// Gives this node its even share of the limit, without asking.
    fn refill_apart(&self, allowance: &mut Allowance, limits: &PerResource<Limit>, take: Take) -> Result<(), Duration> {
        let now = Instant::now();
        let nodes = (self.quotas.parts.catalog.nodes().len() as u64).max(1);
        let fresh = || Apart { events: Bucket::empty(now), bytes: Bucket::empty(now), ask_again: now };
        let apart = allowance.apart.get_or_insert_with(fresh);
        if now >= apart.ask_again {
            apart.ask_again = now + PAUSE;
            metrics::apart();
        }
        let wait = |limit: Limit, bucket: &Bucket, amount: u64| match limit {
            Limit::At(rate) if amount > 0 => bucket.wait(now, rate).unwrap_or(PATIENCE * 2),
            Limit::At(_) | Limit::Unlimited => Duration::ZERO,
        };
        let events = wait(limits.events_per_second, &apart.events, take.events);
        let longest = events.max(wait(limits.bytes_per_second, &apart.bytes, take.bytes));
        if longest > Duration::ZERO {
            return Err(longest);
        }
        // An even share of the rate is the rate at so many times the price.
        if let Limit::At(rate) = limits.events_per_second {
            apart.events.spend(now, rate, take.events.saturating_mul(nodes));
        }
        if let Limit::At(rate) = limits.bytes_per_second {
            apart.bytes.spend(now, rate, take.bytes.saturating_mul(nodes));
        }
        allowance.events = allowance.events.saturating_add(take.events);
        allowance.bytes = allowance.bytes.saturating_add(take.bytes);
        Ok(())
    }
}

/// Which rate it was that did not last, as far as that is known.
fn exhausted(limits: &PerResource<Limit>, allowance: Option<&Allowance>, run: Run, retry_after: Duration) -> Exhausted {
    let bytes = limits.bytes_per_second.at();
    let short_of_events = allowance.is_none_or(|allowance| allowance.events < run.events);
    let events = limits.events_per_second.at().filter(|_| short_of_events || bytes.is_none());
    let (resource, limit) = match (events, bytes) {
        (None, Some(limit)) => (Resource::BytesPerSecond, limit),
        // None at all: they were lifted at this moment.
        (events, _) => (Resource::EventsPerSecond, events.unwrap_or(u64::MAX)),
    };
    Exhausted::Rate { resource, limit, retry_after: retry_after.max(RETRY_MIN) }
}
