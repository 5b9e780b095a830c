//! What a refusal says about this process for good, beyond its message: a header, `ensign-refused`.
//!
//! ```text
//! removed        the node was removed from the cluster
//! outlived-8     life 8 of the node is known, and the one that calls is an older one
//! ```
//! Both are for ever, and are known from what a majority has committed, so one peer's word is enough: a peer of the same cluster, in its
//! newest life, whose certificate was checked (gate.rs).

use http::{HeaderMap, HeaderName, HeaderValue};

const REFUSED: HeaderName = HeaderName::from_static("ensign-refused");
const REMOVED: &str = "removed";
const OUTLIVED: &str = "outlived-";
/// No node starts so often. The life that is told is kept, and the next start takes the one after it: a peer that tells the last there is
/// would keep the node from ever starting again.
const LIVES_MAX: u64 = 1 << 48;

/// Why this process is no part of the cluster any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its node was removed.
    Removed,
    /// A later life of its node is known: another process runs on its data, or on a copy of it.
    Outlived {
        /// That life.
        seen: u64,
    },
}

impl Ended {
    pub(super) fn show(self, headers: &mut HeaderMap) {
        let text = match self {
            Self::Removed => REMOVED.to_owned(),
            Self::Outlived { seen } => format!("{OUTLIVED}{seen}"),
        };
        // Letters, digits and a hyphen: always a valid header.
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(REFUSED, value);
        }
    }

    /// What these headers say; nothing of what this program does not know.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(&REFUSED)?.to_str().ok()?;
        if text == REMOVED {
            return Some(Self::Removed);
        }
        let seen = text.strip_prefix(OUTLIVED)?.parse().ok()?;
        (seen <= LIVES_MAX).then_some(Self::Outlived { seen })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_read_and_garbage_says_nothing() {
        for ended in [Ended::Removed, Ended::Outlived { seen: 8 }, Ended::Outlived { seen: LIVES_MAX }] {
            let mut headers = HeaderMap::new();
            ended.show(&mut headers);
            assert_eq!(Ended::of(&headers), Some(ended));
        }
        assert_eq!(Ended::of(&HeaderMap::new()), None);
        for garbage in
            ["", "remove", "outlived-", "outlived--1", "outlived-x", "outlived-18446744073709551615", "newer"]
        {
            let mut headers = HeaderMap::new();
            headers.insert(REFUSED, HeaderValue::from_static(garbage));
            assert_eq!(Ended::of(&headers), None, "{garbage}");
        }
    }
}
