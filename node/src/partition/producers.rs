//! Which events of which producer the partition holds, so that a retry appends nothing twice.
//!
//! A producer numbers its events within a session and an epoch. The table remembers, per session, the newest epoch and the last
//! sequence in it. At most [`SESSIONS_MAX`] sessions are kept; a session idle for an hour of *entry* time is dropped, and the
//! oldest one when the table is full. What a dropped session sent cannot be told from what it did not send, so its retry is
//! refused, never guessed: a session id begins with the millisecond at which the session was made, and an unknown session that is
//! not younger than the newest dropped one might be a dropped one.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use ensign_proto::{Offset, SessionId};

/// The most sessions that a partition remembers.
pub(crate) const SESSIONS_MAX: usize = 10_000;

/// A session is dropped when the partition's newest event is this much younger than the session's last one.
pub(crate) const IDLE_MS: u64 = 60 * 60 * 1000;

/// Appends remembered per session, to tell a retry where and when its event was committed: more than a publisher usually has
/// in flight, and fewer when there are many sessions.
fn runs_max(sessions: usize) -> usize {
    if sessions <= 256 { 64 } else { 8 }
}

/// Session ids are random where it matters; a keyed hash would only make iteration order differ between runs.
#[derive(Default)]
pub(crate) struct SessionHasher(u64);

impl Hasher for SessionHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = (self.0.rotate_left(23) ^ u64::from_le_bytes(word)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
    }
}

/// When a session was made: the millisecond at the front of its id.
pub(crate) fn made_at(session: SessionId) -> u64 {
    session.as_bytes()[..6].iter().fold(0, |ms, byte| ms << 8 | u64::from(*byte))
}

/// Consecutive events of one producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequenced {
    /// Whose.
    pub session: SessionId,
    /// In which life of the session.
    pub epoch: u32,
    /// The number of the first.
    pub first: u64,
    /// How many; at least one.
    pub count: u32,
}

impl Sequenced {
    fn last(&self) -> u64 {
        self.first + u64::from(self.count) - 1
    }
}

/// Where an append of a session went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) offset: Offset,
    pub(crate) committed_ms: u64,
}

/// What the table says of a sequence up to a session's last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    /// It is in this append.
    In(Run),
    /// It is from before the oldest append that is remembered, which begins with this sequence.
    Before(u64),
    /// It is not here: the session passed it over. Its event went elsewhere or was refused.
    PassedOver,
}

/// What the table knows of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Session {
    pub(crate) epoch: u32,
    pub(crate) last: u64,
    pub(crate) seen_ms: u64,
    pub(crate) runs: VecDeque<Run>,
}

/// What may be done with a producer's events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// None is here yet, and none is missing before them: append them.
    Fresh,
    /// The first `held` of them are here already; the others are fresh.
    Duplicate {
        /// How many are held.
        held: u32,
    },
    /// Events before them are missing. Refused: appending would make the missing ones look like duplicates.
    Gap {
        /// The last sequence that is here.
        last: u64,
    },
    /// A newer epoch of the session has written; this one may not any more.
    Fenced {
        /// The newest epoch.
        epoch: u32,
    },
    /// The session is unknown and as old as sessions that were dropped: whether these are retries cannot be told.
    Forgotten,
}

/// The newest place of a session: epoch and last sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Place {
    pub(crate) epoch: u32,
    pub(crate) last: u64,
}

impl Place {
    /// Judges `events` against this place. `previous` is the sequence that the producer sent to this partition just before.
    pub(crate) fn judge(self, events: &Sequenced, previous: Option<u64>) -> Verdict {
        if events.epoch < self.epoch {
            return Verdict::Fenced { epoch: self.epoch };
        }
        let last = if events.epoch > self.epoch { 0 } else { self.last };
        if events.first <= last {
            let held = last.min(events.last()) - events.first + 1;
            return Verdict::Duplicate { held: held as u32 };
        }
        match previous {
            Some(previous) if previous > last => Verdict::Gap { last },
            _ => Verdict::Fresh,
        }
    }
}

/// The table. Part of the partition's replicated state: every change is a pure function of the entries.
#[derive(Debug, Clone, Default)]
pub(crate) struct Producers {
    sessions: HashMap<SessionId, Session, BuildHasherDefault<SessionHasher>>,
    by_age: BTreeSet<(u64, SessionId)>,
    dropped_through_ms: Option<u64>,
}

impl Producers {
    /// The place of a session: that of a fresh one if it is unknown, none if it may have been dropped.
    pub(crate) fn place(&self, session: SessionId) -> Option<Place> {
        match self.sessions.get(&session) {
            Some(known) => Some(Place { epoch: known.epoch, last: known.last }),
            None => self.dropped_through_ms.is_none_or(|dropped| made_at(session) > dropped).then(Place::default),
        }
    }

    /// What became of a sequence that is not above the session's last.
    pub(crate) fn held(&self, session: SessionId, sequence: u64) -> Held {
        let runs = self.sessions.get(&session).map(|known| &known.runs);
        let Some(run) = runs.and_then(|runs| runs.iter().find(|run| sequence <= run.last)) else {
            return Held::Before(sequence + 1);
        };
        let oldest = runs.and_then(|runs| runs.front()).map_or(run.first, |oldest| oldest.first);
        if run.first <= sequence {
            Held::In(*run)
        } else if sequence < oldest {
            Held::Before(oldest)
        } else {
            Held::PassedOver
        }
    }

    /// Notes an append at `now_ms`, the entry's time; drops what is too old or too much.
    pub(crate) fn record(&mut self, events: &Sequenced, offset: Offset, now_ms: u64) {
        let run = Run { first: events.first, last: events.last(), offset, committed_ms: now_ms };
        let fresh = || Session { epoch: events.epoch, last: 0, seen_ms: now_ms, runs: VecDeque::new() };
        let session = self.sessions.entry(events.session).or_insert_with(fresh);
        self.by_age.remove(&(session.seen_ms, events.session));
        if session.epoch != events.epoch {
            *session = fresh();
        }
        session.last = run.last;
        session.seen_ms = now_ms;
        session.runs.push_back(run);
        self.by_age.insert((session.seen_ms, events.session));
        let most = runs_max(self.sessions.len());
        if let Some(session) = self.sessions.get_mut(&events.session) {
            session.runs.drain(..session.runs.len().saturating_sub(most));
        }
        self.drop_old(now_ms);
    }

    fn drop_old(&mut self, now_ms: u64) {
        while let Some((seen_ms, session)) = self.by_age.first().copied() {
            if self.sessions.len() <= SESSIONS_MAX && seen_ms.saturating_add(IDLE_MS) >= now_ms {
                return;
            }
            self.by_age.pop_first();
            self.sessions.remove(&session);
            // Never before the session was made, whatever clock its maker had.
            self.dropped_through_ms = self.dropped_through_ms.max(Some(seen_ms.max(made_at(session))));
        }
    }

    /// How many sessions are remembered.
    pub(crate) fn len(&self) -> usize {
        self.sessions.len()
    }

    pub(crate) fn dropped_through_ms(&self) -> Option<u64> {
        self.dropped_through_ms
    }

    /// Every session, oldest first: an order that all replicas share.
    pub(crate) fn oldest_first(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.by_age.iter().filter_map(|(_, id)| self.sessions.get(id).map(|session| (*id, session)))
    }

    /// The table that `oldest_first` and `dropped_through_ms` described.
    pub(crate) fn rebuild(sessions: Vec<(SessionId, Session)>, dropped_through_ms: Option<u64>) -> Self {
        let by_age = sessions.iter().map(|(id, session)| (session.seen_ms, *id)).collect();
        Self { sessions: sessions.into_iter().collect(), by_age, dropped_through_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(made: u64, n: u8) -> SessionId {
        SessionId::new(made, [n; 10])
    }

    fn events(session: SessionId, epoch: u32, first: u64, count: u32) -> Sequenced {
        Sequenced { session, epoch, first, count }
    }

    fn judge(table: &Producers, events: &Sequenced, previous: Option<u64>) -> Verdict {
        table.place(events.session).map_or(Verdict::Forgotten, |place| place.judge(events, previous))
    }

    #[test]
    fn a_retry_is_a_duplicate_and_knows_its_commit_time() {
        let mut table = Producers::default();
        let s = session(10, 1);
        assert_eq!(judge(&table, &events(s, 1, 1, 3), Some(0)), Verdict::Fresh);
        table.record(&events(s, 1, 1, 3), Offset(1), 100);
        assert_eq!(judge(&table, &events(s, 1, 1, 3), Some(0)), Verdict::Duplicate { held: 3 });
        assert_eq!(judge(&table, &events(s, 1, 2, 4), Some(1)), Verdict::Duplicate { held: 2 });
        assert_eq!(judge(&table, &events(s, 1, 4, 1), Some(3)), Verdict::Fresh);
        let Held::In(run) = table.held(s, 2) else { panic!("it is held") };
        assert_eq!((run.first, run.offset, run.committed_ms), (1, Offset(1), 100));
    }

    #[test]
    fn events_after_a_hole_are_refused() {
        let mut table = Producers::default();
        let s = session(10, 1);
        assert_eq!(judge(&table, &events(s, 1, 4, 1), Some(3)), Verdict::Gap { last: 0 });
        table.record(&events(s, 1, 1, 2), Offset(1), 100);
        assert_eq!(judge(&table, &events(s, 1, 4, 1), Some(3)), Verdict::Gap { last: 2 });
        // The producer says that it sent nothing between 2 and 9 to this partition.
        assert_eq!(judge(&table, &events(s, 1, 9, 1), Some(2)), Verdict::Fresh);
    }

    #[test]
    fn an_append_that_is_no_longer_remembered_is_not_taken_for_another() {
        let mut table = Producers::default();
        let s = session(10, 1);
        for n in 0..100 {
            table.record(&events(s, 1, 1 + 5 * n, 3), Offset(1 + 3 * n), 100 + n);
        }
        let most = runs_max(1) as u64;
        let oldest = 1 + 5 * (100 - most);
        assert_eq!(table.held(s, 1), Held::Before(oldest));
        assert_eq!(table.held(s, oldest - 1), Held::Before(oldest));
        assert!(matches!(table.held(s, oldest + 2), Held::In(run) if run.first == oldest));
        // Three were appended, two numbers were not used, or were refused.
        assert_eq!(table.held(s, oldest + 3), Held::PassedOver);
        assert!(matches!(table.held(s, 498), Held::In(_)));
    }

    #[test]
    fn sessions_that_claim_to_be_from_the_future_do_not_outlive_others() {
        let mut table = Producers::default();
        for n in 0..SESSIONS_MAX as u64 {
            let mut random = [0; 10];
            random[..8].copy_from_slice(&n.to_be_bytes());
            table.record(&events(SessionId::new(1_000_000, random), 1, 1, 1), Offset(n + 1), 1_000);
        }
        let honest = session(1_001, 7);
        table.record(&events(honest, 1, 1, 1), Offset(20_000), 1_001);
        assert_eq!(judge(&table, &events(honest, 1, 2, 1), Some(1)), Verdict::Fresh, "the newest stays");
    }

    #[test]
    fn a_newer_epoch_fences_older_ones() {
        let mut table = Producers::default();
        let s = session(10, 1);
        table.record(&events(s, 1, 1, 5), Offset(1), 100);
        assert_eq!(judge(&table, &events(s, 2, 1, 1), Some(0)), Verdict::Fresh);
        table.record(&events(s, 2, 1, 1), Offset(6), 101);
        assert_eq!(judge(&table, &events(s, 1, 6, 1), Some(5)), Verdict::Fenced { epoch: 2 });
    }

    #[test]
    fn an_idle_session_is_dropped_and_its_retry_refused() {
        let mut table = Producers::default();
        let (old, new) = (session(50, 1), session(IDLE_MS + 200, 2));
        table.record(&events(old, 1, 1, 1), Offset(1), 100);
        table.record(&events(new, 1, 1, 1), Offset(2), 100 + IDLE_MS + 1);
        assert_eq!(table.len(), 1);
        assert_eq!(judge(&table, &events(old, 1, 1, 1), Some(0)), Verdict::Forgotten);
        assert_eq!(judge(&table, &events(session(100, 3), 1, 1, 1), Some(0)), Verdict::Forgotten);
        assert_eq!(judge(&table, &events(session(101, 3), 1, 1, 1), Some(0)), Verdict::Fresh);
    }

    #[test]
    fn a_session_from_the_future_is_still_refused_once_it_was_dropped() {
        let mut table = Producers::default();
        let ahead = session(5_000, 1);
        table.record(&events(ahead, 1, 1, 1), Offset(1), 100);
        table.record(&events(session(9_000 + IDLE_MS, 2), 1, 1, 1), Offset(2), 9_000 + IDLE_MS);
        assert_eq!(judge(&table, &events(ahead, 1, 1, 1), Some(0)), Verdict::Forgotten);
    }

    #[test]
    fn a_full_table_drops_its_oldest() {
        let mut table = Producers::default();
        for n in 0..=SESSIONS_MAX as u64 {
            let mut random = [0; 10];
            random[..8].copy_from_slice(&n.to_be_bytes());
            table.record(&events(SessionId::new(n, random), 1, 1, 1), Offset(n + 1), 1_000 + n);
        }
        assert_eq!(table.len(), SESSIONS_MAX);
        assert_eq!(table.dropped_through_ms(), Some(1_000));
    }
}
