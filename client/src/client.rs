//! The client: one cheap handle for everything.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ensign_proto::TopicId;
use ensign_proto::pb::ensign::v1beta1 as pb;
use ensign_proto::pb::ensign::v1beta1::ensign_client::EnsignClient;
use tonic::transport::Channel;

use crate::admin::Admin;
use crate::connection::{Connection, MESSAGE_BYTES_MAX, Repeat};
use crate::consistency::Consistency;
use crate::error::{CallError, ConnectError};
use crate::options::Options;
use crate::publish::{Publisher, PublisherOptions};
use crate::query::QueryResults;
use crate::subscribe::{Start, SubscribeError, Subscriber, SubscriberOptions};
use crate::token::AuthError;

/// A connection to a cluster, on behalf of one API key. Clones share it; it reconnects by itself.
#[derive(Clone)]
pub struct Client {
    connection: Arc<Connection>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// How a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    /// Its condition.
    pub status: pb::service_state::Status,
    /// Its version.
    pub version: String,
    /// How long it has been running.
    pub uptime: Duration,
}

impl Client {
    /// A client with these options. Nothing is sent: nodes are connected to, and tokens fetched, when they are first needed,
    /// or by [`Client::log_in`].
    ///
    /// # Errors
    /// [`ConnectError`]: an option cannot be what it is.
    pub fn connect(options: Options) -> Result<Self, ConnectError> {
        Ok(Self { connection: Arc::new(Connection::new(options)?) })
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn rpc(channel: Channel) -> EnsignClient<Channel> {
        EnsignClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Fetches a token now, unless there is a valid one: tells bad credentials from anything else.
    ///
    /// # Errors
    /// [`AuthError`].
    pub async fn log_in(&self) -> Result<(), AuthError> {
        self.connection.tokens.bearer().await.map(|_| ())
    }

    /// How the node that answers is.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn status(&self) -> Result<NodeState, CallError> {
        let call = |channel, request| async move { Self::rpc(channel).status(request).await };
        let state = self.connection.call(Repeat::Harmless, pb::HealthCheck::default(), call).await?;
        let uptime = state.uptime.and_then(|it| Duration::try_from(it).ok()).unwrap_or_default();
        Ok(NodeState { status: state.status(), version: state.version, uptime })
    }

    /// Opens a publisher for `topic`, a name or an id, and waits until the server is ready for it.
    ///
    /// # Errors
    /// [`CallError`]; an unknown topic is [`CallError::Precondition`].
    pub async fn publisher(&self, topic: &str, options: PublisherOptions) -> Result<Publisher, CallError> {
        Publisher::open(self.clone(), topic, options).await
    }

    /// Subscribes to `topic`, a name or an id, from `start`, and waits until the server is ready.
    ///
    /// # Errors
    /// [`SubscribeError`]; an unknown topic is [`CallError::Precondition`].
    pub async fn subscribe(
        &self,
        topic: &str,
        start: Start,
        options: SubscriberOptions,
    ) -> Result<Subscriber, SubscribeError> {
        Subscriber::open(self.clone(), topic, start, options).await
    }

    /// Runs an EnSQL query over everything that was acknowledged before it.
    ///
    /// # Errors
    /// [`CallError`]; [`CallError::Invalid`] says what is wrong with the query.
    pub async fn query(&self, query: &str) -> Result<QueryResults, CallError> {
        self.query_with(query, Consistency::Default).await
    }

    /// Runs an EnSQL query over what is as fresh as is asked for.
    ///
    /// # Errors
    /// As [`Client::query`]; [`CallError::Unavailable`] also when no replica can tell how fresh it is.
    pub async fn query_with(&self, query: &str, consistency: Consistency) -> Result<QueryResults, CallError> {
        let message = pb::Query {
            query: query.to_owned(),
            message_bytes_max: MESSAGE_BYTES_MAX as u32,
            consistency: consistency.to_wire(),
            ..pb::Query::default()
        };
        let call = |channel, request| async move {
            let mut request: tonic::Request<pb::Query> = request;
            // The results may take longer than a call should: only their beginning is timed.
            request.metadata_mut().remove("grpc-timeout");
            Self::rpc(channel).en_sql(request).await
        };
        self.connection.call(Repeat::Harmless, message, call).await.map(QueryResults::new)
    }

    /// Administration, for a key that may: see [`crate::CredentialsFile::admin`].
    pub fn admin(&self) -> Admin {
        Admin::new(self.clone())
    }

    /// What the project holds, or only these topics of it: as fresh as the server can tell soon.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn info(&self, topics: &[TopicId]) -> Result<pb::ProjectInfo, CallError> {
        self.info_with(topics, Consistency::Default).await
    }

    /// What the project holds, or only these topics of it: as fresh as is asked for.
    ///
    /// # Errors
    /// [`CallError`]; [`CallError::Unavailable`] also when no replica of a topic can tell how fresh it is.
    pub async fn info_with(&self, topics: &[TopicId], consistency: Consistency) -> Result<pb::ProjectInfo, CallError> {
        let topics = topics.iter().map(|id| bytes::Bytes::copy_from_slice(id.as_bytes())).collect();
        let call = |channel, request| async move { Self::rpc(channel).info(request).await };
        let request = pb::InfoRequest { topics, consistency: consistency.to_wire() };
        self.connection.call(Repeat::Harmless, request, call).await
    }
}
