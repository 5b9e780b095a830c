//! Linearizable reads, and reads of the log itself.

use std::ops::Range;
use std::time::Duration;

use ensign_proto::{ByteCount, LogIndex, NodeId};
use ensign_storage::LogError;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use openraft::ReadPolicy;
use openraft::errors::{LinearizableReadError, RaftError};
use tokio::time::timeout;

use crate::codec;
use crate::errors::ReadError;
use crate::machine::CommittedEntry;
use crate::replica::{Absent, Replica};
use crate::store;
use crate::types::{Raft, Types};

impl Replica {
    pub(crate) async fn read_index(&self) -> Result<LogIndex, ReadError> {
        let raft = self.core().map_err(read_error)?;
        if self.leadership_now().leads(self.config.node) {
            self.nap.note_activity();
            self.stir();
        }
        let _hurry = self.nap.hurry();
        // A quorum that answers does so within a lease; applying may need a little longer.
        let patience = self.config.timing.election_max * 2;
        match timeout(patience, self.confirmed_by_majority(&raft)).await {
            Err(_elapsed) => Err(ReadError::NoQuorum),
            Ok(Ok(read)) => Ok(read),
            Ok(Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))) => Err(ReadError::NoQuorum),
            Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
                Err(ReadError::NotLeader { leader: forward.leader_id.map(NodeId) })
            }
            Ok(Err(RaftError::Fatal(_))) => Err(read_error(self.core().err().unwrap_or(Absent::Recovering))),
        }
    }

    /// A read index. A majority is asked again as often as the cluster beats: the first question may have met replicas that were
    /// just starting, and the next heartbeat of a partition is long in coming.
    pub(crate) async fn confirmed_by_majority(
        &self,
        raft: &Raft,
    ) -> Result<LogIndex, RaftError<Types, LinearizableReadError<Types>>> {
        let ask = || raft.ensure_linearizable(ReadPolicy::ReadIndex);
        let read = until_answered(self.config.timing.heartbeat, ask).await;
        read.map(|read| LogIndex(read.index()))
    }

    pub(crate) async fn read_log(
        &self,
        range: Range<LogIndex>,
        limit: ByteCount,
    ) -> Result<Vec<CommittedEntry>, ReadError> {
        if let Some(cause) = self.fenced() {
            return Err(ReadError::Fenced { cause });
        }
        if self.stop.is_cancelled() {
            return Err(ReadError::Stopped);
        }
        let Some(applied) = self.progress().applied else { return Ok(Vec::new()) };
        let mut rest = range.start..range.end.min(LogIndex(applied.index + 1));
        let mut found = Vec::new();
        let mut left = limit.0;
        while rest.start < rest.end && (found.is_empty() || left > 0) {
            if let Some(purged) = self.log.state().purged.filter(|purged| rest.start <= purged.index) {
                return if found.is_empty() {
                    Err(ReadError::Purged { first: purged.index.next() })
                } else {
                    Ok(found)
                };
            }
            let entries = match store::read(self, rest.clone(), ByteCount(left.max(1))).await {
                Ok(entries) => entries,
                // The log may have been purged meanwhile: look again before calling it a failure.
                Err(LogError::Refused { .. }) if self.log.state().purged.is_some_and(|id| rest.start <= id.index) => {
                    continue;
                }
                // A group that is stopped may be removed at any time, and its log is empty then.
                Err(_) if self.stop.is_cancelled() => return Err(ReadError::Stopped),
                Err(error) => {
                    self.storage_failed(&error);
                    return Err(ReadError::Fenced { cause: error.to_string().into() });
                }
            };
            let Some(last) = entries.last() else { break };
            rest.start = last.id.index.next();
            for entry in entries {
                if let Some(payload) = codec::proposed(&entry.payload) {
                    left = left.saturating_sub(payload.len() as u64);
                    found.push(CommittedEntry { id: entry.id, payload });
                }
            }
        }
        Ok(found)
    }
}

/// Asks, and again every `pause`, until any of the questions is answered.
async fn until_answered<A: Future>(pause: Duration, ask: impl Fn() -> A) -> A::Output {
    let mut asked = FuturesUnordered::new();
    loop {
        asked.push(ask());
        if let Ok(Some(answer)) = timeout(pause, asked.next()).await {
            return answer;
        }
    }
}

pub(crate) fn read_error(absent: Absent) -> ReadError {
    match absent {
        Absent::Fenced(cause) => ReadError::Fenced { cause },
        Absent::Stopped => ReadError::Stopped,
        Absent::Recovering => ReadError::NotLeader { leader: None },
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn who_waits_for_an_answer_asks_again_and_takes_whichever_comes_first() {
        let asked = Cell::new(0);
        // The first two questions are lost: nobody answers them, nor says that nobody will.
        let ask = || {
            asked.set(asked.get() + 1);
            let question = asked.get();
            async move { if question < 3 { std::future::pending().await } else { question } }
        };
        let answer = timeout(Duration::from_secs(20), until_answered(Duration::from_millis(1), ask)).await;
        assert_eq!(answer, Ok(3), "it asked {} times", asked.get());
        // A question that was asked before may still be answered after the next one was put.
        let (slow, late) = (Cell::new(0), tokio::sync::Notify::new());
        let ask = || {
            slow.set(slow.get() + 1);
            let question = slow.get();
            if question == 2 {
                late.notify_one();
            }
            let late = &late;
            async move {
                if question == 1 {
                    late.notified().await;
                } else {
                    std::future::pending::<()>().await;
                }
                question
            }
        };
        let answer = timeout(Duration::from_secs(20), until_answered(Duration::from_millis(1), ask)).await;
        assert_eq!(answer, Ok(1));
    }
}
