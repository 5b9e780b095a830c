//! What travels through a pipe. See docs/format.md.
//!
//! ```text
//! frame   = format u8 = 1 ‖ attachments u16 ‖ (length u32 ‖ message)+
//! message = kind u8 ‖ group u64 ‖ call u64 ‖ body
//! ```
//!
//! A frame is one message of the pipe and is followed by its attachments, one message each: the payloads that are too large
//! to be worth a copy. Numbers are big-endian. Whatever does not fit exactly is refused, and with it the pipe.

use bytes::{BufMut, Bytes, BytesMut};
use ensign_proto::{ClusterVersion, GroupId};
use openraft::entry::RaftEntry as _;
use openraft::raft::{
    StreamAppendError, StreamAppendResult, TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};

use crate::codec::{self, Cursor, Malformed, malformed};
use crate::net::sleeper::{self, Sleeper, Verdict};
use crate::types::{AppendRequest, LogId, RaftEntry, SnapshotMeta, Types, Vote};

const FORMAT: u8 = 1;
const WHAT: &str = "peer message";
/// Payloads from this size on are attached instead of copied into the frame.
const ATTACH_MIN: usize = 16 << 10;
/// In an entry's length: the payload is the next attachment.
const ATTACHED: u32 = 1 << 31;
/// Where a frame stops taking messages; one always fits.
const FRAME_FULL: usize = 256 << 10;
const ATTACHMENTS_FULL: usize = 256;
/// The largest frame or attachment that is taken.
pub(crate) const PART_MAX: usize = 64 << 20;

/// A call number that nobody waits for.
pub(crate) const NO_CALL: u64 = 0;
/// The group of messages that concern no single group.
pub(crate) const NO_GROUP: GroupId = GroupId(0);

#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) group: GroupId,
    pub(crate) call: u64,
    pub(crate) body: Body,
}

#[derive(Debug)]
pub(crate) enum Body {
    Request(Request),
    Answer(Answer),
}

#[derive(Debug)]
pub(crate) enum Request {
    /// Stream 0 is a request on its own; the others are answered in order until the first refusal.
    Append {
        stream: u64,
        request: AppendRequest,
    },
    /// The sender has given the stream up. No answer.
    Close {
        stream: u64,
    },
    Vote(VoteRequest<Types>),
    PreVote(VoteRequest<Types>),
    Transfer(TransferLeaderRequest<Types>),
    Snapshot(SnapshotPart),
    Ping,
    /// A ping from node to node that tells which life of the sender asks.
    Alive {
        incarnation: u64,
    },
    /// The sender leads these groups and would have them sleep: does the receiver agree?
    Sleep(Vec<Sleeper>),
    /// The sender asks whether the receiver leads these groups, and whether they sleep as the sender knows them.
    Check(Vec<Sleeper>),
    /// Of a kind that this node does not know, from a newer peer.
    Unknown {
        kind: u8,
    },
}

impl Request {
    /// The oldest version whose nodes know the request. Older ones break the pipe over it, or refuse it.
    pub(crate) fn needs(&self) -> ClusterVersion {
        match self {
            Self::Append { .. }
            | Self::Close { .. }
            | Self::Vote(_)
            | Self::PreVote(_)
            | Self::Transfer(_)
            | Self::Snapshot(_)
            | Self::Ping
            | Self::Unknown { .. } => ClusterVersion::V1,
            Self::Alive { .. } | Self::Sleep(_) | Self::Check(_) => ClusterVersion::V2,
        }
    }
}

/// A piece of a snapshot, from `offset` of `total` bytes.
#[derive(Debug)]
pub(crate) struct SnapshotPart {
    pub(crate) transfer: u64,
    pub(crate) vote: Vote,
    pub(crate) meta: SnapshotMeta,
    pub(crate) total: u64,
    pub(crate) offset: u64,
    pub(crate) data: Bytes,
}

#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Append(StreamAppendResult<Types>),
    Vote(VoteResponse<Types>),
    Transfer(TransferLeaderResponse<Types>),
    /// Send the next piece.
    SnapshotContinue,
    /// Installed, or refused because of a higher vote; the vote tells.
    SnapshotDone(Vote),
    Pong,
    /// Which life of this node answers.
    Alive {
        incarnation: u64,
    },
    /// The groups that sleep here from now on.
    Asleep(Vec<GroupId>),
    Checked(Vec<(GroupId, Verdict)>),
    Refused(Refusal),
    /// Of a kind that this node does not know.
    Unknown {
        kind: u8,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No such group here, or not yet.
    UnknownGroup,
    /// The group's core is down.
    Stopped,
    /// Too much is under way; later.
    Busy,
    /// An earlier request of this stream was refused.
    StreamClosed,
    /// A request of a kind that this node does not know: the asker is newer.
    UnknownKind,
}

/// A frame being filled.
pub(crate) struct Frame {
    head: BytesMut,
    attachments: Vec<Bytes>,
}

impl Frame {
    const EMPTY: usize = 3;

    pub(crate) fn new() -> Self {
        let mut frame = Self { head: BytesMut::new(), attachments: Vec::new() };
        frame.begin();
        frame
    }

    fn begin(&mut self) {
        self.head.reserve(512);
        self.head.put_u8(FORMAT);
        self.head.put_u16(0);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head.len() == Self::EMPTY
    }

    pub(crate) fn is_full(&self) -> bool {
        self.head.len() >= FRAME_FULL || self.attachments.len() >= ATTACHMENTS_FULL
    }

    pub(crate) fn push(&mut self, message: &Message) {
        let at = self.head.len();
        self.head.put_u32(0);
        put(&mut self.head, &mut self.attachments, message);
        let length = (self.head.len() - at - 4) as u32;
        self.head[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }

    /// The frame and its attachments, in the order in which they go out. Leaves an empty frame.
    pub(crate) fn take(&mut self) -> (Bytes, Vec<Bytes>) {
        let count = self.attachments.len() as u16;
        self.head[1..3].copy_from_slice(&count.to_be_bytes());
        let head = self.head.split().freeze();
        self.begin();
        (head, std::mem::take(&mut self.attachments))
    }
}

/// How many attachments follow this frame.
pub(crate) fn attachments(frame: &Bytes) -> Result<usize, Malformed> {
    match frame[..] {
        [FORMAT, high, low, ..] if frame.len() <= PART_MAX => Ok(usize::from(u16::from_be_bytes([high, low]))),
        _ => Err(malformed(WHAT)),
    }
}

/// The messages of a frame; what they carry shares its buffers.
pub(crate) fn decode(frame: Bytes, attached: Vec<Bytes>) -> Result<Vec<Message>, Malformed> {
    if attachments(&frame)? != attached.len() {
        return Err(malformed(WHAT));
    }
    let mut attached = attached.into_iter();
    let mut cursor = Cursor::new(frame.slice(Frame::EMPTY..), WHAT);
    let mut messages = Vec::new();
    while !cursor.is_empty() {
        let length = cursor.u32()? as usize;
        let mut message = Cursor::new(cursor.bytes(length)?, WHAT);
        messages.push(get(&mut message, &mut attached)?);
        message.end()?;
    }
    (!messages.is_empty() && attached.next().is_none()).then_some(messages).ok_or(malformed(WHAT))
}

mod kind {
    pub(super) const APPEND: u8 = 1;
    pub(super) const CLOSE: u8 = 2;
    pub(super) const VOTE: u8 = 3;
    pub(super) const PRE_VOTE: u8 = 4;
    pub(super) const TRANSFER: u8 = 5;
    pub(super) const SNAPSHOT: u8 = 6;
    pub(super) const PING: u8 = 7;
    pub(super) const ALIVE: u8 = 8;
    pub(super) const SLEEP: u8 = 9;
    pub(super) const CHECK: u8 = 10;
    /// Requests are below, answers are from here on.
    pub(super) const ANSWERS: u8 = 128;
    pub(super) const APPENDED: u8 = 129;
    pub(super) const CONFLICT: u8 = 130;
    pub(super) const HIGHER_VOTE: u8 = 131;
    pub(super) const VOTED: u8 = 132;
    pub(super) const TRANSFERRED: u8 = 133;
    pub(super) const VOTE_CHANGED: u8 = 134;
    pub(super) const NOT_FLUSHED: u8 = 135;
    pub(super) const SNAPSHOT_CONTINUE: u8 = 136;
    pub(super) const SNAPSHOT_DONE: u8 = 137;
    pub(super) const PONG: u8 = 138;
    pub(super) const REFUSED: u8 = 139;
    pub(super) const LIVES: u8 = 140;
    pub(super) const ASLEEP: u8 = 141;
    pub(super) const CHECKED: u8 = 142;
}

fn put_payload(out: &mut BytesMut, attachments: &mut Vec<Bytes>, payload: Bytes) {
    let length = payload.len() as u32;
    if payload.len() >= ATTACH_MIN {
        out.put_u32(length | ATTACHED);
        attachments.push(payload);
    } else {
        out.put_u32(length);
        out.extend_from_slice(&payload);
    }
}

fn payload(cursor: &mut Cursor, attached: &mut impl Iterator<Item = Bytes>) -> Result<Bytes, Malformed> {
    let length = cursor.u32()?;
    if length & ATTACHED == 0 {
        return cursor.bytes(length as usize);
    }
    let payload = attached.next().ok_or(malformed(WHAT))?;
    (payload.len() == (length & !ATTACHED) as usize).then_some(payload).ok_or(malformed(WHAT))
}

fn put(out: &mut BytesMut, attachments: &mut Vec<Bytes>, message: &Message) {
    let at = out.len();
    out.put_u8(0);
    out.put_u64(message.group.0);
    out.put_u64(message.call);
    out[at] = match &message.body {
        Body::Request(request) => put_request(out, attachments, request),
        Body::Answer(answer) => put_answer(out, answer),
    };
}

fn put_request(out: &mut BytesMut, attachments: &mut Vec<Bytes>, request: &Request) -> u8 {
    match request {
        Request::Append { stream, request } => {
            out.put_u64(*stream);
            codec::put_vote(out, &request.vote);
            codec::put_id_option(out, request.prev_log_id.as_ref());
            codec::put_id_option(out, request.leader_commit.as_ref());
            out.put_u32(request.entries.len() as u32);
            for entry in &request.entries {
                codec::put_id(out, &entry.log_id);
                put_payload(out, attachments, codec::stored(&entry.payload));
            }
            kind::APPEND
        }
        Request::Close { stream } => {
            out.put_u64(*stream);
            kind::CLOSE
        }
        Request::Vote(request) => put_vote_request(out, request, kind::VOTE),
        Request::PreVote(request) => put_vote_request(out, request, kind::PRE_VOTE),
        Request::Transfer(request) => {
            codec::put_vote(out, request.from_leader());
            out.put_u64(*request.to_node_id());
            codec::put_id_option(out, request.last_log_id());
            kind::TRANSFER
        }
        Request::Snapshot(part) => {
            out.put_u64(part.transfer);
            codec::put_vote(out, &part.vote);
            codec::put_meta(out, &part.meta);
            out.put_u64(part.total);
            out.put_u64(part.offset);
            put_payload(out, attachments, part.data.clone());
            kind::SNAPSHOT
        }
        Request::Ping => kind::PING,
        Request::Alive { incarnation } => {
            out.put_u64(*incarnation);
            kind::ALIVE
        }
        Request::Sleep(sleepers) => {
            sleeper::put_sleepers(out, sleepers);
            kind::SLEEP
        }
        Request::Check(sleepers) => {
            sleeper::put_sleepers(out, sleepers);
            kind::CHECK
        }
        Request::Unknown { kind } => *kind,
    }
}

fn put_vote_request(out: &mut BytesMut, request: &VoteRequest<Types>, kind: u8) -> u8 {
    codec::put_vote(out, &request.vote);
    codec::put_id_option(out, request.last_log_id.as_ref());
    out.put_u8(u8::from(request.leadership_transfer));
    kind
}

fn put_answer(out: &mut BytesMut, answer: &Answer) -> u8 {
    match answer {
        Answer::Append(Ok(matched)) => {
            codec::put_id_option(out, matched.as_ref());
            kind::APPENDED
        }
        Answer::Append(Err(StreamAppendError::Conflict(at))) => {
            codec::put_id(out, at);
            kind::CONFLICT
        }
        Answer::Append(Err(StreamAppendError::HigherVote(vote))) => {
            codec::put_vote(out, vote);
            kind::HIGHER_VOTE
        }
        Answer::Vote(response) => {
            codec::put_vote(out, &response.vote);
            out.put_u8(u8::from(response.vote_granted));
            codec::put_id_option(out, response.last_log_id.as_ref());
            kind::VOTED
        }
        Answer::Transfer(Ok(())) => kind::TRANSFERRED,
        Answer::Transfer(Err(TransferLeaderError::VoteChanged { expected, actual })) => {
            codec::put_vote(out, expected);
            codec::put_vote(out, actual);
            kind::VOTE_CHANGED
        }
        Answer::Transfer(Err(TransferLeaderError::LogNotFlushed { expected, actual })) => {
            codec::put_id_option(out, expected.as_ref());
            codec::put_id_option(out, actual.as_ref());
            kind::NOT_FLUSHED
        }
        Answer::SnapshotContinue => kind::SNAPSHOT_CONTINUE,
        Answer::SnapshotDone(vote) => {
            codec::put_vote(out, vote);
            kind::SNAPSHOT_DONE
        }
        Answer::Pong => kind::PONG,
        Answer::Alive { incarnation } => {
            out.put_u64(*incarnation);
            kind::LIVES
        }
        Answer::Asleep(groups) => {
            sleeper::put_groups(out, groups);
            kind::ASLEEP
        }
        Answer::Checked(verdicts) => {
            sleeper::put_verdicts(out, verdicts);
            kind::CHECKED
        }
        Answer::Unknown { kind } => *kind,
        Answer::Refused(refusal) => {
            out.put_u8(match refusal {
                Refusal::UnknownGroup => 1,
                Refusal::Stopped => 2,
                Refusal::Busy => 3,
                Refusal::StreamClosed => 4,
                Refusal::UnknownKind => 5,
            });
            kind::REFUSED
        }
    }
}

fn get(cursor: &mut Cursor, attached: &mut impl Iterator<Item = Bytes>) -> Result<Message, Malformed> {
    let kind = cursor.u8()?;
    let (group, call) = (GroupId(cursor.u64()?), cursor.u64()?);
    let request = |request| Ok(Message { group, call, body: Body::Request(request) });
    let answer = |answer| Ok(Message { group, call, body: Body::Answer(answer) });
    match kind {
        kind::APPEND => {
            let (stream, append) = (cursor.u64()?, append(cursor, attached)?);
            request(Request::Append { stream, request: append })
        }
        kind::CLOSE => request(Request::Close { stream: cursor.u64()? }),
        kind::VOTE => request(Request::Vote(vote_request(cursor)?)),
        kind::PRE_VOTE => request(Request::PreVote(vote_request(cursor)?)),
        kind::TRANSFER => {
            let (from, to) = (cursor.vote()?, cursor.u64()?);
            request(Request::Transfer(TransferLeaderRequest::new(from, to, cursor.id_option()?)))
        }
        kind::SNAPSHOT => request(Request::Snapshot(SnapshotPart {
            transfer: cursor.u64()?,
            vote: cursor.vote()?,
            meta: codec::read_meta(cursor)?,
            total: cursor.u64()?,
            offset: cursor.u64()?,
            data: payload(cursor, attached)?,
        })),
        kind::PING => request(Request::Ping),
        kind::ALIVE => request(Request::Alive { incarnation: cursor.u64()? }),
        kind::SLEEP => request(Request::Sleep(sleeper::sleepers(cursor)?)),
        kind::CHECK => request(Request::Check(sleeper::sleepers(cursor)?)),
        kind::APPENDED => answer(Answer::Append(Ok(cursor.id_option()?))),
        kind::CONFLICT => answer(Answer::Append(Err(StreamAppendError::Conflict(cursor.id()?)))),
        kind::HIGHER_VOTE => answer(Answer::Append(Err(StreamAppendError::HigherVote(cursor.vote()?)))),
        kind::VOTED => {
            let (vote, granted) = (cursor.vote()?, cursor.flag()?);
            answer(Answer::Vote(VoteResponse { vote, vote_granted: granted, last_log_id: cursor.id_option()? }))
        }
        kind::TRANSFERRED => answer(Answer::Transfer(Ok(()))),
        kind::VOTE_CHANGED => {
            let (expected, actual) = (cursor.vote()?, cursor.vote()?);
            answer(Answer::Transfer(Err(TransferLeaderError::VoteChanged { expected, actual })))
        }
        kind::NOT_FLUSHED => {
            let (expected, actual) = (cursor.id_option()?, cursor.id_option()?);
            answer(Answer::Transfer(Err(TransferLeaderError::LogNotFlushed { expected, actual })))
        }
        kind::SNAPSHOT_CONTINUE => answer(Answer::SnapshotContinue),
        kind::SNAPSHOT_DONE => answer(Answer::SnapshotDone(cursor.vote()?)),
        kind::PONG => answer(Answer::Pong),
        kind::ASLEEP => answer(Answer::Asleep(sleeper::groups(cursor)?)),
        kind::CHECKED => answer(Answer::Checked(sleeper::verdicts(cursor)?)),
        kind::LIVES => answer(Answer::Alive { incarnation: cursor.u64()? }),
        kind::REFUSED => answer(Answer::Refused(match cursor.u8()? {
            1 => Refusal::UnknownGroup,
            2 => Refusal::Stopped,
            3 => Refusal::Busy,
            4 => Refusal::StreamClosed,
            // A reason that only a newer peer knows is a refusal all the same.
            _ => Refusal::UnknownKind,
        })),
        // A newer peer may say more than this node understands: the message is skipped, and its sender told.
        0 => Err(malformed(WHAT)),
        _ => {
            cursor.skip();
            if kind < kind::ANSWERS { request(Request::Unknown { kind }) } else { answer(Answer::Unknown { kind }) }
        }
    }
}

fn append(cursor: &mut Cursor, attached: &mut impl Iterator<Item = Bytes>) -> Result<AppendRequest, Malformed> {
    let vote = cursor.vote()?;
    let (prev_log_id, leader_commit) = (cursor.id_option()?, cursor.id_option()?);
    let count = cursor.u32()?;
    let mut entries: Vec<RaftEntry> = Vec::new();
    let mut next = prev_log_id.as_ref().map_or(0, |prev: &LogId| prev.index.saturating_add(1));
    for _ in 0..count {
        let id = cursor.id()?;
        // A hole would break the log's contract; no honest peer sends one.
        if id.index != next {
            return Err(malformed(WHAT));
        }
        next = next.checked_add(1).ok_or(malformed(WHAT))?;
        entries.push(RaftEntry::new(id, codec::payload(payload(cursor, attached)?)?));
    }
    Ok(AppendRequest { vote, prev_log_id, entries, leader_commit })
}

fn vote_request(cursor: &mut Cursor) -> Result<VoteRequest<Types>, Malformed> {
    let (vote, last_log_id) = (cursor.vote()?, cursor.id_option()?);
    Ok(VoteRequest { vote, last_log_id, leadership_transfer: cursor.flag()? })
}

#[cfg(test)]
mod tests;
