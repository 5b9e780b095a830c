//! An opened batch and its delivery.

use bytes::BufMut;
use ensign_keyvault::PlainBatch;
use ensign_proto::{BatchHeader, DekId, Offset, PartitionContext, TopicId};

use super::block::{BlockCursor, BlockMap, Envelope, StoredEvent};
use super::handle::ReadError;
use super::keys::{KeyUse, Keys, KeysError};
use super::machine::DekRow;
use super::tail::StoredBatch;

/// A batch whose plaintext is in memory: as short as possible, and wiped by its owner when it goes.
pub(crate) struct OpenBatch {
    plaintext: PlainBatch,
    map: BlockMap,
    cursor: BlockCursor,
    envelope: Envelope,
    /// A surrender of the key waits until the batch is gone from memory.
    in_use: KeyUse,
}

impl std::fmt::Debug for OpenBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenBatch").field("envelope", &self.envelope).finish_non_exhaustive()
    }
}

/// An event of an open batch, encoded on demand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpenEvent<'a> {
    envelope: &'a Envelope,
    stored: StoredEvent<'a>,
}

impl OpenEvent<'_> {
    pub(crate) fn offset(&self) -> Offset {
        self.envelope.base.plus(u64::from(self.stored.ordinal))
    }

    /// Whether it carries event bytes. Clients choke on one that does not.
    pub(crate) fn has_event(&self) -> bool {
        self.stored.has_event
    }

    /// The length of the encoded `EventWrapper`.
    pub(crate) fn wrapper_len(&self) -> usize {
        self.envelope.wrapper_len(self.stored.ordinal, self.stored.publisher.len(), self.stored.body.len())
    }

    /// Writes the encoded `EventWrapper`.
    pub(crate) fn write_wrapper(&self, out: &mut impl BufMut) {
        self.envelope.write_wrapper(&self.stored, out);
    }
}

impl OpenBatch {
    /// Opens a batch that is expected at this partition; `data_key` finds a key that this process does not hold yet.
    ///
    /// # Errors
    /// [`ReadError::Key`], [`ReadError::Corrupt`].
    pub(super) async fn open(
        keys: &dyn Keys,
        context: &PartitionContext,
        batch: &StoredBatch,
        data_key: impl FnOnce(DekId) -> Option<DekRow>,
    ) -> Result<Self, ReadError> {
        let dek = BatchHeader::decode(&batch.sealed).map_err(|error| ReadError::Corrupt { what: error.to_string() })?;
        let dek = dek.header.dek;
        // In use from before it is opened until the caller has handed its events on.
        let in_use = match keys.begin_use(dek) {
            // Perhaps nobody here has asked for it yet, or the lease has just run out.
            Err(KeysError::NotHeld(_) | KeysError::Unavailable(_)) => {
                let row = data_key(dek)
                    .ok_or_else(|| ReadError::Corrupt { what: format!("data key {dek} was never introduced") })?;
                keys.ensure(*context, row.wrapped).await?;
                keys.begin_use(dek)?
            }
            other => other?,
        };
        let plaintext = keys.open(context, &batch.sealed)?;
        Self::new(context.topic, batch, plaintext, in_use).map_err(|what| ReadError::Corrupt { what })
    }

    fn new(topic: TopicId, batch: &StoredBatch, plaintext: PlainBatch, in_use: KeyUse) -> Result<Self, String> {
        let header = BatchHeader::decode(&batch.sealed).map_err(|error| error.to_string())?.header;
        let map = BlockMap::read(plaintext.blocks(), header.count).map_err(|error| error.to_string())?;
        let envelope = Envelope { topic, term: header.term, base: header.base_offset, first_rlid: header.first_id };
        Ok(Self { cursor: map.start(), plaintext, map, envelope, in_use })
    }

    /// Wipes the batch; what was copied out of it is still a use of its key.
    pub(crate) fn into_use(self) -> KeyUse {
        self.in_use
    }

    /// The next event; none after the last.
    pub(crate) fn next(&mut self) -> Option<OpenEvent<'_>> {
        let stored = self.cursor.next(&self.map, self.plaintext.blocks())?;
        Some(OpenEvent { envelope: &self.envelope, stored })
    }
}
