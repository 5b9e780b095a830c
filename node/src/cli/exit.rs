//! What a failed command tells the shell.

use std::process::ExitCode;

use ensign_client::{AuthError, CallError, ConnectError, CredentialsError, NackCode, PublishError, SubscribeError};
use thiserror::Error;

use crate::catalog::PutNodeError;
use crate::config::ConfigError;
use crate::node::NodeEnd;
use crate::peers::TlsError;

/// The exit codes that the main help lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// An error that no other code tells.
    Failure = 1,
    /// The command line, a file or a setting is wrong.
    Usage = 2,
    /// What the command is about does not exist.
    NotFound = 3,
    /// Bad credentials or a missing permission.
    Denied = 4,
    /// No node could serve the command.
    Unavailable = 5,
    /// It may have been done.
    OutcomeUnknown = 6,
    /// The state of things forbids it.
    Refused = 7,
    /// The doctor found something.
    Unwell = 8,
    /// A wait that has a limit reached it.
    TimeUp = 9,
    /// A receipt, or a key that it is verified with, is not what it claims to be.
    Untrusted = 10,
    /// The node may not run: it was removed, or another process runs as it.
    Barred = 11,
    /// Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An input that the command cannot work with.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// The credentials carry no administrator's key.
#[derive(Debug, Error)]
#[error(
    "the credentials file has no administrator's key (`admin`): use the file that `ensign dev` or `ensign serve \
     --bootstrap` wrote"
)]
pub(super) struct NoAdministrator;

/// What the doctor found needs an operator.
#[derive(Debug, Error)]
#[error("the cluster needs an operator: see the findings")]
pub(super) struct Unwell;

/// A key is erased, but for copies that nobody can ask for.
#[derive(Debug, Error)]
#[error("not every node that had a copy of the key has said that it is gone")]
pub(super) struct CopiesMissing;

/// What is asked for is not built yet.
#[derive(Debug, Error)]
#[error("{0}")]
pub(super) struct NotBuilt(pub(super) &'static str);

/// A key ring seals more than what is to be destroyed, or there is none.
#[derive(Debug, Error)]
#[error("{0}")]
pub(super) struct NotAlone(pub(super) String);

/// Ctrl-C or SIGTERM.
#[derive(Debug, Error)]
#[error("interrupted")]
pub struct Interrupted;

/// How streams and queries say that a topic does not exist.
pub(super) const NO_TOPICS: &str = "no topics available";
pub(super) const NO_TOPIC_IN_QUERY: &str = "unknown topic in query";

/// The code of a command that failed with `error`: that of the first cause we know.
pub fn exit_code(error: &anyhow::Error) -> Exit {
    error.chain().find_map(code_of).unwrap_or(Exit::Failure)
}

fn code_of(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if error.is::<UsageError>()
        || error.is::<CredentialsError>()
        || error.is::<ConnectError>()
        || error.is::<ConfigError>()
        || error.is::<TlsError>()
    {
        return Some(Exit::Usage);
    }
    if error.is::<NoAdministrator>() {
        return Some(Exit::Denied);
    }
    if error.is::<Unwell>() || error.is::<CopiesMissing>() {
        return Some(Exit::Unwell);
    }
    if error.is::<super::watch::TimeUp>() {
        return Some(Exit::TimeUp);
    }
    if error.is::<super::receipt::Untrusted>() {
        return Some(Exit::Untrusted);
    }
    if error.is::<NotBuilt>() || error.is::<NotAlone>() {
        return Some(Exit::Refused);
    }
    if let Some(NodeEnd::Barred(_)) = error.downcast_ref() {
        return Some(Exit::Barred);
    }
    if let Some(PutNodeError::LifeOver { .. } | PutNodeError::Revoked { .. }) = error.downcast_ref() {
        return Some(Exit::Barred);
    }
    if error.is::<Interrupted>() {
        return Some(Exit::Interrupted);
    }
    if let Some(error) = error.downcast_ref::<CallError>() {
        return Some(call(error));
    }
    if let Some(error) = error.downcast_ref::<AuthError>() {
        return Some(auth(error));
    }
    if let Some(error) = error.downcast_ref::<SubscribeError>() {
        return Some(match error {
            SubscribeError::Unavailable(_) => Exit::Unavailable,
            SubscribeError::Stream(cause) => call(cause),
            SubscribeError::Trimmed { .. } => Exit::Refused,
            SubscribeError::Gap { .. } => Exit::Failure,
        });
    }
    error.downcast_ref::<PublishError>().map(publish)
}

fn auth(error: &AuthError) -> Exit {
    match error {
        AuthError::Refused { .. } => Exit::Denied,
        AuthError::Unreachable { .. } => Exit::Unavailable,
        AuthError::Malformed { .. } => Exit::Usage,
    }
}

fn call(error: &CallError) -> Exit {
    match error {
        CallError::Auth(error) => auth(error),
        CallError::Unauthenticated { .. } | CallError::PermissionDenied { .. } => Exit::Denied,
        CallError::NotFound { .. } => Exit::NotFound,
        CallError::Precondition { message } if message == NO_TOPICS => Exit::NotFound,
        CallError::Invalid { message } if message == NO_TOPIC_IN_QUERY => Exit::NotFound,
        CallError::AlreadyExists { .. }
        | CallError::Precondition { .. }
        | CallError::OutOfRange { .. }
        | CallError::QuotaSpent { .. } => Exit::Refused,
        CallError::Invalid { .. } | CallError::Unimplemented { .. } => Exit::Usage,
        CallError::Exhausted { .. } | CallError::Unavailable { .. } => Exit::Unavailable,
        CallError::OutcomeUnknown { .. } | CallError::SessionForgotten { .. } => Exit::OutcomeUnknown,
        CallError::DataLoss { .. } | CallError::Internal { .. } => Exit::Failure,
    }
}

fn publish(error: &PublishError) -> Exit {
    match error {
        PublishError::TooLarge { .. } => Exit::Usage,
        PublishError::QuotaSpent { .. } => Exit::Refused,
        PublishError::Refused { code, .. } => match code {
            NackCode::MaxEventSizeExceeded => Exit::Usage,
            NackCode::TopicUnknown => Exit::NotFound,
            NackCode::PermissionDenied => Exit::Denied,
            NackCode::TopicArchived | NackCode::TopicDeleted => Exit::Refused,
            NackCode::ConsensusFailure | NackCode::ShardingFailure | NackCode::Redirect => Exit::Unavailable,
            NackCode::Unknown
            | NackCode::Internal
            | NackCode::Unprocessed
            | NackCode::Timeout
            | NackCode::UnhandledMimetype
            | NackCode::UnknownType
            | NackCode::DeliverAgainAny
            | NackCode::DeliverAgainNotMe => Exit::Failure,
        },
        PublishError::OutcomeUnknown { .. } => Exit::OutcomeUnknown,
        PublishError::NotSent { .. } => Exit::Unavailable,
        PublishError::Stream(cause) => call(cause),
        PublishError::Closed => Exit::Failure,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn message() -> String {
        "words".to_owned()
    }

    #[test]
    fn a_cause_is_found_under_its_context() {
        let not_found = Err::<(), _>(CallError::NotFound { message: message() }).context("looking").unwrap_err();
        assert_eq!(exit_code(&not_found), Exit::NotFound);
        let plain = anyhow::anyhow!("no idea");
        assert_eq!(exit_code(&plain), Exit::Failure);
    }

    #[test]
    fn every_kind_of_failure_has_the_code_that_the_help_promises() {
        let code = |error: CallError| exit_code(&error.into());
        let refused = AuthError::Refused { client_id: message() };
        assert_eq!(code(CallError::Auth(refused)), Exit::Denied);
        assert_eq!(code(CallError::PermissionDenied { message: message() }), Exit::Denied);
        assert_eq!(code(CallError::Unavailable { message: message() }), Exit::Unavailable);
        assert_eq!(code(CallError::OutcomeUnknown { message: message() }), Exit::OutcomeUnknown);
        assert_eq!(code(CallError::AlreadyExists { message: message() }), Exit::Refused);
        assert_eq!(code(CallError::Invalid { message: message() }), Exit::Usage);
        let unknown_topic = CallError::Precondition { message: "no topics available".to_owned() };
        assert_eq!(exit_code(&PublishError::Stream(unknown_topic).into()), Exit::NotFound);
        let removed = anyhow::Error::from(NodeEnd::Barred(message())).context("running");
        assert_eq!(exit_code(&removed), Exit::Barred);
        assert_eq!(exit_code(&NodeEnd::Failed(message()).into()), Exit::Failure);
        let archived = PublishError::Refused { code: NackCode::TopicArchived, message: message() };
        assert_eq!(exit_code(&archived.into()), Exit::Refused);
    }
}
