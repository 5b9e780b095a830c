//! Topics and API keys with key rings of their own, with the keys of a real vault.

use ensign_proto::{ApiKeyId, Permission, RingId};
use tonic::Code;

use super::*;

impl Server {
    /// An access token of an API key with a key ring of its own.
    pub(super) async fn token_under(&self, ring: RingId) -> (String, ApiKeyId) {
        let org = self.catalog.view().project(self.project).unwrap().org;
        let permissions = [Permission::Publisher].into_iter().collect();
        let (name, project) = ("a device".to_owned(), Some(self.project));
        let new = NewApiKey { name, org, project, permissions, admin: false, ring: Some(ring) };
        let (key, credentials) = self.identity.create_api_key(new).await.unwrap();
        let (id, secret) = (credentials.client_id.as_str(), credentials.secret.expose());
        let arrived = tokio::time::Instant::now();
        let pair = self.identity.authenticate(id, secret.to_owned(), None, arrived).await.unwrap();
        (pair.access, key.id)
    }

    pub(super) async fn publisher_with(&self, token: &str) -> Publisher {
        let mut publisher = self.raw_publisher(token).await;
        publisher.send(api::publisher_request::Embed::OpenStream(api::OpenStream::default())).await;
        let ready = publisher.next().await.unwrap().unwrap();
        assert!(matches!(ready, api::publisher_reply::Embed::Ready(_)), "{ready:?}");
        publisher
    }

    async fn create_under(&self, name: &str, ring: RingId) -> TopicId {
        let (names, policies) = (vec![name.parse().unwrap()], crate::catalog::TopicPolicies::default());
        let made = self.catalog.create_topics(self.project, names, &policies, Some(ring)).await.unwrap();
        made[0].as_ref().unwrap().id
    }
}

fn from(topic: &str, start: api::subscription::Start) -> api::Subscription {
    api::Subscription { topics: vec![topic.to_owned()], start: Some(start), ..Default::default() }
}

fn earliest(topic: &str) -> api::Subscription {
    from(topic, api::subscription::Start::Earliest(true))
}

/// The revocation, which has to come to its end by itself.
async fn revoke(vault: &TestVault, ring: RingId) {
    let revoked = vault.revoke(ring, None);
    tokio::time::timeout(Duration::from_secs(20), revoked).await.expect("every use of the key ends");
}

#[tokio::test]
async fn revoking_the_ring_of_a_topic_ends_that_topic_and_no_other_until_it_is_bound_to_another_ring() {
    let (server, vault) = Server::start_sealed().await;
    let ring = vault.create_ring(server.project);
    let (own, other) = (server.create_under("own", ring).await, server.create("other").await);
    server.publish(own, &["a", "b"]).await;
    server.publish(other, &["c"]).await;
    let mut at_tail = server.subscribe(from("own", api::subscription::Start::Offset(3))).await;
    let mut elsewhere = server.subscribe(from("other", api::subscription::Start::Offset(2))).await;
    let mut publisher = server.publisher().await;
    publisher.event(other, b"d").await;
    publisher.ack().await;
    revoke(&vault, ring).await;

    let unreadable = format!("these events cannot be read any more: key ring {ring} was revoked");
    assert_eq!(at_tail.end().await.message(), unreadable);
    let status = server.query("SELECT * FROM own").await.unwrap_err();
    let past = format!("version 1 of key ring {ring} was revoked; reading topic own can go on at offset 3");
    assert!(status.message().ends_with(&past), "{status:?}");
    let mut refused = server.publisher().await;
    refused.event(own, b"no").await;
    let status = refused.end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(&format!("key ring {ring} was revoked")), "{status:?}");
    // The other topic notices nothing, and neither does the stream that published to it.
    publisher.event(other, b"e").await;
    publisher.ack().await;
    assert_eq!(elsewhere.data(2).await, ["d", "e"]);
    assert_eq!(server.query("SELECT * FROM other").await.unwrap(), ["c", "d", "e"]);

    let next = vault.create_ring(server.project);
    server.catalog.set_topic_ring(own, next).await.unwrap();
    let mut rebound = server.publisher().await;
    let taken = async {
        loop {
            rebound.event(own, b"f").await;
            match rebound.next().await {
                Some(Ok(api::publisher_reply::Embed::Ack(_))) => return,
                // This node's partition hears of it a moment later than its catalog.
                _ => rebound = server.publisher().await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), taken).await.expect("it takes events again");
    let mut reader = server.subscribe(from("own", api::subscription::Start::Offset(3))).await;
    assert_eq!(reader.data(1).await, ["f"], "what is under the new ring is read");
    assert_eq!(
        server.subscribe(earliest("own")).await.end().await.code(),
        Code::FailedPrecondition,
        "and the rest is not"
    );
}

#[tokio::test]
async fn what_an_api_key_with_a_ring_publishes_goes_with_that_ring_and_readers_are_told_where_to_go_on() {
    let (server, vault) = Server::start_sealed().await;
    let ring = vault.create_ring(server.project);
    let (one, two) = (server.create("one").await, server.create("two").await);
    let token = server.token_under(ring).await.0;
    let mut device = server.publisher_with(&token).await;
    let mut plain = server.publisher().await;
    for (at, topic) in [(0, one), (1, one), (2, two)] {
        plain.event(topic, format!("plain {at}").as_bytes()).await;
        plain.ack().await;
        for part in 0..2 {
            device.event(topic, format!("device {at}.{part}").as_bytes()).await;
            device.ack().await;
        }
    }
    plain.event(one, b"plain 3").await;
    plain.ack().await;
    assert_eq!(server.query("SELECT * FROM one").await.unwrap().len(), 7, "together, as long as all live");
    let mut at_tail = server.subscribe(from("one", api::subscription::Start::Offset(8))).await;
    revoke(&vault, ring).await;

    let status = device.end().await;
    assert_eq!(shown(&status), format!("FailedPrecondition: the topic cannot be written: key ring {ring} was revoked"));
    // From one living stretch to the next, by what the statuses say.
    let (mut read, mut next) = (Vec::new(), 1);
    while next < 8 {
        let mut reader = server.subscribe(from("one", api::subscription::Start::Offset(next))).await;
        loop {
            match reader.next().await.unwrap() {
                Ok(api::subscribe_reply::Embed::Event(event)) => {
                    next = event.offset + 1;
                    read.push(data(&event));
                }
                Ok(other) => panic!("not an event: {other:?}"),
                Err(status) => {
                    let message = status.message();
                    assert!(message.contains(&format!("version 1 of key ring {ring} was revoked")), "{message}");
                    let at = message.rsplit_once("reading topic one can go on at offset ").expect("where to go on").1;
                    next = at.parse().unwrap();
                    break;
                }
            }
            if next == 8 {
                break;
            }
        }
    }
    assert_eq!(read, ["plain 0", "plain 1", "plain 3"], "all that is not the device's, in two steps past what is");
    // Whoever has an API key without a ring goes on, and so does who follows them.
    plain.event(one, b"plain 4").await;
    plain.ack().await;
    assert_eq!(at_tail.data(1).await, ["plain 4"]);
    let status = server.query("SELECT * FROM two OFFSET 1").await.unwrap_err();
    assert!(status.message().ends_with("reading topic two can go on at offset 4"), "{status:?}");
}

#[tokio::test]
async fn an_api_key_whose_ring_is_disabled_is_nacked_with_the_remedy_and_others_go_on() {
    let (server, vault) = Server::start_sealed().await;
    let ring = vault.create_ring(server.project);
    let topic = server.create("shared").await;
    let token = server.token_under(ring).await.0;
    let (mut device, mut plain) = (server.publisher_with(&token).await, server.publisher().await);
    device.event(topic, b"before").await;
    device.ack().await;
    vault.disable(ring, None).await.unwrap();
    device.event(topic, b"meanwhile").await;
    let nack = device.nack().await;
    assert_eq!(nack.code(), api::nack::Code::PermissionDenied);
    assert!(nack.error.contains(&format!("`ensign key enable --ring {ring} --all`")), "{}", nack.error);
    plain.event(topic, b"plain").await;
    plain.ack().await;
    vault.enable(ring, None);
    let stored = async {
        loop {
            device.event(topic, b"after").await;
            match device.next().await.unwrap().unwrap() {
                api::publisher_reply::Embed::Ack(_) => return,
                api::publisher_reply::Embed::Nack(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                other => panic!("neither an ack nor a nack: {other:?}"),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), stored).await.expect("the same stream goes on");
    assert_eq!(server.query("SELECT * FROM shared").await.unwrap(), ["before", "plain", "after"]);
}
