//! Writing the file anew, so that nothing is left of what was removed from it. redb reuses pages, and a page that is free keeps its bytes.
//!
//! ```text
//! log.redb ─ copy what is needed ─> log.redb.new, synced and read back
//! log.redb ─ rename ─> log.redb.old      log.redb.new ─ rename ─> log.redb      log.redb.old ─ zeros over it, synced, removed
//! ```
//!
//! A start that finds no `log.redb` but the other two completes the renames: the new file was whole before the first of them. A start
//! that finds one of the others beside `log.redb` overwrites and removes it. So `log.redb` is always the one that counts, for older
//! builds too.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ensign_proto::GroupId;
use tracing::warn;

use crate::backend::{Space, is_full};
use crate::disk::Disk;
use crate::frame::LOG_FILE;
use crate::frame::codec::{FrameBuilder, Kind, MAX_ORDER, pieces};
use crate::frame::group::Group;
use crate::frame::queue::full;
use crate::frame::recover::{Recovered, recover};
use crate::frame::state::{Durable, Place};
use crate::frame::store::{Commit, ReadFailure, Store, WriteFailure};
use crate::frame::writer::Writer;
use crate::log::LogError;

/// A rewrite that is not complete.
pub(crate) const NEW_FILE: &str = "log.redb.new";
/// What a rewrite replaced.
pub(crate) const OLD_FILE: &str = "log.redb.old";

/// Completes what a crash cut short between the two renames. False: the log is not there, and what it replaced is.
pub(super) fn complete(disk: &dyn Disk, dir: &Path) -> io::Result<bool> {
    let (log, new, old) = (dir.join(LOG_FILE), dir.join(NEW_FILE), dir.join(OLD_FILE));
    if disk.exists(&log)? || !disk.exists(&old)? {
        return Ok(true);
    }
    if !disk.exists(&new)? {
        return Ok(false);
    }
    disk.rename(&new, &log)?;
    Ok(true)
}

/// Overwrites and removes what a rewrite has left.
pub(super) fn clean(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    for name in [NEW_FILE, OLD_FILE] {
        let path = dir.join(name);
        if disk.exists(&path)? {
            scrub(disk, &path)?;
        }
    }
    Ok(())
}

/// Once is enough for a disk that writes in place; for one that does not, no number is.
fn scrub(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    let file = disk.open(path)?;
    file.write_zeros(0, file.len()?)?;
    file.sync_data()?;
    drop(file);
    disk.remove(path)
}

/// Why the file was not written anew: nothing has changed.
enum Unwritten {
    Full,
    Because(String),
}

impl From<io::Error> for Unwritten {
    fn from(error: io::Error) -> Self {
        if is_full(&error) { Self::Full } else { Self::Because(error.to_string()) }
    }
}

impl From<ReadFailure> for Unwritten {
    fn from(failure: ReadFailure) -> Self {
        Self::Because(match failure {
            ReadFailure::Damaged(what) => format!("the log is damaged ({what})"),
            ReadFailure::Failed(cause) => cause,
            ReadFailure::Closed => "it was closed".to_owned(),
        })
    }
}

impl Writer {
    /// Writes the file anew and marks it. Everything that was queued before is durable; nothing of it waits.
    pub(super) fn rewrite(&mut self, mark: u64) -> Result<(), LogError> {
        let dir = self.shared.store.path.parent().map(Path::to_path_buf).unwrap_or_default();
        let disk = Arc::clone(self.shared.store.space().disk());
        let groups = self.shared.all_groups();
        let mut recovered = match self.write_new(&disk, &dir, &groups, mark) {
            Ok(recovered) => recovered,
            Err(why) => {
                // What holds a copy must not stay; where that fails, the next attempt or the next start does it.
                if let Err(error) = clean(&*disk, &dir) {
                    warn!(dir = %dir.display(), %error, "what there is of a new log file could not be removed");
                }
                return Err(match why {
                    Unwritten::Full => full(),
                    Unwritten::Because(why) => {
                        LogError::Refused { what: format!("the file was not written anew: {why}").into() }
                    }
                });
            }
        };
        // From here on a failure leaves it open which file counts: only a start finds out.
        let (log, new, old) = (dir.join(LOG_FILE), dir.join(NEW_FILE), dir.join(OLD_FILE));
        let before = self.shared.store.space();
        let swap = || -> Result<Space, String> {
            let renamed = disk.rename(&log, &old).and_then(|()| disk.rename(&new, &log));
            let opened = renamed.and_then(|()| Space::open(Arc::clone(&disk), &log, 0));
            Ok(opened.map_err(|error| error.to_string())?.counted_with(&before))
        };
        let moved = || {
            for group in &groups {
                group.lock().disk = recovered.groups.remove(&group.id).unwrap_or_default();
            }
        };
        let replaced = self.shared.store.replace(swap, moved);
        let replaced = replaced.and_then(|()| scrub(&*disk, &old).map_err(|error| error.to_string()));
        if let Err(cause) = replaced {
            return Err(
                self.fence(format!("the file was written anew and could not take its place: {cause}"), Vec::new())
            );
        }
        self.census = recovered.census;
        (self.next, self.covered) = (recovered.next, recovered.covered);
        self.next_blob = self.next_blob.max(recovered.next_blob);
        (self.index_len, self.since_index) = (recovered.index_len, recovered.scanned);
        self.orphans = recovered.orphans;
        self.cannot_move = false;
        self.shared.mark.store(mark, Ordering::Release);
        Ok(())
    }

    /// Writes the new file and reads it back: what a start would find in it.
    fn write_new(
        &self,
        disk: &Arc<dyn Disk>,
        dir: &Path,
        groups: &[Arc<Group>],
        mark: u64,
    ) -> Result<Recovered, Unwritten> {
        clean(&**disk, dir)?;
        let path = dir.join(NEW_FILE);
        let space = Space::open(Arc::clone(disk), &path, self.config.prefill.0)?;
        let store = Store::open(space, &path, self.shared.store.cache())?;
        let mut copy =
            Copy { from: &self.shared.store, to: &store, frame: FrameBuilder::default(), blobs: Vec::new(), next: 1 };
        for group in groups {
            let disk = group.lock().disk.clone();
            if disk.exists {
                copy.group(group.id, &disk, self.config.commit.0 as usize)?;
            }
        }
        copy.flush()?;
        store.set_mark(mark).map_err(Unwritten::Because)?;
        let found = recover(&store).map_err(|error| Unwritten::Because(error.to_string()))?;
        for group in groups {
            let (had, has) = (group.lock().disk.clone(), found.groups.get(&group.id).cloned().unwrap_or_default());
            if !same(&had, &has) {
                return Err(Unwritten::Because(format!("the new file holds something else of group {}", group.id)));
            }
        }
        if store.mark()? != mark {
            return Err(Unwritten::Because("the new file does not hold its mark".to_owned()));
        }
        store.close().map_err(Unwritten::Because)?;
        Ok(found)
    }
}

/// Whether two files hold the same of a group, wherever in them.
fn same(one: &Durable, other: &Durable) -> bool {
    let first = |it: &Durable| if it.places.is_empty() { 0 } else { it.first };
    let entry = |place: &Place| (place.term, place.len);
    (one.exists, &one.vote, &one.committed, one.purged) == (other.exists, &other.vote, &other.committed, other.purged)
        && (one.snapshot, first(one)) == (other.snapshot, first(other))
        && one.checkpoint.map(|place| place.len) == other.checkpoint.map(|place| place.len)
        && one.places.iter().map(entry).eq(other.places.iter().map(entry))
}

/// Puts what groups hold into another file, a commit's worth at a time.
struct Copy<'a> {
    from: &'a Store,
    to: &'a Store,
    frame: FrameBuilder,
    blobs: Vec<(u64, bytes::Bytes)>,
    next: u64,
}

impl Copy<'_> {
    fn group(&mut self, id: GroupId, disk: &Durable, limit: usize) -> Result<(), Unwritten> {
        if let Some(vote) = &disk.vote {
            self.frame.record(Kind::Vote, id, (0, 0), Some(vote));
        }
        if let Some(purged) = disk.purged {
            self.frame.record(Kind::Purge, id, (purged.term.0, purged.index.0), None);
        }
        for (index, place) in (disk.first..).zip(&disk.places) {
            for entry in self.from.entries(id, &[(index, *place)])? {
                self.frame.entry(Kind::Append, id, &entry);
            }
            if self.frame.len() >= limit {
                self.flush()?;
            }
        }
        // Also where there is none: it makes the group known.
        self.frame.record(Kind::Committed, id, (0, 0), disk.committed.as_ref());
        if let Some(blob) = disk.snapshot {
            self.blobs.push((blob.id, self.from.blob(blob)?));
            self.frame.record(Kind::Snapshot, id, (blob.len, blob.id), None);
        }
        if let Some(place) = disk.checkpoint {
            self.frame.record(Kind::Checkpoint, id, (0, 0), Some(&self.from.checkpoint(id, place)?));
        }
        if self.frame.len() >= limit { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Unwritten> {
        self.frame.finish();
        if self.frame.records() == 0 {
            return Ok(());
        }
        let chunks = pieces(self.frame.len(), MAX_ORDER).count() as u64;
        let commit = Commit {
            first: self.next,
            frame: &mut self.frame,
            max_order: MAX_ORDER,
            log_start: 1,
            purge: false,
            blobs: std::mem::take(&mut self.blobs),
            dropped_blobs: Vec::new(),
            durable: true,
        };
        self.to.commit(commit).map_err(|failure| match failure {
            WriteFailure::Full => Unwritten::Full,
            WriteFailure::Failed(cause) => Unwritten::Because(cause),
        })?;
        self.next += chunks;
        self.frame.clear();
        Ok(())
    }
}
