//! An event on its way in: what of its envelope is kept, and what it is counted by.

use bytes::{Buf as _, Bytes};
use ensign_proto::pb::ensign::peer::v1::EventKind;
use ensign_proto::pb::ensign::v1beta1 as api;
use prost::Message as _;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// The name under which events without a type are counted.
const UNSPECIFIED: &str = "Unspecified";

/// The longest name, in bytes, under which events are counted. Names are kept for as long as their topic, so longer ones are not.
pub(crate) const TYPE_NAME_MAX: usize = 256;

/// The largest encoded `Type` that is looked at: its name, and three numbers with room to spare.
const TYPE_MAX: usize = TYPE_NAME_MAX + 32;

/// The largest encoded `EventKind` of a name that is kept.
pub(crate) const KIND_MAX: usize = TYPE_NAME_MAX + 40;

/// The envelope fields that belong to the publisher: key, event, and how its author encrypted and compressed it.
///
/// Everything else in an envelope is the server's: a publisher's values for it are dropped, never stored.
pub(crate) fn encode_body(wrapper: api::EventWrapper, out: &mut Vec<u8>) {
    let kept = api::EventWrapper {
        key: wrapper.key,
        event: wrapper.event,
        encryption: wrapper.encryption,
        compression: wrapper.compression,
        ..api::EventWrapper::default()
    };
    kept.encode_raw(out);
}

/// What an encoded `Event` is counted by, as it is encoded: cheap to take and to compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawKind {
    mimetype: i32,
    /// An encoded `Type`; empty if there is none.
    encoded_type: Bytes,
}

impl RawKind {
    /// The kind of an event; none if the bytes are not an `Event`, or are empty.
    ///
    /// Only the outermost fields are looked at; payload and metadata are skipped, not decoded.
    pub(crate) fn of(event: &Bytes) -> Option<Self> {
        if event.is_empty() {
            return None;
        }
        let mut rest: &[u8] = event;
        let mut kind = Self { mimetype: 0, encoded_type: Bytes::new() };
        while rest.has_remaining() {
            let (tag, wire_type) = decode_key(&mut rest).ok()?;
            match (tag, wire_type) {
                (4, WireType::Varint) => kind.mimetype = decode_varint(&mut rest).ok()? as i32,
                (5, WireType::LengthDelimited) => {
                    let length = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
                    let (encoded, after) = rest.split_at_checked(length)?;
                    kind.encoded_type = event.slice_ref(encoded);
                    rest = after;
                }
                _ => skip_field(wire_type, tag, &mut rest, DecodeContext::default()).ok()?,
            }
        }
        Some(kind)
    }

    /// The kind in words; none if its type does not decode, or has too long a name to be counted by.
    pub(crate) fn decode(&self) -> Option<EventKind> {
        if self.encoded_type.len() > TYPE_MAX {
            return None;
        }
        let declared = api::Type::decode(self.encoded_type.clone()).ok()?;
        if declared.name.len() > TYPE_NAME_MAX {
            return None;
        }
        let (major, minor, patch) = (declared.major_version, declared.minor_version, declared.patch_version);
        let unnamed = declared.name.is_empty() && (major, minor, patch) == (0, 0, 0);
        let name = if unnamed { UNSPECIFIED.to_owned() } else { declared.name };
        Some(EventKind { name, major, minor, patch, mimetype: self.mimetype })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind_of(event: &Bytes) -> Option<EventKind> {
        RawKind::of(event)?.decode()
    }

    fn event(r#type: Option<api::Type>, mimetype: i32) -> Bytes {
        let metadata = [("a".to_owned(), "b".to_owned())].into();
        let event = api::Event { data: Bytes::from_static(b"payload"), metadata, mimetype, r#type, created: None };
        event.encode_to_vec().into()
    }

    #[test]
    fn an_event_is_counted_by_its_type_and_mimetype() {
        let declared = api::Type { name: "Play".to_owned(), major_version: 1, minor_version: 2, patch_version: 3 };
        let expected = EventKind { name: "Play".to_owned(), major: 1, minor: 2, patch: 3, mimetype: 50 };
        assert_eq!(kind_of(&event(Some(declared), 50)), Some(expected));
    }

    #[test]
    fn an_absent_type_and_an_empty_one_count_alike() {
        let unspecified = EventKind { name: "Unspecified".to_owned(), mimetype: 1, ..EventKind::default() };
        assert_eq!(kind_of(&event(None, 1)), Some(unspecified.clone()));
        assert_eq!(kind_of(&event(Some(api::Type::default()), 1)), Some(unspecified));
    }

    #[test]
    fn bytes_that_are_no_event_have_no_kind() {
        assert_eq!(kind_of(&Bytes::new()), None);
        assert_eq!(kind_of(&Bytes::from_static(b"\xff\xff\xff not protobuf")), None);
        assert_eq!(kind_of(&Bytes::from_static(b"\x2a\x7f short")), None);
    }

    #[test]
    fn the_longest_name_is_counted_by_and_a_longer_one_is_not() {
        let named = |length: usize| {
            let name = "n".repeat(length);
            event(
                Some(api::Type { name, major_version: u32::MAX, minor_version: u32::MAX, patch_version: u32::MAX }),
                -1,
            )
        };
        let longest = kind_of(&named(TYPE_NAME_MAX)).unwrap();
        assert_eq!(longest.name.len(), TYPE_NAME_MAX);
        assert!(longest.encoded_len() <= KIND_MAX, "the batcher introduces every kind that is counted by");
        assert_eq!(kind_of(&named(TYPE_NAME_MAX + 1)), None);
        assert_eq!(kind_of(&named(5_000_000)), None);
    }

    #[test]
    fn a_publisher_cannot_forge_what_is_the_servers() {
        let forged = api::EventWrapper {
            id: Bytes::from_static(b"0123456789"),
            topic_id: Bytes::from_static(b"0123456789abcdef"),
            offset: 7,
            epoch: 9,
            shard: 3,
            publisher: Some(api::Publisher::default()),
            is_duplicate: true,
            duplicate_id: Bytes::from_static(b"0123456789"),
            local_id: Bytes::from_static(b"local"),
            key: Bytes::from_static(b"key"),
            event: Bytes::from_static(b"event"),
            compression: Some(api::Compression { algorithm: 1, level: 3 }),
            ..api::EventWrapper::default()
        };
        let mut body = Vec::new();
        encode_body(forged, &mut body);
        let kept = api::EventWrapper::decode(&body[..]).unwrap();
        let expected = api::EventWrapper {
            key: Bytes::from_static(b"key"),
            event: Bytes::from_static(b"event"),
            compression: Some(api::Compression { algorithm: 1, level: 3 }),
            ..api::EventWrapper::default()
        };
        assert_eq!(kept, expected);
    }
}
