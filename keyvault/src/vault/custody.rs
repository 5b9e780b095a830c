//! Which node may have the data keys of which partition.

use std::ops::Bound;

use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{ClusterId, NodeId, Partition, PartitionContext};

use super::{Vault, page, unexpected};
use crate::link::{Reason, Refusal};
use crate::machine::{CUSTODIES_MAX, Change, Custodies, Custody, CustodyKey, Done, State};
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
        let custody = custody_from(self.0.config.cluster, request)?;
        self.propose_custody(actor, change(custody)).await
    }

    /// Puts or drops many records in one commit: all of them, or none.
    pub(super) async fn custodies(
        &self,
        actor: &str,
        request: &pb::CustodiesRequest,
        change: fn(Custodies) -> Change,
    ) -> Result<pb::CustodyReply, Refusal> {
        self.must_lead()?;
        let batch = custodies_from(self.0.config.cluster, request)?;
        self.propose_custody(actor, change(batch)).await
    }

    async fn propose_custody(&self, actor: &str, change: Change) -> Result<pb::CustodyReply, Refusal> {
        match self.propose(actor, change).await? {
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

fn custody_from(cluster: ClusterId, request: &pb::CustodyRequest) -> Result<Custody, Refusal> {
    let ctx = wire::context_from(cluster, request.context.as_ref())?;
    if request.node == 0 {
        return Err(wire::malformed("node"));
    }
    Ok(Custody {
        node: request.node,
        project: wire::bytes(ctx.project.as_bytes()),
        topic: wire::bytes(ctx.topic.as_bytes()),
        partition: ctx.partition.0,
    })
}

pub(crate) fn custodies_from(cluster: ClusterId, request: &pb::CustodiesRequest) -> Result<Custodies, Refusal> {
    let records = &request.custody;
    if records.is_empty() || records.len() > CUSTODIES_MAX {
        let message = format!("custody: 1 to {CUSTODIES_MAX} records at once, not {}", records.len());
        return Err(Refusal::new(Reason::Invalid, message));
    }
    let custody = records.iter().map(|record| custody_from(cluster, record)).collect::<Result<_, _>>()?;
    Ok(Custodies { custody })
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
