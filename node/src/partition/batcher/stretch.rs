//! One stretch of leadership: from an applied head to the first thing that goes wrong.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::{DekId, Link, Offset, RingId, Rlid, SessionId, Term, link};
use ensign_raft::env::Stop;
use ensign_raft::{Leadership, ProposeError};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::{FuturesOrdered, FuturesUnordered};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::lanes::{Lanes, Whose};
use super::task::{NoKey, no_key};
use super::{Admission, BatcherParts, Job};
use crate::partition::append::{AppendError, AppendedRun};
use crate::partition::entry::Payload;
use crate::partition::event::KIND_MAX;
use crate::partition::keys::KeysError;
use crate::partition::machine::{Applied, TYPES_MAX};
use crate::partition::producers::{Held, Place, Sequenced, Verdict};
use crate::partition::{batch, metrics, rlid};

/// Jobs in one batch at most: each may add a row of 32 bytes to a header that has room for 64 KiB.
const JOBS_MAX: usize = 1_000;

/// A vault that has no key for a ring is not asked for one again sooner.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// The head of the partition once everything in flight is applied.
struct Head {
    next_offset: Offset,
    link: Link,
    last_id: Rlid,
    types: u32,
}

/// What a proposal carries.
enum Cargo {
    Batch(Vec<Job>),
    Introduction,
}

/// For which lane, under which ring, and the key.
type Keyed = (Whose, RingId, Result<DekId, NoKey>);

type Resolved = (u64, Cargo, Result<Applied, Unresolved>);

/// Why a proposal has no answer of its own.
enum Unresolved {
    Failed(ProposeError),
    /// The key was asked back before the proposal was decided. It may be committed yet, and must not be acknowledged.
    Severed,
}

/// One stretch of leadership, from an applied head to the first thing that goes wrong.
pub(super) struct Stretch<'a> {
    parts: &'a BatcherParts,
    term: Term,
    lanes: Lanes,
    /// Keys that are on their way.
    keying: FuturesUnordered<BoxFuture<'a, Keyed>>,
    /// Lanes that there was no key for, and from when on the vault may be asked again.
    refused: HashMap<Whose, Instant>,
    /// What the pending batch is sealed under.
    dek: DekId,
    head: Head,
    /// Known with the first key: without a lease their names could not be opened.
    kinds: Option<HashMap<Bytes, u32>>,
    /// The newest places of sessions with events pending or in flight, and in which batch.
    ahead: HashMap<SessionId, (Place, u64)>,
    /// The number of the last batch that was proposed, and of the last that was resolved.
    serial: u64,
    resolved: u64,
    pending: Vec<Job>,
    pending_bytes: u64,
    in_flight: FuturesOrdered<BoxFuture<'static, Resolved>>,
    /// Retries of what is pending or in flight, until that batch is resolved.
    waiting: Vec<(u64, Job)>,
    /// What has to be taken again, in order.
    again: Vec<Job>,
    failure: Option<ProposeError>,
}

/// How a stretch ended.
pub(super) enum End {
    Stopped,
    /// Leadership changed, or something failed; begin anew from the applied state.
    Again,
    Key(KeysError),
}

impl End {
    /// A key that is gone, or was never held, is no obstacle: another one may do. Without any lease there is none.
    fn of_key(error: KeysError) -> Self {
        match error {
            KeysError::NotHeld(_) | KeysError::Unusable(_) | KeysError::Disabled(_) => Self::Again,
            KeysError::Unavailable(_) | KeysError::Damaged | KeysError::Failed(_) => Self::Key(error),
        }
    }
}

impl<'a> Stretch<'a> {
    pub(super) fn begin(parts: &'a BatcherParts, term: Term) -> Self {
        let head = parts.group.inspect(|machine| {
            let state = machine.state();
            Head {
                next_offset: state.next_offset,
                link: state.link,
                last_id: state.last_id,
                types: state.types.len() as u32,
            }
        });
        Self {
            parts,
            term,
            lanes: Lanes::default(),
            keying: FuturesUnordered::new(),
            refused: HashMap::new(),
            dek: DekId::default(),
            head,
            kinds: None,
            ahead: HashMap::new(),
            serial: 0,
            resolved: 0,
            pending: Vec::new(),
            pending_bytes: 0,
            in_flight: FuturesOrdered::new(),
            waiting: Vec::new(),
            again: Vec::new(),
            failure: None,
        }
    }

    pub(super) async fn run(
        &mut self,
        jobs: &mut mpsc::UnboundedReceiver<Job>,
        retry: &mut VecDeque<Job>,
        leadership: &mut watch::Receiver<Leadership>,
        stop: &Stop,
    ) -> End {
        loop {
            self.fill(jobs, retry);
            self.ask_for_keys();
            if self.should_cut() {
                if self.parts.keys.should_roll_over(self.dek) {
                    return End::Again;
                }
                if let Err(error) = self.cut().await {
                    return error;
                }
                continue;
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return End::Stopped,
                Some(resolved) = self.in_flight.next(), if !self.in_flight.is_empty() => {
                    self.settle(resolved);
                    if self.failure.is_some() || !self.again.is_empty() {
                        return End::Again;
                    }
                    let resolved = self.resolved;
                    retry.extend(self.waiting.extract_if(.., |(of, _)| *of <= resolved).map(|(_, job)| job));
                }
                Some(keyed) = self.keying.next(), if !self.keying.is_empty() => {
                    if let Err(end) = self.keyed(keyed).await {
                        return end;
                    }
                }
                changed = leadership.changed() => {
                    let now = *leadership.borrow();
                    if changed.is_err() || now.term != self.term || !now.ready {
                        return End::Again;
                    }
                }
                job = jobs.recv(), if self.has_room() => match job {
                    Some(job) => self.lanes.push(job),
                    None => return End::Stopped,
                },
            }
        }
    }

    /// Takes what has come: into the pending batch what fits into it, and everything else into its lane.
    fn fill(&mut self, jobs: &mut mpsc::UnboundedReceiver<Job>, retry: &mut VecDeque<Job>) {
        loop {
            let begun = self.pending.is_empty() && self.begin_batch();
            while self.has_room() {
                let Some(job) = self.lanes.pop() else { break };
                self.admit(job);
            }
            if begun && self.pending.is_empty() && self.lanes.another_waits() {
                // Nothing of that lane had to be appended.
                continue;
            }
            if !self.has_room() {
                return;
            }
            let Some(job) = retry.pop_front().or_else(|| jobs.try_recv().ok()) else { return };
            self.lanes.push(job);
        }
    }

    /// Begins a batch of the lane whose turn it is, if there is one.
    fn begin_batch(&mut self) -> bool {
        let ring = *self.parts.ring.borrow();
        let dek = self.lanes.turn(ring);
        self.dek = dek.unwrap_or_default();
        dek.is_some()
    }

    fn ask_for_keys(&mut self) {
        for whose in self.lanes.take_wanting() {
            let (parts, term) = (self.parts, self.term);
            let not_before = self.refused.remove(&whose);
            self.keying.push(Box::pin(async move {
                if let Some(not_before) = not_before {
                    sleep_until(not_before).await;
                }
                let ring = whose.unwrap_or_else(|| *parts.ring.borrow());
                (whose, ring, parts.sealing_key(term, ring).await)
            }));
        }
    }

    /// A lane has its key, or there is none for it: then it is refused what waits in it, and the others go on.
    async fn keyed(&mut self, (whose, ring, key): Keyed) -> Result<(), End> {
        let error = match key {
            Ok(dek) => {
                if self.kinds.is_none() {
                    self.kinds = Some(batch::known_kinds(self.parts).await);
                }
                self.lanes.hold(whose, ring, dek);
                return Ok(());
            }
            Err(NoKey::Introduction(error)) => {
                debug!(%error, "a new data key was not introduced");
                self.failure.get_or_insert(error);
                return Err(End::Again);
            }
            Err(NoKey::Key(error)) => error,
        };
        let refusal = no_key(&self.parts.context, &error);
        self.refused.insert(whose, Instant::now() + ASK_AGAIN);
        for job in self.lanes.give_up(whose) {
            let events = job.chunk.producer;
            let retried = self
                .ahead
                .get(&events.session)
                .filter(|(place, _)| matches!(place.judge(&events, job.chunk.previous), Verdict::Duplicate { .. }));
            if let Some((_, serial)) = retried {
                // On its way already, sealed under another key: that it was not appended would be a lie.
                self.waiting.push((*serial, job));
            } else if let Some(job) = self.parts.answer_held(job) {
                job.refuse(refusal.clone());
            }
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        self.pending_bytes < self.parts.limits.target.0
            && self.pending.len() < JOBS_MAX
            && !self.pending.last().is_some_and(|job| job.alone)
    }

    fn should_cut(&self) -> bool {
        let in_flight = self.in_flight.len();
        if self.pending.is_empty() || in_flight >= self.parts.limits.in_flight {
            return false;
        }
        // Another ring's chunks need not wait until this batch is large enough.
        let enough = self.parts.crowd.enough(in_flight).min(self.parts.limits.target.0);
        !self.has_room() || self.lanes.another_waits() || self.pending_bytes >= enough
    }

    /// Decides what becomes of a chunk: append it, answer it, or refuse it.
    fn admit(&mut self, mut job: Job) {
        let events = job.chunk.producer;
        let ahead = self.ahead.get(&events.session).copied();
        let place = match ahead {
            Some((place, _)) => Some(place),
            None => self.parts.group.inspect(|machine| machine.state().producers.place(events.session)),
        };
        let verdict = place.map_or(Verdict::Forgotten, |place| place.judge(&events, job.chunk.previous));
        // What is here already is acknowledged whatever has become of the topic since.
        let closed = match *self.parts.admission.borrow() {
            Admission::Open => None,
            Admission::Archived => Some(AppendError::Archived),
            Admission::Deleted => Some(AppendError::Deleted),
        };
        match (verdict, ahead) {
            (Verdict::Fresh, _) => match closed {
                None => self.gather(job),
                Some(refusal) => job.refuse(refusal),
            },
            (Verdict::Duplicate { .. }, Some((_, serial))) => self.waiting.push((serial, job)),
            (Verdict::Duplicate { held }, None) => match (self.parts.held_runs(&events, held), closed) {
                (Err(sequence), _) => job.refuse(AppendError::Spent { sequence }),
                (Ok(runs), _) if held == events.count => {
                    job.held = runs;
                    job.acknowledge(None);
                }
                (Ok(runs), None) => {
                    job.held = runs;
                    job.chunk.drop_first(held);
                    self.gather(job);
                }
                (Ok(_), Some(refusal)) => {
                    // Some of them are here and some never will be: no one answer is true of all.
                    job.doubtful = true;
                    job.refuse(refusal);
                }
            },
            (Verdict::Gap { last }, _) => job.refuse(AppendError::Gap { last }),
            (Verdict::Fenced { epoch }, _) => job.refuse(AppendError::Fenced { epoch }),
            (Verdict::Forgotten, _) => {
                // Younger than every session that was dropped.
                let dropped = self.parts.group.inspect(|machine| machine.state().producers.dropped_through_ms());
                let now_ms = self.head.last_id.unix_ms().max(dropped.map_or(0, |dropped| dropped + 1));
                job.refuse(AppendError::Forgotten { now_ms });
            }
        }
    }

    fn gather(&mut self, job: Job) {
        let events = job.chunk.producer;
        let place = Place { epoch: events.epoch, last: events.first + u64::from(events.count) - 1 };
        self.ahead.insert(events.session, (place, self.serial + 1));
        self.pending_bytes += job.chunk.size().0;
        self.pending.push(job);
    }

    /// Seals what is pending for the predicted head and proposes it.
    async fn cut(&mut self) -> Result<(), End> {
        self.introduce_kinds().await?;
        let chunks: Vec<_> = self.pending.iter().map(|job| &job.chunk).collect();
        let place = batch::Place {
            term: self.term,
            base: self.head.next_offset,
            first_id: rlid::first_of_batch(self.parts.clock.wall().as_millis(), self.head.last_id),
            prev: self.head.link,
            dek: self.dek,
        };
        let context = self.parts.context;
        let kinds = self.kinds.get_or_insert_default();
        let Ok(draft) = batch::draft(&chunks, &place, &context, kinds) else {
            self.part_oversize();
            return Err(End::Again);
        };
        let (last_id, next_offset, events) = (draft.header.last_id, draft.header.next_offset(), draft.header.count);
        let in_use = self.parts.keys.begin_use(self.dek).map_err(End::of_key)?;
        let sealed = self.parts.keys.seal(&context, self.dek, draft.header, draft.payload).map_err(End::of_key)?;
        let next_link = link(&context, &sealed);
        let pending = match self.parts.group.submit(Some(self.term), sealed.into_bytes()).await {
            Ok(pending) => pending,
            Err(ProposeError::TooLarge { .. }) => {
                self.part_oversize();
                return Err(End::Again);
            }
            Err(error) => {
                self.failure = Some(error);
                return Err(End::Again);
            }
        };
        self.serial += 1;
        self.head.next_offset = next_offset;
        self.head.last_id = last_id;
        self.head.link = next_link;
        self.pending_bytes = 0;
        metrics::observe_batch(events, draft.bytes);
        let (serial, jobs) = (self.serial, std::mem::take(&mut self.pending));
        let in_crowd = self.parts.crowd.enter();
        self.in_flight.push_back(Box::pin(async move {
            let _in_crowd = in_crowd;
            // The use lasts until the proposal is resolved: no event is acked under a key that was reported dead before. A
            // revoke is not kept waiting by a quorum that is away.
            let outcome = tokio::select! {
                biased;
                outcome = pending => outcome.map(|committed| committed.response).map_err(Unresolved::Failed),
                () = in_use.severed() => Err(Unresolved::Severed),
            };
            drop(in_use);
            (serial, Cargo::Batch(jobs), outcome)
        }));
        Ok(())
    }

    /// What is too large together is tried one by one; what is too large by itself is refused.
    fn part_oversize(&mut self) {
        if self.pending.len() == 1 {
            self.pending.drain(..).for_each(|job| job.refuse(AppendError::TooLarge));
        }
        self.pending.iter_mut().for_each(|job| job.alone = true);
    }

    /// Introduces kinds of event that the partition has not counted yet, while there is room for more.
    async fn introduce_kinds(&mut self) -> Result<(), End> {
        let context = self.parts.context;
        let known = self.kinds.get_or_insert_default();
        let new: Vec<Bytes> = {
            let kinds = self.pending.iter().flat_map(|job| job.chunk.kinds.iter());
            kinds.filter(|kind| !known.contains_key(*kind)).map(|kind| Bytes::copy_from_slice(kind)).collect()
        };
        for kind in new {
            // Whatever this node's own edge lets through fits; another node's may be older.
            if known.contains_key(&kind) || self.head.types as usize >= TYPES_MAX || kind.len() > KIND_MAX {
                continue;
            }
            let handle = self.head.types + 1;
            let sealed = self.parts.keys.seal_type(&context, self.dek, handle, &kind).map_err(End::of_key)?;
            let payload = Payload::type_introduced(handle, self.dek, &sealed);
            let pending = match self.parts.group.submit(Some(self.term), payload).await {
                Ok(pending) => pending,
                Err(error) => {
                    self.failure = Some(error);
                    return Err(End::Again);
                }
            };
            self.head.types = handle;
            known.insert(kind, handle);
            self.in_flight.push_back(Box::pin(async move {
                let outcome = pending.await.map(|committed| committed.response);
                (0, Cargo::Introduction, outcome.map_err(Unresolved::Failed))
            }));
        }
        Ok(())
    }

    /// Answers the chunks of a resolved proposal, or keeps them to be taken again.
    fn settle(&mut self, (serial, cargo, outcome): Resolved) {
        let jobs = match cargo {
            Cargo::Batch(jobs) => jobs,
            Cargo::Introduction => Vec::new(),
        };
        match outcome {
            Ok(Applied::Batch { base, committed_ms }) => {
                self.ahead.retain(|_, (_, of)| *of != serial);
                metrics::observe_committed(jobs.iter().map(|job| u64::from(job.chunk.count())).sum());
                self.resolved = serial;
                let mut offset = base;
                for job in jobs {
                    let count = job.chunk.count();
                    job.acknowledge(Some(AppendedRun { count, offset, committed_ms }));
                    offset = offset.plus(u64::from(count));
                }
            }
            Ok(Applied::Introduced) => {}
            Ok(Applied::Stale) => {
                self.again.extend(jobs);
                // Even a stale introduction of a type means that the head was predicted wrongly.
                self.failure.get_or_insert(ProposeError::OutcomeUnknown);
            }
            Ok(Applied::Unreadable) => {
                self.again.extend(jobs.into_iter().map(in_doubt));
                self.failure = Some(ProposeError::Stopped);
            }
            Err(Unresolved::Severed) => {
                // Whoever asks again is answered from what is applied by then.
                for job in jobs {
                    job.refuse(AppendError::OutcomeUnknown);
                }
                self.failure = Some(ProposeError::OutcomeUnknown);
            }
            Err(Unresolved::Failed(error @ ProposeError::OutcomeUnknown)) => {
                self.again.extend(jobs.into_iter().map(in_doubt));
                self.failure = Some(error);
            }
            Err(Unresolved::Failed(error)) => {
                self.again.extend(jobs);
                // An unknown outcome outweighs a refusal: chunks of both kinds go back together.
                self.failure.get_or_insert(error);
            }
        }
    }

    /// Waits until everything in flight is resolved; what was not appended, in order, and the reason.
    pub(super) async fn resolve(mut self) -> (Vec<Job>, Option<ProposeError>) {
        while let Some(resolved) = self.in_flight.next().await {
            self.settle(resolved);
        }
        let mut again = self.again;
        again.extend(self.pending);
        again.extend(self.waiting.into_iter().map(|(_, job)| job));
        again.extend(self.lanes.into_jobs());
        (again, self.failure)
    }
}

fn in_doubt(mut job: Job) -> Job {
    job.doubtful = true;
    job
}

impl BatcherParts {
    /// Acknowledges a chunk of which every event is here; gives back any other. Only on a ready leader.
    pub(super) fn answer_held(&self, mut job: Job) -> Option<Job> {
        let events = job.chunk.producer;
        let place = self.group.inspect(|machine| machine.state().producers.place(events.session))?;
        match place.judge(&events, job.chunk.previous) {
            Verdict::Duplicate { held } if held == events.count => match self.held_runs(&events, held) {
                Ok(runs) => {
                    job.held = runs;
                    job.acknowledge(None);
                    None
                }
                Err(_) => Some(job),
            },
            _ => Some(job),
        }
    }

    /// Where the first `held` of `events` were committed, as far as that is remembered. An error is a sequence that certainly
    /// was not: it was passed over.
    fn held_runs(&self, events: &Sequenced, held: u32) -> Result<Vec<AppendedRun>, u64> {
        self.group.inspect(|machine| {
            let producers = &machine.state().producers;
            let mut runs: Vec<AppendedRun> = Vec::new();
            let mut sequence = events.first;
            let end = events.first + u64::from(held);
            while sequence < end {
                let (last, offset, committed_ms) = match producers.held(events.session, sequence) {
                    Held::In(run) => (run.last, run.offset.plus(sequence - run.first), run.committed_ms),
                    Held::Before(first) => (first - 1, Offset(0), 0),
                    Held::PassedOver => return Err(sequence),
                };
                let last = last.min(end - 1);
                runs.push(AppendedRun { count: (last - sequence + 1) as u32, offset, committed_ms });
                sequence = last + 1;
            }
            Ok(runs)
        })
    }
}
