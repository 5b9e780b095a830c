//! Erasing: what was destroyed also leaves the file of every member of the vault, and the leader commits that it has.
//!
//! ```text
//! each member:  the state holds a destruction newer than the file ──> snapshot, purge ──> rewrite the file ──> overwrite the old one
//! leader:       ask every member how far its file has come ──> all past a revocation: commit Erase, which makes its receipt
//! ```
//!
//! A member is whoever has the log: voters, also those of a change that is under way, and learners. A node that is none any more may
//! have what it had as one, so every node of the cluster is asked. Not here: how a file is rewritten so that a crash at any point
//! leaves one that is whole (`storage`).

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{LogIndex, NodeId};
use ensign_raft::Leadership;
use ensign_raft::env::BootTime;
use futures::future::join_all;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::Vault;
use crate::link::Reason;
use crate::machine::{Change, Erase};
use crate::metrics;

/// Between two rewrites of a file: what is destroyed in between goes with the next one.
const APART: Duration = Duration::from_secs(5);
/// How long a member may take to say how far it is.
const ASK_DEADLINE: Duration = Duration::from_secs(1);
/// How long one look waits for a purge. A leader that is sending what it would purge purges when that has arrived.
const PURGE_WITHIN: Duration = Duration::from_secs(1);
/// Between two snapshots for the sake of a purge that does not come.
const SNAPSHOTS_APART: Duration = Duration::from_secs(30);
/// How long a start waits for it.
const START_WITHIN: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(20);
const ACTOR: &str = "vault";
/// What a node answers that has nothing of the vault's log.
const HOLDS_NOTHING: LogIndex = LogIndex(u64::MAX);

/// What a voter remembers of it.
#[derive(Debug, Default)]
pub(super) struct EraseCare {
    rewritten: Option<BootTime>,
    /// The destruction for which a snapshot was taken, and when.
    snapshot: Option<(LogIndex, BootTime)>,
    /// Whether it was said that the log cannot be purged.
    complained: bool,
}

impl Vault {
    /// Up to where this node's file holds nothing that was destroyed.
    pub(super) fn erased_through(&self) -> LogIndex {
        let status = self.0.group.status();
        let empty = [status.last, status.snapshot, status.purged].iter().all(|index| index.0 == 0);
        if empty { HOLDS_NOTHING } else { LogIndex(self.0.log.mark()) }
    }

    /// Everyone who may have the vault's log: its members, and nodes that may have been.
    pub(super) fn copies(&self) -> Vec<NodeId> {
        let members = self.0.group.members();
        let members = [members.voters, members.outgoing, members.learners].into_iter().flatten();
        let all: std::collections::BTreeSet<NodeId> = members.chain((self.0.nodes)()).collect();
        all.into_iter().collect()
    }

    /// Those who have it, and how far each was when this leader last asked; 0 for who gave no answer.
    pub(super) fn erasers(&self) -> Vec<pb::ErasedVoter> {
        let heard = self.heard();
        let through = |node: NodeId| (node, heard.get(&node).copied().unwrap_or_default());
        let having = self.copies().into_iter().map(through).filter(|(_, through)| *through != HOLDS_NOTHING);
        having.map(|(node, through)| pb::ErasedVoter { node: node.0, through: through.0 }).collect()
    }

    /// How far each node was when this leader last asked.
    pub(super) fn heard(&self) -> MutexGuard<'_, BTreeMap<NodeId, LogIndex>> {
        self.0.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first look of a node that starts: what it has applied may say that its own file is too old.
    pub(super) async fn tend_file_at_start(&self) -> EraseCare {
        let mut care = EraseCare::default();
        // What takes longer goes on, and is looked at again.
        let _ = timeout(START_WITHIN, self.tend_file(&mut care)).await;
        care
    }

    /// Rewrites this node's file, if the state holds a destruction that is newer.
    pub(super) async fn tend_file(&self, care: &mut EraseCare) {
        let Ok(destroyed) = self.inspect(|state| Ok(state.destroyed)) else { return };
        let now = self.0.clock.boot();
        let lately = care.rewritten.is_some_and(|last| now.0 < last.0 + APART);
        if destroyed <= self.erased_through() || lately {
            return;
        }
        match self.rewrite(care, destroyed).await {
            Ok(mark) => {
                (care.rewritten, care.complained) = (Some(now), false);
                info!(through = mark.0, "the vault's file was written anew: it holds no key that was destroyed");
            }
            Err(why) if care.complained => debug!(why, "the vault's file is not written anew yet"),
            Err(why) => {
                care.complained = true;
                warn!(
                    why,
                    "keys that were destroyed are still in the vault's file on this node: it is tried again and again"
                );
            }
        }
    }

    async fn rewrite(&self, care: &mut EraseCare, destroyed: LogIndex) -> Result<LogIndex, String> {
        let (group, now) = (&self.0.group, self.0.clock.boot());
        let lately = care.snapshot.is_some_and(|(index, at)| index == destroyed && now.0 < at.0 + SNAPSHOTS_APART);
        if group.status().purged < destroyed && !lately {
            group.compact(0).await.map_err(|error| error.to_string())?;
            care.snapshot = Some((destroyed, now));
        }
        let deadline = Instant::now() + PURGE_WITHIN;
        let purged = loop {
            let purged = group.status().purged;
            if purged >= destroyed {
                break purged;
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "the log is purged up to {purged} and not up to {destroyed}: a member that is away has not taken it yet"
                ));
            }
            sleep(LOOK).await;
        };
        let (done, outcome) = oneshot::channel();
        let tell = move |result| drop(done.send(result));
        self.0.log.rewrite(purged.0, Box::new(tell));
        match outcome.await {
            Ok(Ok(())) => Ok(purged),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_gone) => Err("the log was closed".to_owned()),
        }
    }

    /// On the leader: asks every member how far it has come, and commits what all have done.
    pub(super) async fn tend_erasures(&self, leadership: Leadership) {
        let looked = self.inspect(|state| {
            let first = state.erasures.first_key_value().map(|(drained, _)| *drained);
            Ok((first, state.erasures.len(), state.erasing_since_ms()))
        });
        let Ok((first, open, since)) = looked else { return };
        if !leadership.ready {
            metrics::vault_erasures(0, Duration::ZERO);
            self.heard().clear();
            return;
        }
        let age = since.map_or(0, |since| self.0.clock.wall().as_millis().saturating_sub(since));
        metrics::vault_erasures(open, Duration::from_millis(age));
        let Some(first) = first else { return };
        let heard = self.ask_everyone().await;
        *self.heard() = heard.clone();
        // Without a receipt key nobody could sign it, now or later: a sealed leader waits until somebody unseals it, or leads in its place.
        let signed = self.attests() && self.inspect(|state| Ok(!state.receipt_keys.is_empty())) == Ok(true);
        let Some(through) = erased_by_all(&heard, first, signed) else { return };
        let having = heard.iter().filter(|(_, through)| **through != HOLDS_NOTHING);
        let voters = having.map(|(node, through)| pb::ErasedVoter { node: node.0, through: through.0 });
        let erase = Erase { through: through.0, voters: voters.collect() };
        match self.propose_in(Some(leadership.term), ACTOR, Change::Erase(erase)).await {
            Ok(_) => info!(through = through.0, "keys that were destroyed are in no file of the vault any more"),
            Err(refusal) if refusal.reason == Reason::NotLeader => {}
            Err(refusal) => warn!(%refusal, "an erasure is not committed yet"),
        }
    }

    /// Each node's answer; 0 for who gives none.
    async fn ask_everyone(&self) -> BTreeMap<NodeId, LogIndex> {
        let me = self.0.config.node;
        let ask = |node: NodeId| async move {
            if node == me {
                return (node, self.erased_through());
            }
            let call = Some(pb::request::Call::Status(pb::StatusRequest {}));
            let asked = self.0.peers.call(node, pb::Request { actor: String::new(), call });
            let reply = timeout(ASK_DEADLINE, asked).await;
            let through = match reply {
                Ok(Ok(pb::Reply { result: Some(pb::reply::Result::Status(status)) })) => status.erased_through,
                _ => 0,
            };
            (node, LogIndex(through))
        };
        join_all(self.copies().into_iter().map(ask)).await.into_iter().collect()
    }
}

/// Up to where nobody's file holds anything that was destroyed, if that is as far as `first` and can be signed.
fn erased_by_all(heard: &BTreeMap<NodeId, LogIndex>, first: LogIndex, signed: bool) -> Option<LogIndex> {
    let having = heard.values().copied().filter(|through| *through != HOLDS_NOTHING);
    having.min().filter(|through| signed && *through >= first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_is_erased_when_all_who_had_it_say_so_and_that_can_be_signed() {
        let by = |through: &[u64], signed| {
            let heard = (1..).map(NodeId).zip(through.iter().copied().map(LogIndex)).collect();
            erased_by_all(&heard, LogIndex(5), signed)
        };
        assert_eq!(by(&[7, 6, 9], true), Some(LogIndex(6)));
        assert_eq!(by(&[7, 6, 9], false), None, "nobody could sign it later");
        assert_eq!(by(&[7, 4, 9], true), None);
        assert_eq!(by(&[7, 0, 9], true), None, "who does not answer may have it");
        assert_eq!(by(&[7, HOLDS_NOTHING.0, 9], true), Some(LogIndex(7)), "who never had it is not waited for");
        assert_eq!(by(&[HOLDS_NOTHING.0], true), None);
    }
}
