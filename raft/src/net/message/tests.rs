use std::collections::BTreeSet;

use ensign_proto::Term;
use openraft::raft::VoteResponse;
use proptest::prelude::*;

use super::*;
use crate::types::{LeaderId, Membership, RaftPayload, StoredMembership};

fn id() -> impl Strategy<Value = LogId> {
    (0..9_u64, 0..99_u64).prop_map(|(term, index)| LogId::new_term_index(term, index))
}

fn vote() -> impl Strategy<Value = Vote> {
    (0..9_u64, 0..5_u64, any::<bool>())
        .prop_map(|(term, voted_for, committed)| Vote { leader_id: LeaderId { term, voted_for }, committed })
}

fn body_bytes() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from),
        (ATTACH_MIN - 2..ATTACH_MIN + 9).prop_map(|length| Bytes::from(vec![7; length])),
    ]
}

fn membership() -> Membership {
    Membership::new_with_defaults(vec![BTreeSet::from([1, 2, 3])], [4])
}

fn append() -> impl Strategy<Value = Request> {
    let entries = prop::collection::vec((0..9_u64, body_bytes(), 0..3_u8), 0..6);
    (any::<u64>(), vote(), prop::option::of(id()), prop::option::of(id()), entries).prop_map(
        |(stream, vote, prev_log_id, leader_commit, entries)| {
            let first = prev_log_id.map_or(0, |prev| prev.index + 1);
            let entries = entries.into_iter().zip(first..).map(|((term, bytes, kind), index)| {
                let payload = match kind {
                    0 => RaftPayload::Blank,
                    1 => RaftPayload::Normal(codec::proposal(bytes)),
                    _ => RaftPayload::Membership(membership()),
                };
                RaftEntry::new(LogId::new_term_index(term, index), payload)
            });
            let entries = entries.collect();
            Request::Append { stream, request: AppendRequest { vote, prev_log_id, entries, leader_commit } }
        },
    )
}

fn sleepers() -> impl Strategy<Value = Vec<Sleeper>> {
    let sleeper = (any::<u64>(), any::<u64>(), prop::option::of(id())).prop_map(|(group, term, last)| Sleeper {
        group: GroupId(group),
        term: Term(term),
        last,
    });
    prop::collection::vec(sleeper, 0..5)
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![Just(Verdict::Sleeps), Just(Verdict::Leads), Just(Verdict::NotLeader)]
}

fn request() -> impl Strategy<Value = Request> {
    let vote_request = || {
        (vote(), prop::option::of(id()), any::<bool>())
            .prop_map(|(vote, last_log_id, leadership_transfer)| VoteRequest { vote, last_log_id, leadership_transfer })
    };
    let snapshot =
        (vote(), id(), any::<u64>(), any::<u64>(), body_bytes()).prop_map(|(vote, id, total, offset, data)| {
            let last_membership = StoredMembership::new(Some(id), membership());
            let meta = SnapshotMeta { last_log_id: Some(id), last_membership };
            Request::Snapshot(SnapshotPart { transfer: 3, vote, meta, total, offset, data })
        });
    prop_oneof![
        4 => append(),
        1 => any::<u64>().prop_map(|stream| Request::Close { stream }),
        1 => vote_request().prop_map(Request::Vote),
        1 => vote_request().prop_map(Request::PreVote),
        1 => (vote(), any::<u64>(), prop::option::of(id()))
            .prop_map(|(from, to, last)| Request::Transfer(TransferLeaderRequest::new(from, to, last))),
        1 => snapshot,
        1 => Just(()).prop_map(|()| Request::Ping),
        1 => any::<u64>().prop_map(|incarnation| Request::Alive { incarnation }),
        1 => sleepers().prop_map(Request::Sleep),
        1 => sleepers().prop_map(Request::Check),
    ]
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        prop::option::of(id()).prop_map(|id| Answer::Append(Ok(id))),
        id().prop_map(|id| Answer::Append(Err(StreamAppendError::Conflict(id)))),
        vote().prop_map(|vote| Answer::Append(Err(StreamAppendError::HigherVote(vote)))),
        (vote(), prop::option::of(id()), any::<bool>())
            .prop_map(|(vote, last, granted)| Answer::Vote(VoteResponse::new(vote, last, granted))),
        Just(Answer::Transfer(Ok(()))),
        (vote(), vote()).prop_map(|(expected, actual)| {
            Answer::Transfer(Err(TransferLeaderError::VoteChanged { expected, actual }))
        }),
        (prop::option::of(id()), prop::option::of(id())).prop_map(|(expected, actual)| {
            Answer::Transfer(Err(TransferLeaderError::LogNotFlushed { expected, actual }))
        }),
        Just(Answer::SnapshotContinue),
        vote().prop_map(Answer::SnapshotDone),
        Just(Answer::Pong),
        any::<u64>().prop_map(|incarnation| Answer::Alive { incarnation }),
        prop::collection::vec(any::<u64>().prop_map(GroupId), 0..5).prop_map(Answer::Asleep),
        prop::collection::vec((any::<u64>().prop_map(GroupId), verdict()), 0..5).prop_map(Answer::Checked),
        prop_oneof![
            Just(Refusal::UnknownGroup),
            Just(Refusal::Stopped),
            Just(Refusal::Busy),
            Just(Refusal::StreamClosed),
            Just(Refusal::UnknownKind)
        ]
        .prop_map(Answer::Refused),
    ]
}

fn message() -> impl Strategy<Value = Message> {
    let body = prop_oneof![request().prop_map(Body::Request), answer().prop_map(Body::Answer)];
    (any::<u64>(), any::<u64>(), body).prop_map(|(group, call, body)| Message { group: GroupId(group), call, body })
}

fn frame(messages: &[Message]) -> (Bytes, Vec<Bytes>) {
    let mut frame = Frame::new();
    for message in messages {
        frame.push(message);
    }
    frame.take()
}

proptest! {
    #[test]
    fn a_frame_comes_back_as_it_was(messages in prop::collection::vec(message(), 1..5)) {
        let (head, attached) = frame(&messages);
        let back = decode(head.clone(), attached.clone()).unwrap();
        prop_assert_eq!(frame(&back), (head, attached));
    }

    #[test]
    fn every_truncation_of_a_frame_is_refused(message in message(), cut: prop::sample::Index) {
        let (head, attached) = frame(&[message]);
        prop_assert!(decode(head.slice(..cut.index(head.len())), attached).is_err());
    }

    #[test]
    fn a_missing_longer_or_extra_attachment_is_refused(message in message(), extra in body_bytes()) {
        let (head, attached) = frame(&[message]);
        let mut more = attached.clone();
        more.push(extra);
        prop_assert!(decode(head.clone(), more).is_err());
        if !attached.is_empty() {
            prop_assert!(decode(head.clone(), attached[1..].to_vec()).is_err());
            let mut longer = attached;
            longer[0] = Bytes::from([&longer[0][..], b"x"].concat());
            prop_assert!(decode(head, longer).is_err());
        }
    }

    #[test]
    fn flipped_bits_never_panic(message in message(), at: prop::sample::Index, bit in 0..8_u8) {
        let (head, attached) = frame(&[message]);
        let mut bytes = head.to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let _ = decode(bytes.into(), attached);
    }
}

#[test]
fn a_large_payload_is_attached_and_not_copied() {
    let payload = codec::proposal(Bytes::from(vec![1; 256 << 10]));
    let place = payload.0.as_ptr();
    let vote = Vote::new_committed(1, 1);
    let entries = vec![RaftEntry::new(LogId::new_term_index(1, 0), RaftPayload::Normal(payload))];
    let request = AppendRequest { vote, prev_log_id: None, entries, leader_commit: None };
    let body = Body::Request(Request::Append { stream: 1, request });
    let (head, attached) = frame(&[Message { group: GroupId(16), call: 1, body }]);
    assert!(head.len() < 200);
    assert_eq!(attached[0].as_ptr(), place);
    let back = decode(head, attached).unwrap();
    let Body::Request(Request::Append { request, .. }) = &back[0].body else { panic!("not an append") };
    assert_eq!(codec::stored(&request.entries[0].payload).as_ptr(), place);
}

#[test]
fn another_format_is_refused() {
    let (head, attached) = frame(&[Message { group: GroupId(1), call: 1, body: Body::Request(Request::Ping) }]);
    let mut bytes = head.to_vec();
    bytes[0] = 2;
    assert!(decode(bytes.into(), attached).is_err());
}

#[test]
fn a_stored_sample_of_the_first_format_still_opens() {
    // A heartbeat of node 2 in term 5 for group 16, call 9, after entry 4.7, committed through 4.6.
    let sample = b"\x01\0\0\0\0\0\x50\x01\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\0\
        \0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x02\x01\
        \x01\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x07\x01\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x06\0\0\0\0";
    let messages = decode(Bytes::from_static(sample), Vec::new()).unwrap();
    assert_eq!((messages[0].group, messages[0].call), (GroupId(16), 9));
    let Body::Request(Request::Append { stream: 0, request }) = &messages[0].body else { panic!("not a beat") };
    assert_eq!(request.vote, Vote::new_committed(5, 2));
    assert_eq!(request.prev_log_id, Some(LogId::new_term_index(4, 7)));
}

#[test]
fn messages_of_a_newer_peer_are_skipped_and_the_rest_of_the_frame_is_read() {
    // A request of kind 0x7f with three bytes of body, an answer of kind 0xfe without, then a ping.
    let sample = b"\x01\0\0\
        \0\0\0\x14\x7f\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x09new\
        \0\0\0\x11\xfe\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x0a\
        \0\0\0\x11\x07\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x0b";
    let messages = decode(Bytes::from_static(sample), Vec::new()).unwrap();
    assert!(matches!(messages[0].body, Body::Request(Request::Unknown { kind: 0x7f })), "{messages:?}");
    assert_eq!((messages[0].group, messages[0].call), (GroupId(16), 9), "its sender can be told");
    assert!(matches!(messages[1].body, Body::Answer(Answer::Unknown { kind: 0xfe })), "{messages:?}");
    assert!(matches!(messages[2].body, Body::Request(Request::Ping)), "{messages:?}");
}
