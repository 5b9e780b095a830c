//! The transit provider: a transit engine of HashiCorp Vault, or of what speaks its HTTP API, wraps and unwraps.
//!
//! ```text
//! wrap     POST /v1/MOUNT/encrypt/KEY {plaintext, associated_data}       -> data.ciphertext "vault:v3:…"
//! unwrap   POST /v1/MOUNT/decrypt/KEY {ciphertext, associated_data}      -> data.plaintext
//! rotate   POST /v1/MOUNT/keys/KEY/rotate, then GET /v1/MOUNT/keys/KEY   -> data.latest_version
//! destroy  POST /v1/MOUNT/keys/KEY/config {min_decryption_version, min_encryption_version}
//!          POST /v1/MOUNT/keys/KEY/trim {min_available_version}, then GET to see that it is so
//! ```
//!
//! The associated data (cluster and epoch, as in every wrap) needs a key of an AEAD type: aes256-gcm96, the engine's default, aes128-gcm96 or
//! chacha20-poly1305. TLS only, no redirects and no proxy of the environment: the token and the master key go to the named server or nowhere.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::BytesMut;
use ensign_keyvault::{
    MasterName, Passphrase, RootError, RootKind, RootProvider, Unwrapped, WrappedMaster, check_kind,
};
use futures::future::BoxFuture;
use http::header::HeaderValue;
use reqwest::{Certificate, Client, Method, redirect};
use serde::Deserialize;
use serde_json::json;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::outside::{self, Made};
use crate::files::read_secret;

const PATIENCE: Duration = Duration::from_secs(10);
const ANSWER_MAX: usize = 64 << 10;
const TOKEN_MAX: usize = 4 << 10;
const TOKEN_HEADER: &str = "x-vault-token";

/// Which engine and which key.
#[derive(Debug, Clone)]
pub(super) struct TransitRoot {
    /// `https://HOST:PORT`.
    pub(super) address: String,
    /// Where the engine is mounted.
    pub(super) mount: String,
    /// The key.
    pub(super) key: String,
    /// The file with the token.
    pub(super) token: PathBuf,
    /// The authority of the server's certificate (PEM); empty: the system's.
    pub(super) authority: PathBuf,
}

#[derive(Deserialize)]
struct Answer<T> {
    data: T,
}

#[derive(Deserialize)]
struct Encrypted {
    ciphertext: String,
}

#[derive(Deserialize, Zeroize, ZeroizeOnDrop)]
struct Decrypted {
    plaintext: String,
}

#[derive(Deserialize)]
struct KeyInfo {
    latest_version: u32,
    #[serde(default)]
    min_available_version: u32,
}

#[derive(Deserialize)]
struct Refused {
    #[serde(default)]
    errors: Vec<String>,
}

impl TransitRoot {
    /// What the vault's state calls the key: without the address, which may change.
    fn reference(&self) -> String {
        format!("{}/{}", self.mount, self.key)
    }

    fn failure(&self, what: impl fmt::Display) -> RootError {
        RootError::provider(format!("transit engine {}: {what}", self.address))
    }

    fn client(&self) -> Result<Client, RootError> {
        let mut builder =
            Client::builder().https_only(true).redirect(redirect::Policy::none()).no_proxy().timeout(PATIENCE);
        if !self.authority.as_os_str().is_empty() {
            let named = |what: &dyn fmt::Display| {
                self.failure(format_args!("root.transit_authority {}: {what}", self.authority.display()))
            };
            let pem = std::fs::read(&self.authority).map_err(|error| named(&error))?;
            let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| named(&error))?;
            // Whoever names an authority trusts no other.
            builder = builder.tls_certs_only(certificates);
        }
        builder.build().map_err(|error| self.failure(error))
    }

    fn token(&self) -> Result<HeaderValue, RootError> {
        let named = |what: &dyn fmt::Display| self.failure(format_args!("root.transit_token: {what}"));
        let text = read_secret(&self.token, TOKEN_MAX).map_err(|error| named(&error))?;
        let mut token = HeaderValue::from_bytes(text.trim_ascii()).map_err(|_| named(&"it is no token"))?;
        if token.is_empty() {
            return Err(named(&"the file is empty"));
        }
        token.set_sensitive(true);
        Ok(token)
    }

    /// One call; an answer without a body is `null`.
    async fn call(&self, method: Method, path: &str, body: Option<Zeroizing<Vec<u8>>>) -> Result<Body, RootError> {
        let url = format!("{}/v1/{}/{path}", self.address.trim_end_matches('/'), self.mount);
        let mut request = self.client()?.request(method, url).header(TOKEN_HEADER, self.token()?);
        if let Some(body) = body {
            request = request.header(http::header::CONTENT_TYPE, "application/json").body(body.to_vec());
        }
        let mut response = request.send().await.map_err(|error| self.failure(innermost(&error)))?;
        let status = response.status();
        let mut text = Body(BytesMut::with_capacity(ANSWER_MAX));
        while let Some(chunk) = response.chunk().await.map_err(|error| self.failure(innermost(&error)))? {
            if text.0.len() + chunk.len() > ANSWER_MAX {
                return Err(self.failure("it answered more than 64 KiB"));
            }
            text.0.extend_from_slice(&chunk);
        }
        if status.is_success() {
            return Ok(text);
        }
        let said =
            serde_json::from_slice::<Refused>(&text.0).map(|refused| refused.errors.join("; ")).unwrap_or_default();
        let remedy = match status.as_u16() {
            403 => ": does the token in root.transit_token live, and may it use this key?",
            404 => ": is root.transit_mount right, and is there such a key?",
            503 => ": it is sealed itself, or not ready",
            _ => "",
        };
        Err(self.failure(format_args!("{status} for {path}{remedy} {}", outside::words(&said))))
    }

    fn parse<'a, T: Deserialize<'a>>(&self, body: &'a Body) -> Result<T, RootError> {
        // What is wrong with the text is not said: it may be a key.
        let answer: Answer<T> = serde_json::from_slice(&body.0)
            .map_err(|_| self.failure("its answer is not what the transit API promises"))?;
        Ok(answer.data)
    }

    async fn key_info(&self) -> Result<KeyInfo, RootError> {
        let body = self.call(Method::GET, &format!("keys/{}", self.key), None).await?;
        self.parse(&body)
    }
}

/// An answer, which may hold the master key: overwritten when it is dropped.
struct Body(BytesMut);

impl Drop for Body {
    fn drop(&mut self) {
        self.0[..].zeroize();
    }
}

fn body(value: &serde_json::Value) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(value.to_string().into_bytes())
}

/// What binds a wrap to its place, as in every wrap of ours.
fn associated(name: MasterName) -> String {
    BASE64_STANDARD.encode([&name.cluster.as_bytes()[..], &name.epoch.to_be_bytes()].concat())
}

/// The cause at the bottom: the layers above say "error sending request".
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    if error.is_timeout() {
        format!("no answer within {} s", PATIENCE.as_secs())
    } else {
        outside::words(&cause.to_string())
    }
}

/// The key's version in `vault:v3:…`.
fn version_of(ciphertext: &str) -> Option<u32> {
    let (version, _) = ciphertext.strip_prefix("vault:v")?.split_once(':')?;
    version.parse().ok().filter(|version| *version > 0)
}

impl RootProvider for TransitRoot {
    fn kind(&self) -> RootKind {
        RootKind::Transit
    }

    fn wrap<'a>(
        &'a self,
        name: MasterName,
        key: &'a [u8; 32],
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<WrappedMaster, RootError>> {
        Box::pin(async move {
            let plaintext = Zeroizing::new(BASE64_STANDARD.encode(key));
            // Both are base64: nothing in them needs to be escaped.
            let asked = format!("{{\"plaintext\":\"{}\",\"associated_data\":\"{}\"}}", *plaintext, associated(name));
            let asked = Zeroizing::new(asked.into_bytes());
            let answer = self.call(Method::POST, &format!("encrypt/{}", self.key), Some(asked)).await?;
            let Encrypted { ciphertext } = self.parse(&answer)?;
            let version =
                version_of(&ciphertext).ok_or_else(|| self.failure("its ciphertext names no version of the key"))?;
            let made = Made { reference: self.reference(), version, made: ciphertext.as_bytes() };
            outside::keep(RootKind::Transit, name, key, &made).map_err(|error| self.failure(error))
        })
    }

    fn unwrap<'a>(
        &'a self,
        name: MasterName,
        wrapped: &'a WrappedMaster,
        _phrase: Option<&'a Passphrase>,
    ) -> BoxFuture<'a, Result<Unwrapped, RootError>> {
        Box::pin(async move {
            check_kind(wrapped, RootKind::Transit)?;
            if wrapped.reference != self.reference() {
                return Err(RootError::WrongKey { needs: wrapped.reference.clone(), has: self.reference() });
            }
            let (id, made) = outside::kept(wrapped)?;
            let ciphertext = std::str::from_utf8(made)
                .map_err(|_| RootError::Damaged { what: "it is no ciphertext of a transit engine" })?;
            let asked = body(&json!({ "ciphertext": ciphertext, "associated_data": associated(name) }));
            let answer = self.call(Method::POST, &format!("decrypt/{}", self.key), Some(asked)).await?;
            let answer: Decrypted = self.parse(&answer)?;
            let mut key = Zeroizing::new([0; 33]);
            let length = BASE64_STANDARD.decode_slice(&answer.plaintext, &mut *key);
            let length = length.map_err(|_| self.failure("its plaintext is not 32 bytes in base64"))?;
            outside::unwrapped(name, id, &key[..length]).map_err(|error| self.failure(error))
        })
    }

    fn rotate(&self) -> BoxFuture<'_, Result<u32, RootError>> {
        Box::pin(async move {
            self.call(Method::POST, &format!("keys/{}/rotate", self.key), None).await?;
            Ok(self.key_info().await?.latest_version)
        })
    }

    fn destroy(&self, version: u32) -> BoxFuture<'_, Result<(), RootError>> {
        Box::pin(async move {
            let first = version + 1;
            if self.key_info().await?.latest_version < first {
                return Err(self.failure(format_args!("version {version} of the key is its newest: rotate it first")));
            }
            // Trimming takes what both bounds leave behind, and is refused while either is not set.
            let bounds = body(&json!({ "min_decryption_version": first, "min_encryption_version": first }));
            self.call(Method::POST, &format!("keys/{}/config", self.key), Some(bounds)).await?;
            let trim = body(&json!({ "min_available_version": first }));
            self.call(Method::POST, &format!("keys/{}/trim", self.key), Some(trim)).await?;
            let kept = self.key_info().await?.min_available_version;
            if kept < first {
                return Err(self.failure(format_args!(
                    "it still keeps versions from {kept} on: version {version} is not destroyed"
                )));
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests;
