//! The catalog: which organizations, projects, topics, API keys and nodes the cluster has. One Raft group, on every node.
//!
//! ```text
//! Catalog ── write ──▶ leader (here, or through ProposeLink) ──▶ log ──▶ CatalogMachine::apply, on every node
//!    └────── read ───▶ View: what this node has applied, at once                    └─▶ changes()
//! ```
//! Names, ids and states are here in clear; hashes of secrets, private keys and key rings are in the vault. What spans
//! both is written to the vault first, so that nothing here ever points at something that the vault does not have; what a crash
//! leaves between the two is put right by the leader (`reconcile`).
//! Applying is pure: whoever proposes picks ids and times. A command that arrives twice answers the same.
//! Not here: who may ask (`identity`, `rpc`), the events of a topic (`partition`).

mod command;
mod create;
mod errors;
mod freshness;
mod handle;
mod link;
mod machine;
mod moves;
mod paging;
mod placing;
mod quota;
mod reconcile;
mod records;
mod rings;
mod state;
pub mod testing;
#[cfg(test)]
mod tests;
mod vault;
mod view;
mod wire;

pub use command::{Command, Join, NewTopic, Outcome, Refusal, Response, TOPICS_BATCH_MAX};
pub use errors::{
    ApiKeyError, BindRingError, ChangeTopicError, CreateOrganizationError, CreateProjectError, CreateTopicError,
    JoinError, PlaceError, PutNodeError, ReconcileError, RefreshError, SetQuotaError, VaultFailure, WriteFailure,
};
pub use handle::{Catalog, CatalogParts, WhyNotYet};
pub use link::{AllAlive, Custody, Liveness, ProposeLink, ProposeLinkError, Replica, VaultHas, VaultWrites};
pub use machine::CatalogMachine;
pub use moves::{
    MovePhase, MoveReason, MoveReport, NodeState, Placement, PlacementDefaults, REPLICATION_MAX, Reassignment,
};
pub use paging::{Page, PageError, PageRequest};
pub use placing::PlacementWish;
pub use quota::{BUILT_IN, Change, Limit, PerResource, Quota, QuotaChange, Resource};
pub use reconcile::Reconciled;
pub use records::{
    ApiKey, ClusterAuthority, JoinToken, NodeRecord, Organization, Project, SigningKey, Topic, TopicPolicies,
    TopicState,
};
pub use rings::Bound;
pub use vault::VaultRings;
pub(crate) use vault::{Patience, is_passing};
pub use view::{TopicsSeen, View};
pub use wire::DecodeError;
