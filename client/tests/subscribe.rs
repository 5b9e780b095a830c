//! What a subscriber promises while its server misbehaves.

mod support;

use std::ops::RangeInclusive;
use std::time::Duration;

use ensign_client::{Event, PublisherOptions, Start, SubscribeError, Subscriber, SubscriberOptions};
use ensign_proto::pb::ensign::v1beta1::subscription::Start as Wire;
use support::Server;

async fn fill(server: &Server, numbers: RangeInclusive<u64>) {
    let publisher = server.client().publisher("topic", PublisherOptions::default()).await.expect("a publisher");
    for number in numbers {
        publisher.publish(Event::new(number.to_string())).await.expect("room");
    }
    publisher.close().await;
}

async fn offsets(subscriber: &mut Subscriber, count: usize) -> Vec<u64> {
    let mut offsets = Vec::new();
    while offsets.len() < count {
        let delivery = subscriber.next().await.expect("an event");
        assert_eq!(delivery.event().expect("bytes of an event").data, delivery.offset.0.to_string().as_bytes());
        offsets.push(delivery.offset.0);
    }
    offsets
}

#[tokio::test]
async fn a_broken_stream_is_resumed_without_a_gap_or_a_repeat() {
    let server = Server::start().await;
    fill(&server, 1..=50).await;
    {
        let mut state = server.state();
        state.break_subscribe_after.extend([0, 7, 1, 20]);
        state.repeat = 3;
    }
    let client = server.client();
    let mut subscriber = client.subscribe("topic", Start::Earliest, SubscriberOptions::default()).await.unwrap();
    assert_eq!(offsets(&mut subscriber, 50).await, (1..=50).collect::<Vec<_>>());
    assert_eq!(server.state().starts[0], Some(Wire::Earliest(true)));
    assert_eq!(server.state().starts[1], Some(Wire::Earliest(true)));
    assert_eq!(server.state().starts[2], Some(Wire::Offset(8)));
}

#[tokio::test]
async fn a_live_stream_that_breaks_before_its_first_event_misses_nothing() {
    let server = Server::start().await;
    fill(&server, 1..=5).await;
    server.state().break_subscribe_after.push_back(0);
    let client = server.client();
    let mut subscriber = client.subscribe("topic", Start::Live, SubscriberOptions::default()).await.unwrap();
    fill(&server, 6..=8).await;
    assert_eq!(offsets(&mut subscriber, 3).await, [6, 7, 8]);
    assert_eq!(server.state().starts[1], Some(Wire::Offset(6)));
}

#[tokio::test]
async fn a_gap_is_an_error_and_stays_one() {
    let server = Server::start().await;
    fill(&server, 1..=5).await;
    server.state().skip = vec![3];
    let client = server.client();
    let mut subscriber = client.subscribe("topic", Start::Earliest, SubscriberOptions::default()).await.unwrap();
    assert_eq!(offsets(&mut subscriber, 2).await, [1, 2]);
    for _ in 0..2 {
        let error = subscriber.next().await.unwrap_err();
        assert!(matches!(error, SubscribeError::Gap { expected, found } if expected.0 == 3 && found.0 == 4), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_is_away_is_reported_and_may_come_back() {
    let server = Server::start().await;
    fill(&server, 1..=1).await;
    let options = SubscriberOptions { patience: Duration::from_millis(200), ..SubscriberOptions::default() };
    server.state().break_subscribe_after.push_back(1);
    let mut subscriber = server.client().subscribe("topic", Start::Earliest, options).await.unwrap();
    server.state().away = true;
    subscriber.next().await.unwrap();
    for _ in 0..2 {
        assert!(matches!(subscriber.next().await, Err(SubscribeError::Unavailable(_))));
    }
    server.state().away = false;
    fill(&server, 2..=2).await;
    assert_eq!(offsets(&mut subscriber, 1).await, [2]);
}
