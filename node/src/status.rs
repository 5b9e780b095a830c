//! What clients are told: the one place that knows gRPC codes and, for publish streams, nack codes.
//!
//! A nack is a promise that the event is not stored. What may be stored after all ends the stream instead.
#![deny(clippy::wildcard_enum_match_arm)]

use std::borrow::Cow;
use std::time::Duration;

use ensign_proto::convert::InvalidField;
use ensign_proto::pb::ensign::v1beta1::nack::Code as NackCode;
use ensign_proto::{InvalidTopicName, Offset};
use prost::Message as _;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tracing::{error, info, warn};

use crate::catalog::{ChangeTopicError, CreateTopicError, PageError, Resource, TopicState, WriteFailure};
use crate::ensql::SyntaxError;
use crate::identity::AuthError;
use crate::partition::{KeysError, NotServed, PublishError, ReadError};
use crate::placement::planner::Unplaceable;
use crate::quota::{self, Exhausted};

/// Texts that clients compare or show.
pub(crate) mod text {
    pub(crate) const NO_CREDENTIALS: &str = "missing credentials";
    pub(crate) const NOT_AUTHORIZED: &str = "not authorized to perform this action";
    pub(crate) const OPERATOR_READS_NO_EVENTS: &str =
        "an operator's key administers the cluster and reads no events: query with an API key of the project";
    pub(crate) const NO_TOPICS: &str = "no topics available";
    pub(crate) const TOPIC_NOT_FOUND: &str = "topic not found";
    pub(crate) const OPEN_FIRST: &str = "an open stream message must be sent immediately after opening the stream";
    pub(crate) const OPEN_TWICE: &str = "cannot send multiple open stream messages";
    pub(crate) const EMPTY_REQUEST: &str = "unhandled publisher request message <nil>";
    pub(crate) const RECEIVE_FAILED: &str = "could not recv event from client";
    pub(crate) const SUBSCRIBE_FIRST: &str = "must send subscription to initialize stream";
    pub(crate) const UPGRADING: &str =
        "the cluster is being upgraded, and this works once that is finished: please try again later";
    pub(crate) const STOPPING: &str = "the node is shutting down";
    pub(crate) const KEY_REVOKED: &str = "the API key of this stream was revoked";
    pub(crate) const OUT_OF_TOUCH: &str = "this node is out of touch with the cluster and cannot tell whether API keys were revoked, please try another node";
    pub(crate) const UNKNOWN_TOPIC_IN_QUERY: &str = "unknown topic in query";
}

/// Why a request is refused before anything else is looked at.
pub(crate) fn unauthenticated(error: &AuthError) -> Status {
    match error {
        AuthError::Invalid(reason) => {
            tracing::debug!(%reason, "a token is refused");
            Status::unauthenticated("invalid credentials")
        }
        AuthError::Unavailable { cause } => {
            // Not louder: anyone can bring it about, and readiness tells what is wrong.
            tracing::debug!(cause, "a token cannot be verified");
            Status::unavailable("tokens cannot be verified at the moment, please try again")
        }
    }
}

/// A field that does not say what it must.
pub(crate) fn invalid_field(error: &InvalidField) -> Status {
    Status::invalid_argument(error.to_string())
}

/// A page token that is none.
pub(crate) fn invalid_page(error: PageError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// A query that is none.
pub(crate) fn invalid_query(error: &SyntaxError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// A name that is none.
pub(crate) fn invalid_name(error: InvalidTopicName) -> Status {
    Status::invalid_argument(error.to_string())
}

/// A change of the catalog that was not made, or nobody knows.
pub(crate) fn write_failed(failure: &WriteFailure, generic: &'static str) -> Status {
    match failure {
        WriteFailure::Unavailable { cause } => {
            warn!(cause, "the catalog cannot be written");
            Status::unavailable("the catalog cannot be written at the moment, please try again")
        }
        WriteFailure::OutcomeUnknown { cause } => {
            warn!(cause, "a change of the catalog has an unknown outcome");
            Status::deadline_exceeded("it is not known whether the change was made, please look before trying again")
        }
        WriteFailure::NotYet { .. } => {
            // Which nodes are behind is for operators: the log, the admin API and `ensign cluster version` say so.
            info!(%failure, "a change is refused until the cluster is upgraded");
            Status::failed_precondition(text::UPGRADING)
        }
        WriteFailure::Internal { cause } => {
            error!(cause, "the catalog refused a change");
            Status::internal(generic)
        }
    }
}

/// Why a topic was not created.
pub(crate) fn create_topic_failed(error: &CreateTopicError) -> Status {
    match error {
        CreateTopicError::NameTaken => Status::already_exists("topic name already exists in project"),
        CreateTopicError::TooMany { .. } => Status::resource_exhausted(error.to_string()),
        CreateTopicError::Quota { .. } => {
            quota::metrics::refused(Resource::Topics, 1);
            exhausted(error.to_string(), Resource::Topics, None)
        }
        CreateTopicError::Placement(why) => unplaceable(why),
        CreateTopicError::RingShredded => Status::failed_precondition(error.to_string()),
        CreateTopicError::Vault(failure) => {
            warn!(%failure, "a topic was not created");
            Status::unavailable("the key vault cannot be reached at the moment, please try again")
        }
        // The token names a project that is gone.
        CreateTopicError::ProjectUnknown => Status::permission_denied(text::NOT_AUTHORIZED),
        CreateTopicError::Write(failure) => write_failed(failure, "could not process create topic request"),
    }
}

/// Why replicas cannot be where they were asked to be.
pub(crate) fn unplaceable(why: &Unplaceable) -> Status {
    match why {
        Unplaceable::Replication { .. } | Unplaceable::RegionUnknown { .. } | Unplaceable::LeaderRegion { .. } => {
            Status::invalid_argument(why.to_string())
        }
        Unplaceable::TooFewNodes { .. } | Unplaceable::NoMajority { .. } => {
            Status::failed_precondition(why.to_string())
        }
    }
}

/// Why a topic was not archived or destroyed.
pub(crate) fn change_topic_failed(error: &ChangeTopicError) -> Status {
    match error {
        ChangeTopicError::Unknown => Status::not_found(text::TOPIC_NOT_FOUND),
        ChangeTopicError::State(state) => cannot_change(*state),
        ChangeTopicError::Write(failure) => write_failed(failure, "could not process delete topic request"),
    }
}

/// A topic in this state is neither archived nor destroyed.
pub(crate) fn cannot_change(state: TopicState) -> Status {
    let name = state_name(state);
    Status::failed_precondition(format!("cannot archive or destroy a topic that is in the {name} state"))
}

/// A state as the wire names it.
pub(crate) fn state_name(state: TopicState) -> &'static str {
    match state {
        TopicState::Ready => "READY",
        TopicState::Readonly => "READONLY",
        TopicState::Deleting => "DELETING",
    }
}

/// Why a topic cannot be read on this node at all.
pub(crate) fn not_served(why: NotServed) -> Status {
    match why {
        NotServed::NotYet => Status::unavailable(why.to_string()),
        NotServed::Damaged => Status::data_loss(why.to_string()),
    }
}

/// Why a topic takes no events on this node: others may.
pub(crate) fn not_served_nack(why: NotServed) -> (NackCode, &'static str) {
    let text = match why {
        NotServed::NotYet => "the topic is not served by this node yet, please try again",
        NotServed::Damaged => "this node's replica of the topic is damaged, please publish through another node",
    };
    (NackCode::ShardingFailure, text)
}

/// Why events are not delivered.
pub(crate) fn read_failed(error: &ReadError) -> Status {
    match error {
        ReadError::Trimmed { .. } => Status::out_of_range(error.to_string()),
        ReadError::Stopped => Status::unavailable("the topic is not served by this node any more"),
        ReadError::NoLeader { cause } => {
            warn!(cause, "a read found no leader in time");
            Status::unavailable("the topic's replicas cannot be reached at the moment, please try again")
        }
        ReadError::Unreachable { cause } => {
            warn!(cause, "a read reached none of the nodes that hold the topic");
            let message = "none of the nodes that hold the topic can be reached at the moment, please try again";
            retry_after(Code::Unavailable, message.to_owned(), MetadataMap::new(), Duration::from_secs(1))
        }
        ReadError::Key(error) => key_failed(error),
        ReadError::Corrupt { what } => {
            error!(what, "a replica cannot be read");
            Status::data_loss("this replica of the topic is damaged; please ask another node")
        }
    }
}

/// A batch that does not open. Where its key is gone the reader is told where the next events are that may be read: nothing is left out
/// without a word, and nobody has to look for them.
pub(crate) fn unreadable(error: &ReadError, topic: &str, next: Offset) -> Status {
    match error {
        ReadError::Key(gone @ (KeysError::Unusable(_) | KeysError::Disabled(_))) => {
            let why = key_failed(gone);
            let message = format!("{}; reading topic {topic} can go on at offset {next}", why.message());
            Status::new(why.code(), message)
        }
        ReadError::Trimmed { .. }
        | ReadError::Stopped
        | ReadError::NoLeader { .. }
        | ReadError::Unreachable { .. }
        | ReadError::Key(_)
        | ReadError::Corrupt { .. } => read_failed(error),
    }
}

/// Why what is sealed stays sealed.
pub(crate) fn key_failed(error: &KeysError) -> Status {
    match error {
        KeysError::Unavailable(cause) => {
            warn!(cause, "no lease on the keys of a topic");
            Status::unavailable("the topic's encryption keys are not available at the moment, please try again")
        }
        KeysError::Unusable(cause) => {
            Status::failed_precondition(format!("these events cannot be read any more: {cause}"))
        }
        KeysError::Disabled(cause) => Status::failed_precondition(format!("these events cannot be read now: {cause}")),
        KeysError::NotHeld(_) => {
            Status::unavailable("the topic's encryption keys are not available at the moment, please try again")
        }
        KeysError::Damaged => {
            error!("a sealed batch does not open");
            Status::data_loss("this replica of the topic is damaged; please ask another node")
        }
        KeysError::Failed(cause) => {
            error!(cause, "the keys of a topic cannot be used");
            Status::internal("the topic's encryption keys cannot be used")
        }
    }
}

/// Why a publish stream ends although nothing was published on it.
pub(crate) fn cannot_publish(error: &KeysError) -> Status {
    Status::failed_precondition(format!("the topic cannot be written: {error}"))
}

/// An event that is larger than the client can take.
pub(crate) fn event_too_large(offset: u64, size: usize, limit: usize) -> Status {
    Status::resource_exhausted(format!(
        "the event at offset {offset} takes {size} bytes, more than the {limit} bytes that a message to this client may have; \
         a client that accepts more says so in the metadata field ensign-max-message-bytes"
    ))
}

/// Says in the metadata of a refusal which quota is used up, and after how many milliseconds another try may work.
const QUOTA: &str = "ensign-quota";
const RETRY_AFTER: &str = "ensign-retry-after-ms";

/// `google.rpc.Status`, as `grpc-status-details-bin` carries it.
#[derive(Clone, PartialEq, prost::Message)]
struct Details {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// `google.rpc.RetryInfo`.
#[derive(Clone, PartialEq, prost::Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<prost_types::Duration>,
}

/// A quota that is used up. Without `retry_after`, trying again does not help.
fn exhausted(message: String, resource: Resource, retry_after: Option<Duration>) -> Status {
    let mut metadata = MetadataMap::new();
    metadata.insert(QUOTA, tonic::metadata::MetadataValue::from_static(resource.as_str()));
    let Some(retry_after) = retry_after else {
        return Status::with_metadata(Code::ResourceExhausted, message, metadata);
    };
    self::retry_after(Code::ResourceExhausted, message, metadata, retry_after)
}

/// A refusal that says when another try may work: for our clients in its metadata, for others as `google.rpc.RetryInfo`.
fn retry_after(code: Code, message: String, mut metadata: MetadataMap, after: Duration) -> Status {
    metadata.insert(RETRY_AFTER, (u64::try_from(after.as_millis()).unwrap_or(u64::MAX)).into());
    let retry = RetryInfo { retry_delay: prost_types::Duration::try_from(after).ok() };
    let any = prost_types::Any {
        type_url: "type.googleapis.com/google.rpc.RetryInfo".to_owned(),
        value: retry.encode_to_vec(),
    };
    let details = Details { code: code as i32, message: message.clone(), details: vec![any] };
    let details = details.encode_to_vec().into();
    Status::with_details_and_metadata(code, message, details, metadata)
}

/// A stream that is not opened for want of quota.
pub(crate) fn quota_exhausted(error: &Exhausted) -> Status {
    exhausted(error.to_string(), error.resource(), error.retry_after())
}

/// Events that are not taken for want of quota: certainly not stored, so a nack. Of the codes that clients know it is the one that
/// says so; what to do is in the text.
pub(crate) fn quota_nack(error: &Exhausted) -> (NackCode, String) {
    let hint = error.retry_after().map(|after| format!("; try again in {} ms", after.as_millis())).unwrap_or_default();
    (NackCode::ConsensusFailure, format!("could not commit event: {error}{hint}"))
}

/// Says in the metadata of a refusal from when on a new producer session must be made, in milliseconds since 1970.
const SESSION_AFTER: &str = "ensign-session-after";

/// What becomes of events that were not acknowledged.
#[derive(Debug, Clone)]
pub(crate) enum Refusal {
    /// They are not stored: a nack for each, and the stream lives on.
    Nack(NackCode, Cow<'static, str>),
    /// The stream ends.
    End(Status),
}

/// What events that got this nack before anybody was asked are counted as.
pub(crate) fn edge_cause(code: NackCode) -> &'static str {
    match code {
        NackCode::MaxEventSizeExceeded => "too_large",
        NackCode::TopicUnknown => "topic_unknown",
        NackCode::TopicArchived => "archived",
        NackCode::TopicDeleted => "deleted",
        NackCode::ShardingFailure => "not_served",
        NackCode::ConsensusFailure => "quota",
        NackCode::Unknown
        | NackCode::PermissionDenied
        | NackCode::Redirect
        | NackCode::Internal
        | NackCode::Unprocessed
        | NackCode::Timeout
        | NackCode::UnhandledMimetype
        | NackCode::UnknownType
        | NackCode::DeliverAgainAny
        | NackCode::DeliverAgainNotMe => "other",
    }
}

/// What events that were not acknowledged are counted as.
pub(crate) fn publish_cause(error: &PublishError) -> &'static str {
    match error {
        PublishError::Archived => "archived",
        PublishError::Deleted => "deleted",
        PublishError::DiskFull => "disk_full",
        PublishError::TooLarge => "too_large",
        PublishError::KeyUnusable { .. } => "key_unusable",
        PublishError::KeyDisabled { .. } => "key_disabled",
        PublishError::Fenced { .. } => "fenced",
        PublishError::Spent { .. } => "spent",
        PublishError::Forgotten { .. } => "forgotten",
        PublishError::Unavailable { .. } => "unavailable",
        PublishError::OutcomeUnknown { .. } => "outcome_unknown",
    }
}

/// What a publisher is told.
pub(crate) fn publish_failed(error: &PublishError) -> Refusal {
    let nack = |code, reason: &'static str| Refusal::Nack(code, reason.into());
    match error {
        PublishError::Archived => nack(NackCode::TopicArchived, "cannot publish to an archived topic"),
        PublishError::Deleted => nack(NackCode::TopicDeleted, "topic is currently being deleted"),
        PublishError::DiskFull => nack(
            NackCode::ConsensusFailure,
            "could not commit event: the disk of the topic's leader is full, please try again when there is room",
        ),
        PublishError::TooLarge => nack(NackCode::MaxEventSizeExceeded, "maximum event size has been exceeded"),
        PublishError::KeyUnusable { detail } => {
            Refusal::End(Status::failed_precondition(format!("the topic cannot be written: {detail}")))
        }
        // It names the command that an operator has to run.
        PublishError::KeyDisabled { .. } => Refusal::Nack(NackCode::PermissionDenied, error.to_string().into()),
        PublishError::Fenced { .. } | PublishError::Spent { .. } => {
            Refusal::End(Status::failed_precondition(error.to_string()))
        }
        PublishError::Forgotten { now_ms } => {
            let mut status = Status::aborted(error.to_string());
            status.metadata_mut().insert(SESSION_AFTER, (*now_ms).into());
            Refusal::End(status)
        }
        PublishError::Unavailable { cause } => {
            warn!(cause, "a publish stream ends: its events found no leader in time");
            Refusal::End(Status::unavailable("the topic's replicas cannot be reached, please try again"))
        }
        // Proposed, perhaps, and unanswered: neither ack nor nack would be true.
        PublishError::OutcomeUnknown { cause } => {
            warn!(cause, "a publish stream ends with an unknown outcome");
            Refusal::End(Status::deadline_exceeded(
                "it is not known whether the last events were committed; publishing them again may store them twice",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::ClusterVersion;

    use super::*;

    fn shown(status: &Status) -> String {
        format!("{:?}: {}", status.code(), status.message())
    }

    #[test]
    fn what_may_be_stored_is_never_nacked() {
        let doubtful = [
            PublishError::OutcomeUnknown { cause: String::new() },
            PublishError::Forgotten { now_ms: 5 },
            PublishError::Spent { sequence: 4 },
            PublishError::Fenced { epoch: 2 },
        ];
        for error in doubtful {
            assert!(matches!(publish_failed(&error), Refusal::End(_)), "{error}");
        }
    }

    #[test]
    fn a_quota_that_is_used_up_says_which_and_when_to_come_back() {
        let rate = Exhausted::Rate {
            resource: Resource::BytesPerSecond,
            limit: 5_000,
            retry_after: Duration::from_millis(1_250),
        };
        let status = quota_exhausted(&rate);
        let metadata = |key: &str| status.metadata().get(key).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(
            (metadata("ensign-quota").as_deref(), metadata("ensign-retry-after-ms").as_deref()),
            (Some("bytes-per-second"), Some("1250"))
        );
        let details = Details::decode(status.details()).unwrap();
        assert_eq!((details.code, &*details.message), (8, status.message()));
        assert_eq!(details.details[0].type_url, "type.googleapis.com/google.rpc.RetryInfo");
        let retry = RetryInfo::decode(&details.details[0].value[..]).unwrap().retry_delay.unwrap();
        assert_eq!((retry.seconds, retry.nanos), (1, 250_000_000));
        let (code, text) = quota_nack(&rate);
        assert_eq!(code, NackCode::ConsensusFailure);
        let expected = "could not commit event: the project may publish 5000 bytes a second and publishes more: slow down, or ask \
                        an operator to raise the quota (ensign quota set --bytes-per-second); try again in 1250 ms";
        assert_eq!(text, expected);
        // Nothing that time alone mends.
        let full = Exhausted::Stored { limit: 10, stored: 12 };
        assert!(quota_nack(&full).1.ends_with("reading goes on"), "{}", quota_nack(&full).1);
        assert!(quota_exhausted(&full).details().is_empty());
        let topics = create_topic_failed(&CreateTopicError::Quota { limit: 3 });
        let expected = "ResourceExhausted: the project has its limit of 3 topics: destroy topics that are no longer needed, or ask \
                        an operator to raise the quota (ensign quota set --topics)";
        assert_eq!(shown(&topics), expected);
    }

    #[test]
    fn what_went_wrong_inside_is_not_for_strangers() {
        let cause = || "node 3 at 10.0.0.3:5357".to_owned();
        let statuses = [
            unauthenticated(&AuthError::Unavailable { cause: cause() }),
            read_failed(&ReadError::NoLeader { cause: cause() }),
            read_failed(&ReadError::Unreachable { cause: cause() }),
        ];
        for status in statuses {
            assert!(!status.message().contains("10.0.0.3"), "{status:?}");
            assert!(status.message().ends_with("please try again"), "{status:?}");
        }
    }

    #[test]
    fn a_tenant_hears_that_the_cluster_is_upgraded_and_not_which_nodes_are_behind() {
        let why = "node 3 speaks version 1: run the new version of ensign on it".to_owned();
        let failure = WriteFailure::NotYet { needs: ClusterVersion::V2, active: ClusterVersion::V1, why };
        let expected = "FailedPrecondition: the cluster is being upgraded, and this works once that is finished: please try again \
                        later";
        assert_eq!(shown(&create_topic_failed(&CreateTopicError::Write(failure.clone()))), expected);
        assert_eq!(shown(&change_topic_failed(&ChangeTopicError::Write(failure))), expected);
    }

    #[test]
    fn a_replica_that_cannot_serve_says_whether_waiting_helps() {
        assert_eq!(shown(&not_served(NotServed::NotYet)), "Unavailable: the topic is not served by this node yet");
        let damaged = "DataLoss: this replica of the topic is damaged; please ask another node";
        assert_eq!(shown(&not_served(NotServed::Damaged)), damaged);
        for (why, words) in [(NotServed::NotYet, "please try again"), (NotServed::Damaged, "through another node")] {
            let (code, text) = not_served_nack(why);
            assert!(code == NackCode::ShardingFailure && text.ends_with(words), "{text}");
        }
        let Refusal::Nack(code, text) = publish_failed(&PublishError::DiskFull) else {
            panic!("a full disk is no end")
        };
        assert!(code == NackCode::ConsensusFailure && text.contains("disk of the topic's leader is full"), "{text}");
    }

    #[test]
    fn statuses_read_as_documented() {
        let lines = [
            shown(&create_topic_failed(&CreateTopicError::NameTaken)),
            shown(&change_topic_failed(&ChangeTopicError::Unknown)),
            shown(&change_topic_failed(&ChangeTopicError::State(TopicState::Deleting))),
            shown(&read_failed(&ReadError::Trimmed { log_start: ensign_proto::Offset(5) })),
            shown(&key_failed(&KeysError::Unusable("the key was revoked".to_owned()))),
            shown(&key_failed(&KeysError::Disabled("version 2 is disabled".to_owned()))),
        ];
        let expected = [
            "AlreadyExists: topic name already exists in project",
            "NotFound: topic not found",
            "FailedPrecondition: cannot archive or destroy a topic that is in the DELETING state",
            "OutOfRange: events before offset 5 are no longer kept",
            "FailedPrecondition: these events cannot be read any more: the key was revoked",
            "FailedPrecondition: these events cannot be read now: version 2 is disabled",
        ];
        assert_eq!(lines, expected);
    }
}
