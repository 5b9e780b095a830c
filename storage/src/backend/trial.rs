//! What opening a log would change, kept back until it is known that the log is sound.
//!
//! redb repairs its file while it opens it, before anybody can know what is damaged, and writes to it even when it gives up.
//! A file that is refused must stay as it was found: it is evidence, and perhaps the only copy. So until the log is accepted,
//! writes are kept here, reads see them, and syncs are noted; then all of it is done, in the order in which redb did it, so
//! that a crash in between is one that redb is made for.

use std::io;
use std::ops::Range;

use crate::disk::DiskFile;

#[derive(Debug)]
enum Step {
    Write { at: u64, data: Vec<u8> },
    Extend(u64),
    Sync,
}

/// The changes so far, in order.
#[derive(Debug)]
pub(super) struct Trial {
    /// The length of the file itself.
    len: u64,
    steps: Vec<Step>,
}

impl Trial {
    pub(super) fn new(len: u64) -> Self {
        Self { len, steps: Vec::new() }
    }

    pub(super) fn write(&mut self, at: u64, data: &[u8]) {
        self.steps.push(Step::Write { at, data: data.to_vec() });
    }

    /// The file shall be this long; new bytes are zeros.
    pub(super) fn extend(&mut self, len: u64) {
        self.steps.push(Step::Extend(len));
    }

    pub(super) fn sync(&mut self) {
        self.steps.push(Step::Sync);
    }

    /// Reads what `file` would hold if everything was done. Nothing is past its end: the caller knows the length.
    pub(super) fn read(&self, file: &dyn DiskFile, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let there = self.len.saturating_sub(offset).min(out.len() as u64) as usize;
        file.read_at(offset, &mut out[..there])?;
        out[there..].fill(0);
        let wanted = offset..offset + out.len() as u64;
        for step in &self.steps {
            let Step::Write { at, data } = step else { continue };
            let Some(both) = overlap(&wanted, &(*at..at + data.len() as u64)) else { continue };
            let (to, from) = (inside(&both, offset), inside(&both, *at));
            out[to].copy_from_slice(&data[from]);
        }
        Ok(())
    }

    /// Does everything; `extend` makes the file longer.
    pub(super) fn accept(self, file: &dyn DiskFile, extend: impl Fn(u64) -> io::Result<()>) -> io::Result<()> {
        for step in self.steps {
            match step {
                Step::Write { at, data } => file.write_at(at, &data)?,
                Step::Extend(len) => extend(len)?,
                Step::Sync => file.sync_data()?,
            }
        }
        Ok(())
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (both.start < both.end).then_some(both)
}

fn inside(range: &Range<u64>, base: u64) -> Range<usize> {
    (range.start - base) as usize..(range.end - base) as usize
}
