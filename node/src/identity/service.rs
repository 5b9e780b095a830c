//! The service: its settings, its parts and what it does on its own. Its calls are in `login`, `verify` and `issue`.

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
use tokio::time::{Instant, sleep_until, timeout};
use tracing::warn;

use super::cache::Recent;
use super::hashing::{HashParams, HashPool};
use super::limits::FailureLimits;
use super::login::Slowest;
use super::metrics;
use super::secrets::SecretStore;
use super::signing::{self, Jwk, SigningKeys};
use super::token::Claims;
use crate::catalog::Catalog;

/// Logins whose secret was right lately, so that a fleet that reconnects costs no hashes.
const SECRETS_REMEMBERED: usize = 4_096;
/// Tokens whose signature was right lately.
const TOKENS_REMEMBERED: usize = 8_192;
/// Failed logins that wait for their answer at once.
const DELAYED_MAX: usize = 4_096;
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
#[derive(PartialEq, Eq)]
pub struct TokenPair {
    /// For RPCs.
    pub access: String,
    /// For `/v1/refresh`.
    pub refresh: String,
    /// When the caller logged in before, in Unix seconds, if that is known.
    pub last_login: Option<u64>,
}

impl fmt::Debug for TokenPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever reads a log must not be able to act for its users.
        f.debug_struct("TokenPair").field("last_login", &self.last_login).finish_non_exhaustive()
    }
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
    pub(super) signing: SigningKeys,
    pub(super) signing_slots: Semaphore,
    pub(super) limits: Mutex<FailureLimits>,
    /// Keys the cache below: what a memory dump of it shows cannot be tried against elsewhere.
    pub(super) secret_tag_key: hmac::Key,
    pub(super) known_secrets: Mutex<Recent<[u8; 32], ApiKeyId>>,
    pub(super) known_tokens: Mutex<Recent<[u8; 32], Arc<Known>>>,
    pub(super) delayed: Semaphore,
    pub(super) pause: Arc<dyn Pause>,
    pub(super) caught_up: AsyncMutex<Option<CaughtUp>>,
    pub(super) slowest: Mutex<Slowest>,
    pub(super) vault_failed: Mutex<Option<BootTime>>,
    /// When the vault was last asked, with success, on behalf of ids that do not exist.
    pub(super) vault_probed: AsyncMutex<Option<Instant>>,
    pub(super) availability: watch::Sender<Availability>,
    pub(super) started: BootTime,
}

/// How the last attempt to catch up with the cluster went.
pub(super) struct CaughtUp {
    pub(super) begun: Instant,
    pub(super) ended: Instant,
    pub(super) failure: Option<String>,
}

/// A token whose signature, issuer and audience were right.
pub(super) struct Known {
    pub(super) claims: Arc<Claims>,
    pub(super) kid: [u8; 16],
    pub(super) not_before: u64,
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
            signing_slots: Semaphore::new(signing_slots()),
            limits: Mutex::new(FailureLimits::new()),
            secret_tag_key: hmac::Key::new(hmac::HMAC_SHA256, &*tag_key),
            known_secrets: Mutex::new(Recent::new(SECRETS_REMEMBERED)),
            known_tokens: Mutex::new(Recent::new(TOKENS_REMEMBERED)),
            delayed: Semaphore::new(DELAYED_MAX),
            pause,
            caught_up: AsyncMutex::new(None),
            slowest: Mutex::default(),
            vault_failed: Mutex::new(None),
            vault_probed: AsyncMutex::new(None),
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
}

/// Tokens being signed at once: whoever may log in may not keep all cores busy with it.
fn signing_slots() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    (cores / 2).max(1)
}

pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Nothing here panics while it holds a lock, and each of these maps is whole between two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
