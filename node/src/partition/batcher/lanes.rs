//! Chunks that wait for a batch of their ring's.
//!
//! A batch is sealed under one data key, so under one ring. Chunks of publishers with a ring of their own wait in a lane of theirs, those of all
//! others in the topic's. Lanes take turns, batch by batch. A lane whose key is still to come keeps nobody waiting but its own.
//!
//! Invariants: chunks of one lane are taken in the order in which they came. The topic's lane is sealed under the ring that the topic is bound
//! to when its batch is begun, and not when its chunks arrived.

use std::collections::{HashMap, VecDeque};

use ensign_proto::{DekId, RingId};

use super::Job;

/// Under whose ring a lane's chunks are sealed: a publisher's own, or (`None`) the topic's.
pub(super) type Whose = Option<RingId>;

#[derive(Default)]
struct Lane {
    jobs: VecDeque<Job>,
    key: LaneKey,
    in_line: bool,
}

#[derive(Default)]
enum LaneKey {
    /// Nobody has asked for it.
    #[default]
    None,
    Asked,
    Held {
        ring: RingId,
        dek: DekId,
    },
}

/// The lanes of one stretch.
#[derive(Default)]
pub(super) struct Lanes {
    lanes: HashMap<Whose, Lane>,
    /// Those with chunks and a key, in the order of their turns; without the current one.
    line: VecDeque<Whose>,
    /// Whose chunks go into the batch that is pending.
    current: Option<Whose>,
    /// Those that need a key.
    wanting: Vec<Whose>,
}

impl Lanes {
    pub(super) fn push(&mut self, job: Job) {
        let whose = job.chunk.ring;
        let lane = self.lanes.entry(whose).or_default();
        lane.jobs.push_back(job);
        match lane.key {
            LaneKey::None => {
                lane.key = LaneKey::Asked;
                self.wanting.push(whose);
            }
            LaneKey::Asked => {}
            LaneKey::Held { .. } => self.line_up(whose),
        }
    }

    /// Begins the next lane's turn, and with it a batch under this key; `topic` is the ring that the topic is bound to now. None: no lane has
    /// both chunks and a key.
    pub(super) fn turn(&mut self, topic: RingId) -> Option<DekId> {
        if let Some(whose) = self.current.take() {
            self.line_up(whose);
        }
        while let Some(whose) = self.line.pop_front() {
            let Some(lane) = self.lanes.get_mut(&whose) else { continue };
            lane.in_line = false;
            let LaneKey::Held { ring, dek } = lane.key else { continue };
            if ring == whose.unwrap_or(topic) {
                self.current = Some(whose);
                return Some(dek);
            }
            // The topic was bound to another ring.
            lane.key = LaneKey::Asked;
            self.wanting.push(whose);
        }
        None
    }

    /// The next chunk of the lane whose turn it is.
    pub(super) fn pop(&mut self) -> Option<Job> {
        self.lanes.get_mut(&self.current?)?.jobs.pop_front()
    }

    /// Whether another lane could begin a batch of its own.
    pub(super) fn another_waits(&self) -> bool {
        !self.line.is_empty()
    }

    /// Lanes that need a key since the last call.
    pub(super) fn take_wanting(&mut self) -> Vec<Whose> {
        std::mem::take(&mut self.wanting)
    }

    /// The lane has a key of this ring from here on.
    pub(super) fn hold(&mut self, whose: Whose, ring: RingId, dek: DekId) {
        if let Some(lane) = self.lanes.get_mut(&whose) {
            lane.key = LaneKey::Held { ring, dek };
            self.line_up(whose);
        }
    }

    /// There is no key for the lane: what waits in it. The next chunk has the key be asked for anew.
    pub(super) fn give_up(&mut self, whose: Whose) -> VecDeque<Job> {
        self.lanes.remove(&whose).map(|lane| lane.jobs).unwrap_or_default()
    }

    /// Everything that waits, in the order of each lane.
    pub(super) fn into_jobs(self) -> impl Iterator<Item = Job> {
        self.lanes.into_values().flat_map(|lane| lane.jobs)
    }

    fn line_up(&mut self, whose: Whose) {
        if self.current == Some(whose) {
            return;
        }
        if let Some(lane) = self.lanes.get_mut(&whose).filter(|lane| !lane.in_line && !lane.jobs.is_empty()) {
            lane.in_line = true;
            self.line.push_back(whose);
        }
    }
}
