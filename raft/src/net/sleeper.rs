//! What nodes tell each other about groups that sleep: many groups in one message.

use bytes::{BufMut as _, BytesMut};
use ensign_proto::{GroupId, Term};

use crate::codec::{self, Cursor, Malformed, malformed};
use crate::types::LogId;

const WHAT: &str = "a message about sleeping groups";
/// Groups of one message.
pub(crate) const SLEEPERS_MAX: usize = 4096;

/// A group, as its sender knows it: in its request the leader, or who asks for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sleeper {
    pub(crate) group: GroupId,
    pub(crate) term: Term,
    pub(crate) last: Option<LogId>,
}

/// A node's answer about one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It leads the group in that term, the group sleeps, and the logs agree.
    Sleeps,
    /// It leads the group, which is awake now.
    Leads,
    /// It does not lead the group, as far as it knows.
    NotLeader,
}

fn count(cursor: &mut Cursor) -> Result<usize, Malformed> {
    let count = cursor.u32()? as usize;
    (count <= SLEEPERS_MAX).then_some(count).ok_or(malformed(WHAT))
}

pub(super) fn put_sleepers(out: &mut BytesMut, sleepers: &[Sleeper]) {
    out.put_u32(sleepers.len() as u32);
    for sleeper in sleepers {
        out.put_u64(sleeper.group.0);
        out.put_u64(sleeper.term.0);
        codec::put_id_option(out, sleeper.last.as_ref());
    }
}

pub(super) fn sleepers(cursor: &mut Cursor) -> Result<Vec<Sleeper>, Malformed> {
    let sleeper = |cursor: &mut Cursor| {
        Ok(Sleeper { group: GroupId(cursor.u64()?), term: Term(cursor.u64()?), last: cursor.id_option()? })
    };
    (0..count(cursor)?).map(|_| sleeper(cursor)).collect()
}

pub(super) fn put_groups(out: &mut BytesMut, groups: &[GroupId]) {
    out.put_u32(groups.len() as u32);
    for group in groups {
        out.put_u64(group.0);
    }
}

pub(super) fn groups(cursor: &mut Cursor) -> Result<Vec<GroupId>, Malformed> {
    (0..count(cursor)?).map(|_| Ok(GroupId(cursor.u64()?))).collect()
}

pub(super) fn put_verdicts(out: &mut BytesMut, verdicts: &[(GroupId, Verdict)]) {
    out.put_u32(verdicts.len() as u32);
    for (group, verdict) in verdicts {
        out.put_u64(group.0);
        out.put_u8(match verdict {
            Verdict::Sleeps => 1,
            Verdict::Leads => 2,
            Verdict::NotLeader => 3,
        });
    }
}

pub(super) fn verdicts(cursor: &mut Cursor) -> Result<Vec<(GroupId, Verdict)>, Malformed> {
    let verdict = |cursor: &mut Cursor| {
        let group = GroupId(cursor.u64()?);
        let verdict = match cursor.u8()? {
            1 => Verdict::Sleeps,
            2 => Verdict::Leads,
            3 => Verdict::NotLeader,
            _ => return Err(malformed(WHAT)),
        };
        Ok((group, verdict))
    };
    (0..count(cursor)?).map(|_| verdict(cursor)).collect()
}
