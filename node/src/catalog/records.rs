//! What the catalog knows: plain values, the same on every replica.

use std::collections::BTreeSet;

use bytes::Bytes;
use ensign_proto::{
    ApiKeyId, ClusterVersion, GroupId, NodeId, OrgId, Partition, PermissionSet, ProjectId, RingId, TopicId, TopicName,
};
use ensign_raft::env::UnixNanos;

use super::moves::{NodeState, Placement, Reassignment};

/// The outermost tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Organization {
    /// Its id.
    pub id: OrgId,
    /// Its name; unique in the cluster.
    pub name: String,
    /// When it was made.
    pub created: UnixNanos,
}

/// The unit of isolation: its topics are sealed under its ring, and its API keys see its topics only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    /// Its id.
    pub id: ProjectId,
    /// Whose it is.
    pub org: OrgId,
    /// Its name; unique in its organization.
    pub name: String,
    /// The key ring of its topics; exists in the vault before the project exists here.
    pub ring: RingId,
    /// When it was made.
    pub created: UnixNanos,
}

/// Where a topic is in its life; it only ever moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TopicState {
    /// Takes events and gives them.
    Ready,
    /// Archived: gives events and takes none.
    Readonly,
    /// Being destroyed; the name is taken until [`super::Catalog::finish_destroy`].
    Deleting,
}

/// Policies, stored as the client sent them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TopicPolicies {
    /// An encoded `ensign.v1beta1.Deduplication`; empty for none.
    pub deduplication: Bytes,
    /// A `ShardingStrategy` number; 0 for unknown.
    pub sharding: i32,
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its id.
    pub id: TopicId,
    /// Whose it is.
    pub project: ProjectId,
    /// Whose project it is.
    pub org: OrgId,
    /// Its name; unique in its project, by hash.
    pub name: TopicName,
    /// The Raft group of its partition; never reused.
    pub group: GroupId,
    /// Its one partition.
    pub partition: Partition,
    /// The nodes that hold a replica. Empty for a topic that was made before placement was kept: then all founding nodes do.
    pub replicas: BTreeSet<NodeId>,
    /// Where its replicas may be, and how many.
    pub placement: Placement,
    /// How many moves of its replicas are over. Only at 0 may a replica found the topic's group.
    pub assignment: u64,
    /// The move that is on.
    pub reassignment: Option<Reassignment>,
    /// The key ring that its events are sealed under, but for those of publishers with a ring of their own.
    pub ring: RingId,
    /// The rings that it was bound to before: batches of those days are still sealed under them.
    pub former_rings: BTreeSet<RingId>,
    /// Where it is in its life.
    pub state: TopicState,
    /// What the client asked for.
    pub policies: TopicPolicies,
    /// When it was made.
    pub created: UnixNanos,
    /// When its state or policies last changed.
    pub modified: UnixNanos,
}

/// An API key, without its secret: only a hash of that exists, in the vault, under this id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Its id, the subject of its tokens.
    pub id: ApiKeyId,
    /// What its holder logs in with; not secret, unique.
    pub client_id: String,
    /// Its name, for people.
    pub name: String,
    /// Whose it is.
    pub org: OrgId,
    /// The one project it works in; none for an operator's key.
    pub project: Option<ProjectId>,
    /// What it may do.
    pub permissions: PermissionSet,
    /// An operator's key: administers the cluster, never carries data.
    pub admin: bool,
    /// When it was made.
    pub created: UnixNanos,
    /// When it was revoked; for ever.
    pub revoked_at: Option<UnixNanos>,
    /// The key ring that its events are sealed under, whichever topic they go to; none for that of the topic.
    pub ring: Option<RingId>,
    /// It was revoked together with that ring: nothing is bound to the ring any more.
    pub shredded: bool,
}

/// The public half of a token-signing key; the private half is in the vault under the same id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SigningKey {
    /// A ULID: the `kid` of its tokens.
    pub kid: [u8; 16],
    /// The RSA public key, PKCS#1 DER.
    pub public_key: Bytes,
    /// When it was made, and published.
    pub created: UnixNanos,
    /// When nodes may begin to sign with it; the youngest that may, does.
    pub signs_from: UnixNanos,
    /// From when on it verifies nothing; none until it is retired.
    pub verifies_until: Option<UnixNanos>,
}

/// A node of the cluster, where it is reached, and which of its lives is the newest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeRecord {
    /// Its id.
    pub id: NodeId,
    /// Host and port for peers.
    pub peer: String,
    /// Host and port for gRPC clients; empty when not told.
    pub grpc: String,
    /// Host and port for HTTP clients; empty when not told.
    pub http: String,
    /// Its name, for people; unique in the cluster. Empty in what was written before nodes had names.
    pub name: String,
    /// The region it stands in; empty as for the name.
    pub region: String,
    /// The zone of the region; empty as for the name.
    pub zone: String,
    /// How often its data directory was started, at the newest registration; 0 before the first.
    pub incarnation: u64,
    /// What the process of that start drew: tells apart two copies of one directory.
    pub process: u64,
    /// Whether it may hold replicas. Kept by the catalog: registering again does not change it.
    pub state: NodeState,
    /// The SHA-256 of the public key that it joined with; empty for a node that did not join by token. The catalog keeps it.
    pub key: Bytes,
    /// The newest version that the process of its newest life speaks; see [`NodeRecord::speaks`].
    pub version: ClusterVersion,
    /// It holds the cluster's root key, so it may vote in the vault.
    pub vault: bool,
}

impl NodeRecord {
    /// The record without what nodes of `version` would drop from it.
    #[must_use]
    pub(super) fn for_version(self, version: ClusterVersion) -> Self {
        if version >= ClusterVersion::V2 {
            return self;
        }
        let Self { id, peer, grpc, http, .. } = self;
        Self { id, peer, grpc, http, ..Self::default() }
    }

    /// Whether a process of it has ever registered. Of a node that did not join by token, and is not told to have lived, nobody knows: it
    /// counts as one that has.
    pub fn has_started(&self) -> bool {
        self.incarnation > 0 || self.key.is_empty()
    }

    /// The newest version that it spoke when it registered last.
    pub fn speaks(&self) -> ClusterVersion {
        // Who has a name or tells its life is no node of the first version.
        if self.incarnation > 0 || !self.name.is_empty() { self.version.max(ClusterVersion::V2) } else { self.version }
    }
}

/// The certificate authority that the cluster signs with; its private key is in the vault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterAuthority {
    /// Its certificate, PEM.
    pub certificate: String,
    /// When the cluster was given it.
    pub created: UnixNanos,
}

/// A token that lets machines join, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// A ULID.
    pub id: [u8; 16],
    /// The SHA-256 of its secret, which is random.
    pub hash: [u8; 32],
    /// When it was made.
    pub created: UnixNanos,
    /// From when on it lets nobody in.
    pub expires: UnixNanos,
    /// How many machines it lets in.
    pub uses: u32,
    /// How many it has let in.
    pub used: u32,
    /// When it was revoked; for ever.
    pub revoked_at: Option<UnixNanos>,
}
