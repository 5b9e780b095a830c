//! What one commit will hold: what was queued, the marks that ride along, and old entries that move forward.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::GroupId;
use tracing::error;

use crate::frame::codec::{FrameBuilder, Kind};
use crate::frame::group::Group;
use crate::frame::queue::{Lazy, Mark, Op, Work};
use crate::frame::recover::each;
use crate::frame::state::{Blob, Change};
use crate::frame::store::ReadFailure;
use crate::frame::writer::Writer;

/// Bytes of live entries that one commit moves forward at most, and frames that it looks through for them.
const MOVE_BYTES: usize = 256 << 10;
const MOVE_FRAMES: usize = 16;

/// What one commit will have changed once it is durable, in the order of its records.
pub(super) enum Planned {
    Op(usize),
    Moved(Arc<Group>, u64, u64),
    MovedCheckpoint(Arc<Group>),
    Committed(Arc<Group>, Option<Bytes>),
    Checkpoint(Arc<Group>, Bytes),
}

#[derive(Default)]
pub(super) struct Plan {
    pub(super) steps: Vec<Planned>,
    pub(super) blobs: Vec<(u64, Bytes)>,
    /// Of the snapshots, in order.
    pub(super) blob_ids: VecDeque<Blob>,
    pub(super) dropped: Vec<u64>,
    pub(super) moved: usize,
}

impl Writer {
    pub(super) fn plan_ops(&mut self, ops: &[Op], frame: &mut FrameBuilder, plan: &mut Plan) {
        // The snapshots of this batch, which replace the stored ones.
        let mut snapshots: BTreeMap<GroupId, Option<u64>> = BTreeMap::new();
        for (n, op) in ops.iter().enumerate() {
            let id = op.group.id;
            let old = |snapshots: &BTreeMap<GroupId, Option<u64>>| match snapshots.get(&id) {
                Some(blob) => *blob,
                None => op.group.lock().disk.snapshot.map(|blob| blob.id),
            };
            match &op.work {
                Work::Append(entries) => entries.iter().for_each(|entry| frame.entry(Kind::Append, id, entry)),
                Work::Vote(vote) => frame.record(Kind::Vote, id, (0, 0), Some(vote)),
                Work::Truncate(from) => frame.record(Kind::Truncate, id, (0, from.0), None),
                Work::Purge(through) => frame.record(Kind::Purge, id, (through.term.0, through.index.0), None),
                Work::Snapshot(bytes) => {
                    let blob = Blob { id: self.next_blob, len: bytes.len() as u64 };
                    self.next_blob += 1;
                    if let Some(old) = old(&snapshots) {
                        plan.blobs.retain(|(id, _)| *id != old);
                        plan.dropped.push(old);
                    }
                    snapshots.insert(id, Some(blob.id));
                    plan.blobs.push((blob.id, bytes.clone()));
                    plan.blob_ids.push_back(blob);
                    frame.record(Kind::Snapshot, id, (blob.len, blob.id), None);
                }
                Work::Remove(vote) => {
                    if let Some(old) = old(&snapshots) {
                        plan.blobs.retain(|(id, _)| *id != old);
                        plan.dropped.push(old);
                    }
                    snapshots.insert(id, None);
                    frame.record(Kind::Remove, id, (0, 0), None);
                    // In the same frame: a crash leaves both or neither.
                    if let Some(vote) = vote {
                        frame.record(Kind::Vote, id, (0, 0), Some(vote));
                    }
                }
                Work::Nothing | Work::Rewrite(_) => continue,
            }
            plan.steps.push(Planned::Op(n));
        }
    }

    /// Writes the live entries of the oldest frames again, so that a group that seldom writes does not pin the log.
    pub(super) fn plan_moves(&mut self, frame: &mut FrameBuilder, plan: &mut Plan) {
        if self.census.total.saturating_sub(self.census.live) < self.config.pinned_max.0 {
            return;
        }
        let Some(front) = self.census.frames.iter().find(|frame| frame.live > 0) else { return };
        // What is dead in front of it goes by itself, and what the index does not cover yet cannot go.
        let pinned = self.census.pinned(front.first).saturating_sub(self.since_index);
        if self.cannot_move || pinned < self.config.pinned_max.0 || pinned * 2 < self.census.total {
            return;
        }
        let mut found = Vec::new();
        let (mut bytes, mut frames) = (0, 0);
        let limit = MOVE_BYTES.min(self.config.commit.0 as usize);
        let walked = self.shared.store.walk(front.first, |head, cuts, stored| {
            each(stored, head.frame, cuts, |id, change| {
                let group = self.shared.group(id);
                let disk = &group.lock().disk;
                let (live, len) = match &change {
                    Change::Entry { index, place } | Change::Moved { index, place } => {
                        (disk.place(*index) == Some(*place), place.len)
                    }
                    Change::Checkpoint(place) => (disk.checkpoint == Some(*place), place.len),
                    _ => (false, 0),
                };
                if live {
                    bytes += len as usize;
                    found.push((id, change));
                }
                Ok(())
            })?;
            frames += 1;
            Ok(bytes < limit && frames < MOVE_FRAMES && stored.len() < 4 * limit)
        });
        let read = || -> Result<(), ReadFailure> {
            walked?;
            for (id, change) in &found {
                let group = self.shared.group(*id);
                match change {
                    Change::Entry { index, place } | Change::Moved { index, place } => {
                        for entry in self.shared.store.entries(*id, &[(*index, *place)])? {
                            frame.entry(Kind::Moved, *id, &entry);
                            plan.moved += entry.payload.len();
                        }
                        plan.steps.push(Planned::Moved(group, *index, place.term));
                    }
                    Change::Checkpoint(place) => {
                        let checkpoint = self.shared.store.checkpoint(*id, *place)?;
                        frame.record(Kind::Checkpoint, *id, (0, 0), Some(&checkpoint));
                        plan.moved += checkpoint.len();
                        plan.steps.push(Planned::MovedCheckpoint(group));
                    }
                    _ => {}
                }
            }
            Ok(())
        };
        if let Err(failure) = read() {
            error!(
                ?failure,
                "an old frame cannot be moved forward, so the log keeps growing; rebuild this node from its peers"
            );
            self.cannot_move = true;
        }
    }
}

pub(super) fn plan_marks(marks: &[Mark], frame: &mut FrameBuilder, plan: &mut Plan) {
    for Mark { lazy, group, value, .. } in marks {
        let group = Arc::clone(group);
        match (lazy, value) {
            (Lazy::Checkpoint, Some(checkpoint)) => {
                frame.record(Kind::Checkpoint, group.id, (0, 0), Some(checkpoint));
                plan.steps.push(Planned::Checkpoint(group, checkpoint.clone()));
            }
            (Lazy::Checkpoint, None) => {}
            (Lazy::Committed, committed) => {
                frame.record(Kind::Committed, group.id, (0, 0), committed.as_ref());
                plan.steps.push(Planned::Committed(group, committed.clone()));
            }
        }
    }
}
