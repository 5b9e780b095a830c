//! What can go wrong with a change of the catalog, one enum an operation, said as what the caller can do.

use ensign_proto::{ClusterVersion, NodeId};
use thiserror::Error;

use super::command::Refusal;
use super::records::TopicState;
use crate::placement::planner::Unplaceable;

/// The change was not carried out, or nobody knows.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum WriteFailure {
    /// Nothing was changed: no leader could be reached in time. Try again.
    #[error("the catalog cannot be written at the moment: {cause}")]
    Unavailable {
        /// The last thing that went wrong.
        cause: String,
    },
    /// It was proposed, and may be carried out or may have been. Look, then decide.
    #[error("it is not known whether the catalog was changed: {cause}")]
    OutcomeUnknown {
        /// The last thing that went wrong.
        cause: String,
    },
    /// Nothing was changed: some nodes may not be able to read the change yet. Upgrade them.
    #[error("this needs version {needs} of the cluster, which is at version {active}: {why}")]
    NotYet {
        /// What it needs.
        needs: ClusterVersion,
        /// What the cluster has.
        active: ClusterVersion,
        /// Which nodes are behind, or what else holds the cluster back, and what to do about each.
        why: String,
    },
    /// Our bug; nothing was changed.
    #[error("the catalog refused a change: {cause}")]
    Internal {
        /// What it said.
        cause: String,
    },
}

/// The vault did not do its part, so the catalog was not asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("the vault could not be asked: {cause}")]
pub struct VaultFailure {
    /// What it said. No secret, no key.
    pub cause: String,
}

impl VaultFailure {
    /// A failure with this cause.
    pub fn new(cause: impl Into<String>) -> Self {
        Self { cause: cause.into() }
    }
}

/// Why this node could not catch up with the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("this node cannot catch up with the catalog at the moment: {cause}")]
pub struct RefreshError {
    /// The last thing that went wrong.
    pub cause: String,
}

/// Why the vault was not compared with the catalog, or not to the end.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReconcileError {
    /// The vault could not be read or written.
    #[error(transparent)]
    Vault(#[from] VaultFailure),
    /// What this node knows of the catalog may be old.
    #[error(transparent)]
    Refresh(#[from] RefreshError),
}

/// Why a node was not added.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PutNodeError {
    /// Another node has the name.
    #[error("another node of the cluster is called \"{name}\": set node.name to a name of its own")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The catalog has seen a later life of the node, or another process of this one.
    #[error(
        "life {seen} of node {node} has begun elsewhere, and this process is in life {shown} (each start of a data directory is one life): \
         two processes run under one node.id, one of them on a copy of the other's data directory; or this directory was lost, or set back \
         to an older state. Stop the process that does not belong. If this is the right one, start it again: it begins a life of its own. If \
         its data is the older, it does not know what the node promised since, and must not take part: add the machine under a new \
         node.id, with an empty data directory"
    )]
    LifeOver {
        /// The node.
        node: NodeId,
        /// What the catalog knows.
        seen: u64,
        /// What was shown.
        shown: u64,
    },
    /// The node was removed from the cluster.
    #[error(
        "node {node} was removed from the cluster: add the machine under a new node.id, with an empty data directory"
    )]
    Revoked {
        /// The node.
        node: NodeId,
    },
    /// The cluster is at a version that this build does not speak.
    #[error(
        "the cluster is at version {active}, and this build of node {node} speaks versions up to {speaks} only: run the newer version of \
         ensign again, or one that speaks version {active}"
    )]
    VersionTooOld {
        /// The node.
        node: NodeId,
        /// What it speaks.
        speaks: ClusterVersion,
        /// What the cluster has.
        active: ClusterVersion,
    },
    /// The cluster's version was raised meanwhile; try again.
    #[error("the cluster's version was raised meanwhile")]
    VersionRaised,
    /// It may have custody of some topics, which changes nothing by itself; try again.
    #[error(transparent)]
    Vault(#[from] VaultFailure),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why a join token was not made or used, or the authority not set.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JoinError {
    /// See there. Nothing was changed.
    #[error(transparent)]
    Refused(Refusal),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why an organization was not made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CreateOrganizationError {
    /// Another one has the name.
    #[error("an organization of this name exists already")]
    NameTaken,
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why a project was not made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CreateProjectError {
    /// No such organization.
    #[error("organization not found")]
    OrganizationUnknown,
    /// Another project of the organization has the name.
    #[error("a project of this name exists already")]
    NameTaken,
    /// Nothing is to be seen of it; try again.
    #[error(transparent)]
    Vault(#[from] VaultFailure),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why a topic was not made.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CreateTopicError {
    /// No such project.
    #[error("project not found")]
    ProjectUnknown,
    /// Another topic of the project has the name, or its hash.
    #[error("topic name already exists in project")]
    NameTaken,
    /// No nodes can hold it as asked.
    #[error(transparent)]
    Placement(#[from] Unplaceable),
    /// The cluster has as many topics as it can carry.
    #[error("the cluster has its limit of {limit} topics")]
    TooMany {
        /// How many.
        limit: usize,
    },
    /// The project has as many topics as its quota allows: destroy some, or have the quota raised.
    #[error(
        "the project has its limit of {limit} topics: destroy topics that are no longer needed, or ask an operator to raise the \
         quota (ensign quota set --topics)"
    )]
    Quota {
        /// How many.
        limit: u64,
    },
    /// The key ring that it should be sealed under was destroyed with its API key.
    #[error("the key ring was destroyed together with its API key: name another one")]
    RingShredded,
    /// Nothing is to be seen of it; try again.
    #[error(transparent)]
    Vault(#[from] VaultFailure),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why a quota was not changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SetQuotaError {
    /// No such project.
    #[error("project not found")]
    ProjectUnknown,
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why a topic was not changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ChangeTopicError {
    /// No such topic, or it is destroyed.
    #[error("topic not found")]
    Unknown,
    /// Its state does not allow it.
    #[error("the topic is in the {0:?} state")]
    State(TopicState),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why a topic was not bound to another key ring.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BindRingError {
    /// No such topic, or it is destroyed.
    #[error("topic not found")]
    Unknown,
    /// It takes no more events, so there is nothing to seal.
    #[error("the topic is in the {0:?} state")]
    State(TopicState),
    /// The ring was destroyed with its API key, or the topic had too many.
    #[error("{0}")]
    Refused(Refusal),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why nodes, placements or moves were not changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlaceError {
    /// No nodes can hold the replicas as asked.
    #[error(transparent)]
    Unplaceable(#[from] Unplaceable),
    /// The catalog's state does not allow it.
    #[error("{0}")]
    Refused(Refusal),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}

/// Why an API key was not made or changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ApiKeyError {
    /// No such API key.
    #[error("API key not found")]
    Unknown,
    /// No such organization.
    #[error("organization not found")]
    OrganizationUnknown,
    /// No such project in the organization.
    #[error("project not found")]
    ProjectUnknown,
    /// Another key has the id or the client id.
    #[error("another API key has this id or client id")]
    Taken,
    /// Its key ring does not allow it.
    #[error("{0}")]
    Ring(Refusal),
    /// See there.
    #[error(transparent)]
    Write(#[from] WriteFailure),
}
