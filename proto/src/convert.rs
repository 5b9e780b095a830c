//! From wire messages to the vocabulary, where the two meet.

use thiserror::Error;

use crate::pb::ensign::v1beta1 as api;
use crate::{InvalidId, Offset, Rlid, SessionId};

/// A field of a request that does not say what it must.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("invalid {field} field")]
pub struct InvalidField {
    /// The field's name in the schema, with spaces.
    pub field: &'static str,
    /// What was wrong with it, if there is more to say.
    #[source]
    pub source: Option<InvalidId>,
}

impl InvalidField {
    fn new(field: &'static str) -> Self {
        Self { field, source: None }
    }
}

/// Where a subscription begins in each of its topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// With what is committed from now on.
    #[default]
    Latest,
    /// With this offset.
    Offset(Offset),
    /// With the first event committed at this time or later, in nanoseconds since the Unix epoch.
    Time(u64),
    /// With the event that follows this one.
    After(Rlid),
    /// With the oldest event there is.
    Earliest,
}

impl TryFrom<&api::Subscription> for Start {
    type Error = InvalidField;

    fn try_from(subscription: &api::Subscription) -> Result<Self, InvalidField> {
        use api::subscription::Start as Wire;
        match &subscription.start {
            None => Ok(Self::Latest),
            // Offset 0 is before the first event, and asking for everything by it is a common habit.
            Some(Wire::Offset(offset)) => Ok(Self::Offset(Offset((*offset).max(Offset::FIRST.0)))),
            Some(Wire::Time(time)) => unix_nanos(time).map(Self::Time).ok_or(InvalidField::new("start time")),
            Some(Wire::AfterEvent(id)) => Rlid::try_from(&id[..])
                .map(Self::After)
                .map_err(|source| InvalidField { field: "start event id", source: Some(source) }),
            Some(Wire::Earliest(_)) => Ok(Self::Earliest),
        }
    }
}

/// Who numbers the events of a stream, so that a retry is recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Producer {
    /// The session.
    pub session: SessionId,
    /// Which life of it.
    pub epoch: u32,
}

impl Producer {
    /// The producer that `bytes` and `epoch` name. Absent if there are no bytes: the server then makes one.
    fn parse(bytes: &[u8], epoch: u32) -> Result<Option<Self>, InvalidField> {
        if bytes.is_empty() {
            return if epoch == 0 { Ok(None) } else { Err(InvalidField::new("producer session")) };
        }
        let session = SessionId::try_from(bytes)
            .map_err(|source| InvalidField { field: "producer session", source: Some(source) })?;
        if session.is_zero() {
            return Err(InvalidField::new("producer session"));
        }
        Ok(Some(Self { session, epoch }))
    }

    /// The producer that a stream was opened for.
    pub fn of_stream(open: &api::OpenStream) -> Result<Option<Self>, InvalidField> {
        Self::parse(&open.producer_session, open.producer_epoch)
    }

    /// The producer of one event, where it is not that of its stream.
    pub fn of_event(event: &api::EventWrapper) -> Result<Option<Self>, InvalidField> {
        Self::parse(&event.producer_session, event.producer_epoch)
    }
}

/// What is to become of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TopicChange {
    /// It takes no more events.
    Archive,
    /// It and its events go.
    Destroy,
}

impl TryFrom<&api::TopicMod> for TopicChange {
    type Error = InvalidField;

    fn try_from(request: &api::TopicMod) -> Result<Self, InvalidField> {
        match request.operation() {
            api::topic_mod::Operation::Archive => Ok(Self::Archive),
            api::topic_mod::Operation::Destroy => Ok(Self::Destroy),
            api::topic_mod::Operation::Noop => Err(InvalidField::new("operation")),
        }
    }
}

/// A time stamp of `nanos` since the Unix epoch.
pub fn timestamp(nanos: u64) -> prost_types::Timestamp {
    // Seconds of a u64 of nanoseconds fit an i64, and the rest an i32.
    prost_types::Timestamp {
        seconds: (nanos / 1_000_000_000).cast_signed(),
        nanos: ((nanos % 1_000_000_000) as u32).cast_signed(),
    }
}

/// Nanoseconds since the Unix epoch, if the time stamp is well formed, not earlier than the epoch and before the year 2554.
pub fn unix_nanos(time: &prost_types::Timestamp) -> Option<u64> {
    let seconds = u64::try_from(time.seconds).ok()?;
    let nanos = u64::try_from(time.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::subscription::Start as Wire;

    fn start(start: impl Into<Option<Wire>>) -> Result<Start, InvalidField> {
        Start::try_from(&api::Subscription { start: start.into(), ..Default::default() })
    }

    #[test]
    fn a_subscription_begins_where_it_says() {
        assert_eq!(start(None), Ok(Start::Latest));
        assert_eq!(start(Wire::Offset(0)), Ok(Start::Offset(Offset::FIRST)));
        assert_eq!(start(Wire::Offset(9)), Ok(Start::Offset(Offset(9))));
        assert_eq!(start(Wire::Time(timestamp(1_500_000_000))), Ok(Start::Time(1_500_000_000)));
        let id = Rlid::new(7, 8);
        assert_eq!(start(Wire::AfterEvent(id.as_bytes().to_vec().into())), Ok(Start::After(id)));
        assert_eq!(start(Wire::Earliest(false)), Ok(Start::Earliest));
    }

    #[test]
    fn a_start_that_is_no_place_is_refused() {
        let refused = |wire: Wire| start(wire).unwrap_err().to_string();
        assert_eq!(refused(Wire::AfterEvent(vec![1; 16].into())), "invalid start event id field");
        for (seconds, nanos) in [(-1, 0), (0, -1), (0, 1_000_000_000), (i64::MAX, 0)] {
            assert_eq!(refused(Wire::Time(prost_types::Timestamp { seconds, nanos })), "invalid start time field");
        }
    }

    #[test]
    fn a_producer_has_a_session_of_sixteen_bytes_or_none() {
        let parse = |bytes: &'static [u8], producer_epoch| {
            let open = api::OpenStream { producer_session: bytes.into(), producer_epoch, ..Default::default() };
            Producer::of_stream(&open).map_err(|error| error.to_string())
        };
        assert_eq!(parse(&[], 0), Ok(None));
        let session = SessionId::from_bytes([7; 16]);
        assert_eq!(parse(&[7; 16], 3), Ok(Some(Producer { session, epoch: 3 })));
        for (bytes, epoch) in [(&[][..], 1), (&[7; 15], 1), (&[7; 17], 1), (&[0; 16], 1)] {
            assert_eq!(parse(bytes, epoch), Err("invalid producer session field".into()));
        }
    }

    #[test]
    fn a_topic_is_archived_or_destroyed_and_nothing_else() {
        let change = |operation| TopicChange::try_from(&api::TopicMod { id: String::new(), operation });
        assert_eq!(change(1), Ok(TopicChange::Archive));
        assert_eq!(change(2), Ok(TopicChange::Destroy));
        for operation in [0, 3, -1] {
            assert_eq!(change(operation).unwrap_err().to_string(), "invalid operation field");
        }
    }
}
