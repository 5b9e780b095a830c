//! Which node may hold the data keys of which partition.

use std::collections::BTreeSet;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{NodeId, PartitionContext, ProjectId, TopicId};
use ensign_storage::EntryId;

use super::command::{self, Command};
use super::state::{Done, Outcome, State, What, refuse};
use crate::link::{Reason, Refusal};
use crate::wire::{self, Dead};

const CUSTODY_MAX: usize = 2_000_000;
/// Custody records of one command: what applies at once stays short.
pub(crate) const CUSTODIES_MAX: usize = 4_096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CustodyKey {
    pub(crate) topic: TopicId,
    pub(crate) partition: u32,
    pub(crate) node: NodeId,
    pub(crate) project: ProjectId,
}

impl CustodyKey {
    pub(crate) fn new(node: NodeId, ctx: &PartitionContext) -> Self {
        Self { topic: ctx.topic, partition: ctx.partition.0, node, project: ctx.project }
    }
}

impl State {
    pub(super) fn put_custody(&mut self, at: EntryId, command: &Command, change: &command::Custody) -> Outcome {
        let place = self.custody_of(change)?;
        self.put_places(at, command, &[place])
    }

    pub(super) fn drop_custody(&mut self, at: EntryId, command: &Command, change: &command::Custody) -> Outcome {
        let place = self.custody_of(change)?;
        Ok(self.drop_places(at, command, &[place]))
    }

    pub(super) fn put_custodies(&mut self, at: EntryId, command: &Command, change: &command::Custodies) -> Outcome {
        let places = self.places_of(change)?;
        self.put_places(at, command, &places)
    }

    pub(super) fn drop_custodies(&mut self, at: EntryId, command: &Command, change: &command::Custodies) -> Outcome {
        let places = self.places_of(change)?;
        Ok(self.drop_places(at, command, &places))
    }

    /// Each record has its own link in the chain, so whoever reads the chain need not know how many shared a command.
    fn put_places(&mut self, at: EntryId, command: &Command, places: &[(NodeId, PartitionContext)]) -> Outcome {
        // What is there already takes no more room.
        let new: BTreeSet<_> = places.iter().map(|(node, ctx)| CustodyKey::new(*node, ctx)).collect();
        let new = new.difference(&self.custody).count();
        if self.custody.len() + new > CUSTODY_MAX && new > 0 {
            return refuse(Reason::Exhausted, format!("there is room for {CUSTODY_MAX} custody records"));
        }
        for (node, ctx) in places {
            if self.custody.insert(CustodyKey::new(*node, ctx)) {
                self.record(at, command, "put custody", ctx.topic.as_bytes(), node.0 as u32);
            }
        }
        Ok(Done::Custody(at.index))
    }

    fn drop_places(&mut self, at: EntryId, command: &Command, places: &[(NodeId, PartitionContext)]) -> Done {
        for (node, ctx) in places {
            if self.custody.remove(&CustodyKey::new(*node, ctx)) {
                self.event(at, What::Dead(Dead::Custody(*node, *ctx)));
                self.record(at, command, "drop custody", ctx.topic.as_bytes(), node.0 as u32);
            }
        }
        Done::Custody(at.index)
    }

    fn custody_of(&self, change: &command::Custody) -> Result<(NodeId, PartitionContext), Refusal> {
        let wire =
            pb::Context { project: change.project.clone(), topic: change.topic.clone(), partition: change.partition };
        Ok((NodeId(change.node), wire::context_from(self.cluster, Some(&wire))?))
    }

    /// All of a batch, read before anything is changed.
    fn places_of(&self, change: &command::Custodies) -> Result<Vec<(NodeId, PartitionContext)>, Refusal> {
        if change.custody.len() > CUSTODIES_MAX {
            return refuse(Reason::Invalid, format!("at most {CUSTODIES_MAX} custody records at once"));
        }
        change.custody.iter().map(|custody| self.custody_of(custody)).collect()
    }
}
