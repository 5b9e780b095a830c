//! One group on this node, without its state machine's type.

use std::any::Any;
use std::ops::Range;

use bytes::Bytes;
use ensign_proto::{ByteCount, GroupId, LogIndex, NodeId, Term};
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::errors::{CompactError, ProposeError, ReadError, TransferError};
use crate::group::{Committed, GroupStatus, Health, Leadership};
use crate::machine::CommittedEntry;

/// What a machine answered, with its type erased so that openraft is compiled once and not per machine.
pub(crate) type Response = Box<dyn Any + Send>;
pub(crate) type Outcome = BoxFuture<'static, Result<Committed<Response>, ProposeError>>;

pub(crate) struct Replica {
    id: GroupId,
    leadership: watch::Sender<Leadership>,
    applied: watch::Sender<LogIndex>,
}

impl Replica {
    pub(crate) fn id(&self) -> GroupId {
        self.id
    }

    pub(crate) fn leadership(&self) -> watch::Receiver<Leadership> {
        self.leadership.subscribe()
    }

    pub(crate) fn applied(&self) -> watch::Receiver<LogIndex> {
        self.applied.subscribe()
    }

    pub(crate) async fn submit(&self, _expected: Option<Term>, _payload: Bytes) -> Result<Outcome, ProposeError> {
        Err(ProposeError::Stopped)
    }

    pub(crate) async fn read_index(&self) -> Result<LogIndex, ReadError> {
        Err(ReadError::Stopped)
    }

    pub(crate) async fn read_log(
        &self,
        _range: Range<LogIndex>,
        _limit: ByteCount,
    ) -> Result<Vec<CommittedEntry>, ReadError> {
        Err(ReadError::Stopped)
    }

    pub(crate) async fn transfer_leader(&self, _to: NodeId) -> Result<(), TransferError> {
        Err(TransferError::Stopped)
    }

    pub(crate) async fn compact(&self, _keep_entries: u64) -> Result<LogIndex, CompactError> {
        Err(CompactError::Stopped)
    }

    pub(crate) fn status(&self) -> GroupStatus {
        GroupStatus {
            id: self.id,
            health: Health::Stopped,
            leadership: *self.leadership.borrow(),
            last: LogIndex(0),
            committed: LogIndex(0),
            applied: *self.applied.borrow(),
            snapshot: LogIndex(0),
            purged: LogIndex(0),
            voters: std::collections::BTreeSet::new(),
            matched: std::collections::BTreeMap::new(),
            restarts: 0,
        }
    }
}
