//! Tokens that are no good, at every kind of call: each is refused with one status, and none leaves a stream waiting.

use tonic::metadata::AsciiMetadataValue;

use super::*;

const INVALID: &str = "Unauthenticated: invalid credentials";
const MISSING: &str = "Unauthenticated: missing credentials";

/// A call with these values of `authorization`.
fn with<T>(message: T, values: &[String]) -> Request<T> {
    let mut request = Request::new(message);
    for value in values {
        let value: AsciiMetadataValue = value.parse().unwrap();
        request.metadata_mut().append("authorization", value);
    }
    request
}

/// The status that ends a stream of replies. It has to come by itself: the client of a silent stream sends nothing.
async fn end_of<T>(mut replies: Streaming<T>) -> Status {
    let end = async {
        loop {
            match replies.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return Status::ok(""),
                Err(status) => return status,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), end).await.expect("a refused stream ends")
}

/// How every kind of call ends with these values of `authorization`: one of its own, streams of replies, and streams both ways,
/// where the client speaks first or waits.
async fn ends(server: &Server, values: &[String]) -> Vec<(&'static str, String)> {
    let mut client = server.client();
    let mut ends = Vec::new();
    let mut note = |call, status: Status| ends.push((call, shown(&status)));
    let unary = |outcome: Option<Status>| outcome.unwrap_or_else(|| Status::ok(""));
    note("list topics", unary(client.list_topics(with(api::PageInfo::default(), values)).await.err()));
    note("topic names", unary(client.topic_names(with(api::PageInfo::default(), values)).await.err()));
    let name = api::TopicName { name: "listens".to_owned(), ..Default::default() };
    note("topic exists", unary(client.topic_exists(with(name, values)).await.err()));
    let new = api::Topic { name: "another".to_owned(), ..Default::default() };
    note("create topic", unary(client.create_topic(with(new, values)).await.err()));
    note("info", unary(client.info(with(api::InfoRequest::default(), values)).await.err()));
    let query = api::Query { query: "SELECT * FROM listens".to_owned(), ..Default::default() };
    note("query", end_of(client.en_sql(with(query, values)).await.unwrap().into_inner()).await);

    let open = api::publisher_request::Embed::OpenStream(api::OpenStream::default());
    for (call, opening) in [("publish", Some(open)), ("publish in silence", None)] {
        let (requests, outgoing) = mpsc::channel(1);
        let replies = client.publish(with(ReceiverStream::new(outgoing), values)).await.unwrap().into_inner();
        if opening.is_some() {
            requests.send(api::PublisherRequest { embed: opening }).await.unwrap();
        }
        note(call, end_of(replies).await);
    }
    let open = api::subscribe_request::Embed::Subscription(api::Subscription::default());
    for (call, opening) in [("subscribe", Some(open)), ("subscribe in silence", None)] {
        let (requests, outgoing) = mpsc::channel(1);
        let replies = client.subscribe(with(ReceiverStream::new(outgoing), values)).await.unwrap().into_inner();
        if opening.is_some() {
            requests.send(api::SubscribeRequest { embed: opening }).await.unwrap();
        }
        note(call, end_of(replies).await);
    }
    ends
}

async fn assert_refused(server: &Server, what: &str, values: &[String], expected: &str) {
    for (call, end) in ends(server, values).await {
        assert_eq!(end, expected, "{what}: {call}");
    }
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// A login at `identity`, which shares the server's catalog or has its own.
async fn login(identity: &Identity, project: ProjectId, org: ensign_proto::OrgId) -> crate::identity::TokenPair {
    let permissions = PermissionSet::api_key();
    let new = NewApiKey {
        name: "another key".to_owned(),
        org,
        project: Some(project),
        permissions,
        admin: false,
        ring: None,
    };
    let (_, credentials) = identity.create_api_key(new).await.unwrap();
    let (id, secret) = (credentials.client_id.as_str(), credentials.secret.expose().to_owned());
    identity.authenticate(id, secret, None, tokio::time::Instant::now()).await.unwrap()
}

#[tokio::test]
async fn an_absent_or_malformed_token_is_refused_by_every_kind_of_call() {
    let server = Server::start().await;
    server.create("listens").await;
    assert_refused(&server, "nothing", &[], MISSING).await;
    let token = &server.token;
    let cut = &token[..token.len() - 4];
    let (head, signature) = token.rsplit_once('.').unwrap();
    let forged = format!("{head}.{}", signature.chars().rev().collect::<String>());
    let unsigned = format!("{head}.");
    let cases = [
        ("garbage", "garbage".to_owned()),
        ("an empty token", bearer("")),
        ("three words", bearer("a.b.c")),
        ("another scheme", format!("Basic {token}")),
        ("a prefix in small letters", format!("bearer {token}")),
        ("a token cut short", bearer(cut)),
        ("a signature that is another", bearer(&forged)),
        ("no signature", bearer(&unsigned)),
        ("two spaces", format!("Bearer  {token}")),
    ];
    // Together, since each has to wait until its silent streams are given up on.
    let refusals =
        cases.iter().map(|(what, value)| assert_refused(&server, what, std::slice::from_ref(value), INVALID));
    futures::future::join_all(refusals).await;
    // The first that verifies counts, whatever comes before it.
    let values = ["garbage".to_owned(), bearer("a.b.c"), bearer(token)];
    let names = server.client().topic_names(with(api::PageInfo::default(), &values)).await;
    assert_eq!(names.unwrap().into_inner().topic_names.len(), 1);
    assert!(server.catalog.view().topics(server.project).len() == 1, "a refused call made a topic");
}

#[tokio::test]
async fn an_expired_token_is_refused_by_every_kind_of_call_and_open_streams_go_on() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut publisher = server.publisher().await;
    let mut subscriber = server.subscribe(api::Subscription::default()).await;
    server.token_clock.advance(Duration::from_hours(1));
    assert_refused(&server, "an expired token", &[bearer(&server.token)], INVALID).await;
    publisher.event(topic, b"still here").await;
    publisher.ack().await;
    assert_eq!(subscriber.data(1).await, ["still here"], "a stream outlives the token that it began with");
}

#[tokio::test]
async fn a_token_for_another_use_or_another_cluster_is_refused_by_every_kind_of_call() {
    let server = Server::start().await;
    server.create("listens").await;
    let org = server.catalog.view().project(server.project).unwrap().org;
    let pair = login(&server.identity, server.project, org).await;
    assert_refused(&server, "a refresh token", &[bearer(&pair.refresh)], INVALID).await;

    // The same signing key and the same API keys, for somebody else's ears.
    let cluster = ClusterId::from_bytes([9; 16]);
    let sibling = |config| {
        let (clock, rng) = (server.token_clock.clone(), Arc::new(OsRng));
        Identity::new(config, server.catalog.clone(), server.secrets.clone(), clock, rng)
    };
    let elsewhere = sibling(IdentityConfig { audience: "urn:elsewhere".to_owned(), ..token_config(cluster) });
    let pair = login(&elsewhere, server.project, org).await;
    assert_refused(&server, "another audience", &[bearer(&pair.access)], INVALID).await;
    let stranger = sibling(IdentityConfig { issuer: "urn:stranger".to_owned(), ..token_config(cluster) });
    let pair = login(&stranger, server.project, org).await;
    assert_refused(&server, "another issuer", &[bearer(&pair.access)], INVALID).await;

    let other = Server::start().await;
    let token = bearer(&other.token);
    assert!(other.client().list_topics(with(api::PageInfo::default(), std::slice::from_ref(&token))).await.is_ok());
    assert_refused(&server, "a token of another cluster", std::slice::from_ref(&token), INVALID).await;
}

#[tokio::test]
async fn a_token_whose_api_key_was_revoked_is_refused_by_every_kind_of_call() {
    let server = Server::start().await;
    server.create("listens").await;
    let (token, key) = server.token(server.project, PermissionSet::api_key()).await;
    let token = bearer(&token);
    let listed = server.client().list_topics(with(api::PageInfo::default(), std::slice::from_ref(&token))).await;
    assert!(listed.is_ok(), "good so far, and remembered as such");
    server.identity.revoke_api_key(key).await.unwrap();
    assert_refused(&server, "a revoked key", std::slice::from_ref(&token), INVALID).await;
}
