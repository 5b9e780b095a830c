//! For tests of this crate: keys without a vault.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use ensign_keyvault::PlainBatch;
use ensign_proto::{
    BatchHeader, COMMIT_BYTES, DekId, NodeId, Offset, PartitionContext, RingId, SALT_BYTES, SealedBytes, TAG_BYTES,
    TopicId,
};
use futures::future::BoxFuture;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::elsewhere::{Counting, Page, Pages, Place, ReadLink, Stand, Unread, Wanted};
use super::freshness::Freshness;
use super::keys::{InUse, KeyUse, Keys, KeysError, NewDek};

/// There is no other node.
pub(crate) struct NoOthers;

fn nobody<T: Send + 'static>() -> BoxFuture<'static, Result<T, Unread>> {
    Box::pin(async { Err(Unread::Unreachable { cause: "there is no other node".to_owned() }) })
}

impl ReadLink for NoOthers {
    fn stand(&self, _: NodeId, _: TopicId, _: Freshness, _: Counting) -> BoxFuture<'static, Result<Stand, Unread>> {
        nobody()
    }

    fn locate(&self, _: NodeId, _: TopicId, _: Place) -> BoxFuture<'static, Result<Offset, Unread>> {
        nobody()
    }

    fn fetch(&self, _: NodeId, _: TopicId, _: Wanted) -> BoxFuture<'static, Result<Page, Unread>> {
        nobody()
    }

    fn follow(&self, _: NodeId, _: TopicId, _: Offset) -> BoxFuture<'static, Result<Pages, Unread>> {
        nobody()
    }
}

/// Keys without a vault: what they seal lies open, but bound to its place as a seal would bind it.
#[derive(Default)]
pub(crate) struct OpenKeys {
    created: AtomicU64,
    /// Keys that are gone for good.
    pub(crate) dead: Mutex<BTreeSet<DekId>>,
    /// There is no lease.
    pub(crate) away: AtomicBool,
    /// There is no version to make keys under.
    pub(crate) revoked: AtomicBool,
    /// Rings that are disabled: no keys are made under them.
    pub(crate) disabled: Mutex<BTreeSet<RingId>>,
    /// Rings whose keys take their time, until this is told.
    pub(crate) late: Mutex<BTreeSet<RingId>>,
    pub(crate) arrived: Arc<Notify>,
    /// Keys that are never fetched, whoever asks for them.
    pub(crate) mute: Mutex<BTreeSet<DekId>>,
    /// Names are opened only with a key that was fetched.
    pub(crate) unheld: AtomicBool,
    /// Which were, and how often any was asked for.
    pub(crate) fetched: Arc<Mutex<BTreeSet<DekId>>>,
    pub(crate) ensured: AtomicU64,
    /// The next seal asks for a new key.
    pub(crate) roll_over: AtomicBool,
    /// Every use in progress is asked to end.
    pub(crate) severed: CancellationToken,
    deaths: watch::Sender<u64>,
    uses: Arc<()>,
}

/// Counted for as long as it lasts.
struct OpenUse(CancellationToken, #[expect(dead_code, reason = "its life is what counts")] Arc<()>);

impl InUse for OpenUse {
    fn check(&self) -> Result<(), KeysError> {
        Ok(())
    }

    fn severed(&self) -> BoxFuture<'static, ()> {
        Box::pin(self.0.clone().cancelled_owned())
    }
}

impl OpenKeys {
    /// How many uses are in progress.
    pub(crate) fn uses(&self) -> usize {
        Arc::strong_count(&self.uses) - 1
    }

    /// Everything made so far is gone, and nothing new can be made.
    pub(crate) fn revoke_all(&self) {
        self.revoked.store(true, Ordering::SeqCst);
        let made = 0..self.created.load(Ordering::SeqCst);
        self.dead.lock().unwrap().extend(made.map(dek_of));
        self.deaths.send_modify(|deaths| *deaths += 1);
    }

    fn check(&self, dek: DekId) -> Result<(), KeysError> {
        if self.dead.lock().unwrap().contains(&dek) {
            return Err(KeysError::Unusable("the key was revoked".to_owned()));
        }
        if self.away.load(Ordering::SeqCst) {
            return Err(KeysError::Unavailable("no lease".to_owned()));
        }
        Ok(())
    }
}

fn dek_of(n: u64) -> DekId {
    let mut id = [7; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    DekId::from_bytes(id)
}

impl Keys for OpenKeys {
    fn create_dek(&self, _: PartitionContext, ring: RingId) -> BoxFuture<'static, Result<NewDek, KeysError>> {
        let dek = dek_of(self.created.fetch_add(1, Ordering::SeqCst));
        let outcome = if self.revoked.load(Ordering::SeqCst) {
            Err(KeysError::Unusable("the ring was revoked".to_owned()))
        } else if self.away.load(Ordering::SeqCst) {
            Err(KeysError::Unavailable("no vault".to_owned()))
        } else if self.disabled.lock().unwrap().contains(&ring) {
            Err(KeysError::Disabled(format!("key ring {ring} is disabled")))
        } else {
            self.roll_over.store(false, Ordering::SeqCst);
            Ok(NewDek { dek, wrapped: [&dek.as_bytes()[..], ring.as_bytes()].concat().into() })
        };
        let late = self.late.lock().unwrap().contains(&ring);
        let arrived = late.then(|| Arc::clone(&self.arrived).notified_owned());
        Box::pin(async move {
            if let Some(arrived) = arrived {
                arrived.await;
            }
            outcome
        })
    }

    fn ring_of(&self, wrapped: &Bytes) -> Option<RingId> {
        RingId::try_from(wrapped.get(16..)?).ok()
    }

    fn ensure(&self, _: PartitionContext, wrapped: Bytes) -> BoxFuture<'static, Result<(), KeysError>> {
        let outcome = DekId::try_from(&wrapped[..16])
            .map_err(|_| KeysError::Damaged)
            .and_then(|dek| self.check(dek).map(|()| dek));
        self.ensured.fetch_add(1, Ordering::SeqCst);
        let mute = outcome.as_ref().is_ok_and(|dek| self.mute.lock().unwrap().contains(dek));
        let fetched = Arc::clone(&self.fetched);
        Box::pin(async move {
            if mute {
                std::future::pending::<()>().await;
            }
            outcome.map(|dek| {
                fetched.lock().unwrap().insert(dek);
            })
        })
    }

    fn seal(
        &self,
        context: &PartitionContext,
        dek: DekId,
        header: BatchHeader,
        payload: PlainBatch,
    ) -> Result<SealedBytes, KeysError> {
        self.check(dek)?;
        let blocks = payload.blocks();
        let mut bytes = header.encode(blocks.len()).map_err(|error| KeysError::Failed(error.to_string()))?;
        bytes.extend_from_slice(&[0; SALT_BYTES]);
        bytes.extend_from_slice(&context.to_bytes()[..COMMIT_BYTES]);
        bytes.extend_from_slice(blocks);
        bytes.extend_from_slice(&[0; TAG_BYTES]);
        SealedBytes::parse(bytes.into()).map_err(|error| KeysError::Failed(error.to_string()))
    }

    fn open(&self, context: &PartitionContext, sealed: &Bytes) -> Result<PlainBatch, KeysError> {
        let sealed = SealedBytes::parse(sealed.clone()).map_err(|_| KeysError::Damaged)?;
        self.check(sealed.header().dek)?;
        if sealed.commit()[..] != context.to_bytes()[..COMMIT_BYTES] {
            return Err(KeysError::Damaged);
        }
        let mut plain = PlainBatch::with_capacity(sealed.ciphertext().len());
        plain.append(sealed.ciphertext()).map_err(|_| KeysError::Damaged)?;
        Ok(plain)
    }

    fn seal_type(&self, _: &PartitionContext, dek: DekId, _: u32, name: &[u8]) -> Result<Bytes, KeysError> {
        self.check(dek).map(|()| Bytes::copy_from_slice(name))
    }

    fn open_type(&self, _: &PartitionContext, dek: DekId, _: u32, sealed: &Bytes) -> Result<Bytes, KeysError> {
        self.check(dek)?;
        if (self.unheld.load(Ordering::SeqCst) || self.mute.lock().unwrap().contains(&dek))
            && !self.fetched.lock().unwrap().contains(&dek)
        {
            return Err(KeysError::NotHeld(dek));
        }
        Ok(sealed.clone())
    }

    fn should_roll_over(&self, _: DekId) -> bool {
        self.roll_over.load(Ordering::SeqCst)
    }

    fn begin_use(&self, dek: DekId) -> Result<KeyUse, KeysError> {
        self.check(dek).map(|()| Box::new(OpenUse(self.severed.clone(), Arc::clone(&self.uses))) as KeyUse)
    }

    fn refuse_ring(&self, _: RingId) -> Result<(), KeysError> {
        let revoked = self.revoked.load(Ordering::SeqCst);
        if revoked { Err(KeysError::Unusable("the ring was revoked".to_owned())) } else { Ok(()) }
    }

    fn deaths(&self) -> watch::Receiver<u64> {
        self.deaths.subscribe()
    }
}
