//! A partition's group as moves see it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ensign_proto::{NodeId, TopicId};
use ensign_raft::{Group, MembershipError, Runtime, TransferError};
use futures::FutureExt as _;
use futures::future::BoxFuture;

use super::machine::PartitionMachine;
use super::registry::Partitions;
use crate::placement::{Seat, Seats, Seen};

impl Seats for Partitions {
    fn seat(&self, topic: TopicId) -> Option<Arc<dyn Seat>> {
        let handle = self.get(topic)?;
        Some(Arc::new(GroupSeat { me: self.me(), group: handle.group().clone(), runtime: self.runtime().clone() }))
    }
}

struct GroupSeat {
    me: NodeId,
    group: Group<PartitionMachine>,
    runtime: Runtime,
}

fn changed(outcome: Result<(), MembershipError>) -> Result<(), String> {
    outcome.map_err(|error| error.to_string())
}

impl Seat for GroupSeat {
    fn leads(&self) -> bool {
        self.group.leadership().borrow().ready
    }

    fn seen(&self) -> Seen {
        let (members, status) = (self.group.members(), self.group.status());
        let missing = |node: &NodeId| match status.matched.get(node) {
            _ if *node == self.me => Some(0),
            Some(matched) => Some(status.last.0.saturating_sub(matched.0)),
            None => None,
        };
        let all = members.voters.iter().chain(&members.learners);
        let missing: BTreeMap<NodeId, u64> = all.filter_map(|node| Some((*node, missing(node)?))).collect();
        let outgoing = members.is_joint().then_some(members.outgoing);
        Seen {
            voters: members.voters,
            outgoing,
            learners: members.learners,
            missing,
            last: status.last.0,
            throttled: self.runtime.learners_waited(),
        }
    }

    fn settle(&self) -> BoxFuture<'static, Result<(), String>> {
        let group = self.group.clone();
        // A leader that was deposed and does not know it may see the group as it once was, with nothing left to commit.
        async move { group.confirmed_members().await.map(drop).map_err(|error| error.to_string()) }.boxed()
    }

    fn add_learner(&self, node: NodeId) -> BoxFuture<'static, Result<(), String>> {
        let group = self.group.clone();
        async move { changed(group.add_learner(node).await) }.boxed()
    }

    fn remove_learner(&self, node: NodeId) -> BoxFuture<'static, Result<(), String>> {
        let group = self.group.clone();
        async move { changed(group.remove_learner(node).await) }.boxed()
    }

    fn change_voters(
        &self,
        expected: BTreeSet<NodeId>,
        voters: BTreeSet<NodeId>,
    ) -> BoxFuture<'static, Result<(), String>> {
        let group = self.group.clone();
        async move { changed(group.change_voters(&expected, voters).await) }.boxed()
    }

    fn hand_over(&self, to: NodeId) -> BoxFuture<'static, Result<(), String>> {
        let group = self.group.clone();
        async move { group.transfer_leader(to).await.map_err(|error: TransferError| error.to_string()) }.boxed()
    }
}
