//! What administrators are told. The codes are those that `admin.proto` lists.
#![deny(clippy::wildcard_enum_match_arm)]

use ensign_keyvault::{CallError, Reason};
use tonic::Status;
use tracing::{error, warn};

use crate::catalog::{
    ApiKeyError, BindRingError, CreateOrganizationError, CreateProjectError, CreateTopicError, JoinError, PlaceError,
    RefreshError, Refusal, SetQuotaError, VaultFailure, WriteFailure,
};
use crate::identity::CreateKeyError;
use crate::join::{AuthorityUnavailable, CreateTokenError};

/// The state that this node knows may be old.
pub(super) fn stale(error: &RefreshError) -> Status {
    Status::unavailable(error.to_string())
}

/// A change of the catalog that was not made, or nobody knows.
pub(super) fn write_failed(failure: &WriteFailure) -> Status {
    match failure {
        WriteFailure::Unavailable { cause } => {
            warn!(cause, "the catalog cannot be written");
            Status::unavailable("the catalog cannot be written at the moment, please try again")
        }
        WriteFailure::OutcomeUnknown { cause } => {
            warn!(cause, "a change of the catalog has an unknown outcome");
            Status::deadline_exceeded("it is not known whether the change was made, please look before trying again")
        }
        WriteFailure::NotYet { .. } => Status::failed_precondition(failure.to_string()),
        WriteFailure::Internal { cause } => {
            error!(cause, "the catalog refused a change");
            Status::internal("the change could not be made")
        }
    }
}

fn vault_failed(failure: &VaultFailure) -> Status {
    warn!(cause = failure.cause, "the vault cannot be written");
    Status::unavailable("the key vault cannot be written at the moment, please try again")
}

/// An organization that was not made.
pub(super) fn create_organization(error: &CreateOrganizationError) -> Status {
    match error {
        CreateOrganizationError::NameTaken => Status::already_exists(error.to_string()),
        CreateOrganizationError::Write(failure) => write_failed(failure),
    }
}

/// A join token that was not made.
pub(super) fn create_join_token(error: &CreateTokenError) -> Status {
    match error {
        CreateTokenError::Ttl | CreateTokenError::Uses => Status::invalid_argument(error.to_string()),
        CreateTokenError::Authority(AuthorityUnavailable::ByHand) => Status::failed_precondition(error.to_string()),
        CreateTokenError::Authority(AuthorityUnavailable::Vault(_)) => Status::unavailable(error.to_string()),
        CreateTokenError::Authority(AuthorityUnavailable::Unusable(_)) => {
            error!(%error, "the cluster's authority cannot sign");
            Status::internal(error.to_string())
        }
        CreateTokenError::Catalog(error) => join_token(error),
    }
}

/// A join token that was not changed.
pub(super) fn join_token(error: &JoinError) -> Status {
    match error {
        JoinError::Refused(Refusal::TokenUnknown) => Status::not_found(error.to_string()),
        JoinError::Refused(Refusal::TokensTooMany) => Status::resource_exhausted(error.to_string()),
        JoinError::Refused(_) => Status::failed_precondition(error.to_string()),
        JoinError::Write(failure) => write_failed(failure),
    }
}

/// A project that was not made.
pub(super) fn create_project(error: &CreateProjectError) -> Status {
    match error {
        CreateProjectError::OrganizationUnknown => Status::not_found(error.to_string()),
        CreateProjectError::NameTaken => Status::already_exists(error.to_string()),
        CreateProjectError::Vault(failure) => vault_failed(failure),
        CreateProjectError::Write(failure) => write_failed(failure),
    }
}

/// Topics that were not made, or one of them.
pub(super) fn create_topics(error: &CreateTopicError) -> Status {
    match error {
        CreateTopicError::ProjectUnknown => Status::not_found(error.to_string()),
        CreateTopicError::NameTaken => Status::already_exists(error.to_string()),
        CreateTopicError::TooMany { .. } | CreateTopicError::Quota { .. } => {
            Status::resource_exhausted(error.to_string())
        }
        CreateTopicError::Placement(why) => crate::status::unplaceable(why),
        CreateTopicError::RingShredded => Status::failed_precondition(error.to_string()),
        CreateTopicError::Vault(failure) => vault_failed(failure),
        CreateTopicError::Write(failure) => write_failed(failure),
    }
}

/// A quota that was not changed.
pub(super) fn set_quota(error: &SetQuotaError) -> Status {
    match error {
        SetQuotaError::ProjectUnknown => Status::not_found(error.to_string()),
        SetQuotaError::Write(failure) => write_failed(failure),
    }
}

/// A topic that was not bound to another key ring.
pub(super) fn bind_ring(error: &BindRingError) -> Status {
    match error {
        BindRingError::Unknown => Status::not_found(error.to_string()),
        BindRingError::State(state) => {
            let name = crate::status::state_name(*state);
            let message =
                format!("the topic is in the {name} state: it takes no more events, so there is nothing to seal");
            Status::failed_precondition(message)
        }
        BindRingError::Refused(_) => Status::failed_precondition(error.to_string()),
        BindRingError::Write(failure) => write_failed(failure),
    }
}

/// An API key that was not made.
pub(super) fn create_api_key(error: &CreateKeyError) -> Status {
    match error {
        CreateKeyError::Name | CreateKeyError::Permissions | CreateKeyError::NoProject => {
            Status::invalid_argument(error.to_string())
        }
        CreateKeyError::Busy => Status::resource_exhausted("too many logins wait to be hashed, please try again"),
        CreateKeyError::Vault(cause) => {
            warn!(%cause, "the hash of an API key cannot be kept");
            Status::unavailable("the key vault cannot be written at the moment, please try again")
        }
        CreateKeyError::Catalog(error) => api_key(error),
    }
}

/// An API key that was not changed.
pub(super) fn api_key(error: &ApiKeyError) -> Status {
    match error {
        ApiKeyError::Unknown | ApiKeyError::OrganizationUnknown | ApiKeyError::ProjectUnknown => {
            Status::not_found(error.to_string())
        }
        ApiKeyError::Taken => Status::already_exists(error.to_string()),
        ApiKeyError::Ring(_) => Status::failed_precondition(error.to_string()),
        ApiKeyError::Write(failure) => write_failed(failure),
    }
}

/// A node, a placement or a move that was not changed.
pub(super) fn place(error: &PlaceError) -> Status {
    let refusal = match error {
        PlaceError::Unplaceable(why) => return crate::status::unplaceable(why),
        PlaceError::Write(failure) => return write_failed(failure),
        PlaceError::Refused(refusal) => refusal,
    };
    let message = refusal.to_string();
    match refusal {
        Refusal::NodeUnknown
        | Refusal::TopicUnknown
        | Refusal::OrganizationUnknown
        | Refusal::ProjectUnknown
        | Refusal::ApiKeyUnknown
        | Refusal::SigningKeyUnknown
        | Refusal::TokenUnknown => Status::not_found(message),
        Refusal::Replication => Status::invalid_argument(message),
        Refusal::TopicQuota => Status::resource_exhausted(message),
        Refusal::MoveStale => Status::aborted(format!("{message}: look again, then decide")),
        Refusal::TopicState(state) => {
            let name = crate::status::state_name(*state);
            Status::failed_precondition(format!("the topic is in the {name} state: its replicas do not move any more"))
        }
        Refusal::NodeRevoked
        | Refusal::NodeHolds
        | Refusal::NodeActive
        | Refusal::LastNode
        | Refusal::MoveOn
        | Refusal::NoMove
        | Refusal::TargetUnusable
        | Refusal::RegionForbidden
        | Refusal::TooFewNodes
        | Refusal::RegionUnknown
        | Refusal::VersionTooOld
        | Refusal::TokenExpired
        | Refusal::TokenUsedUp
        | Refusal::TokenRevoked
        | Refusal::TokensTooMany
        | Refusal::RingShredded
        | Refusal::RingShared
        | Refusal::NoRing
        | Refusal::RingsTooMany => Status::failed_precondition(message),
        Refusal::NameTaken
        | Refusal::IdTaken
        | Refusal::LifeOver
        | Refusal::AuthorityExists
        | Refusal::AddressTaken => Status::already_exists(message),
        Refusal::Unreadable => Status::internal(message),
    }
}

/// A key ring that was not read or changed.
pub(crate) fn vault(error: &CallError) -> Status {
    let refusal = match error {
        CallError::Unreachable(cause) => {
            warn!(%cause, "the vault cannot be reached");
            return Status::unavailable("the key vault cannot be reached at the moment, please try again");
        }
        CallError::Malformed { what } => {
            error!(what, "the vault's answer makes no sense");
            return Status::internal("the key vault answered something unexpected");
        }
        CallError::Refused(refusal) => refusal,
    };
    let message = refusal.message.clone();
    match refusal.reason {
        Reason::NotFound => Status::not_found(message),
        Reason::AlreadyExists => Status::already_exists(message),
        Reason::Invalid => Status::invalid_argument(message),
        Reason::Revoked | Reason::Disabled | Reason::NoActiveVersion | Reason::Conflict => {
            Status::failed_precondition(message)
        }
        Reason::NotGranted => Status::permission_denied(message),
        Reason::Exhausted => Status::resource_exhausted(message),
        Reason::NotLeader | Reason::Unavailable => Status::unavailable(message),
        // Where the root key lies is no business of tenants.
        Reason::Sealed => {
            warn!(cause = message, "the vault is sealed");
            Status::unavailable("the key vault is sealed: an operator has to unseal it (`ensign vault status`)")
        }
        Reason::OutcomeUnknown => Status::deadline_exceeded(message),
        Reason::Pending => Status::deadline_exceeded(
            "no node gets these keys any more, but not all have given them up yet: repeat the call to wait on",
        ),
        Reason::Damaged => Status::data_loss(message),
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::ClusterVersion;

    use super::*;

    #[test]
    fn an_operator_hears_which_nodes_keep_the_cluster_from_a_version() {
        let why = "node 3 speaks version 1: run the new version of ensign on it".to_owned();
        let failure = WriteFailure::NotYet { needs: ClusterVersion::V2, active: ClusterVersion::V1, why };
        let status = create_topics(&CreateTopicError::Write(failure));
        assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        let expected = "this needs version 2 of the cluster, which is at version 1: node 3 speaks version 1: run the new version of \
                        ensign on it";
        assert_eq!(status.message(), expected);
    }
}
