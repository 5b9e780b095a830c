//! Verifying tokens, and trading one kind for new ones.

use std::sync::Arc;
use std::time::Duration;

use ensign_proto::ApiKeyId;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::info;

use super::metrics;
use super::service::{CaughtUp, Identity, Known, LoginError, TokenPair, lock, sha256};
use super::token::{AuthError, Claims, RawClaims, Rejection, Unverified};
use crate::catalog::ApiKey;

/// How far another node's clock may be ahead of this one's.
const LEEWAY_SECONDS: u64 = 60;
/// At most this often is the cluster asked whether it knows something that this node does not.
const CATCH_UP_EVERY: Duration = Duration::from_millis(100);
/// How long the cluster may take to answer, and for how long nobody asks again if it did not.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(5);
const CATCH_UP_PAUSE: Duration = Duration::from_secs(1);
/// A `kid` that nobody knows is asked about at most this often: anyone can make one up.
const UNKNOWN_KID_EVERY: Duration = Duration::from_secs(1);

impl Identity {
    /// Trades a refresh token for a new pair, with what its API key may do now.
    ///
    /// # Errors
    /// See [`LoginError`]; a failure is answered as late as a failed login.
    pub async fn refresh(&self, token: &str, arrived: Instant) -> Result<TokenPair, LoginError> {
        let known = async {
            let claims = self.signed_by_us(token).await?.1;
            let now = self.inner.clock.wall().as_secs();
            self.check_place(&claims, &self.inner.config.refresh_audience())?;
            check_times(claims.nbf, claims.exp, now).map_err(AuthError::Invalid)?;
            let subject = claims.subject().map_err(AuthError::Invalid)?;
            let key = self.known_key(subject).await?;
            // An API key never changes hands, so this only guards against our own mistakes.
            let same = key.org.to_string() == claims.org && key.project.map(|id| id.to_string()) == claims.project;
            if same { Ok((key, claims.iat)) } else { Err(AuthError::Invalid(Rejection::Revoked)) }
        };
        match known.await {
            Ok((key, before)) => self.issue(&key, Some(before)).await,
            Err(AuthError::Unavailable { .. }) => Err(LoginError::Unavailable),
            Err(AuthError::Invalid(reason)) => {
                info!(%reason, "a refresh was refused");
                self.delay(arrived).await?;
                Err(LoginError::Refused)
            }
        }
    }

    /// Who the bearer of this access token is. Cheap for a token that was seen before; asks the network only about tokens of
    /// this cluster that this node does not know yet.
    ///
    /// # Errors
    /// [`AuthError::Invalid`]: UNAUTHENTICATED, for whatever reason, the API key's revocation included.
    pub async fn verify(&self, bearer: &str) -> Result<Arc<Claims>, AuthError> {
        if self.inner.catalog.stuck().is_some() {
            // It would not hear of a revocation.
            return Err(AuthError::Unavailable { cause: "this node must be upgraded".to_owned() });
        }
        if !self.inner.catalog.is_fresh() {
            // Nor would it hear of one while nobody confirms what it knows. Asked here, too, for nodes that do not keep it fresh.
            self.catch_up().await?;
        }
        let digest = sha256(bearer.as_bytes());
        let hit = lock(&self.inner.known_tokens).get_mut(&digest).map(|known| Arc::clone(known));
        let known = if let Some(known) = hit {
            known
        } else {
            let verified = self.verify_anew(bearer).await;
            metrics::token(if verified.is_ok() { "ok" } else { "refused" });
            let known = Arc::new(verified?);
            lock(&self.inner.known_tokens).insert(digest, Arc::clone(&known));
            known
        };
        let now = self.inner.clock.wall();
        let checked = check_times(known.not_before, known.claims.expires, now.as_secs()).and_then(|()| {
            // A signing key can be withdrawn, an API key revoked, at any time.
            self.inner.signing.public_key(&known.kid, now).ok_or(Rejection::UnknownKey)?;
            self.is_live(&known.claims).then_some(()).ok_or(Rejection::Revoked)
        });
        match checked {
            Ok(()) => Ok(Arc::clone(&known.claims)),
            Err(reason) => {
                if reason != Rejection::NotYet {
                    lock(&self.inner.known_tokens).remove(&digest);
                }
                Err(AuthError::Invalid(reason))
            }
        }
    }

    /// Whether the caller's API key is still good: what an open stream asks whenever [`View::changes`] wakes it.
    ///
    /// [`View::changes`]: crate::catalog::View::changes
    pub fn is_live(&self, claims: &Claims) -> bool {
        !self.inner.catalog.is_revoked(claims.subject)
    }

    async fn verify_anew(&self, bearer: &str) -> Result<Known, AuthError> {
        let (kid, claims) = self.signed_by_us(bearer).await?;
        self.check_place(&claims, &self.inner.config.audience)?;
        // A refresh token names the same audience; it opens nothing but the refresh call.
        if claims.aud.contains(&self.inner.config.refresh_audience()) {
            return Err(AuthError::Invalid(Rejection::WrongAudience));
        }
        let access = claims.access().map_err(AuthError::Invalid)?;
        self.known_key(access.subject).await?;
        Ok(Known { claims: Arc::new(access), kid, not_before: claims.nbf.max(claims.iat) })
    }

    /// The claims of a token that one of this cluster's keys has signed.
    async fn signed_by_us(&self, token: &str) -> Result<([u8; 16], RawClaims), AuthError> {
        let token = Unverified::parse(token).map_err(AuthError::Invalid)?;
        let now = self.inner.clock.wall();
        let mut key = self.inner.signing.public_key(&token.kid, now);
        if key.is_none() && self.may_ask_about_kid() {
            self.catch_up().await?;
            key = self.inner.signing.public_key(&token.kid, now);
        }
        let key = key.ok_or(AuthError::Invalid(Rejection::UnknownKey))?;
        let claims = token.verify(&key.public_key).map_err(AuthError::Invalid)?;
        Ok((token.kid, claims))
    }

    fn check_place(&self, claims: &RawClaims, audience: &str) -> Result<(), AuthError> {
        if claims.iss != self.inner.config.issuer {
            return Err(AuthError::Invalid(Rejection::WrongIssuer));
        }
        let named = claims.aud.iter().any(|named| named == audience);
        named.then_some(()).ok_or(AuthError::Invalid(Rejection::WrongAudience))
    }

    /// The API key of a token that we signed, unless it is revoked. It exists somewhere, so this node may be behind.
    async fn known_key(&self, subject: ApiKeyId) -> Result<Arc<ApiKey>, AuthError> {
        let mut key = self.inner.catalog.api_key(subject);
        if key.is_none() {
            self.catch_up().await?;
            key = self.inner.catalog.api_key(subject);
        }
        key.filter(|key| key.revoked_at.is_none()).ok_or(AuthError::Invalid(Rejection::Revoked))
    }

    fn may_ask_about_kid(&self) -> bool {
        // Whoever is asking already asks for real tokens, or about another `kid` that was made up.
        let Ok(last) = self.inner.caught_up.try_lock() else { return false };
        last.as_ref().is_none_or(|last| last.begun.elapsed() >= UNKNOWN_KID_EVERY)
    }

    /// Lets this node apply what the cluster knew when this was called. However many ask, the cluster is asked once for all.
    pub(super) async fn catch_up(&self) -> Result<(), AuthError> {
        let asked = Instant::now();
        let mut last = self.inner.caught_up.lock().await;
        if let Some(last) = &*last {
            match &last.failure {
                None if last.begun >= asked => return Ok(()),
                None => sleep_until(last.begun + CATCH_UP_EVERY).await,
                // Nobody waits one by one for a leader that is not there.
                Some(cause) if last.ended.elapsed() < CATCH_UP_PAUSE => {
                    return Err(AuthError::Unavailable { cause: cause.clone() });
                }
                Some(_) => {}
            }
        }
        let begun = Instant::now();
        let failure = match timeout(CATCH_UP_DEADLINE, self.inner.catalog.refresh()).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("the catalog's leader does not answer".to_owned()),
        };
        *last = Some(CaughtUp { begun, ended: Instant::now(), failure: failure.clone() });
        failure.map_or(Ok(()), |cause| Err(AuthError::Unavailable { cause }))
    }
}

/// No leeway at the end: nobody is served longer than the token says.
fn check_times(not_before: u64, expires: u64, now: u64) -> Result<(), Rejection> {
    if now >= expires {
        return Err(Rejection::Expired);
    }
    if now + LEEWAY_SECONDS < not_before {
        return Err(Rejection::NotYet);
    }
    Ok(())
}
