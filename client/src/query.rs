//! The rows of a query, as they arrive.

use ensign_proto::pb::ensign::v1beta1 as pb;
use tonic::Streaming;

use crate::error::CallError;
use crate::event::Delivery;

/// The results of a query, in offset order. Dropping it ends the query.
#[derive(Debug)]
pub struct QueryResults(Streaming<pb::EventWrapper>);

impl QueryResults {
    pub(crate) fn new(replies: Streaming<pb::EventWrapper>) -> Self {
        Self(replies)
    }

    /// The next event; `None` after the last. Cancel safe.
    ///
    /// # Errors
    /// [`CallError`]: what was delivered so far is right, but not complete.
    pub async fn next(&mut self) -> Result<Option<Delivery>, CallError> {
        match self.0.message().await? {
            Some(wrapper) => Delivery::try_from(wrapper).map(Some).map_err(CallError::protocol),
            None => Ok(None),
        }
    }
}
