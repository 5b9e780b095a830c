//! Rows of quotas.

use bytes::Bytes;
use prost::Message;

use super::DecodeError;
use crate::catalog::quota::{Change, Limit, Quota, QuotaChange};

/// A limit, or in a change what to do with it.
#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct LimitRow {
    // 1 unlimited, 2 at `at`; in a change also 3 unset.
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(uint64, tag = "2")]
    at: u64,
}

/// The limits that are set; in a change, those that are changed.
#[derive(Clone, PartialEq, Message)]
pub(super) struct QuotaRow {
    #[prost(message, optional, tag = "1")]
    events_per_second: Option<LimitRow>,
    #[prost(message, optional, tag = "2")]
    bytes_per_second: Option<LimitRow>,
    #[prost(message, optional, tag = "3")]
    stored_bytes: Option<LimitRow>,
    #[prost(message, optional, tag = "4")]
    topics: Option<LimitRow>,
    #[prost(message, optional, tag = "5")]
    streams: Option<LimitRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ProjectQuotaRow {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) project: Bytes,
    #[prost(message, optional, tag = "2")]
    pub(super) limits: Option<QuotaRow>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct QuotaChangeRow {
    // Empty for the cluster's default.
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) project: Bytes,
    #[prost(message, optional, tag = "2")]
    pub(super) limits: Option<QuotaRow>,
}

impl From<Limit> for LimitRow {
    fn from(limit: Limit) -> Self {
        match limit {
            Limit::Unlimited => Self { kind: 1, at: 0 },
            Limit::At(at) => Self { kind: 2, at },
        }
    }
}

impl LimitRow {
    const UNSET: Self = Self { kind: 3, at: 0 };

    /// None: forget it.
    fn limit(self) -> Result<Option<Limit>, DecodeError> {
        match self.kind {
            1 => Ok(Some(Limit::Unlimited)),
            2 => Ok(Some(Limit::At(self.at))),
            3 => Ok(None),
            // Strict: a limit that this version does not know must not get lost in the next snapshot.
            _ => Err(DecodeError::Invalid("limit")),
        }
    }
}

impl From<&Quota> for QuotaRow {
    fn from(quota: &Quota) -> Self {
        Self {
            events_per_second: quota.events_per_second.map(Into::into),
            bytes_per_second: quota.bytes_per_second.map(Into::into),
            stored_bytes: quota.stored_bytes.map(Into::into),
            topics: quota.topics.map(Into::into),
            streams: quota.streams.map(Into::into),
        }
    }
}

impl TryFrom<QuotaRow> for Quota {
    type Error = DecodeError;

    fn try_from(row: QuotaRow) -> Result<Self, DecodeError> {
        let limit = |row: Option<LimitRow>| row.map_or(Ok(None), LimitRow::limit);
        Ok(Self {
            events_per_second: limit(row.events_per_second)?,
            bytes_per_second: limit(row.bytes_per_second)?,
            stored_bytes: limit(row.stored_bytes)?,
            topics: limit(row.topics)?,
            streams: limit(row.streams)?,
        })
    }
}

impl From<&QuotaChange> for QuotaRow {
    fn from(change: &QuotaChange) -> Self {
        let row = |change: Change| match change {
            Change::Keep => None,
            Change::Unset => Some(LimitRow::UNSET),
            Change::Set(limit) => Some(limit.into()),
        };
        Self {
            events_per_second: row(change.events_per_second),
            bytes_per_second: row(change.bytes_per_second),
            stored_bytes: row(change.stored_bytes),
            topics: row(change.topics),
            streams: row(change.streams),
        }
    }
}

impl TryFrom<QuotaRow> for QuotaChange {
    type Error = DecodeError;

    fn try_from(row: QuotaRow) -> Result<Self, DecodeError> {
        let change = |row: Option<LimitRow>| match row {
            None => Ok(Change::Keep),
            Some(row) => Ok(row.limit()?.map_or(Change::Unset, Change::Set)),
        };
        Ok(Self {
            events_per_second: change(row.events_per_second)?,
            bytes_per_second: change(row.bytes_per_second)?,
            stored_bytes: change(row.stored_bytes)?,
            topics: change(row.topics)?,
            streams: change(row.streams)?,
        })
    }
}
