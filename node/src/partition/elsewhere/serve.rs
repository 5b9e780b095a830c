//! The other side: reads of nodes that hold no replica, answered from the one here. Never passed on, so they cannot go in circles.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ensign_proto::pb::ensign::peer::v1 as peer;
use ensign_proto::{ByteCount, DekId, Link, LogIndex, NodeId, Offset, Rlid, TopicId};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

use super::follow::SIGN_OF_LIFE;
use super::link::{Counting, Page, Place, Stand, Unread, Wanted};
use crate::partition::freshness::Freshness;
use crate::partition::handle::{LogPlace, PartitionHandle, ReadError};
use crate::partition::registry::Partitions;
use crate::partition::tail::StoredBatch;

/// Tails that one node may follow here.
const FOLLOWS: usize = 2_048;

/// Pages that one node may fetch here at once; more wait.
const FETCHES: usize = 64;

/// The largest page of a fetch, whatever is asked for; one batch may be larger.
const PAGE_BYTES: u64 = 1 << 20;

/// The largest page of a tail.
const TAIL_BYTES: ByteCount = ByteCount(256 << 10);

/// How long a replica may take to become as fresh as is asked.
const FRESHEN: Duration = Duration::from_secs(3);

/// Answers reads from the replicas of this node.
#[derive(Debug, Clone)]
pub(in crate::partition) struct Reads {
    partitions: Partitions,
    /// What each node may still do here.
    shares: Arc<Mutex<HashMap<NodeId, Share>>>,
}

#[derive(Debug, Clone)]
struct Share {
    follows: Arc<Semaphore>,
    fetches: Arc<Semaphore>,
}

impl Reads {
    pub(in crate::partition) fn new(partitions: Partitions) -> Self {
        Self { partitions, shares: Arc::default() }
    }

    fn share(&self, caller: NodeId) -> Share {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Share { follows: Arc::new(Semaphore::new(FOLLOWS)), fetches: Arc::new(Semaphore::new(FETCHES)) };
        shares.entry(caller).or_insert_with(new).clone()
    }

    fn held(&self, topic: TopicId) -> Result<PartitionHandle, Unread> {
        self.partitions.get(topic).ok_or(Unread::NotHeld)
    }

    pub(in crate::partition) async fn stand(
        &self,
        topic: TopicId,
        freshness: Freshness,
        counting: Counting,
    ) -> Result<Stand, Unread> {
        let handle = self.held(topic)?;
        handle.freshen(freshness, FRESHEN).await?;
        let leader = handle.leadership().borrow().leader;
        Ok(Stand {
            leader,
            log_start: handle.log_start(),
            high_watermark: handle.high_watermark(),
            entry_time_ms: handle.entry_time_ms(),
            counts: (counting == Counting::Wanted).then(|| handle.counts()),
        })
    }

    pub(in crate::partition) async fn locate(&self, topic: TopicId, place: Place) -> Result<Offset, Unread> {
        let handle = self.held(topic)?;
        Ok(match place {
            Place::Time(ms) => handle.offset_at_time(ms).await?,
            Place::After(id) => handle.offset_after(id).await?,
        })
    }

    pub(in crate::partition) async fn fetch(
        &self,
        caller: NodeId,
        topic: TopicId,
        wanted: Wanted,
    ) -> Result<Page, Unread> {
        let handle = self.held(topic)?;
        let _turn = self.share(caller).fetches.acquire_owned().await.map_err(|_| Unread::Busy)?;
        let limit = ByteCount(wanted.bytes.min(PAGE_BYTES));
        let mut place = wanted.after.map(|(index, link)| LogPlace::following(index, wanted.from, link));
        let placed = place.is_some();
        let batches = match handle.read(wanted.from, limit, &mut place).await {
            // Perhaps it is only the caller's place that leads nowhere.
            Err(ReadError::Corrupt { .. }) if placed => handle.read(wanted.from, limit, &mut None).await?,
            read => read?,
        };
        Ok(page(&handle, batches, &mut HashSet::new()))
    }

    /// Pages as they come: at least one every [`SIGN_OF_LIFE`].
    pub(in crate::partition) fn follow(
        &self,
        caller: NodeId,
        topic: TopicId,
        from: Offset,
    ) -> Result<BoxStream<'static, Result<Page, Unread>>, Unread> {
        let handle = self.held(topic)?;
        let share = self.share(caller).follows.try_acquire_owned().map_err(|_| Unread::Busy)?;
        let told = HashSet::new();
        let tail = Tail { handle, next: from, place: None, told, begun: false, _share: share };
        let pages = futures::stream::unfold(Some(tail), |tail| async move {
            let mut tail = tail?;
            match tail.next().await {
                Ok(page) => Some((Ok(page), Some(tail))),
                Err(unread) => Some((Err(unread), None)),
            }
        });
        Ok(pages.boxed())
    }
}

/// Batches with the keys among theirs that were not told yet.
fn page(handle: &PartitionHandle, batches: Vec<StoredBatch>, told: &mut HashSet<DekId>) -> Page {
    let deks = batches.iter().filter_map(|batch| ensign_proto::BatchHeader::decode(&batch.sealed).ok());
    let new: Vec<DekId> = deks.map(|decoded| decoded.header.dek).filter(|dek| told.insert(*dek)).collect();
    Page {
        log_start: handle.log_start(),
        high_watermark: handle.high_watermark(),
        batches: batches.into_iter().map(|batch| (batch.index, batch.sealed)).collect(),
        keys: new.into_iter().filter_map(|dek| handle.data_key(dek)).collect(),
    }
}

/// A tail that another node follows.
struct Tail {
    handle: PartitionHandle,
    next: Offset,
    place: Option<LogPlace>,
    told: HashSet<DekId>,
    begun: bool,
    _share: OwnedSemaphorePermit,
}

impl Tail {
    async fn next(&mut self) -> Result<Page, Unread> {
        // At once, so that the other side knows that it is followed.
        if std::mem::replace(&mut self.begun, true) {
            let mut watermark = self.handle.watch();
            let next = self.next;
            tokio::select! {
                () = self.handle.stopped() => return Err(Unread::NotHeld),
                more = watermark.wait_for(|high| *high > next) => { more.map_err(|_| Unread::NotHeld)?; }
                () = tokio::time::sleep(SIGN_OF_LIFE) => {}
            }
        }
        if self.handle.is_stopped() {
            return Err(Unread::NotHeld);
        }
        let batches = self.handle.read(self.next, TAIL_BYTES, &mut self.place).await?;
        self.next = batches.last().map_or(self.next, StoredBatch::end);
        Ok(page(&self.handle, batches, &mut self.told))
    }
}

/// A question that makes no sense.
fn invalid(what: &'static str) -> Status {
    Status::invalid_argument(format!("malformed question of a peer: {what}"))
}

pub(in crate::partition) fn offset(from: u64) -> Result<Offset, Status> {
    if from < Offset::FIRST.0 { Err(invalid("offset")) } else { Ok(Offset(from)) }
}

pub(in crate::partition) fn place(place: Option<peer::locate_request::Place>) -> Result<Place, Status> {
    match place {
        Some(peer::locate_request::Place::TimeMs(ms)) => Ok(Place::Time(ms)),
        Some(peer::locate_request::Place::AfterId(id)) => {
            Rlid::try_from(&id[..]).map(Place::After).map_err(|_| invalid("event id"))
        }
        None => Err(invalid("place")),
    }
}

pub(in crate::partition) fn wanted(request: &peer::FetchRequest) -> Result<Wanted, Status> {
    let after = match &request.after_link[..] {
        [] => None,
        link => {
            let link: [u8; 32] = link.try_into().map_err(|_| invalid("link"))?;
            Some((LogIndex(request.after_index), Link(link)))
        }
    };
    Ok(Wanted { from: offset(request.from)?, bytes: request.bytes, after })
}

pub(in crate::partition) fn after(wanted: &Wanted) -> (u64, Bytes) {
    wanted.after.map_or((0, Bytes::new()), |(index, link)| (index.0, Bytes::copy_from_slice(&link.0)))
}

pub(in crate::partition) fn fetch_reply(page: Result<Page, Unread>) -> peer::FetchReply {
    let kind = match page {
        Ok(page) => peer::fetch_reply::Kind::Page(page.into()),
        Err(unread) => peer::fetch_reply::Kind::Refused(unread.into()),
    };
    peer::FetchReply { kind: Some(kind) }
}
