//! What one client can take of a node: everything that it sends and that has to be kept has a limit, and a status at it.

use ensign_proto::SessionId;
use tonic::Code;

use super::publish::RawCodec;
use super::*;
use crate::rpc::OPENING_MAX;

/// An event whose type has this name.
fn named(topic: TopicId, name: String) -> api::EventWrapper {
    let r#type = Some(api::Type { name, major_version: 1, ..Default::default() });
    let event = api::Event { data: Bytes::from_static(b"x"), mimetype: 1, r#type, ..Default::default() };
    let topic_id = Bytes::copy_from_slice(topic.as_bytes());
    api::EventWrapper { topic_id, event: event.encode_to_vec().into(), ..Default::default() }
}

#[tokio::test]
async fn an_event_of_a_type_with_a_huge_name_is_stored_and_its_name_is_not_counted_by() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut publisher = server.publisher().await;
    publisher.wrapper(named(topic, "n".repeat(256))).await;
    publisher.wrapper(named(topic, "n".repeat(257))).await;
    publisher.wrapper(named(topic, "n".repeat(3_000_000))).await;
    for _ in 0..3 {
        publisher.ack().await;
    }
    let info = server.client().info(server.request(api::InfoRequest::default())).await.unwrap().into_inner();
    assert_eq!(info.events, 3);
    let names: Vec<_> = info.topics[0].types.iter().map(|info| info.r#type.as_ref().unwrap().name.len()).collect();
    assert_eq!(names, [256]);
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap().len(), 3);
}

#[tokio::test]
async fn a_client_id_that_is_too_long_is_refused() {
    let server = Server::start().await;
    server.create("listens").await;
    let expected = "InvalidArgument: invalid client id field: it has 513 bytes, and may have 512 at most";
    let open = |length: usize| api::OpenStream { client_id: "c".repeat(length), ..Default::default() };
    assert_eq!(shown(&server.open(open(513)).await.end().await), expected);
    assert!(server.open(open(512)).await.next().await.unwrap().is_ok());
    let subscription = api::Subscription { client_id: "c".repeat(513), ..Default::default() };
    assert_eq!(shown(&server.raw_subscriber(subscription).await.end().await), expected);
}

#[tokio::test]
async fn a_stream_names_a_thousand_topics_and_no_more() {
    let server = Server::start().await;
    server.create("listens").await;
    let mut topics = vec!["absent".to_owned(); 999];
    topics.push("listens".to_owned());
    let open = api::OpenStream { topics: topics.clone(), ..Default::default() };
    assert!(server.open(open).await.next().await.unwrap().is_ok());
    topics.push("one.more".to_owned());
    let expected = "InvalidArgument: invalid topics field: it names 1001 topics, and may name 1000 at most; \
                    open another stream for the rest, or name none to have all topics of the project";
    let open = api::OpenStream { topics: topics.clone(), ..Default::default() };
    assert_eq!(shown(&server.open(open).await.end().await), expected);
    let subscription = api::Subscription { topics, ..Default::default() };
    assert_eq!(shown(&server.raw_subscriber(subscription).await.end().await), expected);
}

#[tokio::test]
async fn a_local_id_is_answered_verbatim_up_to_its_limit_and_beyond_it_the_stream_ends() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut publisher = server.publisher().await;
    let event = |length: usize| {
        let local_id = Bytes::from(vec![7; length]);
        let topic_id = Bytes::copy_from_slice(topic.as_bytes());
        api::publisher_request::Embed::Event(api::EventWrapper { topic_id, local_id, ..named(topic, "n".to_owned()) })
    };
    for length in [0, 16, 128] {
        publisher.send(event(length)).await;
        assert_eq!(publisher.ack().await.id, vec![7; length]);
    }
    publisher.send(event(129)).await;
    let expected = "InvalidArgument: invalid local id field: it has 129 bytes, and may have 128 at most";
    assert_eq!(shown(&publisher.end().await), expected);
}

#[tokio::test]
async fn a_stream_numbers_events_under_so_many_sessions_and_no_more() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut publisher = server.publisher().await;
    for n in 0..64 {
        let producer_session = Bytes::copy_from_slice(SessionId::new(1_700_000_000_000, [n; 10]).as_bytes());
        let numbered = api::EventWrapper {
            producer_session,
            producer_epoch: 1,
            producer_sequence: 1,
            ..named(topic, "n".to_owned())
        };
        publisher.wrapper(numbered).await;
        publisher.ack().await;
    }
    let producer_session = Bytes::copy_from_slice(SessionId::new(1_700_000_000_000, [64; 10]).as_bytes());
    let numbered =
        api::EventWrapper { producer_session, producer_epoch: 1, producer_sequence: 1, ..named(topic, "n".to_owned()) };
    publisher.wrapper(numbered).await;
    let expected = "InvalidArgument: a stream may carry events of 64 producer sessions: open another stream for more";
    assert_eq!(shown(&publisher.end().await), expected);
}

/// The status of a call that sends `pieces` and then neither more nor its end.
async fn unfinished(server: &Server, token: &str, path: &str, pieces: Vec<Bytes>) -> Status {
    let mut grpc = tonic::client::Grpc::new(server.channel.clone());
    grpc.ready().await.unwrap();
    let pieces = futures::StreamExt::chain(futures::stream::iter(pieces), futures::stream::pending());
    let call = async {
        let request = with_token(pieces, token);
        grpc.streaming(request, path.parse().unwrap(), RawCodec).await?.into_inner().message().await
    };
    let status = tokio::time::timeout(Duration::from_secs(20), call).await.expect("the server answers");
    status.expect_err("refused")
}

const METHODS: [&str; 4] = ["Publish", "Subscribe", "EnSQL", "ListTopics"];

#[tokio::test]
async fn who_is_not_let_in_is_told_so_without_having_sent_anything() {
    let server = Server::start().await;
    let mut creator = PermissionSet::EMPTY;
    creator.insert(ensign_proto::Permission::TopicsCreate);
    let (creator, _) = server.token(server.project, creator).await;
    for method in METHODS {
        let path = format!("/ensign.v1beta1.Ensign/{method}");
        let status = unfinished(&server, "", &path, Vec::new()).await;
        assert_eq!(shown(&status), "Unauthenticated: missing credentials", "{method}");
    }
    for method in ["Publish", "Subscribe", "EnSQL"] {
        let path = format!("/ensign.v1beta1.Ensign/{method}");
        let status = unfinished(&server, &creator, &path, Vec::new()).await;
        assert_eq!(shown(&status), "PermissionDenied: not authorized to perform this action", "{method}");
    }
}

#[tokio::test]
async fn what_opens_a_call_is_small() {
    let server = Server::start().await;
    server.create("listens").await;
    for method in METHODS {
        let path = format!("/ensign.v1beta1.Ensign/{method}");
        let status = unfinished(&server, &server.token, &path, vec![vec![0; OPENING_MAX + 1].into()]).await;
        let expected = match method {
            "ListTopics" => {
                (Code::OutOfRange, "decoded message length too large: found 65537 bytes, the limit is: 65536 bytes")
            }
            _ => (Code::InvalidArgument, "the first message of this call has 65537 bytes, and may have 65536 at most"),
        };
        assert!(status.code() == expected.0 && status.message().contains(expected.1), "{method}: {status:?}");
    }
}

#[tokio::test]
async fn an_answer_of_a_subscriber_is_small() {
    let server = Server::start().await;
    server.create("listens").await;
    let mut subscriber = server.subscribe(api::Subscription::default()).await;
    let ack = api::Ack { id: vec![0; OPENING_MAX].into(), ..Default::default() };
    let embed = Some(api::subscribe_request::Embed::Ack(ack));
    subscriber.requests.send(api::SubscribeRequest { embed }).await.unwrap();
    assert_eq!(subscriber.end().await.code(), Code::OutOfRange);
}

#[tokio::test]
async fn what_waited_for_room_when_its_key_was_revoked_is_not_published() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let (token, key) = server.token(server.project, PermissionSet::api_key()).await;
    let mut publisher = server.raw_publisher(&token).await;
    publisher.send(api::publisher_request::Embed::OpenStream(api::OpenStream::default())).await;
    publisher.next().await.unwrap().unwrap();
    // Somebody else has all the room that there is.
    let room = &server.shared.publish_room;
    let all = room.acquire(ensign_proto::ProjectId::from_bytes([7; 16]), u64::MAX).await;
    publisher.event(topic, b"late").await;
    while room.guests() < 2 {
        tokio::task::yield_now().await;
    }
    server.identity.revoke_api_key(key).await.unwrap();
    drop(all);
    let Some(Ok(api::publisher_reply::Embed::CloseStream(totals))) = publisher.next().await else { panic!("no close") };
    assert_eq!((totals.events, totals.acks), (0, 0));
    assert_eq!(shown(&publisher.end().await), "Unauthenticated: the API key of this stream was revoked");
    assert!(server.query("SELECT * FROM listens").await.unwrap().is_empty());
}

#[tokio::test]
async fn an_operators_key_reads_no_events() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    server.publish(topic, &["secret"]).await;
    let org = server.catalog.view().project(server.project).unwrap().org;
    let permissions = crate::identity::operator_permissions();
    let name = "operator".to_owned();
    let new = NewApiKey { name, org, project: Some(server.project), permissions, admin: true, ring: None };
    let (_, credentials) = server.identity.create_api_key(new).await.unwrap();
    let (id, secret) = (credentials.client_id.as_str(), credentials.secret.expose().to_owned());
    let pair = server.identity.authenticate(id, secret, None, tokio::time::Instant::now()).await.unwrap();
    assert!(!format!("{pair:?}").contains(&pair.access), "a token has no place in a log");
    let topics = server.client().list_topics(with_token(api::PageInfo::default(), &pair.access)).await;
    assert_eq!(topics.unwrap().into_inner().topics.len(), 1, "what there is it may see");
    let query = api::Query { query: "SELECT * FROM listens".to_owned(), ..Default::default() };
    let mut replies = server.client().en_sql(with_token(query, &pair.access)).await.unwrap().into_inner();
    let expected = "PermissionDenied: an operator's key administers the cluster and reads no events: \
                    query with an API key of the project";
    assert_eq!(shown(&replies.message().await.unwrap_err()), expected);
    for method in ["Publish", "Subscribe"] {
        let status = unfinished(&server, &pair.access, &format!("/ensign.v1beta1.Ensign/{method}"), Vec::new()).await;
        assert_eq!(shown(&status), "PermissionDenied: not authorized to perform this action", "{method}");
    }
}
