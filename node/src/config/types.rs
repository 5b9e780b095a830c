//! Types of settings that cannot hold a wrong value.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use ensign_proto::NodeId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A node's number and the address of its peer listener: `ID=HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// The node.
    pub id: NodeId,
    /// `HOST:PORT`.
    pub address: String,
}

/// The name of a node, a region or a zone: lower-case letters, digits, `-`, `_` and `.`, at most 63 of them. May be empty.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Label(String);

/// A span of time, written as `10s`, `500ms`, `1h 30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seconds(Duration);

/// An amount of bytes, written as `64MiB`, `1GiB`, `512KiB` or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(u64);

/// Timing of elections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Timing {
    /// Nodes within a few milliseconds of one another.
    Lan,
    /// Nodes in several regions.
    Wan,
}

/// When the cluster's version is raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upgrade {
    /// As soon as every node speaks it.
    Auto,
    /// By `ensign cluster upgrade`, so that until then the build before can be put back.
    Manual,
}

/// What keeps the cluster's root key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    /// A file on each node: `node.root_key`.
    File,
    /// A phrase that people type on each node of the vault: `ensign vault unseal`.
    Passphrase,
    /// A program on each node, which wraps and unwraps: `root.command`.
    Command,
    /// A transit engine of HashiCorp Vault, or of what speaks its API: `root.transit_…`.
    Transit,
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

impl Label {
    /// `local`: what a region and a zone are called where nobody named them.
    pub fn local() -> Self {
        Self("local".to_owned())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let fits = text.len() <= 63 && text.chars().all(|c| plain(c) || "-_.".contains(c));
        if text.is_empty() || (fits && text.starts_with(plain) && text.ends_with(plain)) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "{text:?} is no name of a node, region or zone: lower-case letters, digits, '-', '_' and '.' inside, at most 63 characters, \
             for example eu-west-1"
        ))
    }
}

impl Seconds {
    /// A whole number of seconds.
    pub const fn new(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl From<Seconds> for Duration {
    fn from(seconds: Seconds) -> Self {
        seconds.0
    }
}

impl From<Duration> for Seconds {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl Bytes {
    /// A whole number of mebibytes.
    pub const fn mib(count: u64) -> Self {
        Self(count << 20)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.id, self.address)
    }
}

impl FromStr for PeerAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not ID=HOST:PORT, for example 2=node-2.internal:5357");
        let (id, address) = text.split_once('=').ok_or_else(wrong)?;
        let id = id.trim().parse().ok().filter(|id| *id > 0).ok_or_else(wrong)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(wrong());
        }
        Ok(Self { id: NodeId(id), address: address.to_owned() })
    }
}

impl Timing {
    /// What it stands for.
    pub fn elections(self) -> ensign_raft::Timing {
        match self {
            Self::Lan => ensign_raft::Timing::LAN,
            Self::Wan => ensign_raft::Timing::WAN,
        }
    }
}

impl fmt::Display for Timing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lan => "lan",
            Self::Wan => "wan",
        })
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|_| format!("{text:?} is not a span of time such as 10s, 500ms or 1h"))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("GiB", 30), ("MiB", 20), ("KiB", 10)] {
            if self.0 > 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not an amount of bytes such as 64MiB, 1GiB or 4096");
        let text = text.trim();
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
        let shift = match text[digits..].trim() {
            "" | "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            _ => return Err(wrong()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

macro_rules! serde_as_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

serde_as_text!(PeerAddress, Label, Seconds, Bytes);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_and_write_their_units() {
        for (text, bytes) in [("64MiB", 64 << 20), ("1GiB", 1 << 30), ("4096", 4096), ("3 KiB", 3072)] {
            assert_eq!(text.parse::<Bytes>().unwrap().get(), bytes, "{text}");
        }
        assert_eq!(Bytes::mib(1024).to_string(), "1GiB");
        for text in ["", "MiB", "-1", "1.5GiB", "99999999999GiB", "1 PiB"] {
            assert!(text.parse::<Bytes>().unwrap_err().contains("is not an amount of bytes"), "{text}");
        }
    }

    #[test]
    fn a_label_is_short_and_plain() {
        for text in ["", "a", "eu-west-1", "rack_7.b", &"x".repeat(63)] {
            assert_eq!(text.parse::<Label>().unwrap().as_str(), text);
        }
        for text in ["A", "eu west", "-a", "a.", "é", "a\n", &"x".repeat(64)] {
            assert!(text.parse::<Label>().unwrap_err().contains("eu-west-1"), "{text}");
        }
    }

    #[test]
    fn a_peer_needs_a_number_a_host_and_a_port() {
        let peer: PeerAddress = "2=[::1]:5357".parse().unwrap();
        assert_eq!((peer.id, peer.address.as_str()), (NodeId(2), "[::1]:5357"));
        for text in ["", "2", "2=", "0=h:1", "x=h:1", "2=h", "2=:1", "2=h:99999"] {
            assert!(text.parse::<PeerAddress>().unwrap_err().contains("ID=HOST:PORT"), "{text}");
        }
    }
}
