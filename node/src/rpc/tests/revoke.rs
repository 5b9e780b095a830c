//! Streams while keys are rotated and revoked, with the keys of a real vault.

use ensign_proto::{KeyVersion, RingId};
use tonic::Code;

use super::*;

impl Server {
    fn ring(&self) -> RingId {
        self.catalog.view().project(self.project).unwrap().ring
    }
}

fn earliest() -> api::Subscription {
    api::Subscription { start: Some(api::subscription::Start::Earliest(true)), ..Default::default() }
}

/// The revocation, which has to come to its end by itself.
async fn revoke(vault: &TestVault, ring: RingId, version: Option<KeyVersion>) {
    let revoked = vault.revoke(ring, version);
    tokio::time::timeout(Duration::from_secs(20), revoked).await.expect("every use of the key ends");
}

#[tokio::test]
async fn idle_streams_are_told_when_their_ring_is_revoked() {
    let (server, vault) = Server::start_sealed().await;
    let topic = server.create("listens").await;
    server.publish(topic, &["old"]).await;
    let mut at_tail = server.subscribe(api::Subscription::default()).await;
    let mut has_read = server.subscribe(earliest()).await;
    assert_eq!(has_read.data(1).await, ["old"]);
    let mut published = server.publisher().await;
    published.event(topic, b"new").await;
    published.ack().await;
    assert_eq!((at_tail.data(1).await, has_read.data(1).await), (vec!["new".to_owned()], vec!["new".to_owned()]));
    let mut silent = server.publisher().await;

    let ring = server.ring();
    revoke(&vault, ring, None).await;
    let unreadable = format!("FailedPrecondition: these events cannot be read any more: key ring {ring} was revoked");
    assert_eq!(shown(&at_tail.end().await), unreadable);
    assert_eq!(shown(&has_read.end().await), unreadable);
    let unwritable = format!("FailedPrecondition: the topic cannot be written: key ring {ring} was revoked");
    assert_eq!(shown(&published.end().await), unwritable);
    assert_eq!(shown(&silent.end().await), unwritable);
    // Those that come later learn it at once, although they wait for events that are yet to come.
    assert_eq!(shown(&server.subscribe(api::Subscription::default()).await.end().await), unreadable);
    let mut late = server.publisher().await;
    late.event(topic, b"too late").await;
    let status = late.end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("revoked"), "{status:?}");
}

/// The same for taking something out of use.
async fn disable(vault: &TestVault, ring: RingId, version: Option<KeyVersion>) {
    let disabled = vault.disable(ring, version);
    tokio::time::timeout(Duration::from_secs(20), disabled).await.expect("every use of the key ends").unwrap();
}

/// Publishes until an event is stored: holders of this double hear that a key is enabled when they renew.
async fn stored(publisher: &mut Publisher, topic: TopicId, text: &str) {
    let settled = async {
        loop {
            publisher.event(topic, text.as_bytes()).await;
            match publisher.next().await.unwrap().unwrap() {
                api::publisher_reply::Embed::Ack(_) => return,
                api::publisher_reply::Embed::Nack(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                other => panic!("neither an ack nor a nack: {other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), settled).await.expect("publishing goes on");
}

#[tokio::test]
async fn a_disabled_ring_tells_its_readers_and_refuses_events_until_it_is_enabled() {
    let (server, vault) = Server::start_sealed().await;
    let topic = server.create("listens").await;
    server.publish(topic, &["old"]).await;
    let mut at_tail = server.subscribe(api::Subscription::default()).await;
    let mut publisher = server.publisher().await;
    publisher.event(topic, b"before").await;
    publisher.ack().await;
    assert_eq!(at_tail.data(1).await, ["before"]);
    let ring = server.ring();
    disable(&vault, ring, None).await;

    let why = format!("key ring {ring} is disabled until `ensign key enable --ring {ring} --all`");
    let unreadable = format!("FailedPrecondition: these events cannot be read now: {why}");
    assert_eq!(shown(&at_tail.end().await), unreadable, "who waits for more is told");
    let past = format!("{unreadable}; reading topic listens can go on at offset 3");
    assert_eq!(shown(&server.query("SELECT * FROM listens").await.unwrap_err()), past);
    assert_eq!(shown(&server.subscribe(earliest()).await.end().await), unreadable);
    publisher.event(topic, b"meanwhile").await;
    let nack = publisher.nack().await;
    assert_eq!(nack.code(), api::nack::Code::PermissionDenied);
    assert_eq!(nack.error, format!("the topic cannot be written now: {why}"));

    vault.enable(ring, None);
    stored(&mut publisher, topic, "after").await;
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap(), ["old", "before", "after"], "on the same stream");
}

#[tokio::test]
async fn publishing_without_an_active_version_is_nacked_with_the_remedy_and_goes_on_when_that_is_taken() {
    let (server, vault) = Server::start_sealed().await;
    let topic = server.create("listens").await;
    server.publish(topic, &["first era"]).await;
    let mut publisher = server.publisher().await;
    let ring = server.ring();
    revoke(&vault, ring, Some(KeyVersion(1))).await;
    publisher.event(topic, b"no key").await;
    let nack = publisher.nack().await;
    let expected = format!(
        "the topic cannot be written now: key ring {ring} has no active version: `ensign key rotate --ring {ring}` makes one"
    );
    assert_eq!(nack.error, expected);
    vault.rotate(ring);
    stored(&mut publisher, topic, "second era").await;

    disable(&vault, ring, Some(KeyVersion(2))).await;
    publisher.event(topic, b"no key either").await;
    let nack = publisher.nack().await;
    let enable = format!("`ensign key enable --ring {ring} --version 2` takes it back into use");
    assert!(nack.error.contains(&enable), "{}", nack.error);
    let mut reader = server.subscribe(earliest()).await;
    let status = reader.end().await;
    assert!(status.message().contains("version 1 of key ring"), "{status:?}");
    vault.enable(ring, Some(KeyVersion(2)));
    stored(&mut publisher, topic, "the same era").await;
}

#[tokio::test]
async fn revoking_a_version_ends_only_those_who_read_what_it_sealed() {
    let (server, vault) = Server::start_sealed().await;
    let topic = server.create("listens").await;
    let mut at_tail = server.subscribe(api::Subscription::default()).await;
    server.publish(topic, &["first era"]).await;
    assert_eq!(at_tail.data(1).await, ["first era"]);
    let ring = server.ring();
    vault.rotate(ring);
    let mut publisher = server.publisher().await;
    revoke(&vault, ring, Some(KeyVersion(1))).await;
    publisher.event(topic, b"second era").await;
    publisher.ack().await;
    assert_eq!(at_tail.data(1).await, ["second era"]);
    let status = server.subscribe(earliest()).await.end().await;
    let expected = format!(
        "these events cannot be read any more: version 1 of key ring {ring} was revoked; reading topic listens can go on at offset 2"
    );
    assert_eq!((status.code(), status.message()), (Code::FailedPrecondition, expected.as_str()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_does_not_read_keeps_no_revoke_waiting_and_gets_no_more_than_was_on_its_way() {
    let (server, vault) = Server::start_sealed().await;
    let topic = server.create("listens").await;
    let body = "x".repeat(16 << 10);
    let count = 2_000;
    let texts: Vec<String> = (0..count).map(|n| format!("{n:08}{body}")).collect();
    for part in texts.chunks(50) {
        server.publish(topic, &part.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
    // Both have more to send than all buffers on the way hold, and stand still, each on a connection of its own.
    let mut subscriber = server.subscribe(earliest()).await;
    assert_eq!(&subscriber.data(1).await[0][..8], "00000000");
    let query = api::Query { query: "SELECT * FROM listens".to_owned(), ..Default::default() };
    let mut other = server.other_client();
    let mut rows = other.en_sql(server.request(query)).await.unwrap().into_inner();
    assert_eq!(&data(&rows.message().await.unwrap().unwrap())[..8], "00000000");

    let ring = server.ring();
    revoke(&vault, ring, None).await;

    let mut seen = 1;
    let status = loop {
        match subscriber.next().await.expect("a status, not an end") {
            Ok(api::subscribe_reply::Embed::Event(event)) => {
                assert_eq!(data(&event)[..8], format!("{seen:08}"));
                seen += 1;
            }
            Ok(other) => panic!("not an event: {other:?}"),
            Err(status) => break status,
        }
    };
    // The ring is named to who looks before the next batch, and its version to who was about to open one.
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    let message = status.message();
    assert!(message.contains(&format!("key ring {ring} was revoked")), "{message}");
    assert!(seen < count, "all {seen} events");
    let mut seen = 1;
    let status = loop {
        match rows.message().await {
            Ok(row) => assert_eq!(data(&row.expect("a status, not an end"))[..8], format!("{seen:08}")),
            Err(status) => break status,
        }
        seen += 1;
    };
    assert_eq!(shown(&status).split(": ").next(), Some("FailedPrecondition"), "{status:?}");
    assert!(status.message().contains("was revoked") && seen < count, "{seen} rows, then {status:?}");
}
