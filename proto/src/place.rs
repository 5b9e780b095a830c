//! Where a batch belongs, and the chain that ties a partition's batches together.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::{ClusterId, Partition, ProjectId, SealedBytes, TopicId};

/// The partition that a batch belongs to, as the seal binds it.
///
/// It is not stored with a batch: whoever opens one supplies it, from where it *expects* the batch to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PartitionContext {
    /// The cluster.
    pub cluster: ClusterId,
    /// The project that owns the topic.
    pub project: ProjectId,
    /// The topic.
    pub topic: TopicId,
    /// The partition of the topic.
    pub partition: Partition,
}

impl PartitionContext {
    /// The length of [`Self::to_bytes`].
    pub const BYTES: usize = 52;

    /// `cluster ‖ project ‖ topic ‖ partition`.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(self.cluster.as_bytes());
        bytes[16..32].copy_from_slice(self.project.as_bytes());
        bytes[32..48].copy_from_slice(self.topic.as_bytes());
        bytes[48..].copy_from_slice(&self.partition.0.to_be_bytes());
        bytes
    }
}

/// A hash over a batch and everything before it in its partition.
///
/// Every batch names the link of its predecessor, so the order and completeness of a partition can be checked without
/// a key, also after its keys are gone.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Link(pub [u8; 32]);

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({self})")
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What the first batch of a partition names as its predecessor.
pub fn genesis(context: &PartitionContext) -> Link {
    let mut hash = Sha256::new();
    hash.update(b"ensign/genesis/v1");
    hash.update(context.to_bytes());
    Link(hash.finalize().into())
}

/// What the batch after `batch` names as its predecessor.
///
/// The ciphertext enters through its tag, so the link of a batch whose ciphertext has been dropped can still be computed.
pub fn link(context: &PartitionContext, batch: &SealedBytes) -> Link {
    let mut hash = Sha256::new();
    hash.update(b"ensign/link/v1");
    hash.update(context.to_bytes());
    hash.update(batch.header_bytes());
    hash.update(batch.salt());
    hash.update(batch.commit());
    hash.update(batch.tag());
    Link(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_its_fields_in_order() {
        let context = PartitionContext {
            cluster: ClusterId::from_bytes([1; 16]),
            project: ProjectId::from_bytes([2; 16]),
            topic: TopicId::from_bytes([3; 16]),
            partition: Partition(0x0405_0607),
        };
        let bytes = context.to_bytes();
        assert_eq!(bytes[..16], [1; 16]);
        assert_eq!(bytes[16..32], [2; 16]);
        assert_eq!(bytes[32..48], [3; 16]);
        assert_eq!(bytes[48..], [4, 5, 6, 7]);
    }

    #[test]
    fn every_partition_begins_with_a_link_of_its_own() {
        let context = |partition| PartitionContext {
            cluster: ClusterId::from_bytes([1; 16]),
            project: ProjectId::from_bytes([2; 16]),
            topic: TopicId::from_bytes([3; 16]),
            partition: Partition(partition),
        };
        // SHA-256 of the label and the context, computed by another implementation.
        assert_eq!(
            genesis(&context(0)).to_string(),
            "d7864c6aa3e0ebb962fca1c1bfb2780e7871875deb773f934f908e7037a06edf"
        );
        assert_ne!(genesis(&context(0)), genesis(&context(1)));
    }
}
