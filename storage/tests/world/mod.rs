//! A frame log on a fault disk beside the model of what it must hold, for tests that pull the plug.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use ensign_proto::{GroupId, LogIndex, Term};
use ensign_storage::fault::{Crash, Fault, SplitMix};
use ensign_storage::memory::{GroupModel, Op};
use ensign_storage::testing::ALL;
use ensign_storage::{Entry, EntryId, FaultDisk, FrameLog, LogConfig, LogError, NodeLog, Writer};

pub(crate) const DIR: &str = "log";
const GROUPS: u64 = 4;

/// What the log answered wrongly.
#[derive(Debug)]
#[expect(dead_code, reason = "read through Debug, when a test fails")]
pub(crate) struct Violation(pub(crate) String);

pub(crate) type Outcome<T = ()> = Result<T, Violation>;

/// How a life of the log went.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    pub(crate) promised: usize,
    pub(crate) crashes: usize,
    pub(crate) lost_unpromised: usize,
    pub(crate) kept_unpromised: usize,
}

pub(crate) struct World {
    pub(crate) disk: FaultDisk,
    pub(crate) config: LogConfig,
    pub(crate) log: Option<(Arc<FrameLog>, Writer)>,
    pub(crate) tally: Tally,
    /// What the disk held when the log was opened.
    base: BTreeMap<GroupId, GroupModel>,
    /// What everything submitted since makes of it.
    live: BTreeMap<GroupId, GroupModel>,
    journal: Vec<(GroupId, Op)>,
    /// How many operations of the journal were called back, in order.
    promised: Arc<AtomicUsize>,
    out_of_order: Arc<AtomicUsize>,
}

impl World {
    pub(crate) fn new(config: LogConfig) -> Outcome<Self> {
        let mut world = Self {
            disk: FaultDisk::new(),
            config,
            log: None,
            tally: Tally::default(),
            base: BTreeMap::new(),
            live: BTreeMap::new(),
            journal: Vec::new(),
            promised: Arc::default(),
            out_of_order: Arc::default(),
        };
        world.open()?;
        Ok(world)
    }

    fn open(&mut self) -> Outcome {
        let opened = FrameLog::open(Arc::new(self.disk.clone()), Path::new(DIR), self.config);
        self.log = Some(opened.map_err(|error| Violation(format!("it does not open: {error}")))?);
        Ok(())
    }

    fn node(&self) -> &FrameLog {
        &self.log.as_ref().expect("the log is open").0
    }

    pub(crate) fn live(&self, group: GroupId) -> GroupModel {
        self.live.get(&group).cloned().unwrap_or_default()
    }

    /// Submits an operation that the model takes.
    pub(crate) fn submit(&mut self, group: GroupId, op: Op) {
        let model = self.live.entry(group).or_default();
        if model.apply(op.clone()).is_err() {
            return;
        }
        if matches!(op, Op::Remove) {
            self.live.remove(&group);
        }
        self.journal.push((group, op.clone()));
        let position = self.journal.len();
        let (promised, out_of_order) = (Arc::clone(&self.promised), Arc::clone(&self.out_of_order));
        let done = Box::new(move |outcome: Result<(), LogError>| {
            if outcome.is_ok() && promised.fetch_max(position, Ordering::SeqCst) >= position {
                out_of_order.fetch_add(1, Ordering::SeqCst);
            }
        });
        let log = self.node().group(group);
        match op {
            Op::Append(entries) => log.append(entries, done),
            Op::Vote(vote) => log.save_vote(vote, done),
            Op::Committed(committed) => log.save_committed(committed),
            Op::Truncate(from) => log.truncate(from, done),
            Op::Purge(through) => log.purge(through, done),
            Op::Snapshot(snapshot) => log.put_snapshot(snapshot, done),
            Op::Checkpoint(checkpoint) => log.put_checkpoint(checkpoint),
            Op::Remove => self.node().remove(group, done),
            Op::Forget(vote) => self.node().forget(group, vote, done),
            Op::Rewrite(mark) => log.rewrite(mark, done),
        }
    }

    /// One group commit. False when the disk gave up.
    pub(crate) fn commit(&mut self) -> bool {
        self.log.as_mut().expect("the log is open").1.commit_queued().is_ok()
    }

    /// Compares everything readable with the model.
    pub(crate) fn check_live(&self) -> Outcome {
        let live = self.live.clone();
        self.compare(&live, None).map_err(|what| Violation(format!("before any crash: {what}")))
    }

    /// Closes cleanly, opens again, and expects everything.
    pub(crate) fn reopen(&mut self) -> Outcome {
        if let Some((log, writer)) = self.log.take() {
            drop(log);
            writer.close();
        }
        self.open()?;
        let live = self.live.clone();
        self.compare(&live, None).map_err(|what| Violation(format!("after a clean close: {what}")))?;
        self.settle(live);
        Ok(())
    }

    /// The power fails; what comes back must be what some prefix of the journal makes, and all that was promised.
    pub(crate) fn crash(&mut self, crash: Crash, seed: u64) -> Outcome {
        self.disk.fence();
        let promised = self.promised.load(Ordering::SeqCst);
        self.log = None;
        self.disk.crash(crash, seed);
        // A start may crash as well.
        let mut rng = SplitMix(seed ^ 0x5eed);
        while rng.below(3) == 0 {
            self.disk.inject(Fault::PowerOff(rng.below(12)));
            let opened = FrameLog::open(Arc::new(self.disk.clone()), Path::new(DIR), self.config);
            self.disk.fence();
            drop(opened);
            self.disk.crash(crash, rng.next());
        }
        self.open()?;
        let mut model = self.base.clone();
        let mut closest = String::new();
        for kept in 0..=self.journal.len() {
            if kept > 0 {
                let (group, op) = &self.journal[kept - 1];
                let group_model = model.entry(*group).or_default();
                group_model.apply(op.clone()).map_err(|error| Violation(format!("the journal: {error}")))?;
                if matches!(op, Op::Remove) {
                    model.remove(group);
                }
            }
            if kept < promised {
                continue;
            }
            match self.compare(&model, Some(kept)) {
                Ok(()) => {
                    self.tally.crashes += 1;
                    self.tally.promised += promised;
                    self.tally.kept_unpromised += kept - promised;
                    self.tally.lost_unpromised += self.journal.len() - kept;
                    let found = self.found(&model);
                    self.settle(found);
                    return Ok(());
                }
                Err(what) if closest.is_empty() => closest = what,
                Err(_) => {}
            }
        }
        Err(Violation(format!("{promised} of {} operations were promised, and: {closest}", self.journal.len())))
    }

    /// The model with the marks that were really found, which may be older.
    fn found(&self, model: &BTreeMap<GroupId, GroupModel>) -> BTreeMap<GroupId, GroupModel> {
        let mut found = model.clone();
        for id in self.node().groups() {
            let log = self.node().group(id);
            let group = found.entry(id).or_default();
            group.committed = log.state().committed;
            group.checkpoint = log.checkpoint().ok().flatten();
        }
        found.retain(|id, _| self.node().groups().contains(id));
        found
    }

    fn settle(&mut self, state: BTreeMap<GroupId, GroupModel>) {
        self.base.clone_from(&state);
        self.live = state;
        self.journal.clear();
        self.promised = Arc::default();
    }

    /// Compares the log with the model. After a crash (`kept` operations came back) marks may be older, but never newer.
    fn compare(&self, model: &BTreeMap<GroupId, GroupModel>, kept: Option<usize>) -> Result<(), String> {
        if self.out_of_order.load(Ordering::SeqCst) > 0 {
            return Err("callbacks came out of order".to_owned());
        }
        for id in (16..16 + GROUPS).map(GroupId) {
            let expected = model.get(&id).cloned().unwrap_or_default();
            let log = self.node().group(id);
            let (found, state) = (log.state(), expected.state());
            if (&found.vote, found.purged, found.last) != (&state.vote, state.purged, state.last) {
                return Err(format!("group {id} has {found:?}, not {state:?}"));
            }
            if let (Some(first), Some(last)) = (expected.entries.front(), expected.entries.back()) {
                let range = first.id.index..last.id.index.next();
                let entries =
                    log.read(range.clone(), ALL).map_err(|error| format!("group {id}, {range:?}: {error}"))?;
                if expected.entries != entries {
                    return Err(format!("group {id} has other entries in {range:?}"));
                }
            }
            let snapshot = log.snapshot().map_err(|error| format!("group {id}: {error}"))?;
            if snapshot != expected.snapshot {
                return Err(format!("group {id} has another snapshot"));
            }
            let checkpoint = log.checkpoint().map_err(|error| format!("group {id}: {error}"))?;
            match kept {
                None if checkpoint != expected.checkpoint => return Err(format!("group {id} has another checkpoint")),
                None if found.committed != state.committed => {
                    return Err(format!("group {id} has another committed mark"));
                }
                None => {}
                Some(kept) => {
                    self.check_mark(id, kept, checkpoint, "checkpoint", |op| match op {
                        Op::Checkpoint(bytes) => Some(Some(bytes.clone())),
                        _ => None,
                    })?;
                    self.check_mark(id, kept, found.committed, "committed mark", |op| match op {
                        Op::Committed(bytes) => Some(bytes.clone()),
                        _ => None,
                    })?;
                }
            }
        }
        Ok(())
    }

    /// A mark that came back was set in this life of the group, at or before what came back; or it is the base's.
    fn check_mark(
        &self,
        id: GroupId,
        kept: usize,
        mark: Option<Bytes>,
        what: &str,
        value: impl Fn(&Op) -> Option<Option<Bytes>>,
    ) -> Result<(), String> {
        let base = self.base.get(&id);
        let mut allowed = vec![if what == "checkpoint" {
            base.and_then(|model| model.checkpoint.clone())
        } else {
            base.and_then(|model| model.committed.clone())
        }];
        // Marks follow every operation submitted before them, so one that follows the last kept operation may be there.
        let mut lazies_after = 0;
        for (n, (group, op)) in self.journal.iter().enumerate() {
            if n >= kept {
                if !op.is_lazy() {
                    break;
                }
                lazies_after += 1;
            }
            if *group == id {
                if matches!(op, Op::Remove | Op::Forget(_)) {
                    allowed = vec![None];
                }
                allowed.extend(value(op));
            }
        }
        if allowed.contains(&mark) {
            Ok(())
        } else {
            Err(format!("group {id} has a {what} from nowhere ({lazies_after} after)"))
        }
    }

    /// One random step.
    pub(crate) fn step(&mut self, rng: &mut SplitMix) {
        let id = GroupId(16 + rng.below(GROUPS));
        let model = self.live(id);
        let state = model.state();
        let next = state.last.map_or(rng.below(2), |last| last.index.0 + 1);
        let term = Term(state.last.map_or(1, |last| last.term.0) + rng.below(8) / 7);
        let bytes = |rng: &mut SplitMix, max: u64| {
            let (len, stamp) = (rng.below(max) as usize, rng.next().to_le_bytes());
            let mut bytes = stamp.repeat(len / 8 + 1);
            bytes.truncate(len);
            Bytes::from(bytes)
        };
        let op = match rng.below(100) {
            0..60 => {
                let max = [40, 400, 3000, 12_000, 90_000][(rng.below(24) as f64).sqrt() as usize];
                let count = 1 + rng.below(4);
                let entry = |index, rng: &mut SplitMix| Entry {
                    id: EntryId { term, index: LogIndex(index) },
                    payload: bytes(rng, max),
                };
                Op::Append((next..next + count).map(|index| entry(index, rng)).collect())
            }
            60..66 => Op::Vote(bytes(rng, 20)),
            66..72 => Op::Committed((rng.below(9) > 0).then(|| bytes(rng, 16))),
            72..78 => Op::Checkpoint(bytes(rng, 3000)),
            78..85 => {
                let back = rng.below(1 + model.entries.len() as u64 / 2);
                Op::Truncate(LogIndex((next - back.min(next)).max(state.purged.map_or(0, |purged| purged.index.0 + 1))))
            }
            85..95 => {
                let len = model.entries.len() as u64;
                let at = model.entries.get(rng.below(len + 1) as usize).map(|entry| entry.id);
                let past = EntryId { term, index: LogIndex(next + rng.below(5)) };
                Op::Purge(at.unwrap_or(past))
            }
            95..98 => {
                let max = [100, 20_000, 200_000][rng.below(3) as usize];
                Op::Snapshot(bytes(rng, max))
            }
            98 => Op::Rewrite(1 + rng.below(1000)),
            _ if rng.below(2) == 0 => Op::Forget(bytes(rng, 20)),
            _ => Op::Remove,
        };
        self.submit(id, op);
    }
}

/// Lives through `crashes` crashes, random in everything that `seed` decides.
pub(crate) fn live_through(seed: u64, crashes: usize, config: LogConfig, lying: bool) -> Outcome<Tally> {
    live_through_with(seed, crashes, config, lying, |_| ())
}

/// The same, with a look at the world before each crash.
pub(crate) fn live_through_with(
    seed: u64,
    crashes: usize,
    config: LogConfig,
    lying: bool,
    mut look: impl FnMut(&World),
) -> Outcome<Tally> {
    let mut rng = SplitMix(seed);
    let mut world = World::new(config)?;
    if lying {
        world.disk.inject(Fault::LyingSync);
    }
    for _ in 0..crashes {
        world.disk.inject(Fault::PowerOff(rng.below(120)));
        if lying {
            world.disk.inject(Fault::LyingSync);
        }
        // Most crashes come inside a commit; some between two.
        for _ in 0..5 + rng.below(120) {
            world.step(&mut rng);
            if rng.below(5) == 0 && !world.commit() {
                break;
            }
        }
        // A read may write as well: redb makes room in its cache.
        match world.check_live() {
            Err(violation) if !world.disk.powered_off() => return Err(violation),
            _ => {}
        }
        look(&world);
        let crash = [Crash::DropAll, Crash::Prefix, Crash::Sectors, Crash::KeepAll][rng.below(4) as usize];
        world.crash(crash, rng.next())?;
        if rng.below(6) == 0 {
            world.reopen()?;
        }
    }
    Ok(world.tally)
}
