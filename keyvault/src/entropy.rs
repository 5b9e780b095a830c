//! Where salts and keys come from: the kernel, one call each time.
//!
//! Never a generator in user space: after a memory image is cloned, only the kernel's reseeds itself (`docs/format.md`).

use std::fmt;

use hpke::rand_core::{Infallible, TryCryptoRng, TryRng};

/// The source of salts and keys.
#[derive(Clone, Default)]
pub struct Entropy(Source);

#[derive(Clone, Default)]
enum Source {
    #[default]
    Kernel,
    #[cfg(feature = "simulation")]
    Seeded(std::sync::Arc<ensign_raft::env::SeededRng>),
}

impl Entropy {
    /// The kernel's generator: the only source that a release build has.
    pub fn kernel() -> Self {
        Self(Source::Kernel)
    }

    /// A source that replays from its seed. Whatever is sealed with it is sealed for show.
    #[cfg(feature = "simulation")]
    pub fn seeded(seed: u64) -> Self {
        Self(Source::Seeded(std::sync::Arc::new(ensign_raft::env::SeededRng::new(seed))))
    }

    /// Overwrites all of `bytes`.
    pub(crate) fn fill(&self, bytes: &mut [u8]) {
        match &self.0 {
            // A process that cannot have randomness must not go on: it would seal under a salt it used before.
            Source::Kernel => assert!(getrandom::fill(bytes).is_ok(), "the kernel gives no random bytes"),
            #[cfg(feature = "simulation")]
            Source::Seeded(rng) => ensign_raft::env::Rng::fill(&**rng, bytes),
        }
    }

    /// Fresh bytes that are no secret: salts and ids.
    pub(crate) fn array<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Source::Kernel => "Entropy(kernel)",
            #[cfg(feature = "simulation")]
            Source::Seeded(_) => "Entropy(seeded)",
        })
    }
}

/// The same source, in the shape that `hpke` asks for.
pub(crate) struct HpkeRng<'a>(pub(crate) &'a Entropy);

impl TryRng for HpkeRng<'_> {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(u32::from_le_bytes(self.0.array()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(u64::from_le_bytes(self.0.array()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.0.fill(bytes);
        Ok(())
    }
}

impl TryCryptoRng for HpkeRng<'_> {}
