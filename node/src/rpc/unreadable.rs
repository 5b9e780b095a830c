//! Batches that do not open, among others that do: each may be sealed under a ring of its own.

use std::collections::VecDeque;

use tonic::Status;

use crate::partition::{KeysError, ReadError, Reader, StoredBatch};
use crate::status;

/// How reading ends at a batch that does not open. Looks past it, over what was read ahead, for the first one that may open.
pub(super) async fn status(
    reader: &Reader,
    error: &ReadError,
    batch: &StoredBatch,
    ahead: &VecDeque<StoredBatch>,
) -> Status {
    let mut next = batch.end();
    for batch in ahead {
        match reader.open(batch).await {
            Err(ReadError::Key(KeysError::Unusable(_) | KeysError::Disabled(_))) => next = batch.end(),
            Ok(_) | Err(_) => break,
        }
    }
    status::unreadable(error, &reader.partition().topic_name(), next)
}
