//! The books of the node that leads the catalog: what each project may still publish, and what every node uses.
//!
//! They are kept in memory and belong to one leadership: a new leader begins with empty buckets, so a change of leader gives nobody a
//! second burst, and without reports, which it has from everyone after two rounds.

use std::collections::HashMap;
use std::time::Duration;

use ensign_proto::{NodeId, ProjectId, Term};
use ensign_raft::Leadership;
use tokio::time::Instant;

use super::bucket::Bucket;
use super::{REPORT_EVERY, Reported, Take, Taken, Total, Use};
use crate::catalog::{Limit, PerResource};

/// A node that was not heard from for so long counts for nothing: what it led, others lead.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3 * REPORT_EVERY.as_secs());
/// From when on a leader has heard from everybody who is up.
const COMPLETE_AFTER: Duration = Duration::from_secs(2 * REPORT_EVERY.as_secs() + 1);
/// Buckets that are kept; beyond, those that are full are dropped, which changes nothing.
const BUCKETS_KEPT: usize = 1_024;
/// The longest wait that is promised: an operator may raise a limit meanwhile.
const WAIT_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy)]
struct Buckets {
    events: Bucket,
    bytes: Bucket,
}

#[derive(Debug, Default)]
pub(super) struct Books {
    /// Whose they are, and since when.
    kept: Option<(Term, Instant)>,
    buckets: HashMap<ProjectId, Buckets>,
    reports: HashMap<NodeId, (Instant, HashMap<ProjectId, Use>)>,
}

impl Books {
    /// Begins anew in a new term. Since when the books are kept.
    fn open(&mut self, now: Leadership, at: Instant) -> Instant {
        match self.kept {
            Some((term, since)) if term == now.term => since,
            _ => {
                *self = Self { kept: Some((now.term, at)), ..Self::default() };
                at
            }
        }
    }

    pub(super) fn take(&mut self, now: Leadership, at: Instant, limits: &PerResource<Limit>, take: Take) -> Taken {
        let since = self.open(now, at);
        if self.buckets.len() >= BUCKETS_KEPT {
            let full = |bucket: &Bucket| bucket.is_full(at);
            self.buckets.retain(|_, buckets| !(full(&buckets.events) && full(&buckets.bytes)));
        }
        let fresh = Buckets { events: Bucket::empty(since), bytes: Bucket::empty(since) };
        let buckets = self.buckets.entry(take.project).or_insert(fresh);
        let pairs = [
            (limits.events_per_second, &mut buckets.events, take.events),
            (limits.bytes_per_second, &mut buckets.bytes, take.bytes),
        ];
        let wait = |(limit, bucket, amount): &(Limit, &mut Bucket, u64)| match limit {
            Limit::At(rate) if *amount > 0 => bucket.wait(at, *rate).unwrap_or(WAIT_MAX).min(WAIT_MAX),
            Limit::At(_) | Limit::Unlimited => Duration::ZERO,
        };
        let longest = pairs.iter().map(wait).max().unwrap_or_default();
        if longest > Duration::ZERO {
            return Taken::Wait(longest);
        }
        for (limit, bucket, amount) in pairs {
            if let Limit::At(rate) = limit {
                bucket.spend(at, rate, amount);
            }
        }
        Taken::All
    }

    pub(super) fn report(
        &mut self,
        now: Leadership,
        at: Instant,
        from: NodeId,
        uses: Vec<(ProjectId, Use)>,
        limited: impl Fn(ProjectId) -> bool,
    ) -> Reported {
        let since = self.open(now, at);
        self.reports.insert(from, (at, uses.into_iter().collect()));
        self.reports.retain(|_, (heard, _)| at.saturating_duration_since(*heard) < FORGOTTEN_AFTER);
        let mut stored: HashMap<ProjectId, u64> = HashMap::new();
        for (project, used) in self.reports.values().flat_map(|(_, uses)| uses) {
            *stored.entry(*project).or_default() += used.stored_bytes;
        }
        stored.retain(|project, _| limited(*project));
        Reported { complete: is_complete(since, at), stored: stored.into_iter().collect() }
    }

    /// What projects use; none before everybody was heard.
    pub(super) fn usage(&mut self, now: Leadership, at: Instant, projects: &[ProjectId]) -> Option<Vec<Total>> {
        let since = self.open(now, at);
        is_complete(since, at).then(|| projects.iter().map(|project| self.total(at, *project)).collect())
    }

    fn total(&self, at: Instant, project: ProjectId) -> Total {
        let mut total = Total::default();
        let heard = |heard: &Instant| at.saturating_duration_since(*heard) < FORGOTTEN_AFTER;
        let uses = self.reports.values().filter(|(when, _)| heard(when)).filter_map(|(_, uses)| uses.get(&project));
        for used in uses {
            total.sum.stored_bytes += used.stored_bytes;
            total.sum.streams += used.streams;
            total.sum.events_per_second += used.events_per_second;
            total.sum.bytes_per_second += used.bytes_per_second;
            total.streams_of_busiest_node = total.streams_of_busiest_node.max(used.streams);
        }
        total
    }
}

fn is_complete(since: Instant, at: Instant) -> bool {
    at.saturating_duration_since(since) >= COMPLETE_AFTER
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leads(term: u64) -> Leadership {
        Leadership { term: Term(term), leader: Some(NodeId(1)), ready: true }
    }

    fn limits(events: u64) -> PerResource<Limit> {
        PerResource { events_per_second: Limit::At(events), ..crate::catalog::BUILT_IN }
    }

    fn project(n: u8) -> ProjectId {
        ProjectId::from_bytes([n; 16])
    }

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn a_new_leader_gives_no_second_burst() {
        let (mut books, begin) = (Books::default(), Instant::now());
        let take = |books: &mut Books, term, at| {
            books.take(leads(term), at, &limits(10), Take { project: project(1), events: 20, bytes: 1 })
        };
        assert!(matches!(take(&mut books, 1, begin), Taken::Wait(_)), "it begins empty");
        assert_eq!(take(&mut books, 1, begin + secs(60)), Taken::All);
        assert!(matches!(take(&mut books, 1, begin + secs(60)), Taken::Wait(_)));
        // Deposed, and elected again in another term.
        assert!(matches!(take(&mut books, 2, begin + secs(61)), Taken::Wait(_)));
        assert_eq!(take(&mut books, 2, begin + secs(62)), Taken::All);
    }

    #[test]
    fn projects_have_a_bucket_each_and_full_ones_are_not_kept() {
        let (mut books, begin) = (Books::default(), Instant::now());
        let at = begin + secs(60);
        books.open(leads(1), begin);
        for n in 0..3_000_u32 {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&n.to_be_bytes());
            let take = Take { project: ProjectId::from_bytes(id), events: 1, bytes: 1 };
            let later = at + secs(u64::from(n));
            assert_eq!(books.take(leads(1), later, &limits(10), take), Taken::All);
        }
        assert!(books.buckets.len() <= BUCKETS_KEPT + 1);
    }

    #[test]
    fn what_is_stored_is_added_up_and_a_node_that_is_gone_counts_no_more() {
        let (mut books, begin) = (Books::default(), Instant::now());
        let used = |stored_bytes, streams| Use { stored_bytes, streams, ..Use::default() };
        let report = |books: &mut Books, at, node, uses| books.report(leads(1), at, NodeId(node), uses, |_| true);
        let first = report(&mut books, begin, 1, vec![(project(1), used(5, 2))]);
        assert!(!first.complete, "others have not been heard yet");
        assert_eq!(books.usage(leads(1), begin, &[project(1)]), None);
        report(&mut books, begin + secs(4), 1, vec![(project(1), used(6, 2))]);
        let both = report(&mut books, begin + secs(5), 2, vec![(project(1), used(7, 3)), (project(2), used(1, 0))]);
        let mut stored = both.stored.clone();
        stored.sort_unstable();
        assert_eq!((both.complete, stored), (true, vec![(project(1), 13), (project(2), 1)]));
        let total = books.usage(leads(1), begin + secs(5), &[project(1)]).unwrap()[0];
        assert_eq!((total.sum.streams, total.streams_of_busiest_node), (5, 3));
        let alone = report(&mut books, begin + secs(10), 2, vec![(project(1), used(7, 3))]);
        assert_eq!(alone.stored, vec![(project(1), 7)]);
        assert!(!books.report(leads(2), begin + secs(11), NodeId(2), Vec::new(), |_| true).complete);
    }
}
