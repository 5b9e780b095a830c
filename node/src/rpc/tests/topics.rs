use ensign_proto::Permission;

use super::*;

fn named(name: &str) -> api::Topic {
    api::Topic { name: name.to_owned(), ..Default::default() }
}

#[tokio::test]
async fn a_topic_is_made_listed_found_and_counted() {
    let server = Server::start().await;
    let mut client = server.client();
    let made = client.create_topic(server.request(named("listens"))).await.unwrap().into_inner();
    assert_eq!((made.id.len(), made.project_id[..].len(), made.name.as_str()), (16, 16, "listens"));
    assert_eq!(made.status(), api::TopicState::Ready);
    let policy = made.deduplication.as_ref().unwrap();
    assert_eq!((policy.strategy, policy.offset), (1, 1));
    assert!(made.created.is_some() && made.created == made.modified);
    let id = TopicId::try_from(&made.id[..]).unwrap();
    for n in 0..4 {
        server.create(&format!("t{n}")).await;
    }
    let page = |size, token: &str| server.request(api::PageInfo { page_size: size, next_page_token: token.to_owned() });
    let first = client.list_topics(page(3, "")).await.unwrap().into_inner();
    let second = client.list_topics(page(3, &first.next_page_token)).await.unwrap().into_inner();
    let listed: Vec<_> = first.topics.iter().chain(&second.topics).collect();
    assert!(listed.is_sorted_by_key(|topic| &topic.id), "pages follow the ids, which one millisecond leaves to chance");
    let mut names: Vec<_> = listed.iter().map(|topic| topic.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["listens", "t0", "t1", "t2", "t3"]);
    assert!(second.next_page_token.is_empty());
    let status = client.list_topics(page(3, "garbled")).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);

    let by_hash = client.topic_names(page(0, "")).await.unwrap().into_inner();
    let entry = by_hash.topic_names.iter().find(|entry| entry.topic_id == id.to_string()).unwrap();
    assert_eq!(entry.name, ensign_proto::topic_name_hash("listens").to_string());

    let found = client.retrieve_topic(server.request(api::Topic { id: made.id.clone(), ..Default::default() })).await;
    assert_eq!(found.unwrap().into_inner().name, "listens");

    server.publish(id, &["a", "b", "c"]).await;
    let info = client
        .info(server.request(api::InfoRequest { topics: vec![made.id.clone()], ..Default::default() }))
        .await
        .unwrap()
        .into_inner();
    assert_eq!((info.num_topics, info.num_readonly_topics, info.events, info.topics.len()), (1, 0, 3, 1));
    let topic = &info.topics[0];
    assert_eq!((topic.events, topic.event_offset_id.len(), topic.types.len()), (3, 10, 1));
    let kind = &topic.types[0];
    assert_eq!((kind.events, kind.mimetype, kind.r#type.as_ref().unwrap().name.as_str()), (3, 1, "Unspecified"));
    let mut sizes = 0;
    let mut rows = client
        .en_sql(server.request(api::Query { query: "SELECT * FROM listens".to_owned(), ..Default::default() }))
        .await
        .unwrap()
        .into_inner();
    while let Some(row) = rows.message().await.unwrap() {
        sizes += row.encoded_len() as u64;
    }
    assert_eq!(topic.data_size_bytes, sizes, "the size of events as they are delivered");
    let all = client.info(server.request(api::InfoRequest::default())).await.unwrap().into_inner();
    assert_eq!((all.num_topics, all.events), (5, 3));
    let bad = client
        .info(server.request(api::InfoRequest { topics: vec![Bytes::from_static(b"x")], ..Default::default() }))
        .await
        .unwrap_err();
    assert_eq!(shown(&bad), "InvalidArgument: could not parse topic id in info request filter");
}

#[tokio::test]
async fn names_and_ids_that_are_none_are_refused_as_documented() {
    let server = Server::start().await;
    let mut client = server.client();
    client.create_topic(server.request(named("taken"))).await.unwrap();
    let foreign = Bytes::copy_from_slice(&[1; 16]);
    let refusals = [
        (named(""), "InvalidArgument: missing name field"),
        (named(&"x".repeat(513)), "InvalidArgument: topic name is too long"),
        (named("with/slash"), "InvalidArgument: topic name is invalid"),
        (named("1digit"), "InvalidArgument: topic name is invalid"),
        (named("taken"), "AlreadyExists: topic name already exists in project"),
        (api::Topic { id: Bytes::from_static(b"x"), ..named("a") }, "InvalidArgument: cannot parse id field"),
        (
            api::Topic { project_id: Bytes::from_static(b"x"), ..named("a") },
            "InvalidArgument: invalid project id field",
        ),
        (api::Topic { project_id: foreign, ..named("a") }, "PermissionDenied: not authorized to perform this action"),
    ];
    for (topic, refusal) in refusals {
        let status = client.create_topic(server.request(topic)).await.unwrap_err();
        assert_eq!(shown(&status), refusal);
    }
    client.create_topic(server.request(named(&"x".repeat(512)))).await.unwrap();
    let retrieve = async |id: &[u8]| {
        let wanted = api::Topic { id: Bytes::copy_from_slice(id), ..Default::default() };
        shown(&server.client().retrieve_topic(server.request(wanted)).await.unwrap_err())
    };
    assert_eq!(retrieve(b"").await, "InvalidArgument: missing topic id field");
    assert_eq!(retrieve(b"short").await, "InvalidArgument: invalid topic id field");
    assert_eq!(retrieve(&[7; 16]).await, "NotFound: topic not found");
    let delete = async |id: &str, operation| {
        let wanted = api::TopicMod { id: id.to_owned(), operation };
        shown(&server.client().delete_topic(server.request(wanted)).await.unwrap_err())
    };
    let absent = TopicId::from_bytes([7; 16]).to_string();
    assert_eq!(delete("", 0).await, "InvalidArgument: invalid operation field");
    assert_eq!(delete("", 1).await, "InvalidArgument: missing id field");
    assert_eq!(delete("short", 1).await, "InvalidArgument: invalid id field");
    assert_eq!(delete(&absent, 2).await, "NotFound: topic not found");
    let exists = async |name: &str, topic_id: &str, project_id: &str| {
        let asked =
            api::TopicName { name: name.to_owned(), topic_id: topic_id.to_owned(), project_id: project_id.to_owned() };
        match server.client().topic_exists(server.request(asked)).await {
            Ok(reply) => format!("{} {}", reply.get_ref().query, reply.get_ref().exists),
            Err(status) => shown(&status),
        }
    };
    assert_eq!(exists("taken", "", "").await, r#"name="taken" true"#);
    assert_eq!(exists("no/name", "", "").await, r#"name="no/name" false"#);
    assert_eq!(exists("", &absent, "").await, format!("topic={absent:?} false"));
    assert_eq!(exists("", "", "").await, "InvalidArgument: must specify either or both topic name and id");
    assert_eq!(exists("x", "", "short").await, "InvalidArgument: invalid project id field");
    assert_eq!(exists("x", "", &absent).await, "PermissionDenied: not authorized to perform this action");
}

#[tokio::test]
async fn topics_of_other_projects_are_not_there() {
    let server = Server::start().await;
    let topic = server.create("mine").await;
    let org = server.catalog.view().project(server.project).unwrap().org;
    let other = server.identity.ensure_project(org, "second").await.unwrap().id;
    let (stranger, _) = server.token(other, PermissionSet::api_key()).await;
    let mut client = server.client();
    let id = Bytes::copy_from_slice(topic.as_bytes());
    let wanted = api::Topic { id: id.clone(), ..Default::default() };
    let status = client.retrieve_topic(with_token(wanted, &stranger)).await.unwrap_err();
    assert_eq!(shown(&status), "NotFound: topic not found");
    let wanted = api::TopicMod { id: topic.to_string(), operation: 2 };
    assert_eq!(
        shown(&client.delete_topic(with_token(wanted, &stranger)).await.unwrap_err()),
        "NotFound: topic not found"
    );
    let info = client
        .info(with_token(api::InfoRequest { topics: vec![id], ..Default::default() }, &stranger))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.num_topics, 0);
    let query = api::Query { query: "SELECT * FROM mine".to_owned(), ..Default::default() };
    let mut rows = client.en_sql(with_token(query, &stranger)).await.unwrap().into_inner();
    assert_eq!(shown(&rows.message().await.unwrap_err()), "InvalidArgument: unknown topic in query");
    let names = client.topic_names(with_token(api::PageInfo::default(), &stranger)).await.unwrap().into_inner();
    assert!(names.topic_names.is_empty());
}

#[tokio::test]
async fn every_call_asks_for_its_permission() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let mut permissions = PermissionSet::EMPTY;
    permissions.insert(Permission::MetricsRead);
    let (token, _) = server.token(server.project, permissions).await;
    let mut client = server.client();
    let denied = "PermissionDenied: not authorized to perform this action";
    let statuses = [
        client.list_topics(with_token(api::PageInfo::default(), &token)).await.unwrap_err(),
        client.create_topic(with_token(named("x"), &token)).await.unwrap_err(),
        client.retrieve_topic(with_token(api::Topic::default(), &token)).await.unwrap_err(),
        client.topic_names(with_token(api::PageInfo::default(), &token)).await.unwrap_err(),
        client.topic_exists(with_token(api::TopicName::default(), &token)).await.unwrap_err(),
        client.set_topic_policy(with_token(api::TopicPolicy::default(), &token)).await.unwrap_err(),
        client.info(with_token(api::InfoRequest::default(), &token)).await.unwrap_err(),
        client.explain(with_token(api::Query::default(), &token)).await.unwrap_err(),
        client
            .delete_topic(with_token(api::TopicMod { id: topic.to_string(), operation: 1 }, &token))
            .await
            .unwrap_err(),
        client
            .delete_topic(with_token(api::TopicMod { id: topic.to_string(), operation: 2 }, &token))
            .await
            .unwrap_err(),
    ];
    for status in statuses {
        assert_eq!(shown(&status), denied);
    }
    let unauthenticated = client.list_topics(Request::new(api::PageInfo::default())).await.unwrap_err();
    assert_eq!(shown(&unauthenticated), "Unauthenticated: missing credentials");
    let state = client.status(Request::new(api::HealthCheck::default())).await.unwrap().into_inner();
    assert_eq!(state.status(), api::service_state::Status::Healthy);
    assert!(state.uptime.is_some() && state.not_before.is_some() && state.not_after.is_some());
}

#[tokio::test]
async fn policies_are_checked_before_they_are_declined() {
    let server = Server::start().await;
    let topic = server.create("listens").await;
    let set = async |policy: api::TopicPolicy| match server.client().set_topic_policy(server.request(policy)).await {
        Ok(reply) => format!("{:?}", reply.get_ref().state()),
        Err(status) => shown(&status),
    };
    let policy = |id: &str, strategy, sharding_strategy| api::TopicPolicy {
        id: id.to_owned(),
        deduplication_policy: Some(api::Deduplication { strategy, ..Default::default() }),
        sharding_strategy,
    };
    let id = topic.to_string();
    assert_eq!(set(api::TopicPolicy::default()).await, "InvalidArgument: missing id field");
    assert_eq!(set(policy(&id, 0, 0)).await, "InvalidArgument: no policies defined to set on topic");
    assert_eq!(set(policy("short", 1, 0)).await, "InvalidArgument: invalid id field");
    assert_eq!(set(policy(&id, 1, 0)).await, "Ready");
    assert_eq!(set(policy(&id, 4, 0)).await, "InvalidArgument: no keys specified for key based hashing");
    let sharding = "Unimplemented: changing the sharding strategy of a topic is currently not supported";
    assert_eq!(set(api::TopicPolicy { deduplication_policy: None, ..policy(&id, 0, 2) }).await, sharding);
    assert!(set(policy(&id, 2, 0)).await.starts_with("Unimplemented: deduplication by content is not supported yet"));
}
