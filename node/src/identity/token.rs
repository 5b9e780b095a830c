//! Tokens: JWS compact, RS256, with the claims that the SDKs and the nodes read.
//!
//! ```text
//! {"alg":"RS256","typ":"JWT","kid":ULID} . {"iss","aud":[…],"sub","jti","iat","nbf","exp","org","project","permissions"} . signature
//! ```

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeyPair;
use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ensign_proto::{ApiKeyId, OrgId, Permission, PermissionSet, ProjectId};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use ulid::Ulid;

/// No token of ours is nearly as long (one with a 4096-bit key has 1.6 kB).
const LENGTH_MAX: usize = 8 * 1024;

/// What a verified token says about the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The API key that logged in.
    pub subject: ApiKeyId,
    /// Its organization.
    pub org: OrgId,
    /// The one project it works in; none for an operator.
    pub project: Option<ProjectId>,
    /// What it may do.
    pub permissions: PermissionSet,
    /// When the token ends, in Unix seconds.
    pub expires: u64,
}

impl Claims {
    /// Whether the caller may do this.
    pub fn permits(&self, permission: Permission) -> bool {
        self.permissions.contains(permission)
    }
}

/// Why a token is refused, for logs and tests; callers hear the same of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Rejection {
    /// Not a token that we could have made.
    #[error("malformed")]
    Malformed,
    /// Signed with a key that this cluster does not have, or no longer accepts.
    #[error("unknown signing key")]
    UnknownKey,
    /// The signature does not fit.
    #[error("bad signature")]
    BadSignature,
    /// Issued by somebody else.
    #[error("wrong issuer")]
    WrongIssuer,
    /// Issued for something else.
    #[error("wrong audience")]
    WrongAudience,
    /// Over.
    #[error("expired")]
    Expired,
    /// Not begun.
    #[error("not yet valid")]
    NotYet,
    /// The API key is revoked, or never was.
    #[error("revoked or unknown subject")]
    Revoked,
}

/// Why a caller is not let in.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AuthError {
    /// UNAUTHENTICATED `invalid credentials`, whatever the reason.
    #[error("invalid credentials")]
    Invalid(#[source] Rejection),
    /// This node cannot tell at the moment; UNAVAILABLE, try again.
    #[error("tokens cannot be verified at the moment: {cause}")]
    Unavailable {
        /// What is missing.
        cause: String,
    },
}

/// The header of every token we sign; nothing else is accepted.
#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    typ: Option<String>,
    kid: String,
    // Extensions that must be understood; we understand none (RFC 7515 §4.1.11).
    #[serde(default, skip_serializing)]
    crit: Option<serde::de::IgnoredAny>,
}

/// The claims as they are signed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RawClaims {
    pub(super) iss: String,
    pub(super) aud: Vec<String>,
    pub(super) sub: String,
    pub(super) jti: String,
    pub(super) iat: u64,
    pub(super) nbf: u64,
    pub(super) exp: u64,
    pub(super) org: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) project: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) permissions: Option<Vec<String>>,
}

impl RawClaims {
    pub(super) fn subject(&self) -> Result<ApiKeyId, Rejection> {
        self.sub.parse().map_err(|_| Rejection::Malformed)
    }

    /// The claims of an access token.
    pub(super) fn access(&self) -> Result<Claims, Rejection> {
        let permissions = self.permissions.as_ref().ok_or(Rejection::Malformed)?;
        Ok(Claims {
            subject: self.subject()?,
            org: self.org.parse().map_err(|_| Rejection::Malformed)?,
            project: self.project.as_ref().map(|id| id.parse()).transpose().map_err(|_| Rejection::Malformed)?,
            permissions: PermissionSet::from_known(permissions.iter().map(String::as_str)),
            expires: self.exp,
        })
    }
}

/// A private key that signs tokens.
pub(super) struct Signer {
    kid: [u8; 16],
    key: KeyPair,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", Ulid::from_bytes(self.kid))
    }
}

/// The key could not sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the token could not be signed")]
pub(super) struct SignFailure;

impl Signer {
    /// The signer of a PKCS#8 key, or `None` if it is not one.
    pub(super) fn from_pkcs8(kid: [u8; 16], der: &[u8]) -> Option<Arc<Self>> {
        KeyPair::from_pkcs8(der).ok().map(|key| Arc::new(Self { kid, key }))
    }

    /// Signs; takes about a millisecond of a core.
    pub(super) fn sign(&self, claims: &RawClaims) -> Result<String, SignFailure> {
        let kid = Ulid::from_bytes(self.kid).to_string();
        let header = Header { alg: "RS256".to_owned(), typ: Some("JWT".to_owned()), kid, crit: None };
        let encode = |json: Result<Vec<u8>, _>| json.map(|json| URL_SAFE_NO_PAD.encode(json)).map_err(|_| SignFailure);
        let header = encode(serde_json::to_vec(&header))?;
        let payload = encode(serde_json::to_vec(claims))?;
        let mut token = format!("{header}.{payload}");
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), token.as_bytes(), &mut signature)
            .map_err(|_| SignFailure)?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token)
    }
}

/// A token that looks like one; its signature is not checked yet.
pub(super) struct Unverified<'a> {
    pub(super) kid: [u8; 16],
    signed: &'a str,
    signature: Vec<u8>,
    payload: &'a str,
}

impl<'a> Unverified<'a> {
    pub(super) fn parse(token: &'a str) -> Result<Self, Rejection> {
        if token.len() > LENGTH_MAX {
            return Err(Rejection::Malformed);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(Rejection::Malformed)?;
        let (header, payload) = signed.split_once('.').ok_or(Rejection::Malformed)?;
        let header: Header = json(header)?;
        let kid = Ulid::from_string(&header.kid).map_err(|_| Rejection::Malformed)?;
        let ours = header.alg == "RS256" && header.typ.is_none_or(|typ| typ == "JWT") && header.crit.is_none();
        if !ours {
            return Err(Rejection::Malformed);
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| Rejection::Malformed)?;
        Ok(Self { kid: kid.to_bytes(), signed, signature, payload })
    }

    /// The claims, if the signature is that of `public_key` (PKCS#1 DER).
    pub(super) fn verify(&self, public_key: &[u8]) -> Result<RawClaims, Rejection> {
        UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, public_key)
            .verify(self.signed.as_bytes(), &self.signature)
            .map_err(|_| Rejection::BadSignature)?;
        json(self.payload)
    }
}

fn json<T: for<'de> Deserialize<'de>>(part: &str) -> Result<T, Rejection> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| Rejection::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| Rejection::Malformed)
}
