//! Quotas: how much of a cluster a project may use, and what happens at the limit.
//!
//! ```text
//! publish stream ─ Meter::admit ─┬─ what this node was given ─▶ admitted
//!                                └─ Take ─▶ leader of the catalog: one bucket a project ─▶ given, or "in so long"
//! every node, every 2 s ─ Report: stored bytes that it leads, streams, rates ─▶ leader: totals ─▶ back, and to `quota show`
//! ```
//! Limits are catalog records ([`crate::catalog::Quota`]). Topics are judged there, where they are made. Streams are counted on each
//! node. Rates have one bucket a project, with the node that leads the catalog; the others take from it ahead of need, a
//! twentieth of a second at a time. A node that cannot reach the leader lets in its even share, so that neither
//! publishing nor its limit depends on the catalog. Stored bytes are added up by the leader from what the partitions count.
//! The bounds that follow: docs/limits.md; why: docs/adr/0025-quotas.md.
//! Not here: what a refusal is called on the wire (`status`), memory (`partition::room`).

mod books;
mod bucket;
mod meter;
pub mod metrics;
mod peers;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ensign_proto::{NodeId, ProjectId};
use ensign_raft::Leadership;
use ensign_raft::env::Stop;
use futures::future::BoxFuture;
use thiserror::Error;
use tokio::time::{Instant, timeout};
use tracing::debug;

use crate::catalog::{Catalog, Resource};
use books::Books;
use meter::Reading;
pub(crate) use meter::{Meter, StreamPlace};
pub use peers::{PeerQuota, QuotaService};

/// How often nodes report what their projects use.
pub const REPORT_EVERY: Duration = Duration::from_secs(2);
/// How long the leader may take to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// Why something is refused for want of quota. Nothing was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Exhausted {
    /// The project publishes faster than it may, and waiting did not help.
    #[error("the project may publish {limit} {} a second and publishes more: slow down, or ask an operator to raise the quota (ensign quota set --{})", unit(*.resource), .resource.as_str())]
    Rate {
        /// Events or bytes.
        resource: Resource,
        /// How many a second.
        limit: u64,
        /// When there is likely to be some again.
        retry_after: Duration,
    },
    /// The project stores as much as it may.
    #[error(
        "the project stores {stored} bytes and may store {limit}: destroy topics that are no longer needed, or ask an operator to raise the quota (ensign quota set --stored-bytes); reading goes on"
    )]
    Stored {
        /// How many bytes it may.
        limit: u64,
        /// How many it does.
        stored: u64,
    },
    /// The project has as many streams open on this node as it may.
    #[error(
        "the project has its limit of {limit} streams open on this node: close some, use fewer streams for more topics, or ask an operator to raise the quota (ensign quota set --streams)"
    )]
    Streams {
        /// How many.
        limit: u64,
    },
}

fn unit(resource: Resource) -> &'static str {
    if resource == Resource::BytesPerSecond { "bytes" } else { "events" }
}

impl Exhausted {
    /// What has run out.
    pub fn resource(&self) -> Resource {
        match self {
            Self::Rate { resource, .. } => *resource,
            Self::Stored { .. } => Resource::StoredBytes,
            Self::Streams { .. } => Resource::Streams,
        }
    }

    /// After how long another try may work; none where somebody has to do something first.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Rate { retry_after, .. } => Some(*retry_after),
            Self::Stored { .. } => None,
            Self::Streams { .. } => Some(Duration::from_secs(1)),
        }
    }
}

/// What a node asks of what a project may publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Take {
    /// Whose.
    pub project: ProjectId,
    /// How many events.
    pub events: u64,
    /// How many bytes.
    pub bytes: u64,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// All of it.
    All,
    /// Nothing now; there is some again after so long.
    Wait(Duration),
    /// Nothing: whoever was asked does not keep the books.
    NotLeader,
}

/// What a project uses on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Use {
    /// Bytes of events in partitions that the node leads.
    pub stored_bytes: u64,
    /// Open streams.
    pub streams: u64,
    /// Published lately, a second.
    pub events_per_second: u64,
    /// Published lately, a second.
    pub bytes_per_second: u64,
}

/// What a project uses on all nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Total {
    /// The sum.
    pub sum: Use,
    /// Streams on the node that has most of them.
    pub streams_of_busiest_node: u64,
}

/// What came back for a report.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reported {
    /// Whether the leader has heard from everybody.
    pub complete: bool,
    /// What is stored, of projects for which that is limited.
    pub stored: Vec<(ProjectId, u64)>,
}

/// Reaches the node that keeps the books. An error says in words for the log why it was not reached.
pub trait QuotaLink: Send + Sync + 'static {
    /// Takes.
    fn take(&self, leader: NodeId, take: Take) -> BoxFuture<'static, Result<Taken, String>>;
    /// Reports; none if the callee does not lead.
    fn report(
        &self,
        leader: NodeId,
        uses: Vec<(ProjectId, Use)>,
    ) -> BoxFuture<'static, Result<Option<Reported>, String>>;
    /// Asks for totals, in the order of the projects; none if the callee does not lead or has not heard from everybody.
    fn usage(&self, leader: NodeId, projects: Vec<ProjectId>)
    -> BoxFuture<'static, Result<Option<Vec<Total>>, String>>;
}

/// What a node's partitions store, by project; only those that it leads.
pub type StoredHere = Arc<dyn Fn() -> HashMap<ProjectId, u64> + Send + Sync>;

/// What quotas are made of.
pub struct QuotaParts {
    /// This node.
    pub me: NodeId,
    /// Says what the limits are, and who keeps the books.
    pub catalog: Catalog,
    /// The way to whoever does.
    pub link: Arc<dyn QuotaLink>,
    /// What is stored here.
    pub stored: StoredHere,
}

/// The quotas of this node's projects. Clones share them.
#[derive(Clone)]
pub struct Quotas(Arc<Inner>);

struct Inner {
    parts: QuotaParts,
    books: Mutex<Books>,
    meters: Mutex<HashMap<ProjectId, Arc<Reading>>>,
    /// What limited projects store in the whole cluster, as last heard.
    stored: Mutex<HashMap<ProjectId, u64>>,
}

impl fmt::Debug for Quotas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Quotas").field("node", &self.0.parts.me).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Every section below leaves what it changes whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Quotas {
    /// Quotas of a node.
    pub fn new(parts: QuotaParts) -> Self {
        Self(Arc::new(Inner { parts, books: Mutex::default(), meters: Mutex::default(), stored: Mutex::default() }))
    }

    /// The meter of a project on this node.
    pub(crate) fn meter(&self, project: ProjectId) -> Meter {
        let reading = Arc::clone(lock(&self.0.meters).entry(project).or_default());
        Meter::new(project, Arc::clone(&self.0), reading)
    }

    /// What projects use in the whole cluster, in their order; none while that is not known.
    pub async fn usage(&self, projects: Vec<ProjectId>) -> Option<Vec<Total>> {
        match self.0.bookkeeper() {
            Bookkeeper::Me(now) => lock(&self.0.books).usage(now, Instant::now(), &projects),
            Bookkeeper::Other(leader) => {
                let asked = timeout(ANSWER, self.0.parts.link.usage(leader, projects)).await;
                asked.ok().and_then(Result::ok).flatten()
            }
            Bookkeeper::Nobody => None,
        }
    }

    /// Reports what is used here, until `stop`. One task a node.
    pub async fn keep_reported(self, stop: Stop) {
        let mut last = Instant::now();
        while stop.run_until_cancelled(tokio::time::sleep(REPORT_EVERY)).await.is_some() {
            let since = last.elapsed();
            last = Instant::now();
            let Some(()) = stop.run_until_cancelled(self.report(since)).await else { return };
        }
    }

    async fn report(&self, since: Duration) {
        let uses = self.0.uses(since);
        let reported = match self.0.bookkeeper() {
            Bookkeeper::Me(now) => Some(self.0.note(now, self.0.parts.me, uses)),
            Bookkeeper::Other(leader) => match timeout(ANSWER, self.0.parts.link.report(leader, uses)).await {
                Ok(Ok(reported)) => reported,
                Ok(Err(cause)) => {
                    debug!(%leader, cause, "what projects use was not reported");
                    None
                }
                Err(_) => None,
            },
            Bookkeeper::Nobody => None,
        };
        if let Some(reported) = reported {
            self.0.heard(reported);
        }
    }

    /// Serves a node that takes.
    pub(crate) fn serve_take(&self, take: Take) -> Taken {
        match self.0.bookkeeper() {
            Bookkeeper::Me(now) => self.0.take_here(now, take),
            Bookkeeper::Other(_) | Bookkeeper::Nobody => Taken::NotLeader,
        }
    }

    /// Serves a node that reports.
    pub(crate) fn serve_report(&self, from: NodeId, uses: Vec<(ProjectId, Use)>) -> Option<Reported> {
        match self.0.bookkeeper() {
            Bookkeeper::Me(now) => Some(self.0.note(now, from, uses)),
            Bookkeeper::Other(_) | Bookkeeper::Nobody => None,
        }
    }

    /// Serves a node that asks what projects use.
    pub(crate) fn serve_usage(&self, projects: &[ProjectId]) -> Option<Vec<Total>> {
        match self.0.bookkeeper() {
            Bookkeeper::Me(now) => lock(&self.0.books).usage(now, Instant::now(), projects),
            Bookkeeper::Other(_) | Bookkeeper::Nobody => None,
        }
    }
}

/// Who keeps the books now.
enum Bookkeeper {
    Me(Leadership),
    Other(NodeId),
    Nobody,
}

impl Inner {
    fn bookkeeper(&self) -> Bookkeeper {
        let now = self.parts.catalog.leadership();
        match now.leader {
            Some(leader) if leader == self.parts.me => {
                if now.ready {
                    Bookkeeper::Me(now)
                } else {
                    Bookkeeper::Nobody
                }
            }
            Some(leader) => Bookkeeper::Other(leader),
            None => Bookkeeper::Nobody,
        }
    }

    fn take_here(&self, now: Leadership, take: Take) -> Taken {
        let limits = self.parts.catalog.quota(take.project);
        lock(&self.books).take(now, Instant::now(), &limits, take)
    }

    fn note(&self, now: Leadership, from: NodeId, uses: Vec<(ProjectId, Use)>) -> Reported {
        let catalog = self.parts.catalog.view();
        let limited = |project: ProjectId| catalog.quota(project).stored_bytes.at().is_some();
        lock(&self.books).report(now, Instant::now(), from, uses, limited)
    }

    fn heard(&self, reported: Reported) {
        let mut stored = lock(&self.stored);
        if reported.complete {
            *stored = reported.stored.into_iter().collect();
            return;
        }
        // A leader that has not heard from everybody knows too little, never too much.
        for (project, bytes) in reported.stored {
            let known = stored.entry(project).or_default();
            *known = bytes.max(*known);
        }
    }

    /// What is used here, and what was published in the time that has passed. Meters that nobody uses are dropped.
    fn uses(&self, since: Duration) -> Vec<(ProjectId, Use)> {
        let mut uses: HashMap<ProjectId, Use> = HashMap::new();
        for (project, stored_bytes) in (self.parts.stored)() {
            uses.entry(project).or_default().stored_bytes = stored_bytes;
        }
        let mut meters = lock(&self.meters);
        meters.retain(|project, meter| {
            let (streams, events, bytes) = meter.settle();
            let mine = uses.entry(*project).or_default();
            mine.streams = streams;
            mine.events_per_second = per_second(events, since);
            mine.bytes_per_second = per_second(bytes, since);
            // New ones are only made under this lock.
            Arc::strong_count(meter) > 1 || events > 0
        });
        uses.into_iter().filter(|(_, used)| *used != Use::default()).collect()
    }
}

fn per_second(amount: u64, since: Duration) -> u64 {
    let nanos = since.as_nanos().max(1);
    u64::try_from(u128::from(amount) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}
