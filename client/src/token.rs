//! Tokens: logging in once, staying logged in, never twice at a time.
//!
//! A token is renewed when four fifths of its life have passed, so no call waits for a login in normal running. Its life is
//! counted from when we asked for it, by our own monotonic clock and from `exp - iat`: a wrong wall clock on this machine
//! neither ends it early nor keeps it too long.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::credentials::Credentials;
use crate::error::chain;

/// How many times an unreachable login service is tried before the caller hears of it.
const ATTEMPTS: u32 = 4;
/// How long a still valid token is used on after a failed renewal before the next try.
const RETRY_RENEWAL: Duration = Duration::from_secs(5);

/// Why there is no token.
#[derive(Debug, Clone, Error)]
pub enum AuthError {
    /// The server does not know this client id, or the secret is wrong, or the key was revoked. Trying again does not help.
    #[error("the API key {client_id} was refused: unknown, revoked, or the wrong secret")]
    Refused {
        /// The public half of the credentials.
        client_id: String,
    },
    /// No login service answered. Trying again may help.
    #[error("cannot log in at {url}: {cause}")]
    Unreachable {
        /// The address that was tried last.
        url: String,
        /// What happened.
        cause: String,
    },
    /// Something answered that is not an Ensign login service.
    #[error("{url} does not answer like a login service: {cause}")]
    Malformed {
        /// The address.
        url: String,
        /// What is wrong with its answer.
        cause: String,
    },
}

/// Gives out the `authorization` value of a valid token.
pub(crate) struct TokenSource {
    http: reqwest::Client,
    urls: Vec<String>,
    credentials: Credentials,
    attempt_timeout: Duration,
    current: Mutex<Option<Tokens>>,
    /// Held by the one task that logs in; the others wait for it and then look at `current`.
    login: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Tokens {
    bearer: MetadataValue<Ascii>,
    renew_at: Instant,
    expires_at: Instant,
    refresh: Option<Refresh>,
}

#[derive(Clone)]
struct Refresh {
    token: String,
    from: Instant,
    until: Instant,
}

#[derive(Deserialize)]
struct LoginReply {
    access_token: String,
    #[serde(default)]
    refresh_token: Option<String>,
}

#[derive(Deserialize)]
struct ErrorReply {
    error: String,
}

#[derive(Deserialize)]
struct Claims {
    exp: i64,
    #[serde(default)]
    iat: Option<i64>,
    #[serde(default)]
    nbf: Option<i64>,
}

impl TokenSource {
    pub(crate) fn new(
        http: reqwest::Client,
        urls: Vec<String>,
        credentials: Credentials,
        attempt_timeout: Duration,
    ) -> Self {
        let urls = urls.into_iter().map(|url| url.trim_end_matches('/').to_owned()).collect();
        Self {
            http,
            urls,
            credentials,
            attempt_timeout,
            current: Mutex::default(),
            login: tokio::sync::Mutex::default(),
        }
    }

    #[cfg(test)]
    pub(crate) fn urls(&self) -> &[String] {
        &self.urls
    }

    /// A token that is valid now. Cancel safe.
    pub(crate) async fn bearer(&self) -> Result<MetadataValue<Ascii>, AuthError> {
        if let Some(tokens) = self.fresh() {
            return Ok(tokens.bearer);
        }
        let _login = self.login.lock().await;
        // Whoever held the lock before us may have logged in already.
        if let Some(tokens) = self.fresh() {
            return Ok(tokens.bearer);
        }
        let old = self.lock().clone();
        match self.renew(old.as_ref()).await {
            Ok(tokens) => {
                let bearer = tokens.bearer.clone();
                *self.lock() = Some(tokens);
                Ok(bearer)
            }
            // Renewal starts early so that an outage of the login service need not be one of ours.
            Err(error @ (AuthError::Unreachable { .. } | AuthError::Malformed { .. })) => match old {
                Some(mut old) if Instant::now() < old.expires_at => {
                    warn!(%error, "renewing the token failed; using the old one while it lasts");
                    old.renew_at = Instant::now() + RETRY_RENEWAL;
                    let bearer = old.bearer.clone();
                    *self.lock() = Some(old);
                    Ok(bearer)
                }
                _ => Err(error),
            },
            Err(refused @ AuthError::Refused { .. }) => {
                *self.lock() = None;
                Err(refused)
            }
        }
    }

    /// Forgets the token if it is still `bearer`: the server says that it is not valid.
    pub(crate) fn reject(&self, bearer: &MetadataValue<Ascii>) {
        let mut current = self.lock();
        if current.as_ref().is_some_and(|tokens| tokens.bearer == *bearer) {
            *current = None;
        }
    }

    fn fresh(&self) -> Option<Tokens> {
        self.lock().as_ref().filter(|tokens| Instant::now() < tokens.renew_at).cloned()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Tokens>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn renew(&self, old: Option<&Tokens>) -> Result<Tokens, AuthError> {
        let now = Instant::now();
        let usable = old.and_then(|old| old.refresh.as_ref()).filter(|it| it.from <= now && now < it.until);
        if let Some(refresh) = usable {
            let body = serde_json::json!({ "refresh_token": refresh.token });
            match self.post("/v1/refresh", &body).await {
                Ok(tokens) => return Ok(tokens),
                // A login would ask the same service.
                Err(error @ AuthError::Unreachable { .. }) => return Err(error),
                // A refresh token can be refused for reasons that a login is not, for example a rotated signing key.
                Err(error) => info!(%error, "refresh failed; logging in"),
            }
        }
        let body = serde_json::json!({
            "client_id": self.credentials.client_id(),
            "client_secret": self.credentials.client_secret(),
        });
        self.post("/v1/authenticate", &body).await
    }

    async fn post(&self, path: &str, body: &serde_json::Value) -> Result<Tokens, AuthError> {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        let mut last = AuthError::Unreachable { url: String::new(), cause: "no address is configured".to_owned() };
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                sleep(backoff.delay()).await;
            }
            for url in &self.urls {
                match self.post_once(&format!("{url}{path}"), body).await {
                    Err(error @ AuthError::Unreachable { .. }) => last = error,
                    other => return other,
                }
            }
        }
        Err(last)
    }

    async fn post_once(&self, url: &str, body: &serde_json::Value) -> Result<Tokens, AuthError> {
        let unreachable = |cause: String| AuthError::Unreachable { url: url.to_owned(), cause };
        let malformed = |cause: String| AuthError::Malformed { url: url.to_owned(), cause };
        let asked = Instant::now();
        let exchange = async {
            let reply = self.http.post(url).json(body).send().await?;
            let status = reply.status();
            Ok::<_, reqwest::Error>((status, reply.bytes().await?))
        };
        let (status, reply) = match timeout(self.attempt_timeout, exchange).await {
            Err(_) => return Err(unreachable(format!("no answer within {:?}", self.attempt_timeout))),
            Ok(Err(error)) => return Err(unreachable(chain(&error.without_url()))),
            Ok(Ok(answer)) => answer,
        };
        match status.as_u16() {
            200..=299 => {
                let reply: LoginReply = serde_json::from_slice(&reply)
                    // serde's message could quote the token.
                    .map_err(|_| malformed("the reply carries no access_token".to_owned()))?;
                Tokens::new(&reply, asked).ok_or_else(|| malformed("the access token is not a JWT with exp".to_owned()))
            }
            401 | 403 => Err(AuthError::Refused { client_id: self.credentials.client_id().to_owned() }),
            429 | 500..=599 => Err(unreachable(explain(status, &reply))),
            _ => Err(malformed(explain(status, &reply))),
        }
    }
}

fn explain(status: reqwest::StatusCode, reply: &[u8]) -> String {
    match serde_json::from_slice::<ErrorReply>(reply) {
        Ok(reply) => format!("{status}: {}", reply.error),
        Err(_) => status.to_string(),
    }
}

impl Tokens {
    fn new(reply: &LoginReply, asked: Instant) -> Option<Self> {
        let access = claims(&reply.access_token)?;
        let issued = access.iat.or(access.nbf)?;
        let life = Duration::from_secs(u64::try_from(access.exp - issued).ok().filter(|seconds| *seconds > 0)?);
        let refresh = reply.refresh_token.as_ref().and_then(|token| {
            let claims = claims(token)?;
            let after = |time: i64| asked + Duration::from_secs(u64::try_from(time - issued).unwrap_or(0));
            Some(Refresh { token: token.clone(), from: after(claims.nbf?), until: after(claims.exp) })
        });
        let mut bearer: MetadataValue<Ascii> = format!("Bearer {}", reply.access_token).parse().ok()?;
        bearer.set_sensitive(true);
        Some(Self { bearer, renew_at: asked + life.mul_f64(0.8), expires_at: asked + life, refresh })
    }
}

/// Reads a token's payload. Its signature is the server's business: we only want to know when to ask for the next.
fn claims(token: &str) -> Option<Claims> {
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
}
