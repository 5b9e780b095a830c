//! Between the wire's messages and the vocabulary. A malformed message is one refusal that names the field.

use bytes::Bytes;
use ensign_proto::pb::vault::v1 as pb;
use ensign_proto::{
    Algorithm, ClusterId, DekId, KeyVersion, NodeId, Partition, PartitionContext, ProjectId, RingId, TopicId,
};

use crate::link::{Reason, Refusal};
use crate::wrap::{DekUse, KEY_BOX_LEN, WrappedDek};

/// What stopped being openable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Dead {
    /// One version of a ring.
    Version(RingId, KeyVersion),
    /// All versions of a ring.
    Ring(RingId),
    /// One node's custody of a partition.
    Custody(NodeId, PartitionContext),
}

pub(crate) fn malformed(field: &'static str) -> Refusal {
    Refusal::new(Reason::Invalid, format!("invalid {field} field"))
}

/// A sixteen-byte id.
pub(crate) fn id<T: for<'a> TryFrom<&'a [u8]>>(bytes: &[u8], field: &'static str) -> Result<T, Refusal> {
    T::try_from(bytes).map_err(|_| malformed(field))
}

pub(crate) fn bytes(id: &[u8; 16]) -> Bytes {
    Bytes::copy_from_slice(id)
}

pub(crate) fn context_to(ctx: &PartitionContext) -> pb::Context {
    pb::Context {
        project: bytes(ctx.project.as_bytes()),
        topic: bytes(ctx.topic.as_bytes()),
        partition: ctx.partition.0,
    }
}

pub(crate) fn context_from(cluster: ClusterId, wire: Option<&pb::Context>) -> Result<PartitionContext, Refusal> {
    let wire = wire.ok_or_else(|| malformed("context"))?;
    Ok(PartitionContext {
        cluster,
        project: id::<ProjectId>(&wire.project, "project")?,
        topic: id::<TopicId>(&wire.topic, "topic")?,
        partition: Partition(wire.partition),
    })
}

pub(crate) fn algorithm_from(wire: u32) -> Result<Algorithm, Refusal> {
    u8::try_from(wire).ok().and_then(|byte| Algorithm::try_from(byte).ok()).ok_or_else(|| malformed("alg"))
}

pub(crate) fn usage_from(wire: u32) -> Result<DekUse, Refusal> {
    DekUse::from_byte(wire).ok_or_else(|| malformed("use"))
}

pub(crate) fn wrapped_to(wrapped: &WrappedDek) -> pb::WrappedDek {
    pb::WrappedDek {
        dek: bytes(wrapped.dek.as_bytes()),
        ring: bytes(wrapped.ring.as_bytes()),
        version: wrapped.version.0,
        alg: wrapped.alg as u32,
        r#use: wrapped.usage as u32,
        r#box: wrapped.boxed.clone(),
    }
}

pub(crate) fn wrapped_from(wire: &pb::WrappedDek) -> Result<WrappedDek, Refusal> {
    if wire.r#box.len() != KEY_BOX_LEN {
        return Err(malformed("box"));
    }
    Ok(WrappedDek {
        dek: id::<DekId>(&wire.dek, "dek")?,
        ring: id::<RingId>(&wire.ring, "ring")?,
        version: KeyVersion(wire.version),
        alg: algorithm_from(wire.alg)?,
        usage: usage_from(wire.r#use)?,
        boxed: wire.r#box.clone(),
    })
}

pub(crate) fn dead_to(dead: &Dead) -> pb::Dead {
    let what = match dead {
        Dead::Version(ring, version) => {
            pb::dead::What::Version(pb::RingVersion { ring: bytes(ring.as_bytes()), version: version.0 })
        }
        Dead::Ring(ring) => pb::dead::What::Ring(bytes(ring.as_bytes())),
        Dead::Custody(node, ctx) => {
            pb::dead::What::Custody(pb::LostCustody { node: node.0, context: Some(context_to(ctx)) })
        }
    };
    pb::Dead { what: Some(what) }
}

pub(crate) fn dead_from(cluster: ClusterId, wire: &pb::Dead) -> Result<Dead, Refusal> {
    match wire.what.as_ref().ok_or_else(|| malformed("dead"))? {
        pb::dead::What::Version(which) => Ok(Dead::Version(id(&which.ring, "ring")?, KeyVersion(which.version))),
        pb::dead::What::Ring(ring) => Ok(Dead::Ring(id(ring, "ring")?)),
        pb::dead::What::Custody(lost) => {
            Ok(Dead::Custody(NodeId(lost.node), context_from(cluster, lost.context.as_ref())?))
        }
    }
}
