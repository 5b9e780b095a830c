//! Room on the disk: written out ahead, so that a full disk is noticed before redb would fail on it.

use std::sync::atomic::Ordering;

use tracing::{info, warn};

use crate::backend::is_full;
use crate::frame::RESERVE;
use crate::frame::queue::full;
use crate::frame::writer::Writer;
use crate::log::LogError;
use crate::metrics;

/// What redb needs for itself in an empty file.
const OVERHEAD: u64 = 512 << 10;

impl Writer {
    /// Sees to it that redb finds room for everything that may be queued, or else stops taking more.
    pub(super) fn make_room(&mut self) -> Result<(), LogError> {
        let space = &self.shared.store.space;
        let used = self.census.stored() + self.snapshot_bytes + 2 * self.index_len + OVERHEAD;
        let used = used + used / 32;
        let headroom = self.config.headroom();
        let free = space.logical().saturating_sub(used);
        let want = space.next_logical().max(2 * (used + headroom));
        let mut room = None;
        if free < (2 * headroom).max(space.physical() / 4) && space.physical() < want {
            // A little with each commit, so that none of them waits long, unless it is needed now.
            let to = if free < headroom { want } else { want.min(space.physical() + 8 * self.config.commit.0) };
            match space.extend(to) {
                Ok(()) => {}
                Err(error) if is_full(&error) && free >= headroom => {}
                Err(error) if is_full(&error) => room = Some(space.physical().saturating_sub(used + RESERVE)),
                Err(error) => return Err(self.fence(format!("the file cannot be written ahead: {error}"), Vec::new())),
            }
        }
        if room.is_some() != self.full {
            self.full = room.is_some();
            metrics::set_full(self.full);
            if self.full {
                warn!(path = %self.shared.store.path.display(), "the disk is full: appends are refused until there is room");
            } else {
                info!(path = %self.shared.store.path.display(), "there is room again: appends are taken");
            }
        }
        self.shared.queue.set_room(room);
        Ok(())
    }

    /// redb was refused growth. Nothing of the batch counts: its header was not written, so the last commit stands.
    pub(super) fn recover_from_full(&mut self) -> LogError {
        self.full = true;
        self.shared.queue.set_room(Some(0));
        let reopened = self.shared.store.reopen();
        self.shared.counters.reopened.fetch_add(1, Ordering::Relaxed);
        let extent = reopened.and_then(|()| self.shared.store.extent());
        match extent {
            Ok(extent) if extent.map_or(1, |(_, last, _)| last + 1) == self.next => full(),
            Ok(extent) => self.fence(format!("after a refused growth the log ends elsewhere: {extent:?}"), Vec::new()),
            Err(failure) => self.fence(format!("after a refused growth: {failure:?}"), Vec::new()),
        }
    }
}
