//! What nodes that hold a partition are asked by nodes that do not, and what they answer: places, counters, ciphertext.

use bytes::Bytes;
use ensign_proto::pb::ensign::peer::v1 as peer;
use ensign_proto::{DekId, Link, LogIndex, NodeId, Offset, Rlid, TopicId};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use thiserror::Error;

use crate::partition::freshness::Freshness;
use crate::partition::handle::{Counts, ReadError};
use crate::partition::machine::{DekRow, TypeCount};

/// Where a partition stands on a node that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stand {
    /// Who leads, as far as that node knows.
    pub leader: Option<NodeId>,
    /// The first offset that is kept.
    pub log_start: Offset,
    /// The first offset that is not committed.
    pub high_watermark: Offset,
    /// The time of the newest event, in milliseconds since the Unix epoch.
    pub entry_time_ms: u64,
    /// If asked for.
    pub counts: Option<Counts>,
}

/// A place that is sought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The first event committed then or later, in milliseconds since the Unix epoch.
    Time(u64),
    /// The event that follows.
    After(Rlid),
}

/// Batches that are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The first offset.
    pub from: Offset,
    /// About how many bytes.
    pub bytes: u64,
    /// The batch before, if it was read: its index, and the link that the next one has to name.
    pub after: Option<(LogIndex, Link)>,
}

/// Consecutive batches as they are stored, and the keys that they need, wrapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The first offset that is kept.
    pub log_start: Offset,
    /// The first offset that is not committed, as far as the node has applied.
    pub high_watermark: Offset,
    /// Index and bytes of each.
    pub batches: Vec<(LogIndex, Bytes)>,
    /// Keys that were not told before.
    pub keys: Vec<DekRow>,
}

/// Why a node did not answer a read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unread {
    /// It holds no replica, or not any more.
    #[error("it holds no replica")]
    NotHeld,
    /// Retention has passed the place.
    #[error("events before offset {log_start} are no longer kept")]
    Trimmed {
        /// The first offset that is kept.
        log_start: Offset,
    },
    /// Nobody confirms how fresh its replica is.
    #[error("nobody confirms how fresh its replica is: {cause}")]
    NoLeader {
        /// Why.
        cause: String,
    },
    /// Its replica is damaged.
    #[error("its replica is damaged: {what}")]
    Damaged {
        /// What was found.
        what: String,
    },
    /// This node has too many reads open there.
    #[error("it serves as many reads as it may")]
    Busy,
    /// It could not be asked.
    #[error("{cause}")]
    Unreachable {
        /// Why.
        cause: String,
    },
}

/// Asks nodes that hold a partition.
pub trait ReadLink: Send + Sync + 'static {
    /// Where the partition stands there, and what is counted in it if `counts` says so.
    fn stand(
        &self,
        holder: NodeId,
        topic: TopicId,
        freshness: Freshness,
        counts: Counting,
    ) -> BoxFuture<'static, Result<Stand, Unread>>;

    /// The offset of a place.
    fn locate(&self, holder: NodeId, topic: TopicId, place: Place) -> BoxFuture<'static, Result<Offset, Unread>>;

    /// Batches, once.
    fn fetch(&self, holder: NodeId, topic: TopicId, wanted: Wanted) -> BoxFuture<'static, Result<Page, Unread>>;

    /// Batches from an offset on, as they are committed. A page without batches is a sign of life.
    fn follow(&self, holder: NodeId, topic: TopicId, from: Offset) -> BoxFuture<'static, Result<Pages, Unread>>;
}

/// Pages as they come; an error is the last one.
pub type Pages = BoxStream<'static, Result<Page, Unread>>;

/// Whether counters are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counting {
    /// They are.
    Wanted,
    /// They are not.
    Unwanted,
}

impl From<ReadError> for Unread {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Trimmed { log_start } => Self::Trimmed { log_start },
            ReadError::Stopped => Self::NotHeld,
            ReadError::NoLeader { cause } | ReadError::Unreachable { cause } => Self::NoLeader { cause },
            ReadError::Key(error) => Self::Damaged { what: error.to_string() },
            ReadError::Corrupt { what } => Self::Damaged { what },
        }
    }
}

impl From<Unread> for peer::ReadRefused {
    fn from(unread: Unread) -> Self {
        use peer::read_refused::Reason;
        let mut refused = Self { detail: unread.to_string(), ..Self::default() };
        let reason = match unread {
            Unread::NotHeld => Reason::NotHeld,
            Unread::Trimmed { log_start } => {
                refused.log_start = log_start.0;
                Reason::Trimmed
            }
            Unread::NoLeader { cause } => {
                refused.detail = cause;
                Reason::NoLeader
            }
            Unread::Damaged { what } => {
                refused.detail = what;
                Reason::Damaged
            }
            Unread::Busy => Reason::Busy,
            Unread::Unreachable { .. } => Reason::Unknown,
        };
        refused.set_reason(reason);
        refused
    }
}

impl From<peer::ReadRefused> for Unread {
    fn from(refused: peer::ReadRefused) -> Self {
        use peer::read_refused::Reason;
        match refused.reason() {
            Reason::NotHeld => Self::NotHeld,
            Reason::Trimmed => Self::Trimmed { log_start: Offset(refused.log_start) },
            Reason::NoLeader => Self::NoLeader { cause: refused.detail },
            Reason::Damaged => Self::Damaged { what: refused.detail },
            Reason::Busy => Self::Busy,
            Reason::Unknown => Self::Unreachable { cause: refused.detail },
        }
    }
}

/// An answer that does not hold together.
pub(crate) fn malformed(what: &str) -> Unread {
    Unread::Damaged { what: format!("its answer is malformed: {what}") }
}

impl From<Freshness> for peer::Freshness {
    fn from(freshness: Freshness) -> Self {
        match freshness {
            Freshness::Known => Self::Known,
            Freshness::Bounded => Self::Bounded,
            Freshness::Latest => Self::Latest,
        }
    }
}

impl From<peer::Freshness> for Freshness {
    fn from(freshness: peer::Freshness) -> Self {
        match freshness {
            peer::Freshness::Known => Self::Known,
            peer::Freshness::Bounded => Self::Bounded,
            peer::Freshness::Latest => Self::Latest,
        }
    }
}

impl From<DekRow> for peer::DataKey {
    fn from(row: DekRow) -> Self {
        Self { dek: Bytes::copy_from_slice(row.dek.as_bytes()), wrapped: row.wrapped }
    }
}

impl TryFrom<peer::DataKey> for DekRow {
    type Error = Unread;

    fn try_from(key: peer::DataKey) -> Result<Self, Unread> {
        let dek = DekId::try_from(&key.dek[..]).map_err(|_| malformed("data key"))?;
        // Copied, so that a small key does not keep a large message in memory.
        Ok(Self { dek, wrapped: Bytes::copy_from_slice(&key.wrapped) })
    }
}

impl From<TypeCount> for peer::CountedType {
    fn from(counted: TypeCount) -> Self {
        Self {
            handle: counted.handle,
            dek: Bytes::copy_from_slice(counted.dek.as_bytes()),
            sealed: counted.sealed,
            events: counted.events,
            bytes: counted.bytes,
            modified_ms: counted.modified_ms,
        }
    }
}

impl TryFrom<peer::CountedType> for TypeCount {
    type Error = Unread;

    fn try_from(counted: peer::CountedType) -> Result<Self, Unread> {
        Ok(Self {
            handle: counted.handle,
            dek: DekId::try_from(&counted.dek[..]).map_err(|_| malformed("type"))?,
            sealed: counted.sealed,
            events: counted.events,
            bytes: counted.bytes,
            modified_ms: counted.modified_ms,
        })
    }
}

impl From<Counts> for peer::Counts {
    fn from(counts: Counts) -> Self {
        Self {
            events: counts.events,
            bytes: counts.bytes,
            last_id: counts.last_id.map(|id| Bytes::copy_from_slice(id.as_bytes())).unwrap_or_default(),
            types: counts.types.into_iter().map(Into::into).collect(),
            keys: counts.keys.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<peer::Counts> for Counts {
    type Error = Unread;

    fn try_from(counts: peer::Counts) -> Result<Self, Unread> {
        let last_id = match &counts.last_id[..] {
            [] => None,
            id => Some(Rlid::try_from(id).map_err(|_| malformed("last id"))?),
        };
        Ok(Self {
            events: counts.events,
            bytes: counts.bytes,
            last_id,
            types: counts.types.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            keys: counts.keys.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

impl From<Stand> for peer::Stand {
    fn from(stand: Stand) -> Self {
        Self {
            leader: stand.leader.map_or(0, |leader| leader.0),
            log_start: stand.log_start.0,
            high_watermark: stand.high_watermark.0,
            entry_time_ms: stand.entry_time_ms,
            counts: stand.counts.map(Into::into),
        }
    }
}

impl TryFrom<peer::Stand> for Stand {
    type Error = Unread;

    fn try_from(stand: peer::Stand) -> Result<Self, Unread> {
        let (log_start, high_watermark) = places(stand.log_start, stand.high_watermark)?;
        Ok(Self {
            leader: (stand.leader != 0).then_some(NodeId(stand.leader)),
            log_start,
            high_watermark,
            entry_time_ms: stand.entry_time_ms,
            counts: stand.counts.map(TryInto::try_into).transpose()?,
        })
    }
}

fn places(log_start: u64, high_watermark: u64) -> Result<(Offset, Offset), Unread> {
    if log_start < Offset::FIRST.0 || high_watermark < log_start {
        return Err(malformed("offsets"));
    }
    Ok((Offset(log_start), Offset(high_watermark)))
}

impl From<Page> for peer::Page {
    fn from(page: Page) -> Self {
        let batch = |(index, sealed): (LogIndex, Bytes)| peer::SealedBatch { index: index.0, sealed };
        Self {
            log_start: page.log_start.0,
            high_watermark: page.high_watermark.0,
            batches: page.batches.into_iter().map(batch).collect(),
            keys: page.keys.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<peer::Page> for Page {
    type Error = Unread;

    fn try_from(page: peer::Page) -> Result<Self, Unread> {
        let (log_start, high_watermark) = places(page.log_start, page.high_watermark)?;
        Ok(Self {
            log_start,
            high_watermark,
            batches: page.batches.into_iter().map(|batch| (LogIndex(batch.index), batch.sealed)).collect(),
            keys: page.keys.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_survives_the_way_back() {
        let refusals = [
            Unread::NotHeld,
            Unread::Trimmed { log_start: Offset(7) },
            Unread::NoLeader { cause: "an election is on".to_owned() },
            Unread::Damaged { what: "a hole".to_owned() },
            Unread::Busy,
        ];
        for refusal in refusals {
            assert_eq!(Unread::from(peer::ReadRefused::from(refusal.clone())), refusal);
        }
        // A reason that this build does not know says nothing about the replica.
        assert!(matches!(Unread::from(peer::ReadRefused::default()), Unread::Unreachable { .. }));
    }

    #[test]
    fn answers_survive_the_way_back_and_malformed_ones_are_refused() {
        let dek = DekId::from_bytes([3; 16]);
        let keys = vec![DekRow { dek, wrapped: Bytes::from_static(b"wrapped") }];
        let counted =
            TypeCount { handle: 1, dek, sealed: Bytes::from_static(b"s"), events: 2, bytes: 3, modified_ms: 4 };
        let last_id = Some(Rlid::from_bytes([5; 10]));
        let counts = Counts { events: 9, bytes: 8, last_id, types: vec![counted], keys: keys.clone() };
        let stand = Stand {
            leader: Some(NodeId(2)),
            log_start: Offset(1),
            high_watermark: Offset(10),
            entry_time_ms: 5,
            counts: Some(counts),
        };
        assert_eq!(Stand::try_from(peer::Stand::from(stand.clone())), Ok(stand.clone()));
        let batches = vec![(LogIndex(4), Bytes::from_static(b"batch"))];
        let page = Page { log_start: Offset(1), high_watermark: Offset(3), batches, keys };
        assert_eq!(Page::try_from(peer::Page::from(page.clone())), Ok(page.clone()));

        let spoilt = peer::Page { high_watermark: 0, ..page.clone().into() };
        assert!(Page::try_from(spoilt).is_err());
        let mut spoilt = peer::Page::from(page);
        spoilt.keys[0].dek.truncate(3);
        assert!(Page::try_from(spoilt).is_err());
        let mut spoilt = peer::Stand::from(stand);
        spoilt.counts.as_mut().unwrap().last_id.truncate(3);
        assert!(Stand::try_from(spoilt).is_err());
    }
}
