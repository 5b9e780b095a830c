use tonic::Code;

use super::*;

fn from(start: api::subscription::Start) -> api::Subscription {
    api::Subscription { start: Some(start), ..Default::default() }
}

#[tokio::test]
async fn a_subscriber_gets_what_is_committed_after_ready_and_nothing_older() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    server.publish(topic, &["old"]).await;
    let mut subscriber = server.subscribe(api::Subscription::default()).await;
    server.publish(topic, &["a", "b", "c"]).await;
    let first = subscriber.event().await;
    assert_eq!(data(&first), "a");
    assert_eq!((first.id.len(), first.offset, first.topic_id.len()), (10, 2, 16));
    assert!(first.epoch > 0 && first.committed.is_some() && first.local_id.is_empty());
    let publisher = first.publisher.unwrap();
    assert_eq!(publisher.publisher_id.len(), 26);
    assert!(publisher.ipaddr.starts_with("127.0.0.1:") && publisher.user_agent.contains("tonic"), "{publisher:?}");
    assert_eq!(subscriber.data(2).await, ["b", "c"]);
}

#[tokio::test]
async fn history_and_tail_join_without_a_gap_or_a_repeat() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let texts: Vec<String> = (0..300).map(|n| format!("e{n:04}")).collect();
    let (old, new) = texts.split_at(200);
    for part in old.chunks(20) {
        server.publish(topic, &part.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
    let mut all = server.subscribe(from(api::subscription::Start::Earliest(true))).await;
    let mut some = server.subscribe(from(api::subscription::Start::Offset(151))).await;
    let fifth = {
        let mut events = all.data(4).await;
        let fifth = all.event().await;
        events.push(data(&fifth));
        assert_eq!(events, old[..5]);
        fifth
    };
    let mut after = server.subscribe(from(api::subscription::Start::AfterEvent(fifth.id.clone()))).await;
    let mut since = server.subscribe(from(api::subscription::Start::Time(fifth.committed.unwrap()))).await;
    server.publish(topic, &new.iter().map(String::as_str).collect::<Vec<_>>()).await;
    assert_eq!(all.data(295).await, texts[5..]);
    assert_eq!(some.data(150).await, texts[150..]);
    assert_eq!(after.data(295).await, texts[5..]);
    let first = since.event().await;
    assert!(first.offset <= 5, "the batch's first event is committed at that time, too");
    let bad =
        server.raw_subscriber(from(api::subscription::Start::AfterEvent(Bytes::from_static(b"x")))).await.end().await;
    assert_eq!(shown(&bad), "InvalidArgument: invalid start event id field");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_subscriber_loses_nothing() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut subscriber = server.subscribe(api::Subscription::default()).await;
    let mut publisher = server.publisher().await;
    let body = "x".repeat(4096);
    // More than the windows, the tail and every buffer together hold.
    let count = 6_400;
    for n in 0..count {
        publisher.event(topic, format!("{n:08}{body}").as_bytes()).await;
        if n % 64 == 63 {
            for _ in 0..64 {
                publisher.ack().await;
            }
        }
    }
    publisher.close().await;
    for n in 0..count {
        let event = subscriber.event().await;
        assert_eq!(data(&event)[..8], format!("{n:08}"));
    }
}

#[tokio::test]
async fn half_close_is_answered_with_totals_and_acknowledgements_are_taken_at_any_time() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut subscriber = server.subscribe(api::Subscription::default()).await;
    server.publish(topic, &["a", "b"]).await;
    let ids = [subscriber.event().await.id, subscriber.event().await.id];
    for (at, id) in ids.into_iter().enumerate() {
        let embed = if at == 0 {
            api::subscribe_request::Embed::Ack(api::Ack { id, ..Default::default() })
        } else {
            api::subscribe_request::Embed::Nack(api::Nack { id, code: 100, error: String::new() })
        };
        subscriber.requests.send(api::SubscribeRequest { embed: Some(embed) }).await.unwrap();
    }
    subscriber.requests.send(api::SubscribeRequest { embed: None }).await.unwrap();
    drop(std::mem::replace(&mut subscriber.requests, mpsc::channel(1).0));
    let Some(Ok(api::subscribe_reply::Embed::CloseStream(close))) = subscriber.next().await else { panic!("no close") };
    assert_eq!((close.events, close.topics, close.acks, close.nacks), (2, 1, 1, 1));
    assert!(subscriber.next().await.is_none(), "then OK");
}

#[tokio::test]
async fn a_stream_for_all_topics_takes_those_that_are_made_later() {
    let server = Server::start().await;
    server.create("first").await;
    let mut subscriber = server.subscribe(api::Subscription::default()).await;
    let later = server.create("later").await;
    server.publish(later, &["a"]).await;
    assert_eq!(subscriber.data(1).await, ["a"]);
}

#[tokio::test]
async fn an_event_larger_than_the_client_receives_ends_with_a_clear_status_unless_it_asked_for_more() {
    let server = Server::start().await;
    let topic = server.create("large").await;
    let large = "x".repeat(4_900_000);
    server.publish(topic, &["small", &large, "after"]).await;
    let mut subscriber = server.subscribe(from(api::subscription::Start::Earliest(true))).await;
    assert_eq!(subscriber.data(1).await, ["small"]);
    let status = subscriber.end().await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("offset 2"), "{status:?}");
    let status = server.query("SELECT * FROM large").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    let asked = api::Subscription { message_bytes_max: 16 << 20, ..from(api::subscription::Start::Earliest(true)) };
    let mut subscriber = server.subscribe(asked).await;
    assert_eq!(subscriber.data(3).await, ["small", &large, "after"]);
    assert_eq!(server.query("SELECT * FROM large OFFSET 2").await.unwrap(), ["after"]);
}

#[tokio::test]
async fn a_subscriber_is_refused_with_the_documented_status() {
    let server = Server::start().await;
    let early = server.raw_subscriber(api::Subscription::default()).await.end().await;
    assert_eq!(shown(&early), "FailedPrecondition: no topics available");
    let topic = server.create("listens").await;
    let filter = api::Subscription { topics: vec!["other".to_owned()], ..Default::default() };
    assert_eq!(shown(&server.raw_subscriber(filter).await.end().await), "FailedPrecondition: no topics available");
    let (requests, outgoing) = mpsc::channel(4);
    let ack = api::subscribe_request::Embed::Ack(api::Ack::default());
    requests.send(api::SubscribeRequest { embed: Some(ack) }).await.unwrap();
    let replies = server.client().subscribe(server.request(ReceiverStream::new(outgoing))).await.unwrap().into_inner();
    let status = Subscriber { requests, replies }.end().await;
    assert_eq!(shown(&status), "FailedPrecondition: must send subscription to initialize stream");
    server.publish(topic, &["sealed"]).await;
    let mut live = server.subscribe(api::Subscription::default()).await;
    server.phase.send_replace(Phase::Stopping);
    assert_eq!(shown(&live.end().await), "Unavailable: the node is shutting down");
    server.phase.send_replace(Phase::Serving);
    server.keys.revoke_all();
    let status = server.raw_subscriber(from(api::subscription::Start::Earliest(true))).await.end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("revoked"), "{status:?}");
}

#[tokio::test]
async fn open_streams_end_when_nobody_could_tell_whether_their_key_is_revoked() {
    let server = Server::start().await;
    server.create("listens").await;
    let mut subscriber = server.subscribe(api::Subscription::default()).await;
    let mut publisher = server.publisher().await;
    server.catalog.forget_confirmation();
    for status in [subscriber.end().await, publisher.end().await] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("cannot tell whether API keys were revoked"), "{status:?}");
    }
    // The next call asks the cluster first, and goes on where that answers.
    server.subscribe(api::Subscription::default()).await;
}

#[tokio::test]
async fn a_query_skips_limits_and_says_what_it_cannot_do() {
    let server = Server::start().await;
    let topic = server.create("listens.by.day").await;
    assert!(server.query("SELECT * FROM listens.by.day").await.unwrap().is_empty(), "no rows is OK");
    server.publish(topic, &["1", "2", "3", "4", "5"]).await;
    let cases: [(&str, &[&str]); 6] = [
        ("SELECT * FROM listens.by.day", &["1", "2", "3", "4", "5"]),
        ("select * from listens.by.day limit 2;", &["1", "2"]),
        ("SELECT * FROM listens.by.day OFFSET 3", &["4", "5"]),
        ("SELECT * FROM listens.by.day OFFSET 1 LIMIT 2", &["2", "3"]),
        ("SELECT * FROM listens.by.day OFFSET 99", &[]),
        ("SELECT * FROM listens.by.day LIMIT 0", &[]),
    ];
    for (query, rows) in cases {
        assert_eq!(server.query(query).await.unwrap(), rows, "{query}");
    }
    let refusals = [
        ("", "InvalidArgument: invalid query"),
        ("  ", "InvalidArgument: empty query is invalid"),
        ("SELECT * FROM other", "InvalidArgument: unknown topic in query"),
        ("INSERT INTO topic", "InvalidArgument: syntax error at position 0 near \"INSERT\": invalid query type"),
        (
            "SELECT * FROM listens.by.day WHERE a = 1",
            "Unimplemented: WHERE is not supported yet; supported is SELECT * FROM topic [OFFSET n] [LIMIT n]",
        ),
        (
            "SELECT * FROM listens.by.day.Schema.1",
            "Unimplemented: selecting by schema is not supported yet; supported is SELECT * FROM topic [OFFSET n] [LIMIT n]",
        ),
    ];
    for (query, refusal) in refusals {
        assert_eq!(shown(&server.query(query).await.unwrap_err()), refusal, "{query}");
    }
    let query = api::Query { query: "SELECT * FROM listens.by.day".to_owned(), ..Default::default() };
    let status = server.client().explain(server.request(query)).await.unwrap_err();
    assert_eq!(shown(&status), "Unimplemented: explain query is not implemented yet");
}
