//! What this crate writes to the log: entries, votes, marks, snapshots and checkpoints. See docs/format.md.
//!
//! An entry is its body and then one tag byte, format in the high half and kind in the low one. The tag stands last so that
//! a proposal whose buffer keeps [`PROPOSAL_ROOM`] for it is taken as it is (any other is copied once), and a reader gets
//! the body as a slice.
//! Everything else starts with a format byte. Numbers are big-endian. A decoder refuses what it does not know and
//! whatever is left over.

use std::collections::BTreeSet;

use bytes::{BufMut, Bytes, BytesMut};
use ensign_storage::{Entry, EntryId};
use openraft::entry::RaftEntry as _;
use thiserror::Error;

use crate::machine::PROPOSAL_ROOM;
use crate::types::{
    LeaderId, LogId, Membership, Payload, RaftEntry, RaftPayload, SnapshotMeta, StoredMembership, Vote, entry_id,
    log_id,
};

const FORMAT: u8 = 1;
/// Of a vote with a floor.
const FORMAT_FLOOR: u8 = 2;
const TAG_BLANK: u8 = FORMAT << 4;
const TAG_NORMAL: u8 = FORMAT << 4 | 1;
const TAG_MEMBERSHIP: u8 = FORMAT << 4 | 2;
/// More members than any group will have; keeps a length from asking for gigabytes.
const MEMBERS_MAX: usize = 1024;

/// Bytes that were not written by this codec.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("malformed {what}")]
pub(crate) struct Malformed {
    what: &'static str,
}

pub(crate) fn malformed(what: &'static str) -> Malformed {
    Malformed { what }
}

/// Reads from the front of a buffer; everything it gives out shares that buffer.
pub(crate) struct Cursor {
    rest: Bytes,
    what: &'static str,
}

impl Cursor {
    pub(crate) fn new(bytes: Bytes, what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Result<Bytes, Malformed> {
        (count <= self.rest.len()).then(|| self.rest.split_to(count)).ok_or(malformed(self.what))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let bytes = self.bytes(N)?;
        <[u8; N]>::try_from(&bytes[..]).map_err(|_| malformed(self.what))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(crate) fn flag(&mut self) -> Result<bool, Malformed> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(malformed(self.what)),
        }
    }

    pub(crate) fn format(&mut self) -> Result<(), Malformed> {
        (self.u8()? == FORMAT).then_some(()).ok_or(malformed(self.what))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn end(&self) -> Result<(), Malformed> {
        self.rest.is_empty().then_some(()).ok_or(malformed(self.what))
    }

    /// Passes over whatever is left.
    pub(crate) fn skip(&mut self) {
        self.rest.clear();
    }

    pub(crate) fn into_rest(self) -> Bytes {
        self.rest
    }

    pub(crate) fn id(&mut self) -> Result<LogId, Malformed> {
        Ok(LogId::new_term_index(self.u64()?, self.u64()?))
    }

    pub(crate) fn id_option(&mut self) -> Result<Option<LogId>, Malformed> {
        Ok(if self.flag()? { Some(self.id()?) } else { None })
    }

    pub(crate) fn vote(&mut self) -> Result<Vote, Malformed> {
        let leader_id = LeaderId { term: self.u64()?, voted_for: self.u64()? };
        Ok(Vote { leader_id, committed: self.flag()? })
    }

    fn nodes(&mut self) -> Result<BTreeSet<u64>, Malformed> {
        let count = usize::from(self.u16()?);
        if count > MEMBERS_MAX {
            return Err(malformed(self.what));
        }
        let nodes = (0..count).map(|_| self.u64()).collect::<Result<BTreeSet<_>, _>>()?;
        (nodes.len() == count).then_some(nodes).ok_or(malformed(self.what))
    }

    fn membership(&mut self) -> Result<Membership, Malformed> {
        let configs = usize::from(self.u16()?);
        if configs > MEMBERS_MAX {
            return Err(malformed(self.what));
        }
        let configs = (0..configs).map(|_| self.nodes()).collect::<Result<Vec<_>, _>>()?;
        Ok(Membership::new_with_defaults(configs, self.nodes()?))
    }
}

pub(crate) fn put_id(out: &mut BytesMut, id: &LogId) {
    out.put_u64(id.leader_id.term);
    out.put_u64(id.index);
}

pub(crate) fn put_id_option(out: &mut BytesMut, id: Option<&LogId>) {
    out.put_u8(u8::from(id.is_some()));
    if let Some(id) = id {
        put_id(out, id);
    }
}

pub(crate) fn put_vote(out: &mut BytesMut, vote: &Vote) {
    out.put_u64(vote.leader_id.term);
    out.put_u64(vote.leader_id.voted_for);
    out.put_u8(u8::from(vote.committed));
}

fn put_nodes<'a>(out: &mut BytesMut, nodes: impl ExactSizeIterator<Item = &'a u64>) {
    out.put_u16(nodes.len() as u16);
    nodes.for_each(|node| out.put_u64(*node));
}

fn put_membership(out: &mut BytesMut, membership: &Membership) {
    let configs = membership.get_joint_config();
    out.put_u16(configs.len() as u16);
    for voters in configs {
        put_nodes(out, voters.iter());
    }
    let nodes: Vec<u64> = membership.nodes().map(|(id, ())| *id).collect();
    put_nodes(out, nodes.iter());
}

/// Makes a proposal of the proposer's bytes: in place if nobody else holds them and their buffer has [`PROPOSAL_ROOM`], else
/// with one copy that has no room to spare, since a log keeps it in memory.
pub(crate) fn proposal(body: Bytes) -> Payload {
    let copied = |body: &[u8]| {
        let mut copy = BytesMut::with_capacity(body.len() + PROPOSAL_ROOM);
        copy.extend_from_slice(body);
        copy
    };
    let mut buffer = match body.try_into_mut() {
        Ok(own) if own.capacity() - own.len() >= PROPOSAL_ROOM => own,
        Ok(own) => copied(&own),
        Err(shared) => copied(&shared),
    };
    buffer.put_u8(TAG_NORMAL);
    Payload(buffer.freeze())
}

/// The stored bytes of an entry; a proposal's are shared, not copied.
pub(crate) fn stored(payload: &RaftPayload) -> Bytes {
    match payload {
        RaftPayload::Blank => Bytes::from_static(&[TAG_BLANK]),
        RaftPayload::Normal(payload) => payload.0.clone(),
        RaftPayload::Membership(membership) => {
            let mut out = BytesMut::with_capacity(64);
            put_membership(&mut out, membership);
            out.put_u8(TAG_MEMBERSHIP);
            out.freeze()
        }
    }
}

/// What storage keeps of an entry.
pub(crate) fn to_storage(entry: &RaftEntry) -> Entry {
    Entry { id: entry_id(&entry.log_id), payload: stored(&entry.payload) }
}

/// The payload of stored bytes.
pub(crate) fn payload(stored: Bytes) -> Result<RaftPayload, Malformed> {
    const WHAT: &str = "log entry";
    match stored.last() {
        Some(&TAG_BLANK) if stored.len() == 1 => Ok(RaftPayload::Blank),
        Some(&TAG_NORMAL) => Ok(RaftPayload::Normal(Payload(stored))),
        Some(&TAG_MEMBERSHIP) => {
            let mut cursor = Cursor::new(stored.slice(..stored.len() - 1), WHAT);
            let membership = cursor.membership()?;
            cursor.end()?;
            Ok(RaftPayload::Membership(membership))
        }
        _ => Err(malformed(WHAT)),
    }
}

/// An entry read back.
pub(crate) fn from_storage(entry: Entry) -> Result<RaftEntry, Malformed> {
    Ok(RaftEntry::new(log_id(entry.id), payload(entry.payload)?))
}

/// The proposer's bytes of a stored entry, or `None` for Raft's own entries.
pub(crate) fn proposed(stored: &Bytes) -> Option<Bytes> {
    (stored.last() == Some(&TAG_NORMAL)).then(|| stored.slice(..stored.len() - 1))
}

/// The vote, and where the log ended that this replica once gave up.
pub(crate) fn encode_vote(vote: &Vote, floor: Option<&LogId>) -> Bytes {
    let mut out = BytesMut::with_capacity(34);
    out.put_u8(if floor.is_some() { FORMAT_FLOOR } else { FORMAT });
    put_vote(&mut out, vote);
    if let Some(floor) = floor {
        put_id(&mut out, floor);
    }
    out.freeze()
}

pub(crate) fn decode_vote(bytes: Bytes) -> Result<(Vote, Option<LogId>), Malformed> {
    let mut cursor = Cursor::new(bytes, "vote");
    let floored = match cursor.u8()? {
        FORMAT => false,
        FORMAT_FLOOR => true,
        _ => return Err(malformed("vote")),
    };
    let vote = cursor.vote()?;
    let floor = if floored { Some(cursor.id()?) } else { None };
    cursor.end()?;
    Ok((vote, floor))
}

pub(crate) fn encode_mark(id: &LogId) -> Bytes {
    let mut out = BytesMut::with_capacity(17);
    out.put_u8(FORMAT);
    put_id(&mut out, id);
    out.freeze()
}

pub(crate) fn decode_mark(bytes: Bytes) -> Result<LogId, Malformed> {
    let mut cursor = Cursor::new(bytes, "committed mark");
    cursor.format()?;
    let id = cursor.id()?;
    cursor.end()?;
    Ok(id)
}

pub(crate) fn put_meta(out: &mut BytesMut, meta: &SnapshotMeta) {
    out.put_u8(FORMAT);
    put_id_option(out, meta.last_log_id.as_ref());
    put_id_option(out, meta.last_membership.log_id().as_ref());
    put_membership(out, meta.last_membership.membership());
}

pub(crate) fn read_meta(cursor: &mut Cursor) -> Result<SnapshotMeta, Malformed> {
    cursor.format()?;
    let last_log_id = cursor.id_option()?;
    let membership_id = cursor.id_option()?;
    let last_membership = StoredMembership::new(membership_id, cursor.membership()?);
    Ok(SnapshotMeta { last_log_id, last_membership })
}

/// A snapshot or a checkpoint: where it stands, then the machine's bytes.
pub(crate) fn encode_state(meta: &SnapshotMeta, state: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(state.len() + 128);
    put_meta(&mut out, meta);
    out.extend_from_slice(state);
    out.freeze()
}

pub(crate) fn decode_state(bytes: Bytes) -> Result<(SnapshotMeta, Bytes), Malformed> {
    let mut cursor = Cursor::new(bytes, "stored state");
    let meta = read_meta(&mut cursor)?;
    Ok((meta, cursor.into_rest()))
}

/// The place that a state stands for, as storage writes it.
pub(crate) fn state_id(meta: &SnapshotMeta) -> Option<EntryId> {
    meta.last_log_id.as_ref().map(entry_id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn membership() -> Membership {
        Membership::new_with_defaults(vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([2, 3, 4])], [9])
    }

    #[test]
    fn a_proposal_with_room_to_spare_is_not_copied() {
        let mut buffer = BytesMut::with_capacity(64);
        buffer.extend_from_slice(b"sealed");
        let body = buffer.freeze();
        let place = body.as_ptr();
        let payload = proposal(body);
        assert_eq!(payload.0.as_ptr(), place);
        assert_eq!(proposed(&payload.0).unwrap(), &b"sealed"[..]);
    }

    #[test]
    fn a_proposal_without_room_is_copied_once_and_takes_no_more_memory_than_it_needs() {
        let body = Bytes::from(vec![7; 256 << 10]);
        let shared = body.clone();
        for body in [body, Bytes::from(vec![7; 256 << 10])] {
            let stored = proposal(body).0;
            let buffer = stored.try_into_mut().unwrap();
            assert_eq!((buffer.len(), buffer.capacity()), ((256 << 10) + 1, (256 << 10) + 1));
        }
        drop(shared);
    }

    #[test]
    fn an_entry_of_another_format_is_refused() {
        assert!(payload(Bytes::from_static(b"x\x21")).is_err());
        assert!(payload(Bytes::new()).is_err());
        assert!(payload(Bytes::from_static(b"x\x10")).is_err());
    }

    #[test]
    fn a_stored_sample_of_the_first_format_still_opens() {
        let sample = Bytes::from_static(b"\x00\x01\x00\x01\0\0\0\0\0\0\0\x07\x00\x01\0\0\0\0\0\0\0\x07\x12");
        let RaftPayload::Membership(found) = payload(sample).unwrap() else { panic!("not a membership") };
        assert_eq!(found, Membership::new_with_defaults(vec![BTreeSet::from([7])], []));
        let vote = decode_vote(Bytes::from_static(b"\x01\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x02\x01")).unwrap();
        assert_eq!(vote, (Vote::new_committed(5, 2), None));
    }

    proptest! {
        #[test]
        fn entries_survive_storage(body: Vec<u8>, term: u64, index: u64) {
            let id = LogId::new_term_index(term, index);
            for payload in [
                RaftPayload::Blank,
                RaftPayload::Normal(proposal(body.clone().into())),
                RaftPayload::Membership(membership()),
            ] {
                let entry = RaftEntry::new(id, payload);
                prop_assert_eq!(&from_storage(to_storage(&entry)).unwrap(), &entry);
            }
        }

        #[test]
        fn a_truncated_vote_mark_or_state_is_refused(term: u64, node: u64, committed: bool, cut in 0_usize..100) {
            let voted = Vote { leader_id: LeaderId { term, voted_for: node }, committed };
            let floor = committed.then(|| LogId::new_term_index(node, term));
            let vote = encode_vote(&voted, floor.as_ref());
            prop_assert_eq!(decode_vote(vote.clone()).unwrap(), (voted, floor));
            let mark = encode_mark(&LogId::new_term_index(term, node));
            let meta = SnapshotMeta {
                last_log_id: Some(LogId::new_term_index(term, node)),
                last_membership: StoredMembership::new(None, membership()),
            };
            let state = encode_state(&meta, b"");
            prop_assert_eq!(decode_state(state.clone()).unwrap().0, meta);
            if cut < vote.len() { prop_assert!(decode_vote(vote.slice(..cut)).is_err()); }
            if cut < mark.len() { prop_assert!(decode_mark(mark.slice(..cut)).is_err()); }
            if cut < state.len() { prop_assert!(decode_state(state.slice(..cut)).is_err()); }
        }
    }
}
