//! The one place where data keys and the vault master key lie: page-aligned, locked into memory, 64 bytes a slot.
//!
//! Keys are written where they stay and borrowed from there, never moved by value. A freed slot is overwritten first.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use thiserror::Error;
use tracing::warn;
use zeroize::Zeroize as _;

const SLOTS_PER_PAGE: usize = 64;
const PAGES_PER_CHUNK: usize = 16;

/// A key and whether it is one. With its lock it fills a slot, so that no two keys share a cache line.
#[derive(Default)]
struct Cell {
    key: [u8; 32],
    live: bool,
}

#[repr(C, align(64))]
#[derive(Default)]
struct Slot(RwLock<Cell>);

#[repr(C, align(4096))]
struct Page([Slot; SLOTS_PER_PAGE]);

struct Chunk {
    // Before the pages, so that it is dropped, and the memory unlocked, while they are still there.
    _lock: Option<region::LockGuard>,
    pages: Box<[Page]>,
}

impl Chunk {
    fn slot(&self, index: usize) -> &Slot {
        &self.pages[index / SLOTS_PER_PAGE].0[index % SLOTS_PER_PAGE]
    }
}

struct Inner {
    free: Mutex<Free>,
    unlocked: AtomicBool,
    slots_max: usize,
}

#[derive(Default)]
struct Free {
    slots: Vec<(Arc<Chunk>, usize)>,
    made: usize,
}

/// Hands out slots, up to a limit.
#[derive(Clone)]
pub(crate) struct Arena(Arc<Inner>);

/// The arena is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("no room for another key")]
pub(crate) struct ArenaFull;

impl Arena {
    /// An arena of at most `slots_max` keys; memory is taken page by page as they come.
    pub(crate) fn new(slots_max: usize) -> Self {
        Self(Arc::new(Inner { free: Mutex::default(), unlocked: AtomicBool::new(false), slots_max }))
    }

    /// A slot without a key in it.
    pub(crate) fn take(&self) -> Result<KeySlot, ArenaFull> {
        let mut free = self.0.free();
        if free.slots.is_empty() {
            if free.made >= self.0.slots_max {
                return Err(ArenaFull);
            }
            let chunk = Arc::new(self.0.make_chunk());
            let slots = SLOTS_PER_PAGE * PAGES_PER_CHUNK;
            free.made += slots;
            free.slots.extend((0..slots).rev().map(|index| (Arc::clone(&chunk), index)));
        }
        let (chunk, index) = free.slots.pop().ok_or(ArenaFull)?;
        Ok(KeySlot { chunk, index, arena: Arc::clone(&self.0) })
    }

    /// Whether every page so far is locked into memory.
    #[cfg(test)]
    pub(crate) fn is_locked(&self) -> bool {
        !self.0.unlocked.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Arena")
    }
}

impl Inner {
    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_chunk(&self) -> Chunk {
        let pages: Box<[Page]> = (0..PAGES_PER_CHUNK).map(|_| Page(std::array::from_fn(|_| Slot::default()))).collect();
        let lock = match region::lock(pages.as_ptr(), size_of_val(&*pages)) {
            Ok(lock) => Some(lock),
            Err(error) => {
                if !self.unlocked.swap(true, Ordering::Relaxed) {
                    warn!(%error, "keys may be swapped to disk: raise the limit of locked memory (LimitMEMLOCK= of the service, or ulimit -l), or turn swap off");
                }
                None
            }
        };
        Chunk { _lock: lock, pages }
    }
}

/// Room for one key. Dropping it overwrites the key.
pub(crate) struct KeySlot {
    chunk: Arc<Chunk>,
    index: usize,
    arena: Arc<Inner>,
}

impl KeySlot {
    /// Lets `fill` write a key into the slot; what it wrote before an error is overwritten.
    pub(crate) fn fill<E>(&self, fill: impl FnOnce(&mut [u8; 32]) -> Result<(), E>) -> Result<(), E> {
        let mut cell = self.chunk.slot(self.index).0.write().unwrap_or_else(PoisonError::into_inner);
        let filled = fill(&mut cell.key);
        cell.live = filled.is_ok();
        if filled.is_err() {
            cell.key.zeroize();
        }
        filled
    }

    /// Lends the key; `None` once it was wiped. A wipe waits for the loan to end.
    pub(crate) fn with<T>(&self, borrow: impl FnOnce(&[u8; 32]) -> T) -> Option<T> {
        let cell = self.chunk.slot(self.index).0.read().unwrap_or_else(PoisonError::into_inner);
        cell.live.then(|| borrow(&cell.key))
    }

    /// Overwrites the key, now.
    pub(crate) fn wipe(&self) {
        let mut cell = self.chunk.slot(self.index).0.write().unwrap_or_else(PoisonError::into_inner);
        cell.key.zeroize();
        cell.live = false;
    }
}

impl Drop for KeySlot {
    fn drop(&mut self) {
        self.wipe();
        self.arena.free().slots.push((Arc::clone(&self.chunk), self.index));
    }
}

impl fmt::Debug for KeySlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeySlot")
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn put(slot: &KeySlot, key: [u8; 32]) {
        let filled = slot.fill::<Infallible>(|out| {
            out.copy_from_slice(&key);
            Ok(())
        });
        assert_eq!(filled, Ok(()));
    }

    #[test]
    fn a_slot_is_one_cache_line_and_a_page_is_a_page() {
        assert_eq!(size_of::<Slot>(), 64);
        assert_eq!(size_of::<Page>(), 4096);
        let arena = Arena::new(1);
        let slot = arena.take().unwrap();
        assert_eq!(slot.chunk.pages.as_ptr() as usize % 4096, 0);
        assert!(arena.is_locked(), "the machine that runs the tests can lock 64 KiB");
    }

    #[test]
    fn a_wiped_key_is_not_lent() {
        let slot = Arena::new(1).take().unwrap();
        assert!(slot.with(|_| ()).is_none());
        put(&slot, [7; 32]);
        assert_eq!(slot.with(|key| *key), Some([7; 32]));
        slot.wipe();
        assert!(slot.with(|_| ()).is_none());
        assert_eq!(slot.chunk.slot(slot.index).0.read().unwrap().key, [0; 32]);
    }

    #[test]
    fn a_freed_slot_is_overwritten_before_it_is_used_again() {
        let arena = Arena::new(1);
        let slot = arena.take().unwrap();
        put(&slot, [7; 32]);
        let (chunk, index) = (Arc::clone(&slot.chunk), slot.index);
        drop(slot);
        assert_eq!(chunk.slot(index).0.read().unwrap().key, [0; 32]);
        let again = arena.take().unwrap();
        assert!(again.with(|_| ()).is_none());
    }

    #[test]
    fn a_fill_that_fails_leaves_zeros() {
        let slot = Arena::new(1).take().unwrap();
        let refused = slot.fill(|out| {
            out.fill(9);
            Err("no")
        });
        assert_eq!(refused, Err("no"));
        assert!(slot.with(|_| ()).is_none());
        assert_eq!(slot.chunk.slot(slot.index).0.read().unwrap().key, [0; 32]);
    }

    #[test]
    fn a_full_arena_says_so() {
        let arena = Arena::new(1);
        let slots: Vec<_> = std::iter::from_fn(|| arena.take().ok()).collect();
        assert_eq!(slots.len(), SLOTS_PER_PAGE * PAGES_PER_CHUNK);
        drop(slots);
        assert!(arena.take().is_ok());
    }
}
