//! How topics are named: by a validated name, by the hash of one, or by id.

use std::fmt;
use std::io::Cursor;
use std::str::FromStr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use thiserror::Error;

use crate::{InvalidId, TopicId};

/// A topic's name: 1 to 512 bytes, a letter and then letters, digits, `.`, `-` and `_`. Case matters.
///
/// A cheap clone. Names lie outside the seal and outlive revocation, so they must not carry personal data.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicName(Arc<str>);

/// Why text is not a topic name. The messages are those that clients of the published API know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InvalidTopicName {
    /// There is none.
    #[error("missing name field")]
    Missing,
    /// It has more than [`TopicName::BYTES_MAX`] bytes.
    #[error("topic name is too long")]
    TooLong,
    /// It has a character that is not allowed, or not allowed at its start.
    #[error("topic name is invalid")]
    Malformed,
}

impl TopicName {
    /// The longest name, in bytes.
    pub const BYTES_MAX: usize = 512;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name's hash.
    pub fn hash(&self) -> TopicNameHash {
        topic_name_hash(&self.0)
    }
}

impl FromStr for TopicName {
    type Err = InvalidTopicName;

    fn from_str(text: &str) -> Result<Self, InvalidTopicName> {
        let bytes = text.as_bytes();
        let Some(first) = bytes.first() else { return Err(InvalidTopicName::Missing) };
        if bytes.len() > Self::BYTES_MAX {
            return Err(InvalidTopicName::TooLong);
        }
        let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if first.is_ascii_alphabetic() && bytes.iter().all(allowed) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidTopicName::Malformed)
        }
    }
}

impl TryFrom<&str> for TopicName {
    type Error = InvalidTopicName;

    fn try_from(text: &str) -> Result<Self, InvalidTopicName> {
        text.parse()
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TopicName({:?})", self.as_str())
    }
}

/// The 128-bit murmur3 hash of a topic name: 22 base64url characters without padding as text.
///
/// SDKs compute it themselves and compare texts, so it is part of the wire contract. It is not secret and proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicNameHash([u8; 16]);

/// Hashes a name: `MurmurHash3` x64 128-bit with seed 0, both halves big-endian.
pub fn topic_name_hash(name: &str) -> TopicNameHash {
    let hash = murmur3::murmur3_x64_128(&mut Cursor::new(name), 0).expect("reading from memory cannot fail");
    let (first, second) = (hash as u64, (hash >> 64) as u64);
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_be_bytes());
    bytes[8..].copy_from_slice(&second.to_be_bytes());
    TopicNameHash(bytes)
}

impl TopicNameHash {
    /// The hash of these sixteen bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The sixteen bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl FromStr for TopicNameHash {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let mut bytes = [0; 16];
        match URL_SAFE_NO_PAD.decode_slice(text, &mut bytes) {
            Ok(16) => Ok(Self(bytes)),
            _ => Err(InvalidId { kind: "topic name hash", text: text.chars().take(64).collect() }),
        }
    }
}

impl fmt::Display for TopicNameHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for TopicNameHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TopicNameHash({self})")
    }
}

/// What a client may mean by a string that refers to a topic.
///
/// A text can be a name *and* an id or a hash: try the readings in this order and take the first that names a topic.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TopicRef {
    /// The text as a name.
    pub name: Option<TopicName>,
    /// The text as an id.
    pub id: Option<TopicId>,
    /// The text as the hash of a name.
    pub hash: Option<TopicNameHash>,
}

impl TopicRef {
    /// All readings of `text`. None at all means that it can refer to no topic.
    pub fn parse(text: &str) -> Self {
        Self { name: text.parse().ok(), id: text.parse().ok(), hash: text.parse().ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_hashes_as_the_wire_reference_says() {
        let hex = |hash: TopicNameHash| format!("{:032x}", u128::from_be_bytes(*hash.as_bytes()));
        for (name, bytes, text) in [
            ("", "00000000000000000000000000000000", "AAAAAAAAAAAAAAAAAAAAAA"),
            ("topic", "08bcb3329e24668d923704322de7faf2", "CLyzMp4kZo2SNwQyLef68g"),
            ("testing.testapp.foo", "178ce04519db8237e2a7b5e3d2b34622", "F4zgRRnbgjfip7Xj0rNGIg"),
            ("testing.testapp.alerts", "85468882a509168c2b894515ba65ba72", "hUaIgqUJFowriUUVumW6cg"),
        ] {
            assert_eq!(hex(topic_name_hash(name)), bytes, "{name}");
            assert_eq!(topic_name_hash(name).to_string(), text);
            assert_eq!(text.parse(), Ok(topic_name_hash(name)));
        }
        assert_eq!(topic_name_hash("testing.topics.topica").to_string(), "IdTcxHgZmlLM8oBj_YytLw");
        assert_eq!(hex(topic_name_hash("testing.test.consumergroup.alpha")), "f0a5b9500d4b78e0dd7f150a39155952");
    }

    #[test]
    fn a_name_is_refused_for_the_reason_that_clients_are_told() {
        let refused = |text: &str| text.parse::<TopicName>().unwrap_err().to_string();
        assert_eq!(refused(""), "missing name field");
        assert_eq!(refused(&"a".repeat(513)), "topic name is too long");
        for text in ["1a", ".a", "_a", "a/b", "a b", "a\n", "é", "aé", "a\0"] {
            assert_eq!(refused(text), "topic name is invalid", "{text:?}");
        }
        for text in ["a", "Z", "a.b-c_D9", &"a".repeat(512)] {
            assert_eq!(text.parse::<TopicName>().unwrap().as_str(), text);
        }
    }

    #[test]
    fn a_hash_of_another_length_is_refused() {
        for text in [
            "",
            "CLyzMp4kZo2SNwQyLef68",
            "CLyzMp4kZo2SNwQyLef68g=",
            "CLyzMp4kZo2SNwQyLef68gA",
            "CLyzMp4kZo2SNwQyLef6/g",
        ] {
            assert!(text.parse::<TopicNameHash>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_reference_can_be_read_in_more_than_one_way() {
        let id = TopicId::new(1_700_000_000_000, [7; 10]);
        let reference = TopicRef::parse(&id.to_string());
        assert_eq!((reference.name, reference.id, reference.hash), (None, Some(id), None));

        let hash = topic_name_hash("testing.testapp.foo");
        let reference = TopicRef::parse(&hash.to_string());
        assert_eq!(reference.name, hash.to_string().parse().ok());
        assert_eq!(reference.hash, Some(hash));

        assert_eq!(TopicRef::parse("no such/thing"), TopicRef::default());
    }
}
