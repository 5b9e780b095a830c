//! One reader of a partition: it begins at the replica here if there is one, and goes on elsewhere when that one goes.

use std::sync::Arc;
use std::time::Duration;

use ensign_proto::{ByteCount, DekId, Offset};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{error, info};

use super::elsewhere::{Chain, Following};
use super::handle::{LogPlace, PartitionHandle, ReadError};
use super::keys::KeysError;
use super::machine::DekRow;
use super::open::OpenBatch;
use super::reach::Reach;
use super::tail::StoredBatch;

/// How long a reader goes on trying when no node that holds the partition answers.
const PATIENCE: Duration = Duration::from_secs(20);

/// Reads sealed batches of one partition, in order, wherever they are.
pub struct Reader {
    partition: Reach,
    source: Source,
}

enum Source {
    Here {
        replica: PartitionHandle,
        place: Option<LogPlace>,
        watermark: watch::Receiver<Offset>,
        /// The replica was seen to stop.
        stopped: bool,
    },
    Elsewhere(Box<Remote>),
    /// The topic is being destroyed: there is nothing more, and whoever reads is told by the catalog.
    Gone,
}

/// What a reader knows of a partition that is elsewhere.
struct Remote {
    tail: Option<Followed>,
    chain: Chain,
    keys: Vec<DekRow>,
}

struct Followed {
    following: Arc<Following>,
    watermark: watch::Receiver<Offset>,
    lost: watch::Receiver<Option<Instant>>,
}

impl Followed {
    fn new(following: Arc<Following>) -> Self {
        Self { watermark: following.tail().watch(), lost: following.lost(), following }
    }

    /// When nobody has been heard for too long; none while somebody is.
    fn given_up_at(&self) -> Option<Instant> {
        self.lost.borrow().map(|since| since + PATIENCE)
    }

    /// Returns once there is more than `next`, or nobody has been heard for too long.
    async fn more(&mut self, next: Offset) {
        loop {
            let give_up = self.given_up_at();
            tokio::select! {
                // It lives as long as this follower.
                _ = self.watermark.wait_for(|high| *high > next) => return,
                changed = self.lost.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(give_up.unwrap_or_else(Instant::now)), if give_up.is_some() => return,
            }
        }
    }
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("topic", &self.partition.topic()).finish_non_exhaustive()
    }
}

impl Reader {
    pub(super) fn here(partition: Reach, replica: PartitionHandle) -> Self {
        let watermark = replica.watch();
        Self { partition, source: Source::Here { replica, place: None, watermark, stopped: false } }
    }

    pub(super) fn elsewhere(partition: Reach) -> Self {
        let remote = Remote { tail: None, chain: Chain::default(), keys: Vec::new() };
        Self { partition, source: Source::Elsewhere(Box::new(remote)) }
    }

    /// Follows the tail, from `from` on unless it is followed already.
    pub(super) fn following(mut self, from: Offset) -> Result<Self, ReadError> {
        let elsewhere = self.partition.elsewhere().ok_or(ReadError::Stopped)?;
        let followed = Followed::new(elsewhere.follow(*self.partition.context(), from));
        if let Source::Elsewhere(remote) = &mut self.source {
            remote.tail = Some(followed);
        }
        Ok(self)
    }

    /// The partition.
    pub fn partition(&self) -> &Reach {
        &self.partition
    }

    /// Whether reading from `next` on would bring something: events, another source, or an error.
    pub fn has_more(&self, next: Offset) -> bool {
        match &self.source {
            Source::Here { replica, stopped, .. } => *stopped || next < replica.high_watermark(),
            Source::Elsewhere(remote) => remote.tail.as_ref().is_none_or(|tail| {
                let high = *tail.watermark.borrow();
                next < high || tail.given_up_at().is_some_and(|at| at <= Instant::now())
            }),
            Source::Gone => false,
        }
    }

    /// Returns once [`Reader::has_more`]. Cancel safe.
    pub async fn more(&mut self, next: Offset) {
        match &mut self.source {
            Source::Here { replica, watermark, stopped, .. } => {
                tokio::select! {
                    _ = watermark.wait_for(|high| *high > next) => {}
                    () = replica.stopped() => *stopped = true,
                }
            }
            Source::Elsewhere(remote) => {
                if let Some(tail) = &mut remote.tail {
                    tail.more(next).await;
                }
            }
            Source::Gone => std::future::pending().await,
        }
    }

    /// Sealed batches from the one that holds `next`: from memory, else from the log, else from a node that holds the partition.
    /// Empty when there is nothing new.
    ///
    /// # Errors
    /// [`ReadError::Unreachable`]: no node that holds it has answered for a while. See [`ReadError`] for the rest.
    pub async fn read(&mut self, next: Offset, limit: ByteCount) -> Result<Vec<StoredBatch>, ReadError> {
        loop {
            let read = match &mut self.source {
                Source::Here { replica, .. } if replica.is_stopped() => Err(ReadError::Stopped),
                Source::Here { replica, place, .. } => replica.read(next, limit, place).await,
                Source::Elsewhere(remote) => remote.read(&self.partition, next, limit).await,
                Source::Gone => Ok(Vec::new()),
            };
            match read {
                Err(ReadError::Stopped) if matches!(self.source, Source::Here { .. }) => self.go_on_elsewhere(next)?,
                Err(error @ ReadError::Unreachable { .. }) => {
                    if self.partition.is_going() {
                        self.source = Source::Gone;
                        return Ok(Vec::new());
                    }
                    // A replica may have come here meanwhile.
                    let replica = self.partition.replica().filter(PartitionHandle::was_confirmed).ok_or(error)?;
                    self.source = Self::here(self.partition.clone(), replica).source;
                }
                read => return read,
            }
        }
    }

    /// The replica here has stopped: another one here, one elsewhere, or none at all.
    fn go_on_elsewhere(&mut self, next: Offset) -> Result<(), ReadError> {
        let topic = self.partition.topic();
        let Source::Here { place, .. } = &self.source else { return Ok(()) };
        let chain = place.as_ref().and_then(LogPlace::last).map(|(index, at, link)| Chain::following(index, at, link));
        if let Some(replica) = self.partition.replica() {
            self.source = Self::here(self.partition.clone(), replica).source;
        } else if self.partition.is_going() {
            self.source = Source::Gone;
        } else {
            info!(%topic, offset = %next, "a reader goes on at another node, since the replica here has stopped");
            let elsewhere = self.partition.elsewhere().ok_or(ReadError::Stopped)?;
            let tail = Some(Followed::new(elsewhere.follow(*self.partition.context(), next)));
            let remote = Remote { tail, chain: chain.unwrap_or_default(), keys: Vec::new() };
            self.source = Source::Elsewhere(Box::new(remote));
        }
        Ok(())
    }

    /// Opens a batch that was read here, fetching its key under the lease if this process does not hold it yet.
    ///
    /// # Errors
    /// [`ReadError::Key`], [`ReadError::Corrupt`].
    pub(crate) async fn open(&self, batch: &StoredBatch) -> Result<OpenBatch, ReadError> {
        match &self.source {
            Source::Here { replica, .. } => replica.open(batch).await,
            Source::Elsewhere(remote) => {
                let keys = self.partition.keys().ok_or(ReadError::Stopped)?;
                OpenBatch::open(keys, self.partition.context(), batch, |dek| remote.data_key(dek)).await
            }
            Source::Gone => Err(ReadError::Stopped),
        }
    }

    /// Refuses a topic whose ring is revoked as a whole.
    ///
    /// # Errors
    /// [`KeysError::Unusable`].
    pub(crate) fn refuse_ring(&self) -> Result<(), KeysError> {
        self.partition.refuse_ring()
    }
}

impl Remote {
    async fn read(&mut self, partition: &Reach, next: Offset, limit: ByteCount) -> Result<Vec<StoredBatch>, ReadError> {
        if let Some(tail) = &self.tail {
            if next >= *tail.watermark.borrow() {
                let unheard = tail.given_up_at().is_some_and(|at| at <= Instant::now());
                let cause = || "none was heard for a while".to_owned();
                return if unheard { Err(ReadError::Unreachable { cause: cause() }) } else { Ok(Vec::new()) };
            }
            if let Some(recent) = tail.following.tail().read(next, limit) {
                return self.check(partition, next, recent);
            }
        }
        let elsewhere = partition.elsewhere().ok_or(ReadError::Stopped)?;
        // Only the keys of what was read last are needed, and of what is read now.
        if self.keys.len() > 16 {
            self.keys.clear();
        }
        elsewhere.fetch(partition.context(), next, limit, &mut self.chain, &mut self.keys, PATIENCE).await
    }

    /// Holds what the shared tail has against what this reader has read.
    fn check(
        &mut self,
        partition: &Reach,
        next: Offset,
        batches: Vec<StoredBatch>,
    ) -> Result<Vec<StoredBatch>, ReadError> {
        let sealed = batches.into_iter().map(|batch| (batch.index, batch.sealed));
        self.chain.accept_all(partition.context(), next, sealed).map_err(|broken| {
            error!(topic = %partition.topic(), %broken, "a replica on another node does not fit what was read before");
            ReadError::Corrupt { what: broken.to_string() }
        })
    }

    fn data_key(&self, dek: DekId) -> Option<DekRow> {
        let fetched = self.keys.iter().find(|row| row.dek == dek).cloned();
        fetched.or_else(|| self.tail.as_ref()?.following.data_key(dek))
    }
}
