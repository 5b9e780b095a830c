//! Logging in: the order of the checks is what keeps a failure from telling anything.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use ensign_raft::env::BootTime;
use tokio::time::{Instant, timeout_at};
use tracing::warn;

use super::credentials::{ClientId, ClientSecret};
use super::limits::site;
use super::secrets::SecretKind;
use super::service::{Identity, LoginError, TokenPair, lock, sha256};
use crate::catalog::ApiKey;

/// After a failed call the vault is left alone for this long.
const VAULT_PAUSE: Duration = Duration::from_secs(1);

/// How long a login may take that is not decided yet: vault and queue included.
const DEADLINE: Duration = Duration::from_secs(5);
/// The longest delay of a failure, in fixed delays.
const BEATS_MAX: u32 = 10;
/// In this time, half of how slow it was is forgotten.
const FORGET_HALF: Duration = Duration::from_secs(5);

/// How long it took lately to decide about a login that was hashed for.
#[derive(Debug, Default)]
pub(super) struct Slowest {
    took: Duration,
    at: BootTime,
}

impl Slowest {
    fn now(&self, now: BootTime) -> Duration {
        let halvings = now.0.saturating_sub(self.at.0).as_nanos() / FORGET_HALF.as_nanos();
        self.took / 2_u32.saturating_pow(u32::try_from(halvings).unwrap_or(u32::MAX))
    }

    fn note(&mut self, took: Duration, now: BootTime) {
        if took >= self.now(now) {
            *self = Self { took, at: now };
        }
    }
}

impl Identity {
    /// Logs an API key in. Whatever comes in, however long: only 32 letters and 64 characters are ever looked at.
    ///
    /// A failure is answered a fixed time after `arrived`, hashing included. Cancel safe.
    ///
    /// # Errors
    /// See [`LoginError`].
    pub async fn authenticate(
        &self,
        client_id: &str,
        secret: String,
        from: Option<IpAddr>,
        arrived: Instant,
    ) -> Result<TokenPair, LoginError> {
        let client = whose(client_id, from);
        let secret = ClientSecret::parse(secret);
        let client_id = client_id.parse::<ClientId>();
        if let (Ok(client_id), Ok(secret)) = (&client_id, &secret)
            && let Some(key) = self.remembered(client_id, secret)
        {
            return self.issue(&key, None).await;
        }
        // By client and address: who merely knows an id cannot lock its owner out from elsewhere.
        if let Some(wait) = lock(&self.inner.limits).wait(from, &client, self.inner.clock.boot()) {
            return Err(LoginError::Busy { retry_after: wait });
        }
        // Asked before the id is looked up, so that a full queue looks the same to everybody.
        if !self.inner.pool.has_room() {
            return Err(LoginError::Busy { retry_after: Duration::from_secs(1) });
        }
        let (Ok(client_id), Ok(secret)) = (client_id, secret) else {
            return self.refuse(from, client, arrived).await;
        };
        match self.check(&client_id, secret, arrived).await? {
            Some(key) => self.issue(&key, None).await,
            None => self.refuse(from, client, arrived).await,
        }
    }

    /// The key whose secret this is, if any.
    async fn check(
        &self,
        client_id: &ClientId,
        secret: ClientSecret,
        arrived: Instant,
    ) -> Result<Option<Arc<ApiKey>>, LoginError> {
        // What nobody can log in without is waited for; what only serves to say "no" with more confidence is not.
        // Those who wait are told apart by what they say they are, whether there is such a client or not.
        let client = sha256(client_id.as_str().as_bytes());
        let (deadline, soon) = (arrived + DEADLINE, arrived + self.inner.config.failure_delay * 9 / 10);
        self.vault_answers(soon).await?;
        let mut key = self.inner.catalog.api_key_by_client(client_id.as_str());
        if key.is_none() {
            // Perhaps made on another node just now. Failing to find out is no reason to say more than "no".
            let _ = timeout_at(soon, self.catch_up()).await;
            key = self.inner.catalog.api_key_by_client(client_id.as_str());
        }
        let Some(key) = key.filter(|key| key.revoked_at.is_none()) else {
            // Nothing is hashed for an id that could not log in anyway. But it meets whatever one that could would meet, when it
            // would: a vault that does not answer, a queue that is too long.
            self.vault_answers_by(deadline).await?;
            let turn = self.inner.pool.turn(client, deadline).await;
            return turn.map(|()| None).map_err(|_| LoginError::Busy { retry_after: Duration::from_secs(1) });
        };
        let asked = self.inner.secrets.get(SecretKind::ApiKey, *key.id.as_bytes());
        let hash = match timeout_at(deadline, asked).await {
            Ok(Ok(Some(hash))) => hash,
            Ok(Ok(None)) => {
                warn!(key = %key.id, "the vault has no hash of this API key");
                return Ok(None);
            }
            Ok(Err(error)) => {
                warn!(%error, "a login failed for want of the vault");
                self.vault_failed_now();
                return Err(LoginError::Unavailable);
            }
            Err(_) => {
                self.vault_failed_now();
                return Err(LoginError::Unavailable);
            }
        };
        let tag = self.secret_tag(client_id, &secret);
        let verified = self.inner.pool.verify(client, hash, secret, deadline).await;
        lock(&self.inner.slowest).note(arrived.elapsed(), self.inner.clock.boot());
        match verified {
            Ok(false) => Ok(None),
            Ok(true) => {
                lock(&self.inner.known_secrets).insert(tag, key.id);
                // It may have been revoked while its secret was hashed.
                Ok(Some(key).filter(|key| !self.inner.catalog.is_revoked(key.id)))
            }
            Err(_) => Err(LoginError::Busy { retry_after: Duration::from_secs(1) }),
        }
    }

    /// While the vault does not answer, known and unknown ids are refused alike: nobody learns which are which.
    async fn vault_answers(&self, deadline: Instant) -> Result<(), LoginError> {
        let Some(failed) = *lock(&self.inner.vault_failed) else { return Ok(()) };
        if self.inner.clock.boot().0.saturating_sub(failed.0) < VAULT_PAUSE {
            return Err(LoginError::Unavailable);
        }
        let probe = self.inner.secrets.get(SecretKind::ApiKey, [0; 16]);
        if matches!(timeout_at(deadline, probe).await, Ok(Ok(_))) {
            *lock(&self.inner.vault_failed) = None;
            Ok(())
        } else {
            self.vault_failed_now();
            Err(LoginError::Unavailable)
        }
    }

    /// Asks the vault for what it does not have, in place of a hash. However many ask, it is asked once for all of them.
    async fn vault_answers_by(&self, deadline: Instant) -> Result<(), LoginError> {
        let asked = Instant::now();
        let probing = async {
            let mut last = self.inner.vault_probed.lock().await;
            if last.is_some_and(|begun| begun >= asked) {
                return true;
            }
            let begun = Instant::now();
            let answered = self.inner.secrets.get(SecretKind::ApiKey, [0; 16]).await.is_ok();
            *last = answered.then_some(begun);
            answered
        };
        if matches!(timeout_at(deadline, probing).await, Ok(true)) {
            return Ok(());
        }
        self.vault_failed_now();
        Err(LoginError::Unavailable)
    }

    fn vault_failed_now(&self) {
        *lock(&self.inner.vault_failed) = Some(self.inner.clock.boot());
    }

    /// The key of a login that succeeded lately.
    fn remembered(&self, client_id: &ClientId, secret: &ClientSecret) -> Option<Arc<ApiKey>> {
        let tag = self.secret_tag(client_id, secret);
        let id = *lock(&self.inner.known_secrets).get_mut(&tag)?;
        let key = self.inner.catalog.api_key(id).filter(|key| key.revoked_at.is_none());
        if key.is_none() {
            lock(&self.inner.known_secrets).remove(&tag);
        }
        key
    }

    fn secret_tag(&self, client_id: &ClientId, secret: &ClientSecret) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.inner.secret_tag_key);
        // Both have a fixed length, so there is one way to cut them apart.
        context.update(client_id.as_str().as_bytes());
        context.update(secret.expose().as_bytes());
        let mut tag = [0; 32];
        tag.copy_from_slice(context.sign().as_ref());
        tag
    }

    async fn refuse<T>(&self, from: Option<IpAddr>, client: [u8; 32], arrived: Instant) -> Result<T, LoginError> {
        lock(&self.inner.limits).failed(from, client, self.inner.clock.boot());
        self.delay(arrived).await?;
        Err(LoginError::Refused)
    }

    /// Waits until a failure may be answered: the next multiple of the fixed delay after `arrived`.
    ///
    /// Where deciding takes as long as the delay, since the machine is overloaded or the queue is long, everybody's delay is a
    /// longer one: an id that is hashed for must not be known by its lateness.
    pub(super) async fn delay(&self, arrived: Instant) -> Result<(), LoginError> {
        let planned = self.inner.config.failure_delay;
        let slowest = lock(&self.inner.slowest).now(self.inner.clock.boot());
        let beats = if planned.is_zero() { 1 } else { (slowest * 3 / 2).as_nanos() / planned.as_nanos() + 1 };
        let delay = planned * u32::try_from(beats).unwrap_or(BEATS_MAX).min(BEATS_MAX);
        let Ok(_place) = self.inner.delayed.try_acquire() else {
            return Err(LoginError::Busy { retry_after: Duration::from_secs(1) });
        };
        let mut until = arrived + delay;
        while until <= Instant::now() && delay > Duration::ZERO {
            until += delay;
        }
        self.inner.pause.until(until, until - arrived).await;
        Ok(())
    }
}

/// What failures of this client id from there are counted by.
fn whose(client_id: &str, from: Option<IpAddr>) -> [u8; 32] {
    let mut text = sha256(client_id.as_bytes()).to_vec();
    if let Some(from) = from {
        text.extend_from_slice(site(from).to_string().as_bytes());
    }
    sha256(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_decision_is_remembered_for_a_while_and_a_slower_one_replaces_it() {
        let at = |seconds| BootTime(Duration::from_secs(seconds));
        let mut slowest = Slowest::default();
        assert_eq!(slowest.now(at(100)), Duration::ZERO);
        slowest.note(Duration::from_millis(800), at(100));
        slowest.note(Duration::from_millis(30), at(101));
        assert_eq!(slowest.now(at(104)), Duration::from_millis(800));
        assert_eq!(slowest.now(at(105)), Duration::from_millis(400));
        slowest.note(Duration::from_millis(500), at(105));
        assert_eq!(slowest.now(at(105)), Duration::from_millis(500));
        assert_eq!(slowest.now(at(100_000)), Duration::ZERO);
    }
}
