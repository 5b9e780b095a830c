use std::sync::atomic::Ordering;

use ensign_proto::{Permission, SessionId};
use futures::FutureExt as _;
use tonic::Code;

use super::*;
use crate::rpc::EVENT_MAX;

#[tokio::test]
async fn every_event_is_acknowledged_in_order_and_the_close_counts_them() {
    let server = Server::start().await;
    let (one, two) = (server.create("one").await, server.create("two.with.dots").await);
    let mut publisher = server.open(api::OpenStream { client_id: "me".to_owned(), ..Default::default() }).await;
    let Some(Ok(api::publisher_reply::Embed::Ready(ready))) = publisher.next().await else { panic!("no ready") };
    assert_eq!((ready.client_id.as_str(), ready.server_id.as_str()), ("me", "1"));
    assert_eq!(ready.topics["one"][..], one.as_bytes()[..]);
    assert_eq!(ready.topics["two.with.dots"][..], two.as_bytes()[..]);
    for n in 0..50_u8 {
        publisher.event(if n % 3 == 0 { one } else { two }, &[n]).await;
    }
    let mut last = 0;
    for n in 1..=50_u64 {
        let ack = publisher.ack().await;
        assert_eq!(ack.id[..], n.to_be_bytes(), "the local id, verbatim, in order");
        let committed = ack.committed.unwrap();
        assert!(committed.seconds > 1_700_000_000 && ack.offset > 0);
        last = ack.offset;
    }
    assert!(last <= 34);
    let totals = publisher.close().await;
    assert_eq!((totals.events, totals.topics, totals.acks, totals.nacks), (50, 2, 50, 0));
}

#[tokio::test]
async fn nothing_is_lost_when_a_client_closes_at_once_or_goes_away() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut publisher = server.publisher().await;
    for n in 0..200_u8 {
        publisher.event(topic, format!("closed {n}").as_bytes()).await;
    }
    assert_eq!(publisher.close().await.acks, 200, "every ack precedes close_stream");
    let mut publisher = server.publisher().await;
    for n in 0..50_u8 {
        publisher.event(topic, format!("cancelled {n}").as_bytes()).await;
    }
    publisher.ack().await;
    drop(publisher);
    let mut count = 0;
    for _ in 0..100 {
        count = server.query("SELECT * FROM listens").await.unwrap().len();
        if count == 250 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(count, 250, "what was received is committed");
}

#[tokio::test]
async fn an_event_that_cannot_be_taken_is_nacked_and_the_stream_lives_on() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut publisher = server.publisher().await;
    let no_topic = api::EventWrapper { event: event(b"x"), ..Default::default() };
    publisher.wrapper(no_topic).await;
    let bad_topic = api::EventWrapper { topic_id: Bytes::from_static(b"short"), ..Default::default() };
    publisher.wrapper(bad_topic).await;
    publisher.event(TopicId::new(1, [1; 10]), b"x").await;
    let too_large = api::EventWrapper {
        topic_id: Bytes::copy_from_slice(topic.as_bytes()),
        event: vec![0; EVENT_MAX + 1].into(),
        ..Default::default()
    };
    publisher.wrapper(too_large.clone()).await;
    publisher.wrapper(api::EventWrapper { event: vec![0; EVENT_MAX].into(), ..too_large }).await;
    let nacks = [
        (2, "no topic id specified"),
        (2, "invalid topic id"),
        (2, "topic unknown or unhandled"),
        (1, "maximum event size has been exceeded"),
    ];
    for (at, (code, error)) in nacks.into_iter().enumerate() {
        let nack = publisher.nack().await;
        assert_eq!((nack.code, nack.error.as_str()), (code, error));
        assert_eq!(nack.id[..], (at as u64 + 1).to_be_bytes());
    }
    publisher.ack().await;
    let totals = publisher.close().await;
    assert_eq!((totals.events, totals.topics, totals.acks, totals.nacks), (1, 1, 1, 4));
}

#[tokio::test]
async fn archived_and_destroyed_topics_are_nacked_on_an_open_stream_and_the_name_is_free_again() {
    let server = Server::start().await;
    let (kept, gone) = (server.create("kept").await, server.create("gone").await);
    let mut publisher = server.publisher().await;
    publisher.event(kept, b"1").await;
    publisher.event(gone, b"1").await;
    publisher.ack().await;
    publisher.ack().await;
    let change = |id: TopicId, operation| server.request(api::TopicMod { id: id.to_string(), operation });
    let reply = server.client().delete_topic(change(kept, 1)).await.unwrap().into_inner();
    assert_eq!(reply.state(), api::TopicState::Readonly);
    let reply = server.client().delete_topic(change(gone, 2)).await.unwrap().into_inner();
    assert_eq!(reply.state(), api::TopicState::Deleting);
    let again = server.client().delete_topic(change(gone, 2)).await.unwrap_err();
    assert_eq!(shown(&again), "FailedPrecondition: cannot archive or destroy a topic that is in the DELETING state");
    publisher.event(kept, b"2").await;
    publisher.event(gone, b"2").await;
    let nack = publisher.nack().await;
    assert_eq!(
        (nack.code(), nack.error.as_str()),
        (api::nack::Code::TopicArchived, "cannot publish to an archived topic")
    );
    let nack = publisher.nack().await;
    assert_eq!((nack.code(), nack.error.as_str()), (api::nack::Code::TopicDeleted, "topic is currently being deleted"));
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if server.catalog.view().topic(gone).is_none() {
            break;
        }
    }
    publisher.event(gone, b"3").await;
    assert_eq!(publisher.nack().await.code(), api::nack::Code::TopicUnknown);
    assert_eq!(server.query("SELECT * FROM kept").await.unwrap(), ["1"], "an archived topic is read on");
    let again = server.create("gone").await;
    assert_ne!(again, gone);
    publisher.event(again, b"4").await;
    publisher.ack().await;
    assert_eq!(server.query("SELECT * FROM gone").await.unwrap(), ["4"], "made anew, also for streams that were open");
}

#[tokio::test]
async fn a_stream_that_does_not_keep_to_the_order_of_messages_ends_with_the_documented_status() {
    let server = Server::start().await;
    let mut early = server.open(api::OpenStream::default()).await;
    assert_eq!(shown(&early.end().await), "FailedPrecondition: no topics available");
    let topic = server.create("listens").await;
    let mut unopened = server.raw_publisher(&server.token).await;
    unopened.event(topic, b"x").await;
    let expected = "FailedPrecondition: an open stream message must be sent immediately after opening the stream";
    assert_eq!(shown(&unopened.end().await), expected);
    let mut twice = server.publisher().await;
    twice.event(topic, b"x").await;
    twice.send(api::publisher_request::Embed::OpenStream(api::OpenStream::default())).await;
    twice.ack().await;
    let Some(Ok(api::publisher_reply::Embed::CloseStream(close))) = twice.next().await else { panic!("no close") };
    assert_eq!(close.acks, 1);
    assert_eq!(shown(&twice.end().await), "Aborted: cannot send multiple open stream messages");
    let empty = server.publisher().await;
    empty.requests.send(api::PublisherRequest { embed: None }).await.unwrap();
    let mut empty = empty;
    assert_eq!(shown(&empty.end().await), "FailedPrecondition: unhandled publisher request message <nil>");
    let filter = api::OpenStream { topics: vec!["other".to_owned(), "no/name".to_owned()], ..Default::default() };
    assert_eq!(shown(&server.open(filter).await.end().await), "FailedPrecondition: no topics available");
    let untouched = server.raw_publisher(&server.token).await;
    let mut untouched = untouched;
    drop(std::mem::replace(&mut untouched.requests, mpsc::channel(1).0));
    assert_eq!(untouched.end().await.code(), Code::Ok);
}

#[tokio::test]
async fn a_stream_is_filtered_by_name_id_or_hash() {
    let server = Server::start().await;
    let (one, two, other) = (server.create("one").await, server.create("two").await, server.create("other").await);
    let hash = ensign_proto::topic_name_hash("one").to_string();
    let topics = vec![hash, two.to_string(), "absent".to_owned()];
    let mut publisher = server.open(api::OpenStream { topics, ..Default::default() }).await;
    let Some(Ok(api::publisher_reply::Embed::Ready(ready))) = publisher.next().await else { panic!("no ready") };
    assert_eq!(ready.topics.len(), 2);
    for topic in [one, two, other] {
        publisher.event(topic, b"x").await;
    }
    publisher.ack().await;
    publisher.ack().await;
    assert_eq!(publisher.nack().await.error, "topic unknown or unhandled");
}

#[tokio::test]
async fn who_may_not_publish_is_told_why() {
    let server = Server::start().await;
    server.create("listens").await;
    let end = async |token: &str| {
        let mut publisher = server.raw_publisher(token).await;
        publisher.send(api::publisher_request::Embed::OpenStream(api::OpenStream::default())).await;
        shown(&publisher.end().await)
    };
    assert_eq!(end("").await, "Unauthenticated: missing credentials");
    assert_eq!(end("not.a.token").await, "Unauthenticated: invalid credentials");
    let mut reader = PermissionSet::EMPTY;
    reader.insert(Permission::Subscriber);
    let (reader, _) = server.token(server.project, reader).await;
    assert_eq!(end(&reader).await, "PermissionDenied: not authorized to perform this action");
    let org = server.catalog.view().project(server.project).unwrap().org;
    let other = server.identity.ensure_project(org, "second").await.unwrap().id;
    let (stranger, _) = server.token(other, PermissionSet::api_key()).await;
    assert_eq!(
        end(&stranger).await,
        "FailedPrecondition: no topics available",
        "topics of other projects are not there"
    );
}

#[tokio::test]
async fn a_revoked_api_key_and_a_stopping_node_end_streams() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let (token, key) = server.token(server.project, PermissionSet::api_key()).await;
    let mut publisher = server.raw_publisher(&token).await;
    publisher.send(api::publisher_request::Embed::OpenStream(api::OpenStream::default())).await;
    publisher.event(topic, b"before").await;
    publisher.next().await.unwrap().unwrap();
    publisher.ack().await;
    server.identity.revoke_api_key(key).await.unwrap();
    assert_eq!(shown(&publisher.end().await), "Unauthenticated: the API key of this stream was revoked");
    let mut publisher = server.publisher().await;
    publisher.event(topic, b"last").await;
    publisher.ack().await;
    server.phase.send_replace(Phase::Stopping);
    assert_eq!(shown(&publisher.end().await), "Unavailable: the node is shutting down");
    assert!(server.tasks.shut_down(Duration::from_secs(10)).await, "every task ends");
}

#[tokio::test]
async fn a_publisher_that_numbers_its_events_may_send_them_again() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let session = SessionId::new(1_700_000_000_000, [5; 10]);
    let open = api::OpenStream {
        producer_session: Bytes::copy_from_slice(session.as_bytes()),
        producer_epoch: 1,
        ..Default::default()
    };
    let mut offsets = Vec::new();
    for _ in 0..2 {
        let mut publisher = server.open(open.clone()).await;
        publisher.next().await.unwrap().unwrap();
        for sequence in 1..=3 {
            let wrapper = api::EventWrapper {
                topic_id: Bytes::copy_from_slice(topic.as_bytes()),
                event: event(format!("{sequence}").as_bytes()),
                producer_sequence: sequence,
                ..Default::default()
            };
            publisher.wrapper(wrapper).await;
        }
        for _ in 0..3 {
            offsets.push(publisher.ack().await.offset);
        }
    }
    assert_eq!(offsets, [1, 2, 3, 1, 2, 3]);
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap(), ["1", "2", "3"]);
    let bad = api::OpenStream { producer_session: Bytes::from_static(b"short"), ..Default::default() };
    assert_eq!(shown(&server.open(bad).await.end().await), "InvalidArgument: invalid producer session field");
}

#[tokio::test]
async fn a_topic_whose_keys_are_revoked_takes_nothing_and_says_why() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    server.publish(topic, &["before"]).await;
    server.keys.revoke_all();
    let mut publisher = server.publisher().await;
    publisher.event(topic, b"after").await;
    let status = publisher.end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("revoked"), "{status:?}");
    let status = server.query("SELECT * FROM listens").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("revoked"), "{status:?}");
}

#[tokio::test]
async fn what_all_streams_have_in_memory_is_bounded_and_they_go_on_when_it_clears() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    server.publish(topic, &["before"]).await;
    // Room for one event of this size; somebody else has the rest.
    let room = &server.shared.publish_room;
    let others = room.acquire(ProjectId::from_bytes([7; 16]), room.left() - (8 << 10)).await;
    let body = [b'x'; 5 << 10];
    server.keys.away.store(true, Ordering::SeqCst);
    let (mut one, mut other) = (server.publisher().await, server.publisher().await);
    one.event(topic, &body).await;
    let taken = async {
        while room.left() >= 4 << 10 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), taken).await.expect("the first event takes its room");
    // Neither the same stream nor another gets more in.
    one.event(topic, &body).await;
    other.event(topic, &body).await;
    assert!(one.replies.message().now_or_never().is_none() && other.replies.message().now_or_never().is_none());
    // Both wait, and nothing more is taken.
    assert!(room.left() > 0 && room.left() < 4 << 10, "{}", room.left());
    server.keys.away.store(false, Ordering::SeqCst);
    one.ack().await;
    one.ack().await;
    other.ack().await;
    assert_eq!((one.close().await.acks, other.close().await.acks), (2, 1));
    assert_eq!(room.left(), 8 << 10, "all of it is given back");
    drop(others);
}

/// A codec that sends bytes as they are.
#[derive(Clone, Copy, Default)]
pub(super) struct RawCodec;

impl tonic::codec::Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl tonic::codec::Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), Status> {
        use bytes::BufMut as _;
        out.put(item);
        Ok(())
    }
}

impl tonic::codec::Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        use bytes::Buf as _;
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

#[tokio::test]
async fn bytes_that_are_no_message_end_the_call_and_nothing_else() {
    let server = Server::start().await;
    server.create("listens").await;
    for method in ["Publish", "Subscribe", "EnSQL", "CreateTopic"] {
        let mut grpc = tonic::client::Grpc::new(server.channel.clone());
        grpc.ready().await.unwrap();
        let request = server.request(futures::stream::iter([Bytes::from_static(b"\xff\xff\xff\xff not protobuf")]));
        let path = format!("/ensign.v1beta1.Ensign/{method}").parse().unwrap();
        let status = match grpc.streaming(request, path, RawCodec).await {
            Err(status) => status,
            Ok(replies) => replies.into_inner().message().await.expect_err("refused"),
        };
        assert_ne!(status.code(), Code::Ok, "{method}");
    }
    assert!(server.query("SELECT * FROM listens").await.unwrap().is_empty(), "the server is well");
}
