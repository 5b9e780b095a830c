//! Which node may have the data keys of which partition.

use std::ops::Bound;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{NodeId, Partition, PartitionContext};

use super::{Vault, page, unexpected};
use crate::link::Refusal;
use crate::machine::{Change, Custody, CustodyKey, Done, State};
use crate::wire;

impl Vault {
    /// Puts or drops a record.
    pub(super) async fn custody(
        &self,
        actor: &str,
        request: &pb::CustodyRequest,
        change: fn(Custody) -> Change,
    ) -> Result<pb::CustodyReply, Refusal> {
        self.must_lead()?;
        let ctx = wire::context_from(self.0.config.cluster, request.context.as_ref())?;
        if request.node == 0 {
            return Err(wire::malformed("node"));
        }
        let custody = Custody {
            node: request.node,
            project: wire::bytes(ctx.project.as_bytes()),
            topic: wire::bytes(ctx.topic.as_bytes()),
            partition: ctx.partition.0,
        };
        match self.propose(actor, change(custody)).await? {
            Done::Custody(index) => Ok(pb::CustodyReply { index: index.0 }),
            other => Err(unexpected(&other)),
        }
    }

    /// A page of the records, as of now.
    pub(super) async fn list_custody(&self, request: &pb::ListCustodyRequest) -> Result<pb::ListCustodyReply, Refusal> {
        self.read_index().await?;
        self.inspect(|state| custody_page(state, request))
    }
}

pub(crate) fn custody_page(state: &State, request: &pb::ListCustodyRequest) -> Result<pb::ListCustodyReply, Refusal> {
    let after = match &request.after {
        Some(after) => {
            let ctx = wire::context_from(state.cluster, after.context.as_ref())?;
            Bound::Excluded(CustodyKey::new(NodeId(after.node), &ctx))
        }
        None => Bound::Unbounded,
    };
    let row = |key: &CustodyKey| {
        let ctx = PartitionContext {
            cluster: state.cluster,
            project: key.project,
            topic: key.topic,
            partition: Partition(key.partition),
        };
        pb::CustodyRequest { node: key.node.0, context: Some(wire::context_to(&ctx)) }
    };
    let (custody, more) = page(state.custody.range((after, Bound::Unbounded)).map(row), request.limit);
    Ok(pb::ListCustodyReply { custody, more })
}
