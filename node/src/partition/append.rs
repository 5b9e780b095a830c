//! The unit of appending: consecutive events of one producer, and what became of them.

use std::sync::Arc;

use bytes::Bytes;
use ensign_proto::pb::ensign::peer::v1 as peer;
use ensign_proto::{ByteCount, NodeId, Offset, RingId, SessionId};
use thiserror::Error;

use super::block::BodyShape;
use super::producers::Sequenced;

/// Consecutive events of one producer for one partition. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// Whose, and which.
    pub producer: Sequenced,
    /// The sequence that this producer sent to the partition just before, if known.
    pub previous: Option<u64>,
    /// Who publishes: an encoded `Publisher`.
    pub publisher: Bytes,
    /// The kinds of event in the chunk: encoded `EventKind`s.
    pub kinds: Vec<Bytes>,
    /// Per event, the length of its body.
    pub shapes: Arc<[BodyShape]>,
    /// Per event, its place in `kinds` from 1, or 0.
    pub kind_of: Arc<[u16]>,
    /// The bodies, joined.
    pub bodies: Bytes,
    /// The publisher's own key ring; none for that of the topic.
    pub ring: Option<RingId>,
}

/// A chunk that a peer sent does not hold together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("malformed chunk: {0}")]
pub struct MalformedChunk(&'static str);

impl Chunk {
    /// What it weighs in queues.
    pub fn size(&self) -> ByteCount {
        let kinds: usize = self.kinds.iter().map(|kind| kind.len() + 32).sum();
        ByteCount((self.bodies.len() + self.shapes.len() * 8 + kinds + self.publisher.len() + 128) as u64)
    }

    /// How many events.
    pub fn count(&self) -> u32 {
        self.producer.count
    }

    /// Cuts off the first `count` events, fewer than there are.
    pub(super) fn drop_first(&mut self, count: u32) {
        let at = count as usize;
        let length: usize = self.shapes[..at].iter().map(|shape| shape.length()).sum();
        self.bodies = self.bodies.slice(length..);
        self.shapes = self.shapes[at..].into();
        self.kind_of = self.kind_of[at..].into();
        self.previous = Some(self.producer.first + u64::from(count) - 1);
        self.producer.first += u64::from(count);
        self.producer.count -= count;
    }
}

impl From<&Chunk> for peer::AppendChunk {
    fn from(chunk: &Chunk) -> Self {
        Self {
            session: Bytes::copy_from_slice(chunk.producer.session.as_bytes()),
            epoch: chunk.producer.epoch,
            first: chunk.producer.first,
            previous: chunk.previous,
            publisher: chunk.publisher.clone(),
            kinds: chunk.kinds.clone(),
            lengths: chunk.shapes.iter().map(|shape| shape.to_wire()).collect(),
            kind_of: chunk.kind_of.iter().map(|kind| u32::from(*kind)).collect(),
            bodies: chunk.bodies.clone(),
            ring: chunk.ring.map(|ring| Bytes::copy_from_slice(ring.as_bytes())).unwrap_or_default(),
        }
    }
}

impl TryFrom<peer::AppendChunk> for Chunk {
    type Error = MalformedChunk;

    fn try_from(chunk: peer::AppendChunk) -> Result<Self, MalformedChunk> {
        let session = SessionId::try_from(&chunk.session[..]).map_err(|_| MalformedChunk("session"))?;
        let count = u32::try_from(chunk.lengths.len()).map_err(|_| MalformedChunk("too many events"))?;
        let shapes: Arc<[_]> = chunk.lengths.into_iter().map(BodyShape::from_wire).collect();
        let ring = (!chunk.ring.is_empty()).then(|| RingId::try_from(&chunk.ring[..])).transpose();
        let ring = ring.map_err(|_| MalformedChunk("ring"))?;
        let total: usize = shapes.iter().map(|shape| shape.length()).sum();
        let kinds = chunk.kinds.len() as u32;
        let last = chunk.first.checked_add(u64::from(count));
        if count == 0 || chunk.first == 0 || last.is_none() {
            return Err(MalformedChunk("sequences"));
        }
        if total != chunk.bodies.len() || chunk.kind_of.len() != count as usize || kinds > u32::from(u16::MAX) {
            return Err(MalformedChunk("lengths"));
        }
        if chunk.kind_of.iter().any(|kind| *kind > kinds) {
            return Err(MalformedChunk("kinds"));
        }
        Ok(Self {
            producer: Sequenced { session, epoch: chunk.epoch, first: chunk.first, count },
            previous: chunk.previous,
            publisher: chunk.publisher,
            kinds: chunk.kinds,
            shapes,
            kind_of: chunk.kind_of.into_iter().map(|kind| kind as u16).collect(),
            bodies: chunk.bodies,
            ring,
        })
    }
}

/// Events that were committed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppendedRun {
    /// How many.
    pub count: u32,
    /// The offset of the first.
    pub offset: Offset,
    /// When, in milliseconds since the Unix epoch.
    pub committed_ms: u64,
}

/// Every event of a chunk is committed: on disk on a majority, and applied by the leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// In the order of the chunk; the counts add up to the chunk's.
    pub runs: Vec<AppendedRun>,
}

/// Why a chunk was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum AppendError {
    /// Nothing was appended: ask `leader`, or whoever leads next.
    #[error("not the partition's leader")]
    NotLeader {
        /// The leader, if known.
        leader: Option<NodeId>,
    },
    /// It may yet be committed. A retry under the same sequence is safe.
    #[error("leadership was lost after the events were proposed; they may still be committed")]
    OutcomeUnknown,
    /// Nothing was appended: events before these are missing; start over after `last`.
    #[error("events after sequence {last} are missing")]
    Gap {
        /// The last sequence that is held.
        last: u64,
    },
    /// Nothing was appended: a newer epoch of the session writes.
    #[error("epoch {epoch} of the producer session has taken over")]
    Fenced {
        /// The newest epoch.
        epoch: u32,
    },
    /// Nothing was appended: the session has passed this number over, so its event was refused before or went elsewhere.
    #[error("sequence {sequence} was passed over by its producer session and cannot be used any more")]
    Spent {
        /// The first such number.
        sequence: u64,
    },
    /// Nothing was appended now; whether an earlier attempt did cannot be told any more.
    #[error("the producer session is no longer remembered")]
    Forgotten {
        /// The partition's time, for a new session.
        now_ms: u64,
    },
    /// Nothing was appended: the topic takes no more events.
    #[error("the topic is archived")]
    Archived,
    /// Nothing was appended: the topic is being destroyed or is gone.
    #[error("the topic is being deleted")]
    Deleted,
    /// Nothing was appended: the topic's keys are revoked.
    #[error("the topic's encryption key cannot be used: {detail}")]
    KeyUnusable {
        /// Why.
        detail: String,
    },
    /// Nothing was appended: nothing can be sealed until an operator enables the key or makes another.
    #[error("the topic has no encryption key in use: {detail}")]
    KeyDisabled {
        /// Why, and what to do.
        detail: String,
    },
    /// Nothing was appended: no lease, no quorum at the vault, or too much in flight. Retry later.
    #[error("the partition cannot append now: {detail}")]
    Busy {
        /// Why.
        detail: String,
    },
    /// Nothing was appended: the leader's disk is full. Retry once there is room.
    #[error("the disk of the partition's leader is full")]
    DiskFull,
    /// Nothing was appended, and nothing like it can be.
    #[error("the events are too large for one batch")]
    TooLarge,
}

impl AppendError {
    /// Whether a later attempt may succeed without the publisher's doing.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::NotLeader { .. } | Self::OutcomeUnknown | Self::Gap { .. } | Self::Busy { .. } | Self::DiskFull
        )
    }
}

/// What became of a chunk.
pub type Outcome = Result<Appended, AppendError>;

/// An outcome, as the wire between nodes carries it.
pub(super) fn to_reply(outcome: &Outcome) -> peer::AppendReply {
    let kind = match outcome {
        Ok(appended) => peer::append_reply::Kind::Appended(peer::Appended {
            runs: appended
                .runs
                .iter()
                .map(|run| peer::AppendedRun { count: run.count, offset: run.offset.0, committed_ms: run.committed_ms })
                .collect(),
        }),
        Err(error) => peer::append_reply::Kind::Refused(error.into()),
    };
    peer::AppendReply { kind: Some(kind) }
}

impl From<&AppendError> for peer::Refused {
    fn from(error: &AppendError) -> Self {
        use peer::refused::Reason;
        let mut refused = Self::default();
        let reason = match error {
            AppendError::NotLeader { leader } => {
                refused.leader = leader.map_or(0, |node| node.0);
                Reason::NotLeader
            }
            AppendError::OutcomeUnknown => Reason::OutcomeUnknown,
            AppendError::Gap { last } => {
                refused.last = *last;
                Reason::Gap
            }
            AppendError::Fenced { epoch } => {
                refused.epoch = *epoch;
                Reason::Fenced
            }
            AppendError::Spent { sequence } => {
                refused.last = *sequence;
                Reason::Spent
            }
            AppendError::Forgotten { now_ms } => {
                refused.now_ms = *now_ms;
                Reason::Forgotten
            }
            AppendError::Archived => Reason::Archived,
            AppendError::Deleted => Reason::Deleted,
            AppendError::KeyUnusable { detail } => {
                refused.detail.clone_from(detail);
                Reason::KeyUnusable
            }
            AppendError::KeyDisabled { detail } => {
                refused.detail.clone_from(detail);
                refused.may_return = true;
                Reason::KeyUnusable
            }
            AppendError::Busy { detail } => {
                refused.detail.clone_from(detail);
                Reason::Busy
            }
            AppendError::DiskFull => Reason::DiskFull,
            AppendError::TooLarge => Reason::TooLarge,
        };
        refused.set_reason(reason);
        refused
    }
}

/// An outcome from the wire. A reply that says nothing proves nothing: its outcome is unknown.
pub(super) fn from_reply(reply: peer::AppendReply) -> Outcome {
    match reply.kind {
        Some(peer::append_reply::Kind::Appended(appended)) => Ok(Appended {
            runs: appended
                .runs
                .into_iter()
                .map(|run| AppendedRun { count: run.count, offset: Offset(run.offset), committed_ms: run.committed_ms })
                .collect(),
        }),
        Some(peer::append_reply::Kind::Refused(refused)) => Err(refused.into()),
        None => Err(AppendError::OutcomeUnknown),
    }
}

impl From<peer::Refused> for AppendError {
    fn from(refused: peer::Refused) -> Self {
        use peer::refused::Reason;
        match refused.reason() {
            Reason::NotLeader => Self::NotLeader { leader: (refused.leader != 0).then_some(NodeId(refused.leader)) },
            Reason::Gap => Self::Gap { last: refused.last },
            Reason::Fenced => Self::Fenced { epoch: refused.epoch },
            Reason::Spent => Self::Spent { sequence: refused.last },
            Reason::Forgotten => Self::Forgotten { now_ms: refused.now_ms },
            Reason::Archived => Self::Archived,
            Reason::Deleted => Self::Deleted,
            Reason::KeyUnusable if refused.may_return => Self::KeyDisabled { detail: refused.detail },
            Reason::KeyUnusable => Self::KeyUnusable { detail: refused.detail },
            Reason::Busy => Self::Busy { detail: refused.detail },
            Reason::DiskFull => Self::DiskFull,
            Reason::TooLarge => Self::TooLarge,
            Reason::OutcomeUnknown | Reason::Unknown => Self::OutcomeUnknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk() -> peer::AppendChunk {
        peer::AppendChunk {
            session: Bytes::from_static(&[1; 16]),
            epoch: 1,
            first: 4,
            previous: Some(3),
            publisher: Bytes::from_static(b"p"),
            kinds: vec![Bytes::from_static(b"k")],
            lengths: vec![2, 3],
            kind_of: vec![0, 1],
            bodies: Bytes::from_static(b"abcde"),
            ring: Bytes::from_static(&[5; 16]),
        }
    }

    #[test]
    fn a_chunk_survives_the_way_to_another_node() {
        let there: Chunk = chunk().try_into().unwrap();
        assert_eq!(peer::AppendChunk::from(&there), chunk());
        let plain = peer::AppendChunk { ring: Bytes::new(), ..chunk() };
        assert_eq!(Chunk::try_from(plain).unwrap().ring, None);
    }

    #[test]
    fn a_chunk_that_does_not_hold_together_is_refused() {
        let spoil: [fn(&mut peer::AppendChunk); 7] = [
            |chunk| chunk.session.truncate(15),
            |chunk| chunk.first = 0,
            |chunk| chunk.first = u64::MAX,
            |chunk| chunk.lengths[0] = 9,
            |chunk| chunk.kind_of = vec![0, 2],
            |chunk| chunk.lengths.clear(),
            |chunk| chunk.ring.truncate(15),
        ];
        for spoil in spoil {
            let mut spoilt = chunk();
            spoil(&mut spoilt);
            assert!(Chunk::try_from(spoilt).is_err());
        }
    }

    #[test]
    fn every_refusal_survives_the_way_back() {
        let errors = [
            AppendError::NotLeader { leader: None },
            AppendError::NotLeader { leader: Some(NodeId(3)) },
            AppendError::OutcomeUnknown,
            AppendError::Gap { last: 3 },
            AppendError::Fenced { epoch: 2 },
            AppendError::Spent { sequence: 4 },
            AppendError::Forgotten { now_ms: 9 },
            AppendError::Archived,
            AppendError::Deleted,
            AppendError::KeyUnusable { detail: "revoked".to_owned() },
            AppendError::KeyDisabled { detail: "disabled".to_owned() },
            AppendError::Busy { detail: "no lease".to_owned() },
            AppendError::DiskFull,
            AppendError::TooLarge,
        ];
        for error in errors {
            let reply = to_reply(&Err(error.clone()));
            assert_eq!(from_reply(reply), Err(error));
        }
        assert_eq!(from_reply(peer::AppendReply { kind: None }), Err(AppendError::OutcomeUnknown));
    }
}
