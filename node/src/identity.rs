//! Who is calling: API keys log in, tokens carry what they may do, and revoking a key ends both.
//!
//! ```text
//! client id + secret ─▶ authenticate ─▶ catalog: which key?  vault: its Argon2id hash ─▶ bounded pool ─▶ tokens (RS256)
//! bearer ─▶ verify ─▶ cache, else signature (public keys: catalog) ─▶ times, issuer, audience ─▶ revoked? ─▶ Claims
//! ```
//! A failed login tells nothing: the same text after the same time, whether the id exists or not, and only a key that could
//! log in is ever hashed for. Secrets exist in clear in one reply; afterwards the vault has a hash of each.
//! Private signing keys are in the vault, public ones in the catalog, so that any node verifies what any node signed,
//! before and after a restart. Tokens are bound to the cluster by issuer, audience and key.
//! Not here: what a claim allows in an RPC (`rpc`), users and sessions (later).

mod bootstrap;
mod cache;
mod credentials;
mod hashing;
mod http;
mod issue;
mod limits;
mod login;
mod metrics;
mod secrets;
mod service;
mod signing;
mod token;
mod vault;
mod verify;

#[cfg(test)]
mod tests;

pub use bootstrap::{BootstrapError, CreateKeyError, NewApiKey, operator_permissions};
pub use credentials::{ClientId, ClientSecret, Credentials, InvalidCredentials};
pub use hashing::HashParams;
pub use http::router;
pub(crate) use limits::FailureLimits as AttemptLimits;
pub use secrets::{MemorySecrets, Secret, SecretError, SecretKind, SecretStore};
pub use service::{Availability, Identity, IdentityConfig, LoginError, TokenPair};
pub use signing::{SigningError, new_signing_key};
pub use token::{AuthError, Claims, Rejection};
pub use vault::VaultSecrets;
