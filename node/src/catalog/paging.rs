//! Pages and the tokens that ask for the next one.
//!
//! ```text
//! version u8 = 1 ‖ call u8 ‖ project[16] ‖ last key[16] ‖ expires u64, Unix seconds, big endian ‖ crc32c u32, big endian
//! ```
//! as base64url without padding. To clients it is opaque. It grants nothing (a page is cut from the caller's own project), so
//! it carries a checksum and no signature.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ensign_proto::ProjectId;
use ensign_raft::env::UnixNanos;
use thiserror::Error;

const VERSION: u8 = 1;
const LENGTH: usize = 1 + 1 + 16 + 16 + 8 + 4;
const LIFE_SECONDS: u64 = 24 * 3600;

/// What a page holds when the client names no size.
const SIZE_DEFAULT: usize = 100;
/// The most that a page holds, whatever the client asks. With names of 512 bytes a reply stays under 4 MiB.
const SIZE_MAX: usize = 5000;

/// Which list a token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Paged {
    Topics = 1,
    TopicNames = 2,
}

/// A request for a page, as the client sent it.
#[derive(Debug, Clone, Copy, Default)]
pub struct PageRequest<'a> {
    /// How many items; 0 means 100, and more than 5,000 means 5,000.
    pub size: u32,
    /// Where to go on; empty for the first page.
    pub token: &'a str,
}

/// A page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// What it holds.
    pub items: Vec<T>,
    /// Asks for the next page; empty on the last one, also where that is exactly full.
    pub next: String,
}

/// Why a page token is refused; INVALID_ARGUMENT to clients. They start again from the first page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PageError {
    /// It is none of ours, or was altered.
    #[error("invalid next page token")]
    Garbled,
    /// It is older than 24 hours.
    #[error("next page token has expired")]
    Expired,
    /// It was given out by another call or for another project.
    #[error("next page token belongs to another request")]
    Foreign,
}

/// A checked request: from where to cut, and how much.
#[derive(Debug)]
pub(super) struct Cut {
    pub(super) after: Option<[u8; 16]>,
    size: usize,
    list: Paged,
    project: ProjectId,
    expires: u64,
}

impl PageRequest<'_> {
    pub(super) fn open(&self, list: Paged, project: ProjectId, now: UnixNanos) -> Result<Cut, PageError> {
        let size = if self.size == 0 { SIZE_DEFAULT } else { SIZE_MAX.min(self.size as usize) };
        let after = if self.token.is_empty() { None } else { Some(parse(self.token, list, project, now)?) };
        Ok(Cut { after, size, list, project, expires: now.as_secs() + LIFE_SECONDS })
    }
}

impl Cut {
    /// Takes the page from `rows`, which begin past [`Cut::after`].
    pub(super) fn fill<T>(&self, mut rows: impl Iterator<Item = ([u8; 16], T)>) -> Page<T> {
        let mut items = Vec::new();
        let mut last = [0; 16];
        for (key, item) in rows.by_ref().take(self.size) {
            last = key;
            items.push(item);
        }
        let next = if rows.next().is_some() { self.token(&last) } else { String::new() };
        Page { items, next }
    }

    fn token(&self, last: &[u8; 16]) -> String {
        let mut bytes = Vec::with_capacity(LENGTH);
        bytes.extend_from_slice(&[VERSION, self.list as u8]);
        bytes.extend_from_slice(self.project.as_bytes());
        bytes.extend_from_slice(last);
        bytes.extend_from_slice(&self.expires.to_be_bytes());
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_be_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }
}

fn parse(token: &str, list: Paged, project: ProjectId, now: UnixNanos) -> Result<[u8; 16], PageError> {
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| PageError::Garbled)?;
    let bytes = <[u8; LENGTH]>::try_from(bytes).map_err(|_| PageError::Garbled)?;
    let (body, crc) = bytes.split_at(LENGTH - 4);
    if crc32c::crc32c(body).to_be_bytes() != crc || body[0] != VERSION {
        return Err(PageError::Garbled);
    }
    if body[1] != list as u8 || body[2..18] != project.as_bytes()[..] {
        return Err(PageError::Foreign);
    }
    let expires = body[34..].iter().fold(0, |seconds, byte| seconds << 8 | u64::from(*byte));
    if now.as_secs() >= expires {
        return Err(PageError::Expired);
    }
    let mut last = [0; 16];
    last.copy_from_slice(&body[18..34]);
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixNanos = UnixNanos(1_700_000_000_000_000_000);

    fn project(n: u8) -> ProjectId {
        ProjectId::from_bytes([n; 16])
    }

    fn rows(count: u8) -> impl Iterator<Item = ([u8; 16], u8)> {
        (1..=count).map(|n| ([n; 16], n))
    }

    fn second_page_token() -> String {
        let cut = PageRequest { size: 2, token: "" }.open(Paged::Topics, project(1), NOW).unwrap();
        let page = cut.fill(rows(3));
        assert_eq!(page.items, [1, 2]);
        page.next
    }

    #[test]
    fn a_token_leads_past_the_last_item_whether_or_not_it_still_exists() {
        let token = second_page_token();
        let cut = PageRequest { size: 2, token: &token }.open(Paged::Topics, project(1), NOW).unwrap();
        assert_eq!(cut.after, Some([2; 16]));
    }

    #[test]
    fn the_last_page_has_no_token_even_when_it_is_full() {
        let cut = PageRequest { size: 3, token: "" }.open(Paged::Topics, project(1), NOW).unwrap();
        assert_eq!(cut.fill(rows(3)), Page { items: vec![1, 2, 3], next: String::new() });
    }

    #[test]
    fn sizes_are_clamped() {
        let size = |size| PageRequest { size, token: "" }.open(Paged::Topics, project(1), NOW).unwrap().size;
        assert_eq!((size(0), size(7), size(u32::MAX)), (100, 7, 5000));
    }

    #[test]
    fn a_token_serves_one_call_of_one_project_for_a_day() {
        let token = second_page_token();
        let request = PageRequest { size: 2, token: &token };
        let open = |list, owner, seconds: u64| {
            let now = UnixNanos(NOW.0 + seconds * 1_000_000_000);
            request.open(list, project(owner), now).map(|cut| cut.after)
        };
        assert_eq!(open(Paged::Topics, 1, 24 * 3600 - 1), Ok(Some([2; 16])));
        assert_eq!(open(Paged::Topics, 1, 24 * 3600), Err(PageError::Expired));
        assert_eq!(open(Paged::TopicNames, 1, 0), Err(PageError::Foreign));
        assert_eq!(open(Paged::Topics, 2, 0), Err(PageError::Foreign));
    }

    #[test]
    fn every_altered_or_cut_token_is_refused() {
        let bytes = URL_SAFE_NO_PAD.decode(second_page_token()).unwrap();
        let refused = |bytes: &[u8]| {
            let token = URL_SAFE_NO_PAD.encode(bytes);
            PageRequest { size: 0, token: &token }.open(Paged::Topics, project(1), NOW).is_err()
        };
        for bit in 0..bytes.len() * 8 {
            let mut altered = bytes.clone();
            altered[bit / 8] ^= 1 << (bit % 8);
            assert!(refused(&altered), "bit {bit}");
        }
        assert!((1..bytes.len()).all(|length| refused(&bytes[..length])));
        assert_eq!(
            PageRequest { size: 0, token: "nonsense!" }.open(Paged::Topics, project(1), NOW).err(),
            Some(PageError::Garbled)
        );
    }
}
