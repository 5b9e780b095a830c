//! From chunks to the header and plaintext of a batch.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use ensign_keyvault::{BatchFull, PlainBatch};
use ensign_proto::{Algorithm, BatchHeader, DekId, Link, Offset, PartitionContext, ProducerRow, Rlid, Term, TypeRow};

use super::append::Chunk;
use super::batcher::BatcherParts;
use super::block::{self, BlockRun, Envelope};

/// The place that a batch is sealed for.
pub(super) struct Place {
    pub(super) term: Term,
    pub(super) base: Offset,
    pub(super) first_id: Rlid,
    pub(super) prev: Link,
    pub(super) dek: DekId,
}

/// A batch before it is sealed.
pub(super) struct Draft {
    pub(super) header: BatchHeader,
    pub(super) payload: PlainBatch,
    /// Its size before it is sealed.
    pub(super) bytes: usize,
}

/// Drafts a batch of `chunks`, of which there is at least one.
///
/// # Errors
/// The events do not fit into one batch.
pub(super) fn draft(
    chunks: &[&Chunk],
    place: &Place,
    context: &PartitionContext,
    kinds: &HashMap<Bytes, u32>,
) -> Result<Draft, BatchFull> {
    let count: u32 = chunks.iter().map(|chunk| chunk.count()).sum();
    let header = BatchHeader {
        algorithm: Algorithm::default(),
        count,
        term: place.term,
        base_offset: place.base,
        first_id: place.first_id,
        last_id: place.first_id.plus(u64::from(count) - 1),
        dek: place.dek,
        prev: place.prev,
        producers: producer_rows(chunks),
        types: type_rows(chunks, place, context, kinds),
        fingerprints: Vec::new(),
    };
    let runs: Vec<_> = chunks
        .iter()
        .map(|chunk| BlockRun { publisher: &chunk.publisher, shapes: &chunk.shapes, bodies: &chunk.bodies })
        .collect();
    let bytes = block::encoded_len(&runs);
    let mut payload = PlainBatch::with_capacity(bytes);
    payload.append_with(bytes, |mut slot| block::encode(&runs, &mut slot))?;
    Ok(Draft { header, payload, bytes })
}

/// A row per run of consecutive sequences, in the order of the events.
fn producer_rows(chunks: &[&Chunk]) -> Vec<ProducerRow> {
    let mut rows: Vec<ProducerRow> = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let events = &chunk.producer;
        match rows.last_mut() {
            Some(row)
                if row.session == events.session
                    && row.epoch == events.epoch
                    && row.first_sequence + u64::from(row.count) == events.first =>
            {
                row.count += events.count;
            }
            _ => rows.push(ProducerRow {
                session: events.session,
                epoch: events.epoch,
                first_sequence: events.first,
                count: events.count,
            }),
        }
    }
    rows
}

/// Events and delivered bytes by type; handle 0 stands for events without a known one.
fn type_rows(
    chunks: &[&Chunk],
    place: &Place,
    context: &PartitionContext,
    kinds: &HashMap<Bytes, u32>,
) -> Vec<TypeRow> {
    let envelope = Envelope { topic: context.topic, term: place.term, base: place.base, first_rlid: place.first_id };
    let mut rows: BTreeMap<u32, TypeRow> = BTreeMap::new();
    let mut ordinal = 0;
    for chunk in chunks {
        let handles: Vec<u32> = chunk.kinds.iter().map(|kind| kinds.get(kind).copied().unwrap_or(0)).collect();
        for (shape, kind) in chunk.shapes.iter().zip(chunk.kind_of.iter()) {
            let handle = usize::from(*kind).checked_sub(1).and_then(|at| handles.get(at)).copied().unwrap_or(0);
            let row = rows.entry(handle).or_insert(TypeRow { handle, count: 0, bytes: 0 });
            row.count += 1;
            row.bytes += envelope.wrapper_len(ordinal, chunk.publisher.len(), shape.length()) as u64;
            ordinal += 1;
        }
    }
    rows.into_values().collect()
}

/// The kinds that the partition counts, as far as their names can be opened. A kind whose key is gone gets a new handle.
pub(super) async fn known_kinds(parts: &BatcherParts) -> HashMap<Bytes, u32> {
    let (context, types, deks) = parts.group.inspect(|machine| {
        let state = machine.state();
        (*machine.context(), state.types.clone(), state.deks.clone())
    });
    let names = super::types::open_names(&*parts.keys, &context, &deks, &types).await;
    let mut kinds = HashMap::with_capacity(types.len());
    for (counted, name) in types.iter().zip(names) {
        if let Some(name) = name {
            kinds.entry(name).or_insert(counted.handle);
        }
    }
    kinds
}
