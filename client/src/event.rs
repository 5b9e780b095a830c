//! Events as a program makes and receives them.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use ensign_proto::pb::ensign::v1beta1 as pb;
use ensign_proto::pb::mimetype::v1beta1::Mime;
use ensign_proto::{Offset, Rlid, Term, TopicId};
use prost::Message as _;
use thiserror::Error;

/// The largest event, encoded, that a server accepts.
pub const EVENT_BYTES_MAX: usize = 5_243_000;

/// A schema's name and version.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventType {
    /// Its name.
    pub name: String,
    /// Breaking changes.
    pub major: u32,
    /// Additions.
    pub minor: u32,
    /// Corrections.
    pub patch: u32,
}

/// What a publisher sends and a subscriber gets.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The payload.
    pub data: Bytes,
    /// Keys and values that travel with it.
    pub metadata: HashMap<String, String>,
    /// The format of `data`: a number of the `mimetype.v1beta1.MIME` table. Unknown numbers pass through unchanged.
    pub mimetype: i32,
    /// The schema of `data`.
    pub event_type: Option<EventType>,
    /// When the publisher made it, by the publisher's clock.
    pub created: Option<SystemTime>,
}

impl Event {
    /// An event of `data`, made now, of no particular format.
    pub fn new(data: impl Into<Bytes>) -> Self {
        Self {
            data: data.into(),
            metadata: HashMap::new(),
            mimetype: Mime::Unspecified as i32,
            event_type: None,
            created: Some(wall_now()),
        }
    }

    /// The same event, of this format.
    #[must_use]
    pub fn with_mimetype(mut self, mimetype: Mime) -> Self {
        self.mimetype = mimetype as i32;
        self
    }

    /// The same event with one more pair of metadata.
    #[must_use]
    pub fn with_metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    pub(crate) fn encode(self) -> Bytes {
        let event = pb::Event {
            data: self.data,
            metadata: self.metadata,
            mimetype: self.mimetype,
            r#type: self.event_type.map(|it| pb::Type {
                name: it.name,
                major_version: it.major,
                minor_version: it.minor,
                patch_version: it.patch,
            }),
            created: self.created.and_then(to_timestamp),
        };
        event.encode_to_vec().into()
    }

    /// Reads a stored event.
    ///
    /// # Errors
    /// [`DecodeEventError`]: a publisher stored bytes that are no event; servers do not look inside.
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeEventError> {
        let event = pb::Event::decode(bytes)?;
        Ok(Self {
            data: event.data,
            metadata: event.metadata,
            mimetype: event.mimetype,
            event_type: event.r#type.map(|it| EventType {
                name: it.name,
                major: it.major_version,
                minor: it.minor_version,
                patch: it.patch_version,
            }),
            created: event.created.and_then(from_timestamp),
        })
    }
}

/// Bytes that a publisher stored as an event, but are none.
#[derive(Debug, Clone, Error)]
#[error("the stored bytes are not an event")]
pub struct DecodeEventError(#[from] prost::DecodeError);

/// A committed event as the server delivers it.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivery {
    /// Its id: unique and rising within its partition.
    pub id: Rlid,
    /// Where it was published.
    pub topic: TopicId,
    /// Its place, from 1, without holes.
    pub offset: Offset,
    /// The leadership that committed it.
    pub epoch: Term,
    /// When it was committed, by the leader's clock.
    pub committed: Option<SystemTime>,
    /// What the publisher called itself.
    pub publisher: String,
    /// The key that it was published under; often empty.
    pub key: Bytes,
    /// The encoded event; see [`Delivery::event`].
    pub bytes: Bytes,
}

impl Delivery {
    /// The event itself.
    ///
    /// # Errors
    /// As [`Event::decode`].
    pub fn event(&self) -> Result<Event, DecodeEventError> {
        Event::decode(self.bytes.clone())
    }
}

impl TryFrom<pb::EventWrapper> for Delivery {
    type Error = String;

    fn try_from(wrapper: pb::EventWrapper) -> Result<Self, String> {
        Ok(Self {
            id: Rlid::try_from(&wrapper.id[..]).map_err(|error| error.to_string())?,
            topic: TopicId::try_from(&wrapper.topic_id[..]).map_err(|error| error.to_string())?,
            offset: Offset(wrapper.offset),
            epoch: Term(wrapper.epoch),
            committed: wrapper.committed.and_then(from_timestamp),
            publisher: wrapper.publisher.map(|it| it.client_id).unwrap_or_default(),
            key: wrapper.key,
            bytes: wrapper.event,
        })
    }
}

#[allow(clippy::disallowed_methods, reason = "an SDK stamps events with its caller's wall clock; nothing relies on it")]
pub(crate) fn wall_now() -> SystemTime {
    SystemTime::now()
}

pub(crate) fn to_timestamp(time: SystemTime) -> Option<prost_types::Timestamp> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).ok()?,
        nanos: since.subsec_nanos().cast_signed(),
    })
}

pub(crate) fn from_timestamp(time: prost_types::Timestamp) -> Option<SystemTime> {
    let since = Duration::new(u64::try_from(time.seconds).ok()?, u32::try_from(time.nanos).ok()?);
    SystemTime::UNIX_EPOCH.checked_add(since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_survives_its_encoding() {
        let mut event = Event::new("{}").with_mimetype(Mime::ApplicationJson).with_metadata("k", "v");
        event.event_type = Some(EventType { name: "Order".to_owned(), major: 1, minor: 2, patch: 3 });
        assert_eq!(Event::decode(event.clone().encode()).unwrap(), event);
    }

    #[test]
    fn a_format_that_we_do_not_know_passes_through() {
        let event = Event { mimetype: 4242, ..Event::new("x") };
        assert_eq!(Event::decode(event.encode()).unwrap().mimetype, 4242);
    }
}
