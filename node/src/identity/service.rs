//! Logging in, refreshing, verifying.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_lc_rs::hmac;
use ensign_proto::{ApiKeyId, ClusterId};
use ensign_raft::env::{BootTime, Clock, Rng, Stop};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use sha2::{Digest as _, Sha256};
use thiserror::Error;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{info, warn};
use ulid::Ulid;

use super::cache::Recent;
use super::credentials::{ClientId, ClientSecret};
use super::hashing::{HashParams, HashPool};
use super::limits::FailureLimits;
use super::metrics;
use super::secrets::{SecretKind, SecretStore};
use super::signing::{self, Jwk, SigningKeys};
use super::token::{AuthError, Claims, RawClaims, Rejection, Unverified};
use crate::catalog::{ApiKey, Catalog};

/// Logins whose secret was right lately, so that a fleet that reconnects costs no hashes.
const SECRETS_REMEMBERED: usize = 4_096;
/// Tokens whose signature was right lately.
const TOKENS_REMEMBERED: usize = 8_192;
/// Failed logins that wait for their answer at once.
const DELAYED_MAX: usize = 4_096;
/// Tokens being signed at once.
const SIGNING_MAX: usize = 64;
/// How far another node's clock may be ahead of this one's.
const LEEWAY_SECONDS: u64 = 60;
/// At most this often is the cluster asked whether it knows something that this node does not.
const CATCH_UP_EVERY: Duration = Duration::from_millis(100);
/// A `kid` that nobody knows is asked about at most this often: anyone can make one up.
const UNKNOWN_KID_EVERY: Duration = Duration::from_secs(1);
/// After a failed call the vault is left alone for this long.
const VAULT_PAUSE: Duration = Duration::from_secs(1);
const TEND_EVERY: Duration = Duration::from_mins(1);

/// Settings. All nodes of a cluster must agree on issuer and audience.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityConfig {
    /// The tokens' `iss`, without a trailing slash.
    pub issuer: String,
    /// The tokens' `aud`.
    pub audience: String,
    /// Where clients reach the HTTP listener, without a trailing slash; for the discovery document only.
    pub public_url: String,
    /// How long an access token lives.
    pub access_ttl: Duration,
    /// How long a refresh token lives.
    pub refresh_ttl: Duration,
    /// How long before the access token's end the refresh token begins.
    pub refresh_overlap: Duration,
    /// When a failed login is answered, counted from its arrival.
    pub failure_delay: Duration,
    /// What hashing an API key's secret costs.
    pub hash: HashParams,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpAddr>,
    /// What `/v1/status` says.
    pub version: String,
}

impl IdentityConfig {
    /// The usual settings. Issuer and audience name the cluster and never change: a new address must not void every token.
    pub fn new(cluster: ClusterId) -> Self {
        let issuer = format!("urn:ensign:{}", cluster.to_string().to_ascii_lowercase());
        Self {
            audience: issuer.clone(),
            issuer,
            public_url: "http://localhost:8088".to_owned(),
            access_ttl: Duration::from_hours(1),
            refresh_ttl: Duration::from_hours(2),
            refresh_overlap: Duration::from_mins(15),
            failure_delay: Duration::from_millis(500),
            hash: HashParams::default(),
            trusted_proxies: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// The audience that only refresh tokens have.
    pub(super) fn refresh_audience(&self) -> String {
        format!("{}/v1/refresh", self.issuer)
    }
}

/// Whether logins are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Availability {
    /// Yes.
    Ok,
    /// Not now.
    Maintenance,
    /// The node is shutting down.
    Stopping,
}

/// Waits before a failure is answered; tests only note for how long.
pub(super) trait Pause: Send + Sync + 'static {
    /// Until `instant`, which is `since_arrival` after the request came in.
    fn until(&self, instant: Instant, since_arrival: Duration) -> BoxFuture<'static, ()>;
}

struct Sleep;

impl Pause for Sleep {
    fn until(&self, instant: Instant, _: Duration) -> BoxFuture<'static, ()> {
        sleep_until(instant).boxed()
    }
}

/// Both tokens of a login; SDKs need both in every reply.
#[derive(Debug, PartialEq, Eq)]
pub struct TokenPair {
    /// For RPCs.
    pub access: String,
    /// For `/v1/refresh`.
    pub refresh: String,
    /// When the caller logged in before, in Unix seconds, if that is known.
    pub last_login: Option<u64>,
}

/// Why a login or a refresh gave no tokens.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum LoginError {
    /// 403, the same for every reason.
    #[error("invalid credentials")]
    Refused,
    /// 429: too many failures from there, or too many logins at once.
    #[error("too many requests")]
    Busy {
        /// When to come back.
        retry_after: Duration,
    },
    /// 503: vault or catalog cannot be asked; nothing was decided.
    #[error("logins are unavailable at the moment")]
    Unavailable,
}

/// Who may log in and what their tokens mean. Clones are cheap and share it.
#[derive(Clone)]
pub struct Identity {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) config: IdentityConfig,
    pub(super) catalog: Catalog,
    pub(super) secrets: Arc<dyn SecretStore>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) rng: Arc<dyn Rng>,
    pub(super) pool: HashPool,
    signing: SigningKeys,
    signing_slots: Semaphore,
    limits: Mutex<FailureLimits>,
    /// Keys the cache below: what a memory dump of it shows cannot be tried against elsewhere.
    secret_tag_key: hmac::Key,
    known_secrets: Mutex<Recent<[u8; 32], ApiKeyId>>,
    known_tokens: Mutex<Recent<[u8; 32], Arc<Known>>>,
    delayed: Semaphore,
    pause: Arc<dyn Pause>,
    caught_up: AsyncMutex<Option<Instant>>,
    vault_failed: Mutex<Option<BootTime>>,
    availability: watch::Sender<Availability>,
    started: BootTime,
}

/// A token whose signature, issuer and audience were right.
struct Known {
    claims: Arc<Claims>,
    kid: [u8; 16],
    not_before: u64,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity").field("issuer", &self.inner.config.issuer).finish_non_exhaustive()
    }
}

impl Identity {
    /// The identity service of this node. `rng` must be the kernel's outside of tests: secrets come from it.
    pub fn new(
        config: IdentityConfig,
        catalog: Catalog,
        secrets: Arc<dyn SecretStore>,
        clock: Arc<dyn Clock>,
        rng: Arc<dyn Rng>,
    ) -> Self {
        Self::with_pause(config, catalog, secrets, clock, rng, Arc::new(Sleep))
    }

    pub(super) fn with_pause(
        config: IdentityConfig,
        catalog: Catalog,
        secrets: Arc<dyn SecretStore>,
        clock: Arc<dyn Clock>,
        rng: Arc<dyn Rng>,
        pause: Arc<dyn Pause>,
    ) -> Self {
        metrics::describe();
        let mut tag_key = zeroize::Zeroizing::new([0; 32]);
        rng.fill(&mut *tag_key);
        let inner = Inner {
            pool: HashPool::new(config.hash, Arc::clone(&clock)),
            signing: SigningKeys::new(catalog.view().clone()),
            signing_slots: Semaphore::new(SIGNING_MAX),
            limits: Mutex::new(FailureLimits::new()),
            secret_tag_key: hmac::Key::new(hmac::HMAC_SHA256, &*tag_key),
            known_secrets: Mutex::new(Recent::new(SECRETS_REMEMBERED)),
            known_tokens: Mutex::new(Recent::new(TOKENS_REMEMBERED)),
            delayed: Semaphore::new(DELAYED_MAX),
            pause,
            caught_up: AsyncMutex::new(None),
            vault_failed: Mutex::new(None),
            availability: watch::Sender::new(Availability::Ok),
            started: clock.boot(),
            config,
            catalog,
            secrets,
            clock,
            rng,
        };
        Self { inner: Arc::new(inner) }
    }

    /// The settings.
    pub fn config(&self) -> &IdentityConfig {
        &self.inner.config
    }

    /// Turns logins on or off; verifying goes on either way.
    pub fn set_availability(&self, availability: Availability) {
        self.inner.availability.send_replace(availability);
    }

    pub(super) fn availability(&self) -> Availability {
        *self.inner.availability.borrow()
    }

    pub(super) fn uptime(&self) -> Duration {
        self.inner.clock.boot().0.saturating_sub(self.inner.started.0)
    }

    pub(super) fn published_keys(&self) -> Vec<Jwk> {
        self.inner.signing.published(self.inner.clock.wall())
    }

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
        let client = sha256(client_id.as_bytes());
        let secret = ClientSecret::parse(secret);
        let client_id = client_id.parse::<ClientId>();
        if let (Ok(client_id), Ok(secret)) = (&client_id, &secret)
            && let Some(key) = self.remembered(client_id, secret)
        {
            return self.issue(&key, None).await;
        }
        if let Some(wait) = self.limits().wait(from, &client, self.inner.clock.boot()) {
            return Err(LoginError::Busy { retry_after: wait });
        }
        // Asked before the id is looked up, so that a full queue looks the same to everybody.
        if !self.inner.pool.admits(self.inner.config.failure_delay * 4 / 5) {
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
        let deadline = arrived + self.inner.config.failure_delay * 9 / 10;
        self.vault_answers(deadline).await?;
        let mut key = self.inner.catalog.api_key_by_client(client_id.as_str());
        if key.is_none() {
            // Perhaps made on another node just now. Failing to find out is no reason to say more than "no".
            let _ = timeout_at(deadline, self.catch_up()).await;
            key = self.inner.catalog.api_key_by_client(client_id.as_str());
        }
        // Nothing is hashed for an id that could not log in anyway.
        let Some(key) = key.filter(|key| key.revoked_at.is_none()) else { return Ok(None) };
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
        match self.inner.pool.verify(hash, secret, deadline).await {
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
        self.limits().failed(from, client, self.inner.clock.boot());
        self.delay(arrived).await?;
        Err(LoginError::Refused)
    }

    /// Waits until a failure may be answered: the next multiple of the fixed delay after `arrived`.
    async fn delay(&self, arrived: Instant) -> Result<(), LoginError> {
        let delay = self.inner.config.failure_delay;
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
        if key.is_none() && self.may_ask_about_kid().await {
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

    async fn may_ask_about_kid(&self) -> bool {
        self.inner.caught_up.lock().await.is_none_or(|last| last.elapsed() >= UNKNOWN_KID_EVERY)
    }

    /// Lets this node apply what the cluster knew when this was called. However many ask, the cluster is asked once for all.
    async fn catch_up(&self) -> Result<(), AuthError> {
        let asked = Instant::now();
        let mut last = self.inner.caught_up.lock().await;
        if let Some(last) = *last {
            if last >= asked {
                return Ok(());
            }
            sleep_until(last + CATCH_UP_EVERY).await;
        }
        let begun = Instant::now();
        match timeout(Duration::from_secs(5), self.inner.catalog.refresh()).await {
            Ok(Ok(())) => {
                *last = Some(begun);
                Ok(())
            }
            Ok(Err(error)) => Err(AuthError::Unavailable { cause: error.to_string() }),
            Err(_) => Err(AuthError::Unavailable { cause: "the catalog's leader does not answer".to_owned() }),
        }
    }

    /// Makes a pair of tokens.
    async fn issue(&self, key: &ApiKey, last_login: Option<u64>) -> Result<TokenPair, LoginError> {
        let now = self.inner.clock.wall();
        let signer = self.inner.signing.signer(&*self.inner.secrets, now).await.map_err(|error| {
            warn!(%error, "no tokens can be made");
            LoginError::Unavailable
        })?;
        let (access, refresh) = self.claims(key);
        let Ok(_slot) = self.inner.signing_slots.acquire().await else { return Err(LoginError::Unavailable) };
        let signed =
            tokio::task::spawn_blocking(move || Some((signer.sign(&access).ok()?, signer.sign(&refresh).ok()?))).await;
        let Some((access, refresh)) = signed.ok().flatten() else {
            warn!("a token could not be signed");
            return Err(LoginError::Unavailable);
        };
        Ok(TokenPair { access, refresh, last_login })
    }

    fn claims(&self, key: &ApiKey) -> (RawClaims, RawClaims) {
        let config = &self.inner.config;
        let now = self.inner.clock.wall();
        let mut random = [0; 10];
        self.inner.rng.fill(&mut random);
        let jti = Ulid::from_parts(now.as_millis(), random.iter().fold(0, |n, byte| n << 8 | u128::from(*byte)));
        let iat = now.as_secs();
        let exp = iat + config.access_ttl.as_secs();
        let access = RawClaims {
            iss: config.issuer.clone(),
            aud: vec![config.audience.clone()],
            sub: key.id.to_string(),
            jti: jti.to_string().to_ascii_lowercase(),
            iat,
            nbf: iat,
            exp,
            org: key.org.to_string(),
            project: key.project.map(|project| project.to_string()),
            permissions: Some(key.permissions.to_texts().into_iter().map(str::to_owned).collect()),
        };
        let refresh = RawClaims {
            aud: vec![config.audience.clone(), config.refresh_audience()],
            nbf: exp.saturating_sub(config.refresh_overlap.as_secs()).max(iat),
            exp: iat + config.refresh_ttl.as_secs(),
            permissions: None,
            ..access.clone()
        };
        (access, refresh)
    }

    /// Follows the catalog until `stop`: loads signing keys ahead of their use, forgets what belongs to revoked API keys, and,
    /// on the catalog's leader, replaces the signing key when it is old. One task a node.
    pub async fn tend(self, stop: Stop) {
        let inner = &self.inner;
        let mut changes = inner.catalog.changes();
        let mut rotation_due = Instant::now();
        loop {
            inner.signing.reload(&*inner.secrets, inner.clock.wall()).await;
            lock(&inner.known_secrets).retain(|key| !inner.catalog.is_revoked(*key));
            lock(&inner.known_tokens).retain(|known| !inner.catalog.is_revoked(known.claims.subject));
            if inner.catalog.leads() && Instant::now() >= rotation_due {
                rotation_due = Instant::now() + TEND_EVERY;
                let (store, clock, rng) = (&*inner.secrets, &*inner.clock, &*inner.rng);
                let rotated = signing::rotate_if_due(&inner.catalog, store, clock, rng, inner.config.refresh_ttl).await;
                if let Err(error) = rotated {
                    warn!(%error, "the token-signing keys could not be looked after");
                }
            }
            let woken = stop.run_until_cancelled(timeout(TEND_EVERY, changes.changed())).await;
            if woken.is_none() || matches!(woken, Some(Ok(Err(_)))) {
                return;
            }
        }
    }

    fn limits(&self) -> MutexGuard<'_, FailureLimits> {
        lock(&self.inner.limits)
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

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Nothing here panics while it holds a lock, and each of these maps is whole between two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
