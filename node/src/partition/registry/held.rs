//! What a node does with the log of a replica: when it may found a group with an empty one, and when it gives one up.
//!
//! What cannot be taken back waits until a majority has confirmed what this node knows of the catalog: a view that trails, as after
//! a restart, may show where replicas once were. Who founded a group by it would make a second history; who removed a log
//! by it could take away what others count on. A replica that left keeps its promises: see `ensign_raft::parting`.

use std::collections::BTreeSet;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ensign_proto::GroupId;
use ensign_raft::env::Stop;
use ensign_raft::{Mode, parting};
use ensign_storage::{Done, NodeLog};
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use super::Partitions;
use crate::catalog::Topic;

impl Partitions {
    /// Whether a replica belongs here: one that is, or one that is to come.
    pub(super) fn is_held_here(&self, topic: &Topic) -> bool {
        let me = &self.inner.parts.me;
        let comes = topic.reassignment.as_ref().is_some_and(|on| on.target.contains(me));
        comes || self.inner.parts.catalog.replicas_of(topic).contains(me)
    }

    /// Whether a majority confirms that the catalog is at least as this node knows it.
    async fn confirm(&self, stop: &Stop) -> bool {
        match stop.run_until_cancelled(self.inner.parts.catalog.refresh()).await {
            None => false,
            Some(Ok(())) => {
                self.inner.unread.store(false, Ordering::SeqCst);
                true
            }
            Some(Err(error)) => {
                // It is asked again and again, and said once.
                if !self.inner.unread.swap(true, Ordering::SeqCst) {
                    warn!(%error, "partitions that are new here, or were moved away, wait until the catalog can be read");
                }
                false
            }
        }
    }

    /// Whether a replica that has nothing yet may create the topic's group: only if nobody can have done so and moved on.
    /// None where the catalog has to confirm that first, and cannot.
    ///
    /// Once since the start is enough: what this node gives up later, it gives up because its view already shows the move.
    pub(super) async fn mode(&self, topic: &Topic, stop: &Stop) -> Option<Mode> {
        let catalog = &self.inner.parts.catalog;
        let first = |topic: &Topic| topic.assignment == 0 && catalog.replicas_of(topic).contains(&self.inner.parts.me);
        let state = self.inner.parts.log.group(topic.group).state();
        if !first(topic) || state.last.is_some() || state.vote.is_some() {
            return Some(Mode::Member);
        }
        if !self.inner.confirmed.load(Ordering::SeqCst) {
            if !self.confirm(stop).await {
                return None;
            }
            self.inner.confirmed.store(true, Ordering::SeqCst);
        }
        // What was looked at may be older than the confirmation.
        let founds = catalog.view().topic(topic.id).is_some_and(|topic| first(&topic));
        Some(if founds { Mode::Found } else { Mode::Member })
    }

    /// Stops a replica whose place is elsewhere now, and gives up its log but for what it has promised.
    pub(super) async fn leave(&self, topic: &Topic, stop: &Stop) -> bool {
        // Out of sight first: whoever asks for it from here on goes to another node.
        let running = self.inner.running.write().unwrap_or_else(PoisonError::into_inner).remove(&topic.id);
        let runs = running.is_some();
        if let Some(running) = running {
            info!(topic = %topic.id, group = %topic.group, "the replica on this node is not needed any more");
            self.inner.changes.send_modify(|changes| *changes += 1);
            running.tasks.shut_down(Duration::from_secs(5)).await;
            self.inner.parts.runtime.stop(topic.group).await;
        }
        self.inner.damaged.write().unwrap_or_else(PoisonError::into_inner).remove(&topic.id);
        if !runs && self.inner.parts.log.group(topic.group).state().last.is_none() {
            return true;
        }
        // It promises nothing any more. Only now is asked whether it is really not wanted: from here on nobody can have counted on it.
        if !self.confirm(stop).await {
            return false;
        }
        match self.inner.parts.catalog.view().topic(topic.id) {
            Some(now) if self.is_held_here(&now) => false,
            Some(_) => self.forget(topic.group).await,
            None => self.remove_log(topic.group).await,
        }
    }

    pub(super) async fn remove_log(&self, group: GroupId) -> bool {
        if !self.inner.parts.log.groups().contains(&group) {
            return true;
        }
        self.give_up(group, |log, done| log.remove(group, done)).await
    }

    /// Gives up the log of a replica that left, and keeps what it has promised: it may be asked back.
    async fn forget(&self, group: GroupId) -> bool {
        match parting(&self.inner.parts.log.group(group).state()) {
            Ok(Some(vote)) => self.give_up(group, |log, done| log.forget(group, vote, done)).await,
            Ok(None) => self.remove_log(group).await,
            Err(error) => {
                error!(%group, %error, "the log of a replica that left stays");
                true
            }
        }
    }

    async fn give_up(&self, group: GroupId, submit: impl FnOnce(&dyn NodeLog, Done)) -> bool {
        let (sender, done) = oneshot::channel();
        // Whoever waited may be gone.
        submit(&*self.inner.parts.log, Box::new(move |outcome| drop(sender.send(outcome))));
        match done.await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                error!(%group, %error, "the log of a destroyed topic, or of a replica that left, is not removed yet");
                false
            }
            Err(_) => false,
        }
    }

    /// Removes logs of topics that were destroyed while this node was down. Only after the catalog is known to be up to date:
    /// a replica that trails may not know a topic yet whose log is here.
    pub(super) async fn sweep(&self, stop: &Stop) -> bool {
        match stop.run_until_cancelled(self.inner.parts.catalog.refresh()).await {
            None => return false,
            Some(Err(error)) => {
                warn!(%error, "leftovers of destroyed topics stay until the catalog can be read");
                return false;
            }
            Some(Ok(())) => {}
        }
        let known: BTreeSet<GroupId> =
            self.inner.parts.catalog.view().all_topics().iter().map(|topic| topic.group).collect();
        let mut complete = true;
        for group in self.inner.parts.log.groups() {
            if group >= GroupId::FIRST_PARTITION && !known.contains(&group) {
                info!(%group, "the log of a topic that was destroyed meanwhile is removed");
                complete &= self.remove_log(group).await;
            }
        }
        complete
    }
}
