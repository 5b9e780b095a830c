//! Topic names, until `proto` has them.

use std::fmt;
use std::str::FromStr;

/// A valid topic name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicName(String);

impl TopicName {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its murmur3 hash.
    pub fn hash(&self) -> [u8; 16] {
        murmur3::murmur3_x64_128(&mut self.0.as_bytes(), 0).map(u128::to_be_bytes).unwrap_or_default()
    }
}

impl fmt::Debug for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl FromStr for TopicName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > 512 { Err(text.to_owned()) } else { Ok(Self(text.to_owned())) }
    }
}
