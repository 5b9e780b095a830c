//! Who holds keys, as far as this leadership granted them. In memory: a new leader waits instead of knowing.

use std::collections::HashMap;
use std::time::Duration;

use ensign_proto::{NodeId, SessionId, Term};
use ensign_raft::env::BootTime;

use crate::link::{Reason, Refusal};

/// More sessions than any cluster has processes within one lease wait.
const SESSIONS_MAX: usize = 100_000;

#[derive(Debug, Default)]
pub(crate) struct LeaseBook {
    sessions: HashMap<SessionId, Known>,
    /// The leadership of this process, and when it first saw itself lead it.
    leading: Option<(Term, BootTime)>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    node: NodeId,
    last_grant: BootTime,
}

impl LeaseBook {
    /// When this process first saw itself lead `term`: now, unless it did before.
    pub(crate) fn leading_since(&mut self, term: Term, now: BootTime) -> BootTime {
        match self.leading {
            Some((known, since)) if known == term => since,
            _ => {
                self.leading = Some((term, now));
                now
            }
        }
    }

    /// Notes a grant, in one critical section with the state it was decided from.
    pub(crate) fn note(
        &mut self,
        session: SessionId,
        node: NodeId,
        now: BootTime,
        wait: Duration,
    ) -> Result<(), Refusal> {
        if let Some(known) = self.sessions.get_mut(&session) {
            if known.node != node {
                return Err(Refusal::new(Reason::Invalid, "that session belongs to another node"));
            }
            known.last_grant = now;
            return Ok(());
        }
        if self.sessions.len() >= SESSIONS_MAX {
            self.sessions.retain(|_, known| known.is_running(now, wait));
        }
        if self.sessions.len() >= SESSIONS_MAX {
            return Err(Refusal::new(Reason::Exhausted, "too many sessions hold a lease"));
        }
        self.sessions.insert(session, Known { node, last_grant: now });
        Ok(())
    }

    /// A clean stop: the session overwrote its keys.
    pub(crate) fn release(&mut self, session: SessionId, node: NodeId) {
        if self.sessions.get(&session).is_some_and(|known| known.node == node) {
            self.sessions.remove(&session);
        }
    }

    /// The sessions whose lease may still be running.
    pub(crate) fn known(&mut self, now: BootTime, wait: Duration) -> Vec<(SessionId, NodeId)> {
        self.sessions.retain(|_, known| known.is_running(now, wait));
        let mut sessions: Vec<_> = self.sessions.iter().map(|(session, known)| (*session, known.node)).collect();
        sessions.sort_unstable();
        sessions
    }
}

impl Known {
    fn is_running(&self, now: BootTime, wait: Duration) -> bool {
        now.0 < self.last_grant.0 + wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> BootTime {
        BootTime(Duration::from_secs(seconds))
    }

    const W: Duration = Duration::from_secs(15);

    #[test]
    fn a_leadership_begins_once() {
        let mut book = LeaseBook::default();
        assert_eq!(book.leading_since(Term(3), at(10)), at(10));
        assert_eq!(book.leading_since(Term(3), at(20)), at(10));
        assert_eq!(book.leading_since(Term(5), at(30)), at(30), "another leadership was in between");
    }

    #[test]
    fn a_session_is_known_until_its_lease_cannot_be_running() {
        let mut book = LeaseBook::default();
        let session = SessionId::from_bytes([1; 16]);
        book.note(session, NodeId(1), at(10), W).unwrap();
        assert_eq!(book.known(BootTime(Duration::from_millis(24_999)), W), [(session, NodeId(1))]);
        assert!(book.known(at(25), W).is_empty());
        book.note(session, NodeId(1), at(30), W).unwrap();
        assert!(book.note(session, NodeId(2), at(30), W).is_err());
        book.release(session, NodeId(2));
        assert_eq!(book.known(at(31), W).len(), 1);
        book.release(session, NodeId(1));
        assert!(book.known(at(31), W).is_empty());
    }
}
