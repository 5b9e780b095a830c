//! A partition as this node can reach it: by the replica here, else by way of a node that holds one. Who calls need not care.

use std::time::Duration;

use ensign_proto::convert::Start;
use ensign_proto::{DekId, NodeId, Offset, PartitionContext, RingId, TopicId};
use tokio::sync::watch;

use super::batcher::Admission;
use super::elsewhere::{Counting, Elsewhere, Place, Stand};
use super::freshness::Freshness;
use super::handle::{Counters, PartitionHandle, ReadError};
use super::keys::{Keys, KeysError};
use super::reader::Reader;
use super::registry::Partitions;
use crate::catalog::TopicState;

/// How long a replica that was just started may take to learn how far the partition goes, before it is read all the same.
const FIRST_CATCH_UP: Duration = Duration::from_secs(2);

/// A partition as this node can reach it. Clones are cheap.
#[derive(Debug, Clone)]
pub struct Reach {
    context: PartitionContext,
    /// The replica here that was found when it was reached.
    found: Option<PartitionHandle>,
    /// Where it is looked for again; tests of a replica alone have none.
    partitions: Option<Partitions>,
}

/// What can be read of a partition now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first offset that is kept.
    pub log_start: Offset,
    /// The first offset that is not committed.
    pub high_watermark: Offset,
}

#[cfg(test)]
impl From<PartitionHandle> for Reach {
    fn from(handle: PartitionHandle) -> Self {
        Self { context: *handle.context(), found: Some(handle), partitions: None }
    }
}

impl Reach {
    pub(super) fn new(context: PartitionContext, found: Option<PartitionHandle>, partitions: Partitions) -> Self {
        Self { context, found, partitions: Some(partitions) }
    }

    /// The topic.
    pub fn topic(&self) -> TopicId {
        self.context.topic
    }

    /// What people call it; its id where it is gone.
    pub fn topic_name(&self) -> String {
        let topic = self.partitions.as_ref().and_then(|partitions| partitions.catalog().view().topic(self.topic()));
        topic.map_or_else(|| self.topic().to_string(), |topic| topic.name.as_str().to_owned())
    }

    /// Where it is.
    pub fn context(&self) -> &PartitionContext {
        &self.context
    }

    /// The ring that the topic is bound to now; none of one that is gone.
    pub fn ring(&self) -> Option<RingId> {
        Some(self.partitions.as_ref()?.catalog().view().topic(self.topic())?.ring)
    }

    /// The replica here, if one runs now.
    pub(super) fn replica(&self) -> Option<PartitionHandle> {
        if let Some(found) = self.found.as_ref().filter(|found| !found.is_stopped()) {
            return Some(found.clone());
        }
        self.partitions.as_ref()?.get(self.topic())
    }

    pub(super) fn elsewhere(&self) -> Option<&Elsewhere> {
        self.partitions.as_ref().map(Partitions::elsewhere)
    }

    fn others(&self) -> Result<&Elsewhere, ReadError> {
        self.elsewhere().ok_or(ReadError::Stopped)
    }

    pub(super) fn me(&self) -> Option<NodeId> {
        self.partitions.as_ref().map(Partitions::node)
    }

    pub(super) fn keys(&self) -> Option<&dyn Keys> {
        match (&self.found, &self.partitions) {
            (Some(found), _) => Some(&**found.keys()),
            (None, Some(partitions)) => Some(partitions.keys()),
            (None, None) => None,
        }
    }

    /// Whether the topic takes events: as the replica here has it, else as the catalog says.
    pub fn admission(&self) -> Admission {
        // Asked for every event, so nothing is locked or cloned here.
        match &self.found {
            Some(found) if !found.is_closed() => found.admission(),
            Some(_) | None => self.admitted_by_catalog(),
        }
    }

    /// Follows whether the replica here takes events; none if there is none.
    pub fn watch_admission(&self) -> Option<watch::Receiver<Admission>> {
        self.replica().map(|replica| replica.watch_admission())
    }

    pub(super) fn admitted_by_catalog(&self) -> Admission {
        let topic = self.partitions.as_ref().and_then(|partitions| partitions.catalog().view().topic(self.topic()));
        match topic.map(|topic| topic.state) {
            Some(TopicState::Ready) => Admission::Open,
            Some(TopicState::Readonly) => Admission::Archived,
            Some(TopicState::Deleting) | None => Admission::Deleted,
        }
    }

    /// Whether the topic is being destroyed, or is gone: then its replicas stop everywhere, and nothing is amiss.
    pub(super) fn is_going(&self) -> bool {
        self.partitions.is_some() && self.admitted_by_catalog() == Admission::Deleted
    }

    /// The partition's time: that of its newest event, as far as this node knows; never later than the leader's.
    pub(super) fn entry_time_ms(&self) -> u64 {
        match self.replica() {
            Some(replica) => replica.entry_time_ms(),
            None => self.elsewhere().and_then(|other| other.known(self.topic())).map_or(0, |known| known.entry_time_ms),
        }
    }

    /// The replica here, if it may be read: one that this node only builds up, or gives away, may not.
    fn readable_replica(&self) -> Option<PartitionHandle> {
        let replica = self.replica()?;
        let Some(partitions) = &self.partitions else { return Some(replica) };
        partitions.belongs_here(self.topic()).then_some(replica)
    }

    async fn stand(&self, freshness: Freshness, counting: Counting, patience: Duration) -> Result<Stand, ReadError> {
        self.others()?.stand(self.topic(), freshness, counting, patience).await
    }

    /// How far it can be read, as fresh as is asked for, and a reader of it.
    ///
    /// # Errors
    /// [`ReadError::NoLeader`], [`ReadError::Unreachable`] when that takes longer than `patience`.
    pub async fn scan(&self, freshness: Freshness, patience: Duration) -> Result<(Reader, Extent), ReadError> {
        if let Some(replica) = self.readable_replica() {
            match replica.freshen(freshness, patience).await {
                Ok(()) => {
                    let extent = Extent { log_start: replica.log_start(), high_watermark: replica.high_watermark() };
                    return Ok((Reader::here(self.clone(), replica), extent));
                }
                // It stopped while it was asked.
                Err(ReadError::Stopped) if self.partitions.is_some() => {}
                Err(error) => return Err(error),
            }
        }
        let stand = self.stand(freshness, Counting::Unwanted, patience).await?;
        let extent = Extent { log_start: stand.log_start, high_watermark: stand.high_watermark };
        Ok((Reader::elsewhere(self.clone()), extent))
    }

    /// A reader that begins at `start` and follows the tail, and where it begins.
    ///
    /// # Errors
    /// [`ReadError::Trimmed`]; as [`Reach::scan`].
    pub async fn follow(
        &self,
        start: Start,
        freshness: Freshness,
        patience: Duration,
    ) -> Result<(Reader, Offset), ReadError> {
        if let Some(replica) = self.readable_replica() {
            match self.follow_here(&replica, start, freshness, patience).await {
                Ok(next) => return Ok((Reader::here(self.clone(), replica), next)),
                Err(ReadError::Stopped) if self.partitions.is_some() => {}
                Err(error) => return Err(error),
            }
        }
        let stand = self.stand(freshness, Counting::Unwanted, patience).await?;
        // Followed before the place is looked for, so that nothing that is committed meanwhile has to be fetched.
        let reader = Reader::elsewhere(self.clone()).following(stand.high_watermark)?;
        let others = self.others()?;
        let next = match start {
            Start::Latest => stand.high_watermark,
            Start::Earliest => stand.log_start,
            Start::Offset(offset) => offset,
            Start::Time(nanos) => others.locate(self.topic(), Place::Time(nanos.div_ceil(1_000_000)), patience).await?,
            Start::After(id) => others.locate(self.topic(), Place::After(id), patience).await?,
        };
        not_trimmed(next, stand.log_start)?;
        Ok((reader, next))
    }

    async fn follow_here(
        &self,
        replica: &PartitionHandle,
        start: Start,
        freshness: Freshness,
        patience: Duration,
    ) -> Result<Offset, ReadError> {
        if freshness == Freshness::Known && !replica.was_confirmed() {
            // After a restart a replica does not know how far it had come: what is old would pass for new.
            // If nobody confirms it in time, it is read as it is.
            if let Err(ReadError::Stopped) = replica.catch_up(FIRST_CATCH_UP.min(patience)).await {
                return Err(ReadError::Stopped);
            }
        }
        replica.freshen(freshness, patience).await?;
        let next = match start {
            Start::Latest => replica.high_watermark(),
            Start::Earliest => replica.log_start(),
            Start::Offset(offset) => offset,
            Start::Time(nanos) => replica.offset_at_time(nanos.div_ceil(1_000_000)).await?,
            Start::After(id) => replica.offset_after(id).await?,
        };
        not_trimmed(next, replica.log_start())?;
        Ok(next)
    }

    /// The partition's counters, as fresh as is asked for.
    ///
    /// # Errors
    /// As [`Reach::scan`].
    pub async fn counters(&self, freshness: Freshness, patience: Duration) -> Result<Counters, ReadError> {
        let keys = self.keys().ok_or(ReadError::Stopped)?;
        if let Some(replica) = self.readable_replica() {
            match replica.freshen(freshness, patience).await {
                Ok(()) => return Ok(replica.counts().open(keys, &self.context).await),
                Err(ReadError::Stopped) if self.partitions.is_some() => {}
                Err(error) => return Err(error),
            }
        }
        let counts = self.stand(freshness, Counting::Wanted, patience).await?.counts.unwrap_or_default();
        Ok(counts.open(keys, &self.context).await)
    }

    /// Whether what was opened with the key may be shown at this very moment.
    pub(crate) fn usable(&self, dek: DekId) -> bool {
        self.keys().is_some_and(|keys| keys.begin_use(dek).is_ok())
    }

    /// Refuses a topic whose ring is revoked as a whole: nothing that it is given is readable, until it is bound to another one.
    ///
    /// # Errors
    /// [`KeysError::Unusable`].
    pub(crate) fn refuse_ring(&self) -> Result<(), KeysError> {
        match (self.keys(), self.ring()) {
            (Some(keys), Some(ring)) => keys.refuse_ring(ring),
            _ => Ok(()),
        }
    }
}

fn not_trimmed(next: Offset, log_start: Offset) -> Result<(), ReadError> {
    if next < log_start { Err(ReadError::Trimmed { log_start }) } else { Ok(()) }
}
