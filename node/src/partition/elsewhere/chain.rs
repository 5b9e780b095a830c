//! The order and completeness of batches that came from elsewhere, checked without a key.

use bytes::Bytes;
use ensign_proto::{Link, LogIndex, Offset, PartitionContext, SealedBytes, genesis, link};
use thiserror::Error;

use crate::partition::tail::StoredBatch;

/// A batch that does not continue what was read before it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum Broken {
    /// It is no batch.
    #[error("the batch for offset {at} is malformed: {what}")]
    Malformed {
        /// Where it was expected.
        at: Offset,
        /// What is wrong.
        what: String,
    },
    /// It belongs elsewhere.
    #[error("the batch at offset {found} does not hold offset {at}")]
    Misplaced {
        /// What was expected.
        at: Offset,
        /// What came.
        found: Offset,
    },
    /// It names another predecessor than the one that was read.
    #[error("the batch at offset {at} does not follow the one before it")]
    Unlinked {
        /// Where it is.
        at: Offset,
    },
}

/// A reader's place: what the next batch has to be.
#[derive(Debug, Clone, Default)]
pub(crate) struct Chain {
    /// The index of the last batch, where its successor begins, and the link that it names.
    last: Option<(LogIndex, Offset, Link)>,
}

impl Chain {
    /// After the batch at `index`.
    pub(crate) fn following(index: LogIndex, next: Offset, link: Link) -> Self {
        Self { last: Some((index, next, link)) }
    }

    /// The batch before `from`, if that is the one that was read last.
    pub(crate) fn before(&self, from: Offset) -> Option<(LogIndex, Link)> {
        self.last.filter(|(_, next, _)| *next == from).map(|(index, _, link)| (index, link))
    }

    /// The batch, if it is the one that holds `from` and follows the one before.
    pub(crate) fn accept(
        &mut self,
        context: &PartitionContext,
        from: Offset,
        (index, bytes): (LogIndex, Bytes),
    ) -> Result<StoredBatch, Broken> {
        let sealed =
            SealedBytes::parse(bytes).map_err(|error| Broken::Malformed { at: from, what: error.to_string() })?;
        let header = sealed.header();
        let (base, end) = (header.base_offset, header.next_offset());
        match self.last {
            Some((_, next, _)) if next == from && base != from => {
                return Err(Broken::Misplaced { at: from, found: base });
            }
            Some((_, next, link)) if next == from && header.prev != link => return Err(Broken::Unlinked { at: from }),
            _ if base > from || end <= from => return Err(Broken::Misplaced { at: from, found: base }),
            _ if base == Offset::FIRST && header.prev != genesis(context) => return Err(Broken::Unlinked { at: from }),
            _ => {}
        }
        let count = header.count;
        self.last = Some((index, end, link(context, &sealed)));
        Ok(StoredBatch { base, count, index, sealed: sealed.into_bytes() })
    }

    /// The batches of a page, of which the first holds `from`. Nothing is taken of a page that is broken anywhere.
    pub(crate) fn accept_all(
        &mut self,
        context: &PartitionContext,
        from: Offset,
        batches: impl IntoIterator<Item = (LogIndex, Bytes)>,
    ) -> Result<Vec<StoredBatch>, Broken> {
        let mut chain = self.clone();
        let mut next = from;
        let mut accepted = Vec::new();
        for batch in batches {
            let batch = chain.accept(context, next, batch)?;
            next = batch.end();
            accepted.push(batch);
        }
        *self = chain;
        Ok(accepted)
    }
}

#[cfg(test)]
mod tests {
    use ensign_proto::{Algorithm, BatchHeader, ClusterId, DekId, Partition, ProjectId, Rlid, Term, TopicId};

    use super::*;

    fn context() -> PartitionContext {
        PartitionContext {
            cluster: ClusterId::from_bytes([1; 16]),
            project: ProjectId::from_bytes([2; 16]),
            topic: TopicId::from_bytes([3; 16]),
            partition: Partition(0),
        }
    }

    /// Three batches of ten events each, one after another.
    fn batches() -> Vec<(LogIndex, Bytes)> {
        let mut prev = genesis(&context());
        let mut batches = Vec::new();
        for n in 0..3_u64 {
            let header = BatchHeader {
                algorithm: Algorithm::default(),
                count: 10,
                term: Term(1),
                base_offset: Offset(1 + n * 10),
                first_id: Rlid::from_bytes([n as u8 + 1; 10]),
                last_id: Rlid::from_bytes([n as u8 + 1; 10]).plus(9),
                dek: DekId::from_bytes([4; 16]),
                prev,
                producers: Vec::new(),
                types: Vec::new(),
                fingerprints: Vec::new(),
            };
            let mut bytes = header.encode(4).unwrap();
            bytes.extend_from_slice(&[n as u8; SealedBytes::OVERHEAD + 4]);
            let sealed = SealedBytes::parse(bytes.into()).unwrap();
            prev = link(&context(), &sealed);
            batches.push((LogIndex(n + 2), sealed.into_bytes()));
        }
        batches
    }

    #[test]
    fn what_follows_is_accepted_from_the_middle_of_a_batch_and_across_pages() {
        let all = batches();
        let mut chain = Chain::default();
        let first = chain.accept_all(&context(), Offset(5), all[..2].to_vec()).unwrap();
        assert_eq!(first.iter().map(|batch| batch.base.0).collect::<Vec<_>>(), [1, 11]);
        assert_eq!(chain.before(Offset(21)).unwrap().0, LogIndex(3));
        assert_eq!(chain.before(Offset(25)), None, "not the next one");
        assert_eq!(chain.accept_all(&context(), Offset(21), all[2..].to_vec()).unwrap()[0].end(), Offset(31));
    }

    #[test]
    fn a_gap_a_repeat_and_a_stranger_are_refused_and_move_nothing() {
        let all = batches();
        let mut chain = Chain::default();
        chain.accept_all(&context(), Offset(1), all[..1].to_vec()).unwrap();
        let gap = chain.accept_all(&context(), Offset(11), all[2..].to_vec());
        assert_eq!(gap, Err(Broken::Misplaced { at: Offset(11), found: Offset(21) }));
        let repeat = chain.accept_all(&context(), Offset(11), all[..1].to_vec());
        assert_eq!(repeat, Err(Broken::Misplaced { at: Offset(11), found: Offset(1) }));
        // A batch of this very place whose predecessor was another one.
        let mut other = all[0].1.to_vec();
        *other.last_mut().unwrap() ^= 1;
        let mut forked = Chain::default();
        forked.accept_all(&context(), Offset(1), [(LogIndex(2), other.into())]).unwrap();
        let unlinked = forked.accept_all(&context(), Offset(11), all[1..2].to_vec());
        assert_eq!(unlinked, Err(Broken::Unlinked { at: Offset(11) }));
        let malformed = chain.accept_all(&context(), Offset(11), [(LogIndex(9), Bytes::from_static(b"no batch"))]);
        assert!(matches!(malformed, Err(Broken::Malformed { .. })), "{malformed:?}");
        // A page that breaks in its middle is taken in no part.
        let half = vec![all[1].clone(), all[0].clone()];
        assert!(chain.accept_all(&context(), Offset(11), half).is_err());
        assert_eq!(chain.accept_all(&context(), Offset(11), all[1..].to_vec()).unwrap().len(), 2);
    }

    #[test]
    fn a_first_batch_has_no_predecessor_but_the_beginning() {
        let mut elsewhere = context();
        elsewhere.partition = Partition(1);
        let refused = Chain::default().accept_all(&elsewhere, Offset(1), batches()[..1].to_vec());
        assert_eq!(refused, Err(Broken::Unlinked { at: Offset(1) }));
    }
}
