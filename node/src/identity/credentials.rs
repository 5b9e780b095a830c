//! Client ids and secrets: how they look, how they are made.

use std::fmt;
use std::str::FromStr;

use ensign_raft::env::Rng;
use thiserror::Error;
use zeroize::Zeroizing;

const ID_LENGTH: usize = 32;
const SECRET_LENGTH: usize = 64;
/// The letters first: an id takes the first 52 of these, a secret all 62.
const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
const LETTERS: usize = 52;

/// Text that is no client id or no secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum InvalidCredentials {
    /// Not 32 letters.
    #[error("a client id is 32 letters")]
    Id,
    /// Not 64 letters and digits.
    #[error("a client secret is 64 letters and digits")]
    Secret,
}

/// What the holder of an API key logs in with: 32 letters. Not secret.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(String);

impl ClientId {
    /// A fresh one: 182 bits.
    pub fn generate(rng: &dyn Rng) -> Self {
        Self(draw(rng, ID_LENGTH, LETTERS).to_string())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for ClientId {
    type Err = InvalidCredentials;

    fn from_str(text: &str) -> Result<Self, InvalidCredentials> {
        let valid = text.len() == ID_LENGTH && text.bytes().all(|byte| byte.is_ascii_alphabetic());
        if valid { Ok(Self(text.to_owned())) } else { Err(InvalidCredentials::Id) }
    }
}

/// The secret of an API key: 64 letters and digits, 381 bits. Shown once; overwritten when dropped.
pub struct ClientSecret(Zeroizing<String>);

impl ClientSecret {
    /// A fresh one. `rng` must be the kernel's outside of tests.
    pub fn generate(rng: &dyn Rng) -> Self {
        Self(draw(rng, SECRET_LENGTH, ALPHABET.len()))
    }

    /// Takes the text over, and overwrites it if it is no secret.
    ///
    /// # Errors
    /// It is not 64 letters and digits.
    pub fn parse(text: String) -> Result<Self, InvalidCredentials> {
        let text = Zeroizing::new(text);
        let valid = text.len() == SECRET_LENGTH && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
        if valid { Ok(Self(text)) } else { Err(InvalidCredentials::Secret) }
    }

    /// The text, for the one reply or file that shows it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ClientSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientSecret(…)")
    }
}

/// What an SDK logs in with.
#[derive(Debug)]
pub struct Credentials {
    /// Who.
    pub client_id: ClientId,
    /// The proof.
    pub secret: ClientSecret,
}

impl Credentials {
    /// Fresh ones. `rng` must be the kernel's outside of tests.
    pub fn generate(rng: &dyn Rng) -> Self {
        Self { client_id: ClientId::generate(rng), secret: ClientSecret::generate(rng) }
    }
}

/// `length` characters, each uniform among the first `choices` of the alphabet.
fn draw(rng: &dyn Rng, length: usize, choices: usize) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(length));
    let mut pool = Zeroizing::new([0_u8; 64]);
    while text.len() < length {
        rng.fill(&mut *pool);
        // Six bits a draw, and a draw past the choices is thrown away: taking the rest instead would favour the first letters.
        let drawn = pool.iter().map(|byte| usize::from(byte & 63)).filter(|index| *index < choices);
        let missing = length - text.len();
        text.extend(drawn.take(missing).map(|index| char::from(ALPHABET[index])));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use ensign_raft::env::SeededRng;

    #[test]
    fn ids_are_letters_and_secrets_are_letters_and_digits() {
        let rng = SeededRng::new(7);
        for _ in 0..100 {
            let fresh = Credentials::generate(&rng);
            assert_eq!(fresh.client_id.as_str().parse::<ClientId>(), Ok(fresh.client_id.clone()));
            assert!(ClientSecret::parse(fresh.secret.expose().to_owned()).is_ok());
        }
        assert_eq!("short".parse::<ClientId>(), Err(InvalidCredentials::Id));
        assert_eq!("1".repeat(32).parse::<ClientId>(), Err(InvalidCredentials::Id));
        assert!(ClientSecret::parse("-".repeat(64)).is_err());
    }

    #[test]
    fn every_character_is_about_equally_likely() {
        let rng = SeededRng::new(11);
        let mut counts = [0_u32; 128];
        for _ in 0..1_000 {
            ClientSecret::generate(&rng).expose().bytes().for_each(|byte| counts[usize::from(byte)] += 1);
        }
        // 64,000 draws over 62 characters: 1,032 each, σ ≈ 32.
        let (least, most) = ALPHABET
            .iter()
            .map(|byte| counts[usize::from(*byte)])
            .fold((u32::MAX, 0), |(l, m), n| (l.min(n), m.max(n)));
        assert!(least > 870 && most < 1_200, "{least}..{most}");
    }

    #[test]
    fn a_secret_is_not_printed() {
        let fresh = Credentials::generate(&SeededRng::new(1));
        assert!(!format!("{fresh:?}").contains(fresh.secret.expose()));
    }
}
