//! Quotas as publishers, readers and other tenants meet them.

use ensign_proto::pb::ensign::v1beta1::nack::Code as NackCode;
use tonic::Code;

use super::*;
use crate::catalog::{Change, Limit, QuotaChange};

impl Server {
    async fn limit(&self, project: ProjectId, change: QuotaChange) {
        self.catalog.set_quota(Some(project), change).await.unwrap();
    }

    /// Another tenant's project, with a topic, and a token for it.
    async fn neighbour(&self) -> (String, TopicId) {
        let org = self.identity.ensure_organization("Neighbours").await.unwrap();
        let project = self.identity.ensure_project(org.id, "next door").await.unwrap().id;
        let (token, _) = self.token(project, PermissionSet::api_key()).await;
        let wanted = api::Topic { name: "diary".to_owned(), ..Default::default() };
        let topic = self.client().create_topic(with_token(wanted, &token)).await.unwrap().into_inner();
        (token, TopicId::try_from(&topic.id[..]).unwrap())
    }

    async fn publisher_of(&self, token: &str) -> Publisher {
        let mut publisher = self.raw_publisher(token).await;
        publisher.send(api::publisher_request::Embed::OpenStream(api::OpenStream::default())).await;
        let ready = publisher.next().await.unwrap().unwrap();
        assert!(matches!(ready, api::publisher_reply::Embed::Ready(_)), "{ready:?}");
        publisher
    }
}

/// Opens a publish stream, if the server lets it.
async fn one_more_stream(mut client: Client, server: &Server) -> Result<Publisher, Status> {
    let (requests, outgoing) = mpsc::channel(1);
    let open = api::publisher_request::Embed::OpenStream(api::OpenStream::default());
    requests.send(api::PublisherRequest { embed: Some(open) }).await.unwrap();
    let replies = client.publish(server.request(ReceiverStream::new(outgoing))).await?.into_inner();
    let mut publisher = Publisher { requests, replies, sent: 0 };
    publisher.next().await.expect("a reply or an end")?;
    Ok(publisher)
}

fn at(limit: u64) -> Change {
    Change::Set(Limit::At(limit))
}

fn hint(status: &Status, key: &str) -> Option<String> {
    status.metadata().get(key).map(|value| value.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_client_that_opens_ten_thousand_streams_gets_its_share_and_its_neighbour_never_notices() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let (token, diary) = server.neighbour().await;
    server.limit(server.project, QuotaChange { streams: at(50), ..Default::default() }).await;
    let (mut open, mut refused) = (Vec::new(), Vec::new());
    // Kept open by the client, also where the server has ended them.
    for round in 0..100 {
        let connection = server.other_client();
        let attempts = (0..100).map(|_| one_more_stream(connection.clone(), &server));
        for attempt in futures::future::join_all(attempts).await {
            match attempt {
                Ok(publisher) => open.push(publisher),
                Err(status) => refused.push(status),
            }
        }
        if round % 20 == 19 {
            let mut neighbour = server.publisher_of(&token).await;
            neighbour.event(diary, b"dear").await;
            neighbour.ack().await;
            neighbour.close().await;
        }
    }
    let count = refused.len();
    let refused = refused.pop();
    assert_eq!((open.len(), count), (50, 9_950));
    let refused = refused.unwrap();
    let expected = "ResourceExhausted: the project has its limit of 50 streams open on this node: close some, use fewer streams \
                    for more topics, or ask an operator to raise the quota (ensign quota set --streams)";
    assert_eq!(shown(&refused), expected);
    assert_eq!(hint(&refused, "ensign-quota").as_deref(), Some("streams"));
    assert_eq!(hint(&refused, "ensign-retry-after-ms").as_deref(), Some("1000"));
    assert!(!refused.details().is_empty(), "RetryInfo");
    // Readers share the places, and those that are open work on.
    let status = server.raw_subscriber(api::Subscription::default()).await.end().await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap_err().code(), Code::ResourceExhausted);
    open[0].event(topic, b"still").await;
    open[0].ack().await;
    // A place that is given back is there for the next one.
    open.pop().unwrap().close().await;
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap(), ["still"]);
}

#[tokio::test]
async fn who_publishes_too_fast_is_slowed_down_and_loses_nothing() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    server.limit(server.project, QuotaChange { events_per_second: at(200), ..Default::default() }).await;
    let begun = tokio::time::Instant::now();
    let mut publisher = server.publisher().await;
    // Faster than it may, and within what it is waited for.
    let names: Vec<_> = (0..600).map(|n| format!("e{n}")).collect();
    for batch in names.chunks(20) {
        for name in batch {
            publisher.event(topic, name.as_bytes()).await;
        }
        for _ in batch {
            publisher.ack().await;
        }
    }
    // A burst of one second at most, and one run, came for free.
    assert!(begun.elapsed() >= Duration::from_millis(1_500), "{:?}", begun.elapsed());
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap(), names);
}

#[tokio::test]
async fn events_beyond_the_rate_are_nacked_with_a_hint_after_a_wait_and_the_stream_lives_on() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let (token, diary) = server.neighbour().await;
    server.limit(server.project, QuotaChange { bytes_per_second: at(0), ..Default::default() }).await;
    let mut publisher = server.publisher().await;
    publisher.event(topic, b"too much").await;
    // Others are served meanwhile.
    let mut neighbour = server.publisher_of(&token).await;
    neighbour.event(diary, b"dear").await;
    neighbour.ack().await;
    let nack = publisher.nack().await;
    assert_eq!(nack.code(), NackCode::ConsensusFailure);
    assert!(nack.error.contains("may publish 0 bytes a second"), "{}", nack.error);
    assert!(nack.error.contains("try again in") && nack.error.contains("quota set"), "{}", nack.error);
    server.limit(server.project, QuotaChange { bytes_per_second: Change::Unset, ..Default::default() }).await;
    publisher.event(topic, b"fine").await;
    publisher.ack().await;
    let totals = publisher.close().await;
    assert_eq!((totals.acks, totals.nacks), (1, 1));
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap(), ["fine"]);
}

#[tokio::test]
async fn a_limit_that_is_raised_lets_those_in_who_wait_for_it() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    server.limit(server.project, QuotaChange { events_per_second: at(1), ..Default::default() }).await;
    let mut publisher = server.publisher().await;
    for _ in 0..3 {
        publisher.event(topic, b"one").await;
        publisher.ack().await;
    }
    publisher.event(topic, b"two").await;
    server
        .limit(server.project, QuotaChange { events_per_second: Change::Set(Limit::Unlimited), ..Default::default() })
        .await;
    publisher.ack().await;
}

#[tokio::test]
async fn a_project_that_stores_all_it_may_is_told_what_to_do_and_reads_on() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let (token, diary) = server.neighbour().await;
    server.limit(server.project, QuotaChange { stored_bytes: at(10_000), ..Default::default() }).await;
    let mut publisher = server.publisher().await;
    let mut stored = 0;
    let nack = loop {
        publisher.event(topic, &[b'x'; 1_000]).await;
        match publisher.next().await.unwrap().unwrap() {
            api::publisher_reply::Embed::Ack(_) => stored += 1,
            api::publisher_reply::Embed::Nack(nack) => break nack,
            other => panic!("{other:?}"),
        }
        // Other nodes would be heard of with the next report; here what was let in counts at once.
        assert!(stored < 40, "the quota does not hold");
    };
    assert!(stored >= 9, "{stored}");
    assert_eq!(nack.code(), NackCode::ConsensusFailure);
    assert!(nack.error.contains("may store 10000: destroy topics"), "{}", nack.error);
    assert!(!nack.error.contains("try again in"), "time alone does not help: {}", nack.error);
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap().len(), stored);
    let mut neighbour = server.publisher_of(&token).await;
    neighbour.event(diary, b"dear").await;
    neighbour.ack().await;
    server.limit(server.project, QuotaChange { stored_bytes: at(1 << 30), ..Default::default() }).await;
    publisher.event(topic, b"more").await;
    publisher.ack().await;
}

#[tokio::test]
async fn topics_beyond_the_quota_are_not_made() {
    let server = Server::start().await;
    server.catalog.set_quota(None, QuotaChange { topics: at(2), ..Default::default() }).await.unwrap();
    server.create("one").await;
    server.create("two").await;
    let wanted = api::Topic { name: "three".to_owned(), ..Default::default() };
    let refused = server.client().create_topic(server.request(wanted)).await.unwrap_err();
    let expected = "ResourceExhausted: the project has its limit of 2 topics: destroy topics that are no longer needed, or ask \
                    an operator to raise the quota (ensign quota set --topics)";
    assert_eq!(shown(&refused), expected);
    assert_eq!(hint(&refused, "ensign-quota").as_deref(), Some("topics"));
    assert_eq!(hint(&refused, "ensign-retry-after-ms"), None);
    let (_, _) = server.neighbour().await;
}

#[tokio::test]
async fn a_flood_that_is_stuck_leaves_memory_for_other_projects() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let (token, diary) = server.neighbour().await;
    // As a project whose events are not committed holds it, on as many streams as it takes.
    let room = &server.shared.publish_room;
    let mut held = Vec::new();
    while let Some(share) = futures::FutureExt::now_or_never(room.acquire(server.project, 16 << 20)) {
        held.push(share);
    }
    assert_eq!(held.len(), 8, "half of 256 MiB");
    let mut stuck = server.publisher().await;
    stuck.event(topic, &vec![b'x'; 1 << 20]).await;
    let mut neighbour = server.publisher_of(&token).await;
    neighbour.event(diary, &vec![b'y'; 4 << 20]).await;
    neighbour.ack().await;
    // The flood's own next event fits no more, and waits until something of it is settled.
    assert_eq!(room.guests(), 9);
    held.clear();
    stuck.ack().await;
}

/// An event with a number of its publisher's.
fn numbered(topic: TopicId, sequence: u64) -> api::EventWrapper {
    let session = ensign_proto::SessionId::new(1_700_000_000_000, [4; 10]);
    api::EventWrapper {
        topic_id: Bytes::copy_from_slice(topic.as_bytes()),
        event: event(format!("n{sequence}").as_bytes()),
        producer_session: Bytes::copy_from_slice(session.as_bytes()),
        producer_epoch: 1,
        producer_sequence: sequence,
        ..Default::default()
    }
}

#[tokio::test]
async fn a_retry_of_what_is_stored_is_never_nacked_for_what_has_changed_since() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut publisher = server.publisher().await;
    publisher.wrapper(numbered(topic, 1)).await;
    let offset = publisher.ack().await.offset;
    // Its answer was lost, say, and the project has used up its rate when the publisher comes back: it is told to come again.
    server.limit(server.project, QuotaChange { events_per_second: at(0), ..Default::default() }).await;
    let mut again = server.publisher().await;
    again.wrapper(numbered(topic, 1)).await;
    let status = again.end().await;
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(hint(&status, "ensign-retry-after-ms").is_some() && !status.details().is_empty());
    server.limit(server.project, QuotaChange { events_per_second: Change::Unset, ..Default::default() }).await;
    // Or the topic takes nothing new any more. What is here is acknowledged where it is, and nothing else is.
    server.catalog.archive_topic(topic).await.unwrap();
    let mut again = server.publisher().await;
    again.wrapper(numbered(topic, 1)).await;
    assert_eq!(again.ack().await.offset, offset);
    again.wrapper(numbered(topic, 2)).await;
    assert_eq!(again.nack().await.code(), NackCode::TopicArchived);
    assert_eq!(server.query("SELECT * FROM listens").await.unwrap(), ["n1"]);
}
