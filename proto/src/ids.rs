//! Identifiers: newtypes that cannot be swapped for one another.
//!
//! Sixteen-byte ids are ULIDs: raw bytes on the wire and on disk, 26 upper-case Crockford characters for people.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Text or bytes that are not the identifier they were taken for.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text:?} is not a valid {kind}")]
pub struct InvalidId {
    /// What was expected, for example `topic id`.
    pub kind: &'static str,
    /// What was found; bytes are shown by their length only.
    pub text: String,
}

macro_rules! ulid_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id of these sixteen bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The sixteen bytes, as the wire and the disk carry them.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// A fresh id: 48 bits of `unix_ms`, then 80 bits of `random`.
            pub fn new(unix_ms: u64, random: [u8; 10]) -> Self {
                let mut bytes = [0; 16];
                bytes[..6].copy_from_slice(&unix_ms.to_be_bytes()[2..]);
                bytes[6..].copy_from_slice(&random);
                Self(bytes)
            }

            /// Whether every byte is zero, which is how the wire says "absent".
            pub fn is_zero(&self) -> bool {
                self.0 == [0; 16]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&ulid::Ulid::from_bytes(self.0).to_string())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                // The first character of a ULID carries three bits, so it is at most `7`.
                let plausible = text.len() == 26 && text.as_bytes()[0] <= b'7';
                plausible
                    .then(|| ulid::Ulid::from_string(text).ok())
                    .flatten()
                    .map(|ulid| Self(ulid.to_bytes()))
                    .ok_or_else(|| InvalidId { kind: $kind, text: text.chars().take(64).collect() })
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = InvalidId;

            fn try_from(bytes: &[u8]) -> Result<Self, InvalidId> {
                <[u8; 16]>::try_from(bytes)
                    .map(Self)
                    .map_err(|_| InvalidId { kind: $kind, text: format!("{} bytes", bytes.len()) })
            }
        }
    };
}

ulid_id!(
    /// A cluster, for its whole life; bound into every sealed byte.
    ClusterId, "cluster id");
ulid_id!(
    /// An organization: the outermost tenant.
    OrgId, "organization id");
ulid_id!(
    /// A project: the unit of isolation and of key rings.
    ProjectId, "project id");
ulid_id!(
    /// A topic.
    TopicId, "topic id");
ulid_id!(
    /// An API key (its public id, not its client id or secret).
    ApiKeyId, "API key id");
ulid_id!(
    /// A key ring of the vault.
    RingId, "key ring id");
ulid_id!(
    /// A data encryption key.
    DekId, "data key id");
ulid_id!(
    /// One life of one process, or of one publish stream: sixteen random bytes.
    SessionId, "session id");

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

number!(
    /// A node of the cluster; never reused, from 1.
    NodeId(u64));
number!(
    /// A Raft group of the node-wide log.
    GroupId(u64));
number!(
    /// The number of a leadership; clients see it as the leader epoch.
    Term(u64));
number!(
    /// An entry's place in a Raft log, from 1. Never an offset.
    LogIndex(u64));
number!(
    /// An event's place in its partition, from 1. Never a log index.
    Offset(u64));
number!(
    /// A partition of a topic, from 0.
    Partition(u32));
number!(
    /// A version of a key ring, from 1.
    KeyVersion(u32));
number!(
    /// A number of bytes.
    ByteCount(u64));

impl GroupId {
    /// The catalog: nodes, organizations, projects, topics, placements.
    pub const CATALOG: Self = Self(1);
    /// The key vault.
    pub const VAULT: Self = Self(2);
    /// The first group id that the catalog gives to a partition.
    pub const FIRST_PARTITION: Self = Self(16);
}

impl Offset {
    /// The offset of a partition's first event.
    pub const FIRST: Self = Self(1);

    /// The offset `count` events later.
    pub fn plus(self, count: u64) -> Self {
        Self(self.0 + count)
    }
}

impl LogIndex {
    /// The index after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// An event's id: 48 bits of Unix milliseconds, then a 32-bit sequence; byte order is event order.
///
/// Ten raw bytes on the wire. As text, sixteen lower-case Crockford characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Rlid([u8; 10]);

const RLID_ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

impl Rlid {
    /// The id of these ten bytes.
    pub const fn from_bytes(bytes: [u8; 10]) -> Self {
        Self(bytes)
    }

    /// The ten bytes, as the wire carries them.
    pub const fn as_bytes(&self) -> &[u8; 10] {
        &self.0
    }

    /// The id of `unix_ms` (its low 48 bits) and `sequence`.
    pub fn new(unix_ms: u64, sequence: u32) -> Self {
        let mut bytes = [0; 10];
        bytes[..6].copy_from_slice(&unix_ms.to_be_bytes()[2..]);
        bytes[6..].copy_from_slice(&sequence.to_be_bytes());
        Self(bytes)
    }

    /// Milliseconds since the Unix epoch.
    pub fn unix_ms(&self) -> u64 {
        self.0[..6].iter().fold(0, |ms, byte| ms << 8 | u64::from(*byte))
    }

    /// The sequence within its millisecond.
    pub fn sequence(&self) -> u32 {
        self.0[6..].iter().fold(0, |n, byte| n << 8 | u32::from(*byte))
    }

    /// The id that follows this one, `steps` later, carrying into the milliseconds when the sequence runs over.
    pub fn plus(self, steps: u64) -> Self {
        let value = u128::from(self.unix_ms()) << 32 | u128::from(self.sequence());
        let value = value + u128::from(steps);
        Self::new((value >> 32) as u64, value as u32)
    }
}

impl fmt::Display for Rlid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.0.iter().fold(0_u128, |n, byte| n << 8 | u128::from(*byte));
        let text: String = (0..16).map(|i| char::from(RLID_ALPHABET[(value >> (75 - 5 * i)) as usize & 31])).collect();
        f.pad(&text)
    }
}

impl fmt::Debug for Rlid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rlid({self})")
    }
}

impl FromStr for Rlid {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId { kind: "event id", text: text.chars().take(64).collect() };
        if text.len() != 16 {
            return Err(invalid());
        }
        let mut value = 0_u128;
        for byte in text.bytes() {
            let digit = RLID_ALPHABET.iter().position(|c| *c == byte.to_ascii_lowercase()).ok_or_else(invalid)?;
            value = value << 5 | digit as u128;
        }
        let mut bytes = [0; 10];
        bytes.copy_from_slice(&value.to_be_bytes()[6..]);
        Ok(Self(bytes))
    }
}

impl TryFrom<&[u8]> for Rlid {
    type Error = InvalidId;

    fn try_from(bytes: &[u8]) -> Result<Self, InvalidId> {
        <[u8; 10]>::try_from(bytes)
            .map(Self)
            .map_err(|_| InvalidId { kind: "event id", text: format!("{} bytes", bytes.len()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_reads_as_the_wire_reference_says() {
        let bytes = [0x01, 0x83, 0x42, 0x5F, 0x66, 0x6F, 0x00, 0x6F, 0xEB, 0x6B];
        let id = Rlid::from_bytes(bytes);
        assert_eq!(id.to_string(), "061m4qv6dw06ztvb");
        assert_eq!("061M4QV6DW06ZTVB".parse::<Rlid>(), Ok(id));
        let other: Rlid = "109fap8jm8xzw0cr".parse().unwrap();
        assert_eq!(other.as_bytes(), &[0x08, 0x12, 0xF5, 0x59, 0x12, 0xA2, 0x3B, 0xFE, 0x01, 0x98]);
    }

    #[test]
    fn an_event_id_carries_into_its_milliseconds() {
        assert_eq!(Rlid::new(7, u32::MAX).plus(1), Rlid::new(8, 0));
        assert!(Rlid::new(7, u32::MAX) < Rlid::new(8, 0));
    }

    #[test]
    fn a_topic_id_survives_its_text_in_either_case() {
        let id = TopicId::new(1_700_000_000_000, [7; 10]);
        assert_eq!(id.to_string().parse::<TopicId>(), Ok(id));
        assert_eq!(id.to_string().to_lowercase().parse::<TopicId>(), Ok(id));
    }

    #[test]
    fn an_id_that_would_overflow_is_refused() {
        let error = "80000000000000000000000000".parse::<TopicId>().unwrap_err();
        assert_eq!(error.to_string(), "\"80000000000000000000000000\" is not a valid topic id");
        assert!(TopicId::try_from(&[1_u8; 15][..]).is_err());
    }
}
