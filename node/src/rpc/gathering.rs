//! Events of one topic on their way into a submission, copied out of the messages that they came in.

use bytes::{Bytes, BytesMut};
use ensign_proto::TopicId;
use ensign_proto::pb::ensign::v1beta1 as api;
use prost::Message as _;

use crate::partition::{BodyShape, Numbering, RawKind, encode_body};

/// Where a run of events is cut: that of a batch, so that a chunk never spans two.
const RUN_BYTES: usize = 256 << 10;

/// What an event costs in memory beside its own bytes.
const EVENT_OVERHEAD: usize = 64;

/// The longest local id, in bytes; it is answered with what the event is.
pub(super) const LOCAL_ID_MAX: usize = 128;

/// The local ids of consecutive events, copied together: as it arrives, each would keep the whole message in memory that it came in.
#[derive(Debug, Default)]
pub(super) struct LocalIds {
    joined: BytesMut,
    lengths: Vec<u8>,
}

impl LocalIds {
    /// Adds an id of at most [`LOCAL_ID_MAX`] bytes.
    pub(super) fn push(&mut self, id: &[u8]) {
        debug_assert!(id.len() <= LOCAL_ID_MAX, "checked when the event was taken");
        self.joined.extend_from_slice(id);
        self.lengths.push(id.len() as u8);
    }

    pub(super) fn of(id: &[u8]) -> Self {
        let mut one = Self::default();
        one.push(id);
        one
    }

    pub(super) fn len(&self) -> usize {
        self.lengths.len()
    }

    /// What they take in memory.
    pub(super) fn weight(&self) -> usize {
        128 + self.joined.capacity() + self.lengths.capacity()
    }
}

impl IntoIterator for LocalIds {
    type Item = Bytes;
    type IntoIter = Ids;

    fn into_iter(self) -> Ids {
        Ids { joined: self.joined.freeze(), lengths: self.lengths.into_iter() }
    }
}

/// Local ids, one by one.
pub(super) struct Ids {
    joined: Bytes,
    lengths: std::vec::IntoIter<u8>,
}

impl Iterator for Ids {
    type Item = Bytes;

    fn next(&mut self) -> Option<Bytes> {
        self.lengths.next().map(|length| self.joined.split_to(usize::from(length)))
    }
}

/// Consecutive events of one topic.
#[derive(Debug)]
pub(super) struct Gathering {
    pub(super) topic: TopicId,
    pub(super) numbering: Numbering,
    pub(super) local_ids: LocalIds,
    pub(super) kinds: Vec<Bytes>,
    last_kind: Option<(RawKind, u16)>,
    pub(super) shapes: Vec<BodyShape>,
    pub(super) kind_of: Vec<u16>,
    pub(super) bodies: Vec<u8>,
}

impl Gathering {
    /// None yet, and `size` bytes of event to come.
    pub(super) fn new(topic: TopicId, numbering: Numbering, size: usize) -> Self {
        Self {
            topic,
            numbering,
            local_ids: LocalIds::default(),
            kinds: Vec::new(),
            last_kind: None,
            shapes: Vec::new(),
            kind_of: Vec::new(),
            bodies: Vec::with_capacity(size + EVENT_OVERHEAD),
        }
    }

    /// Whether an event continues the run.
    pub(super) fn continues(&self, topic: TopicId, numbering: Numbering, size: usize) -> bool {
        let follows = match (self.numbering, numbering) {
            (Numbering::Ours, Numbering::Ours) => true,
            (Numbering::Theirs { session, epoch, first }, Numbering::Theirs { session: s, epoch: e, first: f }) => {
                (session, epoch, first + self.shapes.len() as u64) == (s, e, f)
            }
            (Numbering::Ours, Numbering::Theirs { .. }) | (Numbering::Theirs { .. }, Numbering::Ours) => false,
        };
        follows && self.topic == topic && self.bodies.len() + size <= RUN_BYTES
    }

    /// The place of the event's kind in `kinds`, from 1; 0 if it has none.
    fn kind(&mut self, event: &Bytes) -> u16 {
        let Some(raw) = RawKind::of(event) else { return 0 };
        // Neighbours are mostly of one kind.
        if let Some((last, place)) = &self.last_kind
            && *last == raw
        {
            return *place;
        }
        let Some(kind) = raw.decode().map(|kind| Bytes::from(kind.encode_to_vec())) else { return 0 };
        let known = self.kinds.iter().position(|known| *known == kind);
        let place = known.unwrap_or_else(|| {
            self.kinds.push(kind);
            self.kinds.len() - 1
        }) as u16
            + 1;
        self.last_kind = Some((raw, place));
        place
    }

    pub(super) fn push(&mut self, event: api::EventWrapper) {
        let kind = self.kind(&event.event);
        self.local_ids.push(&event.local_id);
        let has_event = !event.event.is_empty();
        let before = self.bodies.len();
        encode_body(event, &mut self.bodies);
        self.shapes.push(BodyShape::new((self.bodies.len() - before) as u32, has_event));
        self.kind_of.push(kind);
    }

    /// What the events take in memory until there is an outcome.
    pub(super) fn weight(&self) -> usize {
        let kinds: usize = self.kinds.iter().map(|kind| kind.len() + EVENT_OVERHEAD).sum();
        self.bodies.capacity() + self.shapes.len() * EVENT_OVERHEAD + kinds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_that_is_gathered_keeps_nothing_of_its_message_alive() {
        let message = Bytes::from(vec![1; 1 << 20]);
        let mut run = Gathering::new(TopicId::default(), Numbering::Ours, 10);
        let wrapper = api::EventWrapper {
            local_id: message.slice(..16),
            event: message.slice(16..26),
            key: message.slice(26..30),
            ..Default::default()
        };
        run.push(wrapper);
        assert!(message.is_unique());
        assert_eq!(run.local_ids.into_iter().collect::<Vec<_>>(), [vec![1; 16]]);
    }

    #[test]
    fn kinds_and_spare_room_are_weighed() {
        let kinds = |names: usize| {
            let mut run = Gathering::new(TopicId::default(), Numbering::Ours, 0);
            for n in 0..100 {
                let name = format!("{:0200}", n % names);
                let r#type = Some(api::Type { name, ..Default::default() });
                let event = api::Event { r#type, ..Default::default() }.encode_to_vec();
                run.push(api::EventWrapper { event: event.into(), ..Default::default() });
            }
            assert!(run.weight() >= run.bodies.capacity());
            run.weight()
        };
        assert!(kinds(100) >= kinds(1) + 99 * 200);
    }
}
