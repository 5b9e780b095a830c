//! What went wrong with a call, in terms of what the caller can do about it.

use std::error::Error;
use std::path::PathBuf;

use thiserror::Error;
use tonic::{Code, Status};

use crate::token::AuthError;

/// Why a client could not be made. Nothing was sent yet.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// No gRPC address, or no login address.
    #[error("no {what} is given")]
    Missing {
        /// `endpoint` or `auth URL`.
        what: &'static str,
    },
    /// An address that is not `host:port`, or a URL that is none.
    #[error("{address:?} is not a valid {what}")]
    Address {
        /// `endpoint (host:port)` or `auth URL (http://… or https://…)`.
        what: &'static str,
        /// What was given.
        address: String,
    },
    /// The certificate authorities cannot be read or used.
    #[error("cannot use the certificate authorities in {path}: {cause}")]
    Certificates {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// TLS cannot be set up.
    #[error("cannot set up TLS: {cause}")]
    Tls {
        /// Why.
        cause: String,
    },
}

/// Why a call did not succeed.
#[derive(Debug, Clone, Error)]
pub enum CallError {
    /// There is no token to call with.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The server does not accept the token, also not a fresh one.
    #[error("the server does not accept our token: {message}")]
    Unauthenticated {
        /// The server's words.
        message: String,
    },
    /// The key lacks the permission.
    #[error("{message}")]
    PermissionDenied {
        /// The server's words.
        message: String,
    },
    /// What the call is about does not exist, or not for this key.
    #[error("{message}")]
    NotFound {
        /// The server's words.
        message: String,
    },
    /// It exists already.
    #[error("{message}")]
    AlreadyExists {
        /// The server's words.
        message: String,
    },
    /// The request cannot be right; sending it again will not help.
    #[error("{message}")]
    Invalid {
        /// The server's words.
        message: String,
    },
    /// The state of things forbids it, for example an archived topic or a revoked key.
    #[error("{message}")]
    Precondition {
        /// The server's words.
        message: String,
    },
    /// Retention has passed the place that was asked for; start again at the earliest.
    #[error("{message}")]
    OutOfRange {
        /// The server's words.
        message: String,
    },
    /// A limit is reached or a disk is full; less, or later.
    #[error("{message}")]
    Exhausted {
        /// The server's words.
        message: String,
    },
    /// A quota of the project is used up, and time alone does not help: something has to be destroyed, or an operator has to raise it.
    #[error("{message}")]
    QuotaSpent {
        /// The server's words.
        message: String,
    },
    /// No node could serve the call; later.
    #[error("the cluster is not available: {message}")]
    Unavailable {
        /// The server's or the transport's words.
        message: String,
    },
    /// It may have been done, or may yet be: look before you try again.
    #[error("the outcome is unknown: {message}")]
    OutcomeUnknown {
        /// The server's words.
        message: String,
    },
    /// The partition no longer remembers the producer session, so nothing was stored under it now. A publisher goes on with
    /// another session by itself.
    #[error("{message}")]
    SessionForgotten {
        /// The server's words.
        message: String,
        /// A new session must be made after this, in milliseconds since 1970.
        after_ms: u64,
    },
    /// This server does not do that.
    #[error("{message}")]
    Unimplemented {
        /// The server's words.
        message: String,
    },
    /// Stored data failed its check.
    #[error("damaged data: {message}")]
    DataLoss {
        /// The server's words.
        message: String,
    },
    /// A failure inside the server, or an answer that breaks the protocol.
    #[error("{message}")]
    Internal {
        /// The server's words, or ours.
        message: String,
    },
}

impl CallError {
    /// An answer that this client cannot make sense of.
    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::Internal { message: message.into() }
    }

    /// Whether the same call may work in a while.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Auth(AuthError::Unreachable { .. }) => true,
            Self::Auth(_)
            | Self::Unauthenticated { .. }
            | Self::PermissionDenied { .. }
            | Self::NotFound { .. }
            | Self::AlreadyExists { .. }
            | Self::Invalid { .. }
            | Self::Precondition { .. }
            | Self::OutOfRange { .. }
            | Self::Exhausted { .. }
            | Self::QuotaSpent { .. }
            | Self::OutcomeUnknown { .. }
            | Self::SessionForgotten { .. }
            | Self::Unimplemented { .. }
            | Self::DataLoss { .. }
            | Self::Internal { .. } => false,
        }
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        let message = words(&status);
        let after_ms =
            status.metadata().get("ensign-session-after").and_then(|value| value.to_str().ok()?.parse().ok());
        if let (Code::Aborted, Some(after_ms)) = (status.code(), after_ms) {
            return Self::SessionForgotten { message, after_ms };
        }
        let says = |name| status.metadata().get(name).is_some();
        match status.code() {
            Code::Unauthenticated => Self::Unauthenticated { message },
            Code::PermissionDenied => Self::PermissionDenied { message },
            Code::NotFound => Self::NotFound { message },
            Code::AlreadyExists => Self::AlreadyExists { message },
            Code::InvalidArgument => Self::Invalid { message },
            Code::FailedPrecondition => Self::Precondition { message },
            Code::OutOfRange => Self::OutOfRange { message },
            Code::ResourceExhausted if says("ensign-quota") && !says("ensign-retry-after-ms") => {
                Self::QuotaSpent { message }
            }
            Code::ResourceExhausted => Self::Exhausted { message },
            Code::Unavailable => Self::Unavailable { message },
            Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => Self::OutcomeUnknown { message },
            Code::Unimplemented => Self::Unimplemented { message },
            Code::DataLoss => Self::DataLoss { message },
            Code::Ok | Code::Internal | Code::Unknown if is_broken_connection(&status) => Self::Unavailable { message },
            Code::Ok | Code::Internal | Code::Unknown => Self::Internal { message },
        }
    }
}

/// Whether the status was made on this side, by a connection that could not be made or broke.
///
/// tonic reports a reset connection as UNKNOWN or INTERNAL with the transport's error as its source.
pub(crate) fn is_broken_connection(status: &Status) -> bool {
    status.code() == Code::Unavailable && status.source().is_some()
        || status.source().is_some_and(|source| {
            source.is::<tonic::transport::Error>()
                || chain(source).contains("h2 protocol error")
                || has_cause::<std::io::Error>(source)
        })
}

/// Whether nothing of the call can have reached a server: the connection was never made.
pub(crate) fn is_never_sent(status: &Status) -> bool {
    status.source().is_some_and(has_cause::<tonic::ConnectError>)
}

fn has_cause<E: Error + 'static>(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<E>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// Whether the server answers a TLS client in clear. It will do so the next time, too.
pub(crate) fn speaks_no_tls(status: &Status) -> bool {
    // rustls' name for what is no TLS record at all.
    status.source().is_some_and(|source| chain(source).contains("InvalidContentType"))
}

fn words(status: &Status) -> String {
    if speaks_no_tls(status) {
        return "the server's port speaks no TLS: name the port of a proxy that does, or say that the way to it is safe \
                without (insecure)"
            .to_owned();
    }
    let message = match status.source() {
        Some(source) => chain(source),
        None => status.message().to_owned(),
    };
    if message.is_empty() { status.code().description().to_owned() } else { message }
}

/// An error and its causes in one line, without saying anything twice.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
