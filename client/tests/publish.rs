//! What a publisher promises while its server misbehaves.

mod support;

use std::time::Duration;

use ensign_client::{BeginWith, CallError, Event, NackCode, PublishError, PublisherOptions};
use support::{SESSION_AFTER, Server, TOPIC};

fn options() -> PublisherOptions {
    PublisherOptions { deadline: Duration::from_secs(20), ..PublisherOptions::default() }
}

#[tokio::test]
async fn what_a_broken_stream_left_unanswered_is_stored_once_and_in_order() {
    let server = Server::start().await;
    server.state().break_publish_after.extend([3, 1, 40, 7]);
    let publisher = server.client().publisher("topic", options()).await.unwrap();
    assert_eq!(publisher.topic(), TOPIC);
    let mut receipts = Vec::new();
    for number in 0..100 {
        receipts.push(publisher.publish(Event::new(number.to_string())).await.unwrap());
    }
    for (number, receipt) in receipts.into_iter().enumerate() {
        let ack = receipt.await.unwrap();
        assert_eq!(ack.offset.unwrap().0, number as u64 + 1);
    }
    publisher.close().await;
    let expected: Vec<_> = (0..100).map(|number| number.to_string()).collect();
    assert_eq!(server.payloads(), expected);
    assert!(server.state().arrived > 100, "nothing was sent twice, so nothing was shown");
    let session = server.state().stored[0].0.clone();
    assert!(server.state().stored.iter().all(|(it, _, _)| *it == session), "the session changed");
}

#[tokio::test]
async fn a_forgotten_session_is_replaced_and_what_was_sent_once_goes_on() {
    let server = Server::start().await;
    server.state().forget_session_after.push_back(2);
    let publisher = server.client().publisher("topic", options()).await.unwrap();
    for number in 0..2 {
        publisher.publish(Event::new(number.to_string())).await.unwrap().await.unwrap();
    }
    // An hour passes.
    let receipts =
        [publisher.publish(Event::new("2")).await.unwrap(), publisher.publish(Event::new("3")).await.unwrap()];
    for receipt in receipts {
        receipt.await.unwrap();
    }
    publisher.close().await;
    assert_eq!(server.payloads(), ["0", "1", "2", "3"]);
    let sessions: Vec<_> = server.state().stored.iter().map(|(session, _, _)| session.clone()).collect();
    assert!(sessions[0] == sessions[1] && sessions[1] != sessions[2] && sessions[2] == sessions[3]);
    let made = sessions[2][..6].iter().fold(0_u64, |ms, byte| ms << 8 | u64::from(*byte));
    assert!(made > SESSION_AFTER, "the server would not know it as younger");
}

#[tokio::test]
async fn an_event_that_may_be_stored_under_a_forgotten_session_is_of_unknown_outcome() {
    let server = Server::start().await;
    server.state().break_publish_after.push_back(1);
    server.state().forget_session_after.extend([9, 0]);
    let publisher = server.client().publisher("topic", options()).await.unwrap();
    let doubtful = publisher.publish(Event::new("0")).await.unwrap();
    assert!(matches!(doubtful.await, Err(PublishError::OutcomeUnknown { cause: Some(_) })));
    publisher.publish(Event::new("1")).await.unwrap().await.unwrap();
    assert_eq!(server.payloads(), ["0", "1"], "nothing twice");
}

#[tokio::test]
async fn a_refused_event_does_not_hold_up_the_others() {
    let server = Server::start().await;
    server.state().refuse = vec![2];
    let publisher = server.client().publisher("topic", options()).await.unwrap();
    let mut receipts = Vec::new();
    for text in ["a", "b", "c"] {
        receipts.push(publisher.publish(Event::new(text)).await.unwrap());
    }
    let mut outcomes = Vec::new();
    for receipt in receipts {
        outcomes.push(receipt.await);
    }
    assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
    assert!(matches!(&outcomes[1], Err(PublishError::Refused { code: NackCode::TopicArchived, .. })), "{outcomes:?}");
    assert_eq!(server.payloads(), ["a", "c"]);
}

#[tokio::test]
async fn an_event_without_an_answer_is_of_unknown_outcome_at_its_deadline() {
    let server = Server::start().await;
    server.state().mute = true;
    let options = PublisherOptions { deadline: Duration::from_millis(300), ..PublisherOptions::default() };
    let publisher = server.client().publisher("topic", options).await.unwrap();
    let receipt = publisher.publish(Event::new("x")).await.unwrap();
    assert!(matches!(receipt.await, Err(PublishError::OutcomeUnknown { cause: None })));
}

#[tokio::test]
async fn an_event_that_no_stream_could_store_says_what_the_last_one_ended_with() {
    let server = Server::start().await;
    server.state().break_publish_after.extend([1; 1000]);
    let options = PublisherOptions { deadline: Duration::from_millis(300), ..PublisherOptions::default() };
    let publisher = server.client().publisher("topic", options).await.unwrap();
    let error = publisher.publish(Event::new("x")).await.unwrap().await.unwrap_err();
    assert!(matches!(error, PublishError::OutcomeUnknown { cause: Some(_) }), "{error:?}");
    assert!(error.to_string().contains("going away"), "{error}");
}

#[tokio::test]
async fn the_window_bounds_what_waits_for_an_answer() {
    let server = Server::start().await;
    server.state().mute = true;
    let options = PublisherOptions { window_events: 3, ..options() };
    let publisher = server.client().publisher("topic", options).await.unwrap();
    for _ in 0..3 {
        publisher.publish(Event::new("x")).await.unwrap();
    }
    let fourth = tokio::time::timeout(Duration::from_millis(200), publisher.publish(Event::new("y"))).await;
    assert!(fourth.is_err(), "the window did not hold");
}

#[tokio::test]
async fn an_event_that_no_server_takes_is_not_sent() {
    let server = Server::start().await;
    let publisher = server.client().publisher("topic", options()).await.unwrap();
    let error = publisher.publish(Event::new(vec![0_u8; 5_300_000])).await.unwrap_err();
    assert!(matches!(error, PublishError::TooLarge { limit: 5_243_000, .. }), "{error}");
    publisher.publish(Event::new("small")).await.unwrap().await.unwrap();
    assert_eq!(server.payloads(), ["small"]);
}

#[tokio::test]
async fn a_key_that_is_revoked_ends_the_publisher() {
    let server = Server::start().await;
    server.state().break_publish_after.push_back(2);
    let publisher = server.client().publisher("topic", options()).await.unwrap();
    publisher.publish(Event::new("x")).await.unwrap().await.unwrap();
    {
        let mut state = server.state();
        state.rejected = state.seen.clone();
        state.login_failures.extend(["403 Forbidden"; 8]);
    }
    // Stored, but its answer is lost with the stream.
    let receipt = publisher.publish(Event::new("y")).await.unwrap();
    assert!(matches!(receipt.await, Err(PublishError::OutcomeUnknown { cause: Some(CallError::Auth(_)) })));
    let error = publisher.publish(Event::new("z")).await.unwrap_err();
    let refused = matches!(&error, PublishError::Stream(CallError::Auth(ensign_client::AuthError::Refused { .. })));
    assert!(refused, "{error}");
}

#[tokio::test]
async fn a_wrong_secret_is_told_at_once() {
    let server = Server::start().await;
    let mut options = server.options();
    options.credentials = ensign_client::Credentials::new("id", "wrong");
    let client = ensign_client::Client::connect(options).unwrap();
    let error = client.publisher("topic", self::options()).await.err().unwrap();
    assert!(matches!(error, CallError::Auth(ensign_client::AuthError::Refused { .. })), "{error}");
    assert_eq!(server.state().logins.len(), 1, "a refused login must not be repeated");
}

#[tokio::test]
async fn a_dead_node_is_passed_over() {
    let server = Server::start().await;
    let mut options = server.options();
    options.endpoints.insert(0, "127.0.0.1:1".to_owned());
    options.begin_with = BeginWith::First;
    let client = ensign_client::Client::connect(options).unwrap();
    let publisher = client.publisher("topic", self::options()).await.unwrap();
    publisher.publish(Event::new("x")).await.unwrap().await.unwrap();
}
