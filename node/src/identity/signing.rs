//! The keys that sign and verify tokens: public halves from the catalog, private halves from the vault.
//!
//! A key's life: published (`created`), signs from `signs_from` on (ten minutes later, so that every verifier has seen it),
//! is superseded by a younger one, and verifies until the last token it signed is over (`verifies_until`).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rsa::{KeyPair, KeySize, PublicKey};
use aws_lc_rs::signature::KeyPair as _;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use ensign_raft::env::{Clock, Rng, UnixNanos};
use serde::Serialize;
use thiserror::Error;
use tracing::{info, warn};
use ulid::Ulid;

use super::secrets::{Secret, SecretError, SecretKind, SecretStore};
use super::token::Signer;
use crate::catalog::{Catalog, SigningKey, View, WriteFailure};

/// From publishing a key to signing with it: longer than any verifier caches the published set (five minutes).
pub(super) const PUBLISH_AHEAD: Duration = Duration::from_mins(10);
/// The age at which the signing key is replaced.
pub(super) const ROTATE_AFTER: Duration = Duration::from_hours(30 * 24);
/// What a verifier's clock may be behind, added to a retired key's last token.
const MARGIN: Duration = Duration::from_mins(1);

/// Why there is no key to sign with.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SigningError {
    /// The cluster has none that may sign: it is not bootstrapped.
    #[error("the cluster has no token-signing key")]
    None,
    /// The vault did not give the private half, or did not keep it.
    #[error(transparent)]
    Vault(#[from] SecretError),
    /// The private half is not the key it should be, or none could be made.
    #[error("the token-signing key {kid} cannot be used")]
    Unusable {
        /// Which.
        kid: Ulid,
    },
    /// It could not be published.
    #[error(transparent)]
    Catalog(#[from] WriteFailure),
}

/// The signing keys of this node.
#[derive(Debug)]
pub(super) struct SigningKeys {
    view: View,
    signers: Mutex<HashMap<[u8; 16], Arc<Signer>>>,
}

/// One key of the published set (RFC 7517).
#[derive(Debug, Serialize)]
pub(super) struct Jwk {
    kty: &'static str,
    #[serde(rename = "use")]
    usage: &'static str,
    alg: &'static str,
    kid: String,
    e: String,
    n: String,
}

impl SigningKeys {
    pub(super) fn new(view: View) -> Self {
        Self { view, signers: Mutex::default() }
    }

    /// The youngest key that may sign, with its private half; an older one if the vault does not give that one's now.
    pub(super) async fn signer(&self, store: &dyn SecretStore, now: UnixNanos) -> Result<Arc<Signer>, SigningError> {
        let mut failure = SigningError::None;
        for key in self.eligible(now) {
            match self.load(store, &key).await {
                Ok(signer) => return Ok(signer),
                Err(error) => {
                    warn!(kid = %Ulid::from_bytes(key.kid), %error, "a token-signing key cannot be used");
                    // The youngest one's failure is the one to report.
                    if failure == SigningError::None {
                        failure = error;
                    }
                }
            }
        }
        Err(failure)
    }

    /// Keys that may sign now, youngest first.
    fn eligible(&self, now: UnixNanos) -> Vec<Arc<SigningKey>> {
        let mut keys = self.view.signing_keys();
        keys.retain(|key| key.signs_from <= now && verifies(key, now));
        keys.sort_by_key(|key| std::cmp::Reverse((key.signs_from, key.kid)));
        keys
    }

    async fn load(&self, store: &dyn SecretStore, key: &SigningKey) -> Result<Arc<Signer>, SigningError> {
        if let Some(signer) = self.lock().get(&key.kid) {
            return Ok(Arc::clone(signer));
        }
        let unusable = || SigningError::Unusable { kid: Ulid::from_bytes(key.kid) };
        let secret = store.get(SecretKind::TokenSigning, key.kid).await?.ok_or_else(unusable)?;
        let signer = Signer::from_pkcs8(key.kid, secret.expose()).ok_or_else(unusable)?;
        self.lock().insert(key.kid, Arc::clone(&signer));
        Ok(signer)
    }

    /// Loads what may sign now or soon, and forgets what verifies nothing any more.
    pub(super) async fn reload(&self, store: &dyn SecretStore, now: UnixNanos) {
        let soon = UnixNanos(now.0 + PUBLISH_AHEAD.as_nanos() as u64);
        let keys = self.eligible(soon);
        self.lock().retain(|kid, _| keys.iter().any(|key| key.kid == *kid));
        for key in keys.iter().take(2) {
            if let Err(error) = self.load(store, key).await {
                info!(kid = %Ulid::from_bytes(key.kid), %error, "a token-signing key is not loaded yet");
            }
        }
    }

    /// The public key that verifies tokens of this `kid` now.
    pub(super) fn public_key(&self, kid: &[u8; 16], now: UnixNanos) -> Option<Arc<SigningKey>> {
        self.view.signing_key(kid).filter(|key| verifies(key, now))
    }

    /// The published set, oldest first.
    pub(super) fn published(&self, now: UnixNanos) -> Vec<Jwk> {
        self.view.signing_keys().iter().filter(|key| verifies(key, now)).filter_map(|key| jwk(key)).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<[u8; 16], Arc<Signer>>> {
        self.signers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn verifies(key: &SigningKey, now: UnixNanos) -> bool {
    key.verifies_until.is_none_or(|until| now < until)
}

fn jwk(key: &SigningKey) -> Option<Jwk> {
    let public = PublicKey::from_der(&key.public_key).ok()?;
    Some(Jwk {
        kty: "RSA",
        usage: "sig",
        alg: "RS256",
        kid: Ulid::from_bytes(key.kid).to_string(),
        e: URL_SAFE_NO_PAD.encode(public.exponent().big_endian_without_leading_zero()),
        n: URL_SAFE_NO_PAD.encode(public.modulus().big_endian_without_leading_zero()),
    })
}

/// Makes a signing key: the private half into the vault, then the public half into the catalog. Takes up to a second of a core.
///
/// It signs at once if the cluster has no other key, else after ten minutes.
///
/// # Errors
/// See [`SigningError`]. A private half that was never published stays in the vault, unused.
pub async fn new_signing_key(
    catalog: &Catalog,
    store: &dyn SecretStore,
    clock: &dyn Clock,
    rng: &dyn Rng,
) -> Result<Ulid, SigningError> {
    let now = clock.wall();
    let mut random = [0; 10];
    rng.fill(&mut random);
    let kid = Ulid::from_parts(now.as_millis(), random.iter().fold(0, |n, byte| n << 8 | u128::from(*byte)));
    let unusable = || SigningError::Unusable { kid };
    let (private, public) = tokio::task::spawn_blocking(generate).await.ok().flatten().ok_or_else(unusable)?;
    store.put(SecretKind::TokenSigning, kid.to_bytes(), private).await?;
    let first = catalog.signing_keys().iter().all(|key| !verifies(key, now));
    let ahead = if first { Duration::ZERO } else { PUBLISH_AHEAD };
    let signs_from = UnixNanos(now.0 + ahead.as_nanos() as u64);
    let key = SigningKey { kid: kid.to_bytes(), public_key: public, created: now, signs_from, verifies_until: None };
    catalog.add_signing_key(key).await?;
    info!(%kid, "a token-signing key was made");
    Ok(kid)
}

fn generate() -> Option<(Secret, Bytes)> {
    let pair = KeyPair::generate(KeySize::Rsa2048).ok()?;
    let private: aws_lc_rs::encoding::Pkcs8V1Der<'_> = pair.as_der().ok()?;
    let public = Bytes::copy_from_slice(pair.public_key().as_ref());
    Some((Secret::new(private.as_ref().to_vec()), public))
}

/// Replaces the signing key when it is old: the new one is published now and signs in ten minutes, the old one verifies until
/// the last token it can have signed is over. One node does this (the catalog's leader); twice is harmless.
pub(super) async fn rotate_if_due(
    catalog: &Catalog,
    store: &dyn SecretStore,
    clock: &dyn Clock,
    rng: &dyn Rng,
    longest_token: Duration,
) -> Result<(), SigningError> {
    let now = clock.wall();
    let mut keys = catalog.signing_keys();
    keys.retain(|key| verifies(key, now));
    let Some(youngest) = keys.iter().map(|key| key.created).max() else { return Ok(()) };
    if now.0.saturating_sub(youngest.0) >= ROTATE_AFTER.as_nanos() as u64 {
        new_signing_key(catalog, store, clock, rng).await?;
    }
    // A key that a younger one has taken over from signs no more.
    for key in keys.iter().filter(|key| key.verifies_until.is_none()) {
        let successor = keys.iter().map(|other| other.signs_from).filter(|from| *from > key.signs_from).min();
        if let Some(from) = successor
            && from <= now
        {
            let until = UnixNanos(from.0 + (longest_token + MARGIN).as_nanos() as u64);
            catalog.retire_signing_key(key.kid, until).await?;
        }
    }
    // Private halves that sign nothing any more have no reason to exist.
    for key in catalog.signing_keys().iter().filter(|key| !verifies(key, now)) {
        store.delete(SecretKind::TokenSigning, key.kid).await?;
    }
    Ok(())
}
