//! Randomness for jitter and ids. Salts of sealed batches never come from here (`keyvault` asks the kernel).

use std::fmt;
use std::sync::Mutex;

use rand::Rng as _;
use rand::SeedableRng as _;
use rand_chacha::ChaCha12Rng;

/// Fills buffers with random bytes.
pub trait Rng: Send + Sync + 'static {
    /// Overwrites all of `bytes`.
    fn fill(&self, bytes: &mut [u8]);

    /// A uniform number.
    fn next_u64(&self) -> u64 {
        let mut bytes = [0; 8];
        self.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// The kernel's generator.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsRng;

impl Rng for OsRng {
    fn fill(&self, bytes: &mut [u8]) {
        // The kernel's generator cannot fail once it is seeded; a process that cannot have randomness must not go on.
        assert!(getrandom::fill(bytes).is_ok(), "the kernel gives no random bytes");
    }
}

/// A generator that replays from its seed. For simulations and tests.
pub struct SeededRng(Mutex<ChaCha12Rng>);

impl SeededRng {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(Mutex::new(ChaCha12Rng::seed_from_u64(seed)))
    }
}

impl fmt::Debug for SeededRng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeededRng")
    }
}

impl Rng for SeededRng {
    fn fill(&self, bytes: &mut [u8]) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).fill_bytes(bytes);
    }
}
