//! The partition's replicated state: a pure function of its entries, and small.
//!
//! No event bytes are kept: the entry in the log *is* the batch. Applying one reads its header, which needs no key, checks that
//! its place is free, and moves the head. A batch that does not fit exactly there changes nothing at all: the answer is
//! [`Applied::Stale`], which proves to its leader that nothing was appended.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::{
    BatchError, BatchHeader, DekId, Link, LogIndex, Offset, PartitionContext, Rlid, SealedBytes, SessionId, genesis,
    link,
};
use ensign_raft::{CommittedEntry, RestoreError, StateMachine};

use super::entry::Payload;
use super::index::{Mark, SparseIndex};
use super::producers::{Place, Producers, Sequenced, Verdict};
use super::tail::{StoredBatch, Tail};

/// The most types that a partition counts by name; events of others are counted without one.
pub(super) const TYPES_MAX: usize = 1_000;

/// The largest sealed name of a type. They stay in the state for good, so together they are bounded by half a megabyte.
pub(super) const SEALED_NAME_MAX: usize = 512;

/// What applying an entry did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// The batch is part of the partition now.
    Batch {
        /// The offset of its first event.
        base: Offset,
        /// When it was committed.
        committed_ms: u64,
    },
    /// The key, or the type, is known from now on (or was already).
    Introduced,
    /// It was prepared for another state of the partition. Nothing changed: prepare it anew from the applied head.
    Stale,
    /// This build cannot read the entry. Nothing changed, and nothing after it will: the replica must not serve.
    Unreadable,
}

/// A wrapped data key, as the log introduced it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DekRow {
    /// Its id.
    pub dek: DekId,
    /// The wrapped key, as keyvault encodes it.
    pub wrapped: Bytes,
}

/// A type and what is counted under it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeCount {
    /// Its number in this partition, from 1.
    pub handle: u32,
    /// The key that its name is sealed under.
    pub dek: DekId,
    /// Its name, sealed.
    pub sealed: Bytes,
    /// How many events.
    pub events: u64,
    /// Their size as they are delivered.
    pub bytes: u64,
    /// When the last one was committed.
    pub modified_ms: u64,
}

/// The applied state.
#[derive(Debug, Clone)]
pub(crate) struct State {
    pub(crate) log_start: Offset,
    pub(crate) next_offset: Offset,
    pub(crate) link: Link,
    pub(crate) last_id: Rlid,
    pub(crate) deks: Vec<DekRow>,
    pub(crate) types: Vec<TypeCount>,
    pub(crate) producers: Producers,
    pub(crate) bytes: u64,
    pub(crate) index: SparseIndex,
    /// Batches that were sealed for exactly this place and refused all the same. Readers of the log, who follow the chain,
    /// could not tell them from the batch that took the place. They are those whose session was dropped while they were in flight.
    pub(crate) refused_in_place: Vec<LogIndex>,
    /// The last entry that changed anything.
    pub(crate) applied: LogIndex,
    /// Why nothing can be applied any more.
    pub(crate) halted: Option<String>,
}

impl State {
    pub(crate) fn new(context: &PartitionContext) -> Self {
        Self {
            log_start: Offset::FIRST,
            next_offset: Offset::FIRST,
            link: genesis(context),
            last_id: Rlid::default(),
            deks: Vec::new(),
            types: Vec::new(),
            producers: Producers::default(),
            bytes: 0,
            index: SparseIndex::default(),
            refused_in_place: Vec::new(),
            applied: LogIndex(0),
            halted: None,
        }
    }

    /// Whether a batch was sealed for exactly this place.
    fn is_next(&self, header: &BatchHeader, entry: &CommittedEntry) -> bool {
        header.term == entry.id.term && header.prev == self.link && header.base_offset == self.next_offset
    }

    /// Whether a batch that is next may be taken.
    fn takes(&self, header: &BatchHeader) -> bool {
        header.first_id > self.last_id
            && self.deks.iter().any(|row| row.dek == header.dek)
            && header.types.iter().all(|row| row.handle as usize <= self.types.len())
            && self.producers_are_fresh(header)
    }

    /// No event of the batch may be here already, be it from an earlier batch or from this one.
    fn producers_are_fresh(&self, header: &BatchHeader) -> bool {
        let mut within: HashMap<SessionId, Place> = HashMap::new();
        header.producers.iter().all(|row| {
            let events = sequenced(row);
            let place = within.get(&row.session).copied().or_else(|| self.producers.place(row.session));
            let fresh = place.is_some_and(|place| place.judge(&events, None) == Verdict::Fresh);
            within.insert(row.session, Place { epoch: row.epoch, last: row.last_sequence() });
            fresh
        })
    }

    fn count_types(&mut self, header: &BatchHeader, committed_ms: u64) {
        for row in &header.types {
            self.bytes += row.bytes;
            let Some(at) = (row.handle as usize).checked_sub(1) else { continue };
            if let Some(counted) = self.types.get_mut(at) {
                counted.events += u64::from(row.count);
                counted.bytes += row.bytes;
                counted.modified_ms = committed_ms;
            }
        }
    }
}

pub(super) fn sequenced(row: &ensign_proto::ProducerRow) -> Sequenced {
    Sequenced { session: row.session, epoch: row.epoch, first: row.first_sequence, count: row.count }
}

/// The state machine of one partition.
#[derive(Debug)]
pub struct PartitionMachine {
    context: PartitionContext,
    state: State,
    tail: Arc<Tail>,
}

impl PartitionMachine {
    /// An empty partition that feeds `tail`.
    pub fn new(context: PartitionContext, tail: Arc<Tail>) -> Self {
        Self { context, state: State::new(&context), tail }
    }

    /// Where it is.
    pub fn context(&self) -> &PartitionContext {
        &self.context
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    fn apply_batch(&mut self, entry: &CommittedEntry, bytes: Bytes) -> Applied {
        let sealed = match SealedBytes::parse(bytes) {
            Ok(sealed) => sealed,
            Err(error @ (BatchError::UnknownFormat { .. } | BatchError::UnknownAlgorithm { .. })) => {
                return self.halt(error.to_string());
            }
            // Damage with a good checksum, or a bug of its leader: it has no place here, on any replica.
            Err(BatchError::Truncated { .. } | BatchError::Trailing { .. } | BatchError::Invalid { .. }) => {
                return Applied::Stale;
            }
        };
        let header = sealed.header();
        if !self.state.is_next(header, entry) {
            return Applied::Stale;
        }
        if !self.state.takes(header) {
            self.state.refused_in_place.push(entry.id.index);
            self.state.applied = entry.id.index;
            return Applied::Stale;
        }
        let committed_ms = header.first_id.unix_ms();
        let state = &mut self.state;
        let mut offset = header.base_offset;
        for row in &header.producers {
            // Offsets of runs are told by the order of rows; events without a producer come last.
            state.producers.record(&sequenced(row), offset, committed_ms);
            offset = offset.plus(u64::from(row.count));
        }
        state.count_types(header, committed_ms);
        state.next_offset = header.next_offset();
        state.last_id = header.last_id;
        state.link = link(&self.context, &sealed);
        state.applied = entry.id.index;
        let mark = Mark { offset: header.base_offset, committed_ms, index: entry.id.index };
        state.index.add(mark, sealed.bytes().len() as u64);
        let (base, count) = (header.base_offset, header.count);
        self.tail.push(StoredBatch { base, count, index: entry.id.index, sealed: sealed.into_bytes() });
        Applied::Batch { base, committed_ms }
    }

    fn introduce_dek(&mut self, dek: DekId, wrapped: Bytes) -> Applied {
        match self.state.deks.iter().find(|row| row.dek == dek) {
            Some(known) if known.wrapped == wrapped => Applied::Introduced,
            Some(_) => Applied::Stale,
            None => {
                // Detached, so that a small row does not keep a large message alive.
                self.state.deks.push(DekRow { dek, wrapped: Bytes::copy_from_slice(&wrapped) });
                Applied::Introduced
            }
        }
    }

    fn introduce_type(&mut self, handle: u32, dek: DekId, sealed: Bytes) -> Applied {
        let types = &mut self.state.types;
        let known_dek = self.state.deks.iter().any(|row| row.dek == dek);
        let fits = types.len() < TYPES_MAX && sealed.len() <= SEALED_NAME_MAX;
        if handle as usize != types.len() + 1 || !fits || !known_dek {
            return Applied::Stale;
        }
        let sealed = Bytes::copy_from_slice(&sealed);
        types.push(TypeCount { handle, dek, sealed, events: 0, bytes: 0, modified_ms: 0 });
        Applied::Introduced
    }

    fn halt(&mut self, why: String) -> Applied {
        tracing::error!(topic = %self.context.topic, why, "a log entry is newer than this build; the replica serves nothing");
        self.state.halted = Some(why);
        Applied::Unreadable
    }
}

impl StateMachine for PartitionMachine {
    type Response = Applied;

    fn apply(&mut self, entry: &CommittedEntry) -> Applied {
        if self.state.halted.is_some() {
            return Applied::Unreadable;
        }
        let applied = match Payload::read(&entry.payload) {
            Payload::Batch(bytes) => self.apply_batch(entry, bytes),
            Payload::DekIntroduced { dek, wrapped } => self.introduce_dek(dek, wrapped),
            Payload::TypeIntroduced { handle, dek, sealed } => self.introduce_type(handle, dek, sealed),
            Payload::Unknown { first_byte } => self.halt(format!("entry kind {first_byte:?} is newer than this build")),
        };
        if applied == Applied::Introduced {
            self.state.applied = entry.id.index;
        }
        applied
    }

    fn snapshot(&self) -> Bytes {
        super::checkpoint::encode(&self.context, &self.state)
    }

    fn restore(&mut self, snapshot: &Bytes) -> Result<(), RestoreError> {
        self.state = super::checkpoint::decode(&self.context, snapshot)?;
        self.tail.reset(self.state.next_offset);
        Ok(())
    }

    fn checkpoint(&self) -> Option<Bytes> {
        self.state.halted.is_none().then(|| self.snapshot())
    }

    fn restore_checkpoint(&mut self, bytes: &Bytes) -> Result<(), RestoreError> {
        self.restore(bytes)
    }
}

#[cfg(test)]
mod tests;
