//! The token that lets one machine join: shown once, and stored as a hash.
//!
//! ```text
//! ensign-join-1.ID.SECRET.FINGERPRINT     26 characters ‖ 32 bytes ‖ 32 bytes, the last two base64url
//! ```
//! The fingerprint is the SHA-256 of the authority's certificate: the joining machine knows the cluster by it before it says a word.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ensign_raft::env::{Rng, UnixNanos};
use sha2::{Digest as _, Sha256};
use ulid::Ulid;
use zeroize::Zeroizing;

const PREFIX: &str = "ensign-join-1";

/// A join token in clear.
pub struct Token {
    /// Its id, which is no secret.
    pub id: Ulid,
    /// What proves that its holder was given it.
    pub secret: Zeroizing<[u8; 32]>,
    /// Which authority the cluster has.
    pub fingerprint: [u8; 32],
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Token {
    /// A fresh token of the cluster whose authority has this fingerprint.
    pub fn generate(fingerprint: [u8; 32], now: UnixNanos, rng: &dyn Rng) -> Self {
        let mut random = [0; 16];
        rng.fill(&mut random);
        let mut secret = Zeroizing::new([0; 32]);
        rng.fill(secret.as_mut());
        Self { id: Ulid::from_parts(now.as_millis(), u128::from_be_bytes(random)), secret, fingerprint }
    }

    /// The text to show once.
    pub fn text(&self) -> Zeroizing<String> {
        let (secret, fingerprint) = (URL_SAFE_NO_PAD.encode(*self.secret), URL_SAFE_NO_PAD.encode(self.fingerprint));
        let text = format!("{PREFIX}.{}.{secret}.{fingerprint}", self.id);
        Zeroizing::new(text)
    }

    /// What is stored of it. The secret has 256 random bits, so a plain hash tells nothing.
    pub fn hash(secret: &[u8]) -> [u8; 32] {
        Sha256::digest(secret).into()
    }
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            format!(
                "this is no join token ({what}): it looks like {PREFIX}.… and is printed by `ensign cluster token create`; copy all of it"
            )
        };
        let mut parts = text.trim().split('.');
        if parts.next() != Some(PREFIX) {
            return Err(wrong("it begins otherwise"));
        }
        let (Some(id), Some(secret), Some(fingerprint), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(wrong("it does not have four parts"));
        };
        let bytes = |text: &str| URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        Ok(Self {
            id: id.parse().map_err(|_| wrong("its id is garbled"))?,
            secret: Zeroizing::new(bytes(secret).ok_or_else(|| wrong("its secret is cut or garbled"))?),
            fingerprint: bytes(fingerprint).ok_or_else(|| wrong("its fingerprint is cut or garbled"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use ensign_raft::env::OsRng;

    use super::*;

    #[test]
    fn a_token_is_read_as_it_was_printed_and_not_when_it_was_cut() {
        let token = Token::generate([7; 32], UnixNanos(1_700_000_000_000_000_000), &OsRng);
        let text = token.text();
        let read: Token = format!(" {}\n", *text).parse().unwrap();
        assert_eq!((read.id, *read.secret, read.fingerprint), (token.id, *token.secret, [7; 32]));
        for length in 0..text.len() {
            let error = text[..length].parse::<Token>().unwrap_err();
            assert!(error.contains("ensign cluster token create"), "{error}");
        }
        assert!(!format!("{token:?}").contains(&URL_SAFE_NO_PAD.encode(*token.secret)));
    }
}
