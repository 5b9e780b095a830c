//! Room on the disk: written out ahead, so that a full disk is noticed before redb would fail on it.
//!
//! ```text
//! | used | free pages | written ahead |
//!                     ^ logical       ^ physical      redb goes on to `grown(logical)`, about twice as much, at once
//! ```
//!
//! Zeros cost more than data: their pages are fresh ones. So they are written as late as can be: all that redb may need for
//! what may be queued now, and the rest bit by bit, so that it is there when redb asks for it. And while much is queued the room is only reserved, where the file system can.

use std::sync::atomic::Ordering;

use tracing::{info, warn};

use crate::backend::{Fill, grown, is_full};
use crate::frame::RESERVE;
use crate::frame::queue::full;
use crate::frame::writer::Writer;
use crate::log::LogError;
use crate::metrics;

/// With more than this in the queue, room is only reserved: what waits for the disk needs the time that zeros would take, and a sync
/// of so much hides what the file system does besides.
const BUSY: u64 = 256 << 10;
/// What redb needs for itself in an empty file.
const OVERHEAD: u64 = 512 << 10;
/// Bytes of zeros for each byte that is committed, once it is time for them.
const PACE: u64 = 3;
/// Zeros are written in multiples of this.
const STEP: u64 = 1 << 20;

/// How long the file should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lengths {
    /// What redb will have asked for when everything that may be queued has come.
    needed: u64,
    /// What it is time for besides, on the way to what redb asks for after that.
    paced: u64,
}

fn lengths(logical: u64, used: u64, headroom: u64) -> Lengths {
    let mut needed = logical;
    while needed < used + headroom {
        needed = grown(needed);
    }
    let next = grown(needed);
    let late = next.saturating_sub(PACE * (needed - used - headroom));
    Lengths { needed, paced: late.next_multiple_of(STEP).clamp(needed, next) }
}

impl Writer {
    /// Sees to it that redb finds room for everything that may be queued, or else stops taking more.
    pub(super) fn make_room(&mut self) -> Result<(), LogError> {
        let space = self.shared.store.space();
        let used = self.census.stored() + self.snapshot_bytes + 2 * self.index_len + OVERHEAD;
        let used = used + used / 32;
        let lengths = lengths(space.logical(), used, self.config.headroom());
        let mut room = None;
        let missing = if space.physical() < lengths.needed { lengths.needed } else { lengths.paced };
        if space.physical() < missing {
            let how = if self.shared.queue.bytes() < BUSY { Fill::Zeros } else { Fill::Reserved };
            match space.extend(missing, how) {
                Ok(()) => {}
                Err(error) if is_full(&error) && space.physical() >= lengths.needed => {}
                Err(error) if is_full(&error) => room = Some(self.room_left(used)),
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

    /// What may still be queued when the file cannot grow: redb takes no more of it than it can ask for.
    fn room_left(&self, used: u64) -> u64 {
        let space = self.shared.store.space();
        let mut usable = space.logical();
        while grown(usable) <= space.physical() {
            usable = grown(usable);
        }
        usable.saturating_sub(used + RESERVE)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::PAGE;

    const MB: u64 = 1 << 20;

    #[test]
    fn nothing_is_written_ahead_while_redb_has_more_than_half_of_its_file_left() {
        let logical = 1024 * MB + PAGE;
        assert_eq!(lengths(logical, 600 * MB, 35 * MB), Lengths { needed: logical, paced: logical });
        // From here on three bytes for each one: 189 MiB are left.
        let paced = (2048 - 3 * 189) * MB;
        assert_eq!(lengths(logical, 800 * MB, 35 * MB), Lengths { needed: logical, paced });
    }

    proptest! {
        #[test]
        fn what_redb_asks_for_next_is_there_when_it_does(
            start in 1_u64..6000, headroom in 1_u64..80, commits in prop::collection::vec(1_u64..4000, 1..400),
        ) {
            let (mut logical, mut physical) = (start * MB + PAGE, start * MB + PAGE);
            let headroom = headroom * MB;
            let mut used = 0;
            for commit in commits {
                // What may be queued is what the headroom is for.
                let bytes = (commit * 1024).min(headroom);
                let wanted = lengths(logical, used, headroom);
                // A commit waits for no more zeros than this, but for the first ones and where redb takes whole regions.
                let written = wanted.paced.saturating_sub(physical);
                physical = physical.max(wanted.paced);
                used += bytes;
                while logical < used {
                    logical = grown(logical);
                    prop_assert!(logical <= physical, "redb asks for {logical}, and {physical} are there");
                }
                prop_assert!(written <= PACE * 4000 * 1024 + STEP || used < 4 * headroom || logical > 4 << 30);
            }
        }
    }
}
