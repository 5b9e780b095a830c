//! Argon2id, beside the async runtime and within bounds: each hash takes megabytes and milliseconds of a core.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use argon2::{Algorithm, Argon2, Params, PasswordHash, PasswordHasher as _, PasswordVerifier as _, Version};
use ensign_raft::env::{Clock, Rng};
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::credentials::ClientSecret;
use super::secrets::Secret;

/// Logins that wait for a core; the next ones are told to come back. Of one client id as many as there are places left, so that no
/// client keeps all others out.
const QUEUE_MAX: usize = 32;

/// How costly a hash is. Stored with each hash, so a change concerns new ones only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashParams {
    /// KiB of memory.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Default for HashParams {
    /// OWASP's first choice for Argon2id: 19 MiB, two passes, one lane.
    fn default() -> Self {
        Self { memory_kib: 19_456, passes: 2, lanes: 1 }
    }
}

/// No core became free in time; nothing was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("too many logins at once")]
pub(super) struct Busy;

/// A hash could not be made or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the secret cannot be hashed")]
pub(super) struct HashFailure;

/// Hashes and verifies with at most half the cores.
#[derive(Clone)]
pub(super) struct HashPool {
    shared: Arc<Shared>,
}

struct Shared {
    params: HashParams,
    cores: Arc<Semaphore>,
    waiting: Mutex<Waiting>,
    clock: Arc<dyn Clock>,
}

/// Who waits.
#[derive(Default)]
struct Waiting {
    all: usize,
    /// By what their client id hashes to; whoever has none to show shares one.
    of: HashMap<[u8; 32], usize>,
}

impl fmt::Debug for HashPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HashPool").field("params", &self.shared.params).finish_non_exhaustive()
    }
}

impl HashPool {
    pub(super) fn new(params: HashParams, clock: Arc<dyn Clock>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let cores = Arc::new(Semaphore::new((cores / 2).max(1)));
        Self { shared: Arc::new(Shared { params, cores, waiting: Mutex::default(), clock }) }
    }

    /// Whether there is room for one more. Asked before anything is looked up, so that the answer tells nothing about the login.
    pub(super) fn has_room(&self) -> bool {
        lock(&self.shared.waiting).all < QUEUE_MAX
    }

    /// Whether `secret` is what `hash` was made of. Begins before `deadline` or not at all.
    pub(super) async fn verify(
        &self,
        client: [u8; 32],
        hash: Secret,
        secret: ClientSecret,
        deadline: Instant,
    ) -> Result<bool, Busy> {
        let clock = Arc::clone(&self.shared.clock);
        let (verified, took) = self
            .run(client, deadline, move || {
                let start = clock.boot();
                let verified = std::str::from_utf8(hash.expose())
                    .ok()
                    .and_then(|text| PasswordHash::new(text).ok())
                    // The cost comes from the hash, not from this instance.
                    .is_some_and(|hash| Argon2::default().verify_password(secret.expose().as_bytes(), &hash).is_ok());
                (verified, clock.boot().0.saturating_sub(start.0))
            })
            .await?;
        super::metrics::hashed(took);
        Ok(verified)
    }

    /// The hash of a new secret, as a PHC string.
    pub(super) async fn hash(&self, secret: &ClientSecret, rng: &dyn Rng) -> Result<Secret, HashFailure> {
        let HashParams { memory_kib, passes, lanes } = self.shared.params;
        let params = Params::new(memory_kib, passes, lanes, None).map_err(|_| HashFailure)?;
        let mut salt = [0; 16];
        rng.fill(&mut salt);
        let secret = Zeroizing::new(secret.expose().to_owned());
        let deadline = Instant::now() + Duration::from_secs(30);
        self.run([0; 32], deadline, move || {
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_with_salt(secret.as_bytes(), &salt)
                .map(|hash| Secret::new(hash.to_string().into_bytes()))
        })
        .await
        .map_err(|_| HashFailure)?
        .map_err(|_| HashFailure)
    }

    /// Waits for a turn, and gives it to the next one.
    pub(super) async fn turn(&self, client: [u8; 32], deadline: Instant) -> Result<(), Busy> {
        let _place = Place::take(&self.shared, client)?;
        match timeout_at(deadline, self.shared.cores.acquire()).await {
            Ok(Ok(_permit)) => Ok(()),
            _ => Err(Busy),
        }
    }

    async fn run<T: Send + 'static>(
        &self,
        client: [u8; 32],
        deadline: Instant,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Busy> {
        let place = Place::take(&self.shared, client)?;
        let permit = timeout_at(deadline, Arc::clone(&self.shared.cores).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else { return Err(Busy) };
        drop(place);
        tokio::task::spawn_blocking(move || {
            // Held until the work is done: a client that hangs up must not free the core for the next one early.
            let _permit = permit;
            work()
        })
        .await
        .map_err(|_| Busy)
    }
}

/// A place in the queue, given back when dropped.
struct Place<'a> {
    waiting: &'a Mutex<Waiting>,
    client: [u8; 32],
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    // Every change is whole before anything could panic.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Place<'a> {
    fn take(shared: &'a Shared, client: [u8; 32]) -> Result<Self, Busy> {
        let mut waiting = lock(&shared.waiting);
        let own = waiting.of.get(&client).copied().unwrap_or_default();
        // Known and unknown ids alike: a full share must not tell which are which.
        if own >= QUEUE_MAX.saturating_sub(waiting.all) {
            return Err(Busy);
        }
        waiting.all += 1;
        *waiting.of.entry(client).or_default() += 1;
        Ok(Self { waiting: &shared.waiting, client })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut waiting = lock(self.waiting);
        waiting.all -= 1;
        if let Entry::Occupied(mut own) = waiting.of.entry(self.client) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ensign_raft::env::{SeededRng, SystemClock};

    const CHEAP: HashParams = HashParams { memory_kib: 64, passes: 1, lanes: 1 };

    fn pool() -> HashPool {
        HashPool::new(CHEAP, Arc::new(SystemClock))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_mins(1)
    }

    #[tokio::test]
    async fn a_hash_fits_its_secret_and_no_other() {
        let rng = SeededRng::new(1);
        let (right, wrong) = (ClientSecret::generate(&rng), ClientSecret::generate(&rng));
        let hash = pool().hash(&right, &rng).await.unwrap();
        let text = std::str::from_utf8(hash.expose()).unwrap();
        assert!(text.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{text}");
        assert!(pool().verify([1; 32], hash.clone(), right, soon()).await.unwrap());
        assert!(!pool().verify([1; 32], hash, wrong, soon()).await.unwrap());
    }

    #[tokio::test]
    async fn a_hash_that_cannot_be_read_fits_nothing() {
        let secret = ClientSecret::generate(&SeededRng::new(1));
        assert_eq!(pool().verify([1; 32], Secret::new(b"$argon2id$".to_vec()), secret, soon()).await, Ok(false));
    }

    #[tokio::test]
    async fn the_queue_is_bounded() {
        let pool = pool();
        let cores = pool.shared.cores.available_permits() as u32;
        let cores = Arc::clone(&pool.shared.cores).acquire_many_owned(cores).await.unwrap();
        let secret = || ClientSecret::generate(&SeededRng::new(1));
        let hash = pool.clone();
        let login = |client: u8| Box::pin(hash.verify([client; 32], Secret::new(Vec::new()), secret(), soon()));
        let mut flood: Vec<_> = (0..QUEUE_MAX).map(|_| login(1)).collect();
        let mut waiting = 0;
        for login in &mut flood {
            waiting += usize::from(futures::poll!(login).is_pending());
        }
        // One client has half of the places, and another one gets in.
        assert_eq!((waiting, pool.has_room()), (QUEUE_MAX / 2, true));
        let mut other = login(2);
        assert!(futures::poll!(&mut other).is_pending());
        assert_eq!(login(1).await, Err(Busy));
        let mut many: Vec<_> = (3..3 + QUEUE_MAX as u8).map(login).collect();
        for login in &mut many {
            let _ = futures::poll!(login);
        }
        assert!(!pool.has_room());
        assert_eq!(login(99).await, Err(Busy));
        drop((flood, other, many));
        drop(cores);
        assert!(pool.has_room() && lock(&pool.shared.waiting).of.is_empty());
        assert_eq!(login(1).await, Ok(false));
    }

    #[tokio::test]
    async fn the_usual_cost_is_what_owasp_asks_for() {
        let rng = SeededRng::new(1);
        let pool = HashPool::new(HashParams::default(), Arc::new(SystemClock));
        let hash = pool.hash(&ClientSecret::generate(&rng), &rng).await.unwrap();
        assert!(hash.expose().starts_with(b"$argon2id$v=19$m=19456,t=2,p=1$"));
    }
}
