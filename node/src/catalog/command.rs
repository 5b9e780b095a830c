//! What can be asked of the catalog, and what it answers.
//!
//! The proposer chooses ids and times, so applying is a pure function, and a command that arrives twice answers the same.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::{ApiKeyId, ClusterVersion, NodeId, OrgId, ProjectId, RingId, TopicId, TopicName};
use ensign_raft::env::UnixNanos;
use thiserror::Error;

use super::moves::{MoveReason, MoveReport, NodeState, Placement};
use super::quota::QuotaChange;
use super::records::{
    ApiKey, ClusterAuthority, JoinToken, NodeRecord, Organization, Project, SigningKey, Topic, TopicPolicies,
    TopicState,
};

/// The most topics that one command makes: its answer has to travel, and what applies at once stays short.
pub const TOPICS_BATCH_MAX: usize = 256;

/// A change of the catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Adds a node, or replaces what is known of it. A life that is over cannot.
    PutNode(NodeRecord),
    /// Adds an organization.
    CreateOrganization {
        /// Its id.
        id: OrgId,
        /// Its name.
        name: String,
        /// Now.
        at: UnixNanos,
    },
    /// Adds a project, whose ring the vault already has.
    CreateProject(Project),
    /// Adds a topic, whose custody the vault already has.
    CreateTopic(NewTopic),
    /// Adds topics, at most [`TOPICS_BATCH_MAX`], each for itself: what is refused of one changes nothing for the others.
    CreateTopics(Vec<NewTopic>),
    /// Moves a topic forward; a state that it has reached or passed already is no error where that means the same.
    SetTopicState {
        /// Which.
        topic: TopicId,
        /// [`TopicState::Readonly`] or [`TopicState::Deleting`].
        state: TopicState,
        /// Now.
        at: UnixNanos,
    },
    /// Replaces a topic's policies.
    SetTopicPolicies {
        /// Which.
        topic: TopicId,
        /// With what.
        policies: TopicPolicies,
        /// Now.
        at: UnixNanos,
    },
    /// Forgets a topic whose data is gone, and frees its name.
    FinishDestroy {
        /// Which.
        topic: TopicId,
        /// Now.
        at: UnixNanos,
    },
    /// Binds what a topic is given from now on to another key ring.
    SetTopicRing {
        /// Which.
        topic: TopicId,
        /// To which: one of the topic's project, in the vault.
        ring: RingId,
        /// Now.
        at: UnixNanos,
    },
    /// Adds an API key, whose hash the vault already has.
    CreateApiKey(ApiKey),
    /// Revokes an API key, for ever.
    RevokeApiKey {
        /// Which.
        key: ApiKeyId,
        /// Now.
        at: UnixNanos,
    },
    /// Revokes an API key, for ever, and lets nothing be bound to its ring any more: that is about to be destroyed.
    ShredApiKey {
        /// Which.
        key: ApiKeyId,
        /// Now.
        at: UnixNanos,
    },
    /// Publishes a token-signing key, whose private half the vault already has.
    AddSigningKey(SigningKey),
    /// Lets a token-signing key run out.
    RetireSigningKey {
        /// Which.
        kid: [u8; 16],
        /// From when on it verifies nothing.
        verifies_until: UnixNanos,
    },
    /// Changes some of a project's limits, or of those of every project that has none of its own.
    SetQuota {
        /// Whose; none for the cluster's default.
        project: Option<ProjectId>,
        /// What to do with each limit.
        change: QuotaChange,
    },
    /// Keeps, once, who founded the cluster and how many replicas a topic has that asks for no number.
    SetPlacementDefaults {
        /// The founding nodes.
        founders: BTreeSet<NodeId>,
        /// Replicas of a topic.
        replication: u32,
    },
    /// Drains a node, takes that back, or removes it for ever.
    SetNodeState {
        /// Which.
        node: NodeId,
        /// What it shall be.
        state: NodeState,
        /// Now.
        at: UnixNanos,
    },
    /// Replaces where a topic's replicas may be. What does not fit is moved later.
    AlterTopic {
        /// Which.
        topic: TopicId,
        /// With what.
        placement: Placement,
        /// Now.
        at: UnixNanos,
    },
    /// Begins to move a topic's replicas; one move at a time.
    StartMove {
        /// Which.
        topic: TopicId,
        /// What the proposer saw: moves that were over then.
        assignment: u64,
        /// Who shall hold the replicas.
        target: BTreeSet<NodeId>,
        /// Why.
        reason: MoveReason,
        /// Now.
        at: UnixNanos,
    },
    /// Turns a move round: the replicas go back to where they were.
    CancelMove {
        /// Which.
        topic: TopicId,
        /// What the proposer saw.
        assignment: u64,
        /// Now.
        at: UnixNanos,
    },
    /// Ends a move, once `replicas` are the group's voters.
    FinishMove {
        /// Which.
        topic: TopicId,
        /// What the proposer saw.
        assignment: u64,
        /// Who holds the replicas now.
        replicas: BTreeSet<NodeId>,
    },
    /// Says how far a move is.
    ReportMove {
        /// Which.
        topic: TopicId,
        /// What the proposer saw.
        assignment: u64,
        /// How far.
        report: MoveReport,
    },
    /// Gives the cluster its certificate authority, once; the vault already has the private key.
    SetAuthority(ClusterAuthority),
    /// Adds a join token.
    CreateJoinToken(JoinToken),
    /// Revokes a join token, for ever.
    RevokeJoinToken {
        /// Which.
        token: [u8; 16],
        /// Now.
        at: UnixNanos,
    },
    /// Lets a machine in: gives it a number that no node ever had, and uses the token once.
    Join(Join),
    /// Ends a node's being one, for ever: nobody speaks to it, whatever certificate it shows.
    RevokeNode {
        /// Which.
        node: NodeId,
        /// Now.
        at: UnixNanos,
    },
    /// Raises the cluster's version, for ever. Proposed only once every node speaks it: see [`super::Catalog::raise_version`].
    SetClusterVersion(ClusterVersion),
}

/// A machine that wants to be a node, and whose token was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Join {
    /// The token that it showed.
    pub token: [u8; 16],
    /// The SHA-256 of its public key: asking again with the same one answers the same node.
    pub key: [u8; 32],
    /// How it wants to be called; empty: after its number.
    pub name: String,
    /// Where it stands.
    pub region: String,
    /// Where in the region.
    pub zone: String,
    /// Host and port of its peer listener.
    pub peer: String,
    /// No number up to this one is given out: nodes that are configured and have not registered yet may have them.
    pub above: NodeId,
    /// The newest version that it speaks.
    pub version: ClusterVersion,
    /// Now.
    pub at: UnixNanos,
}

/// A topic that is to be made; the catalog adds organization and group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTopic {
    /// Its id.
    pub id: TopicId,
    /// Whose it is.
    pub project: ProjectId,
    /// Its name.
    pub name: TopicName,
    /// The key ring that it is sealed under.
    pub ring: RingId,
    /// The nodes that shall hold a replica.
    pub replicas: BTreeSet<NodeId>,
    /// Where replicas may be, and how many.
    pub placement: Placement,
    /// What the client asked for.
    pub policies: TopicPolicies,
    /// Now.
    pub at: UnixNanos,
}

/// What a command did, or had done when it arrived before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing to show.
    Done,
    /// The organization as it is now.
    Organization(Arc<Organization>),
    /// The project as it is now.
    Project(Arc<Project>),
    /// The topic as it is now.
    Topic(Arc<Topic>),
    /// The topics as they are now, or why one was not made, in the command's order.
    Topics(Vec<Result<Arc<Topic>, Refusal>>),
    /// The API key as it is now.
    ApiKey(Arc<ApiKey>),
    /// The node as it is now.
    Node(Arc<NodeRecord>),
}

/// Join tokens that the cluster keeps.
pub(super) const JOIN_TOKENS_MAX: usize = 1_000;

/// Key rings that a topic was bound to before.
pub(super) const FORMER_RINGS_MAX: usize = 64;

/// Why a command changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Refusal {
    /// No such organization.
    #[error("organization not found")]
    OrganizationUnknown,
    /// No such project.
    #[error("project not found")]
    ProjectUnknown,
    /// No such topic, or it was destroyed.
    #[error("topic not found")]
    TopicUnknown,
    /// No such API key.
    #[error("API key not found")]
    ApiKeyUnknown,
    /// No such token-signing key.
    #[error("signing key not found")]
    SigningKeyUnknown,
    /// Another one has the name.
    #[error("the name is taken")]
    NameTaken,
    /// Another one has the id.
    #[error("the id is taken")]
    IdTaken,
    /// The topic's state does not allow it.
    #[error("the topic is {0:?}")]
    TopicState(TopicState),
    /// The node has begun a later life than the one that asks, or another process began the same one.
    #[error("this life of the node is over")]
    LifeOver,
    /// The project has as many topics as its quota allows.
    #[error("the project has as many topics as its quota allows")]
    TopicQuota,
    /// Another node is reached at the address.
    #[error("another node of the cluster has this address")]
    AddressTaken,
    /// No such join token.
    #[error("the cluster has no such join token")]
    TokenUnknown,
    /// The token's time is over.
    #[error("the join token has expired: make another one with `ensign cluster token create`")]
    TokenExpired,
    /// It has let in as many machines as it may.
    #[error("the join token has been used as often as it may be: make another one with `ensign cluster token create`")]
    TokenUsedUp,
    /// It was revoked.
    #[error("the join token was revoked: make another one with `ensign cluster token create`")]
    TokenRevoked,
    /// There are as many join tokens as the cluster keeps.
    #[error(
        "the cluster keeps {JOIN_TOKENS_MAX} join tokens at most: revoke some, and they are forgotten after a week"
    )]
    TokensTooMany,
    /// The node was removed, for ever.
    #[error("the node was removed from the cluster: it may come back only under a new number")]
    NodeRevoked,
    /// The cluster has another authority already.
    #[error("the cluster has another certificate authority already")]
    AuthorityExists,
    /// The node does not speak the cluster's version.
    #[error(
        "the cluster is at a version that the node does not speak: run a newer version of ensign on it (`ensign cluster version` shows \
         which is needed)"
    )]
    VersionTooOld,
    /// The bytes are no command that this version knows.
    #[error("the command cannot be read")]
    Unreadable,
    /// No such node.
    #[error("node not found")]
    NodeUnknown,
    /// It holds replicas, or is about to.
    #[error("the node holds replicas")]
    NodeHolds,
    /// It is not drained.
    #[error("the node is not drained")]
    NodeActive,
    /// No other node could hold replicas.
    #[error("no other node of the cluster is active")]
    LastNode,
    /// A move of the topic is on.
    #[error("the topic's replicas are being moved")]
    MoveOn,
    /// No move of the topic is on.
    #[error("the topic's replicas are not being moved")]
    NoMove,
    /// A move ended since the proposer looked.
    #[error("the topic's replicas were moved meanwhile")]
    MoveStale,
    /// A node that shall get a replica is unknown, drained or removed.
    #[error("a node of the target cannot take replicas")]
    TargetUnusable,
    /// A node that shall get a replica is outside the topic's regions.
    #[error("a node of the target is outside the regions of the topic")]
    RegionForbidden,
    /// Not a number of replicas.
    #[error("a topic has 1 to 9 replicas")]
    Replication,
    /// More replicas than nodes that may hold one.
    #[error("fewer nodes than replicas may hold one")]
    TooFewNodes,
    /// No active node is in the region.
    #[error("no active node is in the region")]
    RegionUnknown,
    /// The key ring is destroyed together with the API key that it belonged to.
    #[error("the key ring was destroyed together with its API key")]
    RingShredded,
    /// Something else is sealed under the API key's ring.
    #[error("something else is sealed under the key ring of the API key")]
    RingShared,
    /// The API key has no key ring of its own.
    #[error("the API key has no key ring of its own")]
    NoRing,
    /// The topic was bound to as many rings as are remembered.
    #[error(
        "the topic was bound to {FORMER_RINGS_MAX} other key rings before: take one of those, or make another topic"
    )]
    RingsTooMany,
}

/// The state machine's answer.
pub type Response = Result<Outcome, Refusal>;

impl Command {
    /// The oldest version whose nodes can apply the command as it is, and keep all of it in their snapshots.
    ///
    /// Every command that is added here needs the version that it came with, and a field that is added to a record is one that
    /// older nodes drop: then [`Command::for_version`] leaves it out, or the command needs the newer version.
    pub fn needs(&self) -> ClusterVersion {
        let newer = match self {
            Self::PutNode(node) => node.speaks() > ClusterVersion::V1,
            Self::CreateTopic(topic) => !topic.replicas.is_empty() || topic.placement != Placement::default(),
            Self::CreateApiKey(key) => key.ring.is_some(),
            Self::CreateOrganization { .. }
            | Self::CreateProject(_)
            | Self::SetTopicState { .. }
            | Self::SetTopicPolicies { .. }
            | Self::FinishDestroy { .. }
            | Self::RevokeApiKey { .. }
            | Self::AddSigningKey(_)
            | Self::RetireSigningKey { .. }
            | Self::SetClusterVersion(_) => false,
            Self::CreateTopics(_)
            | Self::SetTopicRing { .. }
            | Self::ShredApiKey { .. }
            | Self::SetQuota { .. }
            | Self::SetAuthority(_)
            | Self::CreateJoinToken(_)
            | Self::RevokeJoinToken { .. }
            | Self::Join(_)
            | Self::RevokeNode { .. }
            | Self::SetPlacementDefaults { .. }
            | Self::SetNodeState { .. }
            | Self::AlterTopic { .. }
            | Self::StartMove { .. }
            | Self::CancelMove { .. }
            | Self::FinishMove { .. }
            | Self::ReportMove { .. } => true,
        };
        if newer { ClusterVersion::V2 } else { ClusterVersion::V1 }
    }

    /// The command without what nodes of `version` would drop, where it can do without.
    #[must_use]
    pub(super) fn for_version(self, version: ClusterVersion) -> Self {
        if version >= ClusterVersion::V2 {
            return self;
        }
        match self {
            Self::PutNode(node) => Self::PutNode(node.for_version(version)),
            // No replicas named means all founding nodes, which is what they are as long as nodes cannot join.
            Self::CreateTopic(topic) => {
                let (replicas, placement) = (BTreeSet::new(), Placement::default());
                Self::CreateTopic(NewTopic { replicas, placement, ..topic })
            }
            other => other,
        }
    }

    /// The command as the log carries it.
    pub fn encode(&self) -> Bytes {
        super::wire::encode_command(self)
    }

    /// The command of these bytes.
    ///
    /// # Errors
    /// A wrong checksum, a version or a command that this build does not know, or a field that cannot be.
    pub fn decode(bytes: &Bytes) -> Result<Self, super::DecodeError> {
        super::wire::decode_command(bytes)
    }
}
